"""Role layouts: the runs of equal roles along a sequence, read once for all layers and steps that share them."""

from __future__ import annotations

from torch import Tensor

from .memo import Memo, content

Run = tuple[int, int, int]
"""(role, start, stop)"""

_known: Memo[list[Run]] = Memo(512)


def row_bytes(roles: Tensor) -> list[bytes] | None:
    """The rows of a tensor ``[B, L]`` uint8 as bytes, one when all are equal; None when it is too large.

    Roles on a device are read once per tensor and version (`memo.content`).
    """
    key = content(roles)
    if key is None:
        return None
    every = key[2]
    length = roles.shape[1]
    first = every[:length]
    if every == first * roles.shape[0]:
        return [first]
    return [every[start : start + length] for start in range(0, len(every), length)]


def known_runs(values: bytes) -> list[Run]:
    """`runs`, remembered."""
    return _known.get(values, lambda: runs(values))


def runs(values: bytes) -> list[Run]:
    """Maximal runs of equal values as (value, start, stop)."""
    found = []
    start = 0
    while start < len(values):
        value = values[start]
        stop = start + 1
        # Runs are long: look for the end in doubling steps before going one by one.
        step = 1
        while stop + step <= len(values) and values[stop : stop + step] == bytes((value,)) * step:
            stop += step
            step *= 2
        while stop < len(values) and values[stop] == value:
            stop += 1
        found.append((value, start, stop))
        start = stop
    return found
