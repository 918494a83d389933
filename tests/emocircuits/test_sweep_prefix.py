"""Attention that reads the base run's keys where they are, as it does on a GPU: the same tables as with copies."""

from __future__ import annotations

import pytest
import sweep_oracle as oracle
import torch
from test_sweep_engine import HEADS, A, B, agree, difference, pair

from emocircuits.sweep import prefix
from emocircuits.sweep.api import Sweep
from emocircuits.sweep.metrics import logit_diff


@pytest.fixture
def used(monkeypatch):
    """The calls that the kernel got, as (queries, prefix, whether causal); the backend is chosen by the test."""
    calls, run = [], prefix.run

    def counted(query, *args, **options):
        calls.append((query.shape[2], options["prefix"][0].shape[2], options["causal"]))
        return run(query, *args, **options)

    monkeypatch.setattr(prefix, "run", counted)
    return calls


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "llama-padded"])
@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_shared_keys_are_not_copied(kind, backend, used, monkeypatch):
    model, clean, corrupt = pair(kind)
    monkeypatch.setattr(prefix, "without_copies", lambda query, value: backend)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    for target, positions, units in (("heads", "all", HEADS), ("heads", "each", HEADS), ("residual", "each", None)):
        found = getattr(sweep, target)(positions=positions)
        expected = oracle.sweep(model, corrupt, clean, target, difference, positions, units)
        agree(found.values, expected, 1e-10, found.gap)
    assert any(causal for _, _, causal in used) == ("padded" not in kind)
    assert {before for _, before, _ in used} >= set(range(sweep.first, sweep.columns))


@pytest.mark.parametrize("causal", [True, False])
def test_masks_are_read_row_by_row_for_few_queries_only(causal, used, monkeypatch):
    model, clean, corrupt = pair("llama-padded" if not causal else "llama")
    monkeypatch.setattr(prefix, "without_copies", lambda query, value: "composed")
    monkeypatch.setattr(prefix, "FEW", 2)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    sweep.heads(positions=[-1, -2, -3, -4], layers=[0])
    sweep.residual(positions=[-4], layers=[0])
    assert {n > 2 for n, _, _ in used} == ({True, False} if causal else {False})


def test_more_keys_of_their_own_than_shared_ones(used, monkeypatch):
    model, clean, corrupt = pair("llama")
    monkeypatch.setattr(prefix, "without_copies", lambda query, value: "composed")
    monkeypatch.setattr(prefix, "FEW", 2)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    sweep.residual(positions="each")
    assert all(n <= 2 or before >= sweep.columns - before for n, before, _ in used)
    assert any(n > 2 for n, _, _ in used)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_kernel_in_the_interpreter(kind, used, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, whose own tests run the kernel")
    model, clean, corrupt = pair(kind, torch.float32)
    plain = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).heads(positions=[5, 7], layers=[0, 1])
    monkeypatch.setattr(prefix, "without_copies", lambda query, value: "fused")
    found = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).heads(positions=[5, 7], layers=[0, 1])
    agree(found.values, plain.values, 2e-5, found.gap)
    assert {causal for _, _, causal in used} == {True, False}


def test_a_plain_mask():
    causal = torch.zeros(1, 1, 4, 4).masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf)
    assert prefix.plain(causal)
    assert prefix.plain(causal.clamp(min=torch.finfo(torch.float32).min))
    for change in ((0, 0, 2, 0, -torch.inf), (0, 0, 0, 1, 0.0), (0, 0, 3, 1, 0.5)):
        other = causal.clone()
        other[change[:4]] = change[4]
        assert not prefix.plain(other)
