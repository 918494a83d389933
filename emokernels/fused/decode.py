"""Attention of few queries against many keys: slices of the keys side by side, then their merge.

The number of slices follows from shapes and the number of SMs alone; where a slice begins is worked out on the device
from the lengths (`decode_kernel.py`). So a captured CUDA graph follows a static cache as it fills, and its tables.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..heads import HeadEdits
from ..ops import empty_outputs
from ..problem import Problem
from .arguments import edit_arguments, shared_stride, table_arguments
from .decode_kernel import merge_kernel, partial_kernel
from .launch import Config, Launch, arch_of, padded_dim
from .schedule import mask_arguments, mask_kind

FEW_ROWS = 64
"""Rows that share their keys (query heads of a key head times positions) up to which this is the way to compute."""
FEW_QUERIES = 8
MAX_SPLITS = 128
KEYS_PER_SPLIT = 128
"""The least: a slice costs as much memory traffic as about sixteen keys, and its loads need a few blocks to overlap."""
RESIDENT = 2
"""Programs per SM that are counted on."""
ASSUMED_SMS = 132
"""Where there is no GPU to ask."""
BUSY = 0.85

# {padded head dimension: tiles by number of rows}. A problem takes the first that holds all rows that share their keys,
# or several of the last. Tensor cores that read their operands from shared memory (sm_90 on) afford more rows.
_AMPERE_HALF = {
    64: (Config(16, 64, 4, 4), Config(32, 32, 4, 4), Config(64, 32, 4, 4), Config(128, 32, 8, 4)),
    128: (Config(16, 64, 4, 3), Config(32, 32, 4, 4), Config(128, 16, 8, 3)),
    256: (Config(16, 32, 4, 3), Config(32, 32, 8, 3)),
}
_HOPPER_HALF = {
    64: _AMPERE_HALF[64],
    128: (Config(16, 64, 4, 3), Config(32, 32, 4, 4), Config(64, 32, 8, 3), Config(128, 32, 8, 3)),
    256: (Config(16, 32, 4, 3), Config(32, 32, 8, 3), Config(64, 16, 8, 3)),
}
_SINGLE = {
    64: (Config(16, 32, 4, 4), Config(32, 32, 8, 3)),
    128: (Config(16, 32, 8, 3),),
    256: (Config(16, 16, 8, 3),),
}
CONFIGS: dict[tuple[str, int], dict[int, tuple[Config, ...]]] = {
    ("sm_80", 2): _AMPERE_HALF, ("sm_90", 2): _HOPPER_HALF, ("sm_100", 2): _HOPPER_HALF,
    ("sm_80", 4): _SINGLE, ("sm_90", 4): _SINGLE, ("sm_100", 4): _SINGLE,
}  # fmt: skip
"""By architecture and bytes of an element."""
_PER_ROW = 8192
"""Bytes of the keys in a block where masks or roles are read row by row: they take registers."""


class Keys(NamedTuple):
    """Keys that one launch goes through: ``k`` and ``v [B|1, Hkv, K, D]``, columns `origin` ... of all `columns`.

    `packed`: the same memory serves all batch rows, whose queries share tiles.
    """

    k: Tensor
    v: Tensor
    origin: int
    columns: int
    packed: bool


def same_for_all_rows(k: Tensor, v: Tensor) -> bool:
    """True when a batch of more than one row has one memory for its keys and one for its values."""
    return k.shape[0] > 1 and k.stride(0) == 0 and v.stride(0) == 0


def suits(problem: Problem) -> bool:
    """Whether this is the way to compute a problem; looks at shapes only."""
    n, share = problem.q.shape[2], problem.q.shape[1] // problem.k.shape[1]
    return n <= FEW_QUERIES or n * share <= FEW_ROWS


def config_for(arch: str, size: int, dim: int, rows: int, per_row: bool = False) -> Config:
    """The tile for `rows` rows that share their keys; head dimensions below 64 use the tiles of 64."""
    tiles = CONFIGS[arch, size][max(64, dim)]
    if per_row:
        return tiles[0]._replace(block_n=max(16, min(32, _PER_ROW // (size * max(64, dim)))))
    return next((tile for tile in tiles if tile.block_m >= rows), tiles[-1])


def _precision(q: Tensor) -> str:
    """How the products of float32 are computed: wide heads have no registers for tensor cores to emulate it."""
    return "tf32x3" if q.dtype == torch.float32 and padded_dim(q.shape[3]) < 256 else "ieee"


@functools.cache
def _sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.lru_cache(1024)
def splits_for(tiles: int, keys: int, sms: int) -> int:
    """Into how many slices to cut `keys` when `tiles` programs go through them without: enough to fill the GPU evenly.

    The least number whose last wave leaves at most about 15 % more of the GPU idle than the best one does.

    >>> splits_for(tiles=8, keys=4096, sms=132), splits_for(tiles=1024, keys=4096, sms=132)
    (28, 1)
    """
    slots = sms * RESIDENT
    if tiles >= 0.8 * slots:
        return 1
    most = max(1, min(MAX_SPLITS, keys // KEYS_PER_SPLIT))
    busy = [tiles * s / slots / -(-tiles * s // slots) for s in range(1, most + 1)]
    return next(s for s, share in enumerate(busy, 1) if share >= BUSY * max(busy))


class Plan(NamedTuple):
    """How to go through some keys: tile, number of tiles, groups (key heads, times batch rows), slices of the keys."""

    config: Config
    tiles: int
    groups: int
    splits: int
    role_rows: bool
    mask_rows: bool


def plan_of(problem: Problem, keys: Keys, arch: str | None = None) -> Plan:
    """The plan for some keys; looks at shapes and strides only.

    `role_rows`, `mask_rows`: roles or masks differ between the rows of a tile and are read row by row.
    """
    q, mask = problem.q, problem.mask
    batch, query_heads, n, dim = q.shape
    key_heads, length = keys.k.shape[1], keys.k.shape[2]
    role_rows = keys.packed and problem.routed and shared_stride(problem.roles, 0) != 0
    varying = ((0, keys.packed), (1, True), (2, True))
    mask_rows = any(vary and shared_stride(mask, x) != 0 for x, vary in varying)
    rows = query_heads // key_heads * n * (batch if keys.packed else 1)
    config = config_for(arch_of(q, arch), q.element_size(), padded_dim(dim), rows, role_rows or mask_rows)
    tiles, groups = triton.cdiv(rows, config.block_m), key_heads if keys.packed else key_heads * batch
    reach = min(length, problem.window + n) if problem.window else length
    sms = _sms(q.device.index or 0) if q.is_cuda else ASSUMED_SMS
    return Plan(config, tiles, groups, splits_for(tiles * groups, reach, sms), role_rows, mask_rows)


def partial_launch(
    problem: Problem,
    keys: Keys,
    plan: Plan,
    heads: HeadEdits | None,
    z: Tensor,
    lse: Tensor | None,
    need_lse: bool,
) -> Launch:
    """The launch over some keys: into z ``[B, H, N, D]`` and lse, or into parts ``[splits, B, H, N, D]`` of them."""
    q, k, v, mask, roles, lengths = problem.q, keys.k, keys.v, problem.mask, problem.roles, problem.lengths
    batch, query_heads, n, dim = q.shape
    config, tiles, groups, splits, role_rows, mask_rows = plan
    direct, routed = z.dim() == 4, problem.routed
    tables, tables_given = table_arguments(problem)
    edits, edits_given = edit_arguments(heads)
    values, lowest, at_mask = mask_arguments(mask, batch, query_heads)
    # Rows of a tile see the same keys unless a diagonal, a window or lengths of their own cut them differently.
    reaches = problem.window > 0 or lengths is not None or keys.origin + k.shape[2] > keys.columns - n + 1
    ragged = (n > 1 and problem.causal and reaches) or (keys.packed and shared_stride(lengths, 0) != 0)
    args: dict[str, Any] = {
        "q": q, "k": k, "v": v, "z": z, "lse": lse,
        "roles": roles if routed else None, "query_roles": problem.query_roles if routed else None,
        "mask": values, "lengths": lengths, **tables, **edits,
        **{
            f"stride_{name}_{axis}": t.stride(x)
            for name, t in (("q", q), ("k", k), ("v", v))
            for x, axis in enumerate("bhnd")
        },
        "stride_z_s": 0 if direct else z.stride(0),
        "stride_z_b": z.stride(-4), "stride_z_h": z.stride(-3), "stride_z_n": z.stride(-2),
        "stride_role_b": shared_stride(roles, 0), "stride_role_k": 0 if roles is None else roles.stride(1),
        "stride_query_b": shared_stride(problem.query_roles, 0),
        "stride_query_n": shared_stride(problem.query_roles, 1),
        **{f"stride_mask_{axis}": stride for axis, stride in zip("bhnk", at_mask, strict=True)}, "lowest": lowest,
        "stride_length": shared_stride(lengths, 0),
        "n": n, "keys": k.shape[2], "origin": keys.origin, "columns": keys.columns, "batches": batch,
        "key_heads": k.shape[1], "share": query_heads // k.shape[1], "dim": dim, "tiles": tiles,
        "window": problem.window, "scale": problem.scale, "cap": problem.softcap,
    }  # fmt: skip
    meta = {
        "ROUTED": routed, **tables_given, "MASK": mask_kind(mask),
        "MASK_ROWS": mask_rows,
        "LENGTHS": lengths is not None, "CAUSAL": problem.causal, "WINDOW": problem.window > 0,
        "SOFTCAP": problem.softcap > 0, **edits_given, "LSE": need_lse, "DIRECT": direct, "PACKED": keys.packed,
        "RAGGED": ragged, "ROLE_ROWS": role_rows,
        "PRECISION": _precision(q), "EVEN": padded_dim(dim) == dim,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "DIM": padded_dim(dim),
    }  # fmt: skip
    return Launch(partial_kernel, (groups * tiles, splits), args, meta, config.num_warps, config.num_stages)


def merge_launch(part: Tensor, stat: Tensor, heads: HeadEdits | None, z: Tensor, lse: Tensor | None) -> Launch:
    """The launch that merges ``part [S, B, H, N, D]`` and ``stat [S, B, H, N]`` into z ``[B, H, N, D]`` and lse."""
    splits, batch, query_heads, n, dim = part.shape
    edits, edits_given = edit_arguments(heads)
    width, count = padded_dim(dim), 1 << (splits - 1).bit_length()
    args: dict[str, Any] = {
        "part": part, "stat": stat, "z": z, "lse": lse, **edits,
        "stride_z_b": z.stride(0), "stride_z_h": z.stride(1), "stride_z_n": z.stride(2),
        "n": n, "heads": query_heads, "dim": dim, "splits": splits,
    }  # fmt: skip
    meta = {
        **edits_given, "LSE": lse is not None, "EVEN": width == dim, "SPLITS": count,
        "BLOCK": min(count, 4096 // width), "DIM": width,
    }  # fmt: skip
    return Launch(merge_kernel, (batch * query_heads * n,), args, meta, 4, 2)


def launches_of(
    problem: Problem, runs: Sequence[Keys], heads: HeadEdits | None, need_lse: bool, arch: str | None = None
) -> tuple[list[Launch], Tensor, Tensor | None]:
    """The launches over disjoint runs of keys and their merge, with z ``[B, H, N, D]`` and lse that they fill."""
    z, made = empty_outputs(problem.q)
    lse = made if need_lse else None
    plans = [plan_of(problem, keys, arch) for keys in runs]
    count = sum(plan.splits for plan in plans)
    if count == 1:
        return [partial_launch(problem, runs[0], plans[0], heads, z, lse, need_lse)], z, lse
    part = z.new_empty((count, *z.shape), dtype=torch.float32)
    stat = z.new_empty((count, *z.shape[:3]), dtype=torch.float32)
    launches, start = [], 0
    for keys, plan in zip(runs, plans, strict=True):
        of_run = slice(start, start + plan.splits)
        launches.append(partial_launch(problem, keys, plan, heads, part[of_run], stat[of_run], need_lse))
        start += plan.splits
    return [*launches, merge_launch(part, stat, heads, z, lse)], z, lse


def attend(problem: Problem, heads: HeadEdits | None = None, need_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Z ``[B, H, N, D]`` (laid out as [B, N, H, D]) and lse ``[B, H, N]`` (None unless needed); no gradient.

    Keys that all batch rows share (stride 0) are read once for all of them.
    """
    k, v = problem.k, problem.v
    runs = [Keys(k, v, 0, k.shape[2], same_for_all_rows(k, v))]
    launches, z, lse = launches_of(problem, runs, heads, need_lse)
    for launch in launches:
        launch.run()
    return z, lse
