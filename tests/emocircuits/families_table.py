"""Write the table of families and edits in docs/families.md: every cell comes from running those edits on a tiny model.

python tests/emocircuits/families_table.py    # writes the page; test_families_table.py fails when it differs
"""

from __future__ import annotations

import pathlib

import families_harness as harness
import families_vision_models  # noqa: F401  registers its builders
import torch

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- begin: written by tests/emocircuits/families_table.py -->", "<!-- end -->"


def table() -> str:
    """The table in Markdown, one row a family."""
    rows = {name: harness.outcomes(name) for name in harness.BUILDERS}
    kinds = list(next(iter(rows.values())))
    lines = [["family", "`model_type`", *kinds], ["---"] * (2 + len(kinds))]
    for name, row in rows.items():
        kind = harness.BUILDERS[name](torch.float32)[0].config.model_type
        lines.append([name, f"`{kind}`", *(row[edit] for edit in kinds)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    """The page with the table as it is now."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page())
