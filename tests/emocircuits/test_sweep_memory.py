"""Activations in host memory, batches that are as large as memory allows, and what happens when it is not enough."""

from __future__ import annotations

import weakref

import families_harness as harness
import pytest
import sweep_oracle as oracle
import test_sweep_families as families
import torch
from test_sweep_engine import HEADS, A, B, agree, difference, pair
from torch._subclasses import FakeTensorMode

from emocircuits.sweep import memory
from emocircuits.sweep.api import Sweep
from emocircuits.sweep.memory import Host
from emocircuits.sweep.metrics import logit_diff


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
