"""Scores and statistics."""

from emocircuits.scoring.statistics import Comparison, compare

__all__ = ["Comparison", "compare"]
