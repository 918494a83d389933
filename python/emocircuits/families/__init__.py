"""One small adapter per model family: where layers, heads, neurons and visual tokens are."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from emocircuits.families.base import Family, Geometry, Handle
from emocircuits.families.catalog import FAMILIES
from emocircuits.families.refusals import refuse
from emocircuits.families.structure import recognise

__all__ = ["FAMILIES", "Family", "Geometry", "Handle", "open_model", "without_adapters"]

log = logging.getLogger(__name__)


def open_model(model: nn.Module) -> Handle:
    """Find the family of ``model`` and check that everything the family names is there.

    A model type that no family names is recognised by its structure where that is safe (:mod:`.structure`).

    Raises:
        TypeError: ``model`` is not a Hugging Face model with a config.
        NotImplementedError: no plan can be put into such a model (:mod:`.refusals`), or its family, or its text
            decoder, is not known; the message lists what is missing.
    """
    model = without_adapters(model)
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or kind is None:
        raise TypeError(f"model is {type(model).__name__}: expected a Hugging Face model (a module with a .config)")
    refuse(model, config)
    families = [f for f in FAMILIES if kind in f.model_types]
    # Families of one model type differ in the layout of their text decoder.
    text = config.get_text_config(decoder=True).model_type
    family = next((f for f in families if text in f.decoders), None)
    if family is None:
        known = (t for f in families or FAMILIES for t in (f.decoders if families else f.model_types))
        family = recognise(model, config, known, families[0] if families else None)
        log.info("%s with text model %r is not in the catalog; recognised by its structure", kind, text)
    try:
        return Handle(model, family)
    except AttributeError as error:
        raise NotImplementedError(
            f"{type(model).__name__} lacks a part that family {family.name!r} needs ({error}); "
            "pass the ...ForConditionalGeneration or ...ForCausalLM model"
        ) from error


def without_adapters(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PeftModel, whose projections carry the adapters; any other model as it is.

    Raises:
        NotImplementedError: a prompt learning method, which puts columns before the prompt that have no role.
    """
    inner = getattr(model, "get_base_model", None)
    if inner is None:
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise NotImplementedError(
            f"{model.active_peft_config.peft_type} puts virtual tokens before every prompt, which have no role; "  # type: ignore[union-attr]
            "use adapters of weights, such as LoRA, or the model without them"
        )
    found: nn.Module = inner()
    return found
