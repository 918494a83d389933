"""The merge itself: attention over disjoint sets of keys from the attention over each, by log-sum-exp.

With a bias b_k and a gain g_k per set (docs/kernels.md)::

    lse = logsumexp_k(lse_k + b_k)        z = sum_k g_k * exp(lse_k + b_k - lse) * z_k

Float32 throughout (float64 for float64 results), and nothing is subtracted: a gain near 0 on a set that holds nearly
all the weight loses nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .softmax import accumulator


def weigh(shares: list[Tensor], may_be_empty: bool) -> tuple[list[Tensor | None], Tensor]:
    """``exp(share - total)`` for every set, None where that is 1, and ``total = logsumexp(shares)``.

    Args:
        shares: ``lse_k + b_k [B, H, N]`` of every set.
        may_be_empty: a share can be -inf, which gets weight 0 even when all of them are.
    """
    if len(shares) == 1:
        total = shares[0]
        return [(total > -torch.inf).to(total.dtype) if may_be_empty else None], total
    stacked = torch.stack(shares)
    weights = torch.softmax(stacked, 0)
    top = stacked.amax(0)
    # The largest weight is exp(top - total) >= 1 / sets: the same as logsumexp, five times faster.
    total = top - weights.amax(0).log_()
    if may_be_empty:
        empty = top == -torch.inf
        weights.masked_fill_(empty.unsqueeze(0), 0.0)
        total.masked_fill_(empty, -torch.inf)
    return list(weights.unbind(0)), total


def weighted_sum(parts: list[Tensor], weights: list[Tensor | None], out: Tensor) -> None:
    """``out = sum_k weights_k * parts_k``, accumulated in float32 for half-precision parts.

    Args:
        parts: ``[B, Hkv, G, N, D]``, query heads grouped by their key head.
        weights: ``[B|1, H, N|1]``, None for 1 (only ever of a single part).
        out: ``[B, H, N, D]``, any strides.
    """
    wide = accumulator(out.dtype)
    groups = parts[0].shape[1:3]
    out = out.unflatten(1, groups)
    total = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        if weight is None:
            out.copy_(part)
            return
        factor = weight.unflatten(1, groups).unsqueeze(-1).to(wide)
        if number == 0:
            torch.mul(part, factor, out=total)
        else:
            total.addcmul_(part, factor) if part.dtype == wide else total.addcmul_(part.to(wide), factor)
    if total is not out:
        out.copy_(total)
