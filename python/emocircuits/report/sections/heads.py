"""Stage II.2: critical heads, by patching and by intention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from emocircuits.circuits.heads import FILE, Heads
from emocircuits.plotting import style
from emocircuits.report.figures import heatmap
from emocircuits.report.sections import Section
from emocircuits.report.sections.parts import EMOTIONAL, RANDOM, beside


def section(folder: Path) -> Section | None:
    """From ``heads.json``, its tensors and ``heads.parquet``."""
    if not (folder / FILE).is_file():
        return None
    found = Heads.load(folder)
    s, n = found.settings, len(found.emotions)
    marked = [(c.layer, c.head) for c in found.critical]
    effects: Any = found.effects.tolist()
    intention: Any = found.intention.tolist()
    figures = [
        (
            heatmap(effects, marked, title="effect"),
            f"Share of the gap in {s['reads']} that comes back when one head's z of the emotional side is put into the "
            f"neutral run; average over {n} pairs. Rings: critical heads.",
        ),
        (
            heatmap(intention, marked, title="cosine"),
            f"Emotional intention, cos(W_O z, S) at the last prompt token of X+; average over {n} pairs.",
        ),
        (
            _tested(found),
            f"The first heads of the ranking ({s['ranked_on']} pairs), tested on {s['tested_on']} others: average with "
            "95 % bootstrap interval; ring: 95th percentile of matched random heads of the layer.",
        ),
    ]
    text = (
        f"{len(marked)} of {len(found.candidates)} candidates are critical: above random heads of their layers by "
        f"{s['margin']:g}, interval above 0, q < {s['level']:g} (Wilcoxon, Benjamini-Hochberg). Heads up to layer "
        f"{s['l_emo']} are read there, heads above in the last layer."
    )
    return Section("Stage II.2: heads", beside(figures) + _table(found), text)


def _tested(found: Heads) -> go.Figure:
    names = [f"{c.layer}.{c.head}" for c in found.candidates]
    figure = go.Figure(
        go.Bar(
            x=names, y=[c.effect for c in found.candidates], showlegend=False,
            marker_color=[EMOTIONAL if c.critical else "#d1d5db" for c in found.candidates],
            error_y=dict(
                type="data", symmetric=False, array=[c.high - c.effect for c in found.candidates],
                arrayminus=[c.effect - c.low for c in found.candidates], thickness=1.2,
            ),
            hovertemplate="head %{x}: %{y:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_scatter(
        x=names, y=[c.random for c in found.candidates], mode="markers", showlegend=False,
        marker=dict(symbol="circle-open", size=10, color=RANDOM, line=dict(width=2)),
        hovertemplate="random heads, 95th percentile: %{y:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title="layer.head", type="category")
    figure.update_yaxes(title="share of the gap")
    return style(figure, 320)


def _table(found: Heads) -> str:
    rows = "".join(
        f"<tr><td>{'<b>' if c.critical else ''}{c.layer}.{c.head}{'</b>' if c.critical else ''}</td>"
        f'<td class="n">{c.effect:.3f}</td><td class="n">{c.low:.3f} to {c.high:.3f}</td>'
        f'<td class="n">{c.random:.3f}</td><td class="n">{c.q:.2g}</td></tr>'
        for c in found.candidates
    )
    return (
        '<div class="wrap"><table><tr><th>head</th><th class="n">effect</th><th class="n">95 %</th>'
        f'<th class="n">random</th><th class="n">q</th></tr>{rows}</table></div>'
    )
