"""What a neuron spells: the tokens that it makes more likely, by its direct path to the logits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from scipy import stats
from torch import Tensor, nn

from emocircuits.circuits.lexicon import Lexicon
from emocircuits.families import Handle, open_model

Spelling = Literal["words", "first"]
ELEMENTS = 1 << 24
"""Logits in memory at a time: 64 MiB in float32."""


@torch.no_grad()
def writes(handle: Handle, layer: int) -> Tensor:
    """``[d_model, I]``: what one unit of each neuron adds to the residual stream, ``W_down``.

    Where a norm follows the MLP (OLMo 2, Gemma 2 and 3) its gain is folded in; what it divides by depends on the token
    and is left out, so that writes of such a layer are right up to a positive factor.
    """
    down = handle.weight(handle.down_projections[layer])
    after = handle.sites["mlp_out"][layer]
    return down if after is handle.mlps[layer] else handle.norm_gain(after)[:, None] * down


def _unembedding(handle: Handle, fold_norm: bool) -> Tensor:
    weight = handle.weight(handle.unembed)
    return weight * handle.norm_gain() if fold_norm else weight


@torch.no_grad()
def vocabulary_projection(model: nn.Module, layer: int, *, fold_norm: bool = True) -> Tensor:
    """``[V, I]`` logits that one unit of each neuron writes: ``W_U . diag(final norm gain) . W_down`` (direct path).

    For small models; :func:`top_tokens` never forms it.
    """
    handle = open_model(model)
    return _unembedding(handle, fold_norm) @ writes(handle, layer)


@torch.no_grad()
def top_tokens(
    model: nn.Module, layer: int, signs: Tensor, *, neurons: Sequence[int] | None = None, count: int = 20,
    fold_norm: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tokens that neurons of a layer make more likely, most of all first.

    Args:
        model: a supported model.
        layer: of the neurons.
        signs: of each neuron; where one works by falling silent (negative) the other end of its projection is read.
        neurons: which, None: all; ``signs`` has one for each of them.
        count: tokens of each neuron.
        fold_norm: multiply ``W_U`` with the final norm's gain.

    Returns:
        ``(ids, logits)``, each ``[neurons, count]``; logits are those of one unit of activation, times the sign.
    """
    handle = open_model(model)
    unembed, down = _unembedding(handle, fold_norm), writes(handle, layer)
    if neurons is not None:
        down = down[:, list(neurons)]
    if signs.shape != down.shape[1:]:
        raise ValueError(f"signs are {list(signs.shape)}: expected one for each of {down.shape[1]} neurons")
    # A neuron that does not change at all spells what it would spell by firing.
    down = down * torch.where(signs.to(down) < 0, -1.0, 1.0).to(down)
    count = min(count, len(unembed))
    step = max(1, ELEMENTS // len(unembed))
    found = [(unembed @ down[:, a : a + step]).topk(count, dim=0) for a in range(0, down.shape[1], step)]
    return torch.cat([f.indices for f in found], 1).T, torch.cat([f.values for f in found], 1).T


def emotion_tokens(tokenizer: Any, lexicon: Lexicon, spelling: Spelling = "words") -> Tensor:
    """Ids ``[n]`` of tokens that name an emotion (the neutral one is none).

    Args:
        tokenizer: the model's.
        lexicon: words of each emotion.
        spelling: "words" (default): tokens that are a whole word of the lexicon, in any case; "first": first
            sub-tokens of its words, see :meth:`Lexicon.first_tokens`.

    Raises:
        ValueError: no token does.
    """
    if spelling not in ("words", "first"):
        raise ValueError(f"spelling={spelling!r}: expected 'words' or 'first'")
    ids: set[int] = set()
    if spelling == "first":
        for emotion in lexicon.emotions:
            ids.update(lexicon.first_tokens(tokenizer, emotion).tolist())
    else:
        words = set().union(*(lexicon.words[e] for e in lexicon.emotions))
        special = set(tokenizer.all_special_ids)
        numbers = sorted(set(tokenizer.get_vocab().values()) - special)
        texts = tokenizer.batch_decode([[i] for i in numbers])
        ids = {i for i, text in zip(numbers, texts, strict=True) if text.strip().lower() in words}
    if not ids:
        raise ValueError(
            f"no token of the tokenizer is a word of the lexicon {lexicon.name!r}; use spelling='first', or a lexicon "
            "with words that are one token"
        )
    return torch.tensor(sorted(ids))


def least_hits(vocabulary: int, emotional: int, count: int, level: float = 0.01) -> int:
    """Emotion tokens among ``count`` drawn at random from the vocabulary that chance exceeds with p < ``level``.

    The smallest k with ``P(X >= k) < level``, X hypergeometric.
    """
    return int(stats.hypergeom.isf(level, vocabulary, emotional, min(count, vocabulary))) + 1


def hits(ids: Tensor, emotional: Tensor | Collection[int]) -> Tensor:
    """How many of each neuron's tokens ``[neurons, count]`` name an emotion, ``[neurons]``."""
    wanted = emotional if isinstance(emotional, Tensor) else torch.tensor(sorted(emotional))
    return torch.isin(ids, wanted.to(ids)).sum(-1)
