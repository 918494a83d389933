"""``model.generate`` of a patched model: what a plan cannot follow is refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from emocircuits.context import Context


def refuse_attentions(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse a forward pass that is asked for its attention weights."""
    wanted = kwargs.get("output_attentions")
    if wanted or (wanted is None and getattr(module.config, "output_attentions", False)):
        raise ValueError(
            "output_attentions=True is not possible on a patched model: its attention weights are never formed; "
            "use emocircuits.measure.attention_weights, or ask for them outside patch()"
        )


def generate(model: Any, context: Context, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``original(*args, **kwargs)``, a model's own generate, with its steps marked as generation in ``context``."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    for name in ("num_beams", "num_beam_groups"):
        value = kwargs.get(name, getattr(config, name, 1)) or 1
        if value > 1:
            raise NotImplementedError(
                f"{name}={value} is not supported on a patched model yet; use {name}=1 (greedy or sampling)"
            )
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        if kwargs.get(name, getattr(config, name, None)) is not None:
            raise NotImplementedError(f"{name} is not supported on a patched model; leave it out")
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        refuse_attentions(model, {"output_attentions": True})
    if kwargs.get("past_key_values") is None:
        context.reset()
    context.generating = context.expects_prompt = True
    try:
        return original(*args, **kwargs)
    finally:
        context.generating = False
