"""What a sweep found: the metric under each patch, the two baselines, and what follows from them."""

from __future__ import annotations

import dataclasses as dc
import hashlib
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from emocircuits.environment import versions
from emocircuits.files import read_json, write_bytes, write_json
from emocircuits.scoring.statistics import intervals

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FORMAT = "emocircuits.sweep/1"
FILE = "sweep.json"


@dc.dataclass(frozen=True, eq=False)
class SweepResult:
    """The metric under each patch.

    Attributes:
        values: float64 on the CPU, one axis for each of `axes`: ``[layer]``, ``[layer, pos]``, ``[layer, head]``,
            ``[layer, pos, head]``, ... For several pairs their mean.
        clean, corrupt: the metric of the two prompts, nothing patched.
        axes: names of the axes; "layer" is the first, "pos" the column of the prompt.
        labels: by axis, what its entries are. Other keys may name the entries of an axis once more ("token").
        meta: what was swept, on what: JSON-ready.
        pairs: of several pairs, ``values`` of each, ``[pairs, *values.shape]``; else None.
        baselines: of several pairs, clean and corrupt of each, ``[pairs, 2]``; else None.
        draws: where patches come from drawn prompts, ``values`` of each draw, ``[draws, *values.shape]``; else None.
        exact: of a prescreened sweep, bool as ``values``: where the engine ran the patch (of several pairs, in all of
            them); the others are estimates. None: all values are what their method gives.
    """

    values: Tensor
    clean: float
    corrupt: float
    axes: tuple[str, ...]
    labels: dict[str, list[Any]]
    meta: dict[str, Any] = dc.field(default_factory=dict)
    pairs: Tensor | None = None
    baselines: Tensor | None = None
    draws: Tensor | None = None
    exact: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float64 or self.values.device.type != "cpu":
            raise TypeError(f"values are {self.values.dtype} on {self.values.device}: expected float64 on the CPU")
        sizes = tuple(len(self.labels[axis]) if axis in self.labels else -1 for axis in self.axes)
        if tuple(self.values.shape) != sizes:
            raise ValueError(
                f"values are {list(self.values.shape)}: expected {list(sizes)}, one axis for each of "
                f"{', '.join(self.axes)} and its labels"
            )

    @property
    def gap(self) -> float:
        """``clean - corrupt``: what a patch can restore."""
        return self.clean - self.corrupt

    @property
    def base(self) -> float:
        """The metric of the run that was patched: the clean one where patches add noise."""
        return self.clean if self.meta.get("direction") == "noise" else self.corrupt

    @property
    def measurable(self) -> bool:
        """Whether the two baselines differ by more than the rounding of the model's arithmetic."""
        dtype = getattr(torch, str(self.meta.get("dtype", "float32")), torch.float32)
        noise = 8 * torch.finfo(dtype).eps * max(abs(self.clean), abs(self.corrupt))
        return math.isfinite(self.gap) and abs(self.gap) > noise

    @property
    def texts(self) -> list[Any] | None:
        """Of a generated metric what each patch made the model say, as ``values.flatten()``; of others None.

        Of several pairs as ``pairs.flatten()``, of several draws all draws of a patch, then those of the next.
        Those of the two prompts are in ``meta["texts"]``, except for several pairs.
        """
        found: list[Any] | None = self.meta.get("texts", {}).get("patched")
        return found

    @property
    def effects(self) -> Tensor:
        """``(values - corrupt) / (clean - corrupt)``: 0 as the corrupt prompt, 1 as the clean one.

        For several pairs the ratio of the means, so that a pair with hardly a difference does not drown the others.

        Raises:
            ValueError: the baselines are equal or not finite: there is nothing to be a share of. `values` are there.
        """
        if not self.measurable:
            raise ValueError(
                f"clean {self.clean:.6g} and corrupt {self.corrupt:.6g} do not differ, so effects would be shares of "
                "nothing; use .values, or a metric or pair that tells the two prompts apart"
            )
        return (self.values - self.corrupt) / self.gap

    @classmethod
    def mean(cls, results: Sequence[SweepResult]) -> SweepResult:
        """The mean over prompt pairs; the single pairs stay in `pairs`, for :meth:`interval`.

        Raises:
            ValueError: there are none, they are of different sweeps (axes, layers, heads, number of positions), or one
                of them is a mean already.
        """
        if not results:
            raise ValueError("there are no results to take the mean of")
        first = results[0]
        for i, other in enumerate(results):
            if other.pairs is not None:
                raise ValueError(f"result {i} is a mean of pairs already; pass the results of the single pairs")
            same = other.axes == first.axes and all(
                len(other.labels[a]) == len(first.labels[a]) if a == "pos" else other.labels[a] == first.labels[a]
                for a in first.axes
            )
            if not same or any(other.meta.get(k) != first.meta.get(k) for k in ("target", "direction", "patch_with")):
                raise ValueError(
                    f"result {i} is [{_shape(other)}] of {other.meta.get('target')}, the first one [{_shape(first)}] "
                    f"of {first.meta.get('target')}; a mean needs the same sweep over pairs with as many positions "
                    "(positions='all' has none)"
                )
        if len(results) == 1:
            return first
        pairs = torch.stack([r.values for r in results])
        baselines = torch.tensor([[r.clean, r.corrupt] for r in results], dtype=torch.float64)
        clean, corrupt = baselines.mean(0).tolist()
        labels = {k: v for k, v in first.labels.items() if all(r.labels.get(k) == v for r in results)}
        # Columns that are not the same in all pairs are numbered.
        labels |= {a: list(range(len(first.labels[a]))) for a in first.axes if a not in labels}
        meta = {k: v for k, v in first.meta.items() if all(r.meta.get(k) == v for r in results)}
        if all(r.texts is not None for r in results):
            meta["texts"] = {"patched": [text for r in results for text in r.texts or []]}
        exact = [r.exact for r in results if r.exact is not None]
        if exact:
            meta["prescreen"] = {"pairs": [r.meta.get("prescreen") for r in results]}
        return cls(
            pairs.mean(0), clean, corrupt, first.axes, labels, {**meta, "pairs": len(results)}, pairs, baselines,
            exact=torch.stack(exact).all(0) if exact else None,
        )  # fmt: skip

    def interval(
        self, of: Literal["effects", "values"] = "effects", *, seed: int = 0, resamples: int = 2000
    ) -> tuple[Tensor, Tensor]:
        """95 % bootstrap interval over the pairs, of one pair over its draws: bounds, each as ``values``.

        Raises:
            ValueError: fewer than two pairs or draws, or, for effects, baselines that do not differ.
        """
        above, below = self._samples(of)
        low, high = intervals(above.numpy(), below.numpy(), seed=seed, resamples=resamples)
        return torch.from_numpy(low), torch.from_numpy(high)

    @property
    def sampled(self) -> bool:
        """Whether there are several pairs, or several draws: whether :meth:`interval` has something to say."""
        return any(samples is not None and len(samples) > 1 for samples in (self.pairs, self.draws))

    def _samples(self, of: str) -> tuple[Tensor, Tensor]:
        """Of every pair or draw, numerators and denominators of the mean that is shown."""
        samples, baselines = self.pairs, self.baselines
        if samples is None and self.draws is not None and len(self.draws) > 1:
            samples = self.draws
            baselines = torch.tensor([[self.clean, self.corrupt]], dtype=torch.float64).expand(len(samples), 2)
        if samples is None or baselines is None:
            raise ValueError(
                "an interval needs several pairs (see SweepResult.mean), or several draws of resampled patches; this "
                "is the result of one"
            )
        if of == "effects":
            _ = self.effects
            return samples - _column(baselines, 1, self), baselines[:, 0] - baselines[:, 1]
        if of == "values":
            return samples, torch.ones(len(samples), dtype=torch.float64)
        raise ValueError(f"of={of!r}: expected 'effects' or 'values'")

    def less(
        self, other: SweepResult, of: Literal["effects", "values"] = "effects", *, seed: int = 0, resamples: int = 2000
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What this result has more than another one of the same pairs, with its 95 % bootstrap interval over them.

        Pairs are drawn for both at once, so what they have in common does not blur the difference.

        Returns:
            Difference, lower and upper bound, each as ``values``.

        Raises:
            ValueError: tables of another shape, or of other pairs, or fewer than two of them.
        """
        if self.pairs is None or other.pairs is None:
            raise ValueError("a comparison needs two results of the same pairs, at least two of them")
        here, there = self._samples(of), other._samples(of)
        if self.axes != other.axes or here[0].shape != there[0].shape:
            raise ValueError(
                f"[pairs {len(here[0])}, {_shape(self)}] and [pairs {len(there[0])}, {_shape(other)}]: expected tables "
                "of one shape over the same pairs"
            )
        if self.meta.get("of_pairs") != other.meta.get("of_pairs"):
            raise ValueError("the two results are not of the same pairs of prompts, so their pairs cannot be compared")
        low, high = intervals(
            here[0].numpy(), here[1].numpy(), less=(there[0].numpy(), there[1].numpy()), seed=seed, resamples=resamples
        )
        mine, theirs = (getattr(r, of) for r in (self, other))
        return mine - theirs, torch.from_numpy(low), torch.from_numpy(high)

    def with_tokens(self, processor: Any, inputs: Mapping[str, Any]) -> SweepResult:
        """The same result with the token of each position: shown in figures, and a column of the table.

        Args:
            processor: a tokenizer, or a processor that has one.
            inputs: model inputs of one row; positions are columns of its ``input_ids``.

        Raises:
            ValueError: no axis of positions, or positions outside these inputs (of several pairs whose columns differ
                they are numbered, and are no columns).
        """
        ids = inputs["input_ids"]
        ids = ids[0] if ids.ndim == 2 else ids
        if "pos" not in self.axes:
            raise ValueError(f"[{_shape(self)}] has no positions to name")
        if not all(isinstance(p, int) and 0 <= p < len(ids) for p in self.labels["pos"]):
            raise ValueError(f"positions {self.labels['pos'][-1]} are not columns of a prompt of {len(ids)} tokens")
        words = getattr(processor, "tokenizer", processor).convert_ids_to_tokens([int(i) for i in ids])
        tokens = [str(words[p]).replace("\u0120", " ").replace("\u2581", " ") for p in self.labels["pos"]]
        return dc.replace(self, labels={**self.labels, "token": tokens})

    def to_dataframe(self) -> pd.DataFrame:
        """One row a patch: a column for each axis, ``value`` and ``effect`` (NaN where there is none).

        Several pairs also give ``effect_low`` and ``effect_high``, generated metrics of one pair ``text``; labels that
        name an axis once more (as long as it, such as "token" for "pos") become columns.
        """
        import pandas as pd

        grid = np.indices(tuple(self.values.shape)).reshape(len(self.axes), -1)
        columns: dict[str, Any] = {}
        for axis, index in zip(self.axes, grid, strict=True):
            columns[axis] = [self.labels[axis][i] for i in index]
            for extra in self._extra(axis):
                columns[extra] = [self.labels[extra][i] for i in index]
        if self.exact is not None:
            columns["exact"] = self.exact.flatten().numpy()
        columns["value"] = self.values.flatten().numpy()
        columns["effect"] = self.effects.flatten().numpy() if self.measurable else np.nan
        if self.sampled and self.measurable:
            low, high = self.interval()
            columns |= {"effect_low": low.flatten().numpy(), "effect_high": high.flatten().numpy()}
        if self.texts is not None and len(self.texts) == self.values.numel():
            columns["text"] = self.texts
        return pd.DataFrame(columns)

    def _extra(self, axis: str) -> list[str]:
        """Labels that name the entries of an axis once more: only positions have them."""
        return [k for k in self.labels if axis == "pos" and k not in self.axes and k == "token"]

    def top(self, n: int = 10) -> list[dict[str, Any]]:
        """The ``n`` patches that move the metric most, strongest first: axes, value, effect (None without one).

        Several pairs or draws also give ``effect_low`` and ``effect_high``, generated metrics of one pair ``text``.
        Of a prescreened sweep those that were run come first, and ``exact`` says which are.
        """
        moved = (self.values - self.base).abs().flatten().nan_to_num(-1.0)
        order = moved.argsort(descending=True, stable=True)
        if self.exact is not None:
            # What was only estimated comes after all that was run.
            order = order[self.exact.flatten()[order].logical_not().int().argsort(stable=True)]
        order = order[:n]
        found = []
        for flat in order.tolist():
            where = np.unravel_index(flat, tuple(self.values.shape))
            value = float(self.values.flatten()[flat])
            place = {axis: self.labels[axis][int(i)] for axis, i in zip(self.axes, where, strict=True)}
            found.append(
                place | {"value": value, "effect": (value - self.corrupt) / self.gap if self.measurable else None}
            )
        if self.exact is not None:
            for place, flat in zip(found, order.tolist(), strict=True):
                place["exact"] = bool(self.exact.flatten()[flat])
        if self.texts is not None and len(self.texts) == self.values.numel():
            for place, flat in zip(found, order.tolist(), strict=True):
                place["text"] = self.texts[flat]
        if self.sampled and self.measurable:
            above, below = self._samples("effects")
            low, high = intervals(above.flatten(1)[:, order].numpy(), below.numpy())
            for place, a, b in zip(found, low.tolist(), high.tolist(), strict=True):
                place |= {"effect_low": a, "effect_high": b}
        return found

    def _repr_html_(self) -> str:
        """In a notebook: what was swept, and the patches that move the metric most."""
        import pandas as pd

        rows = pd.DataFrame(self.top(10))
        return f"<p>{html.escape(repr(self))}</p>{rows.to_html(index=False, float_format=lambda x: f'{x:.4g}')}"

    def plot(self, path: str | Path | None = None) -> go.Figure:
        """A heatmap of the effects, written to ``path`` as one page; of the metric's change where there are none.

        Colours diverge around what the unpatched run has: an effect of 0, or of 1 where patches add noise. Layers go
        up, positions (else what is patched in a layer) to the right; grids of strengths are drawn as grids. Other axes
        are chosen in a menu, which starts with the strongest of them at each place.
        """
        from emocircuits.sweep.heatmap import figure

        drawn = figure(self)
        if path is not None:
            write_bytes(path, drawn.to_html(full_html=True, include_plotlyjs=True).encode())
        return drawn

    def save(self, folder: str | Path) -> Path:
        """Write ``sweep.json`` and the tensors beside it as safetensors; an interrupted write leaves the old result."""
        folder = Path(folder)
        tensors = {
            "values": self.values, "pairs": self.pairs, "baselines": self.baselines, "draws": self.draws,
            "exact": self.exact,
        }  # fmt: skip
        data = save({k: v.contiguous() for k, v in tensors.items() if v is not None})
        name = f"values-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        write_bytes(folder / name, data)
        record = dict(
            format=FORMAT, tensors=name, clean=_finite(self.clean), corrupt=_finite(self.corrupt),
            axes=list(self.axes), labels=self.labels, meta=self.meta, versions=versions(),
        )  # fmt: skip
        written = write_json(folder / FILE, record)
        for old in folder.glob("values-*.safetensors"):
            if old.name != name:
                old.unlink()
        return written

    @classmethod
    def load(cls, folder: str | Path) -> SweepResult:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: there is no result, or it is not whole.
        """
        path = Path(folder) / FILE
        record = read_json(path, "the result of a sweep")
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{path}: not the result of a sweep (expected format {FORMAT!r})")
        name = record["tensors"]
        try:
            data = (path.parent / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{path.parent / name}: cannot read the values ({error.strerror or error})") from error
        if hashlib.sha256(data).hexdigest()[:16] != name.removeprefix("values-").removesuffix(".safetensors"):
            raise ValueError(f"{path.parent / name}: damaged, its content is not what its name says")
        tensors = load(data)
        clean, corrupt = (float("nan") if record[k] is None else float(record[k]) for k in ("clean", "corrupt"))
        return cls(
            tensors["values"], clean, corrupt, tuple(record["axes"]), record["labels"], record["meta"],
            tensors.get("pairs"), tensors.get("baselines"), tensors.get("draws"), tensors.get("exact"),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"SweepResult([{_shape(self)}], clean={self.clean:.4g}, corrupt={self.corrupt:.4g})"


def _shape(result: SweepResult) -> str:
    return ", ".join(f"{axis} {n}" for axis, n in zip(result.axes, result.values.shape, strict=True))


def _column(baselines: Tensor, which: int, result: SweepResult) -> Tensor:
    return baselines[:, which].reshape(-1, *[1] * len(result.axes))


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
