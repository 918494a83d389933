"""Edits of MLP neurons: entries of the input of the down projection."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from emocircuits.edits.arrays import FrozenArray, number
from emocircuits.edits.base import NEURONS, Edit

if TYPE_CHECKING:
    from emocircuits.families import Geometry


@dc.dataclass(frozen=True)
class NeuronEdit(Edit):
    """Base of the edits that name neurons.

    Args:
        neurons: ``{layer: [neuron, ...]}``.
    """

    neurons: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "neurons", tuple(sorted(_groups(self.neurons))))

    def layers_used(self) -> set[int]:
        """Layers of the neurons."""
        return {layer for layer, _ in self.neurons}

    def place(self) -> str:
        """Neurons are edited at the input of the down projection."""
        return NEURONS

    def check(self, geometry: Geometry) -> None:
        """ValueError when a layer or neuron is not there, NotImplementedError for a mixture of experts."""
        super().check(geometry)
        if geometry.neurons == 0:
            raise NotImplementedError(
                "the MLPs of this model are mixtures of experts, whose neurons cannot be edited; "
                "use heads, routes and vectors"
            )
        for layer, index in self.neurons:
            if max(index) >= geometry.neurons:
                raise ValueError(
                    f"layer {layer} has no neuron {max(index)}; this model has neurons 0 to {geometry.neurons - 1}"
                )


@dc.dataclass(frozen=True)
class ScaleNeurons(NeuronEdit):
    """Multiply neurons by ``by``; 0 ablates, > 1 amplifies.

    Args:
        neurons: ``{layer: [neuron, ...]}``.
        by: factor.
    """

    by: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "by", number("by", self.by))


@dc.dataclass(frozen=True)
class _ValuedNeurons(NeuronEdit):
    """Neurons with a value each: kept as ``[n]``, layers ascending, a layer's neurons as they were given."""

    value: Any = ()

    arrays: ClassVar[tuple[str, ...]] = ("value",)

    def __post_init__(self) -> None:
        groups = _groups(self.neurons)
        super().__post_init__()
        count = sum(len(index) for _, index in groups)
        given = [self.value] * count if isinstance(self.value, int | float) else self.value
        array = FrozenArray("value", given)
        if array.shape != (count,):
            raise ValueError(f"value has shape {array.shape} for {count} neurons: expected a number or [{count}]")
        parts, start = [], 0
        for layer, index in groups:
            parts.append((layer, np.asarray(array)[start : start + len(index)]))
            start += len(index)
        parts.sort(key=lambda part: part[0])
        object.__setattr__(self, "value", FrozenArray("value", np.concatenate([part for _, part in parts])))

    def values(self) -> dict[int, list[float]]:
        """The values of each layer, in the order of its neurons."""
        found, rest = {}, self.value.tolist()
        for layer, index in self.neurons:
            found[layer], rest = rest[: len(index)], rest[len(index) :]
        return found


@dc.dataclass(frozen=True)
class AddNeurons(_ValuedNeurons):
    """Add ``by * value`` to neurons, after factors.

    Args:
        neurons: ``{layer: [neuron, ...]}``.
        value: a number, or ``[n]`` for the n neurons in the order in which ``neurons`` names them.
        by: factor on the value.
    """

    by: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "by", number("by", self.by))


@dc.dataclass(frozen=True)
class ReplaceNeurons(_ValuedNeurons):
    """Set neurons: mean ablation, activation patching.

    Args:
        neurons: ``{layer: [neuron, ...]}``.
        value: a number, or ``[n]`` for the n neurons in the order in which ``neurons`` names them.
    """


def _groups(given: Any) -> list[tuple[int, tuple[int, ...]]]:
    """(layer, neurons) in the order given."""
    try:
        items = given.items() if isinstance(given, Mapping) else given
        groups = [(int(layer), tuple(int(i) for i in index)) for layer, index in items]
    except (TypeError, ValueError):
        raise TypeError(f"neurons={given!r}: expected {{layer: [neuron, ...]}} such as {{20: [8483]}}") from None
    distinct = len({layer for layer, _ in groups}) == len(groups)
    if not groups or not distinct or any(not i or min(i) < 0 or n < 0 or len(set(i)) != len(i) for n, i in groups):
        raise ValueError(f"neurons={given!r}: expected distinct non-negative neuron numbers, at least one a layer")
    return groups
