"""docs/steering.md: its code runs, and says what the text says."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "steering.md"


def test_the_code_of_the_page_runs(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert "('vector', 'layer', 'alpha')" in capsys.readouterr().out
    assert names["result"].effects.shape == (6, 3)
    assert names["grid"].pairs.shape == (3, 3, 2)
    assert names["pair"].measurable
