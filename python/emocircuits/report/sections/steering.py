"""Stage I: which pairs were kept, and how long the vectors are in each layer."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from emocircuits.circuits.steering import FILE, FORMAT, SteeringVectors
from emocircuits.circuits.stored import read_record
from emocircuits.plotting import style
from emocircuits.report.sections import Section
from emocircuits.report.sections.parts import beside

SHOWN = 3


def section(folder: Path) -> Section | None:
    """From ``steering.json`` and ``steering.safetensors``."""
    if not (folder / FILE).is_file():
        return None
    record = read_record(folder / FILE, FORMAT, "steering vectors")
    found = SteeringVectors.load(folder)
    n = sum(found.kept)
    average = f"average over the {n} kept pairs"
    told = [
        (_kept(found), f"Kept: the answer to the emotional side names its emotion (hit rate above {found.tau:g})."),
        (_norms(found), f"Length of the vectors: mean difference of resid_post at the last prompt token, {average}."),
        (_cosines(found), f"Cosine between the vectors of two emotions in the last layer, {average}."),
    ]
    left = [s for s in record["samples"] if not s["kept"]]
    rows = "".join(
        f"<tr><td>{escape(s['id'])}</td><td>{escape(s['emotion'])}</td><td>{escape(s['said'])}</td></tr>"
        for s in left[:SHOWN]
    )
    table = ""
    if rows:
        table = (
            f'<p class="soft">Left out: {len(left)}; the first of them (single examples):</p><div class="wrap"><table>'
            f"<tr><th>pair</th><th>emotion</th><th>said of the emotional side</th></tr>{rows}</table></div>"
        )
    text = (
        f"One vector an emotion and layer, not normalised; {n} of {sum(found.total)} pairs were kept. Which, and why "
        f"not the others, stands in {FILE}."
    )
    return Section("Stage I: steering vectors", beside(told) + table, text)


def _kept(found: SteeringVectors) -> go.Figure:
    figure = go.Figure(go.Bar(x=list(found.emotions), y=list(found.kept), name="kept", marker_color="#c2410c"))
    left = [t - k for k, t in zip(found.kept, found.total, strict=True)]
    figure.add_bar(x=list(found.emotions), y=left, name="left out", marker_color="#d1d5db")
    figure.update_layout(barmode="stack")
    figure.update_yaxes(title="pairs")
    return style(figure, 260)


def _norms(found: SteeringVectors) -> go.Figure:
    figure = go.Figure()
    for emotion, vectors in zip(found.emotions, found.vectors, strict=True):
        figure.add_scatter(
            x=list(range(len(vectors))), y=vectors.norm(dim=-1).tolist(), name=emotion, mode="lines+markers",
            hovertemplate="layer %{x}: %{y:.3g}<extra>" + emotion + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title="layer", dtick=1 if found.vectors.shape[1] <= 12 else 4)
    figure.update_yaxes(title="|S|", rangemode="tozero")
    return style(figure, 300).update_layout(legend=dict(y=1.35))


def _cosines(found: SteeringVectors) -> go.Figure:
    last = found.vectors[:, -1]
    unit = last / last.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    z: Any = (unit @ unit.T).tolist()
    figure = go.Figure(
        go.Heatmap(
            z=z, x=list(found.emotions), y=list(found.emotions), zmin=-1, zmax=1, colorscale="RdBu_r",
            colorbar=dict(thickness=10), hovertemplate="%{x}, %{y}: %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True)
    return style(figure, 300)
