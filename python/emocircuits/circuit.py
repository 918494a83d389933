"""A Circuit: what localisation found in one model, as a file that VEENA takes."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

from torch import nn

from emocircuits.files import read_json, write_json
from emocircuits.fingerprint import weights_fingerprint

FORMAT = "emocircuits/circuit"
VERSION = 2
READS = (1, 2)
EXPLICIT, CONTEXTUAL = "explicit", "contextual"


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
        head_intervals: 95 % interval (low, high) of each of ``head_effects``.
        neuron_effects: score of each of ``neurons``.
        neuron_types: "explicit" or "contextual" of each of ``neurons``.
        neuron_tokens: top tokens of each of ``neurons``.
        steering: name of the file with its steering vectors, beside the circuit file.
        fingerprint: :func:`~emocircuits.fingerprint.weights_fingerprint` of the model, empty where it is not known.

    Raises:
        ValueError: layers that the model does not have, or a list that is not as long as what it describes.
    """

    model_type: str
    layers: int
    l_emo: int
    heads: tuple[tuple[int, int], ...]
    neurons: tuple[tuple[int, int], ...] = ()
    head_effects: tuple[float, ...] = ()
    settings: dict[str, Any] = dc.field(default_factory=dict)
    head_intervals: tuple[tuple[float, float], ...] = ()
    neuron_effects: tuple[float, ...] = ()
    neuron_types: tuple[str, ...] = ()
    neuron_tokens: tuple[tuple[str, ...], ...] = ()
    steering: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for name in ("heads", "neurons"):
            pairs = tuple((int(a), int(b)) for a, b in getattr(self, name))
            if any(layer < 0 or layer >= self.layers or i < 0 for layer, i in pairs):
                raise ValueError(
                    f"{name}={list(pairs)}: expected layers 0 to {self.layers - 1} and non-negative numbers"
                )
            if len(set(pairs)) < len(pairs):
                raise ValueError(f"{name}={list(pairs)}: one is there twice")
            object.__setattr__(self, name, pairs)
        for name in ("head_effects", "neuron_effects"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        intervals = tuple((float(a), float(b)) for a, b in self.head_intervals)
        object.__setattr__(self, "head_intervals", intervals)
        object.__setattr__(self, "neuron_types", tuple(self.neuron_types))
        object.__setattr__(self, "neuron_tokens", tuple(tuple(map(str, words)) for words in self.neuron_tokens))
        for of, names in (
            ("heads", ("head_effects", "head_intervals")),
            ("neurons", ("neuron_effects", "neuron_types", "neuron_tokens")),
        ):
            for name in names:
                found, expected = len(getattr(self, name)), len(getattr(self, of))
                if found and found != expected:
                    raise ValueError(f"{name} has {found} values for {expected} {of}")
        unknown = sorted(set(self.neuron_types) - {EXPLICIT, CONTEXTUAL})
        if unknown:
            raise ValueError(f"neuron_types has {unknown[0]!r}: expected {EXPLICIT!r} or {CONTEXTUAL!r}")
        if not 0 <= self.l_emo < self.layers:
            raise ValueError(f"l_emo={self.l_emo}: expected a layer from 0 to {self.layers - 1}")

    def require(self, model: nn.Module, model_type: str, layers: int) -> None:
        """Refuse a model that the circuit was not found in.

        Args:
            model: it.
            model_type, layers: its ``config.model_type`` and depth.

        Raises:
            ValueError: its type, depth or weights are not those of the circuit.
        """
        if (model_type, layers) != (self.model_type, self.layers):
            raise ValueError(
                f"the circuit was found in a {self.model_type!r} model of {self.layers} layers, this is "
                f"{model_type!r} with {layers}; find the circuit of this model first"
            )
        if self.fingerprint and weights_fingerprint(model) != self.fingerprint:
            raise ValueError(
                f"the circuit was found in a {self.model_type!r} model with other weights (fingerprint "
                f"{self.fingerprint[:12]}); find the circuit of this model, or say that it is meant for this one too: "
                "dataclasses.replace(circuit, fingerprint='')"
            )

    def save(self, path: str | Path) -> Path:
        """Write JSON; an interrupted write leaves the old file."""
        return write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """What a circuit file holds."""
        return {"format": FORMAT, "version": VERSION, **dc.asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what :meth:`save` wrote, by this release or an older one; ``ValueError`` names what is wrong."""
        data = read_json(path, "a circuit")
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'{path}: not a circuit: expected "format": "{FORMAT}"')
        if data.get("version") not in READS:
            raise ValueError(
                f"{path}: a circuit of version {data.get('version')!r}; this release reads {', '.join(map(str, READS))}"
            )
        names = {f.name for f in dc.fields(cls)}
        wrong = sorted(set(data) - names - {"format", "version"})
        if wrong:
            raise ValueError(f"{path}: unknown field {', '.join(wrong)}; a circuit holds {', '.join(sorted(names))}")
        try:
            return cls(**{k: v for k, v in data.items() if k in names})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
