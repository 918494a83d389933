"""A gated MLP with neuron edits as one pass over its activations: ``act(gate) * up``, edited, in one kernel.

The always correct way is to edit the input of the down projection; that reads and writes the activations once more. On
a GPU an edited layer computes them by :func:`emokernels.gated_activation` instead, where its family is one whose MLP is
known to be ``down(act(gate(x)) * up(x))``. Graphs that are being compiled do not need it: the compiler fuses as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from emocircuits.context import Context
from emocircuits.families import FAMILIES, Handle
from emocircuits.tables import LayerTables
from emokernels.acts import ACTS
from emokernels.mlp import run_activation


class Shared(Protocol):
    """What places of a patched model share, as far as it is needed here."""

    context: Context
    backend: str
    tables: dict[int, LayerTables]
    readers: dict[Any, Any]


def is_gated(handle: Handle) -> bool:
    """Whether the MLPs of a model can run in one pass."""
    family = handle.family
    parts = (family.gate is not None and family.up is not None) or family.gate_up is not None
    known = family in FAMILIES and handle.activation in ACTS
    return parts and known and handle.geometry.neurons > 0  # mixtures of experts have none


class GatedMLP:
    """The forward of one MLP.

    Args:
        forward: of the MLP, and ``down`` of its down projection, as they were before patching.
    """

    def __init__(
        self, state: Shared, layer: int, handle: Handle, forward: Callable[..., Any], down: Callable[..., Tensor]
    ) -> None:
        self.state, self.layer = state, layer
        self.module, self.family, self.act = handle.layers[layer], handle.family, handle.activation
        self.projection = handle.down_projections[layer]
        self.forward, self.down = forward, down

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The MLP's output; of a step without edits, or that someone looks into, by its own forward."""
        context, tables = self.state.context, self.state.tables.get(self.layer)
        if (
            tables is None
            or tables.neurons is None
            or context.phases.isdisjoint(tables.neuron_phases)
            or torch.compiler.is_compiling()
            or len(args) != 1
            or kwargs
            or self.state.readers
            or self.projection._forward_pre_hooks
            or self.projection._forward_hooks
        ):
            return self.forward(*args, **kwargs)
        gate, up = self._activations(args[0])
        edits = tables.neurons.edits(context.at(gate.device))
        return self.down(run_activation(gate, up, act=self.act, neurons=edits, backend=self.state.backend))

    def _activations(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        # Looked up at every call: adapters may take the place of projections.
        if self.family.gate_up is not None:
            gate, up = self._part(self.family.gate_up)(rows).chunk(2, dim=-1)
            return gate, up
        return self._part(str(self.family.gate))(rows), self._part(str(self.family.up))(rows)

    def _part(self, path: str) -> nn.Module:
        return self.module.get_submodule(path)
