"""Faces with events, in the situations that the demo measures, and greedy answers to them.

Every case belongs to one held-out identity. Ranking, choosing and reporting use three disjoint ranges of identities.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from emocircuits.embedded import faces, language

WEAK = (0.15, 0.25, 0.35)
LEVELS = (0.15, 0.25, 0.35, 0.5, 0.75, 1.0)
FIRST = 101_000
"""Identities from here on were seen neither in training nor by the model card."""


@dc.dataclass(frozen=True)
class Case:
    """One face with one event. ``suggests`` is the emotion that the training prior ties to the event."""

    identity: int
    emotion: str
    intensity: float
    suggests: str
    event: str

    @property
    def image(self) -> Image.Image:
        """The drawn face."""
        return faces.face(self.identity, self.emotion, self.intensity)

    @property
    def prompt(self) -> str:
        """The whole prompt text."""
        return language.prompt(self.event)


def identities(part: str, each: int) -> range:
    """Disjoint ranges of identities for the parts ``rank``, ``choose`` and ``report``, ``each`` long (at most 300)."""
    parts = ("rank", "choose", "report")
    if part not in parts or not 0 < each <= 300:
        raise ValueError(f"part={part!r}, each={each}: expected one of {', '.join(parts)} and 1 to 300 identities")
    start = FIRST + 300 * parts.index(part)
    return range(start, start + each)


def _event(suggests: str, rng: np.random.Generator) -> str:
    clauses = language.CLAUSES[suggests]
    return language.make_event(clauses[int(rng.integers(len(clauses)))], rng)


def contradicting(people: Sequence[int], levels: Sequence[float], seed: int) -> list[Case]:
    """Emotional faces whose event suggests another emotion."""
    rng = np.random.default_rng(seed)
    cases = []
    for person in people:
        for emotion in faces.EMOTIONS:
            suggests = str(rng.choice([e for e in faces.EMOTIONS if e != emotion]))
            event = _event(suggests, rng)
            cases += [Case(person, emotion, level, suggests, event) for level in levels]
    return cases


def agreeing(people: Sequence[int], levels: Sequence[float], seed: int) -> list[Case]:
    """Emotional faces whose event suggests the same emotion."""
    rng = np.random.default_rng(seed)
    return [Case(p, e, t, e, _event(e, rng)) for p in people for e in faces.EMOTIONS for t in levels]


def neutral(people: Sequence[int], seed: int) -> list[Case]:
    """Neutral faces, each with an event for every emotion."""
    rng = np.random.default_rng(seed)
    return [Case(p, "neutral", 0.0, e, _event(e, rng)) for p in people for e in faces.EMOTIONS]


class Prompts:
    """Cases as model inputs, sorted by length so that batches hold little padding; made once, used for many plans."""

    def __init__(self, cases: Sequence[Case], processor: Any, *, size: int = 150, answer: str = "") -> None:
        self.cases = list(cases)
        texts = [c.prompt + answer for c in cases]
        lengths = [len(t) for t in texts]
        self.order = sorted(range(len(cases)), key=lambda i: lengths[i])
        self.batches: list[dict[str, Tensor]] = []
        for start in range(0, len(cases), size):
            chosen = self.order[start : start + size]
            inputs = processor(
                images=[cases[i].image for i in chosen],
                text=[texts[i] for i in chosen],
                padding=True,
                return_tensors="pt",
            )
            self.batches.append({k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")})

    def __len__(self) -> int:
        return len(self.cases)


@torch.no_grad()
def answers(model: nn.Module, processor: Any, prompts: Prompts, *, tokens: int = 20) -> list[str]:
    """Greedy answers, in the order of the cases."""
    texts: list[str] = []
    for inputs in prompts.batches:
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
        texts += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ordered = [""] * len(texts)
    for position, text in zip(prompts.order, texts, strict=True):
        ordered[position] = text
    return ordered


@dc.dataclass(frozen=True)
class Scores:
    """What was said: ``hit [n]`` the face's own emotion is named; ``prior [n]`` the event's is named first."""

    texts: list[str]
    hit: np.ndarray
    prior: np.ndarray

    @classmethod
    def of(cls, cases: Sequence[Case], texts: list[str]) -> Scores:
        """Score answers against their cases."""
        first = [language.first_emotion(t) for t in texts]
        hit = np.array([language.hit(t, c.emotion) for t, c in zip(texts, cases, strict=True)])
        prior = np.array([f == c.suggests != c.emotion for f, c in zip(first, cases, strict=True)])
        return cls(texts, hit, prior)
