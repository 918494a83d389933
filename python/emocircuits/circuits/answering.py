"""What a subject says of pairs under many plans, decoded together, and how likely the subject itself finds it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emocircuits.circuits.pairs import Pairs, Side
from emocircuits.circuits.subject import Subject
from emocircuits.plan import Plan
from emocircuits.sweep import generated, plan_grid

Ids = tuple[int, ...]


@dc.dataclass(frozen=True)
class Said:
    """Greedy answers to one side of some pairs, by plan and pair.

    Attributes:
        side: of the pairs.
        ids: new tokens of each answer, with the end of the sequence where it was reached.
        texts: the same as text.
    """

    side: Side
    ids: tuple[tuple[Ids, ...], ...]
    texts: tuple[tuple[str, ...], ...]

    def rates(self, score: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
        """``[plans, pairs]`` float64 of a score of the answers to all pairs."""
        return np.stack([score(texts) for texts in self.texts])


def say(
    subject: Subject, pairs: Pairs, side: Side, plans: Sequence[Plan], *, batch: int | None = None,
    progress: bool = False,
) -> Said:  # fmt: skip
    """Answers under every plan; each is what ``patch(model, plan)`` and ``generate`` give for that pair.

    Args:
        subject: the model.
        pairs, side: what it is asked about.
        plans: without rows and positions; equal ones run once.
        batch: answers decoded together (None: what memory allows).
        progress: show a bar.
    """
    prompts = [pairs.take([i]).inputs(subject, side) for i in range(len(pairs))]
    # Without a tokenizer, texts are token ids; every answer is its own, so the score is not of interest.
    metric = generated(len, limit=subject.limit)
    found: Any = plan_grid(
        subject.model, prompts, lambda plan: plans[plan], {"plan": range(len(plans))}, metric, batch=batch,
        progress=progress,
    ).texts  # fmt: skip
    by_pair = [found[i * len(plans) : (i + 1) * len(plans)] for i in range(len(pairs))]
    ids = tuple(tuple(tuple(row[p]) for row in by_pair) for p in range(len(plans)))
    decode = subject.tokenizer.decode
    texts = tuple(tuple(decode(list(a), skip_special_tokens=True).strip() for a in row) for row in ids)
    return Said(side, ids, texts)


class Fluency:
    """How likely the unmodified model finds answers: each is scored once, however many plans give it."""

    def __init__(self, subject: Subject, pairs: Pairs, *, batch: int = 64) -> None:
        self.subject, self.pairs, self.batch = subject, pairs, batch
        self._known: dict[tuple[Side, int, Ids], float] = {}

    def perplexity(self, *said: Said) -> np.ndarray:
        """``[plans]``: exp of the mean over all tokens of all answers of ``-log p(token | prompt, tokens before)``.

        Teacher-forced, without any plan. Answers of no tokens count for none.

        Args:
            said: answers under the same plans; of several (both sides) all tokens count alike.
        """
        for one in said:
            self._score(one)
        values = []
        for rows in zip(*(one.ids for one in said), strict=True):
            known = [
                (self._known[one.side, i, ids], len(ids))
                for one, row in zip(said, rows, strict=True)
                for i, ids in enumerate(row)
                if ids
            ]
            values.append(np.exp(sum(v for v, _ in known) / max(1, sum(n for _, n in known))))
        return np.array(values)

    def _score(self, said: Said) -> None:
        wanted = {(said.side, i, ids) for row in said.ids for i, ids in enumerate(row) if ids}
        todo = sorted(wanted - set(self._known), key=lambda k: (len(self.pairs.records[k[1]].event), k[1:]))
        for start in range(0, len(todo), self.batch):
            part = todo[start : start + self.batch]
            which = self.pairs.take([i for _, i, _ in part])
            for key, value in zip(part, surprise(self.subject, which, said.side, [k[2] for k in part]), strict=True):
                self._known[key] = value


@torch.no_grad()
def surprise(subject: Subject, pairs: Pairs, side: Side, answers: Sequence[Ids]) -> list[float]:
    """``-log p(answer | prompt)`` in nats of one answer for each pair, in float32 or better, teacher-forced."""
    inputs, longest = pairs.inputs(subject, side), max(map(len, answers))
    shape = inputs["input_ids"].shape
    ids = torch.zeros(shape[0], longest, dtype=torch.long, device=inputs["input_ids"].device)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(answer)
        real[row, : len(answer)] = True
    longer: dict[str, Any] = {}
    for name, value in inputs.items():
        # Anything else that counts tokens (token types) says "text".
        more = ids if name == "input_ids" else real.long() if name == "attention_mask" else torch.zeros_like(ids)
        longer[name] = torch.cat([value, more.to(value)], 1) if value.shape == shape else value
    logits: Tensor = subject.model(**longer, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
    work = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = work.gather(-1, ids[..., None])[..., 0].masked_fill(~real, 0.0)
    return [-float(v) for v in picked.double().sum(1)]
