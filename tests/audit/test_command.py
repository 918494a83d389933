"""``python -m emokernels.audit`` on small packages of kernels, each in a process of its own: compiles without a GPU."""

import json

import pytest

from emokernels.audit.__main__ import main

pytest.importorskip("triton")

GOOD = """
    yield "product", fake.product(), {"matrix": "native", "wide": True}
    yield "product again", fake.product(), {"plain": "product", "free": True}
    yield "rows", fake.rows()
"""
BAD = """
    yield "product", fake.product(), {"matrix": True}
    yield "costly", fake.product(lookup=True), {"plain": "product", "free": True}
    yield "spilling", fake.rows(256)
    yield "no product", fake.rows(), {"matrix": True}
    yield "large", fake.product(stages=32)
"""


def test_good_kernels_pass_on_every_architecture(package, audit, tmp_path):
    done = audit("--arch", "all", "--package", package("good", GOOD), "--kernel", "product*", "--json", "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "6 kernels compiled: no spills" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"]
    product, again = (one for one in found["kernels"] if one["arch"] == "sm_90")
    assert [product["name"], again["name"]] == ["product", "product again"]
    assert product["matrix"] == {"HGMMA": 4}
    assert product["wide_loads"] == product["loads"] > 0
    assert 0 < product["registers"] <= 255
    assert product["shared"] > 16384
    assert product["spills"] == product["stack"] == 0
    assert product["loop"]["arithmetic"] == 64, "32 elements a thread: one exp2 and one sum"
    assert again["extra"] == dict.fromkeys(("arithmetic", "logic", "memory", "other"), 0)


def test_what_is_wrong_fails_and_is_named(package, audit):
    done = audit("--arch", "sm_80", "--package", package("bad", BAD), "--json", "-", "--jobs", "1")
    assert done.returncode == 1, done.stderr
    problems = {one["name"]: " ".join(one["problems"]) for one in json.loads(done.stdout)["kernels"]}
    assert problems["product"] == ""
    assert "main loop: 32 more arithmetic instructions than without routes, for 32 elements" in problems["costly"]
    assert "spills" in problems["spilling"]
    assert "matrix instructions: none" in problems["no product"]
    assert "shared memory" in problems["large"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--arch"),
        (["--arch", "sm_70"], "expected sm_80, sm_90, sm_100 or all, got 'sm_70'"),
        (["--arch", "all", "--jobs", "0"], "--jobs"),
        (["--arch", "all", "--json", "/nowhere/at/all.json"], "--json: the folder"),
        (["--arch", "all", "--package", "not.there"], "not"),
    ],
)
def test_an_impossible_request_is_one_line_and_exit_code_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert says in error
    assert error.count("\n") == 1


def test_a_pattern_that_matches_nothing(package, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--arch", "sm_90", "--package", package("nothing", GOOD), "--kernel", "softmax"])
    assert caught.value.code == 2
    assert "nothing matches 'softmax'; kernels: product_kernel, sum_kernel" in capsys.readouterr().err


def test_without_triton(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        main(["--arch", "sm_90"])
    assert caught.value.code == 2
    assert "triton is not installed" in capsys.readouterr().err


def test_a_module_that_cannot_be_imported_or_listed_is_named(package, tmp_path, capsys):
    name = package("listless", "    yield 'one', fake.no_such_launch()\n")
    assert main(["--arch", "sm_90", "--package", name]) == 1
    assert "listless.kernels.audit_launches('sm_90') failed: AttributeError" in capsys.readouterr().out
    (tmp_path / name / "other.py").write_text("import no_such_module\n")
    assert main(["--arch", "sm_90", "--package", name]) == 1
    assert "listless.other cannot be imported: ModuleNotFoundError" in capsys.readouterr().err
