"""Attention flow, written as the formula. Keeps every [B, H, N, K] tensor: for checking, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from ..routes import ROLES
from .attention import attend


def measure_flow(problem: Problem, grad_z: Tensor | None) -> Tensor:
    """Mass, or with `grad_z` saliency, per (destination role, source role): ``[B, H, R, R]`` float32 or float64."""
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    batch, heads = problem.q.shape[:2]
    key_heads, keys = problem.k.shape[1:3]
    # A is what multiplies the values, so it is the output of attention when the values are the unit vectors.
    units = torch.eye(keys, dtype=wide, device=problem.q.device).expand(batch, key_heads, keys, keys)
    pairs, _ = attend(problem._replace(q=problem.q.to(wide), k=problem.k.to(wide), v=units))
    if grad_z is not None:
        v = problem.v.to(wide).repeat_interleave(heads // key_heads, dim=1)
        pairs = (pairs * (grad_z.to(wide) @ v.mT)).abs()
    if problem.roles is None or problem.query_roles is None:
        raise ValueError("roles: expected role tensors, got None. Pass roles=[B|1, K] uint8.")
    return _one_hot(problem.query_roles, wide).mT @ pairs @ _one_hot(problem.roles, wide)


def _one_hot(roles: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B|1, 1, length, R]``."""
    return torch.nn.functional.one_hot(roles.long(), ROLES).to(dtype).unsqueeze(1)
