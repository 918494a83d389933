"""Decode steps of a CPU that are analysed once for a whole generation.

All of it is about not spending microseconds: a decode step of a small model takes a few of them per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from ..routes import Role
from . import host, step
from .layout import row_bytes
from .softmax import accumulator, additive
from .tables import inspect

GENERATED = int(Role.GENERATED)


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
    where: step.Where
    masks: bool
    gains: list[tuple[int, int, Tensor]] | None
    """Where only weights change: (start, stop, gain ``[B|1, Hkv, G, 1 or stop - start]``)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: StepMask | None, scale: float) -> Tensor:
        """Z ``[B, H, 1, D]``; `mask` as `StepMask.of` made it, once for all layers of the step."""
        if self.gains is not None and k.numel() < step.LARGE_KEYS and (mask is None or mask.given.shape[1] == 1):
            return _weighed(q, k, v, mask, scale, self.gains)
        problem = self.template._replace(q=q, k=k, v=v, mask=None if mask is None else mask.given, scale=scale)
        return step.attend_step(problem, self.dst, self.where, mask is not None or self.masks, False)[0]


def prepare_step(problem: Problem) -> Step | None:
    """Analyse a decode step for all that follow it; None when later steps need an analysis of their own."""
    if not host.owns(problem.q) or problem.q.shape[2] != 1 or problem.window or not problem.routed:
        return None
    if problem.roles is None or problem.query_roles is None:
        return None
    queries, keys = row_bytes(problem.query_roles), row_bytes(problem.roles)
    if queries is None or keys is None or len(queries) != 1:
        return None
    alike, dst = inspect(problem), queries[0][0]
    if problem.q.element_size() == 2 or alike.changes_logits(dst, GENERATED) or alike.changes_weights(dst, GENERATED):
        return None
    where = step.slices_of(keys[0], dst, alike) if len(keys) == 1 else step.dense_of(keys, dst, alike, problem)
    if where is None:
        return None
    empty = problem.q.new_empty(0)
    gains = _gains(problem, dst, where)
    template = problem._replace(q=empty, k=empty, v=empty, roles=None, query_roles=None, mask=None)
    return Step(template, dst, where, alike.masks, gains)


def _gains(problem: Problem, dst: int, where: step.Where) -> list[tuple[int, int, Tensor]] | None:
    """What `_weighed` multiplies the weights by; None when logits change as well or the problem has more to it."""
    if problem.softcap or problem.gain is None:
        return None
    if isinstance(where, step.Dense):
        only = where.gain is not None and where.bias is where.factor is where.magnitude is None
        return [(0, where.stop, where.gain)] if only and where.gain is not None else None
    if where[0]:
        return None
    key_heads = problem.k.shape[1]
    share, wide = problem.q.shape[1] // key_heads, accumulator(problem.q.dtype)
    row = step.table_row(problem.gain.detach(), dst, key_heads, share, wide)
    with torch.inference_mode(False):
        return [(start, stop, row[..., src : src + 1].clone()) for src, start, stop in where[1]]


_NOTHING = {dtype: torch.zeros(1, 1, 1, dtype=dtype) for dtype in (torch.float32, torch.float64)}


def _weighed(
    q: Tensor, k: Tensor, v: Tensor, mask: StepMask | None, scale: float, gains: list[tuple[int, int, Tensor]]
) -> Tensor:
    """`attend_step` where only weights change, in as few calls as it takes."""
    batch, heads, _, dim = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    folded = batch * key_heads
    # Scaled by the product itself: what it would add is not read.
    s = torch.baddbmm(
        _NOTHING[q.dtype], q.reshape(folded, -1, dim), k.reshape(folded, keys, dim).mT, beta=0, alpha=scale
    )
    if mask is not None:
        s.view(batch, key_heads, -1, keys).add_(mask.values)
    p = torch.softmax(s, -1)
    weights = p.view(batch, key_heads, -1, keys)
    if mask is not None and mask.empty is not None:
        weights.masked_fill_(mask.empty, 0.0)
    for start, stop, gain in gains:
        weights[..., start:stop].mul_(gain)
    return torch.bmm(p, v.reshape(folded, keys, dim)).view(batch, 1, heads, dim).transpose(1, 2)
