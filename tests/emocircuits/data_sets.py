"""Small sets of pairs for the tests: drawn faces with events, written as one would by hand."""

import json

import numpy as np
from PIL import Image

from emocircuits.embedded import faces

EVENTS = (
    "my mom said that the shop opens at ten.",
    "I put the wet umbrella by the door before dinner.",
    "the neighbor moved the chairs to the hall at noon.",
    "we walked from the station to the office on monday.",
    "my cousin wrote a letter about the new bridge.",
    "the teacher closed the window and read the list.",
    "I carried the boxes from the car to the kitchen.",
    "a man at the market sold bread and apples.",
)


def pair(number, folder, emotion="sad", intensity=1.0):
    """Two files of one face; returns their names."""
    who = 110_000 + number
    names = f"{number}-{emotion}.png", f"{number}-neutral.png"
    faces.face(who, emotion, intensity).save(folder / names[0])
    faces.face(who, "neutral", 0.0).save(folder / names[1])
    return names


def record(number, folder, split="extract", **changed):
    """A good record, as it stands in a manifest; ``changed`` replaces fields, and None takes one away."""
    emotion = changed.get("emotion", "sad")
    a, b = pair(number, folder, emotion if emotion in faces.EMOTIONS else "sad")
    good = {
        "id": f"r{number}", "emotion": "sad", "image_emotional": a, "image_neutral": b, "event": EVENTS[number],
        "split": split, "source": "drawn", "licence": "CC0-1.0",
    } | changed  # fmt: skip
    return {k: v for k, v in good.items() if v is not None}


def write(folder, records, name="pairs.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def good(folder):
    """Records of a manifest in which nothing is wrong: two pairs in each split."""
    return [record(i, folder, "extract" if i < 2 else "analyze") for i in range(4)]


def texture(seed, size=(160, 120)):
    """A picture like a photograph: smooth at all scales, in colour."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for side in (3, 6, 12, 24, 48, max(size) // 4):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), float) / min(side, 24)
    total = (total - total.min()) / (total.max() - total.min())
    return Image.fromarray((total * 255).astype(np.uint8))
