"""bench/sweep_gpu.py end to end on a small model."""

import json
import sys
from pathlib import Path

import pytest
import torch

import bench.gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import sweep_gpu

    return sweep_gpu


OPTIONS = ["--tiny", "--rounds", "2", "--slice", "8", "--check", "12", "--columns", "16"]


def test_a_small_model_end_to_end(module, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert module.main([*OPTIONS, "--results", str(tmp_path), "--commit", "abc"]) == 0
    assert torch.get_num_threads() == threads
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["tiny"]
    assert found["commit"] == "abc"
    assert {"device", "versions", "sizes", "ceilings", "command"} <= found.keys()
    assert [job["job"] for job in found["jobs"]] == ["heads", "heads-each"]
    for job in found["jobs"]:
        rows = {row["contender"]: row for row in job["contenders"]}
        assert {"engine", "batched hooks"} <= rows.keys()
        assert ("nnsight" in rows) != ("nnsight" in found["left_out"])
        for row in rows.values():
            assert row["agrees"]
            assert row["ms_a_patch"] > 0
            assert len(row["all_ms"]) == 2
            assert row["share_of_matmul_rate"] > 0
            assert row["gflop_a_patch"] > 0
        assert rows["engine"]["gflop_a_patch"] < rows["batched hooks"]["gflop_a_patch"]
    assert "of the bound" in capsys.readouterr().out


def test_who_is_wrong_is_not_timed(module, tmp_path, monkeypatch, capsys):
    wrong = module.Batched.run
    monkeypatch.setattr(module.Batched, "run", lambda self, *a: [x + 1 for x in wrong(self, *a)])
    # What the hook loop is compared with stays as it is.
    monkeypatch.setattr(module.Fewer, "run", wrong)
    assert module.main([*OPTIONS, "--results", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    rows = [row for job in json.loads(path.read_text())["jobs"] for row in job["contenders"]]
    assert all("ms_a_patch" not in row for row in rows if row["contender"] == "batched hooks")
    assert "is not timed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(module, tmp_path, capsys):
    assert module.main(["--results", str(tmp_path)]) == 0
    assert "no GPU is visible to torch" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_make_gpu_runs_it(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(bench.gpu, "_sees_a_gpu", lambda: True)
    monkeypatch.setattr(bench.gpu, "build_native", lambda: None)
    monkeypatch.setattr(bench.gpu, "_run", lambda command, **options: ran.append(command) or int("sweep" in command[1]))
    options = ["--skip-tests", "--skip-benchmarks", "--skip-overhead", "--results", str(tmp_path), "--commit", "abc"]
    assert bench.gpu.main(["--device", "cpu", *options]) == 1
    assert ran[-1] == [sys.executable, "bench/sweep_gpu.py", "--results", str(tmp_path), "--commit", "abc"]
