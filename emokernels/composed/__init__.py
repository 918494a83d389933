"""Routed attention from stock pieces: torch's own attention kernels merged by log-sum-exp, and tiles for the rest."""

from __future__ import annotations

from torch import Tensor

from ..problem import Problem
from .mlp import activate
from .plain import is_plain, plain
from .tiles import attend_tiled

__all__ = ["activate", "attend", "attend_with_lse", "is_plain", "plain"]


def attend(problem: Problem, need_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """z ``[B, H, N, D]`` and lse ``[B, H, N]`` (None unless needed); no gradient."""
    return attend_tiled(problem, need_lse)


def attend_with_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    """`attend` in the form the op needs: z in its declared layout, lse always there."""
    z, lse = attend(problem, need_lse=True)
    assert lse is not None
    return z.transpose(1, 2).contiguous().transpose(1, 2), lse
