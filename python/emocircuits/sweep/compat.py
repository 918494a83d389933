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
from emocircuits.sweep.pattern import pattern, pattern_entries, residual_between

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


def get_act_patch_resid_mid(model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]) -> Tensor:
    """The metric with the clean residual stream between attention and MLP, at each position: ``[layer, pos]`` float64.

    Raises:
        NotImplementedError: a model whose attention and MLP read the same residual stream.
    """
    return residual_between(_sweep(model, corrupted, clean, metric)).values


def get_act_patch_attn_head_q_by_pos(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The metric with the clean queries of each head, at each position: ``[layer, pos, head]`` float64.

    Before or after rotary embedding is the same here: a position turns both runs' queries by the same angle.
    """
    return _part(_sweep(model, corrupted, clean, metric), "q", "each")


def get_act_patch_attn_head_k_by_pos(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The metric with the clean keys of each key-value head, at each position: ``[layer, pos, kv_head]`` float64."""
    return _part(_sweep(model, corrupted, clean, metric), "k", "each")


def get_act_patch_attn_head_v_by_pos(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The metric with the clean values of each key-value head, at each position: ``[layer, pos, kv_head]`` float64."""
    return _part(_sweep(model, corrupted, clean, metric), "v", "each")


def get_act_patch_attn_head_q_all_pos(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The metric with the clean queries of each head, at all positions at once: ``[layer, head]`` float64."""
    return _part(_sweep(model, corrupted, clean, metric), "q", "all")


def get_act_patch_attn_head_k_all_pos(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The metric with the clean keys of each key-value head, at all positions at once: ``[layer, kv_head]`` float64."""
    return _part(_sweep(model, corrupted, clean, metric), "k", "all")


def get_act_patch_attn_head_v_all_pos(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The metric with the clean values of each key-value head, at all positions: ``[layer, kv_head]`` float64."""
    return _part(_sweep(model, corrupted, clean, metric), "v", "all")


def get_act_patch_attn_head_pattern_all_pos(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The metric with the clean attention pattern of each head: ``[layer, head]`` float64."""
    return pattern(_sweep(model, corrupted, clean, metric), "all").values


def get_act_patch_attn_head_pattern_by_pos(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The metric with one row of each head's clean attention pattern: ``[layer, head, dest_pos]`` float64."""
    return pattern(_sweep(model, corrupted, clean, metric), "each").values.transpose(1, 2)


def get_act_patch_attn_head_pattern_dest_src_pos(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The metric with one weight of each head's pattern: ``[layer, head, dest_pos, src_pos]`` float64."""
    return pattern_entries(_sweep(model, corrupted, clean, metric)).values


def get_act_patch_attn_head_all_pos_every(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """Output, queries, keys, values and pattern of each head, at all positions at once: ``[5, layer, head]`` float64.

    With fewer key-value heads than heads the entries that do not exist are NaN (in TransformerLens 0).
    """
    return _every(_sweep(model, corrupted, clean, metric), "all")


def get_act_patch_attn_head_by_pos_every(
    model: nn.Module, corrupted: Inputs, clean: Inputs, metric: Callable[..., Any]
) -> Tensor:
    """The same at each position: ``[5, layer, pos, head]`` float64."""
    return _every(_sweep(model, corrupted, clean, metric), "each")


def __getattr__(name: str) -> Any:
    if name.startswith("get_act_patch_"):
        has = ", ".join(k.removeprefix("get_act_patch_") for k in globals() if k.startswith("get_act_patch_"))
        raise NotImplementedError(f"{name} is not on this engine; get_act_patch_ is there with {has}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _part(sweep: Sweep, part: str, positions: str) -> Tensor:
    """Queries, keys or values of a table of all three."""
    found = sweep.qkv(positions=positions)
    return found.values[..., [i for i, label in enumerate(found.labels["qkv"]) if label[0] == part]]


def _every(sweep: Sweep, positions: str) -> Tensor:
    found = sweep.qkv(positions=positions)
    parts = [sweep.heads(positions=positions).values]
    for part in "qkv":
        parts.append(found.values[..., [i for i, label in enumerate(found.labels["qkv"]) if label[0] == part]])
    parts.append(pattern(sweep, positions).values)
    heads = parts[0].shape[-1]
    return torch.stack([torch.nn.functional.pad(p, (0, heads - p.shape[-1]), value=float("nan")) for p in parts])


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
