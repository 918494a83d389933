"""docs/presets.md: its code runs, and its table is the one in the package."""

import re
from pathlib import Path

import models
import torch

from emocircuits import AddHead, AddVector, BoostRoute, GateHeads, GateRoute, Plan, ScaleHead, ScaleNeurons, presets
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
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= len(blocks) - 4
    assert all(line.startswith("[") for line in printed)
    assert len(set(printed)) > 1, "no preset changed the answer: the page would not show anything"


def test_what_the_page_says_they_equal():
    model = models.build("llava")
    heads, text, emits = [(0, 1), (2, 3)], ["query", "last", "generated"], ["last", "generated"]
    late = [(2, h) for h in range(4)]
    roles = ["pad", "system", "visual", "query", "last", "generated"]
    some = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    unit = some[:, :8] / some[:, :8].norm(dim=1, keepdim=True)
    same = {
        "pai": (presets.pai(model, 0.2), [BoostRoute(late, "visual", by=0.2, reading="logit-abs", to=emits)]),
        "vaf": (
            presets.vaf(model, 1.15, 0.95, heads=heads),
            [
                BoostRoute(heads, "visual", by=1.15, reading="logit-scale", to=text),
                BoostRoute(heads, "system", by=0.95, reading="logit-scale", to=text),
            ],
        ),
        "adhh": (
            presets.adhh(model, heads, text=0.2, image=1.5),
            [BoostRoute(heads, text, by=0.2, to=emits), BoostRoute(heads, "visual", by=1.5, to=emits)],
        ),
        "adhh adaptive": (
            presets.adhh(model, heads, threshold=0.4),
            [GateRoute(heads, text, by=0.0, threshold=0.4, to=emits)],
        ),
        "knockout": (
            presets.knockout(model, "query", "visual", heads=heads),
            [BoostRoute(heads, "visual", by=0.0, reading="logit-add", to="query")],
        ),
        "temperature": (
            presets.temperature(model, 0.8, heads=heads),
            [BoostRoute(heads, roles, by=1 / 0.8, reading="logit-scale")],
        ),
        "iti": (presets.iti(model, heads, unit, 0.5, 3.0), [AddHead(heads, 0.5 * unit, by=3.0, to=emits)]),
        "vseam": (presets.vseam(model, {(0, 1): -0.5, (2, 3): -0.5}), [ScaleHead(heads, by=0.5)]),
        "spin": (
            presets.spin(model, 0.8, 0.05),
            [GateHeads([0, 1, 2], keep=3, by=0.05, source="visual", measure="logits", to=emits)],
        ),
        "hones": (presets.hones(model, {(1, 7): 1.6, (1, 2): 1.6}), [ScaleNeurons({1: [7, 2]}, by=1.6)]),
        "caa": (presets.caa(model, 2, some[0], 0.5), [AddVector([2], some[0], "resid_post", by=0.5, to=emits)]),
        "actadd": (
            presets.actadd(model, 2, some, 2.0),
            [AddVector([2], some[i], "resid_pre", by=2.0, positions=[i]) for i in range(2)],
        ),
        "vista": (
            presets.vista(model, some, 0.17, layers=[0, 2]),
            [AddVector([0, 2], some, "mlp_out", by=0.17, norm="keep", relative=True)],
        ),
    }
    plans = {name.split()[0] for name in same}
    assert plans == {entry.name for entry in PRESETS.values() if entry.kind == "plan"}
    for name, (plan, edits) in same.items():
        if name == "iti":  # directions are normalised in float64, then kept in float32
            assert torch.allclose(torch.tensor(plan.edits[0].vector.tolist()), 0.5 * unit, rtol=1e-6, atol=0)
            continue
        assert plan == Plan(edits), name


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + table() + page[page.index(END) :], encoding="utf-8")
