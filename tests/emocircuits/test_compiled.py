"""A decode step of a patched model as one compiled graph, which follows refilled tables without a recompile."""

import models
import pytest
import torch
from transformers import StaticCache

import emokernels as emo
from emocircuits import (
    AddHead,
    AddNeurons,
    AddVector,
    BoostRoute,
    Plan,
    ProjectOut,
    ReplaceHead,
    ReplaceNeurons,
    ReplaceVector,
    ScaleHead,
    ScaleNeurons,
    patch,
)

LENGTH = 64


def emokernels_fused():
    return next(b.available for b in emo.backends() if b.name == "fused")


def plan(by=1.7, scale=0.5, neurons=(3, 7)):
    return Plan(
        [
            BoostRoute(heads=[(0, 1), (1, 2)], to=["query", "generated"], source="visual", by=by),
            BoostRoute(heads=[(1, 0)], to=["generated"], source="query", by=by, reading="logit-add"),
            ScaleNeurons({1: list(neurons)}, by=by),
            ScaleHead(heads=[(2, 0)], by=scale),
            ReplaceHead(heads=[(2, 1)], value=torch.full((8,), scale)),
            AddVector(layers=[1], vector=torch.full((32,), 0.1), site="resid_post", by=by),
        ]
    )


def prompts(model, more=0):
    return models.batch([models.prompt(model, 3, 5 + more), models.prompt(model, 1, 9 + more, seed=1)])


@torch.no_grad()
def generate(model, inputs, step, tokens=4):
    """Logits of a greedy generation on a static cache: the prompt eagerly, every further token by `step`."""
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=LENGTH)
    mask = torch.zeros(2, LENGTH, dtype=torch.long)
    columns = inputs["input_ids"].shape[1]
    mask[:, :columns] = inputs["attention_mask"]
    out = model(**inputs, past_key_values=cache, use_cache=True)
    logits = [out.logits[:, -1]]
    for _ in range(tokens):
        mask = mask.clone()
        mask[:, columns] = 1
        columns += 1
        out = step(
            input_ids=logits[-1].argmax(-1, keepdim=True),
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llava", "text"])
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_serves_every_step_prompt_and_plan(family, compiler):
    model = models.build(family)
    if family == "text":
        plans = [Plan([ScaleHead([(1, 0)], by=b), ScaleNeurons({1: [3]}, by=b)]) for b in (0.5, 2.0)]
        inputs = [
            models.batch([models.prompt(model, 3, 5, sizes=[]), models.prompt(model, 1, n, sizes=[])]) for n in (9, 12)
        ]
    else:
        plans = [plan(), plan(by=0.6, scale=-1.0, neurons=(1, 5))]
        inputs = [prompts(model), prompts(model, more=3)]
    expected = []
    for each, given in zip(plans, inputs, strict=True):
        with patch(model, each):
            expected.append(generate(model, given, model))
    assert not torch.allclose(expected[0], expected[1])
    with patch(model, plans[0]) as patched:
        step = torch.compile(model, fullgraph=True, backend=compiler)
        got = [generate(model, inputs[0], step)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            patched.replace(plans[1])
            got.append(generate(model, inputs[1], step))
            patched.replace(plans[0])
            got.append(generate(model, inputs[0], step))
    # Stock attention shares grouped keys in another way while a graph is traced.
    for one, two in zip(got, [*expected, expected[0]], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5)


@pytest.mark.skipif(not emokernels_fused(), reason="the Triton kernels need a GPU or TRITON_INTERPRET=1")
def test_one_graph_on_the_fused_kernels():
    model = models.build("llava")
    with patch(model, plan()):
        expected = generate(model, prompts(model), model, tokens=2)
    with patch(model, plan(by=0.6), backend="fused") as patched:
        step = torch.compile(model, fullgraph=True, backend="eager")
        generate(model, prompts(model), step, tokens=1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            patched.replace(plan())
            got = generate(model, prompts(model), step, tokens=2)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_sliding_cache_in_a_compiled_step():
    """Columns that the cache has dropped take their roles with them."""
    model = models.build("llava", text="mistral", sliding_window=32)
    inputs = models.batch([models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)])
    with patch(model, plan()):
        expected = generate(model, inputs, model, tokens=12)
        got = generate(model, inputs, torch.compile(model, fullgraph=True, backend="eager"), tokens=12)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_a_prompt_through_a_compiled_model_breaks_the_graph_and_is_right():
    model = models.build("llava")
    inputs = prompts(model)
    for each in (plan(), every_edit(0.6, [3, 7], [0, -2])):
        with torch.no_grad(), patch(model, each):
            expected = model(**inputs)
            got = torch.compile(model, backend="eager")(**inputs)
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=2e-5)
        for one, two in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close(one.keys, two.keys, rtol=0, atol=2e-5)
            torch.testing.assert_close(one.values, two.values, rtol=0, atol=2e-5)


def every_edit(by, neurons, positions):
    """A plan of every edit that acts in a decode step, or on what it reads."""

    def vector(*shape):
        return by * torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))

    return Plan(
        [
            BoostRoute([(0, 1), (1, 2)], to=["query", "generated"], source="visual", by=by),
            BoostRoute([(0, 1)], source="visual", by=2 * by, positions=positions),
            ScaleHead([(2, 0)], by=by),
            AddHead([(2, 0), (2, 2)], vector(2, 8), by=by),
            ReplaceHead([(2, 1)], vector(8), to=["last", "generated"]),
            ScaleNeurons({1: neurons}, by=by),
            AddNeurons({1: neurons}, by, phase="decode"),
            ReplaceNeurons({1: neurons[:1]}, by, to=["last", "generated"]),
            AddVector([0], vector(32), site="mlp_out", by=by, relative=True),
            AddVector([1], vector(32), by=by, norm="keep", rows=[1]),
            AddVector([1], vector(32), by=by, positions=positions),
            ProjectOut([2], vector(2, 32), site="resid_pre"),
            ReplaceVector([2], vector(32), site="attn_out", phase="decode", rows=[0]),
            AddVector([1], vector(2, 8), site="v", by=by),
            AddVector([0], vector(2, 8), site="k", by=by, to="visual"),
        ]
    )


def test_one_graph_serves_every_kind_of_edit():
    """Another plan of the same form, on a prompt of another length, fills the same tables."""
    model = models.build("llava")
    plans = [every_edit(0.6, [3, 7], [0, -2]), every_edit(0.8, [5, 1], [1, -3])]
    inputs = [prompts(model), prompts(model, more=3)]
    expected = []
    for each, given in zip(plans, inputs, strict=True):
        with patch(model, each):
            expected.append(generate(model, given, model))
    assert (expected[0] - expected[1]).abs().max() > 0.1
    with patch(model, plans[0]) as patched:
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = [generate(model, inputs[0], step)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            patched.replace(plans[1])
            got.append(generate(model, inputs[1], step))
            patched.replace(plans[0])
            got.append(generate(model, inputs[0], step))
    for one, two in zip(got, [*expected, expected[0]], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=5e-5)
