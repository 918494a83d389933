"""Routes and head edits of one layer as tables."""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from torch import Tensor

from emocircuits.edits import AddHead, BoostRoute, ReplaceHead, ScaleHead
from emocircuits.tables.space import GENERATED, R, Space, by_row, phases
from emokernels import HeadEdits, Role, Routes

IDENTITY = {"gain": 1.0, "scale": 1.0, "abs": 0.0, "bias": 0.0}


class RouteBuilder:
    """Accumulates the routes of one layer."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.fields: dict[str, Tensor] = {}
        self.selects = False

    def add(self, edit: BoostRoute, layer: int) -> None:
        """Take in the heads of ``layer``."""
        self.selects |= edit.positions is not None
        field, value = {
            "weight": ("gain", edit.by),
            "logit-scale": ("scale", edit.by),
            "logit-abs": ("abs", edit.by),
            "logit-add": ("bias", math.log(edit.by) if edit.by > 0 else -math.inf),
        }[edit.reading]
        if field not in self.fields:
            self.fields[field] = self.space.full((self.space.geometry.heads, R), IDENTITY[field])
        table, device = self.fields[field], self.space.device
        rows, dst = (index[:, None, None] for index in self.space.selection(edit))
        heads = torch.tensor([head for at, head in edit.heads if at == layer], device=device)[:, None]
        at = (rows, dst, heads, torch.tensor([int(Role[name.upper()]) for name in edit.source], device=device))
        table[at] = table[at] * value if IDENTITY[field] == 1.0 else table[at] + value

    def build(self) -> tuple[Routes | None, dict[str, Routes], frozenset[str]]:
        """Routes ``[B|1, H, R, R]`` by role, those of extra kinds if they differ, and the phases that are active."""
        if not self.fields:
            return None, {}, frozenset()
        active = frozenset().union(*(phases(table != IDENTITY[name]) for name, table in self.fields.items()))
        starts = range(R, self.space.kinds, R) if self.selects else ()
        return self._routes(0), {str(start): self._routes(start) for start in starts}, active

    def _routes(self, start: int) -> Routes:
        part = {}
        for name, table in self.fields.items():
            rows = table[:, start : start + R].movedim(2, 1)
            # The last part may have fewer kinds; no token has the others.
            part[name] = torch.nn.functional.pad(rows, (0, 0, 0, R - rows.shape[2])).contiguous()
        return Routes(**part)


@dc.dataclass(frozen=True)
class HeadTable:
    """Head edits of one layer by kind of destination; any part may be None.

    ``scale [B|1, kinds, H]``; ``shift [B|1, kinds, H, D]``; ``value [B|1, kinds, H, D]`` with ``mask [B|1, kinds, H]``;
    ``columns [B, P, H, D]`` with ``column_mask [B|1, kinds, H]``: values per prompt column.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    columns: Tensor | None = None
    column_mask: Tensor | None = None
    decode: HeadEdits = dc.field(init=False)
    """The edits of generated rows: views of the tables, ready before the first step."""

    def edits(self, kinds: Tensor, prefill: bool) -> HeadEdits:
        """The tables spread over the rows of one forward pass."""
        if not prefill:
            return self.decode
        scale = None if self.scale is None else by_row(self.scale, kinds)
        shift = None if self.shift is None else by_row(self.shift, kinds)
        replace = mask = None
        if self.value is not None and self.mask is not None:
            replace, mask = by_row(self.value, kinds), by_row(self.mask, kinds)
        if self.columns is not None and self.column_mask is not None:
            expected = (kinds.shape[0], kinds.shape[1])
            chosen, columns = by_row(self.column_mask, kinds), self.columns
            recorded = columns.shape[1]
            if recorded < expected[1] and bool((kinds[:, recorded:] == GENERATED).all()):
                # Generation without a cache runs the prompt again with what was generated: that has no values.
                columns = torch.nn.functional.pad(columns, (0, 0, 0, 0, 0, expected[1] - recorded))
                chosen = chosen.expand(expected[0], -1, -1).clone()
                chosen[:, recorded:] = False
            if tuple(columns.shape[:2]) != expected:
                raise ValueError(
                    f"ReplaceHead value holds {tuple(self.columns.shape[:2])} (batch rows, prompt columns), the prompt "
                    f"has {expected}; record the values on a prompt of the same shape (padding included)"
                )
            if replace is None or mask is None:
                replace, mask = columns, chosen
            else:
                replace, mask = torch.where(chosen[..., None], columns, replace), mask | chosen
        return HeadEdits(scale=scale, shift=shift, replace=replace, mask=mask)

    def __post_init__(self) -> None:
        step = slice(GENERATED, GENERATED + 1)
        parts = {"scale": self.scale, "shift": self.shift, "replace": self.value, "mask": self.mask}
        object.__setattr__(self, "decode", HeadEdits(**{k: v[:, step] for k, v in parts.items() if v is not None}))


class HeadBuilder:
    """Accumulates the head edits of one layer."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.parts: dict[str, Tensor] = {}

    def _table(self, name: str, shape: tuple[int, ...], value: float, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self.parts:
            self.parts[name] = self.space.full(shape, value, dtype)
        return self.parts[name]

    def add(self, edit: ScaleHead | AddHead | ReplaceHead, layer: int) -> None:
        """Take in the heads of ``layer``.

        Raises:
            ValueError: a value per prompt column is for another number of batch rows.
        """
        space = self.space
        heads, dim = space.geometry.heads, space.geometry.head_dim
        rows, dst = space.selection(edit)
        for n, (at, head) in enumerate(edit.heads):
            if at != layer:
                continue
            if isinstance(edit, ScaleHead):
                self._table("scale", (heads,), 1.0)[rows, dst, head] *= edit.by
            elif isinstance(edit, AddHead):
                vector = edit.vector.tensor(space.device, space.exact)
                vector = vector if vector.ndim == 1 else vector[n]
                self._table("shift", (heads, dim), 0.0)[rows, dst, head] += edit.by * vector
            elif edit.value.ndim == 4:
                value = edit.value.tensor(space.device, space.dtype)
                if value.shape[0] != space.batch:
                    raise ValueError(
                        f"ReplaceHead value is for {value.shape[0]} batch rows, the batch has {space.batch}"
                    )
                if "columns" not in self.parts:
                    self.parts["columns"] = value.new_zeros(*value.shape[:2], heads, dim)
                self.parts["columns"][:, :, head] = value[:, :, n]
                self._table("column_mask", (heads,), 0, torch.bool)[rows, dst, head] = True
            else:
                value = edit.value.tensor(space.device, space.dtype)
                self._table("value", (heads, dim), 0, space.dtype)[rows, dst, head] = (
                    value if value.ndim == 1 else value[n]
                )
                self._table("mask", (heads,), 0, torch.bool)[rows, dst, head] = True

    def build(self) -> tuple[HeadTable | None, frozenset[str]]:
        """The table and the phases in which it changes anything."""
        if not self.parts:
            return None, frozenset()
        deciding = {name: table for name, table in self.parts.items() if name not in ("columns", "value")}
        active = frozenset().union(*(phases(t != (1.0 if n == "scale" else 0.0)) for n, t in deciding.items()))
        return HeadTable(**self.parts), active
