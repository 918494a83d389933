"""The one attention function registered with transformers; each layer's Site decides what it does there."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

# Names may not contain "sdpa", "flash", "/" or ":": transformers treats those specially.
OVER_STOCK = "emokernels"
OVER_EAGER = "emokernels_on_eager"
SITE = "_emocircuits_site"


class AttentionSite(Protocol):
    """Takes over the attention of one layer while a plan has something to change there."""

    def active(self) -> bool:
        """Whether the forward pass in progress is changed here."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None, causal: bool
    ) -> Tensor:
        """Head outputs ``[B, N, H, D]``."""


def key_over(implementation: str | None) -> str:
    """The registered name that leaves unedited layers on the arithmetic they had.

    Eager stays eager; SDPA stays SDPA. FlashAttention and FlexAttention models run their unedited layers on SDPA.
    """
    return OVER_EAGER if implementation == "eager" else OVER_STOCK


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    site: AttentionSite | None = module.__dict__.get(SITE)
    if site is None or not site.active():
        stock = sdpa_attention_forward
        if module.config._attn_implementation == OVER_EAGER:
            # Every modeling file has its own eager function; transformers looks it up there too.
            stock = sys.modules[type(module).__module__].eager_attention_forward
        return stock(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    for name in ("s_aux", "position_bias", "cache", "softcap"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"attention with {name} cannot be edited yet; remove the edits of layer {_layer(module)}"
            )
    if dropout:
        raise NotImplementedError(
            f"attention dropout is {dropout} in layer {_layer(module)}; call model.eval() before editing it"
        )
    causal = (module.is_causal if is_causal is None else is_causal) and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        # Prefill into a static cache: the columns after the prompt are still empty.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    return site(query, key, value, attention_mask, scaling=scaling, causal=causal), None


def _layer(module: Any) -> Any:
    return getattr(module, "layer_idx", "?")


AttentionInterface.register(OVER_STOCK, _forward)
AttentionMaskInterface.register(OVER_STOCK, sdpa_mask)
AttentionInterface.register(OVER_EAGER, _forward)
AttentionMaskInterface.register(OVER_EAGER, eager_mask)
