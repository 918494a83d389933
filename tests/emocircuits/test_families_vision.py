"""Every vision-language family against the oracle: roles, all edits, every way to generate; DeepStack, masks."""

import families_harness as harness
import oracle
import oracle_layouts
import pytest
import torch
import transformers
from families_vision_models import (
    CLIP_TOWER,
    END,
    IMAGE,
    INDEX,
    SQUARE,
    START,
    VIDEO,
    VISION,
    WIDE,
    join,
    patches,
    row,
    square,
    tiles,
    vision,
)
from random_plans import random_plan

from emocircuits import AddVector, BoostRoute, Plan, ReplaceVector, patch
from emocircuits.families import FAMILIES, open_model
from emokernels import Role

# generate() of the untouched PaliGemma 2 fails on a static cache: it gives a dict of masks to a model that expects one.
NO_STATIC = ("PaliGemma 2",)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -- every family ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_sites_add_up_and_placeholders_are_what_the_model_fills(name):
    """Residual + attention + MLP (+ DeepStack) is the residual; rows that are not their id's embedding are visual."""
    model, make_inputs = VISION[name](torch.float64)
    handle = open_model(model)
    assert model.config.model_type in handle.family.model_types
    if name != "Aya Vision":
        assert model.config.get_text_config().model_type in handle.family.decoders, "recognised by structure"
    assert handle.text is oracle_layouts.decoder(model)
    inputs = make_inputs(3, "left")
    seen, entering = {}, []
    hooks = [handle.layers[0].register_forward_pre_hook(lambda m, a, k: entering.append(of(a, k)), with_kwargs=True)]

    def of(args, kwargs):
        return args[0] if args else kwargs["hidden_states"]

    for site in ("resid_pre", "resid_post", "attn_out", "mlp_out"):
        module, enters = handle.site(site, 1)
        if enters:
            hook = lambda m, a, k, site=site: seen.__setitem__(site, of(a, k))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            hook = lambda m, a, o, site=site: seen.__setitem__(site, o[0] if isinstance(o, tuple) else o)  # noqa: E731
            hooks.append(module.register_forward_hook(hook))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    visual = torch.isin(inputs["input_ids"], torch.tensor(handle.placeholder_ids()))
    assert visual.any(-1).all()
    filled = (entering[0] != model.get_input_embeddings()(inputs["input_ids"])).any(-1)
    assert torch.equal(filled, visual)
    extra = seen["resid_post"] - seen["resid_pre"] - seen["attn_out"] - seen["mlp_out"]
    stacked = extra.abs().amax(-1) > 1e-9
    assert torch.equal(stacked, visual if handle.family.between_layers else torch.zeros_like(visual))


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_roles_of_padded_prompts_with_several_images(name):
    model, make_inputs = VISION[name](torch.float32)
    inputs = make_inputs(3, "left")
    expected = oracle.roles_of(inputs["input_ids"], inputs["attention_mask"], {IMAGE, VIDEO})
    with patch(model, Plan([])) as patched:
        model(**inputs)
        assert [[Role(r).name.lower() for r in row] for row in patched.context.rows.tolist()] == expected
    assert len({tuple(row) for row in expected}) == 3
    assert all("visual" in row for row in expected)


@pytest.mark.parametrize("name", VISION)
def test_a_random_plan_equals_the_oracle(name):
    harness.check(name, [run for run in harness.RUNS[:2] if name not in NO_STATIC or run.cache == "dynamic"])


@pytest.mark.parametrize("name", [name for name in VISION if name not in NO_STATIC])
def test_an_empty_plan_changes_no_bit_on_a_static_cache(name):
    model, make_inputs = VISION[name](torch.float32)
    inputs, run = make_inputs(2, "left"), harness.Run("static", compiled=False)
    plain = harness.generate(model, inputs, run)[1]
    with patch(model, Plan([])):
        assert torch.equal(harness.generate(model, inputs, run)[1], plain)


@pytest.mark.parametrize(
    ("name", "look"),
    [("LLaVA-NeXT", tiles), ("Qwen3-VL", patches), ("Gemma 3 (vision)", square((START,), (END,)))],
)
@torch.no_grad()
def test_a_row_without_an_image_beside_rows_with_some(name, look):
    """Edits that need visual tokens name the rows that have some; the other row has text of role QUERY."""
    model, _ = VISION[name](torch.float64)
    rows = [row(model, look, layout, seed=n) for n, layout in enumerate([[1, SQUARE, 2, WIDE, 1], [6], [3, SQUARE, 1]])]
    inputs = join(model, rows)
    plan = random_plan(open_model(model).geometry, seed=2, visual=True, rows=[0, 2])
    other = random_plan(open_model(model).geometry, seed=3, visual=False, rows=[1])
    with patch(model, plan + other):
        tokens, got = harness.generate(model, inputs)
    full = oracle.logits(model, inputs, plan + other, tokens[:, :-1])
    assert harness.distance(got.double(), full[:, inputs["input_ids"].shape[1] - 1 :]) < 1e-6
    with patch(model, random_plan(open_model(model).geometry)), pytest.raises(ValueError, match="batch row 1 has none"):
        model(**inputs)


@pytest.mark.parametrize("name", [name for name in VISION if name not in NO_STATIC])
def test_a_compiled_step_equals_the_oracle(name):
    harness.check(name, harness.RUNS[2:3], seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_STATIC)
def test_a_compiled_step_on_a_dynamic_cache_equals_the_oracle(name):
    harness.check(name, harness.RUNS[3:], seed=1)


def test_what_the_untouched_model_cannot_do():
    for name in NO_STATIC:
        model, make_inputs = VISION[name](torch.float32)
        with pytest.raises(AttributeError, match="dict"):
            harness.generate(model, make_inputs(1, "none"), harness.Run("static", compiled=False))


def test_every_vision_language_family_of_the_catalog_is_tested():
    built = {VISION[name](torch.float32)[0].config.model_type for name in VISION}
    assert built == {t for f in FAMILIES if f.placeholders for t in f.model_types}


# -- DeepStack -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", range(harness.LAYERS))
@torch.no_grad()
def test_visual_rows_are_edited_after_deepstack_has_added_to_them(layer):
    """Replaced, a visual row is the vector; the features that were added there are gone."""
    model, make_inputs = VISION["Qwen3-VL"](torch.float64)
    inputs, vector = make_inputs(2, "left"), harness.vector(harness.WIDTH, 0)
    handle = open_model(model)
    after = [*handle.layers[1:], handle.norm][layer]
    seen = {}
    hook = lambda m, a, k: seen.update(x=a[0] if a else k["hidden_states"])  # noqa: E731
    with patch(model, Plan([ReplaceVector([layer], vector, site="resid_post", to="visual")])):
        entering = after.register_forward_pre_hook(hook, with_kwargs=True)
        model(**inputs)
        entering.remove()
    visual = torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO]))
    assert torch.equal(seen["x"][visual], vector.double().expand(int(visual.sum()), -1))


@torch.no_grad()
def test_deepstack_site_comes_before_the_next_layers_input_also_when_it_is_installed_later():
    model, make_inputs = VISION["Qwen3-VL"](torch.float64)
    inputs = make_inputs(2, "left")
    entering = ReplaceVector([1], harness.vector(harness.WIDTH, 0), site="resid_pre", to="visual")
    both = Plan([entering, AddVector([0], harness.vector(harness.WIDTH, 1), site="resid_post", by=2.0)])
    with patch(model, Plan([entering])) as patched:
        patched.replace(both)
        got = model(**inputs).logits
    expected = oracle.logits(model, inputs, both)
    assert harness.distance(got, expected) < 1e-9


# -- masks that are not causal ---------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_route_may_lead_back_where_the_prompt_attends_in_both_directions():
    """PaliGemma's image comes first; its rows see the text after it, so that VISUAL <- QUERY is a route."""
    model, make_inputs = VISION["PaliGemma"](torch.float64)
    inputs = make_inputs(2, "left")
    plan = Plan([BoostRoute([(0, 0), (0, 2)], to="visual", source=["query", "last"], by=3.0)])
    positions = inputs["attention_mask"].cumsum(-1).clamp(min=1)
    with patch(model, plan):
        got = model(**inputs, position_ids=positions).logits
    visual, real = inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool()
    assert (got - model(**inputs).logits).abs()[visual].amax(-1).min() > 1e-4
    assert harness.distance(got[real], oracle.logits(model, inputs, plan)[real]) < 1e-9


@torch.no_grad()
def test_gemma3_images_are_routes_to_themselves_in_both_directions():
    """A knockout of VISUAL <- VISUAL on rows of an image leaves the image's later tokens out too, in every layer."""
    model, make_inputs = VISION["Gemma 3 (vision)"](torch.float64)
    inputs = make_inputs(2, "left")
    heads = [(layer, head) for layer in range(harness.LAYERS) for head in range(harness.HEADS)]
    plan = Plan([BoostRoute(heads, to="visual", source="visual", by=0.0, reading="logit-add")])
    with patch(model, plan):
        got = model(**inputs).logits
    one_way = {k: v for k, v in inputs.items() if k != "token_type_ids"}
    with patch(model, plan):
        causal = model(**one_way).logits
    assert torch.allclose(got, causal, rtol=1e-9, atol=1e-9), "with no attention inside images their mask is no matter"
    assert not torch.allclose(model(**inputs).logits, model(**one_way).logits, rtol=1e-3, atol=1e-3)


# -- other text decoders, other models -------------------------------------------------------------------------------
LLAVAS = {
    "LLaVA around Phi-3": ("Phi3Config", {}, "phi3"),
    "LLaVA around Qwen3": ("Qwen3Config", {"head_dim": harness.DIM}, "qwen3"),
    "LLaVA around OLMo2": ("Olmo2Config", {}, "olmo2"),
    "LLaVA around a mixture": ("MixtralConfig", {"num_local_experts": 4}, "mixtral"),
    "LLaVA around SmolLM3": ("SmolLM3Config", {"pad_token_id": harness.PAD}, None),  # in no text family
}


@pytest.mark.parametrize("name", LLAVAS)
def test_a_vision_family_fits_around_any_text_family(name, monkeypatch):
    text, over, decoder = LLAVAS[name]
    build = vision("Llava", CLIP_TOWER, square(), text, over, vision_feature_layer=-1, **INDEX)
    family = open_model(build(torch.float32)[0]).family
    assert family.name == "llava"
    if decoder is not None:
        assert decoder in family.decoders
    monkeypatch.setitem(harness.BUILDERS, name, build)
    harness.check(name, harness.RUNS[:1])


def test_cross_attention_is_refused_by_name():
    text = dict(
        **{k: v for k, v in harness.SIZES.items() if k not in ("initializer_range", "attention_dropout")},
        cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    seen = dict(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
        vision_output_dim=48, image_size=8, patch_size=4, max_num_tiles=1, intermediate_layers_indices=[1],
        supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    config = transformers.MllamaConfig(vision_config=seen, text_config=text, image_token_index=IMAGE)
    model = transformers.MllamaForConditionalGeneration(config)
    with pytest.raises(NotImplementedError, match=r"MllamaForConditionalGeneration \(mllama\) has cross-attention"):
        patch(model, Plan([]))
