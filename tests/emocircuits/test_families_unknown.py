"""Model types that are not in the catalog: recognised by structure and then right, or refused with what is missing."""

import copy

import families_harness as harness
import models
import oracle_layouts
import pytest
import torch
import transformers
from random_plans import random_plan

from emocircuits import Plan, ScaleHead, patch
from emocircuits.families import open_model

# A parallel block, norms after, experts, Llama's layout, two parallel norms, an MLP without gate, norms of q and k.
RECOGNISED = {
    "cohere": harness.text("CohereConfig", "CohereForCausalLM", logit_scale=1.0),
    "exaone4": harness.text("Exaone4Config", "Exaone4ForCausalLM", layer_types=["full_attention"] * 3),
    "olmoe": harness.text("OlmoeConfig", "OlmoeForCausalLM", **harness.EXPERTS),
    "hunyuan_v1_dense": harness.text("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", head_dim=harness.DIM),
    "smollm3": harness.text("SmolLM3Config", "SmolLM3ForCausalLM"),
    "stablelm": harness.text("StableLmConfig", "StableLmForCausalLM", use_parallel_residual=True),
    "nemotron": harness.text("NemotronConfig", "NemotronForCausalLM", head_dim=harness.DIM),
}
oracle_layouts.LAYOUTS.update(exaone4=oracle_layouts.NORMS_BEFORE_ADDING, olmoe=oracle_layouts.EXPERTS)
MISSING = {
    "granite": (harness.text("GraniteConfig", "GraniteForCausalLM"), "without a factor .*residual_multiplier"),
    "bitnet": (harness.text("BitNetConfig", "BitNetForCausalLM"), "known use of self_attn.attn_sub_norm"),
    "starcoder2": (harness.text("Starcoder2Config", "Starcoder2ForCausalLM"), r"mlp\.down_proj"),
    "opt": (
        harness.text("OPTConfig", "OPTForCausalLM", ffn_dim=16, word_embed_proj_dim=32, num_key_value_heads=...),
        "module model.layers",
    ),
}
CANNOT = {
    "mamba": (harness.text("MambaConfig", "MambaForCausalLM"), "without attention heads .*Mamba"),
    "jamba": (
        harness.text("JambaConfig", "JambaForCausalLM", use_mamba_kernels=False, num_experts=2, mamba_dt_rank=4),
        "without attention heads .*Mamba",
    ),
    "t5": (harness.text("T5Config", "T5ForConditionalGeneration", d_model=16, d_kv=8, d_ff=16), "encoder-decoder"),
    "gpt2": (
        harness.text(
            "GPT2Config", "GPT2LMHeadModel", n_inner=harness.NEURONS, intermediate_size=..., num_key_value_heads=...,
            add_cross_attention=True,
        ),
        "cross-attention",
    ),
}  # fmt: skip
PLAN = Plan([ScaleHead([(0, 0)], by=0.0)])


@pytest.mark.parametrize("kind", RECOGNISED)
def test_a_recognised_model_equals_the_oracle(kind):
    model, make_inputs = RECOGNISED[kind](torch.float64)
    handle = open_model(model)
    assert handle.family.name == kind
    plan = random_plan(handle.geometry, seed=3, visual=False)
    inputs = make_inputs(2, "left")
    exact = copy.deepcopy(model)
    with patch(model, plan):
        tokens, logits = harness.generate(model, inputs)
    expected = harness.Expected(exact, inputs, plan).steps(tokens)
    assert harness.distance(logits.double(), expected) < 1e-6


@pytest.mark.parametrize("kind", MISSING)
def test_what_is_missing_is_listed(kind):
    build, message = MISSING[kind]
    with pytest.raises(NotImplementedError, match=f"{kind}.*missing:.*{message}.*Known types: llava") as caught:
        patch(build(torch.float32)[0], PLAN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_work_is_refused_by_name(kind):
    build, message = CANNOT[kind]
    with pytest.raises(NotImplementedError, match=rf"\({kind}\).*{message}"):
        patch(build(torch.float32)[0], PLAN)


def test_cross_attention_of_mllama_is_refused_by_name():
    text = {**harness.SIZES, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}}
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
        image_size=16, patch_size=8, vision_output_dim=48, supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[0, 1], max_num_tiles=1,
    )  # fmt: skip
    config = transformers.MllamaConfig(text_config=text, vision_config=vision)
    with pytest.raises(NotImplementedError, match=r"\(mllama\) has cross-attention layers"):
        patch(transformers.MllamaForConditionalGeneration(config), PLAN)


def test_weights_split_over_devices_are_refused():
    model, _ = harness.BUILDERS["Llama"](torch.float32)
    model._tp_size = 2
    with pytest.raises(NotImplementedError, match="tensor-parallel plan"):
        patch(model, PLAN)


def test_dtensor_weights_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    model, _ = harness.BUILDERS["Llama"](torch.float32)
    torch.distributed.init_process_group("gloo", init_method="tcp://localhost:0", rank=0, world_size=1)
    try:
        projection = model.model.layers[0].self_attn.q_proj
        mesh = init_device_mesh("cpu", (1,))
        projection.weight = torch.nn.Parameter(distribute_tensor(projection.weight.data, mesh, [Replicate()]))
        with pytest.raises(NotImplementedError, match="tensor-parallel plan"):
            patch(model, PLAN)
    finally:
        torch.distributed.destroy_process_group()


def test_sizes_that_disagree_with_the_config():
    model, _ = RECOGNISED["smollm3"](torch.float32)
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(harness.WIDTH, 24)
    with pytest.raises(NotImplementedError, match=r"self_attn\.k_proj from 32 to 16, as the config says .*to 24"):
        patch(model, PLAN)


def test_attention_that_does_not_go_through_the_interface():
    model, _ = RECOGNISED["smollm3"](torch.float32)

    class Own(type(model.model.layers[0].self_attn)):
        def forward(self, hidden_states, **kwargs):
            return self.o_proj(self.v_proj(hidden_states)), None

    for layer in model.model.layers:
        layer.self_attn.__class__ = Own
    with pytest.raises(NotImplementedError, match="Own calling transformers' AttentionInterface"):
        patch(model, PLAN)


def test_an_unknown_vision_language_model_is_not_guessed():
    model, _ = RECOGNISED["smollm3"](torch.float32)
    model.config.vision_config = transformers.CLIPVisionConfig()
    with pytest.raises(NotImplementedError, match="which tokens stand for images or sound is never guessed"):
        patch(model, PLAN)


@pytest.mark.parametrize("kind", ["smollm3", "exaone4"])
def test_a_known_vision_language_family_around_an_unknown_text_decoder(kind):
    text = RECOGNISED[kind](torch.float32)[0].config
    vision = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        projection_dim=24,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=models.IMAGE, vision_feature_layer=-1
    )
    model = harness.finish(transformers.LlavaForConditionalGeneration(config), torch.float64)
    inputs = models.batch([models.prompt(model, 3, 5), models.prompt(model, 2, 3, seed=1)])
    handle = open_model(model)
    assert handle.sees
    plan, exact = random_plan(handle.geometry, seed=3), copy.deepcopy(model)
    with patch(model, plan):
        tokens, logits = harness.generate(model, inputs)
    expected = harness.Expected(exact, inputs, plan).steps(tokens)
    assert harness.distance(logits.double(), expected) < 1e-6
