"""Prescreening: all patches estimated, the strongest ones run exactly, and a random sample of the others as a check.

The check is that of Kramár et al. 2024 (section 4.3): what the sample shows bounds how much the estimates have missed.
"""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from emocircuits.sweep.attribution.nodes import Method, estimates
from emocircuits.sweep.progress import Planned
from emocircuits.sweep.results import SweepResult
from emocircuits.sweep.targets import Target, Variant

if TYPE_CHECKING:
    from emocircuits.sweep.api import Positions, Sweep

CONFIDENCE = 0.95


class Screen(TypedDict, total=False):
    """Options of a prescreened sweep.

    Attributes:
        prescreen: how patches are estimated, "atp*", "atp" or "ig" (see :meth:`Sweep.attribute`); None: all are run.
        confirm: how many of the strongest estimates are run exactly (64).
        sample: how many of the others, drawn at random, are run as well (32).
        sample_seed: of that draw (0).
    """

    prescreen: Method | None
    confirm: int
    sample: int
    sample_seed: int


class Chosen(NamedTuple):
    """A patch that is run: number ``patch`` of those."""

    layer: int
    column: int | None
    unit: int | None
    patch: int


def screened(
    sweep: Sweep, target: Target, units: Sequence[int | None], positions: Positions, layers: Sequence[int] | None,
    screen: Screen,
) -> SweepResult:  # fmt: skip
    """A table with exact values where they were run and estimates elsewhere.

    ``exact`` of the result says which; ``meta["prescreen"]`` is the report. Patches that provably change nothing are
    exact and are neither confirmed nor sampled.

    Raises:
        ValueError: nothing to confirm, or what :meth:`Sweep.attribute` refuses.
    """
    method = screen["prescreen"]
    assert method is not None
    confirm, sample, seed = screen.get("confirm", 64), screen.get("sample", 32), screen.get("sample_seed", 0)
    if confirm < 1 or sample < 0 or seed < 0:
        raise ValueError(
            f"confirm={confirm}, sample={sample}, sample_seed={seed}: expected at least 1, 0 and 0; leave prescreen= "
            "out to run all patches"
        )
    guess = estimates(sweep, target, units, method, positions, layers)
    variants = sweep.variants(target, units, positions, layers)[0]
    with torch.inference_mode():
        runner = sweep.runner(target)
        live = np.array([i for i, v in enumerate(variants) if runner.columns(v)], dtype=np.int64)
    moved = (guess.values - guess.base).abs().flatten().numpy()
    order = live[np.argsort(-moved[live], kind="stable")]
    strongest, others = order[:confirm], np.sort(order[confirm:])
    drawn = np.random.default_rng(seed).choice(others, min(sample, len(others)), replace=False)
    values, exact = guess.values.flatten().clone(), torch.ones(len(variants), dtype=torch.bool)
    exact[torch.from_numpy(live)] = False
    values[exact] = guess.base
    meta = {k: v for k, v in guess.meta.items() if k not in ("method", "steps")}
    found: dict[int, float] = {}
    if len(live):
        run = sorted({*strongest.tolist(), *drawn.tolist()})
        found = dict(zip(run, _exact(sweep, target, [variants[i] for i in run], guess, screen), strict=True))
        values[run] = torch.tensor([found[i] for i in run], dtype=torch.float64)
        exact[run] = True
    told = [
        (np.array([moved[i] for i in which]), np.array([abs(found[i] - guess.base) for i in which]))
        for which in (strongest.tolist(), drawn.tolist())
    ]
    meta["prescreen"] = {
        "method": method, "patches": len(variants), "without_effect": len(variants) - len(live), "seed": seed,
        **_report(*told[0], *told[1]),
    }  # fmt: skip
    shape = guess.values.shape
    return dc.replace(guess, values=values.reshape(shape), exact=exact.reshape(shape), meta=meta)


def _exact(
    sweep: Sweep, target: Target, variants: Sequence[Variant], guess: SweepResult, screen: Screen
) -> list[float]:
    """What the engine gives for some patches; with a folder they are kept in ``prescreen/`` there."""
    one = copy.copy(sweep)
    if one.out is not None:
        one.out = Path(one.out) / "prescreen"
    chosen = [Chosen(v.layer, v.column, v.unit, i) for i, v in enumerate(variants)]
    what = {"groups": target.groups, "positions": guess.labels.get("pos", "all"), "prescreen": dict(screen)}
    try:
        table: Tensor = one.table(target, chosen, ("patch",), {"patch": list(range(len(chosen)))}, what).values  # type: ignore[arg-type]
    except Planned as planned:
        # Of several pairs a mean is taken over whole tables.
        raise Planned(guess, planned.cost) from None
    return table.tolist()


def _report(guessed: np.ndarray, confirmed: np.ndarray, sampled: np.ndarray, checked: np.ndarray) -> dict[str, Any]:
    """How good the estimates were, from magnitudes: of what was confirmed, and of the random sample of the rest.

    ``misses`` of the sample move the metric more than the weakest that was confirmed; ``miss_share_below`` bounds their
    share among all that was not confirmed (Clopper-Pearson, one-sided, 95 %).
    """
    weakest = float(confirmed.min()) if len(confirmed) else 0.0
    misses = int((checked > weakest).sum())
    bound = None
    if len(checked):
        test = stats.binomtest(misses, len(checked), alternative="less")
        bound = float(test.proportion_ci(CONFIDENCE, method="exact").high)
    return {
        "confirmed": len(confirmed), "sampled": len(checked), "rank_confirmed": _rank(guessed, confirmed),
        "rank_sampled": _rank(sampled, checked), "weakest_confirmed": weakest, "misses": misses,
        "miss_share_below": bound,
    }  # fmt: skip


def _rank(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation; None where it is of nothing."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(stats.spearmanr(a, b).statistic)
