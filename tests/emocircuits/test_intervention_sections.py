"""Report sections of stage patching, function verification and tuning: they read files, and say n and what it is."""

import dataclasses as dc
import re

import pytest

from emocircuits.circuit import Circuit
from emocircuits.circuits.bench import Rates
from emocircuits.circuits.controls import Change, Random
from emocircuits.circuits.stages import Cell, Stages
from emocircuits.circuits.tuning import Confirmation, Trial, Tuning
from emocircuits.circuits.verification import NORM, SAME, Check, Verification
from emocircuits.report.sections import stages, tuning, verification
from emocircuits.veena import VEENA

CHANGE = Change(40, 0.125, 0.625, 0.5, 0.375, 0.6125, 4.0, 1e-4, 3e-4)
RANDOM = Random("x", (0.1,) * 9 + (0.2,), 0.11, 0.0316, 0.0, 1 / 11, 1e-3, 2e-3)
QUIET = dc.replace(CHANGE, value=0.125, change=0.0, low=0.0, high=0.0, relative=0.0, p=1.0, q=1.0)


def stages_result():
    cells = tuple(
        Cell(role, stage, layers, (1.0, 0.0), 0.8, CHANGE if role == "visual" else QUIET, RANDOM)
        for role in ("visual", "query", "last")
        for stage, layers in (("shallow", (0, 1)), ("middle", (2,)), ("deep", (3, 4)))
    )
    return Stages((1.0,) * 40, (0.0,) * 40, CHANGE, cells, ("sad",) * 40, {"draws": 10, "random": "moved as far"})


def verification_result():
    randoms = (dc.replace(RANDOM, kind=SAME), dc.replace(RANDOM, kind=NORM, mean=0.2475))
    checks = tuple(
        Check(what, action, factor, side, (1.0, 0.0), CHANGE, randoms)
        for side in ("emotional", "neutral") for what in ("heads", "neurons")
        for action, factor in (("ablate", 0.0), ("enhance", 2.0))
    )  # fmt: skip
    settings = {"members": {"heads": [[1, 2]], "neurons": [[3, 11], [3, 12]]}, "enhance": 2.0, "draws": 10,
                "correction": "Benjamini-Hochberg over all checks"}  # fmt: skip
    return Verification({"emotional": (1.0,), "neutral": (0.0,)}, checks, ("sad",) * 40, settings)


def tuning_result(chosen=1):
    circuit = Circuit("llava", 4, 2, ((1, 2),), ((3, 11),))
    base = Rates(0.125, 1.0, 1.0, 1.25, 1.0, 0.0, 0.95)
    better = dc.replace(base, hit=0.625, perplexity=1.375, ratio=1.1)
    ruined = dc.replace(base, hit=0.9, ratio=77.5, ability=0.0)

    def trial(beta, gamma, rates, value, broken=()):
        names = ("beta", "gamma", "heads", "neurons", "reading", "where", "last", "ena_phase")
        veena = VEENA(circuit, beta, gamma)
        return Trial("pooled", {n: getattr(veena, n) for n in names}, rates, value, broken)

    trials = (trial(9.0, 1.0, ruined, 0.95, ("perplexity <b>77.50</b> times",)), trial(2.0, 1.6, better, 0.8125))
    confirmation = Confirmation(CHANGE, QUIET, RANDOM, base, better, 0.5625, 0.7, (), True)
    said = {"before": "i feel calm.", "after": "i feel sad."}
    examples = ({"id": "a", "emotion": "sad", "event": "a <i>bus</i>", **said},)
    settings = {"objective": "balanced", "pairs": 40, "questions": 24, "rails": {"ratio": 1.5}}
    picked = chosen is not None
    return Tuning(
        trial(1.0, 1.0, base, 0.5625), trials, chosen, confirmation if picked else None, examples if picked else (),
        settings,
    )  # fmt: skip


def page(made):
    assert "plotly-graph-div" in made.html
    assert "<script src" not in made.html
    return made.html + made.text


def test_no_file_no_section(tmp_path):
    assert stages.section(tmp_path) is verification.section(tmp_path) is tuning.section(tmp_path) is None
    for module in (stages, verification, tuning):
        (tmp_path / module.FILE).write_text('{"format": "other"}')
        with pytest.raises(ValueError, match="expected format"):
            module.section(tmp_path)


def test_stages(tmp_path):
    stages_result().save(tmp_path)
    told = page(stages.section(tmp_path))
    for part in ("40 pairs", "10 random controls", "visual tokens, shallow (layers 0 to 1): 0.625 [0.500, 0.738]",
                 "middle (layer 2)", "random 0.110"):  # fmt: skip
        assert part in told
    assert "the last prompt token" not in told  # nothing is restored there


def test_verification(tmp_path):
    verification_result().save(tmp_path)
    told = page(verification.section(tmp_path))
    for part in ("1 heads and 2 neurons", "40 pairs", "0.125 → 0.625", "+0.500 [+0.375, +0.613]", "+400.0%",
                 "0.110 ± 0.032", "0.247", "q = 0.0003", "10 random sets"):  # fmt: skip
        assert part in told, part


def test_tuning(tmp_path):
    tuning_result().save(tmp_path)
    told = page(tuning.section(tmp_path))
    for part in ("2 settings on 40 pairs", "1 break a guard rail", "beta 2 (weight, split, all heads), gamma 1.6",
                 "0.125 → 0.625", "above every one", "i feel calm.", "i feel sad.", "Single examples", "× 77.50",
                 "a &lt;i&gt;bus&lt;/i&gt;", "&lt;b&gt;77.50"):  # fmt: skip
        assert part in told, part
    assert not re.search("<i>bus", told)


def test_a_tuning_that_chose_nothing_says_so(tmp_path):
    tuning_result(None).save(tmp_path)
    told = page(tuning.section(tmp_path))
    assert "VEENA is off" in told
    assert "held-out pairs" not in told
