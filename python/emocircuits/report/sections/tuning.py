"""VEENA's strengths: every setting that was tried, the chosen one on held-out pairs, sentences before and after."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from emocircuits.circuits.stored import read_record
from emocircuits.circuits.tuning import FILE, FORMAT
from emocircuits.plotting import style
from emocircuits.report.sections import Section
from emocircuits.report.sections.parts import EMOTIONAL, NEUTRAL, OTHER, RANDOM, beside

SHOWN = 12
"""Rows of the table of trials; all of them stand in the file."""


def section(folder: Path) -> Section | None:
    """Trials, confirmation and examples; None without a result."""
    if not (folder / FILE).exists():
        return None
    record = read_record(folder / FILE, FORMAT, "a tuning of VEENA")
    settings, trials, chosen, confirmed = (record[k] for k in ("settings", "trials", "chosen", "confirmation"))
    broken = sum(bool(t["broken"]) for t in trials)
    text = (
        f"{len(trials)} settings on {settings['pairs']} pairs of the analyze split, objective "
        f"“{escape(settings['objective'])}” ({record['base']['value']:.3f} without VEENA); {broken} break a guard rail "
        f"(perplexity above {settings['rails']['ratio']:g} times that of the unmodified model's answers, unfinished "
        f"answers, or {settings['questions']} questions that are not about feelings) and cannot be chosen. "
    )
    if chosen is None:
        text += "None within the rails is better than the model left alone: VEENA is off."
    else:
        hit, random = confirmed["hit"], confirmed["random"]
        text += (
            f"Chosen: {_told(trials[chosen])}. On {hit['n']} held-out pairs (average): hit rate {hit['base']:.3f} → "
            f"{hit['value']:.3f}, {hit['change']:+.3f} [{hit['low']:+.3f}, {hit['high']:+.3f}], q = {hit['q']:.2g}; "
            f"{len(random['values'])} random draws with the same setting {random['mean']:.3f} ± {random['std']:.3f} "
            f"({'above every one' if confirmed['above_every_draw'] else 'not above every one'})."
        )
    parts = [_figures(record), _trials(record)]
    if confirmed is not None:
        parts += [_confirmation(confirmed), _examples(record["examples"])]
    return Section("VEENA: choice of its strengths", "".join(parts), text)


def _told(trial: dict[str, Any]) -> str:
    s = trial["setting"]
    told = f"{escape(trial['circuit'])} circuit, beta {s['beta']:g} ({s['reading']}, {s['where']}"
    told += f"{', last row too' if s['last'] else ''}, {'all' if s['heads'] is None else s['heads']} heads)"
    if s["gamma"] != 1:
        neurons = "all" if s["neurons"] is None else s["neurons"]
        phase = "both phases" if s["ena_phase"] == "both" else s["ena_phase"]
        told += f", gamma {s['gamma']:g} ({neurons} neurons, {phase})"
    return told


def _figures(record: dict[str, Any]) -> str:
    figure, trials = go.Figure(), record["trials"]
    n = record["settings"]["pairs"]
    within = [t for t in trials if not t["broken"]]
    broken = [t for t in trials if t["broken"]]
    best: list[dict[str, Any]] = [] if record["chosen"] is None else [trials[record["chosen"]]]
    for name, of, colour, symbol in (
        ("within the rails", within, OTHER, "circle"), ("breaks a rail", broken, RANDOM, "x"),
        ("left alone", [record["base"]], NEUTRAL, "square"), ("chosen", best, EMOTIONAL, "star"),
    ):  # fmt: skip
        figure.add_scatter(
            x=[t["rates"]["ratio"] for t in of], y=[t["value"] for t in of], mode="markers", name=name,
            marker=dict(color=colour, symbol=symbol, size=13 if symbol == "star" else 8),
            text=[_told(t) + "".join(f"<br>{escape(b)}" for b in t["broken"]) for t in of],
            hovertemplate="%{text}<br>value %{y:.3f}, perplexity × %{x:.2f}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="perplexity, × unmodified", type="log")
    figure.update_yaxes(title="objective")
    return beside([(style(figure, 360), f"Every setting: average over {n} pairs.")])


def _trials(record: dict[str, Any]) -> str:
    ordered: list[dict[str, Any]] = sorted(record["trials"], key=lambda t: -t["value"])
    best = None if record["chosen"] is None else record["trials"][record["chosen"]]
    rows = [_row("left alone", record["base"], "")]
    for t in ordered[:SHOWN]:
        name = _told(t)
        rows.append(_row(f"<b>{name}</b>" if t is best else name, t, "; ".join(map(escape, t["broken"]))))
    return (
        f"<details><summary>The {min(SHOWN, len(ordered))} settings with the highest value, of {len(ordered)}</summary>"
        '<div class="wrap"><table><tr><th>setting</th><th>value</th><th>hit</th><th>kept</th><th>calm</th>'
        f"<th>perplexity</th><th>ability</th><th>breaks</th></tr>{''.join(rows)}</table></div></details>"
    )


def _row(name: str, trial: dict[str, Any], broken: str) -> str:
    r = trial["rates"]
    cells = [trial["value"], r["hit"], r["kept"], r["calm"]]
    return (
        f"<tr><td>{name}</td>{''.join(f'<td>{v:.3f}</td>' for v in cells)}"
        f"<td>{r['perplexity']:.2f} (× {r['ratio']:.2f})</td><td>{_share(r['ability'])}</td><td>{broken}</td></tr>"
    )


def _share(value: float | None) -> str:
    return "not asked" if value is None else f"{value:.3f}"


def _confirmation(c: dict[str, Any]) -> str:
    before, after = c["before"], c["after"]
    rows = [("objective", c["value_before"], c["value_after"])]
    rows += [
        (told, before[name], after[name])
        for name, told in (
            ("hit", "emotional side: emotion named"), ("kept", "the same, where it was named before"),
            ("calm", "neutral side: no emotion named"), ("perplexity", "perplexity of the answers"),
            ("unfinished", "answers that do not end"), ("ability", "other questions answered"),
        )
    ]  # fmt: skip
    body = "".join(f"<tr><td>{told}</td><td>{_share(a)}</td><td>{_share(b)}</td></tr>" for told, a, b in rows)
    broken = f"<p>On held-out pairs it breaks: {'; '.join(map(escape, c['broken']))}.</p>" if c["broken"] else ""
    return (
        f"<h3>The chosen setting on {c['hit']['n']} held-out pairs</h3>"
        f'<div class="wrap"><table><tr><th></th><th>before</th><th>after</th></tr>{body}</table></div>{broken}'
    )


def _examples(examples: list[dict[str, str]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(e['emotion'])}<br>{escape(e['event'])}</td><td>{escape(e['before'])}</td>"
        f"<td>{escape(e['after'])}</td></tr>"
        for e in examples
    )
    return (
        f"<h3>Before and after</h3><p>Single examples: the first {len(examples)} held-out pairs, emotional side.</p>"
        f'<div class="wrap"><table><tr><th>shown, told</th><th>before</th><th>after</th></tr>{rows}</table></div>'
    )
