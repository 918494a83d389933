"""Which heads serve one emotion, and which serve them all."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from emocircuits.circuits.decoupling import FILE, STAGES, Decoupling, as_matrix
from emocircuits.plotting import style
from emocircuits.report.sections import Section
from emocircuits.report.sections.parts import beside


def section(folder: Path) -> Section | None:
    """From ``decoupling.json``."""
    if not (folder / FILE).is_file():
        return None
    found = Decoupling.load(folder)
    figures = []
    for stage in ("all", *STAGES):
        pairs = [o for o in found.overlaps if o.stage == stage and o.jaccard is not None]
        if not pairs:
            continue
        chance = sum(o.expected for o in pairs) / len(pairs)
        shared = sum(o.shared for o in pairs) / len(pairs)
        figures.append(
            (
                _matrix(found, stage),
                f"Jaccard overlap, {stage if stage != 'all' else 'all layers'}. Two emotions share {shared:.1f} heads, "
                f"sets drawn at random {chance:.1f} (average over {len(pairs)} pairs of emotions).",
            )
        )
    general = ", ".join(f"{layer}.{head}" for layer, head in found.general) or "none"
    rows = "".join(
        f"<tr><td>{layer}.{head}</td><td>{escape(', '.join(emotions))}</td></tr>"
        for (layer, head), emotions in found.specific.items()
    )
    html = (
        beside(figures) + f"<p>Emotion-general heads: {general}.</p>"
        f'<div class="wrap"><table><tr><th>specific head</th><th>emotions</th></tr>{rows}</table></div>'
    )
    text = (
        f"The first {found.k} heads of each emotion by patch effect (average over its pairs); a head among them for at "
        f"least {found.settings['general_from']} of {found.settings['emotions']} emotions is emotion-general."
    )
    return Section("Decoupling", html, text)


def _matrix(found: Decoupling, stage: str) -> go.Figure:
    names: Any = list(found.sets)
    figure = go.Figure(
        go.Heatmap(
            z=as_matrix(found, stage), x=names, y=names, zmin=0, zmax=1, colorscale="Oranges",
            colorbar=dict(thickness=10), hovertemplate="%{x}, %{y}: %{z:.2f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True)
    return style(figure, 300)
