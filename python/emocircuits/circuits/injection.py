"""Stage II.1: where adding a steering vector makes the model say the emotion (method.md "Layers"; arXiv 2605.21980).

``h~ = h- + alpha * S[e, l]`` where the residual stream leaves one layer, in the run on X-; the model then answers. Each
layer and strength is compared with random directions of the same length. The rows of a batch are prompts under plans,
and what plans share of a pass is computed once (:func:`emocircuits.sweep.grids.plan_grid`).
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.steering import SteeringVectors
from emocircuits.circuits.subject import Subject
from emocircuits.edits import AddVector
from emocircuits.files import read_json, write_json
from emocircuits.plan import Plan
from emocircuits.scoring.statistics import intervals
from emocircuits.sweep import generated
from emocircuits.sweep.grids import plan_grid
from emocircuits.sweep.steering import READINGS, ROWS, Reading, Rows

FORMAT = "emocircuits.layers/1"
FILE = "layers.json"
ALPHAS = (0.1, 1.0, 2.0)
"""The paper's strength, and larger ones: where 0.1 changes no answer, it ranks no layers."""
LEAST_DRAWS = 10


@dc.dataclass(frozen=True, eq=False)
class Layers:
    """What steering does in each layer: ``L`` layers, ``A`` strengths, ``R`` random draws, ``n`` pairs.

    Attributes:
        layers: numbers of the layers.
        alphas: strengths.
        plus, minus: hit rate of the untouched model on X+ and on X-.
        hits: ``[L, A]`` float64, hit rate on X- with the vector added.
        low, high: ``[L, A]``, 95 % bootstrap interval of ``hits - minus`` over pairs.
        random: ``[R, L, A]``, hit rate with a random direction of the same length in its place.
        tokens: emotion ("pooled" for the pooled vector) -> for each layer the tokens that its vector makes likelier.
        l_emo: the layer with the largest effect; None where no layer has any.
        tied: layers with the same largest effect, ``l_emo`` among them.
        note: what to know about the choice, empty where it is clear.
        examples: single answers, one pair of each emotion: untouched and steered ``[L][A]``.
        settings: readings and numbers.
    """

    layers: tuple[int, ...]
    alphas: tuple[float, ...]
    plus: float
    minus: float
    hits: np.ndarray
    low: np.ndarray
    high: np.ndarray
    random: np.ndarray
    tokens: dict[str, tuple[tuple[str, ...], ...]]
    l_emo: int | None
    tied: tuple[int, ...]
    note: str
    examples: tuple[dict[str, Any], ...]
    settings: dict[str, Any]

    @property
    def effects(self) -> np.ndarray:
        """``[L, A]``: delta H, hit rate with the vector less hit rate without."""
        result: np.ndarray = self.hits - self.minus
        return result

    @property
    def restoration(self) -> np.ndarray | None:
        """``[L, A]``: ``(H~ - H-) / (H+ - H-)``; None where X+ and X- have the same hit rate."""
        return None if self.plus == self.minus else self.effects / (self.plus - self.minus)

    def save(self, folder: str | Path) -> Path:
        """Write ``layers.json``."""
        restoration = self.restoration
        record = {
            "format": FORMAT, "settings": self.settings, "average_over": "pairs of the analyze split",
            "n": self.settings["pairs"], "layers": list(self.layers), "alphas": list(self.alphas),
            "hit_rate_plus": self.plus, "hit_rate_minus": self.minus, "hit_rate": self.hits.tolist(),
            "effect": self.effects.tolist(), "effect_low": self.low.tolist(), "effect_high": self.high.tolist(),
            "restoration": None if restoration is None else restoration.tolist(),
            "random_hit_rate": self.random.tolist(),
            "tokens": {e: [list(t) for t in ts] for e, ts in self.tokens.items()},
            "l_emo": self.l_emo, "tied": list(self.tied), "note": self.note, "examples": list(self.examples),
        }  # fmt: skip
        return write_json(Path(folder) / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> Layers:
        """Read what :meth:`save` wrote; ``ValueError`` says what is wrong with it."""
        path = Path(folder) / FILE
        r: Any = read_json(path, "effects of steering by layer")
        if not isinstance(r, dict) or r.get("format") != FORMAT:
            raise ValueError(f"{path}: not effects of steering by layer (expected format {FORMAT!r})")
        return cls(
            tuple(r["layers"]), tuple(r["alphas"]), r["hit_rate_plus"], r["hit_rate_minus"], np.array(r["hit_rate"]),
            np.array(r["effect_low"]), np.array(r["effect_high"]), np.array(r["random_hit_rate"]),
            {e: tuple(tuple(t) for t in ts) for e, ts in r["tokens"].items()}, r["l_emo"], tuple(r["tied"]),
            r["note"], tuple(r["examples"]), r["settings"],
        )  # fmt: skip


def inject(
    subject: Subject, pairs: Pairs, steering: SteeringVectors, *,
    alphas: Sequence[float] = ALPHAS, layers: Sequence[int] | None = None, rows: Rows = "all", reading: Reading = "raw",
    pooled: bool = False, draws: int = LEAST_DRAWS, top: int = 10, seed: int = 0, batch: int | None = None,
    out: str | Path | None = None, progress: bool = True,
) -> Layers:  # fmt: skip
    """Add steering vectors in the run on X-, layer by layer, and read the answers.

    Args:
        subject: the model.
        pairs: of the analyze split.
        steering: of Stage I.
        alphas: strengths; the paper's is 0.1.
        layers: all by default.
        rows: that are steered: "all", of the prompt and of what is generated (default), "prompt", or "last".
        reading: "raw" (default): ``h + alpha * S``; "relative": ``h + alpha * |h| * S/|S|``; "norm-preserving".
        pooled: one steering vector for all emotions.
        draws: random directions in place of each vector, at least 10.
        top: tokens of each vector's projection on the vocabulary.
        seed: of the random directions and the bootstrap.
        batch: rows (an answer each) at a time; None: what memory allows.
        out: a folder in which answers are kept while they come in; a killed run resumes.
        progress: show progress bars.

    Raises:
        ValueError: an emotion without a steering vector, too few draws, fewer than two pairs, or a wrong reading.
    """
    count = subject.handle.geometry.layers
    chosen = tuple(range(count)) if layers is None else tuple(layers)
    _validate(chosen, count, rows, reading, draws, len(pairs))
    names = list(dict.fromkeys(pairs.emotions))
    vectors = {e: steering.of(None if pooled else e) for e in names}
    plus, minus = (
        subject.hits(subject.generate(pairs.images(side), pairs.events, progress=progress), pairs.emotions)
        for side in ("emotional", "neutral")
    )
    hits = np.zeros((len(pairs), draws + 1, len(chosen), len(alphas)))
    examples = []
    for number, emotion in enumerate(tqdm(names, desc="inject", disable=not progress)):
        which = [i for i, e in enumerate(pairs.emotions) if e == emotion]
        part = pairs.take(which)
        directions = torch.cat([vectors[emotion][None], random_directions(vectors[emotion], draws, [seed, number])])

        def plan(direction: int, layer: int, alpha: float, directions: Tensor = directions) -> Plan:
            vector = directions[direction, layer]
            if not bool(vector.any()):
                return Plan()
            edit = AddVector(
                [layer], vector, by=alpha, norm="keep" if reading == "norm-preserving" else "free",
                relative=reading == "relative", to="last" if rows == "last" else None,
                phase="both" if rows == "all" else "prefill",
            )  # fmt: skip
            return Plan([edit])

        metric = generated(Says(subject, emotion), limit=subject.limit, tokenizer=subject.tokenizer)
        prompts = [part.take([i]).inputs(subject, "neutral") for i in range(len(part))]
        axes = {"direction": range(draws + 1), "layer": chosen, "alpha": tuple(alphas)}
        folder = None if out is None else Path(out) / emotion
        found = plan_grid(subject.model, prompts, plan, axes, metric, batch=batch, out=folder, progress=False)
        hits[which] = (found.values[None] if found.pairs is None else found.pairs).numpy()
        texts = np.array((found.texts or [])[: hits[0].size], object).reshape(hits.shape[1:])
        examples.append(_example(subject, part, emotion, texts[0]))
    return _judged(
        hits, plus, minus, chosen, tuple(map(float, alphas)), examples,
        {("pooled" if pooled else e): tuple(spelled(subject, vectors[e][list(chosen)], top)) for e in names},
        {
            "rows": rows, "reading": reading, "vectors": "pooled" if pooled else "per emotion", "draws": draws,
            "seed": seed, "pairs": len(pairs), "side": "neutral", "l_emo": "largest mean effect over the alphas",
            "random": "directions of equal norm, one for each emotion, layer and draw", "lexicon": subject.lexicon.name,
        },
        seed,
    )  # fmt: skip


@dc.dataclass(frozen=True)
class Says:
    """A score for generated text: 1.0 where it names an emotion."""

    subject: dc.InitVar[Subject]
    emotion: str
    lexicon: str = ""

    def __post_init__(self, subject: Subject) -> None:
        """Keep the model out of what identifies the score."""
        words = {e: sorted(w) for e, w in subject.lexicon.words.items()}
        object.__setattr__(self, "lexicon", repr(words))
        object.__setattr__(self, "_lexicon", subject.lexicon)

    def __call__(self, text: str) -> float:  # noqa: D102
        return float(self.__dict__["_lexicon"].hit(text, self.emotion))


def random_directions(vectors: Tensor, draws: int, seed: int | Sequence[int]) -> Tensor:
    """``[draws, L, d_model]``: random directions, each as long as its layer's vector in ``[L, d_model]``."""
    rng = np.random.default_rng(seed)
    found = torch.from_numpy(rng.standard_normal((draws, *vectors.shape))).to(vectors)
    return found / found.norm(dim=-1, keepdim=True) * vectors.norm(dim=-1, keepdim=True)


@torch.no_grad()
def spelled(subject: Subject, vectors: Tensor, top: int = 10) -> list[tuple[str, ...]]:
    """Of vectors ``[n, d_model]``, the tokens that each makes likelier on the direct path to the logits, best first.

    The final norm's gain is folded in: ``W_U . diag(g) . S``.
    """
    handle = subject.handle
    unembed = handle.weight(handle.unembed)
    logits = (vectors.to(unembed) * handle.norm_gain()) @ unembed.T
    ids = logits.topk(min(top, logits.shape[-1])).indices.tolist()
    return [tuple(subject.tokenizer.decode([i]).strip() for i in row) for row in ids]


def _validate(layers: Sequence[int], count: int, rows: str, reading: str, draws: int, pairs: int) -> None:
    if rows not in ROWS or reading not in READINGS:
        raise ValueError(
            f"rows={rows!r}, reading={reading!r}: expected one of {', '.join(ROWS)}, and of {', '.join(READINGS)}"
        )
    if draws < LEAST_DRAWS:
        raise ValueError(f"draws={draws}: expected at least {LEAST_DRAWS} random directions")
    if not layers or len(set(layers)) < len(layers) or not all(0 <= l < count for l in layers):
        raise ValueError(f"layers={list(layers)}: expected different ones from 0 to {count - 1}")
    if pairs < 2:
        raise ValueError(f"{pairs} pair: an effect with an interval needs at least two")


def _example(subject: Subject, part: Pairs, emotion: str, steered: np.ndarray) -> dict[str, Any]:
    one = part.take([0])
    plus, minus = (subject.generate(one.images(side), one.events)[0] for side in ("emotional", "neutral"))
    return {
        "id": one.records[0].id, "emotion": emotion, "event": one.events[0], "plus": plus, "minus": minus,
        "steered": [[str(t).strip() for t in row] for row in steered],
    }  # fmt: skip


def _judged(
    hits: np.ndarray, plus: np.ndarray, minus: np.ndarray, layers: tuple[int, ...], alphas: tuple[float, ...],
    examples: list[dict[str, Any]], tokens: dict[str, tuple[tuple[str, ...], ...]], settings: dict[str, Any], seed: int,
) -> Layers:  # fmt: skip
    """Means, intervals and the choice of a layer, of hits ``[n, 1 + R, L, A]``."""
    means = hits.mean(0)
    low, high = intervals(hits[:, 0] - minus[:, None, None], np.ones(len(hits)), seed=seed)
    l_emo, tied, note = choose(layers, means[0] - minus.mean(), means[1:] - minus.mean())
    return Layers(
        layers, alphas, float(plus.mean()), float(minus.mean()), means[0], low, high, means[1:], tokens, l_emo, tied,
        note, tuple(examples), settings,
    )  # fmt: skip


def choose(layers: Sequence[int], effects: np.ndarray, random: np.ndarray) -> tuple[int | None, tuple[int, ...], str]:
    """``l_emo``, the layers it is tied with, and what to know about the choice.

    Args:
        layers: numbers.
        effects: ``[L, A]``; the mean over strengths counts.
        random: ``[R, L, A]``, of random directions.

    Of tied layers the deepest is taken: heads are patched from ``l_emo`` downwards, and it leaves out none.
    """
    mean, best = effects.mean(1), float(effects.mean(1).max())
    if best <= 0:
        return None, (), "in no layer does steering make the model say the emotion more often than without"
    tied = tuple(l for l, value in zip(layers, mean, strict=True) if value >= best - 1e-12)
    l_emo, notes = max(tied), []
    if len(tied) > 1:
        notes.append(f"layers {', '.join(map(str, tied))} have the same effect; the deepest of them is taken")
    above = float(random.mean(2)[:, layers.index(l_emo)].max())
    if best <= above:
        notes.append(f"a random direction does as much in layer {l_emo} ({above:+.3f} against {best:+.3f})")
    return l_emo, tied, "; ".join(notes)
