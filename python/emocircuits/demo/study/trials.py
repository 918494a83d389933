"""Choosing a setting by what it does beyond random members of the same layers, and reporting it on fresh identities."""

from __future__ import annotations

import dataclasses as dc
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats
from torch import nn
from tqdm.auto import tqdm

from emocircuits.circuits.controls import against, random_sets
from emocircuits.circuits.patch_effects import random_like
from emocircuits.demo.cases import WEAK, agreeing, contradicting, neutral
from emocircuits.demo.study.asked import Asked, Said
from emocircuits.demo.study.settings import TOLD, Member, Setting, scale
from emocircuits.scoring import compare
from emocircuits.scoring.statistics import interval

Rankings = Mapping[str, Sequence[Member]]
SITUATIONS = ("weak", "agreeing", "neutral", "full")


class Bench:
    """Weak contradicted faces, and the situations in which a boost can only cost, of some identities.

    ``count`` is how many members (heads or neurons) a layer has.
    """

    def __init__(self, model: nn.Module, processor: Any, people: Sequence[int], seed: int, *, thin: int = 1) -> None:
        weak = contradicting(people, WEAK, seed)
        rest = [
            agreeing(people[::thin], WEAK, seed + 1), neutral(people[::thin], seed + 2),
            contradicting(people[::thin], [1.0], seed + 3),
        ]  # fmt: skip
        self.weak = Asked(model, processor, weak)
        self.rest = Asked(model, processor, [c for part in rest for c in part])
        bounds = np.cumsum([0, *map(len, rest)])
        self.parts = {n: slice(a, b) for n, (a, b) in zip(SITUATIONS[1:], itertools.pairwise(bounds), strict=True)}
        self.base = self.weak.said()
        self.base_rest = self.rest.said()

    def cost(self, said: Said) -> float:
        """Mean over the situations of the change of the hit rate."""
        return float(np.mean([said.hit[p].mean() - self.base_rest.hit[p].mean() for p in self.parts.values()]))


def choose(
    bench: Bench, rankings: Rankings, settings: Sequence[Setting], count: int, *, draws: int, seed: int, progress: bool
) -> list[dict[str, Any]]:
    """Every setting with its value, best first.

    The value is how far the hit rate on weak contradicted faces is above the mean of random draws, and above the best
    of them (half each), plus half of what the other situations lose. Ties go to the weaker, smaller setting.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[tuple[str, int], list[list[Member]]] = {}
    rows = []
    for s in tqdm(settings, desc=f"choosing {settings[0].half}", unit="setting", disable=not progress):
        members = list(rankings[s.ranking][: s.count])
        if len(members) < s.count:
            continue
        sets = drawn.setdefault((s.ranking, s.count), [random_like(members, count, rng) for _ in range(draws)])
        said = bench.weak.said(s.plan(members))
        # Prompts that a plan edits have to be run again: one draw there.
        few = sets if s.place == "decode" else sets[:1]
        random = [float(bench.weak.said(s.plan(m)).hit.mean()) for m in few]
        hit, cost = float(said.hit.mean()), bench.cost(bench.rest.said(s.plan(members)))
        value = hit - (float(np.mean(random)) + max(random)) / 2 + cost / 2
        rows.append(
            {**dc.asdict(s), **said.rates(), "random_mean": float(np.mean(random)), "random_max": max(random),
             "cost": cost, "value": value}
        )  # fmt: skip
    return sorted(rows, key=lambda r: (-r["value"], r["strength"], r["count"]))


def setting_of(row: Mapping[str, Any]) -> Setting:
    """The setting of a row."""
    return Setting(**{f.name: row[f.name] for f in dc.fields(Setting)})


def report(
    bench: Bench, rankings: Rankings, setting: Setting, count: int, *, draws: int, seed: int, full: bool, progress: bool
) -> dict[str, Any]:
    """One setting on fresh identities, beside random members.

    ``random`` are draws of as many members of the same layers, any but the whole set itself; ``outside`` those that
    share none with it. ``full`` adds the latter, the members at the other end of the ranking, and the cost.
    """
    ranking = rankings[setting.ranking]
    members = list(ranking[: setting.count])
    rng = np.random.default_rng(seed)
    kinds = {"random": [random_like(members, count, rng) for _ in range(draws)]}
    if full:
        kinds["outside"] = [list(m) for m in random_sets(members, count, draws, seed)]
    said = bench.weak.said(setting.plan(members))
    found: dict[str, Any] = {
        **dc.asdict(setting), "members": [list(m) for m in members], "untouched": bench.base.rates(), **said.rates(),
        "against_untouched": {n: _compared(bench.weak, bench.base, said, n) for n in ("hit", "prior")},
    }  # fmt: skip
    for kind, sets in kinds.items():
        bar = tqdm(sets, desc=f"{setting.half} {setting.ranking}, {kind}", disable=not progress)
        found[kind] = _beside(bench.weak, bench.base, said, [bench.weak.said(setting.plan(m)) for m in bar], kind)
    if full:
        bottom = list(ranking[-setting.count :])
        found["bottom"] = {"members": [list(m) for m in bottom], **bench.weak.said(setting.plan(bottom)).rates()}
        other = bench.rest.said(setting.plan(members))
        found["cost"] = {
            name: _compared(bench.rest, bench.base_rest, other, "hit", part) for name, part in bench.parts.items()
        }
    return found


def told(bench: Bench, rankings: Rankings, settings: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    """ENA that knows an answer: neurons of the face's emotion, or of the event's, amplified in generated rows."""
    rows = []
    for count, gamma in settings:
        under = {
            name: bench.weak.said(scale(members[:count], gamma))
            for name, members in rankings.items() if name.startswith(TOLD)
        }  # fmt: skip
        row: dict[str, Any] = {"count": count, "strength": gamma}
        for who in ("emotion", "suggests"):
            which = [under[f"{TOLD}{getattr(c, who)}"] for c in bench.weak.cases]
            row[who] = {n: float(np.mean([getattr(s, n)[i] for i, s in enumerate(which)])) for n in ("hit", "prior")}
        rows.append(row)
    return rows


def _compared(asked: Asked, base: Said, said: Said, what: str, part: slice = slice(None)) -> dict[str, Any]:
    c = compare(getattr(base, what)[part], getattr(said, what)[part], asked.people[part])
    return {**c._asdict(), "n": len(asked.people[part])}


def _beside(asked: Asked, base: Said, said: Said, drawn: Sequence[Said], kind: str) -> dict[str, Any]:
    """Draws of one kind, and the difference between the setting and their mean, case by case."""
    table = np.stack([d.hit for d in drawn]).astype(float)
    hits = against(kind, base.hit.astype(float), said.hit.astype(float), table)
    difference = said.hit - table.mean(0)
    people = np.unique(asked.people)
    sums = np.array([difference[asked.people == p].sum() for p in people])
    sizes = np.array([(asked.people == p).sum() for p in people])
    low, high = interval(sums, sizes)
    priors = np.array([d.prior.mean() for d in drawn])
    faces = np.array([d.face.mean() for d in drawn])
    return {
        "hits": list(hits.values), "mean": hits.mean, "best": max(hits.values), "std": hits.std, "p": hits.p,
        "above": int(sum(said.hit.mean() > v for v in hits.values)), "draws": len(drawn),
        "difference": float(difference.mean()), "low": low, "high": high,
        "p_identities": float(stats.wilcoxon(sums).pvalue) if np.any(sums) else 1.0,
        "prior_mean": float(priors.mean()), "prior_least": float(priors.min()), "face_mean": float(faces.mean()),
        "face_best": float(faces.max()),
    }  # fmt: skip
