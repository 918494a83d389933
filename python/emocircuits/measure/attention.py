"""Attention weights of a few rows, without eager attention and without the full matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emocircuits.measure.capture import capture
from emocircuits.patching import patch
from emocircuits.plan import Plan


@torch.no_grad()
def attention_weights(
    model: nn.Module, inputs: dict[str, Tensor], plan: Plan | None = None, *, rows: int = 1, roles: Tensor | None = None
) -> Tensor:
    """Weights that the last ``rows`` rows of a prompt give to every key, by layer and head.

    With a plan these are the effective weights: after its logit edits and gains, as they multiply the values. A
    post-softmax gain is not renormalised, so rows then need not sum to 1. It is the ``pattern`` of
    :func:`emocircuits.measure.capture`, which chooses rows more freely.

    Args:
        model: a supported model, not patched at the moment.
        inputs: model inputs of one or more prompts, padded on the left if at all.
        plan: edits to apply (None: the model left alone).
        rows: how many rows, counted from the end.
        roles: roles of the tokens, see :func:`emocircuits.patch`.

    Returns:
        ``[L, B, H, rows, K]`` float32.
    """
    with patch(model, plan or Plan(), roles=roles), capture(model, "pattern", columns=range(-rows, 0)) as seen:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return seen["pattern"].transpose(2, 3).float()
