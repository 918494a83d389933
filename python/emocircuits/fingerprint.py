"""What a model is: bit for bit, to prove that leaving patch() changes nothing; and by its weights, to know it again."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

SAMPLE = 4096
"""Numbers of each weight that count for :func:`weights_fingerprint`: a large model takes a second, not a minute."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter and buffer, every config, and the names and hooks of every module."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        digest.update(f"{name} {sorted(module.__dict__)} {hooks}".encode())
        config = getattr(module, "config", None)
        if config is not None:
            text = json.dumps(config.to_dict(), sort_keys=True, default=str)
            digest.update(f"{text} {config._attn_implementation}".encode())
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """The same for the same checkpoint, wherever, in whatever floating-point type and by whatever release it is loaded.

    SHA-256 over shapes and evenly spread numbers (4096 of each weight, rounded to bfloat16) of all parameters, names
    left out: releases of transformers rename them. Fine-tuned weights differ; a quantised model is another one.

    Raises:
        ValueError: weights that are offloaded and not in memory.
    """
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError("weights are offloaded, so the model cannot be told from others; load all of it first")
    parts = []
    for weight in model.parameters():
        flat = weight.detach().reshape(-1)
        chosen = flat[:: max(1, flat.numel() // SAMPLE)]
        if chosen.is_floating_point():
            # -0.0 and 0.0 are the same weight.
            chosen = chosen.to(torch.bfloat16) + 0.0
        data = chosen.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        parts.append(f"{tuple(weight.shape)} {hashlib.sha256(data).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()
