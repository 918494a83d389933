"""Fused attention as the rest of the package calls it: configurations, the forward launch, and who does what."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..heads import HeadEdits
from ..ops import empty_outputs
from ..problem import Problem
from . import decode
from .forward import forward_kernel
from .launch import Config, Launch, arch_of, padded_dim
from .prefix import attend as attend_prefix
from .schedule import Schedule, mask_arguments, mask_kind, schedule_of

# (architecture, bytes of an element): {padded head dimension: configuration}
CONFIGS: dict[tuple[str, int], dict[int, Config]] = {
    ("sm_80", 2): {64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 4, 2)},
    ("sm_90", 2): {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 64, 4, 2)},
    ("sm_100", 2): {64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 64, 8, 2)},
    ("sm_80", 4): {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 16, 4, 1)},
    ("sm_90", 4): {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 16, 4, 1)},
    ("sm_100", 4): {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 16, 4, 1)},
}


SLOW_STAGES = 2


def config_for(arch: str, element_size: int, dim: int) -> Config:
    """The tile sizes for a padded head dimension; small ones use those of 64."""
    return CONFIGS[arch, element_size][max(64, dim)]


def _stride(tensor: Tensor | None, dimension: int) -> int:
    """The stride of a dimension, 0 where it is shared (size 1) or there is no tensor."""
    return 0 if tensor is None or tensor.shape[dimension] == 1 else tensor.stride(dimension)


def forward_launch(
    problem: Problem, z: Tensor, lse: Tensor | None, schedule: Schedule | None, config: Config, heads: HeadEdits | None
) -> Launch:
    """The launch that fills z ``[B, H, N, D]`` and lse ``[B, H, N]`` (unless None) of a problem."""
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    batch, query_heads, n, dim = q.shape
    edits = heads if heads is not None else HeadEdits()
    scale, chosen = _dense_last(edits.scale, 1), _dense_last(edits.mask, 1)
    shift, replace = _dense_last(edits.shift, 2), _dense_last(edits.replace, 2)
    values, lowest, at_mask = mask_arguments(mask, batch, query_heads)
    tables = {
        "bias": problem.bias, "factor": problem.factor, "magnitude": problem.magnitude, "gain": problem.gain
    }  # fmt: skip
    tables = {name: None if table is None else table.contiguous() for name, table in tables.items()}
    routed = problem.routed
    order, ends = schedule if schedule is not None else (None, None)
    args = {
        "q": q, "k": k, "v": v, "z": z, "lse": lse, "order": order, "ends": ends,
        "roles": problem.roles if routed else None, "query_roles": problem.query_roles if routed else None,
        **tables, "mask": values,
        "head_scale": scale, "head_shift": shift, "head_replace": replace,
        "head_mask": None if chosen is None else chosen.view(torch.uint8),
        **{
            f"stride_{name}_{axis}": t.stride(x)
            for name, t in (("q", q), ("k", k), ("v", v))
            for x, axis in enumerate("bhnd")
        },
        "stride_z_b": z.stride(0), "stride_z_h": z.stride(1), "stride_z_n": z.stride(2),
        "stride_order_b": 0 if order is None or order.shape[0] == 1 else order.shape[1] * order.shape[2],
        "stride_order_h": 0 if order is None or order.shape[1] == 1 else order.shape[2],
        "stride_role_b": _stride(problem.roles, 0), "stride_query_b": _stride(problem.query_roles, 0),
        **{f"stride_{name}_b": _stride(table, 0) for name, table in tables.items()},
        **{f"stride_mask_{axis}": stride for axis, stride in zip("bhnk", at_mask, strict=True)}, "lowest": lowest,
        **{
            f"stride_{name}_{axis}": _stride(t, x)
            for name, t in (("scale", scale), ("shift", shift), ("replace", replace), ("chosen", chosen))
            for x, axis in enumerate("bn")
        },
        "n": n, "keys": k.shape[2], "length": 0 if order is None else order.shape[3], "heads": query_heads,
        "share": query_heads // k.shape[1], "dim": dim, "window": problem.window,
        "scale": abs(problem.scale), "cap": problem.softcap,
    }  # fmt: skip
    meta = {
        "SCHEDULED": schedule is not None, "ROUTED": routed,
        "BIAS": problem.bias is not None, "FACTOR": problem.factor is not None,
        "MAGNITUDE": problem.magnitude is not None, "GAIN": problem.gain is not None,
        "MASK": mask_kind(mask), "CAUSAL": problem.causal, "WINDOW": problem.window > 0,
        "SOFTCAP": problem.softcap > 0, "HEAD_SCALE": scale is not None, "HEAD_SHIFT": shift is not None,
        "HEAD_REPLACE": replace is not None, "LSE": lse is not None,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee", "NEGATIVE": problem.scale < 0,
        "EVEN": padded_dim(dim) == dim, "SLOW_STAGES": SLOW_STAGES,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "DIM": padded_dim(dim),
    }  # fmt: skip
    grid = (triton.cdiv(n, config.block_m), query_heads, batch)
    # The list of blocks is read one stage ahead of the keys.
    stages = config.num_stages + (schedule is not None)
    return Launch(forward_kernel, grid, args, meta, config.num_warps, stages)


def _dense_last(value: Tensor | None, dimensions: int) -> Tensor | None:
    """`value` with its last dimensions dense, as the kernel indexes them; small, and copied only when they are not."""
    if value is None:
        return None
    wanted = 1
    for x in range(1, dimensions + 1):
        if value.shape[-x] > 1 and value.stride(-x) != wanted:
            return value.contiguous()
        wanted *= value.shape[-x]
    return value


def needs_schedule(problem: Problem) -> bool:
    """Routes and masks sort the key blocks; the rest is a contiguous range."""
    return problem.routed or problem.mask is not None


def attend(
    problem: Problem,
    heads: HeadEdits | None = None,
    need_lse: bool = True,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Z ``[B, H, N, D]`` (laid out as [B, N, H, D]) and lse ``[B, H, N]`` (None unless needed); no gradient.

    A few queries on many keys go to `decode`, a shared prefix to `prefix`, the rest through the forward kernel.
    """
    if prefix is not None:
        return attend_prefix(problem, *prefix, heads, need_lse)
    if decode.suits(problem):
        return decode.attend(problem, heads, need_lse)
    problem = problem.fold_lengths()
    z, lse = empty_outputs(problem.q)
    config = config_for(arch_of(problem.q), problem.q.element_size(), padded_dim(problem.q.shape[3]))
    schedule = schedule_of(problem, config.block_m, config.block_n) if needs_schedule(problem) else None
    forward_launch(problem, z, lse if need_lse else None, schedule, config, heads).run()
    return z, lse if need_lse else None
