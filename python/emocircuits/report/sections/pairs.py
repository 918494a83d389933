"""What a circuit was found on: the pairs, and which of them Stage I kept."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from emocircuits.files import read_json
from emocircuits.report.sections import Section

FILE = "pairs.json"


def section(folder: Path) -> Section | None:
    """From ``pairs.json``."""
    if not (folder / FILE).is_file():
        return None
    record: Any = read_json(folder / FILE, "statistics of pairs")
    emotions = list(record["emotions"])
    head = "".join(f'<th class="n">{escape(e)}</th>' for e in emotions)
    rows = []
    for name, split in record["splits"].items():
        counts = "".join(f'<td class="n">{split["emotions"].get(e, 0)}</td>' for e in emotions)
        rows.append(
            f'<tr><td>{escape(name)}</td><td class="n">{split["records"]}</td><td class="n">{split["events"]}</td>'
            f"{counts}</tr>"
        )
    licences = ", ".join(f"{escape(name or 'none')} ({n})" for name, n in record["licences"].items())
    html = (
        f'<div class="wrap"><table><tr><th>split</th><th class="n">pairs</th><th class="n">events</th>{head}</tr>'
        f'{"".join(rows)}</table></div><p class="soft">Licences: {licences}.</p>'
    )
    text = (
        f"{record['records']} pairs of a picture with an emotion and the same picture without, each told with one "
        "neutral event. The splits share no picture and no event (checked)."
    )
    return Section("Pairs", html, text)
