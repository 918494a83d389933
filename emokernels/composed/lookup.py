"""Table values at the scores of a tile: by runs of equal roles where there are few, by gathering elsewhere.

A role is usually a run of keys, so a bias on VISUAL keys is one addition to a slice of the scores, and runs whose table
value is the identity cost nothing. Rows with different layouts in one tile, and layouts of many short runs, gather the
value of every score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..problem import Problem
from ..routes import ROLES
from . import host
from .layout import Run, known_runs, row_bytes
from .tables import Alike, inspect

if TYPE_CHECKING:
    from .tiles import Cut

MAX_SLICES = 12
"""More runs than this are gathered."""


class Lookup:
    """The tables of one problem, ready to be applied to tiles of scores and weights, in place."""

    def __init__(self, problem: Problem, roles: Tensor, query_roles: Tensor, wide: torch.dtype) -> None:
        self.bias, self.factor = _as(problem.bias, wide), _as(problem.factor, wide)
        self.magnitude, self.gain = _as(problem.magnitude, wide), _as(problem.gain, wide)
        self._roles, self._query_roles = roles, query_roles
        self.alike: Alike | None = None
        self.key_bytes: bytes | None = None
        self.query_bytes: bytes | None = None
        self.row_edges: tuple[int, ...] = ()
        self.masks = self.bias is not None
        if host.owns(problem.q):
            self.alike = inspect(problem)
            self.masks = self.alike.masks
            keys, queries = row_bytes(roles), row_bytes(query_roles)
            self.key_bytes = keys[0] if keys is not None and len(keys) == 1 else None
            if queries is not None and len(queries) == 1:
                self.query_bytes = queries[0]
                if len(queries[0]) > 1:
                    self.row_edges = tuple(start for _, start, _ in known_runs(queries[0]))

    def route(self, s: Tensor, cut: Cut, heads: slice) -> None:
        """``s = factor * s + magnitude * |s| + bias`` on a tile ``[b, h, n, k]``."""
        found = self._slices(cut, "logits")
        if found is not None:
            dst, slices = found
            for src, start, stop in slices:
                self._route_slice(s[:, :, :, start:stop], cut, heads, dst, src)
            return
        extra = s.abs().mul_(self.gathered(self.magnitude, cut, heads)) if self.magnitude is not None else None
        if self.factor is not None:
            s.mul_(self.gathered(self.factor, cut, heads))
        if extra is not None:
            s.add_(extra)
        if self.bias is not None:
            s.add_(self.gathered(self.bias, cut, heads))

    def weigh(self, p: Tensor, cut: Cut, heads: slice) -> None:
        """``p = gain * p`` on a tile ``[b, h, n, k]``."""
        if self.gain is None:
            return
        found = self._slices(cut, "weights")
        if found is not None:
            dst, slices = found
            for src, start, stop in slices:
                p[:, :, :, start:stop].mul_(_value(self.gain, cut, heads, dst, src))
            return
        p.mul_(self.gathered(self.gain, cut, heads))

    def gathered(self, table: Tensor, cut: Cut, heads: slice) -> Tensor:
        """``table[row, head, role of query, role of key]`` over a rectangle, ``[b|1, h, n, k]``."""
        roles = self._roles[_rows(self._roles, cut), cut.j0 : cut.j1].long()
        query_roles = self._query_roles[_rows(self._query_roles, cut), cut.i0 : cut.i1].long()
        pair = query_roles.unsqueeze(2) * ROLES + roles.unsqueeze(1)
        flat = table[_rows(table, cut), heads].flatten(2)
        rows = max(pair.shape[0], flat.shape[0])
        index = pair.flatten(1).unsqueeze(1).expand(rows, flat.shape[1], -1)
        return flat.expand(rows, -1, -1).gather(2, index).view(rows, flat.shape[1], *pair.shape[1:])

    def _route_slice(self, s: Tensor, cut: Cut, heads: slice, dst: int, src: int) -> None:
        extra = s.abs().mul_(_value(self.magnitude, cut, heads, dst, src)) if self.magnitude is not None else None
        if self.factor is not None:
            s.mul_(_value(self.factor, cut, heads, dst, src))
        if extra is not None:
            s.add_(extra)
        if self.bias is not None:
            s.add_(_value(self.bias, cut, heads, dst, src))

    def _slices(self, cut: Cut, what: str) -> tuple[int, list[Run]] | None:
        """The tile's one destination role, and (source role, start, stop) of runs that change its logits or weights.

        Relative to the tile. None when the queries mix roles, the rows differ in layout, or the runs are many.
        """
        alike, key_bytes, query_bytes = self.alike, self.key_bytes, self.query_bytes
        if alike is None or key_bytes is None or query_bytes is None:
            return None
        dst = query_bytes[cut.i0]
        if cut.i1 - cut.i0 > 1 and query_bytes.count(dst, cut.i0, cut.i1) != cut.i1 - cut.i0:
            return None
        label = alike.label[dst]
        found: list[Run] = []
        for src, start, stop in known_runs(key_bytes):
            changed = alike.changes_weights(dst, src) if what == "weights" else alike.changes_logits(dst, src)
            if stop <= cut.j0 or start >= cut.j1 or not changed:
                continue
            start, stop = max(start, cut.j0) - cut.j0, min(stop, cut.j1) - cut.j0
            if found and found[-1][2] == start and label[found[-1][0]] == label[src]:
                found[-1] = (found[-1][0], found[-1][1], stop)
            elif len(found) == MAX_SLICES:
                return None
            else:
                found.append((src, start, stop))
        return dst, found


def _value(table: Tensor, cut: Cut, heads: slice, dst: int, src: int) -> Tensor:
    """``table[row, head, dst, src]`` of a rectangle as ``[b|1, h, 1, 1]``."""
    return table[_rows(table, cut), heads, dst : dst + 1, src : src + 1]


def _rows(tensor: Tensor, cut: Cut) -> slice:
    return slice(0, 1) if tensor.shape[0] == 1 else slice(cut.b0, cut.b1)


def _as(table: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return table if table is None or table.dtype == dtype else table.to(dtype)
