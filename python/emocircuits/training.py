"""What training adds: dropout is refused, and layers that backward() runs again see what they saw the first time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from emocircuits.families import Handle
from emocircuits.sites import State
from emocircuits.undo import Changes

CHECKPOINT = "_gradient_checkpointing_func"


def refuse_dropout(text: nn.Module) -> None:
    """Refuse a text decoder in training mode with any dropout above 0.

    Dropout makes what an edit acts on random, and attention with dropout is not what edited layers compute.
    """
    for name, module in text.named_modules():
        if not module.training:
            continue
        rates = {k: v for k, v in vars(module).items() if "dropout" in k and isinstance(v, float)}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates = {"p": module.p}
        for field, rate in rates.items():
            if rate > 0:
                raise NotImplementedError(
                    f"{field}={rate} in {name or type(text).__name__} ({type(module).__name__}) while the model is in "
                    "training mode: dropout cannot be combined with a plan; set it to 0, or call model.eval()"
                )


def keep_for_backward(handle: Handle, state: State, changes: Changes) -> None:
    """Let layers under gradient checkpointing be run again with the roles and tables of their own forward pass."""
    for layer in handle.layers:
        function = getattr(layer, CHECKPOINT, None)
        if function is not None and not isinstance(function, _Kept):
            changes.set(layer, CHECKPOINT, _Kept(function, state))


class _Kept:
    """A checkpointing function whose second run of a layer finds the state of the first."""

    def __init__(self, checkpoint: Callable[..., Any], state: State) -> None:
        self.checkpoint, self.state = checkpoint, state

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(self._run, self.state.context.snapshot(), self.state.tables, function)
        return self.checkpoint(run, *args, **kwargs)

    def _run(self, context: Any, tables: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if not state.open:
            raise ValueError(
                "backward() ran outside of patch(), and gradient checkpointing needs the patched layers again; call "
                "backward() inside the with block"
            )
        before = state.context, state.tables
        state.context, state.tables = context, tables
        try:
            return function(*args, **kwargs)
        finally:
            state.context, state.tables = before
