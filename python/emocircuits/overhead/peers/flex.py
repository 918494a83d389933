"""FlexAttention: logits plus a table's entry for the roles of row and key, in a ``score_mod`` that is compiled."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from emocircuits.edits import BoostRoute
from emocircuits.families import open_model
from emocircuits.overhead.peers.edits import neurons, routes, use_attention
from emocircuits.plan import Plan
from emokernels import Role

# transformers treats names with "flex_attention" in them specially.
NAME = "emocircuits_score_mod"
PLACE = "_emocircuits_score_mod"


@contextlib.contextmanager
def flex(model: nn.Module, plan: Plan, roles: Tensor) -> Iterator[None]:
    """Put ``plan`` (logits plus ln(by), gains on neurons) into ``model``; every layer runs on FlexAttention.

    Raises:
        NotImplementedError: the plan or the model needs more than that.
    """
    handle = open_model(model)
    routes(plan, roles, "logit-add")  # refuses what it cannot do
    use_attention(model, handle, NAME)
    tables: dict[int, Tensor] = {}
    for edit in plan:
        if isinstance(edit, BoostRoute):
            for layer, head in edit.heads:
                if layer not in tables:
                    tables[layer] = torch.zeros(handle.geometry.heads, len(Role), len(Role), device=roles.device)
                for source in edit.source:
                    to = torch.tensor([int(role) for role in edit.destinations()], device=roles.device)
                    tables[layer][head, to, int(Role[source.upper()])] += math.log(edit.by)
    generated = torch.full((4096,), int(Role.GENERATED), device=roles.device)
    columns = torch.cat([roles.long(), generated])
    with contextlib.ExitStack() as undo:
        undo.enter_context(neurons(handle, plan))
        for layer, module in enumerate(handle.attentions):
            module.__dict__[PLACE] = (tables.get(layer), columns)
            undo.callback(module.__dict__.pop, PLACE)
        yield


def _attend(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, to: Tensor, of: Tensor, mask: Tensor | None, **options: Any
) -> Tensor:
    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if table is not None:
            score = score + table[h, to[i], of[j]]
        return score if mask is None else torch.where(mask[b, 0, i, j], score, -math.inf)

    found = flex_attention(q, k, v, score_mod=modified, **options)
    assert isinstance(found, Tensor)
    return found


@functools.cache
def _compiled(device: str) -> Any:
    # One shape a graph on a CPU, where the kernel of dynamic decode steps does not compile (torch 2.13).
    return torch.compile(_attend, dynamic=False if device == "cpu" else None)


@functools.cache
def _causal(rows: int, keys: int, device: torch.device) -> BlockMask:
    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    return create_block_mask(visible, None, None, rows, keys, device=device)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    refused = [n for n in ("softcap", "s_aux", "position_bias") if options.get(n) is not None]
    if refused:
        raise NotImplementedError(f"attention with {', '.join(refused)}")
    table, columns = module.__dict__[PLACE]
    rows, keys = query.shape[2], key.shape[2]
    heads, share = query.shape[1], query.shape[1] // key.shape[1]
    grouped = share > 1
    if grouped and heads & (heads - 1):
        # As transformers does for numbers of heads that are no power of two.
        key, value, grouped = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1), False
    attend = _attend if torch.compiler.is_compiling() else _compiled(query.device.type)
    to = columns[-1:] if rows == 1 else columns[:rows]
    blocks = _causal(rows, keys, query.device) if mask is None and rows > 1 else None
    z = attend(
        query, key, value, table, to, columns[:keys], mask, block_mask=blocks, scale=scaling, enable_gqa=grouped
    )  # fmt: skip
    return z.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
# Not the mask of FlexAttention: `generate` cannot hand one on when the cache is static (transformers 5.23).
AttentionMaskInterface.register(NAME, sdpa_mask)
