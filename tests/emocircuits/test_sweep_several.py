"""Several prompt pairs in one sweep: the mean of hook loops, pair by pair; killed, resumed, and refused."""

from __future__ import annotations

import functools
import weakref

import numpy as np
import pytest
import sweep_oracle as oracle
import torch
from models import IMAGE, prompt
from test_sweep_engine import HEADS, A, B, agree, difference, pair

from emocircuits.scoring.statistics import intervals
from emocircuits.sweep import Sweep, SweepResult, api, log_prob, logit_diff, progress, several
from emocircuits.sweep.targets import Target


@functools.cache
def pairs(kind, lengths=(8, 8, 8)):
    """A model and as many pairs, of different words or pictures."""
    model = pair(kind)[0]
    found = []
    for seed, length in enumerate(lengths):
        if kind == "llava":
            clean, corrupt = (prompt(model, 2, 3, seed=s) for s in (seed, seed))
            corrupt["pixel_values"] = -clean["pixel_values"] + 0.5
        else:
            clean = prompt(model, length, 0, seed=seed, sizes=[])
            corrupt = {k: v.clone() for k, v in clean.items()}
            corrupt["input_ids"][0, [3, 5]] = torch.tensor([50, 51 + seed])
        found.append((clean, corrupt))
    return model, [c for c, _ in found], [c for _, c in found]


def expected(model, clean, corrupt, target, metrics, positions, units):
    tables = [
        oracle.sweep(model, b, a, target, m, positions, units) for a, b, m in zip(clean, corrupt, metrics, strict=True)
    ]
    return torch.stack(tables)


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_the_mean_is_that_of_hook_loops(kind):
    model, clean, corrupt = pairs(kind)
    sweep = Sweep(model, clean=clean, corrupt=corrupt, metric=logit_diff(A, B), progress=False)
    places = [("heads", "all"), ("residual", "last"), ("heads", [-1])]
    for target, positions in places + ([("residual", "visual")] if kind == "llava" else []):
        units = HEADS if target == "heads" else None
        found = getattr(sweep, target)(positions=positions)
        image = (corrupt[0]["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
        at = {"last": [-1], "visual": image}.get(str(positions), positions)
        truth = expected(model, clean, corrupt, target, [difference] * 3, at, units)
        agree(found.pairs, truth, 1e-10)
        agree(found.values, truth.mean(0), 1e-10)
        with torch.no_grad():
            plain = [[float(difference(model(**x).logits)) for x in both] for both in zip(clean, corrupt, strict=True)]
        torch.testing.assert_close(found.baselines, torch.tensor(plain, dtype=torch.float64), rtol=0, atol=1e-10)
        assert (sweep.clean, sweep.corrupt) == pytest.approx((found.clean, found.corrupt), abs=1e-12)
        low, high = found.interval("values")
        theirs = intervals(truth.numpy(), torch.ones(3).numpy())
        torch.testing.assert_close(torch.stack([low, high]), torch.tensor(np.array(theirs)), rtol=0, atol=1e-8)


def test_pairs_of_different_length_and_a_metric_each():
    model, clean, corrupt = pairs("llama", (7, 9, 12))
    metrics = [logit_diff(A, B), log_prob(A), lambda x: x[0, -1, B]]
    plain = [difference, lambda x: x[0, -1].log_softmax(-1)[A], lambda x: x[0, -1, B]]
    sweep = Sweep(model, clean, corrupt, metrics, progress=False)
    agree(sweep.heads().pairs, expected(model, clean, corrupt, "heads", plain, "all", HEADS), 1e-10)
    agree(sweep.residual("last").pairs, expected(model, clean, corrupt, "residual", plain, [-1], None), 1e-10)
    assert sweep.residual("last").labels["pos"] == [0]  # another column in each pair
    with pytest.raises(ValueError, match=r"of these pairs no mean can be taken: result 1 is \[layer 3, pos 10\]"):
        sweep.residual("each")
    with pytest.raises(ValueError, match=r"pair 1 of 3: positions \[10\]: expected columns inside a prompt of 8"):
        sweep.residual([10])


def test_rows_of_batches_are_pairs():
    model, clean, corrupt = pairs("llama")
    batches = ({k: torch.cat([x[k] for x in side]) for k in side[0]} for side in (clean, corrupt))
    together = Sweep(model, *batches, logit_diff(A, B), progress=False).heads()
    alone = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).heads()
    assert torch.equal(together.pairs, alone.pairs)
    llava, with_image, other = pairs("llava")
    both = [{k: torch.cat([x[k] for x in side]) for k in side[0]} for side in (with_image, other)]
    with pytest.raises(ValueError, match="clean is a batch of 3 prompts with pixel_values, whose rows need not be"):
        Sweep(llava, *both, logit_diff(A, B))


def test_one_pair_in_a_list_is_that_pair():
    model, clean, corrupt = pairs("llama")
    found = Sweep(model, clean[:1], corrupt[:1], logit_diff(A, B), progress=False).heads()
    one = Sweep(model, clean[0], corrupt[0], logit_diff(A, B), progress=False).heads()
    assert torch.equal(found.values, one.values)
    assert found.pairs is None


def test_wrong_pairs_are_refused_before_any_runs():
    model, clean, corrupt = pairs("llama")
    metric = logit_diff(A, B)
    with pytest.raises(ValueError, match="clean has 3 prompts, corrupt 2"):
        Sweep(model, clean, corrupt[:2], metric)
    with pytest.raises(ValueError, match="clean has 0 prompts"):
        Sweep(model, [], [], metric)
    with pytest.raises(ValueError, match="clean is of several prompts, corrupt of one"):
        Sweep(model, clean, corrupt[0], metric)
    with pytest.raises(ValueError, match="2 metrics for 3 pairs"):
        Sweep(model, clean, corrupt, [metric] * 2)
    with pytest.raises(ValueError, match="2 metrics for one pair"):
        Sweep(model, clean[0], corrupt[0], [metric] * 2)
    shorter = {k: v[:, 1:] for k, v in corrupt[1].items()}
    with pytest.raises(ValueError, match="pair 2 of 3: clean has 9 tokens, corrupt 8"):
        Sweep(model, clean, [corrupt[0], shorter, corrupt[2]], metric)
    with pytest.raises(TypeError, match="pair 3 of 3: clean is str"):
        Sweep(model, [*clean[:2], "words"], corrupt, metric)
    with pytest.raises(ValueError, match="pair 1 of 1 is of several prompts itself"):
        Sweep(model, [clean], [corrupt], metric)
    with pytest.raises(TypeError, match="unexpected keyword"):
        Sweep(model, clean, corrupt, metric, colour="red")
    sweep = Sweep(model, clean, corrupt, metric, progress=False)
    with pytest.raises(AttributeError, match="base is of one pair; this sweep has 3"):
        _ = sweep.base
    with pytest.raises(ValueError, match="pair 1 of 3: no token of the prompt is VISUAL"):
        sweep.heads(positions="visual")


def test_a_folder_for_each_pair_and_another_pair_in_it_is_refused(tmp_path):
    model, clean, corrupt = pairs("llama")
    sweep = functools.partial(Sweep, model, metric=logit_diff(A, B), out=tmp_path, progress=False)
    first = sweep(clean=clean, corrupt=corrupt).heads()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0001", "0002", "0003"]
    again = sweep(clean=clean, corrupt=corrupt).heads()
    assert torch.equal(again.pairs, first.pairs)
    swapped = [clean[1], clean[0], clean[2]], [corrupt[1], corrupt[0], corrupt[2]]
    with pytest.raises(ValueError, match=r"pair 1 of 3: .*0001/heads holds another sweep: the inputs"):
        sweep(clean=swapped[0], corrupt=swapped[1]).heads()


def test_one_forecast_and_one_bar(capsys):
    model, clean, corrupt = pairs("llama", (7, 9, 12))
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B))
    sweep.heads()
    told = capsys.readouterr().err
    assert told.count("patches, ") == 1
    assert "36 patches, " in told
    assert "expected " in told
    assert told.count("heads: 100%") >= 1
    assert "36/36 patches" in told
    assert "12/12" not in told
    one = Sweep(model, clean[0], corrupt[0], logit_diff(A, B), progress=False)
    assert one.heads().values.shape == (3, 4)
    assert capsys.readouterr().err == ""


def test_small_runs_stay_in_memory_and_are_not_made_again(monkeypatch):
    model, clean, corrupt = pairs("llama", (7, 9, 12))
    made, real = [], api.trace
    monkeypatch.setattr(api, "trace", lambda *a, **k: (made.append(1), real(*a, **k))[1])
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    first = sweep.heads()
    assert torch.equal(sweep.heads().values, first.values)
    assert len(made) == 2 * 3
    assert len({id(sweep.several.sweep(i).products) for i in range(3)}) == 1
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    try:
        with pytest.raises(ValueError, match="is not what it was"):
            sweep.heads()
    finally:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] -= 1


def test_of_large_runs_one_pair_is_kept_in_memory(monkeypatch):
    monkeypatch.setattr(several, "KEPT", 0)
    model, clean, corrupt = pairs("llama", (7, 9, 12))
    made, most = [], []
    real = api.trace

    def trace(*arguments, **more):
        most.append(sum(run() is not None for run in made))
        found = real(*arguments, **more)
        made.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(api, "trace", trace)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    sweep.heads()
    assert len(most) >= 2 * 3 * 2, "each prompt when the sweep is made, and when it is swept"
    assert max(most) == 1, "the clean run of a pair while its corrupt one is made, and no others"
    assert sweep.several is not None
    assert sweep.several.sweep(1) is sweep.several.sweep(1)


def test_a_result_of_a_mean_is_what_results_are_good_for(tmp_path):
    model, clean, corrupt = pairs("llama")
    found = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).heads()
    assert {"effect_low", "effect_high"} <= set(found.to_dataframe())
    found.save(tmp_path)
    assert torch.equal(SweepResult.load(tmp_path).pairs, found.pairs)
    assert found.meta["pairs"] == 3


def test_the_bar_is_over_all_pairs_and_ends_where_it_said(tmp_path, monkeypatch):
    model, clean, corrupt = pairs("llama", (7, 9, 12))
    bars, seen = [], []
    real = progress.Bar.add

    def add(self, cost, patches):
        real(self, cost, patches)
        seen.append((self.bar.total, self.bar.n))

    monkeypatch.setattr(progress.Bar, "add", add)
    make = progress.Bar.__init__
    monkeypatch.setattr(progress.Bar, "__init__", lambda self, *a: (make(self, *a), bars.append(self))[0])
    Sweep(model, clean[:1], corrupt[:1], logit_diff(A, B), out=tmp_path, batch=1).heads()
    bars.clear()
    seen.clear()
    Sweep(model, clean, corrupt, logit_diff(A, B), out=tmp_path, batch=1).heads()
    (bar,) = bars
    # What the first pair has on disk says nothing about how long the others take.
    assert 0 < bar.bar.initial < bar.bar.total
    totals = [total for total, _ in seen]
    assert max(totals) == pytest.approx(min(totals)), "known before the run"
    assert bar.bar.n == pytest.approx(bar.bar.total, rel=1e-9)
    assert len({n for _, n in seen}) > 10
    assert (bar.done, bar.patches) == (36, 36)
    alone = [
        sum(w.forecast(Target("heads"), w.variants(Target("heads"), list(range(4)), "all", None)[0]).costs)
        for w in (Sweep(model, a, b, logit_diff(A, B), progress=False) for a, b in zip(clean, corrupt, strict=True))
    ]
    assert bar.bar.total == pytest.approx(sum(alone), rel=1e-4)
    assert bar.bar.initial == pytest.approx(alone[0], rel=1e-4)


def test_every_target_goes_over_pairs():
    parts = {"table", "collected"}  # of one pair, which targets are made of
    for name, method in vars(Sweep).items():
        gives = getattr(method, "__annotations__", {}).get("return")
        if gives == "SweepResult" and not name.startswith("_") and name not in parts:
            assert hasattr(method, "__wrapped__"), f"{name} lacks @over_pairs"
