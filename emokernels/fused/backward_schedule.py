"""Which tiles of query rows a block of keys meets in a masked problem: the forward's classes, sorted the other way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..problem import Problem
from .launch import Config, Launch
from .schedule import Schedule, schedule_launches


@triton.jit
def _sort_tiles_kernel(classes, order, ends, tiles, blocks, n, BLOCK_M: tl.constexpr, TILES: tl.constexpr):
    """For one block of keys: the tiles of rows that see it wholly, then those that see some of it, ascending."""
    row, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    tile = tl.arange(0, TILES)
    found = tl.load(classes + (row * tiles + tile) * blocks + block, mask=tile < tiles, other=0).to(tl.int32)
    seen = found & 64 != 0
    # The last tile may have rows that do not exist: a matter of masks.
    whole = seen & (found & 128 != 0) & (tile * BLOCK_M + BLOCK_M <= n)
    start = 0
    for part in tl.static_range(0, 2):
        chosen = ((seen & ~whole) if part else whole).to(tl.int32)
        place = start + tl.cumsum(chosen, 0) - 1
        tl.store(order + (row * blocks + block) * tiles + place, tile, mask=chosen == 1)
        start += tl.sum(chosen, 0)
        tl.store(ends + (row * blocks + block) * 2 + part, start)


def rows_of_keys_launches(problem: Problem, config: Config) -> tuple[list[Launch], Schedule]:
    """A masked problem's schedule the other way round, and the launches that fill it.

    ``order [S, H, blocks of keys, tiles of rows]`` and ``ends [S, H, blocks of keys, 2]``.
    """
    plain = problem._replace(bias=None, factor=None, magnitude=None, gain=None)
    (classify, _), by_rows = schedule_launches(plain, config.block_m, config.block_n)
    classes = classify.args["classes"]
    (rows, heads), (_, tiles, blocks) = by_rows.order.shape[:2], classes.shape
    order = torch.empty(rows, heads, blocks, tiles, dtype=torch.int32, device=classes.device)
    ends = torch.empty(rows, heads, blocks, 2, dtype=torch.int32, device=classes.device)
    sort = Launch(
        _sort_tiles_kernel,
        (blocks, rows * heads),
        {"classes": classes, "order": order, "ends": ends, "tiles": tiles, "blocks": blocks, "n": problem.q.shape[2]},
        {"BLOCK_M": config.block_m, "TILES": triton.next_power_of_2(tiles)},
    )
    return [classify, sort], Schedule(order, ends)
