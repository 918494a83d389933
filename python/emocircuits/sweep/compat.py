"""The one-liners that people know from TransformerLens, on this engine.

Names, order of arguments and axes are those of ``transformer_lens.patching``. Two things differ: the model is a Hugging
Face model, and the clean prompt is given as inputs, not as a cache: the engine runs it once itself, image included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emocircuits.sweep import Sweep

Inputs = Tensor | Mapping[str, Any]


def get_act_patch_resid_pre(model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]) -> Tensor:
    """The metric with the clean residual stream before each layer, at each position: ``[layer, pos]`` float64."""
    return _sweep(model, corrupted, clean, metric).residual(positions="each").values


def get_act_patch_attn_out(model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]) -> Tensor:
    """The metric with the clean output of each attention block, at each position: ``[layer, pos]`` float64."""
    return _sweep(model, corrupted, clean, metric).attn_out(positions="each").values


def get_act_patch_mlp_out(model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]) -> Tensor:
    """The metric with the clean output of each MLP, at each position: ``[layer, pos]`` float64."""
    return _sweep(model, corrupted, clean, metric).mlp_out(positions="each").values


def get_act_patch_block_every(model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]) -> Tensor:
    """The three above from one pair of runs: ``[3, layer, pos]`` float64, residual stream, attention, MLP."""
    sweep = _sweep(model, corrupted, clean, metric)
    tables = [target(positions="each").values for target in (sweep.residual, sweep.attn_out, sweep.mlp_out)]
    return torch.stack(tables)


def get_act_patch_attn_head_out_by_pos(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The metric with the clean output of each head, at each position: ``[layer, pos, head]`` float64."""
    return _sweep(model, corrupted, clean, metric).heads(positions="each").values


def get_act_patch_attn_head_out_all_pos(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The metric with the clean output of each head, at all positions at once: ``[layer, head]`` float64."""
    return _sweep(model, corrupted, clean, metric).heads(positions="all").values


def _sweep(model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]) -> Sweep:
    """Set the sweep up.

    Args:
        model: a Hugging Face model.
        corrupted, clean: token ids ``[1, pos]``, or a dict of model inputs (with ``pixel_values`` for an image).
        metric: from logits ``[1, pos, vocabulary]`` to a number, or one of :mod:`emocircuits.sweep`, which is faster.

    Raises:
        TypeError: a cache in place of the clean prompt.
    """
    return Sweep(model, clean=_inputs("clean", clean), corrupt=_inputs("corrupted", corrupted), metric=metric)


def _inputs(name: str, given: Inputs) -> dict[str, Any]:
    if isinstance(given, Tensor):
        if given.is_floating_point():
            raise TypeError(f"{name} is {given.dtype}: expected token ids, or a dict of model inputs")
        return {"input_ids": given if given.ndim == 2 else given[None]}
    if isinstance(given, Mapping) and "input_ids" in given:
        return dict(given)
    raise TypeError(
        f"{name} is a {type(given).__name__} without input_ids: pass token ids or a dict of model inputs; the engine "
        "runs the clean prompt itself, once, so no cache is needed"
    )
