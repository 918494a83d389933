"""SDPA with a dense bias: what is to be added to the logits, as an additive mask of every head, row and key."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from emocircuits.families import open_model
from emocircuits.overhead.peers.edits import Block, neurons, routes, use_attention
from emocircuits.plan import Plan

NAME = "emocircuits_dense_bias"
PLACE = "_emocircuits_dense_bias"


@contextlib.contextmanager
def dense_bias(model: nn.Module, plan: Plan, roles: Tensor) -> Iterator[None]:
    """Put ``plan`` (logits plus ln(by), gains on neurons) into ``model``.

    Raises:
        NotImplementedError: the plan or the model needs more than that.
    """
    handle = open_model(model)
    use_attention(model, handle, NAME)
    dtype = next(handle.text.parameters()).dtype
    with contextlib.ExitStack() as undo:
        undo.enter_context(neurons(handle, plan))
        for layer, blocks in routes(plan, roles, "logit-add").items():
            place = handle.attentions[layer].__dict__
            place[PLACE] = _Bias(blocks, handle.geometry.heads, roles, dtype)
            undo.callback(place.pop, PLACE)
        yield


class _Bias:
    """The bias of one layer."""

    def __init__(self, blocks: list[Block], heads: int, roles: Tensor, dtype: torch.dtype) -> None:
        self.heads = heads
        self.prefill = [block for block in blocks if block.rows is not None]
        self.step: Tensor | None = None
        for block in blocks:
            if block.rows is None:
                if self.step is None:
                    # Longer than any generation that is timed: steps slice it.
                    self.step = torch.zeros(1, heads, 1, roles.numel() + 4096, device=roles.device, dtype=dtype)
                _add(self.step, block, slice(None))

    def over(self, query: Tensor, keys: int, mask: Tensor | None) -> Tensor | None:
        """The additive mask for this call, or None where this layer has nothing to add."""
        rows = query.shape[2]
        if rows == 1:
            if self.step is None:
                return mask
            bias = self.step[..., :keys]
            return bias if mask is None else torch.where(mask, bias, -math.inf)
        if not self.prefill:
            return mask
        bias = query.new_zeros(1, self.heads, rows, keys)
        for block in self.prefill:
            assert block.rows is not None
            _add(bias, block, block.rows)
        if mask is None:
            mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril()
        return bias.masked_fill_(~mask, -math.inf)


def _add(bias: Tensor, block: Block, rows: Any) -> None:
    columns = torch.arange(bias.shape[3], device=bias.device)[block.keys]
    at = torch.arange(bias.shape[2], device=bias.device)[rows]
    bias[0, block.heads[:, None, None], at[:, None], columns] += math.log(block.by)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    bias: _Bias | None = module.__dict__.get(PLACE)
    if bias is not None:
        mask = bias.over(query, key.shape[2], mask)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
