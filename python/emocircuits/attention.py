"""The one attention function registered with transformers; each layer's Site decides what it does there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, eager_mask, sdpa_mask

# Names may not contain "sdpa", "flash", "/" or ":": transformers treats those specially.
OVER_STOCK = "emokernels"
OVER_EAGER = "emokernels_on_eager"
SITE = "_emocircuits_site"
TAP = "_emocircuits_tap"
# Arguments of an attention function that no edit can follow.
_REFUSED = ("s_aux", "position_bias", "cache")


class AttentionSite(Protocol):
    """Takes over the attention of one layer while a plan has something to change there."""

    def active(self) -> bool:
        """Whether the forward pass in progress is changed here."""

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor | None:
        """As calling it, for a decode step that runs as it was prepared before; None when it does not."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None,
        causal: bool,
        softcap: float | None = None,
    ) -> Tensor:
        """Head outputs ``[B, N, H, D]``."""


def key_over(implementation: str | None) -> str:
    """The registered name that leaves unedited layers on the arithmetic they had.

    Eager stays eager; SDPA stays SDPA. FlashAttention and FlexAttention models run their unedited layers on SDPA.
    """
    return OVER_EAGER if implementation == "eager" else OVER_STOCK


def _over(stock: Callable[[Any], Callable[..., Any]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An attention function that leaves modules without an active site to ``stock(module)``."""

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        # A tap only looks: whatever computes the layer computes it as it would without one.
        tap = module.__dict__.get(TAP)
        if tap is not None:
            _problem(tap, module, query, key, value, attention_mask, **kwargs)
        site: AttentionSite | None = module.__dict__.get(SITE)
        bare = query.shape[2] == 1 and _is_bare(kwargs)
        if site is None or not site.active():
            if bare and stock is _sdpa and attention_mask is None and query.shape[3] <= 256:
                # What the stock function comes down to in a decode step, without its checks. Above 256 it repeats
                # grouped keys instead of asking SDPA to share them.
                z = scaled_dot_product_attention(
                    query, key, value, scale=kwargs.get("scaling"), enable_gqa=query.shape[1] != key.shape[1]
                )
                return z.transpose(1, 2).contiguous(), None
            return stock(module)(module, query, key, value, attention_mask, **kwargs)
        if bare:
            step = site.step(query, key, value, attention_mask, kwargs.get("scaling"))
            if step is not None:
                return step, None
        return _problem(site, module, query, key, value, attention_mask, **kwargs), None

    return forward


def _sdpa(module: Any) -> Callable[..., Any]:
    return sdpa_attention_forward


def _is_bare(options: dict[str, Any]) -> bool:
    """Whether a call is nothing but a softmax: written out, since every layer asks in every step."""
    given = options.get
    return (
        not given("dropout")
        and given("softcap") is None
        and given("s_aux") is None
        and given("position_bias") is None
        and given("cache") is None
    )


def _problem(
    take: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Any:
    """What ``take``, a site or a tap, makes of one call: its arguments are checked, and no key is beyond a prompt."""
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"attention with {name} cannot be edited or read yet; leave out layer {_layer(module)}"
            )
    if dropout:
        raise NotImplementedError(
            f"attention dropout is {dropout} in layer {_layer(module)}; call model.eval() before editing or reading it"
        )
    rows = query.shape[2]
    causal = attention_mask is None and rows > 1 and bool(module.is_causal if is_causal is None else is_causal)
    if causal and key.shape[2] > rows:
        # Prefill into a static cache: the columns after the prompt are still empty.
        key, value = key[:, :, :rows], value[:, :, :rows]
    return take(query, key, value, attention_mask, scaling=scaling, causal=causal, softcap=softcap)


def _eager(module: Any) -> Callable[..., Any]:
    # Every modeling file has its own eager function; transformers looks it up there too.
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return eager


def _layer(module: Any) -> Any:
    return getattr(module, "layer_idx", "?")


def _mask(**kwargs: Any) -> Tensor | None:
    """``sdpa_mask``, with a short cut for the common decode step: its mask is the padding mask itself.

    Building it by index arithmetic costs a small model more than an edit does. The values are the same.
    """
    padding, keys = kwargs.get("attention_mask"), kwargs["kv_length"]
    plain = kwargs["mask_function"] is causal_mask_function and kwargs.get("local_size") is None
    step = kwargs["q_length"] == 1 and not torch.compiler.is_compiling()  # a graph cannot branch on the padding
    if plain and step and padding is not None and kwargs.get("allow_is_causal_skip", True):
        offset = kwargs.get("q_offset", 0)
        dynamic = isinstance(offset, int) and offset == keys - 1 and kwargs.get("kv_offset", 0) == 0
        if dynamic and tuple(padding.shape) == (kwargs["batch_size"], keys) and padding.dtype == torch.bool:
            return None if padding.all() else padding[:, None, None, :]
    return sdpa_mask(**kwargs)


AttentionInterface.register(OVER_STOCK, _over(_sdpa))
AttentionMaskInterface.register(OVER_STOCK, _mask)
AttentionInterface.register(OVER_EAGER, _over(_eager))
AttentionMaskInterface.register(OVER_EAGER, eager_mask)
