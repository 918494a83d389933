"""Models as people have them: with adapters, offloaded or quantised weights, in training; and what is refused."""

import copy

import models
import oracle
import pytest
import torch
from test_errors import refused
from test_patching import everything, forward, generate, snapshot
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LogitsProcessor

from emocircuits import AddVector, BoostRoute, Plan, ScaleHead, ScaleNeurons, patch
from emocircuits.fingerprint import fingerprint

VISUAL = Plan([BoostRoute([(0, 0)], to="query", source="visual", by=2.0)])


def inputs_of(model):
    return models.batch([models.prompt(model, 3, 5), models.prompt(model, 1, 9, seed=1)])


def agrees(model, inputs, plan, target=None, bare=None):
    """Prompt and steps of ``model`` patched equal those of ``bare`` (by default itself) under the oracle's hooks."""
    bare = model if bare is None else bare
    with patch(model if target is None else target, plan):
        prefill = forward(model, inputs)
        tokens, steps = generate(model, inputs)
    full = oracle.logits(bare, inputs, plan, tokens[:, :-1])
    n = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(prefill[real], full[:, :n][real], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(steps, full[:, n - 1 :], rtol=1e-9, atol=1e-9)
    assert (forward(model, inputs)[real] - prefill[real]).abs().max() > 1e-3


# -- adapters --------------------------------------------------------------------------------------------------------
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model, projections=PROJECTIONS):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=rf".*language_model.*\.({'|'.join(projections)})", lora_alpha=12)
    wrapped = peft.get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


def merged(wrapped):
    """The same model with the adapters in its weights."""
    return copy.deepcopy(wrapped).merge_and_unload()


def test_adapters_under_a_plan():
    """The edit meets the input of the wrapped projection once: both the weight and the adapter read it."""
    wrapped = adapted(models.build("llava", dtype=torch.float64))
    inputs = inputs_of(wrapped)
    bare = merged(wrapped)
    generate(wrapped, inputs)
    before = snapshot(wrapped.get_base_model())
    agrees(wrapped, inputs, everything(), bare=bare)
    agrees(wrapped, inputs, everything(), target=wrapped.get_base_model(), bare=bare)
    assert snapshot(wrapped.get_base_model()) == before


def test_adapters_added_and_merged_inside_the_block():
    model = models.build("llava", dtype=torch.float64)
    inputs = inputs_of(model)
    plan = everything()
    with patch(model, plan):
        plain = forward(model, inputs)
        wrapped = adapted(model)
        found = forward(wrapped, inputs)
        tokens, steps = generate(wrapped, inputs)
    full = oracle.logits(merged(wrapped), inputs, plan, tokens[:, :-1])
    n = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], full[:, :n][real], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(steps, full[:, n - 1 :], rtol=1e-9, atol=1e-9)
    assert (plain - found).abs().max() > 1e-3
    assert "forward" not in model.model.language_model.layers[0].mlp.down_proj.__dict__
    with patch(wrapped, plan):
        forward(wrapped, inputs)
        model = wrapped.merge_and_unload()
        torch.testing.assert_close(forward(model, inputs)[real], full[:, :n][real], rtol=1e-9, atol=1e-9)


def test_adapters_and_folding():
    model = models.build("llava", dtype=torch.float64)
    plan = Plan([ScaleNeurons({1: [3]}, by=2.0)])
    inputs = inputs_of(model)
    with pytest.raises(ValueError, match="replaced"), patch(model, plan, fold=True):
        forward(model, inputs)
        forward(adapted(model), inputs)
    with pytest.raises(ValueError, match=r"peft.*fold=False"):
        patch(model, plan, fold=True)


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = models.build("text")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        patch(peft.get_peft_model(model, config), Plan())


# -- where weights are -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offload", [False, True])
def test_weights_that_accelerate_moves(offload):
    """Forwards that accelerate wrapped; with offloading, weights rest on the meta device between two calls."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    bare = models.build("llava", dtype=torch.float64)
    model = copy.deepcopy(bare)
    if offload:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.model.language_model.layers[0].mlp.down_proj.weight.is_meta
    else:
        device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
        device_map["model.language_model"] = "cpu"
        model = accelerate.dispatch_model(model, device_map, force_hooks=True)
    forwards = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    agrees(model, inputs_of(model), everything(), bare=bare)
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == forwards
    if offload:
        with pytest.raises(ValueError, match=r"meta.*fold=False"):
            patch(model, Plan([ScaleNeurons({1: [3]}, by=2.0)]), fold=True)


def test_a_layer_on_another_device_sees_the_same_roles():
    """Two devices cannot be had here: a context that is asked from "meta" shows what is moved, and when."""
    from emocircuits.context import Context
    from emocircuits.devices import moved
    from emokernels import HeadEdits, Routes

    context = Context((models.IMAGE,))
    context.spread = True
    context.begin({"input_ids": torch.tensor([[1, 5, 9, 9]]), "past_key_values": None})
    there = context.at(torch.device("meta"))
    assert context.at(torch.device("cpu")) is context
    assert there.rows.device.type == there.key_roles(4).device.type == "meta"
    assert there.rows is there.rows
    assert there.key_roles(4) is there.key_roles(4)
    assert (there.prefill, there.phases, there.seen) == (True, context.phases, 4)
    first = there.key_roles(4)
    context.begin({"input_ids": torch.tensor([[1, 9]]), "past_key_values": None})
    assert there.key_roles(2) is not first
    tables = moved({"a": Routes(gain=torch.ones(1, 2, 6, 6)), "b": HeadEdits(scale=torch.ones(1, 1, 2))}, "meta")
    assert tables["a"].gain.is_meta
    assert tables["b"].scale.is_meta


def test_roles_are_moved_only_when_layers_are_elsewhere(monkeypatch):
    from emocircuits import patching

    model = models.build("llava", dtype=torch.float64)
    inputs, plan = models.prompt(model, 3, 5), Plan([ScaleHead([(0, 0)], by=0.0, to="query")])
    with patch(model, plan) as patched:
        expected = forward(model, inputs)
        assert not patched.context.spread
    last, where = model.model.language_model.layers[2], patching.device_of
    monkeypatch.setattr(patching, "device_of", lambda m: torch.device("meta") if m is last else where(m))
    with patch(model, plan) as patched:
        assert torch.equal(forward(model, inputs), expected)
        assert patched.context.spread
        assert patched.context.at(torch.device("meta")).rows.is_meta


class Quantised(nn.Linear):
    """As bitsandbytes replaces a linear layer: integer weights, a scale for each row, a forward of its own."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_quantised_projections():
    model = models.build("llava", dtype=torch.float64)
    for layer in model.model.language_model.layers:
        for parent, names in ((layer.self_attn, PROJECTIONS[:4]), (layer.mlp, PROJECTIONS[4:])):
            for name in names:
                setattr(parent, name, Quantised(getattr(parent, name)))
    agrees(model, inputs_of(model), everything())
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"int8.*fold=False"):
        patch(model, Plan([ScaleNeurons({1: [3]}, by=2.0)]), fold=True)
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_generates_as_it_reads_whole_sequences(dtype):
    """Every step is within twice the error of the untouched model in the same precision."""
    model = models.build("llava", dtype=dtype)
    exact = copy.deepcopy(model).double()
    inputs = inputs_of(model)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    n = inputs["input_ids"].shape[1]
    errors = []
    for plan in (Plan(), everything()):
        with patch(model, plan):
            tokens, steps = generate(model, inputs)
        full = oracle.logits(exact, wide, plan, tokens[:, :-1])[:, n - 1 :]
        assert steps.dtype == dtype
        errors.append((steps.double() - full).square().mean().sqrt() / full.square().mean().sqrt())
    assert errors[1] <= 2 * errors[0]


# -- training --------------------------------------------------------------------------------------------------------
def trained(model, inputs, plan):
    """Gradients of a loss on two batches whose graphs are both alive when backward() runs."""
    model.zero_grad()
    loss = 0
    for i, one in enumerate(inputs):
        loss = loss + (i + 1) * forward(model, one)[one["attention_mask"].bool()].square().mean()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_in_training_mode(reentrant):
    """Under gradient checkpointing each layer runs again in backward(), with the roles of its own forward pass."""
    model = models.build("llava", dtype=torch.float64).train()
    inputs = [inputs_of(model), models.batch([models.prompt(model, 6, 2, seed=3), models.prompt(model, 2, 2, seed=4)])]
    plan = everything()
    expected = {}
    model.zero_grad()
    for i, one in enumerate(inputs):
        roles = oracle.roles_of(one["input_ids"], one["attention_mask"], {models.IMAGE})
        with oracle.installed(model, plan, roles):
            logits = model(**one, position_ids=(one["attention_mask"].cumsum(-1) - 1).clamp(min=0), use_cache=False)
            ((i + 1) * logits.logits[one["attention_mask"].bool()].square().mean()).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with patch(model, plan):
        found = trained(model, inputs, plan)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-9 * float(expected[name].abs().max()))


def test_checkpointed_backward_outside_the_block():
    model = models.build("llava", dtype=torch.float64).train()
    with patch(model, everything()):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = forward(model, inputs_of(model)).sum()
    with pytest.raises(ValueError, match="inside the with block"):
        loss.backward()


def test_dropout_of_every_kind_is_refused_in_training():
    model = models.build("text")
    inputs = models.prompt(model, 3, 5, [])
    plan = Plan([ScaleNeurons({1: [3]}, by=2.0)])
    model.train()
    with patch(model, plan):
        model(**inputs)
    attention = models.build("text", attention_dropout=0.1).train()
    refused(attention, NotImplementedError, r"attention_dropout=0.1.*model.eval", plan, lambda m: m(**inputs))
    attention.eval()
    with patch(attention, plan):
        attention(**inputs)
    model.model.layers[2].post_attention_layernorm = nn.Sequential(
        model.model.layers[2].post_attention_layernorm, nn.Dropout(0.2)
    )
    refused(model.train(), NotImplementedError, r"p=0.2 in layers.2", plan, lambda m: m(**inputs))


@pytest.mark.parametrize("kind", ["resid_pdrop", "embd_pdrop", "attn_pdrop", None])
def test_dropout_of_older_layouts(kind):
    """GPT-2 keeps its dropouts as modules: of the embeddings, after attention and MLP, and in attention."""
    rates = {name: 0.1 if name == kind else 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, bos_token_id=1, eos_token_id=2, **rates)
    model, inputs = GPT2LMHeadModel(config), {"input_ids": torch.tensor([[3, 4, 5]])}
    plan = Plan([ScaleNeurons({1: [3]}, by=2.0)])
    with patch(model.eval(), plan):
        model(**inputs)
    model.train()
    if kind is None:
        with patch(model, plan):
            model(**inputs)
    else:
        refused(model, NotImplementedError, r"0.1 in .*model.eval", plan, lambda m: m(**inputs))


# -- refused ---------------------------------------------------------------------------------------------------------
class CallsTheModel(LogitsProcessor):
    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        self.model(input_ids=input_ids)
        return scores


ASSISTED = {"prompt_lookup_num_tokens": 2, "assistant_early_exit": 1, "use_mtp": True}
REFUSED = {
    **ASSISTED,
    "prefill_chunk_size": 4,
    "num_beam_groups": 2,
    "dola_layers": "low",
    "penalty_alpha": 0.6,
    "force_words_ids": [[9]],
    "guidance_scale": 1.5,
    "custom_generate": lambda **k: None,
    "cache_implementation": "paged",
    "assistant_model": nn.Identity(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_generation_that_a_plan_cannot_follow(name):
    model = models.build("llava")
    inputs = models.prompt(model, 3, 5)
    model.generate(**inputs, max_new_tokens=1)
    ran = []
    hook = model.model.vision_tower.register_forward_hook(lambda *a: ran.append(1))
    options = {name: REFUSED[name]} | ({"num_beams": 2} if name in ("num_beam_groups", "force_words_ids") else {})
    refused(
        model, NotImplementedError, name, VISUAL, lambda m: m.generate(**inputs, max_new_tokens=2, top_k=4, **options)
    )
    assert not ran, "it must be refused before anything runs"
    hook.remove()


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching(name):
    model = models.build("llava")
    refused(model, NotImplementedError, rf"{name}.*left-padded", VISUAL, lambda m: getattr(m, name)([[1, 2]]))


def test_paged_attention_and_an_implementation_set_inside():
    model = models.build("llava")
    config = model.model.language_model.config
    config._attn_implementation_internal = "paged|sdpa"
    with pytest.raises(NotImplementedError, match=r"paged\|sdpa.*set_attn_implementation"):
        patch(model, VISUAL)
    config._attn_implementation_internal = "sdpa"

    def change(m):
        m.set_attn_implementation("sdpa")
        m(**models.prompt(m, 3, 5))

    refused(model, ValueError, "inside patch", VISUAL, change)


def test_a_second_forward_pass_inside_generate():
    model = models.build("llava")
    inputs = models.prompt(model, 3, 5)
    model.generate(**inputs, max_new_tokens=1)
    options = dict(max_new_tokens=2, logits_processor=[CallsTheModel(model)])
    refused(model, NotImplementedError, "inside generate", VISUAL, lambda m: m.generate(**inputs, **options))


def test_rows_that_do_not_fit():
    """The plan counts the rows that are given, not what generate() makes of them."""
    model = models.build("llava")
    inputs = inputs_of(model)
    model.generate(**inputs, max_new_tokens=1)
    plan = Plan([AddVector([0], torch.ones(32), rows=[3])])
    ran = []
    hook = model.model.vision_tower.register_forward_hook(lambda *a: ran.append(1))
    refused(model, ValueError, r"batch row 3.*2 rows", plan, lambda m: m(**inputs))
    refused(model, ValueError, r"batch row", plan, lambda m: m.generate(**inputs, num_beams=2, max_new_tokens=2))
    assert not ran
    hook.remove()

    def other(m):
        cache = DynamicCache()
        m.generate(**inputs, past_key_values=cache, max_new_tokens=2)
        m.generate(input_ids=torch.full((3, 40), 9), past_key_values=cache, max_new_tokens=2)

    refused(model, ValueError, "2 batch rows.*has 3", Plan([ScaleHead([(0, 0)])]), other)
