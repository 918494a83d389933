"""Presets that steer the residual stream with a vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
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


@preset(
    formula="h' = h + c·(h₊ - h₋) at the input of a layer, token by token, for the first tokens of the prompt",
    paper="Turner et al. 2023, Activation Addition (ActAdd), arXiv 2308.10248",
    needs="activations of two short prompts, token by token, padded to one length",
)
def actadd(
    model: nn.Module,
    layer: int,
    difference: Any,
    coefficient: float = 1.0,
    *,
    start: int = 0,
    rows: Rows = None,
) -> Plan:
    """Activation addition: the difference of two prompts laid over the first tokens of another one.

    Official code: github.com/montemac/activation_additions, hook_utils.py (``resid_pre[:, :n] += coeff * activations``
    while a prompt is run, and nothing in steps that run one token).

    Args:
        model: only its sizes are read.
        layer: the layer whose input changes.
        difference: ``[n, d_model]``, the input of that layer in the positive prompt minus in the negative one.
        coefficient: c.
        start: token of the prompt, without padding, that the first row is added to.
        rows: batch rows (None: all).
    """
    geometry = opened(model).geometry
    vectors = np.asarray(difference, np.float64)
    if vectors.ndim != 2:
        raise ValueError(f"difference has shape {vectors.shape}: expected [n, d_model], one row per token")
    chosen = some_layers(geometry, layer, ())
    return Plan(
        [
            AddVector(chosen, vector, "resid_pre", coefficient, positions=[start + i], rows=rows)
            for i, vector in enumerate(vectors)
            if vector.any()
        ]
    )


@preset(
    formula="h' = |h|·u/|u| with u = h/|h| + λ·v/|v|, at the output of every MLP, all rows",
    paper="Li et al. 2025, The Hidden Life of Tokens (VISTA), arXiv 2502.03628",
    needs="a visual steering vector for every layer: last-token activations with the image minus those without it",
)
def vista(
    model: nn.Module,
    vectors: Any,
    strength: float = 0.17,
    *,
    layers: int | Iterable[int] | None = None,
    relative: bool = True,
    rows: Rows = None,
) -> Plan:
    """VISTA's visual steering vector: added to MLP outputs, which keep their length.

    The rule is that of the official code's simple mode (VSVLayer in llm_layers.py of github.com/LzVv123456/VISTA, read
    in forks of it); its default mode also multiplies lambda by ``1 + max(0, cos(h, -v))``, which depends on the data
    and is left out here. ``relative=False`` adds ``strength * v`` as it is before the length is restored, as others
    read the paper's equations. The second half of VISTA, self-logits augmentation, is not part of a plan.

    Args:
        model: only its sizes are read.
        vectors: ``[n_layers, d_model]`` in the order of ``layers``, or one ``[d_model]`` for all of them. The paper
            takes them from the one prompt at hand; give such a plan ``rows`` in a batch.
        strength: lambda; 0.17 for LLaVA-1.5 in the official script.
        layers: by default all of them.
        relative: whether the vector gives a direction only, and lambda is in units of the length of h.
        rows: batch rows (None: all).
    """
    geometry = opened(model).geometry
    chosen = some_layers(geometry, layers, range(geometry.layers))
    return Plan([AddVector(chosen, vectors, "mlp_out", strength, "keep", relative, rows=rows)])
