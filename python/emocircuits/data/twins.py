"""The pictures of a manifest, pair after pair: opened, compared with their twins, hashed once."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from emocircuits.data.hashes import Fingerprints, assemble, image_hash, named
from emocircuits.data.pairs import Problem, Record
from emocircuits.data.pictures import Comparison, compare, digest, flat, open_image, open_mask

MOST_CHANGED = 0.5
"""Without a mask: a larger share of differing pixels is worth a look."""


class Pictures:
    """Looks at the pictures of record after record.

    Args:
        folder: of the manifest.
        tolerance: levels of 255 by which a channel may differ in a pixel that is the same.
        outside: largest share of the pixels outside a mask that may differ by more.

    Attributes:
        problems, warnings: what was seen so far.
    """

    def __init__(self, folder: Path, tolerance: int, outside: float) -> None:
        self.folder, self.tolerance, self.outside = folder, tolerance, outside
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.compared: list[Comparison] = []
        self.sizes: collections.Counter[str] = collections.Counter()
        self._hashes: dict[str, str] = {}
        self._called: dict[str, list[Record]] = {}

    def look(self, record: Record) -> None:
        """Open both pictures and the mask of a record, compare them, and remember what they are."""
        opened: dict[str, Image.Image] = {}
        for side, path in (("emotional", record.image_emotional), ("neutral", record.image_neutral)):
            image = self._open(record, path)
            if image is not None:
                opened[side] = image
        mask = None
        if record.mask is not None:
            try:
                mask = open_mask(record.mask)
            except ValueError as error:
                self.problems.append(record.problem(f"mask {error}"))
        if len(opened) < 2:
            return
        emotional, neutral = opened["emotional"], opened["neutral"]
        self._called.setdefault(digest(emotional), []).append(record)
        self.sizes[f"{emotional.width}x{emotional.height}"] += 1
        wrong = []
        if emotional.size != neutral.size:
            wrong.append(f"the emotional picture is {_size(emotional.size)}, the neutral one {_size(neutral.size)}")
        if mask is not None and mask.shape[::-1] != emotional.size:
            wrong.append(f"the picture is {_size(emotional.size)}, the mask {_size(mask.shape[::-1])}")
        if wrong:
            self.problems += [record.problem(f"{w}; they must have one size") for w in wrong]
            return
        self._compare(record, emotional, neutral, mask)

    def _open(self, record: Record, path: Path) -> Image.Image | None:
        """A picture, or None with the problem told; its hash is kept, so that other records need not make it."""
        try:
            image = open_image(path)
        except ValueError as error:
            self.problems.append(record.problem(str(error)))
            return None
        if flat(image):
            self.problems.append(record.problem(f"{path} is one colour all over; it shows nothing"))
            return None
        name = named(path, self.folder)
        if name not in self._hashes:
            self._hashes[name] = image_hash(image)
        return image

    def _compare(self, record: Record, a: Image.Image, b: Image.Image, mask: np.ndarray | None) -> None:
        found = compare(a, b, mask, self.tolerance)
        self.compared.append(found)
        right, down = found.shift
        moved = (
            f"the neutral picture seems moved by {right} to the right, {down} down (pixels)" if right or down else ""
        )
        if found.changed == 0:
            what = f"no pixel differs by more than {self.tolerance} of 255 levels between the two pictures"
            self.problems.append(record.problem(f"{what}; the neutral one must lack the emotional cues"))
        elif found.outside is not None and found.outside > self.outside:
            what = (
                f"{found.outside_pixels} pixels ({found.outside:.2%}) outside the mask differ by more than "
                f"{self.tolerance} of 255 levels (up to {found.outside_largest}; {self.outside:.2%} are allowed)"
            )
            hint = moved or "paste the original back outside the mask"
            self.problems.append(record.problem(f"{what}; {hint}"))
        elif moved:
            self.warnings.append(record.problem(moved))
        if mask is not None and (mask.all() or not mask.any()):
            every = "everything" if mask.all() else "nothing"
            self.problems.append(record.problem(f"the mask says that {every} may differ; white is what may"))
        if mask is None and found.changed > MOST_CHANGED:
            what = f"{found.changed:.0%} of the pixels differ from the neutral picture: is it the same picture?"
            self.warnings.append(record.problem(f"{what} A mask would let this be checked"))

    def conflicts(self) -> Iterable[Problem]:
        """One picture that is said to show several emotions."""
        for records in self._called.values():
            for record in records[1:]:
                if record.emotion != records[0].emotion:
                    other = f"{records[0].where}, where it is {records[0].emotion}"
                    yield record.problem(f"shows {record.emotion} with the very picture of {other}")

    def names(self, record: Record) -> list[str]:
        """What the two pictures of a record are called."""
        return [named(p, self.folder) for p in (record.image_emotional, record.image_neutral)]

    def fingerprints(self, records: Iterable[Record]) -> Fingerprints:
        """Fingerprints of these records, of the pictures that could be opened."""
        records = list(records)
        names = dict.fromkeys(name for r in records for name in self.names(r) if name in self._hashes)
        return assemble([(n, self._hashes[n]) for n in names], ((r.id, r.event) for r in records))

    def statistics(self) -> dict[str, object]:
        """Sizes and differences, JSON-ready."""
        outside = [c.outside for c in self.compared if c.outside is not None]
        return {
            "opened": len(self._hashes),
            "compared": len(self.compared),
            "sizes": dict(self.sizes.most_common()),
            "changed": _spread([c.changed for c in self.compared]),
            "outside_mask": _spread(outside),
            "with_mask": len(outside),
        }


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    least, median, most = np.quantile(values, [0, 0.5, 1])
    return {"least": float(least), "median": float(median), "most": float(most)}
