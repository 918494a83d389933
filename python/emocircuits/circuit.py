"""A Circuit: what localisation found in one model, as a file that VEENA takes."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

from emocircuits.files import read_json, write_json

FORMAT = "emocircuits/circuit"
VERSION = 1


@dc.dataclass(frozen=True)
class Circuit:
    """Emotional circuit of one model.

    Args:
        model_type: ``config.model_type`` of the model it was found in.
        layers: number of decoder layers of that model.
        l_emo: the layer at which steering has its largest effect.
        heads: critical heads as (layer, head), most important first.
        neurons: explicit-state neurons as (layer, neuron), most important first.
        head_effects: effect of each of ``heads``, in its order; its meaning is in ``settings``.
        settings: how it was found (free form, plain JSON values).
    """

    model_type: str
    layers: int
    l_emo: int
    heads: tuple[tuple[int, int], ...]
    neurons: tuple[tuple[int, int], ...] = ()
    head_effects: tuple[float, ...] = ()
    settings: dict[str, Any] = dc.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("heads", "neurons"):
            pairs = tuple((int(a), int(b)) for a, b in getattr(self, name))
            if any(layer < 0 or layer >= self.layers or i < 0 for layer, i in pairs):
                raise ValueError(
                    f"{name}={list(pairs)}: expected layers 0 to {self.layers - 1} and non-negative numbers"
                )
            object.__setattr__(self, name, pairs)
        object.__setattr__(self, "head_effects", tuple(float(v) for v in self.head_effects))
        if self.head_effects and len(self.head_effects) != len(self.heads):
            raise ValueError(f"head_effects has {len(self.head_effects)} values for {len(self.heads)} heads")
        if not 0 <= self.l_emo < self.layers:
            raise ValueError(f"l_emo={self.l_emo}: expected a layer from 0 to {self.layers - 1}")

    def save(self, path: str | Path) -> Path:
        """Write JSON; an interrupted write leaves the old file."""
        return write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """What a circuit file holds."""
        return {"format": FORMAT, "version": VERSION, **dc.asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what :meth:`save` wrote; ``ValueError`` names what is wrong with the file."""
        data = read_json(path, "a circuit")
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise ValueError(f'{path}: not a circuit of version {VERSION}: expected "format": "{FORMAT}"')
        names = {f.name for f in dc.fields(cls)}
        wrong = sorted(set(data) - names - {"format", "version"})
        if wrong:
            raise ValueError(f"{path}: unknown field {', '.join(wrong)}; a circuit holds {', '.join(sorted(names))}")
        try:
            return cls(**{k: v for k, v in data.items() if k in names})
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from error
