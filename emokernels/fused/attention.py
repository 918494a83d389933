"""Fused attention as the rest of the package calls it: configurations, the forward launch, and who does what."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..heads import HeadEdits
from ..ops import empty_outputs
from ..problem import Problem
from . import decode
from .arguments import edit_arguments, shared_stride, table_arguments
from .forward import forward_kernel
from .launch import Launch, arch_of, padded_dim
from .prefix import attend as attend_prefix
from .schedule import Schedule, mask_arguments, mask_kind, schedule_of


class Tiles(NamedTuple):
    """How the forward kernel is cut: rows and keys of a tile, warps, and what overlaps what.

    `num_stages` tiles of keys are under way in the main loop, `slow_stages` in that of the slow blocks. `room` is the
    largest `_burden` that these tiles have registers for.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    slow_stages: int = 1
    room: int = 99


CONFIGS: dict[tuple[str, int], dict[int, tuple[Tiles, ...]]] = {
    ("sm_80", 2): {
        64: (Tiles(128, 64, 8, 3),),
        128: (Tiles(128, 64, 8, 2, slow_stages=2, room=1), Tiles(128, 32, 8, 3)),
        256: (Tiles(64, 32, 8, 2, room=5), Tiles(64, 16, 8, 2)),
    },
    ("sm_90", 2): {
        64: (Tiles(128, 128, 8, 3, room=5), Tiles(128, 64, 8, 3)),
        128: (Tiles(128, 64, 8, 3, slow_stages=2, room=3), Tiles(128, 64, 8, 3)),
        256: (Tiles(128, 32, 8, 2, room=7), Tiles(64, 32, 8, 2)),
    },
    ("sm_100", 2): {
        64: (Tiles(128, 128, 8, 3),),
        128: (Tiles(128, 64, 8, 3, slow_stages=2, room=3), Tiles(128, 64, 8, 3)),
        256: (Tiles(64, 32, 8, 2),),
    },
    ("sm_80", 4): {
        64: (Tiles(32, 32, 4, 2, room=3), Tiles(32, 16, 4, 2)),
        128: (Tiles(16, 32, 4, 2),),
        256: (Tiles(16, 32, 8, 2),),
    },
    ("sm_90", 4): {
        64: (Tiles(64, 32, 4, 2, room=7), Tiles(16, 32, 4, 2)),
        128: (Tiles(16, 32, 4, 2),),
        256: (Tiles(16, 32, 8, 2),),
    },
    ("sm_100", 4): {64: (Tiles(64, 32, 8, 2),), 128: (Tiles(16, 32, 4, 2),), 256: (Tiles(16, 32, 8, 2),)},
}
"""(architecture, bytes of an element): {padded head dimension: tiles, the first with room for a problem is taken}."""


def _burden(problem: Problem, heads: HeadEdits | None) -> int:
    """How much a problem needs registers for beside its tiles.

    A bias counts twice (the shift of a row, and which rows it closes); an additive mask and vectors in head edits are
    numbers for each element of a tile and outweigh everything else.
    """
    small = (problem.factor, problem.magnitude, problem.gain, problem.mask)
    burden = 2 * (problem.bias is not None) + sum(t is not None for t in small) + (problem.softcap > 0)
    vectors = heads is not None and (heads.shift is not None or heads.replace is not None)
    return burden + 8 * (mask_kind(problem.mask) == "add" or vectors)


def tiles_for(problem: Problem, heads: HeadEdits | None, arch: str) -> Tiles:
    """The tiles for a problem; small head dimensions use those of 64."""
    offered = CONFIGS[arch, problem.q.element_size()][max(64, padded_dim(problem.q.shape[3]))]
    burden = _burden(problem, heads)
    return next(tiles for tiles in offered if burden <= tiles.room)


def forward_launch(
    problem: Problem, z: Tensor, lse: Tensor | None, schedule: Schedule | None, tiles: Tiles, heads: HeadEdits | None
) -> Launch:
    """The launch that fills z ``[B, H, N, D]`` and lse ``[B, H, N]`` (unless None) of a problem."""
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    batch, query_heads, n, dim = q.shape
    tables, routes = table_arguments(problem)
    edited, edits = edit_arguments(heads)
    values, lowest, at_mask = mask_arguments(mask, batch, query_heads)
    routed = problem.routed
    order, ends = schedule if schedule is not None else (None, None)
    args = {
        "q": q, "k": k, "v": v, "z": z, "lse": lse, "order": order, "ends": ends,
        "roles": problem.roles if routed else None, "query_roles": problem.query_roles if routed else None,
        **tables, **edited, "mask": values,
        **{
            f"stride_{name}_{axis}": t.stride(x)
            for name, t in (("q", q), ("k", k), ("v", v))
            for x, axis in enumerate("bhnd")
        },
        "stride_z_b": z.stride(0), "stride_z_h": z.stride(1), "stride_z_n": z.stride(2),
        "stride_order_b": 0 if order is None or order.shape[0] == 1 else order.shape[1] * order.shape[2],
        "stride_order_h": 0 if order is None or order.shape[1] == 1 else order.shape[2],
        "stride_role_b": shared_stride(problem.roles, 0), "stride_query_b": shared_stride(problem.query_roles, 0),
        **{f"stride_mask_{axis}": stride for axis, stride in zip("bhnk", at_mask, strict=True)}, "lowest": lowest,
        "n": n, "keys": k.shape[2], "length": 0 if order is None else order.shape[3], "heads": query_heads,
        "share": query_heads // k.shape[1], "dim": dim, "window": problem.window,
        "scale": abs(problem.scale), "cap": problem.softcap,
    }  # fmt: skip
    meta = {
        "SCHEDULED": schedule is not None, "ROUTED": routed,
        **routes, **edits,
        "MASK": mask_kind(mask), "CAUSAL": problem.causal, "WINDOW": problem.window > 0,
        "SOFTCAP": problem.softcap > 0, "LSE": lse is not None,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee", "NEGATIVE": problem.scale < 0,
        "EVEN": padded_dim(dim) == dim, "SLOW_STAGES": tiles.slow_stages,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "DIM": padded_dim(dim),
        # 256 float32 numbers of q a row, each in the two parts that TF32 needs, are more than there are registers.
        "CHUNK": 64 if q.dtype == torch.float32 and padded_dim(dim) == 256 else padded_dim(dim),
    }  # fmt: skip
    grid = (triton.cdiv(n, tiles.block_m), query_heads, batch)
    # With a list of blocks two loads follow each other, and Triton shares the stages out between them: so many of them
    # keep as many tiles of keys under way as without one.
    stages = tiles.num_stages if schedule is None else 2 * tiles.num_stages - 1
    return Launch(forward_kernel, grid, args, meta, tiles.num_warps, stages)


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
    tiles = tiles_for(problem, heads, arch_of(problem.q))
    schedule = schedule_of(problem, tiles.block_m, tiles.block_n) if needs_schedule(problem) else None
    forward_launch(problem, z, lse if need_lse else None, schedule, tiles, heads).run()
    return z, lse if need_lse else None
