"""Function verification: hit rates with the circuit ablated and enhanced, beside random members."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from emocircuits.circuits.stored import read_record
from emocircuits.circuits.verification import FILE, FORMAT, NORM, SAME
from emocircuits.plotting import style
from emocircuits.report.sections import Section
from emocircuits.report.sections.parts import EMOTIONAL, NEUTRAL, RANDOM, beside

COLOURS = {"emotional": EMOTIONAL, "neutral": NEUTRAL}
SYMBOLS = {SAME: "circle-open", NORM: "diamond-open"}


def section(folder: Path) -> Section | None:
    """Heads and neurons, ablated and enhanced, both sides; None without a result."""
    if not (folder / FILE).exists():
        return None
    record = read_record(folder / FILE, FORMAT, "function verification")
    n, settings, checks = record["n"], record["settings"], record["checks"]
    figures = [
        (_figure(checks, what), f"{what.capitalize()}: average over {n} pairs; bars are 95 % bootstrap intervals.")
        for what in dict.fromkeys(c["what"] for c in checks)
    ]
    counts = " and ".join(f"{len(members)} {what}" for what, members in settings["members"].items())
    text = (
        f"{counts} of the circuit ablated (factor 0) and enhanced (factor {settings['enhance']:g}); hit rate of the "
        f"generated answers, average over {n} pairs. Grey: {settings['draws']} random sets of the same layers, with "
        f"{SAME} (circles) and with {NORM} (diamonds). q: {settings['correction']}."
    )
    return Section("Function verification", beside(figures) + _table(checks), text)


def _figure(checks: list[dict[str, Any]], what: str) -> go.Figure:
    figure = go.Figure()
    for i, side in enumerate(COLOURS):
        of = [c for c in checks if (c["what"], c["side"]) == (what, side)]
        effects = [c["effect"] for c in of]
        names = ["left alone", *(f"{c['action']} ({c['factor']:g})" for c in of)]
        figure.add_bar(
            x=names, y=[effects[0]["base"], *(e["value"] for e in effects)], name=f"{side} side", offsetgroup=i,
            marker_color=COLOURS[side],
            error_y=dict(
                type="data", symmetric=False, thickness=1.5,
                array=[0, *(e["base"] + e["high"] - e["value"] for e in effects)],
                arrayminus=[0, *(e["value"] - e["base"] - e["low"] for e in effects)],
            ),
            hovertemplate="%{x}: hit rate %{y:.3f}<extra></extra>",
        )  # fmt: skip
        for kind, symbol in SYMBOLS.items():
            drawn = [(name, r["values"]) for name, c in zip(names[1:], of, strict=True)
                     for r in c["random"] if r["kind"] == kind]  # fmt: skip
            figure.add_scatter(
                x=[name for name, values in drawn for _ in values], y=[v for _, values in drawn for v in values],
                mode="markers", offsetgroup=i, showlegend=False, hoverinfo="skip",
                marker=dict(symbol=symbol, size=7, color=RANDOM),
            )  # fmt: skip
    figure.update_layout(barmode="group", scattermode="group")
    figure.update_yaxes(title="hit rate", range=[0, 1.05])
    return style(figure, 320)


def _table(checks: list[dict[str, Any]]) -> str:
    rows = []
    for c in checks:
        e = c["effect"]
        relative = "" if e["relative"] is None else f"<br>{e['relative']:+.1%}"
        random = "<br>".join(f"{r['mean']:.3f} ± {r['std']:.3f}, q = {r['q']:.2g}" for r in c["random"])
        rows.append(
            f"<tr><td>{c['what']}, {c['action']}<br>{c['side']}</td><td>{e['base']:.3f} → {e['value']:.3f}</td>"
            f"<td>{e['change']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}]{relative}<br>q = {e['q']:.2g}</td>"
            f"<td>{random}</td></tr>"
        )
    return (
        '<div class="wrap"><table><tr><th>what, side</th><th>hit rate</th><th>change, 95 % interval, relative</th>'
        f"<th>random: {SAME}; {NORM}</th></tr>{''.join(rows)}</table></div>"
    )
