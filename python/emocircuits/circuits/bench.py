"""What settings of VEENA are tried on: hits, harm, fluency, general ability, and the guard rails."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence

import numpy as np
import torch

from emocircuits.circuits.answering import Fluency, Said, say
from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.questions import Question, ability
from emocircuits.circuits.subject import Subject
from emocircuits.plan import Plan


@dc.dataclass(frozen=True)
class Rates:
    """What a setting did.

    Attributes:
        hit: share of X+ whose emotion is named.
        kept: the same among those X+ that the model left alone reads correctly (1 where there are none).
        calm: share of X- in whose answer no emotion is named (the neutral one is none).
        perplexity: of the answers to both sides under the unmodified model, a token.
        ratio: of it to that of the unmodified model's own answers.
        unfinished: share of answers that did not end within the limit.
        ability: share of the questions that are answered exactly; None without questions.
    """

    hit: float
    kept: float
    calm: float
    perplexity: float
    ratio: float
    unfinished: float
    ability: float | None


def balanced(rates: Rates) -> float:
    """Half the hits, half the mean of what a boost can only harm: X+ that was read correctly, and X-."""
    return (rates.hit + (rates.kept + rates.calm) / 2) / 2


def hits(rates: Rates) -> float:
    """The hits alone."""
    return rates.hit


OBJECTIVES: dict[str, Callable[[Rates], float]] = {"balanced": balanced, "hits": hits}


@dc.dataclass(frozen=True)
class Rails:
    """What a setting may cost.

    Attributes:
        ratio: highest perplexity, as a multiple of the unmodified model's. Another emotion word surprises it too: in an
            answer of ten words once, in one of a single word every time; answers that short need a higher limit.
        unfinished: how much the share of unfinished answers may rise.
        ability: how much the share of questions that are answered exactly may fall.
    """

    ratio: float = 1.5
    unfinished: float = 0.1
    ability: float = 0.05

    def broken(self, rates: Rates, base: Rates) -> tuple[str, ...]:
        """What a setting breaks, in words."""
        found = []
        if rates.ratio > self.ratio:
            found.append(f"perplexity {rates.ratio:.2f} times that of the unmodified model, limit {self.ratio:g}")
        if rates.unfinished > base.unfinished + self.unfinished + 1e-9:
            found.append(f"{rates.unfinished:.2f} of the answers do not end, without it {base.unfinished:.2f}")
        able, before = rates.ability, base.ability
        if able is not None and before is not None and able < before - self.ability - 1e-9:
            found.append(f"{able:.2f} of the questions answered, without it {before:.2f}")
        return tuple(found)


class Bench:
    """Pairs and questions on which plans are tried; the first plan must be empty.

    Attributes:
        hits, calm: ``[plans, pairs]`` of the last call of :meth:`rates`; `texts` its answers to X+, by plan and pair.
    """

    def __init__(
        self, subject: Subject, pairs: Pairs, questions: Sequence[Question], batch: int | None, progress: bool
    ) -> None:
        self.subject, self.pairs, self.questions = subject, pairs, questions
        self.batch, self.progress = batch, progress
        self.fluency = Fluency(subject, pairs)
        ends = getattr(subject.model.generation_config, "eos_token_id", None)
        self.ends = {*(ends if isinstance(ends, list) else [ends]), subject.tokenizer.eos_token_id}
        self.hits = self.calm = np.zeros((0, len(pairs)))
        self.texts: tuple[tuple[str, ...], ...] = ()
        self._ability: dict[Plan, float] = {}

    @torch.no_grad()
    def rates(self, plans: Sequence[Plan]) -> list[Rates]:
        """What each plan did."""
        subject, emotions = self.subject, self.pairs.emotions
        plus, minus = (
            say(subject, self.pairs, side, plans, batch=self.batch, progress=self.progress)
            for side in ("emotional", "neutral")
        )
        self.texts = plus.texts
        self.hits = plus.rates(lambda texts: subject.hits(texts, emotions))
        self.calm = minus.rates(self._calm)
        perplexity = self.fluency.perplexity(plus, minus)
        right = self.hits[0] > 0.5
        unfinished = (self._unfinished(plus) + self._unfinished(minus)) / 2
        return [
            Rates(
                float(h.mean()), float(h[right].mean()) if right.any() else 1.0, float(c.mean()), float(p),
                float(p / perplexity[0]), float(u), self._able(plan),
            )
            for h, c, p, u, plan in zip(self.hits, self.calm, perplexity, unfinished, plans, strict=True)
        ]  # fmt: skip

    def _calm(self, texts: Sequence[str]) -> np.ndarray:
        lexicon = self.subject.lexicon
        return np.array([all(e == lexicon.neutral for e in lexicon.found(t)) for t in texts], float)

    def _unfinished(self, said: Said) -> np.ndarray:
        return np.array([np.mean([not ids or ids[-1] not in self.ends for ids in row]) for row in said.ids])

    def _able(self, plan: Plan) -> float | None:
        if not self.questions:
            return None
        if plan not in self._ability:
            self._ability[plan] = float(ability(self.subject, self.questions, plan).mean())
        return self._ability[plan]
