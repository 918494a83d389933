"""One query per row, as in a decode step: two products, one softmax, and routes on slices of the scores.

Query heads that share a key head are the rows of one product, so K and V are read once. Everything else here is about
not spending microseconds: a decode step of a small model takes a few of them per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from ..routes import ROLES, Role
from .layout import known_runs, row_bytes
from .softmax import additive, finish
from .tables import Alike, inspect

GENERATED = int(Role.GENERATED)

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
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
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


class StepMask(NamedTuple):
    """The mask of a decode step, ready for every layer: values to add, and which rows see no key (None: all do)."""

    given: Tensor
    values: Tensor
    empty: Tensor | None

    @staticmethod
    def of(mask: Tensor, dtype: torch.dtype) -> StepMask:
        """From ``[B|1, 1|H, 1, K]``, bool or additive, for scores of `dtype`."""
        values = additive(mask, dtype)
        empty = (values == -torch.inf).all(-1, keepdim=True)
        return StepMask(mask, values, empty if bool(empty.any()) else None)


@dataclass(frozen=True)
class Step:
    """A decode step that was analysed once: what `attend_step` needs besides q, k, v and the mask.

    Holds as long as the tables are not written to and the keys that were there keep their roles; keys that are appended
    must have role `GENERATED`.
    """

    template: Problem
    dst: int
    where: tuple[Slices, Slices] | Dense
    masks: bool
    gains: list[tuple[int, int, Tensor]] | None
    """Where only weights change: (start, stop, gain ``[B|1, Hkv, G, 1 or stop - start]``)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: StepMask | None, scale: float) -> Tensor:
        """Z ``[B, H, 1, D]``; `mask` as `StepMask.of` made it, once for all layers of the step."""
        if self.gains is not None and k.numel() < LARGE_KEYS and (mask is None or mask.given.shape[1] == 1):
            return _weighed(q, k, v, mask, scale, self.gains)
        problem = self.template._replace(q=q, k=k, v=v, mask=None if mask is None else mask.given, scale=scale)
        return attend_step(problem, self.dst, self.where, mask is not None or self.masks, False)[0]


def prepare_step(problem: Problem) -> Step | None:
    """Analyse a decode step for all that follow it; None when later steps need an analysis of their own."""
    if problem.q.device.type != "cpu" or problem.q.shape[2] != 1 or problem.window or not problem.routed:
        return None
    if problem.roles is None or problem.query_roles is None:
        return None
    queries, keys = row_bytes(problem.query_roles), row_bytes(problem.roles)
    if queries is None or keys is None or len(queries) != 1:
        return None
    alike, dst = inspect(problem), queries[0][0]
    if problem.q.element_size() == 2 or alike.changes_logits(dst, GENERATED) or alike.changes_weights(dst, GENERATED):
        return None
    where = slices_of(keys[0], dst, alike) if len(keys) == 1 else dense_of(keys, dst, alike, problem)
    if where is None:
        return None
    empty = problem.q.new_empty(0)
    gains = _gains(problem, dst, where)
    template = problem._replace(q=empty, k=empty, v=empty, roles=None, query_roles=None, mask=None)
    return Step(template, dst, where, alike.masks, gains)


def _gains(problem: Problem, dst: int, where: tuple[Slices, Slices] | Dense) -> list[tuple[int, int, Tensor]] | None:
    """What `_weighed` multiplies the weights by; None when logits change as well or the problem has more to it."""
    if problem.softcap or problem.gain is None:
        return None
    if isinstance(where, Dense):
        only = where.gain is not None and where.bias is where.factor is where.magnitude is None
        return [(0, where.stop, where.gain)] if only and where.gain is not None else None
    if where[0]:
        return None
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    key_heads = problem.k.shape[1]
    row = _row(problem.gain.detach(), dst, key_heads, problem.q.shape[1] // key_heads, wide)
    assert row is not None
    with torch.inference_mode(False):
        return [(start, stop, row[..., src : src + 1].clone()) for src, start, stop in where[1]]


def _weighed(
    q: Tensor, k: Tensor, v: Tensor, mask: StepMask | None, scale: float, gains: list[tuple[int, int, Tensor]]
) -> Tensor:
    """`attend_step` where only weights change, in as few calls as it takes."""
    batch, heads, _, dim = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    folded = batch * key_heads
    s = torch.bmm((q * scale).reshape(folded, -1, dim), k.reshape(folded, keys, dim).mT)
    if mask is not None:
        s.view(batch, key_heads, -1, keys).add_(mask.values)
    p = torch.softmax(s, -1)
    weights = p.view(batch, key_heads, -1, keys)
    if mask is not None and mask.empty is not None:
        weights.masked_fill_(mask.empty, 0.0)
    for start, stop, gain in gains:
        weights[..., start:stop].mul_(gain)
    return torch.bmm(p, v.reshape(folded, keys, dim)).view(batch, 1, heads, dim).transpose(1, 2)


def attend_step(
    problem: Problem, dst: int, where: tuple[Slices, Slices] | Dense, may_be_empty: bool, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Z ``[B, H, 1, D]`` and lse ``[B, H, 1]`` for queries that all have role `dst`.

    `where` says which scores the tables change: slices when the rows share one key layout, else `Dense`.
    """
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
    dense = where if isinstance(where, Dense) else None
    logits, weights = ([], []) if isinstance(where, Dense) else where
    if dense is not None:
        _route(s[..., : dense.stop], dense.bias, dense.factor, dense.magnitude)
    if logits:
        bias, factor, magnitude = (
            _row(table, dst, key_heads, share, wide) for table in (problem.bias, problem.factor, problem.magnitude)
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
    if weights:
        gain = _row(problem.gain, dst, key_heads, share, wide)
        for src, start, stop in weights:
            if gain is not None:
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


def _row(table: Tensor | None, dst: int, key_heads: int, share: int, wide: torch.dtype) -> Tensor | None:
    """``table[:, :, dst]`` as ``[B|1, Hkv, G, R]``."""
    if table is None:
        return None
    row = table.select(2, dst).view(table.shape[0], key_heads, share, ROLES)
    return row if row.dtype == wide else row.to(wide)
