"""Activations in host memory, batches that are as large as memory allows, and what happens when it is not enough."""

from __future__ import annotations

import weakref

import families_harness as harness
import pandas as pd
import pytest
import sweep_oracle as oracle
import test_sweep_families as families
import torch
from models import build
from test_sweep_engine import HEADS, A, B, agree, difference, pair
from torch._subclasses import FakeTensorMode

from emocircuits.sweep import attend, memory
from emocircuits.sweep.api import Sweep
from emocircuits.sweep.engine import Run
from emocircuits.sweep.memory import Demand, Host
from emocircuits.sweep.metrics import logit_diff
from emocircuits.sweep.resume import Decoder
from emocircuits.sweep.targets import Target, Variant


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "llava-padded"])
def test_host_is_what_a_hook_loop_gives(kind):
    model, clean, corrupt = pair(kind)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), activations="host", progress=False)
    for target, positions, units in (("heads", "all", HEADS), ("residual", [-2, -1], None), ("mlp_out", [5], None)):
        found = getattr(sweep, target)(positions=positions)
        columns = positions if positions == "all" else [p % sweep.columns for p in positions]
        expected = oracle.sweep(model, corrupt, clean, target, difference, columns, units)
        agree(found.values, expected, 1e-10, found.gap)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llava-padded"])
@pytest.mark.parametrize("patch", ["clean", "mean"])
def test_host_is_device(kind, patch):
    model, clean, corrupt = pair(kind)
    here, there = (
        Sweep(model, clean, corrupt, logit_diff(A, B), patch_with=patch, activations=where, progress=False)
        for where in ("device", "host")
    )
    assert here.base.host is None
    assert there.base.host.bytes > 0
    kept = sum(memory.held({n: x for n in memory.NAMES if (x := getattr(r, n)) is not None}) for r in here.base.layers)
    assert there.base.host.bytes <= kept  # nothing twice
    for target, options in (
        ("heads", {"positions": "each"}), ("neurons", {"groups": 3}), ("attn_out", {"positions": "each"}),
        ("residual", {}), ("routes", {}), *([("qkv", {"positions": [4]})] if patch == "clean" else []),
    ):  # fmt: skip
        a, b = (getattr(s, target)(**options).values for s in (here, there))
        assert torch.allclose(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["Qwen3-VL", "Gemma 3 (vision)"])
def test_families_that_add_between_layers_or_look_ahead(name):
    model, _, make_inputs, _ = harness.built(name)
    clean, corrupt = families.pair(model, make_inputs)
    here, there = (
        Sweep(model, clean, corrupt, logit_diff(A, B), activations=where, progress=False) for where in ("auto", "host")
    )
    for target in ("heads", "residual", "mlp_out"):
        a, b = (getattr(s, target)(positions="query", layers=[0, 1]).values for s in (here, there))
        assert torch.allclose(a, b, rtol=0, atol=1e-11)


def test_only_what_is_read_is_on_the_device(monkeypatch):
    """Every copy that was brought, watched while it lives."""
    model, clean, corrupt = pair("llama")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), activations="host", progress=False)
    alive, most, read = {}, 0, set()
    bring = Host._bring

    def watched(self, layer, name, ahead):
        nonlocal most
        found = bring(self, layer, name, ahead)
        if self is sweep.base.host:
            assert found[0].data_ptr() != self._kept[layer, name].data_ptr()  # a copy also on a CPU
            alive[layer, name] = weakref.ref(found[0])
            read.add(name)
            most = max(most, len({l for (l, _), x in alive.items() if x() is not None}))
        return found

    monkeypatch.setattr(Host, "_bring", watched)
    sweep.heads(positions="each", layers=[0, 1])
    assert most <= 2  # the layer that is entered, and the one that a batch is in
    assert read <= {"q", "k", "v", "z", "resid_pre", "resid_post", "attention"}
    assert len({layer for layer, _ in sweep.base.host.resident}) <= 1
    assert {name for _, name in sweep.source.host.resident} == {"z"}


def test_what_is_read_layer_by_layer_is_copied_ahead(monkeypatch):
    """The order of copies; a side stream that is only said to be there."""
    host = Host(torch.device("cpu"))
    for layer in range(4):
        host.put(layer, {name: torch.full((2,), 10.0 * layer + i) for i, name in enumerate("kvz")})
    asked = []
    bring = host._bring
    monkeypatch.setattr(host, "_bring", lambda l, n, ahead: asked.append((l, n, ahead)) or bring(l, n, ahead=False))
    monkeypatch.setattr(host, "_side", object())
    for layer in range(4):
        for i, name in enumerate("kv"):
            assert float(host.get(layer, name)[0]) == 10 * layer + i
    assert asked == [
        (0, "k", False), (0, "v", False), (1, "k", False), (2, "k", True), (1, "v", False), (2, "v", True),
        (3, "k", True), (3, "v", True),
    ]  # fmt: skip
    assert host.get(0, "w") is None


def test_auto_goes_by_free_memory(monkeypatch):
    with FakeTensorMode():
        fields = {"z": torch.empty(4, device="cuda")}
    monkeypatch.setattr(memory, "held", lambda fields: 10)
    for free, runs, expected in ((400, 2, False), (399, 2, True), (399, 1, False), (199, 1, True)):
        monkeypatch.setattr(memory, "free", lambda device, free=free: free)
        assert memory.on_host("auto", fields, layers=10, runs=runs) == expected
        assert memory.on_host("host", fields, 10)
        assert not memory.on_host("device", fields, 10)


def test_where_is_refused():
    model, clean, corrupt = pair("llama")
    with pytest.raises(ValueError, match="activations is 'disk', expected one of auto, device, host"):
        Sweep(model, clean, corrupt, logit_diff(A, B), activations="disk")


# ---- batches ----------------------------------------------------------------------------------------


def peak(run):
    """Bytes at the worst moment of a call, by the allocator's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def wide(heads=4, kv_heads=4, neurons=172, columns=64, **over):
    model = build(
        "text", hidden_size=64, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=neurons,
        dtype=torch.float32, **over,
    )  # fmt: skip
    clean = {"input_ids": torch.randint(8, 60, (1, columns), generator=torch.Generator().manual_seed(0))}
    corrupt = {"input_ids": clean["input_ids"].clone()}
    corrupt["input_ids"][0, 0] = 61
    return model, clean, corrupt


SHAPES = [{}, {"kv_heads": 1}, {"neurons": 512}, {"heads": 8, "kv_heads": 8}]
LATE = [Variant(0, c, h) for c in (60, 63) for h in range(4)]
BATCHES = {
    "all": (Target("heads"), [Variant(0, None, h) for h in range(4)] * 4),
    "each": (Target("residual"), [Variant(0, c, None) for c in range(64)]),
    "late": (Target("heads"), LATE),
    "one place": (Target("heads"), [Variant(0, 63, 0)] * 64),
    "last layer": (Target("residual"), [Variant(2, c, None) for c in range(64)]),
    "qkv": (Target("qkv"), [Variant(0, None, u) for u in range(6)] * 4),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_of_a_batch_is_known_before_it_runs(shape, batch):
    sweep = Sweep(*wide(**shape), logit_diff(A, B), progress=False)
    target, variants = BATCHES[batch]
    with torch.inference_mode():
        run = Run(sweep, target)
        run.values(variants)
        sizes = [run.size(v) for v in variants]
        groups = [(sum(s for s in sizes if s == size), sizes.count(size)) for size in set(sizes)]
        group = (max(g[0] for g in groups), max(g[1] for g in groups))
        estimate, taken = run.demand.bytes(sum(sizes), len(variants), group), peak(lambda: run.values(variants))
    assert taken <= 1.15 * estimate
    if batch != "last layer":  # where columns that nobody reads are left out
        assert estimate <= 2.5 * taken


def test_all_logits_are_counted():
    model, clean, corrupt = wide(vocab_size=2048)
    sweep = Sweep(model, clean, corrupt, lambda logits: logits[0, -1, A] - logits[0, -1, B], progress=False)
    variants = [Variant(1, None, h) for h in range(4)] * 2
    with torch.inference_mode():
        run = Run(sweep, Target("heads"))
        sizes = [run.size(v) for v in variants]
        estimate = run.demand.bytes(sum(sizes), len(sizes), (sum(sizes), len(sizes)))
        taken = peak(lambda: run.values(variants))
    assert taken <= estimate <= 2.5 * taken


def test_batches_fit_into_the_room_there_is(monkeypatch):
    model, clean, corrupt = pair("llama")
    plain = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).heads(positions="each")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    seen = []
    values = Run.values
    monkeypatch.setattr(Run, "values", lambda self, vs: seen.append(len(vs)) or values(self, vs))
    monkeypatch.setattr("emocircuits.sweep.engine.free", lambda device: 2 * 40 * Demand.of(sweep).token)
    found = sweep.heads(positions="each")
    assert torch.allclose(found.values, plain.values, rtol=0, atol=1e-12)
    assert max(seen) < 40
    assert len(seen) > 6


def failing(monkeypatch, most, error=torch.OutOfMemoryError):
    """Attention that has no memory for more than so many query tokens at once; the sizes that were asked for."""
    asked = []
    heads = attend.heads

    def limited(query, *rest):
        tokens = query.shape[0] * query.shape[2]
        asked.append(tokens)
        if tokens > most:
            raise error("CUDA out of memory. Tried to allocate" if error is torch.OutOfMemoryError else "other")
        return heads(query, *rest)

    monkeypatch.setattr(attend, "heads", limited)
    return asked


@pytest.mark.parametrize("kind", ["llama-padded", "gpt2"])
@pytest.mark.parametrize(("target", "positions", "most"), [("heads", "all", 16), ("heads", "each", 2)])
def test_out_of_memory_halves_the_batch_and_goes_on(kind, target, positions, most, monkeypatch, tmp_path):
    model, clean, corrupt = pair(kind)
    units = HEADS if target == "heads" else None
    expected = oracle.sweep(model, corrupt, clean, target, difference, positions, units)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), out=tmp_path, progress=False)
    asked = failing(monkeypatch, most)
    found = getattr(sweep, target)(positions=positions)
    agree(found.values, expected, 1e-10, found.gap)
    assert max(asked) > most  # it did run out
    failed = [i for i, n in enumerate(asked) if n > most]
    assert len(failed) <= 8  # and remembers
    on_disk = pd.concat(pd.read_parquet(path) for path in sorted((tmp_path / target / "shards").glob("*.parquet")))
    assert len(on_disk) == found.values.numel()  # nothing lost, nothing twice
    again = getattr(sweep, target)(positions=positions)
    assert torch.equal(again.values, found.values)


def test_memory_comes_back_before_the_next_try(monkeypatch):
    """What a batch that failed had computed is gone when the smaller one begins."""
    model, clean, corrupt = pair("llama")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    failing(monkeypatch, 16)
    held, gone = [], []
    run, forget = Decoder.dense, Run.forget

    def dense(self, layer, packed):
        held.append(weakref.ref(packed.x))
        return run(self, layer, packed)

    monkeypatch.setattr(Decoder, "dense", dense)
    monkeypatch.setattr(Run, "forget", lambda self: gone.append(held[-1]() is None) or forget(self))
    sweep.heads()
    assert gone
    assert all(gone)


def test_one_patch_that_does_not_fit(monkeypatch, tmp_path):
    model, clean, corrupt = pair("llama")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), out=tmp_path, progress=False)
    failing(monkeypatch, 2)
    with pytest.raises(ValueError, match=r"cpu has no memory for one patch of layer 0 .* give it shorter prompts"):
        sweep.heads()
    monkeypatch.undo()
    expected = oracle.sweep(model, corrupt, clean, "heads", difference, "all", HEADS)
    agree(sweep.heads().values, expected, 1e-10)


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    model, clean, corrupt = pair("llama")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    failing(monkeypatch, 2, RuntimeError)
    with pytest.raises(RuntimeError, match="other"):
        sweep.heads()
