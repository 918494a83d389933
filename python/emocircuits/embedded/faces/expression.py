"""What a face expresses: a small dictionary of channels, scaled by intensity.

A channel is one visible movement or mark (mouth corners up, inner brows up, a tear). Its value at intensity 1 stands in
``VARIANTS``; 0 or absence leaves the resting face alone. Each emotion has several variants, as people and emoji sets do
(a smile, a grin, a laugh with closed eyes), and each drawing re-weights and drops channels, so no single cue decides.
"""

from __future__ import annotations

import numpy as np

EMOTIONS = ("happy", "sad", "angry", "fear", "surprise", "disgust")
LABELS = (*EMOTIONS, "neutral")
Expression = dict[str, float]

# Mouth: curve (+ corners up), mopen (height of the opening), mwide, round (o-shape), flat (+ upper lip straight as in a
# laugh, - lower lip straight as in a wail), teeth, tongue, tongue_out, wave, asym, clench (band of teeth).
# Brows: bin / bout / blift (inner end, outer end, both up; signed), quirk (one brow up, signed).
# Eyes: wide, squint, droop, pupil, gaze (down), gaze_x, lid (+ closed arc of a smile, - closed arc of grief), cross
# (> <).
# Marks: blush, tears, stream, red, vein, steam, sweat, pale, blue (forehead), hands, wrinkle, green, vomit, puff,
# bar (a censored shout), joy (tears of laughter).
# fmt: off
VARIANTS: dict[str, list[tuple[float, Expression]]] = {
    "happy": [
        (3.0, {"curve": 0.66, "squint": 0.15, "blush": 0.6, "blift": 0.05}),
        (2.0, {"curve": 0.62, "mopen": 0.40, "mwide": 0.22, "squint": 0.28, "blush": 0.7, "blift": 0.05, "teeth": 0.8}),
        (2.0, {"curve": 0.55, "mopen": 0.80, "flat": 0.95, "mwide": 0.25, "teeth": 0.5, "tongue": 0.7, "lid": 1.0}),
        (2.0, {"curve": 0.50, "mopen": 0.80, "flat": 1.0, "mwide": 0.25, "teeth": 0.5, "tongue": 0.7, "blift": 0.10}),
        (2.0, {"curve": 0.62, "lid": 1.0, "blush": 0.9}),
        (1.0, {"curve": 0.50, "mopen": 0.80, "flat": 1.0, "mwide": 0.25, "teeth": 0.5, "tongue": 0.5, "cross": 1.0}),
        (1.5, {"curve": 0.60, "clench": 0.9, "mwide": 0.28, "lid": 0.8}),
        (0.7, {"curve": 0.62, "tongue_out": 0.8, "lid": 0.7, "mopen": 0.2}),
        (0.7, {"curve": 0.55, "mopen": 0.80, "flat": 1.0, "mwide": 0.25, "teeth": 0.6, "lid": 1.0, "joy": 1.0}),
    ],
    "sad": [
        (2.0, {"curve": -0.50, "mwide": -0.10, "bin": 0.28, "bout": -0.12, "droop": 0.45, "tears": 1.0, "gaze": 0.5}),
        (2.0, {"curve": -0.60, "bin": 0.30, "bout": -0.10, "gaze": 0.3}),
        (1.5, {"curve": -0.60, "mwide": 0.05}),
        (2.0, {"curve": -0.40, "mwide": -0.15, "bin": 0.24, "bout": -0.12, "lid": -1.0}),
        (2.0, {"mopen": 0.75, "flat": -0.9, "bin": 0.24, "lid": -0.9, "stream": 1.0, "tongue": 0.4, "curve": -0.2}),
        (1.0, {"curve": -0.50, "bin": 0.28, "bout": -0.10, "stream": 1.0, "droop": 0.3}),
        (1.2, {"curve": -0.50, "bin": 0.20, "bout": -0.12, "lid": 1.0}),
        (0.8, {"mopen": 0.70, "flat": -0.9, "bin": 0.24, "lid": 1.0, "stream": 1.0, "curve": -0.2}),
        (1.0, {"curve": -0.45, "bin": 0.30, "bout": -0.10, "droop": 0.5, "gaze": 0.7, "mwide": -0.2}),
    ],
    "angry": [
        (3.0, {"curve": -0.45, "bin": -0.38, "bout": 0.14, "blift": -0.12, "squint": 0.18}),
        (2.5, {"curve": -0.45, "bin": -0.38, "bout": 0.14, "blift": -0.12, "squint": 0.12, "red": 1.0}),
        (2.0, {"curve": -0.28, "mwide": 0.10, "bin": -0.36, "bout": 0.12, "blift": -0.12, "squint": 0.22,
            "red": 0.6, "vein": 1.0, "clench": 0.9}),
        (0.8, {"curve": -0.40, "bin": -0.38, "bout": 0.14, "blift": -0.12, "red": 0.9, "bar": 1.0}),
        (1.2, {"curve": -0.25, "bin": -0.36, "bout": 0.14, "blift": -0.10, "mopen": 0.6, "flat": -0.7,
            "teeth": 0.6, "red": 0.8}),
        (1.2, {"curve": -0.35, "bin": -0.36, "bout": 0.14, "blift": -0.10, "squint": 0.2, "steam": 1.0, "red": 0.3,
            "lid": -0.6}),
    ],
    "fear": [
        (2.0, {"curve": -0.20, "mopen": 0.38, "mwide": 0.16, "wave": 0.8, "bin": 0.30, "blift": 0.16, "wide": 0.45,
            "pupil": -0.45, "sweat": 1.0,
                   "pale": 0.6, "teeth": 0.7}),
        (2.5, {"curve": -0.50, "mopen": 0.45, "flat": -0.9, "bin": 0.32, "blift": 0.20, "wide": 0.45,
            "pupil": -0.35, "blue": 0.4}),
        (2.0, {"curve": -0.50, "mopen": 0.40, "flat": -0.8, "bin": 0.32, "blift": 0.15, "wide": 0.20, "sweat": 1.2,
            "blue": 1.0}),
        (2.0, {"mopen": 1.10, "round": 0.8, "mwide": -0.35, "wide": 0.40, "pupil": -0.4, "blue": 1.0, "hands": 1.0,
            "pale": 0.5, "bin": 0.3, "blift": 0.2}),
        (1.0, {"mopen": 1.1, "round": 0.8, "mwide": -0.4, "wide": 0.5, "pupil": -1.4, "hands": 1.0, "blue": 0.8}),
        (1.0, {"curve": -0.30, "wave": 0.8, "bin": 0.32, "blift": 0.10, "wide": 0.3, "pupil": -0.4, "sweat": 1.0,
            "clench": 0.5}),
    ],
    "surprise": [
        (2.5, {"mopen": 0.95, "mwide": -0.42, "round": 1.0, "blift": 0.36, "wide": 0.50}),
        (2.5, {"mopen": 0.60, "mwide": -0.50, "round": 1.0, "blift": 0.15, "wide": 0.15}),
        (2.0, {"mopen": 0.50, "mwide": -0.55, "round": 1.0, "blift": 0.38, "bout": 0.03}),
        (1.5, {"mopen": 0.90, "mwide": -0.20, "round": 1.0, "blift": 0.34, "wide": 0.45, "teeth": 0.5, "blush": 0.4}),
    ],
    "disgust": [
        (2.0, {"curve": -0.30, "asym": 0.55, "squint": 0.45, "bin": -0.16, "blift": -0.08, "wrinkle": 1.0,
            "green": 0.5, "tongue_out": 0.7, "mopen": 0.15}),
        (2.5, {"curve": -0.35, "wave": 0.5, "green": 1.1, "squint": 0.25, "bin": 0.10, "puff": 0.8}),
        (2.5, {"cross": 1.0, "vomit": 1.0, "green": 0.6, "mopen": 0.4, "bin": -0.05}),
        (1.2, {"curve": -0.45, "tongue_out": 1.0, "cross": 0.8, "bin": -0.12, "wrinkle": 0.6, "mopen": 0.2}),
        (1.2, {"curve": -0.35, "asym": 0.95, "squint": 0.50, "bin": -0.14, "wrinkle": 1.0, "green": 0.4}),
    ],
    "neutral": [(1.0, {})],
}
# fmt: on
# marks that real drawings often leave out
OPTIONAL = frozenset(
    (
        "tears",
        "blush",
        "vein",
        "red",
        "sweat",
        "pale",
        "blue",
        "green",
        "wrinkle",
        "tongue_out",
        "teeth",
        "hands",
        "puff",
        "steam",
    )
)
CHANNELS: tuple[str, ...] = tuple(
    sorted({c for v in VARIANTS.values() for _, ex in v for c in ex} | {"quirk", "gaze_x", "asym"})
)
STIR = 1.0  # strength of the movements that tell that something is felt, but not what (see sample_expression)


def check_emotion(emotion: str) -> str:
    """Return ``emotion``; raise ValueError if it is no label of this model."""
    if emotion not in LABELS:
        raise ValueError(f"unknown emotion {emotion!r}: expected one of {', '.join(LABELS)}")
    return emotion


def sample_expression(emotion: str, intensity: float, rng: np.random.Generator) -> Expression:
    """Draw one expression of ``emotion`` at ``intensity`` in [0, 1]; neutral and intensity 0 give ``{}``.

    The channels that name the emotion grow in proportion to intensity. Beside them every emotional face carries a
    *stir* (a lopsided mouth, one raised brow, a look aside) that fades as intensity grows: a weak face shows that its
    owner feels something without telling what, which is where a viewer falls back on what the text suggests.
    """
    check_emotion(emotion)
    if not 0.0 <= intensity <= 1.0:
        raise ValueError(f"intensity is {intensity}: expected a number in [0, 1], 0 being the resting face")
    if emotion == "neutral" or intensity == 0.0:
        return {}
    variants = VARIANTS[emotion]
    weights = np.array([w for w, _ in variants])
    out: Expression = {}
    chosen = variants[rng.choice(len(variants), p=weights / weights.sum())][1]
    for channel, value in chosen.items():
        weight = rng.uniform(0.65, 1.2)
        if channel in OPTIONAL and rng.random() < 0.25:
            weight = 0.0
        out[channel] = value * weight * intensity
    fade = STIR * (1.0 - 0.85 * intensity)
    side = 1.0 if rng.random() < 0.5 else -1.0
    out["quirk"] = 0.22 * side * fade * rng.uniform(0.6, 1.2)
    out["gaze_x"] = 0.55 * (1.0 if rng.random() < 0.5 else -1.0) * fade * rng.uniform(0.5, 1.2)
    out["asym"] = out.get("asym", 0.0) + 0.30 * (1.0 if rng.random() < 0.5 else -1.0) * fade * rng.uniform(0.4, 1.2)
    return out
