"""Stage I: steering vectors from contrastive pairs (method.md "Stage I"; arXiv 2605.21980)."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from emocircuits.circuits.pairs import SIDES, Pairs
from emocircuits.circuits.stored import read_record, read_tables, write_tables
from emocircuits.circuits.subject import Subject
from emocircuits.files import write_json
from emocircuits.measure import capture

FORMAT = "emocircuits.steering/1"
FILE, TENSORS = "steering.json", "steering.safetensors"
LEAST = 2
"""Kept pairs that an emotion needs."""


@dc.dataclass(frozen=True)
class Sample:
    """One pair in Stage I: what the model said of both sides, whether it was kept, and why not."""

    id: str
    emotion: str
    hit: float
    kept: bool
    why: str
    said: str = ""


@dc.dataclass(frozen=True, eq=False)
class SteeringVectors:
    """Mean resid_post(X+) - resid_post(X-) at the last prompt token, of the pairs that were kept.

    Attributes:
        emotions: with a vector each.
        vectors: ``[E, L, d_model]`` float32, not normalised.
        kept, total: pairs of each emotion, after and before the hit-rate filter.
        pooled: ``[L, d_model]`` float32, the mean over all kept pairs, whatever their emotion.
        samples: every pair.
        tau: a pair is kept when its hit rate on X+ is strictly above this.
    """

    emotions: tuple[str, ...]
    vectors: Tensor
    kept: tuple[int, ...]
    total: tuple[int, ...]
    pooled: Tensor
    samples: tuple[Sample, ...] = ()
    tau: float = 0.5

    def of(self, emotion: str | None) -> Tensor:
        """``[L, d_model]`` of one emotion; None: pooled.

        Raises:
            ValueError: an emotion without a vector.
        """
        if emotion is None:
            return self.pooled
        if emotion not in self.emotions:
            raise ValueError(f"no steering vector of {emotion!r}; there are {', '.join(self.emotions)}")
        return self.vectors[self.emotions.index(emotion)]

    def save(self, folder: str | Path) -> Path:
        """Write ``steering.safetensors`` and, after it, ``steering.json``, which says what is in it and why."""
        folder = Path(folder)
        digest = write_tables(folder / TENSORS, {"vectors": self.vectors.numpy(), "pooled": self.pooled.numpy()})
        record = {
            "format": FORMAT, "tensors": TENSORS, "sha256": digest,
            "emotions": list(self.emotions), "kept": list(self.kept), "total": list(self.total), "tau": self.tau,
            "average_over": "kept pairs", "samples": [dc.asdict(s) for s in self.samples],
        }  # fmt: skip
        return write_json(folder / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> SteeringVectors:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: there is nothing, or the tensors are not whole.
        """
        record = read_record(Path(folder) / FILE, FORMAT, "steering vectors")
        tensors = {n: torch.from_numpy(x) for n, x in read_tables(Path(folder) / TENSORS, record["sha256"]).items()}
        return cls(
            tuple(record["emotions"]), tensors["vectors"], tuple(record["kept"]), tuple(record["total"]),
            tensors["pooled"], tuple(Sample(**s) for s in record["samples"]), record["tau"],
        )  # fmt: skip


@torch.no_grad()
def extract(
    subject: Subject, pairs: Pairs, *, tau: float = 0.5, batch: int = 64, progress: bool = True
) -> SteeringVectors:
    """Stage I on a model: ask it about every X+, keep what it reads correctly, average the residual differences.

    Args:
        subject: the model.
        pairs: of the extract split.
        tau: keep a pair when its hit rate on X+ is strictly above this.
        batch: pairs at a time.
        progress: show progress bars.

    Raises:
        ValueError: no answer names any emotion, or an emotion keeps fewer than two pairs.
    """
    said = subject.generate(pairs.emotional, pairs.events, batch=batch, progress=progress)
    if not any(subject.lexicon.found(text) for text in said):
        raise ValueError(
            f"none of {len(said)} answers names an emotion of the lexicon {subject.lexicon.name!r} (the first: "
            f"{said[0][:80]!r}); ask for a feeling, allow longer answers, or give a lexicon with the model's words"
        )
    hits = subject.hits(said, pairs.emotions)
    handle = subject.handle
    states = {s: torch.zeros(handle.geometry.layers, len(pairs), handle.geometry.d_model) for s in SIDES}
    with tqdm(total=2 * len(pairs), desc="residuals", disable=not progress) as bar:
        for which, part in pairs.batches(batch):
            for side in SIDES:
                with capture(subject.model, ["resid_post"], columns=[-1]) as seen:
                    subject.model(**part.inputs(subject, side), use_cache=False, logits_to_keep=1)
                states[side][:, which] = seen["resid_post"][:, :, 0].float().cpu()
                bar.update(len(which))
    found = steering_vectors(states["emotional"], states["neutral"], pairs.emotions, hits.tolist(), tau=tau)
    samples = tuple(
        Sample(r.id, r.emotion, float(hit), bool(hit > tau), "" if hit > tau else f"hit rate {hit:g} <= {tau:g}", text)
        for r, hit, text in zip(pairs.records, hits, said, strict=True)
    )
    return dc.replace(found, samples=samples)


def steering_vectors(
    plus: Tensor, minus: Tensor, emotions: Sequence[str], hits: Sequence[float], *, tau: float = 0.5
) -> SteeringVectors:
    """Average the residual differences of pairs whose emotional side the model reads correctly.

    Args:
        plus, minus: ``[L, B, d_model]`` resid_post at the last prompt token of X+ and X-.
        emotions: ``[B]`` emotion of each pair.
        hits: ``[B]`` hit rate of the model on X+.
        tau: keep a pair when its hit rate is strictly above this.

    Raises:
        ValueError: an emotion keeps fewer than two pairs.
    """
    names = tuple(dict.fromkeys(emotions))
    difference = plus.float() - minus.float()
    keep = np.asarray(hits, float) > tau
    label = np.asarray(emotions)
    few = [n for n in names if (keep & (label == n)).sum() < LEAST]
    if few:
        told = "; ".join(
            f"emotion {n!r} keeps {(keep & (label == n)).sum()} of {(label == n).sum()} pairs" for n in few
        )
        raise ValueError(
            f"{told} at tau={tau}; each needs {LEAST}: give more pairs, lower tau, or leave the emotion out"
        )
    vectors, kept, total = [], [], []
    for name in names:
        chosen = torch.as_tensor(np.flatnonzero((label == name) & keep))
        vectors.append(difference[:, chosen].mean(1))
        kept.append(len(chosen))
        total.append(int((label == name).sum()))
    pooled = difference[:, torch.as_tensor(np.flatnonzero(keep))].mean(1)
    return SteeringVectors(names, torch.stack(vectors), tuple(kept), tuple(total), pooled, tau=tau)
