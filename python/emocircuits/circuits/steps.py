"""The steps of a localisation: what each rests on, what it finds, and what it says in a line."""

from __future__ import annotations

import dataclasses as dc
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emocircuits.circuit import Circuit
from emocircuits.circuits.decoupling import Decoupling, decoupling
from emocircuits.circuits.flow import Flow, information_flow
from emocircuits.circuits.heads import Heads, critical_heads
from emocircuits.circuits.injection import Layers, inject
from emocircuits.circuits.lens import Lens, visual_lens
from emocircuits.circuits.maps import Maps, attention_maps
from emocircuits.circuits.neurons import Neurons, critical_neurons
from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.questions import Question
from emocircuits.circuits.settings import Settings
from emocircuits.circuits.stages import Stages, stage_patching
from emocircuits.circuits.steering import TENSORS, SteeringVectors, extract
from emocircuits.circuits.subject import Subject
from emocircuits.circuits.tuning import Tuning, tune
from emocircuits.circuits.verification import Verification, verify

TUNING_DRAWS = 20
"""Random controls of the confirmation, at least."""


@dc.dataclass(eq=False)
class Run:
    """A localisation under way.

    Attributes:
        questions: of general ability: every other one where strengths are chosen, the rest where that is confirmed.
        found: result of each step that is done, by name.
    """

    subject: Subject
    extract: Pairs
    analyze: Pairs
    settings: Settings
    folder: Path
    progress: bool
    fingerprint: str
    questions: tuple[Question, ...] = ()
    found: dict[str, Any] = dc.field(default_factory=dict)

    @property
    def l_emo(self) -> int:
        """As given, or as found.

        Raises:
            ValueError: no layer has an effect.
        """
        if self.settings.l_emo is not None:
            return self.settings.l_emo
        layers: Layers = self.found["layers"]
        if layers.l_emo is None:
            raise ValueError(
                f"no l_emo: {layers.note} (strengths {', '.join(f'{a:g}' for a in layers.alphas)}); give larger "
                "strengths (alphas), or name the layer (l_emo)"
            )
        return layers.l_emo

    def few(self, pairs: Pairs) -> Pairs:
        """The first pairs of every emotion, as many as answers are generated for."""
        count: dict[str, int] = {}
        which = []
        for i, emotion in enumerate(pairs.emotions):
            count[emotion] = count.get(emotion, 0) + 1
            if count[emotion] <= self.settings.answered:
                which.append(i)
        return pairs.take(which)

    @property
    def critical(self) -> list[tuple[int, int]]:
        """Critical heads, strongest first."""
        heads: Heads = self.found["heads"]
        return [(c.layer, c.head) for c in heads.critical]


@dc.dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: in ``run.json``.
        file: that it writes last.
        settings: names of those that it depends on.
        after: steps that it rests on.
        kind: of its result, with ``load`` and ``save``.
        find: makes it.
        tell: what it found, in a line.
        needless: why there is nothing to find in this run, or "".
        more: what else it depends on.
    """

    name: str
    file: str
    settings: tuple[str, ...]
    after: tuple[str, ...]
    kind: Any
    find: Callable[[Run], Any]
    tell: Callable[[Any], str]
    needless: Callable[[Run], str] = lambda run: ""
    more: Callable[[Run], Any] = lambda run: None


def _steering(run: Run) -> SteeringVectors:
    return extract(run.subject, run.extract, tau=run.settings.tau, progress=run.progress)


def _steering_told(found: SteeringVectors) -> str:
    return "kept " + ", ".join(f"{e} {k}/{n}" for e, k, n in zip(found.emotions, found.kept, found.total, strict=True))


def _layers(run: Run) -> Layers:
    s = run.settings
    return inject(
        run.subject, run.few(run.analyze), run.found["steering"], alphas=s.alphas, rows=s.inject_rows,
        reading=s.inject_reading, pooled=s.pooled, draws=s.draws, seed=s.seed, progress=run.progress,
    )  # fmt: skip


def _layers_told(found: Layers) -> str:
    if found.l_emo is None:
        return found.note
    effect = found.effects[found.layers.index(found.l_emo)].mean()
    return f"l_emo {found.l_emo}, hit rate {effect:+.3f}" + (f" ({found.note})" if found.note else "")


def _heads(run: Run) -> Heads:
    s = run.settings
    return critical_heads(
        run.subject, run.analyze, run.found["steering"], run.l_emo, reads=s.head_reads, pooled=s.pooled,
        rows=s.head_rows, top=s.top, margin=s.margin, level=s.level, prescreen=s.prescreen, confirm=s.confirm,
        seed=s.seed, progress=run.progress,
    )  # fmt: skip


def _heads_told(found: Heads) -> str:
    named = ", ".join(f"{c.layer}.{c.head} ({c.effect:.3f})" for c in found.critical)
    return f"{len(found.critical)} critical of {len(found.candidates)} candidates" + (f": {named}" if named else "")


def _decoupled(run: Run) -> Decoupling:
    return decoupling(run.found["heads"], k=run.settings.k)


def _one_emotion(run: Run) -> str:
    return "" if len(set(run.analyze.emotions)) > 1 else "the pairs have one emotion"


def _neurons(run: Run) -> Neurons:
    s = run.settings
    return critical_neurons(
        run.subject, run.analyze, run.found["steering"], run.critical, run.l_emo, row=s.neuron_row,
        activation=s.neuron_activation, by=s.neuron_by, pooled=s.pooled, fold_norm=s.fold_norm, spelling=s.spelling,
        look=s.look,
        k=s.explicit_k, top=s.neurons, controls=s.draws, margin=s.margin, level=s.level,
        tracing={"source": s.source_token, "score": s.neuron_score, "follow": s.follow, "at": s.gradients_at},
        seed=s.seed, progress=run.progress,
    )  # fmt: skip


def _neurons_told(found: Neurons) -> str:
    return f"{len(found.explicit)} explicit-state neurons and {len(found.contextual)} contextual triggers passed"


def _few_pairs(run: Run) -> str:
    few = [e for e in dict.fromkeys(run.analyze.emotions) if run.analyze.emotions.count(e) < 4]
    return f"{', '.join(few)} has fewer than four pairs in analyze" if few else ""


def _flow(run: Run) -> Flow:
    s = run.settings
    return information_flow(
        run.subject, run.analyze, loss=s.flow_loss, wordless="leave out", seed=s.seed, progress=run.progress
    )


def _lens(run: Run) -> Lens:
    return visual_lens(
        run.subject, run.analyze, draws=run.settings.draws, seed=run.settings.seed, progress=run.progress
    )


def _maps(run: Run) -> Maps:
    s = run.settings
    return attention_maps(
        run.subject, run.analyze, run.critical, draws=s.draws, wordless="leave out", seed=s.seed, progress=run.progress
    )


def _no_heads(run: Run) -> str:
    return "" if run.critical else "no head is critical"


def _stages(run: Run) -> Stages:
    s = run.settings
    return stage_patching(
        run.subject, run.few(run.analyze), draws=s.draws, seed=s.seed, progress=run.progress
    )  # fmt: skip


def _stages_told(found: Stages) -> str:
    best = max(found.cells, key=lambda c: c.effect.change)
    return f"most comes back with {best.role} rows of the {best.stage} stage, hit rate {best.effect.change:+.3f}"


def _verification(run: Run) -> Verification:
    # Heads and neurons were found on the analyze split.
    s = run.settings
    return verify(
        run.subject, circuit_of(run), run.few(run.extract), enhance=s.enhance, draws=s.draws, seed=s.seed,
        progress=run.progress,
    )  # fmt: skip


def _verification_told(found: Verification) -> str:
    return ", ".join(f"{c.action} {c.what} {c.effect.change:+.3f}" for c in found.checks if c.side == "emotional")


def _tuning(run: Run) -> Tuning:
    s = run.settings
    return tune(
        run.subject, circuit_of(run), run.few(run.analyze), run.few(run.extract), objective=s.objective,
        questions=run.questions[::2], held_out_questions=run.questions[1::2], draws=max(s.draws, TUNING_DRAWS),
        seed=s.seed, progress=run.progress,
    )  # fmt: skip


def _tuning_told(found: Tuning) -> str:
    if found.confirmation is None:
        return f"none of {len(found.trials)} settings within the rails is better than the model left alone"
    hit, s = found.confirmation.hit, found.best.setting
    above = "above" if found.confirmation.above_every_draw else "not above"
    return (
        f"beta {s['beta']:g}, gamma {s['gamma']:g}: on held-out pairs hit rate {hit.base:.3f} to {hit.value:.3f}, "
        f"{above} every random draw"
    )


def _not_tuned(run: Run) -> str:
    if not run.settings.tune:
        return "not asked for"
    neurons: Neurons | None = run.found.get("neurons")
    return "" if run.critical or (neurons is not None and neurons.explicit) else "the circuit is empty"


def _asked(run: Run) -> list[list[str]]:
    return [[q.prompt, q.answer, q.begins, hashlib.sha256(q.image.tobytes()).hexdigest()] for q in run.questions]


def _pairs_told(found: Any) -> str:
    return f"{len(found.ids)} pairs"


STEPS: tuple[Step, ...] = (
    Step("steering", "steering.json", ("tau",), (), SteeringVectors, _steering, _steering_told),
    Step(
        "layers", "layers.json",
        ("alphas", "inject_rows", "inject_reading", "answered", "pooled", "draws", "seed"), ("steering",),
        Layers, _layers, _layers_told,
    ),
    Step(
        "heads", "heads.json",
        ("l_emo", "head_reads", "head_rows", "pooled", "top", "margin", "level", "prescreen", "confirm", "seed"),
        ("steering", "layers"), Heads, _heads, _heads_told,
    ),
    Step(
        "neurons", "neurons.json",
        (
            "neuron_row", "neuron_activation", "neuron_by", "pooled", "fold_norm", "spelling", "look", "explicit_k",
            "neurons", "draws", "margin", "level", "source_token", "neuron_score", "follow", "gradients_at", "seed",
        ),
        ("steering", "layers", "heads"), Neurons, _neurons, _neurons_told, _few_pairs,
    ),
    Step(
        "decoupling", "decoupling.json", ("k",), ("heads",), Decoupling, _decoupled,
        lambda found: f"{len(found.general)} general heads, {len(found.specific)} specific", _one_emotion,
    ),
    Step("flow", "flow.json", ("flow_loss", "seed"), (), Flow, _flow, _pairs_told),
    Step("lens", "lens.json", ("draws", "seed"), (), Lens, _lens, _pairs_told),
    Step("maps", "maps.json", ("draws", "seed"), ("heads",), Maps, _maps, _pairs_told, _no_heads),
    Step("stages", "stages.json", ("answered", "draws", "seed"), (), Stages, _stages, _stages_told),
    Step(
        "verification", "verification.json", ("answered", "enhance", "draws", "seed"), ("heads", "neurons"),
        Verification, _verification, _verification_told, _no_heads,
    ),
    Step(
        "tuning", "tuning.json", ("tune", "objective", "answered", "draws", "seed"), ("heads", "neurons"),
        Tuning, _tuning, _tuning_told, _not_tuned, _asked,
    ),
)  # fmt: skip


def circuit_of(run: Run) -> Circuit:
    """What VEENA takes, from the results of a run."""
    heads: Heads = run.found["heads"]
    critical = heads.critical
    steering: SteeringVectors = run.found["steering"]
    neurons: Neurons | None = run.found.get("neurons")
    more = {} if neurons is None else neurons.for_circuit()
    config: Any = run.subject.model.config
    settings = {
        "head_effect": "share of the gap restored by patching z, on pairs that heads were not ranked on",
        "heads": heads.settings, "layers": run.found["layers"].settings, "tau": steering.tau,
        "kept": dict(zip(steering.emotions, steering.kept, strict=True)),
        "l_emo": "given" if run.settings.l_emo is not None else run.found["layers"].settings["l_emo"],
        "neurons": None if neurons is None else neurons.settings, "seed": run.settings.seed,
    }  # fmt: skip
    tuning: Tuning | None = run.found.get("tuning")
    if tuning is not None:
        settings["veena"] = tuning.best.setting
    return Circuit(
        str(config.model_type), run.subject.handle.geometry.layers, run.l_emo,
        tuple((c.layer, c.head) for c in critical),
        head_effects=tuple(c.effect for c in critical), head_intervals=tuple((c.low, c.high) for c in critical),
        settings=settings, steering=TENSORS, fingerprint=run.fingerprint, **more,
    )  # fmt: skip
