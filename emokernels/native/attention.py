"""Attention of a few queries over many keys, on the CUDA kernels of csrc."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import ops as schemas
from ..errors import message
from ..ops import empty_outputs
from ..problem import Problem
from . import library
from .checks import WAY_OUT, called_directly, check_input, refuse_gradient
from .splits import plan_splits

MAX_QUERIES = 8
"""N up to which this is a decode step; longer prefills belong to other backends."""

MAX_HEAD_DIM = 256


def attend(problem: Problem, need_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Output z ``[B, H, N, D]`` in q's dtype (laid out as [B, N, H, D]); lse ``[B, H, N]`` float32, or None.

    float32 accumulation; in half precision the weights are rounded before they meet the values, as in FlashAttention.
    Keys are split over the GPU and merged in a fixed order, so results do not vary from run to run. Nothing waits for
    the device: the call can be captured in a CUDA graph.

    Raises:
        NotImplementedError: more than `MAX_QUERIES` queries, a head dimension that is no multiple of 8 or above 256,
            float64, a last dimension with a stride, or an input that wants a gradient.
    """
    names = ("q", "k", "v", "bias", "factor", "magnitude", "gain", "mask")
    refuse_gradient(**{name: getattr(problem, name) for name in names})
    _check(problem)
    z, lse = _attend(*problem) if called_directly(problem.q) else attention(*problem)
    return z, lse if need_lse else None


def _check(problem: Problem) -> None:
    for name in ("q", "k", "v"):
        check_input(name, getattr(problem, name))
    n, dim = problem.q.shape[2:]
    if n > MAX_QUERIES:
        raise NotImplementedError(message("q", f"at most {MAX_QUERIES} queries for 'native'", f"N={n}", WAY_OUT))
    if dim % 8 or dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            message("q", f"a head dimension that is a multiple of 8 up to {MAX_HEAD_DIM}", f"D={dim}", WAY_OUT)
        )


def _attend(*args: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*args)
    _check(problem)
    q, k = problem.q, problem.k
    batch, heads, n, dim = q.shape
    half = q.dtype != torch.float32
    splits = plan_splits(
        batch, k.shape[1], heads // k.shape[1] * n, k.shape[2], dim, _multiprocessors(q.device), half_precision=half
    )
    return run(problem, splits)


def run(problem: Problem, splits: int) -> tuple[Tensor, Tensor]:
    """`attend` over a given number of splits, without checks."""
    q = problem.q
    z, lse = empty_outputs(q)
    partial_z = partial_lse = None
    if splits > 1:
        partial_z = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(splits, *q.shape[:3], dtype=torch.float32, device=q.device)
    mask = problem.mask
    if mask is not None and mask.dtype == torch.float64:
        mask = mask.float()
    library.ops().decode_attention(
        q,
        problem.k,
        problem.v,
        _bytes(problem.roles),
        _bytes(problem.query_roles),
        *(_table(table) for table in (problem.bias, problem.factor, problem.magnitude, problem.gain)),
        mask,
        problem.lengths,
        problem.causal,
        problem.scale,
        problem.window,
        problem.softcap,
        splits,
        z,
        lse,
        partial_z,
        partial_lse,
    )
    return z, lse


def _bytes(roles: Tensor | None) -> Tensor | None:
    return roles if roles is None or roles.stride(1) == 1 else roles.contiguous()


def _table(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.float().contiguous()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _refuse(ctx: Any, *inputs: Any, **named: Any) -> Any:
    raise NotImplementedError(
        message("q", "inputs that need no gradient for 'native'", "one with requires_grad=True", WAY_OUT)
    )


attention = torch.library.custom_op(
    "emokernels::attention_native",
    _attend,
    mutates_args=(),
    schema=f"({schemas._PROBLEM}) -> (Tensor z, Tensor lse)",
)
attention.register_fake(lambda q, *rest: empty_outputs(q))
attention.register_autograd(_refuse, setup_context=_refuse)
