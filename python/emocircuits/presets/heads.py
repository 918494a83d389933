"""Presets that change the output of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from emocircuits.edits import Edit, ScaleHead
from emocircuits.plan import Plan
from emocircuits.presets.registry import preset
from emocircuits.presets.where import Pair, opened

Rows = Sequence[int] | None


@preset(
    formula="z' = clip(1 + λ·score, 0, 2)·z for every head whose |score| is at least ε",
    paper="Wang et al. 2025, V-SEAM (EMNLP 2025), arXiv 2509.14837",
    needs="a signed score for every head: positive heads are raised, negative ones lowered",
)
def vseam(
    model: nn.Module,
    scores: Mapping[Pair, float] | Any,
    strength: float = 1.0,
    *,
    epsilon: float = 0.0,
    clip: tuple[float, float] | None = (0.0, 2.0),
    rows: Rows = None,
) -> Plan:
    """V-SEAM's head rescaling: ``z' = clip(1 + strength * score) * z`` before the output projection, all rows.

    Official code: github.com/petergit1/V-SEAM, Attention_Head_Rescaling.py (EDIT_LAMBDA 1, CLIP_RANGE (0, 2)); there a
    score is how much the probability of the right answer drops when the head is replaced by the mean of the others.

    Args:
        model: only its sizes are read.
        scores: ``[layers, heads]`` array, or ``{(layer, head): score}``.
        strength: lambda.
        epsilon: heads with a smaller ``|score|`` are left alone.
        clip: bounds of the factor, or None.
        rows: batch rows (None: all).
    """
    geometry = opened(model).geometry
    if isinstance(scores, Mapping):
        items = [((int(layer), int(head)), float(score)) for (layer, head), score in scores.items()]
    else:
        table = np.asarray(scores, np.float64)
        if table.shape != (geometry.layers, geometry.heads):
            raise ValueError(
                f"scores has shape {table.shape}: expected [layers, heads] = [{geometry.layers}, {geometry.heads}], "
                "or {(layer, head): score}"
            )
        items = [((layer, head), float(table[layer, head])) for layer, head in np.ndindex(table.shape)]
    by_factor: dict[float, list[Pair]] = {}
    for pair, score in items:
        factor = 1.0 if abs(score) < epsilon else 1.0 + strength * score
        factor = factor if clip is None else min(max(factor, clip[0]), clip[1])
        if factor != 1.0:
            by_factor.setdefault(factor, []).append(pair)
    edits: list[Edit] = [ScaleHead(pairs, by=factor, rows=rows) for factor, pairs in by_factor.items()]
    return Plan(edits)
