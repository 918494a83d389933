"""The result of a capture: a mapping from names, ours or TransformerLens', to tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from emocircuits.files import write_bytes
from emocircuits.measure.names import QUANTITIES, lens_name, read_name
from emocircuits.measure.tokens import Index

FORMAT = "emocircuits.capture/1"


class Captured(Mapping[str, Tensor]):
    """What was captured, by name.

    ``seen["z"]`` is stacked over the layers captured, ``[L, tokens..., ...]``; ``seen["blocks.3.attn.hook_z"]`` or
    ``seen["z", 3]`` is that of one layer. (TransformerLens' patterns have the axis of heads before that of rows.)

    ``tokens...`` is ``[B, P]`` where every batch row keeps as many tokens, which is so without a selection, for
    ``columns`` and for positions asked for one by one; with ``roles`` or a slice of positions it is ``[T]``: the tokens
    of the first row, then those of the second. `index` says which token is which. Under ``reduce`` there are no token
    axes, or ``[R]``, by role.

    Attributes:
        layers: by quantity, the layers of its first axis; ``()`` where there is no such axis.
        index: row, column, position, role and step of the tokens; None with ``reduce``.
        count: with ``reduce``, the tokens in the mean, ``[]`` or ``[R]``; else None.
        reduce: None, "mean" or "mean_by_role".
    """

    def __init__(
        self, layers: dict[str, tuple[int, ...]], reduce: str | None = None,
        read: Callable[[], tuple[dict[str, Tensor], Index | None, Tensor | None]] | None = None,
    ) -> None:  # fmt: skip
        self.layers, self.reduce = layers, reduce
        self._read = read
        self._tensors: dict[str, Tensor] = {}
        self._index: Index | None = None
        self._count: Tensor | None = None
        self._gradients: Callable[[Tensor, Sequence[tuple[str, int | None]]], list[Tensor]] | None = None

    def _now(self) -> dict[str, Tensor]:
        if self._read is not None:
            self._tensors, self._index, self._count = self._read()
        return self._tensors

    @property
    def index(self) -> Index | None:
        """Which tokens they are."""
        self._now()
        return self._index

    @property
    def count(self) -> Tensor | None:
        """How many tokens are in the means."""
        self._now()
        return self._count

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        name, layer = self._find(key)
        tensors = self._now()
        if name not in tensors:
            raise ValueError(
                f"nothing was captured of {key!r}: run the whole model inside the block"
                + (", with input_ids" if name == "embed" else "")
            )
        value = tensors[name] if layer is None else tensors[name][self.layers[name].index(layer)]
        return value if key == name or isinstance(key, tuple) else _lens_axes(name, value)

    def _find(self, key: str | tuple[str, int]) -> tuple[str, int | None]:
        named = key[0] if isinstance(key, tuple) else key
        quantity, layer = read_name(named)
        if isinstance(key, tuple):
            layer = key[1]
        if quantity.name not in self.layers:
            raise KeyError(f"{key!r} was not captured; captured: {', '.join(self.layers)}")
        if layer is not None and layer not in self.layers[quantity.name]:
            raise KeyError(f"{key!r}: captured layers are {list(self.layers[quantity.name])}")
        return quantity.name, layer

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, key: object) -> bool:
        try:
            self._find(key)  # type: ignore[arg-type]
        except (KeyError, ValueError, TypeError):
            return False
        return True

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in self._now().items())
        return f"Captured({shapes or 'nothing yet'})"

    def by_row(self, name: str) -> list[Tensor]:
        """One tensor a batch row: ``[L, n, ...]`` with the n tokens it keeps.

        Raises:
            ValueError: there are no token axes (``reduce``, mass).
        """
        tensor, index = self[name], self.index
        quantity, layer = read_name(name)
        if index is None or quantity.per != "token":
            raise ValueError(f"{name} has no token axis to split by batch row")
        axis = 0 if layer is not None or not quantity.layered else 1
        if index.row.ndim == 2:
            return list(tensor.unbind(axis))
        sizes = torch.bincount(index.row, minlength=int(index.row.max()) + 1 if len(index.row) else 0)
        return list(tensor.split(sizes.tolist(), axis))

    def cache_dict(self) -> dict[str, Tensor]:
        """By TransformerLens name, layer by layer, in its shapes; what it has no name for is left out."""
        out: dict[str, Tensor] = {}
        for name, tensor in self._now().items():
            for i, layer in enumerate(self.layers[name] or (None,)):
                lens = lens_name(name, layer)
                if lens is not None:
                    value = tensor if layer is None else tensor[i]
                    out[lens] = _lens_axes(name, value)
        return out

    def gradient(self, loss: Tensor, name: str) -> Tensor:
        """Gradient of ``loss`` with respect to what was captured in the last forward pass; needs ``detach=False``.

        Returns:
            The shape of ``seen[name]``. The graph of ``loss`` is kept.

        Raises:
            ValueError: the capture was detached, or ``name`` is not something the model itself computes.
        """
        quantity, layer = self._find(name)
        layers: list[int | None] = [layer] if layer is not None else [*self.layers[quantity]] or [None]
        found = self.gradients(loss, [(quantity, at) for at in layers])
        return found[0] if layer is not None or not self.layers[quantity] else torch.stack(found)

    def gradients(self, loss: Tensor, wanted: Sequence[tuple[str, int | None]]) -> list[Tensor]:
        """Gradients with respect to several tensors at once, in one backward pass: see :meth:`gradient`.

        Args:
            loss: a scalar.
            wanted: (name, layer) of each, the names ours; layer is None where there is one for the whole model.
        """
        if self._gradients is None:
            raise ValueError("the captured values are detached; use capture(..., detach=False)")
        return self._gradients(loss, wanted)

    # -- files ---------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write everything to a safetensors file; an interrupted write leaves the old file."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self._now().items()}
        if self._index is not None:
            tensors |= {f"index.{k}": v.contiguous() for k, v in vars(self._index).items()}
        if self._count is not None:
            tensors["count"] = self._count
        about = {"layers": {name: list(self.layers[name]) for name in self._tensors}, "reduce": self.reduce}
        return write_bytes(path, save(tensors, {"format": FORMAT, "about": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> Captured:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, broken, or something else.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own kind for broken files
            raise ValueError(f"{path}: cannot read a capture ({error})") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path}: not a capture; expected a file that Captured.save wrote")
        about: dict[str, Any] = json.loads(metadata["about"])
        out = cls({name: tuple(layers) for name, layers in about["layers"].items()}, about["reduce"])
        index = {k.removeprefix("index."): tensors.pop(k) for k in list(tensors) if k.startswith("index.")}
        out._index = Index(**index) if index else None
        out._count = tensors.pop("count", None)
        unknown = [name for name in tensors if name not in QUANTITIES]
        if unknown:
            raise ValueError(f"{path}: holds {', '.join(unknown)}, which this version does not know")
        out._tensors = tensors
        return out


def _lens_axes(name: str, value: Tensor) -> Tensor:
    """``[B, P, H, K]`` as TransformerLens has it, ``[B, H, P, K]``; everything else is the same."""
    return value.movedim(-2, -3) if name in ("pattern", "scores") and value.ndim == 4 else value
