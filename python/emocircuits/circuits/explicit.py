"""Explicit-state neurons: MLP neurons that the emotional image activates and whose output spells emotion words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emocircuits.circuits.vocabulary import hits, least_hits, top_tokens, writes
from emocircuits.families import Handle, open_model


class ExplicitNeuron(NamedTuple):
    """One neuron: where it is, its score, its top words and how many of them are emotion words."""

    layer: int
    neuron: int
    score: float
    words: tuple[str, ...]
    emotion_words: int


@torch.no_grad()
def written(handle: Handle, layer: int, activations: Tensor, direction: Tensor) -> Tensor:
    """``a_i * <W_down[:, i], S / |S|>``: what each neuron adds along a direction.

    Args:
        handle: the model.
        layer: of the neurons.
        activations: ``[B, I]``, or differences of them.
        direction: ``[B, d_model]``, of any length.

    Returns:
        ``[B, I]``.
    """
    down = writes(handle, layer)
    unit = (direction / direction.norm(dim=-1, keepdim=True)).to(down)
    return activations.to(down) * (unit @ down)


@torch.no_grad()
def explicit_state_neurons(
    model: nn.Module, plus: Tensor, minus: Tensor, direction: Tensor, vocabulary: Sequence[str],
    emotion_words: set[str], *,
    top: int = 20, level: float = 0.01,
) -> tuple[list[ExplicitNeuron], int]:  # fmt: skip
    """Rank neurons by ``(a+ - a-) * <W_down[:, i], S / |S|>`` and keep those that spell emotion words.

    A neuron is an explicit-state neuron when at least k of its ``top`` projected tokens are emotion words; k is the
    smallest count that chance reaches with probability below ``level``.

    Args:
        model: a supported model.
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
    emotional = torch.tensor([i for i, w in enumerate(vocabulary) if w in emotion_words])
    k = least_hits(len(vocabulary), len(emotional), top, level)
    found = []
    for layer in range(handle.geometry.layers):
        change = (plus[layer] - minus[layer]).float()
        score = written(handle, layer, change, direction[layer]).mean(0)
        ids, _ = top_tokens(model, layer, change.mean(0).sign(), count=top)
        counts = hits(ids, emotional)
        for i in torch.nonzero((counts >= k) & (score > 0)).flatten().tolist():
            words = tuple(vocabulary[t] for t in ids[i].tolist())
            found.append(ExplicitNeuron(layer, i, float(score[i]), words, int(counts[i])))
    return sorted(found, key=lambda n: -n.score), k
