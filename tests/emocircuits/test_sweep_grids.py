"""Grids of plans against ``patch`` and ``model.generate``, one plan and one prompt at a time."""

from __future__ import annotations

import functools

import families_harness as harness
import families_vision_models  # noqa: F401  registers its builders
import pytest
import torch
from models import prompt
from test_sweep_engine import A, B, agree, difference, pair
from test_sweep_generated import alone, score

from emocircuits import AddVector, BoostRoute, Plan, ScaleHead, ScaleNeurons, patch
from emocircuits.families import open_model
from emocircuits.sweep import Sweep, generated, kl, logit_diff, plan_grid, projection
from emocircuits.sweep.branching import Branching, branches
from emocircuits.sweep.grids import PlanRun

AXES = {"reading": ("weight", "logit-add"), "beta": (1.0, 1.7, 3.0), "gamma": (1.0, 2.5)}
LIMIT = 4


def split(reading, beta, gamma, source="visual"):
    """As VEENA makes it: prompt rows up to layer 1, generated ones above, neurons in both phases."""
    edits = []
    if beta != 1:
        edits += [
            BoostRoute([(0, 1), (1, 0)], (source,), beta, reading, to=("query", "last")),
            BoostRoute([(2, 3)], (source,), beta, reading, to=("generated",)),
        ]
    if gamma != 1:
        edits.append(ScaleNeurons({1: [3, 7, 9, 20], 2: [0, 30]}, gamma))
    return Plan(edits)


def late(beta, gamma):
    """Nothing in the prompt."""
    return Plan(
        [
            BoostRoute([(0, 1), (2, 0), (2, 2)], ("visual",), beta, to=("generated",)),
            ScaleNeurons({1: [3, 7, 9, 20, 31], 2: [0, 30]}, gamma, phase="decode"),
        ]
    )


@functools.cache
def prompts(kind, lengths=(3, 3, 5)):
    model, clean, _ = pair(kind)
    if kind.startswith("llava"):
        found = [prompt(model, 2, n, seed=i) for i, n in enumerate(lengths)]
        if kind.endswith("padded"):
            found.append(clean)
    else:
        found = [prompt(model, 4 + n, 0, seed=i, sizes=[]) for i, n in enumerate(lengths)]
    return model, found


def cells(axes):
    names = list(axes)
    for index in torch.cartesian_prod(*(torch.arange(len(v)) for v in axes.values())).reshape(-1, len(axes)).tolist():
        yield {name: axes[name][i] for name, i in zip(names, index, strict=True)}


@torch.no_grad()
def one_by_one(model, given, plan, axes, metric=difference):
    table = []
    for inputs in given:
        row = []
        for cell in cells(axes):
            with patch(model, plan(**cell)):
                row.append(float(metric(model(**inputs).logits)))
        table.append(row)
    return torch.tensor(table, dtype=torch.float64).reshape(len(given), *(len(v) for v in axes.values()))


def texts(model, given, plan, axes, limit=LIMIT, **options):
    found = []
    for inputs in given:
        for cell in cells(axes):
            with patch(model, plan(**cell)):
                found.append(alone(model, inputs, limit, **options))
    return found


@pytest.mark.parametrize("kind", ["llava", "llava-padded", "qwen2", "gpt2"])
def test_logits(kind):
    model, given = prompts(kind) if kind != "gpt2" else (pair(kind)[0], [pair(kind)[1], pair(kind)[2]])
    plan = functools.partial(split, source="visual" if kind.startswith("llava") else "query")
    found = plan_grid(model, given, plan, AXES, logit_diff(A, B), progress=False)
    assert found.axes == ("reading", "beta", "gamma")
    agree(found.pairs, one_by_one(model, given, plan, AXES), 1e-10)
    torch.testing.assert_close(found.values, found.pairs.mean(0))
    with torch.no_grad():
        plain = torch.tensor([float(difference(model(**x).logits)) for x in given], dtype=torch.float64)
    torch.testing.assert_close(found.baselines, plain[:, None].expand(-1, 2), rtol=0, atol=1e-9)
    assert not found.measurable
    assert found.interval("values")[0].shape == (2, 3, 2)
    # Free metrics, and small batches: rows of one prompt in several of them.
    small = plan_grid(model, given, plan, AXES, difference, batch=5, progress=False)
    torch.testing.assert_close(small.pairs, found.pairs, rtol=0, atol=1e-9)


def test_divergence_is_from_the_prompt_without_a_plan():
    model, given = prompts("llava")
    found = plan_grid(model, given, split, AXES, kl(), batch=5, progress=False)
    expected = []
    for inputs in given:
        with torch.no_grad():
            plain = model(**inputs).logits[0, -1].log_softmax(-1)
        of = lambda x, p=plain: (p.exp() * (p - x[0, -1].log_softmax(-1))).sum()  # noqa: E731
        expected.append(one_by_one(model, [inputs], split, AXES, of))
    torch.testing.assert_close(found.pairs, torch.cat(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["llava", "llava-padded", "qwen2"])
def test_generated(kind):
    model, given = prompts(kind)
    plan = functools.partial(split, source="visual" if kind.startswith("llava") else "query")
    found = plan_grid(model, given, plan, AXES, generated(score, limit=LIMIT), progress=False)
    expected = texts(model, given, plan, AXES)
    assert found.texts == expected
    assert found.pairs.flatten().tolist() == [score(e) for e in expected]
    assert len({tuple(e) for e in expected}) > len(given)


def test_edits_of_generated_tokens_alone():
    model, given = prompts("llava")
    axes = {"beta": (1.0, 2.0, 5.0), "gamma": (0.0, 4.0)}
    found = plan_grid(model, given, late, axes, generated(score, limit=6), progress=False)
    assert found.texts == texts(model, given, late, axes, limit=6)
    assert len({tuple(t) for t in found.texts}) > len(given)
    patched = Branching(model, [late(**c) for c in cells(axes)])
    rows = [(p, n) for p in range(3) for n in range(6)]
    made = branches(patched.compiled(), 3, rows, torch.device("cpu"))
    assert [len(b.prompts) for b in made] == [3, 3, 3]


def test_rows_part_where_plans_do():
    model, _ = prompts("llava")
    plans = [split(**c) for c in cells(AXES)]
    rows = [(p, n) for p in range(2) for n in range(12)]
    made = branches(Branching(model, plans).compiled(), 3, rows, torch.device("cpu"))
    # Layer 0: beta 1, and two strengths in two readings; then gammas as well.
    assert [len(b.prompts) for b in made] == [2 * 5, 2 * 10, 2 * 10]


@pytest.mark.parametrize("kind", ["llava", "llava-padded"])
def test_columns_of_the_image_are_run_once_where_plans_differ_after_it(kind, monkeypatch):
    model, given = prompts(kind)
    given = given[-1:]
    columns = given[0]["input_ids"].shape[1]
    seen = [[] for _ in range(3)]
    for layer, module in enumerate(open_model(model).layers):
        real = module.mlp.forward
        forward = lambda x, real=real, at=seen[layer]: at.append(tuple(x.shape[:2])) or real(x)  # noqa: E731
        monkeypatch.setattr(module.mlp, "forward", forward)
    plan_grid(model, given, split, AXES, logit_diff(A, B), progress=False)
    # No plan is the same as beta 1 and gamma 1. Neurons change everywhere, from layer 1 on.
    end = seen[0][0][1]
    assert 2 < end < columns - 2
    assert seen == [
        [(1, end), (5, columns - end)],
        [(2, end), (10, columns - end)],
        [(2, end), (10, columns - end)],
    ]
    # A metric of an early column is read in one piece.
    for shapes in seen:
        shapes.clear()
    early = plan_grid(model, given, split, AXES, logit_diff(A, B, pos=end - 1), progress=False)
    assert seen[0] == [(5, columns)]
    of = lambda x: x[0, end - 1, A] - x[0, end - 1, B]  # noqa: E731
    torch.testing.assert_close(early.values[None], one_by_one(model, given, split, AXES, of), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["llava", "llava-padded"])
def test_edits_of_one_role(kind):
    """What is edited before the image, in it, after it, or in what follows: rows part where they must."""
    model, given = prompts(kind)
    v = torch.randn(32, generator=torch.Generator().manual_seed(3))

    def plan(to, by):
        return Plan(
            [
                ScaleNeurons({0: [3, 7, 9, 20], 1: [0, 30]}, 1 + by, to=to),
                AddVector([1], v, by=by, to=to),
                BoostRoute([(0, 1), (2, 2)], ("visual", "system"), 1 + by, to=to),
            ]
        )

    axes = {"to": ("system", "visual", "query", "last", "generated"), "by": (0.5, 2.0)}
    found = plan_grid(model, given, plan, axes, logit_diff(A, B), progress=False)
    agree(found.pairs, one_by_one(model, given, plan, axes), 1e-10)
    said = plan_grid(model, given, plan, axes, generated(score, limit=LIMIT), progress=False)
    assert said.texts == texts(model, given, plan, axes)


def test_early_ends_and_small_batches():
    model, given = prompts("llava-padded")
    stop = [40, 13, 22, 57, 9, 31, 33, 10, 46, 52, 28, 60, 17, 50]
    axes = {"reading": ("weight",), "beta": (1.7, 3.0), "gamma": (1.0, 2.5)}
    expected = texts(model, given, split, axes, limit=8, eos_token_id=stop)
    for batch in (None, 7):
        metric = generated(score, limit=8, stop=stop)
        assert plan_grid(model, given, split, axes, metric, batch=batch, progress=False).texts == expected
    assert len({len(e) for e in expected}) > 2


def test_memory_that_runs_out(monkeypatch):
    model, given = prompts("llava")
    metric, real, sizes = generated(score, limit=2), PlanRun._generate, []
    whole = plan_grid(model, given, split, AXES, metric, progress=False)

    def small(self, rows):
        sizes.append(len(rows))
        if len(rows) > 6:
            raise torch.OutOfMemoryError("no more")
        return real(self, rows)

    monkeypatch.setattr(PlanRun, "_generate", small)
    assert plan_grid(model, given, split, AXES, metric, progress=False).texts == whole.texts
    assert max(sizes[3:]) <= 6


def vectors(kind, alpha, handle):
    """Every site of vectors and heads, cached keys too."""
    g = torch.Generator().manual_seed(1)
    wide = lambda *n: torch.randn(*n, generator=g)  # noqa: E731
    edits = [
        AddVector([0, 1], wide(32), by=alpha, site="resid_post"),
        AddVector([1, 2], wide(32), by=alpha, site="resid_pre", norm="keep"),
        AddVector([1], wide(32), by=alpha, site="attn_out", phase="decode"),
        AddVector([2], wide(32), by=0.3, site="mlp_out", to="last"),
        ScaleHead([(0, 1), (2, 2)], by=1 + alpha),
    ]
    if kind == "cache":
        edits.append(AddVector([0], wide(handle.geometry.kv_heads, handle.geometry.head_dim), site="v", by=alpha))
    return Plan(edits)


@pytest.mark.parametrize("name", [n for n in harness.BUILDERS if n not in harness.SINGLE])
def test_every_family(name):
    model, _, make_inputs, _ = harness.built(name)
    inputs = [{k: v for k, v in make_inputs(1, "none").items() if k != "labels"}]
    plan = functools.partial(vectors, handle=open_model(model))
    axes = {"kind": ("plain", "cache"), "alpha": (0.0, 0.8)}
    for kind in ("plain", "cache") if name in ("Llama", "LLaVA", "GPT-2") else ("plain",):
        chosen = {**axes, "kind": (kind,)}
        found = plan_grid(model, inputs, plan, chosen, generated(score, limit=3), progress=False)
        assert found.texts == texts(model, inputs, plan, chosen, limit=3)
    axes["kind"] = ("plain",)
    found = plan_grid(model, inputs, plan, axes, difference, progress=False)
    torch.testing.assert_close(found.values[None], one_by_one(model, inputs, plan, axes), rtol=0, atol=1e-6)


def test_on_a_pair():
    model, clean, corrupt = pair("llava-padded")
    for direction, inputs in (("denoise", corrupt), ("noise", clean)):
        sweep = Sweep(model, clean, corrupt, kl(), direction=direction, progress=False)
        found = sweep.grid(split, AXES)
        with torch.no_grad():
            plain = model(**clean).logits[0, -1].log_softmax(-1)
        expected = one_by_one(
            model, [inputs], split, AXES, lambda x, p=plain: (p.exp() * (p - x[0, -1].log_softmax(-1))).sum()
        )
        agree(found.values, expected[0], 1e-10)
        assert (found.clean, found.corrupt) == (sweep.clean, sweep.corrupt)
        assert found.effects.shape == (2, 3, 2)
    sweep = Sweep(model, [clean, corrupt], [corrupt, clean], generated(score, limit=3), progress=False)
    assert sweep.grid(split, AXES).texts == texts(model, [corrupt, clean], split, AXES, limit=3)


def test_kept_on_disk(tmp_path, monkeypatch):
    model, given = prompts("llava", (3, 3))
    options = dict(out=tmp_path, progress=False)
    run = functools.partial(plan_grid, model, given, split, AXES, generated(score, limit=2), **options)
    first, real, calls = run(batch=7), PlanRun._generate, []
    monkeypatch.setattr(PlanRun, "_generate", lambda *a: calls.append(a) or real(*a))
    again = run()
    assert not calls
    assert again.texts == first.texts
    torch.testing.assert_close(again.pairs, first.pairs)
    for change in (
        lambda: plan_grid(model, given[:1], split, AXES, generated(score, limit=2), out=tmp_path, progress=False),
        lambda: plan_grid(
            model, given, split, {**AXES, "gamma": (1.0, 2.6)}, generated(score, limit=2), out=tmp_path, progress=False
        ),
        lambda: plan_grid(model, given, split, AXES, generated(score, limit=3), out=tmp_path, progress=False),
    ):
        with pytest.raises(ValueError, match="holds another sweep"):
            change()
    first.plot(tmp_path / "page.html")


def test_what_is_refused():
    model, given = prompts("llava")
    text, words = prompts("llama")
    metric = logit_diff(A, B)
    scaled = lambda edit: plan_grid(model, given, lambda by: Plan([edit]), {"by": [2.0]}, metric)  # noqa: E731
    cases = [
        (lambda: plan_grid(model, [], split, AXES, metric), ValueError, "no prompts"),
        (lambda: plan_grid(model, given, split, {}, metric), ValueError, "axes is empty"),
        (lambda: plan_grid(model, given, split, {**AXES, "beta": (1, 1)}, metric), ValueError, "distinct values"),
        (lambda: plan_grid(model, given, lambda beta: beta, {"beta": [1]}, metric), TypeError, "gave a int"),
        (
            lambda: plan_grid(model, given, split, AXES, projection(torch.ones(32), 1)),
            NotImplementedError, "reads logits",
        ),
        (lambda: plan_grid(model, given, split, AXES, metric, batch=0), ValueError, "batch is 0"),
        (lambda: scaled(ScaleHead([(0, 1)], by=2.0, rows=[0])), ValueError, "batch rows"),
        (lambda: scaled(ScaleHead([(0, 1)], by=2.0, positions=[0])), NotImplementedError, "positions"),
        (lambda: scaled(ScaleHead([(5, 1)], by=2.0)), ValueError, "layer 5"),
        (lambda: plan_grid(text, words, split, AXES, metric, progress=False), ValueError, "text-only"),
    ]  # fmt: skip
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
