"""Which blocks of keys a tile of queries meets, for every set of source roles: worked out on the device.

A tile of query rows goes through its keys set by set of source roles, so that bias and gain are one number a row while
it stays in a set. Thirteen sets serve every table: each role alone (0 ... 5), all roles but one (6 ... 11), all (12). A
key block belongs to a set in one of two ways:

* *whole*: every row of the tile sees every key of it, and all its keys are of the set: no work an element;
* *part*: some row sees some key of the set, but a mask, the diagonal or keys of other roles cut it: a mask an element.

A schedule lists the whole, then the part blocks of each set in ascending order: ``order [S, T, L]`` int32 with the
block numbers and ``ends [S, T, 2 * sets]`` int32 with the ends of these lists. ``S`` counts batch rows (times heads,
for a mask that differs by head), ``T`` tiles. Any mask becomes block-sparse that way, whatever it means. Without
routes there is only the set of all roles.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .blocks import members_of
from .launch import Launch

SETS = 13
"""Each role alone, all but one, all."""
ALL = 12


class Schedule(NamedTuple):
    """``order [rows, heads, tiles, L]`` and ``ends [rows, heads, tiles, 2 * sets]``, int32; rows and heads may be 1."""

    order: Tensor
    ends: Tensor


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _classify_kernel(
    classes, roles, mask, lowest,
    stride_role_b, stride_mask_b, stride_mask_h, stride_mask_n, stride_mask_k,
    heads, n, keys, window,
    ROUTED: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, tile, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    first, last = tile * BLOCK_M + keys - n, tl.minimum(tile * BLOCK_M + BLOCK_M, n) - 1 + keys - n
    full = block * BLOCK_N + BLOCK_N <= keys
    some = True
    if CAUSAL:
        full = full & (block * BLOCK_N + BLOCK_N - 1 <= first)
        some = some & (block * BLOCK_N <= last)
    if WINDOW:
        full = full & (block * BLOCK_N > last - window)
        some = some & (block * BLOCK_N + BLOCK_N - 1 > first - window)
    if MASK != "none":
        at = batch.to(tl.int64) * stride_mask_b + head.to(tl.int64) * stride_mask_h
        at = at + i.to(tl.int64)[:, None] * stride_mask_n + j.to(tl.int64)[None, :] * stride_mask_k
        inside = (i < n)[:, None] & (j < keys)[None, :]
        if MASK == "bool":
            value = tl.load(mask + at, mask=inside, other=1) != 0
            full = full & (tl.min(tl.min(value.to(tl.int32), 1), 0) == 1)
            value = (value & inside).to(tl.int32)
            some = some & (tl.max(tl.max(value, 1), 0) == 1)
        else:
            value = tl.load(mask + at, mask=inside, other=0.0).to(tl.float32)
            full = full & (tl.max(tl.max((value != 0).to(tl.int32), 1), 0) == 0)
            seen = ((value > lowest) & inside).to(tl.int32)
            some = some & (tl.max(tl.max(seen, 1), 0) == 1)
    # Bits: a role that is there (0 ... 5), something is visible (6), everything is (7).
    found = 1
    if ROUTED:
        role = tl.load(roles + batch.to(tl.int64) * stride_role_b + j, mask=j < keys, other=0).to(tl.int32)
        found = tl.reduce(tl.where(j < keys, 1 << role, 0), 0, _either)
    found = found | tl.where(some, 64, 0) | tl.where(some & full, 128, 0)
    blocks, tiles = tl.num_programs(0), tl.num_programs(1)
    tl.store(classes + (row.to(tl.int64) * tiles + tile) * blocks + block, found.to(tl.uint8))


@triton.jit
def _sort_kernel(classes, order, ends, blocks, length, SETS: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    found = tl.load(classes + row * blocks + block, mask=block < blocks, other=0).to(tl.int32)
    start = 0
    for number in tl.static_range(0, SETS):
        members = members_of(number + 13 - SETS)
        mine = (found & 64 != 0) & (found & members != 0)
        whole = mine & (found & 128 != 0) & (found & 63 & ~members == 0)
        for part in tl.static_range(0, 2):
            chosen = ((mine & ~whole) if part else whole).to(tl.int32)
            place = start + tl.cumsum(chosen, 0) - 1
            tl.store(order + row * length + place, block, mask=chosen == 1)
            start += tl.sum(chosen, 0)
            tl.store(ends + row * 2 * SETS + 2 * number + part, start)


def mask_kind(mask: Tensor | None) -> str:
    """What the kernels need to know of a mask: "none", "bool" or "add"."""
    return "none" if mask is None else "bool" if mask.dtype == torch.bool else "add"


def mask_arguments(
    mask: Tensor | None, batch: int, heads: int
) -> tuple[Tensor | None, float, tuple[int, int, int, int]]:
    """The mask as kernels read it (bool as bytes), its lowest finite value, and strides, 0 where it is shared."""
    if mask is None:
        return None, 0.0, (0, 0, 0, 0)
    lowest = 0.0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    b, h, n, k = mask.stride()
    strides = (b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0, n, k)
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask), lowest, strides


def schedule_launches(problem: Problem, block_m: int, block_n: int) -> tuple[list[Launch], Schedule]:
    """The two launches that fill a Schedule, and the Schedule they fill."""
    q, k, mask, roles = problem.q, problem.k, problem.mask, problem.roles
    n, keys = q.shape[2], k.shape[2]
    tiles, blocks = triton.cdiv(n, block_m), triton.cdiv(keys, block_n)
    routed = problem.routed and roles is not None
    rows = max(roles.shape[0] if routed and roles is not None else 1, mask.shape[0] if mask is not None else 1)
    heads = mask.shape[1] if mask is not None else 1
    sets = SETS if routed else 1
    order = torch.empty(rows, heads, tiles, sets * blocks, dtype=torch.int32, device=q.device)
    ends = torch.empty(rows, heads, tiles, 2 * sets, dtype=torch.int32, device=q.device)
    classes = torch.empty(rows * heads, tiles, blocks, dtype=torch.uint8, device=q.device)
    values, lowest, strides = mask_arguments(mask, q.shape[0], q.shape[1])
    classify = Launch(
        _classify_kernel,
        (blocks, tiles, rows * heads),
        {
            "classes": classes, "roles": roles if routed else None, "mask": values, "lowest": lowest,
            "stride_role_b": roles.stride(0) if routed and roles is not None and roles.shape[0] > 1 else 0,
            "stride_mask_b": strides[0], "stride_mask_h": strides[1], "stride_mask_n": strides[2],
            "stride_mask_k": strides[3], "heads": heads, "n": n, "keys": keys, "window": problem.window,
        },
        {
            "ROUTED": routed, "MASK": mask_kind(mask), "CAUSAL": problem.causal, "WINDOW": problem.window > 0,
            "BLOCK_M": block_m, "BLOCK_N": block_n,
        },
    )  # fmt: skip
    sort = Launch(
        _sort_kernel,
        (rows * heads * tiles,),
        {"classes": classes, "order": order, "ends": ends, "blocks": blocks, "length": sets * blocks},
        {"SETS": sets, "BLOCKS": triton.next_power_of_2(blocks)},
    )
    return [classify, sort], Schedule(order, ends)


_known: OrderedDict[tuple[object, ...], tuple[tuple[weakref.ref[Tensor] | None, ...], Schedule]] = OrderedDict()
_KEPT = 8


def schedule_of(problem: Problem, block_m: int, block_n: int) -> Schedule:
    """The schedule of a problem, remembered for the layers that share its roles and mask objects.

    Remembered by object and version, so a tensor that was written to, or another one in its place, is noticed. While a
    CUDA graph is captured nothing is remembered: the graph then contains the launches and follows its inputs.
    """
    inputs = (problem.roles if problem.routed else None, problem.mask)
    given = [t for t in inputs if t is not None]
    lasting = not any(torch.is_inference(t) for t in given) and not (
        problem.q.is_cuda and torch.cuda.is_current_stream_capturing()
    )
    key = (
        *(None if t is None else (id(t), t._version) for t in inputs if lasting),
        problem.q.shape[2], problem.k.shape[2], problem.causal, problem.window, block_m, block_n, problem.q.device,
        torch.cuda.current_stream(problem.q.device) if problem.q.is_cuda else None,
    )  # fmt: skip
    if lasting and key in _known:
        refs, found = _known[key]
        if all(ref is None or ref() is t for ref, t in zip(refs, inputs, strict=True)):
            _known.move_to_end(key)
            return found
    launches, made = schedule_launches(problem, block_m, block_n)
    for launch in launches:
        launch.run()
    if lasting:
        _known[key] = (tuple(None if t is None else weakref.ref(t) for t in inputs), made)
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    return made
