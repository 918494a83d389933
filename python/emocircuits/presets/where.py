"""Which layers and heads a preset means when the caller does not say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from emocircuits.families import Geometry, Handle, open_model

Pair = tuple[int, int]
Pairs = Sequence[Pair]
ANSWER = ("last", "generated")
"""Rows that emit a token: the published code edits ``[-1]`` at every step, in prefill and in decode."""


def opened(model: nn.Module, *, sees: str | None = None) -> Handle:
    """The model through its family; ``sees`` names a preset that needs visual tokens.

    Raises:
        TypeError, NotImplementedError: as :func:`emocircuits.families.open_model`.
        ValueError: the preset needs visual tokens, and the model is text-only.
    """
    handle = open_model(model)
    if sees is not None and not handle.sees:
        raise ValueError(f"{sees} edits attention to visual tokens; {type(model).__name__} is a text-only model")
    return handle


def some_layers(geometry: Geometry, layers: int | Iterable[int] | None, default: Iterable[int]) -> list[int]:
    """``layers`` as a list, or ``default``, checked against the depth of the model."""
    chosen = list(default) if layers is None else [layers] if isinstance(layers, int) else [int(i) for i in layers]
    wrong = [i for i in chosen if not 0 <= i < geometry.layers]
    if wrong or not chosen:
        raise ValueError(
            f"layers={chosen}: this model has layers 0 to {geometry.layers - 1}; name at least one of them"
        )
    return chosen


def chosen_heads(
    name: str,
    geometry: Geometry,
    layers: int | Iterable[int] | None,
    heads: Pairs | None,
    default: Iterable[int],
) -> Pairs:
    """``heads``, or all query heads of ``layers``, or of ``default``; ``name`` is the preset that asks."""
    if heads is not None and layers is not None:
        raise ValueError(f"{name} takes layers (all their heads) or heads, not both")
    if heads is not None:
        return heads
    return [(layer, head) for layer in some_layers(geometry, layers, default) for head in range(geometry.heads)]
