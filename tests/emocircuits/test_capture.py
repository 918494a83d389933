"""`capture` against unmodified eager models: their hidden states and attentions, plain hooks, loops over roles."""

import copy
import re
from pathlib import Path

import models
import oracle
import pytest
import torch
import transformers
from test_patching import everything, generate
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from emocircuits import BoostRoute, GateRoute, Plan, ScaleNeurons, patch
from emocircuits.measure import QUANTITIES, Captured, capture
from emokernels import Role

ROLES = oracle.NAMES
PAGE = Path(__file__).parents[2] / "docs" / "capture.md"
BEGIN, END = "<!-- table: generated from QUANTITIES -->\n", "<!-- end of table -->"
LAYERED = [q.name for q in QUANTITIES.values() if q.layered and q.per == "token"]
TOKEN = [q.name for q in QUANTITIES.values() if q.per == "token"]


def full_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """Eager attention in the dtype of its inputs (that of the modeling files rounds its softmax to float32)."""
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    s = query @ k.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    module.scores = s
    module.weights = torch.softmax(s + attention_mask, -1)
    return (module.weights @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register("full_attention_with_weights", full_attention)
AttentionMaskInterface.register("full_attention_with_weights", eager_mask)


def eager_copy(model, path):
    """A copy whose text decoder runs `full_attention`, and that decoder."""
    model = copy.deepcopy(model)
    text = model.get_submodule(path)
    text.config._attn_implementation_internal = "full_attention_with_weights"
    return model, text


def by_role(matrix, roles):
    """``[..., K]`` summed over the keys of each role."""
    return torch.stack([matrix[..., [r == name for r in roles]].sum(-1) for name in ROLES], -1)


@torch.no_grad()
def theirs(model, inputs, tokens=None):
    """Every quantity of every token, from an eager copy: ``[L, B, N, ...]``, and the roles of the tokens.

    ``tokens`` are run behind the prompt, all at once.
    """
    model, text = eager_copy(model, "model.language_model" if hasattr(model.model, "language_model") else "model")
    extra = 0 if tokens is None else tokens.shape[1]
    placeholders = {getattr(model.config, "image_token_id", -1)}
    roles = oracle.roles_of(inputs["input_ids"], inputs["attention_mask"], placeholders, extra)
    inputs = dict(inputs)
    if extra:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    kept: dict[str, list] = {}

    def keep(name, heads=None):
        def hook(module, args, out=None):
            value = args[0] if out is None else out[0] if isinstance(out, tuple) else out
            kept.setdefault(name, []).append(value if heads is None else value.unflatten(-1, (heads, -1)))

        return hook

    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layer.post_attention_layernorm.register_forward_pre_hook(keep("resid_mid"))
        attention.register_forward_hook(keep("attn_out"))
        mlp.register_forward_hook(keep("mlp_out"))
        attention.q_proj.register_forward_hook(keep("q_proj", 4))
        attention.k_proj.register_forward_hook(keep("k_proj", 2))
        attention.v_proj.register_forward_hook(keep("v", 2))
        attention.o_proj.register_forward_pre_hook(keep("z", 4))
        mlp.gate_proj.register_forward_hook(keep("gate"))
        mlp.up_proj.register_forward_hook(keep("up"))
        mlp.down_proj.register_forward_pre_hook(keep("neurons"))
    model.get_input_embeddings().register_forward_hook(keep("embed"))
    text.norm.register_forward_pre_hook(keep("last"))
    out = model(**inputs, position_ids=positions, output_hidden_states=True, use_cache=False)
    values = {name: torch.stack(layers) for name, layers in kept.items()}
    last = values.pop("last")[0]
    values["embed"] = values["embed"][0]
    values["logits"] = out.logits
    values["final_scale"] = (last.square().mean(-1, keepdim=True) + model.config.get_text_config().rms_norm_eps).sqrt()
    values["final_normalized"] = last / values["final_scale"]
    hidden = torch.stack(out.hidden_states)
    values["resid_pre"], values["resid_post"] = hidden[:-1], torch.cat([hidden[1:-1], last[None]])
    cos, sin = text.rotary_emb(last, positions)
    rotated = [
        apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        for q, k in zip(values["q_proj"], values["k_proj"], strict=True)
    ]
    values["q"], values["k"] = (torch.stack([r[i].transpose(1, 2) for r in rotated]) for i in (0, 1))
    values["pattern"] = torch.stack([layer.self_attn.weights for layer in text.layers]).transpose(2, 3)
    logits = torch.stack([layer.self_attn.scores for layer in text.layers]).transpose(2, 3)
    sees = values["pattern"] != 0
    values["scores"] = logits.masked_fill(~sees, -torch.inf)

    def spans(matrix):
        return torch.stack([by_role(matrix[:, b], roles[b]) for b in range(len(roles))], 1)

    values["span_mass"] = spans(values["pattern"])
    values["span_logits"] = spans(logits.masked_fill(~sees, 0))
    values["span_keys"] = spans(sees[:, :, :, 0].double())
    return values, roles


def mass_of(pattern, roles, rows=None):
    """Mean weight by (role of the row, role of the key), from full matrices ``[L, B, N, H, K]``."""
    layers, batch, n, heads, _ = pattern.shape
    mass = torch.zeros(layers, batch, heads, 6, 6, dtype=pattern.dtype)
    for b in range(batch):
        for i, name in enumerate(ROLES[1:], 1):
            at = [j for j in range(n) if roles[b][j] == name and (rows is None or j in rows[b])]
            if at:
                mass[:, b, :, i] = by_role(pattern[:, b][:, at], roles[b]).mean(1)
    return mass


def two_rows(model, side="left"):
    """Prompts of different lengths: one with two images around text, one with one."""
    rows = [models.prompt(model, 4, 5), models.prompt(model, 1, 3, seed=1)]
    return models.batch(rows, side)


def same(ours, expected, **options):
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected.to(ours.dtype), **{"rtol": 1e-9, "atol": 1e-9, **options})


def real(inputs):
    return inputs["attention_mask"].bool()


# -- every quantity --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
def test_every_quantity_equals_an_eager_model(text, padding):
    over = {"sliding_window": 6} if text == "mistral" else {}
    model = models.build("llava", text, torch.float64, **over)
    inputs = models.prompt(model, 3, 5) if padding == "none" else two_rows(model, padding)
    expected, roles = theirs(model, inputs)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    plain = model(**inputs, position_ids=positions).logits
    with capture(model, [*TOKEN, "mass"]) as seen:
        out = model(**inputs, position_ids=positions)
    assert torch.equal(out.logits, plain)
    assert set(seen) == set(QUANTITIES)
    tokens = real(inputs)
    for name in TOKEN:
        ours = seen[name] if QUANTITIES[name].layered else seen[name][None]
        full = expected[name] if QUANTITIES[name].layered else expected[name][None]
        same(ours[:, tokens], full[:, tokens])
    same(seen["mass"], mass_of(expected["pattern"], roles))
    # Where a role has rows, their attention sums to 1.
    present = torch.tensor([[name in row for name in ROLES] for row in roles])
    present[:, 0] = False
    sums = seen["mass"].sum(-1)[:, :, 0]
    same(sums, present.expand_as(sums))


def test_images_of_different_sizes_and_text_between_them():
    model = models.build("llava_next", dtype=torch.float64)
    rows = [models.prompt(model, 2, 4, [(16, 32), (16, 16)], between=3)]
    inputs = models.batch(rows)
    expected, roles = theirs(model, inputs)
    with capture(model, ["span_mass", "mass", "z"], roles="last") as seen, torch.no_grad():
        model(**inputs)
    at = roles[0].index("last")
    same(seen["z"], expected["z"][:, :, at])
    same(seen["span_mass"], expected["span_mass"][:, :, at])
    same(seen["mass"], mass_of(expected["pattern"], roles, rows=[[at]]))


def test_an_eager_model_stays_eager_bit_for_bit():
    model = models.build("llava", dtype=torch.float32)
    model.set_attn_implementation("eager")
    inputs = two_rows(model)
    plain = model(**inputs).logits
    before = model.config.get_text_config()._attn_implementation
    with capture(model, [*TOKEN, "mass"]):
        assert torch.equal(model(**inputs).logits, plain)
    assert model.config.get_text_config()._attn_implementation == before
    assert torch.equal(model(**inputs).logits, plain)


# -- other layouts ---------------------------------------------------------------------------------------------------
def small(kind):
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3, attention_dropout=0.0,
    )  # fmt: skip
    name = {"gemma2": "Gemma2", "qwen3": "Qwen3", "phi3": "Phi3", "gpt_neox": "GPTNeoX", "olmo2": "Olmo2",
            "gpt2": "GPT2"}[kind]  # fmt: skip
    if kind == "gpt2":
        sizes = dict(vocab_size=64, n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=128, initializer_range=0.3)
    if kind == "gpt_neox":
        del sizes["num_key_value_heads"]
    if kind == "gemma2":
        sizes |= {"sliding_window": 4, "query_pre_attn_scalar": 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    if kind == "gemma2":
        config._attn_implementation = "eager"  # older transformers offer SDPA, which leaves out the softcap
    head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    return getattr(transformers, name + head)(config).double().eval()


@pytest.mark.parametrize("kind", ["gemma2", "qwen3", "phi3", "gpt_neox", "olmo2", "gpt2"])
@torch.no_grad()
def test_other_layouts(kind):
    model = small(kind)
    ids = torch.randint(8, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    path, attention = {"gpt2": ("transformer", "h.{}.attn"), "gpt_neox": ("gpt_neox", "layers.{}.attention")}.get(
        kind, ("model", "layers.{}.self_attn")
    )
    eager, text = eager_copy(model, path)
    out = eager(ids, output_hidden_states=True, use_cache=False)
    hidden = torch.stack(out.hidden_states)
    pattern = torch.stack([text.get_submodule(attention.format(i)).weights for i in range(3)]).transpose(2, 3)
    what = ["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "neurons", "gate", "pattern", "mass"]
    what += ["scores", "final_normalized", "logits"]
    parallel = kind == "gpt_neox"
    with capture(model, what) as seen:
        plain = model(ids, use_cache=False).logits
    assert torch.equal(plain, model(ids, use_cache=False).logits)
    # Gemma 2 is eager by itself, whose softmax rounds to float32.
    close = dict(rtol=1e-4, atol=1e-5) if kind == "gemma2" else {}
    same(seen["resid_pre"], hidden[:-1], **close)
    same(seen["resid_post"][:-1], hidden[1:-1], **close)
    same(seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"], seen["resid_post"])
    same(seen["pattern"], pattern, **close)
    share = 4 // seen["v"].shape[3]
    same(seen["z"], torch.einsum("lbihj,lbjhd->lbihd", pattern, seen["v"].repeat_interleave(share, 3)), **close)
    same(seen["scores"].softmax(-1), pattern, **close)
    same(seen["logits"], out.logits, **close)
    normed = seen["final_normalized"]
    assert normed.square().mean(-1).sub(1).abs().max() < 1e-3
    if kind == "gpt2":
        same(normed.mean(-1), torch.zeros(2, 9))
    if parallel:
        with pytest.raises(NotImplementedError, match="same residual stream"), capture(model, "resid_mid"):
            pass
    else:
        with capture(model, "resid_mid") as mid:
            model(ids)
        same(mid["resid_mid"], seen["resid_pre"] + seen["attn_out"])
    with capture(model, ["q_proj", "k_proj"]) as projected:
        model(ids)
    # The first token is not rotated; Qwen3 and OLMo 2 have norms in between.
    if kind not in ("qwen3", "olmo2"):
        for name in ("q", "k"):
            assert projected[f"{name}_proj"].shape == seen[name].shape
            same(projected[f"{name}_proj"][:, :, 0], seen[name][:, :, 0])
            assert kind == "gpt2" or not torch.allclose(projected[f"{name}_proj"], seen[name])
    if kind in ("gpt2", "gpt_neox"):
        with pytest.raises(NotImplementedError, match="no gate"), capture(model, "up"):
            pass
        act = model.transformer.h[1].mlp.act if kind == "gpt2" else model.gpt_neox.layers[1].mlp.act
        same(act(seen["gate", 1]), seen["neurons", 1])
    else:
        act = model.model.layers[1].mlp
        act = act.activation_fn if kind == "phi3" else act.act_fn
        with capture(model, "up", layers=1) as up:
            model(ids)
        same(act(seen["gate", 1]) * up["up", 1], seen["neurons", 1])


def test_a_mixture_of_experts_has_no_neurons_to_read():
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    for name in ("neurons", "gate", "blocks.1.mlp.hook_post"):
        with pytest.raises(NotImplementedError, match="mixtures of experts"), capture(model, name):
            pass
    with capture(model, ["z", "mlp_out"]) as seen:
        model(torch.arange(8, 15)[None])
    assert seen["z"].shape == (2, 1, 7, 4, 8)


# -- which tokens ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_by_role_and_position(side):
    model = models.build("llava", dtype=torch.float64)
    inputs = two_rows(model, side)
    expected, roles = theirs(model, inputs)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def seen_with(**options):
        with capture(model, ["resid_post", "pattern", "mass"], layers=[0, -1], **options) as seen, torch.no_grad():
            model(**inputs, position_ids=positions)
        return seen

    def check(seen, wanted):
        """``wanted``: columns of each batch row."""
        flat = [(b, c) for b, columns in enumerate(wanted) for c in columns]
        index = seen.index
        assert list(zip(index.row.flatten().tolist(), index.column.flatten().tolist(), strict=True)) == flat
        assert [ROLES[r] for r in index.role.flatten().tolist()] == [roles[b][c] for b, c in flat]
        for name in ("resid_post", "pattern"):
            values = torch.stack([expected[name][[0, 2], b, c] for b, c in flat], 1)
            same(seen[name].reshape(values.shape), values)
        assert index.step.max() == 0
        padding = [(~real(inputs)[b, :c]).sum() for b, c in flat]
        assert index.position.flatten().tolist() == [int(c - p) for (_, c), p in zip(flat, padding, strict=True)]
        same(seen["mass"], mass_of(expected["pattern"][[0, 2]], roles, wanted))

    real_columns = [real(inputs)[b].nonzero().flatten().tolist() for b in range(2)]
    seen = seen_with(roles="visual")
    check(seen, [[c for c in range(len(row)) if row[c] == "visual"] for row in roles])
    assert seen["resid_post"].shape == (2, 32, 32)
    seen = seen_with(roles=["system", "last"])
    check(seen, [[c for c in range(len(row)) if row[c] in ("system", "last")] for row in roles])
    assert [x.shape[1] for x in seen.by_row("resid_post")] == [6, 3]
    assert torch.equal(torch.cat(seen.by_row("blocks.2.hook_resid_post")), seen["resid_post", 2])
    seen = seen_with(positions=[0, -1])
    check(seen, [[row[0], row[-1]] for row in real_columns])
    assert seen["resid_post"].shape == (2, 2, 2, 32)
    assert seen["blocks.2.attn.hook_pattern"].shape == (2, 4, 2, inputs["input_ids"].shape[1])
    check(seen_with(positions=slice(-3, None)), [row[-3:] for row in real_columns])
    check(seen_with(positions=slice(18)), [row[:18] for row in real_columns])
    check(seen_with(positions=-2), [[row[-2]] for row in real_columns])
    seen = seen_with(roles="query", positions=slice(-2, None))
    check(seen, [[row[-2]] for row in real_columns])
    if side == "left":
        check(seen_with(columns=[-1]), [[row[-1]] for row in real_columns])
        with pytest.raises(ValueError, match="batch row 1 has no token at position 22"):
            seen_with(positions=[22])
    with pytest.raises(ValueError, match="tokens that were chosen"):
        seen_with(roles="generated")


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_generation_is_put_together(text, cache):
    over = {"sliding_window": 6} if text == "mistral" else {}
    model = models.build("llava", text, torch.float64, **over)
    inputs = two_rows(model)
    options = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}[cache]
    tokens, logits = generate(model, inputs, **options)
    expected, roles = theirs(model, inputs, tokens[:, :-1])
    everywhere = [name for name in TOKEN if name not in ("embed", "logits")]
    with capture(model, [*everywhere, "mass"]) as seen:
        again, more = generate(model, inputs, **options)
    assert torch.equal(again, tokens)
    assert torch.equal(more, logits)
    n = inputs["input_ids"].shape[1]
    rows = torch.ones(2, n + tokens.shape[1] - 1, dtype=torch.bool)
    rows[:, :n] = real(inputs)
    for name in everywhere:
        ours, full = (x if QUANTITIES[name].layered else x[None] for x in (seen[name], expected[name]))
        same(ours[:, rows], full[:, rows])
    same(seen["mass"], mass_of(expected["pattern"], roles))
    if cache != "none":
        assert seen.index.step[0].tolist() == [0] * n + list(range(1, tokens.shape[1]))

    # Without a cache, generate() computes the logits of the last token only, at every step.
    what = ["z"] if cache == "none" else ["z", "logits"]
    with capture(model, what, roles=["last", "generated"]) as seen:
        generate(model, inputs, **options)
    assert torch.equal(
        seen.index.role, torch.tensor(([int(Role.LAST)] + [int(Role.GENERATED)] * 3) * 2)[: len(seen.index.role)]
    )
    same(seen["z"], expected["z"][:, :, n - 1 :].flatten(1, 2))
    if "logits" in seen:
        same(seen["logits"], logits.flatten(0, 1))
    with capture(model, "resid_post", positions=[-1, 23]) as seen:
        generate(model, inputs, **options)
    length = [int(r.sum()) for r in real(inputs)]
    assert seen.index.column[:, 0].tolist() == [n - 1] * 2
    assert seen.index.column.tolist()[1][1] == n - length[1] + 23


def test_steps():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 5)
    n = inputs["input_ids"].shape[1]
    with capture(model, "z") as every:
        generate(model, inputs)
    for steps, at in (("prompt", slice(0, n)), ("last", slice(-1, None))):
        with capture(model, "z", steps=steps) as seen:
            generate(model, inputs)
        assert torch.equal(seen["z"], every["z"][:, :, at])
    with capture(model, "z", steps="prompt") as seen:
        generate(model, inputs, use_cache=False)
    same(seen["z"], every["z"][:, :, :n])
    # A new prompt takes the place of the last one, and every pass can be read in the block.
    shorter = models.prompt(model, 1, 2, seed=3)
    with capture(model, "z") as seen, torch.no_grad():
        model(**inputs)
        assert torch.equal(seen["z"], every["z"][:, :, :n])
        model(**shorter)
        assert seen["z"].shape[2] == shorter["input_ids"].shape[1]
    with pytest.raises(ValueError, match="steps='first'"), capture(model, "z", steps="first"):
        pass


def test_a_chat_goes_on_in_the_same_capture():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 4)
    more = torch.tensor([[9, 10, 11]])
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    expected, _ = theirs(model, whole)
    with capture(model, ["z", "k"]) as seen, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        model(input_ids=more, attention_mask=whole["attention_mask"], past_key_values=cache)
    for name in ("z", "k"):
        same(seen[name], expected[name])
    # A cache that is cut takes its tokens along.
    n = inputs["input_ids"].shape[1]
    for options in ({}, {"positions": slice(None)}):
        with capture(model, "z", **options) as seen, torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            for tokens in (torch.tensor([[20, 21, 22, 23]]), more):
                mask = torch.ones(1, n + tokens.shape[1], dtype=torch.long)
                model(input_ids=tokens, attention_mask=mask, past_key_values=cache)
                cache.crop(-tokens.shape[1])
        same(seen["z"].reshape(expected["z"].shape), expected["z"])
        assert seen.index.column.flatten().tolist() == list(range(n + 3))


def test_returned_sequences():
    model = models.build("llava", dtype=torch.float64)
    inputs = two_rows(model)
    with capture(model, ["z", "pattern"], roles="generated") as seen:
        torch.manual_seed(0)
        out = model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=4, suppress_tokens=[5, 0])
    repeated = {name: value.repeat_interleave(2, 0) for name, value in inputs.items()}
    n = inputs["input_ids"].shape[1]
    expected, _ = theirs(model, repeated, out[:, n:-1])
    assert seen.index.row.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for name in ("z", "pattern"):
        same(seen[name], expected[name][:, :, n:].flatten(1, 2))


# -- under a plan ----------------------------------------------------------------------------------------------------
def test_a_capture_inside_patch_sees_what_the_plan_leaves():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 5)
    plan = everything()
    roles = oracle.roles_of(inputs["input_ids"], inputs["attention_mask"], {models.IMAGE})
    kept: dict[str, list] = {}

    def keep(name, before):
        def hook(module, args, out=None):
            value = args[0] if before else out[0] if isinstance(out, tuple) else out
            kept.setdefault(name, []).append(value.detach().clone())

        return hook

    # Hooks that come after those of the oracle see edited values.
    with oracle.installed(model, plan, roles), torch.no_grad():
        handles = []
        for layer in model.model.language_model.layers:
            handles += [
                layer.register_forward_pre_hook(keep("resid_pre", True)),
                layer.register_forward_hook(keep("resid_post", False)),
                layer.self_attn.register_forward_hook(keep("attn_out", False)),
                layer.mlp.register_forward_hook(keep("mlp_out", False)),
                layer.self_attn.o_proj.register_forward_pre_hook(keep("z", True)),
                layer.mlp.down_proj.register_forward_pre_hook(keep("neurons", True)),
            ]
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    with patch(model, plan) as patched:
        with capture(model, [*kept, "resid_mid"]) as seen, torch.no_grad():
            out = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, out)
        for name, layers in kept.items():
            same(seen[name].flatten(3), torch.stack(layers).flatten(3))
        same(seen["resid_mid"], seen["resid_pre"] + seen["attn_out"])
        # A plan that comes in while it is read acts, also where places were read only.
        other = Plan([ScaleNeurons({1: [3, 4]}, by=2.5)])
        with capture(model, "neurons") as before, torch.no_grad():
            model(**inputs)
            patched.replace(other)
            model(**inputs)
        edited = model(**inputs).logits
    with capture(model, "neurons") as plain, torch.no_grad():
        model(**inputs)
    factor = torch.ones(48, dtype=torch.float64)
    factor[[3, 4]] = 2.5
    same(before["neurons", 1], plain["neurons", 1] * factor)
    same(edited, oracle.logits(model, inputs, other))
    assert not torch.allclose(edited, out)


def test_attention_under_a_plan():
    model = models.build("llava", dtype=torch.float64)
    inputs = two_rows(model)
    expected, roles = theirs(model, inputs)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    layer, head = 0, 2
    weight = Plan([BoostRoute([(layer, head)], to="query", source="visual", by=1.5)])
    added = Plan([BoostRoute([(layer, head)], to="query", source="visual", by=1.5, reading="logit-add", rows=[1])])
    tokens = real(inputs)
    visual = torch.tensor([[r == "visual" for r in row] for row in roles])
    query = torch.tensor([[r == "query" for r in row] for row in roles])
    pairs = query[:, :, None] & visual[:, None]
    plain = expected["pattern"][layer, :, :, head]
    for plan in (weight, added):
        with patch(model, plan), capture(model, ["pattern", "mass", "scores", "span_mass"]) as seen, torch.no_grad():
            model(**inputs, position_ids=positions)
        boosted = torch.where(pairs, 1.5 * plain, plain)
        if plan is added:
            boosted = boosted / boosted.sum(-1, keepdim=True)
            boosted[0] = plain[0]
        same(seen["pattern"][layer, :, :, head][tokens], boosted[tokens])
        full = expected["pattern"].clone()
        full[layer, :, :, head] = boosted
        same(seen["mass"][: layer + 1], mass_of(full[: layer + 1], roles))
    gate = Plan([GateRoute([(1, 0)], to="last", source="visual", threshold=0.1, by=0.5)])
    with patch(model, gate), pytest.raises(NotImplementedError, match="gates routes"), capture(model, "pattern"):
        model(**inputs)
    with patch(model, gate), capture(model, ["pattern", "z"], layers=[0, 2]):
        model(**inputs)


# -- means, memory, files, gradients ---------------------------------------------------------------------------------
def test_means_are_running_sums_over_all_prompts():
    model = models.build("llava", dtype=torch.float32)
    batches = [two_rows(model), models.batch([models.prompt(model, 2, 2, seed=5), models.prompt(model, 2, 2, seed=6)])]
    names = ["z", "resid_post", "span_mass", "final_normalized"]
    whole = []
    for inputs in batches:
        with capture(model, [*names, "mass"], roles=["system", "visual", "query"]) as seen:
            generate(model, inputs)
        whole.append(seen)
    roles = torch.cat([s.index.role for s in whole])
    for reduce in ("mean", "mean_by_role"):
        with capture(model, [*names, "mass"], roles=["system", "visual", "query"], reduce=reduce) as seen:
            for inputs in batches:
                generate(model, inputs)
        assert seen.index is None
        for name in names:
            axis = 1 if QUANTITIES[name].layered else 0
            tokens = torch.cat([s[name] for s in whole], axis)
            if reduce == "mean":
                same(seen[name], tokens.mean(axis), rtol=1e-4, atol=1e-5)
                continue
            for role in (1, 2, 3):
                mean = tokens.index_select(axis, (roles == role).nonzero().flatten()).mean(axis)
                same(seen[name].select(axis, role), mean, rtol=1e-4, atol=1e-5)
            assert not seen[name].select(axis, 0).any()
        count = torch.bincount(roles, minlength=6)
        assert torch.equal(seen.count.long(), count.sum() if reduce == "mean" else count)
        rows = [torch.stack([(s.index.role[s.index.row == b] == 2).sum() for b in range(2)]) for s in whole]
        mass = sum((s["mass"][:, :, :, 2] * r[None, :, None, None]).sum(1) for s, r in zip(whole, rows, strict=True))
        same(seen["mass"][:, :, 2], mass / count[2], rtol=1e-4, atol=1e-5)
    with capture(model, "z", reduce="mean") as cached:
        generate(model, batches[0])
    with capture(model, "z", reduce="mean") as again:
        generate(model, batches[0], use_cache=False)
    same(again["z"], cached["z"], rtol=1e-4, atol=1e-5)
    assert again.count == cached.count


def test_memory_is_bounded_before_a_layer_runs():
    model = models.build("llava")
    inputs = two_rows(model)
    tokens = inputs["input_ids"].numel()
    calls = []
    hook = model.model.language_model.layers[0].register_forward_hook(lambda *a: calls.append(1))
    need = 3 * tokens * (32 + 4 * 8) * 4
    with capture(model, ["z", "resid_post"], max_bytes=need):
        model(**inputs)
    calls.clear()
    with (
        pytest.raises(ValueError, match=f"takes {need:,} bytes"),
        capture(model, ["z", "resid_post"], max_bytes=need - 1),
    ):
        model(**inputs)
    assert not calls
    with capture(model, ["z", "resid_post"], max_bytes=need // 2, dtype=torch.float16, device="cpu") as seen:
        model(**inputs)
    assert seen["z"].dtype == torch.float16
    with capture(model, ["z", "resid_post"], max_bytes=4 * 3 * 64, reduce="mean"):
        model(**inputs)
    # The steps of a generation add up.
    with pytest.raises(ValueError, match="of 2 tokens"), capture(model, ["z", "resid_post"], max_bytes=need + 100):
        generate(model, inputs)
    square = 3 * tokens * 4 * inputs["input_ids"].shape[1] * 4
    with pytest.raises(ValueError, match=f"{square:,}"), capture(model, "pattern", max_bytes=square - 1):
        model(**inputs)
    with capture(model, "pattern", positions=[-1], max_bytes=square // 10):
        model(**inputs)
    hook.remove()


def test_files_come_back_as_they_were(tmp_path):
    model = models.build("llava")
    inputs = two_rows(model)
    for options in ({"roles": ["visual", "last"]}, {"positions": [0, -1]}, {"reduce": "mean_by_role"}):
        with capture(model, ["z", "blocks.1.attn.hook_q", "mass", "final_scale"], **options) as seen:
            model(**inputs)
        back = Captured.load(seen.save(tmp_path / "seen.safetensors"))
        assert dict(back.layers) == seen.layers
        assert all(torch.equal(back[name], seen[name]) for name in seen)
        assert torch.equal(back["blocks.1.attn.hook_q"], seen["q_proj", 1])
        if "reduce" in options:
            assert back.index is None
            assert torch.equal(back.count, seen.count)
        else:
            assert all(
                torch.equal(a, b) for a, b in zip(vars(back.index).values(), vars(seen.index).values(), strict=True)
            )
    (tmp_path / "broken").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot read a capture"):
        Captured.load(tmp_path / "broken")
    with pytest.raises(ValueError, match="cannot read a capture"):
        Captured.load(tmp_path / "missing")


def test_gradients():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 5)
    target = model.model.language_model
    held = {}

    def hold(name):
        def hook(module, args):
            args[0].retain_grad()
            held[name] = args[0]

        return hook

    handles = [target.layers[1].self_attn.o_proj.register_forward_pre_hook(hold("z"))]
    handles += [target.layers[1].mlp.down_proj.register_forward_pre_hook(hold("neurons"))]
    model(**inputs).logits[0, -1, 7].backward()
    for handle in handles:
        handle.remove()
    with capture(model, ["z", "neurons", "q", "pattern"], positions=slice(-4, None), detach=False) as seen:
        loss = model(**inputs).logits[0, -1, 7]
    same(seen.gradient(loss, "blocks.1.attn.hook_z"), held["z"].grad[0, -4:].unflatten(-1, (4, 8)))
    same(seen.gradient(loss, "neurons")[1], held["neurons"].grad[0, -4:])
    assert seen.gradient(loss, "q").shape == (3, 4, 4, 8)
    # What was captured can be differentiated itself.
    (grad,) = torch.autograd.grad(seen["z"].sum(), target.layers[0].self_attn.v_proj.weight)
    assert grad.any()
    with pytest.raises(ValueError, match="computed beside the model"):
        seen.gradient(loss, "pattern")
    with capture(model, "z") as plain:
        loss = model(**inputs).logits.sum()
    assert not plain["z"].requires_grad
    with pytest.raises(ValueError, match="detach=False"):
        plain.gradient(loss, "z")
    with pytest.raises(NotImplementedError, match="mass has no gradient"), capture(model, "mass", detach=False):
        pass
    with torch.inference_mode(), capture(model, ["z", "mass", "pattern"]) as seen:
        model(**inputs)
    assert not any(seen[name].is_inference() for name in ("z", "pattern"))


# -- names -----------------------------------------------------------------------------------------------------------
LENS = {
    "hook_embed": "embed", "blocks.1.hook_resid_pre": "resid_pre", "blocks.1.hook_resid_mid": "resid_mid",
    "blocks.1.hook_resid_post": "resid_post", "blocks.1.hook_attn_out": "attn_out", "blocks.1.hook_mlp_out": "mlp_out",
    "blocks.1.attn.hook_q": "q_proj", "blocks.1.attn.hook_k": "k_proj", "blocks.1.attn.hook_v": "v",
    "blocks.1.attn.hook_rot_q": "q", "blocks.1.attn.hook_rot_k": "k", "blocks.1.attn.hook_z": "z",
    "blocks.1.attn.hook_pattern": "pattern", "blocks.1.attn.hook_attn_scores": "scores",
    "blocks.1.mlp.hook_pre": "gate", "blocks.1.mlp.hook_post": "neurons", "blocks.1.mlp.hook_pre_linear": "up",
    "ln_final.hook_scale": "final_scale", "ln_final.hook_normalized": "final_normalized",
}  # fmt: skip
"""TransformerLens' names, and which of our quantities they are by its documentation."""


def test_transformer_lens_names():
    model = models.build("text", dtype=torch.float64)
    inputs = {"input_ids": torch.randint(8, 64, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    expected, _ = theirs(model, inputs)
    with capture(model, list(LENS)) as seen:
        model(**inputs)
    cache = seen.cache_dict()
    assert set(cache) == set(LENS)
    for lens, name in LENS.items():
        value = expected[name][1] if lens.startswith("blocks") else expected[name]
        same(seen[lens], value.transpose(1, 2) if name in ("pattern", "scores") else value)
        assert torch.equal(cache[lens], seen[lens])
        assert lens in seen
        assert name in seen
    assert seen["z"].shape[0] == 1
    assert torch.equal(seen["z", 1], seen["blocks.1.attn.hook_z"])
    assert "blocks.0.attn.hook_z" not in seen
    assert "mass" not in seen
    with pytest.raises(KeyError, match=r"captured layers are \[1\]"):
        seen["blocks.0.attn.hook_z"]
    with pytest.raises(KeyError, match="was not captured"):
        seen["mass"]
    with capture(model, ["z", "blocks.2.attn.hook_z", "k"], layers=[0]) as seen:
        model(**inputs)
    assert seen.layers == {"z": (0, 2), "k": (0,)}


def test_transformer_lens_itself(tmp_path):
    lens = pytest.importorskip("transformer_lens.model_bridge", reason="transformer-lens is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    ids = torch.randint(8, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    for model in (models.build("text"), small("qwen3").float(), small("gemma2").float()):
        ours = copy.deepcopy(model)
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
        # TransformerLens loads it again, to change its settings.
        special = dict(bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w0")
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        bridge = lens.TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer)
        _, cache = bridge.run_with_cache(ids)
        with capture(ours, list(LENS)) as seen, torch.no_grad():
            ours(ids)
        for name, value in seen.cache_dict().items():
            hidden = ~torch.isfinite(value)
            same(value.masked_fill(hidden, 0), cache[name].masked_fill(hidden, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(what="blocks.3.attn.hook_zz"), ValueError, r"nearest: blocks.3.attn.hook_z"),
        (dict(what="resid_prev"), ValueError, "nearest: resid_pre"),
        (dict(what="blocks.3.attn.hook_z"), ValueError, "no layer 3; this model has layers 0 to 2"),
        (dict(what="z", layers=[7]), ValueError, "no layer 7"),
        (dict(what="z", layers=[]), ValueError, "at least one layer"),
        (dict(what=[]), ValueError, "what is empty"),
        (dict(what=[3]), TypeError, "not a name"),
        (dict(what="z", roles="image"), ValueError, "expected one or more of pad, system, visual"),
        (dict(what="z", positions=[0], columns=[0]), ValueError, "both given"),
        (dict(what="z", positions=["a"]), ValueError, "whole numbers"),
        (dict(what="z", positions=[]), ValueError, "whole numbers"),
        (dict(what="z", reduce="sum"), ValueError, "'mean' or 'mean_by_role'"),
        (dict(what="pattern", reduce="mean"), NotImplementedError, "use span_mass"),
    ],
)
def test_what_is_refused(options, error, message):
    model = models.build("text")
    with pytest.raises(error, match=message), capture(model, **options):
        raise AssertionError("the block was entered")


def test_what_cannot_be_read():
    model = models.build("llava")
    inputs = models.prompt(model, 3, 5)
    with pytest.raises(ValueError, match="last 1 columns only"), capture(model, "logits"):
        model(**inputs, logits_to_keep=1)
    with capture(model, "logits", positions=[-1]) as seen:
        out = model(**inputs, logits_to_keep=1).logits
    assert torch.equal(seen["logits"], out)
    with pytest.raises(ValueError, match="nothing was captured"), capture(model, "z"):
        pass
    with capture(model, ["z", "logits"]) as seen:
        model.model(**inputs)
    with pytest.raises(ValueError, match="nothing was captured of 'logits'"):
        seen["logits"]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    roles = torch.full(inputs["input_ids"].shape, int(Role.QUERY), dtype=torch.uint8)
    with capture(model, ["z", "embed"], token_roles=roles, roles="query") as seen:
        model(inputs_embeds=embeds)
    assert seen["z"].shape == (3, roles.numel(), 4, 8)
    with pytest.raises(ValueError, match="with input_ids"):
        seen["embed"]
    with patch(model, Plan()), pytest.raises(ValueError, match=r"patch\(..., roles=\)"):
        capture(model, "z", token_roles=roles).__enter__()
    with capture(model, "z"):
        model(**inputs)
        with pytest.raises(ValueError, match="open it inside patch"), patch(model, Plan()):
            pass
    # An interrupted pass leaves nothing.
    stop = model.model.language_model.layers[1].register_forward_hook(lambda *a: 1 / 0)
    with capture(model, "z") as seen:
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        stop.remove()
        model(**inputs)
        first = seen["z"]
    assert first.shape[2] == inputs["input_ids"].shape[1]


@pytest.mark.slow
def test_compiled_models():
    model = models.build("text", num_hidden_layers=1)
    with pytest.raises(ValueError, match="compiled"), capture(torch.compile(model, backend="eager"), "z"):
        pass
    step = {"input_ids": torch.tensor([[9]])}

    def prefill():
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        model(input_ids=torch.arange(8, 20)[None], past_key_values=cache, use_cache=True)
        return cache

    what = ["z", "neurons"]
    with patch(model, Plan([ScaleNeurons({0: [3]}, by=2.0)])), torch.no_grad():
        with capture(model, what, roles="generated") as plain:
            model(**step, past_key_values=prefill())
        whole = torch.compile(model, backend="aot_eager", fullgraph=True)
        whole(**step, past_key_values=prefill())
        # One graph cannot be read, also one that was made before.
        with pytest.raises(torch._dynamo.exc.Unsupported, match="inside capture"), capture(model, what):
            whole(**step, past_key_values=prefill())
        # A graph that may break does so where something is read.
        with capture(model, what, roles="generated") as seen:
            torch.compile(model, backend="aot_eager")(**step, past_key_values=prefill())
        for name in plain:
            same(seen[name], plain[name], rtol=1e-4, atol=1e-4)


# -- the page --------------------------------------------------------------------------------------------------------
def table():
    """The table of docs/capture.md."""
    rows = ["| name | TransformerLens | is |", "|---|---|---|"]
    for q in QUANTITIES.values():
        lens = "" if q.lens is None else f"`{q.lens.format('3')}`"
        rows.append(f"| `{q.name}` | {lens} | {q.meaning} |")
    return "\n".join(rows) + "\n"


def test_the_page(tmp_path, monkeypatch):
    """Print what its table should be with ``python tests/emocircuits/test_capture.py``."""
    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["boosted"]["z"].shape == names["seen"]["z"].shape


if __name__ == "__main__":
    print(table())
