"""Where the layers of a model compute, when its weights are spread over devices or offloaded."""

from __future__ import annotations

import dataclasses as dc
import itertools
from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """The device a module computes on.

    Weights that accelerate offloads rest on the "meta" device between two calls; its hooks know where they go.
    """
    for part in module.modules():
        hook = part.__dict__.get("_hf_hook")
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    raise ValueError(
        f"the weights of {type(module).__name__} are on the meta device: load them before patching the model"
    )


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype a module's activations have: that of its first float weight (quantised ones are integers)."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def moved(value: Any, device: torch.device) -> Any:
    """A copy of tables, however nested, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if dc.is_dataclass(value) and not isinstance(value, type):
        return dc.replace(value, **{f.name: moved(getattr(value, f.name), device) for f in dc.fields(value) if f.init})
    return value
