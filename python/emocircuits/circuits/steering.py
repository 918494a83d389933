"""Stage I: steering vectors from contrastive pairs (method.md "Stage I")."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


@dc.dataclass(frozen=True)
class SteeringVectors:
    """``vectors [E, L, d_model]`` float32: mean resid_post(X+) - resid_post(X-) at the last prompt token.

    ``kept`` and ``total`` count pairs per emotion before and after the hit-rate filter.
    """

    emotions: tuple[str, ...]
    vectors: Tensor
    kept: tuple[int, ...]
    total: tuple[int, ...]

    def of(self, emotion: str) -> Tensor:
        """``[L, d_model]`` of one emotion."""
        return self.vectors[self.emotions.index(emotion)]


def steering_vectors(
    plus: Tensor, minus: Tensor, emotions: Sequence[str], hits: Sequence[float], *, tau: float = 0.5
) -> SteeringVectors:
    """Average the residual differences of pairs whose emotional side the model reads correctly.

    Args:
        plus, minus: ``[L, B, d_model]`` resid_post at the last prompt token of X+ and X-.
        emotions: ``[B]`` emotion of each pair.
        hits: ``[B]`` hit rate of the model on X+.
        tau: keep a pair when its hit rate is strictly above this.

    Raises:
        ValueError: an emotion keeps fewer than two pairs.
    """
    names = tuple(dict.fromkeys(emotions))
    difference = plus.float() - minus.float()
    keep = np.asarray(hits, float) > tau
    label = np.asarray(emotions)
    vectors, kept, total = [], [], []
    for name in names:
        chosen = np.flatnonzero((label == name) & keep)
        if len(chosen) < 2:
            raise ValueError(
                f"emotion {name!r} keeps {len(chosen)} of {(label == name).sum()} pairs at tau={tau}; it needs 2: "
                "give more pairs, or lower tau"
            )
        vectors.append(difference[:, torch.as_tensor(chosen)].mean(1))
        kept.append(len(chosen))
        total.append(int((label == name).sum()))
    return SteeringVectors(names, torch.stack(vectors), tuple(kept), tuple(total))
