"""Exact activation patching of whole models, no work done twice.

>>> from emocircuits.sweep import Sweep, logit_diff
>>> sweep = Sweep(model, clean, corrupt, logit_diff(a, b))  # doctest: +SKIP
>>> sweep.heads(positions="each").effects  # doctest: +SKIP
"""

from emocircuits.sweep.api import Sweep
from emocircuits.sweep.attribution.graph import EdgeResult
from emocircuits.sweep.combinations import interaction
from emocircuits.sweep.generated import contains, generated
from emocircuits.sweep.grids import plan_grid
from emocircuits.sweep.metrics import Metric, kl, log_prob, logit_diff, projection
from emocircuits.sweep.results import SweepResult

__all__ = [
    "EdgeResult", "Metric", "Sweep", "SweepResult", "contains", "generated", "interaction", "kl", "log_prob",
    "logit_diff", "plan_grid", "projection",
]  # fmt: skip
