"""Attention without routes: exactly the stock call, with the arguments that Hugging Face's sdpa path gives it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Problem

MAX_GQA_DIM = 256
"""Largest head dimension for which transformers asks SDPA for grouped queries (integrations/sdpa_attention.py)."""


def is_plain(problem: Problem) -> bool:
    """True when stock attention computes the problem as it stands."""
    return not (problem.routed or problem.window or problem.softcap)


def plain(problem: Problem) -> Tensor:
    """z ``[B, H, N, D]`` by ``F.scaled_dot_product_attention``; the same bits as Hugging Face's sdpa path.

    A causal call with fewer queries than keys, which Hugging Face makes with a mask, gets the bottom-right mask here.
    """
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    n, keys = q.shape[2], k.shape[2]
    causal = problem.causal and n > 1
    if causal and (mask is not None or n != keys):
        lower = torch.ones(n, keys, dtype=torch.bool, device=q.device).tril(keys - n)
        if mask is None:
            mask = lower
        elif mask.dtype == torch.bool:
            mask = mask & lower
        else:
            mask = mask.masked_fill(~lower, -torch.inf)
        causal = False
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(q.dtype)
    share = q.shape[1] // k.shape[1]
    grouped = share > 1 and mask is None and q.shape[3] <= MAX_GQA_DIM
    packed = share > 1 and not grouped and n == 1 and (mask is None or mask.shape[1] == 1)
    if packed:
        q = q.reshape(q.shape[0], k.shape[1], share, q.shape[3])
    elif share > 1 and not grouped:
        k, v = _repeat(k, share), _repeat(v, share)
    z = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=problem.scale, enable_gqa=grouped)
    return z.reshape(problem.q.shape) if packed else z


def _repeat(x: Tensor, share: int) -> Tensor:
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, share, length, dim).reshape(batch, heads * share, length, dim)
