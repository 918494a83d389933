"""A record as a table for people, and as a page with a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emocircuits.files import write_bytes, write_json

NO_FIGURE = "-"


def table(record: Mapping[str, Any]) -> str:
    """Plain text, a contender a line; those that did not run say why."""
    model, settings = record["model"], record["settings"]
    best = record["best_stock"]
    heads = ["", "prefill", "a token", "tokens/s", "whole", "memory", "prefill", "a token", "whole [95 %]"]
    if best != "sdpa":
        heads.append(f"whole / {best}")
    rows = [_cells(row, model["batch"], best) for row in record["contenders"] if row["status"] == "timed"]
    geometry = model["geometry"]
    lines = [
        f"{model['name']}: {model['parameters'] / 1e6:,.1f} M parameters, {model['dtype']}, "
        f"{geometry['layers']} layers, {geometry['heads']}/{geometry['kv_heads']} heads of {geometry['head_dim']}",
        f"{record['device']}, {record['threads']} threads, torch {record['versions']['torch']}, transformers "
        f"{record['versions']['transformers']}",
        f"batch {model['batch']}, prompt {model['prompt']} ({model['roles'].get('visual', 0)} visual), "
        f"{settings['tokens']} new tokens, {settings['cache']} cache, decode "
        f"{'compiled' if settings['compiled'] else 'not compiled'}"
        + (", processor time" if settings["clock"] == "cpu" else ""),
        f"VEENA's circuit: {model['circuit']}",
        "",
        *aligned([heads, *rows]),
        "",
        "Ratios (last columns): time / that of the untouched model on SDPA, median over pairs. Memory: beyond weights.",
    ]
    lines += [
        f"{row['title']}: {row['status']}, {row['reason']}" for row in record["contenders"] if row["status"] != "timed"
    ]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], batch: int, best: str) -> list[str]:
    title = row["title"]
    whole, token = row["whole"]["p50_s"], row["decode"]["p50_s"]
    memory = NO_FIGURE if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:,.1f} MiB"
    cells = [title, _time(row["prefill"]["p50_s"]), _time(token), f"{batch / token:,.0f}", _time(whole), memory]
    if row["name"] == "sdpa":
        cells += ["1", "1", "1"]
    else:
        ratios = row["ratios"]["sdpa"]
        cells += [f"{ratios[phase]['median']:.3f}" for phase in ("prefill", "decode")] + [_interval(ratios["whole"])]
    if best != "sdpa":
        to = row["ratios"].get(best)
        cells.append("1" if row["name"] == best else NO_FIGURE if to is None else _interval(to["whole"]))
    return cells


def _interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of equal columns, the first left and the others right aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def figure(record: Mapping[str, Any]) -> Any:
    """Ratios to the untouched model on SDPA with their intervals, one panel a phase (a plotly figure)."""
    from plotly.subplots import make_subplots

    rows = [row for row in reversed(record["contenders"]) if "sdpa" in row.get("ratios", {})]
    titles = {"prefill": "prefill", "decode": "a generated token", "whole": "whole generation"}
    made = make_subplots(rows=1, cols=3, shared_yaxes=True, subplot_titles=list(titles.values()))
    colours = {"stock": "#6b7280", "ours": "#c2410c", "peer": "#0e7490"}
    for column, phase in enumerate(titles, 1):
        ratios = [row["ratios"]["sdpa"][phase] for row in rows]
        made.add_scatter(
            row=1, col=column, x=[r["median"] for r in ratios], y=[row["title"] for row in rows], mode="markers",
            showlegend=False, marker=dict(size=9, color=[colours[row["kind"]] for row in rows]),
            error_x=dict(
                type="data", symmetric=False, array=[r["high"] - r["median"] for r in ratios],
                arrayminus=[r["median"] - r["low"] for r in ratios], thickness=1.5,
            ),
            hovertemplate="%{y}<br>%{x:.3f}<extra></extra>",
        )  # fmt: skip
        made.add_vline(x=1.0, line=dict(color="#9ca3af", width=1, dash="dot"), row=1, col=column)
    made.update_layout(
        template="simple_white", height=140 + 34 * len(rows), margin=dict(l=12, r=12, t=70, b=40),
        title=f"{record['model']['name']}: time / untouched SDPA, {record['device']}", font=dict(size=13),
    )  # fmt: skip
    return made


def save(record: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write ``bench.json``, ``bench.txt`` and ``bench.html`` (a page of its own) into ``folder``."""
    page = figure(record).to_html(full_html=True, include_plotlyjs=True, config={"displayModeBar": False})
    return {
        "json": write_json(folder / "bench.json", record),
        "table": write_bytes(folder / "bench.txt", (table(record) + "\n").encode()),
        "plot": write_bytes(folder / "bench.html", str(page).encode()),
    }
