"""The benchmark run as a whole on a CPU: its file, what happens when it dies, its command line, and the page."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench.gpu
from bench.kernels_gpu import __main__ as command_line
from bench.kernels_gpu import goals, record, report, run
from bench.kernels_gpu.machine import slug
from bench.kernels_gpu.shapes import SETS, SHARES

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of all groups on tiny shapes, and the folder of its file."""
    folder = tmp_path_factory.mktemp("results")
    said = []
    state = record.fresh("cpu", commit="abc")
    state = run.run_groups(state, run.plan(None, 3600), "tiny", "cpu", folder, "the command", say=said.append)
    return state, folder, said


def test_the_smoke_run_measures_every_group(smoke):
    state, _, said = smoke
    assert record.problems(state) == []
    assert list(state["groups"]) == list(SHARES)
    for group, part in state["groups"].items():
        assert part["complete"]
        assert "running" not in part
        assert part["ceilings"]["matmul_tflops"] > 0
        assert [case["name"] for case in part["cases"]] == [case.name for case in SETS["tiny"]()[group]]
        for case in part["cases"]:
            assert any(one["status"] == "timed" and one["ours"] for one in case["contenders"]), case["name"]
            assert all(one["status"] != "failed" for one in case["contenders"]), case["contenders"]
            assert case["ratios"]
    assert record.failures(state) == []
    assert len(said) == sum(len(cases) for cases in SETS["tiny"]().values())


def test_the_file_holds_what_was_measured(smoke):
    state, folder, _ = smoke
    path = folder / "cpu-smoke.json"
    assert json.loads(path.read_text()) == state
    assert state["smoke"]
    assert state["commit"] == "abc"
    assert state["versions"]["torch"]
    assert [one.name for one in folder.iterdir()] == ["cpu-smoke.json"], "no temporary file is left"
    assert record.read_all(folder) == [], "a smoke run is not published"


def test_complete_groups_are_kept_and_the_others_measured(smoke, tmp_path):
    state = copy.deepcopy(smoke[0])
    del state["groups"]["lens"]
    kept = copy.deepcopy(state["groups"]["flow"])
    run.run_groups(state, run.plan(["flow", "lens"], 3600), "tiny", "cpu", tmp_path, "again", say=lambda text: None)
    assert state["groups"]["flow"] == kept
    assert state["groups"]["lens"]["command"] == "again"


def test_a_process_that_died_is_resumed_after_the_case_it_was_at(smoke, tmp_path):
    state = copy.deepcopy(smoke[0])
    part = state["groups"]["activation"]
    first, second = (case.name for case in SETS["tiny"]()["activation"])
    part.update(complete=False, cases=[], running={"case": first, "contender": "fused"})
    run.run_groups(state, run.plan(["activation"], 3600), "tiny", "cpu", tmp_path, "again", say=lambda text: None)
    assert [case["name"] for case in part["cases"]] == [first, second]
    assert part["cases"][0]["crashed"] == "the process ended while fused ran"
    assert part["cases"][1]["ratios"]
    assert record.problems(state) == []
    assert record.failures(state) == [f"activation: {first}: the process ended while fused ran"]


def test_a_group_whose_time_is_up_says_so(smoke, tmp_path):
    state = record.fresh("cpu")
    run.run_groups(state, {"flow": 0.0}, "tiny", "cpu", tmp_path, "short", say=lambda text: None)
    cases = state["groups"]["flow"]["cases"]
    assert [case["skipped"] for case in cases] == ["the 0 s of its group were used up"] * 2


def test_parts_of_one_identity_are_merged_and_others_replaced(smoke):
    state, folder, _ = smoke
    same = record.fresh("cpu")
    assert record.load_or_start(same, folder)["groups"] == state["groups"]
    other = {**record.fresh("cpu"), "sources": "another"}
    assert record.load_or_start(other, folder) is other
    unknown = {**record.fresh("cpu"), "commit": "unknown"}
    assert record.load_or_start(unknown, folder)["commit"] == "abc"


def test_a_broken_file_is_replaced(tmp_path):
    state = record.fresh("cpu")
    record.path_of(state, tmp_path).write_text("{")
    assert record.load_or_start(state, tmp_path) is state


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    state = record.fresh("cpu")
    path = record.save(state, tmp_path)
    old = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        record.save({**state, "x": float("nan")}, tmp_path)
    assert path.read_text() == old
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_wrong_with_a_record_is_said(smoke):
    state = copy.deepcopy(smoke[0])
    case = state["groups"]["prefill"]["cases"][0]
    timed = next(one for one in case["contenders"] if one["status"] == "timed")
    timed["p50_us"] = timed["p80_us"] + 1
    next(one for one in case["contenders"] if one["status"] == "skipped")["reason"] = ""
    case["ratios"][0]["of"] = "nobody"
    del state["groups"]["lens"]["ceilings"]
    assert len(record.problems(state)) == 4
    assert record.problems({"schema": "x"})[0] == "no smoke"


def test_device_names_make_file_names():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_parent_starts_again_where_a_child_died(monkeypatch):
    codes, seen = iter([-11, 0]), []

    def child(command, **options):
        seen.append(command[3:])
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(run.subprocess, "run", child)
    assert run.supervise(["--child"], 60, say=lambda text: None) == 0
    assert seen == [["--child"], ["--child", "--resume"]]


def test_an_unexpected_error_of_a_child_is_no_result(tmp_path, monkeypatch, capsys):
    """A broken device raises anywhere; the parent must know that this was not the end."""

    def broken(*args, **options):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(run, "run_groups", broken)
    arguments = ["--device", "cpu", "--results", str(tmp_path), "--groups", "flow", "--child"]
    assert command_line.main(arguments) == run.DIED
    assert "illegal memory access" in capsys.readouterr().err


def test_the_parent_stops_when_time_is_up(monkeypatch):
    def child(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(run.subprocess, "run", child)
    ticks = iter([0.0, 1.0, 100.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(ticks))
    said = []
    assert run.supervise(["--child"], 60, say=said.append) == 1
    assert said == ["stopped after 60 s; --resume goes on from here"]


def test_without_a_gpu_the_command_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(command_line.torch.cuda, "is_available", lambda: False)
    assert command_line.main([]) == 0
    assert capsys.readouterr().out == "no GPU is visible to torch: nothing was timed\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cpu"], "give another folder"),
        (["--device", "cpu", "--results", "x", "--groups", "no"], "prefill"),
    ],
)
def test_bad_arguments_end_with_code_2_and_one_line(arguments, says, capsys):
    assert command_line.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_command_as_a_user_runs_it(tmp_path):
    command = [sys.executable, "-m", "bench.kernels_gpu", "--device", "cpu", "--groups", "flow"]
    done = subprocess.run([*command, "--results", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "flow: tiny, 40 keys, mass" in done.stdout
    found = json.loads((tmp_path / "cpu-smoke.json").read_text())
    assert found["groups"]["flow"]["command"].endswith(f"--results {tmp_path}")


def published(smoke):
    """A record as a GPU would leave it, with figures of our kernels."""
    state = copy.deepcopy(smoke[0])
    state["smoke"] = False
    state["device"] = {
        "name": "NVIDIA X100", "slug": "nvidia-x100", "capability": "9.0", "multiprocessors": 132,
        "memory_bytes": 80 << 30, "l2_bytes": 50 << 20, "driver": "580.1",
    }  # fmt: skip
    for part in state["groups"].values():
        part["ceilings"] = {"matmul_tflops": 700.0, "copy_gbps": 3000.0}
    case = state["groups"]["prefill"]["cases"][0]
    figures = {"p20_us": 90.0, "p50_us": 100.0, "p80_us": 2000.0, "tflops": 350.0, "gbps": 300.0, "rounds": 9}
    for one in case["contenders"]:
        if one["name"] in (goals.BOOST, goals.PLAIN):
            one.update(figures, status="timed", host_us=50.0)
    case["ratios"] += [
        {"of": goals.BOOST, "to": goals.PLAIN, "median": 1.01, "low": 1.0, "high": 1.02},
        {"of": goals.BOOST, "to": "SDPA flash", "median": 1.25, "low": 1.2, "high": 1.3},
    ]
    return state


def test_the_page_shows_what_was_measured(smoke):
    text = report.page([published(smoke)])
    assert "## NVIDIA X100" in text
    assert "1.01x met (tiny, 4/2 heads of 16, 40 keys, float32)" in text
    assert "0.80x **missed**" in text
    assert "100.0 µs (90.0 µs to 2.00 ms) | 50% (350 TFLOP/s)" in text
    assert "0.800 (0.769 to 0.833)" in text
    assert "no CUDA GPU is visible" in text, "who was not there, and why"
    assert report.NOT_YET in text, "goals that this record says nothing about"
    assert text == report.page([published(smoke)])


def test_a_page_without_records_says_that_nothing_was_run():
    text = report.page([])
    assert text.count(report.NOT_YET) == len(goals.GOALS) + len(SHARES)
    assert " met" not in text


def test_every_column_names_a_contender():
    from bench.kernels_gpu.measure import contenders_of

    for group, cases in SETS["full"]().items():
        names = {one.name for one in contenders_of(cases[0], "cuda")}
        main, others = report.COLUMNS[group]
        assert {main, *(name for _, name in others)} <= names


def test_goals_name_contenders():
    """A goal whose contenders were renamed would never be judged again."""
    from bench.kernels_gpu.measure import contenders_of

    for goal in goals.GOALS:
        cases = SETS["full"]()[goal.group]
        names = [one.name for one in contenders_of(cases[0], "cuda")]
        rows = [{"name": name, "status": "timed", "gbps": 1.0} for name in names]
        ratios = [{"of": a, "to": b, "median": 1.0, "low": 1.0, "high": 1.0} for a in names for b in names]
        part = {
            "ceilings": {"copy_gbps": 1.0},
            "cases": [{"name": case.name, "bytes": 10**9, "contenders": rows, "ratios": ratios} for case in cases],
        }
        assert goals.judge(goal, {"groups": {goal.group: part}}) is not None, goal.what


def test_the_page_in_docs_is_written_from_the_committed_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_committed_results_have_the_right_form():
    for found in record.read_all(ROOT / "bench" / "results"):
        assert record.problems(found) == []


def test_make_gpu_without_a_gpu_says_so_and_ends_well(capsys, monkeypatch):
    monkeypatch.setattr(bench.gpu, "_sees_a_gpu", lambda: False)
    assert bench.gpu.main([]) == 0
    out = capsys.readouterr().out
    assert "no GPU is visible to torch" in out
    assert out.count("\n") == 1


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("assert False", 1)])
def test_make_gpu_fails_when_a_test_fails(body, code, tmp_path, monkeypatch):
    test = tmp_path / "test_one.py"
    test.write_text(f"def test_one():\n    {body}\n")
    monkeypatch.setattr(bench.gpu, "_sees_a_gpu", lambda: True)
    monkeypatch.setattr(bench.gpu, "build_native", lambda: None)
    monkeypatch.setattr(bench.gpu, "TESTS", (str(test),))
    ran = []
    monkeypatch.setattr(bench.gpu, "_run", lambda command, **options: ran.append(command[2]) or 0)
    results = ["--device", "cpu", "--results", str(tmp_path), "--skip-overhead", "--skip-sweep"]
    assert bench.gpu.main(["--workers", "1", *results]) == code
    assert ran == ["bench.kernels_gpu", "bench.kernels_gpu.report"]
    found = json.loads((tmp_path / "cpu-smoke.json").read_text())["tests"]
    assert (found["passed"], found["failed"], found["exit"]) == (1 - code, code, code)


def test_the_last_line_of_pytest_is_counted():
    counts = bench.gpu.counts("= 2 failed, 61 passed, 3 skipped, 1 error in 80.12s =")
    assert counts == {"passed": 61, "failed": 3, "skipped": 3}
