"""The logit lens, written as the formula. Keeps the [N, V] logits: for checking, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor


def measure_lens(
    hidden: Tensor, unembed: Tensor, bias: Tensor | None, sets: Tensor | None, top_k: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy ``[N]``, set probabilities ``[N, S]``, ids and log probabilities ``[N, k]`` of the likeliest tokens.

    hidden ``[N, d]``, unembed ``[V, d]``, bias ``[V]``, sets ``[S, L]`` with -1 for no token, each id once.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(wide) @ unembed.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_prob = torch.log_softmax(logits, -1)
    prob = log_prob.exp()
    entropy = torch.special.entr(prob).sum(-1)
    set_prob = prob.new_empty(hidden.shape[0], 0)
    if sets is not None:
        set_prob = prob[:, sets.clamp(min=0)].masked_fill(sets < 0, 0.0).sum(-1)
    top = log_prob.topk(top_k, -1)
    return entropy, set_prob, top.indices, top.values
