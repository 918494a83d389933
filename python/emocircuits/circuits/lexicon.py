"""Which words name which emotion: what an answer said, and which tokens begin an emotion word."""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

NEGATIONS = frozenset({"not", "no", "never", "without", "hardly", "nor", "neither", "cannot"})
REACH = 2
"""A negation takes back emotion words so many words after it: "not happy", "not very happy"."""

# Our own list, of words that people use for feelings. It is for finding circuits, not for scoring benchmarks.
ENGLISH: dict[str, str] = {
    "happy": "happy happiness happily joy joyful joyous glad gladness pleased pleasure delighted delight delightful "
    "cheerful cheer cheery content contented elated elation ecstatic thrilled overjoyed merry blissful bliss excited "
    "excitement enthusiastic smiling grateful amused amusement upbeat jolly",
    "sad": "sad sadness sadly unhappy unhappiness sorrow sorrowful grief grieving gloomy gloom melancholy melancholic "
    "depressed depressing depression heartbroken heartbreak mournful miserable misery tearful crying dejected downcast "
    "despair despairing hopeless disappointed disappointment lonely loneliness upset hurt",
    "angry": "angry anger angrily mad rage raging furious fury irritated irritation irritable annoyed annoyance "
    "frustrated frustration outraged outrage hostile hostility resentful resentment enraged indignant indignation "
    "infuriated aggressive bitter",
    "fear": "fear fearful afraid scared scary frightened frightening terrified terror anxious anxiety worried worry "
    "nervous nervousness uneasy unease panic panicked dread alarmed horrified horror apprehensive apprehension tense",
    "surprise": "surprise surprised surprising surprisingly amazed amazement astonished astonishment stunned shocked "
    "shock startled bewildered awe wonder disbelief speechless",
    "disgust": "disgust disgusted disgusting revolted revulsion repulsed repulsion sickened nauseated nauseous nausea "
    "grossed gross distaste aversion loathing contempt repelled",
    "neutral": "neutral neutrality calm calmness calmly composed composure indifferent indifference steady "
    "expressionless unemotional impassive serene relaxed",
}


@dc.dataclass(frozen=True)
class Lexicon:
    """Emotion words.

    Args:
        words: emotion -> its words, lower case, one word each.
        neutral: the emotion that means none, or None; it is not among `emotions`.
        name: for results, so that one can tell which list gave a number.
    """

    words: Mapping[str, Collection[str]]
    neutral: str | None = "neutral"
    name: str = "own"

    def __post_init__(self) -> None:
        clean = {str(e): frozenset(str(w).lower().strip() for w in words) for e, words in self.words.items()}
        for emotion, words in clean.items():
            wrong = sorted(w for w in words if not re.fullmatch(r"[^\W\d_]+", w))
            if not words or wrong:
                raise ValueError(f"lexicon: {emotion!r} has {wrong or 'no words'}; expected single words of letters")
        shared = sorted(w for w in set().union(*clean.values()) if sum(w in ws for ws in clean.values()) > 1)
        if shared:
            raise ValueError(f"lexicon: {', '.join(shared[:5])} would name several emotions; a word names one")
        object.__setattr__(self, "words", MappingProxyType(clean))

    @classmethod
    def english(cls) -> Lexicon:
        """Six emotions and neutral, some 200 words: our own list."""
        return cls({e: words.split() for e, words in ENGLISH.items()}, name="emocircuits-english")

    @classmethod
    def embedded(cls) -> Lexicon:
        """What the embedded model can say."""
        from emocircuits.embedded import language

        return cls(language.LEXICON, name="embedded")

    @property
    def emotions(self) -> tuple[str, ...]:
        """All emotions but neutral, in the order given."""
        return tuple(e for e in self.words if e != self.neutral)

    @cached_property
    def _emotion(self) -> dict[str, str]:
        return {w: e for e, words in self.words.items() for w in words}

    def spans(self, text: str) -> list[tuple[int, int, str]]:
        """``(start, end, emotion)`` of the emotion words in ``text``, in order; negated ones are left out."""
        tokens = list(re.finditer(r"[^\W\d_]+(?:['’][tT]\b)?", text))
        words = [t.group().lower() for t in tokens]
        negated = [w in NEGATIONS or w.endswith(("n't", "n’t")) for w in words]
        return [
            (t.start(), t.end(), self._emotion[w])
            for i, (t, w) in enumerate(zip(tokens, words, strict=True))
            if w in self._emotion and not any(negated[max(0, i - REACH) : i])
        ]

    def found(self, text: str) -> list[str]:
        """Emotions named in ``text``, in order, repeats kept; negated ones ("not happy", "isn't happy") are not."""
        return [emotion for *_, emotion in self.spans(text)]

    def hit(self, text: str, emotion: str) -> float:
        """1.0 where ``text`` names ``emotion`` anywhere, else 0.0: the hit rate of one answer with one gold label.

        Raises:
            ValueError: an emotion that the lexicon does not have.
        """
        self.require(emotion)
        return float(emotion in self.found(text))

    def require(self, emotion: str) -> None:
        """Refuse an unknown emotion."""
        if emotion not in self.words:
            raise ValueError(f"unknown emotion {emotion!r}: the lexicon {self.name!r} has {', '.join(self.words)}")

    def first_tokens(self, tokenizer: Any, emotion: str) -> Tensor:
        """Ids ``[n]`` of the first sub-token of each of the emotion's words, as they stand inside a sentence.

        A sub-token that also begins words of another emotion says nothing and is left out.

        Raises:
            ValueError: an unknown emotion, or none of its words begins with a token of its own.
        """
        self.require(emotion)
        by_emotion = self._first(tokenizer)
        others = set().union(*(ids for e, ids in by_emotion.items() if e != emotion))
        ids = sorted(by_emotion[emotion] - others)
        if not ids:
            raise ValueError(
                f"no word of {emotion!r} begins with a token of its own in this tokenizer; give a lexicon with others"
            )
        return torch.tensor(ids)

    def beginnings(self, tokenizer: Any) -> set[int]:
        """Ids of all tokens that begin some word of the lexicon, the neutral ones and shared ones too."""
        return set().union(*self._first(tokenizer).values())

    def _first(self, tokenizer: Any) -> dict[str, set[int]]:
        unknown = tokenizer.unk_token_id
        found: dict[str, set[int]] = {}
        for emotion, words in self.words.items():
            ids: set[int] = set()
            for word in words:
                for text in (f" {word}", f" {word.capitalize()}"):
                    # SentencePiece tokenizers give the word mark alone before a word that they do not know whole.
                    pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
                    kept = [p for p in pieces if tokenizer.decode([p]).strip()]
                    if kept and kept[0] != unknown:
                        ids.add(int(kept[0]))
            found[emotion] = ids
        return found
