"""Into how many parts the keys of a decode step are cut, so that every multiprocessor has work."""

from __future__ import annotations

import functools

MAX_SPLITS = 128
"""As kMaxSplits in csrc/include/decode_params.cuh."""

MIN_KEYS = 128
"""A split with fewer keys costs more in the merge than it saves."""

RESIDENT = {(64, 1): 4, (64, 2): 3, (128, 1): 3, (128, 2): 2}
"""Blocks that a multiprocessor holds, by (padded head dimension, tiles of eight rows per block); 2 for others."""


def rows_per_block(rows: int, dim: int, half_precision: bool) -> int:
    """Query rows of one key head that a block serves, as csrc/include/decode_dispatch.cuh chooses them."""
    if not half_precision:
        return 4
    return 16 if rows > 8 and dim in (64, 128) else 8


@functools.lru_cache(4096)
def plan_splits(
    batch: int, key_heads: int, rows: int, keys: int, dim: int, multiprocessors: int, *, half_precision: bool = True
) -> int:
    """The smallest number of splits that keeps the GPU nearly as busy as the best one, from shapes alone.

    Args:
        batch: rows of the batch, B.
        key_heads: key heads, Hkv.
        rows: query rows that share a key head, (H / Hkv) * N.
        keys: K, the length of the cache.
        dim: head dimension D.
        multiprocessors: of the GPU.
        half_precision: False for float32.

    >>> plan_splits(1, 8, 4, 16384, 128, 132), plan_splits(256, 8, 4, 4096, 128, 132)
    (49, 1)
    """
    per_block = rows_per_block(rows, dim, half_precision)
    blocks = batch * key_heads * -(-rows // per_block)
    resident = RESIDENT.get((64 if dim <= 64 else 128, per_block // 8), 2) if dim <= 128 else 2
    capacity = multiprocessors * resident
    most = max(1, min(MAX_SPLITS, keys // MIN_KEYS))
    busy = [blocks * s / (-(-blocks * s // capacity) * capacity) for s in range(1, most + 1)]
    return next(s for s, share in enumerate(busy, 1) if share >= 0.9 * max(busy))
