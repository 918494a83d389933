"""``emocircuits sweep``, the one-liners, and the page: end to end, against a plain hook loop."""

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import models
import pandas as pd
import pytest
import torch

from emocircuits import embedded
from emocircuits.cli import main
from emocircuits.embedded import faces, language
from emocircuits.sweep import Sweep, SweepResult, api, command, compat, logit_diff

EVENT = language.prompt("my mom said that the report is ready.") + " i feel"
PAGE = Path(__file__).parents[2] / "docs" / "sweep.md"
HEADS = 8


def run(capsys, *arguments):
    code = main(["sweep", *(str(a) for a in arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    for person in (101_900, 101_901):
        faces.face(person, "happy", 1.0).save(path / f"happy-{person}.png")
        faces.face(person, "neutral", 0.0).save(path / f"neutral-{person}.png")
    lines = [
        {
            "id": str(person), "clean": EVENT, "corrupt": EVENT, "clean_image": f"happy-{person}.png",
            "corrupt_image": f"neutral-{person}.png", "answer": "happy", "wrong": "calm",
        }
        for person in (101_900, 101_901)
    ]  # fmt: skip
    (path / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (path / "one.jsonl").write_text(json.dumps(lines[0]))
    return path


def loop(model, clean, corrupt, metric, layer, heads, columns=slice(None)):
    """One patch at a time: a hook on the output projection, a whole forward pass."""
    projection = model.model.language_model.layers[layer].self_attn.o_proj
    kept = {}
    handle = projection.register_forward_pre_hook(lambda m, a: kept.update(z=a[0].clone()))
    with torch.no_grad():
        model(**clean)
        handle.remove()
        values = []
        for head in heads:

            def hook(module, args, head=head):
                z = args[0].clone()
                size = z.shape[-1] // HEADS
                part = slice(head * size, (head + 1) * size)
                z[:, columns, part] = kept["z"][:, columns, part]
                return (z,)

            handle = projection.register_forward_pre_hook(hook)
            values.append(float(metric(model(**corrupt).logits)))
            handle.remove()
    return values


def faces_pair():
    model, processor = embedded.load()
    clean, corrupt = (
        dict(processor(images=faces.face(101_900, side, strength), text=EVENT, return_tensors="pt"))
        for side, strength in (("happy", 1.0), ("neutral", 0.0))
    )
    a, b = processor.tokenizer.convert_tokens_to_ids(["happy", "calm"])
    return model, clean, corrupt, a, b


@pytest.fixture(scope="module")
def pair():
    return faces_pair()


def test_the_command_gives_what_a_hook_loop_gives(capsys, folder, pair, tmp_path):
    out = tmp_path / "out"
    command = ("--pairs", folder / "pairs.jsonl", "--layers", "2,4", "--out", out)
    code, printed, err = run(capsys, *command, "--json")
    assert code == 0, err
    record = json.loads(printed)
    assert record["axes"] == ["layer", "head"]
    assert record["labels"]["layer"] == [2, 4]
    assert record["pairs"] == ["101900", "101901"]
    model, clean, corrupt, a, b = pair
    first = SweepResult.load(out).pairs[0]
    span = float(first.max() - first.min())
    expected = loop(model, clean, corrupt, lambda x: x[0, -1, a] - x[0, -1, b], 2, range(HEADS))
    assert torch.allclose(first[0], torch.tensor(expected).double(), rtol=0, atol=2e-5 * span)
    assert torch.allclose(torch.tensor(record["values"]).double(), SweepResult.load(out).values)
    low, effect, high = (torch.tensor(record[k]) for k in ("effects_low", "effects", "effects_high"))
    assert (low <= effect + 1e-9).all()
    assert (effect <= high + 1e-9).all()
    assert SweepResult.load(out).meta["ids"] == record["pairs"]
    assert record["top"][0]["value"] in [v for row in record["values"] for v in row]
    assert (out / "sweep.html").stat().st_size > 1e5
    assert len(pd.read_parquet(out / "0001" / "heads" / "shards")) == 2 * HEADS
    # Again: nothing is computed, the numbers are the same.
    held = sorted((out / "0001" / "heads" / "shards").iterdir())
    code, printed, err = run(capsys, *command)
    assert code == 0, err
    assert "heads of embedded, 2 pairs, logit_diff: clean" in printed
    low, high = (record["top"][0][f"effect_{k}"] for k in ("low", "high"))
    assert f"[{low:+.3f}, {high:+.3f}]" in printed.splitlines()[2]
    assert err.count("patches, ") == 1, "one forecast for both pairs"
    assert f"{4 * HEADS}/{4 * HEADS} patches" in err
    assert sorted((out / "0001" / "heads" / "shards").iterdir()) == held
    # Another metric into the same folder.
    code, printed, err = run(capsys, *command, "--metric", "log_prob")
    assert (code, printed) == (2, "")
    assert "holds another sweep" in err
    assert err.splitlines()[-1].startswith("emocircuits: ")


def test_other_targets_metrics_and_positions(capsys, folder):
    for more, axes in (
        (("--target", "residual", "--positions", "last", "--metric", "log_prob"), ["layer", "pos"]),
        (("--target", "neurons", "--groups", "4", "--direction", "noise"), ["layer", "group"]),
        (("--target", "attn_out", "--positions", "3,-1", "--patch-with", "zero", "--batch", "3"), ["layer", "pos"]),
        (("--positions", "last", "--metric", "kl"), ["layer", "pos", "head"]),
        (("--target", "qkv"), ["layer", "qkv"]),
    ):
        code, printed, err = run(capsys, "--pairs", folder / "one.jsonl", "--layers", "3", "--json", *more)
        assert code == 0, err
        assert json.loads(printed)["axes"] == axes


def test_a_text_model_from_a_folder(capsys, tmp_path):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    models.build("text", "llama").save_pretrained(tmp_path / "model")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(models.VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3").save_pretrained(tmp_path / "model")
    line = {"clean": "w7 w8 w9 w10", "corrupt": "w7 w18 w9 w10", "answer": "w20", "wrong": "w21"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    arguments = ("--model", tmp_path / "model", "--pairs", tmp_path / "pairs.jsonl", "--positions", "each", "--json")
    code, printed, err = run(capsys, *arguments)
    assert code == 0, err
    values = torch.tensor(json.loads(printed)["values"])
    assert values.shape == (3, 4, 4)
    assert (values[:, 0] == json.loads(printed)["corrupt"]).all(), "before the first difference nothing changes"
    assert json.loads(printed)["labels"]["token"] == ["w7", "w18", "w9", "w10"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--positions", "middle"), "middle"),
        (("--positions", "3,-"), "--positions 3,-"),
        (("--positions", "900"), "900"),
        (("--layers", "x"), "--layers x"),
        (("--layers", "1-2,2"), "each layer once"),
        (("--layers", "17"), "17"),
        (("--groups", "3"), "--groups is for --target neurons"),
        (("--batch", "0"), "--batch 0: expected at least 1"),
        (("--out", PAGE), "is a file; name a folder"),
        (("--model", "./nowhere"), "config.json"),
    ],
)
def test_bad_input_is_one_line(capsys, folder, more, said):
    code, printed, err = run(capsys, "--pairs", folder / "one.jsonl", *more)
    assert (code, printed) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("emocircuits: ")]
    assert len(lines) == 1
    assert said in lines[0]


def test_a_bad_pairs_file_names_its_lines(capsys, folder, tmp_path):
    code, _, err = run(capsys, "--pairs", tmp_path / "none.jsonl")
    assert code == 2
    assert "none.jsonl: cannot read the pairs" in err
    line = json.loads((folder / "one.jsonl").read_text())
    longer = {**line, "id": "longer", "clean": EVENT + " very", "corrupt": EVENT + " very"}
    path = folder / "lengths.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in (line, longer)))
    code, _, err = run(capsys, "--pairs", path, "--positions", "each")
    assert code == 2
    assert "80 tokens (line 1), 81 tokens (line 2)" in err
    # Roles that have as many tokens in each, and columns from the end, are the same places.
    for positions in ("last", "-1"):
        code, printed, err = run(capsys, "--pairs", path, "--positions", positions, "--layers", "3", "--json")
        assert code == 0, err
        assert json.loads(printed)["axes"] == ["layer", "pos", "head"]
    code, _, err = run(capsys, "--pairs", path, "--positions", "query", "--layers", "3")
    assert code == 2
    assert "of these pairs no mean can be taken" in err


def test_one_liners(pair):
    model = models.build("text", "llama")
    ids = torch.tensor([[3, 8, 9, 10, 11]])
    other = torch.tensor([[3, 8, 19, 10, 12]])

    def metric(logits):
        return logits[0, -1, 20] - logits[0, -1, 21]

    shapes = {
        "resid_pre": (3, 5), "attn_out": (3, 5), "mlp_out": (3, 5), "attn_head_out_by_pos": (3, 5, 4),
        "attn_head_out_all_pos": (3, 4),
    }  # fmt: skip
    layers = model.model.layers
    sites = {"resid_pre": layers, "attn_out": [l.self_attn for l in layers], "mlp_out": [l.mlp for l in layers]}
    for name, shape in shapes.items():
        function = getattr(compat, f"get_act_patch_{name}")
        table = function(model, other, ids, metric)
        assert table.shape == shape
        assert torch.allclose(table, function(model, other[0], {"input_ids": ids}, logit_diff(20, 21)), atol=1e-5)
        for layer in range(3):
            for column in range(5):
                if name in sites:
                    expected = hooked(model, sites[name][layer], name, ids, other, metric, column)
                    assert table[layer, column] == pytest.approx(expected, abs=2e-5)
    every = compat.get_act_patch_block_every(model, other, ids, metric)
    alone = [
        getattr(compat, f"get_act_patch_{name}")(model, other, ids, metric)
        for name in ("resid_pre", "attn_out", "mlp_out")
    ]
    assert torch.equal(every, torch.stack(alone))
    for bad in ({"blocks.0.hook_resid_pre": ids}, 3):
        with pytest.raises(TypeError, match="without input_ids"):
            compat.get_act_patch_resid_pre(model, other, bad, metric)
    with pytest.raises(TypeError, match="expected token ids"):
        compat.get_act_patch_resid_pre(model, other, torch.zeros(1, 5), metric)


def hooked(model, module, name, clean, corrupt, metric, column):
    """The residual stream, or what a block adds to it, of one column from the clean prompt."""
    kept = {}
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    if name == "resid_pre":
        take = module.register_forward_pre_hook(lambda m, a: kept.update(x=a[0].clone()))
    else:
        take = module.register_forward_hook(lambda m, a, out: kept.update(x=first(out).clone()))
    with torch.no_grad():
        model(clean)
        take.remove()

        def before(m, args):
            x = args[0].clone()
            x[:, column] = kept["x"][:, column]
            return (x, *args[1:])

        def after(m, args, out):
            x = first(out).clone()
            x[:, column] = kept["x"][:, column]
            return (x, *out[1:]) if isinstance(out, tuple) else x

        put = module.register_forward_pre_hook(before) if name == "resid_pre" else module.register_forward_hook(after)
        value = float(metric(model(corrupt).logits))
        put.remove()
    return value


def test_the_code_of_the_page_runs(capsys):
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "SweepResult([layer 6, head 8]" in printed
    assert "48 patches on disk" in printed
    assert "tensor(True)" in printed
    example = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert example is not None
    assert json.loads(example[1])["answer"] == "happy"


def test_values_that_are_not_finite_are_null_in_json():
    table = torch.tensor([[1.0, math.nan], [2.0, math.inf]], dtype=torch.float64)
    labels = {"layer": [0, 1], "head": [0, 1]}
    meta = {"target": "heads", "direction": "denoise", "patch_with": "clean"}
    result = SweepResult(table, 3.0, 1.0, ("layer", "head"), labels, meta)
    for r in (result, SweepResult.mean([result, result])):
        args = argparse.Namespace(
            model="m", target="heads", positions="all", metric="kl", direction="denoise", patch_with="clean",
            command_line="", device=None,
        )  # fmt: skip
        record = command.report(r, args, ["a"])
        assert json.loads(json.dumps(record, allow_nan=False))["values"] == [[1.0, None], [2.0, None]]
        assert len(command.text(record).splitlines()) == 6


@pytest.mark.parametrize("page", sorted(PAGE.parent.glob("sweep-*.md")), ids=lambda page: page.stem)
def test_the_code_of_the_other_pages_runs(page):
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    """A tiny shape, once: contenders agree, and every row is there. Nothing about its times."""
    path = Path(__file__).parents[2] / "bench" / "sweep.py"
    small = dict(
        columns=8, rounds=1, slice=4, layers=2, width=32, heads=4, kv_heads=2, neurons=32, vocabulary=100, groups=4
    )
    sizes = [part for k, v in small.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    command = [sys.executable, str(path), "--only", "engine,batched hooks", "--json", str(tmp_path / "x.json"), *sizes]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert {(r["job"], r["contender"]) for r in rows} == {
        (job, name)
        for job in ("heads", "heads-each", "residual-each", "neurons")
        for name in ("engine", "hook loop", "batched hooks")
    }
    assert all(r["difference_of_range"] <= 2e-5 for r in rows)


CHILD = """
import sys, time
from emocircuits.sweep import Sweep, logit_diff
from emocircuits.sweep.store import Store
sys.path.insert(0, sys.argv[2])
from test_sweep_command import faces_pair

model, clean, corrupt, a, b = faces_pair()
add, calls = Store.add, []

def slow(self, values):
    self.seconds = 0.0
    add(self, values)
    calls.append(1)
    if len(calls) == 3:
        print("ready", flush=True)
        time.sleep(60)

Store.add = slow
sweep = Sweep(model, clean=clean, corrupt=corrupt, metric=logit_diff(a, b), batch=2, out=sys.argv[1], progress=False)
sweep.heads(layers=[3, 5])
"""


def test_killed_in_the_middle_of_a_sweep(tmp_path, pair, monkeypatch):
    """SIGKILL between two shards; the second run computes the rest, and the table is that of one run."""
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(Path(__file__).parent)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.kill()
    child.wait()
    shards = tmp_path / "heads" / "shards"
    held = pd.read_parquet(shards)["index"].tolist()
    assert 0 < len(held) < 2 * HEADS
    computed = []
    real = api.evaluate

    def counting(sweep, target, todo, *more):
        computed.extend(todo)
        return real(sweep, target, todo, *more)

    monkeypatch.setattr(api, "evaluate", counting)
    model, clean, corrupt, a, b = pair
    again = Sweep(model, clean=clean, corrupt=corrupt, metric=logit_diff(a, b), out=tmp_path, progress=False)
    resumed = again.heads(layers=[3, 5])
    assert len(computed) == 2 * HEADS - len(held)
    assert sorted(pd.read_parquet(shards)["index"]) == list(range(2 * HEADS))
    whole = Sweep(model, clean=clean, corrupt=corrupt, metric=logit_diff(a, b), progress=False).heads(layers=[3, 5])
    assert torch.allclose(resumed.values, whole.values, rtol=0, atol=1e-5 * float(whole.values.abs().max()))
    # Another picture in the same folder.
    other = {**corrupt, "pixel_values": corrupt["pixel_values"] + 0.01}
    with pytest.raises(ValueError, match=r"another sweep: the inputs \(corrupt\) differs"):
        Sweep(model, clean=clean, corrupt=other, metric=logit_diff(a, b), out=tmp_path, progress=False).heads(
            layers=[3, 5]
        )
