"""A model's own answers, token by token, and prompts that go on with them."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from emocircuits.circuits.pairs import SIDES, Pairs, Side
from emocircuits.circuits.subject import Subject
from emokernels import Role

SHOWN = 3


@dc.dataclass(frozen=True)
class Word:
    """An emotion word of an answer, neutral ones too: its tokens are ``start`` to ``stop - 1``."""

    text: str
    emotion: str
    start: int
    stop: int


@dc.dataclass(frozen=True)
class Answer:
    """A greedy answer without the token that ends it."""

    ids: tuple[int, ...]
    text: str
    words: tuple[Word, ...]


@torch.no_grad()
def own_answers(subject: Subject, pairs: Pairs, side: Side, *, batch: int = 32, progress: bool = False) -> list[Answer]:
    """What the unmodified model says of one side of every pair, in order."""
    model: Any = subject.model
    ends = getattr(model.generation_config, "eos_token_id", None)
    stops = {*(ends if isinstance(ends, list) else [ends]), subject.tokenizer.eos_token_id} - {None}
    found: dict[int, Answer] = {}
    with tqdm(total=len(pairs), desc=f"answers, {side}", disable=not progress) as bar:
        for which, part in pairs.batches(batch):
            inputs: dict[str, Any] = part.inputs(subject, side)
            out = model.generate(**inputs, max_new_tokens=subject.limit, do_sample=False)
            for i, row in zip(which, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((k for k, token in enumerate(row) if token in stops), len(row))
                found[i] = read(subject, row[:end])
            bar.update(len(which))
    return [found[i] for i in range(len(pairs))]


def read(subject: Subject, ids: Sequence[int]) -> Answer:
    """Find the emotion words of an answer, and which tokens they are."""
    decode = subject.tokenizer.decode
    lengths = [len(decode(list(ids[:k]))) for k in range(len(ids) + 1)]
    text = decode(list(ids))
    words = []
    for start, end, emotion in subject.lexicon.spans(text):
        inside = [k for k in range(len(ids)) if lengths[k] < end and lengths[k + 1] > start]
        words.append(Word(text[start:end], emotion, inside[0], inside[-1] + 1))
    return Answer(tuple(ids), text.strip(), tuple(words))


@dc.dataclass(frozen=True)
class LeftOut:
    """A pair that is not measured, because an answer names no emotion."""

    id: str
    side: Side
    text: str


def speaking(
    subject: Subject, pairs: Pairs, *, wordless: str, batch: int, progress: bool
) -> tuple[Pairs, dict[Side, list[Answer]], tuple[LeftOut, ...]]:
    """Answers of both sides of those pairs whose answers name an emotion.

    Args:
        subject: the model.
        pairs: to be asked about.
        wordless: "refuse" answers without an emotion word, or "leave out" their pairs.
        batch: answers at a time.
        progress: show progress bars.

    Raises:
        ValueError: an answer names no emotion, or leaving these out leaves fewer than two pairs.
    """
    if wordless not in ("refuse", "leave out"):
        raise ValueError(f"wordless={wordless!r}: expected 'refuse' or 'leave out'")
    said = {side: own_answers(subject, pairs, side, batch=batch, progress=progress) for side in SIDES}
    out = tuple(
        LeftOut(r.id, side, a.text) for side in SIDES for r, a in zip(pairs.records, said[side], strict=True)
        if not a.words
    )  # fmt: skip
    without = {x.id for x in out}
    kept = [i for i, r in enumerate(pairs.records) if r.id not in without]
    if out and (wordless == "refuse" or len(kept) < 2):
        told = "; ".join(f"{x.id}, {x.side} side: {x.text[:60]!r}" for x in out[:SHOWN])
        raise ValueError(
            f"{len(out)} of {2 * len(pairs)} answers name no emotion of the lexicon {subject.lexicon.name!r}: {told}"
            f"{'; ...' if len(out) > SHOWN else ''}. Leave these pairs out (wordless='leave out' does, where two or "
            "more remain), ask for a feeling, allow longer answers, or give a lexicon with the model's words"
        )
    return pairs.take(kept), {side: [said[side][i] for i in kept] for side in SIDES}, out


def forced(
    subject: Subject, inputs: dict[str, Tensor], tails: Sequence[Sequence[int]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts that go on with the beginnings of answers, padded on the left again: all rows end in the last column.

    Args:
        subject: the model.
        inputs: of the prompts, without an answer.
        tails: tokens that follow each prompt, possibly none.

    Returns:
        Inputs, and roles ``[B, N]`` uint8 in which the answers are GENERATED.
    """
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    columns = max(int(real[b].sum()) + len(tail) for b, tail in enumerate(tails))
    pad = subject.tokenizer.pad_token_id

    def longer(name: str, value: Tensor) -> Tensor:
        if value.shape != ids.shape:
            return value
        out = value.new_full((len(ids), columns), (pad or 0) if name == "input_ids" else 0)
        # Whatever else counts tokens (token types) says "text".
        told = {"attention_mask": 1, "roles": int(Role.GENERATED)}.get(name, 0)
        for b, tail in enumerate(tails):
            more = torch.tensor(list(tail) if name == "input_ids" else [told] * len(tail)).to(value)
            row = torch.cat([value[b, real[b]], more])
            out[b, columns - len(row) :] = row
        return out

    return {name: longer(name, value) for name, value in inputs.items()}, longer("roles", subject.roles(inputs))
