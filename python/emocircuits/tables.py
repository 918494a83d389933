"""A Plan as device tables: one small tensor per layer and primitive, indexed by batch row and role."""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Any

import torch
from torch import Tensor

from emocircuits.context import Context
from emocircuits.edits import (
    AddVector,
    BoostRoute,
    Edit,
    ReplaceHead,
    ReplaceVector,
    ScaleHead,
    ScaleNeurons,
    Site,
)
from emocircuits.families import Geometry
from emocircuits.plan import Plan
from emokernels import HeadEdits, NeuronEdits, Role, Routes
from emokernels.edits import run_edit_neurons

R = len(Role)
GENERATED = int(Role.GENERATED)


def by_row(table: Tensor, query_roles: Tensor) -> Tensor:
    """Pick the row of ``table`` ``[B|1, R, ...]`` for each token: ``[B, N, ...]``."""
    if table.shape[0] == 1:
        return table[0][query_roles.long()]
    rows = torch.arange(table.shape[0], device=table.device)[:, None]
    return table[rows, query_roles.long()]


@dc.dataclass(frozen=True)
class HeadTable:
    """Head edits of one layer by destination role; any part may be None.

    ``scale [B|1, R, H]``; ``value [B|1, R, H, D]`` with ``mask [B|1, R, H]``; ``columns [B, P, H, D]`` with
    ``column_mask [B|1, R, H]``: values per prompt column.
    """

    scale: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    columns: Tensor | None = None
    column_mask: Tensor | None = None
    decode: HeadEdits = dc.field(init=False)
    """The edits of generated rows: views of the tables, ready before the first step."""

    def edits(self, query_roles: Tensor, prefill: bool) -> HeadEdits:
        """The tables spread over the rows of one forward pass."""
        if not prefill:
            return self.decode
        scale = None if self.scale is None else by_row(self.scale, query_roles)
        replace = mask = None
        if self.value is not None and self.mask is not None:
            replace, mask = by_row(self.value, query_roles), by_row(self.mask, query_roles)
        if self.columns is not None and self.column_mask is not None:
            expected = (query_roles.shape[0], query_roles.shape[1])
            chosen, columns = by_row(self.column_mask, query_roles), self.columns
            recorded = columns.shape[1]
            if recorded < expected[1] and bool((query_roles[:, recorded:] == GENERATED).all()):
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
        return HeadEdits(scale=scale, replace=replace, mask=mask)

    def __post_init__(self) -> None:
        step = slice(GENERATED, GENERATED + 1)
        parts = {"scale": self.scale, "replace": self.value, "mask": self.mask}
        object.__setattr__(self, "decode", HeadEdits(**{k: v[:, step] for k, v in parts.items() if v is not None}))


@dc.dataclass(frozen=True)
class NeuronTable:
    """Neuron factors of one layer: ``index [n]``, ``scale [B|1, R, n]``.

    ``row [B|1, 1, neurons]`` spreads the factors of generated rows over all neurons; `uniform` says that they are those
    of every role.
    """

    index: Tensor
    scale: Tensor
    row: Tensor
    uniform: bool

    @classmethod
    def of(cls, index: Tensor, scale: Tensor, neurons: int) -> NeuronTable:
        """The table of factors ``scale [B|1, R, n]`` on ``index [n]``."""
        row = scale.new_ones(scale.shape[0], 1, neurons)
        row[..., index] = scale[:, GENERATED : GENERATED + 1]
        return cls(index, scale, row, bool((scale == scale[:, :1]).all()))

    def apply(self, activations: Tensor, context: Context) -> Tensor:
        """Edit ``activations [B, N, I]``; the input is left alone."""
        if context.prefill and not self.uniform:
            return run_edit_neurons(activations, NeuronEdits(self.index, scale=by_row(self.scale, context.rows)))
        # One product with a row of factors reads and writes what a copy would, and exact ones change nothing.
        edited = activations * self.row
        return edited if edited.dtype == activations.dtype else edited.to(activations.dtype)


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


@dc.dataclass(frozen=True)
class LayerTables:
    """Everything a plan does to one layer. ``prefill`` and ``decode`` say in which phase each part does anything."""

    routes: Routes | None = None
    heads: HeadTable | None = None
    neurons: NeuronTable | None = None
    vectors: dict[Site, VectorTable] = dc.field(default_factory=dict)
    attention_phases: frozenset[str] = frozenset()
    neuron_phases: frozenset[str] = frozenset()
    vector_phases: dict[Site, frozenset[str]] = dc.field(default_factory=dict)

    def refill(self, other: LayerTables) -> bool:
        """Take over the values of `other` in place, so that graphs compiled on these tables follow.

        False, and nothing is changed, when the two differ in more than values.
        """
        mine, theirs = _parts(self), _parts(other)
        if mine.keys() != theirs.keys() or not all(_alike(mine[key], theirs[key]) for key in mine):
            return False
        for key, value in mine.items():
            if isinstance(value, Tensor):
                value.copy_(theirs[key])
        return True


def _parts(tables: Any) -> dict[str, Any]:
    """The tensors and other values of a table by their place; views made from them are not parts."""
    found: dict[str, Any] = {}
    for field in dc.fields(tables):
        value = getattr(tables, field.name)
        if not field.init:
            continue
        items = value.items() if isinstance(value, dict) else [("", value)]
        for key, item in items:
            place = f"{field.name}.{key}"
            if dc.is_dataclass(item):
                found |= {f"{place}.{name}": part for name, part in _parts(item).items()}
            else:
                found[place] = item
    return found


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def check(plan: Plan, geometry: Geometry) -> None:
    """Refuse a plan that names what the model does not have.

    Raises:
        ValueError: a layer, head or neuron out of range, or a vector of the wrong length.
        NotImplementedError: neurons of a mixture of experts.
    """
    for i, edit in enumerate(plan):
        name = f"edit {i} ({type(edit).__name__})"
        for layer in sorted(edit.layers_used()):
            if layer >= geometry.layers:
                raise ValueError(f"{name}: no layer {layer}; this model has layers 0 to {geometry.layers - 1}")
        if isinstance(edit, BoostRoute | ScaleHead | ReplaceHead):
            for layer, head in edit.heads:
                if head >= geometry.heads:
                    raise ValueError(
                        f"{name}: layer {layer} has no head {head}; this model has heads 0 to {geometry.heads - 1}"
                    )
        if geometry.neurons == 0 and hasattr(edit, "neurons"):
            raise NotImplementedError(
                f"{name}: the MLPs of this model are mixtures of experts, whose neurons cannot be edited; "
                "use heads, routes and vectors"
            )
        if isinstance(edit, ScaleNeurons):
            for layer, index in edit.neurons:
                if max(index) >= geometry.neurons:
                    raise ValueError(
                        f"{name}: layer {layer} has no neuron {max(index)}; "
                        f"this model has neurons 0 to {geometry.neurons - 1}"
                    )
        for array, size in (("value", geometry.head_dim), ("vector", geometry.d_model)):
            if array in edit.arrays:
                length = getattr(edit, array).shape[-1]
                if length != size:
                    raise ValueError(f"{name}: {array} has length {length}; this model needs {size}")


def compile_plan(
    plan: Plan, geometry: Geometry, batch: int, device: torch.device, dtype: torch.dtype
) -> dict[int, LayerTables]:
    """Compile ``plan`` for a batch of ``batch`` rows: tables by layer, only for layers that change.

    Tables have one row when no edit names batch rows, else ``batch`` rows. Route and factor tables are float32
    (float64 for a float64 model); values and vectors have ``dtype``.

    Raises:
        ValueError: the plan names a batch row that the batch does not have.
    """
    needed = plan.batch_rows()
    if needed is not None and needed > batch:
        raise ValueError(f"the plan names batch row {needed - 1}, but the batch has {batch} rows (0 to {batch - 1})")
    build = _Builder(geometry, 1 if needed is None else batch, batch, device, dtype)
    for edit in plan:
        build.add(edit)
    return (
        {layer: build.layer(layer) for layer in sorted(set().union(*(e.layers_used() for e in plan)))}
        if plan.edits
        else {}
    )


class _Builder:
    """Accumulates edits into dense per-layer tables."""

    def __init__(self, geometry: Geometry, rows: int, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.geometry, self.rows, self.batch, self.device, self.dtype = geometry, rows, batch, device, dtype
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.routes: dict[int, dict[str, Tensor]] = {}
        self.heads: dict[int, dict[str, Tensor]] = {}
        self.neurons: dict[int, dict[int, Tensor]] = {}
        self.vectors: dict[int, dict[Site, dict[str, Tensor]]] = {}

    def full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, value, device=self.device, dtype=dtype or self.exact)

    def selection(self, edit: Edit) -> tuple[Tensor, Tensor]:
        """Index tensors for [batch row, role], ready to combine by broadcasting."""
        rows = range(self.rows) if edit.rows is None else edit.rows
        return torch.tensor(list(rows))[:, None], torch.tensor([int(r) for r in edit.destinations()])[None, :]

    def add(self, edit: Edit) -> None:
        if isinstance(edit, BoostRoute):
            self._route(edit)
        elif isinstance(edit, ScaleHead | ReplaceHead):
            self._head(edit)
        elif isinstance(edit, ScaleNeurons):
            rows, roles = self.selection(edit)
            for layer, index in edit.neurons:
                table = self.neurons.setdefault(layer, {})
                for i in index:
                    if i not in table:
                        table[i] = self.full((self.rows, R), 1.0)
                    table[i][rows, roles] *= edit.by
        elif isinstance(edit, AddVector | ReplaceVector):
            self._vector(edit)

    def _route(self, edit: BoostRoute) -> None:
        field, start, value, multiply = {
            "weight": ("gain", 1.0, edit.by, True),
            "logit-scale": ("scale", 1.0, edit.by, True),
            "logit-abs": ("abs", 0.0, edit.by, False),
            "logit-add": ("bias", 0.0, math.log(edit.by) if edit.by > 0 else -math.inf, False),
        }[edit.reading]
        rows, dst = (index[:, :, None, None] for index in self.selection(edit))
        src = torch.tensor([int(_role(source)) for source in edit.source])
        for layer in sorted(edit.layers_used()):
            fields = self.routes.setdefault(layer, {})
            if field not in fields:
                fields[field] = self.full((self.rows, self.geometry.heads, R, R), start)
            heads = torch.tensor([head for at, head in edit.heads if at == layer])[:, None]
            at = (rows, heads, dst, src)
            fields[field][at] = fields[field][at] * value if multiply else fields[field][at] + value

    def _head(self, edit: ScaleHead | ReplaceHead) -> None:
        heads, dim = self.geometry.heads, self.geometry.head_dim
        rows, dst = self.selection(edit)
        value = None if isinstance(edit, ScaleHead) else edit.value.tensor(self.device, self.dtype)
        for n, (layer, head) in enumerate(edit.heads):
            table = self.heads.setdefault(layer, {})
            if isinstance(edit, ScaleHead):
                table.setdefault("scale", self.full((self.rows, R, heads), 1.0))[rows, dst, head] *= edit.by
            elif value is not None and value.ndim == 4:
                if value.shape[0] != self.batch:
                    raise ValueError(
                        f"ReplaceHead value is for {value.shape[0]} batch rows, the batch has {self.batch}"
                    )
                if "columns" not in table:
                    table["columns"] = torch.zeros(*value.shape[:2], heads, dim, device=self.device, dtype=self.dtype)
                    table["column_mask"] = self.full((self.rows, R, heads), 0, torch.bool)
                table["columns"][:, :, head] = value[:, :, n]
                table["column_mask"][rows, dst, head] = True
            elif value is not None:
                table.setdefault("value", self.full((self.rows, R, heads, dim), 0, self.dtype))
                table.setdefault("mask", self.full((self.rows, R, heads), 0, torch.bool))
                table["value"][rows, dst, head] = value if value.ndim == 1 else value[n]
                table["mask"][rows, dst, head] = True

    def _vector(self, edit: AddVector | ReplaceVector) -> None:
        rows, dst = self.selection(edit)
        vector = edit.vector.tensor(self.device, self.dtype)
        shape = (self.rows, R, self.geometry.d_model)
        for n, layer in enumerate(edit.layers):
            table = self.vectors.setdefault(layer, {}).setdefault(edit.site, {})
            value = vector if vector.ndim == 1 else vector[n]
            if isinstance(edit, AddVector):
                table.setdefault("add", self.full(shape, 0, self.dtype))[rows, dst] += edit.by * value
            else:
                table.setdefault("value", self.full(shape, 0, self.dtype))[rows, dst] = value
                table.setdefault("mask", self.full(shape[:2], 0, torch.bool))[rows, dst] = True

    def layer(self, layer: int) -> LayerTables:
        attention: set[str] = set()
        routes = heads = neurons = None
        if layer in self.routes:
            fields = self.routes[layer]
            for name, table in fields.items():
                attention |= phases(table.movedim(2, 1) != (1.0 if name in ("gain", "scale") else 0.0))
            routes = Routes(**fields)
        if layer in self.heads:
            parts = self.heads[layer]
            for name, table in parts.items():
                if name not in ("columns", "value"):
                    attention |= phases(table != (1.0 if name == "scale" else 0.0))
            heads = HeadTable(**parts)
        active: frozenset[str] = frozenset()
        if layer in self.neurons:
            index = sorted(self.neurons[layer])
            scale = torch.stack([self.neurons[layer][i] for i in index], -1)
            neurons = NeuronTable.of(torch.tensor(index, device=self.device), scale, self.geometry.neurons)
            active = frozenset(phases(scale != 1.0))
        sites = {site: VectorTable(**t) for site, t in self.vectors.get(layer, {}).items()}
        where = {
            site: frozenset().union(*(phases(t[k] != 0) for k in t if k != "value"))
            for site, t in self.vectors.get(layer, {}).items()
        }
        return LayerTables(routes, heads, neurons, sites, frozenset(attention), active, where)


def phases(changes: Tensor) -> set[str]:
    """The phases in which any entry of ``changes [B|1, R, ...]`` (bool) is set."""
    by_role = changes.movedim(1, 0).flatten(1).any(1).tolist()
    prompt = any(by_role[:GENERATED])
    return ({"prefill"} if prompt else set()) | ({"decode"} if by_role[GENERATED] else set())


def _role(name: str) -> Role:
    return Role[name.upper()]
