"""Every text family: its paths exist, and every kind of edit equals the oracle, in every way to generate."""

import dataclasses as dc

import families_harness as harness
import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from emocircuits import AddVector, Plan, ScaleNeurons, patch
from emocircuits.families import FAMILIES, open_model
from emocircuits.measure import capture

MIXTURES = ("Mixtral", "Qwen2-MoE", "Qwen3-MoE")
IN_TEXT, IN_MODEL = ("layers", "norm"), ("backbone", "text", "unembed")
FACTS = ("activation", "softcap", "between_layers")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", harness.TEXT)
def test_every_path_exists_and_means_what_it_says(name):
    model, make_inputs = harness.BUILDERS[name](torch.float32)
    handle = open_model(model)
    family = handle.family
    assert model.config.model_type in family.model_types, "recognised by structure, not by name"
    mixed = name in MIXTURES
    for field in dc.fields(family):
        path = getattr(family, field.name)
        if not isinstance(path, str) or field.name in (*FACTS, "name"):
            continue
        if field.name in IN_MODEL:
            model.get_submodule(path)
        elif field.name in IN_TEXT:
            handle.text.get_submodule(path)
        else:
            where = handle.layers
            if mixed:  # some layers of a mixture are dense
                wanted = field.name == "experts"
                where = [layer for layer in where if hasattr(layer.mlp, "experts") == wanted or "mlp." not in path]
            for layer in where:
                layer.get_submodule(path)
    geometry = handle.geometry
    assert geometry == dc.replace(geometry, layers=harness.LAYERS, heads=harness.HEADS, d_model=harness.WIDTH)
    assert handle.weight(handle.unembed).shape == (harness.VOCAB, harness.WIDTH)
    cache = model(**make_inputs(1, "none"), use_cache=True).past_key_values
    assert cache.layers[0].keys.shape[1::2] == (geometry.kv_heads, geometry.head_dim)
    for module in handle.output_projections:
        assert handle.weight(module).shape == (harness.WIDTH, harness.HEADS * harness.DIM)
    for part, heads in {"query": geometry.heads, "key": geometry.kv_heads, "value": geometry.kv_heads}.items():
        for module in handle.parts(part) or ():
            assert handle.weight(module).shape == (heads * harness.DIM, harness.WIDTH)
    if mixed:
        assert geometry.neurons == 0
        assert handle.parts("gate") is None
        return
    assert geometry.neurons == harness.NEURONS
    for module in handle.down_projections:
        assert handle.weight(module).shape == (harness.WIDTH, harness.NEURONS)
    for part, rows in {"gate": harness.NEURONS, "up": harness.NEURONS, "gate_up": 2 * harness.NEURONS}.items():
        for module in handle.parts(part) or ():
            assert handle.weight(module).shape == (rows, harness.WIDTH)


@pytest.mark.parametrize("name", [n for n in harness.TEXT if n not in MIXTURES])
@torch.no_grad()
def test_neurons_follow_from_gate_up_and_activation(name):
    """``act(gate(x)) * up(x)``, by the family's own names, is the input of the down projection."""
    from transformers.activations import ACT2FN

    model, make_inputs = harness.BUILDERS[name](torch.float64)
    handle = open_model(model)
    act, fused, gate, up = ACT2FN[handle.activation], handle.parts("gate_up"), handle.parts("gate"), handle.parts("up")
    seen = {}
    hooks = [m.register_forward_pre_hook(lambda m, a: seen.update(x=a[0])) for m in handle.mlps[1:2]]
    hooks += [m.register_forward_pre_hook(lambda m, a: seen.update(neurons=a[0])) for m in handle.down_projections[1:2]]
    model(**make_inputs(1, "none"))
    for hook in hooks:
        hook.remove()
    if fused is not None:
        g, u = fused[1](seen["x"]).chunk(2, -1)
        expected = act(g) * u
    elif gate is not None and up is not None:
        expected = act(gate[1](seen["x"])) * up[1](seen["x"])
    else:
        first = next(m for m in handle.mlps[1].children() if hasattr(m, "weight"))
        expected = act(first(seen["x"]))
    torch.testing.assert_close(seen["neurons"], expected)


@pytest.mark.parametrize("name", harness.TEXT)
@torch.no_grad()
def test_attention_and_mlp_sites_add_up_to_the_residual_stream(name):
    model, make_inputs = harness.BUILDERS[name](torch.float64)
    handle = open_model(model)
    for layer in range(harness.LAYERS):
        seen = {}

        def save(site, value, seen=seen):
            seen[site] = value[0] if isinstance(value, tuple) else value

        hooks = [
            handle.sites[site][layer].register_forward_hook(lambda m, a, out, site=site: save(site, out))
            for site in ("resid_post", "attn_out", "mlp_out")
        ]
        hooks.append(handle.layers[layer].register_forward_pre_hook(lambda m, a: save("resid_pre", a[0])))
        model(**make_inputs(1, "none"))
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"], seen["resid_post"])


@pytest.mark.parametrize("name", harness.TEXT)
@torch.no_grad()
def test_norm_gain(name):
    """The gain of the final norm, from how its output changes when its weight does."""
    model, _ = harness.BUILDERS[name](torch.float64)
    handle = open_model(model)
    x = harness.vector(harness.WIDTH, 0).double()
    x = x - x.mean()
    bias = getattr(handle.norm, "bias", None)
    shift = 0 if bias is None else bias
    expected = (handle.norm(x) - shift) / (x / x.square().mean().sqrt())
    torch.testing.assert_close(handle.norm_gain(), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", harness.TEXT)
def test_a_random_plan_equals_the_oracle(name):
    runs = harness.RUNS if name == "Llama" else harness.RUNS[:3]
    harness.check(name, runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in harness.TEXT if n != "Llama"])
def test_a_compiled_step_on_a_dynamic_cache_equals_the_oracle(name):
    # It is compiled anew for every length.
    harness.check(name, harness.RUNS[3:], seed=1, paddings=["left"])


@torch.no_grad()
def test_capped_logits_on_a_model_that_was_loaded_with_flex_attention():
    """Its unedited layers cannot run on SDPA, which has no cap."""
    model, exact, make_inputs, tolerance = harness.built("Gemma 2")
    plan, inputs = Plan(harness.edits(open_model(model))["heads"]), make_inputs(2, "left")
    model.set_attn_implementation("flex_attention")
    with patch(model, plan):
        tokens, logits = harness.generate(model, inputs)
    assert model.config._attn_implementation == "flex_attention"
    assert harness.distance(logits.double(), harness.Expected(exact, inputs, plan).steps(tokens)) < tolerance


@pytest.mark.parametrize("name", MIXTURES)
def test_neurons_of_mixtures_are_refused(name):
    model, make_inputs = harness.BUILDERS[name](torch.float32)
    with pytest.raises(NotImplementedError, match=r"mixtures of experts.*use heads"):
        patch(model, Plan([ScaleNeurons({0: [1]}, by=2.0)]))
    with pytest.raises(NotImplementedError, match="mixtures of experts"), capture(model, ["neurons"]):
        model(**make_inputs(1, "none"))
    plan = Plan([AddVector([0], harness.vector(harness.WIDTH, 0))])
    with patch(model, plan) as patched, pytest.raises(NotImplementedError, match="mixtures of experts"):
        patched.replace(Plan([ScaleNeurons({0: [1]}, by=2.0)]))


def test_windows_and_caps():
    windows = {name: open_model(harness.BUILDERS[name](torch.float32)[0]).windows for name in harness.TEXT}
    assert windows["Llama"] == windows["GPT-2"] == windows["Qwen3"] == (None, None, None)
    assert windows["Mistral"] == (6, 6, 6)
    assert windows["Gemma 2"] == windows["Gemma 3"] == (6, None, 6)
    assert open_model(harness.BUILDERS["Gemma 2"](torch.float32)[0]).softcap == 2.0
    assert open_model(harness.BUILDERS["Gemma 3"](torch.float32)[0]).softcap is None


def test_every_text_family_of_the_catalog_is_tested():
    built = {harness.BUILDERS[name](torch.float32)[0].config.model_type for name in harness.TEXT}
    named = {t for f in FAMILIES if not f.placeholders for t in f.model_types}
    # Decoders that exist only inside a vision-language model are tested there.
    assert built == named & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
