"""The gated activation of an MLP, with and without edited neurons."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import emokernels as emo
from emokernels.mlp import run_activation

from ..oracle import Gate, relative
from ..shapes import Activation
from ..timing import Call
from . import Contender, Prepare, Unavailable, need

PLAIN = "fused"
EDITED = "fused, 1 % of neurons edited"
HF = "act(gate) * up"
COPY = "copy of as many bytes"
CHECKED_ROWS = 32
LARGEST_SCALE = 1.8


@dataclass(frozen=True)
class Inputs:
    """``gate, up [1, N, F]`` and edits of one neuron in a hundred."""

    case: Activation
    gate: Tensor
    up: Tensor
    neurons: emo.NeuronEdits


def make(case: Activation, device: str, seed: int) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (1, case.tokens, case.width)
    gate, up = (torch.randn(*shape, generator=generator, device=device, dtype=case.dtype) for _ in range(2))
    index = torch.randperm(case.width, generator=generator, device=device)[: case.edits].sort().values
    scale = torch.linspace(0.2, LARGEST_SCALE, case.edits, device=device).view(1, 1, -1)
    return Inputs(case, gate, up, emo.NeuronEdits(index, scale=scale))


def gates(inputs: Inputs) -> dict[str, Gate]:
    """The first and last rows in float64; the yardstick rounds once."""
    rows = sample_rows(inputs.case.tokens)
    gate, up = (x[:, rows].double() for x in (inputs.gate, inputs.up))
    plain = gate * torch.sigmoid(gate) * up
    edited = plain.clone()
    edited[..., inputs.neurons.index] *= inputs.neurons.scale.double()  # type: ignore[union-attr]
    error = relative(plain.float().to(inputs.case.dtype), plain)
    return {"plain": Gate((plain,), (error,)), "edited": Gate((edited,), (error,), LARGEST_SCALE)}


def sample_rows(tokens: int) -> list[int]:
    half = CHECKED_ROWS // 2
    return sorted({*range(min(half, tokens)), *range(max(0, tokens - half), tokens)})


def taken(inputs: Inputs, out: Tensor) -> tuple[Tensor, ...]:
    """The part of an output that `gates` describes."""
    return (out[:, sample_rows(inputs.case.tokens)],)


def ours(backend: str, edited: bool) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        need(backend)
        neurons = inputs.neurons if edited else None
        return lambda: run_activation(inputs.gate, inputs.up, neurons=neurons, backend=backend)

    return prepare


def hf(inputs: Inputs) -> Call:
    return lambda: F.silu(inputs.gate) * inputs.up


def hf_edited(inputs: Inputs) -> Call:
    """As a hook before down_proj does it."""
    index, scale = inputs.neurons.index, inputs.neurons.scale
    factor = scale.to(inputs.gate.dtype)  # type: ignore[union-attr]

    def call() -> Tensor:
        a = F.silu(inputs.gate) * inputs.up
        a[..., index] *= factor
        return a

    return call


def compiled(inputs: Inputs) -> Call:
    if not inputs.gate.is_cuda:
        raise Unavailable("compiled for GPUs only")
    function = torch.compile(lambda gate, up: F.silu(gate) * up, dynamic=True)
    return lambda: function(inputs.gate, inputs.up)


def copy(inputs: Inputs) -> Call:
    """Half of three tensors read, half of three written."""
    source = torch.cat([inputs.gate.flatten(), inputs.up.flatten()])[: 3 * inputs.gate.numel() // 2]
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def contenders() -> list[Contender]:
    return [
        Contender(PLAIN, "plain", ours("fused", False), ours=True),
        Contender(EDITED, "edited", ours("fused", True), ours=True),
        Contender("native", "plain", ours("native", False), ours=True),
        Contender("native, 1 % of neurons edited", "edited", ours("native", True), ours=True),
        Contender("composed, 1 % of neurons edited", "edited", ours("composed", True), ours=True),
        Contender(HF, "plain", hf),
        Contender("act(gate) * up, then edited columns", "edited", hf_edited),
        Contender("torch.compile", "plain", compiled),
        Contender(COPY, "", copy),
    ]
