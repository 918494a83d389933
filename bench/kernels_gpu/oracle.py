"""Float64 answers to check every contender by before it is timed, on sampled rows where a whole answer is too large.

An error is root mean square over the sample, relative to that of the answer. The yardstick is a plain low-precision
run without routes: inputs in the case's dtype, float32 softmax, weights and output rounded to the dtype. Our own
kernels may have twice its error (times the largest gain, by which they multiply it); others are held to a looser bound
that still tells a wrong mask from a rounding, because some of them round their logits too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import emokernels as emo

from .inputs import LARGEST_GAIN, Inputs

OURS, OTHERS = 2.0, 12.0
"""Errors that are accepted, in units of the plain run's."""
FLOOR = 1e-6
"""Relative error that is always accepted: float32 sums in another order."""
ROWS, HEADS = 48, 4


class Wrong(Exception):
    """A contender's answer is not the float64 answer."""


class Gate(NamedTuple):
    """What a contender's outputs (one, or the gradients of q, k and v) must look like on the sample."""

    expected: tuple[Tensor, ...]
    plain: tuple[float, ...]
    """The yardstick's relative error of each."""
    gain: float = 1.0

    def check(self, found: Sequence[Tensor], ours: bool) -> float:
        """The largest relative error of the outputs; `Wrong` when one exceeds its budget or is not finite."""
        worst = 0.0
        for tensor, expected, plain in zip(found, self.expected, self.plain, strict=True):
            error = relative(tensor, expected)
            budget = (OURS if ours else OTHERS) * max(plain * self.gain, FLOOR)
            if not error <= budget:  # also NaN
                raise Wrong(f"relative rms error {error:.2e}, {budget:.2e} accepted")
            worst = max(worst, error)
        return worst


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected; one number from the device."""
    if found.shape != expected.shape:
        raise Wrong(f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    difference = found.double() - expected
    return float((difference.square().mean() / expected.square().mean().clamp_min(1e-300)).sqrt())


class Sample(NamedTuple):
    """Which query rows of which heads of which batch rows are looked at."""

    batch: Tensor
    heads: Tensor
    rows: Tensor

    def of(self, z: Tensor) -> Tensor:
        """``[b, h, n, D]`` of ``z [B, H, N, D]``."""
        return z[self.batch][:, self.heads][:, :, self.rows]


def sample(inputs: Inputs, seed: int) -> Sample:
    """First and last rows and heads, where roles change, and some at random."""
    case = inputs.case
    generator = torch.Generator().manual_seed(seed)

    def some(count: int, size: int, always: set[int]) -> Tensor:
        drawn = torch.randperm(size, generator=generator)[:count].tolist()
        return torch.tensor(sorted(always & set(range(size)) | set(drawn)), device=inputs.q.device)

    model = case.model
    edge = model.system + model.visual_tokens(case.keys)
    rows = {0, 1, model.system, edge - 1, edge, case.rows // 2, case.rows - 2, case.rows - 1}
    return Sample(
        some(2, case.batch, {0, case.batch - 1}),
        some(HEADS, model.heads, {0, model.heads - 1}),
        some(ROWS, case.rows, rows),
    )


def forward_gates(inputs: Inputs, at: Sample) -> dict[str, Gate]:
    """The float64 answer of every variant on the sampled rows."""
    case = inputs.case
    groups = at.heads // inputs.share
    q = at.of(inputs.q)
    k, v = (x[at.batch][:, groups] for x in (inputs.k, inputs.v))
    position = at.rows + case.keys - case.rows
    hidden = torch.zeros(len(at.rows), case.keys, dtype=torch.bool, device=q.device)
    if case.causal:
        hidden = torch.arange(case.keys, device=q.device)[None, :] > position[:, None]
    pairs = (inputs.roles[0, position].long()[:, None], inputs.roles[0].long()[None, :])

    def answer(dtype: torch.dtype, routes: emo.Routes | None, rounded: torch.dtype | None = None) -> Tensor:
        s = (q.to(dtype) @ k.to(dtype).mT * inputs.scale).masked_fill(hidden, -torch.inf)
        if routes is not None and routes.bias is not None:
            s = s + routes.bias[0, at.heads].to(dtype)[:, pairs[0], pairs[1]]
        p = torch.softmax(s, -1)
        if routes is not None and routes.gain is not None:
            p = p * routes.gain[0, at.heads].to(dtype)[:, pairs[0], pairs[1]]
        if rounded is not None:
            p = p.to(rounded).to(dtype)
        z = p @ v.to(dtype)
        return z if rounded is None else z.to(rounded)

    exact = {variant: answer(torch.float64, routes) for variant, routes in inputs.tables.items()}
    error = relative(answer(torch.float32, None, case.dtype), exact["plain"])
    return {variant: Gate((z,), (error,), _gain(inputs.tables[variant])) for variant, z in exact.items()}


def _gain(routes: emo.Routes | None) -> float:
    return 1.0 if routes is None or routes.gain is None else LARGEST_GAIN


class Slice(NamedTuple):
    """One key head and its query heads, all rows: gradients of k and v sum over all rows, so nothing less will do."""

    key_head: int
    heads: Tensor

    def of(self, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dq[:, self.heads], dk[:, self.key_head], dv[:, self.key_head]


def backward_gates(inputs: Inputs) -> tuple[Slice, dict[str, Gate]]:
    """The float64 gradients of q, k and v of every variant, for a slice of the heads."""
    case, share = inputs.case, inputs.share
    group = case.model.key_heads - 1
    heads = torch.arange(group * share, (group + 1) * share, device=inputs.q.device)
    source, destination = inputs.roles[0].long(), inputs.query_roles[0].long()
    hidden = torch.ones(case.rows, case.keys, dtype=torch.bool, device=inputs.q.device)
    hidden = hidden.triu_(case.keys - case.rows + 1) if case.causal else hidden.zero_()

    def gradients(
        dtype: torch.dtype, routes: emo.Routes | None, rounded: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """Head by head, so that it takes no more memory than the scores of one head."""
        k, v = (x[:, group].to(dtype) for x in (inputs.k, inputs.v))
        dk, dv, dq = torch.zeros_like(k), torch.zeros_like(v), []

        def narrow(x: Tensor) -> Tensor:
            return x if rounded is None else x.to(rounded).to(dtype)

        for head in heads.tolist():
            q, grad = inputs.q[:, head].to(dtype), inputs.grad[:, head].to(dtype)
            s = (q @ k.mT * inputs.scale).masked_fill_(hidden, -torch.inf)
            gain: Tensor | float = 1.0
            if routes is not None and routes.bias is not None:
                s += routes.bias[0, head].to(dtype)[destination][:, source]
            if routes is not None and routes.gain is not None:
                gain = routes.gain[0, head].to(dtype)[destination][:, source]
            p = torch.softmax(s, -1)
            dv += narrow(p * gain).mT @ grad
            ds = grad @ v.mT * gain
            ds = p * (ds - (p * ds).sum(-1, keepdim=True))
            dq.append(narrow(ds) @ k * inputs.scale)
            dk += narrow(ds).mT @ q * inputs.scale
        return tuple(narrow(x) for x in (torch.stack(dq, 1), dk, dv))

    exact = {variant: gradients(torch.float64, routes) for variant, routes in inputs.tables.items()}
    low = gradients(torch.float32, None, case.dtype)
    errors = tuple(relative(found, expected) for found, expected in zip(low, exact["plain"], strict=True))
    gates = {variant: Gate(parts, errors, _gain(inputs.tables[variant])) for variant, parts in exact.items()}
    return Slice(group, heads), gates
