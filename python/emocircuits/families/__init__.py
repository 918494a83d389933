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
    supported = ", ".join(t for f in FAMILIES for t in f.model_types)
    family = next((f for f in FAMILIES if kind in f.model_types), None)
    if family is None:
        raise NotImplementedError(f"model type {kind!r} is not supported; supported: {supported}")
    try:
        handle = Handle(model, family)
    except AttributeError as error:
        raise NotImplementedError(
            f"{type(model).__name__} lacks a part that family {family.name!r} needs ({error}); "
            "pass the ...ForConditionalGeneration or ...ForCausalLM model"
        ) from error
    text = handle.text_config.model_type
    if text not in family.text_types:
        raise NotImplementedError(
            f"{kind} with a {text!r} text model is not supported; supported text models: {', '.join(family.text_types)}"
        )
    return handle
