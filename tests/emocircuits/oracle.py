"""An independent, slow interpretation of a plan: full attention matrices, Python loops, hooks; no code of the package.

A whole sequence (prompt and generated tokens) is run at once without a cache, so it also checks prefill + decode.
"""

from __future__ import annotations

import contextlib
import functools
import math

import oracle_edits
import oracle_layouts
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAMES = ["pad", "system", "visual", "query", "last", "generated"]


def roles_of(input_ids, attention_mask, placeholders, generated: int = 0) -> list[list[str]]:
    """Role names of each token of each row, by hand."""
    out = []
    for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
        prompt = len(ids)
        row, seen = [], not any(i in placeholders and m for i, m in zip(ids, mask, strict=True))
        for i, m in zip(ids, mask, strict=True):
            if not m:
                row.append("pad")
            elif i in placeholders:
                row.append("visual")
                seen = True
            else:
                row.append("query" if seen else "system")
        row[max(j for j in range(prompt) if mask[j])] = "last"
        out.append(row + ["generated"] * generated)
    return out


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    plan, roles = module._oracle
    b, h, n, _ = query.shape
    group = h // key.shape[1]
    z = torch.zeros_like(query)
    for row in range(b):
        for head in range(h):
            q, k, v = query[row, head], key[row, head // group], value[row, head // group]
            # What was generated reads the keys and values of the prompt as edits leave them in the cache.
            later = torch.tensor([role == "generated" for role in roles[row]])[:, None]
            layer, at = module.layer_idx, (head // group, plan, roles, row)
            edited_k, edited_v = (oracle_edits.cached(t, layer, site, *at) for t, site in ((k, "k"), (v, "v")))
            s = torch.where(later, q @ edited_k.T, q @ k.T) * scaling
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            gain = torch.ones_like(s)
            for edit in plan:
                if type(edit).__name__ != "BoostRoute" or (module.layer_idx, head) not in edit.heads:
                    continue
                for i in range(n):
                    for j in range(n):
                        if not oracle_edits.reads(edit, roles, row, i, j):
                            continue
                        if edit.reading == "weight":
                            gain[i, j] *= edit.by
            # factors first, then |s|, then the added bias, each summed over the edits of the plan
            scale, absolute, bias = torch.ones_like(s), torch.zeros_like(s), torch.zeros_like(s)
            for edit in plan:
                if (
                    type(edit).__name__ != "BoostRoute"
                    or (module.layer_idx, head) not in edit.heads
                    or edit.reading == "weight"
                ):
                    continue
                hit = torch.tensor([[oracle_edits.reads(edit, roles, row, i, j) for j in range(n)] for i in range(n)])
                if edit.reading == "logit-scale":
                    scale[hit] *= edit.by
                elif edit.reading == "logit-abs":
                    absolute[hit] += edit.by
                else:
                    bias[hit] += math.log(edit.by) if edit.by else -math.inf
            s = scale * s + absolute * s.abs() + bias
            mask = attention_mask[row, 0, :n, :n]
            visible = mask if mask.dtype == torch.bool else mask > -1e30
            s = s.masked_fill(~visible, -math.inf)
            p = torch.nan_to_num(s.softmax(-1))
            z[row, head] = torch.where(later, (p * gain) @ edited_v, (p * gain) @ v)
    return z.transpose(1, 2), None


AttentionInterface.register("oracle", _attention)
AttentionMaskInterface.register("oracle", eager_mask)


@contextlib.contextmanager
def installed(model, plan, roles):
    text = oracle_layouts.decoder(model)
    names = oracle_layouts.layout(text)
    layers = list(oracle_layouts.at(text, names.layers))
    config = text.config
    old = config._attn_implementation_internal
    handles = []

    def heads(module, args, layer):
        z = args[0].unflatten(-1, (config.num_attention_heads, -1))
        return (oracle_edits.heads(z, layer, plan, roles).flatten(-2),)

    def neurons(module, args, layer):
        return (oracle_edits.neurons(args[0], layer, plan, roles),)

    def vectors(hidden, layer, site):
        return oracle_edits.vectors(hidden, layer, site, plan, roles)

    def post(site, layer):
        def hook(module, args, out):
            return (vectors(out[0], layer, site), *out[1:]) if isinstance(out, tuple) else vectors(out, layer, site)

        return hook

    def leaving(layer):
        def hook(module, args, kwargs):
            if args:
                return (vectors(args[0], layer, "resid_post"), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": vectors(kwargs["hidden_states"], layer, "resid_post")}

        return hook

    try:
        config._attn_implementation_internal = "oracle"
        if names.between:
            for n, after in enumerate([*layers[1:], text.norm]):
                handles.append(after.register_forward_pre_hook(leaving(n), with_kwargs=True))
        for n, layer in enumerate(layers):
            part = functools.partial(oracle_layouts.at, layer)
            part(names.attention)._oracle = (plan, roles)
            handles += [
                part(names.out).register_forward_pre_hook(lambda m, a, n=n: heads(m, a, n)),
                layer.register_forward_pre_hook(lambda m, a, n=n: (vectors(a[0], n, "resid_pre"), *a[1:])),
                part(names.attn_out).register_forward_hook(post("attn_out", n)),
                part(names.mlp_out).register_forward_hook(post("mlp_out", n)),
            ]
            if not names.between:
                handles.append(layer.register_forward_hook(post("resid_post", n)))
            if names.down is not None:
                handles.append(part(names.down).register_forward_pre_hook(lambda m, a, n=n: neurons(m, a, n)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            del oracle_layouts.at(layer, names.attention)._oracle
        config._attn_implementation_internal = old


@torch.no_grad()
def logits(model, inputs, plan, tokens=None):
    """Logits ``[B, N + T, V]`` of the prompt followed by ``tokens [B, T]``, under ``plan``."""
    inputs = dict(inputs)
    placeholders = {getattr(model.config, "image_token_id", -1), getattr(model.config, "video_token_id", -1)}
    extra = 0 if tokens is None else tokens.shape[1]
    roles = roles_of(inputs["input_ids"], inputs["attention_mask"], placeholders, extra)
    mask = inputs["attention_mask"]
    if tokens is not None:
        # A generated token may equal the image id of a tiny vocabulary: embed it as text.
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
        inputs["attention_mask"] = mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        for name, kind in (
            ("mm_token_type_ids", 0),
            ("token_type_ids", 1 if model.config.model_type == "paligemma" else 0),
        ):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.full_like(tokens, kind)], 1)
    if not hasattr(getattr(model, "model", None), "get_rope_index"):  # else the model finds them from its ids
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + (model.config.model_type == "paligemma")
    with installed(model, plan, roles):
        return model(**inputs, use_cache=False).logits
