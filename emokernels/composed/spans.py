"""Routed attention as a merge of stock attention over disjoint classes of keys. The fast path of a prefill on a CPU.

Softmax attention over disjoint sets of keys merges by log-sum-exp, so with a bias b and a gain g per set
(docs/kernels.md)::

    lse = logsumexp_k(lse_k + b_k)        z = sum_k g_k * exp(lse_k + b_k - lse) * z_k

`plan` chooses the sets, torch's CPU flash kernel computes (z_k, lse_k), Routes.scale becomes a scaled q. Nothing is
subtracted, so a gain near 0 on a set that holds nearly all the weight loses nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from .layout import row_bytes
from .memo import Memo
from .plan import Band, Piece, Plan, make_plan
from .tables import Alike, Flags
from .visible import Visible

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_plans: Memo[Plan] = Memo(512)

GATHER_ROWS = 32
"""From this many query rows on, copying scattered keys into one buffer pays."""

Group = tuple[Plan, list[int]]


def group_rows(problem: Problem, alike: Alike, visible: list[Visible]) -> list[Group] | None:
    """Plans with the batch rows that share each; None when a layout is too long to serve as a key."""
    if problem.roles is None or problem.query_roles is None:
        return None
    batch, _, n, _ = problem.q.shape
    keys, queries = row_bytes(problem.roles), row_bytes(problem.query_roles)
    if keys is None or queries is None:
        return None
    rows = max(len(keys), len(queries), len(visible))
    groups: dict[tuple[bytes, bytes, Visible], list[int]] = {}
    for row in range(rows):
        layout = (keys[row % len(keys)], queries[row % len(queries)], visible[row % len(visible)])
        groups.setdefault(layout, []).append(row)
    gather = n >= GATHER_ROWS
    found = []
    for (key_bytes, query_bytes, seen), members in groups.items():
        plan = _plans.get(
            (key_bytes, query_bytes, seen, alike.label, gather),
            lambda: make_plan(key_bytes, query_bytes, seen, alike.label, gather),  # noqa: B023 - called at once
        )
        found.append((plan, members if rows > 1 else list(range(batch))))
    return found


def attend_by_spans(
    problem: Problem, alike: Alike, groups: list[Group], need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Z ``[B, H, N, D]`` and lse ``[B, H, N]`` (None unless needed)."""
    batch, heads, n, dim = problem.q.shape
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    z = problem.q.new_empty(batch, n, heads, dim).transpose(1, 2)
    lse = problem.q.new_empty(batch, heads, n, dtype=wide) if need_lse else None
    for plan, members in groups:
        _Merger(problem, alike, plan, members).run(z, lse)
    return z, lse


class _Rows(NamedTuple):
    """Query rows [i0, i1) and their one role, None when they mix."""

    i0: int
    i1: int
    role: int | None


class _Merger:
    """One plan on the batch rows that share it."""

    def __init__(self, problem: Problem, alike: Alike, plan: Plan, members: list[int]) -> None:
        self.alike, self.plan, self.scale = alike, plan, problem.scale
        self.share = problem.q.shape[1] // problem.k.shape[1]
        self.batch = problem.q.shape[0]
        self.members = members
        pick = self._pick
        self.q, self.k, self.v = _dense(pick(problem.q)), _dense(pick(problem.k)), _dense(pick(problem.v))
        self.bias = None if problem.bias is None else pick(problem.bias)
        self.factor = None if problem.factor is None else pick(problem.factor)
        self.gain = None if problem.gain is None else pick(problem.gain)
        rows = problem.query_roles
        self.query_roles = None if rows is None else rows[members[0] if rows.shape[0] > 1 else 0].long()
        self.buffers = [(_gather(self.k, ranges), _gather(self.v, ranges)) for ranges in plan.buffers]

    def _pick(self, tensor: Tensor) -> Tensor:
        """The rows of this group: a view when they are adjacent, a copy of them otherwise."""
        members = self.members
        if tensor.shape[0] == 1 or len(members) == self.batch:
            return tensor
        if members[-1] - members[0] + 1 == len(members):
            return tensor[members[0] : members[-1] + 1]
        return tensor[torch.tensor(members)]

    def run(self, z: Tensor, lse: Tensor | None) -> None:
        """Fill the rows of this group in z and lse."""
        whole = len(self.members) == self.batch
        adjacent = self.members[-1] - self.members[0] + 1 == len(self.members)
        index = slice(self.members[0], self.members[-1] + 1)
        own_z = z if whole else z[index] if adjacent else z.new_empty(self._size(z)).transpose(1, 2)
        own_lse = None
        if lse is not None:
            own_lse = lse if whole else lse[index] if adjacent else lse.new_empty((len(self.members), *lse.shape[1:]))
        done = 0
        for band in self.plan.bands:
            self._fill_empty(own_z, own_lse, done, band.i0)
            self._merge_band(band, own_z, own_lse)
            done = band.i1
        self._fill_empty(own_z, own_lse, done, z.shape[2])
        if not (whole or adjacent):
            z[self.members] = own_z
            if lse is not None and own_lse is not None:
                lse[self.members] = own_lse

    def _size(self, z: Tensor) -> tuple[int, int, int, int]:
        return len(self.members), z.shape[2], z.shape[1], z.shape[3]

    @staticmethod
    def _fill_empty(z: Tensor, lse: Tensor | None, i0: int, i1: int) -> None:
        if i1 > i0:
            z[:, :, i0:i1] = 0
            if lse is not None:
                lse[:, :, i0:i1] = -torch.inf

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
            weights, total = self._weights(shares)
            if lse is not None:
                lse[:, :, block.i0 : block.i1] = total
            weights = [self._gained(weight, piece, rows) for weight, piece in zip(weights, pieces, strict=True)]
            _weighted_sum([part for part, _ in parts], weights, z[:, :, block.i0 : block.i1])

    def _weights(self, shares: list[Tensor]) -> tuple[list[Tensor | None], Tensor]:
        """``exp(share - total)`` per piece (None for 1) and ``total = logsumexp(shares)``, ``[b, H, n]`` each."""
        if len(shares) == 1:
            total = shares[0]
            return [(total > -torch.inf).to(total.dtype) if self.alike.masks else None], total
        stacked = torch.stack(shares)
        weights = torch.softmax(stacked, 0)
        top = stacked.amax(0)
        # The largest weight is exp(top - total) >= 1 / pieces: the same as logsumexp, five times faster.
        total = top - weights.amax(0).log_()
        if self.alike.masks:
            empty = top == -torch.inf
            weights.masked_fill_(empty.unsqueeze(0), 0.0)
            total.masked_fill_(empty, -torch.inf)
        return list(weights.unbind(0)), total

    def _call(self, q: Tensor, piece: Piece, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Stock attention of some rows over one piece: z ``[b, Hkv, H / Hkv, n, D]`` and lse ``[b, H, n]``."""
        if self.factor is not None and self._used(self.alike.factor, piece, rows):
            q = q * self._look_up(self.factor, piece, rows).unsqueeze(-1).to(q.dtype)
        k, v = (self.k, self.v) if piece.buffer is None else self.buffers[piece.buffer]
        span = slice(piece.start, piece.start + piece.length)
        k, v = k[:, :, span], v[:, :, span]
        batch, heads, n, dim = q.shape
        key_heads = k.shape[1]
        if piece.causal or self.share == 1:
            part, part_lse = _flash(q, k, v, 0.0, piece.causal, scale=self.scale)
            return part.unflatten(1, (key_heads, self.share)), part_lse
        # Query heads of one key head become rows of one call: larger products, and keys are read once.
        part, part_lse = _flash(q.reshape(batch, key_heads, self.share * n, dim), k, v, scale=self.scale)
        return part.unflatten(2, (self.share, n)), part_lse.reshape(batch, heads, n)

    def _shifted(self, share: Tensor, piece: Piece, rows: _Rows) -> Tensor:
        if self.bias is None or not self._used(self.alike.bias, piece, rows):
            return share
        return share + self._look_up(self.bias, piece, rows)

    def _gained(self, weight: Tensor | None, piece: Piece, rows: _Rows) -> Tensor | None:
        if self.gain is None or not self._used(self.alike.gain, piece, rows):
            return weight
        gain = self._look_up(self.gain, piece, rows)
        return gain if weight is None else weight * gain

    @staticmethod
    def _used(flags: Flags, piece: Piece, rows: _Rows) -> bool:
        if rows.role is not None:
            return flags[rows.role][piece.role]
        return any(row[piece.role] for row in flags)

    def _look_up(self, table: Tensor, piece: Piece, rows: _Rows) -> Tensor:
        """``table[row, head, role of query, piece.role]`` as ``[b|1, H, n|1]``."""
        column = table[:, :, :, piece.role]
        if rows.role is not None or self.query_roles is None:
            return column[:, :, rows.role : (rows.role or 0) + 1]
        return column.index_select(2, self.query_roles[rows.i0 : rows.i1])


def _dense(x: Tensor) -> Tensor:
    """The kernel reads any strides but wants the elements of one head vector side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _gather(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    if len(ranges) == 1:
        return x[:, :, ranges[0][0] : ranges[0][1]]
    return torch.cat([x[:, :, start:stop] for start, stop in ranges], dim=2)


def _weighted_sum(parts: list[Tensor], weights: list[Tensor | None], out: Tensor) -> None:
    """``out = sum_k weights_k * parts_k``, accumulated in float32 for half-precision parts.

    `parts` are ``[b, Hkv, G, n, D]``, weights ``[b|1, H, n|1]`` (None for 1), `out` ``[b, H, n, D]``.
    """
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    groups = parts[0].shape[1:3]
    out = out.unflatten(1, groups)
    total = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        if weight is None:  # only ever a single part
            out.copy_(part)
            return
        factor = weight.unflatten(1, groups).unsqueeze(-1).to(wide)
        if number == 0:
            torch.mul(part, factor, out=total)
        else:
            total.addcmul_(part, factor) if part.dtype == wide else total.addcmul_(part.to(wide), factor)
    if total is not out:
        out.copy_(total)
