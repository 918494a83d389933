"""First emotion words of greedy answers under many plans.

Prompts that no plan edits are run once: plans that act on generated rows only start from the same cache. Answers end
when every one has named an emotion, so that what is decoded is two or three tokens of most.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emocircuits.demo.cases import Case, Prompts
from emocircuits.embedded import faces, language
from emocircuits.patching import patch
from emocircuits.plan import Plan
from emokernels import Role

LABELS = list(faces.LABELS)


@dc.dataclass(frozen=True, eq=False)
class Said:
    """What answers say.

    Attributes:
        hit, prior: ``[n]`` bool, the first emotion word is the face's; is the event's, and not the face's.
        face, margin: ``[n]`` float64, log-probability of the face's words in the row that emits the word, and how much
            larger it is than that of the event's words.
    """

    hit: np.ndarray
    prior: np.ndarray
    face: np.ndarray
    margin: np.ndarray

    def part(self, which: slice) -> Said:
        """Some of the answers."""
        return Said(*(getattr(self, f.name)[which] for f in dc.fields(self)))

    def rates(self) -> dict[str, float]:
        """Means."""
        return {f.name: float(getattr(self, f.name).mean()) for f in dc.fields(self)}


class Asked:
    """Cases whose answers are asked for under one plan after another.

    Args:
        model, processor: the embedded model, or one of another training seed.
        cases: what is asked.
        size: prompts of a batch.
        limit: longest answer in new tokens; 8 reach the emotion word of every template.
    """

    def __init__(
        self, model: nn.Module, processor: Any, cases: Sequence[Case], *, size: int = 400, limit: int = 8
    ) -> None:
        self.model, self.cases, self.limit = model, list(cases), limit
        self.tokenizer = processor.tokenizer
        self.prompts = Prompts(cases, processor, size=size)
        self.order = np.array(self.prompts.order)
        words = torch.full((len(self.tokenizer),), -1)
        for k, label in enumerate(LABELS):
            words[torch.tensor(self.tokenizer.convert_tokens_to_ids(sorted(language.LEXICON[label])))] = k
        self.words = words
        self.faces = np.array([LABELS.index(c.emotion) for c in cases])
        self.suggests = np.array([LABELS.index(c.suggests) for c in cases])
        self.people = np.array([c.identity for c in cases])
        self._prompted: list[tuple[Any, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.cases)

    @torch.no_grad()
    def said(self, plan: Plan | None = None) -> Said:
        """First emotion words under a plan, in the order of the cases."""
        plan = plan or Plan()
        parts = [self._decoded(plan, *prompted) for prompted in self._run(plan)]
        label, logp = (torch.cat(p).numpy() for p in zip(*parts, strict=True))
        back = np.argsort(self.order)
        label, logp = label[back], logp[back].astype(float)
        rows = np.arange(len(label))
        own = logp[rows, self.faces]
        return Said(
            label == self.faces, (label == self.suggests) & (self.suggests != self.faces), own,
            own - logp[rows, self.suggests],
        )  # fmt: skip

    def emotions(self, logits: Tensor) -> Tensor:
        """Log-probability of each label's words, ``[n, V]`` logits to ``[n, 7]``."""
        logp = logits.float().log_softmax(-1)
        return torch.stack([logp[:, self.words == k].logsumexp(-1) for k in range(len(LABELS))], 1)

    def _run(self, plan: Plan) -> Iterator[tuple[dict[str, Tensor], Any, Tensor]]:
        """Prompts with their cache and the logits of their last row."""
        if all(r == Role.GENERATED for edit in plan for r in edit.destinations()):
            if self._prompted is None:
                self._prompted = [self._prompt(inputs, Plan()) for inputs in self.prompts.batches]
            yield from zip(self.prompts.batches, *zip(*self._prompted, strict=True), strict=True)
        else:
            for inputs in self.prompts.batches:
                yield inputs, *self._prompt(inputs, plan)

    def _prompt(self, inputs: dict[str, Tensor], plan: Plan) -> tuple[Any, Tensor]:
        with patch(self.model, plan):
            out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1]

    def _decoded(self, plan: Plan, inputs: dict[str, Tensor], cache: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Label ``[n]`` of the first emotion word, -1 none, and ``[n, 7]`` read where it is (else in the last row)."""
        mask, n = inputs["attention_mask"], len(logits)
        label, logp = torch.full((n,), -1), self.emotions(logits)
        ended, steps = torch.zeros(n, dtype=torch.bool), 0
        with patch(self.model, plan):
            while True:
                ids = logits.argmax(-1)
                open_ = (label < 0) & ~ended
                logp[open_] = self.emotions(logits)[open_]
                label[open_] = self.words[ids][open_]
                ended |= ids == self.tokenizer.eos_token_id
                if steps + 1 == self.limit or bool(((label >= 0) | ended).all()):
                    break
                mask = torch.cat([mask, mask.new_ones(n, 1)], 1)
                logits = self.model(
                    input_ids=ids[:, None], attention_mask=mask, past_key_values=cache, use_cache=True
                ).logits[:, -1]
                steps += 1
        if steps:
            cache.crop(-steps)
        return label, logp
