"""Attention maps: where heads look in the image when the emotion word is said (method.md "Analyses").

The row is the one that emits the first emotion word of the model's own greedy answer, which is forced up to there.
Heads are compared with random heads of the same layers. Maps are averages over pairs or single examples, and say which.
"""

from __future__ import annotations

import base64
import dataclasses as dc
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from emocircuits.circuits.answers import Answer, LeftOut, forced, speaking
from emocircuits.circuits.averages import average, differs, plain
from emocircuits.circuits.grid import image_grids, seen_part
from emocircuits.circuits.pairs import SIDES, Pairs, Side
from emocircuits.circuits.patch_effects import random_like
from emocircuits.circuits.stored import read_record, read_tables, write_tables
from emocircuits.circuits.subject import Subject
from emocircuits.files import write_json
from emocircuits.measure import attention_weights
from emokernels import Role

FORMAT = "emocircuits.maps/1"
FILE, TENSORS = "maps.json", "maps.safetensors"
LEAST_DRAWS = 10
EXAMPLES = 4
PICTURE = 256
"""Largest side, in pixels, of the pictures of examples."""
TABLES = ("mass", "random_mass", "average", "random_average")


@dc.dataclass(frozen=True)
class View:
    """One side of one pair: what was said, and where the heads looked when they said the word.

    Attributes:
        said, word: the answer, and the emotion word.
        picture: a PNG of what the model saw, as a data URI.
        heads, random: mean weight of the given heads, and of all random draws, by row and column of the image.
    """

    said: str
    word: str
    picture: str
    heads: tuple[tuple[float, ...], ...]
    random: tuple[tuple[float, ...], ...]


@dc.dataclass(frozen=True)
class Example:
    """A single pair."""

    id: str
    emotion: str
    emotional: View
    neutral: View


@dc.dataclass(frozen=True, eq=False)
class Maps:
    """Attention to the image, of given heads and of random ones.

    Attributes:
        heads: (layer, head) of each.
        draws: random heads of the same layers, as many.
        mass: ``[2, pairs, heads]`` float64, emotional side first: weight that the row gives to the whole image.
        random_mass: ``[2, pairs, draws]``, mean over the heads of a draw.
        average: ``[2, heads, rows, columns]`` mean map over pairs; empty where the pairs' grids differ.
        random_average: ``[2, rows, columns]``, mean over the draws too.
        examples: single pairs.
        ids, emotions: of the pairs.
        left_out: pairs that were not measured.
        settings: readings and numbers.
    """

    heads: tuple[tuple[int, int], ...]
    draws: tuple[tuple[tuple[int, int], ...], ...]
    mass: np.ndarray
    random_mass: np.ndarray
    average: np.ndarray
    random_average: np.ndarray
    examples: tuple[Example, ...]
    ids: tuple[str, ...]
    emotions: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    settings: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """Masses with their intervals, and paired tests: against random heads, and between the sides."""
        seed, margin = self.settings["seed"], self.settings["margin"]
        given, random = self.mass.mean(-1), self.random_mass.mean(-1)
        found: dict[str, Any] = {}
        for s, side in enumerate(SIDES):
            of_draws = self.random_mass[s].mean(0)
            found[side] = {
                "heads": average(given[s], seed=seed).json(), "random": average(random[s], seed=seed).json(),
                "draws": plain(of_draws), "above": int((given[s].mean() > of_draws).sum()),
                "p": float(differs(given[s], random[s], margin=margin)),
                "by_head": average(self.mass[s], seed=seed).json(),
            }  # fmt: skip
        told = average(given[0] - given[1], seed=seed).json()
        return found | {"difference": told | {"p": float(differs(given[0], given[1], margin=margin))}}

    def save(self, folder: str | Path) -> Path:
        """Write ``maps.safetensors`` (masses of single pairs, maps of single heads) and, after it, ``maps.json``."""
        folder = Path(folder)
        digest = write_tables(folder / TENSORS, {n: getattr(self, n) for n in TABLES})
        record = {
            "format": FORMAT, "tensors": TENSORS, "sha256": digest, "n": len(self.ids), "settings": self.settings,
            "heads": [list(h) for h in self.heads], "draws": [[list(h) for h in d] for d in self.draws],
            "mass": self.summary(),
            "average": {
                side: {
                    "heads": plain(self.average[s].mean(0)), "random": plain(self.random_average[s]),
                    "by_head": plain(self.average[s]),
                }
                for s, side in enumerate(SIDES)
            } if self.average.size else None,
            "examples": [dc.asdict(e) for e in self.examples],
            "ids": list(self.ids), "emotions": list(self.emotions),
            "left_out": [dc.asdict(x) for x in self.left_out],
        }  # fmt: skip
        return write_json(folder / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> Maps:
        """Read what :meth:`save` wrote; ``ValueError`` says what is wrong with it."""
        path = Path(folder) / FILE
        record = read_record(path, FORMAT, "attention maps")
        tables = read_tables(path.parent / TENSORS, record["sha256"])
        return cls(
            tuple((a, b) for a, b in record["heads"]),
            tuple(tuple((a, b) for a, b in d) for d in record["draws"]),
            tables["mass"], tables["random_mass"], tables["average"], tables["random_average"],
            tuple(
                Example(e["id"], e["emotion"], _view(e["emotional"]), _view(e["neutral"])) for e in record["examples"]
            ),
            tuple(record["ids"]), tuple(record["emotions"]), tuple(LeftOut(**x) for x in record["left_out"]),
            record["settings"],
        )  # fmt: skip


def attention_maps(
    subject: Subject, pairs: Pairs, heads: Sequence[tuple[int, int]], *, examples: Sequence[str] | None = None,
    draws: int = 10, wordless: str = "refuse", batch: int = 16, margin: float = 0.01, seed: int = 0,
    progress: bool = True,
) -> Maps:  # fmt: skip
    """Read where heads look on both sides of every pair, on the unmodified model.

    Args:
        subject: the model.
        pairs: of the analyze split.
        heads: (layer, head) of the critical heads.
        examples: ids of pairs to show alone; None: the first pair of each of the first four emotions.
        draws: random sets of as many heads of the same layers.
        wordless: "refuse" answers without an emotion word (default), or "leave out" their pairs.
        batch: pairs at a time.
        margin: differences below this share of the mean count as none in the tests.
        seed: of the draws and the bootstrap.
        progress: show progress bars.

    Raises:
        ValueError: heads that the model does not have, fewer than ten draws, an unknown example, or answers that name
            no emotion.
        NotImplementedError: the model's visual tokens are not a grid.
    """
    geometry = subject.handle.geometry
    heads = [(int(l), int(h)) for l, h in heads]
    wrong = [h for h in heads if not (0 <= h[0] < geometry.layers and 0 <= h[1] < geometry.heads)]
    if wrong or not heads or len(set(heads)) < len(heads):
        raise ValueError(
            f"heads {wrong or heads}: expected one or more, each once, of layers 0 to {geometry.layers - 1} and heads "
            f"0 to {geometry.heads - 1}"
        )
    if draws < LEAST_DRAWS:
        raise ValueError(f"draws={draws}: expected at least {LEAST_DRAWS} random sets")
    known = {r.id: r.emotion for r in pairs.records}
    unknown = [i for i in examples or () if i not in known]
    if unknown:
        raise ValueError(f"examples: no pair {unknown[0]!r}; there are {', '.join(list(known)[:5])}, ...")
    rng = np.random.default_rng(seed)
    drawn = [random_like(heads, geometry.heads, rng) for _ in range(draws)]
    asked = len(pairs)
    pairs, said, left_out = speaking(subject, pairs, wordless=wordless, batch=max(32, batch), progress=progress)
    silent = [i for i in examples or () if i in {x.id for x in left_out}]
    if silent:
        raise ValueError(f"examples: an answer of {silent[0]!r} names no emotion, so there is no row to show")
    if examples is None:
        first = {r.emotion: r.id for r in reversed(pairs.records)}
        examples = [first[e] for e in dict.fromkeys(pairs.emotions)][:EXAMPLES]

    given: list[list[np.ndarray]] = [[np.empty(0)] * len(pairs) for _ in SIDES]  # [heads, rows, columns] of each pair
    random: list[list[np.ndarray]] = [[np.empty(0)] * len(pairs) for _ in SIDES]  # [draws, rows, columns]
    with tqdm(total=2 * len(pairs), desc="attention maps", disable=not progress) as bar:
        for s, side in enumerate(SIDES):
            for which, part in pairs.batches(batch):
                tails = [said[side][i].ids[: said[side][i].words[0].start] for i in which]
                inputs, roles = forced(subject, part.inputs(subject, side), tails)
                grids = image_grids(subject.handle, inputs, roles)
                weights = attention_weights(subject.model, inputs, roles=roles)[:, :, :, 0]
                for b, i in enumerate(which):
                    table = weights[:, b][:, :, roles[b] == int(Role.VISUAL)].double().cpu().numpy()
                    table = table.reshape(*table.shape[:2], *grids[b])
                    given[s][i] = _of(table, heads)
                    random[s][i] = np.stack([_of(table, d).mean(0) for d in drawn])
                bar.update(len(which))
    shapes = {m.shape[1:] for side in given for m in side}
    settings = {
        "row": "the one that emits the first emotion word of the model's own greedy answer, forced up to there",
        "model": "unmodified", "random": "as many heads of the same layers", "draws": draws, "wordless": wordless,
        "asked": asked, "grid": list(shapes.pop()) if len(shapes) == 1 else None, "margin": margin,
        "grids": "the pairs' grids differ, so there is no mean map" if shapes else "the same for all pairs",
        "interval": "95 % bootstrap over pairs", "test": "Wilcoxon, two-sided", "seed": seed,
        "lexicon": subject.lexicon.name,
    }  # fmt: skip
    same = settings["grid"] is not None
    ids = [r.id for r in pairs.records]
    shown = tuple(
        Example(i, known[i], *(_seen(subject, pairs, ids.index(i), s, said, given, random) for s in range(2)))
        for i in examples
    )
    return Maps(
        tuple(heads), tuple(tuple(d) for d in drawn),
        np.array([[m.sum((1, 2)) for m in side] for side in given]),
        np.array([[m.sum((1, 2)) for m in side] for side in random]),
        np.array([np.mean(side, 0) for side in given]) if same else np.empty(0),
        np.array([np.mean(side, 0).mean(0) for side in random]) if same else np.empty(0),
        shown, tuple(ids), tuple(pairs.emotions), left_out, settings,
    )  # fmt: skip


def _of(table: np.ndarray, heads: Sequence[tuple[int, int]]) -> np.ndarray:
    return table[[l for l, _ in heads], [h for _, h in heads]]


def _seen(
    subject: Subject, pairs: Pairs, i: int, side: int, said: Mapping[Side, Sequence[Answer]],
    given: Sequence[Sequence[np.ndarray]], random: Sequence[Sequence[np.ndarray]],
) -> View:  # fmt: skip
    image = seen_part(subject.processor, pairs.images(SIDES[side])[i])
    answer = said[SIDES[side]][i]
    maps = [_cells(table[side][i].mean(0)) for table in (given, random)]
    return View(answer.text, answer.words[0].text, _data_uri(image), *maps)


def _data_uri(image: Image.Image) -> str:
    scale = PICTURE / max(image.size)
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _cells(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in values)


def _view(record: dict[str, Any]) -> View:
    maps = {k: tuple(tuple(row) for row in record[k]) for k in ("heads", "random")}
    return View(record["said"], record["word"], record["picture"], **maps)
