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


@dc.dataclass(frozen=True)
class RouteTables:
    """The routes of one layer; ``by_role [B|1, H, R, R]`` are all there is where no edit names positions.

    Attributes:
        selected: of tokens that edits name by position, R kinds each by the first of them (:mod:`.reroute`).
        slots: ``[B|1, key kinds]`` uint8, where edits name keys by position: what stands for the role of a key in a
            prompt, in ``keyed [B|1, H, R, R]`` in place of ``by_role``, and in ``selected``.
        active: phases in which anything changes.
    """

    by_role: Routes | None = None
    selected: dict[str, Routes] = dc.field(default_factory=dict)
    slots: Tensor | None = None
    keyed: Routes | None = None
    active: frozenset[str] = frozenset()


class RouteBuilder:
    """Accumulates the routes of one layer."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.fields: dict[str, Tensor] = {}
        self.selects = self.selects_keys = False

    def add(self, edit: BoostRoute, layer: int) -> None:
        """Take in the heads of ``layer``."""
        self.selects |= edit.positions is not None
        self.selects_keys |= edit.source_positions is not None
        field, value = {
            "weight": ("gain", edit.by),
            "logit-scale": ("scale", edit.by),
            "logit-abs": ("abs", edit.by),
            "logit-add": ("bias", math.log(edit.by) if edit.by > 0 else -math.inf),
        }[edit.reading]
        if field not in self.fields:
            shape = (self.space.geometry.heads, self.space.key_kinds)
            self.fields[field] = self.space.full(shape, IDENTITY[field])
        table, device = self.fields[field], self.space.device
        heads = torch.tensor([head for at, head in edit.heads if at == layer], device=device)[:, None]
        rows, dst = self.space.selection(edit)
        for row in rows.unique().tolist():
            keys = torch.tensor(self._keys(edit, row), device=device, dtype=torch.int64)
            at = (row, dst[rows == row][:, None, None], heads, keys)
            table[at] = table[at] * value if IDENTITY[field] == 1.0 else table[at] + value

    def _keys(self, edit: BoostRoute, row: int) -> list[int]:
        """Kinds of the keys that an edit names, in one row of the tables."""
        roles, wanted = {Role[name.upper()] for name in edit.source}, edit.source_positions
        extra = self.space.key_extra[row] if self.space.key_extra else ()
        found = [R + i for i, (role, held) in enumerate(extra) if role in roles and (wanted is None or wanted in held)]
        return found if wanted is not None else [*(int(role) for role in roles), *found]

    def build(self, layer: int) -> RouteTables:
        """The routes of the layer.

        Raises:
            NotImplementedError: keys that are named by position are of more kinds than a kernel tells apart.
        """
        if not self.fields:
            return RouteTables()
        active = frozenset().union(*(phases(table != IDENTITY[name]) for name, table in self.fields.items()))
        by_role = self._routes(0, {name: table[..., :R] for name, table in self.fields.items()})
        fields, slots, keyed = self.fields, None, None
        if self.selects_keys:
            slots, fields = self._merge(layer)
            keyed = self._routes(0, fields)
        fields = {name: table[..., :R] for name, table in fields.items()}
        starts = range(R, self.space.kinds, R) if self.selects else ()
        return RouteTables(by_role, {str(start): self._routes(start, fields) for start in starts}, slots, keyed, active)

    def _merge(self, layer: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Slots ``[rows, key kinds]``, and tables with a column for every slot: kinds treated alike share one."""
        space = self.space
        slots = torch.zeros(space.rows, space.key_kinds, dtype=torch.uint8)
        merged = {name: space.full((space.geometry.heads, R), IDENTITY[name]) for name in self.fields}
        for row in range(space.rows):
            columns: dict[bytes, int] = {}
            for kind in range(R + len(space.key_extra[row])):
                parts = {name: table[row, ..., kind] for name, table in self.fields.items()}
                content = b"".join(part.cpu().numpy().tobytes() for part in parts.values())
                slot = columns.setdefault(content, len(columns))
                if slot >= R:
                    raise NotImplementedError(
                        f"routes of layer {layer} tell more than {R} kinds of keys apart; name fewer source_positions "
                        "that differ in what is done to them"
                    )
                slots[row, kind] = slot
                for name, part in parts.items():
                    merged[name][row, ..., slot] = part
        return slots.to(space.device), merged

    def _routes(self, start: int, fields: dict[str, Tensor]) -> Routes:
        part = {}
        for name, table in fields.items():
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
