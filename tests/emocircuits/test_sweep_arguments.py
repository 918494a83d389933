"""Wrong arguments of a sweep are said, never understood as something else."""

from __future__ import annotations

import pytest
import torch
from test_sweep_engine import A, B, pair

from emocircuits.sweep import Sweep, logit_diff


@pytest.fixture(scope="module")
def sweep():
    model, clean, corrupt = pair("llama")
    return Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(positions=3), "positions=3: expected a list of whole numbers"),
        (dict(positions=[1.5]), "expected a list of whole numbers"),
        (dict(positions=[True, False]), "expected a list of whole numbers"),
        (dict(positions=torch.tensor([True, False])), "expected a list of whole numbers"),
        (dict(layers=2), "layers=2: expected a list of whole numbers"),
        (dict(position="each"), "unexpected keyword argument 'position'"),
        (dict(prescreen="atp", confim=3), "unexpected keyword argument 'confim'"),
    ],
)
def test_wrong_arguments(sweep, options, told):
    with pytest.raises(TypeError, match=told.replace("(", "[(]")):
        sweep.heads(**options)
    with pytest.raises(TypeError, match="expected a number of groups"):
        sweep.neurons(groups=2.5)


def test_numbers_of_any_kind(sweep):
    expected = sweep.residual(positions=[1, 2]).values
    assert torch.equal(sweep.residual(positions=torch.tensor([1, 2])).values, expected)
    assert torch.equal(sweep.residual(positions=range(1, 3)).values, expected)


def test_a_sweep_says_what_it_is(sweep):
    assert repr(sweep).startswith(f"Sweep({sweep.columns} columns, clean=")
    model, clean, corrupt = pair("llama")
    assert repr(Sweep(model, [clean] * 2, [corrupt] * 2, logit_diff(A, B), progress=False)).startswith(
        "Sweep(2 pairs, "
    )
