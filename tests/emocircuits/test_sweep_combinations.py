"""Heads patched together against hooks on all of them at once, in float64; and what they do beyond their sum."""

from __future__ import annotations

from itertools import combinations

import families_harness as harness
import families_vision_models  # noqa: F401  registers its builders
import pytest
import sweep_oracle as oracle
import torch
from test_sweep_engine import A, B, agree, difference, pair
from test_sweep_families import pair as harness_pair
from test_sweep_families import place

from emocircuits.sweep import Sweep, generated, interaction, kl, logit_diff, projection
from emocircuits.sweep.resume import Decoder

CHOSEN = [(0, 1), (0, 3), (1, 0), (2, 2), (2, 3)]


def sweep_of(kind, metric=None, **more):
    model, clean, corrupt = pair(kind)
    return model, clean, corrupt, Sweep(model, clean, corrupt, metric or logit_diff(A, B), progress=False, **more)


@torch.no_grad()
def hooked(model, inputs, kept, heads, columns, where=oracle.place, size=8):
    """Logits with all of ``heads`` overwritten in ``columns``."""

    def hook(layer, entries):
        def change(module, args):
            x = args[0].clone()
            for c in columns:
                x[0, c, entries] = kept[layer][c, entries]
            return (x, *args[1:])

        return where(model, "heads", layer)[0].register_forward_pre_hook(change)

    hooks = [hook(layer, slice(size * head, size * (head + 1))) for layer, head in heads]
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        for h in hooks:
            h.remove()


def by_hand(model, base, source, sets, positions, read=difference, fill=None):
    """``[combination]`` or ``[combination, pos]``."""
    kept = oracle.record(model, source, "heads")
    kept = kept if fill is None else {k: fill(v) for k, v in kept.items()}
    total = base["input_ids"].shape[1]
    columns = (
        [range(total)] if positions == "all" else [[c] for c in (range(total) if positions == "each" else positions)]
    )
    table = [[float(read(hooked(model, base, kept, s, cs))) for cs in columns] for s in sets]
    found = torch.tensor(table, dtype=torch.float64)
    return found[:, 0] if positions == "all" else found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "llama-padded", "llava", "llava-padded"])
@pytest.mark.parametrize("positions", ["all", "each"])
def test_pairs(kind, positions):
    model, clean, corrupt, sweep = sweep_of(kind)
    if kind.startswith("llava") and positions == "each":
        positions = [3, 10, -3, -1]
    found = sweep.combinations(CHOSEN, positions=positions)
    sets = list(combinations(CHOSEN, 2))
    assert found.labels["combination"][0] == "0.1+0.3"
    assert found.axes == ("combination", *(["pos"] if positions != "all" else []))
    agree(found.values, by_hand(model, corrupt, clean, sets, positions), 1e-10, found.gap)


@pytest.mark.parametrize(("patch", "direction"), [("clean", "noise"), ("zero", "denoise"), ("mean", "noise")])
def test_triples_and_fillings(patch, direction):
    model, clean, corrupt, sweep = sweep_of("llama-padded", patch_with=patch, direction=direction)
    real = clean["attention_mask"][0].bool()
    fill = {
        "clean": None,
        "zero": torch.zeros_like,
        "mean": lambda x: x[real].mean(0, keepdim=True).expand_as(x),
    }[patch]
    base, source = (clean, corrupt) if direction == "noise" else (corrupt, clean)
    sets = [*combinations(CHOSEN, 1), *combinations(CHOSEN, 3)]
    for positions in ("all", "each"):
        found = sweep.combinations(CHOSEN, size=(1, 3), positions=positions)
        agree(found.values, by_hand(model, base, source, sets, positions, fill=fill), 1e-10, found.gap)


@torch.no_grad()
def test_metrics():
    model, clean, corrupt, sweep = sweep_of("qwen2", kl(pos=5))
    wanted = model(**clean).logits[0, 5].log_softmax(-1)

    def divergence(logits):
        return (wanted.exp() * (wanted - logits[0, 5].log_softmax(-1))).sum()

    sets = list(combinations(CHOSEN, 2))
    for positions in ("all", "each"):
        expected = by_hand(model, corrupt, clean, sets, positions, divergence)
        agree(sweep.combinations(CHOSEN, positions=positions).values, expected, 1e-10)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model, clean, corrupt, sweep = sweep_of("llama", projection(direction, layer=1))
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o[0, -1] @ direction))
    expected = by_hand(model, corrupt, clean, sets, "each", lambda _: seen[-1])
    hook.remove()
    found = sweep.combinations(CHOSEN, positions="each")
    agree(found.values, expected, 1e-10)
    assert bool((found.values[-1] == sweep.corrupt).all())  # two heads above what is read


def test_an_earlier_patch_does_not_move_a_later_head():
    """Overwritten, not added to: all heads of a layer at zero are no attention, whatever comes before."""
    _, _, _, sweep = sweep_of("llama", patch_with="zero")
    layer = [(1, h) for h in range(4)]
    found = sweep.combinations([(0, 2), *layer], size=(1, 4, 5))
    values = dict(zip(found.labels["combination"], found.values.tolist(), strict=True))
    one, rest, every = values["0.2"], values["1.0+1.1+1.2+1.3"], values["0.2+1.0+1.1+1.2+1.3"]
    assert abs(rest - float(sweep.attn_out(layers=[1]).values)) < 1e-9
    assert len({round(x, 6) for x in (one, rest, every)}) == 3


def test_interaction():
    model, clean, corrupt, sweep = sweep_of("qwen2")
    singles = sweep.heads()
    pairs = sweep.combinations(singles, top=4)
    assert len(pairs.values) == 6
    chosen = {name for label in pairs.labels["combination"] for name in label.split("+")}
    ranked = sorted((abs(float(singles.values[l, h]) - sweep.corrupt), f"{l}.{h}") for l in range(3) for h in range(4))
    assert chosen == {name for _, name in ranked[-4:]}
    found = interaction(pairs, singles)
    kept = oracle.record(model, clean, "heads")
    total = range(sweep.columns)
    for i, label in enumerate(pairs.labels["combination"]):
        heads = [tuple(map(int, name.split("."))) for name in label.split("+")]
        values = [float(difference(hooked(model, corrupt, kept, s, total))) for s in (heads, heads[:1], heads[1:])]
        both, *each = (value - sweep.corrupt for value in values)
        assert abs(float(found[i]) - (both - sum(each)) / (sweep.clean - sweep.corrupt)) < 1e-9
    assert float(found.abs().max()) > 1e-3
    torch.testing.assert_close(found * pairs.gap, interaction(pairs, singles, of="values"), rtol=0, atol=1e-12)
    # Singles as sets of one, and position by position.
    torch.testing.assert_close(interaction(pairs, sweep.combinations(singles, size=1, top=4)), found, rtol=0, atol=1e-9)
    by_position = sweep.combinations(CHOSEN[:3], positions=[3, 5])
    found = interaction(by_position, sweep.heads(positions=[3, 5]))
    assert found.shape == (3, 2)
    noise = sweep_of("qwen2", direction="noise")[-1]
    pairs, alone = noise.combinations(CHOSEN, size=(1, 2)), noise.heads()
    # A set of one has none, from whichever side it is measured.
    assert float(interaction(pairs, alone)[:5].abs().max()) < 1e-9 < float(interaction(pairs, alone)[5:].abs().max())
    for wrong, told in (
        ((pairs, singles), "other prompts, or other patches"),
        ((by_position, singles), "other positions"),
        ((singles, singles), "expected one of combinations"),
        ((by_position, sweep.residual(positions=[3, 5])), "expected one of heads"),
        ((by_position, sweep.combinations(CHOSEN[:2], size=1, positions=[3, 5])), "not among the single heads"),
    ):
        with pytest.raises(ValueError, match=told):
            interaction(*wrong)


def test_what_is_free_is_not_run_and_counted_so(monkeypatch):
    _, _, _, sweep = sweep_of("llama")
    told, ran = [], []
    real, run = Sweep.forecast, Decoder.run
    monkeypatch.setattr(Sweep, "forecast", lambda self, *a, **k: told.append(real(self, *a, **k)) or told[-1])
    monkeypatch.setattr(Decoder, "run", lambda self, layer, packed: ran.append(layer) or run(self, layer, packed))
    found = sweep.combinations([(0, 1), (2, 2)], positions=[0, 1, 2])  # before the prompts differ
    assert not ran
    assert told[-1].no_ops == 3
    assert bool((found.values == sweep.corrupt).all())
    sweep.combinations([(2, 0), (2, 1)], positions=[3, -1])  # the last layer, once in a column that is not read
    assert told[-1].no_ops == 1
    assert told[-1].costs[1] == told[-1].flops < told[-1].naive


def test_a_stopped_sweep_goes_on(tmp_path, monkeypatch):
    def sweep():
        return sweep_of("llama", batch=1, out=tmp_path)[-1]

    expected = sweep_of("llama")[-1].combinations(CHOSEN).values
    real, calls = Decoder.run, []

    def run(self, layer, packed):
        calls.append(layer)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, layer, packed)

    monkeypatch.setattr(Decoder, "run", run)
    with pytest.raises(KeyboardInterrupt):
        sweep().combinations(CHOSEN)
    torch.testing.assert_close(sweep().combinations(CHOSEN).values, expected, rtol=0, atol=1e-10)
    before = len(calls)
    sweep().combinations(CHOSEN)
    assert len(calls) == before
    other = [*CHOSEN[:4], (2, 0)]  # as many patches of the same layers
    with pytest.raises(ValueError, match="another sweep"):
        sweep().combinations(other)


def test_refusals():
    _, _, _, sweep = sweep_of("llama")
    every = [(l, h) for l in range(3) for h in range(4)]
    for options, told in (
        ({"heads": [(0, 4), (0, 1)]}, "layers 0 to 2 of heads 0 to 3"),
        ({"heads": [(0, 1), (0, 1)]}, "distinct pairs"),
        ({"heads": CHOSEN, "size": 6}, "expected 1 to 5"),
        ({"heads": CHOSEN, "size": 0}, "expected 1 to 5"),
        ({"heads": CHOSEN, "size": (2, 2)}, "expected 1 to 5"),
        ({"heads": every, "size": 6, "positions": "each"}, r"8,316 patches.*limit=8316"),
        ({"heads": every, "limit": 10}, "66 patches"),
        ({"heads": sweep.residual()}, "expected one of heads"),
        ({"heads": sweep.heads(), "top": 13}, "expected 1 to 12"),
    ):
        with pytest.raises(ValueError, match=told):
            sweep.combinations(**options)
    with pytest.raises(TypeError, match="pairs such as"):
        sweep.combinations([3, 4])
    with pytest.raises(ValueError, match="does not broadcast"):
        sweep_of("llama", patch_with=torch.zeros(5))[-1].combinations(CHOSEN)


def test_the_result_is_a_table_like_others(tmp_path):
    sweep = sweep_of("llama")[-1]
    for positions, shape in (("all", (10,)), ([3, 5], (10, 2))):
        found = sweep.combinations(CHOSEN, positions=positions)
        assert tuple(found.values.shape) == shape
        assert list(found.to_dataframe().columns) == [*found.axes, "value", "effect"]
        assert found.top(1)[0]["combination"] in found.labels["combination"]
        page = found.plot(tmp_path / "sets.html")
        assert list(page.data[0].y) == found.labels["combination"]
        assert page.layout.yaxis.title.text == "combination"


@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3 (vision)", "PaliGemma", "Qwen2.5-VL"])
def test_families(name):
    """Capped logits, images that attend to all of themselves, rotary embedding of images."""
    model, _, make_inputs, tolerance = harness.built(name)
    clean, corrupt = harness_pair(model, make_inputs)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    size, total = sweep.handle.geometry.head_dim, sweep.columns
    heads = [(0, 0), (0, 1), (1, 1), (2, 0)]
    kept = oracle.record(model, clean, "heads", place)
    for positions in ("all", [sweep.first, sweep.first + 2, total - 1]):
        found = sweep.combinations(heads, size=(2, 3), positions=positions)
        sets = [s for k in (2, 3) for s in combinations(heads, k)]
        expected = torch.zeros_like(found.values).reshape(len(sets), -1)
        for i, s in enumerate(sets):
            for j, columns in enumerate([range(total)] if positions == "all" else [[c] for c in positions]):
                expected[i, j] = float(difference(hooked(model, corrupt, kept, s, columns, place, size)))
        spread = max(float(expected.max() - expected.min()), abs(sweep.clean - sweep.corrupt))
        assert spread > 1e-3
        assert float((found.values.reshape(len(sets), -1) - expected).abs().max()) <= tolerance * spread


def test_several_pairs():
    """One choice of heads for all pairs, the mean of their tables, and interactions of the mean."""
    model, clean, corrupt, one = sweep_of("llama")
    other = {k: v.clone() for k, v in corrupt.items()}
    other["input_ids"][0, 4] = 12
    two = Sweep(model, clean, other, logit_diff(A, B), progress=False)
    both = Sweep(model, [clean, clean], [corrupt, other], logit_diff(A, B), progress=False)
    singles = both.heads()
    pairs = both.combinations(singles, top=3)
    names = sorted({head for label in pairs.labels["combination"] for head in label.split("+")})
    chosen = [tuple(map(int, name.split("."))) for name in names]
    each = [s.combinations(chosen) for s in (one, two)]
    torch.testing.assert_close(pairs.values, sum(e.values for e in each) / 2, rtol=0, atol=1e-10)
    assert pairs.interval()[0].shape == (3,)
    alone = [s.heads() for s in (one, two)]
    expected = sum(interaction(e, a, of="values") for e, a in zip(each, alone, strict=True)) / 2
    torch.testing.assert_close(interaction(pairs, singles, of="values"), expected, rtol=0, atol=1e-10)
    routes = both.routes(layers=[1])
    torch.testing.assert_close(
        routes.values, sum(s.routes(layers=[1]).values for s in (one, two)) / 2, rtol=0, atol=1e-10
    )


@torch.no_grad()
@pytest.mark.parametrize("positions", ["all", [4, -1]])
def test_generated_text(positions):
    """Sets are patched in the pass over the prompt; what follows is the model's own."""
    model, clean, corrupt = pair("qwen2")
    total = clean["input_ids"].shape[1]
    kept = oracle.record(model, clean, "heads")

    def said(heads, columns):
        def hook(layer, head):
            part = slice(8 * head, 8 * head + 8)

            def change(module, args):
                x = args[0].clone()
                if x.shape[1] == total:
                    x[0, columns, part] = kept[layer][columns, part]
                return (x,)

            return oracle.place(model, "heads", layer)[0].register_forward_pre_hook(change)

        hooks = [hook(*h) for h in heads]
        try:
            return model.generate(**corrupt, do_sample=False, max_new_tokens=4)[0, total:].tolist()
        finally:
            for h in hooks:
                h.remove()

    metric = generated(lambda ids: float(sum((i + 1) * t for i, t in enumerate(ids))), limit=4)
    found = Sweep(model, clean, corrupt, metric, progress=False).combinations(CHOSEN, size=3, positions=positions)
    places = [list(range(total))] if positions == "all" else [[c % total] for c in positions]
    expected = [said(s, columns) for s in combinations(CHOSEN, 3) for columns in places]
    assert found.meta["texts"]["patched"] == expected
    assert len({tuple(e) for e in expected}) > 1
