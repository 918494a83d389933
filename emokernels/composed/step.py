"""One query per row, as in a decode step: two products, one softmax, and routes on slices of the scores.

Query heads that share a key head are the rows of one product, so K and V are read once. Everything else here is about
not spending microseconds: a decode step of a small model takes a few of them per layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from ..routes import ROLES
from .layout import known_runs
from .softmax import additive, finish
from .tables import Alike

MAX_SLICES = 12
"""More runs of keys than this that change something are left to the tiles, which gather."""

LARGE_KEYS = 1 << 21
"""Elements of K from which it streams from memory: ``k q^T`` then reads it up to three times as fast as ``q k^T``."""

Slices = list[tuple[int, int, int]]
"""(source role, start, stop)"""


def slices_of(key_bytes: bytes, dst: int, alike: Alike) -> tuple[Slices, Slices] | None:
    """Runs of keys whose logits change, and runs whose weights change, for queries of role `dst`; None when many."""
    return alike.slices.get((key_bytes, dst), lambda: _slices(key_bytes, dst, alike))


def _slices(key_bytes: bytes, dst: int, alike: Alike) -> tuple[Slices, Slices] | None:
    runs = known_runs(key_bytes)
    if len(runs) > MAX_SLICES:
        return None
    logits = [run for run in runs if alike.changes_logits(dst, run[0])]
    return logits, [run for run in runs if alike.changes_weights(dst, run[0])]


def attend_step(
    problem: Problem, dst: int, slices: tuple[Slices, Slices], may_be_empty: bool, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Z ``[B, H, 1, D]`` and lse ``[B, H, 1]`` for queries that all have role `dst` and share one key layout."""
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, _, dim = q.shape
    key_heads = k.shape[1]
    share = heads // key_heads
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    narrow = q.dtype != wide
    if narrow:
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    # [B, Hkv, G, K]
    folded = batch * key_heads
    s = _products((q * problem.scale).reshape(folded, share, dim), k.reshape(folded, -1, dim))
    s = s.view(batch, key_heads, share, -1)
    if problem.softcap:
        s = s.div_(problem.softcap).tanh_().mul_(problem.softcap)
    logits, weights = slices
    if logits:
        bias, factor, magnitude = (
            _row(table, dst, key_heads, share, wide) for table in (problem.bias, problem.factor, problem.magnitude)
        )
        for src, start, stop in logits:
            part = s[..., start:stop]
            extra = part.abs().mul_(magnitude[..., src : src + 1]) if magnitude is not None else None
            if factor is not None:
                part.mul_(factor[..., src : src + 1])
            if extra is not None:
                part.add_(extra)
            if bias is not None:
                part.add_(bias[..., src : src + 1])
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
    if weights:
        gain = _row(problem.gain, dst, key_heads, share, wide)
        for src, start, stop in weights:
            if gain is not None:
                p[..., start:stop].mul_(gain[..., src : src + 1])
    z = torch.bmm(p.view(folded, share, -1), v.reshape(folded, -1, dim)).view(batch, 1, heads, dim)
    return (z.to(problem.q.dtype) if narrow else z).transpose(1, 2), lse


def _products(q: Tensor, k: Tensor) -> Tensor:
    """``q k^T`` of ``[X, G, D]`` and ``[X, K, D]``, contiguous ``[X, G, K]``."""
    if k.numel() < LARGE_KEYS:
        return torch.bmm(q, k.mT)
    return torch.bmm(k, q.mT).mT.contiguous()


def _row(table: Tensor | None, dst: int, key_heads: int, share: int, wide: torch.dtype) -> Tensor | None:
    """``table[:, :, dst]`` as ``[B|1, Hkv, G, R]``."""
    if table is None:
        return None
    row = table.select(2, dst).view(table.shape[0], key_heads, share, ROLES)
    return row if row.dtype == wide else row.to(wide)
