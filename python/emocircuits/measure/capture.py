"""Reading activations: chosen columns of chosen quantities, stacked over layers, from one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emocircuits.families import open_model

QUANTITIES = ("z", "neurons", "resid_pre", "resid_post")


@contextlib.contextmanager
def capture(
    model: nn.Module, what: Sequence[str] = ("z",), columns: slice | Sequence[int] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Record what the forward passes in the block compute; the last pass wins.

    >>> with capture(model, ["z", "resid_post"], columns=[-1]) as seen:
    ...     model(**inputs)
    >>> seen["z"].shape  # [layers, batch, 1, heads, head_dim]

    Args:
        model: a supported model, patched or not; a patched one shows the edited values.
        what: any of ``z`` (head outputs before the output projection, ``[L, B, P, H, D]``), ``neurons`` (input of the
            down projection, ``[L, B, P, I]``), ``resid_pre`` and ``resid_post`` (``[L, B, P, d_model]``).
        columns: token columns to keep (P of them); None keeps all. Only these are held in memory.

    Yields:
        A dict that is filled when the block ends, detached and in the model's dtype.

    Raises:
        ValueError: an unknown quantity.
    """
    unknown = sorted(set(what) - set(QUANTITIES))
    if unknown:
        raise ValueError(f"what={list(what)}: unknown {', '.join(unknown)}; expected any of {', '.join(QUANTITIES)}")
    handle = open_model(model)
    parts: dict[str, list[Tensor | None]] = {name: [None] * len(handle.layers) for name in what}
    keep: Any = slice(None) if columns is None else columns if isinstance(columns, slice) else list(columns)

    def save(name: str, layer: int, value: Tensor) -> None:
        parts[name][layer] = value.detach()[:, keep].clone()

    hooks = []
    for i in range(len(handle.layers)):
        if "z" in parts:
            hooks.append(handle.output_projections[i].register_forward_pre_hook(lambda m, a, i=i: save("z", i, a[0])))
        if "neurons" in parts:
            hooks.append(
                handle.down_projections[i].register_forward_pre_hook(lambda m, a, i=i: save("neurons", i, a[0]))
            )
        if "resid_pre" in parts:
            hooks.append(
                handle.layers[i].register_forward_pre_hook(
                    lambda m, a, k, i=i: save("resid_pre", i, a[0] if a else k["hidden_states"]), with_kwargs=True
                )
            )
        if "resid_post" in parts:
            hooks.append(
                handle.layers[i].register_forward_hook(
                    lambda m, a, o, i=i: save("resid_post", i, o[0] if isinstance(o, tuple) else o)
                )
            )
    seen: dict[str, Tensor] = {}
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
    for name, layers in parts.items():
        if any(v is None for v in layers):
            raise ValueError("nothing was captured: run the model inside the block")
        stacked = torch.stack([v for v in layers if v is not None])
        if name == "z":
            stacked = stacked.unflatten(-1, (handle.geometry.heads, handle.geometry.head_dim))
        seen[name] = stacked
