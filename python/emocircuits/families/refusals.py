"""What no plan can be put into, refused by name before anything runs."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_CROSS = re.compile("CrossAttention")
_RECURRENT = re.compile("Mamba|Rwkv|RWKV|xLSTM|Recurrent|RgLru|DeltaNet|ShortConv|LinearAttention|LightningAttention")


def refuse(model: nn.Module, config: Any) -> None:
    """Refuse models whose text decoder is not a stack of self-attention and MLP blocks on whole weights.

    Raises:
        NotImplementedError: cross-attention (mllama), encoder-decoders, state-space and other recurrent layers, weights
            that are split over devices by a tensor-parallel plan.
    """
    name = f"{type(model).__name__} ({config.model_type})"
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{name} is an encoder-decoder: plans are for decoders that hold the whole prompt")
    text = config.get_text_config(decoder=True)
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    kinds = {type(module).__name__ for module in decoder.modules()}
    if (
        getattr(text, "add_cross_attention", False)
        or getattr(text, "cross_attention_layers", None)
        or any(map(_CROSS.search, kinds))
    ):
        raise NotImplementedError(
            f"{name} has cross-attention layers: its images never become tokens that a route could name"
        )
    recurrent = sorted(kind for kind in kinds if _RECURRENT.search(kind))
    others = sorted(set(getattr(text, "layer_types", None) or ()) - ATTENTION_TYPES)
    if recurrent or others:
        raise NotImplementedError(
            f"{name} has layers without attention heads ({', '.join(recurrent or others)}): state-space and other "
            "recurrent layers have no routes, heads or keys that a plan could change"
        )
    if getattr(model, "_tp_size", None) is not None or any(isinstance(p, DTensor) for p in model.parameters()):
        raise NotImplementedError(
            f"{name} is split over devices by a tensor-parallel plan, so that no device has every head; "
            "load it whole or with device_map"
        )
