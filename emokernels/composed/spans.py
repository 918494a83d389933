"""Routed attention as a merge of stock attention over disjoint classes of keys. The fast path of a prefill on a CPU.

Softmax attention over disjoint sets of keys merges by log-sum-exp, so with a bias b and a gain g per set (docs/kernels.md)::

    lse = logsumexp_k(lse_k + b_k)        z = sum_k g_k * exp(lse_k + b_k - lse) * z_k

`plan` chooses the sets, torch's CPU flash kernel computes (z_k, lse_k), Routes.scale becomes a scaled q. Nothing is
subtracted, so a gain near 0 on a set that holds nearly all the weight loses nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from .memo import Memo, content
from .plan import Block, Piece, Plan, make_plan
from .tables import Alike
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
    roles, query_roles = problem.roles, problem.query_roles
    batch, _, n, _ = problem.q.shape
    if content(roles) is None or content(query_roles) is None:
        return None
    rows = max(roles.shape[0], query_roles.shape[0], len(visible))
    keys = [_row_bytes(roles, r) for r in range(roles.shape[0])]
    queries = [_row_bytes(query_roles, r) for r in range(query_roles.shape[0])]
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
    """z ``[B, H, N, D]`` and lse ``[B, H, N]`` (None unless needed)."""
    batch, heads, n, dim = problem.q.shape
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    z = problem.q.new_empty(batch, n, heads, dim).transpose(1, 2)
    lse = problem.q.new_empty(batch, heads, n, dtype=wide) if need_lse else None
    for plan, members in groups:
        _Merger(problem, alike, plan, members).run(z, lse)
    return z, lse


def _row_bytes(roles: Tensor, row: int) -> bytes:
    key = content(roles[row])
    assert key is not None  # a row of a tensor that is small enough
    return key[2]  # type: ignore[return-value]


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
        query_roles = problem.query_roles
        assert query_roles is not None
        self.query_roles = query_roles[members[0] if query_roles.shape[0] > 1 else 0].long()
        self.buffers = [
            (_gather(self.k, ranges), _gather(self.v, ranges)) for ranges in plan.buffers
        ]

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
        for block in self.plan.blocks:
            self._fill_empty(own_z, own_lse, done, block.i0)
            self._merge(block, own_z, own_lse)
            done = block.i1
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

    def _merge(self, block: Block, z: Tensor, lse: Tensor | None) -> None:
        """One block: the calls of its pieces, and their weighted sum into z."""
        q = self.q[:, :, block.i0 : block.i1]
        out = z[:, :, block.i0 : block.i1]
        parts = [self._call(q, block, piece) for piece in block.pieces]
        shares = [self._shifted(part_lse, block, piece) for (_, part_lse), piece in zip(parts, block.pieces, strict=True)]
        if len(parts) == 1:
            total = shares[0]
            weights = [torch.ones_like(total)] if self.alike.masks else [None]
            if self.alike.masks:
                weights[0] = (total > -torch.inf).to(total.dtype)
        else:
            stacked = torch.stack(shares)
            total = torch.logsumexp(stacked, 0)
            weighed = torch.softmax(stacked, 0)
            if self.alike.masks:
                weighed.masked_fill_((total == -torch.inf).unsqueeze(0), 0.0)
            weights = list(weighed.unbind(0))
        if lse is not None:
            lse[:, :, block.i0 : block.i1] = total
        weights = [self._gained(weight, block, piece) for weight, piece in zip(weights, block.pieces, strict=True)]
        _weighted_sum([part for part, _ in parts], weights, out)

    def _call(self, q: Tensor, block: Block, piece: Piece) -> tuple[Tensor, Tensor]:
        """Stock attention of the block's rows over one piece: z ``[b, H, n, D]`` and lse ``[b, H, n]``."""
        if self.factor is not None and self._used(self.alike.factor, block, piece):
            q = q * self._look_up(self.factor, block, piece).unsqueeze(-1).to(q.dtype)
        if piece.buffer is None:
            span = slice(piece.start, piece.start + piece.length)
            return _flash(q, self.k[:, :, span], self.v[:, :, span], 0.0, True, scale=self.scale)  # type: ignore[no-any-return]
        k, v = self.buffers[piece.buffer]
        k, v = k[:, :, : piece.length], v[:, :, : piece.length]
        if self.share == 1:
            return _flash(q, k, v, scale=self.scale)  # type: ignore[no-any-return]
        # Query heads of one key head become rows of one call: larger products, and keys are read once.
        batch, heads, n, dim = q.shape
        part, part_lse = _flash(q.reshape(batch, k.shape[1], self.share * n, dim), k, v, scale=self.scale)
        return part.view(batch, k.shape[1], self.share, n, dim).flatten(1, 2), part_lse.reshape(batch, heads, n)

    def _shifted(self, part_lse: Tensor, block: Block, piece: Piece) -> Tensor:
        if self.bias is None or not self._used(self.alike.bias, block, piece):
            return part_lse
        return part_lse + self._look_up(self.bias, block, piece)

    def _gained(self, weight: Tensor | None, block: Block, piece: Piece) -> Tensor | None:
        if self.gain is None or not self._used(self.alike.gain, block, piece):
            return weight
        gain = self._look_up(self.gain, block, piece)
        return gain if weight is None else weight * gain

    @staticmethod
    def _used(flags: tuple[tuple[bool, ...], ...], block: Block, piece: Piece) -> bool:
        if block.role is not None:
            return flags[block.role][piece.role]
        return any(row[piece.role] for row in flags)

    def _look_up(self, table: Tensor, block: Block, piece: Piece) -> Tensor:
        """``table[row, head, role of query, piece.role]`` as ``[b|1, H, n|1]``."""
        column = table[:, :, :, piece.role]
        if block.role is not None:
            return column[:, :, block.role : block.role + 1]
        return column.index_select(2, self.query_roles[block.i0 : block.i1])


def _dense(x: Tensor) -> Tensor:
    """The kernel reads any strides but wants the elements of one head vector side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _gather(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    if len(ranges) == 1:
        return x[:, :, ranges[0][0] : ranges[0][1]]
    return torch.cat([x[:, :, start:stop] for start, stop in ranges], dim=2)


def _weighted_sum(parts: list[Tensor], weights: list[Tensor | None], out: Tensor) -> None:
    """``out = sum_k weights_k * parts_k``, accumulated in float32 for half-precision parts."""
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    if len(parts) == 1:
        weight = weights[0]
        out.copy_(parts[0] if weight is None else parts[0] * weight.unsqueeze(-1))
        return
    total = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        assert weight is not None
        if number == 0:
            torch.mul(part, weight.unsqueeze(-1).to(wide), out=total)
        else:
            total.addcmul_(part.to(wide), weight.unsqueeze(-1).to(wide))
    if total is not out:
        out.copy_(total)
