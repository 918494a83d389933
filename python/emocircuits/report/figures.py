"""Plotly figures in one quiet style, as HTML fragments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from emocircuits.plotting import style

COLOURS = {"baseline": "#6b7280", "veena": "#c2410c", "vee": "#b45309", "ena": "#0e7490", "random": "#9ca3af"}


def fragment(figure: go.Figure) -> str:
    """HTML of one figure; plotly.js is on the page once."""
    config = {"displayModeBar": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=config))


def heatmap(
    values: Sequence[Sequence[float]], marked: Sequence[tuple[int, int]], *, title: str, height: int = 320
) -> go.Figure:
    """Layer by head, diverging around zero; ``marked`` cells carry a ring."""
    z = np.asarray(values)
    limit = float(np.abs(z).max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=z, zmin=-limit, zmax=limit, colorscale="RdBu_r", colorbar=dict(title=title, thickness=12),
            hovertemplate="layer %{y}, head %{x}<br>" + title + " %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_scatter(
        x=[h for _, h in marked], y=[layer for layer, _ in marked], mode="markers", hoverinfo="skip", showlegend=False,
        marker=dict(symbol="circle-open", size=17, color="#111", line=dict(width=2)),
    )  # fmt: skip
    figure.update_xaxes(title="head", dtick=1)
    figure.update_yaxes(title="layer", dtick=1)
    return style(figure, height)


def over_image(image: Sequence[Any], weights: Sequence[Sequence[float]], limit: float, *, size: int = 256) -> go.Figure:
    """An image with attention weights drawn over it, one square a visual token."""
    picture = Image.fromarray(np.asarray(image, np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    w = np.asarray(weights)
    step = size / len(w)
    centres = (np.arange(len(w)) + 0.5) * step
    figure = go.Figure(go.Image(z=np.asarray(picture), hoverinfo="skip"))
    figure.add_heatmap(
        z=w, x=centres, y=centres, zmin=0, zmax=limit, opacity=0.55, colorscale="Inferno", showscale=False,
        hovertemplate="weight %{z:.4f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[0, size], constrain="domain")
    figure.update_yaxes(visible=False, range=[size, 0], scaleanchor="x")
    return style(figure, 280).update_layout(margin=dict(l=0, r=0, t=0, b=0))
