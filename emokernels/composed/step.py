"""One query per row on a CPU, as in a decode step: two products, one softmax, and routes on slices of the scores.

Query heads that share a key head are the rows of one product, so K and V are read once. Which scores the routes change
is found from roles and tables, and kept (`tables.Alike`); `prepared` keeps it for a whole generation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from ..routes import ROLES
from .layout import known_runs
from .softmax import accumulator, additive, finish
from .tables import Alike

MAX_SLICES = 12
"""More runs of keys than this that change something are left to the tiles, which gather."""

LARGE_KEYS = 1 << 21
"""Elements of K from which it streams from memory: ``k q^T`` then reads it up to three times as fast as ``q k^T``."""

DENSE_SCORES = 1 << 20
"""Largest batch of scores whose table values are kept when every row has its own layout."""

Slices = list[tuple[int, int, int]]
"""(source role, start, stop)"""


class Dense(NamedTuple):
    """Table values at every score of keys before `stop`, ``[B, Hkv, G, stop]``; nothing changes from there on."""

    stop: int
    bias: Tensor | None
    factor: Tensor | None
    magnitude: Tensor | None
    gain: Tensor | None


Where = tuple[Slices, Slices] | Dense
"""Which scores the tables change: slices for logits and for weights where all rows share a key layout, else `Dense`."""


def slices_of(key_bytes: bytes, dst: int, alike: Alike) -> tuple[Slices, Slices] | None:
    """Runs of keys whose logits change, and runs whose weights change, for queries of role `dst`; None when many."""
    return alike.slices.get((key_bytes, dst), lambda: _slices(key_bytes, dst, alike))


def _slices(key_bytes: bytes, dst: int, alike: Alike) -> tuple[Slices, Slices] | None:
    runs = known_runs(key_bytes)
    if len(runs) > MAX_SLICES:
        return None
    logits = [run for run in runs if alike.changes_logits(dst, run[0])]
    return logits, [run for run in runs if alike.changes_weights(dst, run[0])]


def dense_of(rows: list[bytes], dst: int, alike: Alike, problem: Problem) -> Dense | None:
    """Table values for rows with different key layouts, as padding makes them; None when there are too many scores.

    Kept for the steps of a generation: the keys that a step appends have a role that usually changes nothing, so the
    columns up to the last one that does are the same in every step.
    """
    idle = bytes(r for r in range(ROLES) if not (alike.changes_logits(dst, r) or alike.changes_weights(dst, r)))
    stop = max(len(row.rstrip(idle)) for row in rows)
    heads = problem.q.shape[1]
    if len(rows) * heads * stop > DENSE_SCORES:
        return None
    wide = accumulator(problem.q.dtype)
    columns = tuple(row[:stop] for row in rows)
    return alike.dense.get((columns, dst, wide, problem.k.shape[1]), lambda: _dense(columns, stop, dst, problem, wide))


def _dense(columns: tuple[bytes, ...], stop: int, dst: int, problem: Problem, wide: torch.dtype) -> Dense:
    roles = torch.frombuffer(bytearray(b"".join(columns)), dtype=torch.uint8).view(len(columns), 1, stop).long()
    batch, heads, key_heads = len(columns), problem.q.shape[1], problem.k.shape[1]

    def spread(table: Tensor | None) -> Tensor | None:
        if table is None:
            return None
        row = table.detach().select(2, dst).to(wide).expand(batch, heads, ROLES)
        return row.gather(2, roles.expand(batch, heads, stop)).view(batch, key_heads, heads // key_heads, stop)

    with torch.inference_mode(False):
        return Dense(stop, *map(spread, (problem.bias, problem.factor, problem.magnitude, problem.gain)))


def attend_step(
    problem: Problem, dst: int, where: Where, may_be_empty: bool, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Z ``[B, H, 1, D]`` and lse ``[B, H, 1]`` for queries that all have role `dst`."""
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, _, dim = q.shape
    key_heads = k.shape[1]
    share = heads // key_heads
    wide = accumulator(q.dtype)
    narrow = q.dtype != wide
    if narrow:
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    # [B, Hkv, G, K]
    folded = batch * key_heads
    s = _products((q * problem.scale).reshape(folded, share, dim), k.reshape(folded, -1, dim))
    s = s.view(batch, key_heads, share, -1)
    if problem.softcap:
        s = s.div_(problem.softcap).tanh_().mul_(problem.softcap)
    dense = where if isinstance(where, Dense) else None
    logits, weights = ([], []) if isinstance(where, Dense) else where
    if dense is not None:
        _route(s[..., : dense.stop], dense.bias, dense.factor, dense.magnitude)
    if logits:
        bias, factor, magnitude = (
            None if table is None else table_row(table, dst, key_heads, share, wide)
            for table in (problem.bias, problem.factor, problem.magnitude)
        )
        for src, start, stop in logits:
            values = (None if t is None else t[..., src : src + 1] for t in (bias, factor, magnitude))
            _route(s[..., start:stop], *values)
    if problem.window and problem.window < s.shape[3]:
        s[..., : s.shape[3] - problem.window] = -torch.inf
    if problem.mask is not None:
        mask = problem.mask
        s += additive(mask if mask.shape[1] == 1 else mask.reshape(-1, key_heads, share, mask.shape[3]), s.dtype)
    p = torch.softmax(s, -1)
    lse = None
    if need_lse or may_be_empty:
        lse = finish(p, s.amax(-1), may_be_empty, need_lse)
        lse = None if lse is None else lse.view(batch, heads, 1)
    if weights and problem.gain is not None:
        gain = table_row(problem.gain, dst, key_heads, share, wide)
        for src, start, stop in weights:
            p[..., start:stop].mul_(gain[..., src : src + 1])
    if dense is not None and dense.gain is not None:
        p[..., : dense.stop].mul_(dense.gain)
    z = torch.bmm(p.view(folded, share, -1), v.reshape(folded, -1, dim)).view(batch, 1, heads, dim)
    return (z.to(problem.q.dtype) if narrow else z).transpose(1, 2), lse


def _route(s: Tensor, bias: Tensor | None, factor: Tensor | None, magnitude: Tensor | None) -> None:
    """``s = factor * s + magnitude * |s| + bias``, in place."""
    extra = s.abs().mul_(magnitude) if magnitude is not None else None
    if factor is not None:
        s.mul_(factor)
    if extra is not None:
        s.add_(extra)
    if bias is not None:
        s.add_(bias)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """``q k^T`` of ``[X, G, D]`` and ``[X, K, D]``, contiguous ``[X, G, K]``."""
    if k.numel() < LARGE_KEYS:
        return torch.bmm(q, k.mT)
    return torch.bmm(k, q.mT).mT.contiguous()


def table_row(table: Tensor, dst: int, key_heads: int, share: int, wide: torch.dtype) -> Tensor:
    """``table[:, :, dst]`` as ``[B|1, Hkv, G, R]``."""
    row = table.select(2, dst).view(table.shape[0], key_heads, share, ROLES)
    return row if row.dtype == wide else row.to(wide)
