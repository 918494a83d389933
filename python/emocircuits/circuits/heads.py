"""Stage II.2: critical heads, by emotional intention and by backward activation patching (method.md; arXiv 2605.21980).

Heads are ranked on one half of the pairs and tested on the other. A head is *critical* when it is among the first of
the ranking and, on the other half, restores more than the 95th percentile of matched random heads (heads of the same
layers that are not candidates), by a margin, in a paired test corrected for the number of candidates.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from emocircuits.circuits.pairs import Pairs
from emocircuits.circuits.patch_effects import ranked
from emocircuits.circuits.steering import SteeringVectors
from emocircuits.circuits.stored import read_record, read_tables, write_tables
from emocircuits.circuits.subject import Subject
from emocircuits.files import write_bytes, write_json
from emocircuits.measure import capture
from emocircuits.scoring.statistics import intervals
from emocircuits.sweep import Sweep
from emocircuits.sweep.metrics import Metric, projection

FORMAT = "emocircuits.heads/1"
FILE, TENSORS, TABLE = "heads.json", "heads.safetensors", "heads.parquet"
Reads = Literal["projection", "log-odds"]
Rows = Literal["all", "last"]


@dc.dataclass(frozen=True)
class LogOdds(Metric):
    """Log-odds that the next token begins one of some words: ``logit sum_t p(t)``."""

    tokens: tuple[int, ...] = ()

    def __call__(self, read: Tensor, reference: Tensor) -> Tensor:
        """``[n]``."""
        inside = read.log_softmax(-1)[..., list(self.tokens)].logsumexp(-1)
        return (inside - torch.log1p(-inside.exp().clamp(max=1 - 1e-6))).mean(-1)


@dc.dataclass(frozen=True)
class Candidate:
    """A head of the ranking, and what the other half of the pairs says of it.

    Attributes:
        layer, head: where.
        rank_effect: share of the gap that it restores on the ranking half.
        effect, low, high: the same on the testing half, with a 95 % bootstrap interval over pairs.
        random: 95th percentile of the effects of matched random heads on the testing half.
        p, q: one-sided Wilcoxon test over pairs that it restores more than these do on average, and the value
            corrected for the number of candidates (Benjamini-Hochberg).
        critical: whether it passed.
    """

    layer: int
    head: int
    rank_effect: float
    effect: float
    low: float
    high: float
    random: float
    p: float
    q: float
    critical: bool


@dc.dataclass(frozen=True, eq=False)
class Heads:
    """What patching and intention say of every head.

    Attributes:
        effects: ``[L, H]`` float64, share of the gap that comes back, ratio of means over all pairs.
        intention: ``[L, H]`` float64, mean over pairs of ``cos(W_O^h z_h, S)`` at the last prompt row of X+.
        restored: ``[pairs, L, H]`` float64, ``patched - corrupt`` of every pair.
        gaps: ``[pairs, L]`` float64, ``clean - corrupt`` of every pair where patches of a layer are read.
        half: ``[pairs]``: 0 the ranking half, 1 the testing half.
        emotions: of every pair.
        candidates: the first of the ranking, tested.
        settings: readings and numbers.
    """

    effects: np.ndarray
    intention: np.ndarray
    restored: np.ndarray
    gaps: np.ndarray
    half: np.ndarray
    emotions: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    settings: dict[str, Any]

    @property
    def critical(self) -> list[Candidate]:
        """Candidates that passed, strongest on the testing half first."""
        return sorted((c for c in self.candidates if c.critical), key=lambda c: -c.effect)

    def of(self, emotion: str) -> np.ndarray:
        """Effects ``[L, H]`` on the pairs of one emotion."""
        which = np.array([e == emotion for e in self.emotions])
        if not which.any():
            raise ValueError(f"no pair of {emotion!r}; there are {', '.join(dict.fromkeys(self.emotions))}")
        return shares(self.restored[which], self.gaps[which])

    def save(self, folder: str | Path) -> Path:
        """Write ``heads.parquet`` (a row a head), the tables of single pairs, and ``heads.json``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = Path(folder)
        names = ("effects", "intention", "restored", "gaps", "half")
        digest = write_tables(folder / TENSORS, {n: getattr(self, n) for n in names})
        layers, heads = np.indices(self.effects.shape).reshape(2, -1)
        columns: dict[str, Any] = {
            "layer": layers, "head": heads, "effect": self.effects.ravel(), "intention": self.intention.ravel(),
        }  # fmt: skip
        columns |= {f"effect_{e}": self.of(e).ravel() for e in dict.fromkeys(self.emotions)}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_bytes(folder / TABLE, sink.getvalue().to_pybytes())
        record = {
            "format": FORMAT, "tensors": TENSORS, "sha256": digest, "table": TABLE, "settings": self.settings,
            "average_over": "pairs", "n": len(self.emotions), "emotions": list(self.emotions),
            "candidates": [dc.asdict(c) for c in self.candidates],
        }  # fmt: skip
        return write_json(folder / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> Heads:
        """Read what :meth:`save` wrote; ``ValueError`` says what is wrong with it."""
        record = read_record(Path(folder) / FILE, FORMAT, "critical heads")
        tensors: dict[str, Any] = read_tables(Path(folder) / TENSORS, record.get("sha256", ""))
        candidates = tuple(Candidate(**c) for c in record["candidates"])
        return cls(**tensors, emotions=tuple(record["emotions"]), candidates=candidates, settings=record["settings"])


def shares(restored: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Effects ``[L, H]``: mean of ``restored [pairs, L, H]`` over mean of ``gaps [pairs, L]``.

    Raises:
        ValueError: in some layer the two sides do not differ on average, so that there is nothing to restore.
    """
    gap = gaps.mean(0)
    if not (np.abs(gap) > 1e-9 * np.abs(restored).max(initial=1e-9)).all():
        raise ValueError(
            "the emotional and the neutral side give the same value on average, so patching has nothing to restore"
        )
    result: np.ndarray = restored.mean(0) / gap[:, None]
    return result


@torch.no_grad()
def intention(subject: Subject, pairs: Pairs, steering: SteeringVectors, *, pooled: bool = False) -> np.ndarray:
    """``[L, H]``: mean over pairs of ``cos(W_O^h z_h[LAST], S[e, l])`` in the run on X+.

    What a head writes is not formed: the inner product goes through ``S`` projected back, the norm through the Gram
    matrix of ``W_O^h`` (method.md, "Exact identities").
    """
    handle = subject.handle
    geometry = handle.geometry
    total = np.zeros((geometry.layers, geometry.heads))
    projections = [handle.weight(p).detach().float() for p in handle.output_projections]  # [d_model, H * D]
    split = [w.unflatten(1, (geometry.heads, -1)) for w in projections]
    grams = [torch.einsum("ohd,ohe->hde", w, w) for w in split]
    for which, part in pairs.batches(32):
        with capture(subject.model, ["z"], columns=[-1]) as seen:
            subject.model(**part.inputs(subject, "emotional"), use_cache=False, logits_to_keep=1)
        for layer in range(geometry.layers):
            z = seen["z"][layer][:, 0].float()  # [B, H, D]
            wanted = [steering.of(None if pooled else pairs.emotions[i])[layer] for i in which]
            s = torch.stack(wanted).to(z)
            back = torch.einsum("ohd,bo->bhd", split[layer], s)
            norm = torch.einsum("bhd,hde,bhe->bh", z, grams[layer], z).clamp_min(0).sqrt()
            cosine = (z * back).sum(-1) / (norm * s.norm(dim=-1, keepdim=True)).clamp_min(1e-12)
            total[layer] += cosine.sum(0).double().cpu().numpy()
    return total / len(pairs)


def critical_heads(
    subject: Subject, pairs: Pairs, steering: SteeringVectors, l_emo: int, *,
    reads: Reads = "projection", pooled: bool = False, rows: Rows = "all", top: int = 10, margin: float = 0.01,
    level: float = 0.05, prescreen: str | None = None, confirm: int = 64, seed: int = 0, progress: bool = True,
) -> Heads:  # fmt: skip
    """Rank heads by backward patching on one half of the pairs, test the first ones on the other.

    Args:
        subject: the model.
        pairs: of the analyze split, at least two of each emotion.
        steering: of Stage I.
        l_emo: heads up to this layer are read there, ``<resid_post[l_emo], S / |S|>`` of the last prompt row; heads
            above it in the last layer.
        reads: "projection" (default), or "log-odds" of the emotion's words in the row that emits them.
        pooled: one steering vector for all emotions.
        rows: where ``z`` is patched: "all" rows (default), or the "last" one.
        top: candidates.
        margin: by how much a critical head restores more than random ones, as a share of the gap: without it heads
            that all carry the same would be told apart by rounding.
        level: of the corrected test.
        prescreen, confirm: attribution patching first, see :meth:`emocircuits.sweep.Sweep.heads`; for large models.
        seed: of the halves and the bootstrap.
        progress: show progress bars.

    Raises:
        ValueError: fewer than two pairs of an emotion, or nothing to restore.
    """
    half = halves(pairs.emotions, seed)
    restored, gaps = patched(
        subject, pairs, steering, l_emo, reads=reads, pooled=pooled, rows=rows, prescreen=prescreen,
        confirm=confirm, progress=progress,
    )  # fmt: skip
    effects = shares(restored, gaps)
    candidates = judged(restored, gaps, half, top=top, margin=margin, level=level, seed=seed)
    settings = {
        "l_emo": l_emo, "reads": reads, "vectors": "pooled" if pooled else "per emotion",
        "rows": rows, "top": top, "margin": margin,
        "level": level, "prescreen": prescreen, "confirm": confirm if prescreen else None, "seed": seed,
        "read_at": [l_emo if layer <= l_emo else len(effects) - 1 for layer in range(len(effects))],
        "ranked_on": int((half == 0).sum()), "tested_on": int((half == 1).sum()),
        "random": "heads of the same layers that are not candidates",
    }  # fmt: skip
    found = intention(subject, pairs, steering, pooled=pooled)
    return Heads(effects, found, restored, gaps, half, tuple(pairs.emotions), candidates, settings)


def halves(emotions: Sequence[str], seed: int) -> np.ndarray:
    """``[pairs]`` 0 or 1, as many of each emotion in both halves.

    Raises:
        ValueError: an emotion with one pair only.
    """
    rng = np.random.default_rng(seed)
    half = np.zeros(len(emotions), int)
    for emotion in dict.fromkeys(emotions):
        which = rng.permutation([i for i, e in enumerate(emotions) if e == emotion])
        if len(which) < 2:
            raise ValueError(f"{emotion!r} has one pair; heads are ranked on some pairs and tested on others: give two")
        half[which[len(which) // 2 :]] = 1
    return half


def patched(
    subject: Subject, pairs: Pairs, steering: SteeringVectors, l_emo: int, *, reads: Reads, pooled: bool,
    rows: Rows, prescreen: str | None, confirm: int, progress: bool,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """``patched - corrupt [pairs, L, H]`` and ``clean - corrupt [pairs, L]`` of the reading of each layer."""
    geometry = subject.handle.geometry
    answer = reads == "log-odds"
    if reads not in ("projection", "log-odds"):
        raise ValueError(f"reads={reads!r}: expected 'projection' or 'log-odds'")
    if rows not in ("all", "last"):
        raise ValueError(f"rows={rows!r}: expected 'all' or 'last'")
    sides = [
        [part.inputs(subject, side, answer=answer) for part in (pairs.take([i]) for i in range(len(pairs)))]
        for side in ("emotional", "neutral")
    ]
    restored = np.zeros((len(pairs), geometry.layers, geometry.heads))
    gaps = np.zeros((len(pairs), geometry.layers))
    last = geometry.layers - 1
    parts = [(last, range(geometry.layers))] if answer else [(l_emo, range(l_emo + 1))]
    if not answer and l_emo < last:
        parts.append((last, range(l_emo + 1, last + 1)))
    for read, layers in parts:
        metrics = [reading(subject, steering, e, read, reads, pooled) for e in pairs.emotions]
        sweep = Sweep(subject.model, clean=sides[0], corrupt=sides[1], metric=metrics, progress=progress)
        more: dict[str, Any] = {"prescreen": prescreen, "confirm": confirm} if prescreen else {}
        result = sweep.heads("all" if rows == "all" else [-1], layers=list(layers), **more)
        values, baselines = result.pairs, result.baselines
        if values is None or baselines is None:  # one pair
            values = result.values[None]
            baselines = torch.tensor([[result.clean, result.corrupt]], dtype=torch.float64)
        values = values.flatten(1, 2) if values.ndim == 4 else values  # one column
        restored[:, list(layers)] = (values - baselines[:, 1, None, None]).numpy()
        gaps[:, list(layers)] = (baselines[:, 0] - baselines[:, 1]).numpy()[:, None]
    return restored, gaps


def reading(
    subject: Subject, steering: SteeringVectors, emotion: str, layer: int, reads: Reads, pooled: bool
) -> Metric:
    """What measures a patch: ``<resid_post[layer], S / |S|>`` of the last row, or the log-odds of the emotion's words.

    Args:
        subject: the model.
        steering: of Stage I.
        emotion: of the pair.
        layer: whose output is projected; log-odds are of the logits.
        reads: which of the two.
        pooled: one steering vector for all emotions.
    """
    if reads == "log-odds":
        return LogOdds(-1, tuple(subject.lexicon.first_tokens(subject.tokenizer, emotion).tolist()))
    vector = steering.of(None if pooled else emotion)[layer]
    return projection(vector / vector.norm(), layer)


def judged(
    restored: np.ndarray, gaps: np.ndarray, half: np.ndarray, *, top: int, margin: float, level: float, seed: int
) -> tuple[Candidate, ...]:
    """The first heads of the ranking half, tested on the other half."""
    rank, test = half == 0, half == 1
    on_rank, on_test = shares(restored[rank], gaps[rank]), shares(restored[test], gaps[test])
    first = ranked(on_rank)[:top]
    bounds = [intervals(restored[test, l], gaps[test, l], seed=seed) for l in range(on_test.shape[0])]
    low, high = (np.stack([b[i] for b in bounds]) for i in (0, 1))
    found = []
    for layer, head in first:
        others = [h for h in range(on_test.shape[1]) if (layer, h) not in first]
        # A layer of candidates only has no heads to compare with but those below them.
        pool = on_test[layer, others] if others else np.delete(on_test[layer], head)
        limit = float(np.percentile(pool, 95)) if len(pool) else 0.0
        mean = restored[test, layer][:, others].mean(1) if others else np.zeros(int(test.sum()))
        difference = (restored[test, layer, head] - mean) * np.sign(gaps[test, layer].mean())
        p = 1.0 if not np.any(difference) else float(stats.wilcoxon(difference, alternative="greater").pvalue)
        found.append((layer, head, limit, p))
    corrected: Any = stats.false_discovery_control([p for *_, p in found]) if found else []
    return tuple(
        Candidate(
            layer, head, float(on_rank[layer, head]), float(on_test[layer, head]), float(low[layer, head]),
            float(high[layer, head]), limit, p, float(q),
            bool(q < level and on_test[layer, head] > limit + margin and low[layer, head] > 0),
        )
        for (layer, head, limit, p), q in zip(found, corrected, strict=True)
    )  # fmt: skip
