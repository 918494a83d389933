"""VEENA: the paper's intervention, from a circuit to a Plan.

Visual emotion enhancement (VEE) raises the attention that critical heads pay to visual tokens; emotional neuron
amplification (ENA) raises explicit-state neurons. Source: Zhang et al., "Interpreting and Enhancing Emotional Circuits
in Large Vision-Language Models via Cross-Modal Information Flow" (arXiv 2605.21980).
"""

from __future__ import annotations

import dataclasses as dc
from typing import Literal

from torch import nn

from emocircuits.circuit import Circuit
from emocircuits.edits import READINGS, BoostRoute, Edit, Reading, ScaleNeurons
from emocircuits.families import open_model
from emocircuits.plan import Plan

Where = Literal["split", "both", "prefill", "decode"]
WHERE = ("split", "both", "prefill", "decode")


@dc.dataclass(frozen=True)
class VEENA:
    """VEE and ENA on a circuit.

    Args:
        circuit: critical heads, explicit-state neurons and l_emo of the model.
        beta: VEE strength, > 1 boosts; 1 turns VEE off.
        gamma: ENA strength, > 1 amplifies; 1 turns ENA off.
        heads: how many of the circuit's heads to use (None: all).
        neurons: how many of its neurons to use (None: all).
        reading: what "multiply the attention" means, see :class:`BoostRoute` (the paper leaves it open).
        where: ``"split"`` is the paper's: prefill at layers <= l_emo, decode above it. ``"both"``, ``"prefill"`` and
            ``"decode"`` act at every layer of the chosen heads.
        last: whether the last prompt row is boosted too in prefill (the paper's QUERY rows do not include it).
        ena_phase: rows that ENA acts on: ``"both"``, ``"prefill"`` or ``"decode"``.
    """

    circuit: Circuit
    beta: float = 1.4
    gamma: float = 1.6
    heads: int | None = None
    neurons: int | None = None
    reading: Reading = "weight"
    where: Where = "split"
    last: bool = False
    ena_phase: Literal["both", "prefill", "decode"] = "both"

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise ValueError(f"reading={self.reading!r}: expected one of {', '.join(READINGS)}")
        if self.where not in WHERE:
            raise ValueError(f"where={self.where!r}: expected one of {', '.join(WHERE)}")

    def vee(self) -> list[Edit]:
        """The attention half: at most one edit a phase."""
        circuit, edits = self.circuit, list[Edit]()
        heads = circuit.heads[: self.heads]
        if self.beta == 1.0 or not heads:
            return edits
        split = self.where == "split"
        prompt = [h for h in heads if self.where in ("both", "prefill") or (split and h[0] <= circuit.l_emo)]
        step = [h for h in heads if self.where in ("both", "decode") or (split and h[0] > circuit.l_emo)]
        to = ("query", "last") if self.last else ("query",)
        if prompt:
            edits.append(BoostRoute(tuple(prompt), ("visual",), self.beta, self.reading, to=to))
        if step:
            edits.append(BoostRoute(tuple(step), ("visual",), self.beta, self.reading, to=("generated",)))
        return edits

    def ena(self) -> list[Edit]:
        """The neuron half: at most one edit."""
        by_layer: dict[int, list[int]] = {}
        for layer, neuron in self.circuit.neurons[: self.neurons]:
            by_layer.setdefault(layer, []).append(neuron)
        if self.gamma == 1.0 or not by_layer:
            return []
        neurons = tuple((layer, tuple(index)) for layer, index in sorted(by_layer.items()))
        return [ScaleNeurons(neurons, self.gamma, phase=self.ena_phase)]

    def plan(self, model: nn.Module | None = None) -> Plan:
        """The edits as a Plan; with ``model`` given, checked to be a model that the circuit fits.

        Raises:
            ValueError: the circuit was found in a model of another type, depth or weights, or the model sees no images.
        """
        if model is not None:
            handle = open_model(model)
            kind = handle.config.model_type
            self.circuit.require(model, kind, handle.geometry.layers)
            if not handle.sees:
                raise ValueError(f"VEENA needs a vision-language model; {kind!r} is text-only")
        return Plan(self.vee() + self.ena())
