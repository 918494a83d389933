"""Stage II.1: what adding a steering vector does, layer by layer."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from emocircuits.circuits.injection import FILE, FORMAT
from emocircuits.circuits.stored import read_record
from emocircuits.plotting import style
from emocircuits.report.sections import Section
from emocircuits.report.sections.parts import EMOTIONAL, NEUTRAL, RANDOM, beside

WORDS = 6


def section(folder: Path) -> Section | None:
    """From ``layers.json``."""
    if not (folder / FILE).is_file():
        return None
    record = read_record(folder / FILE, FORMAT, "effects of steering by layer")
    n, draws = record["n"], record["settings"]["draws"]
    figures = [
        (
            _strength(record, a),
            f"alpha = {alpha:g}: hit rate with the vector added in one layer, average over {n} pairs, shading the 95 % "
            f"bootstrap interval. Rings: {draws} random directions of equal norm. Lines: X+ and X- left alone.",
        )
        for a, alpha in enumerate(record["alphas"])
    ]
    figures.append(
        (_restoration(record), f"Restoration ratio (H~ - H-) / (H+ - H-), average over {n} pairs.")
        if record["restoration"] is not None
        else (_restoration(record), f"Change of the hit rate, average over {n} pairs.")
    )
    s = record["settings"]
    where = "no layer has an effect" if record["l_emo"] is None else f"l_emo = {record['l_emo']}"
    text = f"{where} ({s['l_emo']}). Vectors {s['vectors']}, reading {s['reading']}, rows {s['rows']}. " + (
        f"Note: {record['note']}." if record["note"] else ""
    )
    return Section("Stage II.1: layers", beside(figures) + _tokens(record) + _examples(record), text)


def _strength(record: dict[str, Any], a: int) -> go.Figure:
    layers, minus = record["layers"], record["hit_rate_minus"]
    hits, low, high = (np.array(record[k])[:, a] for k in ("hit_rate", "effect_low", "effect_high"))
    figure = go.Figure()
    for draw in np.array(record["random_hit_rate"])[:, :, a]:
        figure.add_scatter(
            x=layers, y=draw, mode="markers", showlegend=False, marker=dict(symbol="circle-open", color=RANDOM, size=8),
            hovertemplate="layer %{x}: %{y:.3f}<extra>random direction</extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[*layers, *layers[::-1]], y=[*(minus + high), *(minus + low)[::-1]], fill="toself", fillcolor=EMOTIONAL,
        opacity=0.15, line=dict(width=0), mode="lines", hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    figure.add_scatter(
        x=layers, y=hits, mode="lines+markers", name="S", line=dict(color=EMOTIONAL, width=2.4), showlegend=False,
        hovertemplate="layer %{x}: %{y:.3f}<extra>steering vector</extra>",
    )  # fmt: skip
    for value, name in ((record["hit_rate_plus"], "X+"), (minus, "X-")):
        figure.add_hline(y=value, line=dict(color=NEUTRAL, dash="dash", width=1), annotation_text=f"{name} {value:.3f}")
    figure.update_xaxes(title="layer", dtick=1 if len(layers) <= 12 else 4)
    figure.update_yaxes(title="hit rate", range=[-0.05, 1.05])
    return style(figure, 280)


def _restoration(record: dict[str, Any]) -> go.Figure:
    z = np.array(record["effect"] if record["restoration"] is None else record["restoration"])
    figure = go.Figure(
        go.Heatmap(
            z=z.T, x=record["layers"], y=[f"{a:g}" for a in record["alphas"]], zmin=-1, zmax=1, colorscale="RdBu_r",
            colorbar=dict(thickness=10), hovertemplate="layer %{x}, alpha %{y}: %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="layer", dtick=1 if len(record["layers"]) <= 12 else 4)
    figure.update_yaxes(title="alpha", type="category")
    return style(figure, 240)


def _tokens(record: dict[str, Any]) -> str:
    if record["l_emo"] is None:
        return ""
    at = record["layers"].index(record["l_emo"])
    rows = "".join(
        f"<tr><td>{escape(e)}</td><td>{escape(', '.join(layers[at][:WORDS]))}</td></tr>"
        for e, layers in record["tokens"].items()
    )
    return (
        f'<p class="soft">Tokens that the vector of layer {record["l_emo"]} makes likelier on the direct path:</p>'
        f'<div class="wrap"><table><tr><th>vector</th><th>tokens</th></tr>{rows}</table></div>'
    )


def _examples(record: dict[str, Any]) -> str:
    at = 0 if record["l_emo"] is None else record["layers"].index(record["l_emo"])
    alpha = record["alphas"][-1]
    rows = "".join(
        f"<tr><td>{escape(e['emotion'])}</td><td>{escape(e['minus'])}</td><td>{escape(e['steered'][at][-1])}</td></tr>"
        for e in record["examples"]
    )
    return (
        f'<p class="soft">Single examples, layer {record["layers"][at]}, alpha {alpha:g}:</p><div class="wrap"><table>'
        f"<tr><th>vector</th><th>neutral side, left alone</th><th>steered</th></tr>{rows}</table></div>"
    )
