"""Presets that steer the residual stream with a vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from emocircuits.edits import AddVector
from emocircuits.plan import Plan
from emocircuits.presets.registry import preset
from emocircuits.presets.where import ANSWER, opened, some_layers

Rows = Sequence[int] | None


@preset(
    formula="h' = h + α·v at the output of a layer, from the last prompt token on",
    paper="Rimsky et al. 2024, Steering Llama 2 via Contrastive Activation Addition (CAA), arXiv 2312.06681",
    needs="a steering vector: the mean difference of activations over contrastive pairs",
)
def caa(
    model: nn.Module,
    layers: int | Iterable[int],
    vector: Any,
    alpha: float = 1.0,
    *,
    to: str | Sequence[str] | None = ANSWER,
    rows: Rows = None,
) -> Plan:
    """Contrastive activation addition: ``alpha * vector`` added to what a decoder layer outputs.

    Official code: github.com/nrimsky/CAA, llama_wrapper.py; it adds at every position from the end of the instruction
    on, so by default the last prompt token and all generated ones. :func:`emocircuits.circuits.steering_vectors` finds
    such a vector.

    Args:
        model: only its sizes are read.
        layers: a layer or several.
        vector: ``[d_model]``, or ``[n_layers, d_model]`` in the order of ``layers``.
        alpha: multiplier, negative to steer away.
        to: role or roles of the rows (None: every row).
        rows: batch rows (None: all).
    """
    geometry = opened(model).geometry
    to = [to] if isinstance(to, str) else to
    return Plan([AddVector(some_layers(geometry, layers, ()), vector, "resid_post", alpha, to=to, rows=rows)])
