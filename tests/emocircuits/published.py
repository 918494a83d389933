"""Published formulas as hooks on a model: full attention matrices, a whole sequence at once, no code of the package.

The reference runs the prompt and the generated tokens as one sequence, without a cache; what a row or key is comes from
positions in ``input_ids``.
"""

import contextlib
import dataclasses as dc

import models
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from emocircuits import patch

STEPS = 4
SUPPRESS = [models.IMAGE, models.PAD]
LAYERS, HEADS, DIM, NEURONS = 3, 4, 8, 48


@dc.dataclass
class Where:
    """Bool masks ``[B, N]`` over the columns of a left-padded sequence whose prompt ends at column ``prompt - 1``."""

    image: torch.Tensor
    before: torch.Tensor  # text before the image
    after: torch.Tensor  # text after it, last prompt token and generated ones included
    emits: torch.Tensor  # rows that emit a token: the last prompt row and every generated one
    generated: torch.Tensor

    @classmethod
    def of(cls, inputs, generated):
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        prompt = ids.shape[1]
        columns = torch.arange(prompt + generated)
        grow = lambda m, value: torch.nn.functional.pad(m, (0, generated), value=value)  # noqa: E731
        image = grow((ids == models.IMAGE) & mask, False)
        seen = image.cumsum(1) > 0
        real = grow(mask, True)
        rows = torch.ones(ids.shape[0], 1, dtype=torch.bool)
        return cls(
            image=image,
            before=real & ~seen,
            after=real & seen & ~image,
            emits=rows & (columns >= prompt - 1),
            generated=rows & (columns >= prompt),
        )


def block(rows, keys):
    """``[B, 1, N, N]``: these rows and these keys."""
    return rows[:, None, :, None] & keys[:, None, None, :]


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    logits, weights = module._published
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    s = query @ key.mT * scaling
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1e30
    s = logits(module.layer_idx, s).masked_fill(~visible[:, :, : s.shape[2], : s.shape[3]], -torch.inf)
    p = weights(module.layer_idx, torch.nan_to_num(s.softmax(-1)))
    return (p @ value).transpose(1, 2), None


AttentionInterface.register("published", _attention)
AttentionMaskInterface.register("published", eager_mask)


def unchanged(layer, x):
    return x


@contextlib.contextmanager
def published(
    model,
    logits=unchanged,
    weights=unchanged,
    z=unchanged,
    neurons=unchanged,
    mlp=unchanged,
    pre=unchanged,
    post=unchanged,
):
    """The model with formulas: of logits and weights ``[B, H, N, N]``, z ``[B, N, H, D]``, others ``[B, N, d]``."""
    text = model.model.language_model
    old, handles = text.config._attn_implementation_internal, []

    def split(layer, x):
        return z(layer, x.unflatten(-1, (HEADS, DIM))).flatten(-2)

    def output(f, n):
        return lambda m, a, out: (f(n, out[0]), *out[1:]) if isinstance(out, tuple) else f(n, out)

    try:
        text.config._attn_implementation_internal = "published"
        for n, layer in enumerate(text.layers):
            layer.self_attn._published = (logits, weights)
            handles += [
                layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, n=n: (split(n, a[0]),)),
                layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, n=n: (neurons(n, a[0]),)),
                layer.mlp.register_forward_hook(output(mlp, n)),
                layer.register_forward_pre_hook(lambda m, a, n=n: (pre(n, a[0]), *a[1:])),
                layer.register_forward_hook(output(post, n)),
            ]
        yield
    finally:
        text.config._attn_implementation_internal = old
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reference(model, inputs, tokens, **formulas):
    """Logits ``[B, T, V]`` that chose ``tokens [B, T]``."""
    inputs = dict(inputs)
    n = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[:, :-1]], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[:, :-1])], 1)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with published(model, **formulas):
        return model(**inputs, use_cache=False).logits[:, n - 1 :]


@torch.no_grad()
def generate(model, inputs, plan, **options):
    """Greedy tokens ``[B, T]`` of the patched model, and the logits they came from (generate() rounds its own)."""
    steps = []
    with patch(model, plan):
        hook = model.lm_head.register_forward_hook(lambda m, a, out: steps.append(out[:, -1]))
        out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=SUPPRESS, **options)
        hook.remove()
    return out[:, inputs["input_ids"].shape[1] :], torch.stack(steps, 1)


def check(model, inputs, plan, tolerance=1e-10, options=None, **formulas):
    """A patched generation equals the formulas, and the formulas do something."""
    tokens, steps = generate(model, inputs, plan, **(options or {}))
    expected = reference(model, inputs, tokens, **formulas)
    assert (steps - expected).abs().max() <= tolerance * expected.abs().max()
    plain = reference(model, inputs, tokens)
    assert (plain - expected).abs().max() > 1e-3 * expected.abs().max(), "the formula changed nothing"
