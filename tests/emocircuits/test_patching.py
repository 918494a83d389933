"""patch() against an independent float64 oracle, and against the model left alone."""

import copy
import hashlib
import json
import random

import models
import oracle
import pytest
import torch

from emocircuits import AddVector, BoostRoute, Plan, ReplaceHead, ReplaceVector, ScaleHead, ScaleNeurons, patch
from emocircuits.roles import prompt_roles
from emokernels import Role

FAMILIES = [
    ("llava", "llama"),
    ("llava", "qwen2"),
    ("llava", "mistral"),
    ("llava_next", "llama"),
    ("llava_onevision", "qwen2"),
]
SUPPRESS = [models.IMAGE, 6, models.PAD]
STEPS = 4


def everything(rows=None, seed=0):
    """A plan with every kind of edit, reading and site."""
    g = torch.Generator().manual_seed(seed)

    def vector(n):
        return torch.randn(n, generator=g)

    return Plan(
        [
            BoostRoute([(0, 1), (1, 0), (2, 3)], to=["query", "last"], source="visual", by=1.7, rows=rows),
            BoostRoute([(0, 1), (2, 2)], to="generated", source="visual", by=2.5, rows=rows),
            BoostRoute(
                [(0, 0), (1, 0)], to="query", source=["visual", "system"], by=1.6, reading="logit-add", rows=rows
            ),
            BoostRoute([(1, 2)], to=None, source="visual", by=0.7, reading="logit-scale", rows=rows),
            BoostRoute([(1, 3)], to=["last", "generated"], source="visual", by=0.4, reading="logit-abs", rows=rows),
            BoostRoute(
                [(2, 0)], to="generated", source="visual", by=0.0, reading="logit-add", phase="decode", rows=rows
            ),
            ScaleHead([(0, 2), (2, 1)], by=0.3, to=["query", "generated"], rows=rows),
            ReplaceHead([(1, 1), (2, 1)], value=torch.stack([vector(8), vector(8)]), to="last", rows=rows),
            ScaleNeurons({0: [3, 7], 2: [11, 40, 2]}, by=1.8, rows=rows),
            ScaleNeurons({2: [11]}, by=0.5, phase="decode", rows=rows),
            AddVector([0, 2], vector(32), by=0.3, rows=rows),
            AddVector([1], vector(32), site="resid_pre", to="query", rows=rows),
            AddVector([1], vector(32), site="attn_out", phase="decode", rows=rows),
            ReplaceVector([0], vector(32), site="mlp_out", to="last", rows=rows),
        ]
    )


def prompts(model):
    kind = model.config.model_type
    wide = [(16, 32)] if kind != "llava" else [(16, 16)]
    return [
        models.prompt(model, 3, 5),
        models.prompt(model, 2, 7, [*wide, (16, 16)], between=2, seed=1),
        models.prompt(model, 0, 1, wide, seed=2),
    ]


def generate(model, inputs, **options):
    """Greedy tokens ``[B, T]`` and the logits ``[B, T, V]`` they came from, as computed (generate() rounds)."""
    steps = []
    hook = model.lm_head.register_forward_hook(lambda m, a, out: steps.append(out[:, -1]))
    try:
        out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=SUPPRESS, **options)
    finally:
        hook.remove()
    return out[:, inputs["input_ids"].shape[1] :], torch.stack(steps, 1)


def forward(model, inputs):
    """Logits of a prompt, with the positions that generate() gives to padded rows."""
    return model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits


def check(model, inputs, plan, tolerance=1e-9, **options):
    """Prefill and every decode step of a patched generation equal the oracle."""
    with patch(model, plan, **{k: options.pop(k) for k in ("backend",) if k in options}):
        prefill = forward(model, inputs)
        tokens, steps = generate(model, inputs, **options)
    full = oracle.logits(model, inputs, plan, tokens[:, :-1])
    n = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    scale = full.abs().max()
    assert (prefill[real] - full[:, :n][real]).abs().max() <= tolerance * scale
    last = real.long().cumsum(-1).argmax(-1)
    if (last == n - 1).all():
        expected = full[:, n - 1 :]
        assert (steps - expected).abs().max() <= tolerance * scale
    plain = forward(model, inputs)
    assert (plain[real] - prefill[real]).abs().max() > 1e-3 * scale, (
        "the plan changed nothing: the test would not notice"
    )


@pytest.mark.parametrize(("family", "text"), FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_equals_float64_oracle(family, text, cache):
    model = models.build(family, text, torch.float64)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    for inputs in prompts(model):
        check(model, inputs, everything(), **options)


@pytest.mark.parametrize(("family", "text"), FAMILIES[:1] + FAMILIES[3:])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_padded_batch_equals_oracle_and_each_row_alone(family, text, cache, backend):
    model = models.build(family, text, torch.float64)
    rows = prompts(model)
    rows = [r for r in rows if "pixel_values" not in r or r["pixel_values"].shape[0] == 1]
    inputs = models.batch(rows)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    check(model, inputs, everything(), backend=backend, **options)
    with patch(model, everything(), backend=backend):
        together, together_logits = generate(model, inputs, **options)
        for i, row in enumerate(rows):
            alone, alone_logits = generate(model, row, **options)
            assert torch.equal(alone[0], together[i])
            assert torch.allclose(alone_logits[0], together_logits[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reading", ["weight", "logit-add"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prompts_that_follow_each_other_in_one_patch(reading, cache):
    """Decode steps are analysed once a prompt: the next prompt, with another layout, must not inherit that."""
    model = models.build("llava", "llama", torch.float64)
    boost = [(0, 1), (1, 0), (1, 3), (2, 2)]
    plan = Plan(
        [
            BoostRoute(boost, to="query", source="visual", by=2.0, reading=reading),
            BoostRoute(boost, to="generated", source=["visual", "system"], by=3.0, reading=reading),
        ]
    )
    options = {"cache_implementation": "static"} if cache == "static" else {}
    untouched = copy.deepcopy(model)
    singles = [models.prompt(model, 3, 5), models.prompt(model, 7, 2, seed=1), models.prompt(model, 1, 12, seed=2)]
    with patch(model, plan):
        for inputs in (*singles, models.batch(singles), models.batch(singles[1:]), singles[0]):
            tokens, steps = generate(model, inputs, **options)
            full = oracle.logits(untouched, inputs, plan, tokens[:, :-1])
            expected = full[:, inputs["input_ids"].shape[1] - 1 :]
            assert (steps - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_right_padding():
    model = models.build("llava", "llama", torch.float64)
    inputs = models.batch([r for r in prompts(model) if r["pixel_values"].shape[0] == 1], side="right")
    plan = everything()
    with patch(model, plan):
        got = forward(model, inputs)
    real = inputs["attention_mask"].bool()
    assert torch.allclose(got[real], oracle.logits(model, inputs, plan)[real], rtol=1e-9, atol=1e-9)


def test_rows_with_different_plans():
    model = models.build("llava", "llama", torch.float64)
    rows = [models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1), models.prompt(model, 2, 2, seed=2)]
    inputs = models.batch(rows)
    plans = [everything(seed=1), Plan([ScaleHead([(1, 1)], by=-2.0)]), Plan([])]
    plan = Plan.per_row(plans)
    check(model, inputs, plan)
    with patch(model, plan):
        together, logits = generate(model, inputs)
    for i, (row, own) in enumerate(zip(rows, plans, strict=True)):
        with patch(model, own):
            alone, alone_logits = generate(model, row)
        assert torch.equal(alone[0], together[i])
        assert torch.allclose(alone_logits[0], logits[i], rtol=1e-9, atol=1e-9)


def test_a_model_that_was_loaded_with_eager_attention():
    model = models.build("llava", "llama", torch.float64)
    model.set_attn_implementation("eager")
    check(model, models.prompt(model, 3, 5), everything())
    assert model.model.language_model.config._attn_implementation == "eager"


def test_gradients_after_a_generation_in_inference_mode():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 5)
    with patch(model, everything()):
        with torch.inference_mode():
            generate(model, inputs)
        model(**inputs).logits.sum().backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_what_was_set_on_the_model_object_comes_back():
    model = models.build("llava")
    own = model.generate
    model.generate = lambda *args, **kwargs: own(*args, **kwargs)
    mine = model.generate
    with patch(model, everything()):
        generate(model, models.prompt(model, 3, 5))
    assert model.generate is mine


def test_sliding_window_cache_keeps_roles_aligned():
    model = models.build("llava", "mistral", torch.float64, sliding_window=12)
    check(model, models.prompt(model, 3, 5), everything())


def test_replace_head_by_prompt_column():
    model = models.build("llava", "llama", torch.float64)
    inputs = models.batch([models.prompt(model, 3, 5), models.prompt(model, 2, 3, seed=1)])
    b, n = inputs["input_ids"].shape
    value = torch.randn(b, n, 2, 8)
    check(model, inputs, Plan([ReplaceHead([(1, 0), (2, 3)], value=value, to=["query", "last"])]))
    check(model, inputs, Plan([ReplaceHead([(1, 0), (2, 3)], value=value)]))
    check(model, inputs, Plan([ReplaceHead([(1, 0), (2, 3)], value=value)]), use_cache=False)
    plan = Plan([ReplaceHead([(1, 0), (2, 3)], value=value[:, :-1])])
    with patch(model, plan), pytest.raises(ValueError, match="prompt"):
        model(**inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_within_twice_the_plain_error(dtype):
    exact = models.build("llava", "llama", torch.float64)
    model = copy.deepcopy(exact).to(dtype)
    rounded = copy.deepcopy(model).double()
    inputs = models.batch([models.prompt(exact, 3, 5), models.prompt(exact, 1, 9, seed=1)])
    low = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in low.items()}
    real = inputs["attention_mask"].bool()
    plan = everything()
    budget = (forward(model, low).double() - forward(rounded, inputs))[real].abs().max()
    with patch(model, plan):
        got = forward(model, low).double()
    assert (got - oracle.logits(rounded, inputs, plan))[real].abs().max() <= 2 * budget


@pytest.mark.parametrize(("family", "text"), [*FAMILIES, ("text", "llama")])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_empty_plan_is_bit_identical(family, text, implementation):
    model = models.build(family, text)
    model.set_attn_implementation(implementation)
    inputs = models.prompt(model, 3, 5, [] if family == "text" else None)
    tokens, logits = generate(model, inputs)
    expected = model(**inputs).logits
    for plan in (
        Plan(),
        Plan([BoostRoute([(0, 0)], to="query", by=1.0, source="query"), ScaleNeurons({1: [3]}, by=1.0)]),
    ):
        with patch(model, plan):
            patched_tokens, patched_logits = generate(model, inputs)
            assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(tokens, patched_tokens)
        assert torch.equal(logits, patched_logits)


def snapshot(model):
    """Everything of a model that patch() could leave changed."""
    weights = {
        k: hashlib.sha256(v.detach().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()
        for k, v in model.state_dict().items()
    }
    configs = [
        json.dumps(m.config.to_dict(), sort_keys=True, default=str) for m in model.modules() if hasattr(m, "config")
    ]
    implementations = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    modules = [
        (n, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    ]
    return weights, configs, implementations, modules


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_leaving_restores_the_model(implementation):
    model = models.build("llava")
    model.set_attn_implementation(implementation)
    inputs = models.prompt(model, 3, 5)
    generate(model, inputs)  # transformers itself leaves caches on a model at its first generation
    before, logits = snapshot(model), model(**inputs).logits
    with patch(model, everything()) as patched:
        model(**inputs)
        assert snapshot(model) != before
        patched.replace(everything(seed=3))
        generate(model, inputs)
    assert snapshot(model) == before
    with pytest.raises(KeyError), patch(model, everything()):
        model(**inputs)
        raise KeyError
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, logits)


def test_replace_equals_a_fresh_patch():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 5)
    first, second = Plan([ScaleHead([(0, 0)], by=0.0)]), everything()
    with patch(model, second):
        expected = generate(model, inputs)[1]
    with patch(model, first) as patched:
        generate(model, inputs)
        patched.replace(second)
        assert torch.equal(generate(model, inputs)[1], expected)
        with pytest.raises(ValueError, match="no layer 9"):
            patched.replace(Plan([ScaleHead([(9, 0)], by=0.0)]))
        assert torch.equal(generate(model, inputs)[1], expected), "a refused plan must leave the old one in force"


def test_continued_prompt_on_a_kept_cache_equals_one_prompt():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 9)
    n = inputs["input_ids"].shape[1]
    plan = Plan([BoostRoute([(0, 1), (2, 3)], to="query", by=2.0), ScaleNeurons({1: [4]}, by=2.0)])
    with patch(model, plan):
        whole = model(**inputs).logits
        first = model(input_ids=inputs["input_ids"][:, : n - 4], pixel_values=inputs["pixel_values"], use_cache=True)
        rest = model(input_ids=inputs["input_ids"][:, n - 4 :], past_key_values=first.past_key_values).logits
    # The first part ended in a LAST row that is a QUERY row of the whole; everything else has the same role.
    assert rest.shape[1] == 4
    assert torch.isfinite(rest).all()
    assert whole.shape[1] == n


def test_generation_without_a_cache_equals_generation_with_one():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 5)
    with patch(model, everything()):
        a = generate(model, inputs)
        b = generate(model, inputs, use_cache=False)
    assert torch.equal(a[0], b[0])
    assert torch.allclose(a[1], b[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_roles_equal_a_count_by_hand(seed):
    rng = random.Random(seed)
    rows = []
    for _ in range(3):
        ids = [rng.choice([5, 9, 10, 11]) for _ in range(rng.randint(1, 12))]
        rows.append({"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)})
    inputs = models.batch(rows, side=rng.choice(["left", "right"]))
    roles = prompt_roles(inputs["input_ids"], inputs["attention_mask"].bool(), [5])
    expected = oracle.roles_of(inputs["input_ids"], inputs["attention_mask"], {5})
    assert [[Role(r).name.lower() for r in row] for row in roles.tolist()] == expected


def test_given_roles_and_inputs_embeds():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 5)
    plan = everything()
    roles = prompt_roles(inputs["input_ids"], None, [models.IMAGE])
    with patch(model, plan):
        expected = model(**inputs).logits
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    image = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output[0]
    embeds[inputs["input_ids"] == models.IMAGE] = image
    with patch(model, plan, roles=roles):
        assert torch.allclose(model(inputs_embeds=embeds).logits, expected, rtol=1e-12, atol=1e-12)
    with patch(model, plan), pytest.raises(ValueError, match="roles"):
        model(inputs_embeds=embeds)


def test_autograd_through_a_patched_forward():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 5)
    inputs["pixel_values"].requires_grad_()
    plan = everything()
    with patch(model, plan):
        (a,) = torch.autograd.grad(model(**inputs).logits.square().sum(), inputs["pixel_values"])
    with torch.enable_grad():
        roles = oracle.roles_of(inputs["input_ids"], inputs["attention_mask"], {models.IMAGE})
        with oracle.installed(model, plan, roles):
            (b,) = torch.autograd.grad(model(**inputs, use_cache=False).logits.square().sum(), inputs["pixel_values"])
    assert torch.allclose(a, b, rtol=1e-7, atol=1e-9 * b.abs().max())
