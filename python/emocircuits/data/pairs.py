"""The manifest of contrastive pairs: one JSON object a line, and image files beside it.

``{"id": "...", "emotion": "sad", "image_emotional": "a.png", "image_neutral": "b.png", "event": "...",
"split": "extract", "source": "...", "licence": "..."}``. Paths are relative to the manifest. ``"mask"`` names an image
that is white where the two pictures may differ; ``"extra"`` is an object of whatever else one wants to keep.
"""

from __future__ import annotations

import collections
import dataclasses as dc
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emocircuits.files import write_bytes

SPLITS = ("extract", "analyze", "evaluate")
"""What a record is for. An evaluation set is a manifest of its own."""
REQUIRED = ("id", "emotion", "image_emotional", "image_neutral", "event", "split")
OPTIONAL = ("source", "licence", "mask", "extra")
SHOWN = 10


@dc.dataclass(frozen=True)
class Problem:
    """Something wrong: where (a line, a record, the splits), and what; `line` is 0 where no one line is to blame."""

    where: str
    what: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dc.dataclass(frozen=True)
class Record:
    """One pair: two pictures that differ in what shows the emotion, and the event that both are told with.

    Args:
        id: unique in its manifest.
        emotion: that `image_emotional` shows.
        image_emotional, image_neutral: files of the pictures.
        event: a neutral sentence, the same for both sides.
        split: one of `SPLITS`.
        source, licence: where the pictures are from, and what one may do with them.
        mask: file of an image that is white where the pictures may differ, or None.
        extra: anything else.
        line: of the manifest, counting from 1; 0 for a record that was not read.
    """

    id: str
    emotion: str
    image_emotional: Path
    image_neutral: Path
    event: str
    split: str
    source: str = ""
    licence: str = ""
    mask: Path | None = None
    extra: Mapping[str, Any] = dc.field(default_factory=dict)
    line: int = dc.field(default=0, compare=False)

    @property
    def where(self) -> str:
        """How a message names this record."""
        return f"line {self.line} ({self.id})" if self.line else self.id

    def problem(self, what: str) -> Problem:
        """Something that is wrong with this record."""
        return Problem(self.where, what, self.line)


@dc.dataclass(frozen=True)
class Manifest:
    """Pairs, in order, and the file they are from or will be in."""

    records: tuple[Record, ...]
    path: Path

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read a manifest. What the records say is not checked here: see :func:`emocircuits.data.check`.

        Raises:
            ValueError: it cannot be read, holds nothing, or has wrong lines; every wrong line is named.
        """
        records, problems = read(path)
        if problems:
            told = "; ".join(str(p) for p in problems[:SHOWN])
            rest = ", ".join(dict.fromkeys(p.where for p in problems[SHOWN:]))
            raise ValueError(f"{path}: {told}" + (f"; wrong too: {rest}" if rest else ""))
        return cls(tuple(records), Path(path))

    def save(self, path: str | Path | None = None) -> Path:
        """Write the manifest (the images stay where they are). An interrupted write leaves the old file."""
        path = Path(path or self.path)
        folder = path.parent.resolve()
        lines = [json.dumps(_object(record, folder), ensure_ascii=False, allow_nan=False) for record in self.records]
        return write_bytes(path, "".join(f"{line}\n" for line in lines).encode())

    def split(self, name: str) -> list[Record]:
        """Records of one split, in order.

        Raises:
            ValueError: no such split.
        """
        if name not in SPLITS:
            raise ValueError(f"split {name!r}: expected one of {', '.join(SPLITS)}")
        return [r for r in self.records if r.split == name]

    @property
    def emotions(self) -> tuple[str, ...]:
        """Emotions, in order of appearance."""
        return tuple(dict.fromkeys(r.emotion for r in self.records))

    def __len__(self) -> int:
        return len(self.records)

    def statistics(self) -> dict[str, Any]:
        """How many of what: JSON-ready, from the records alone (no image is opened)."""

        def count(values: Iterable[str]) -> dict[str, int]:
            return dict(collections.Counter(values).most_common())

        splits = {}
        for name in SPLITS:
            records = self.split(name)
            if records:
                splits[name] = {
                    "records": len(records),
                    "emotions": count(r.emotion for r in records),
                    "pictures": len({p.resolve() for r in records for p in (r.image_emotional, r.image_neutral)}),
                    "events": len({r.event for r in records}),
                }
        words = [len(r.event.split()) for r in self.records]
        return {
            "records": len(self),
            "emotions": count(r.emotion for r in self.records),
            "splits": splits,
            "masks": sum(r.mask is not None for r in self.records),
            "words_of_events": {
                name: float(value)
                for name, value in zip(("least", "median", "most"), np.quantile(words, [0, 0.5, 1]), strict=True)
            } if words else {},
            "sources": count(r.source or "not given" for r in self.records),
            "licences": count(r.licence or "not given" for r in self.records),
        }  # fmt: skip


def _object(record: Record, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (*REQUIRED, *OPTIONAL):
        value = getattr(record, name)
        if isinstance(value, Path):
            # With forward slashes everywhere, so that a manifest can move between machines.
            value = Path(os.path.relpath(value.resolve(), folder)).as_posix()
        if name in REQUIRED or value:
            found[name] = dict(value) if name == "extra" else value
    return found


def read(path: str | Path) -> tuple[list[Record], list[Problem]]:
    """Read a manifest. Returns the good records, and what is wrong with the other lines.

    Raises:
        ValueError: the file cannot be read, or holds no lines.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the pairs ({error.strerror or error})") from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path}: holds no pairs; expected one JSON object a line")
    records: list[Record] = []
    problems: list[Problem] = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = _record(number, json.loads(line.decode("utf-8")), path.parent)
            if record.id in first:
                raise ValueError(f"id {record.id!r} is that of line {first[record.id]} too")
            first[record.id] = number
            records.append(record)
        except json.JSONDecodeError as error:
            problems.append(Problem(f"line {number}", f"not JSON ({error.msg} at column {error.colno})", number))
        except UnicodeDecodeError as error:
            problems.append(Problem(f"line {number}", f"not UTF-8 ({error.reason} at byte {error.start})", number))
        except ValueError as error:
            problems.append(Problem(f"line {number}", str(error), number))
    return records, problems


def _record(number: int, given: Any, folder: Path) -> Record:
    if not isinstance(given, Mapping):
        raise ValueError(f"a {type(given).__name__}, expected an object with {', '.join(REQUIRED)}")
    unknown = [k for k in given if k not in REQUIRED + OPTIONAL]
    if unknown:
        raise ValueError(
            f"unknown field {unknown[0]!r}; known are {', '.join(REQUIRED + OPTIONAL)} (what is yours goes into extra)"
        )
    lacking = [k for k in REQUIRED if k not in given]
    if lacking:
        raise ValueError(f"lacks {' and '.join(lacking)}")
    for name, value in given.items():
        if name == "extra":
            if not isinstance(value, Mapping):
                raise ValueError(f"extra is {value!r}, expected an object")
        elif not isinstance(value, str) or (not value.strip() and name not in ("source", "licence")):
            raise ValueError(f"{name} is {value!r}, expected a text")
    if given["split"] not in SPLITS:
        raise ValueError(f"split is {given['split']!r}, expected one of {', '.join(SPLITS)}")
    files: dict[str, Any] = {}
    for name in ("image_emotional", "image_neutral", "mask"):
        if name in given:
            files[name] = folder / given[name]
            if "\0" in given[name] or not files[name].is_file():
                raise ValueError(f"{name} {str(files[name])!r} is not a file")
    if files["image_emotional"] == files["image_neutral"]:
        raise ValueError(f"image_emotional and image_neutral are the same file, {given['image_neutral']}")
    texts: dict[str, Any] = {
        k: given[k] for k in ("id", "emotion", "event", "split", "source", "licence") if k in given
    }
    return Record(**texts, **files, extra=dict(given.get("extra", {})), line=number)
