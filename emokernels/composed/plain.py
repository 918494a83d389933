"""Attention without routes: exactly the stock call, with the arguments that Hugging Face's sdpa path gives it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Problem

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

MAX_GQA_DIM = 256
"""Largest head dimension for which transformers asks SDPA for grouped queries (integrations/sdpa_attention.py)."""


def is_plain(problem: Problem) -> bool:
    """True when stock attention computes the problem as it stands."""
    return not (problem.routed or problem.window or problem.softcap)


def plain(problem: Problem) -> Tensor:
    """Z ``[B, H, N, D]`` by ``F.scaled_dot_product_attention``; the same bits as Hugging Face's sdpa path.

    A causal call with fewer queries than keys, which Hugging Face makes with a mask, gets the bottom-right mask here.
    """
    q, k, v = problem.q, problem.k, problem.v
    mask, causal = _mask_and_flag(problem)
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(q.dtype)
    share = q.shape[1] // k.shape[1]
    grouped = share > 1 and mask is None and q.shape[3] <= MAX_GQA_DIM
    packed = share > 1 and not grouped and q.shape[2] == 1 and (mask is None or mask.shape[1] == 1)
    if packed:
        q = q.reshape(q.shape[0], k.shape[1], share, q.shape[3])
    elif share > 1 and not grouped:
        k, v = _repeat(k, share), _repeat(v, share)
    z = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=problem.scale, enable_gqa=grouped)
    return z.reshape(problem.q.shape) if packed else z


def plain_with_lse(problem: Problem) -> tuple[Tensor, Tensor]:
    """Z and lse ``[B, H, N]`` on a CPU, by the kernel that `plain` ends in; rows without keys give 0 and -inf."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (problem.q, problem.k, problem.v))
    mask, causal = _mask_and_flag(problem)
    if mask is None:
        z, lse = _flash(q, k, v, 0.0, causal, scale=problem.scale)
        return z, lse
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
    values = q.new_zeros(()) if mask.dtype == torch.bool else mask.to(q.dtype)
    additive = torch.where(hidden, q.new_full((), -torch.inf), values)
    z, lse = _flash(q, k, v, 0.0, False, attn_mask=additive, scale=problem.scale)
    empty = hidden.all(-1).expand(lse.shape)
    return z.masked_fill_(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, -torch.inf)


def _mask_and_flag(problem: Problem) -> tuple[Tensor | None, bool]:
    """The mask and is_causal for a stock call: a causal call with fewer queries than keys needs a mask."""
    n, keys = problem.q.shape[2], problem.k.shape[2]
    mask = problem.mask
    if not problem.causal or n == 1 or (mask is None and n == keys):
        return mask, problem.causal and n > 1
    lower = torch.ones(n, keys, dtype=torch.bool, device=problem.q.device).tril(keys - n)
    if mask is None:
        return lower[None, None], False
    return (mask & lower if mask.dtype == torch.bool else mask.masked_fill(~lower, -torch.inf)), False


def _repeat(x: Tensor, share: int) -> Tensor:
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, share, length, dim).reshape(batch, heads * share, length, dim)
