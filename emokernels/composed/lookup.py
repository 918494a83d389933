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
from .layout import known_runs, row_bytes
from .tables import Alike, Flags, inspect

if TYPE_CHECKING:
    from .tiles import Cut

MAX_SLICES = 12
"""More runs than this are gathered."""


class Lookup:
    """The tables of one problem, ready to be applied to tiles of scores and weights, in place."""

    def __init__(self, problem: Problem, wide: torch.dtype) -> None:
        self.bias, self.factor = _as(problem.bias, wide), _as(problem.factor, wide)
        self.magnitude, self.gain = _as(problem.magnitude, wide), _as(problem.gain, wide)
        self._roles, self._query_roles = problem.roles, problem.query_roles
        self._long: tuple[Tensor, Tensor] | None = None
        self.alike: Alike | None = None
        self.key_bytes: bytes | None = None
        self.query_bytes: bytes | None = None
        self.row_edges: tuple[int, ...] = ()
        self.masks = self.bias is not None
        if problem.q.device.type == "cpu" and problem.roles is not None and problem.query_roles is not None:
            self.alike = inspect(problem)
            self.masks = self.alike.masks
            keys, queries = row_bytes(problem.roles), row_bytes(problem.query_roles)
            self.key_bytes = keys[0] if keys is not None and len(keys) == 1 else None
            if queries is not None and len(queries) == 1:
                self.query_bytes = queries[0]
                if len(queries[0]) > 1:
                    self.row_edges = tuple(start for _, start, _ in known_runs(queries[0]))

    def route(self, s: Tensor, cut: Cut, heads: slice) -> None:
        """``s = factor * s + magnitude * |s| + bias`` on a tile ``[b, h, n, k]``."""
        dst = self._destination(cut)
        if dst is not None and self.alike is not None:
            slices = self._slices(dst, cut, (self.alike.bias, self.alike.factor), self.alike.magnitude)
            if slices is not None:
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
        dst = self._destination(cut)
        if dst is not None and self.alike is not None:
            slices = self._slices(dst, cut, (self.alike.gain,), False)
            if slices is not None:
                for src, start, stop in slices:
                    p[:, :, :, start:stop].mul_(_value(self.gain, cut, heads, dst, src))
                return
        p.mul_(self.gathered(self.gain, cut, heads))

    def gathered(self, table: Tensor, cut: Cut, heads: slice) -> Tensor:
        """``table[row, head, role of query, role of key]`` over a rectangle, ``[b|1, h, n, k]``."""
        roles, query_roles = self._indices()
        roles = roles[_rows(roles, cut), cut.j0 : cut.j1]
        query_roles = query_roles[_rows(query_roles, cut), cut.i0 : cut.i1]
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

    def _destination(self, cut: Cut) -> int | None:
        """The one role of the tile's queries, or None."""
        query_bytes = self.query_bytes
        if query_bytes is None or self.key_bytes is None:
            return None
        dst = query_bytes[cut.i0]
        if cut.i1 - cut.i0 > 1 and query_bytes.count(dst, cut.i0, cut.i1) != cut.i1 - cut.i0:
            return None
        return dst

    def _slices(self, dst: int, cut: Cut, flags: tuple[Flags, ...], every: bool) -> list[tuple[int, int, int]] | None:
        """(source role, start, stop) relative to the tile, of runs that change something; None when there are many."""
        assert self.alike is not None and self.key_bytes is not None
        label = self.alike.label[dst]
        found: list[tuple[int, int, int]] = []
        for src, start, stop in known_runs(self.key_bytes):
            if stop <= cut.j0 or start >= cut.j1 or not (every or any(flag[dst][src] for flag in flags)):
                continue
            start, stop = max(start, cut.j0) - cut.j0, min(stop, cut.j1) - cut.j0
            if found and found[-1][2] == start and label[found[-1][0]] == label[src]:
                found[-1] = (found[-1][0], found[-1][1], stop)
            elif len(found) == MAX_SLICES:
                return None
            else:
                found.append((src, start, stop))
        return found

    def _indices(self) -> tuple[Tensor, Tensor]:
        if self._long is None:
            assert self._roles is not None and self._query_roles is not None
            self._long = (self._roles.long(), self._query_roles.long())
        return self._long


def _value(table: Tensor, cut: Cut, heads: slice, dst: int, src: int) -> Tensor:
    """``table[row, head, dst, src]`` of a rectangle as ``[b|1, h, 1, 1]``."""
    return table[_rows(table, cut), heads, dst : dst + 1, src : src + 1]


def _rows(tensor: Tensor, cut: Cut) -> slice:
    return slice(0, 1) if tensor.shape[0] == 1 else slice(cut.b0, cut.b1)


def _as(table: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return table if table is None or table.dtype == dtype else table.to(dtype)
