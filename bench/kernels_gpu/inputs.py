"""The tensors of an attention problem, laid out as a Hugging Face model lays them out, and the routes on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import emokernels as emo

from .shapes import BOOSTED, Attention

QUERIES = (emo.Role.QUERY, emo.Role.LAST, emo.Role.GENERATED)
"""Destination roles that are boosted."""
VARIANTS = ("plain", "bias", "routes", "boost", "every")
"""What the kernels compute: no routes; a bias on the image in all heads; bias and gain on the image in all heads; a
gain on the image in ten heads, as VEENA does; another bias and gain on every route of every head."""
LARGEST_GAIN = 1.5


@dataclass(frozen=True)
class Inputs:
    """``q [B, H, N, D]``; ``k, v [B, Hkv, K, D]``; ``roles [1, K]``; ``prefix`` k and v ``[1, Hkv, P, D]`` or None.

    k and v hold the prefix too, copied for every row; ``own`` are the keys and values after it. ``grad`` like z.
    """

    case: Attention
    q: Tensor
    k: Tensor
    v: Tensor
    roles: Tensor
    prefix: tuple[Tensor, Tensor] | None
    own: tuple[Tensor, Tensor]
    grad: Tensor
    tables: dict[str, emo.Routes | None]
    masks: dict[str, Tensor] = field(default_factory=dict)

    def mask(self, variant: str) -> Tensor:
        """`dense_bias` in the inputs' dtype, made once: at 16k keys it takes 16 GiB."""
        if variant not in self.masks:
            self.masks[variant] = dense_bias(self, variant, self.q.dtype)
        return self.masks[variant]

    @property
    def share(self) -> int:
        return self.case.model.heads // self.case.model.key_heads

    @property
    def query_roles(self) -> Tensor:
        return self.roles[:, self.case.keys - self.case.rows :]

    @property
    def scale(self) -> float:
        return float(self.case.model.dim**-0.5)


def role_row(case: Attention) -> list[int]:
    """System, image, query, last token; a decoding row has generated some tokens since."""
    model, keys = case.model, case.keys
    generated = 0 if case.rows > 1 else max(1, keys // 64)
    visual = min(model.visual_tokens(keys), keys - model.system - generated - 2)
    row = [int(emo.Role.SYSTEM)] * model.system + [int(emo.Role.VISUAL)] * visual
    row += [int(emo.Role.QUERY)] * (keys - generated - 1 - len(row)) + [int(emo.Role.LAST)]
    return row + [int(emo.Role.GENERATED)] * generated


def tables_of(heads: int, device: str, seed: int = 0) -> dict[str, emo.Routes | None]:
    """Routes by variant. Biases are multiples of 1/64, so that a bfloat16 mask holds them exactly."""
    chosen = torch.linspace(0, heads - 1, min(BOOSTED, (heads + 1) // 2)).long().to(device)
    steps = torch.arange(heads, device=device) % 16 / 64
    size = (1, heads, len(emo.Role), len(emo.Role))
    zeros, ones = torch.zeros(size, device=device), torch.ones(size, device=device)
    bias, gain, few = zeros, ones, ones.clone()
    for role in QUERIES:
        bias[:, :, role, emo.Role.VISUAL] = 0.25 + steps
        gain[:, :, role, emo.Role.VISUAL] = LARGEST_GAIN - steps
        few[:, chosen, role, emo.Role.VISUAL] = 1.4
    generator = torch.Generator(device=device).manual_seed(seed)
    every = emo.Routes(
        bias=torch.randint(-32, 33, size, generator=generator, device=device) / 64.0,
        gain=0.5 + torch.rand(size, generator=generator, device=device),
    )
    return {
        "plain": None,
        "bias": emo.Routes(bias=bias),
        "routes": emo.Routes(bias=bias.clone(), gain=gain),
        "boost": emo.Routes(gain=few),
        "every": every,
    }


def make(case: Attention, device: str, seed: int) -> Inputs:
    """Fresh random inputs; `seed` is another one at every call of a run."""
    model = case.model
    generator = torch.Generator(device=device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        # Drawn in the case's dtype: a cache of 16 GiB has no room for a float32 copy.
        return torch.randn(*shape, generator=generator, device=device, dtype=case.dtype)

    q = randn(case.batch, case.rows, model.heads, model.dim).transpose(1, 2)
    grad = randn(case.batch, case.rows, model.heads, model.dim).transpose(1, 2)
    own = tuple(randn(case.batch, model.key_heads, case.keys - case.prefix, model.dim) for _ in range(2))
    k, v = own
    prefix = None
    if case.prefix:
        prefix = tuple(randn(1, model.key_heads, case.prefix, model.dim) for _ in range(2))
        k, v = (torch.cat([x.expand(case.batch, -1, -1, -1), y], 2) for x, y in zip(prefix, own, strict=True))
    roles = torch.tensor([role_row(case)], dtype=torch.uint8, device=device)
    tables = tables_of(model.heads, device, seed)
    return Inputs(case, q, k, v, roles, prefix, own, grad, tables)  # type: ignore[arg-type]


def dense_bias(inputs: Inputs, variant: str, dtype: torch.dtype) -> Tensor:
    """The additive mask ``[1, H, N, K]`` that says the same as a table of biases and the causal rule."""
    case, routes = inputs.case, inputs.tables[variant]
    source, destination = inputs.roles[0].long(), inputs.query_roles[0].long()
    if routes is None or routes.bias is None:
        mask = torch.zeros(1, 1, case.rows, case.keys, device=source.device, dtype=dtype)
    else:
        # Row by row of the table: an index with two tensors would make int64 indices for every element.
        mask = routes.bias[0].to(dtype)[:, destination][:, :, source].unsqueeze(0)
    if case.causal:
        hidden = torch.ones(case.rows, case.keys, dtype=torch.bool, device=source.device)
        mask.masked_fill_(hidden.triu_(case.keys - case.rows + 1), -torch.inf)
    return mask
