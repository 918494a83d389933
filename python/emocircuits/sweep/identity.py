"""What makes two sweeps the same one: hashes of model and inputs, and a description of metric and target."""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
import math
import types
import weakref
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

STEP = 1 << 26  # bytes hashed at a time: a large layer on a GPU is not copied as a whole
# Where a model was loaded from, and by what, is not what it computes.
UNRELATED = ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash")


# Weights hashed before, as long as nobody wrote into them: hashing a large model takes longer than a short sweep.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 over shape, dtype and bytes."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    data = tensor.detach().contiguous().reshape(-1)
    size = max(1, STEP // max(1, data.element_size()))
    for start in range(0, data.numel(), size):
        digest.update(data[start : start + size].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_model(model: nn.Module) -> dict[str, str]:
    """Class, SHA-256 of the config, and SHA-256 over names, shapes, dtypes and values of all weights."""
    config = getattr(model, "config", None)
    settings = _without(config.to_dict()) if config is not None else {}
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        "class": type(model).__name__,
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "weights": _hash_weights(model),
    }


def _hash_weights(model: nn.Module) -> str:
    state = sorted(model.state_dict(keep_vars=True).items())
    # In-place writes raise a tensor's version; inference tensors have none and are hashed each time.
    now = None
    if not any(t.is_inference() for _, t in state):
        now = [(name, t.data_ptr(), t._version, t.dtype, tuple(t.shape)) for name, t in state]
    known = _KNOWN.get(model)
    if known is not None and now is not None and known[0] == now:
        return known[1]
    weights = hashlib.sha256()
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype], str] = {}
    for name, tensor in state:
        # Tied weights are hashed once.
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in seen or not tensor.data_ptr():
            seen[key] = hash_tensor(tensor)
        weights.update(f"{name} {seen[key]}".encode())
    found = weights.hexdigest()
    _KNOWN[model] = (now, found)
    return found


def _without(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {k: _without(v) for k, v in settings.items() if k not in UNRELATED}
    return [_without(v) for v in settings] if isinstance(settings, list | tuple) else settings


def hash_inputs(inputs: Mapping[str, Any]) -> str:
    """SHA-256 over the names and values of model inputs."""
    return hashlib.sha256(json.dumps(describe(inputs), sort_keys=True).encode()).hexdigest()


def describe(value: Any) -> Any:
    """``value`` as JSON that is equal for equal values: tensors by their hash, functions by their code.

    Raises:
        TypeError: a value whose equality cannot be told, such as an object that is no dataclass.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        return {"tensor": hash_tensor(value)}
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if dc.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dc.fields(value)}
        return {"type": type(value).__qualname__, **fields}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, Set):
        return sorted((describe(v) for v in value), key=repr)
    if isinstance(value, Sequence):
        return [describe(v) for v in value]
    code = getattr(value, "__code__", None)
    if isinstance(code, types.CodeType):
        closed = [describe(cell.cell_contents) for cell in getattr(value, "__closure__", None) or ()]
        given = describe(getattr(value, "__defaults__", None))
        # Of what it reads around it, plain values count too: the token ids of a metric in a notebook are globals.
        around = {
            name: describe(value.__globals__[name])
            for name in code.co_names
            if isinstance(value.__globals__.get(name), bool | int | float | str | Tensor)
        }
        return {
            "function": value.__qualname__, "code": _code(code), "closure": closed, "defaults": given,
            "globals": around,
        }  # fmt: skip
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(
        f"a {type(value).__name__} cannot be told from another one in a later run, so a sweep with it cannot be "
        "resumed; use a function, a dataclass, tensors or plain values, or sweep without out="
    )


def _code(code: types.CodeType) -> str:
    """SHA-256 of what a function does, wherever its file is."""
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    text = json.dumps([code.co_code.hex(), list(code.co_names), list(code.co_varnames), constants])
    return hashlib.sha256(text.encode()).hexdigest()
