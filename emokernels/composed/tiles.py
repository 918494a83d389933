"""Attention in bounded tiles of scores: every feature, any role layout, any mask.

A tile holds the scores of some heads and some query rows with the keys these rows can see; its size is bounded by
`TILE` elements whatever the shape of the problem, so nothing of size H x N x K exists in a prefill. Query heads that
share a key head are rows of one matrix product, so keys and values are read once per key head, not once per query head.

Softcap, Routes.abs, sliding windows and masks that are no key interval need work per score that stock attention does not
offer: they come here. So do decode steps, where the tile is the whole [H, 1, K] and one read of K and V is the cost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from ..routes import ROLES

TILE = 1 << 19
"""Scores in one tile (2 MB of float32): fits the second-level cache of a CPU with room for keys and values."""
TILE_ROWS = 128
"""Query rows in one tile: enough for a good matrix product, few enough to skip most keys after the diagonal."""


class Cut(NamedTuple):
    """A rectangle of the problem: batch rows, key heads, query rows and keys, each [start, stop)."""

    b0: int
    b1: int
    g0: int
    g1: int
    i0: int
    i1: int
    j0: int
    j1: int


def attend_tiled(problem: Problem, need_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """z ``[B, H, N, D]`` and lse ``[B, H, N]`` (None unless needed)."""
    q = problem.q
    batch, heads, n, dim = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    tiles = Tiles(problem, wide)
    cuts = tiles.cuts()
    if len(cuts) == 1 and n == 1 and q.dtype == wide:
        z, lse = tiles.run(cuts[0], need_lse)
        return z.view(batch, 1, heads, dim).transpose(1, 2), lse
    out = q.new_empty(batch, n, heads, dim).transpose(1, 2)
    out_lse = q.new_empty(batch, heads, n, dtype=wide) if need_lse else None
    share = tiles.share
    for cut in cuts:
        z, lse = tiles.run(cut, need_lse)
        h0, h1 = cut.g0 * share, cut.g1 * share
        out[cut.b0 : cut.b1, h0:h1, cut.i0 : cut.i1] = z
        if out_lse is not None and lse is not None:
            out_lse[cut.b0 : cut.b1, h0:h1, cut.i0 : cut.i1] = lse
    return out, out_lse


class Tiles:
    """What all tiles of one problem share."""

    def __init__(self, problem: Problem, wide: torch.dtype) -> None:
        self.problem = problem
        self.wide = wide
        self.k = problem.k if problem.k.dtype == wide else problem.k.to(wide)
        self.v = problem.v if problem.v.dtype == wide else problem.v.to(wide)
        self.share = problem.q.shape[1] // problem.k.shape[1]
        self.offset = problem.k.shape[2] - problem.q.shape[2]
        self.roles = problem.roles.long() if problem.roles is not None and problem.routed else None
        self.query_roles = problem.query_roles.long() if problem.query_roles is not None and problem.routed else None
        self.may_be_empty = problem.mask is not None or problem.bias is not None or not problem.causal

    def cuts(self) -> list[Cut]:
        """Rectangles that cover the problem, each with at most TILE scores (but never less than one row of one head)."""
        batch, _, n, _ = self.problem.q.shape
        key_heads, keys = self.problem.k.shape[1], self.problem.k.shape[2]
        rows = max(1, min(n, TILE_ROWS, TILE // (self.share * keys)))
        heads = max(1, min(key_heads, TILE // (rows * self.share * keys)))
        together = max(1, min(batch, TILE // (rows * self.share * keys * key_heads))) if heads == key_heads else 1
        cuts = []
        for i0 in range(0, n, rows):
            i1 = min(i0 + rows, n)
            j1 = i1 + self.offset if self.problem.causal else keys
            j0 = max(0, i0 + self.offset - self.problem.window + 1) if self.problem.window else 0
            for b0 in range(0, batch, together):
                for g0 in range(0, key_heads, heads):
                    cuts.append(
                        Cut(b0, min(b0 + together, batch), g0, min(g0 + heads, key_heads), i0, i1, j0, j1)
                    )
        return cuts

    def scores(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """Routed and masked scores, and the same before routing, ``[b, h, n, k]``."""
        problem, share = self.problem, self.share
        b, g, n, keys = cut.b1 - cut.b0, cut.g1 - cut.g0, cut.i1 - cut.i0, cut.j1 - cut.j0
        dim = problem.q.shape[3]
        q = problem.q[cut.b0 : cut.b1, cut.g0 * share : cut.g1 * share, cut.i0 : cut.i1].to(self.wide) * problem.scale
        k = self.k[cut.b0 : cut.b1, cut.g0 : cut.g1, cut.j0 : cut.j1]
        s = torch.bmm(q.reshape(b * g, share * n, dim), k.reshape(b * g, keys, dim).mT).view(b, g * share, n, keys)
        if problem.softcap:
            s = s.div_(problem.softcap).tanh_().mul_(problem.softcap)
        plain = s
        if problem.magnitude is not None:
            s = plain.abs().mul_(self.expand(problem.magnitude, cut))
            s += plain * self.expand(problem.factor, cut) if problem.factor is not None else plain
        elif problem.factor is not None:
            s = plain * self.expand(problem.factor, cut)
        if problem.bias is not None:
            bias = self.expand(problem.bias, cut)
            s = s + bias if s is plain else s.add_(bias)
        return self.hide(s, cut), plain

    def run(self, cut: Cut, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        """z ``[b, h, n, D]`` and lse ``[b, h, n]`` of a rectangle."""
        s, _ = self.scores(cut)
        b, h, n, keys = s.shape
        p = torch.softmax(s, -1)
        lse = None
        if need_lse or self.may_be_empty:
            top = s.amax(-1)
            if self.may_be_empty:
                p.masked_fill_((top == -torch.inf).unsqueeze(-1), 0.0)
            if need_lse:
                # The largest weight is exp(top - lse), at least 1 / K: no cancellation, and no second exp per score.
                lse = top - p.amax(-1).log()
                if self.may_be_empty:
                    lse.masked_fill_(top == -torch.inf, -torch.inf)
        if self.problem.gain is not None:
            p.mul_(self.expand(self.problem.gain, cut))
        v = self.v[cut.b0 : cut.b1, cut.g0 : cut.g1, cut.j0 : cut.j1]
        groups = b * (cut.g1 - cut.g0)
        z = torch.bmm(p.view(groups, self.share * n, keys), v.reshape(groups, keys, v.shape[3]))
        return z.view(b, h, n, -1), lse

    def expand(self, table: Tensor, cut: Cut) -> Tensor:
        """``table[row, head, role of query, role of key]`` over a rectangle, ``[b|1, h, n, k]``."""
        assert self.roles is not None and self.query_roles is not None  # noqa: S101 - Problem carries roles with tables
        b, n, keys = cut.b1 - cut.b0, cut.i1 - cut.i0, cut.j1 - cut.j0
        table = table[_rows(table, cut), cut.g0 * self.share : cut.g1 * self.share].to(self.wide)
        roles = self.roles[_rows(self.roles, cut), cut.j0 : cut.j1]
        query_roles = self.query_roles[_rows(self.query_roles, cut), cut.i0 : cut.i1]
        pair = query_roles.unsqueeze(2) * ROLES + roles.unsqueeze(1)
        flat = table.flatten(2)
        if pair.shape[0] == 1:
            return flat.index_select(2, pair.flatten()).view(table.shape[0], table.shape[1], n, keys)
        heads = table.shape[1]
        index = pair.view(b, 1, n * keys).expand(b, heads, n * keys)
        return flat.expand(b, -1, -1).gather(2, index).view(b, heads, n, keys)

    def hide(self, s: Tensor, cut: Cut) -> Tensor:
        """`s` with -inf at every key that a mask hides."""
        problem = self.problem
        n, keys = cut.i1 - cut.i0, cut.j1 - cut.j0
        if (problem.causal and n > 1) or problem.window:
            i = torch.arange(cut.i0, cut.i1, device=s.device)[:, None] + self.offset
            j = torch.arange(cut.j0, cut.j1, device=s.device)[None, :]
            hidden = j > i if problem.causal else torch.zeros(n, keys, dtype=torch.bool, device=s.device)
            if problem.window:
                hidden = hidden | (j <= i - problem.window)
            s = s.masked_fill(hidden, -torch.inf)
        mask = problem.mask
        if mask is not None:
            heads = slice(None) if mask.shape[1] == 1 else slice(cut.g0 * self.share, cut.g1 * self.share)
            part = mask[_rows(mask, cut), heads, cut.i0 : cut.i1, cut.j0 : cut.j1]
            if mask.dtype == torch.bool:
                s = s.masked_fill(~part, -torch.inf)
            else:
                part = part.to(self.wide).masked_fill(part <= torch.finfo(mask.dtype).min, -torch.inf)
                s = s + part
        return s


def _rows(tensor: Tensor, cut: Cut) -> slice:
    return slice(0, 1) if tensor.shape[0] == 1 else slice(cut.b0, cut.b1)
