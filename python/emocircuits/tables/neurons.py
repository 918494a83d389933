"""Neuron edits of one layer as tables."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from emocircuits.context import Context
from emocircuits.edits import AddNeurons, NeuronEdit, ReplaceNeurons, ScaleNeurons
from emocircuits.tables.space import GENERATED, Space, by_row, phases
from emokernels import NeuronEdits
from emokernels.edits import run_edit_neurons

IDENTITY = {"scale": 1.0, "shift": 0.0, "value": 0.0, "mask": 0.0}
Parts = dict[str, Tensor]


@dc.dataclass(frozen=True)
class NeuronTable:
    """Neuron edits of one layer: ``index [n]`` and tables ``[B|1, kinds, n]``; any of them may be None.

    ``step`` spreads what generated rows get over all neurons, ``[B|1, 1, neurons]`` each: one pass over the activations
    reads and writes what a copy would, and neurons that are not edited are multiplied by an exact 1. ``uniform`` says
    that every kind of token gets the same.
    """

    index: Tensor
    scale: Tensor | None
    shift: Tensor | None
    value: Tensor | None
    mask: Tensor | None
    step: Parts
    uniform: bool
    decode: NeuronEdits = dc.field(init=False)
    """The edits of generated rows: views of the tables, ready before the first step."""

    @classmethod
    def of(cls, index: Tensor, parts: Parts, neurons: int) -> NeuronTable:
        """The table of ``parts`` (scale, shift, value with mask) on ``index [n]``."""
        step = {}
        for name, table in parts.items():
            step[name] = table.new_full((table.shape[0], 1, neurons), IDENTITY[name])
            step[name][..., index] = table[:, GENERATED : GENERATED + 1]
        uniform = all(bool((table == table[:, :1]).all()) for table in parts.values())
        whole = {name: parts.get(name) for name in IDENTITY}
        return cls(index, **whole, step=step, uniform=uniform)

    def __post_init__(self) -> None:
        step = slice(GENERATED, GENERATED + 1)
        parts = {name: table[:, step] for name, table in self._parts().items()}
        object.__setattr__(self, "decode", NeuronEdits(self.index, **parts))

    def _parts(self) -> Parts:
        parts = {"scale": self.scale, "shift": self.shift, "replace": self.value, "mask": self.mask}
        return {name: table for name, table in parts.items() if table is not None}

    def edits(self, context: Context) -> NeuronEdits:
        """The edits of the rows of one forward pass."""
        if not context.prefill:
            return self.decode
        return NeuronEdits(self.index, **{name: by_row(table, context.kinds) for name, table in self._parts().items()})

    def apply(self, activations: Tensor, context: Context) -> Tensor:
        """Edit ``activations [B, N, I]``; the input is left alone."""
        if context.prefill and not self.uniform:
            return run_edit_neurons(activations, self.edits(context))
        step = self.step
        edited = activations
        if "scale" in step:
            edited = edited * step["scale"]
        if "shift" in step:
            edited = edited + step["shift"]
        if "value" in step:
            edited = torch.where(step["mask"], step["value"], edited)
        return edited if edited.dtype == activations.dtype else edited.to(activations.dtype)


class NeuronBuilder:
    """Accumulates the neuron edits of one layer."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.neurons: dict[int, Parts] = {}

    def add(self, edit: NeuronEdit, layer: int) -> None:
        """Take in the neurons of ``layer``."""
        where = self.space.selection(edit)
        index = dict(edit.neurons)[layer]
        values = edit.values()[layer] if isinstance(edit, AddNeurons | ReplaceNeurons) else [0.0] * len(index)
        for neuron, value in zip(index, values, strict=True):
            parts = self.neurons.setdefault(neuron, {})
            if isinstance(edit, ScaleNeurons):
                self._part(parts, "scale")[where] *= edit.by
            elif isinstance(edit, AddNeurons):
                self._part(parts, "shift")[where] += edit.by * value
            else:
                self._part(parts, "value")[where] = value
                self._part(parts, "mask")[where] = True

    def _part(self, parts: Parts, name: str) -> Tensor:
        if name not in parts:
            parts[name] = self.space.full((), IDENTITY[name], torch.bool if name == "mask" else None)
        return parts[name]

    def build(self) -> tuple[NeuronTable | None, frozenset[str]]:
        """The table and the phases in which it changes anything."""
        if not self.neurons:
            return None, frozenset()
        index = sorted(self.neurons)
        names = [name for name in IDENTITY if any(name in parts for parts in self.neurons.values())]
        tables = {n: torch.stack([self._part(self.neurons[i], n) for i in index], -1) for n in names}
        active = frozenset().union(*(phases(t != IDENTITY[n]) for n, t in tables.items() if n != "value"))
        where = torch.tensor(index, device=self.space.device)
        return NeuronTable.of(where, tables, self.space.geometry.neurons), active
