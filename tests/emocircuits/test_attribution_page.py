"""docs/attribution.md: its code runs, and its numbers are those of the record."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "attribution.md"


def test_the_code_of_the_page_runs(capsys):
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "'confirmed': 64, 'sampled': 32" in printed
    assert "EdgeResult(2500 edges" in printed


def test_the_numbers_are_those_of_the_record():
    text = PAGE.read_text(encoding="utf-8")
    for row in json.loads((ROOT / "bench" / "results" / "attribution-cpu.json").read_text())["rows"]:
        cells = [
            f"{row[m]['rank']:.2f} ({row[m]['found'] * 32:.0f}) {row[m]['seconds']:.2f}" for m in ("atp", "atp*", "ig")
        ]
        expected = f"| {row['target']} | {row['patches']} | {row['exact_seconds']:.2f} | {' | '.join(cells)} |"
        assert expected in text
