"""One forward pass over pairs: values, head outputs and neurons of every token, and gradients where asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from emocircuits.circuits.pairs import Pairs, Side
from emocircuits.circuits.subject import Subject
from emocircuits.measure import capture
from emocircuits.measure.captured import Captured
from emocircuits.sweep.attribution.gradients import frozen
from emokernels import Role


class Pass:
    """What one side of some pairs computed, ``B`` rows of ``N`` tokens.

    Attributes:
        group: query heads of a key-value head.
    """

    def __init__(self, subject: Subject, seen: Captured, inputs: dict[str, Tensor], answer: bool) -> None:
        geometry = subject.handle.geometry
        self.group = geometry.heads // geometry.kv_heads
        self.ids = inputs["input_ids"]
        self.role_ids = subject.roles(inputs, answer=answer)
        self._tokenizer = subject.tokenizer
        self._seen = seen

    def z(self, layer: int) -> Tensor:
        """Head outputs ``[B, N, H, D]``."""
        return self._seen["z", layer]

    def neurons(self, layer: int) -> Tensor:
        """Activations ``[B, N, I]``."""
        return self._seen["neurons", layer]

    def values(self, layer: int) -> Tensor:
        """Values ``[B, N, H_kv, D]``."""
        return self._seen["v", layer]

    def resid(self, layer: int) -> Tensor:
        """``resid_post [B, N, d_model]``."""
        return self._seen["resid_post", layer]

    def gradients(self, loss: Tensor, wanted: Sequence[tuple[str, int]]) -> list[Tensor]:
        """Gradients of a scalar with respect to "z", "v" and "neurons" of layers, shaped as above."""
        return self._seen.gradients(loss, wanted)

    def token(self, row: int, column: int) -> tuple[str, str]:
        """Text and role of a token; a visual token has its number among the visual ones for a text."""
        role = int(self.role_ids[row, column])
        if role == int(Role.VISUAL):
            number = int((self.role_ids[row, :column] == role).sum())
            return f"visual token {number}", "visual"
        text: str = self._tokenizer.decode([int(self.ids[row, column])])
        return text.strip() or repr(text), Role(role).name.lower()


@contextlib.contextmanager
def run(
    subject: Subject, pairs: Pairs, side: Side, layers: Sequence[int], *, answer: bool = False,
    gradients: bool = False, reads: Sequence[int] = (),
) -> Iterator[Pass]:  # fmt: skip
    """Run one side of some pairs: what it computed can be read in the block, without ``gradients`` also after it.

    Args:
        subject: the model.
        pairs: all at once.
        side: "emotional" or "neutral".
        layers: whose values, head outputs and neurons are kept.
        answer: with the beginning of an answer.
        gradients: keep the graph, from the input of the first layer on; no parameter is in it.
        reads: layers whose resid_post is kept.
    """
    inputs: dict[str, Any] = pairs.inputs(subject, side, answer=answer)
    what = [f"blocks.{l}.attn.hook_z" for l in layers] + [f"blocks.{l}.mlp.hook_post" for l in layers]
    what += [f"blocks.{l}.attn.hook_v" for l in layers] if gradients else []
    what += [f"blocks.{l}.hook_resid_post" for l in reads]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if gradients:
            stack.enter_context(frozen(subject.model))
            first = subject.handle.layers[0]
            stack.callback(first.register_forward_pre_hook(leaf, with_kwargs=True).remove)
        seen = stack.enter_context(capture(subject.model, what, detach=not gradients))
        subject.model(**inputs, use_cache=False, logits_to_keep=1)
        yield Pass(subject, seen, inputs, answer)


def leaf(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What enters the first layer becomes a leaf of the graph."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}
