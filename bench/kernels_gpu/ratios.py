"""Percentiles of times, and ratios of contenders that were timed in turn, with their intervals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median

RESAMPLES = 500


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the neighbours in the sorted values, as NumPy's default.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.5
    """
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    choose = random.Random(seed)
    medians = [median(choose.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    return percentile(medians, 0.025), percentile(medians, 0.975)


def ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The median of ``times / others``, round by round, and its interval: what slows a round slows both of a pair.

    >>> ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    {'median': 2.0, 'low': 2.0, 'high': 2.0}
    """
    pairs = [a / b for a, b in zip(times, others, strict=True)]
    low, high = interval(pairs)
    return {"median": median(pairs), "low": low, "high": high}
