"""Prescreened sweeps: exact where they say so, reports that can be counted again, folders that go on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from test_sweep_engine import A, B, pair

from emocircuits.sweep import Sweep, SweepResult, interaction, logit_diff
from emocircuits.sweep.combinations import strongest
from emocircuits.sweep.resume import Decoder

TARGETS = ("heads", "neurons", "residual", "attn_out", "mlp_out", "qkv")


def make(kind="llama", **more):
    model, clean, corrupt = pair(kind)
    return Sweep(model, clean, corrupt, logit_diff(A, B), progress=False, **more)


@pytest.mark.parametrize("target", TARGETS)
def test_exact_where_it_says_so(target):
    sweep = make("llama-padded")
    found = getattr(sweep, target)(positions="each", prescreen="atp*", confirm=5, sample=4)
    whole = getattr(sweep, target)(positions="each").values
    guess = sweep.attribute(target, "atp*", "each").values
    torch.testing.assert_close(found.values[found.exact], whole[found.exact], rtol=0, atol=1e-10)
    assert torch.equal(found.values[~found.exact], guess[~found.exact])
    # Columns before the prompts differ change nothing; the others are as many as were asked for.
    assert bool(found.exact[:, : sweep.first].all())
    report = found.meta["prescreen"]
    assert int(found.exact.sum()) == report["without_effect"] + 9
    # The strongest estimates of those that can have an effect are among them.
    moved = (guess - sweep.corrupt).abs()
    live = torch.ones_like(moved, dtype=torch.bool)
    live[:, : sweep.first] = False
    if target != "residual" and target != "qkv":
        live[2, : sweep.columns - 1] = False  # the last layer is read in its last column
    strongest = moved.where(live, -torch.ones(())).flatten().argsort(descending=True, stable=True)[:5]
    assert bool(found.exact.flatten()[strongest].all())


def test_the_report():
    sweep = make("qwen2")
    found = sweep.heads(positions="each", prescreen="atp", confirm=12, sample=20, sample_seed=3)
    again = sweep.heads(positions="each", prescreen="atp", confirm=12, sample=20, sample_seed=3)
    assert torch.equal(found.values, again.values)
    assert found.meta == again.meta
    report = found.meta["prescreen"]
    guess = (sweep.attribute("heads", "atp", "each").values - sweep.corrupt).abs().flatten().numpy()
    truth = (sweep.heads(positions="each").values - sweep.corrupt).abs().flatten().numpy()
    run = found.exact.flatten().numpy() & (truth > 0)
    order = np.argsort(-np.where(run, guess, -1.0), kind="stable")
    confirmed, drawn = order[:12], [i for i in order[12:] if run[i]]
    assert len(drawn) == 20
    assert report["rank_confirmed"] == pytest.approx(stats.spearmanr(guess[confirmed], truth[confirmed])[0])
    assert report["rank_sampled"] == pytest.approx(stats.spearmanr(guess[drawn], truth[drawn])[0])
    misses = int((truth[drawn] > truth[confirmed].min()).sum())
    assert report["misses"] == misses
    assert report["miss_share_below"] == pytest.approx(stats.beta.ppf(0.95, misses + 1, 20 - misses))
    other = sweep.heads(positions="each", prescreen="atp", confirm=12, sample=20, sample_seed=4)
    assert not torch.equal(other.exact, found.exact)


def test_all_confirmed_is_the_exact_table():
    sweep = make()
    found = sweep.heads(positions="each", prescreen="ig", confirm=10_000)
    assert bool(found.exact.all())
    torch.testing.assert_close(found.values, sweep.heads(positions="each").values, rtol=0, atol=1e-10)
    assert found.meta["prescreen"]["miss_share_below"] is None
    # Everything that was not confirmed can be drawn.
    assert bool(sweep.heads(positions="each", prescreen="atp", confirm=3, sample=10_000).exact.all())


def test_top_tables_and_files(tmp_path):
    found = make().heads(positions="each", prescreen="atp", confirm=4, sample=3)
    top = found.top(200)
    flags = [place["exact"] for place in top]
    assert flags == sorted(flags, reverse=True)
    assert flags[:7] == [True] * 7
    table = found.to_dataframe()
    assert table.exact.sum() == int(found.exact.sum())
    found.save(tmp_path)
    again = SweepResult.load(tmp_path)
    assert torch.equal(again.exact, found.exact)
    assert again.meta == found.meta
    assert len(found.plot().data) == 1


def test_a_stopped_one_goes_on(tmp_path, monkeypatch):
    options = dict(positions="each", prescreen="atp*", confirm=8, sample=4)
    expected = make().heads(**options)
    real, calls = Decoder.run, []

    def run(self, layer, packed):
        calls.append(layer)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, layer, packed)

    monkeypatch.setattr(Decoder, "run", run)
    with pytest.raises(KeyboardInterrupt):
        make(out=tmp_path, batch=1).heads(**options)
    before = len(calls)
    found = make(out=tmp_path, batch=1).heads(**options)
    assert len(calls) - before < before + 8
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-10)
    assert torch.equal(found.exact, expected.exact)
    make(out=tmp_path).heads(positions="each")  # the whole table is in a folder of its own
    with pytest.raises(ValueError, match="holds another sweep"):
        make(out=tmp_path).heads(**{**options, "sample_seed": 1})


def three(**more):
    model, clean, corrupt = pair("llama")
    ids = torch.cat([clean["input_ids"], corrupt["input_ids"]])
    other = {"input_ids": ids[1:].flip(1), "attention_mask": torch.ones_like(ids[1:])}
    last = {"input_ids": other["input_ids"].clone(), "attention_mask": other["attention_mask"]}
    last["input_ids"][0, -2] = 12  # of this pair only two columns can change anything
    sides = [clean, corrupt, other], [corrupt, clean, last]
    return Sweep(model, *sides, logit_diff(A, B), progress=False, **more)


@pytest.mark.parametrize("target", ["heads", "residual"])
def test_several_pairs_run_the_same_patches(target):
    options = dict(positions="each", prescreen="atp*", confirm=6, sample=4)
    sweep = three()
    found = getattr(sweep, target)(**options)
    whole = getattr(sweep, target)(positions="each")
    guess = sweep.attribute(target, "atp*", "each")
    report = found.meta["prescreen"]
    assert int(found.exact.sum()) == report["without_effect"] + 10
    torch.testing.assert_close(found.values[found.exact], whole.values[found.exact], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.pairs[:, found.exact], whole.pairs[:, found.exact], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.values[~found.exact], guess.values[~found.exact])
    # The strongest are those of the mean estimate, among what changes something in a pair.
    live = (whole.pairs - whole.baselines[:, 1].reshape(-1, *[1] * len(whole.axes))).abs().amax(0) > 0
    moved = (guess.values - guess.corrupt).abs().where(live, -torch.ones(())).flatten()
    strongest = moved.argsort(descending=True, stable=True)[:6]
    assert bool(found.exact.flatten()[strongest].all())
    truth = (whole.values - whole.corrupt).abs().flatten()
    assert report["weakest_confirmed"] == pytest.approx(float(truth[strongest].min()))
    assert report["rank_confirmed"] == pytest.approx(stats.spearmanr(moved[strongest], truth[strongest])[0])
    assert report["confirmed"] == 6
    assert report["sampled"] == 4


def test_several_screened_pairs_go_on(tmp_path, monkeypatch):
    options = dict(positions="each", prescreen="atp", confirm=8, sample=4)
    expected = three().heads(**options)
    real, calls = Decoder.run, []

    def run(self, layer, packed):
        calls.append(layer)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, layer, packed)

    monkeypatch.setattr(Decoder, "run", run)
    with pytest.raises(KeyboardInterrupt):
        three(out=tmp_path, batch=1).heads(**options)
    before = len(calls)
    found = three(out=tmp_path, batch=1).heads(**options)
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-10)
    assert torch.equal(found.exact, expected.exact)
    again = len(calls)
    three(out=tmp_path, batch=1).heads(**options)
    assert len(calls) == again > before


def test_one_pair_in_a_list_is_that_pair():
    model, clean, corrupt = pair("llama")
    options = dict(prescreen="atp", confirm=4, sample=3)
    one = Sweep(model, [clean], [corrupt], logit_diff(A, B), progress=False).heads(**options)
    alone = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).heads(**options)
    assert torch.equal(one.values, alone.values)
    assert torch.equal(one.exact, alone.exact)
    assert one.meta["prescreen"] == alone.meta["prescreen"]


def test_refusals():
    sweep = make()
    for options, match in (
        (dict(confirm=3), "name prescreen="),
        (dict(prescreen="atp", confirm=0), "expected at least 1"),
        (dict(prescreen="eap"), "expected one of atp"),
    ):
        with pytest.raises(ValueError, match=match):
            sweep.heads(**options)


def test_estimates_are_no_single_heads():
    """Interactions are measured from patches that were run, and the strongest heads are those."""
    sweep = make()
    found = sweep.heads(prescreen="atp", confirm=4, sample=0)
    best = strongest(found, 4)
    assert [(p["layer"], p["head"]) for p in found.top(4)] == best
    pairs = sweep.combinations(best)
    torch.testing.assert_close(interaction(pairs, found), interaction(pairs, sweep.heads()))
    other = next((l, h) for l in range(2) for h in range(4) if not found.exact[l, h])
    with pytest.raises(ValueError, match="is not among the single heads"):
        interaction(sweep.combinations([best[0], other]), found)
    with pytest.raises(ValueError, match="estimates of attribution"):
        interaction(pairs, sweep.attribute())
