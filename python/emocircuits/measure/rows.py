"""What attention does in chosen rows, from queries and keys, in bounded tiles: no ``[H, N, K]`` of all rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from emocircuits.sites import Tapped
from emokernels import Role, Routes
from emokernels.backends import resolve
from emokernels.flow import run_flow

R = len(Role)
AT_ONCE = 1 << 22
"""Logits in a tile."""

NAMES = frozenset({"scores", "pattern", "span_mass", "span_logits", "span_keys"})


def read_rows(call: Tapped, rows: Tensor, local: Tensor, names: Collection[str], seen: int) -> dict[str, Tensor]:
    """Quantities of the T chosen rows of one attention call.

    Args:
        call: the call; its routes are applied.
        rows: ``[T]`` batch row of each, rising.
        local: ``[T]`` column of each, counted in the pass.
        names: any of `NAMES`.
        seen: columns of the sequence so far; a static cache has more.

    Returns:
        By name: ``scores`` and ``pattern`` ``[T, H, seen]`` by column of the sequence (0 weight, -inf score where a
        sliding cache has dropped it), ``span_mass`` and ``span_logits`` ``[T, H, R]``, ``span_keys [T, R]``; in
        float32, or float64 for float64 queries.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    keys = seen - call.dropped
    for b, at in _tiles(rows, local, call.q.shape[1] * call.k.shape[2]):
        scores, visible, gain = _logits(call, b, at)
        kinds = call.roles[b % call.roles.shape[0]].long().to(scores.device)
        hidden = scores.masked_fill(~visible, -torch.inf)
        if "scores" in parts:
            parts["scores"].append(_columns(hidden, keys, call.dropped, -torch.inf))
        if not {"pattern", "span_mass"}.isdisjoint(names):
            weights = hidden.softmax(-1).masked_fill(hidden.amax(-1, keepdim=True) == -torch.inf, 0.0)
            weights = weights if gain is None else weights * gain
            if "pattern" in parts:
                parts["pattern"].append(_columns(weights, keys, call.dropped, 0.0))
            if "span_mass" in parts:
                parts["span_mass"].append(_by_role(weights, kinds))
        if "span_logits" in parts:
            parts["span_logits"].append(_by_role(scores.masked_fill(~visible, 0.0), kinds))
        if "span_keys" in parts:
            parts["span_keys"].append(_by_role(visible.expand(1, *scores.shape[1:]).to(scores.dtype), kinds)[0])
    return {
        name: torch.cat([p if name == "span_keys" else p.transpose(0, 1) for p in tiles])
        for name, tiles in parts.items()
    }


def route_mass(call: Tapped, rows: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the chosen rows summed by route, ``[B, H, R, R]``, and the number of rows of each role, ``[B, R]``.

    Padding rows are left out: what they attend to is of no meaning.
    """
    chosen = torch.zeros_like(call.query_roles, dtype=torch.bool)
    chosen[rows, local] = True
    # Rows that were not chosen count as padding rows, and those are dropped.
    kinds = torch.where(chosen, call.query_roles, int(Role.PAD)).to(call.q.device)
    with torch.no_grad():
        flow = run_flow(
            call.q.detach(), call.k.detach(), roles=call.roles.to(call.q.device), query_roles=kinds,
            routes=_detached(call.routes), mask=call.mask, causal=call.causal, scale=call.scale, softcap=call.softcap,
            backend=resolve("auto", call.q, "attention_flow"),
        )  # fmt: skip
    flow[:, :, int(Role.PAD)] = 0.0
    count = torch.nn.functional.one_hot(kinds.long(), R).sum(1).to(flow.dtype)
    count[:, int(Role.PAD)] = 0.0
    return flow, count


def _tiles(rows: Tensor, local: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    for b in rows.unique().tolist():
        yield from ((b, at) for at in local[rows == b].split(max(1, AT_ONCE // max(width, 1))))


def _logits(call: Tapped, b: int, at: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits ``[H, n, K]`` after routes, which keys are seen ``[1|H, n, K]``, and the gain on weights, if any."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    k, at = call.k[b].to(wide), at.to(call.q.device)
    q = call.q[b][:, at].to(wide)
    heads, n, dim = q.shape
    s = (q.reshape(k.shape[0], -1, dim) @ k.mT).view(heads, n, k.shape[1])
    s = s * (dim**-0.5 if call.scale is None else call.scale)
    if call.softcap:
        s = call.softcap * torch.tanh(s / call.softcap)
    gain = None
    if call.routes is not None:
        to = call.query_roles[b].to(at.device)[at].long()
        source = call.roles[b % call.roles.shape[0]].to(at.device).long()
        tables = {name: t[b % t.shape[0]][:, to][:, :, source].to(wide) for name, t in call.routes.tables()}
        routed = s * tables["scale"] if "scale" in tables else s
        routed = routed + tables["abs"] * s.abs() if "abs" in tables else routed
        s = routed + tables["bias"] if "bias" in tables else routed
        gain = tables.get("gain")
    if call.mask is not None:
        mask = call.mask[b % call.mask.shape[0]][:, at]
        if mask.dtype == torch.bool:
            return s, mask, gain
        return s + mask.to(wide), mask > torch.finfo(mask.dtype).min / 2, gain
    visible = torch.ones(1, n, k.shape[1], dtype=torch.bool, device=at.device)
    if call.causal:
        last = at + k.shape[1] - call.q.shape[2]
        visible = (torch.arange(k.shape[1], device=at.device) <= last[:, None])[None]
    return s, visible, gain


def _by_role(values: Tensor, kinds: Tensor) -> Tensor:
    """``[..., K]`` summed over the keys of each role, ``[..., R]``."""
    return values.new_zeros(*values.shape[:-1], R).index_add(-1, kinds, values)


def _columns(values: Tensor, keys: int, dropped: int, fill: float) -> Tensor:
    """``[..., K]`` of the keys at hand as ``[..., columns of the sequence]``."""
    return torch.nn.functional.pad(values[..., :keys], (dropped, 0), value=fill)


def _detached(routes: Routes | None) -> Routes | None:
    return None if routes is None else Routes(**{name: table.detach() for name, table in routes.tables()})
