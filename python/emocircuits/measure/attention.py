"""Attention weights of a few rows, without eager attention and without the full matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emocircuits.patching import Tapped, patch
from emocircuits.plan import Plan
from emokernels.attention import run as run_attention


@torch.no_grad()
def attention_weights(
    model: nn.Module, inputs: dict[str, Tensor], plan: Plan | None = None, *, rows: int = 1, roles: Tensor | None = None
) -> Tensor:
    """Weights that the last ``rows`` rows of a prompt give to every key, by layer and head.

    With a plan these are the effective weights: after its logit edits and gains, as they multiply the values. A
    post-softmax gain is not renormalised, so rows then need not sum to 1.

    Args:
        model: a supported model, not patched at the moment.
        inputs: model inputs of one or more prompts, padded on the left if at all.
        plan: edits to apply (None: the model left alone).
        rows: how many rows, counted from the end.
        roles: roles of the tokens, see :func:`emocircuits.patch`.

    Returns:
        ``[L, B, H, rows, K]`` float32.
    """
    seen: list[Tensor] = []

    def tap(call: Tapped) -> None:
        # Values that are unit vectors make the head output the row of weights itself.
        keys = call.k.shape[2]
        unit = torch.eye(keys, device=call.k.device, dtype=call.k.dtype).expand(*call.k.shape[:2], keys, keys)
        mask = None if call.mask is None else call.mask[..., -rows:, :]
        weights, _ = run_attention(
            call.q[:, :, -rows:], call.k, unit, mask=mask, causal=call.causal, scale=call.scale, routes=call.routes,
            roles=call.roles, query_roles=call.query_roles[:, -rows:], backend="reference",
        )  # fmt: skip
        seen.append(weights.float())

    with patch(model, plan or Plan(), roles=roles, tap=tap):
        model(**inputs, use_cache=False, logits_to_keep=1)
    return torch.stack(seen)
