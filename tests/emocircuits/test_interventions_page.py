"""docs/interventions.md: its code runs."""

import re
from pathlib import Path

from emocircuits.circuits.tuning import Tuning

PAGE = (Path(__file__).parents[2] / "docs" / "interventions.md").read_text(encoding="utf-8")


def test_the_code_runs(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/interventions.md", "exec"), names)
    assert names["staged"].of("visual", "shallow").restored is None or "Change(n=3" in capsys.readouterr().out
    again = Tuning.load(names["folder"])
    assert len(again.trials) == 2
    assert again.veena(names["circuit"]) == names["veena"]
