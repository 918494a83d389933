"""Random controls, and the tests that set them beside a circuit.

A control is as many heads or neurons of the same layers, drawn at random from those that are not in the circuit, or a
direction of equal norm. Everything is seeded.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.patch_effects import random_like
from emocircuits.scoring import compare

LEAST = 10
"""Draws that a control needs."""
Member = tuple[int, int]


def random_sets(members: Sequence[Member], count: int, draws: int, seed: int) -> list[tuple[Member, ...]]:
    """Random controls of a circuit's heads or neurons.

    Each has as many members in each layer. They are drawn from those outside the circuit; a layer that has too few of
    these gives all of them, and the rest from the circuit, but never the circuit as a whole.

    Args:
        members: (layer, number) of the circuit.
        count: heads or neurons of a layer.
        draws: at least 10.
        seed: of the draws.

    Raises:
        ValueError: fewer than 10 draws, no members, or no set but the circuit itself.
    """
    require_draws(draws)
    if not members:
        raise ValueError("the circuit has none, so there is nothing to draw a control for")
    rng = np.random.default_rng(seed)
    by_layer = {layer: {i for l, i in members if l == layer} for layer in sorted({l for l, _ in members})}
    found = []
    for _ in range(draws):
        if all(len(mine) == count for mine in by_layer.values()):
            random_like(members, count, rng)  # raises: there is no other set
        drawn: list[Member] = []
        for layer, mine in by_layer.items():
            others = [i for i in range(count) if i not in mine]
            chosen = list(rng.permutation(others))[: len(mine)]
            chosen += list(rng.permutation(sorted(mine)))[: len(mine) - len(chosen)]
            drawn += [(layer, int(i)) for i in chosen]
        found.append(tuple(sorted(drawn)))
    return found


def require_draws(draws: int) -> None:
    """Refuse too few draws."""
    if draws < LEAST:
        raise ValueError(f"draws={draws}: a random control needs at least {LEAST}")


def random_directions(like: Tensor, generator: torch.Generator) -> Tensor:
    """Directions uniform on the sphere, each with the norm of the vector in its place.

    Args:
        like: ``[..., d]``, of any device and dtype.
        generator: on the CPU.
    """
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)
    norm = like.double().norm(dim=-1, keepdim=True)
    return (drawn / drawn.norm(dim=-1, keepdim=True) * norm).to(like.dtype)


@dc.dataclass(frozen=True)
class Change:
    """An intervention beside the model left alone, on the same pairs.

    Attributes:
        n: pairs.
        base, value: hit rates without and with it.
        change, low, high: ``value - base`` with a 95 % bootstrap interval over groups of pairs that share a picture.
        relative: ``change / base``; None where the base is 0.
        p: McNemar's exact test, two-sided.
        q: the same, corrected for the tests of the analysis (Benjamini-Hochberg).
    """

    n: int
    base: float
    value: float
    change: float
    low: float
    high: float
    relative: float | None
    p: float
    q: float = 1.0


def change(base: np.ndarray, value: np.ndarray, pairs: Pairs, *, seed: int = 0) -> Change:
    """Compare hits ``[pairs]`` (1 or 0) with and without an intervention; ``q`` is still to be corrected."""
    c = compare(base > 0.5, value > 0.5, groups(pairs), seed=seed)
    relative = c.difference / c.baseline if c.baseline else None
    return Change(len(pairs), c.baseline, c.treated, c.difference, c.low, c.high, relative, c.p_value)


@dc.dataclass(frozen=True)
class Random:
    """What random controls of an intervention did, and whether the intervention did something else.

    Attributes:
        kind: of control.
        values: hit rate of each draw.
        mean, std: over draws.
        share: of draws that are at least as far from the model left alone, in the direction of the circuit's change.
        draw_p: ``(1 + draws at least as far) / (1 + draws)``, one-sided.
        p: Wilcoxon's signed-rank test over pairs, two-sided: the circuit against the mean of the draws.
        q: the same, corrected for the tests of the analysis (Benjamini-Hochberg).
    """

    kind: str
    values: tuple[float, ...]
    mean: float
    std: float
    share: float
    draw_p: float
    p: float
    q: float = 1.0


def against(kind: str, base: np.ndarray, value: np.ndarray, drawn: np.ndarray) -> Random:
    """Set hits ``value [pairs]`` beside random controls ``drawn [draws, pairs]``; ``base [pairs]``: with neither."""
    rates, change = drawn.mean(1), value.mean() - base.mean()
    values = tuple(map(float, rates))
    # Of a circuit that changes nothing, every draw is at least as far.
    far = (rates - base.mean()) * np.sign(change) >= abs(change) - 1e-12
    return Random(
        kind, values, fmean(values), stdev(values), float(far.mean()),
        float((1 + far.sum()) / (1 + len(far))), paired(value, drawn.mean(0)),
    )  # fmt: skip


def paired(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on ``[n]`` pairs of values; 1 where none differ."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    return float(stats.wilcoxon(difference).pvalue) if np.any(difference) else 1.0


def corrected(tests: Sequence[Any]) -> list[Any]:
    """The tests of an analysis (dataclasses with ``p``), each with its ``q`` by Benjamini-Hochberg over all of them."""
    if not tests:
        return []
    values: Any = stats.false_discovery_control([t.p for t in tests])
    return [dc.replace(t, q=float(q)) for t, q in zip(tests, values, strict=True)]


def groups(pairs: Pairs) -> list[str]:
    """What pairs have in common: those with one neutral picture depend on each other."""
    return [str(r.image_neutral) for r in pairs.records]
