"""Figures of every kind of table, names of tokens, and results beside one another."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from emocircuits.scoring.statistics import intervals
from emocircuits.sweep.heatmap import VIEWS, axes
from emocircuits.sweep.results import SweepResult

SIZES = {
    "layer": 3, "pos": 4, "head": 2, "route": 3, "combination": 6, "alpha": 5, "vector": 2, "beta": 4, "gamma": 3,
    "reading": 2, "key": 4,
}  # fmt: skip
TABLES = {  # how it is drawn: up, to the right, in the menu
    ("layer",): ("layer", "", ()),
    ("combination",): ("combination", "", ()),
    ("alpha",): ("alpha", "", ()),
    ("layer", "pos"): ("layer", "pos", ()),
    ("combination", "pos"): ("combination", "pos", ()),
    ("layer", "alpha"): ("layer", "alpha", ()),
    ("beta", "gamma"): ("beta", "gamma", ()),
    ("layer", "pos", "head"): ("layer", "pos", ("head",)),
    ("layer", "head", "route"): ("layer", "head", ("route",)),
    ("vector", "layer", "alpha"): ("layer", "alpha", ("vector",)),
    ("reading", "beta", "gamma"): ("beta", "gamma", ("reading",)),
    ("reading", "layer"): ("reading", "layer", ()),
    ("layer", "head", "pos", "key"): ("layer", "head", ("pos", "key")),
    ("vector", "reading", "beta", "gamma"): ("beta", "gamma", ("vector", "reading")),
    ("vector", "head", "layer"): ("layer", "vector", ("head",)),
}


def result(names, pairs=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = {a: [f"{a[0]}{i}" if a in ("route", "combination") else i for i in range(SIZES[a])] for a in names}

    def one(i):
        values = torch.randn([SIZES[a] for a in names], dtype=torch.float64, generator=g)
        return SweepResult(values, 3.0 + i, 1.0, names, labels, {"target": "heads", "dtype": "float32"})

    return SweepResult.mean([one(i) for i in range(pairs)])


@pytest.mark.parametrize("names", TABLES)
@pytest.mark.parametrize("pairs", [1, 3])
def test_a_figure_of_every_table(names, pairs):
    r = result(names, pairs)
    up, right, menu = TABLES[names]
    assert axes(r) == (up, right, menu)
    drawn = r.plot()
    trace = drawn.data[0]
    assert np.asarray(trace.z).shape == (SIZES[up], SIZES.get(right, 1))
    assert [str(n) for n in r.labels[up]] == list(trace.y)
    table = r.effects.numpy()
    buttons = drawn.layout.updatemenus[0].buttons if menu else ()
    chosen = list(itertools.product(*(range(SIZES[a]) for a in menu)))
    assert len(buttons) == (len(chosen) + 1 if menu else 0)

    def cell(i, j, extra):
        where = {up: i, right: j, **dict(zip(menu, extra, strict=True))}
        return table[tuple(where[a] for a in names)]

    for i, j in itertools.product(range(SIZES[up]), range(SIZES.get(right, 1))):
        every = [cell(i, j, extra) for extra in chosen]
        strongest = max(every, key=abs)
        assert trace.z[i][j] == pytest.approx(strongest)
        for button, value in zip(buttons[1:], every if menu else [], strict=True):
            assert button.args[0]["z"][0][i][j] == pytest.approx(value)
        where, of, metric, *bounds = trace.customdata[i][j]
        assert str(where) == (str(r.labels[right][j]) if right else "all positions" if up == "layer" else "")
        assert metric == pytest.approx(1.0 + strongest * r.gap)
        assert len(bounds) == (2 if pairs > 1 else 0)
        if bounds:
            assert bounds[0] <= strongest <= bounds[1]
        for axis, k in zip(menu, chosen[every.index(strongest)], strict=True):
            assert f"{axis} {r.labels[axis][k]}" in of


def test_many_entries_are_not_all_in_the_menu(tmp_path):
    labels = {"layer": [0, 1], "pos": [0, 1], "head": list(range(VIEWS + 1))}
    r = SweepResult(torch.rand(2, 2, VIEWS + 1).double(), 1.0, 0.0, ("layer", "pos", "head"), labels)
    drawn = r.plot(tmp_path / "x.html")
    assert not drawn.layout.updatemenus
    assert np.allclose(drawn.data[0].z, r.values.amax(-1))
    page = (tmp_path / "x.html").read_text()
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page, "one file, no network"


class Words:
    def convert_ids_to_tokens(self, ids):
        return [f"Ġw{i}" for i in ids]


def test_tokens_name_positions():
    r = result(("layer", "pos", "head"))
    named = r.with_tokens(Words(), {"input_ids": torch.tensor([[7, 8, 9, 10]])})
    assert named.labels["token"] == [" w7", " w8", " w9", " w10"]
    assert named.to_dataframe()["token"].tolist()[:3] == [" w7", " w7", " w8"]
    assert "3  w10" in named.plot().layout.xaxis.ticktext[3]
    assert torch.equal(named.values, r.values)
    with pytest.raises(ValueError, match="positions 3 are not columns of a prompt of 2 tokens"):
        r.with_tokens(Words(), {"input_ids": torch.tensor([7, 8])})
    with pytest.raises(ValueError, match="no positions to name"):
        result(("layer", "head")).with_tokens(Words(), {"input_ids": torch.tensor([[7]])})


def test_a_notebook_shows_the_strongest():
    r = result(("layer", "combination"), pairs=3)
    page = r._repr_html_()
    assert "SweepResult([layer 3, combination 6]" in page
    for column in ("layer", "combination", "value", "effect", "effect_low", "effect_high"):
        assert f"<th>{column}</th>" in page
    best = r.top(1)[0]
    assert f"<td>{best['combination']}</td>" in page
    low, high = r.interval()
    at = r.labels["layer"].index(best["layer"]), r.labels["combination"].index(best["combination"])
    assert (best["effect_low"], best["effect_high"]) == pytest.approx((float(low[at]), float(high[at])))
    assert "effect_low" not in result(("layer",)).top(1)[0]


def test_two_results_of_the_same_pairs():
    a, b = (result(("layer", "head"), pairs=7, seed=s) for s in (0, 1))
    difference, low, high = a.less(b)
    assert torch.allclose(difference, a.effects - b.effects)
    drawn = np.random.default_rng(0).integers(7, size=(2000, 7))

    def effects(r, rows):
        baselines = r.baselines.numpy()[rows]
        gap = (baselines[:, 0] - baselines[:, 1]).sum()
        return (r.pairs.numpy()[rows] - baselines[:, 1, None, None]).sum(0) / gap

    resampled = np.stack([effects(a, rows) - effects(b, rows) for rows in drawn])
    assert np.allclose(np.percentile(resampled, [2.5, 97.5], axis=0), torch.stack([low, high]).numpy())
    # What pairs have in common goes away, as in a paired bootstrap of SciPy's.
    shifted = SweepResult.mean(
        [
            SweepResult(p + 0.25, float(c), float(d), a.axes, {k: a.labels[k] for k in a.axes}, {"target": "heads"})
            for p, (c, d) in zip(a.pairs, a.baselines, strict=True)
        ]
    )
    difference, low, high = shifted.less(a, of="values")
    for part in (difference, low, high):
        assert torch.allclose(part, torch.tensor(0.25).double())
    one = a.pairs[:, 0, 0].numpy(), b.pairs[:, 0, 0].numpy()
    _, low, high = a.less(b, of="values", resamples=20_000)
    theirs = stats.bootstrap(one, lambda x, y, axis=-1: x.mean(axis) - y.mean(axis), paired=True, method="percentile")
    span = float(high[0, 0] - low[0, 0])
    assert float(low[0, 0]) == pytest.approx(theirs.confidence_interval.low, abs=0.05 * span)
    assert float(high[0, 0]) == pytest.approx(theirs.confidence_interval.high, abs=0.05 * span)


def test_results_of_other_pairs_are_not_compared():
    a = result(("layer", "head"), pairs=3)
    for other in (result(("layer", "head")), result(("layer", "pos"), pairs=3), result(("layer", "head"), pairs=4)):
        with pytest.raises(ValueError, match=r"of the same pairs|of one shape over the same pairs"):
            a.less(other)
    with pytest.raises(ValueError, match="not of the same pairs of prompts"):
        a.less(SweepResult(a.values, a.clean, a.corrupt, a.axes, a.labels, {"of_pairs": "x"}, a.pairs, a.baselines))
    with pytest.raises(ValueError, match="less has"):
        intervals(np.zeros((3, 2)), np.ones(3), less=(np.zeros((3, 1)), np.ones(3)))
