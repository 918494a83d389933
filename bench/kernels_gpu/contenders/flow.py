"""Attention mass and saliency per route, with and without the matrix of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from emokernels.flow import run_flow
from emokernels.routes import ROLES

from .. import inputs as attention_inputs
from ..inputs import Inputs
from ..oracle import Gate
from ..shapes import Flow
from ..timing import Call
from . import Contender, Prepare, need

FUSED = "fused"
EAGER = "eager, whole matrix"
CHECKED_HEADS = 2
TOLERANCE = 2e-4
"""Relative error of the yardstick: sums of many weights, each rounded to half precision at most once."""


def make(case: Flow, device: str, seed: int) -> Inputs:
    return attention_inputs.make(case.attention, device, seed)


def matrix(inputs: Inputs, heads: slice, dtype: torch.dtype, saliency: bool) -> Tensor:
    """``[B, heads, R, R]`` from whole matrices in `dtype`, straight from the definition."""
    case = inputs.case
    q = inputs.q[:, heads].to(dtype)
    k, v = (x.repeat_interleave(inputs.share, 1)[:, heads].to(dtype) for x in (inputs.k, inputs.v))
    hidden = torch.ones(case.rows, case.keys, dtype=torch.bool, device=q.device).triu_(case.keys - case.rows + 1)
    p = torch.softmax((q @ k.mT * inputs.scale).masked_fill_(hidden, -torch.inf), -1)
    if saliency:
        p = (p * (inputs.grad[:, heads].to(dtype) @ v.mT)).abs()
    one_hot = torch.nn.functional.one_hot(inputs.roles[0].long(), ROLES).to(dtype)
    return one_hot[case.keys - case.rows :].mT @ p @ one_hot


def gates(inputs: Inputs, saliency: bool) -> dict[str, Gate]:
    """The first heads in float64."""
    return {"plain": Gate((matrix(inputs, slice(CHECKED_HEADS), torch.float64, saliency),), (TOLERANCE,))}


def taken(inputs: Inputs, out: Tensor) -> tuple[Tensor, ...]:
    return (out[:, :CHECKED_HEADS],)


def ours(backend: str, saliency: bool) -> Prepare:
    def prepare(inputs: Inputs) -> Call:
        need(backend)
        grad = inputs.grad if saliency else None
        return lambda: run_flow(inputs.q, inputs.k, inputs.v, roles=inputs.roles, grad_z=grad, backend=backend)

    return prepare


def eager(saliency: bool) -> Prepare:
    """As hooks on eager attention do it: float32 weights of all heads at once."""
    return lambda inputs: lambda: matrix(inputs, slice(None), torch.float32, saliency)


def contenders(saliency: bool) -> list[Contender]:
    return [
        Contender(FUSED, "plain", ours("fused", saliency), ours=True),
        Contender("composed", "plain", ours("composed", saliency), ours=True),
        Contender(EAGER, "plain", eager(saliency)),
    ]
