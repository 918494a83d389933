"""Ratios of times that were taken in pairs: what slows a pair slows both of it, and the ratio keeps still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Ratio(NamedTuple):
    """The median of the pairs' ratios, and 95 % of bootstrapped medians."""

    median: float
    low: float
    high: float
    pairs: int


def ratio(times: Sequence[float], others: Sequence[float], seed: int = 0) -> Ratio:
    """``times / others``, pair by pair.

    >>> ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    Ratio(median=2.0, low=2.0, high=2.0, pairs=3)
    """
    each = np.asarray(times, float) / np.asarray(others, float)
    medians = np.median(np.random.default_rng(seed).choice(each, (RESAMPLES, len(each))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(float(np.median(each)), float(low), float(high), len(each))
