"""Write the table of families and edits in docs/families.md: every cell comes from running those edits on a tiny model.

python tests/emocircuits/families_table.py    # writes the page; test_families_table.py fails when it differs
"""

from __future__ import annotations

import pathlib

import families_harness as harness
import families_vision_models  # noqa: F401  registers its builders
import torch

from emocircuits.families import open_model

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- begin: written by tests/emocircuits/families_table.py -->", "<!-- end -->"


def table() -> str:
    """The table in Markdown, one row a family."""
    models = {name: build(torch.float32)[0] for name, build in harness.BUILDERS.items()}
    kinds = list(harness.edits(open_model(next(iter(models.values())))))
    lines = [["family", "`model_type`", *kinds], ["---"] * (2 + len(kinds))]
    for name, model in models.items():
        lines.append([name, f"`{model.config.model_type}`", *(harness.outcome(name, edit) for edit in kinds)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    """The page with the table as it is now."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page())
