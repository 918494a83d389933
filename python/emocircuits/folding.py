"""``patch(model, plan, fold=True)``: constant neuron gains go into the weights, where they cost nothing.

A gain of a neuron that is the same for every row and step is a factor on a column of ``down_proj.weight``. While the
model is patched these columns are scaled, and on exit they come back bit for bit. Products round where the weights are
stored instead of where the activations are, so results agree with ``fold=False`` to within rounding, not exactly; and
whoever reads weights or the input of ``down_proj`` meanwhile sees scaled columns and unscaled activations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from emocircuits.edits import Edit, NeuronEdit, ScaleNeurons
from emocircuits.families import Handle
from emocircuits.plan import Plan
from emokernels import Role, fold_gain
from emokernels.fold import Folded

Gains = dict[int, dict[int, float]]


def split(plan: Plan) -> tuple[Gains, Plan]:
    """The neuron gains of a plan, ``{layer: {neuron: gain}}``, and the plan of everything else.

    Raises:
        ValueError: a ScaleNeurons edit is not constant, or meets another neuron edit; the message says which.
    """
    gains: Gains = {}
    rest: list[Edit] = []
    for i, edit in enumerate(plan):
        if not isinstance(edit, ScaleNeurons):
            rest.append(edit)
            continue
        reason = _varies(edit)
        if reason is not None:
            raise ValueError(
                f"edit {i} (ScaleNeurons) cannot be folded into the weights: {reason}; "
                "folding needs every batch row, role and phase: widen the edit, or patch with fold=False"
            )
        for layer, index in edit.neurons:
            of_layer = gains.setdefault(layer, {})
            for neuron in index:
                of_layer[neuron] = of_layer.get(neuron, 1.0) * edit.by
    for edit in rest:
        for layer, index in edit.neurons if isinstance(edit, NeuronEdit) else ():
            both = sorted(gains.get(layer, {}).keys() & set(index))
            if both:
                raise ValueError(
                    f"neuron {both[0]} of layer {layer} cannot be folded: {type(edit).__name__} acts on it after its "
                    "factor, and weights come after both; patch with fold=False"
                )
    return gains, Plan(rest)


def _varies(edit: ScaleNeurons) -> str | None:
    if edit.rows is not None:
        return f"it acts on batch rows {list(edit.rows)} only"
    if edit.positions is not None:
        return f"it acts on positions {list(edit.positions)} only"
    if edit.phase != "both":
        return f"it acts in phase={edit.phase!r} only"
    if set(edit.destinations()) != set(Role):
        return f"it acts on rows of role {', '.join(edit.to or ())} only"
    return None


class Folding:
    """The gains of one plan at a time in the weights of one model."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self._gains: Gains = {}
        self._folded: list[Folded] = []

    @property
    def layers(self) -> set[int]:
        """Layers with folded gains."""
        return set(self._gains)

    def rest(self, plan: Plan) -> Plan:
        """What is left of a plan for the tables.

        Raises:
            ValueError: a neuron edit of the plan cannot be folded.
        """
        gains, rest = split(plan)
        for layer in gains:
            self._weight(layer)
        return rest

    def put(self, plan: Plan) -> Plan:
        """Fold the gains of a plan in place of those that are folded now; returns what is left of the plan.

        Raises:
            ValueError: as in `rest`; no gain is folded then.
        """
        gains, rest = split(plan)
        if gains != self._gains:
            self.undo()
            try:
                for layer, of_layer in sorted(gains.items()):
                    self._fold(layer, of_layer)
            except BaseException:
                self.undo()
                raise
            self._gains = gains
        return rest

    def undo(self) -> None:
        """Put the weights back, bit for bit."""
        self._gains = {}
        while self._folded:
            self._folded.pop().undo()

    def _fold(self, layer: int, gains: dict[int, float]) -> None:
        weight, dim = self._weight(layer)
        index = torch.tensor(sorted(gains), device=weight.device)
        by = torch.tensor([gains[i] for i in sorted(gains)], device=weight.device, dtype=torch.float64)
        try:
            self._folded.append(fold_gain(weight, index, by, dim=dim))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"the neurons of layer {layer} cannot be folded: {error} Patch with fold=False."
            ) from error

    def _weight(self, layer: int) -> tuple[Tensor, int]:
        modules = self.handle.down_projections
        module = modules[layer]
        kind = type(module)
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(
                f"layer {layer} cannot be folded: its down projection is a {kind.__module__}.{kind.__qualname__}, "
                "not a plain linear layer; patch with fold=False"
            )
        weight = module.weight
        if weight.is_meta or not weight.is_floating_point():
            state = "offloaded (on the meta device)" if weight.is_meta else f"quantised ({weight.dtype})"
            raise ValueError(
                f"layer {layer} cannot be folded: the weight of its down projection is {state}; patch with fold=False"
            )
        if kind.forward not in (nn.Linear.forward, Conv1D.forward):
            raise ValueError(
                f"layer {layer} cannot be folded: {kind.__module__}.{kind.__qualname__} has a forward of its own, "
                "which may not read the weight as it is; patch with fold=False"
            )
        others = [i for i, other in enumerate(modules) if i != layer and getattr(other, "weight", None) is weight]
        if others:
            raise ValueError(
                f"layer {layer} cannot be folded: layer {others[0]} has the same weight; patch with fold=False"
            )
        return weight, 0 if isinstance(module, Conv1D) else 1
