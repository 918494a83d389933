"""Routed attention from stock pieces: torch's own attention kernels merged by log-sum-exp, and tiles for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from .mlp import activate
from .plain import is_plain, plain
from .spans import attend_by_spans, group_rows
from .tables import inspect
from .tiles import attend_tiled
from .visible import visible_keys

__all__ = ["activate", "attend", "attend_with_lse", "is_plain", "plain"]

SMALL_SCORES = 1 << 18
"""Problems with fewer scores per layout finish in one tile before a merge has made its calls."""
FEW_ROWS = 16
"""Up to this many query rows (decode steps), the tile is small and one read of K and V is the whole cost."""


def attend(problem: Problem, need_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """z ``[B, H, N, D]`` and lse ``[B, H, N]`` (None unless needed); no gradient."""
    q, k = problem.q, problem.k
    batch, heads, n, _ = q.shape
    half = q.dtype in (torch.bfloat16, torch.float16)
    scores = heads * n * k.shape[2]
    # In half precision a tile first converts K and V to float32, so stock kernels win as soon as there are many keys.
    small = n <= FEW_ROWS if not half else k.shape[2] * n <= FEW_ROWS * FEW_ROWS
    if q.device.type != "cpu" or problem.softcap or small or scores < SMALL_SCORES:
        return attend_tiled(problem, need_lse)
    visible = visible_keys(problem)
    if visible is None:
        return attend_tiled(problem, need_lse)
    alike = inspect(problem)
    groups = None if alike.magnitude else group_rows(problem, alike, visible)
    if groups is None:
        return attend_tiled(problem, need_lse)
    return attend_by_spans(problem, alike, groups, need_lse)


def attend_with_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    """`attend` in the form the op needs: z in its declared layout, lse always there."""
    z, lse = attend(problem, need_lse=True)
    assert lse is not None
    return z.transpose(1, 2).contiguous().transpose(1, 2), lse
