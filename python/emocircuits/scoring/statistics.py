"""Paired statistics for "with and without": SciPy does the arithmetic, this says which test and on what."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Comparison(NamedTuple):
    """Two conditions on the same items.

    ``difference`` is mean(treated) - mean(baseline) with a 95 % bootstrap interval over groups; ``gained`` and ``lost``
    count items that only one condition got right; ``p_value`` is McNemar's exact test on them (two-sided).
    """

    baseline: float
    treated: float
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p_value: float


def compare(
    baseline: ArrayLike, treated: ArrayLike, groups: ArrayLike, *, seed: int = 0, resamples: int = 2000
) -> Comparison:
    """Compare two 0/1 outcomes on the same items.

    Args:
        baseline, treated: ``[n]`` outcomes of each item in each condition.
        groups: ``[n]`` what items have in common (an identity), resampled as a whole: its items depend on each other.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        ValueError: lengths differ, or there are no items.
    """
    a, b, g = np.asarray(baseline, bool), np.asarray(treated, bool), np.asarray(groups)
    if not len(a) or not len(a) == len(b) == len(g):
        raise ValueError(
            f"baseline, treated and groups have lengths {len(a)}, {len(b)}, {len(g)}: expected equal and > 0"
        )
    gained, lost = int((b & ~a).sum()), int((a & ~b).sum())
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    change = b.astype(float) - a
    names = np.unique(g)
    sums = np.array([change[g == n].sum() for n in names])
    sizes = np.array([(g == n).sum() for n in names])
    low, high = interval(sums, sizes, seed=seed, resamples=resamples)
    return Comparison(float(a.mean()), float(b.mean()), float(change.mean()), low, high, gained, lost, p)


def interval(sums: np.ndarray, sizes: np.ndarray, *, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of a ratio of sums over groups; a single group has no interval and gives its value."""
    if len(sums) < 2 or np.ptp(sums / sizes) == 0:
        value = float(sums.sum() / sizes.sum())
        return value, value
    result = stats.bootstrap(
        (sums, sizes), lambda s, n, axis=-1: s.sum(axis) / n.sum(axis), paired=True, method="percentile",
        n_resamples=resamples, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def intervals(
    sums: np.ndarray, sizes: np.ndarray, *, less: tuple[np.ndarray, np.ndarray] | None = None, seed: int = 0,
    resamples: int = 2000,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """As :func:`interval`, for many ratios over the same groups at once.

    Args:
        sums: ``[n, ...]`` numerators of each group.
        sizes: ``[n]`` denominators, shared by all ratios.
        less: numerators and denominators of other ratios of the same groups, which are taken away: the interval is
            that of the difference.
        seed: of the bootstrap; all ratios are computed on the same resamples.
        resamples: of the bootstrap.

    Returns:
        Lower and upper 95 % percentile bounds, each ``[...]``.

    Raises:
        ValueError: fewer than two groups, or lengths differ.
    """
    n = len(sizes)
    if n < 2 or len(sums) != n:
        raise ValueError(f"sums and sizes have lengths {len(sums)} and {n}: expected equal and at least 2")
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    counts = np.zeros((resamples, n))
    np.add.at(counts, (np.arange(resamples)[:, None], drawn), 1.0)
    below = (counts @ sizes)[:, None]
    flat = np.asarray(sums, float).reshape(n, -1)
    if less is not None:
        if np.shape(less[0]) != np.shape(sums) or len(less[1]) != n:
            raise ValueError(f"less has {np.shape(less[0])}, sums {np.shape(sums)}: expected the same")
        other, beneath = np.asarray(less[0], float).reshape(n, -1), (counts @ less[1])[:, None]
    bounds = np.empty((2, flat.shape[1]))
    step = 4096  # ratios at a time: resamples x step numbers are in memory
    for start in range(0, flat.shape[1], step):
        part = slice(start, start + step)
        # What is not finite in one group has no interval.
        with np.errstate(invalid="ignore"):
            ratios = counts @ flat[:, part] / below
            if less is not None:
                ratios -= counts @ other[:, part] / beneath
            bounds[:, part] = np.percentile(ratios, [2.5, 97.5], axis=0)
    shape = np.shape(sums)[1:]
    return bounds[0].reshape(shape), bounds[1].reshape(shape)
