"""VEENA's strengths: tried on pairs of the analyze split, confirmed on others, within guard rails.

Every setting is answered by generation, all settings together (:func:`emocircuits.sweep.plan_grid`). A setting that
makes the language worse (its answers surprise the unmodified model, or do not end) or loses other abilities is shown
and not chosen. Where nothing is better than the model left alone, VEENA is off.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from emocircuits.circuit import Circuit
from emocircuits.circuits.answering import say
from emocircuits.circuits.bench import OBJECTIVES, Bench, Rails, Rates
from emocircuits.circuits.controls import (
    Change,
    Random,
    against,
    change,
    corrected,
    random_sets,
    require_draws,
)  # fmt: skip
from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.questions import Question
from emocircuits.circuits.subject import Subject
from emocircuits.edits import Reading
from emocircuits.files import read_json, write_json
from emocircuits.plan import Plan
from emocircuits.veena import VEENA, Where

FORMAT = "emocircuits.tuning/1"
FILE = "tuning.json"
BETAS = (1.5, 2.0, 3.0, 4.0)
GAMMAS = (1.25, 1.6, 2.5)
PLACES: tuple[tuple[Where, bool], ...] = (("split", False), ("both", False), ("both", True), ("decode", False))
LOGITS: tuple[tuple[Reading, tuple[float, ...]], ...] = (("logit-add", (2.0, 4.0, 16.0)), ("logit-scale", (1.5, 3.0)))
SETTING = ("beta", "gamma", "heads", "neurons", "reading", "where", "last", "ena_phase")


@dc.dataclass(frozen=True)
class Trial:
    """One setting: whose circuit, VEENA's arguments, what it did, its value, and the rails it breaks."""

    circuit: str
    setting: dict[str, Any]
    rates: Rates
    value: float
    broken: tuple[str, ...] = ()

    def veena(self, circuits: Mapping[str, Circuit]) -> VEENA:
        """As an intervention."""
        return VEENA(circuits[self.circuit], **self.setting)


@dc.dataclass(frozen=True)
class Confirmation:
    """The chosen setting on held-out pairs, beside the model left alone and the same setting on random members.

    Attributes:
        hit: on X+; ``calm``: on X-.
        random: its hits against the same setting on random heads (and neurons) of the same layers.
        before, after: all rates.
        value_before, value_after: of the objective.
        broken: rails that it breaks here.
        above_every_draw: whether its hit rate is above those of all random controls.
    """

    hit: Change
    calm: Change
    random: Random
    before: Rates
    after: Rates
    value_before: float
    value_after: float
    broken: tuple[str, ...]
    above_every_draw: bool


@dc.dataclass(frozen=True)
class Tuning:
    """Everything that was tried.

    Attributes:
        base: the model left alone (beta and gamma 1).
        trials: every setting, in the order tried.
        chosen: number of the chosen trial; None: none within the rails is better than the model left alone.
        confirmation: of the chosen one, on held-out pairs; None where none was chosen.
        examples: answers to the first held-out X+, before and after; each a single example.
        settings: objective, rails, numbers.
    """

    base: Trial
    trials: tuple[Trial, ...]
    chosen: int | None
    confirmation: Confirmation | None
    examples: tuple[dict[str, str], ...]
    settings: dict[str, Any]

    @property
    def best(self) -> Trial:
        """The chosen trial, or the model left alone."""
        return self.base if self.chosen is None else self.trials[self.chosen]

    def veena(self, circuits: Circuit | Mapping[str, Circuit]) -> VEENA:
        """The chosen intervention; one that is off (beta and gamma 1) where none was chosen.

        Args:
            circuits: what :func:`tune` was given.
        """
        return self.best.veena(_named(circuits))

    def save(self, folder: str | Path) -> Path:
        """Write ``tuning.json``."""
        record = {"format": FORMAT, "average_over": "pairs", **dc.asdict(self)}
        return write_json(Path(folder) / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> Tuning:
        """Read what :meth:`save` wrote."""
        path = Path(folder) / FILE
        record: Any = read_json(path, "a tuning of VEENA")
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{path}: not a tuning of VEENA (expected format {FORMAT!r})")

        def trial(t: dict[str, Any]) -> Trial:
            return Trial(t["circuit"], t["setting"], Rates(**t["rates"]), t["value"], tuple(t["broken"]))

        c = record["confirmation"]
        if c is not None:
            c = Confirmation(
                Change(**c["hit"]), Change(**c["calm"]),
                Random(**{**c["random"], "values": tuple(c["random"]["values"])}), Rates(**c["before"]),
                Rates(**c["after"]), c["value_before"], c["value_after"], tuple(c["broken"]), c["above_every_draw"],
            )  # fmt: skip
        return cls(
            trial(record["base"]), tuple(map(trial, record["trials"])), record["chosen"], c,
            tuple(record["examples"]), record["settings"],
        )  # fmt: skip


def vee_settings(circuit: Circuit) -> list[VEENA]:
    """VEE alone: ``weight`` in all places, and both readings on logits where they act on most rows."""
    sizes = sorted({max(1, round(len(circuit.heads) * share)) for share in (1 / 3, 2 / 3, 1)}) if circuit.heads else []
    found = [
        VEENA(circuit, beta, 1.0, heads=n, where=where, last=last)
        for where, last in PLACES for n in sizes for beta in BETAS
    ] + [
        VEENA(circuit, beta, 1.0, heads=n, reading=reading, where="both", last=True)
        for reading, betas in LOGITS for n in sizes[-2:] for beta in betas
    ]  # fmt: skip
    return [v for v in found if v.vee()]


def ena_settings(vee: VEENA) -> list[VEENA]:
    """ENA on top of a VEE: every gamma in both phases and in decode only, with half and all of the neurons."""
    count = len(vee.circuit.neurons)
    sizes = sorted({max(1, count // 2), count}) if count else []
    return [
        dc.replace(vee, gamma=gamma, neurons=n, ena_phase=phase)
        for n in sizes for gamma in GAMMAS for phase in ("both", "decode")
    ]  # fmt: skip


def tune(
    subject: Subject, circuits: Circuit | Mapping[str, Circuit], pairs: Pairs, held_out: Pairs, *,
    settings: Callable[[Circuit], Sequence[VEENA]] = vee_settings,
    ena: Callable[[VEENA], Sequence[VEENA]] = ena_settings,
    objective: Literal["balanced", "hits"] | Callable[[Rates], float] = "balanced", rails: Rails | None = None,
    questions: Sequence[Question] = (), held_out_questions: Sequence[Question] = (), draws: int = 20,
    batch: int | None = None, seed: int = 0, progress: bool = True,
) -> Tuning:  # fmt: skip
    """Choose VEENA's settings on some pairs and confirm the choice on others.

    VEE is tried first, then ENA on top of the best VEE within the rails. No setting knows the emotion of a pair: with
    several circuits (pooled, and of single emotions), each is tried on all pairs.

    Args:
        subject: the model.
        circuits: of it: one, or several by name.
        pairs: of the analyze split.
        held_out: other pairs.
        settings: from a circuit to the VEE settings to try.
        ena: from a VEE setting to those with ENA to try on top of it.
        objective: what is maximised: "balanced" (:func:`balanced`), "hits", or a function of :class:`Rates`. Ties go
            to the smaller beta, then gamma.
        rails: what a setting may cost.
        questions: of general ability, see :mod:`.questions`; without them it is not guarded, which the result says.
        held_out_questions: other questions, for the confirmation.
        draws: random controls of the confirmation, at least 10.
        batch: answers decoded together (None: what memory allows).
        seed: of controls and bootstrap.
        progress: show bars.

    Raises:
        ValueError: pairs in both sets, an unknown objective, a circuit of another model, or one without heads and
            neurons.
    """
    named, score = _named(circuits), _objective(objective)
    require_draws(draws)
    handle = subject.handle
    for circuit in named.values():
        circuit.require(subject.model, handle.config.model_type, handle.geometry.layers)
        if not circuit.heads and not circuit.neurons:
            raise ValueError("the circuit has neither heads nor neurons; there is nothing to tune")
    _disjoint(pairs, held_out)
    rails = rails or Rails()
    bench = Bench(subject, pairs, questions, batch, progress)
    off = VEENA(next(iter(named.values())), 1.0, 1.0)
    tried = [(name, v) for name, circuit in named.items() for v in settings(circuit)]
    (base, *rates) = bench.rates([Plan(), *(v.plan() for _, v in tried)])
    trials = [_trial(name, v, r, score, rails, base) for (name, v), r in zip(tried, rates, strict=True)]
    first = Trial(next(iter(named)), _setting(off), base, score(base))
    best = _best(first, trials)
    start = best.veena(named)
    on_top = [
        (name, v) for name, circuit in named.items() for v in ena(start if best is not first else _off(circuit))
        if best is first or name == best.circuit
    ]  # fmt: skip
    if on_top:
        _, *rates = bench.rates([Plan(), *(v.plan() for _, v in on_top)])
        trials += [_trial(name, v, r, score, rails, base) for (name, v), r in zip(on_top, rates, strict=True)]
        best = _best(first, trials)
    confirmation: Confirmation | None = None
    examples: tuple[dict[str, str], ...] = ()
    if best is not first:
        confirmation, examples = confirm(
            subject, best.veena(named), held_out, score, rails, held_out_questions, draws=draws, batch=batch,
            seed=seed, progress=progress,
        )  # fmt: skip
    told = {
        "objective": objective if isinstance(objective, str) else getattr(objective, "__name__", "own"),
        "rails": dc.asdict(rails), "pairs": len(pairs), "held_out": len(held_out), "questions": len(questions),
        "held_out_questions": len(held_out_questions), "draws": draws, "seed": seed, "limit": subject.limit,
        "lexicon": subject.lexicon.name, "circuits": {name: c.to_dict() for name, c in named.items()},
        "fluency": "perplexity of the answers under the unmodified model, teacher-forced, a token",
        "random": "the same setting on random heads and neurons of the same layers",
    }  # fmt: skip
    chosen = None if best is first else next(i for i, t in enumerate(trials) if t is best)
    return Tuning(first, tuple(trials), chosen, confirmation, examples, told)


def confirm(
    subject: Subject, veena: VEENA, pairs: Pairs, score: Callable[[Rates], float], rails: Rails,
    questions: Sequence[Question] = (), *, draws: int = 20, batch: int | None = None, seed: int = 0,
    progress: bool = True,
) -> tuple[Confirmation, tuple[dict[str, str], ...]]:  # fmt: skip
    """One setting on pairs that it was not chosen on, and answers before and after; see :class:`Confirmation`."""
    bench = Bench(subject, pairs, questions, batch, progress)
    before, after = bench.rates([Plan(), veena.plan()])
    plans = [v.plan() for v in random_veenas(subject, veena, draws, seed)]
    said = say(subject, pairs, "emotional", plans, batch=batch, progress=progress)
    drawn = said.rates(lambda texts: subject.hits(texts, pairs.emotions))
    (plus, treated), (calm, calmed) = bench.hits, bench.calm
    random = against("the same setting on random members", plus, treated, drawn)
    hit, quiet = corrected([change(plus, treated, pairs, seed=seed), change(calm, calmed, pairs, seed=seed)])
    examples = tuple(
        {"id": r.id, "emotion": r.emotion, "event": r.event, "before": a, "after": b}
        for r, a, b in zip(pairs.records, *bench.texts, strict=True)
    )[:6]  # fmt: skip
    return Confirmation(
        hit, quiet, dc.replace(random, q=random.p), before, after, score(before), score(after),
        rails.broken(after, before), bool(treated.mean() > max(random.values)),
    ), examples  # fmt: skip


def random_veenas(subject: Subject, veena: VEENA, draws: int, seed: int) -> list[VEENA]:
    """The same setting on random heads and neurons of the same layers, those that act."""
    geometry, circuit = subject.handle.geometry, veena.circuit
    heads = circuit.heads[: veena.heads] if veena.vee() else ()
    neurons = circuit.neurons[: veena.neurons] if veena.ena() else ()
    none: list[tuple[tuple[int, int], ...]] = [()] * draws
    drawn = zip(
        random_sets(heads, geometry.heads, draws, seed) if heads else none,
        random_sets(neurons, geometry.neurons, draws, seed) if neurons else none, strict=True,
    )  # fmt: skip
    return [
        dc.replace(veena, circuit=Circuit(circuit.model_type, circuit.layers, circuit.l_emo, h, n), heads=None,
                   neurons=None)
        for h, n in drawn
    ]  # fmt: skip


def _named(circuits: Circuit | Mapping[str, Circuit]) -> dict[str, Circuit]:
    named = {"pooled": circuits} if isinstance(circuits, Circuit) else dict(circuits)
    if not named:
        raise ValueError("there are no circuits")
    return named


def _objective(objective: str | Callable[[Rates], float]) -> Callable[[Rates], float]:
    if callable(objective):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: expected {', '.join(OBJECTIVES)}, or a function of Rates")
    return OBJECTIVES[objective]


def _disjoint(pairs: Pairs, held_out: Pairs) -> None:
    def pictures(of: Pairs) -> set[bytes]:
        return {image.tobytes() for images in (of.emotional, of.neutral) for image in images}

    same = sorted({r.id for r in pairs.records} & {r.id for r in held_out.records})
    if same or pictures(pairs) & pictures(held_out):
        raise ValueError(
            f"held-out pairs share {', '.join(same[:3]) or 'pictures'} with those that settings are chosen on; what "
            "was chosen on a pair cannot be confirmed on it"
        )


def _setting(veena: VEENA) -> dict[str, Any]:
    return {name: getattr(veena, name) for name in SETTING}


def _off(circuit: Circuit) -> VEENA:
    return VEENA(circuit, 1.0, 1.0)


def _trial(name: str, veena: VEENA, rates: Rates, score: Callable[[Rates], float], rails: Rails, base: Rates) -> Trial:
    return Trial(name, _setting(veena), rates, float(score(rates)), rails.broken(rates, base))


def _best(base: Trial, trials: Sequence[Trial]) -> Trial:
    """The highest value within the rails; of equal ones the one that changes least."""
    within = [base, *(t for t in trials if not t.broken)]
    return max(within, key=lambda t: (t.value, t is base, -t.setting["beta"], -t.setting["gamma"]))
