"""Changes to a model that are taken back, last first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn


class Changes:
    """Hooks and attributes put on modules for a while. `undo` takes back all of them, even when one of them fails."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def callback(self, undo: Callable[..., Any], *args: Any) -> None:
        """Run ``undo(*args)`` when the changes are taken back."""
        self._stack.callback(undo, *args)

    def hook(self, register: Callable[..., Any], hook: Callable[..., Any], **options: Any) -> None:
        """Add a hook: ``register`` is a module's ``register_forward_hook`` or the like."""
        self._stack.callback(register(hook, **options).remove)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of one module object, past ``nn.Module.__setattr__``."""
        own = module.__dict__
        if name in own:
            self._stack.callback(own.__setitem__, name, own[name])
        else:
            self._stack.callback(own.pop, name, None)
        own[name] = value

    def undo(self) -> None:
        """Take everything back."""
        self._stack.close()
