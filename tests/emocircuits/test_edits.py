"""Every edit, alone and all together, against plain loops in float64: padded batches, prefill and decode."""

import copy
import dataclasses as dc

import models
import oracle
import pytest
import torch
import transformers
from random_plans import random_plan
from test_patching import check, forward, generate

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
from emocircuits.families import open_model
from emocircuits.measure import attention_weights


@pytest.fixture(scope="module")
def model():
    return models.build("llava", dtype=torch.float64)


def batch(model):
    """Three prompts of different lengths, padded on the left."""
    return models.batch(
        [models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1), models.prompt(model, 2, 2, seed=2)]
    )


def vector(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_random_plans(model, seed, cache):
    plan = random_plan(open_model(model).geometry, seed)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    check(model, batch(model), plan, **options)


@pytest.mark.parametrize("seed", range(2))
def test_rows_with_different_random_plans(model, seed):
    geometry = open_model(model).geometry
    plan = Plan.per_row([random_plan(geometry, seed), Plan(), random_plan(geometry, seed + 100)])
    check(model, batch(model), plan)


ALONE = {
    "add to heads": lambda: [AddHead([(0, 1), (2, 3)], vector(2, 8), by=2.0)],
    "one vector for all heads": lambda: [AddHead([(0, 1), (2, 3)], vector(8), to=["query", "generated"])],
    "scale, then add, then replace": lambda: [
        ReplaceHead([(1, 1)], vector(8), to="last"),
        AddHead([(1, 1), (1, 2)], vector(8), by=0.5),
        ScaleHead([(1, 1), (1, 2)], by=-2.0),
        AddHead([(1, 2)], vector(8, seed=1), phase="decode"),
    ],
    "add to neurons": lambda: [AddNeurons({2: [5, 1], 0: [7]}, [1.0, 2.0, 3.0], by=4.0)],
    "set neurons": lambda: [ReplaceNeurons({1: [5, 40], 2: [0]}, 3.0, to=["query", "generated"])],
    "set neurons everywhere": lambda: [ReplaceNeurons({1: [5, 40], 2: [0]}, [3.0, -2.0, 5.0])],
    "scale, add and set neurons": lambda: [
        ReplaceNeurons({1: [5]}, 2.0, to="generated"),
        AddNeurons({1: [5, 6]}, 3.0),
        ScaleNeurons({1: [5, 6, 7]}, by=-2.0),
    ],
    "a direction, in units of the row's length": lambda: [
        AddVector([0, 2], vector(2, 32), by=0.5, relative=True, to=["last", "generated"]),
        AddVector([2], vector(32, seed=2), by=-0.3, relative=True),
    ],
    "add and keep the norm": lambda: [
        AddVector([0, 1], vector(32), norm="keep", site="mlp_out", to=["query", "generated"])
    ],
    "keep the norm of two additions and a plain one": lambda: [
        AddVector([1], vector(32), norm="keep"),
        AddVector([1], vector(32, seed=1), by=0.7, norm="keep", relative=True, to="generated"),
        AddVector([1], vector(32, seed=2)),
    ],
    "project out a direction": lambda: [ProjectOut([0, 1, 2], vector(32), to=["query", "visual", "generated"])],
    "project out directions that meet": lambda: [
        ProjectOut([1], vector(2, 32), site="attn_out"),
        ProjectOut([1], vector(32, seed=1), site="attn_out", to=["query", "generated"]),
        ProjectOut([1], vector(2, 32)[:1] * 2, site="attn_out", phase="decode"),
    ],
    "project out, add, keep, set": lambda: [
        ReplaceVector([2], vector(32, seed=3), to="last", site="resid_pre"),
        AddVector([2], vector(32, seed=1), norm="keep", site="resid_pre"),
        AddVector([2], vector(32, seed=2), site="resid_pre"),
        ProjectOut([2], vector(1, 2, 32), site="resid_pre"),
    ],
    "heads at positions": lambda: [
        ScaleHead([(0, 1)], by=-1.0, positions=[0, -1]),
        AddHead([(0, 1)], vector(8), positions=[-1, -2]),
        ReplaceHead([(1, 2)], vector(8), positions=3),
        ScaleHead([(0, 1)], by=2.0, to=["last", "generated"]),
    ],
    "neurons at positions": lambda: [
        AddNeurons({1: [3, 4]}, 3.0, positions=range(2, 6)),
        ScaleNeurons({1: [3]}, by=4.0, positions=[-1], to="last"),
        ScaleNeurons({1: [4]}, by=0.5),
    ],
    "vectors at positions": lambda: [
        AddVector([1], vector(32), positions=[1, -3]),
        ReplaceVector([0], vector(32), site="attn_out", positions=[-2]),
        ProjectOut([2], vector(32), positions=[-1, -2, -4], to=["query", "last"]),
    ],
    "routes at positions": lambda: [
        BoostRoute([(0, 1), (1, 2)], source="visual", by=3.0, positions=[-1, -2]),
        BoostRoute([(0, 1)], source=["visual", "query"], by=0.2, reading="logit-add", positions=[-2, -3]),
        BoostRoute([(0, 1)], to=["query", "generated"], source="visual", by=1.5),
        ScaleHead([(0, 1)], by=2.0),
    ],
    "routes from positions": lambda: [
        BoostRoute([(0, 1), (1, 2)], source=None, by=4.0, source_positions=[0, -2]),
        BoostRoute([(0, 1)], to=["last", "generated"], source="visual", by=0.3, source_positions=range(6, 10)),
        BoostRoute([(0, 1)], source=["visual", "query"], by=1.5, reading="logit-scale"),
        BoostRoute([(0, 1)], to="generated", source=["visual", "query"], by=2.0),
        ScaleHead([(0, 1)], by=2.0),
    ],
    "knock out what one token reads from another": lambda: [
        BoostRoute(
            [(0, h) for h in range(4)],
            by=0.0,
            reading="logit-add",
            positions=[-1],
            source=None,
            source_positions=[-2, -3],
        ),
        BoostRoute([(0, 1)], by=3.0, positions=[-2], source=None, source_positions=[-3, 2]),
    ],
    "more kinds of row than a kernel tells apart": lambda: [
        BoostRoute([(1, 0), (2, 1)], source="visual", by=1.0 + i / 3, positions=[i + 1 - 11, -1]) for i in range(9)
    ],
}


@pytest.mark.parametrize("name", ALONE)
def test_one_edit_alone(model, name):
    check(model, batch(model), Plan(ALONE[name]()))


@pytest.mark.parametrize("name", ALONE)
def test_json(name):
    plan = Plan(ALONE[name]())
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()


def test_values_follow_their_neurons():
    """Layers are sorted in a plan; the values move along."""
    edit = AddNeurons({2: [5, 1], 0: [7]}, [1.0, 2.0, 3.0])
    assert edit.neurons == ((0, (7,)), (2, (5, 1)))
    assert edit.values() == {0: [3.0], 2: [1.0, 2.0]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddHead([(0, 0)], torch.ones(2, 8)), "n_heads"),
        (lambda: AddHead([(0, 0)], torch.ones(8), by=float("nan")), "finite"),
        (lambda: AddHead([(0, 0)]), "non-empty"),
        (lambda: AddNeurons({0: [1, 2]}, [1.0]), r"expected a number or \[2\]"),
        (lambda: ReplaceNeurons({0: [1, 2]}), "non-empty"),
        (lambda: ReplaceNeurons({0: [1, 2]}, "many"), "numbers"),
        (lambda: AddVector([0], torch.ones(4), norm="long"), "free, keep"),
        (lambda: ScaleHead([(0, 0)], positions=[]), "distinct token numbers"),
        (lambda: AddVector([0], torch.ones(2, 4), site="k", to="generated"), "cache"),
        (lambda: AddVector([0], torch.ones(2, 4), site="v", phase="decode"), "cache"),
        (lambda: AddVector([0], torch.ones(4), site="v"), r"\[kv_heads, head_dim\] or \[layers, kv_heads, head_dim\]"),
        (lambda: ProjectOut([0, 1], torch.ones(3, 1, 2, 4), site="k"), r"\[layers, k, kv_heads, head_dim\]"),
        (lambda: ScaleHead([(0, 0)], positions=[1, 1]), "distinct token numbers"),
        (lambda: ScaleHead([(0, 0)], positions="last"), "token numbers"),
        (lambda: ScaleHead([(0, 0)], positions=[1], phase="decode"), "drop phase"),
        (lambda: BoostRoute([(0, 0)], source_positions=[1], phase="decode"), "drop phase"),
        (lambda: BoostRoute([(0, 0)], source_positions=[1], to="generated"), "rows of a prompt only"),
        (lambda: BoostRoute([(0, 0)], source_positions=[]), "source_positions.*distinct token numbers"),
        (lambda: BoostRoute([(0, 0)], source=None), "source is None"),
        (lambda: AddVector([0], torch.ones(4), relative=1), "True or False"),
        (lambda: AddVector([0, 1], torch.tensor([[1.0], [0.0]]), relative=True), "no direction"),
        (lambda: ProjectOut([0], torch.zeros(4)), "no direction"),
        (lambda: ProjectOut([0, 1], torch.ones(3, 1, 4)), r"\[layers, k, d_model\]"),
        (lambda: ProjectOut([0], torch.ones(1, 1, 1, 4)), r"\[layers, k, d_model\]"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (AddHead([(7, 0)], torch.ones(8)), "no layer 7"),
        (AddHead([(0, 4)], torch.ones(8)), "no head 4"),
        (AddHead([(0, 0)], torch.ones(9)), "vector has length 9; this model needs 8"),
        (AddNeurons({0: [48]}, 1.0), "no neuron 48"),
        (ReplaceNeurons({3: [4]}, 1.0), "no layer 3"),
        (ProjectOut([0], torch.ones(2, 31)), "vector has length 31; this model needs 32"),
        (AddVector([0], torch.ones(4, 8), site="k"), r"vector ends in \(4, 8\); .* need \(2, 8\)"),
    ],
)
def test_what_the_model_does_not_have_is_refused(model, edit, message):
    with pytest.raises(ValueError, match=message), patch(model, Plan([edit])):
        pass


def test_folding_refuses_a_neuron_that_is_also_added_to(model):
    gain = ScaleNeurons({1: [5]}, by=2.0)
    with (
        pytest.raises(ValueError, match="neuron 5 of layer 1"),
        patch(model, Plan([gain, AddNeurons({1: [5]}, 1.0)]), fold=True),
    ):
        pass
    other = Plan([gain, AddNeurons({1: [6]}, 1.0)])
    inputs = batch(model)
    with patch(model, other, fold=True):
        folded = forward(model, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(folded[real], oracle.logits(model, inputs, other)[real], rtol=1e-9, atol=1e-9)


def test_projecting_out_leaves_nothing_and_keeping_the_norm_keeps_it(model):
    inputs = batch(model)
    basis = vector(3, 32).double()
    seen = []
    hook = lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
    for edits in ([], [ProjectOut([1], basis)], [AddVector([1], basis[0], by=3.0, norm="keep")]):
        with patch(model, Plan(edits)):
            handle = model.model.language_model.layers[1].register_forward_hook(hook)
            forward(model, inputs)
            handle.remove()
    plain, projected, turned = seen
    assert (projected @ basis.float().double().T).abs().max() < 1e-9 * plain.abs().max()
    assert (projected - plain).abs().max() > 0.1
    torch.testing.assert_close(turned.norm(dim=-1), plain.norm(dim=-1), rtol=1e-9, atol=0)
    assert (turned - plain).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_edited_keep_their_bits(dtype):
    model = models.build("llava", dtype=dtype)
    inputs = models.prompt(model, 3, 5)
    out = []
    edits = [ProjectOut([2], vector(32), to="last"), AddVector([2], vector(32), norm="keep", relative=True, to="last")]
    for plan in (Plan(), Plan(edits)):
        with patch(model, plan):
            out.append(model(**inputs).logits)
    assert torch.equal(out[0][:, :-1], out[1][:, :-1])
    assert not torch.equal(out[0][:, -1], out[1][:, -1])


def test_rows_with_different_positions(model):
    """A position means the token of the unpadded prompt, whatever its column in the batch is."""
    rows = [models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1), models.prompt(model, 2, 2, seed=2)]
    inputs = models.batch(rows)
    plans = [
        Plan([AddVector([1], vector(32), positions=[i, -1 - i]), BoostRoute([(0, 1)], by=3.0, positions=[-1 - i])])
        for i in range(3)
    ]
    plan = Plan.per_row(plans)
    check(model, inputs, plan)
    with patch(model, plan):
        _, together = generate(model, inputs)
    for i, row in enumerate(rows):
        with patch(model, plans[i]):
            _, alone = generate(model, row)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-9)


def test_positions_without_a_cache_and_of_a_chat(model):
    inputs = batch(model)
    plan = Plan([AddVector([1], vector(32), positions=[0, -2]), ScaleHead([(2, 0)], by=3.0, positions=[-1])])
    with patch(model, plan):
        tokens, logits = generate(model, inputs)
        again, without = generate(model, inputs, use_cache=False)
        assert torch.equal(tokens, again)
        torch.testing.assert_close(logits, without, rtol=1e-9, atol=1e-9)
    # A second prompt on the cache: positions count from the beginning, those that have been run do nothing again.
    with patch(model, Plan()) as patched:
        one = models.prompt(model, 3, 5)
        n = one["input_ids"].shape[1]
        for position, changed in ((n - 1, True), (-1, True), (0, False), (n - 3, False)):
            edited = Plan([AddVector([2], vector(32), positions=[position])])
            out = []
            for each in (Plan(), edited):
                first = model(input_ids=one["input_ids"][:, : n - 2], pixel_values=one["pixel_values"], use_cache=True)
                patched.replace(each)
                out.append(model(input_ids=one["input_ids"][:, n - 2 :], past_key_values=first.past_key_values).logits)
                patched.replace(Plan())
            assert torch.equal(out[0][:, 0], out[1][:, 0])
            assert torch.equal(out[0][:, 1], out[1][:, 1]) != changed


def test_a_prompt_without_the_position(model):
    inputs = batch(model)
    for plan in (Plan([ScaleHead([(0, 0)], positions=[21])]), Plan([ScaleHead([(0, 0)], positions=[-25])])):
        with pytest.raises(ValueError, match=r"edit 0 \(ScaleHead\) names position .* batch row"), patch(model, plan):
            model(**inputs)
    with patch(model, Plan([ScaleHead([(0, 0)], positions=[24], rows=[1])])):
        model(**inputs)


CACHED = {
    "add to values": lambda: [AddVector([0, 2], vector(2, 2, 8), site="v", by=2.0, to=["visual", "last"])],
    "add to keys at positions": lambda: [AddVector([1], vector(2, 8), site="k", by=3.0, positions=[0, -1, -3])],
    "set, project out, keep the norm": lambda: [
        ReplaceVector([1], vector(2, 8), site="v", to="query"),
        ProjectOut([0, 1], vector(2, 2, 2, 8), site="v"),
        AddVector([1, 2], vector(2, 8), site="k", norm="keep", relative=True, to=["visual", "query"]),
        AddVector([2], vector(2, 8, seed=1), site="k", relative=True, by=0.5, rows=[1]),
    ],
}


def check_cached(model, inputs, plan, **options):
    """Every decode step equals the oracle, the prompt is as without the plan, and the plan changed something."""
    plain = forward(model, inputs)
    with patch(model, plan):
        assert torch.equal(forward(model, inputs), plain)
        tokens, steps = generate(model, inputs, **options)
    full = oracle.logits(model, inputs, plan, tokens[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
    scale = full.abs().max()
    assert (steps - full).abs().max() <= 1e-9 * scale
    unedited = oracle.logits(model, inputs, Plan(), tokens[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
    assert (full - unedited)[:, 1:].abs().amax((1, 2)).min() > 1e-3 * scale


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CACHED)
def test_cached_keys_and_values(model, name, cache):
    plan = Plan(CACHED[name]())
    if any(edit.rows for edit in plan):
        plan = Plan([dc.replace(edit, rows=edit.rows or (0, 1, 2)) for edit in plan])
    assert Plan.from_json(plan.to_json()) == plan
    options = {"cache_implementation": "static"} if cache == "static" else {}
    check_cached(model, batch(model), plan, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("window", [12, 64])
def test_what_a_sliding_cache_has_kept(cache, window):
    model = models.build("llava", "mistral", torch.float64, sliding_window=window)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    plan = Plan([AddVector([0, 1, 2], vector(2, 8), site="v"), AddVector([1], vector(2, 8), site="k", to="query")])
    check_cached(model, models.prompt(model, 3, 5), plan, **options)


def test_a_second_prompt_edits_its_own_columns_once(model):
    one = models.prompt(model, 3, 9)
    n = one["input_ids"].shape[1]
    first, second = one["input_ids"][:, : n - 4], one["input_ids"][:, n - 4 :]
    add = vector(2, 8).double()
    with patch(model, Plan()):
        cache = model(input_ids=first, pixel_values=one["pixel_values"], use_cache=True).past_key_values
        model(input_ids=second, past_key_values=cache)
        plain = [(layer.keys, layer.values) for layer in cache.layers]
    with patch(model, Plan([AddVector([2], add, site="v"), AddVector([2], add, site="k", to="visual")])):
        cache = model(input_ids=first, pixel_values=one["pixel_values"], use_cache=True).past_key_values
        model(input_ids=second, past_key_values=cache)
        edited = [(layer.keys, layer.values) for layer in cache.layers]
    image = (one["input_ids"] == models.IMAGE)[0]
    shift = add.float().double()[None, :, None, :]
    # The layer above reads edited values in the second prompt only; it is the last one, so nothing follows from that.
    torch.testing.assert_close(edited[2][1], plain[2][1] + shift, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(edited[2][0], plain[2][0] + shift * image[None, None, :, None], rtol=1e-12, atol=1e-12)
    assert torch.equal(edited[1][1], plain[1][1])


def test_gradients_through_an_edited_cache(model):
    inputs = models.prompt(model, 3, 5)
    inputs["pixel_values"].requires_grad_()
    with patch(model, Plan([AddVector([1], vector(2, 8), site="v"), ReplaceVector([2], vector(2, 8), site="k")])):
        cache = model(**inputs, use_cache=True).past_key_values
        out = model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits
    (gradient,) = torch.autograd.grad(out.sum(), inputs["pixel_values"])
    assert gradient.abs().sum() > 0


def test_edits_of_a_cache_need_one(model):
    inputs = batch(model)
    plan = Plan([AddVector([1], vector(2, 8), site="v")])
    for use in (lambda: model(**inputs, use_cache=False), lambda: generate(model, inputs, use_cache=False)):
        with pytest.raises(ValueError, match="use_cache=True"), patch(model, plan):
            use()
    with pytest.raises(NotImplementedError, match="offloaded"), patch(model, plan):
        model(**inputs, past_key_values=transformers.DynamicCache(offloading=True))


def test_beams_of_rows_with_different_positions(model):
    """Every beam of a row has the row's positions and cache edits."""
    rows = [models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)]
    plans = [
        Plan([AddVector([1], vector(32), positions=[-1 - i, 2]), AddVector([0], vector(2, 8), site="v", positions=[i])])
        for i in range(2)
    ]
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with patch(model, Plan.per_row(plans)):
        together = model.generate(**models.batch(rows), **options)[:, -4:]
    for i, row in enumerate(rows):
        with patch(model, plans[i]):
            alone = model.generate(**row, **options)[:, -4:]
        assert torch.equal(alone, together[2 * i : 2 * i + 2])
        assert not torch.equal(alone, model.generate(**row, **options)[:, -4:])


def test_more_kinds_of_key_than_a_kernel_tells_apart(model):
    several = [BoostRoute([(1, 0)], source=None, by=2.0 + i, source_positions=[i]) for i in range(7)]
    with pytest.raises(NotImplementedError, match="layer 1 tell more than 6 kinds"), patch(model, Plan(several)):
        model(**batch(model))
    check(model, batch(model), Plan(several[:5]))


def test_rows_with_different_source_positions(model):
    rows = [models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1), models.prompt(model, 2, 2, seed=2)]
    plans = [
        Plan([BoostRoute([(1, 0)], source=None, by=3.0 + i + j, source_positions=[i + j]) for j in range(4)])
        for i in range(3)
    ]
    check(model, models.batch(rows), Plan.per_row(plans))


def test_source_positions_of_a_chat_and_without_a_cache():
    model = models.build("llava", "mistral", torch.float64, sliding_window=14)
    plan = Plan([BoostRoute([(0, 1), (1, 1)], source=None, by=5.0, source_positions=[9, 12, -1])])
    inputs = models.prompt(model, 3, 9)
    n = inputs["input_ids"].shape[1]
    with patch(model, plan):
        tokens, logits = generate(model, inputs)
        again, without = generate(model, inputs, use_cache=False)
        assert torch.equal(tokens, again)
        torch.testing.assert_close(logits, without, rtol=1e-9, atol=1e-9)
    # The second prompt sees keys 9 and 12 in the cache; the first one has no other token at their positions.
    with patch(model, Plan([BoostRoute([(1, 1)], source=None, by=5.0, source_positions=[16, n - 1])])) as patched:
        whole = model(**inputs).logits
        patched.replace(Plan())
        first = model(input_ids=inputs["input_ids"][:, : n - 3], pixel_values=inputs["pixel_values"], use_cache=True)
        patched.replace(Plan([BoostRoute([(1, 1)], source=None, by=5.0, source_positions=[16, n - 1])]))
        rest = model(input_ids=inputs["input_ids"][:, n - 3 :], past_key_values=first.past_key_values).logits
    plain = model(**inputs).logits
    assert (whole - plain)[:, n - 3 :].abs().max() > 1e-3
    assert (rest - plain[:, n - 3 :]).abs().max() > 1e-3


def test_attention_of_single_positions_cannot_be_read(model):
    inputs = models.prompt(model, 3, 5)
    plan = Plan([BoostRoute([(1, 0)], source="visual", by=2.0, positions=[-1])])
    with pytest.raises(NotImplementedError, match="attention of layer 1 cannot be read"):
        attention_weights(model, inputs, plan)
    plan = Plan([BoostRoute([(1, 0)], source=None, by=2.0, source_positions=[-1])])
    with pytest.raises(NotImplementedError, match="attention of layer 1 cannot be read"):
        attention_weights(model, inputs, plan)
    attention_weights(model, inputs, Plan([AddVector([1], vector(32), positions=[-1])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_within_twice_the_plain_error(model, dtype):
    low = copy.deepcopy(model).to(dtype)
    rounded = copy.deepcopy(low).double()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(model).items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}

    def error(plan):
        with patch(low, plan):
            tokens, steps = generate(low, inputs)
        expected = oracle.logits(rounded, exact, plan, tokens[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
        return (steps.double() - expected).abs().max()

    assert error(random_plan(open_model(model).geometry)) <= 2 * error(Plan())
