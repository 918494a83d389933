"""What can be captured, and what TransformerLens calls it.

TransformerLens names mean what they mean there (documentation, and ``TransformerBridge`` of version 4): ``hook_q`` and
``hook_k`` are the outputs of the projections, before a norm of theirs and before rotary embedding, ``hook_rot_q`` and
``hook_rot_k`` what attention receives; ``mlp.hook_pre`` is what the activation function receives (the gate where there
is one), ``hook_pre_linear`` the other factor of a gated MLP and ``hook_post`` what the down projection receives;
``hook_attn_out`` and ``hook_mlp_out`` are what is added to the residual stream.
"""

from __future__ import annotations

import dataclasses as dc
import difflib
import re
from collections.abc import Iterable, Sequence


@dc.dataclass(frozen=True)
class Quantity:
    """One thing that can be captured.

    Attributes:
        name: our name.
        lens: TransformerLens' name, ``{}`` standing for the layer; None where it has none.
        layered: there is one of every layer.
        per: what a value is per: ``"token"``, or ``"route"`` for ``[B, H, R, R]``.
        exact: computed here, in float32 (float64 for a float64 model), whatever the model's dtype.
        meaning: one line for the docs.
    """

    name: str
    lens: str | None
    meaning: str
    layered: bool = True
    per: str = "token"
    exact: bool = False


_ALL = (
    Quantity("resid_pre", "blocks.{}.hook_resid_pre", "residual stream that enters the layer `[d_model]`"),
    Quantity("resid_mid", "blocks.{}.hook_resid_mid", "after attention has been added, before the MLP `[d_model]`"),
    Quantity("resid_post", "blocks.{}.hook_resid_post", "residual stream that leaves the layer `[d_model]`"),
    Quantity("attn_out", "blocks.{}.hook_attn_out", "what attention adds to the residual stream `[d_model]`"),
    Quantity("mlp_out", "blocks.{}.hook_mlp_out", "what the MLP adds to the residual stream `[d_model]`"),
    Quantity("q_proj", "blocks.{}.attn.hook_q", "output of the query projection, before norm and rotary `[H, D]`"),
    Quantity("k_proj", "blocks.{}.attn.hook_k", "the same of keys `[Hkv, D]`"),
    Quantity("q", "blocks.{}.attn.hook_rot_q", "queries as attention sees them `[H, D]`"),
    Quantity("k", "blocks.{}.attn.hook_rot_k", "keys as attention sees them `[Hkv, D]`"),
    Quantity("v", "blocks.{}.attn.hook_v", "values as attention sees them `[Hkv, D]`"),
    Quantity("z", "blocks.{}.attn.hook_z", "head outputs, before the output projection `[H, D]`"),
    Quantity("scores", "blocks.{}.attn.hook_attn_scores", "logits of the row, -inf on keys it does not see `[H, K]`",
             exact=True),
    Quantity("pattern", "blocks.{}.attn.hook_pattern", "weights of the row, as they multiply the values `[H, K]`",
             exact=True),
    Quantity("span_mass", None, "weights of the row summed over the keys of each role `[H, R]`", exact=True),
    Quantity("span_logits", None, "logits of the row summed over the keys of each role that it sees `[H, R]`",
             exact=True),
    Quantity("span_keys", None, "how many keys of each role the row sees `[R]`", exact=True),
    Quantity("mass", None, "mean weight that rows of a role give to keys of another `[B, H, to, from]`", per="route",
             exact=True),
    Quantity("gate", "blocks.{}.mlp.hook_pre", "what the MLP's activation function receives `[I]`"),
    Quantity("up", "blocks.{}.mlp.hook_pre_linear", "the other factor of a gated MLP `[I]`"),
    Quantity("neurons", "blocks.{}.mlp.hook_post", "neurons: what the down projection receives `[I]`"),
    Quantity("embed", "hook_embed", "token embeddings, before image features take their places `[d_model]`",
             layered=False),
    Quantity("final_scale", "ln_final.hook_scale", "what the final norm divides by `[1]`", layered=False, exact=True),
    Quantity("final_normalized", "ln_final.hook_normalized", "the final norm before its weights `[d_model]`",
             layered=False),
    Quantity("logits", None, "what the model returns `[vocab]`", layered=False),
)  # fmt: skip

QUANTITIES: dict[str, Quantity] = {q.name: q for q in _ALL}
_LENS = {q.lens: q for q in _ALL if q.lens is not None}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def lens_name(name: str, layer: int | None) -> str | None:
    """TransformerLens' name of a quantity of ours; None where it has none."""
    lens = QUANTITIES[name].lens
    return None if lens is None else lens.format(layer)


def read_name(name: str) -> tuple[Quantity, int | None]:
    """The quantity that ``name`` means, ours or TransformerLens', and the layer if the name has one.

    Raises:
        TypeError: not a string.
        ValueError: unknown; the message has the nearest names.
    """
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is not a name; expected one such as 'z' or 'blocks.3.attn.hook_z'")
    if name in QUANTITIES:
        return QUANTITIES[name], None
    block = _BLOCK.fullmatch(name)
    quantity = _LENS.get(f"blocks.{{}}.{block[2]}" if block else name)
    if quantity is not None:
        return quantity, int(block[1]) if block else None
    layer = block[1] if block else "0"
    known = [*QUANTITIES, *(lens.format(layer) for lens in _LENS)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(QUANTITIES)
    raise ValueError(f"unknown {name}; nearest: {', '.join(near)} (all: emocircuits.measure.QUANTITIES)")


def wanted(what: str | Iterable[str], layers: Sequence[int] | int | None, count: int) -> dict[str, tuple[int, ...]]:
    """By quantity, the layers to capture in rising order; ``()`` for what no layer has.

    Args:
        what: names; a name with a layer asks for that layer only.
        layers: layers for names without one; negative ones count from the last; None: all.
        count: layers of the model.

    Raises:
        TypeError, ValueError: an unknown name, a layer that is not there, or nothing asked for.
    """
    names = [what] if isinstance(what, str) else list(what)
    if not names:
        raise ValueError("what is empty; name what to capture, such as ['z']")
    if isinstance(layers, int):
        layers = [layers]
    chosen = range(count) if layers is None else [_layer(i, count) for i in layers]
    found: dict[str, set[int]] = {}
    for name in names:
        quantity, layer = read_name(name)
        into = found.setdefault(quantity.name, set())
        if quantity.layered:
            into.update(chosen if layer is None else [_layer(layer, count)])
    empty = [name for name, at in found.items() if QUANTITIES[name].layered and not at]
    if empty:
        raise ValueError(f"layers={list(layers or ())}: name at least one layer for {', '.join(empty)}")
    return {name: tuple(sorted(at)) for name, at in found.items()}


def _layer(layer: int, count: int) -> int:
    if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
        raise ValueError(f"no layer {layer!r}; this model has layers 0 to {count - 1}")
    return layer % count
