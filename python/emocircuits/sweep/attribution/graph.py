"""What edge attribution found: a score for every edge of the model's graph, and circuits cut out of it."""

from __future__ import annotations

import dataclasses as dc
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from emocircuits.environment import versions
from emocircuits.files import read_json, write_bytes, write_json

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FORMAT = "emocircuits.edges/1"
FILE, TENSORS = "edges.json", "edges.safetensors"
Edge = dict[str, Any]


@dc.dataclass(frozen=True, eq=False)
class EdgeResult:
    """Scores of edges: how much the metric changes, to first order, when one edge carries the other prompt's values.

    Attributes:
        scores: ``[sources, destinations]`` float64 in units of the metric; NaN where there is no edge. For several
            pairs their mean.
        sources: "input", heads "a3.h1", MLPs "m3".
        destinations: what reads the residual stream: "a3.h1<q>", "a3.h1<k>", "a3.h1<v>", "m3", "logits"; where heads
            share keys and values these are "a3.kv0<k>", "a3.kv0<v>".
        clean, corrupt: the metric of the two prompts.
        shared: heads that share one key-value head.
        meta: method, direction, steps: JSON-ready.
        pairs: of several pairs, the scores of each, ``[pairs, sources, destinations]``; else None.
    """

    scores: Tensor
    sources: list[str]
    destinations: list[str]
    clean: float
    corrupt: float
    shared: int = 1
    meta: dict[str, Any] = dc.field(default_factory=dict)
    pairs: Tensor | None = None

    @property
    def edges(self) -> int:
        """How many edges there are."""
        return int((~self.scores.isnan()).sum())

    def top(self, n: int = 10) -> list[Edge]:
        """The ``n`` edges with the largest scores by magnitude, largest first: source, destination, score."""
        flat = self.scores.flatten().abs().nan_to_num(-1.0).argsort(descending=True, stable=True)
        return [self._edge(int(i)) for i in flat[: min(n, self.edges)]]

    def circuit(self, n: int, how: Literal["top", "greedy"] = "greedy") -> list[Edge]:
        """Edges of a circuit: of ``n`` chosen ones those that are on a way from the input to the logits.

        Args:
            n: edges to choose.
            how: "top": the largest by magnitude (Syed et al. 2023). "greedy": from the logits on, the largest one into
                what is in the circuit already (Hanna et al. 2024).

        Raises:
            ValueError: another way to choose, or fewer than one edge.
        """
        if n < 1:
            raise ValueError(f"n={n}: expected at least 1 edge")
        if how == "top":
            chosen = self.top(n)
        elif how == "greedy":
            chosen = self._greedy(n)
        else:
            raise ValueError(f"how={how!r}: expected 'top' or 'greedy'")
        below = _closure({"input"}, ((e["source"], d) for e in chosen for d in self._nodes(e["destination"])))
        above = _closure({"logits"}, ((d, e["source"]) for e in chosen for d in self._nodes(e["destination"])))
        between = below & above
        return [e for e in chosen if e["source"] in between and between.intersection(self._nodes(e["destination"]))]

    def _greedy(self, n: int) -> list[Edge]:
        order = self.top(self.edges)
        inside = {"logits"}
        chosen: list[Edge] = []
        while len(chosen) < n:
            at = next((i for i, e in enumerate(order) if inside.intersection(self._nodes(e["destination"]))), None)
            if at is None:
                break
            chosen.append(order.pop(at))
            inside.add(chosen[-1]["source"])
        return chosen

    def _nodes(self, destination: str) -> tuple[str, ...]:
        """The nodes that a destination is an input of: the heads that share it, an MLP, the logits."""
        found = re.fullmatch(r"a(\d+)\.(h|kv)(\d+)<.>", destination)
        if not found:
            return (destination,)
        layer, kind, i = found[1], found[2], int(found[3])
        heads = range(i * self.shared, (i + 1) * self.shared) if kind == "kv" else (i,)
        return tuple(f"a{layer}.h{h}" for h in heads)

    def _edge(self, flat: int) -> Edge:
        i, j = divmod(flat, len(self.destinations))
        return {
            "source": self.sources[i], "destination": self.destinations[j], "score": float(self.scores[i, j]),
        }  # fmt: skip

    def to_dataframe(self) -> pd.DataFrame:
        """One row an edge: source, destination, score."""
        import pandas as pd

        there = (~self.scores.flatten().isnan()).nonzero().flatten().tolist()
        return pd.DataFrame([self._edge(i) for i in there])

    def plot(self, path: str | Path | None = None) -> go.Figure:
        """A heatmap, sources up and destinations to the right, written to ``path`` as one page."""
        import plotly.graph_objects as go

        from emocircuits.plotting import style

        limit = float(self.scores.abs().nan_to_num(0.0).max()) or 1.0
        hover = "%{y} -> %{x}<br>score %{z:.4f}<extra></extra>"
        drawn = go.Figure(
            go.Heatmap(
                z=self.scores.numpy(), x=self.destinations, y=self.sources, zmin=-limit, zmax=limit,
                colorscale="RdBu_r", colorbar=dict(title="score", thickness=12), hovertemplate=hover,
            )
        )  # fmt: skip
        style(drawn, 160 + 12 * len(self.sources))
        if path is not None:
            write_bytes(Path(path), drawn.to_html(full_html=True, include_plotlyjs=True).encode())
        return drawn

    def save(self, folder: str | Path) -> Path:
        """Write ``edges.json`` and the scores beside it as safetensors."""
        folder = Path(folder)
        tensors = {"scores": self.scores} | ({} if self.pairs is None else {"pairs": self.pairs})
        write_bytes(folder / TENSORS, save({k: v.contiguous() for k, v in tensors.items()}))
        record = dict(
            format=FORMAT, sources=self.sources, destinations=self.destinations, clean=self.clean, corrupt=self.corrupt,
            shared=self.shared, meta=self.meta, versions=versions(),
        )  # fmt: skip
        return write_json(folder / FILE, record)

    @classmethod
    def load(cls, folder: str | Path) -> EdgeResult:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: there is no result, or it is not whole.
        """
        path = Path(folder) / FILE
        record = read_json(path, "the result of edge attribution")
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"{path}: not the result of edge attribution (expected format {FORMAT!r})")
        try:
            tensors = load_file(path.parent / TENSORS)
        except Exception as error:
            raise ValueError(f"{path.parent / TENSORS}: cannot read the scores ({error})") from error
        given = {k: record[k] for k in ("sources", "destinations", "clean", "corrupt", "shared", "meta")}
        if tensors["scores"].shape != (len(given["sources"]), len(given["destinations"])):
            raise ValueError(f"{path.parent / TENSORS}: not the scores of {FILE}, which names other edges")
        return cls(tensors["scores"], **given, pairs=tensors.get("pairs"))

    @classmethod
    def mean(cls, results: Sequence[EdgeResult]) -> EdgeResult:
        """The mean over pairs; the single ones stay in `pairs`."""
        first = results[0]
        pairs = torch.stack([r.scores for r in results])
        clean, corrupt = (math.fsum(getattr(r, k) for r in results) / len(results) for k in ("clean", "corrupt"))
        meta = {**first.meta, "pairs": len(results)}
        return dc.replace(first, scores=pairs.mean(0), clean=clean, corrupt=corrupt, meta=meta, pairs=pairs)

    def __repr__(self) -> str:
        return f"EdgeResult({self.edges} edges, clean={self.clean:.4g}, corrupt={self.corrupt:.4g})"


def _closure(start: set[str], steps: Iterable[tuple[str, str]]) -> set[str]:
    """What can be reached from ``start``."""
    found, pairs = set(start), list(steps)
    while True:
        new = {b for a, b in pairs if a in found} - found
        if not new:
            return found
        found |= new
