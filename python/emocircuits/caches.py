"""Edits of cached keys and values: what a prompt has left in the cache changes once, when its forward pass has ended.

The prompt itself has read its keys and values as they were; whatever comes after it reads them as they are now.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from emocircuits.context import Context
from emocircuits.edits import CACHE_SITES
from emocircuits.tables import LayerTables

DYNAMIC = (DynamicLayer, DynamicSlidingWindowLayer)
STATIC = (StaticLayer, StaticSlidingWindowLayer)
HELD = {"k": "keys", "v": "values"}


def edits_cache(tables: dict[int, LayerTables]) -> bool:
    """Whether anything cached changes."""
    return bool(_edited(tables))


def _edited(tables: dict[int, LayerTables]) -> list[int]:
    return [layer for layer, of_layer in tables.items() if not of_layer.vectors.keys().isdisjoint(CACHE_SITES)]


def require_cache(kwargs: dict[str, Any], config: Any, tables: dict[int, LayerTables]) -> None:
    """Refuse a forward pass that keeps no keys and values, or in another form than a dynamic or static cache.

    Raises:
        ValueError: it has no cache, and its arguments or the config say that it will not make one.
        NotImplementedError: an offloaded or quantised cache.
    """
    wanted = kwargs.get("use_cache")
    wanted = getattr(config, "use_cache", True) if wanted is None else wanted
    if kwargs.get("past_key_values") is None and not wanted:
        raise ValueError(
            "the plan edits cached keys or values (site 'k' or 'v'), but the model runs without a cache; "
            "call it with use_cache=True"
        )
    cache = kwargs.get("past_key_values")
    _refuse_offloaded(cache)
    made = len(getattr(cache, "layers", ()))  # a cache without a config makes its layers when it is filled
    for layer in _edited(tables):
        if layer < made:
            _layer(cache, layer)


@torch.compiler.disable
def edit_cache(cache: Any, tables: dict[int, LayerTables], context: Context) -> None:
    """Edit what the prompt that has just been run left in ``cache``.

    Columns that a sliding cache has dropped are gone; those that were there before the prompt stay as they are.

    Raises:
        ValueError: the model made no cache.
        NotImplementedError: a cache that holds its keys and values in another form.
    """
    if cache is None:
        raise ValueError(
            "the plan edits cached keys or values (site 'k' or 'v'), but the model returned no cache; "
            "call it with use_cache=True, outside of gradient checkpointing"
        )
    for layer, of_layer in tables.items():
        for site in CACHE_SITES:
            if site in of_layer.vectors and "prefill" in of_layer.vector_phases[site]:
                held = _layer(cache, layer)
                tensor: Tensor = getattr(held, HELD[site])
                dropped = max(0, context.seen - tensor.shape[2])
                begin, end = max(0, context.first - dropped), context.seen - dropped
                if begin >= end:
                    continue
                kinds = context.at(tensor.device).kinds[:, begin - end :]
                edited = of_layer.vectors[site].apply(tensor[:, :, begin:end], kinds)
                if isinstance(held, STATIC):  # compiled steps hold the tensor
                    tensor[:, :, begin:end] = edited
                else:  # backward() may need the old one
                    setattr(held, HELD[site], torch.cat([tensor[:, :, :begin], edited, tensor[:, :, end:]], 2))


def _layer(cache: Any, layer: int) -> Any:
    layers = getattr(cache, "layers", ())
    found = layers[layer] if layer < len(layers) else None
    _refuse_offloaded(cache)
    if type(found) not in (*DYNAMIC, *STATIC):
        what = type(cache if found is None else found).__name__
        raise NotImplementedError(
            f"keys and values of layer {layer} cannot be edited in a {what}; use a dynamic or static cache"
        )
    return found


def _refuse_offloaded(cache: Any) -> None:
    if getattr(cache, "offloading", False):
        raise NotImplementedError("keys and values cannot be edited in an offloaded cache; use one that stays in place")
