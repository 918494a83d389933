"""``emocircuits sweep`` on routes and sets of heads."""

from __future__ import annotations

import json

import pytest
import torch
from test_sweep_command import faces_pair, folder, run  # noqa: F401  a fixture

from emocircuits.sweep import Sweep, SweepResult, interaction, logit_diff


@pytest.fixture(scope="module")
def sweep():
    model, clean, corrupt, a, b = faces_pair()
    return Sweep(model, clean, corrupt, logit_diff(a, b), progress=False)


def test_routes(capsys, folder, sweep, tmp_path):  # noqa: F811
    command = ("--pairs", folder / "one.jsonl", "--target", "routes", "--layers", "5", "--json")
    more = ("--routes", "last:visual,query<-visual", "--edit", "boost", "--by", "2.0", "--out", tmp_path)
    code, printed, err = run(capsys, *command, *more)
    assert code == 0, err
    record = json.loads(printed)
    found = sweep.routes("boost", by=2.0, routes=[("last", "visual"), ("query", "visual")], layers=[5])
    assert record["labels"]["route"] == ["last<-visual", "query<-visual"]
    assert torch.allclose(torch.tensor(record["values"], dtype=torch.float64), found.values, atol=1e-4)
    assert torch.equal(SweepResult.load(tmp_path).values, torch.tensor(record["values"], dtype=torch.float64))


def test_combinations(capsys, folder, sweep):  # noqa: F811
    command = ("--pairs", folder / "one.jsonl", "--target", "combinations", "--json")
    code, printed, err = run(capsys, *command, "--heads", "3.1,4.7,5.2", "--size", "3")
    assert code == 0, err
    record = json.loads(printed)
    assert record["labels"]["combination"] == ["3.1", "4.7", "5.2", "3.1+4.7+5.2"]
    found = sweep.combinations([(3, 1), (4, 7), (5, 2)], size=(1, 3))
    assert torch.allclose(torch.tensor(record["values"], dtype=torch.float64), found.values, atol=1e-4)
    assert torch.allclose(
        torch.tensor(record["interaction"], dtype=torch.float64), interaction(found, found), atol=1e-4
    )
    code, printed, err = run(capsys, *command, "--top", "2", "--layers", "4,5")
    assert code == 0, err
    names = json.loads(printed)["labels"]["combination"]
    best = {f"{place['layer']}.{place['head']}" for place in sweep.heads(layers=[4, 5]).top(2)}
    assert set(names[2].split("+")) == set(names[:2]) == best


def test_several_pairs_share_their_heads(capsys, folder, tmp_path):  # noqa: F811
    command = ("--pairs", folder / "pairs.jsonl", "--target", "combinations", "--layers", "5", "--out", tmp_path)
    code, printed, err = run(capsys, *command, "--top", "3", "--json")
    assert code == 0, err
    record = json.loads(printed)
    assert len(record["labels"]["combination"]) == len(record["interaction"]) == 6
    assert len(record["pairs"]) == len(SweepResult.load(tmp_path).pairs) == 2
    code, again, err = run(capsys, *command, "--top", "3", "--json")
    assert code == 0, err
    assert json.loads(again)["values"] == record["values"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--target", "heads", "--edit", "boost"), "--edit is for --target routes, not heads"),
        (("--target", "routes", "--top", "3"), "--top is for --target combinations, not routes"),
        (("--target", "routes", "--positions", "last"), "leave it out"),
        (("--target", "routes", "--direction", "noise"), "use --run"),
        (("--target", "routes", "--edit", "boost"), "needs its strength"),
        (("--target", "routes", "--routes", "visual"), "such as query:visual"),
        (("--target", "routes", "--routes", "query:picture"), "expected (destination, source)"),
        (("--target", "combinations", "--heads", "3,4"), "such as 3.1,4.7"),
        (("--target", "combinations", "--heads", "3.1,4.7", "--top", "2"), "leave --top and --layers out"),
        (("--target", "combinations", "--heads", "3.1", "--size", "2"), "expected 1 to 1"),
        (("--target", "combinations", "--size", "0"), "--size 0: expected at least 1"),
    ],
)
def test_refusals(capsys, folder, options, told):  # noqa: F811
    code, printed, err = run(capsys, "--pairs", folder / "one.jsonl", *options)
    assert (code, printed) == (2, "")
    assert told in err
    assert err.splitlines()[-1].startswith("emocircuits: ")


def test_prescreened(capsys, folder, sweep):  # noqa: F811
    command = ("--pairs", folder / "one.jsonl", "--positions", "visual", "--prescreen", "atp*", "--confirm", "5")
    code, printed, err = run(capsys, *command, "--sample", "7", "--json")
    assert code == 0, err
    record = json.loads(printed)
    found = sweep.heads(positions="visual", prescreen="atp*", confirm=5, sample=7)
    assert record["exact"] == found.exact.tolist()
    assert torch.allclose(torch.tensor(record["values"], dtype=torch.float64), found.values, atol=1e-4)
    assert record["prescreen"]["confirmed"] == 5
    assert all(place["exact"] for place in record["top"])
    code, printed, err = run(capsys, *command)
    assert code == 0, err
    assert "the 5 strongest run exactly; of 32 others" in printed
    for more, match in (
        (("--confirm", "3"), "expected --prescreen"),
        (("--prescreen", "atp", "--sample", "-1"), "at least 0"),
        (("--prescreen", "atp", "--target", "routes"), "--prescreen is for"),
    ):
        code, printed, err = run(capsys, "--pairs", folder / "one.jsonl", *more)
        assert code == 2
        assert match in err
