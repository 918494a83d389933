"""Attention in bounded tiles of scores: every feature, any role layout, any mask.

A tile holds the scores of some heads and some query rows with the keys these rows can see; its size is bounded by
`TILE` elements whatever the shape of the problem, so nothing of size H x N x K exists in a prefill. Query heads that
share a key head are rows of one matrix product, so keys and values are read once per key head, not once per query head.

Softcap, Routes.abs, sliding windows and masks that are no key interval need work per score that stock attention does
not offer: they come here. So do decode steps, where the tile is the whole [H, 1, K] and one read of K and V is the
cost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem
from . import host
from .lookup import Lookup
from .softmax import accumulator, additive, finish

TILE = 1 << 19
"""Scores in one tile (2 MB of float32): fits the second-level cache of a CPU with room for keys and values."""
TILE_ROWS = 128
"""Query rows in one tile: enough for a good matrix product, few enough to skip most keys after the diagonal."""
DEVICE_TILE = 1 << 24
"""Scores in one tile on a GPU (64 MB of float32), which is paid per launch: a decode step of a batch is one tile."""
DEVICE_TILE_ROWS = 512


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
    """Z ``[B, H, N, D]`` and lse ``[B, H, N]`` (None unless needed)."""
    q = problem.q
    batch, heads, n, dim = q.shape
    wide = accumulator(q.dtype)
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
        self.lookup = None
        if problem.routed and problem.roles is not None and problem.query_roles is not None:
            self.lookup = Lookup(problem, problem.roles, problem.query_roles, wide)
        self.may_be_empty = problem.mask is not None or (self.lookup is not None and self.lookup.masks)

    def cuts(self) -> list[Cut]:
        """Rectangles that cover the problem, each with at most `TILE` scores or one row of one key head."""
        batch, _, n, _ = self.problem.q.shape
        key_heads, keys = self.problem.k.shape[1], self.problem.k.shape[2]
        tile, tile_rows = (TILE, TILE_ROWS) if host.owns(self.problem.q) else (DEVICE_TILE, DEVICE_TILE_ROWS)
        rows = max(1, min(n, tile_rows, tile // (self.share * keys)))
        heads = max(1, min(key_heads, tile // (rows * self.share * keys)))
        together = max(1, min(batch, tile // (rows * self.share * keys * key_heads))) if heads == key_heads else 1
        edges = self.lookup.row_edges if self.lookup is not None else ()
        cuts = []
        i0 = 0
        while i0 < n:
            i1 = min(i0 + rows, n)
            i1 = next((edge for edge in edges if i0 < edge < i1), i1)
            j1 = i1 + self.offset if self.problem.causal else keys
            j0 = max(0, i0 + self.offset - self.problem.window + 1) if self.problem.window else 0
            for b0 in range(0, batch, together):
                for g0 in range(0, key_heads, heads):
                    cuts.append(Cut(b0, min(b0 + together, batch), g0, min(g0 + heads, key_heads), i0, i1, j0, j1))
            i0 = i1
        return cuts

    def heads(self, cut: Cut) -> slice:
        """The query heads of a rectangle."""
        return slice(cut.g0 * self.share, cut.g1 * self.share)

    def scores(self, cut: Cut) -> Tensor:
        """Scaled and soft-capped scores of a rectangle, ``[b, h, n, k]``, fresh memory."""
        problem, share = self.problem, self.share
        b, g, n, keys = cut.b1 - cut.b0, cut.g1 - cut.g0, cut.i1 - cut.i0, cut.j1 - cut.j0
        q, k = problem.q, self.k
        if b != q.shape[0] or g != k.shape[1] or n != q.shape[2] or keys != k.shape[2]:
            q = q[cut.b0 : cut.b1, self.heads(cut), cut.i0 : cut.i1]
            k = k[cut.b0 : cut.b1, cut.g0 : cut.g1, cut.j0 : cut.j1]
        dim = q.shape[3]
        q = (q if q.dtype == self.wide else q.to(self.wide)) * problem.scale
        s = torch.bmm(q.reshape(b * g, share * n, dim), k.reshape(b * g, keys, dim).mT).view(b, g * share, n, keys)
        if problem.softcap:
            s = s.div_(problem.softcap).tanh_().mul_(problem.softcap)
        return s

    def run(self, cut: Cut, need_lse: bool) -> tuple[Tensor, Tensor | None]:
        """Z ``[b, h, n, D]`` and lse ``[b, h, n]`` of a rectangle."""
        s = self.scores(cut)
        b, h, n, keys = s.shape
        if self.lookup is not None:
            self.lookup.route(s, cut, self.heads(cut))
        self.hide(s, cut)
        p = torch.softmax(s, -1)
        lse = None
        if need_lse or self.may_be_empty:
            lse = finish(p, s.amax(-1), self.may_be_empty, need_lse)
        if self.lookup is not None and self.problem.gain is not None:
            self.lookup.weigh(p, cut, self.heads(cut))
        v = self.v
        if b != v.shape[0] or cut.g1 - cut.g0 != v.shape[1] or keys != v.shape[2]:
            v = v[cut.b0 : cut.b1, cut.g0 : cut.g1, cut.j0 : cut.j1]
        groups = b * (cut.g1 - cut.g0)
        z = torch.bmm(p.view(groups, self.share * n, keys), v.reshape(groups, keys, v.shape[3]))
        return z.view(b, h, n, -1), lse

    def hide(self, s: Tensor, cut: Cut) -> None:
        """Put -inf at every key of the scores that a mask hides."""
        problem = self.problem
        n, keys = cut.i1 - cut.i0, cut.j1 - cut.j0
        if problem.causal and n > 1:
            # Only the last n keys of a tile reach past the diagonal of some row.
            s[..., keys - n :] += torch.full((n, n), -torch.inf, dtype=s.dtype, device=s.device).triu_(1)
        if problem.window and keys > problem.window:
            i = torch.arange(cut.i0, cut.i1, device=s.device)[:, None] + self.offset
            j = torch.arange(cut.j0, cut.j1, device=s.device)[None, :]
            s += additive(j > i - problem.window, s.dtype)
        mask = problem.mask
        if mask is not None:
            heads = slice(None) if mask.shape[1] == 1 else self.heads(cut)
            rows = slice(None) if mask.shape[0] == 1 else slice(cut.b0, cut.b1)
            s += additive(mask[rows, heads, cut.i0 : cut.i1, cut.j0 : cut.j1], s.dtype)
