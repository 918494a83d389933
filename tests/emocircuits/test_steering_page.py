"""docs/steering.md: its code runs, and says what the text says."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "steering.md"


def test_the_code_of_the_page_runs(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert "('vector', 'layer', 'alpha')" in capsys.readouterr().out
    assert names["result"].effects.shape == (6, 3)
    assert names["grid"].pairs.shape == (3, 3, 2)
    assert names["pair"].measurable


def test_the_numbers_are_those_of_the_record():
    text = PAGE.read_text(encoding="utf-8")
    for row in json.loads((ROOT / "bench" / "results" / "veena-grid-cpu.json").read_text())["rows"]:
        assert f"| {row['grid_seconds']:.2f} s | {row['one_by_one_seconds']:.2f} s |" in text
