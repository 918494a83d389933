"""Contenders that compute the same must give the same logits, or nothing is timed.

What two correct ways to compute one thing may differ by is taken from the untouched model: eager and SDPA attention
give different roundings of the same logits. And what an intervention does must stand out from that, or the comparison
could not see a contender that leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emocircuits.overhead.contenders import BASELINE, Contender

ROUNDINGS = 8.0
"""How much of the untouched model's rounding a contender may differ by."""
SEEN = 4.0
"""How far beyond the tolerance an intervention's effect must be."""


class Disagreement(ValueError):
    """Two contenders that should compute the same do not."""


class Agreement(NamedTuple):
    """Root mean squares over all logits: how far a contender is from the reference, what is allowed, and the effect."""

    contender: str
    reference: str
    error: float
    allowed: float
    effect: float

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return self._asdict()


def check(logits: Mapping[str, Tensor], competing: list[Contender], dtype: torch.dtype) -> list[Agreement]:
    """Compare every contender with the first of the same intervention: ours, or the baseline.

    Args:
        logits: ``[B, steps, vocabulary]`` by contender name, of the same text; the baseline among them.
        competing: the contenders, in their order; those without logits did not run.
        dtype: of the model.

    Raises:
        Disagreement: they differ by more than rounding explains, or an intervention's effect drowns in rounding.
    """
    baseline = logits[BASELINE]
    size = _rms(baseline)
    rounding = max(_rms(logits["eager"] - baseline) if "eager" in logits else 0.0, torch.finfo(dtype).eps * size)
    allowed = ROUNDINGS * rounding
    first: dict[str, str] = {"none": BASELINE}
    found = []
    for one in competing:
        if one.name not in logits or one.name == BASELINE:
            continue
        reference = first.setdefault(one.intervention, one.name)
        effect = _rms(logits[reference] - baseline)
        if reference == one.name:
            if effect < SEEN * allowed and one.intervention != "none":
                raise Disagreement(
                    f"{one.title}: what it does to the logits ({effect:.2g}) does not stand out from rounding "
                    f"({rounding:.2g}), so nobody could see whether others do the same; use float32"
                )
            continue
        # Strong edits make the logits larger, and their rounding with them.
        budget = allowed * max(1.0, _rms(logits[reference]) / size)
        error = _rms(logits[one.name] - logits[reference])
        if not error <= budget:
            raise Disagreement(
                f"{one.title} and {reference} should give the same logits and differ by {error:.2g} "
                f"(allowed {budget:.2g}, the intervention itself {effect:.2g}); nothing was timed"
            )
        found.append(Agreement(one.name, reference, error, budget, effect))
    return found


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
