"""``emocircuits sweep`` on steering vectors and on strengths of VEENA."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from test_sweep_command import faces_pair, folder, run  # noqa: F401  a fixture

from emocircuits import embedded
from emocircuits.describe import veena_of
from emocircuits.sweep import Sweep, SweepResult, logit_diff


@pytest.fixture(scope="module")
def sweep():
    model, clean, corrupt, a, b = faces_pair()
    return Sweep(model, clean, corrupt, logit_diff(a, b), progress=False)


@pytest.fixture
def vectors(tmp_path, sweep):
    g = sweep.handle.geometry
    made = torch.randn(2, g.layers, g.d_model, generator=torch.Generator().manual_seed(0))
    save_file({"vectors": made, "pooled": made.mean(0)}, tmp_path / "steering.safetensors")
    (tmp_path / "steering.json").write_text(json.dumps({"emotions": ["joy", "fear"]}))
    return tmp_path / "steering.safetensors", {"joy": made[0], "fear": made[1], "pooled": made.mean(0)}


def same(record, found):
    assert record["axes"] == list(found.axes)
    assert record["labels"] == found.labels
    assert torch.allclose(torch.tensor(record["values"], dtype=torch.float64), found.values, atol=1e-4)


def test_steering(capsys, folder, sweep, vectors, tmp_path):  # noqa: F811
    path, named = vectors
    options = ("--target", "steering", "--vectors", path, "--alphas", "0.5,-2", "--layers", "1,4", "--json")
    more = ("--rows", "last", "--added", "relative", "--out", tmp_path / "out")
    code, printed, err = run(capsys, "--pairs", folder / "one.jsonl", *options, *more)
    assert code == 0, err
    found = sweep.steering(dict(sorted(named.items())), [1, 4], (0.5, -2.0), "last", "relative")
    record = json.loads(printed)
    order = [found.labels["vector"].index(name) for name in record["labels"]["vector"]]
    found.values[:] = found.values[order]
    found.labels["vector"] = record["labels"]["vector"]
    same(record, found)
    assert set(record["labels"]["vector"]) == {"joy", "fear", "pooled"}
    assert SweepResult.load(tmp_path / "out").axes == ("vector", "layer", "alpha")


def test_veena(capsys, folder, sweep, tmp_path):  # noqa: F811
    options = ("--target", "veena", "--betas", "1,3", "--gammas", "1,2.5", "--json")
    for more, axes in (((), {}), (("--readings", "weight,logit-add"), {"reading": ["weight", "logit-add"]})):
        given = ("--circuit", embedded.PATH / "circuit.json") if more else ()
        code, printed, err = run(capsys, "--pairs", folder / "one.jsonl", *options, *more, *given)
        assert code == 0, err
        plan = veena_of("embedded", None).strengths(sweep.handle.model)
        same(json.loads(printed), sweep.grid(plan, {**axes, "beta": [1.0, 3.0], "gamma": [1.0, 2.5]}))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--target", "heads", "--alphas", "1"), "--alphas is for --target steering, not heads"),
        (("--target", "steering", "--betas", "1"), "--betas is for --target veena, not steering"),
        (("--target", "steering"), "needs --vectors FILE"),
        (("--target", "steering", "--vectors", "no.safetensors"), "cannot read steering vectors"),
        (("--target", "veena", "--betas", "1,x"), "expected numbers"),
        (("--target", "veena", "--gammas", "1,1"), "each number once"),
        (("--target", "veena", "--readings", "weights"), "expected some of weight"),
        (("--target", "veena", "--layers", "1"), "leave it out"),
        (("--target", "veena", "--positions", "last"), "leave it out"),
        (("--target", "veena", "--patch-with", "zero"), "leave it out"),
        (("--target", "veena", "--circuit", "no.json"), "no.json"),
        (("--target", "veena", "--model", "some/model"), "give --circuit FILE"),
    ],
)
def test_refusals(capsys, folder, options, told):  # noqa: F811
    code, printed, err = run(capsys, "--pairs", folder / "one.jsonl", *options)
    assert code == 2
    assert told in err
    assert not printed
