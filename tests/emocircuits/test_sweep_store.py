"""Results on disk while a sweep runs: killed and resumed, another sweep in the folder, a full disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import models
import pandas as pd
import pytest
import torch
from sweep_fakes import Engine, grid, value

from emocircuits import files
from emocircuits.sweep.collect import collect
from emocircuits.sweep.identity import describe, hash_inputs, hash_model
from emocircuits.sweep.store import Store, open_store

WHAT = {"target": {"name": "heads", "positions": "each"}, "metric": "m"}


def store(folder, variants, what=WHAT, baselines=(3.0, 1.0), seconds=0.0):
    return Store(folder, what, variants, baselines, seconds=seconds)


def run(folder, engine, **more):
    variants, axes, labels = grid()
    kept = None if folder is None else store(folder, variants, **more)
    return collect(engine, variants, axes=axes, labels=labels, clean=3.0, corrupt=1.0, store=kept, progress=False)


def test_values_go_where_their_patch_is(tmp_path):
    r = run(None, Engine())
    variants, _, _ = grid()
    for v in variants:
        assert r.values[v.layer, v.column, v.unit] == value(v)
    assert torch.equal(run(tmp_path, Engine()).values, r.values)


def test_an_interrupted_sweep_goes_on(tmp_path):
    first = Engine(stop=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first)
    second = Engine(chunk=3)
    r = run(tmp_path, second)
    assert torch.equal(r.values, run(None, Engine()).values)
    assert len(first.seen) == 10
    assert len(second.seen) == 14
    assert not set(first.seen) & set(second.seen)
    third = Engine()
    assert torch.equal(run(tmp_path, third).values, r.values)
    assert third.seen == []


def test_what_came_in_since_the_last_shard_is_kept_when_python_can(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Engine(stop=2), seconds=1000.0)
    assert len(list((tmp_path / "shards").glob("*.parquet"))) == 1
    second = Engine()
    run(tmp_path, second, seconds=1000.0)
    assert len(second.seen) == 14


def test_shards_are_one_parquet_data_set(tmp_path):
    run(tmp_path, Engine())
    frame = pd.read_parquet(tmp_path / "shards").sort_values("index")
    variants, _, _ = grid()
    assert frame[["layer", "column", "unit"]].to_numpy().tolist() == [list(v) for v in variants]
    assert frame["value"].tolist() == [value(v) for v in variants]


CHILD = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from sweep_fakes import Engine, grid
    from emocircuits.sweep.collect import collect
    from emocircuits.sweep.store import Store

    WHAT = {"target": {"name": "heads", "positions": "each"}, "metric": "m"}

    class Slow(Engine):
        def __call__(self, todo):
            for part, values in super().__call__(todo):
                with open(sys.argv[3], "a") as log:
                    for v in todo[part]:
                        print(*v, file=log)
                yield part, values
                print("ready", flush=True)  # the chunk before this line is in the store
                time.sleep(60)

    variants, axes, labels = grid()
    kept = Store(sys.argv[1], WHAT, variants, (3.0, 1.0), seconds=0.0)
    collect(Slow(), variants, axes=axes, labels=labels, clean=3.0, corrupt=1.0, store=kept, progress=False)
    """
)


def test_killed_in_the_middle_then_run_again(tmp_path):
    """SIGKILL, not an exception: nothing is cleaned up."""
    out, log = tmp_path / "out", tmp_path / "log"
    here = str(Path(__file__).parent)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(out), here, str(log)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = log.read_text().splitlines()
    assert len(before) == 5
    half = out / "shards" / ".000000005-5.parquet.killed"
    half.write_bytes(b"PAR1 half a shard")
    second = Engine()
    r = run(out, second)
    computed = before + [" ".join(map(str, v)) for v in second.seen]
    assert len(computed) == len(set(computed)) == 24, "something was computed twice, or not at all"
    assert torch.equal(r.values, run(None, Engine()).values)
    assert not half.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"class": "A", "weights": "other"}}, r"the model \(weights\)"),
        ({"inputs": {"clean": "x", "corrupt": "other"}}, r"the inputs \(corrupt\)"),
        ({"target": {"name": "residual"}}, "the target"),
        ({"metric": "log_prob"}, r"the metric \(logit_diff before, log_prob now\)"),
    ],
)
def test_another_sweep_in_the_folder_is_refused(tmp_path, change, named):
    what = {
        "model": {"class": "A", "weights": "w"}, "inputs": {"clean": "x", "corrupt": "y"}, "target": {"name": "heads"},
        "metric": "logit_diff",
    }  # fmt: skip
    run(tmp_path, Engine(), what=what)
    held = {p: p.read_bytes() for p in (tmp_path / "shards").iterdir()}
    with pytest.raises(ValueError, match=f"another sweep: {named}"):
        run(tmp_path, Engine(), what={**what, **change})
    assert {p: p.read_bytes() for p in (tmp_path / "shards").iterdir()} == held
    variants, _, _ = grid(layers=2)
    with pytest.raises(ValueError, match="the variants"), store(tmp_path, variants, what):
        pass


def test_other_versions_are_refused(tmp_path):
    run(tmp_path, Engine())
    path = tmp_path / "manifest.json"
    record = json.loads(path.read_text())
    record["key"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"the versions \(torch\) differs"):
        run(tmp_path, Engine())


@pytest.mark.parametrize("record", [[], {}, {"format": "emocircuits.sweep.shards/1"}, {"key": {}}, None])
def test_a_manifest_that_is_not_whole_is_refused(tmp_path, record):
    run(tmp_path, Engine())
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="not the manifest of a sweep"):
        run(tmp_path, Engine())


def test_a_model_that_computes_something_else_is_refused(tmp_path):
    run(tmp_path, Engine())
    with pytest.raises(ValueError, match=r"of the clean prompt was 3 and is 3\.5 now"):
        run(tmp_path, Engine(), baselines=(3.5, 1.0))
    run(tmp_path, Engine(), baselines=(3.0000001, 1.0))


def test_two_processes_do_not_share_a_folder(tmp_path):
    variants, _, _ = grid()
    with store(tmp_path, variants), pytest.raises(OSError, match="another process"), store(tmp_path, variants):
        pass
    with store(tmp_path, variants):
        pass


def test_a_full_disk_leaves_what_was_written(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Filling(Engine):
        def __call__(self, todo):
            for k, chunk in enumerate(super().__call__(todo)):
                if k == 2:
                    monkeypatch.setattr(files.os, "fsync", full)
                yield chunk

    with pytest.raises(OSError, match="disk is full; 10 of 24 patches are saved there: make room"):
        run(tmp_path, Filling())
    monkeypatch.undo()
    assert [p.name for p in sorted((tmp_path / "shards").iterdir())] == ["000000000-5.parquet", "000000005-5.parquet"]
    again = Engine()
    assert torch.equal(run(tmp_path, again).values, run(None, Engine()).values)
    assert len(again.seen) == 14


def test_a_broken_shard_or_a_lost_manifest_is_refused(tmp_path):
    run(tmp_path, Engine())
    shard = sorted((tmp_path / "shards").iterdir())[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:40])
    with pytest.raises(ValueError, match="cannot be read"):
        run(tmp_path, Engine())
    shard.write_bytes(whole)
    (shard.parent / "copy.parquet").write_bytes(whole)
    with pytest.raises(ValueError, match="there twice"):
        run(tmp_path, Engine())
    (shard.parent / "copy.parquet").unlink()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        run(tmp_path, Engine())
    a_file = tmp_path / "file"
    a_file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run(a_file, Engine())


def test_an_engine_that_leaves_out_or_repeats_is_refused():
    variants, axes, labels = grid()
    fixed = dict(axes=axes, labels=labels, clean=1.0, corrupt=0.0, progress=False)
    with pytest.raises(ValueError, match="left 19 of 24"):
        collect(lambda todo: iter([(slice(0, 5), torch.zeros(5))]), variants, **fixed)
    with pytest.raises(ValueError, match="twice"):
        collect(lambda todo: iter([(slice(0, 5), torch.zeros(5))] * 2), variants, **fixed)
    with pytest.raises(ValueError, match="expected each once"):
        collect(Engine(), [*variants, variants[0]], **fixed)
    with pytest.raises(ValueError, match="not among the labels"):
        collect(Engine(), [variants[0]._replace(layer=7)], **fixed)


def test_units_with_names_and_the_bar(capsys):
    variants, axes, labels = grid(units=3)
    labels = {**labels, "head": ["q", "k", "v"]}
    fixed = dict(axes=axes, labels=labels, clean=1.0, corrupt=0.0)
    r = collect(Engine(), variants, **fixed, costs=[v.layer * 1e9 for v in variants], meta={"target": "qkv"})
    assert r.values[1, 2, 0] == pytest.approx(1.2)
    shown = capsys.readouterr().err
    assert "qkv: 100%" in shown
    assert "36/36 patches" in shown


def test_the_hash_of_a_model_is_of_its_weights_and_config(tmp_path):
    model = models.build("text", "llama")
    before = hash_model(model)
    model.config._name_or_path = "elsewhere"
    assert hash_model(model) == before
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    assert {k for k, v in hash_model(model).items() if v != before[k]} == {"weights"}
    model.config.rms_norm_eps = 1e-2
    assert {k for k, v in hash_model(model).items() if v != before[k]} == {"weights", "config"}


def test_the_hash_of_inputs_is_of_names_shapes_and_values():
    a = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2)}
    assert hash_inputs(a) == hash_inputs({k: v.clone() for k, v in reversed(a.items())})
    for other in (
        {"input_ids": a["input_ids"]},
        {**a, "input_ids": torch.tensor([[1, 3]])},
        {**a, "input_ids": torch.tensor([1, 2])},
    ):
        assert hash_inputs(a) != hash_inputs(other)


def test_functions_are_told_apart_by_what_they_do():
    def make(k):
        return lambda logits: logits[0, -1, k]

    assert describe(make(3)) == describe(make(3))
    assert describe(make(3)) != describe(make(4))
    assert describe(lambda x: x + 1) != describe(lambda x: x + 2)
    around = {"k": 3}
    reads = eval("lambda logits: logits[0, -1, k]", around)
    before = describe(reads)
    around["k"] = 4
    assert describe(reads) != before, "a token id in a global"
    with pytest.raises(TypeError, match="cannot be told from another"):
        describe(object())


def test_open_store_hashes_and_refuses_what_is_not_finite(tmp_path):
    model = models.build("text", "llama")
    inputs = {"input_ids": torch.tensor([[1, 2]])}
    variants, _, _ = grid()
    fixed = dict(model=model, clean=inputs, corrupt=inputs, what=WHAT, variants=variants)
    with open_store(tmp_path, **fixed, baselines=(1.0, 2.0)):
        pass
    other = models.build("text", "llama", seed=1)
    with (
        pytest.raises(ValueError, match=r"the model \(weights\)"),
        open_store(tmp_path, **{**fixed, "model": other}, baselines=(1.0, 2.0)),
    ):
        pass
    with pytest.raises(ValueError, match="not finite"):
        open_store(tmp_path, **fixed, baselines=(float("nan"), 2.0))
