"""`emocircuits bench`: who runs, that they agree before they are timed, what is written, and what is refused."""

import contextlib
import dataclasses as dc
import json
import sys
from pathlib import Path

import pytest
import torch
from overhead_subjects import tiny

from emocircuits import Plan, ScaleNeurons
from emocircuits.cli import main
from emocircuits.families import open_model
from emocircuits.overhead import SHAPES, Disagreement, Settings, bounds, choose, make, measure, memory, report, run
from emocircuits.overhead.contenders import Contender, Unavailable, contenders
from emocircuits.overhead.ratios import ratio
from emocircuits.overhead.shapes import build
from emocircuits.patching import patch

EAGER_ONLY = ["eager", "empty", "veena", "veena_fold", "hooks", "veena_logit", "bias"]
EAGER_ONLY += ["everything", "hooks_everything"]
SHORT = Settings(4)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def subject():
    return make(config=tiny("llava-1.5-7b"), device="cpu", batch=2)


def once(subject, competing, settings=SHORT, **options):
    return measure(subject, competing, settings, seconds=0, fewest=1, progress=False, **options)


# -- models ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llava-1.5-7b", 7.063),
        ("llava-onevision-7b", 8.030),
        ("qwen2.5-vl-7b", 8.292),
        ("qwen3-vl-8b", 8.767),
        ("llava-0.1b", 0.102),
        ("llava-0.3b", 0.292),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, billions):
    model = build(SHAPES[name], "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llava-onevision-7b", "qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_every_shape_runs_and_its_contenders_agree(name):
    subject = make(config=tiny(name), device="cpu")
    record = once(subject, choose(["eager", "veena", "hooks", "veena_logit", "bias"], "cpu"))
    assert [row["status"] for row in record["contenders"]] == ["timed"] * 6
    assert {(a["contender"], a["reference"]) for a in record["agreement"]} == {
        ("eager", "sdpa"),
        ("hooks", "veena"),
        ("bias", "veena_logit"),
    }
    assert record["model"]["roles"]["visual"] > 1


def test_a_copy_shares_weights_and_nothing_else(subject):
    copied = subject.copy()
    assert all(a is b for a, b in zip(copied.parameters(), subject.model.parameters(), strict=True))
    with patch(copied, subject.plans["veena"]):
        assert subject.model.config.text_config._attn_implementation == "sdpa"


# -- agreement ---------------------------------------------------------------------------------------------------------
def test_all_agree_and_have_figures(subject):
    record = once(subject, choose(EAGER_ONLY, "cpu"))
    rows = {row["name"]: row for row in record["contenders"]}
    assert [(name, row["reason"]) for name, row in rows.items() if row["status"] != "timed"] == []
    assert len(record["agreement"]) == 6
    for found in record["agreement"]:
        assert found["error"] <= found["allowed"] < found["effect"] or found["effect"] == 0
    for name, row in rows.items():
        assert 0 < row["decode"]["p20_s"] <= row["decode"]["p50_s"] <= row["decode"]["p80_s"]
        assert row["memory_bytes"] is None or row["memory_bytes"] >= 0
        if name != "sdpa":
            assert row["ratios"]["sdpa"]["whole"]["pairs"] == 1
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert "ours, VEENA" in report.table(record)


def test_compiled_graphs_do_not_mix_contenders(subject):
    """They share code and weights: the graph of one must not serve another (hooks are easily overlooked)."""
    settings = Settings(5, "static", True, compiler="aot_eager")
    rows = once(subject, choose(["eager", "hooks", "veena", "bias", "veena_logit"], "cpu"), settings)["contenders"]
    assert all(row["status"] == "timed" and row["compiled"] for row in rows)


def broken(change):
    """A contender that says it is VEENA and is not quite."""

    def install(model, subject):
        return patch(model, change(subject.plans["veena"]))

    return Contender("broken", "broken VEENA", "peer", "veena", install)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: Plan(plan.edits[1:]),  # nothing in prefill
        lambda plan: Plan([plan.edits[0], dc.replace(plan.edits[1], heads=plan.edits[1].heads[1:]), plan.edits[2]]),
        lambda plan: Plan([dc.replace(edit, by=edit.by * 1.01) for edit in plan.edits]),
    ],
)
def test_who_computes_something_else_stops_everything(subject, monkeypatch, change):
    monkeypatch.setattr(run, "_time", lambda *_: pytest.fail("something was timed"))
    competing = [*choose(["eager", "veena"], "cpu"), broken(change)]
    with pytest.raises(Disagreement, match=r"broken VEENA and veena should give the same logits.*nothing was timed"):
        once(subject, competing)


def test_an_effect_that_rounding_hides_is_no_check(subject):
    faint = dc.replace(subject, plans={**subject.plans, "veena": Plan([ScaleNeurons(((0, (1,)),), 1.0000001)])})
    with pytest.raises(Disagreement, match="does not stand out from rounding"):
        once(faint, choose(["eager", "veena"], "cpu"))


def test_who_cannot_run_says_why(subject):
    @contextlib.contextmanager
    def absent(model, subject):
        raise Unavailable("the library is at home")
        yield

    def breaks(model, subject):
        raise RuntimeError("no kernel\nmore")

    more = [
        Contender("absent", "somebody", "peer", "veena", absent),
        Contender("breaks", "somebody else", "peer", "veena", breaks),
    ]
    record = once(subject, [*choose(["veena", "flex"], "cpu"), *more], quick=True)
    rows = {row["name"]: (row["status"], row["reason"]) for row in record["contenders"]}
    assert rows["absent"] == ("skipped", "the library is at home")
    assert rows["breaks"] == ("failed", "RuntimeError: no kernel")
    assert rows["flex"][0] == "skipped"
    shown = report.table(record)
    assert "somebody: skipped, the library is at home" in shown
    assert "FlexAttention: skipped, compiles" in shown


# -- measuring ---------------------------------------------------------------------------------------------------------
def test_pairs_alternate_and_ratios_are_taken_within_them(subject, monkeypatch):
    order = []
    seconds = {"sdpa": 1.0, "veena": 1.5}

    def fake(model, inputs, settings):
        order.append(model)
        return run.Times(*(seconds[model] * (1 + len(order) // 2) for _ in range(3)))

    monkeypatch.setattr(run, "timed", fake)
    base, one = (run._Entry(c, SHORT, model=c.name) for c in choose(["veena"], "cpu"))
    run._time([(one, base)], subject, 0, 4, False, "")
    assert order == ["veena", "sdpa", "sdpa", "veena", "veena", "sdpa", "sdpa", "veena"]
    mine, theirs = one.pairs["sdpa"]
    assert (len(mine), len(theirs), len(one.times), len(base.times)) == (4, 4, 4, 4)


def test_the_ratio_is_the_median_over_pairs():
    found = ratio([1.1, 2.2, 30.0], [1.0, 2.0, 10.0])
    assert found.median == pytest.approx(1.1)
    assert found.low == pytest.approx(1.1)
    assert found.high == pytest.approx(3.0)
    assert found.pairs == 3


def test_memory_is_the_peak_of_a_call():
    cpu = torch.device("cpu")

    def call():
        torch.ones(64 * 2**18)  # 64 MiB, gone at the end

    before, peak = memory.used(cpu), memory.peak(call, cpu)
    if before is None or peak is None:
        pytest.skip("this system does not tell the peak of the resident set")
    assert 60 * 2**20 < peak - before < 100 * 2**20
    assert memory.peak(lambda: None, cpu) - before < 30 * 2**20


def test_bounds():
    def row(name, median):
        ratios = {"sdpa": {"decode": {"median": median, "low": median, "high": median, "pairs": 9}}}
        return {"name": name, "status": "timed", "ratios": ratios}

    record = {"model": {"device": "cpu"}, "best_stock": "sdpa", "contenders": [row("veena", 1.04), row("empty", 1.03)]}
    judged = bounds.judge(record)
    assert [(one["contender"], one["kept"]) for one in judged] == [("veena", True), ("empty", False)]
    assert bounds.lines(judged)[1].startswith("EXCEEDED empty / sdpa, decode: 1.030")
    with pytest.raises(ValueError, match="needs the contender 'empty'"):
        bounds.judge({**record, "contenders": record["contenders"][:1]})


# -- the command -------------------------------------------------------------------------------------------------------
QUICK = ["bench", "--device", "cpu", "--quick", "--seconds", "0.1", "--new-tokens", "4"]


def test_the_command_writes_table_json_and_plot(capsys, tmp_path):
    assert main([*QUICK, "--only", "empty", "veena", "hooks", "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "ours, VEENA" in out
    assert "bench.json" in err
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (record["schema"], record["version"]) == ("emocircuits/overhead", 1)
    assert record["command"].startswith("emocircuits bench --device cpu --quick")
    assert {"model", "settings", "memory_method", "best_stock", "contenders", "device", "versions"} <= set(record)
    assert (record["model"]["name"], record["model"]["circuit"]) == ("embedded", "the embedded model's own circuit")
    assert (tmp_path / "out" / "bench.txt").read_text().strip() in out
    assert "plotly" in (tmp_path / "out" / "bench.html").read_text()


def test_json_and_check(capsys, monkeypatch):
    kept = {"cpu": (bounds.Bound("veena", "sdpa", "decode", 1e9),)}
    monkeypatch.setattr(bounds, "BOUNDS", kept)
    assert main([*QUICK, "--only", "veena", "--json", "--check"]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)["bounds"][0]["kept"] is True
    monkeypatch.setattr(bounds, "BOUNDS", {"cpu": (bounds.Bound("veena", "sdpa", "decode", 0.0),)})
    assert main([*QUICK, "--only", "veena", "--check"]) == 1
    assert "EXCEEDED veena" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "llava-9b", "--random-weights"], "expected one of llava-1.5-7b"),
        (["--config", "llava-0.1b"], "add --random-weights"),
        (["--random-weights"], "needs --config"),
        (["--config", "llava-0.1b", "--random-weights", "--model", "x"], "give one of them"),
        (["--only", "everyone"], "--only everyone: expected some of sdpa"),
        (["--prompt", "20"], "expected at least 79"),
        (["--new-tokens", "1"], "expected at least 4"),
        (["--batch", "0"], "--batch 0"),
        (["--device", "abacus"], "--device abacus"),
        (["--compile", "--cache", "dynamic"], "needs --cache static"),
        (["--model", "./nowhere"], "config.json"),
        (["--out", __file__], "is a file"),
    ],
)
def test_what_is_refused(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    _, err = capsys.readouterr()
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_gpu_gets_the_kernels_of_libraries():
    names = [one.name for one in contenders("cuda")]
    assert names[:5] == ["sdpa", "eager", "cudnn", "flash2", "flash3"]
    assert set(names) - {"cudnn", "flash2", "flash3"} == {one.name for one in contenders("cpu")}


def test_the_synthetic_circuit_is_said_and_has_the_papers_size():
    subject = make(config=SHAPES["llava-0.1b"], device="cpu")
    handle = open_model(subject.model)
    assert "synthetic" in subject.note
    assert "10 heads in 6 layers and 30 neurons" in subject.note
    edits = subject.plans["veena"].edits
    assert sum(len(edit.heads) for edit in edits[:2]) == 10
    assert {layer for layer, _ in edits[0].heads} < set(range(handle.geometry.layers // 2))
    neurons = subject.plans["everything"].edits[1].neurons
    assert len(neurons) == handle.geometry.layers
    assert {len(index) for _, index in neurons} == {21}


def test_what_make_gpu_runs(tmp_path, capsys):
    """Here on a CPU, with a small shape: the same command, and the record where it belongs."""
    sys.path.insert(0, str(ROOT))
    from bench import gpu

    less = ["--no-compile", "--cache", "dynamic", "--dtype", "float32", "--only", "veena", "--seconds", "0.1"]
    less += ["--new-tokens", "4", "--quick"]
    assert gpu.run_overhead(tmp_path, "cpu", ["llava-0.1b"], less) == 0
    record = json.loads((tmp_path / "overhead-llava-0-1b-cpu.json").read_text())
    assert record["model"]["name"] == "llava-0.1b, random weights"
    assert "VEENA" in capsys.readouterr().out
    assert gpu.run_overhead(tmp_path, "cpu", ["llava-9b"]) == 1


def test_preparing_ends_in_time(subject):
    rows = once(subject, choose(["eager", "veena"], "cpu"), prepare_seconds=0)["contenders"]
    assert [row["status"] for row in rows] == ["timed", "skipped", "skipped"]
    assert rows[2]["reason"] == "the 0 s for preparing contenders were used up"
