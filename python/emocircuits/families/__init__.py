"""One small adapter per model family: where layers, heads, neurons and visual tokens are."""

from __future__ import annotations

from typing import Any

from torch import nn

from emocircuits.families.base import Family, Geometry, Handle
from emocircuits.families.catalog import FAMILIES

__all__ = ["FAMILIES", "Family", "Geometry", "Handle", "open_model"]


def open_model(model: nn.Module) -> Handle:
    """Find the family of ``model`` and check that everything the family names is there.

    Raises:
        TypeError: ``model`` is not a Hugging Face model with a config.
        NotImplementedError: the family, or its text decoder, is not supported; the message lists what is.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or kind is None:
        raise TypeError(f"model is {type(model).__name__}: expected a Hugging Face model (a module with a .config)")
    families = [f for f in FAMILIES if kind in f.model_types]
    if not families:
        supported = ", ".join(t for f in FAMILIES for t in f.model_types)
        raise NotImplementedError(f"model type {kind!r} is not supported; supported: {supported}")
    # Families of one model type differ in the layout of their text decoder.
    text = config.get_text_config(decoder=True).model_type
    family = next((f for f in families if text in f.decoders), None)
    if family is None:
        decoders = ", ".join(t for f in families for t in f.decoders)
        raise NotImplementedError(
            f"{kind} with a {text!r} text model is not supported; supported text models: {decoders}"
        )
    try:
        return Handle(model, family)
    except AttributeError as error:
        raise NotImplementedError(
            f"{type(model).__name__} lacks a part that family {family.name!r} needs ({error}); "
            "pass the ...ForConditionalGeneration or ...ForCausalLM model"
        ) from error
