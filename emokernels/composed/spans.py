"""Routed attention as a merge of stock attention over disjoint classes of keys: the fast path of a prefill.

`plan` chooses the classes and the calls, `stock` makes them, `merge` puts them together; Routes.scale becomes a scaled
q. Works on tensors of any device for which `stock` has a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from . import host
from .layout import row_bytes
from .memo import Memo
from .merge import weigh, weighted_sum
from .plan import Band, Piece, Plan, make_plan
from .softmax import accumulator
from .stock import stock_with_lse
from .tables import Alike, Flags
from .visible import Visible

_plans: Memo[Plan] = Memo(512)

GATHER_ROWS = 32
"""From this many query rows on, copying scattered keys into one buffer pays."""


class Group(NamedTuple):
    """Batch rows that share a plan, ascending."""

    plan: Plan
    rows: list[int]


def group_rows(problem: Problem, alike: Alike, visible: list[Visible]) -> list[Group] | None:
    """Plans with the batch rows that share each; None when a layout is too long to serve as a key."""
    batch, _, n, _ = problem.q.shape
    keys: list[bytes] | None = [bytes(problem.k.shape[2])]
    queries: list[bytes] | None = [bytes(n)]
    if problem.roles is not None and problem.query_roles is not None:
        keys, queries = row_bytes(problem.roles), row_bytes(problem.query_roles)
    if keys is None or queries is None:
        return None
    rows = max(len(keys), len(queries), len(visible))
    members: dict[tuple[bytes, bytes, Visible], list[int]] = {}
    for row in range(rows):
        layout = (keys[row % len(keys)], queries[row % len(queries)], visible[row % len(visible)])
        members.setdefault(layout, []).append(row)
    gather, cut = n >= GATHER_ROWS, host.owns(problem.q)
    groups = []
    for layout, own in members.items():
        arguments = (*layout, alike.label, gather, cut)
        plan = _plans.get(arguments, lambda: make_plan(*arguments))  # noqa: B023 - called at once
        groups.append(Group(plan, own if rows > 1 else list(range(batch))))
    return groups


def attend_by_spans(
    problem: Problem, alike: Alike, groups: list[Group], need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Z ``[B, H, N, D]`` and lse ``[B, H, N]`` (None unless needed).

    Raises:
        stock.Refused: no kernel takes one of the calls.
    """
    batch, heads, n, dim = problem.q.shape
    if not problem.routed and len(groups) == 1 and (piece := groups[0].plan.only_piece(n)) is not None:
        return _Merger(problem, alike, *groups[0]).whole(piece)
    z = problem.q.new_empty(batch, n, heads, dim).transpose(1, 2)
    lse = problem.q.new_empty(batch, heads, n, dtype=accumulator(problem.q.dtype)) if need_lse else None
    for plan, rows in groups:
        merger = _Merger(problem, alike, plan, rows)
        if rows[-1] - rows[0] + 1 == len(rows):
            index = slice(rows[0], rows[-1] + 1)
            merger.run(z[index], None if lse is None else lse[index])
            continue
        own_z = z.new_empty(len(rows), n, heads, dim).transpose(1, 2)
        own_lse = None if lse is None else lse.new_empty(len(rows), heads, n)
        merger.run(own_z, own_lse)
        where = torch.tensor(rows, device=z.device)
        z.index_copy_(0, where, own_z)
        if lse is not None and own_lse is not None:
            lse.index_copy_(0, where, own_lse)
    return z, lse


class _Rows(NamedTuple):
    """Query rows [i0, i1) and their one role, None when they mix."""

    i0: int
    i1: int
    role: int | None


class _Merger:
    """One plan on the batch rows that share it. Below, b is their number."""

    def __init__(self, problem: Problem, alike: Alike, plan: Plan, rows: list[int]) -> None:
        self.alike, self.plan, self.scale = alike, plan, problem.scale
        self.share = problem.q.shape[1] // problem.k.shape[1]
        pick = _Picker(rows, problem.q)
        self.q, self.k, self.v = (_dense(pick(x)) for x in (problem.q, problem.k, problem.v))
        self.bias = None if problem.bias is None else pick(problem.bias)
        self.factor = None if problem.factor is None else pick(problem.factor)
        self.gain = None if problem.gain is None else pick(problem.gain)
        # All rows of the group have the roles of its first.
        self.query_roles = None if problem.query_roles is None else pick(problem.query_roles)[0].long()
        self.buffers = [(_gather(self.k, ranges), _gather(self.v, ranges)) for ranges in plan.buffers]

    def whole(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """All rows over one piece, which needs no merge: z ``[b, H, N, D]`` and lse ``[b, H, N]``."""
        z, lse = self._call(self.q, piece, _Rows(0, self.q.shape[2], None))
        return z.flatten(1, 2), lse

    def run(self, z: Tensor, lse: Tensor | None) -> None:
        """Fill z ``[b, H, N, D]`` and lse ``[b, H, N]``."""
        done = 0
        for band in self.plan.bands:
            _fill_empty(z, lse, done, band.i0)
            self._merge_band(band, z, lse)
            done = band.i1
        _fill_empty(z, lse, done, z.shape[2])

    def _merge_band(self, band: Band, z: Tensor, lse: Tensor | None) -> None:
        """One band: the calls for all its rows, then block by block the calls inside it and the weighted sum into z."""
        whole = self.q[:, :, band.i0 : band.i1]
        shared = [self._call(whole, piece, _Rows(band.i0, band.i1, band.role)) for piece in band.pieces]
        for block in band.blocks:
            rows = _Rows(block.i0, block.i1, band.role)
            q = self.q[:, :, block.i0 : block.i1]
            inside = slice(block.i0 - band.i0, block.i1 - band.i0)
            pieces = band.pieces + block.pieces
            parts = [(part[:, :, :, inside], part_lse[:, :, inside]) for part, part_lse in shared]
            parts += [self._call(q, piece, rows) for piece in block.pieces]
            shares = [self._shifted(share, piece, rows) for (_, share), piece in zip(parts, pieces, strict=True)]
            weights, total = weigh(shares, self.alike.masks)
            if lse is not None:
                lse[:, :, block.i0 : block.i1] = total
            weights = [self._gained(weight, piece, rows) for weight, piece in zip(weights, pieces, strict=True)]
            weighted_sum([part for part, _ in parts], weights, z[:, :, block.i0 : block.i1])

    def _call(self, q: Tensor, piece: Piece, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Stock attention of some rows over one piece: z ``[b, Hkv, H / Hkv, n, D]`` and lse ``[b, H, n]``."""
        if self.factor is not None and self._used(self.alike.factor, piece, rows):
            q = q * self._look_up(self.factor, piece, rows).unsqueeze(-1).to(q.dtype)
        k, v = (self.k, self.v) if piece.buffer is None else self.buffers[piece.buffer]
        span = slice(piece.start, piece.start + piece.length)
        k, v = k[:, :, span], v[:, :, span]
        batch, heads, n, dim = q.shape
        key_heads = k.shape[1]
        if piece.causal or self.share == 1 or not host.owns(q):
            part, part_lse = stock_with_lse(q, k, v, piece.causal, self.scale)
            return part.unflatten(1, (key_heads, self.share)), part_lse
        # On a CPU query heads of one key head become rows of one call: larger products, and keys are read once.
        part, part_lse = stock_with_lse(q.reshape(batch, key_heads, self.share * n, dim), k, v, False, self.scale)
        return part.unflatten(2, (self.share, n)), part_lse.reshape(batch, heads, n)

    def _shifted(self, share: Tensor, piece: Piece, rows: _Rows) -> Tensor:
        """``lse_k + b_k``."""
        if self.bias is None or not self._used(self.alike.bias, piece, rows):
            return share
        return share + self._look_up(self.bias, piece, rows)

    def _gained(self, weight: Tensor | None, piece: Piece, rows: _Rows) -> Tensor | None:
        """``g_k * weight``, None for 1."""
        if self.gain is None or not self._used(self.alike.gain, piece, rows):
            return weight
        gain = self._look_up(self.gain, piece, rows)
        return gain if weight is None else weight * gain

    @staticmethod
    def _used(flags: Flags, piece: Piece, rows: _Rows) -> bool:
        """Whether a table differs from the identity for these rows and the keys of this piece."""
        if rows.role is not None:
            return flags[rows.role][piece.role]
        return any(row[piece.role] for row in flags)

    def _look_up(self, table: Tensor, piece: Piece, rows: _Rows) -> Tensor:
        """``table[row, head, role of query, piece.role]`` as ``[b|1, H, n|1]``."""
        column = table[:, :, :, piece.role]
        if rows.role is not None or self.query_roles is None:
            return column[:, :, rows.role : (rows.role or 0) + 1]
        return column.index_select(2, self.query_roles[rows.i0 : rows.i1])


class _Picker:
    """Takes some batch rows of tensors ``[B|1, ...]``: all or adjacent ones as a view, others as a copy."""

    def __init__(self, rows: list[int], q: Tensor) -> None:
        self.batch, self.adjacent = q.shape[0], slice(rows[0], rows[-1] + 1)
        scattered = rows[-1] - rows[0] + 1 != len(rows)
        self.index = torch.tensor(rows, device=q.device) if scattered else None

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.shape[0] == 1:
            return tensor
        return tensor[self.adjacent] if self.index is None else tensor.index_select(0, self.index)


def _fill_empty(z: Tensor, lse: Tensor | None, i0: int, i1: int) -> None:
    """Rows that see no key."""
    if i1 > i0:
        z[:, :, i0:i1] = 0
        if lse is not None:
            lse[:, :, i0:i1] = -torch.inf


def _dense(x: Tensor) -> Tensor:
    """Stock kernels read any strides but want the elements of one head vector side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _gather(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    if len(ranges) == 1:
        return x[:, :, ranges[0][0] : ranges[0][1]]
    return torch.cat([x[:, :, start:stop] for start, stop in ranges], dim=2)
