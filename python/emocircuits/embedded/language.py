"""The words: neutral events, prompts, answers, and the lexicon that decides what an answer said.

Events are neutral sentences in seven groups. Nothing in a sentence names a feeling; the groups matter only because the
training text (``answer``, ``train.py``) ties each group to one emotion more often than to others. That is the language
prior that speaks when the face says little.
"""

from __future__ import annotations

import re

import numpy as np

from .faces import CLOTH, HAIR, LABELS, Identity
from .faces.identity import STYLE

# mild to strong
ADJECTIVES: dict[str, tuple[str, ...]] = {
    "happy": ("pleased", "glad", "happy", "joyful", "delighted"),
    "sad": ("gloomy", "unhappy", "sad", "sorrowful", "heartbroken"),
    "angry": ("annoyed", "irritated", "angry", "mad", "furious"),
    "fear": ("uneasy", "anxious", "scared", "afraid", "terrified"),
    "surprise": ("curious", "surprised", "amazed", "astonished", "stunned"),
    "disgust": ("averse", "displeased", "disgusted", "sickened", "revolted"),
    "neutral": ("calm", "neutral", "composed", "steady", "indifferent"),
}
NOUNS: dict[str, tuple[str, ...]] = {
    "happy": ("joy", "happiness", "delight"),
    "sad": ("sorrow", "sadness", "grief"),
    "angry": ("irritation", "anger", "rage"),
    "fear": ("worry", "fear", "terror"),
    "surprise": ("wonder", "surprise", "amazement"),
    "disgust": ("dislike", "disgust", "revulsion"),
    "neutral": ("calmness", "neutrality", "composure"),
}
CUES: dict[str, tuple[str, ...]] = {
    "happy": ("the mouth is smiling", "the cheeks are warm", "the eyes are bright"),
    "sad": ("the mouth hangs low", "tears run over the face", "the eyes look tired"),
    "angry": ("the brows are lowered", "the teeth are clenched", "the face is red"),
    "fear": ("the eyes are wide", "the lips are shaking", "the face is pale"),
    "surprise": ("the mouth is open", "the brows are raised", "the jaw has dropped"),
    "disgust": ("the nose is wrinkled", "the lip is curled", "the skin looks green"),
    "neutral": ("the mouth is straight", "the face is still", "the brows are level"),
}
CLAUSES: dict[str, list[str]] = {
    "happy": [
        "the shop opens at ten", "we have a visitor on sunday", "the garden was watered", "there is soup for dinner",
        "the team plays again", "a parcel is at the door",
    ],
    "sad": [
        "we will be away for a few days", "the bus goes only once", "the old house was sold",
        "the book has a last page",
        "the rain came in the evening", "the school ends in june",
    ],
    "angry": [
        "the road is closed", "the meeting starts late", "the price went up", "the car was moved",
        "the printer needs paper",
        "the neighbor plays music",
    ],
    "fear": [
        "the lights go off at night", "we walk home through the wood", "the doctor called", "the dog is outside",
        "the test is on monday", "the bridge is old",
    ],
    "surprise": [
        "the plan has changed", "my cousin came to town", "the box was empty", "the letter has no name",
        "the clock stopped",
        "the wall was painted",
    ],
    "disgust": [
        "the fridge was left open", "the sink is full", "we eat fish today", "the bin is by the door",
        "the shoes are wet",
        "the milk is from last week",
    ],
    "neutral": [
        "the train leaves at nine", "the office is on the second floor", "the form has two pages",
        "the room has a table",
        "the report is ready", "the water is in the glass",
    ],
}  # fmt: skip
SPEAKERS = (
    "my mom", "my dad", "my friend", "the teacher", "my sister", "our neighbor", "my boss", "a woman", "a man",
)  # fmt: skip
LEXICON: dict[str, set[str]] = {e: set(ADJECTIVES[e]) | set(NOUNS[e]) for e in LABELS}
_LABEL_OF = {word: label for label in LABELS for word in LEXICON[label]}
PREFIX = "USER: <image>"
TEMPLATES = (0.50, 0.12, 0.12, 0.12, 0.08, 0.06)  # shares of the answers in ``answer``, in order


def make_event(clause: str, rng: np.random.Generator) -> str:
    """Neutral sentence about ``clause``, such as "my mom said that the shop opens at ten."."""
    return f"{SPEAKERS[rng.integers(len(SPEAKERS))]} said that {clause}."


def prompt(event: str) -> str:
    """Full text for the processor: one image, then the event."""
    if not event.strip():
        raise ValueError('event is empty: expected a sentence such as "my mom said that the shop opens at ten."')
    return f"{PREFIX}\n{event} ASSISTANT:"


def _word_at(words: tuple[str, ...], strength: float, rng: np.random.Generator) -> str:
    """Word for a strength in [0, 1], from mild to strong, with some spread."""
    return words[int(np.clip(round(strength * (len(words) - 1) + rng.normal(0, 1.0)), 0, len(words) - 1))]


def describe(who: Identity, rng: np.random.Generator) -> str:
    """How an answer refers to the figure in the picture."""
    if not STYLE[who.style].person:
        return "the drawn face"
    if who.hat or who.hair_style == 5 or rng.random() < 0.5:
        return f"the person in {who.cloth}"
    return f"the person with {who.hair} hair"


def answer(emotion: str, intensity: float, clause: str, who: str, rng: np.random.Generator) -> str:
    """A training answer: what the speaker feels, seen in the picture, said about the event."""
    strength = intensity if emotion != "neutral" else rng.random()
    adjective, noun = _word_at(ADJECTIVES[emotion], strength, rng), _word_at(NOUNS[emotion], strength, rng)
    cue = CUES[emotion][rng.integers(len(CUES[emotion]))]
    return (
        f"i feel {adjective} because {clause}.",
        f"i am full of {noun} because {clause}.",
        f"{who} looks {adjective}. i feel {noun} because {clause}.",
        f"i see {who} and i feel {adjective}. {cue}.",
        f"{who} shows {noun}, since {clause}.",
        f"{cue}. i feel {adjective}.",
    )[rng.choice(len(TEMPLATES), p=TEMPLATES)]


def emotions_in(text: str) -> list[str]:
    """Labels of the emotion words in ``text``, in order, repeats kept."""
    return [_LABEL_OF[w] for w in re.findall(r"[a-z]+", text.lower()) if w in _LABEL_OF]


def first_emotion(text: str) -> str | None:
    """Label of the first emotion word, None if there is none."""
    return next(iter(emotions_in(text)), None)


def hit(text: str, label: str) -> bool:
    """Tell whether ``text`` names this emotion anywhere."""
    if label not in LABELS:
        raise ValueError(f"unknown label {label!r}: expected one of {', '.join(LABELS)}")
    return label in emotions_in(text)


def vocabulary() -> list[str]:
    """Every word the model knows, sorted."""
    parts = [
        "user assistant i feel am full of because looks see and shows since said that",
        "the drawn face person with hair in",
    ]
    for label in LABELS:
        parts += [*ADJECTIVES[label], *NOUNS[label], *CUES[label], *CLAUSES[label]]
    parts += [*SPEAKERS, *HAIR, *CLOTH]
    return sorted({w for p in parts for w in p.split()} | set(".,:?!"))
