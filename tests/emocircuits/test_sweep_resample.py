"""Patches from drawn prompts against a hook loop with the same draws, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import sweep_oracle as oracle
import torch
from test_sweep_combinations import CHOSEN, hooked
from test_sweep_engine import HEADS, A, B, agree, difference, model_width, pair

from emocircuits.sweep import Sweep, SweepResult, logit_diff
from emocircuits.sweep.resume import Decoder

WORDS = ((3, 50), (5, 17), (6, 33))  # each prompt changes one token, one of them later than others


def prompts_of(kind):
    """A model, a pair, and three more prompts of the same length."""
    model, clean, corrupt = pair(kind)
    others = []
    for i, (column, word) in enumerate(WORDS):
        other = {k: v.clone() for k, v in clean.items()}
        if "pixel_values" in other:
            other["pixel_values"] = clean["pixel_values"] * (0.5 - i) + 0.1 * i
        other["input_ids"][0, column - 10 * ("padded" in kind and "llava" in kind)] = word
        others.append(other)
    if kind.startswith("llava"):
        for other, given in zip(others, (clean, clean, clean), strict=True):
            other["input_ids"] = given["input_ids"].clone()
    return model, clean, corrupt, others


def drawn(seed, layer, column, unit, prompts, draws):
    """The prompts of one patch, as the documentation says."""
    key = [seed, layer, 0 if column is None else column + 1, 0 if unit is None else unit + 1]
    return np.random.default_rng(key).permutation(prompts)[:draws].tolist()


def by_hand(model, base, others, kind, positions, units, seed, draws, layers=(0, 1, 2)):
    """``[draw, layer, pos, unit]``, axes that do not exist left out."""
    kept = [oracle.record(model, other, kind) for other in others]
    total = base["input_ids"].shape[1]
    columns = [None] if positions == "all" else list(range(total)) if positions == "each" else positions
    entries = [slice(None)] if units is None else units
    table = torch.zeros(draws, len(layers), len(columns), len(entries), dtype=torch.float64)
    for i, layer in enumerate(layers):
        for j, c in enumerate(columns):
            for u, e in enumerate(entries):
                chosen = drawn(seed, layer, c, None if units is None else u, len(others), draws)
                for d, which in enumerate(chosen):
                    where = range(total) if c is None else [c]
                    new = kept[which][layer]
                    table[d, i, j, u] = float(
                        difference(oracle.patched_logits(model, base, kind, layer, where, e, new))
                    )
    table = table[:, :, 0] if positions == "all" else table
    return table[..., 0] if units is None else table


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "llava", "llama-padded", "llava-padded"])
@pytest.mark.parametrize("positions", ["all", "each"])
def test_heads_and_residual(kind, positions):
    model, clean, corrupt, others = prompts_of(kind)
    layers = [0, 2] if kind.startswith("llava") else [0, 1, 2]
    if kind.startswith("llava") and positions == "each":
        positions = [4, -6 % clean["input_ids"].shape[1], clean["input_ids"].shape[1] - 1]
    more = dict(patch_with="resample", resample=others, draws=2, seed=7, direction="noise", progress=False)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), **more)
    for target, units in (("heads", HEADS), ("residual", None)):
        found = getattr(sweep, target)(positions=positions, layers=layers)
        expected = by_hand(model, clean, others, target, positions, units, 7, 2, layers)
        agree(found.draws, expected, 1e-10, found.gap)
        torch.testing.assert_close(found.values, found.draws.mean(0), rtol=0, atol=1e-12)
        assert "draw" not in found.axes
        assert (found.meta["draws"], found.meta["seed"], found.meta["patch_with"]) == (2, 7, "resample")


@pytest.mark.parametrize("target", ["neurons", "attn_out", "mlp_out", "qkv"])
def test_other_targets(target):
    model, clean, corrupt, others = prompts_of("gpt2")
    more = dict(patch_with="resample", resample=others, draws=1, seed=3, progress=False)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), **more)
    width = model_width(model)
    units = {
        "neurons": [list(range(width // 2)), list(range(width // 2, width))],
        "qkv": [slice(8 * i, 8 * i + 8) for i in range(12)],
    }.get(target)
    options = {"groups": units} if target == "neurons" else {}
    for positions in ("all", [3, 6, 8]):
        found = getattr(sweep, target)(positions=positions, **options)
        expected = by_hand(model, corrupt, others, target, positions, units, 3, 1)
        agree(found.draws, expected, 1e-10, found.gap)


def test_combinations():
    """All heads of a set come from one prompt."""
    model, clean, corrupt, others = prompts_of("llama")
    more = dict(patch_with="resample", resample=others, draws=2, seed=1, direction="noise", progress=False)
    found = Sweep(model, clean, corrupt, logit_diff(A, B), **more).combinations(CHOSEN)
    kept = [oracle.record(model, other, "heads") for other in others]
    expected = torch.zeros(2, 10, dtype=torch.float64)
    for i, label in enumerate(found.labels["combination"]):
        heads = [tuple(map(int, name.split("."))) for name in label.split("+")]
        for d, which in enumerate(drawn(1, heads[0][0], None, i, 3, 2)):
            logits = hooked(model, clean, kept[which], heads, range(clean["input_ids"].shape[1]))
            expected[d, i] = float(difference(logits))
    agree(found.draws, expected, 1e-10, found.gap)


def test_draws():
    model, clean, corrupt, others = prompts_of("llama")

    def sweep(**more):
        given = dict(patch_with="resample", resample=others, direction="noise", progress=False) | more
        return Sweep(model, clean, corrupt, logit_diff(A, B), **given)

    # All prompts: no chance in it. The mean is that of whole sweeps, one from each prompt.
    every = [sweep(draws=3, seed=s).heads().values for s in (0, 5)]
    torch.testing.assert_close(every[0], every[1], rtol=0, atol=1e-12)
    whole = [Sweep(model, clean, o, logit_diff(A, B), direction="noise", progress=False).heads().values for o in others]
    torch.testing.assert_close(every[0], torch.stack(whole).mean(0), rtol=0, atol=1e-10)
    # A seed is a table, another seed another one; a part of a table is that part.
    one = sweep(seed=4).heads("each").values
    assert torch.equal(one, sweep(seed=4).heads("each").values)
    assert float((one - sweep(seed=5).heads("each").values).abs().max()) > 1e-3
    part = sweep(seed=4).heads(positions=[5, 3], layers=[1]).values
    torch.testing.assert_close(part, one[1:2, [5, 3]], rtol=0, atol=1e-12)
    # Not what zeros or the pair's other prompt would give; routes take nothing from prompts.
    assert (
        float((sweep(draws=3).heads().values - sweep(patch_with="zero", resample=None).heads().values).abs().max())
        > 1e-3
    )
    routes = [s.routes().values for s in (sweep(), sweep(patch_with="clean", resample=None))]
    torch.testing.assert_close(*routes, rtol=0, atol=1e-12)


def test_intervals_and_saving(tmp_path):
    model, clean, corrupt, others = prompts_of("llama")
    more = dict(patch_with="resample", resample=others, direction="noise", progress=False)
    found = Sweep(model, clean, corrupt, logit_diff(A, B), draws=3, **more).heads()
    low, high = found.interval("values")
    assert bool(((low <= found.values + 1e-9) & (found.values <= high + 1e-9)).all())
    assert float((high - low).max()) > 1e-3
    assert "effect_low" in found.to_dataframe()
    found.save(tmp_path)
    again = SweepResult.load(tmp_path)
    assert torch.equal(again.draws, found.draws)
    assert torch.equal(again.interval()[0], found.interval()[0])
    one = Sweep(model, clean, corrupt, logit_diff(A, B), draws=1, **more).heads()
    with pytest.raises(ValueError, match="several draws"):
        one.interval()
    assert "effect_low" not in one.to_dataframe()
    mean = SweepResult.mean([found, found])
    assert mean.draws is None
    assert mean.interval()[0].shape == found.values.shape


def test_several_pairs():
    model, clean, corrupt, others = prompts_of("llama")
    more = dict(patch_with="resample", resample=others, draws=2, direction="noise", progress=False)
    both = Sweep(model, [clean, others[0]], [corrupt, corrupt], logit_diff(A, B), **more).heads()
    each = [Sweep(model, c, corrupt, logit_diff(A, B), **more).heads() for c in (clean, others[0])]
    torch.testing.assert_close(both.pairs, torch.stack([e.values for e in each]), rtol=0, atol=1e-10)
    assert both.interval()[0].shape == both.values.shape


def test_what_is_free_is_not_run_and_counted_so(monkeypatch):
    model, clean, corrupt, others = prompts_of("llama")
    told, ran = [], []
    real, run = Sweep.forecast, Decoder.run
    monkeypatch.setattr(Sweep, "forecast", lambda self, *a, **k: told.append(real(self, *a, **k)) or told[-1])
    monkeypatch.setattr(
        Decoder, "run", lambda self, layer, packed: ran.append(len(packed.x)) or run(self, layer, packed)
    )
    more = dict(patch_with="resample", resample=others, draws=3, direction="noise", progress=False)
    found = Sweep(model, clean, corrupt, logit_diff(A, B), **more).residual(positions=[2, 4, 6], layers=[0])
    # Column 2 is before all differences, column 4 after one of them, column 6 after two of them and in the third.
    assert sum(ran) == 1 + 3
    assert told[-1].patches == 9
    assert told[-1].no_ops == 9 - sum(ran)
    assert sum(not c for c in told[-1].costs) == 9 - sum(ran)
    assert float(found.values[0, 0]) == found.clean


def test_a_stopped_sweep_goes_on(tmp_path, monkeypatch):
    model, clean, corrupt, others = prompts_of("llama")

    def sweep(**more):
        given = dict(patch_with="resample", resample=others, draws=2, batch=1, progress=False, out=tmp_path) | more
        return Sweep(model, clean, corrupt, logit_diff(A, B), **given)

    expected = sweep(out=None).heads()
    real, calls = Decoder.run, []

    def run(self, layer, packed):
        calls.append(layer)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return real(self, layer, packed)

    monkeypatch.setattr(Decoder, "run", run)
    with pytest.raises(KeyboardInterrupt):
        sweep().heads()
    assert len(calls) == 11
    found = sweep().heads()
    torch.testing.assert_close(found.draws, expected.draws, rtol=0, atol=1e-10)
    before = len(calls)
    sweep().heads()
    assert len(calls) == before
    for other in ({"seed": 1}, {"draws": 1}, {"resample": others[::-1]}, {"patch_with": "zero", "resample": None}):
        with pytest.raises(ValueError, match="another sweep"):
            sweep(**other).heads()


def test_refusals():
    model, clean, corrupt, others = prompts_of("llama")

    def sweep(**more):
        given = dict(patch_with="resample", resample=others, progress=False) | more
        return Sweep(model, clean, corrupt, logit_diff(A, B), **given)

    shorter = {k: v[:, 1:] for k, v in clean.items()}
    padded = {**clean, "attention_mask": torch.cat([torch.zeros(1, 1), clean["attention_mask"][:, 1:]], 1)}
    for options, told in (
        ({"resample": None}, "needs resample="),
        ({"resample": []}, "needs resample="),
        ({"draws": 4}, "expected 1 to 3"),
        ({"draws": 0}, "expected 1 to 3"),
        ({"seed": -1}, "at least 0"),
        ({"patch_with": "clean"}, "patch_with is not 'resample'"),
        ({"patch_with": "samples"}, "clean, zero, mean, resample"),
        ({"resample": [others[0], shorter]}, r"resample\[1\] cannot stand in.*different token length"),
        ({"resample": [padded]}, r"resample\[0\] cannot stand in.*attention_mask differs"),
    ):
        with pytest.raises(ValueError, match=told):
            sweep(**options)
    with pytest.raises(TypeError, match=r"resample\[0\]"):
        sweep(resample=[clean["input_ids"]])
    llava, clean, corrupt, others = prompts_of("llava")
    del others[2]["pixel_values"]
    with pytest.raises(ValueError, match=r"resample\[2\].*an image on one side only"):
        Sweep(llava, clean, corrupt, logit_diff(A, B), patch_with="resample", resample=others, progress=False)


def test_activations_on_the_host():
    model, clean, corrupt, others = prompts_of("qwen2")
    more = dict(patch_with="resample", resample=others, draws=2, progress=False)
    here, there = (
        Sweep(model, clean, corrupt, logit_diff(A, B), activations=where, **more) for where in ("device", "host")
    )
    for sweep in (lambda s: s.heads("each"), lambda s: s.combinations(CHOSEN, size=3), lambda s: s.routes()):
        torch.testing.assert_close(sweep(there).values, sweep(here).values, rtol=0, atol=1e-11)
