"""One patch at a time with plain hooks on the unmodified model: what a sweep must agree with."""

from __future__ import annotations

import torch

PARTS = {  # layers, attention, output projection, mlp, its last projection
    "model": ("model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"),
    "transformer": ("transformer.h", "attn", "attn.c_proj", "mlp", "mlp.c_proj"),
    "language_model": ("model.language_model.layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"),
}


def _layers(model):
    root = next(k for k in ("transformer", "model") if hasattr(model, k))
    if hasattr(model.model if root == "model" else model, "language_model"):
        root = "language_model"
    path, *rest = PARTS[root]
    return list(model.get_submodule(path)), rest


def place(model, kind, layer):
    """The module, and whether its input (else output) is patched."""
    layers, (attention, projection, mlp, down) = _layers(model)
    block = layers[layer]
    path, enters = {
        "heads": (projection, True),
        "neurons": (down, True),
        "residual": ("", True),
        "attn_out": (attention, False),
        "mlp_out": (mlp, False),
        "q": (f"{attention}.q_proj", False),
        "k": (f"{attention}.k_proj", False),
        "v": (f"{attention}.v_proj", False),
        "qkv": (f"{attention}.c_attn", False),
    }[kind]
    return block.get_submodule(path), enters


@torch.no_grad()
def record(model, inputs, kind, where=place, layers=None):
    """The site of every layer, ``[T, width]``."""
    kept, hooks = {}, []
    for l in range(len(_layers(model)[0])) if layers is None else layers:
        module, enters = where(model, kind, l)
        if enters:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda m, a, k, l=l: kept.__setitem__(l, (a[0] if a else k["hidden_states"])[0].clone()),
                    with_kwargs=True,
                )
            )
        else:
            hooks.append(
                module.register_forward_hook(
                    lambda m, a, o, l=l: kept.__setitem__(l, (o[0] if isinstance(o, tuple) else o)[0].clone())
                )
            )
    try:
        model(**inputs, use_cache=False)
    finally:
        for h in hooks:
            h.remove()
    return kept


@torch.no_grad()
def patched_logits(model, inputs, kind, layer, columns, entries, new, where=place):
    """Logits ``[1, T, V]`` with ``site[columns, entries]`` set to ``new`` ``[T, width]`` in one layer."""
    module, enters = where(model, kind, layer)

    def change(x):
        x = x.clone()
        for c in columns:
            x[0, c, entries] = new[c, entries].to(x)
        return x

    def before(m, a, k):
        if a:
            return (change(a[0]), *a[1:]), k
        return a, {**k, "hidden_states": change(k["hidden_states"])}

    def after(m, a, o):
        return (change(o[0]), *o[1:]) if isinstance(o, tuple) else change(o)

    hook = module.register_forward_pre_hook(before, with_kwargs=True) if enters else module.register_forward_hook(after)
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        hook.remove()


def sweep(model, base, source, kind, metric, positions="each", units=None, fill=None, layers=None, where=place):
    """The whole table: ``[layer, pos, unit]`` float64, axes that do not exist left out.

    ``positions``: "all" at once, "each", or columns; ``where``: as :func:`place`.
    ``units``: list of entry lists (None: everything); ``fill``: from the recorded source to the new values.
    """
    kept = record(model, source, kind, where, layers)
    total = base["input_ids"].shape[1]
    each = range(total) if positions == "each" else positions
    columns = [list(range(total))] if positions == "all" else [[c] for c in each]
    entries = [slice(None)] if units is None else units
    table = []
    for l in sorted(kept) if layers is None else layers:
        new = kept[l] if fill is None else fill(kept[l])
        rows = [
            [float(metric(patched_logits(model, base, kind, l, cs, e, new, where))) for e in entries] for cs in columns
        ]
        table.append(rows)
    out = torch.tensor(table, dtype=torch.float64)
    if units is None:
        out = out[..., 0]
    return out[:, 0] if positions == "all" else out
