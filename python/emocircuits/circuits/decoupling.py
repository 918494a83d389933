"""Which critical heads serve one emotion, and which serve them all (method.md "Decoupling").

Overlap is the Jaccard index of the first K heads of two emotions, within a stage (a third of the layers) and over all
layers. Beside it stands what two sets drawn at random would share, with the chance that they share as much.
"""

from __future__ import annotations

import dataclasses as dc
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from emocircuits.circuits.heads import Heads
from emocircuits.circuits.patch_effects import ranked
from emocircuits.circuits.stored import read_record
from emocircuits.files import write_json

FORMAT = "emocircuits.decoupling/1"
FILE = "decoupling.json"
STAGES = ("shallow", "middle", "deep")
SHARE = 0.75
"""A head is emotion-general when it is among the first K of at least this share of the emotions: 3 of 4."""


@dc.dataclass(frozen=True)
class Overlap:
    """What two emotions share in one stage.

    Attributes:
        first, second: emotions.
        stage: "shallow", "middle", "deep" or "all".
        shared, union: heads in both, in either.
        jaccard: ``shared / union``; None where neither has a head in the stage.
        expected: the mean of ``shared`` for sets of these sizes drawn at random from the stage's heads.
        p: the chance of sharing at least as many (hypergeometric); None where a set is empty.
    """

    first: str
    second: str
    stage: str
    shared: int
    union: int
    jaccard: float | None
    expected: float
    p: float | None


@dc.dataclass(frozen=True)
class Decoupling:
    """Heads by the emotions that they serve.

    Attributes:
        k: heads of each emotion.
        sets: emotion -> its first heads, strongest first.
        overlaps: every pair of emotions in every stage.
        general: heads among the first K of at least three quarters of the emotions.
        specific: all other heads, with their emotions.
        settings: numbers and readings.
    """

    k: int
    sets: dict[str, tuple[tuple[int, int], ...]]
    overlaps: tuple[Overlap, ...]
    general: tuple[tuple[int, int], ...]
    specific: dict[tuple[int, int], tuple[str, ...]]
    settings: dict[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write ``decoupling.json``."""
        record = {
            "format": FORMAT, "k": self.k, "sets": {e: [list(h) for h in s] for e, s in self.sets.items()},
            "overlaps": [dc.asdict(o) for o in self.overlaps], "general": [list(h) for h in self.general],
            "specific": [{"head": list(h), "emotions": list(e)} for h, e in self.specific.items()],
            "settings": self.settings,
        }  # fmt: skip
        return write_json(Path(folder) / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> Decoupling:
        """Read what :meth:`save` wrote."""
        record = read_record(Path(folder) / FILE, FORMAT, "overlaps of emotions")
        return cls(
            record["k"], {e: tuple((a, b) for a, b in s) for e, s in record["sets"].items()},
            tuple(Overlap(**o) for o in record["overlaps"]), tuple((a, b) for a, b in record["general"]),
            {(s["head"][0], s["head"][1]): tuple(s["emotions"]) for s in record["specific"]}, record["settings"],
        )  # fmt: skip


def stages(layers: int) -> dict[str, range]:
    """Thirds of the layers; of fewer than three layers the middle ones are missing."""
    edges = [round(i * layers / 3) for i in range(4)]
    return {name: range(a, b) for name, (a, b) in zip(STAGES, itertools.pairwise(edges), strict=True)}


def decoupling(heads: Heads, *, k: int = 10) -> Decoupling:
    """Compare the first heads of every emotion.

    Args:
        heads: of :func:`~emocircuits.circuits.heads.critical_heads`.
        k: heads of each emotion; only heads with a positive effect count.

    Raises:
        ValueError: fewer than two emotions, or K outside the model's heads.
    """
    emotions = list(dict.fromkeys(heads.emotions))
    layers, each = heads.effects.shape
    if len(emotions) < 2:
        raise ValueError(f"the pairs have {len(emotions)} emotion; overlap needs two")
    if not 0 < k <= layers * each:
        raise ValueError(f"k={k}: expected 1 to {layers * each} heads")
    sets = {}
    for emotion in emotions:
        effects = heads.of(emotion)
        sets[emotion] = tuple(h for h in ranked(effects)[:k] if effects[h] > 0)
    overlaps = []
    for a, b in itertools.combinations(emotions, 2):
        for stage, span in {**stages(layers), "all": range(layers)}.items():
            overlaps.append(_overlap(a, b, stage, span, each, sets))
    counts = Counter(h for s in sets.values() for h in s)
    enough = math.ceil(SHARE * len(emotions))
    general = tuple(h for h, n in counts.most_common() if n >= enough)
    specific = {h: tuple(e for e in emotions if h in sets[e]) for h, n in counts.most_common() if n < enough}
    settings = {"general_from": enough, "emotions": len(emotions), "effects": heads.settings.get("reads")}
    return Decoupling(k, sets, tuple(overlaps), general, specific, settings)


def _overlap(
    a: str, b: str, stage: str, span: range, each: int, sets: dict[str, tuple[tuple[int, int], ...]]
) -> Overlap:
    first, second = ({h for h in sets[e] if h[0] in span} for e in (a, b))
    shared, union, total = len(first & second), len(first | second), len(span) * each
    expected = len(first) * len(second) / total if total else 0.0
    p = float(stats.hypergeom.sf(shared - 1, total, len(first), len(second))) if first and second else None
    return Overlap(a, b, stage, shared, union, shared / union if union else None, expected, p)


def as_matrix(found: Decoupling, stage: str = "all") -> np.ndarray:
    """Jaccard index ``[E, E]`` of every two emotions in a stage, 1 on the diagonal, NaN where there is none."""
    emotions = list(found.sets)
    table = np.full((len(emotions), len(emotions)), np.nan)
    np.fill_diagonal(table, 1.0)
    for o in found.overlaps:
        if o.stage == stage and o.jaccard is not None:
            i, j = emotions.index(o.first), emotions.index(o.second)
            table[i, j] = table[j, i] = o.jaccard
    return table
