"""Numbers and readings of a localisation: the defaults are method.md's, its other readings are values here."""

from __future__ import annotations

import dataclasses as dc
from typing import Literal, get_args

from emocircuits.circuits.flow import Loss
from emocircuits.circuits.heads import Reads
from emocircuits.circuits.heads import Rows as HeadRows
from emocircuits.circuits.injection import ALPHAS, LEAST_DRAWS
from emocircuits.circuits.neurons import Activation, Row
from emocircuits.circuits.subject import Subject
from emocircuits.circuits.tracing import At, By, Follow, Score, SourceToken
from emocircuits.circuits.vocabulary import Spelling
from emocircuits.sweep.steering import READINGS, ROWS, Reading, Rows

Objective = Literal["balanced", "hits"]
READINGS_OF = {
    "neuron_row": Row, "neuron_activation": Activation, "neuron_by": By, "spelling": Spelling,
    "source_token": SourceToken, "neuron_score": Score, "follow": Follow, "gradients_at": At, "flow_loss": Loss,
}  # fmt: skip
"""Readings of later steps, by their name in :class:`Settings`."""


@dc.dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    Args:
        seed: of halves, random controls and bootstrap.
        tau: Stage I keeps a pair when its hit rate on X+ is strictly above this.
        pooled: one steering vector for all emotions, in place of one each.
        alphas: strengths of injection.
        inject_rows: rows that are steered: "all" (default), "prompt", "last".
        inject_reading: "raw" (default), "relative", "norm-preserving".
        answered: pairs of each emotion for which answers are generated where layers, stages and functions are tested.
        draws: random directions, heads, neurons, token sets: of each control, at least 10.
        l_emo: a layer, in place of the one with the largest effect.
        head_reads: what patching is read by: "projection" (default) or "log-odds".
        head_rows: rows that are patched: "all" (default) or "last".
        top: candidates for critical heads.
        margin: by how much a critical head restores more than random ones.
        level: of the corrected test.
        prescreen: attribution patching before exact patching: None (default), "atp", "atp*".
        confirm: patches that are then run exactly.
        k: heads of each emotion that are compared.
        neurons: candidates of each type.
        neuron_row: row in which explicit-state neurons are scored: "answer" (default) or "last".
        neuron_activation: "difference" (default), ``a+ - a-``, or "emotional", ``a+``.
        neuron_by: rank by the mean over "all" emotions (default) or by the largest "emotion".
        fold_norm: fold the final norm's gain into the vocabulary projection.
        spelling: tokens that name emotions: "words" (default), or "first" sub-tokens.
        look: tokens of a neuron's projection that count.
        explicit_k: emotion words among them, for an explicit-state neuron; None (default): as chance allows at 1 %.
        source_token: t* by "signed" contribution (default), "attention", or "gradient".
        neuron_score: of upstream neurons: "gradient" (default) or "screen".
        follow: lower heads along "gradient" (default) or "steering".
        gradients_at: "both" sides (default), "emotional", "neutral".
        flow_loss: of the "emotion words" of the answer (default), or of the whole "answer".
        enhance: factor on the circuit when its function is verified.
        tune: choose strengths of VEENA.
        objective: what is then maximised: "balanced" (default) or "hits".
    """

    seed: int = 0
    tau: float = 0.5
    pooled: bool = False
    alphas: tuple[float, ...] = ALPHAS
    inject_rows: Rows = "all"
    inject_reading: Reading = "raw"
    answered: int = 10
    draws: int = LEAST_DRAWS
    l_emo: int | None = None
    head_reads: Reads = "projection"
    head_rows: HeadRows = "all"
    top: int = 10
    margin: float = 0.01
    level: float = 0.05
    prescreen: str | None = None
    confirm: int = 64
    k: int = 10
    neurons: int = 30
    neuron_row: Row = "answer"
    neuron_activation: Activation = "difference"
    neuron_by: By = "all"
    fold_norm: bool = True
    spelling: Spelling = "words"
    look: int = 20
    explicit_k: int | None = None
    source_token: SourceToken = "signed"
    neuron_score: Score = "gradient"
    follow: Follow = "gradient"
    gradients_at: At = "both"
    flow_loss: Loss = "emotion words"
    enhance: float = 2.0
    tune: bool = True
    objective: Objective = "balanced"

    def require(self, subject: Subject) -> None:
        """Refuse what the model has not, before anything runs.

        Raises:
            ValueError: what is wrong, and what was expected.
        """
        layers, heads = subject.handle.geometry.layers, subject.handle.geometry.heads
        for name, value, known in (
            ("inject_rows", self.inject_rows, ROWS),
            ("inject_reading", self.inject_reading, READINGS),
            ("head_reads", self.head_reads, ("projection", "log-odds")),
            ("head_rows", self.head_rows, ("all", "last")),
            ("objective", self.objective, get_args(Objective)),
            *((name, getattr(self, name), get_args(kind)) for name, kind in READINGS_OF.items()),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
        for name, number, least, most in (
            ("seed", self.seed, 0, 2**32 - 1),
            ("answered", self.answered, 1, None),
            ("draws", self.draws, LEAST_DRAWS, None),
            ("top", self.top, 1, layers * heads),
            ("confirm", self.confirm, 1, None),
            ("k", self.k, 1, layers * heads),
            ("l_emo", self.l_emo, 0, layers - 1),
            ("neurons", self.neurons, 1, None),
            ("look", self.look, 1, None),
            ("explicit_k", self.explicit_k, 1, self.look),
        ):
            if number is not None and (number < least or (most is not None and number > most)):
                raise ValueError(f"{name}={number}: expected {least} to {most if most is not None else 'any more'}")
        if not 0 <= self.tau < 1 or not 0 < self.level < 1:
            raise ValueError(f"tau={self.tau}, level={self.level}: expected numbers from 0 to 1")
        if self.enhance <= 1:
            raise ValueError(f"enhance={self.enhance}: expected a factor above 1")
        if not self.alphas or len(set(self.alphas)) < len(self.alphas):
            raise ValueError(f"alphas={list(self.alphas)}: expected different numbers, at least one")
