"""VEENA's strengths as a grid, against patch() one at a time."""

from __future__ import annotations

import functools

import pytest
import torch
from test_sweep_engine import A, B, agree
from test_sweep_generated import score
from test_sweep_grids import one_by_one, prompts, texts

from emocircuits.circuit import Circuit
from emocircuits.sweep import generated, logit_diff
from emocircuits.veena import VEENA, veena_grid

BETAS, GAMMAS = (1.0, 1.4, 3.0), (1.0, 2.0)


def circuit(layers=3):
    heads, neurons = ((1, 2), (0, 3), (2, 0)), ((1, 3), (2, 40), (2, 5))
    return Circuit("llava", layers, l_emo=1, heads=heads, neurons=neurons)


def plan(model, beta, gamma, **more):
    return VEENA(circuit(), beta, gamma, **more).plan(model)


@pytest.mark.parametrize("where", ["split", "decode"])
def test_strengths(where):
    model, given = prompts("llava-padded")
    axes = {"beta": BETAS, "gamma": GAMMAS}
    options = dict(where=where, ena_phase="decode" if where == "decode" else "both")
    found = veena_grid(
        model, given, VEENA(circuit(), **options), BETAS, GAMMAS, generated(score, limit=5), progress=False
    )
    assert found.axes == ("beta", "gamma")
    assert found.texts == texts(model, given, functools.partial(plan, model, **options), axes, limit=5)
    assert len({tuple(t) for t in found.texts}) > len(given)


def test_readings(tmp_path):
    model, given = prompts("llava")
    readings = ("weight", "logit-add", "logit-scale", "logit-abs")
    axes = {"reading": readings, "beta": BETAS, "gamma": GAMMAS}
    found = veena_grid(model, given, circuit(), BETAS, GAMMAS, logit_diff(A, B), readings=readings, progress=False)
    agree(found.pairs, one_by_one(model, given, functools.partial(plan, model), axes), 1e-10)
    found.plot(tmp_path / "page.html")
    one = veena_grid(model, given, circuit(), BETAS, GAMMAS, logit_diff(A, B), readings="logit-add", progress=False)
    torch.testing.assert_close(one.pairs, found.pairs[:, 1], rtol=0, atol=1e-10)


def test_another_model_is_refused():
    model, given = prompts("llava")
    with pytest.raises(ValueError, match="find the circuit of this model first"):
        veena_grid(model, given, circuit(4), BETAS, GAMMAS, logit_diff(A, B))
