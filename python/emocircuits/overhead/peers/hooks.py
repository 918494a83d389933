"""Eager attention with forward hooks: attention weights are formed, and a hook adds what more of them would add.

A gain g on weights p from some rows to some keys adds ``W_O (g - 1) p v`` to the attention block's output. The hook
sees p, which eager attention returns, and finds v in the cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from emocircuits.families import open_model
from emocircuits.overhead.peers.edits import Block, neurons, routes, use_attention
from emocircuits.plan import Plan


@contextlib.contextmanager
def hooks(model: nn.Module, plan: Plan, roles: Tensor) -> Iterator[None]:
    """Put ``plan`` (gains on attention weights, gains on neurons) into ``model``.

    Raises:
        NotImplementedError: the plan or the model needs more than that.
    """
    handle = open_model(model)
    use_attention(model, handle, "eager")
    share = handle.geometry.heads // handle.geometry.kv_heads
    with contextlib.ExitStack() as undo:
        undo.enter_context(neurons(handle, plan))
        for layer, blocks in routes(plan, roles, "weight").items():
            projection = handle.output_projections[layer]
            if not isinstance(projection, nn.Linear | Conv1D):
                raise NotImplementedError(f"an output projection of type {type(projection).__name__}")
            weight = projection.weight.T if isinstance(projection, Conv1D) else projection.weight
            parts = [_Part(block, weight.detach(), handle.geometry.head_dim, share) for block in blocks]
            hook = _Boost(layer, parts)
            undo.callback(handle.attentions[layer].register_forward_hook(hook, with_kwargs=True).remove)
        yield


class _Part:
    """One block, and the columns of the output projection that its heads write through."""

    def __init__(self, block: Block, weight: Tensor, dim: int, share: int) -> None:
        self.block = block
        by_head = weight.unflatten(1, (-1, dim))
        every = block.heads.numel() == by_head.shape[1]
        self.weight = weight if every else by_head[:, block.heads].flatten(1).contiguous()
        self.heads: Tensor | slice = slice(None) if every else block.heads
        self.kv_heads = block.heads // share

    def change(self, weights: Tensor, values: Tensor) -> Tensor:
        """``[B, rows, d_model]`` from ``weights [B, H, N, K]`` and ``values [B, Hkv, K, D]``."""
        rows = slice(None) if self.block.rows is None else self.block.rows
        p = weights[:, self.heads][:, :, rows][..., self.block.keys] * (self.block.by - 1.0)
        z = p @ values[:, self.kv_heads][:, :, self.block.keys]
        return nn.functional.linear(z.transpose(1, 2).flatten(2), self.weight)


class _Boost:
    def __init__(self, layer: int, parts: list[_Part]) -> None:
        self.layer = layer
        self.prefill = [part for part in parts if part.block.rows is not None]
        self.decode = [part for part in parts if part.block.rows is None]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        out, weights = output[0], output[1]
        parts = self.decode if out.shape[1] == 1 else self.prefill
        if not parts:
            return None
        values = kwargs["past_key_values"].layers[self.layer].values
        for part in parts:
            change = part.change(weights, values)
            if part.block.rows is None:
                out = out + change
            else:
                out[:, part.block.rows] += change
        return (out, *output[1:])
