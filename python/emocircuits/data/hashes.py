"""What a set of pictures and events is known by, so that two sets can be told to overlap.

A picture's fingerprint is the perceptual hash of the library ImageHash (a discrete cosine transform of the picture at
64 x 64, the signs of its 16 x 16 lowest frequencies against their median): 256 bits that survive re-encoding, resizing
and a change of brightness. An event's is SHA-256 of its normalised text. docs/data.md has the measured error rates.
"""

from __future__ import annotations

import dataclasses as dc
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import imagehash
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from emocircuits.data.pairs import Manifest, Record, read
from emocircuits.data.pictures import open_image
from emocircuits.files import read_json

SIDE = 16
BITS = SIDE * SIDE
NEAR = 32
"""Two pictures are the same one when at most so many of their 256 bits differ."""
KIND = f"phash-{BITS}"
BLOCK = 512


class Entry(TypedDict):
    """One picture or event: what to call it, and its hash in hexadecimal digits."""

    name: str
    hash: str


class Fingerprints(TypedDict):
    """A set of pictures and events; plain JSON. `kind` is that of the image hashes."""

    kind: str
    images: list[Entry]
    events: list[Entry]


@dc.dataclass(frozen=True)
class Match:
    """A member of one set that is in another too; `distance` in bits, 0 for texts."""

    a: str
    b: str
    distance: int = 0


@dc.dataclass(frozen=True)
class Overlap:
    """What two sets share: each member of the first once, with its nearest in the second. False when nothing is."""

    images: tuple[Match, ...]
    events: tuple[Match, ...]

    def __bool__(self) -> bool:
        return bool(self.images or self.events)


def image_hash(image: Image.Image) -> str:
    """Perceptual hash of a picture: 64 hexadecimal digits."""
    return str(imagehash.phash(image.convert("RGB"), hash_size=SIDE))


def normalised(text: str) -> str:
    """A text without what does not count: case, accents' encoding, punctuation, repeated spaces."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold().replace("’", "'")))


def text_hash(text: str) -> str:
    """Hash of a normalised text: 64 hexadecimal digits."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()


def fingerprints(manifest: Manifest, *, progress: bool = False) -> Fingerprints:
    """Fingerprints of all pictures and events of a manifest.

    Raises:
        ValueError: an image that cannot be opened.
    """
    return fingerprints_of(pictures(manifest), ((r.id, r.event) for r in manifest.records), progress=progress)


def fingerprints_of(
    images: Mapping[str, Path | Image.Image], events: Iterable[tuple[str, str]], *, progress: bool = False
) -> Fingerprints:
    """Fingerprints of any set.

    Args:
        images: name -> file or picture.
        events: (name, text); a text that comes again is kept once.
        progress: show a bar.

    Raises:
        ValueError: an image that cannot be opened.
    """
    hashes = [
        (name, image_hash(open_image(image) if isinstance(image, Path) else image))
        for name, image in tqdm(images.items(), desc="hash pictures", disable=not progress)
    ]
    return assemble(hashes, events)


def assemble(images: Iterable[tuple[str, str]], events: Iterable[tuple[str, str]]) -> Fingerprints:
    """Fingerprints from (name, image hash) and (name, text)."""
    texts: dict[str, str] = {}
    for name, text in events:
        texts.setdefault(text_hash(text), name)
    return {
        "kind": KIND,
        "images": [{"name": name, "hash": value} for name, value in images],
        "events": [{"name": name, "hash": value} for value, name in texts.items()],
    }


def pictures(manifest: Manifest, records: Iterable[Record] | None = None) -> dict[str, Path]:
    """Every picture once, by the name that the manifest has for it."""
    folder = manifest.path.parent
    found: dict[str, Path] = {}
    for record in manifest.records if records is None else records:
        for path in (record.image_emotional, record.image_neutral):
            found.setdefault(named(path, folder), path)
    return found


def named(path: Path, folder: Path) -> str:
    """A path as a manifest in ``folder`` writes it."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def fingerprints_at(path: str | Path, *, progress: bool = False) -> Fingerprints:
    """Fingerprints of an evaluation set.

    Args:
        path: a manifest (``.jsonl``); a JSON file of fingerprints; or a folder: its pictures, and the lines of its
            ``.txt`` files as texts, sub-folders included.
        progress: show a bar.

    Raises:
        ValueError: there is no such set, it is empty, or something in it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, progress)
    if path.suffix == ".json":
        return loaded(read_json(path, "fingerprints"), str(path))
    records, problems = read(path)
    if problems:
        more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(f"{path}: {problems[0]}{more}; what is not read cannot be compared")
    return fingerprints(Manifest(tuple(records), path), progress=progress)


def _folder(folder: Path, progress: bool) -> Fingerprints:
    Image.init()
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    images = {named(p, folder): p for p in files if p.suffix.lower() in Image.EXTENSION}
    texts = []
    for file in files:
        if file.suffix.lower() == ".txt":
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
            name = named(file, folder)
            texts += [(f"{name} line {n}", text) for n, text in enumerate(lines, 1) if normalised(text)]
    if not images and not texts:
        raise ValueError(f"{folder}: holds no pictures and no .txt files; nothing to compare with")
    return fingerprints_of(images, texts, progress=progress)


def loaded(value: Any, what: str) -> Fingerprints:
    """Check that ``value`` is what `fingerprints` made.

    Raises:
        ValueError: it is something else, or has hashes of another kind.
    """
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind != KIND:
        raise ValueError(f"{what}: not fingerprints of the kind {KIND} (kind is {kind!r}); make them anew")
    lists = [value.get("images"), value.get("events")]
    for entries in lists:
        if not isinstance(entries, list) or not all(
            isinstance(e, Mapping) and isinstance(e.get("name"), str) and _hex(e.get("hash")) for e in entries
        ):
            raise ValueError(f"{what}: broken fingerprints; expected images and events, each with name and hash")
    return {"kind": KIND, "images": lists[0], "events": lists[1]}


def _hex(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _signs(entries: list[Entry]) -> np.ndarray:
    """``[n, 256]`` float32 of plus and minus one: a product of two such rows is 256 - 2 * their distance."""
    raw = np.frombuffer(bytes.fromhex("".join(e["hash"] for e in entries)), np.uint8).reshape(-1, BITS // 8)
    return np.unpackbits(raw, axis=1).astype(np.float32) * 2 - 1


def overlap(a: Fingerprints, b: Fingerprints, *, near: int = NEAR) -> Overlap:
    """What two sets share.

    Args:
        a, b: from `fingerprints`, `fingerprints_of` or `fingerprints_at`.
        near: bits in which the hashes of one picture may differ.

    Raises:
        ValueError: hashes of another kind.
    """
    a, b = loaded(a, "the first set"), loaded(b, "the second set")
    images = []
    if a["images"] and b["images"]:
        others = _signs(b["images"])
        for start in range(0, len(a["images"]), BLOCK):
            block = a["images"][start : start + BLOCK]
            distances = (BITS - _signs(block) @ others.T) / 2
            nearest = distances.argmin(1)
            images += [
                Match(entry["name"], b["images"][j]["name"], int(distances[i, j]))
                for i, (entry, j) in enumerate(zip(block, nearest, strict=True))
                if distances[i, j] <= near
            ]
    known = {e["hash"]: e["name"] for e in b["events"]}
    events = [Match(e["name"], known[e["hash"]]) for e in a["events"] if e["hash"] in known]
    return Overlap(tuple(images), tuple(events))
