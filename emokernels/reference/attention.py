"""Attention with routes, written as the formula. Keeps every [B, H, N, K] tensor: for checking, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output z ``[B, H, N, D]`` (dtype of q) and lse ``[B, H, N]`` (float32, float64 for float64 q).

    Half-precision inputs are computed in float32 and rounded once. Differentiable by plain autograd in everything.
    """
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    q, k, v = problem.q.to(wide), problem.k.to(wide), problem.v.to(wide)
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)

    s = problem.scale * (q @ k.mT)
    if problem.softcap:
        s = problem.softcap * torch.tanh(s / problem.softcap)
    routed = s
    if problem.factor is not None:
        routed = _per_pair(problem.factor, problem).to(wide) * s
    if problem.magnitude is not None:
        routed = routed + _per_pair(problem.magnitude, problem).to(wide) * s.abs()
    if problem.bias is not None:
        routed = routed + _per_pair(problem.bias, problem).to(wide)
    visible, additive = _visibility(problem)
    if additive is not None:
        routed = routed + additive.to(wide)
    routed = routed.masked_fill(~visible, -torch.inf)

    # A maximum of 0 for rows without keys keeps NaN out of the values and of the gradients.
    top = routed.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    e = torch.exp(routed - top)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    p = e / total
    if problem.gain is not None:
        p = p * _per_pair(problem.gain, problem).to(wide)
    z = p @ v
    lse = (torch.log(total) + top).masked_fill(empty, -torch.inf).squeeze(-1)
    return z.transpose(1, 2).to(problem.q.dtype).contiguous().transpose(1, 2), lse.contiguous()


def _per_pair(table: Tensor, problem: Problem) -> Tensor:
    """``table[row, head, role of query i, role of key j]`` as ``[B|1, H, N, K]``."""
    if problem.roles is None or problem.query_roles is None:
        raise ValueError("roles: expected role tensors with routes, got None. Pass roles=[B|1, K] uint8.")
    query_roles, roles = problem.query_roles.long(), problem.roles.long()
    rows = max(table.shape[0], query_roles.shape[0], roles.shape[0])
    row = torch.arange(rows, device=table.device)[:, None, None]
    pairs = table.expand(rows, -1, -1, -1)[row, :, query_roles[:, :, None], roles[:, None, :]]
    return pairs.permute(0, 3, 1, 2)


def _visibility(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Which keys a query sees, ``[B|1, 1|H, N, K]`` bool, and the additive mask if one was given."""
    n, keys, device = problem.q.shape[2], problem.k.shape[2], problem.q.device
    # The last query is at the last key there is: key K - 1, or key lengths - 1 of a cache that is not full.
    end = (
        torch.full((1, 1, 1, 1), keys, device=device) if problem.lengths is None else problem.lengths.view(-1, 1, 1, 1)
    )
    j = torch.arange(keys, device=device)
    i = torch.arange(n, device=device)[:, None] + end - n
    visible = (j < end).expand(-1, 1, n, -1)
    if problem.causal:
        visible = visible & (j <= i)
    if problem.window:
        visible = visible & (j > i - problem.window)
    mask = problem.mask
    if mask is None:
        return visible, None
    if mask.dtype == torch.bool:
        return visible & mask, None
    return visible & (mask > torch.finfo(mask.dtype).min), mask
