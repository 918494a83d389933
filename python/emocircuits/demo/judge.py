"""The report part, used once: VEENA and its halves beside random controls, and what they cost."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from emocircuits.circuit import Circuit
from emocircuits.circuits import random_like
from emocircuits.demo.cases import LEVELS, WEAK, Case, Prompts, Scores, agreeing, answers, contradicting, neutral
from emocircuits.demo.choose import Chosen
from emocircuits.families import open_model
from emocircuits.patching import patch
from emocircuits.plan import Plan
from emocircuits.scoring import Comparison, compare
from emocircuits.veena import VEENA

DRAWS = 10
VARIANTS = ("baseline", "veena", "vee", "ena")


@dc.dataclass(frozen=True)
class Verdict:
    """Everything measured on the report part.

    ``scores[situation][variant]``; ``controls[variant]`` holds (hit, prior) on weak contradicted faces for each draw.
    """

    cases: dict[str, list[Case]]
    scores: dict[str, dict[str, Scores]]
    controls: dict[str, list[tuple[float, float]]]

    def of(self, situation: str, variant: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(hit, prior, identity) of ``weak`` or ``full`` contradicted faces, or of ``agreeing`` or ``neutral`` ones."""
        name = situation if situation in self.cases else "contradicting"
        cases, scores = self.cases[name], self.scores[name][variant]
        levels = {"weak": WEAK, "full": (1.0,)}.get(situation, tuple({c.intensity for c in cases}))
        chosen = np.array([c.intensity in levels for c in cases])
        return scores.hit[chosen], scores.prior[chosen], np.array([c.identity for c in cases])[chosen]

    def rates(self, variant: str) -> tuple[float, float]:
        """(hit, prior) on weak contradicted faces."""
        hit, prior, _ = self.of("weak", variant)
        return float(hit.mean()), float(prior.mean())

    def compare(self, situation: str, variant: str, what: str = "hit") -> Comparison:
        """``variant`` against the untouched model."""
        column = ("hit", "prior").index(what)
        *base, groups = self.of(situation, "baseline")
        return compare(base[column], self.of(situation, variant)[column], groups)

    def by_intensity(self, variant: str) -> list[tuple[float, float, float]]:
        """(intensity, hit, prior) on contradicting cases."""
        levels = np.array([c.intensity for c in self.cases["contradicting"]])
        s = self.scores["contradicting"][variant]
        return [(t, float(s.hit[levels == t].mean()), float(s.prior[levels == t].mean())) for t in LEVELS]


def judge(
    model: nn.Module,
    processor: Any,
    chosen: Chosen,
    people: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 200,
    progress: bool = True,
) -> Verdict:
    """Measure the untouched model, VEENA, VEE alone and ENA alone, and ``draws`` random controls of each.

    A control has the same settings and as many heads (neurons) of the same layers, drawn at random.
    """
    cases = {
        "contradicting": contradicting(people, LEVELS, seed),
        "agreeing": agreeing(people, WEAK, seed + 1),
        "neutral": neutral(people, seed + 2),
    }
    prompts = {name: Prompts(c, processor) for name, c in cases.items()}
    weak_cases = [c for c in cases["contradicting"] if c.intensity in WEAK]
    weak_prompts = Prompts(weak_cases, processor)
    settings = {"veena": chosen.veena, "vee": chosen.vee, "ena": chosen.ena}
    scores: dict[str, dict[str, Scores]] = {name: {} for name in cases}
    controls: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    rng = np.random.default_rng(seed)
    steps = len(VARIANTS) * len(cases) + draws * len(settings)
    with tqdm(total=steps, desc="reporting", unit="run", disable=not progress) as bar:
        for variant in VARIANTS:
            plan = Plan() if variant == "baseline" else settings[variant].plan(model)
            with patch(model, plan):
                for name in cases:
                    scores[name][variant] = Scores.of(cases[name], answers(model, processor, prompts[name]))
                    bar.update()
        for variant, veena in settings.items():
            for _ in range(draws):
                with patch(model, control(model, veena, rng).plan(model)):
                    s = Scores.of(weak_cases, answers(model, processor, weak_prompts))
                controls[variant].append((float(s.hit.mean()), float(s.prior.mean())))
                bar.update()
    return Verdict(cases, scores, controls)


def control(model: nn.Module, veena: VEENA, rng: np.random.Generator) -> VEENA:
    """The same setting on random heads and neurons of the same layers."""
    geometry = open_model(model).geometry
    circuit = veena.circuit
    heads = random_like(circuit.heads[: veena.heads], geometry.heads, rng)
    neurons = random_like(circuit.neurons[: veena.neurons], geometry.neurons, rng)
    random = Circuit(circuit.model_type, circuit.layers, circuit.l_emo, tuple(heads), tuple(neurons))
    return dc.replace(veena, circuit=random, heads=None, neurons=None)
