"""Vector edits of one layer at one site as tables."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from emocircuits.edits import AddVector, VectorEdit
from emocircuits.tables.space import Space, by_row, phases


@dc.dataclass(frozen=True)
class VectorTable:
    """Additions ``add [B|1, R, d]`` and settings ``value [B|1, R, d]`` where ``mask [B|1, R]``, at one site."""

    add: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None

    def apply(self, hidden: Tensor, query_roles: Tensor) -> Tensor:
        """Edit ``hidden [B, N, d]``; the input is left alone."""
        if self.add is not None:
            hidden = hidden + by_row(self.add, query_roles).to(hidden.dtype)
        if self.value is not None and self.mask is not None:
            chosen = by_row(self.mask, query_roles)[..., None]
            hidden = torch.where(chosen, by_row(self.value, query_roles).to(hidden.dtype), hidden)
        return hidden


class VectorBuilder:
    """Accumulates the vector edits of one layer at one site."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.parts: dict[str, Tensor] = {}

    def _table(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name not in self.parts:
            self.parts[name] = self.space.full(shape, 0, dtype)
        return self.parts[name]

    def add(self, edit: VectorEdit, layer: int) -> None:
        """Take in the vector of ``layer``."""
        space = self.space
        where = space.selection(edit)
        vector = edit.vector.tensor(space.device, space.dtype)
        vector = vector if vector.ndim == 1 else vector[edit.layers.index(layer)]
        shape = (space.geometry.d_model,)
        if isinstance(edit, AddVector):
            self._table("add", shape, space.dtype)[where] += edit.by * vector
        else:
            self._table("value", shape, space.dtype)[where] = vector
            self._table("mask", (), torch.bool)[where] = True

    def build(self) -> tuple[VectorTable, frozenset[str]]:
        """The table and the phases in which it changes anything."""
        active = frozenset().union(*(phases(t != 0) for name, t in self.parts.items() if name != "value"))
        return VectorTable(**self.parts), active
