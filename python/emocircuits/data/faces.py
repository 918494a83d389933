"""Pairs of drawn faces, for the embedded model: pictures, masks, a manifest, and an evaluation set beside it.

Each split has identities and event clauses of its own. A pair is a face with an expression and the same face at rest.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from emocircuits.data.hashes import Fingerprints, assemble, image_hash, overlap
from emocircuits.data.pairs import SPLITS, Manifest, Record
from emocircuits.embedded import faces, language

FIRST = 102_000
"""Identities from here on: the training, the model card and the demo have none of them."""
EACH = 1000
"""Identities that each split may draw from."""
SOURCE = "emocircuits.embedded.faces"
LICENCE = "Apache-2.0"
EVENTS = ("contradicting", "agreeing", "any")


@dc.dataclass(frozen=True)
class Built:
    """What was written.

    Attributes:
        pairs: manifest of the splits `extract` and `analyze`.
        evaluation: manifest of the split `evaluate`.
        identities: of each split.
        left_out: identities that look like one of another split, and were not used.
    """

    pairs: Path
    evaluation: Path
    identities: dict[str, list[int]]
    left_out: list[int]


def build_faces(
    folder: str | Path, *, identities: int = 20, emotions: Sequence[str] = faces.EMOTIONS,
    intensities: Sequence[float] = (1.0,), events: str = "contradicting", seed: int = 0, progress: bool = False,
) -> Built:  # fmt: skip
    """Draw pairs of faces.

    Args:
        folder: where to write ``pairs.jsonl``, ``evaluate.jsonl`` and ``images/``; made if there is none.
        identities: in each split.
        emotions: one record of each, for each identity and intensity.
        intensities: of the expressions, above 0 and at most 1.
        events: whether the event suggests another emotion than the face's ("contradicting"), its own ("agreeing"), or
            is drawn from all groups ("any"). What it suggests stands in the record's ``extra``.
        seed: of the events.
        progress: show a bar.

    Raises:
        ValueError: the folder has pairs already; or an argument is out of its range.
    """
    folder = Path(folder)
    _validate(identities, emotions, intensities, events)
    for name in ("pairs.jsonl", "evaluate.jsonl"):
        if (folder / name).exists():
            raise ValueError(f"{folder / name} exists; name a new folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a folder")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    used: dict[str, list[int]] = {}
    left_out: list[int] = []
    records: dict[str, list[Record]] = {}
    taken = assemble([], [])
    bar = tqdm(total=identities * len(SPLITS), desc="draw faces", disable=not progress)
    for number, split in enumerate(SPLITS):
        rng = np.random.default_rng([seed, number])
        records[split], used[split], own = [], [], assemble([], [])
        for identity in range(FIRST + number * EACH, FIRST + (number + 1) * EACH):
            drawn = _draw(identity, emotions, intensities)
            prints = assemble(((f"{identity}", image_hash(image)) for image in drawn.values()), [])
            if overlap(prints, taken):
                left_out.append(identity)
                continue
            own["images"] += prints["images"]
            records[split] += _write(folder, split, identity, drawn, events, number, rng)
            used[split].append(identity)
            bar.update()
            if len(used[split]) == identities:
                break
        else:
            raise ValueError(f"only {len(used[split])} identities of {split} look like none of another split; ask less")
        taken = _joined(taken, own)
    bar.close()
    # The manifests come last: a build that was interrupted has none.
    pairs = Manifest((*records["extract"], *records["analyze"]), folder / "pairs.jsonl").save()
    evaluation = Manifest(tuple(records["evaluate"]), folder / "evaluate.jsonl").save()
    return Built(pairs, evaluation, used, left_out)


def _validate(identities: int, emotions: Sequence[str], intensities: Sequence[float], events: str) -> None:
    if not 1 <= identities <= EACH:
        raise ValueError(f"identities is {identities}: expected 1 to {EACH} in each split")
    unknown = [e for e in emotions if e not in faces.EMOTIONS]
    if unknown or not emotions or len(set(emotions)) < len(emotions):
        raise ValueError(f"emotions {list(emotions)}: expected some of {', '.join(faces.EMOTIONS)}, each once")
    levels = {round(100 * t) for t in intensities}
    if not intensities or not all(0.01 <= t <= 1 for t in intensities) or len(levels) < len(intensities):
        raise ValueError(f"intensities {list(intensities)}: expected different ones from 0.01 to 1")
    if events not in EVENTS:
        raise ValueError(f"events is {events!r}: expected one of {', '.join(EVENTS)}")


def _draw(identity: int, emotions: Sequence[str], intensities: Sequence[float]) -> dict[tuple[str, float], Image.Image]:
    drawn = {("neutral", 0.0): faces.face(identity, "neutral", 0.0)}
    return drawn | {(e, t): faces.face(identity, e, t) for e in emotions for t in intensities}


def _write(
    folder: Path, split: str, identity: int, drawn: dict[tuple[str, float], Image.Image], events: str, part: int,
    rng: np.random.Generator,
) -> Iterator[Record]:  # fmt: skip
    def put(image: Image.Image, name: str) -> Path:
        path = folder / "images" / f"{identity}-{name}.png"
        image.save(path)
        return path

    twin = drawn["neutral", 0.0]
    neutral = put(twin, "neutral")
    for (emotion, intensity), image in drawn.items():
        if emotion == "neutral":
            continue
        name = f"{emotion}-{round(100 * intensity):03d}"
        touched = (np.asarray(image) != np.asarray(twin)).any(-1)
        others = [e for e in faces.EMOTIONS if e != emotion]
        groups = {"contradicting": others, "agreeing": [emotion], "any": list(faces.LABELS)}[events]
        suggests = groups[int(rng.integers(len(groups)))]
        # Every third clause of each group: no clause is in two splits.
        clauses = language.CLAUSES[suggests][part :: len(SPLITS)]
        yield Record(
            f"{identity}-{name}", emotion, put(image, name), neutral,
            language.make_event(clauses[int(rng.integers(len(clauses)))], rng), split, SOURCE, LICENCE,
            put(Image.fromarray(touched.astype(np.uint8) * 255), f"{name}-mask"),
            {"identity": identity, "intensity": float(intensity), "suggests": suggests},
        )  # fmt: skip


def _joined(a: Fingerprints, b: Fingerprints) -> Fingerprints:
    return {"kind": a["kind"], "images": [*a["images"], *b["images"]], "events": []}
