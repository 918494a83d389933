"""Vector edits of one layer at one site as tables."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from emocircuits.edits import CACHE_SITES, AddVector, ProjectOut, VectorEdit
from emocircuits.tables.space import Space, by_row, phases

Parts = dict[str, Tensor]


@dc.dataclass(frozen=True)
class VectorTable:
    """Vector edits at one site; any table may be None. They act in the order of the fields.

    At the sites of a cache every head has its own: ``d`` below is then ``kv_heads, head_dim``, ``m, d`` is
    ``kv_heads, m, head_dim``.

    ``basis [m, d]`` with ``along [B|1, kinds, m]``: 1 where the component along a (unit) row of ``basis`` is removed;
    ``add`` and ``relative`` ``[B|1, kinds, d]``: added, and added in units of the row's length;
    ``keep`` and ``keep_relative`` ``[B|1, kinds, d]`` where ``kept [B|1, kinds]``: the same, back to the row's length;
    ``value [B|1, kinds, d]`` where ``mask [B|1, kinds]``: set.
    """

    basis: Tensor | None = None
    along: Tensor | None = None
    add: Tensor | None = None
    relative: Tensor | None = None
    keep: Tensor | None = None
    keep_relative: Tensor | None = None
    kept: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    plain: bool = dc.field(init=False)
    """Whether nothing here needs more than the precision of the model: additions and settings."""

    def __post_init__(self) -> None:
        precise = (self.along, self.relative, self.kept)
        object.__setattr__(self, "plain", all(table is None for table in precise))

    def apply(self, hidden: Tensor, kinds: Tensor) -> Tensor:
        """Edit ``hidden [B, N, d_model]`` (cached ``[B, kv_heads, N, head_dim]``) of rows of these ``kinds [B, N]``.

        The input is left alone.
        """
        edited = hidden
        if not self.plain:
            edited = self._precise(hidden, kinds)
        elif self.add is not None:
            edited = hidden + _spread(self.add, kinds, hidden).to(hidden.dtype)
        if self.value is not None and self.mask is not None:
            chosen = _spread(self.mask, kinds, hidden)[..., None]
            edited = torch.where(chosen, _spread(self.value, kinds, hidden).to(hidden.dtype), edited)
        return edited

    def _precise(self, hidden: Tensor, kinds: Tensor) -> Tensor:
        """Everything but settings, in float32 (float64 for float64 rows), rounded once."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = hidden.to(wide)
        if self.basis is not None and self.along is not None:
            basis = self.basis.to(wide)
            rows = rows - ((rows @ basis.mT) * _spread(self.along, kinds, hidden).to(wide)) @ basis
        start = rows
        if self.add is not None:
            rows = rows + _spread(self.add, kinds, hidden).to(wide)
        if self.relative is not None:
            rows = rows + _length(start) * _spread(self.relative, kinds, hidden).to(wide)
        if self.kept is not None:
            length, moved = _length(rows), rows
            if self.keep is not None:
                moved = moved + _spread(self.keep, kinds, hidden).to(wide)
            if self.keep_relative is not None:
                moved = moved + length * _spread(self.keep_relative, kinds, hidden).to(wide)
            tiny = torch.finfo(wide).tiny
            rows = torch.where(
                _spread(self.kept, kinds, hidden)[..., None], moved * (length / _length(moved).clamp_min(tiny)), rows
            )
        return rows.to(hidden.dtype)


def _spread(table: Tensor, kinds: Tensor, hidden: Tensor) -> Tensor:
    """The row of ``table`` for each token, so that it broadcasts against ``hidden``."""
    rows = by_row(table, kinds)
    if hidden.ndim == 3:
        return rows
    # Heads come before tokens in a cache.
    return rows.transpose(1, 2) if rows.ndim == 4 else rows.unsqueeze(1)


def _length(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True)


class VectorBuilder:
    """Accumulates the vector edits of one layer at one site."""

    def __init__(self, space: Space, site: str) -> None:
        self.space = space
        sizes = space.geometry
        self.shape = (sizes.kv_heads, sizes.head_dim) if site in CACHE_SITES else (sizes.d_model,)
        self.parts: Parts = {}
        self.removed: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def _table(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name not in self.parts:
            self.parts[name] = self.space.full(shape, 0, dtype)
        return self.parts[name]

    def add(self, edit: VectorEdit, layer: int) -> None:
        """Take in the vector of ``layer``."""
        space = self.space
        where = space.selection(edit)
        vector = torch.tensor(edit.at(layer), device=space.device, dtype=torch.float64)
        if isinstance(edit, ProjectOut):
            self.removed.append((vector, where))
        elif isinstance(edit, AddVector):
            name = "add" if edit.norm == "free" else "keep"
            if edit.relative:
                name = "relative" if edit.norm == "free" else "keep_relative"
                vector = _unit(vector)
            dtype = space.dtype if name == "add" else space.exact
            self._table(name, self.shape, dtype)[where] += edit.by * vector.to(dtype)
            if edit.norm == "keep":
                self._table("kept", (), torch.bool)[where] = True
        else:
            self._table("value", self.shape, space.dtype)[where] = vector.to(space.dtype)
            self._table("mask", (), torch.bool)[where] = True

    def _project(self) -> None:
        """One orthonormal basis for every set of directions that meet somewhere; sets do not overlap."""
        sets: dict[tuple[int, int], list[int]] = {}
        for i, (_, (rows, kinds)) in enumerate(self.removed):
            for cell in zip(rows.tolist(), kinds.tolist(), strict=True):
                sets.setdefault(cell, []).append(i)
        distinct = sorted({tuple(edits) for edits in sets.values()})
        if not distinct:  # positions without the roles
            return
        bases = [orthonormal(torch.cat([self.removed[i][0] for i in edits])) for edits in distinct]
        starts = [0]
        for basis in bases:
            starts.append(starts[-1] + basis.shape[-2])
        along = self.space.full((starts[-1],), 0)
        for (row, kind), edits in sets.items():
            n = distinct.index(tuple(edits))
            along[row, kind, starts[n] : starts[n + 1]] = 1
        self.parts |= {"basis": torch.cat(bases, -2).to(self.space.exact), "along": along}

    def build(self) -> tuple[VectorTable, frozenset[str]]:
        """The table and the phases in which it changes anything."""
        if self.removed:
            self._project()
        deciding = [table for name, table in self.parts.items() if name not in ("basis", "value")]
        return VectorTable(**self.parts), frozenset().union(*(phases(table != 0) for table in deciding))


def orthonormal(vectors: Tensor) -> Tensor:
    """Orthonormal rows ``[..., k, d]`` that span ``vectors [k, ..., d]``; zero for a row that adds nothing."""
    basis: list[Tensor] = []
    for vector in vectors.unbind(0):
        rest = vector
        for _ in range(2):  # once more for what rounding leaves
            for other in basis:
                rest = rest - (rest * other).sum(-1, keepdim=True) * other
        new = _length(rest) > 1e-6 * _length(vector)
        basis.append(torch.where(new, _unit(rest), 0.0))
    return torch.stack(basis, -2)


def _unit(vector: Tensor) -> Tensor:
    return vector / _length(vector).clamp_min(torch.finfo(vector.dtype).tiny)
