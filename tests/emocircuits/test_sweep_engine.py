"""The engine against a hook loop: every family, target, position and direction, in float64 and float32."""

from __future__ import annotations

import copy
import functools

import pytest
import sweep_oracle as oracle
import torch
from models import BOS, IMAGE, PAD, VOCAB, batch, build, prompt
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from emocircuits.sweep.api import Sweep
from emocircuits.sweep.metrics import kl, log_prob, logit_diff, projection
from emocircuits.sweep.resume import Decoder

A, B = 11, 23
FAMILIES = ("llama", "qwen2", "gpt2", "llava", "llama-padded", "llava-padded")


@functools.cache
def model_of(kind, dtype=torch.float64):
    if kind == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=BOS, eos_token_id=2,
            initializer_range=0.3, attn_implementation="sdpa",
        )  # fmt: skip
        return GPT2LMHeadModel(config).to(dtype).eval()
    if kind == "llava":
        return build("llava", dtype=dtype)
    return build("text", kind, dtype=dtype)


def pair(kind, dtype=torch.float64):
    """A model and two prompts that first differ at the fourth column, or at the image."""
    name, _, padded = kind.partition("-")
    model = model_of(name, dtype)
    if name == "llava":
        clean, corrupt = (prompt(model, 2, 3, seed=s) for s in (0, 0))
        corrupt["pixel_values"] = -clean["pixel_values"] + 0.5
    else:
        clean = prompt(model, 8, 0, sizes=[]) if name != "gpt2" else _words(9)
        corrupt = {k: v.clone() for k, v in clean.items()}
        corrupt["input_ids"][0, [3, 6]] = torch.tensor([50, 51])
    if padded:
        clean, corrupt = (batch([x, _longer(x)]) for x in (clean, corrupt))
        clean, corrupt = ({k: v[:1] for k, v in x.items()} for x in (clean, corrupt))
    return model, clean, corrupt


def _longer(x):
    more = {**x}
    for name, fill in (("input_ids", 9), ("attention_mask", 1)):
        more[name] = torch.cat([torch.full((1, 3), fill), x[name]], 1)
    return more


def _words(n):
    g = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(8, VOCAB, (1, n), generator=g),
        "attention_mask": torch.ones(1, n, dtype=torch.long),
    }


def difference(logits):
    return logits[0, -1, A] - logits[0, -1, B]


def agree(found, expected, tolerance, gap=0.0):
    """Within ``tolerance`` of the metric's range, which must not be nothing."""
    spread = max(float(expected.max() - expected.min()), abs(gap))
    assert spread > 1e-2
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * spread


HEADS = [slice(8 * h, 8 * h + 8) for h in range(4)]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("positions", ["all", "each"])
@pytest.mark.parametrize("target", ["heads", "residual"])
def test_families(kind, positions, target):
    model, clean, corrupt = pair(kind)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    found = getattr(sweep, target)(positions=positions)
    units = HEADS if target == "heads" else None
    layers = [0, 2] if "llava" in kind and positions == "each" else None
    expected = oracle.sweep(model, corrupt, clean, target, difference, positions, units, layers=layers)
    values = found.values if layers is None else found.values[layers]
    agree(values, expected, 1e-10, found.gap)
    assert found.axes == ("layer", *(["pos"] if positions == "each" else []), *(["head"] if units else []))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "llava-padded"])
@pytest.mark.parametrize("positions", ["all", "each"])
@pytest.mark.parametrize("target", ["neurons", "attn_out", "mlp_out"])
def test_targets(kind, positions, target):
    model, clean, corrupt = pair(kind)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    width = sweep.handle.geometry.neurons
    groups = [[0, 5, 7], list(range(8, width // 2)), list(range(width // 2, width))]
    options = {"groups": groups} if target == "neurons" else {}
    layers = [1, 2] if kind.startswith("llava") else [0, 1, 2]
    found = getattr(sweep, target)(positions=positions, layers=layers, **options)
    units = groups if options else None
    expected = oracle.sweep(model, corrupt, clean, target, difference, positions, units, layers=layers)
    agree(found.values, expected, 1e-10, found.gap)


TARGETS = ("heads", "neurons", "residual", "attn_out", "mlp_out")


@pytest.mark.parametrize("kind", ["llama-padded", "gpt2"])
@pytest.mark.parametrize("patch", ["clean", "zero", "mean", "vector"])
@pytest.mark.parametrize("target", TARGETS)
def test_noise_and_fillings(kind, patch, target):
    model, clean, corrupt = pair(kind)
    units = {"heads": HEADS, "neurons": [slice(0, 16), slice(16, None)]}.get(target)
    real = clean["attention_mask"][0].bool()
    vector = torch.randn(128, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fill = {
        "clean": None,
        "zero": torch.zeros_like,
        "mean": lambda x: x[real].mean(0, keepdim=True).expand_as(x),
        "vector": lambda x: vector[: x.shape[-1]].expand_as(x),
    }[patch]
    given = patch
    if patch == "vector":
        given = vector[: model_width(model) if target == "neurons" else 32]
        given = given.view(4, 8) if target == "heads" else given
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), direction="noise", patch_with=given, progress=False)
    for positions in ("all", "each"):
        options = {"groups": [list(range(16)), list(range(16, model_width(model)))]} if target == "neurons" else {}
        found = getattr(sweep, target)(positions=positions, **options)
        expected = oracle.sweep(model, clean, corrupt, target, difference, positions, units, fill)
        agree(found.values, expected, 1e-10, found.gap)


def model_width(model):
    return getattr(model.config, "intermediate_size", None) or 4 * model.config.hidden_size


def log_probability(logits, pos):
    return logits[0, pos].log_softmax(-1)[A]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "llava-padded"])
@pytest.mark.parametrize("positions", ["all", "each"])
def test_queries_keys_and_values(kind, positions):
    model, clean, corrupt = pair(kind)
    layers = [2] if kind.startswith("llava") else [0, 1, 2]
    for patch, fill in (("clean", None), ("zero", torch.zeros_like)):
        sweep = Sweep(model, clean, corrupt, logit_diff(A, B), patch_with=patch, progress=False)
        found = sweep.qkv(positions=positions, layers=layers)

        def table(kind, units, corrupt=corrupt, fill=fill):
            return oracle.sweep(model, corrupt, clean, kind, difference, positions, units, fill, layers)

        if kind == "gpt2":
            expected = table("qkv", [slice(8 * i, 8 * i + 8) for i in range(12)])
        else:
            parts = (("q", HEADS), ("k", HEADS[:2]), ("v", HEADS[:2]))
            expected = torch.cat([table(name, units) for name, units in parts], -1)
        agree(found.values, expected, 1e-10, found.gap)
        assert found.axes[-1] == "qkv"
        assert (found.labels["qkv"][0], found.labels["qkv"][-1][0]) == ("q0", "v")
    with pytest.raises(ValueError, match="rotated by position"):
        Sweep(model, clean, corrupt, logit_diff(A, B), patch_with="mean", progress=False).qkv()


@pytest.mark.parametrize("target", ["neurons", "mlp_out"])
def test_layers_that_scale_what_they_add(target, monkeypatch):
    """Where the MLP's output is not simply added, the layer's own forward adds it."""
    model, clean, corrupt = pair("llama")
    real = type(model.model.layers[0]).forward

    def scaled(self, hidden_states, **kwargs):
        return hidden_states + 0.5 * (real(self, hidden_states, **kwargs) - hidden_states)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", scaled)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    assert not sweep.base.layers[0].additive
    width = model_width(model)
    units = [list(range(width // 2)), list(range(width // 2, width))] if target == "neurons" else None
    found = sweep.neurons(units, "each") if units else sweep.mlp_out("each")
    agree(found.values, oracle.sweep(model, corrupt, clean, target, difference, "each", units), 1e-10, found.gap)


@torch.no_grad()
def test_metrics():
    model, clean, corrupt = pair("qwen2")
    wanted = model(**clean).logits[0, 5].log_softmax(-1)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metrics = [
        (logit_diff(A, B, pos=5), lambda x: x[0, 5, A] - x[0, 5, B]),
        (log_prob(A, pos=-2), lambda x: log_probability(x, -2)),
        (kl(pos=5), lambda x: (wanted.exp() * (wanted - x[0, 5].log_softmax(-1))).sum()),
        (lambda x: x[0, 3:7, A].sum() - x[0, -1].max(), lambda x: x[0, 3:7, A].sum() - x[0, -1].max()),
    ]
    for metric, plain in metrics:
        sweep = Sweep(model, clean, corrupt, metric, progress=False)
        assert abs(sweep.clean - float(plain(model(**clean).logits))) < 1e-10
        assert abs(sweep.corrupt - float(plain(model(**corrupt).logits))) < 1e-10
        for target in ("heads", "residual", "mlp_out"):
            units = HEADS if target == "heads" else None
            found = getattr(sweep, target)(positions="each")
            agree(found.values, oracle.sweep(model, corrupt, clean, target, plain, "each", units), 1e-10, found.gap)
    for layer in (0, 1, 2):
        # What leaves a layer is read by a hook on it, not from logits.
        seen = []
        hook = model.model.layers[layer].register_forward_hook(lambda m, a, o, s=seen: s.append(o[0, -1] @ direction))
        expected = oracle.sweep(model, corrupt, clean, "heads", lambda _, s=seen: s[-1], "each", HEADS)
        hook.remove()
        sweep = Sweep(model, clean, corrupt, projection(direction, layer), progress=False)
        agree(sweep.heads(positions="each").values, expected, 1e-10, sweep.clean - sweep.corrupt)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "llava", "llama-padded"])
def test_float32(kind):
    model = pair(kind)[0]
    name = kind.partition("-")[0]
    small = model_of(name, torch.float32)
    small.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    _, clean, corrupt = pair(kind, torch.float32)
    sweep = Sweep(small, clean, corrupt, logit_diff(A, B), progress=False)
    layers = [1] if name == "llava" else [0, 1, 2]
    for target in ("heads", "residual"):
        units = HEADS if target == "heads" else None
        found = getattr(sweep, target)(positions="each", layers=layers)
        expected = oracle.sweep(small, corrupt, clean, target, difference, "each", units, layers=layers)
        agree(found.values, expected, 2e-5, found.gap)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("target", ["heads", "residual"])
def test_bfloat16_rounds_like_the_hook_loop(kind, target):
    """Against the same weights in float64: at most twice as far off as the loop, which rounds as often."""
    small = copy.deepcopy(pair(kind)[0]).bfloat16()
    exact = copy.deepcopy(small).double()
    _, clean, corrupt = pair(kind)
    units = HEADS if target == "heads" else None
    found = getattr(Sweep(small, clean, corrupt, logit_diff(A, B), progress=False), target)("each", layers=[1]).values
    loop, truth = (oracle.sweep(m, corrupt, clean, target, plain, "each", units, layers=[1]) for m in (small, exact))
    assert float((found - truth).abs().max()) <= 2 * float((loop - truth).abs().max())


def plain(logits):
    return difference(logits.double())


def test_an_unembedding_that_is_no_plain_layer():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, clean, corrupt = pair("llama")
    model = copy.deepcopy(model)
    head = Scaled(32, VOCAB, bias=False, dtype=torch.float64)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    found = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).residual("each")
    agree(found.values, oracle.sweep(model, corrupt, clean, "residual", difference), 1e-10, found.gap)


def test_only_what_changes_something_is_run(monkeypatch):
    model, clean, corrupt = pair("llama")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    assert sweep.first == 3
    kind, passes = type(model.model.layers[0].mlp), []
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: passes.append(x.shape[1]) or forward(self, x))
    same = sweep.heads(positions=[0, 1, 2]), sweep.heads(positions=[3, -2], layers=[2])
    assert not passes
    assert all(bool((found.values == sweep.corrupt).all()) for found in same)
    sweep.residual(positions=[5], layers=[1])
    assert passes == [sweep.columns - 5, 1]  # one changed column enters layer 1; layer 2 gives one


def test_batches_are_the_same_table():
    model, clean, corrupt = pair("qwen2")
    tables = [
        Sweep(model, clean, corrupt, logit_diff(A, B), batch=b, progress=False).heads(positions="each").values
        for b in (1, 3, None)
    ]
    torch.testing.assert_close(tables[0], tables[2], rtol=0, atol=1e-10)
    torch.testing.assert_close(tables[1], tables[2], rtol=0, atol=1e-10)


def test_out_of_memory_halves_the_batch(monkeypatch):
    model, clean, corrupt = pair("llama")
    expected = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).residual(positions="each").values
    real, sizes = Decoder.run, []

    def run(self, layer, packed):
        sizes.append(len(packed.x))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, layer, packed)

    monkeypatch.setattr(Decoder, "run", run)
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), batch=64, progress=False)
    torch.testing.assert_close(sweep.residual(positions="each").values, expected, rtol=0, atol=1e-10)
    assert max(sizes) > 2 >= sizes[-1]


def test_a_stopped_sweep_goes_on_in_its_folder(tmp_path, monkeypatch):
    model, clean, corrupt = pair("llama")

    def sweep(metric, **more):
        return Sweep(model, clean, corrupt, metric, batch=1, out=tmp_path, progress=False, **more)

    expected = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).heads(positions="each").values
    real, calls = Decoder.run, []

    def run(self, layer, packed):
        calls.append(layer)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, layer, packed)

    monkeypatch.setattr(Decoder, "run", run)
    with pytest.raises(KeyboardInterrupt):
        sweep(logit_diff(A, B)).heads(positions="each")
    torch.testing.assert_close(sweep(logit_diff(A, B)).heads(positions="each").values, expected, rtol=0, atol=1e-10)
    before = len(calls)
    sweep(logit_diff(A, B)).heads(positions="each")
    assert len(calls) == before
    for other in (sweep(logit_diff(B, A)), sweep(logit_diff(A, B), direction="noise")):
        with pytest.raises(ValueError, match="another sweep"):
            other.heads(positions="each")


def test_sliding_window_is_exact():
    model = build("text", "mistral", dtype=torch.float64, sliding_window=4)
    clean = prompt(model, 8, 0, sizes=[])
    corrupt = {k: v.clone() for k, v in clean.items()}
    corrupt["input_ids"][0, 2] = 50
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    for target in ("heads", "residual"):
        units = HEADS if target == "heads" else None
        found = getattr(sweep, target)(positions="each")
        agree(found.values, oracle.sweep(model, corrupt, clean, target, difference, "each", units), 1e-10, found.gap)


def test_the_model_is_left_as_it_was():
    model, clean, corrupt = pair("llava")
    logits, config = model(**clean).logits, model.config.text_config._attn_implementation
    before = [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    Sweep(model, clean, corrupt, logit_diff(A, B), progress=False).heads()
    assert model.config.text_config._attn_implementation == config
    assert torch.equal(model(**clean).logits, logits)
    after = [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert after == before


def test_the_vision_tower_runs_once_an_image():
    model, clean, corrupt = pair("llava")
    seen = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    sweep.heads(positions="each")
    hook.remove()
    assert len(seen) == 2


def test_positions():
    model, clean, corrupt = pair("llava-padded")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    visual = sweep.residual(positions="visual", layers=[0])
    columns = (clean["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    assert visual.labels["pos"] == columns
    each = sweep.residual(positions="each", layers=[0]).values
    torch.testing.assert_close(visual.values, each[:, columns], rtol=0, atol=1e-10)
    assert sweep.residual(positions=[-1], layers=[0]).labels["pos"] == [sweep.columns - 1]


def test_refusals():
    model, clean, corrupt = pair("llama")

    difference = logit_diff(A, B)

    def sweep(*, clean=clean, corrupt=corrupt, metric=difference, model=model, **more):
        return Sweep(model, clean, corrupt, metric, progress=False, **more)

    shorter = {k: v[:, 1:] for k, v in corrupt.items()}
    with pytest.raises(ValueError, match="different token length"):
        sweep(corrupt=shorter)
    with pytest.raises(ValueError, match="outside a prompt"):
        sweep(metric=logit_diff(A, B, pos=sum(corrupt["input_ids"].shape)))
    with pytest.raises(ValueError, match="expected columns inside"):
        sweep().heads(positions=[99])
    with pytest.raises(ValueError, match="vocabulary rows"):
        sweep(metric=logit_diff(A, VOCAB))
    with pytest.raises(ValueError, match="attention_mask differs"):
        sweep(
            corrupt={**corrupt, "attention_mask": torch.cat([torch.zeros(1, 1), corrupt["attention_mask"][:, 1:]], 1)}
        )
    with pytest.raises(ValueError, match="one pair at a time"):
        sweep(corrupt={k: v.repeat(2, 1) for k, v in corrupt.items()})
    with pytest.raises(ValueError, match="does not broadcast"):
        sweep(patch_with=torch.zeros(5)).heads()
    with pytest.raises(ValueError, match="no token of the prompt"):
        sweep().heads(positions="visual")
    made = sweep()
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    for late in (sweep, made.heads):
        with pytest.raises(ValueError, match="forward hook"):
            late()
    hook.remove()
    llava, with_image, other = pair("llava")
    without = {k: v for k, v in other.items() if k != "pixel_values"}
    with pytest.raises(ValueError, match="an image on one side only"):
        Sweep(llava, with_image, without, logit_diff(A, B))
    broken = build("text", dtype=torch.float64)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="mlp of layer 1 in the clean run has NaN"):
        sweep(model=broken)
    broken.train()
    with pytest.raises(ValueError, match="training mode"):
        sweep(model=broken)


def test_neurons_of_experts_are_refused():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, sliding_window=None, pad_token_id=PAD, bos_token_id=BOS,
        experts_implementation="eager",
    )  # fmt: skip
    model = MixtralForCausalLM(config).double().eval()
    _, clean, corrupt = pair("llama")
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B), progress=False)
    with pytest.raises(NotImplementedError, match=r"mixtures of experts: .* sweep mlp_out"):
        sweep.neurons()
    whole = sweep.mlp_out(positions="each")
    agree(whole.values, oracle.sweep(model, corrupt, clean, "mlp_out", difference, "each"), 1e-10, whole.gap)
    found = sweep.heads(positions="each")
    agree(found.values, oracle.sweep(model, corrupt, clean, "heads", difference, "each", HEADS), 1e-10, found.gap)
