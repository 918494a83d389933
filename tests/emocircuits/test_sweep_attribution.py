"""Attribution against finite differences of the hook loop and against autograd written out by hand, in float64."""

from __future__ import annotations

import math

import pytest
import sweep_oracle as oracle
import torch
from test_sweep_engine import FAMILIES, HEADS, A, B, difference, model_width, pair
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

from emocircuits.sweep import Sweep, kl, log_prob, logit_diff, projection
from emocircuits.sweep.generated import generated


@pytest.fixture(autouse=True)
def _norms(monkeypatch):
    """These families normalise in float32 whatever the model's dtype, which differences would not see through."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for kind in (modeling_llama.LlamaRMSNorm, modeling_qwen2.Qwen2RMSNorm):
        monkeypatch.setattr(kind, "forward", norm)


UNITS = {"heads": HEADS, "neurons": [list(range(16)), list(range(16, 48))]}


@torch.no_grad()
def slopes(model, base, source, kind, metric=difference, positions="each", units=None, fill=None, where=oracle.place):
    """``base + d m / d step`` of a patch that goes one step from the base to the source, by central differences."""
    own = oracle.record(model, base, kind, where)
    new = oracle.record(model, source, kind, where)
    start, h, total = float(metric(model(**base).logits)), 1e-5, base["input_ids"].shape[1]
    columns = [list(range(total))] if positions == "all" else [[c] for c in range(total)]
    table = []
    for l in sorted(own):
        to = new[l] if fill is None else fill(new[l])
        ends = [own[l] + by * h * (to - own[l]) for by in (1, -1)]
        for cs in columns:
            for e in [slice(None)] if units is None else units:
                up, down = (float(metric(oracle.patched_logits(model, base, kind, l, cs, e, x, where))) for x in ends)
                table.append(start + (up - down) / (2 * h))
    shape = [len(own), *([] if positions == "all" else [total]), *([] if units is None else [len(units)])]
    return torch.tensor(table, dtype=torch.float64).reshape(shape)


def near(found, expected, tolerance=1e-6):
    spread = float(expected.max() - expected.min())
    assert spread > 1e-3
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * spread


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("target", ["heads", "mlp_out"])
@torch.no_grad()
def test_slopes(kind, target):
    model, clean, corrupt = pair(kind)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    for positions in ("all", "each") if "llava" not in kind else ("all",):
        found = sweep.attribute(target, "atp", positions)
        near(found.values, slopes(model, corrupt, clean, target, positions=positions, units=UNITS.get(target)))
    assert (found.clean, found.corrupt) == (sweep.clean, sweep.corrupt)


@pytest.mark.parametrize("patch", ["clean", "zero", "mean", "vector"])
@pytest.mark.parametrize("target", ["heads", "neurons", "residual", "attn_out", "mlp_out"])
@torch.no_grad()
def test_fillings_of_noise(patch, target):
    model, clean, corrupt = pair("llama-padded")
    real = clean["attention_mask"][0].bool()
    vector = torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fill = {
        "clean": None,
        "zero": torch.zeros_like,
        "mean": lambda x: x[real].mean(0, keepdim=True).expand_as(x),
        "vector": lambda x: vector[: x.shape[-1]].expand_as(x),
    }[patch]
    given = patch
    if patch == "vector":
        given = vector[: model_width(model) if target == "neurons" else 32]
        given = given.view(4, 8) if target == "heads" else given
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), direction="noise", patch_with=given, progress=False)
    found = sweep.attribute(target, positions="each", groups=UNITS["neurons"])
    near(found.values, slopes(model, clean, corrupt, target, units=UNITS.get(target), fill=fill))
    part = sweep.attribute(target, positions=[-1, 2], layers=[1], groups=UNITS["neurons"])
    torch.testing.assert_close(part.values, found.values[1:2][:, [-1, 2]], rtol=0, atol=1e-12)


def test_metrics():
    model, clean, corrupt = pair("qwen2")
    with torch.no_grad():
        wanted = model(**clean).logits[0, 5].log_softmax(-1)
    for metric, plain in (
        (log_prob(A, pos=-2), lambda x: x[0, -2].log_softmax(-1)[A]),
        (kl(pos=5), lambda x: (wanted.exp() * (wanted - x[0, 5].log_softmax(-1))).sum()),
        (lambda x: x[0, 3:7, A].sum() - x[0, -1].max(), lambda x: x[0, 3:7, A].sum() - x[0, -1].max()),
    ):
        found = Sweep(model, clean, corrupt, metric, progress=False).attribute("residual", positions="each")
        near(found.values, slopes(model, corrupt, clean, "residual", plain))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o[0, -1] @ direction))
    expected = slopes(model, corrupt, clean, "heads", lambda _: seen[-1], units=HEADS)
    hook.remove()
    near(
        Sweep(model, clean, corrupt, projection(direction, 1), progress=False).attribute(positions="each").values,
        expected,
    )


# ---- AtP*, written out: eager attention, autograd with outputs of one layer detached, the softmax by hand


def attention(q, k, v, scale):
    causal = torch.full((q.shape[2], q.shape[2]), -math.inf, dtype=torch.float64).triu(1)
    s = q @ k.repeat_interleave(2, 1).mT * scale + causal
    return (s.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)


def backward(model, inputs, drop=None):
    """Gradients of the metric at queries, keys, values (after rotary embedding) and head outputs of every layer."""
    kept = []

    def spy(module, q, k, v, mask, **more):
        q, k, v = (x.detach().requires_grad_() if not x.requires_grad else x for x in (q, k, v))
        out = attention(q, k, v, more["scaling"])
        kept.append((q, k, v, out, more["scaling"]))
        return out, None

    AttentionInterface.register("attribution_oracle", spy)
    AttentionMaskInterface.register("attribution_oracle", sdpa_mask)
    layers = model.model.layers
    hooks = []
    if drop is not None:
        hooks += [layers[drop].self_attn.register_forward_hook(lambda m, a, o: (o[0].detach(), *o[1:]))]
        hooks += [layers[drop].mlp.register_forward_hook(lambda m, a, o: o.detach())]
    before, model.config._attn_implementation = model.config._attn_implementation, "attribution_oracle"
    try:
        value = difference(model(**inputs, use_cache=False).logits)
    finally:
        model.config._attn_implementation = before
        for hook in hooks:
            hook.remove()
    flat = [x for layer in kept for x in layer[:4]]
    grads = torch.autograd.grad(value, flat, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(flat, grads, strict=True)]
    return kept, [grads[4 * i : 4 * i + 4] for i in range(len(kept))]


@pytest.mark.parametrize("positions", ["all", "each"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_atp_star_by_hand(kind, positions):
    model, clean, corrupt = pair(kind)
    total, layers = corrupt["input_ids"].shape[1], 3
    source, _ = backward(model, clean)
    runs = [backward(model, corrupt, drop) for drop in (None, *range(layers))]
    sets = [list(range(total))] if positions == "all" else [[p] for p in range(total)]
    expected = {"heads": [], "qkv": []}
    for l in range(layers):
        q, k, v, out, scale = (x.detach() if isinstance(x, torch.Tensor) else x for x in runs[0][0][l])
        new = [x.detach() for x in source[l][:4]]
        for columns in sets:
            rows = {"heads": [[((new[3] - out) * g[l][3])[0, columns, h].sum() for _, g in runs] for h in range(4)]}
            rows["qkv"] = []
            for which, x in enumerate((q, k, v)):
                for head in range(x.shape[1]):
                    changed = [q, k, v]
                    changed[which] = x.clone()
                    changed[which][0, head, columns] = new[which][0, head, columns]
                    dz = attention(*changed, scale) - out
                    rows["qkv"].append([(dz * g[l][3]).sum() for _, g in runs])
            for name, found in rows.items():
                for e in found:
                    mean = torch.stack(e[1:]).abs().sum() / (layers - 1)
                    expected[name].append(float(e[0].sign() * mean))
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    for name, table in expected.items():
        found = sweep.attribute(name, "atp*", positions)
        near(found.values, sweep.corrupt + torch.tensor(table, dtype=torch.float64).reshape(found.values.shape), 1e-10)


def test_drops_of_the_residual_stream():
    """Every layer's drop leaves the stream: the mean is over all of them, and layers below change nothing."""
    model, clean, corrupt = pair("gpt2")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    found = sweep.attribute("residual", "atp*", "each")
    # Into the last layer: two drops below it that change nothing, and one that leaves the final norm alone.
    plain = sweep.attribute("residual", "atp", "each").values[2] - sweep.corrupt
    x = oracle.record(model, corrupt, "residual")[2], oracle.record(model, clean, "residual")[2]
    seen = []
    hook = model.transformer.ln_f.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    model(**corrupt)
    hook.remove()
    last = seen[0].requires_grad_()
    value = difference(model.lm_head(model.transformer.ln_f(last)))
    (g,) = torch.autograd.grad(value, last)
    dropped = ((x[1] - x[0]) * g[0]).sum(-1).detach()
    near(found.values[2] - sweep.corrupt, plain.sign() * (2 * plain.abs() + dropped.abs()) / 3, 1e-10)


# ---- integrated gradients


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llava-padded"])
@pytest.mark.parametrize("target", ["heads", "neurons", "residual", "attn_out", "mlp_out", "qkv"])
def test_integrated_gradients_are_complete(kind, target):
    """Over a whole layer they add up to the exact effect of patching all of it, the better the more steps."""
    model, clean, corrupt = pair(kind)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    found = [sweep.attribute(target, "ig", "each", layers=[2], steps=n).values - sweep.corrupt for n in (4, 64)]
    if target == "qkv":  # queries, keys and values of a layer together are its attention
        exact = sweep.attn_out(layers=[2]).values - sweep.corrupt
    elif target in ("heads", "neurons"):
        exact = getattr(sweep, {"heads": "attn_out", "neurons": "mlp_out"}[target])(layers=[2]).values - sweep.corrupt
    else:
        exact = getattr(sweep, target)(layers=[2]).values - sweep.corrupt
    coarse, fine = (abs(float(x.sum()) - float(exact)) for x in found)
    assert fine <= max(2e-3 * abs(float(exact)), 1e-9)
    assert fine <= coarse + 1e-9


# ---- the model is left alone, and what cannot be done is refused


def test_the_model_is_left_alone():
    model, clean, corrupt = pair("llama")
    first = next(model.parameters())
    first.requires_grad_(False)
    before = [(p.requires_grad, p._version) for p in model.parameters()]
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    with torch.inference_mode():
        found = [sweep.attribute(method=m, positions="each").values for m in ("atp", "atp*", "ig")]
    again = [sweep.attribute(method=m, positions="each").values for m in ("atp", "atp*", "ig")]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert [(p.requires_grad, p._version) for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    first.requires_grad_(True)


def test_refusals():
    model, clean, corrupt = pair("llama")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    for options, match in (
        (dict(method="atp**"), "expected one of atp"),
        (dict(target="routes"), "expected one of heads"),
        (dict(method="ig", steps=0), "expected at least 1"),
        (dict(target="neurons", groups=100), "expected 1 to 48"),
    ):
        with pytest.raises(ValueError, match=match):
            sweep.attribute(**options)
    for metric in (lambda x: float(x[0, -1, A] - x[0, -1, B]), lambda x: (x[0, -1] - x[0, -1, A]).argmax()):
        with pytest.raises(ValueError, match="not differentiable"):
            Sweep(model, clean, corrupt, metric, progress=False).attribute()
    said = Sweep(model, clean, corrupt, generated(len, limit=2), progress=False)
    with pytest.raises(ValueError, match="is not differentiable"):
        said.attribute()
    options = dict(direction="noise", patch_with="resample", resample=[clean], progress=False)
    drawn = Sweep(model, clean, corrupt, logit_diff(A, B), **options)
    with pytest.raises(NotImplementedError, match="drawn from other prompts"):
        drawn.attribute()


def test_several_pairs():
    model, clean, corrupt = pair("llama")
    both = Sweep(model, [clean, corrupt], [corrupt, clean], logit_diff(A, B), progress=False).attribute(method="atp*")
    single = [
        Sweep(model, a, b, logit_diff(A, B), progress=False).attribute(method="atp*").values
        for a, b in ((clean, corrupt), (corrupt, clean))
    ]
    torch.testing.assert_close(both.pairs, torch.stack(single))
