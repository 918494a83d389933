"""What a sweep found: effects, means over pairs, tables, figures, files."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from emocircuits.scoring.statistics import interval, intervals
from emocircuits.sweep.results import FILE, SweepResult

LABELS = {"layer": [0, 1], "pos": [0, 1, 2], "head": [0, 1, 2, 3], "token": ["a", "b", "c"]}


def result(seed=0, clean=3.0, corrupt=1.0, axes=("layer", "pos", "head"), **more):
    values = torch.randn(
        [len(LABELS[a]) for a in axes], dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    labels = {k: v for k, v in LABELS.items() if k in axes or (k == "token" and "pos" in axes)}
    return SweepResult(values, clean, corrupt, axes, labels, {"target": "heads", "dtype": "float32", **more})


def test_effects_are_0_at_corrupt_and_1_at_clean():
    r = SweepResult(torch.tensor([3.0, 1.0, 2.0, 5.0]).double(), 3.0, 1.0, ("layer",), {"layer": [0, 1, 2, 3]})
    assert r.effects.tolist() == [1.0, 0.0, 0.5, 2.0]
    turned = SweepResult(torch.tensor([3.0, 1.0]).double(), 1.0, 3.0, ("layer",), {"layer": [0, 1]})
    assert turned.effects.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("clean", "corrupt"), [(2.0, 2.0), (2.0, 2.0 + 2e-7), (0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0)]
)
def test_effects_of_equal_baselines_are_refused_and_values_stay(clean, corrupt, tmp_path):
    r = result(clean=clean, corrupt=corrupt)
    with pytest.raises(ValueError, match="do not differ"):
        _ = r.effects
    frame = r.to_dataframe()
    assert frame["effect"].isna().all()
    assert torch.equal(torch.tensor(frame["value"].to_numpy()), r.values.flatten())
    assert r.top(1)[0]["effect"] is None
    if math.isfinite(clean):
        r.plot(tmp_path / "plot.html")
    r.save(tmp_path)
    assert torch.equal(SweepResult.load(tmp_path).values, r.values)


def test_what_counts_as_equal_follows_the_dtype_of_the_model():
    assert result(clean=2.0, corrupt=2.01, dtype="float32").measurable
    assert not result(clean=2.0, corrupt=2.01, dtype="bfloat16").measurable
    assert result(clean=2.0, corrupt=2.0 + 1e-9, dtype="float64").measurable


def test_a_table_that_does_not_fit_its_labels_is_refused():
    with pytest.raises(ValueError, match=r"values are \[2, 3\]: expected \[2, 4\]"):
        SweepResult(torch.zeros(2, 3).double(), 1.0, 0.0, ("layer", "head"), {"layer": [0, 1], "head": [0, 1, 2, 3]})
    with pytest.raises(TypeError, match="float64"):
        SweepResult(torch.zeros(2), 1.0, 0.0, ("layer",), {"layer": [0, 1]})


def test_dataframe_has_one_row_a_patch():
    r = result()
    frame = r.to_dataframe()
    assert list(frame.columns) == ["layer", "pos", "token", "head", "value", "effect"]
    assert len(frame) == 24
    for row in frame.itertuples():
        assert row.value == r.values[row.layer, row.pos, row.head]
        assert row.effect == r.effects[row.layer, row.pos, row.head]
        assert row.token == "abc"[row.pos]


def test_top_is_sorted_by_what_it_moves():
    r = result()
    moved = [abs(t["value"] - 1.0) for t in r.top(24)]
    assert moved == sorted(moved, reverse=True)
    best = r.top(1)[0]
    assert best["value"] == r.values[best["layer"], best["pos"], best["head"]]
    assert moved[0] == float((r.values - 1.0).abs().max())


def test_mean_over_pairs_is_the_ratio_of_means():
    rs = [result(i, clean=2.0 + i, corrupt=float(i % 2)) for i in range(4)]
    m = SweepResult.mean(rs)
    assert torch.allclose(m.values, sum(r.values for r in rs) / 4)
    assert (m.clean, m.corrupt) == (3.5, 0.5)
    share = sum(r.values - r.corrupt for r in rs) / sum(r.clean - r.corrupt for r in rs)
    assert torch.allclose(m.effects, share)
    low, high = m.interval()
    assert (low <= m.effects + 1e-12).all()
    assert (high >= m.effects - 1e-12).all()
    frame = m.to_dataframe()
    assert {"effect_low", "effect_high"} <= set(frame.columns)


def test_intervals_are_those_of_scipy():
    rng = np.random.default_rng(0)
    sums, sizes = rng.normal(1, 1, (30, 3)), rng.uniform(1, 2, 30)
    low, high = intervals(sums, sizes, resamples=20000)
    for k in range(3):
        expected = interval(sums[:, k], sizes, resamples=20000)
        assert low[k] == pytest.approx(expected[0], abs=0.02)
        assert high[k] == pytest.approx(expected[1], abs=0.02)
    # A mean is the ratio with sizes of 1.
    plain = stats.bootstrap(
        (sums[:, 0],), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(1)
    )
    got = intervals(sums[:, :1], np.ones(30), resamples=20000)
    assert got[0][0] == pytest.approx(plain.confidence_interval.low, abs=0.02)
    with pytest.raises(ValueError, match="at least 2"):
        intervals(sums[:1], sizes[:1])


def test_a_mean_of_different_sweeps_is_refused():
    with pytest.raises(ValueError, match="result 1 is"):
        SweepResult.mean([result(), result(axes=("layer", "head"))])
    with pytest.raises(ValueError, match="result 1 is"):
        SweepResult.mean([result(), result(target="residual")])
    with pytest.raises(ValueError, match="no results"):
        SweepResult.mean([])
    two = SweepResult.mean([result(), result(1)])
    with pytest.raises(ValueError, match="mean of pairs already"):
        SweepResult.mean([two, result()])
    with pytest.raises(ValueError, match="several pairs"):
        result().interval()


def test_positions_that_differ_between_pairs_are_numbered():
    a, b = result(0), result(1)
    elsewhere = {**b.labels, "pos": [4, 5, 6], "token": ["x", "y", "z"]}
    m = SweepResult.mean([a, SweepResult(b.values, 3.0, 1.0, b.axes, elsewhere, b.meta)])
    assert m.labels["pos"] == [0, 1, 2]
    assert "token" not in m.labels


@pytest.mark.parametrize("pairs", [1, 3])
def test_save_and_load(tmp_path, pairs):
    r = SweepResult.mean([result(i) for i in range(pairs)])
    r.save(tmp_path)
    r.save(tmp_path)
    back = SweepResult.load(tmp_path)
    assert torch.equal(back.values, r.values)
    assert (back.clean, back.corrupt, back.axes, back.labels, back.meta) == (
        r.clean,
        r.corrupt,
        r.axes,
        r.labels,
        r.meta,
    )
    assert (back.pairs is None) == (pairs == 1)
    assert len(list(tmp_path.iterdir())) == 2
    other = result(9)
    other.save(tmp_path)
    assert torch.equal(SweepResult.load(tmp_path).values, other.values)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_result_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        SweepResult.load(tmp_path)
    result().save(tmp_path)
    tensors = next(tmp_path.glob("*.safetensors"))
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-1] + b"\x00" if data[-1] else data[:-1] + b"\x01")
    with pytest.raises(ValueError, match="damaged"):
        SweepResult.load(tmp_path)
    tensors.unlink()
    with pytest.raises(ValueError, match="cannot read the values"):
        SweepResult.load(tmp_path)
    (tmp_path / FILE).write_text(json.dumps({"format": "something else"}))
    with pytest.raises(ValueError, match="not the result of a sweep"):
        SweepResult.load(tmp_path)


@pytest.mark.parametrize("axes", [("layer",), ("layer", "head"), ("layer", "pos"), ("layer", "pos", "head")])
def test_plot_shows_the_effects(axes, tmp_path):
    r = result(axes=axes)
    figure = r.plot(tmp_path / "plot.html")
    page = (tmp_path / "plot.html").read_text()
    assert "Plotly.newPlot" in page
    z = np.asarray(figure.data[0].z)
    if len(axes) == 3:
        expected = r.effects.numpy()
        best = np.abs(expected).argmax(-1)
        assert np.allclose(z, np.take_along_axis(expected, best[..., None], -1)[..., 0])
        buttons = figure.layout.updatemenus[0].buttons
        assert [b.label for b in buttons] == ["strongest head", "head 0", "head 1", "head 2", "head 3"]
        assert np.allclose(np.asarray(buttons[2].args[0]["z"][0]), expected[..., 1])
    else:
        assert np.allclose(z, r.effects.reshape(2, -1).numpy())
    assert figure.data[0].zmin == -figure.data[0].zmax
