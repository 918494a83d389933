"""Presets that change the output of heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from emocircuits.edits import AddHead, Edit, GateHeads, ScaleHead
from emocircuits.edits.gates import Measure
from emocircuits.plan import Plan
from emocircuits.presets.registry import preset
from emocircuits.presets.where import ANSWER, Pair, Pairs, opened, some_layers

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


@preset(
    formula="z' = z + α·σ·θ/|θ| in the rows that emit a token, chosen heads",
    paper="Li et al. 2023, Inference-Time Intervention (ITI), arXiv 2306.03341",
    needs="for every head a direction θ and the spread σ of activations along it, from probes on labelled data",
)
def iti(
    model: nn.Module,
    heads: Pairs,
    directions: Any,
    sigma: Any = 1.0,
    alpha: float = 15.0,
    *,
    rows: Rows = None,
) -> Plan:
    """Inference-time intervention: head outputs shifted along truthful directions, before the output projection.

    The rows are the last prompt row and every generated one. Official code: github.com/likenneth/honest_llama,
    validate_2fold.py and interveners.py (``b[0, -1] += alpha * direction / |direction| * std`` at every step; 48 heads,
    alpha 15).

    Args:
        model: only its sizes are read.
        heads: (layer, head) pairs.
        directions: ``[n, D]``, one for every head in the order of ``heads``; only their direction counts.
        sigma: ``[n]`` or a number, the standard deviation of head outputs projected on the direction.
        alpha: strength.
        rows: batch rows (None: all).
    """
    opened(model)
    theta = np.asarray(directions, np.float64)
    if theta.ndim != 2 or theta.shape[0] != len(heads):
        raise ValueError(f"directions has shape {theta.shape}: expected [n, D] with n = {len(heads)} heads")
    norm = np.linalg.norm(theta, axis=1, keepdims=True)
    if not norm.all():
        raise ValueError("a direction is zero: it points nowhere")
    spread = np.broadcast_to(np.asarray(sigma, np.float64).reshape(-1, 1), norm.shape)
    return Plan([AddHead(heads, spread * theta / norm, alpha, to=ANSWER, rows=rows)])


@preset(
    formula="z' = r·z in rows that emit a token, but for the k heads of a layer with the largest Σ s over visual keys",
    paper="Sarkar et al. 2025, Image-Guided Head Suppression (SPIN), arXiv 2505.16411",
    needs="a vision-language model",
)
def spin(
    model: nn.Module,
    keep: float = 0.95,
    by: float = 0.05,
    *,
    layers: int | Iterable[int] | None = None,
    measure: Measure = "logits",
    rows: Rows = None,
) -> Plan:
    """SPIN's gate: in every row that emits a token, heads that attend least to the image are suppressed.

    Official code: github.com/YUECHE77/SPIN, attentionSPIN.py. It ranks the heads of a layer by the sum of their masked
    logits over the image tokens, normalised by a standard deviation and a softmax that keep the order, leaves the first
    ``int(keep * heads)`` alone and multiplies the output of the others. The paper speaks of attention scores to image
    tokens; ``measure="weights"`` compares softmax weights instead.

    Args:
        model: a vision-language model; only its sizes are read.
        keep: share of heads left alone (README: 0.95 on captions, 0.8 on POPE).
        by: factor r on the others (README: 0.08 and 0.1; without ``--small-num-mask`` the code sets them to 0).
        layers: by default all of them; the README's examples take 0 to 31 or 0 to 19 of 32.
        measure: ``"logits"`` or ``"weights"``.
        rows: batch rows (None: all).
    """
    geometry = opened(model, sees="spin").geometry
    heads = int(keep * geometry.heads)
    if heads < 1:
        raise ValueError(
            f"keep={keep!r} of {geometry.heads} heads leaves none; expected a share that keeps at least one"
        )
    chosen = some_layers(geometry, layers, range(geometry.layers))
    return Plan([GateHeads(chosen, heads, by, "visual", measure, to=ANSWER, rows=rows)])
