"""Steering sweeps against a hook loop on the unmodified model, and generated texts against patched model.generate."""

from __future__ import annotations

import contextlib

import pytest
import sweep_oracle as oracle
import torch
from test_sweep_engine import A, B, agree, difference, pair
from test_sweep_generated import alone, score

from emocircuits import AddVector, Plan, patch
from emocircuits.sweep import Sweep, generated, kl, log_prob, logit_diff, projection
from emocircuits.sweep.generated import GeneratingRun
from emocircuits.sweep.rowplans import RowPlans

FAMILIES = ("llama", "qwen2", "gpt2", "llava", "llama-padded", "llava-padded", "gpt2-padded")
ALPHAS = (-0.5, 0.0, 0.3, 2.0)
LIMIT = 4


def vectors(*shape, seed=0):
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def hooked(model, layer, vector, alpha, rows="all", reading="raw"):
    """The layer's output steered, with the formulas written out."""
    module, _ = oracle.place(model, "residual", layer)

    def change(h):
        v, size = vector.to(h), h.norm(dim=-1, keepdim=True)
        if reading == "relative":
            new = h + alpha * size * v / v.norm()
        else:
            new = h + alpha * v
            if reading == "norm-preserving":
                new = new * size / new.norm(dim=-1, keepdim=True)
        step = h.shape[1] == 1
        if rows == "all" or (rows == "prompt" and not step):
            return new
        if rows == "last" and not step:
            return torch.cat([h[:, :-1], new[:, -1:]], 1)
        return h

    def after(m, a, o):
        return (change(o[0]), *o[1:]) if isinstance(o, tuple) else change(o)

    hook = module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def loop(model, inputs, metric, several, alphas, layers=(0, 1, 2), **options):
    table = torch.empty(len(several), len(layers), len(alphas), dtype=torch.float64)
    for v, of_layers in enumerate(several):
        for i, layer in enumerate(layers):
            for j, alpha in enumerate(alphas):
                with hooked(model, layer, of_layers[layer], alpha, **options):
                    table[v, i, j] = float(metric(model(**inputs).logits))
    return table


@pytest.mark.parametrize(
    ("kind", "rows"), [*((f, "all") for f in FAMILIES), *((f, "last") for f in ("gpt2", "llava-padded"))]
)
def test_families(kind, rows):
    model, clean, corrupt = pair(kind)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    s = vectors(3)
    found = sweep.steering(s, alphas=ALPHAS, rows=rows)
    assert found.axes == ("layer", "alpha")
    assert found.labels == {"layer": [0, 1, 2], "alpha": list(ALPHAS)}
    agree(found.values, loop(model, corrupt, difference, [s], ALPHAS, rows=rows)[0], 1e-10)
    assert found.values[:, 1].tolist() == [sweep.corrupt] * 3
    assert found.effects.shape == (3, 4)


@pytest.mark.parametrize("reading", ["relative", "norm-preserving"])
@pytest.mark.parametrize("rows", ["prompt", "last"])
def test_readings(reading, rows):
    model, clean, corrupt = pair("qwen2")
    s = {"joy": vectors(3, seed=1), "fear": vectors(3, seed=2)}
    for direction, inputs in (("denoise", corrupt), ("noise", clean)):
        sweep = Sweep(model, clean, corrupt, difference, direction=direction, progress=False)
        found = sweep.steering(s, layers=[0, 2], alphas=(0.2, -0.7), rows=rows, reading=reading)
        assert found.axes == ("vector", "layer", "alpha")
        assert found.labels["vector"] == ["joy", "fear"]
        expected = loop(model, inputs, difference, s.values(), (0.2, -0.7), (0, 2), rows=rows, reading=reading)
        agree(found.values, expected, 1e-10)


def test_metrics():
    """Of layers between, of other columns, of distributions; patch_with says nothing here."""
    model, clean, corrupt = pair("llama")
    s, direction = vectors(2, 3), vectors(1)[0].double()
    with torch.no_grad():
        reference = model(**clean).logits[0, -1].log_softmax(-1)
    cases = {
        log_prob(A, pos=5): lambda x: x[0, 5].log_softmax(-1)[A],
        kl(): lambda x: (reference.exp() * (reference - x[0, -1].log_softmax(-1))).sum(),
    }
    for metric, function in cases.items():
        sweep = Sweep(model, clean, corrupt, metric, patch_with="zero", progress=False)
        agree(sweep.steering(s).values, loop(model, corrupt, function, s, (0.1, 0.5, 1.0)), 1e-10)
    found = Sweep(model, clean, corrupt, projection(direction, layer=1), progress=False).steering(s[0], alphas=(2.0,))
    for layer in range(3):
        with hooked(model, layer, s[0, layer], 2.0):
            resid = oracle.record(model, corrupt, "residual")
        # What leaves layer 1 is what enters layer 2.
        assert float(found.values[layer, 0]) == pytest.approx(float(resid[2][-1] @ direction), abs=1e-9)


def texts(model, inputs, several, alphas, rows, reading="raw", layers=(0, 1, 2), limit=LIMIT, **options):
    """patch() and model.generate, one at a time."""
    found = []
    for s in several:
        for layer in layers:
            for alpha in alphas:
                edit = AddVector(
                    [layer], s[layer], by=alpha, relative=reading == "relative",
                    norm="keep" if reading == "norm-preserving" else "free",
                    to="last" if rows == "last" else None, phase="both" if rows == "all" else "prefill",
                )  # fmt: skip
                with patch(model, Plan([edit])):
                    found.append(alone(model, inputs, limit, **options))
    return found


@pytest.mark.parametrize(
    ("kind", "rows"), [*((f, "all") for f in FAMILIES), ("llama-padded", "prompt"), ("llava", "last")]
)
def test_generated(kind, rows):
    model, clean, corrupt = pair(kind)
    s = vectors(3) * 2
    found = Sweep(model, clean, corrupt, generated(score, limit=LIMIT), progress=False)
    found = found.steering(s, alphas=ALPHAS, rows=rows)
    expected = texts(model, corrupt, [s], ALPHAS, rows)
    assert found.texts == expected
    assert found.values.flatten().tolist() == [score(e) for e in expected]
    assert len({tuple(e) for e in expected}) > 3


def test_generated_with_hooks():
    """The same without anything of ours: steered in the prompt and in every token after it."""
    model, clean, corrupt = pair("llava-padded")
    s = vectors(3) * 2
    found = Sweep(model, clean, corrupt, generated(score, limit=LIMIT), progress=False).steering(s, alphas=ALPHAS)
    expected = []
    for layer in range(3):
        for alpha in ALPHAS:
            with hooked(model, layer, s[layer], alpha):
                expected.append(alone(model, corrupt))
    assert found.texts == expected


@pytest.mark.parametrize("reading", ["raw", "relative", "norm-preserving"])
def test_rows_that_leave_take_their_vectors_along(reading):
    model, clean, corrupt = pair("qwen2")
    s = {"a": vectors(3, seed=3), "b": vectors(3, seed=4)}
    stop = [40, 13, 22, 57, 9, 31, 33, 10, 46, 52, 28, 60, 17]
    metric = generated(score, limit=8, stop=stop)
    options = dict(alphas=(0.3, 1.0, 3.0), reading=reading)
    whole = Sweep(model, clean, corrupt, metric, progress=False).steering(s, **options)
    expected = texts(model, corrupt, s.values(), (0.3, 1.0, 3.0), "all", reading, limit=8, eos_token_id=stop)
    assert whole.texts == expected
    assert len({len(e) for e in expected}) > 3
    small = Sweep(model, clean, corrupt, metric, batch=4, progress=False).steering(s, **options)
    assert small.texts == expected
    with torch.no_grad():  # the model is as it was
        assert float(difference(model(**corrupt).logits)) == pytest.approx(
            Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).corrupt, abs=1e-12
        )


def test_several_pairs():
    model, clean, corrupt = pair("llama")
    other = {k: v.clone() for k, v in corrupt.items()}
    other["input_ids"][0, 3] = 33
    s = vectors(2, 3)
    sweep = Sweep(model, [clean, clean], [corrupt, other], logit_diff(A, B), progress=False)
    found = sweep.steering(s, alphas=(0.5, 1.0))
    expected = torch.stack([loop(model, x, difference, s, (0.5, 1.0)) for x in (corrupt, other)])
    agree(found.pairs, expected, 1e-10)
    agree(found.values, expected.mean(0), 1e-10)
    assert found.interval()[0].shape == (2, 3, 2)
    said = Sweep(model, [clean, clean], [corrupt, other], generated(score, limit=3), progress=False)
    assert said.steering(s, alphas=(2.0, 4.0)).texts == [
        t for x in (corrupt, other) for t in texts(model, x, s, (2.0, 4.0), "all", limit=3)
    ]


def test_kept_on_disk(tmp_path):
    model, clean, corrupt = pair("llama")
    s = vectors(3)
    made = lambda: Sweep(model, clean, corrupt, generated(score, limit=2), out=tmp_path, progress=False)  # noqa: E731
    first = made().steering(s)
    calls = []
    before = GeneratingRun.values
    GeneratingRun.values = lambda *a: calls.append(a) or before(*a)
    try:
        again = made().steering(s)
    finally:
        GeneratingRun.values = before
    assert not calls
    assert again.texts == first.texts
    for other in (
        lambda: made().steering(s + 1e-3),
        lambda: made().steering(s, alphas=(0.1, 0.5, 1.1)),
        lambda: made().steering(s, reading="relative"),
        lambda: made().steering(s, rows="prompt"),
        lambda: made().steering(s[None].repeat(2, 1, 1) + torch.tensor([0.0, 1.0])[:, None, None]),
    ):
        with pytest.raises(ValueError, match="holds another sweep"):
            other()
    assert "steering" in repr(first.meta)
    first.plot(tmp_path / "page.html")


def test_what_is_refused():
    model, clean, corrupt = pair("llama")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    zero = vectors(3)
    zero[1] = 0
    cases = [
        (lambda: sweep.steering(vectors(2)), ValueError, r"vectors is \[2, 32\]: expected a vector for every layer"),
        (lambda: sweep.steering({"joy": vectors(3)[:, :5]}), ValueError, r"vectors\['joy'\] is \[3, 5\]"),
        (lambda: sweep.steering({}), ValueError, "nothing to steer with"),
        (lambda: sweep.steering([1.0]), TypeError, "vectors is list"),
        (lambda: sweep.steering(vectors(3) / 0), ValueError, "NaN or infinite"),
        (lambda: sweep.steering(zero, reading="relative"), ValueError, "zero in layer 1"),
        (lambda: sweep.steering(vectors(3), alphas=(1.0, 1)), ValueError, "distinct finite"),
        (lambda: sweep.steering(vectors(3), alphas=()), ValueError, "distinct finite"),
        (lambda: sweep.steering(vectors(3), alphas=2.0), TypeError, "expected numbers"),
        (lambda: sweep.steering(vectors(3), rows="query"), ValueError, "rows is 'query'"),
        (lambda: sweep.steering(vectors(3), reading="cosine"), ValueError, "reading is 'cosine'"),
        (lambda: sweep.steering(vectors(3), layers=[3]), ValueError, "layers"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    found = sweep.steering(zero)
    assert found.values[1].tolist() == [sweep.corrupt] * 3


def test_rows_of_a_batch_follow_their_plans():
    """From the prompt on, with plans that are shared by rows."""
    model, _, _ = pair("llama")
    ids = torch.randint(8, 64, (3, 7), generator=torch.Generator().manual_seed(5))
    s = vectors(3)
    plans = [Plan(), Plan([AddVector([1], s[1], by=0.7)]), Plan([AddVector([2], s[2], by=2.0, norm="keep")])]
    with torch.no_grad(), RowPlans(model, plans) as patched:
        plain = model(input_ids=ids).logits
        patched.follow(torch.tensor([2, 0, 1]))
        found = model(input_ids=ids).logits
    for row, which in enumerate([2, 0, 1]):
        with torch.no_grad(), patch(model, plans[which]):
            torch.testing.assert_close(found[row : row + 1], model(input_ids=ids[row : row + 1]).logits)
    torch.testing.assert_close(plain[1], found[1])
    for edit, message in (
        (AddVector([1], s[1], positions=[0]), "names positions"),
        (AddVector([1], s[1], rows=[0]), "batch rows"),
    ):
        with pytest.raises((NotImplementedError, ValueError), match=message):
            RowPlans(model, [Plan([edit])])
