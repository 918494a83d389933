"""Edited routes of single heads against full attention matrices in float64, one edit at a time, and against patch()."""

from __future__ import annotations

import copy

import families_harness as harness
import families_vision_models  # noqa: F401  registers its builders
import oracle
import pytest
import torch
from models import build, prompt
from test_sweep_engine import A, B, agree, difference, pair
from test_sweep_families import pair as harness_pair

from emocircuits import BoostRoute, Plan, patch
from emocircuits.sweep import Sweep, kl, logit_diff, projection
from emocircuits.sweep.resume import Decoder
from emokernels import Role

EDITS = [
    ("knockout", None, None),
    ("boost", 1.7, None),
    ("boost", 2.5, "logit-add"),
    ("boost", 0.4, "logit-scale"),
    ("boost", 0.6, "logit-abs"),
]


def sweep_of(kind, metric=None, **more):
    model, clean, corrupt = pair(kind)
    # As the oracle counts them: rotary embedding is float32, and rounds otherwise elsewhere.
    for inputs in (clean, corrupt):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return model, clean, corrupt, Sweep(model, clean, corrupt, metric or logit_diff(A, B), progress=False, **more)


def edits(label, layer, head, by, reading):
    to, source = label.split("<-")
    if by is None:
        by, reading = 0.0, "logit-add"
    more = {"by": by, "reading": reading or "weight", "phase": "prefill"}
    return Plan([BoostRoute([(layer, head)], to=to, source=source, **more)])


def by_hand(model, inputs, labels, layers, by, reading, read=difference):
    """One edit at a time: ``[layer, head, route]``."""
    return torch.tensor(
        [
            [[float(read(oracle.logits(model, inputs, edits(n, l, h, by, reading)))) for n in labels] for h in range(4)]
            for l in layers
        ],
        dtype=torch.float64,
    )


TEXT = ["query<-query", "last<-query", "last<-last"]
IMAGE = [
    "system<-system", "visual<-system", "visual<-visual", "query<-system", "query<-visual", "query<-query",
    "last<-system", "last<-visual", "last<-query", "last<-last",
]  # fmt: skip


CASES = [(kind, *edit) for kind in ("llama", "qwen2", "gpt2", "llama-padded") for edit in EDITS]
CASES += [(kind, *edit) for kind in ("llava", "llava-padded") for edit in EDITS[:2]]


@pytest.mark.parametrize(("kind", "edit", "by", "reading"), CASES)
def test_every_route_of_every_head(kind, edit, by, reading):
    image = kind.startswith("llava")
    model, clean, corrupt, sweep = sweep_of(kind)
    run = "corrupt" if edit == "boost" else "clean"
    layers = [0, 2] if image else [0, 1, 2]
    found = sweep.routes(edit, by=by, reading=reading, layers=layers, run=run)
    assert found.labels["route"] == (IMAGE if image else TEXT)
    assert found.axes == ("layer", "head", "route")
    expected = by_hand(model, clean if run == "clean" else corrupt, found.labels["route"], layers, by, reading)
    agree(found.values, expected, 1e-10, found.gap)
    moved = (found.values - (found.clean if run == "clean" else found.corrupt)).abs().amax((0, 1))
    if reading == "logit-add" and not image:  # all that these queries see becomes stronger: as strong as it was
        moved = moved[1:]
    assert float(moved.min()) > 1e-4 * abs(found.gap), "a route changes nothing"


@pytest.mark.parametrize("kind", ["qwen2", "llava-padded"])
@pytest.mark.parametrize(("edit", "by", "reading"), EDITS)
def test_the_numbers_of_a_patched_model(kind, edit, by, reading):
    model, clean, _, sweep = sweep_of(kind)
    found = sweep.routes(edit, by=by, reading=reading, layers=[1])
    for head, r in ((0, 0), (3, len(found.labels["route"]) - 2)):
        with torch.no_grad(), patch(model, edits(found.labels["route"][r], 1, head, by, reading)):
            expected = float(difference(model(**clean).logits))
        assert abs(float(found.values[0, head, r]) - expected) < 1e-9


@torch.no_grad()
def test_metrics_and_directions():
    model, clean, corrupt, sweep = sweep_of("qwen2", kl(pos=5))
    wanted = model(**clean).logits[0, 5].log_softmax(-1)

    def divergence(logits):
        return (wanted.exp() * (wanted - logits[0, 5].log_softmax(-1))).sum()

    named = [("query", Role.QUERY), ("last", "query")]
    for run, inputs in (("clean", clean), ("corrupt", corrupt)):
        found = sweep.routes(routes=named, run=run, layers=[1])
        assert found.labels["route"] == ["query<-query", "last<-query"]
        expected = by_hand(model, inputs, found.labels["route"], [1], None, None, divergence)
        agree(found.values, expected, 1e-10)
        assert bool((found.values[..., 1] == getattr(found, run)).all())  # after what is read
    # Direction and what patches are made of do not matter: nothing comes from the other prompt.
    _, _, _, other = sweep_of("qwen2", kl(pos=5), direction="noise", patch_with="zero")
    torch.testing.assert_close(other.routes(routes=named, run=run, layers=[1]).values, found.values, rtol=0, atol=1e-10)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, clean, _, sweep = sweep_of("llama", projection(direction, layer=1))
    seen = []
    model = pair("llama")[0]
    hook = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o[0, -1] @ direction))
    expected = by_hand(model, clean, TEXT, [0, 1, 2], None, None, lambda _: seen[-1])
    hook.remove()
    agree(sweep.routes().values, expected, 1e-10)


def test_a_sliding_window_has_other_routes():
    model = build("text", "mistral", dtype=torch.float64, sliding_window=3)
    clean = prompt(model, 8, 0, sizes=[])
    clean["position_ids"] = clean["attention_mask"].cumsum(-1) - 1
    corrupt = {k: v.clone() for k, v in clean.items()}
    corrupt["input_ids"][0, 7] = 50
    found = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).routes()
    agree(found.values, by_hand(model, clean, TEXT, [0, 1, 2], None, None), 1e-10, found.gap)


def test_only_changed_columns_are_run(monkeypatch):
    model, _, _, sweep = sweep_of("llama", direction="noise")
    kind, passes = type(model.model.layers[0].mlp), []
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: passes.append(x.shape[1]) or forward(self, x))
    sweep.routes(routes=[("last", "query")], layers=[1])
    assert passes == [4, 4]  # one column of four heads, and it is the one that is read
    passes.clear()
    assert bool((sweep.routes(routes=[("query", "query")], layers=[2]).values == sweep.clean).all())
    assert not passes


def test_the_planner_counts_what_is_run(monkeypatch):
    """Free edits are those that are answered, and the work grows with what an edit reaches."""
    _, _, _, sweep = sweep_of("llama")
    told = []
    real = Sweep.forecast
    monkeypatch.setattr(Sweep, "forecast", lambda self, *a, **k: told.append(real(self, *a, **k)) or told[-1])
    sweep.routes()
    (found,) = told
    assert found.patches == 36
    assert found.no_ops == 4  # query<-query of the last layer
    costs = torch.tensor(found.costs)
    assert float(costs[:12].sum()) > float(costs[12:24].sum()) > float(costs[24:].sum()) > 0
    assert found.least <= found.flops < found.naive


def test_a_stopped_sweep_of_routes_goes_on(tmp_path, monkeypatch):
    def sweep():
        return sweep_of("llama", batch=1, out=tmp_path)[-1]

    expected = sweep_of("llama")[-1].routes("boost", by=2.0).values
    real, calls = Decoder.run, []

    def run(self, layer, packed):
        calls.append(layer)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, layer, packed)

    monkeypatch.setattr(Decoder, "run", run)
    with pytest.raises(KeyboardInterrupt):
        sweep().routes("boost", by=2.0)
    torch.testing.assert_close(sweep().routes("boost", by=2.0).values, expected, rtol=0, atol=1e-10)
    before = len(calls)
    sweep().routes("boost", by=2.0)
    assert len(calls) == before
    for other in (
        {"edit": "boost", "by": 2.5},
        {"edit": "boost", "by": 2.0, "reading": "logit-scale"},
        {"edit": "boost", "by": 2.0, "run": "corrupt"},
        {"routes": [("last", "query")]},
    ):
        with pytest.raises(ValueError, match="another sweep"):
            sweep().routes(**other)


def test_refusals():
    sweep = sweep_of("llama")[-1]
    for wrong, told in (
        ({"edit": "remove"}, "expected 'knockout' or 'boost'"),
        ({"by": 2.0}, "by and reading are for edit='boost'"),
        ({"edit": "boost"}, "needs its strength"),
        ({"edit": "boost", "by": -1.0}, "by"),
        ({"edit": "boost", "by": 1.0, "reading": "logits"}, "reading"),
        ({"run": "both"}, "expected 'clean' or 'corrupt'"),
        ({"layers": [9]}, "expected each of 0 to 2"),
        ({"routes": [("query", "visual")]}, "no token of the prompt that is QUERY sees one that is VISUAL"),
        ({"routes": [("query", "images")]}, "expected .destination, source."),
        ({"routes": [("pad", "query")]}, "expected .destination, source."),
        ({"routes": ["query"]}, "expected .destination, source."),
        ({"routes": [("last", "query"), ("last", "query")]}, "each once"),
        ({"routes": []}, "at least one"),
    ):
        with pytest.raises(ValueError, match=told):
            sweep.routes(**wrong)
    wrapped = sweep.handle.output_projections[1]
    wrapped.forward = lambda x: x
    try:
        with pytest.raises(NotImplementedError, match="layer 1 has a Linear with a forward of its own"):
            sweep_of("llama", direction="noise")[-1].routes()
    finally:
        del wrapped.forward
    narrow = sweep_of("llama", direction="noise")[-1]
    narrow.base.layers[1].v = narrow.base.layers[1].v[..., :4]
    with pytest.raises(NotImplementedError, match="layer 1 has keys of 8 and values of 4"):
        narrow.routes()


def test_the_result_is_a_table_like_others(tmp_path):
    sweep = sweep_of("llama")[-1]
    found = sweep.routes()
    frame = found.to_dataframe()
    assert list(frame.columns) == ["layer", "head", "route", "value", "effect"]
    assert set(frame["route"]) == set(TEXT)
    # First comes what breaks most, and colours begin where nothing does.
    assert found.top(1)[0]["value"] == max(found.values.flatten().tolist(), key=lambda v: abs(v - sweep.clean))
    page = found.plot(tmp_path / "routes.html")
    assert [b.label for b in page.layout.updatemenus[0].buttons][1:] == [f"route {n}" for n in TEXT]
    assert abs(page.data[0].zmin + page.data[0].zmax - 2) < 1e-9


@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3 (vision)", "PaliGemma", "Qwen2.5-VL"])
def test_families(name):
    """Capped logits, images that attend to all of themselves, rotary embedding of images."""
    model, exact, make_inputs, tolerance = harness.built(name)
    clean, corrupt = harness_pair(model, make_inputs)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    found = sweep.routes(layers=[1])
    labels = found.labels["route"]
    assert ("query<-visual" in labels) == sweep.handle.sees
    base = found.clean
    for head in (0, sweep.handle.geometry.heads - 1):
        logits = [oracle.logits(exact, clean, edits(n, 1, head, None, None)) for n in labels]
        expected = torch.tensor([float(difference(x)) for x in logits], dtype=torch.float64)
        spread = float((expected - base).abs().max())
        assert spread > 1e-3
        assert float((found.values[0, head] - expected).abs().max()) <= tolerance * max(spread, 1.0)


@pytest.mark.parametrize("kind", ["qwen2", "llava"])
def test_float32(kind):
    exact, clean, _ = pair(kind)
    small = copy.deepcopy(exact).float()
    _, clean32, corrupt32 = pair(kind, torch.float32)
    found = Sweep(small, clean32, corrupt32, logit_diff(A, B), progress=False).routes("boost", by=1.5)
    expected = Sweep(exact, clean, pair(kind)[2], logit_diff(A, B), progress=False).routes("boost", by=1.5)
    agree(found.values, expected.values, 2e-5, expected.gap)


@torch.no_grad()
def test_bfloat16_rounds_like_a_patched_model():
    small = copy.deepcopy(pair("qwen2")[0]).bfloat16()
    exact = copy.deepcopy(small).double()
    _, clean, corrupt = pair("qwen2")
    found = Sweep(small, clean, corrupt, logit_diff(A, B), progress=False).routes(layers=[1])
    loop, truth = torch.zeros(2, 4, 3, dtype=torch.float64)
    for table, model in ((loop, small), (truth, exact)):
        for head in range(4):
            for r, name in enumerate(TEXT):
                with patch(model, edits(name, 1, head, None, None)):
                    table[head, r] = float(difference(model(**clean).logits.double()))
    assert float((found.values[0] - truth).abs().max()) <= 2 * float((loop - truth).abs().max())
