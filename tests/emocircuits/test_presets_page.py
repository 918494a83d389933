"""docs/presets.md: its code runs, and its table is the one in the package."""

import re
from pathlib import Path

from emocircuits.presets import PRESETS

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"
BEGIN, END = "<!-- table: generated from PRESETS -->\n", "<!-- end of table -->"


def table():
    """The table of the page."""
    lines = ["| preset | computes | source | needs |", "|---|---|---|---|"]
    for entry in sorted(PRESETS.values(), key=lambda entry: (entry.kind != "plan", entry.name)):
        formula = entry.formula.replace("|", "\\|")
        lines.append(f"| `{entry.name}` | {formula} | {entry.paper} | {entry.needs} |")
    return "\n".join(lines) + "\n"


def test_the_table_is_that_of_the_package():
    """Print what the page should hold with ``python tests/emocircuits/test_presets_page.py``."""
    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table()


def test_every_preset_has_a_paragraph():
    text = PAGE.read_text(encoding="utf-8")
    for name in PRESETS:
        assert f"presets.{name}(" in text, f"docs/presets.md has no example of {name}"


def test_the_code_of_the_page_runs(capsys):
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= len(blocks) - 4
    assert all(line.startswith("['") for line in printed)
    assert len(set(printed)) > 1, "no preset changed the answer: the page would not show anything"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + table() + page[page.index(END) :], encoding="utf-8")
