"""Which neurons are candidates of each type, ranked on one half of the pairs."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emocircuits.circuit import CONTEXTUAL, EXPLICIT
from emocircuits.circuits.explicit import written
from emocircuits.circuits.pairs import SIDES, Pairs
from emocircuits.circuits.steering import SteeringVectors
from emocircuits.circuits.subject import Subject
from emocircuits.circuits.tracing import Tracing, units
from emocircuits.circuits.visits import Visit, both
from emocircuits.circuits.vocabulary import hits, top_tokens
from emocircuits.measure import capture

CHUNK = 1024
"""Neurons whose tokens are looked up at a time, until there are enough of a type."""
Place = tuple[int, int]


@dc.dataclass(frozen=True)
class Candidates:
    """Candidates of one type, best on the ranking half first; lists have one entry for each.

    Attributes:
        type: "explicit" or "contextual".
        places: (layer, neuron).
        emotions: the emotion with the largest score on the ranking half.
        signs, tokens, hits, heads, rank_scores: see :class:`~.neurons.Neuron`.
        single: ``[pairs, n]`` score of each pair, as a share of the mean change of its half.
        activity: ``[L, I]`` mean size of the activations of all neurons.
        random_scores: of candidate i and some neurons of its layer their mean scores on the testing half, on the pairs
            of i's emotion.
    """

    type: str
    places: list[Place]
    emotions: list[str]
    signs: list[int]
    tokens: list[tuple[str, ...]]
    hits: list[int]
    heads: list[Place | None]
    rank_scores: list[float]
    single: np.ndarray
    activity: np.ndarray
    random_scores: Callable[[int, Sequence[int]], np.ndarray]


def explicit_candidates(
    subject: Subject, pairs: Pairs, steering: SteeringVectors, half: np.ndarray, *, row: str, activation: str, by: str,
    pooled: bool, k: int, top: int, emotional: Tensor, count: int, fold_norm: bool, batch: int,
) -> Candidates:  # fmt: skip
    """Neurons that write along S in the row that emits the emotion word, and spell emotion words.

    Raises:
        ValueError: along S the last layer gives the same on both sides.
    """
    scores, active, changes, gap = _answer_row(subject, pairs, steering, row, activation, pooled, batch)
    size = [float(gap[half == i].mean()) for i in (0, 1)]
    if min(size) <= 1e-3 * np.abs(gap).max() or not gap.any():
        raise ValueError(
            "with the emotional picture the last layer's output is no further along S than with the neutral one, so "
            "that no neuron can be explicit; are these steering vectors of this model?"
        )
    names = list(dict.fromkeys(pairs.emotions))
    label = np.array(pairs.emotions)
    tables = [np.stack([scores[(label == e) & (half == i)].mean(0) / size[i] for e in names]) for i in (0, 1)]
    ranks, _ = both(tables[0], tables[1], by)
    signs = np.sign(changes[half == 0].mean(0))
    kept: list[Place] = []
    tokens, counts = [], []
    for places in _chunks(ranks):
        for place, ids, n in _spelled(subject, places, signs, emotional, count, fold_norm):
            if n >= k and len(kept) < top:
                kept.append(place)
                tokens.append(_texts(subject, ids))
                counts.append(n)
        if len(kept) >= top:
            break
    own = [int(tables[0][:, l, i].argmax()) for l, i in kept]
    scale = np.array(size)[half]
    single = np.stack([scores[:, l, i] / scale for l, i in kept], 1) if kept else np.zeros((len(pairs), 0))
    return Candidates(
        EXPLICIT, kept, [names[e] for e in own], [_sign(signs[p]) for p in kept], tokens, counts, [None] * len(kept),
        [float(ranks[p]) for p in kept], single, active[half == 0].mean(0),
        lambda i, neurons: tables[1][own[i], kept[i][0], list(neurons)],
    )  # fmt: skip


def traced_candidates(
    subject: Subject, trees: Tracing, half: np.ndarray, *, k: int, top: int, emotional: Tensor, count: int,
    fold_norm: bool,
) -> Candidates:  # fmt: skip
    """Neurons that critical heads get the emotion from, and that do not spell emotion words.

    One that several heads of the trees get it from is scored where it moves the stream most along the root's S on the
    ranking half: a large share of a head that hardly changes counts for little.
    """
    best: dict[Place, tuple[float, Visit, int]] = {}
    for visit in trees.visits:
        change = float((visit.root.plus - visit.root.minus)[half == 0].mean())
        for j, (place, told) in enumerate(zip(visit.kept, visit.told, strict=True)):
            if place not in best or told[0] * change > best[place][0]:
                best[place] = told[0] * change, visit, j
    ordered = sorted(best, key=lambda p: -best[p][0])
    shape = subject.handle.geometry.layers, subject.handle.geometry.neurons
    signs, activity, seen = np.zeros(shape), np.zeros(shape), np.zeros((shape[0], 1))
    for place in ordered:
        signs[place] = best[place][1].signs[place]
    for visit in trees.visits:
        activity[: visit.layer] += visit.activity
        seen[: visit.layer] += 1
    kept: list[Place] = []
    tokens, counts = [], []
    for start in range(0, len(ordered), CHUNK):
        for place, ids, n in _spelled(subject, ordered[start : start + CHUNK], signs, emotional, count, fold_norm):
            if n < k and len(kept) < top:
                kept.append(place)
                tokens.append(_texts(subject, ids))
                counts.append(n)
    names = list(dict.fromkeys(trees.emotions))
    visits = [best[p][1] for p in kept]
    own = [int(v.rank[:, l, i].argmax()) for v, (l, i) in zip(visits, kept, strict=True)]
    single = [v.single[:, best[p][2]] for v, p in zip(visits, kept, strict=True)]
    return Candidates(
        CONTEXTUAL, kept, [names[e] for e in own], [_sign(signs[p]) for p in kept], tokens, counts,
        [(v.root.layer, v.root.head) for v in visits],
        [v.told[best[p][2]][0] for v, p in zip(visits, kept, strict=True)],
        np.stack(single, 1) if kept else np.zeros((len(half), 0)), activity / np.maximum(seen, 1),
        lambda i, neurons: visits[i].test[own[i], kept[i][0], list(neurons)],
    )  # fmt: skip


@torch.no_grad()
def _answer_row(
    subject: Subject, pairs: Pairs, steering: SteeringVectors, row: str, activation: str, pooled: bool, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores, ``|a+|`` and ``a+ - a-``, each ``[pairs, L, I]``, and the last output's move along S ``[pairs]``."""
    handle = subject.handle
    layers, last = range(handle.geometry.layers), handle.geometry.layers - 1
    shape = len(pairs), len(layers), handle.geometry.neurons
    scores, active, changes = (np.zeros(shape, np.float32) for _ in range(3))
    gap = np.zeros(len(pairs))
    what = [*(f"blocks.{l}.mlp.hook_post" for l in layers), f"blocks.{last}.hook_resid_post"]
    for which, part in pairs.batches(batch):
        found: dict[str, Any] = {}
        for side in SIDES:
            with capture(subject.model, what, columns=[-1]) as seen:
                subject.model(**part.inputs(subject, side, answer=row == "answer"), use_cache=False, logits_to_keep=1)
            found[side] = seen
        plus, minus = (found[side] for side in SIDES)
        for l in layers:
            a, b = (x["neurons", l][:, 0].float() for x in (plus, minus))
            s = units(part.emotions, steering, l, pooled)
            score = written(handle, l, a - b if activation == "difference" else a, s.to(a))
            for table, value in ((scores, score), (active, a.abs()), (changes, a - b)):
                table[which, l] = value.cpu().numpy()
        out = plus["resid_post", last][:, 0].double() - minus["resid_post", last][:, 0].double()
        gap[which] = (out.cpu() * units(part.emotions, steering, last, pooled)).sum(-1).numpy()
    return scores, active, changes, gap


def _chunks(table: np.ndarray) -> Iterator[list[Place]]:
    """Places with a positive value, largest first, some at a time."""
    order = np.argsort(-table, axis=None, kind="stable")[: int((table > 0).sum())]
    for start in range(0, len(order), CHUNK):
        layers, neurons = np.unravel_index(order[start : start + CHUNK], table.shape)
        yield list(zip(layers.tolist(), neurons.tolist(), strict=True))


def _spelled(
    subject: Subject, places: Sequence[Place], signs: np.ndarray, emotional: Tensor, count: int, fold_norm: bool
) -> list[tuple[Place, list[int], int]]:
    """Top tokens of each place, and how many are emotion words, in the order given."""
    found: dict[Place, tuple[list[int], int]] = {}
    for layer in sorted({l for l, _ in places}):
        neurons = [i for l, i in places if l == layer]
        ids, _ = top_tokens(
            subject.model, layer, torch.as_tensor(signs[layer, neurons]), neurons=neurons, count=count,
            fold_norm=fold_norm,
        )  # fmt: skip
        for i, row, n in zip(neurons, ids.tolist(), hits(ids, emotional).tolist(), strict=True):
            found[layer, i] = row, n
    return [(p, *found[p]) for p in places]


def _texts(subject: Subject, ids: Sequence[int]) -> tuple[str, ...]:
    known = len(subject.tokenizer)
    return tuple(subject.tokenizer.decode([i]).strip() or f"<{i}>" if i < known else f"<{i}>" for i in ids)


def _sign(value: float) -> int:
    return -1 if value < 0 else 1
