"""A model under study: how an image and an event become its inputs, and what its answer says."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from emocircuits.circuits.lexicon import Lexicon
from emocircuits.families import Handle, open_model
from emocircuits.patching import patch
from emocircuits.plan import Plan
from emocircuits.roles import prompt_roles
from emokernels import Role

QUESTION = "How does this make you feel? Describe the feeling that the picture shows in one or two sentences."


@dc.dataclass(frozen=True, eq=False)
class Subject:
    """A vision-language model, and how it is asked.

    Args:
        model: of a supported family, in eval mode.
        processor: its processor.
        prompt: from an event to the whole prompt text, with one image in it.
        lexicon: which words name which emotion.
        answer: the beginning of an answer, appended to prompts where a metric is read in the row that emits the
            emotion word (" i feel" for the embedded model). Empty: metrics are read in the last prompt row.
        limit: longest answer, in new tokens.
    """

    model: nn.Module
    processor: Any
    prompt: Callable[[str], str]
    lexicon: Lexicon
    answer: str = ""
    limit: int = 40

    def __post_init__(self) -> None:
        if not self.handle.sees:
            raise ValueError(f"{type(self.model).__name__} sees no images; emotional circuits need a model that does")
        if self.limit < 1:
            raise ValueError(f"limit is {self.limit}: expected at least 1 new token")

    @classmethod
    def embedded(cls) -> Subject:
        """The embedded model."""
        from emocircuits import embedded
        from emocircuits.embedded import language

        return cls(*embedded.load(), language.prompt, Lexicon.embedded(), answer=" i feel", limit=20)

    @classmethod
    def of(
        cls, model: nn.Module, processor: Any, *, question: str = QUESTION, lexicon: Lexicon | None = None,
        answer: str = "", limit: int = 40,
    ) -> Subject:  # fmt: skip
        """Any chat model: one image, the event, and a question.

        Raises:
            ValueError: the processor has no chat template, so nobody knows how to ask.
        """
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                "the processor has no chat template, so the prompt cannot be written; use an instruction-tuned model, "
                "or make a Subject with a prompt of your own"
            )

        def prompt(event: str) -> str:
            content = [{"type": "image"}, {"type": "text", "text": f"{event} {question}".strip()}]
            return str(
                processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            )

        return cls(model, processor, prompt, lexicon or Lexicon.english(), answer, limit)

    @property
    def handle(self) -> Handle:
        """Where the model's parts are."""
        return open_model(self.model)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def inputs(
        self, images: Sequence[Image.Image], events: Sequence[str], *, answer: bool = False
    ) -> dict[str, Tensor]:
        """Model inputs of prompts, one row each, padded on the left.

        Args:
            images, events: of each prompt.
            answer: append the beginning of an answer.

        Raises:
            ValueError: as many images as events are needed, and at least one.
        """
        if not images or len(images) != len(events):
            raise ValueError(f"{len(images)} images and {len(events)} events: expected one of each for every prompt")
        tokenizer = self.tokenizer
        side, tokenizer.padding_side = tokenizer.padding_side, "left"
        try:
            found = self.processor(
                images=list(images), text=[self.prompt(e) for e in events], padding=True, return_tensors="pt"
            )
        finally:
            tokenizer.padding_side = side
        inputs = {k: v for k, v in found.items() if isinstance(v, Tensor)}
        if answer and self.answer:
            inputs = self._begun(inputs)
        device = next(self.model.parameters()).device
        dtype = next(self.handle.text.parameters()).dtype
        return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}

    def _begun(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        tail = torch.tensor(self.begun)
        shape = inputs["input_ids"].shape
        longer = {}
        for name, value in inputs.items():
            if value.shape != shape:
                longer[name] = value
                continue
            # Anything else that counts tokens (token types) says "text".
            more = tail if name == "input_ids" else torch.full_like(tail, int(name == "attention_mask"))
            longer[name] = torch.cat([value, more.to(value).expand(shape[0], -1)], 1)
        return longer

    @property
    def begun(self) -> list[int]:
        """Token ids of `answer`."""
        return list(self.tokenizer(self.answer, add_special_tokens=False)["input_ids"]) if self.answer else []

    def roles(self, inputs: dict[str, Tensor], *, answer: bool = False) -> Tensor:
        """Roles ``[B, N]`` uint8 of such inputs; the beginning of an answer is GENERATED."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        placeholders = self.handle.placeholder_ids()
        tail = len(self.begun) if answer else 0
        if not tail:
            return prompt_roles(ids, mask, placeholders)
        roles = prompt_roles(ids[:, :-tail], mask[:, :-tail], placeholders)
        return torch.cat([roles, roles.new_full((len(ids), tail), int(Role.GENERATED))], 1)

    @torch.no_grad()
    def generate(
        self, images: Sequence[Image.Image], events: Sequence[str], plan: Plan | None = None, *, batch: int = 64,
        progress: bool = False,
    ) -> list[str]:  # fmt: skip
        """Greedy answers, in order, under a plan. Prompts of like length share a batch."""
        order = sorted(range(len(events)), key=lambda i: len(events[i]))
        texts = [""] * len(order)
        with patch(self.model, plan or Plan()):
            for start in tqdm(range(0, len(order), batch), desc="answers", disable=not progress):
                chosen = order[start : start + batch]
                inputs = self.inputs([images[i] for i in chosen], [events[i] for i in chosen])
                model: Any = self.model
                out = model.generate(**inputs, max_new_tokens=self.limit, do_sample=False)
                said = self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                for i, text in zip(chosen, said, strict=True):
                    texts[i] = text.strip()
        return texts

    def hits(self, texts: Sequence[str], emotions: Sequence[str]) -> np.ndarray:
        """Hit rate ``[n]`` float64 of answers, each with its one gold emotion (1 or 0)."""
        return np.array([self.lexicon.hit(t, e) for t, e in zip(texts, emotions, strict=True)], float)
