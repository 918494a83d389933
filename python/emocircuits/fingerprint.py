"""What a model is, bit for bit: to prove that leaving patch() changes nothing."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn


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
