"""Exact patches of single neurons, and what matched random neurons of the same layers restore."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from tqdm.auto import tqdm

from emocircuits.circuits.heads import Reads, Rows, reading
from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.steering import SteeringVectors
from emocircuits.circuits.subject import Subject
from emocircuits.scoring.statistics import intervals
from emocircuits.sweep import Sweep

NEAREST = 10
"""A random control is drawn from so many neurons that are nearest in mean activation."""
LEAST_GAP = 1e-3
"""Two sides whose metric differs by less, relative to its size, have nothing to restore."""
Place = tuple[int, int]


def matched(activity: np.ndarray, chosen: Sequence[Place], count: int, rng: np.random.Generator) -> list[Place]:
    """Random neurons of the layers of ``chosen``, none of them chosen, alike in mean activation.

    In every layer the chosen neurons take turns: each draws one of the ten unused ones that are nearest to it, until
    there are ``count``, or as many as chosen ones if these are more, or the layer has no others.

    Args:
        activity: ``[L, I]`` mean size of activations.
        chosen: (layer, neuron).
        count: for every layer.
        rng: of the draws.

    Raises:
        ValueError: all neurons of a layer are chosen.
    """
    found: list[Place] = []
    for layer in sorted({l for l, _ in chosen}):
        mine = [i for l, i in chosen if l == layer]
        free = [i for i in range(activity.shape[1]) if i not in set(mine)]
        if not free:
            raise ValueError(
                f"all {activity.shape[1]} neurons of layer {layer} are candidates, so none is left to compare them "
                "with; lower top"
            )
        wanted = min(max(count, len(mine)), len(free))
        for turn in range(wanted):
            gap = np.abs(activity[layer, free] - activity[layer, mine[turn % len(mine)]])
            near = np.argsort(gap, kind="stable")[:NEAREST]
            found.append((layer, free.pop(int(rng.choice(near)))))
    return found


def patched_neurons(
    subject: Subject, pairs: Pairs, places: Sequence[Place], wanted: np.ndarray, *, reads: Reads, rows: Rows,
    steering: SteeringVectors, l_emo: int, pooled: bool = False, progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Put each neuron's activations of X+ into the run on X-, one neuron at a time.

    Args:
        subject: the model.
        pairs: to patch.
        places: (layer, neuron).
        wanted: ``[pairs, places]`` bool: which of them.
        reads: "log-odds" of the emotion's words in the row that emits them, or "projection" on S/|S| in the last prompt
            row: in l_emo for neurons up to it, in the last layer for those above.
        rows: "all" rows are patched, or the "last" one, in which the metric is read.
        steering, l_emo, pooled: for "projection".
        progress: show a progress bar.

    Returns:
        ``(restored, gaps)``, each ``[pairs, places]`` float64: ``patched - corrupt`` and ``clean - corrupt``, NaN where
        not wanted.
    """
    layers = subject.handle.geometry.layers
    restored, gaps = (np.full((len(pairs), len(places)), np.nan) for _ in range(2))
    positions: Any = "all" if rows == "all" else [-1]
    with tqdm(total=int(wanted.sum()), desc="patching neurons", disable=not progress) as bar:
        for i in range(len(pairs)):
            groups: dict[int, dict[int, list[int]]] = {}
            for j in np.flatnonzero(wanted[i]).tolist():
                layer = places[j][0]
                at = layers - 1 if reads == "log-odds" or layer > l_emo else l_emo
                groups.setdefault(at, {}).setdefault(layer, []).append(j)
            one = pairs.take([i])
            sides = [one.inputs(subject, side, answer=reads == "log-odds") for side in ("emotional", "neutral")]
            for at, by_layer in groups.items():
                metric = reading(subject, steering, pairs.emotions[i], at, reads, pooled)
                sweep = Sweep(subject.model, clean=sides[0], corrupt=sides[1], metric=metric, progress=False)
                for layer, columns in by_layer.items():
                    table = sweep.neurons([[places[j][1]] for j in columns], positions, layers=[layer])
                    restored[i, columns] = table.values.flatten().numpy() - sweep.corrupt
                    gaps[i, columns] = sweep.clean - sweep.corrupt
                    bar.update(len(columns))
    return restored, gaps


@dc.dataclass(frozen=True)
class Effect:
    """What an exact patch of a neuron says on the testing half, on the pairs of its emotion.

    Attributes:
        effect, low, high: share of the gap that it restores, with a 95 % bootstrap interval over pairs.
        random: 95th percentile of the effects of its layer's random neurons.
        p, q: one-sided paired t-test that it restores more than these do on average; corrected for the number of
            candidates (Benjamini-Hochberg).
        n: pairs.
    """

    effect: float
    low: float
    high: float
    random: float
    p: float
    q: float
    n: int


def tested(
    restored: np.ndarray, gaps: np.ndarray, chosen: Sequence[tuple[int, np.ndarray]], controls: Sequence[np.ndarray],
    seed: int,
) -> list[Effect]:  # fmt: skip
    """Test candidates against random neurons, pair by pair.

    Args:
        restored, gaps: ``[pairs, n]``.
        chosen: of each candidate its column, and the pairs that it is tested on.
        controls: of each candidate the columns of its random neurons.
        seed: of the bootstrap.

    Raises:
        ValueError: the two sides do not differ in the metric on some candidate's pairs.
    """
    found = []
    for (column, pairs), others in zip(chosen, controls, strict=True):
        mine, gap = restored[pairs, column], gaps[pairs, column]
        if abs(gap.mean()) <= LEAST_GAP * max(1.0, float(np.abs(gap).max())):
            raise ValueError(
                "the emotional and the neutral side give the same value on average, so patching has nothing to restore"
            )
        alone = restored[np.ix_(pairs, others)]
        effects = alone.mean(0) / gap.mean()
        difference = (mine - alone.mean(1)) * np.sign(gap.mean())
        p = _greater(difference)
        low, high = intervals(mine, gap, seed=seed)
        found.append(
            (float(mine.mean() / gap.mean()), float(low), float(high), float(np.percentile(effects, 95)), p, len(pairs))
        )
    corrected: Any = stats.false_discovery_control([f[4] for f in found]) if found else []
    return [Effect(*f[:5], float(q), f[5]) for f, q in zip(found, corrected, strict=True)]


def _greater(difference: np.ndarray) -> float:
    """One-sided t-test that the mean is above 0; equal values decide it, one value alone decides nothing."""
    if len(difference) < 2 or not np.any(difference):
        return 1.0
    if np.ptp(difference) == 0:
        return 0.0 if difference[0] > 0 else 1.0
    return float(stats.ttest_1samp(difference, 0.0, alternative="greater").pvalue)
