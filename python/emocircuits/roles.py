"""Which token is what: roles of a prompt, found from its inputs and frozen for the generation that follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emokernels import Role


def prompt_roles(input_ids: Tensor, real: Tensor | None, placeholders: Sequence[int]) -> Tensor:
    """Roles of the tokens of a prompt.

    Text before the first visual token is SYSTEM, text after it QUERY, the last real token LAST, whatever it is. A row
    without visual tokens has no SYSTEM part: its text is QUERY. Several images, in any order with text, keep one role
    per token.

    Args:
        input_ids: ``[B, N]`` integers.
        real: ``[B, N]`` bool, False on padding; None means no padding.
        placeholders: token ids that stand for visual features.

    Returns:
        ``[B, N]`` uint8 on the device of ``input_ids``.
    """
    device = input_ids.device
    if real is None:
        real = torch.ones_like(input_ids, dtype=torch.bool)
    visual = torch.isin(input_ids, torch.tensor(list(placeholders), device=device, dtype=input_ids.dtype)) & real
    after = visual.cumsum(-1) > 0
    after |= ~visual.any(-1, keepdim=True)
    query, system = int(Role.QUERY), int(Role.SYSTEM)
    roles = torch.where(after, query, system)
    roles = roles.masked_fill(visual, int(Role.VISUAL)).masked_fill(~real, int(Role.PAD))
    columns = torch.arange(input_ids.shape[1], device=device)
    last = torch.where(real, columns, -1).amax(-1, keepdim=True)
    return torch.where((columns == last) & real, int(Role.LAST), roles).to(torch.uint8)


def real_tokens(attention_mask: object, start: int, length: int) -> Tensor | None:
    """``[B, N]`` bool of non-padding columns from ``start``, from a mask as Hugging Face models receive it.

    Args:
        attention_mask: None, ``[B, >= start + N]``, ``[B, 1, N, K]`` (bool: True attends; float: additive), or a
            dict of such masks by layer type.
        start: first column, 0 unless a prompt continues on a filled cache.
        length: N, the number of columns.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim not in (2, 4):
        raise TypeError(
            f"attention_mask is {type(attention_mask).__name__}"
            + (f" of shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else "")
            + ": expected [B, tokens], [B, 1, N, K] or None"
        )
    if attention_mask.ndim == 2:
        return attention_mask[:, start : start + length].bool()
    # A column is real when any row of the prompt attends to it; a causal mask hides none of them for good.
    visible = (
        attention_mask
        if attention_mask.dtype == torch.bool
        else attention_mask > torch.finfo(attention_mask.dtype).min / 2
    )
    return visible[:, 0, -length:, start : start + length].any(-2)
