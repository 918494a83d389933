"""Prescreening: all patches estimated, the strongest ones run exactly, and a random sample of the others as a check.

The check is that of Kramár et al. 2024 (section 4.3): what the sample shows bounds how much the estimates have missed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses as dc
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
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


class Estimated(NamedTuple):
    """A table of estimates, and the patches ``[patches]`` bool that can change what is read."""

    guess: SweepResult
    live: Tensor


class Choice(NamedTuple):
    """What is run of a table: numbers of the strongest estimates and of those drawn among the others.

    ``moved`` ``[patches]`` is how far each is thought to move the metric, ``live`` as in :class:`Estimated`.
    """

    strongest: list[int]
    drawn: list[int]
    moved: Tensor
    live: Tensor


class Pool:
    """Pairs that are screened together, so that the same patches are run in all of them.

    What ranks a patch is the estimate of what the table shows: the mean over pairs. Each pair is first estimated, then
    :meth:`choose` decides, then each is run.
    """

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.estimated: dict[int, Estimated] = {}
        self.choice: Choice | None = None

    @contextlib.contextmanager
    def pair(self, number: int) -> Iterator[None]:
        """Screened sweeps within are of this pair."""
        token = _POOL.set((self, number))
        try:
            yield
        finally:
            _POOL.reset(token)

    def choose(self) -> None:
        """Decide what is run, of the estimates of all pairs.

        Raises:
            ValueError: tables of which no mean can be taken.
        """
        found = [self.estimated[i] for i in sorted(self.estimated)]
        mean = SweepResult.mean([one.guess for one in found])
        self.choice = _choose(mean, torch.stack([one.live for one in found]).any(0), self.screen)

    def report(self, mean: SweepResult) -> dict[str, Any]:
        """How good the estimates of the mean were."""
        assert self.choice is not None
        return _report(self.choice, mean, self.screen)


_POOL: ContextVar[tuple[Pool, int] | None] = ContextVar("pool", default=None)


def screened(
    sweep: Sweep, target: Target, units: Sequence[int | None], positions: Positions, layers: Sequence[int] | None,
    screen: Screen,
) -> SweepResult:  # fmt: skip
    """A table with exact values where they were run and estimates elsewhere.

    ``exact`` of the result says which; ``meta["prescreen"]`` is the report. Patches that provably change nothing are
    exact and are neither confirmed nor sampled. Of a :class:`Pool` that has not chosen yet, the estimates.

    Raises:
        ValueError: nothing to confirm, or what :meth:`Sweep.attribute` refuses.
    """
    method = screen["prescreen"]
    assert method is not None
    confirm, sample, seed = _counts(screen)
    if confirm < 1 or sample < 0 or seed < 0:
        raise ValueError(
            f"confirm={confirm}, sample={sample}, sample_seed={seed}: expected at least 1, 0 and 0; leave prescreen= "
            "out to run all patches"
        )
    variants = sweep.variants(target, units, positions, layers)[0]
    pool, pair = _POOL.get() or (None, 0)
    if pool is not None and pair in pool.estimated:
        found = pool.estimated[pair]
    else:
        guess = estimates(sweep, target, units, method, positions, layers)
        with torch.inference_mode():
            runner = sweep.runner(target)
            live = torch.tensor([bool(runner.columns(v)) for v in variants])
        found = Estimated(guess, live)
        if pool is not None:
            pool.estimated[pair] = found
    if pool is None:
        choice = _choose(found.guess, found.live, screen)
        table = _confirmed(sweep, target, variants, found, choice, screen)
        table.meta["prescreen"] = _report(choice, table, screen)
        return table
    return found.guess if pool.choice is None else _confirmed(sweep, target, variants, found, pool.choice, screen)


def _counts(screen: Screen) -> tuple[int, int, int]:
    return screen.get("confirm", 64), screen.get("sample", 32), screen.get("sample_seed", 0)


def _choose(guess: SweepResult, live: Tensor, screen: Screen) -> Choice:
    confirm, sample, seed = _counts(screen)
    moved = (guess.values - guess.base).abs().flatten()
    numbers = live.nonzero().flatten()
    order = numbers[moved[numbers].argsort(descending=True, stable=True)].numpy()
    others = np.sort(order[confirm:])
    drawn = np.random.default_rng(seed).choice(others, min(sample, len(others)), replace=False)
    return Choice(order[:confirm].tolist(), drawn.tolist(), moved, live)


def _confirmed(
    sweep: Sweep, target: Target, variants: Sequence[Variant], found: Estimated, choice: Choice, screen: Screen
) -> SweepResult:
    """The estimates, with the exact values of what was chosen; what changes nothing in this pair need not run."""
    guess, live = found
    values, exact = guess.values.flatten().clone(), ~live
    values[exact] = guess.base
    run = [i for i in sorted({*choice.strongest, *choice.drawn}) if live[i]]
    if run:
        values[run] = torch.tensor(
            _exact(sweep, target, [variants[i] for i in run], guess, screen), dtype=torch.float64
        )
        exact[run] = True
    meta = {k: v for k, v in guess.meta.items() if k not in ("method", "steps")}
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


def _report(choice: Choice, table: SweepResult, screen: Screen) -> dict[str, Any]:
    """How good the estimates were, from magnitudes: of what was confirmed, and of the random sample of the rest.

    ``misses`` of the sample move the metric more than the weakest that was confirmed; ``miss_share_below`` bounds their
    share among all that was not confirmed (Clopper-Pearson, one-sided, 95 %).
    """
    truth = (table.values - table.base).abs().flatten()
    guessed, sampled = (choice.moved[which].numpy() for which in (choice.strongest, choice.drawn))
    confirmed, checked = (truth[which].numpy() for which in (choice.strongest, choice.drawn))
    weakest = float(confirmed.min()) if len(confirmed) else 0.0
    misses = int((checked > weakest).sum())
    bound = None
    if len(checked):
        test = stats.binomtest(misses, len(checked), alternative="less")
        bound = float(test.proportion_ci(CONFIDENCE, method="exact").high)
    return {
        "method": screen["prescreen"], "patches": len(choice.live), "without_effect": int((~choice.live).sum()),
        "seed": _counts(screen)[2], "confirmed": len(confirmed), "sampled": len(checked),
        "rank_confirmed": _rank(guessed, confirmed), "rank_sampled": _rank(sampled, checked),
        "weakest_confirmed": weakest, "misses": misses, "miss_share_below": bound,
    }  # fmt: skip


def _rank(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation; None where it is of nothing."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(stats.spearmanr(a, b).statistic)
