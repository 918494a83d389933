"""Explicit-state neurons: MLP neurons that the emotional image activates and whose output spells emotion words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn

from emocircuits.families import open_model


class Neuron(NamedTuple):
    """One neuron: where it is, its score, its top words and how many of them are emotion words."""

    layer: int
    neuron: int
    score: float
    words: tuple[str, ...]
    emotion_words: int


@torch.no_grad()
def vocabulary_projection(model: nn.Module, layer: int) -> Tensor:
    """``[V, I]`` logits that one unit of each neuron writes: ``W_U . diag(final norm gain) . W_down`` (direct path)."""
    handle = open_model(model)
    unembed, gain = handle.weight(handle.unembed), handle.norm_gain()
    return (unembed * gain) @ handle.weight(handle.down_projections[layer])


@torch.no_grad()
def explicit_state_neurons(
    model: nn.Module, plus: Tensor, minus: Tensor, direction: Tensor, vocabulary: Sequence[str],
    emotion_words: set[str], *,
    top: int = 20, level: float = 0.01,
) -> tuple[list[Neuron], int]:  # fmt: skip
    """Rank neurons by ``(a+ - a-) * <W_down[:, i], S / |S|>`` and keep those that spell emotion words.

    A neuron is an explicit-state neuron when at least k of its ``top`` projected tokens are emotion words. Their k
    suits a large vocabulary; here k is the smallest count that chance (the share of emotion words in the vocabulary)
    reaches with probability below ``level``.

    Args:
        plus, minus: ``[L, B, I]`` activations at the row that emits the emotion word, in X+ and X-.
        direction: ``[L, B, d_model]`` steering vector of each pair's emotion.
        vocabulary: token of each id.
        emotion_words: tokens that name emotions.
        top: projected tokens to look at.
        level: chance level that sets k.

    Returns:
        Explicit-state neurons with a positive score, best first, and k.
    """
    handle = open_model(model)
    is_emotion = torch.tensor([w in emotion_words for w in vocabulary])
    top = min(top, len(vocabulary))
    k = int(stats.hypergeom.isf(level, len(vocabulary), int(is_emotion.sum()), top)) + 1
    found = []
    for layer in range(handle.geometry.layers):
        unit = direction[layer] / direction[layer].norm(dim=-1, keepdim=True)
        write = unit.float() @ handle.weight(handle.down_projections[layer])
        score = ((plus[layer] - minus[layer]).float() * write).mean(0)
        # A neuron that works by falling silent spells what it suppresses; its sign decides which end to read.
        sign = (plus[layer] - minus[layer]).float().mean(0).sign()
        best = (vocabulary_projection(model, layer) * sign).topk(top, dim=0).indices
        counts = is_emotion[best].sum(0)
        for i in torch.nonzero((counts >= k) & (score > 0)).flatten().tolist():
            words = tuple(vocabulary[t] for t in best[:, i].tolist())
            found.append(Neuron(layer, i, float(score[i]), words, int(counts[i])))
    return sorted(found, key=lambda n: -n.score), k
