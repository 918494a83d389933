"""Choosing VEENA's settings on identities that neither found the circuit nor report the result."""

from __future__ import annotations

import dataclasses as dc
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from emocircuits.circuit import Circuit
from emocircuits.demo.cases import WEAK, Prompts, Scores, agreeing, answers, contradicting, neutral
from emocircuits.edits import Reading
from emocircuits.patching import patch
from emocircuits.plan import Plan
from emocircuits.veena import VEENA, Where

BETAS = (1.5, 2.0, 3.0, 4.0)
HEADS = (4, 8, 12)
GAMMAS = (1.25, 1.6, 2.5)


@dc.dataclass(frozen=True)
class Trial:
    """One setting and what it did on the choosing part. ``value`` is what is maximised."""

    veena: VEENA
    hit: float
    prior: float
    cost: float

    @property
    def value(self) -> float:
        """Half the hit rate where text and face disagree, half the mean hit rate where a boost can only do harm."""
        return (self.hit + self.cost) / 2

    def row(self) -> dict[str, Any]:
        """The setting and its scores, JSON-ready."""
        v = self.veena
        return {
            "beta": v.beta, "gamma": v.gamma, "heads": v.heads, "neurons": v.neurons, "reading": v.reading,
            "where": v.where, "last": v.last, "ena_phase": v.ena_phase,
            "hit": self.hit, "prior": self.prior, "cost": self.cost, "value": self.value,
        }  # fmt: skip


class Bench:
    """The choosing part: one padded set of prompts of every situation, answered under many settings."""

    def __init__(self, model: nn.Module, processor: Any, people: Sequence[int], seed: int) -> None:
        self.model, self.processor = model, processor
        weak = contradicting(people, WEAK, seed)
        rest = [
            agreeing(people[::3], WEAK, seed + 1),
            neutral(people[::3], seed + 2),
            contradicting(people[::2], [1.0], seed + 3),
        ]
        self.cases = weak + [c for part in rest for c in part]
        bounds = np.cumsum([0, len(weak), *map(len, rest)])
        self.parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        self.prompts = Prompts(self.cases, processor, size=300)

    def try_plan(self, plan: Plan) -> tuple[float, float, float]:
        """(hit, prior) on weak contradicted faces, and the mean hit rate where a boost can only cost."""
        with patch(self.model, plan):
            scores = Scores.of(self.cases, answers(self.model, self.processor, self.prompts, tokens=12))
        weak, *rest = self.parts
        return (
            float(scores.hit[weak].mean()),
            float(scores.prior[weak].mean()),
            float(np.mean([scores.hit[p].mean() for p in rest])),
        )

    def trial(self, veena: VEENA) -> Trial:
        """Score one setting."""
        return Trial(veena, *self.try_plan(veena.plan(self.model)))


@dc.dataclass(frozen=True)
class Chosen:
    """The chosen settings, everything that was tried, and the dose response of the chosen one."""

    veena: VEENA
    vee: VEENA
    ena: VEENA
    baseline: Trial
    trials: list[Trial]
    ena_trials: list[Trial]
    dose: list[Trial]


def choose(
    model: nn.Module, processor: Any, circuit: Circuit, people: Sequence[int], *, seed: int = 100, progress: bool = True
) -> Chosen:
    """Choose VEE (reading, phase, heads, beta), then ENA (neurons, gamma, phase) on top of it.

    The value that is maximised weighs weak contradicted faces against the mean of the three situations in which a
    boost can only cost; ties go to the smaller beta or gamma. Neither half may be switched off, so that what is
    reported is VEENA even where the model left alone would have scored higher.
    """
    bench = Bench(model, processor, people, seed)
    places: tuple[tuple[Where, bool], ...] = (("split", False), ("both", False), ("both", True), ("decode", False))
    others: tuple[tuple[Reading, tuple[float, ...]], ...] = (
        ("logit-add", (2.0, 4.0, 16.0)),
        ("logit-scale", (1.5, 3.0)),
    )
    vee_grid = [
        VEENA(circuit, beta=beta, gamma=1.0, heads=n, reading="weight", where=where, last=last)
        for where, last in places
        for n in HEADS
        for beta in BETAS
    ] + [
        VEENA(circuit, beta=beta, gamma=1.0, heads=n, reading=reading, where="both", last=True)
        for reading, betas in others
        for n in HEADS[1:]
        for beta in betas
    ]
    vee_grid = [v for v in vee_grid if v.vee()]
    sizes = [n for n in (8, 16, 30) if n <= max(8, len(circuit.neurons))] if circuit.neurons else []
    doses = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0)
    total = 1 + len(vee_grid) + 2 * len(GAMMAS) * len(sizes) + len(doses)
    with tqdm(total=total, desc="choosing settings", unit="setting", disable=not progress) as bar:

        def run(veena: VEENA) -> Trial:
            bar.update()
            return bench.trial(veena)

        baseline = run(VEENA(circuit, beta=1.0, gamma=1.0))
        trials = [run(v) for v in vee_grid]
        vee = max(trials, key=lambda t: (t.value, -t.veena.beta)).veena
        ena_trials = [
            run(dc.replace(vee, gamma=gamma, neurons=n, ena_phase=phase))
            for n in sizes
            for gamma in GAMMAS
            for phase in ("both", "decode")
        ]
        veena = max(ena_trials, key=lambda t: (t.value, -t.veena.gamma)).veena if ena_trials else vee
        dose = [run(dc.replace(vee, beta=beta)) for beta in doses]
    return Chosen(veena, vee, dc.replace(veena, beta=1.0), baseline, trials, ena_trials, dose)
