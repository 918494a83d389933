"""How to cover the visible (query, key) pairs by calls of stock attention, each over keys that act alike.

Query rows are cut into blocks of about `BLOCK_ROWS`. For a block, keys before its diagonal are visible to all its rows:
those of one class (roles that act alike, see `tables`) are one call without mask. The keys on its diagonal, all of one
class, are one causal call. No pair is computed twice, and since stock causal kernels compute whole blocks around the
diagonal and then hide half of them, small causal calls beside large full ones waste less than one causal call does.

A class whose keys are scattered (system text before the image, the question after it) is gathered once into a buffer, in
key order: what a block sees of it is then a prefix of the buffer.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from .visible import Visible

BLOCK_ROWS = 192
"""From 192 rows on, torch's CPU kernel uses tiles of 64 query rows, the better product."""

Ranges = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """One call: the first `length` keys of `buffer`, or (buffer None) keys [start, start + length), causal."""

    role: int
    buffer: int | None
    start: int
    length: int


class Block(NamedTuple):
    """Query rows [i0, i1) and the calls that cover what they see; `role` is their one role, or None when they mix."""

    i0: int
    i1: int
    role: int | None
    pieces: tuple[Piece, ...]


class Plan(NamedTuple):
    """`buffers`: for each, the key ranges it is gathered from. Rows outside all blocks see no key."""

    buffers: tuple[Ranges, ...]
    blocks: tuple[Block, ...]


def runs(values: bytes) -> list[tuple[int, int, int]]:
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


def make_plan(
    roles: bytes, query_roles: bytes, visible: Visible, label: tuple[tuple[int, ...], ...], gather: bool
) -> Plan:
    """The plan for one layout.

    Args:
        roles, query_roles: one byte per key and per query.
        visible: the keys that the queries see.
        label: ``label[dst][src]``, equal for source roles that act alike for this destination role.
        gather: collect a scattered class in one buffer (many rows), or call each of its ranges by itself (few rows, where
            copying keys costs more than calls).
    """
    key_runs = runs(roles)
    classes = _Classes(key_runs, visible, label, gather)
    blocks: list[Block] = []
    for i0, i1 in _segments(query_roles, key_runs, visible, label):
        parts = max(1, round((i1 - i0) / BLOCK_ROWS))
        cuts = [i0 + (i1 - i0) * part // parts for part in range(parts + 1)]
        for a, b in zip(cuts, cuts[1:], strict=False):
            role = query_roles[a] if len(set(query_roles[a:b])) == 1 else None
            blocks.append(Block(a, b, role, classes.pieces(a, b, query_roles[a], roles)))
    return Plan(tuple(classes.buffers), tuple(blocks))


class _Classes:
    """The classes of keys per destination partition, with their buffers."""

    def __init__(
        self, key_runs: list[tuple[int, int, int]], visible: Visible, label: tuple[tuple[int, ...], ...], gather: bool
    ) -> None:
        self.label, self.visible, self.gather = label, visible, gather
        self.key_runs = [
            (role, max(start, visible.start), min(stop, visible.stop))
            for role, start, stop in key_runs
            if start < visible.stop and stop > visible.start
        ]
        self.buffers: list[Ranges] = []

    def pieces(self, i0: int, i1: int, dst: int, roles: bytes) -> tuple[Piece, ...]:
        """The calls that cover what rows [i0, i1) of (the partition of) role `dst` see."""
        label, visible = self.label[dst], self.visible
        before = min(i0 + visible.offset, visible.stop)
        found: dict[int, list[tuple[int, int]]] = {}
        for role, start, stop in self.key_runs:
            ranges = found.setdefault(label[role], [])
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        pieces = []
        for role, ranges in found.items():
            for group in [tuple(ranges)] if self.gather else [(one,) for one in ranges]:
                length = sum(max(0, min(stop, before) - start) for start, stop in group)
                if length:
                    pieces.append(Piece(role, self._buffer(group), 0, length))
        start, stop = max(before, visible.start), min(i1 + visible.offset, visible.stop)
        if stop > start:
            pieces.append(Piece(label[roles[start]], None, start, stop - start))
        return tuple(pieces)

    def _buffer(self, ranges: Ranges) -> int:
        if ranges not in self.buffers:
            self.buffers.append(ranges)
        return self.buffers.index(ranges)


def _segments(
    query_roles: bytes,
    key_runs: list[tuple[int, int, int]],
    visible: Visible,
    label: tuple[tuple[int, ...], ...],
) -> list[tuple[int, int]]:
    """Maximal row ranges with one partition of the source roles and one class of keys on the diagonal."""
    n = len(query_roles)
    first = max(0, visible.start - visible.offset)
    if visible.stop <= visible.start:
        return []
    # Cut where a query's role changes, where the key on the diagonal changes role, and where the diagonal leaves.
    cuts = {first, n} | {start for _, start, _ in runs(query_roles)}
    cuts |= {start - visible.offset for _, start, _ in key_runs} | {visible.stop - visible.offset}
    edges = sorted(cut for cut in cuts if first <= cut <= n)
    starts = [start for _, start, _ in key_runs]
    segments: list[tuple[int, int]] = []
    previous: tuple[tuple[int, ...], int | None] | None = None
    for a, b in zip(edges, edges[1:], strict=False):
        partition = label[query_roles[a]]
        column = a + visible.offset
        diagonal = partition[key_runs[bisect_left(starts, column + 1) - 1][0]] if column < visible.stop else None
        current = (partition, diagonal)
        if current == previous:
            segments[-1] = (segments[-1][0], b)
        else:
            segments.append((a, b))
        previous = current
    return segments
