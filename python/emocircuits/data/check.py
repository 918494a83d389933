"""Is a manifest fit for finding a circuit: pictures, twins, events, splits, licences, overlap with evaluation sets."""

from __future__ import annotations

import collections
import dataclasses as dc
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from emocircuits.data.events import EMOTIONS, UNCHECKED, event_problems
from emocircuits.data.hashes import BITS, NEAR, Overlap, fingerprints_at, overlap, text_hash
from emocircuits.data.pairs import SPLITS, Manifest, Problem, Record, read
from emocircuits.data.twins import Pictures

TOLERANCE = 8
OUTSIDE = 0.001
LEAST = 2
"""Records of an emotion in `extract`: a steering vector is a mean over at least two kept samples."""


@dc.dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        path: of the manifest.
        problems: what makes it unfit.
        warnings: what a person should look at.
        unchecked: what no code can tell, in words.
        statistics: of the records that could be read.
        pictures: sizes, how much of a picture differs from its twin, near-duplicates.
        settings: tolerances, and what it was compared with.
    """

    path: Path
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    unchecked: tuple[str, ...]
    statistics: Mapping[str, Any]
    pictures: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def require(self) -> None:
        """Refuse an unfit manifest: ``ValueError`` with every problem in it."""
        if self.problems:
            raise ValueError(f"{self.path}: " + "; ".join(str(p) for p in self.problems))

    def to_dict(self) -> dict[str, Any]:
        """The whole report, JSON-ready."""
        return {
            "path": str(self.path), "ok": self.ok, "problems": [dc.asdict(p) for p in self.problems],
            "warnings": [dc.asdict(p) for p in self.warnings], "unchecked": list(self.unchecked),
            "statistics": dict(self.statistics), "pictures": dict(self.pictures), "settings": dict(self.settings),
        }  # fmt: skip


def check(
    manifest: str | Path | Manifest, *, against: str | Path | Sequence[str | Path] = (),
    lexicon: Mapping[str, Collection[str]] | None = None, allow_unlicensed: bool = False, tolerance: int = TOLERANCE,
    outside: float = OUTSIDE, near: int = NEAR, progress: bool = False,
) -> Report:  # fmt: skip
    """Check a manifest. Everything that is wrong is found, not only the first.

    Args:
        manifest: its file, or the manifest.
        against: evaluation sets it must not overlap with: manifests, folders, or files of fingerprints.
        lexicon: emotion -> its words, as the model's answers are read. Emotions must be in it, and events must not say
            its words. None: the six emotions of `EMOTIONS`.
        allow_unlicensed: take records that name no licence.
        tolerance: levels of 255 by which a channel may differ in a pixel that is the same.
        outside: largest share of the pixels outside a mask that may differ by more.
        near: bits in which the hashes of one picture may differ.
        progress: show a bar.

    Raises:
        ValueError: the manifest or an evaluation set cannot be read at all, or a setting is out of its range.
    """
    if not 0 <= tolerance < 255 or not 0 <= outside <= 1 or not 0 <= near < BITS // 2:
        raise ValueError(
            f"tolerance={tolerance}, outside={outside}, near={near}: expected 0 to 254 levels, a share from 0 to 1, "
            f"and 0 to {BITS // 2 - 1} bits"
        )
    problems: list[Problem] = []
    if isinstance(manifest, Manifest):
        records, path = list(manifest.records), manifest.path
    else:
        path = Path(manifest)
        records, problems = read(path)
    others = [Path(p) for p in ([against] if isinstance(against, str | Path) else against)]
    foreign = [(p, fingerprints_at(p, progress=progress)) for p in others]

    whole = Manifest(tuple(records), path)
    warnings: list[Problem] = []
    for record in records:
        problems += [record.problem(what) for what in _texts(record, lexicon, allow_unlicensed)]
    seen = Pictures(path.parent, tolerance, outside)
    for record in tqdm(records, desc="check pictures", disable=not progress):
        seen.look(record)
    problems += [*seen.problems, *seen.conflicts()]
    warnings += seen.warnings
    problems += _splits(records)
    warnings += _uneven(records)
    parts = {name: seen.fingerprints(whole.split(name)) for name in SPLITS}

    shared = overlap(parts["analyze"], parts["extract"], near=near)
    problems += _overlaps(shared, seen, whole.split("analyze"), "the extract split")
    everything = seen.fingerprints(records)
    for other, theirs in foreign:
        shared = overlap(everything, theirs, near=near)
        problems += _overlaps(shared, seen, records, str(other))
    # In the order of the lines; what concerns no one line comes last.
    problems.sort(key=lambda p: p.line or sys.maxsize)
    settings = {
        "tolerance": tolerance, "outside": outside, "near": near, "hash": everything["kind"],
        "against": [str(p) for p in others], "allow_unlicensed": allow_unlicensed,
        "unlicensed": sum(not r.licence.strip() for r in records),
        "emotions": list(EMOTIONS if lexicon is None else lexicon),
    }  # fmt: skip
    return Report(
        path, tuple(problems), tuple(warnings), UNCHECKED, whole.statistics(), seen.statistics(), settings
    )  # fmt: skip


def _texts(
    record: Record, lexicon: Mapping[str, Collection[str]] | None, allow_unlicensed: bool
) -> Iterable[str]:  # fmt: skip
    known = [e for e in (EMOTIONS if lexicon is None else lexicon) if e != "neutral"]
    if record.emotion not in known:
        yield (
            f"emotion {record.emotion!r} is not known; known are {', '.join(known)}"
            + (" (others need a lexicon with their words)" if lexicon is None else "")
        )
    if not record.licence.strip() and not allow_unlicensed:
        yield "names no licence; write one, or allow unlicensed records, which the report will say"
    yield from event_problems(record.event, [w for ws in (lexicon or {}).values() for w in ws])


def _splits(records: list[Record]) -> Iterable[Problem]:
    """Both splits are there and large enough; an evaluation set stands alone."""
    used = {r.split for r in records}
    if used <= {"evaluate"}:
        return
    if "evaluate" in used:
        yield Problem("splits", "evaluate stands beside other splits; an evaluation set is a manifest of its own")
    for name in ("extract", "analyze"):
        if name not in used:
            yield Problem("splits", f"no records are in {name}; circuits are found on extract and tested on analyze")
    counts = collections.Counter(r.emotion for r in records if r.split == "extract")
    for emotion, n in counts.items():
        if n < LEAST:
            yield Problem("splits", f"{emotion} has {n} record in extract; at least {LEAST} are needed")


def _uneven(records: list[Record]) -> Iterable[Problem]:
    emotions = {s: {r.emotion for r in records if r.split == s} for s in ("extract", "analyze")}
    if all(emotions.values()):
        for emotion in sorted(emotions["extract"] ^ emotions["analyze"]):
            place = "extract" if emotion in emotions["extract"] else "analyze"
            yield Problem("splits", f"{emotion} is in {place} only")


def _overlaps(shared: Overlap, seen: Pictures, records: list[Record], other: str) -> list[Problem]:
    """Each picture and event of ``records`` that is in another set too, told once, with all records that have it."""
    pictures, events = collections.defaultdict(list), collections.defaultdict(list)
    for record in records:
        events[text_hash(record.event)].append(record)
        for name in seen.names(record):
            pictures[name].append(record)
    same = {users[0].id: users for users in events.values()}

    def told(users: list[Record], what: str) -> Problem:
        more = f"; {', '.join(r.where for r in users[1:])} too" if len(users) > 1 else ""
        return users[0].problem(what + more)

    return [
        told(pictures[m.a], f"picture {m.a} is also in {other}: {m.b} ({m.distance} of {BITS} bits differ)")
        for m in shared.images
    ] + [told(same[m.a], f"the event is also in {other}: {m.b}") for m in shared.events]
