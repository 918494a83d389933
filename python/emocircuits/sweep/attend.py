"""Attention of a traced or resumed layer: transformers hands queries, keys and values over, the sweep decides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from emocircuits.families import Handle

KEY = "emocircuits_sweep"
TAKES = "_emocircuits_sweep"
REFUSED = ("s_aux", "position_bias", "cache")


class Call(NamedTuple):
    """One call of a layer's attention: ``[B, H, N, D]``, keys of grouped heads not repeated; mask as transformers'."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"a sweep cannot follow attention with {name}")
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; call model.eval() before a sweep")
    take: Callable[[Call], Tensor] = module.__dict__[TAKES]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return take(Call(query, key, value, attention_mask, scale, softcap)), None


AttentionInterface.register(KEY, _attend)
AttentionMaskInterface.register(KEY, sdpa_mask)


@contextlib.contextmanager
def switched(handle: Handle) -> Iterator[None]:
    """The text decoder's attention calls :func:`taking` functions; the old implementation comes back afterwards."""
    config = handle.text_config
    before = config._attn_implementation
    config._attn_implementation = KEY
    try:
        yield
    finally:
        config._attn_implementation = before


@contextlib.contextmanager
def taking(module: nn.Module, take: Callable[[Call], Tensor]) -> Iterator[None]:
    """``take`` gives the head outputs ``[B, N, H, D]`` of ``module``."""
    module.__dict__[TAKES] = take
    try:
        yield
    finally:
        module.__dict__.pop(TAKES, None)


@contextlib.contextmanager
def replaced(parts: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Modules whose ``forward`` is another function for a while."""
    before = [(module, module.__dict__.get("forward")) for module, _ in parts]
    try:
        for module, forward in parts:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, old in reversed(before):
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


def heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, cap: float | None) -> Tensor:
    """Softmax attention ``[B, H, n, D]``; a mask is ``[1, 1 or H, n, K]``, True or 0 where it attends."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and mask is not None:
        # There SDPA has no fast kernel for a mask and shared keys at once.
        key, value, grouped = _repeat(key, query.shape[1]), _repeat(value, query.shape[1]), False
    if cap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    return _weights(scores(query, key, mask, scaling, cap)).to(value.dtype) @ _repeat(value, query.shape[1])


def scores(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, cap: float | None) -> Tensor:
    """Attention logits ``[B, H, n, K]``, -inf where masked; in float32 at least."""
    work = torch.promote_types(query.dtype, torch.float32)
    s = (query @ _repeat(key, query.shape[1]).transpose(-1, -2)).to(work) * scaling
    if cap is not None:
        s = cap * torch.tanh(s / cap)
    if mask is None:
        return s
    if mask.dtype == torch.bool:
        return s.masked_fill(~mask, float("-inf"))
    return (s + mask).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))


def _repeat(x: Tensor, count: int) -> Tensor:
    return x if x.shape[1] == count else x.repeat_interleave(count // x.shape[1], 1)


def _weights(s: Tensor) -> Tensor:
    return s.softmax(-1).nan_to_num(0.0)
