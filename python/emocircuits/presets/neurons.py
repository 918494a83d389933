"""Presets that change neurons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from emocircuits.edits import Edit, ScaleNeurons
from emocircuits.plan import Plan
from emocircuits.presets.registry import preset
from emocircuits.presets.where import Pair, opened

Rows = Sequence[int] | None


@preset(
    formula="a' = (1 + δ)·a for the task's neurons, each with its own δ",
    paper="Wang et al. 2026, From Heads to Neurons (HONES), arXiv 2604.17941",
    needs="the neurons and their factors, learned on a frozen model",
)
def hones(
    model: nn.Module,
    scales: Mapping[Pair, float] | Iterable[Mapping[str, Any]],
    *,
    rows: Rows = None,
) -> Plan:
    """HONES steering: neurons of the MLP (the input of the down projection) times a factor each, in all rows.

    Official code: github.com/petergit1/HONES, hones_neuron_steering.py (``h * (1 + mask * scale)`` before
    ``down_proj``; offsets are clamped to +-1.5 while they are learned).

    Args:
        model: only its sizes are read.
        scales: ``{(layer, neuron): factor}``, factor = 1 + offset; or what the official code exports, a list of
            ``{"layer": ..., "neuron": ..., "scale": factor}``.
        rows: batch rows (None: all).
    """
    opened(model)
    items: Iterable[tuple[Pair, float]]
    try:
        if isinstance(scales, Mapping):
            items = [((int(layer), int(neuron)), float(by)) for (layer, neuron), by in scales.items()]
        else:
            items = [((int(s["layer"]), int(s["neuron"])), float(s["scale"])) for s in scales]
    except (TypeError, KeyError, ValueError):
        raise TypeError(
            "scales: expected {(layer, neuron): factor} or a list of {'layer': ..., 'neuron': ..., 'scale': factor}"
        ) from None
    by_factor: dict[float, dict[int, list[int]]] = {}
    for (layer, neuron), by in items:
        if by != 1.0:
            by_factor.setdefault(by, {}).setdefault(layer, []).append(neuron)
    edits: list[Edit] = [
        ScaleNeurons(neurons, by=by, rows=rows)  # type: ignore[arg-type]
        for by, neurons in by_factor.items()
    ]
    return Plan(edits)
