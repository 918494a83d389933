"""The whole story on the embedded model: find the circuit, choose VEENA's settings, report once, measure the cost."""

from __future__ import annotations

import dataclasses as dc
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from emocircuits.demo.cases import FIRST, WEAK, Case, Prompts, answers, identities
from emocircuits.demo.choose import Chosen, choose
from emocircuits.demo.cost import Overhead, overhead
from emocircuits.demo.judge import VARIANTS, Verdict, judge
from emocircuits.demo.localize import Found, localize, with_answer
from emocircuits.environment import provenance
from emocircuits.fingerprint import fingerprint
from emocircuits.loading import load_model
from emocircuits.measure import attention_weights, images_once
from emocircuits.plan import Plan
from emocircuits.veena import VEENA
from emokernels import Role

PEOPLE = {"rank": 20, "choose": 12, "report": 40}
"""Identities of each part."""


def tell(
    *, seed: int = 0, people: dict[str, int] | None = None, progress: bool = True, say: Any = print
) -> dict[str, Any]:
    """Run the demo and return its result as one JSON-ready object (``docs/demo.md`` describes the fields).

    Args:
        seed: of events, controls and bootstrap; the same seed gives the same answers on the same machine.
        people: identities of each part, by default ``PEOPLE``.
        progress: show progress bars.
        say: called with each line for people; ``lambda line: None`` for silence.
    """
    people = {**PEOPLE, **(people or {})}
    start = time.perf_counter()
    parts = {name: identities(name, n) for name, n in people.items()}
    model, processor = load_model()
    _first_generation(model, processor)
    before = fingerprint(model)

    with images_once(model):
        say("1/4  finding the circuit on contrastive pairs (face and neutral twin, same event)")
        found = localize(model, processor, parts["rank"], seed=seed, progress=progress)
        say("2/4  choosing VEENA's settings on other identities")
        chosen = choose(model, processor, found.circuit, parts["choose"], seed=seed + 100, progress=progress)
        say("3/4  reporting on identities not seen so far, beside random controls")
        verdict = judge(model, processor, chosen, parts["report"], seed=seed + 200, progress=progress)
    say("4/4  measuring the cost")
    cost = _overhead(model, processor, chosen, verdict)
    attention = _attention(model, processor, chosen, verdict)
    restored = fingerprint(model) == before
    result = _result(found, chosen, verdict, cost, attention, restored)
    result |= {
        "seed": seed,
        "identities": {name: [r[0], r[-1]] for name, r in parts.items()},
        "seconds": time.perf_counter() - start,
        **provenance(),
    }
    return result


def _first_generation(model: nn.Module, processor: Any) -> None:
    """Generate once, so that what transformers itself leaves on a model is there before the fingerprint is taken."""
    case = Case(FIRST - 1, "happy", 1.0, "sad", "my mom said that the report is ready.")
    answers(model, processor, Prompts([case], processor), tokens=2)


def _overhead(model: nn.Module, processor: Any, chosen: Chosen, verdict: Verdict) -> Overhead:
    cases = [c for c in verdict.cases["contradicting"] if c.intensity in WEAK][:32]
    inputs = Prompts(cases, processor).batches[0]
    return overhead(model, inputs, chosen.veena.plan(model))


def _attention(model: nn.Module, processor: Any, chosen: Chosen, verdict: Verdict) -> dict[str, Any]:
    """Attention over the face, at the row that emits the emotion word, before and after; one example, named as such."""
    cases = verdict.cases["contradicting"]
    base, veena = (verdict.scores["contradicting"][v] for v in ("baseline", "veena"))
    weak = np.array([c.intensity in WEAK for c in cases])
    turned = np.flatnonzero(weak & base.prior & veena.hit)
    index = int(turned[0]) if len(turned) else int(np.flatnonzero(weak)[0])
    case = cases[index]
    inputs, roles = with_answer(model, processor, Prompts([case], processor).batches[0])
    visual = roles[0] == int(Role.VISUAL)
    heads = chosen.veena.circuit.heads[: chosen.veena.heads]
    maps = {}
    for name, plan in (("before", Plan()), ("after", chosen.veena.plan(model))):
        weights = attention_weights(model, inputs, plan, roles=roles)[:, 0, :, 0][..., visual]
        side = int(weights.shape[-1] ** 0.5)
        mean = torch.stack([weights[layer, head] for layer, head in heads]).mean(0)
        maps[name] = {"map": mean.reshape(side, side).tolist(), "mass": float(mean.sum())}
    return {
        "example": True,
        "case": dc.asdict(case),
        "image": np.asarray(case.image).tolist(),
        "heads": [list(h) for h in heads],
        "said": {"before": base.texts[index], "after": veena.texts[index]},
        **maps,
    }


def _result(
    found: Found, chosen: Chosen, verdict: Verdict, cost: Overhead, attention: dict[str, Any], restored: bool
) -> dict[str, Any]:
    settings = {"veena": chosen.veena, "vee": chosen.vee, "ena": chosen.ena}
    rates = {v: verdict.rates(v) for v in VARIANTS}
    controls = verdict.controls

    def block(which: int) -> dict[str, Any]:
        return {
            **{v: rates[v][which] for v in VARIANTS},
            "random_controls": [c[which] for c in controls["veena"]],
            "random_controls_vee": [c[which] for c in controls["vee"]],
            "random_controls_ena": [c[which] for c in controls["ena"]],
        }

    situations = ("agreeing", "neutral", "full")
    # The circuit carries the settings that were chosen for it, so that `emocircuits veena` can use it as it is.
    circuit = dc.replace(found.circuit, settings={**found.circuit.settings, "veena": _fields(chosen.veena)})
    return {
        "hit_rate": block(0),
        "prior_rate": block(1),
        "p_value": verdict.compare("weak", "veena").p_value,
        "comparisons": {
            v: {what: verdict.compare("weak", v, what)._asdict() for what in ("hit", "prior")} for v in settings
        },
        "cost": {s: verdict.compare(s, "veena")._asdict() for s in situations},
        "costs": {v: {s: verdict.compare(s, v)._asdict() for s in situations} for v in settings},
        "beats_controls": {v: rates[v][0] > max(c[0] for c in controls[v]) for v in settings},
        "overhead_ratio": cost.ratio,
        "overhead": cost._asdict(),
        "restored_bitwise": restored,
        "n": {
            **{s: len(verdict.of(s, "baseline")[0]) for s in ("weak", *situations)},
            "draws": len(controls["veena"]),
        },
        "by_intensity": {v: verdict.by_intensity(v) for v in VARIANTS},
        "chosen": {
            name: {f.name: getattr(v, f.name) for f in dc.fields(v) if f.name != "circuit"}
            for name, v in settings.items()
        },
        "choosing": {
            "baseline": chosen.baseline.row(),
            "vee": [t.row() for t in chosen.trials],
            "ena": [t.row() for t in chosen.ena_trials],
            "dose": [t.row() for t in chosen.dose],
        },
        "circuit": circuit.to_dict(),
        "plan": chosen.veena.plan().to_dict(),
        "localization": {
            "pairs": found.pairs,
            "kept": dict(zip(found.steering.emotions, found.steering.kept, strict=True)),
            "total": dict(zip(found.steering.emotions, found.steering.total, strict=True)),
            "injection": found.injection.tolist(),
            "injection_random": found.injection_random.tolist(),
            "head_effects": found.head_effects.tolist(),
            "layer_effects": found.layer_effects.tolist(),
            "neuron_k": found.neuron_k,
            "neurons": [n._asdict() for n in found.neurons[:12]],
            "explicit_state_neurons": len(found.neurons),
        },
        "attention": attention,
        "sentences": _sentences(verdict),
    }


def _fields(veena: VEENA) -> dict[str, Any]:
    return {f.name: getattr(veena, f.name) for f in dc.fields(veena) if f.name != "circuit"}


def _sentences(verdict: Verdict, count: int = 8) -> list[dict[str, Any]]:
    """Answers before and after on weak contradicted faces: the first of each outcome, wins and losses alike."""
    cases = verdict.cases["contradicting"]
    base, veena = (verdict.scores["contradicting"][v] for v in ("baseline", "veena"))
    outcomes = {"mended": ~base.hit & veena.hit, "broken": base.hit & ~veena.hit, "still wrong": ~base.hit & ~veena.hit}
    weak = np.array([c.intensity in WEAK for c in cases])
    rows = []
    for outcome, chosen in outcomes.items():
        picks = np.flatnonzero(chosen & weak)
        for i in picks[:: max(1, len(picks) // count)][: count // 2 if outcome == "mended" else count // 4]:
            rows.append(
                {"outcome": outcome, "case": dc.asdict(cases[i]), "before": base.texts[i], "after": veena.texts[i]}
            )
    return rows
