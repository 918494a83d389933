"""Means over pairs with their intervals, and whether two sides of the same pairs differ."""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Any

import numpy as np
from scipy import stats

from emocircuits.scoring.statistics import intervals


@dc.dataclass(frozen=True, eq=False)
class Average:
    """A mean over pairs ``[...]`` with 95 % bootstrap bounds; NaN where there is none (bounds need two pairs)."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def json(self) -> dict[str, Any]:
        """Nested lists, null where there is no number."""
        return {f.name: plain(getattr(self, f.name)) for f in dc.fields(self)}


def average(values: np.ndarray, *, seed: int = 0) -> Average:
    """Mean over pairs of ``values [n, ...]``; the bootstrap resamples pairs."""
    n = len(values)
    nothing = np.full(values.shape[1:], np.nan)
    if not n:
        return Average(nothing, nothing, nothing)
    mean = values.mean(0)
    low, high = intervals(values, np.ones(n), seed=seed) if n > 1 else (nothing, nothing)
    return Average(mean, low, high)


def differs(plus: np.ndarray, minus: np.ndarray, *, margin: float = 0.01) -> np.ndarray:
    """Paired Wilcoxon test of every cell of ``[n, ...]``, two-sided.

    Args:
        plus, minus: the two sides.
        margin: differences below this share of a cell's mean size count as none, so that rounding is not a finding.

    Returns:
        ``p [...]``; NaN where a side has no number.
    """
    difference = plus - minus
    size = (np.abs(plus) + np.abs(minus)).mean(0) / 2
    difference = np.where(np.abs(difference) <= margin * size, 0.0, difference)
    p = np.full(difference.shape[1:], np.nan)
    for cell in np.ndindex(p.shape):
        d = difference[(slice(None), *cell)]
        if len(d) and np.isfinite(d).all():
            p[cell] = stats.wilcoxon(d).pvalue if np.any(d) else 1.0
    return p


def corrected(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg over all of a table; NaN stays NaN and does not count."""
    q, there = np.full_like(p, np.nan), np.isfinite(p)
    if there.any():
        q[there] = stats.false_discovery_control(p[there])
    return q


def plain(values: np.ndarray) -> Any:
    """Nested lists of an array, None where it is not finite."""
    if np.ndim(values) == 0:
        return float(values) if math.isfinite(values) else None
    return [plain(v) for v in values]
