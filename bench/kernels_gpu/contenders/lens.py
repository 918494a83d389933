"""Entropy and the probability of a token set under the unembedding, with and without the logits of all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import emokernels as emo

from ..oracle import Gate
from ..shapes import Lens
from ..timing import Call
from . import Contender, Prepare, need

FUSED = "fused"
TOP = "fused, ten likeliest tokens too"
FULL = "all logits, softmax, entropy"
PRODUCT = "product with the unembedding alone"
CHECKED_ROWS = 16
SET = 64
TOLERANCE = 2e-4
"""Relative error of the yardstick: float32 sums over a vocabulary of products that half precision represents."""


@dataclass(frozen=True)
class Inputs:
    """``hidden [N, d]``, ``unembed [V, d]``, and the tokens of one set, ``[1, L]``."""

    case: Lens
    hidden: Tensor
    unembed: Tensor
    tokens: Tensor


def make(case: Lens, device: str, seed: int) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(seed)
    hidden = torch.randn(case.rows, case.hidden, generator=generator, device=device, dtype=case.dtype)
    unembed = torch.randn(case.vocabulary, case.hidden, generator=generator, device=device, dtype=case.dtype)
    unembed *= 2 * case.hidden**-0.5  # logits of a model that is not sure
    tokens = torch.randperm(case.vocabulary, generator=generator, device=device)
    return Inputs(case, hidden, unembed, tokens[None, : min(SET, case.vocabulary // 4)])


def statistics(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy in nats and the probability of the set, ``[N]`` each."""
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    return -(p * log_p).sum(-1), p[:, tokens[0]].sum(-1)


def gates(inputs: Inputs) -> dict[str, Gate]:
    """The first rows in float64."""
    exact = statistics(inputs.hidden[:CHECKED_ROWS].double() @ inputs.unembed.double().T, inputs.tokens)
    return {"plain": Gate(exact, (TOLERANCE, TOLERANCE))}


def taken(inputs: Inputs, out: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.reshape(inputs.case.rows)[:CHECKED_ROWS] for x in out)


def ours(backend: str, top_k: int = 0) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        need(backend)
        options = {"token_sets": inputs.tokens, "top_k": top_k, "backend": backend}

        def call() -> tuple[Tensor, Tensor]:
            found = emo.logit_lens(inputs.hidden, inputs.unembed, **options)
            return found.entropy, found.set_prob

        return call

    return prepare


def full(inputs: Inputs) -> Call:
    """As written in every notebook: the logits in the model's dtype, then float32."""
    return lambda: statistics((inputs.hidden @ inputs.unembed.T).float(), inputs.tokens)


def product(inputs: Inputs) -> Call:
    return lambda: inputs.hidden @ inputs.unembed.T


def contenders() -> list[Contender]:
    return [
        Contender(FUSED, "plain", ours("fused"), ours=True),
        Contender(TOP, "plain", ours("fused", 10), ours=True),
        Contender("composed", "plain", ours("composed"), ours=True),
        Contender(FULL, "plain", full),
        Contender(PRODUCT, "", product),
    ]
