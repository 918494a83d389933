"""VEENA: the paper's intervention, from a circuit to a Plan.

Visual emotion enhancement (VEE) raises the attention that critical heads pay to visual tokens; emotional neuron
amplification (ENA) raises explicit-state neurons. Source: Zhang et al., "Interpreting and Enhancing Emotional Circuits
in Large Vision-Language Models via Cross-Modal Information Flow" (arXiv 2605.21980).
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from emocircuits.circuit import Circuit
from emocircuits.edits import READINGS, BoostRoute, Edit, Reading, ScaleNeurons
from emocircuits.families import open_model
from emocircuits.plan import Plan

if TYPE_CHECKING:
    from emocircuits.sweep import SweepResult

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

    def strengths(self, model: nn.Module) -> Callable[..., Plan]:
        """Plans of this setting with other strengths: a function of ``beta``, ``gamma`` or any setting by name.

        Raises:
            ValueError: as :meth:`plan`, which checks the model once, now.
        """
        self.plan(model)

        def plan(**changed: Any) -> Plan:
            return dc.replace(self, **changed).plan()

        return plan


def veena_grid(
    model: nn.Module, prompts: Mapping[str, Any] | Sequence[Mapping[str, Any]], circuit: Circuit | VEENA,
    betas: Sequence[float], gammas: Sequence[float], metric: Any, *,
    readings: Reading | Sequence[Reading] | None = None, batch: int | None = None, out: str | Path | None = None,
    progress: bool = True,
) -> SweepResult:  # fmt: skip
    """A metric under every strength of VEENA: axes [beta, gamma], or [reading, beta, gamma].

    Args:
        model: that the circuit was found in.
        prompts: model inputs of one row, or a list of them; of several the mean, and each in ``pairs``.
        circuit: of the model, or a VEENA with all its other settings, whose strengths are replaced.
        betas, gammas: strengths; 1 turns VEE or ENA off.
        metric: see :func:`~emocircuits.sweep.plan_grid`, as the arguments after it.
        readings: of "multiply the attention"; None or one of them: no axis.
        batch, out, progress: see there.

    Raises:
        ValueError: as :meth:`VEENA.plan` and :func:`~emocircuits.sweep.plan_grid`, before anything runs.
    """
    from emocircuits.sweep import plan_grid

    setting = circuit if isinstance(circuit, VEENA) else VEENA(circuit)
    axes: dict[str, Sequence[Any]] = {"beta": tuple(betas), "gamma": tuple(gammas)}
    if isinstance(readings, str):
        setting = dc.replace(setting, reading=readings)
    elif readings is not None:
        axes = {"reading": tuple(readings), **axes}
    plan = setting.strengths(model)
    return plan_grid(model, prompts, plan, axes, metric, batch=batch, out=out, progress=progress)
