"""How to cover the visible (query, key) pairs by calls of stock attention, each over keys that act alike.

Query rows are cut into bands of at most `BAND_ROWS`, bands into blocks of about `BLOCK_ROWS`. Keys before a band's
diagonal are visible to all its rows: those of one class (roles that act alike, see `tables`) are one call without
mask for the whole band. Inside the band, a block sees the band's keys before it in one more such call, and the keys
on its own diagonal in a causal call. No pair is computed twice, and since stock causal kernels of a CPU compute whole
tiles around the diagonal and then hide half of them, small causal calls beside large full ones waste less than one
causal call over everything. GPU kernels skip hidden tiles and are paid per launch: there rows are cut only where their
classes of keys change.

Causal calls are square, N queries on the N keys of their own diagonal: libraries do not agree on where the diagonal of
another shape lies.

A class whose keys are scattered (system text before the image, the question after it) is gathered once into a buffer,
in key order: what a band sees of it is then a prefix of the buffer.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import NamedTuple

from .layout import Run, runs
from .visible import Visible

BAND_ROWS = 1024
"""Rows that share one pass over the keys before them."""
BLOCK_ROWS = 128
"""Rows of one causal call: fewer waste less on the diagonal, more make better products. 96 to 256 differ by 2 %."""

Ranges = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """One call: keys [start, start + length) of `buffer`, or of k and v themselves (buffer None); causal on a diagonal.

    `role` stands for all roles of the piece: they act alike.
    """

    role: int
    buffer: int | None
    start: int
    length: int
    causal: bool


class Block(NamedTuple):
    """Query rows [i0, i1) and the calls for them alone."""

    i0: int
    i1: int
    pieces: tuple[Piece, ...]


class Band(NamedTuple):
    """Query rows [i0, i1), their one role (None when they mix), the calls for all of them, and their blocks."""

    i0: int
    i1: int
    role: int | None
    pieces: tuple[Piece, ...]
    blocks: tuple[Block, ...]


class Plan(NamedTuple):
    """`buffers`: for each, the key ranges it is gathered from. Rows outside all bands see no key."""

    buffers: tuple[Ranges, ...]
    bands: tuple[Band, ...]

    def only_piece(self, n: int) -> Piece | None:
        """The call that is the whole plan for n query rows, or None when it takes more."""
        pieces = [piece for band in self.bands for piece in band.pieces]
        pieces += [piece for band in self.bands for block in band.blocks for piece in block.pieces]
        covered = len(self.bands) == 1 and (self.bands[0].i0, self.bands[0].i1) == (0, n)
        return pieces[0] if covered and len(pieces) == 1 and len(self.bands[0].blocks) == 1 else None


def make_plan(
    roles: bytes,
    query_roles: bytes,
    visible: Visible,
    label: tuple[tuple[int, ...], ...],
    gather: bool,
    cut: bool = True,
) -> Plan:
    """The plan for one layout.

    Args:
        roles: one byte per key.
        query_roles: one byte per query.
        visible: the keys that the queries see.
        label: ``label[dst][src]``, equal for source roles that act alike for this destination role.
        gather: collect a scattered class in one buffer (many rows), or call each of its ranges by itself (few rows,
            where copying keys costs more than calls).
        cut: bands and blocks of bounded size, for a CPU; False makes them as long as the layout allows, for a GPU.
    """
    band_rows, block_rows = (BAND_ROWS, BLOCK_ROWS) if cut else (len(query_roles), len(query_roles))
    key_runs = runs(roles)
    classes = _Classes(key_runs, visible, gather)
    bands = []
    for start, stop in _segments(query_roles, key_runs, visible, label):
        for a, b in _even_parts(start, stop, -(-(stop - start) // band_rows)):
            partition = label[query_roles[a]]
            role = query_roles[a] if query_roles[a:b].count(query_roles[a]) == b - a else None
            diagonal = a + visible.offset < visible.stop
            blocks = [Block(a, b, ())]
            if diagonal:
                here = partition[roles[a + visible.offset]]
                blocks = [
                    _diagonal_block(a, i0, i1, here, visible)
                    for i0, i1 in _even_parts(a, b, round((b - a) / block_rows))
                ]
            bands.append(Band(a, b, role, classes.pieces(a, partition), tuple(blocks)))
    return Plan(_needed(classes.buffers, bands), tuple(bands))


def _needed(buffers: list[Ranges], bands: list[Band]) -> tuple[Ranges, ...]:
    """The buffers, cut to what the bands read: often a single range, which needs no copy."""
    lengths = [0] * len(buffers)
    for band in bands:
        for piece in band.pieces:
            if piece.buffer is not None:
                lengths[piece.buffer] = max(lengths[piece.buffer], piece.length)
    cut = []
    for ranges, length in zip(buffers, lengths, strict=True):
        kept = []
        for start, stop in ranges:
            stop = min(stop, start + length)
            length -= stop - start
            if stop > start:
                kept.append((start, stop))
        cut.append(tuple(kept))
    return tuple(cut)


def _even_parts(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    parts = max(1, parts)
    cuts = [start + (stop - start) * part // parts for part in range(parts + 1)]
    return list(pairwise(cuts))


def _diagonal_block(band: int, i0: int, i1: int, role: int, visible: Visible) -> Block:
    """Rows [i0, i1) of the band that starts at row `band`: the band's keys before them, then their own diagonal."""
    own = Piece(role, None, i0 + visible.offset, i1 - i0, True)
    if i0 == band:
        return Block(i0, i1, (own,))
    return Block(i0, i1, (Piece(role, None, band + visible.offset, i0 - band, False), own))


class _Classes:
    """The classes of keys per destination partition, with their buffers."""

    def __init__(self, key_runs: list[Run], visible: Visible, gather: bool) -> None:
        self.visible, self.gather = visible, gather
        self.key_runs = [
            (role, max(start, visible.start), min(stop, visible.stop))
            for role, start, stop in key_runs
            if start < visible.stop and stop > visible.start
        ]
        self.buffers: list[Ranges] = []

    def pieces(self, i0: int, partition: tuple[int, ...]) -> tuple[Piece, ...]:
        """The calls that cover the keys before the diagonal of row `i0`, one per class."""
        before = min(i0 + self.visible.offset, self.visible.stop)
        found: dict[int, list[tuple[int, int]]] = {}
        for role, start, stop in self.key_runs:
            ranges = found.setdefault(partition[role], [])
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        pieces = []
        for role, ranges in found.items():
            for group in [tuple(ranges)] if self.gather else [(one,) for one in ranges]:
                length = sum(max(0, min(stop, before) - start) for start, stop in group)
                if length:
                    pieces.append(Piece(role, self._buffer(group), 0, length, False))
        return tuple(pieces)

    def _buffer(self, ranges: Ranges) -> int:
        if ranges not in self.buffers:
            self.buffers.append(ranges)
        return self.buffers.index(ranges)


def _segments(
    query_roles: bytes,
    key_runs: list[Run],
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
    for a, b in pairwise(edges):
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
