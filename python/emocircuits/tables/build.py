"""From a Plan to tables: which edit goes into which table of which layer."""

from __future__ import annotations

import torch

from emocircuits.edits import AddHead, BoostRoute, GateHeads, GateRoute, NeuronEdit, ReplaceHead, ScaleHead, VectorEdit
from emocircuits.families import Geometry
from emocircuits.plan import Plan
from emocircuits.positions import Kind
from emocircuits.tables.attention import HeadBuilder, RouteBuilder
from emocircuits.tables.gates import Gate, HeadGate, RouteGate, check_gates
from emocircuits.tables.layer import LayerTables
from emocircuits.tables.neurons import NeuronBuilder
from emocircuits.tables.space import Space
from emocircuits.tables.vectors import VectorBuilder


def check(plan: Plan, geometry: Geometry) -> None:
    """Refuse a plan that names what the model does not have.

    Raises:
        ValueError: a layer, head or neuron out of range, or a vector of the wrong length.
        NotImplementedError: neurons of a mixture of experts, or a GateRoute on a head that a BoostRoute changes.
    """
    for i, edit in enumerate(plan):
        try:
            edit.check(geometry)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"edit {i} ({type(edit).__name__}): {error}") from None
    check_gates(plan)


def compile_plan(
    plan: Plan,
    geometry: Geometry,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    extra: tuple[tuple[Kind, ...], ...] = (),
    key_extra: tuple[tuple[Kind, ...], ...] = (),
) -> dict[int, LayerTables]:
    """Compile ``plan`` for a batch of ``batch`` rows: tables by layer, only for layers that change.

    Tables have one row when no edit names batch rows, else ``batch`` rows. Route and factor tables are float32
    (float64 for a float64 model); values and vectors have ``dtype``. ``extra`` and ``key_extra`` are the kinds of
    tokens that edits name by position (:func:`emocircuits.positions.select`).

    Raises:
        ValueError: the plan names a batch row that the batch does not have.
    """
    needed = plan.batch_rows()
    if needed is not None and needed > batch:
        raise ValueError(f"the plan names batch row {needed - 1}, but the batch has {batch} rows (0 to {batch - 1})")
    space = Space(geometry, 1 if needed is None else batch, batch, device, dtype, extra, key_extra)
    layers: dict[int, _LayerBuilder] = {}
    for edit in plan:
        for layer in sorted(edit.layers_used()):
            layers.setdefault(layer, _LayerBuilder(space)).add(edit, layer)
    return {layer: layers[layer].build(layer) for layer in sorted(layers)}


class _LayerBuilder:
    """Accumulates the edits of one layer."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.routes, self.heads, self.neurons = RouteBuilder(space), HeadBuilder(space), NeuronBuilder(space)
        self.gates: dict[str, Gate] = {}
        self.vectors: dict[str, VectorBuilder] = {}

    def add(self, edit: object, layer: int) -> None:
        if isinstance(edit, BoostRoute):
            self.routes.add(edit, layer)
        elif isinstance(edit, ScaleHead | AddHead | ReplaceHead):
            self.heads.add(edit, layer)
        elif isinstance(edit, GateHeads):
            self.gates[str(len(self.gates))] = HeadGate.of(edit, self.space)
        elif isinstance(edit, GateRoute):
            self.gates[str(len(self.gates))] = RouteGate.of(edit, self.space, layer)
        elif isinstance(edit, NeuronEdit):
            self.neurons.add(edit, layer)
        elif isinstance(edit, VectorEdit):
            self.vectors.setdefault(edit.site, VectorBuilder(self.space, edit.site)).add(edit, layer)
        else:
            raise TypeError(f"{type(edit).__name__} has no table")

    def build(self, layer: int) -> LayerTables:
        routes = self.routes.build(layer)
        heads, head_phases = self.heads.build()
        neurons, neuron_phases = self.neurons.build()
        vectors = {site: builder.build() for site, builder in self.vectors.items()}
        return LayerTables(
            routes=routes.by_role,
            selected=routes.selected,
            slots=routes.slots,
            keyed=routes.keyed,
            heads=heads,
            gates=self.gates,
            neurons=neurons,
            vectors={site: table for site, (table, _) in vectors.items()},
            attention_phases=routes.active.union(head_phases, *(gate.active for gate in self.gates.values())),
            neuron_phases=neuron_phases,
            vector_phases={site: active for site, (_, active) in vectors.items()},
        )
