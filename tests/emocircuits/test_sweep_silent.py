"""What could be silently wrong in a sweep: each is as a hook loop has it, or refused by name."""

from __future__ import annotations

import contextlib
import copy

import families_harness as harness
import pytest
import sweep_oracle as oracle
import torch
from families_vision_models import VISION
from models import IMAGE, VOCAB, build
from test_sweep_engine import HEADS, A, B, agree, difference, pair
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from emocircuits import AddVector, BoostRoute, Plan, ScaleHead, patch
from emocircuits.families import open_model
from emocircuits.sweep import Sweep, kl, log_prob, logit_diff
from emocircuits.sweep.stale import Weights
from emocircuits.sweep.trace import refuse_lost_cap, trace

METRIC = logit_diff(A, B)


def padded(kind="llama", side="right", by=3):
    """A pair with padding on one side."""
    model, clean, corrupt = pair(kind)
    fill = {"input_ids": 0, "attention_mask": 0}

    def pad(x):
        out = dict(x)
        for name, value in fill.items():
            parts = [torch.full((1, by), value, dtype=x[name].dtype), x[name]]
            out[name] = torch.cat(parts if side == "left" else parts[::-1], 1)
        return out

    return model, pad(clean), pad(corrupt)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(kind, side):
    model, clean, corrupt = padded(kind, side)
    total = clean["input_ids"].shape[1]
    pos = total - 1 if side == "left" else total - 4
    sweep = Sweep(model, clean, corrupt, logit_diff(A, B, pos=pos), progress=False)
    metric = lambda x: x[0, pos, A] - x[0, pos, B]  # noqa: E731
    for target, units in (("heads", HEADS), ("residual", None)):
        found = getattr(sweep, target)(positions="each")
        agree(found.values, oracle.sweep(model, corrupt, clean, target, metric, "each", units), 1e-10, found.gap)
    assert sweep.residual("last").labels["pos"] == [pos]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_metric_that_reads_padding_is_refused(side):
    model, clean, corrupt = padded(side=side)
    total = clean["input_ids"].shape[1]
    own = range(3, total) if side == "left" else range(total - 3)
    wrong = 0 if side == "left" else -1
    message = f"reads padding; the prompt's own columns are {own[0]} to {own[-1]}"
    everywhere = lambda x: x[0, :, A].mean()  # noqa: E731
    for metric in (logit_diff(A, B, pos=wrong), log_prob(A, pos=wrong), kl(pos=wrong), lambda x: x[0, wrong, A]):
        with pytest.raises(ValueError, match=message):
            Sweep(model, clean, corrupt, metric, progress=False)
    with pytest.raises(ValueError, match=message):
        Sweep(model, clean, corrupt, everywhere, progress=False)
    fine = lambda x: x[0, own[0] : own[-1] + 1, A].mean()  # noqa: E731
    found = Sweep(model, clean, corrupt, fine, progress=False).residual(layers=[1])
    agree(found.values, oracle.sweep(model, corrupt, clean, "residual", fine, "all", layers=[1]), 1e-10, found.gap)
    for outside in (total, -total - 1):
        with pytest.raises(ValueError, match=f"reads column {outside}, outside a prompt of {total}"):
            Sweep(model, clean, corrupt, logit_diff(A, B, pos=outside), progress=False)


def test_equal_prompts():
    model, clean, _ = pair("llama")
    sweep = Sweep(model, clean, clean, METRIC, progress=False)
    for found in (sweep.heads("each"), sweep.residual(), sweep.neurons(groups=2), sweep.qkv()):
        assert bool((found.values == sweep.clean).all())
        with pytest.raises(ValueError, match="do not differ, so effects would be shares of nothing"):
            _ = found.effects
        assert found.to_dataframe()["effect"].isna().all()
        assert found.top(1)[0]["effect"] is None
    zero = Sweep(model, clean, clean, METRIC, patch_with="zero", progress=False).heads()
    agree(zero.values, oracle.sweep(model, clean, clean, "heads", difference, "all", HEADS, torch.zeros_like), 1e-10)


def test_images_of_different_size():
    model, clean, corrupt = pair("llava")
    wider = {**corrupt, "pixel_values": torch.zeros(1, 3, 28, 56, dtype=torch.float64)}
    with pytest.raises(ValueError, match="size"):
        Sweep(model, clean, wider, METRIC, progress=False)
    two = {**corrupt, "pixel_values": corrupt["pixel_values"].repeat(2, 1, 1, 1)}
    with pytest.raises(ValueError, match="image"):
        Sweep(model, clean, two, METRIC, progress=False)
    # As many tokens, another grid: the same column is another place of the picture.
    qwen, make = VISION["Qwen2-VL"](torch.float64)
    inputs = make(1, "none")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    turned = {**inputs, "image_grid_thw": torch.tensor([[1, 2, 8]])}
    with pytest.raises(ValueError, match="differ"):
        Sweep(qwen, inputs, turned, METRIC, progress=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_mask": None}, "attention_mask is in the clean inputs and not in the corrupt ones"),
        ({"token_type_ids": 1}, "token_type_ids differs between clean and corrupt"),
        ({"position_ids": 1}, "position_ids differs between clean and corrupt"),
        ({"past_key_values": 1}, "corrupt continues on a cache; give the whole prompt"),
        ({"inputs_embeds": 1}, "inputs_embeds is in the corrupt inputs and not in the clean ones"),
    ],
)
def test_inputs_that_are_not_of_one_kind(change, said):
    model, clean, corrupt = pair("llama")
    clean, corrupt = dict(clean), dict(corrupt)
    for name, value in change.items():
        if value is None:
            corrupt.pop(name)
            continue
        if name.endswith("_ids"):
            clean[name] = torch.zeros_like(clean["input_ids"])
        corrupt[name] = torch.ones_like(clean["input_ids"])
    with pytest.raises(ValueError, match=said):
        Sweep(model, clean, corrupt, METRIC, progress=False)


@pytest.mark.parametrize("where", ["embedding", "layer", "unembedding", "unread"])
def test_weights_that_are_not_finite(where):
    model, clean, corrupt = pair("llama")
    model = copy.deepcopy(model)
    with torch.no_grad():
        if where == "embedding":
            model.model.embed_tokens.weight[50] = float("nan")  # a token of the corrupt prompt alone
        elif where == "layer":
            model.model.layers[2].self_attn.v_proj.weight[0, 0] = float("inf")
        else:
            model.lm_head.weight[A if where == "unembedding" else 60] = float("nan")
    for metric in (METRIC, log_prob(A), kl(), lambda x: x[0, -1, A]):
        with pytest.raises(ValueError, match="NaN or infinite values; nothing can be measured"):
            Sweep(model, clean, corrupt, metric, progress=False)


def test_a_metric_that_is_not_finite():
    model, clean, corrupt = pair("llama")
    with pytest.raises(ValueError, match="the metric of the clean prompt is nan: nothing can be measured"):
        Sweep(model, clean, corrupt, lambda x: x[0, -1, A] * float("nan"))
    with torch.no_grad():
        seen = float(model(**corrupt).logits[0, -1, A])
    with pytest.raises(ValueError, match="the metric of the corrupt prompt is inf: nothing can be measured"):
        Sweep(model, clean, corrupt, lambda x: float("inf") if abs(float(x[0, -1, A]) - seen) < 1e-9 else 1.0)


def changed(model, how):
    layer = model.model.layers[1]
    with torch.no_grad():
        if how == "in place":
            layer.mlp.down_proj.weight[0, 0] += 1e-3
        elif how == "data":
            layer.self_attn.o_proj.weight.data[:, 3] = 0
        elif how == "tied":
            model.model.embed_tokens.weight[A] *= 2
        elif how == "unembedding":
            model.lm_head.weight.data[B] *= 2
        elif how == "loaded":
            model.load_state_dict(build("text", seed=1, dtype=torch.float64).state_dict())
        elif how == "dtype":
            model.float()
        elif how == "training":
            model.train()
        else:
            layer.mlp.down_proj = torch.nn.Linear(*layer.mlp.down_proj.weight.T.shape, bias=False).double().eval()


@pytest.mark.parametrize("how", ["in place", "data", "tied", "unembedding", "loaded", "dtype", "training", "replaced"])
def test_a_model_that_changed_since_its_sweep_was_made(how):
    model, clean, corrupt = pair("llama")
    model = copy.deepcopy(model)
    if how == "tied":
        model.lm_head.weight = model.model.embed_tokens.weight
    sweep = Sweep(model, clean, corrupt, METRIC, progress=False)
    before = sweep.heads(layers=[1]).values
    kept = copy.deepcopy(model.model.layers.state_dict())
    changed(model, how)
    said = "in training mode" if how == "training" else "is not what it was when this sweep ran"
    with pytest.raises(ValueError, match=said):
        sweep.heads(layers=[1])
    if how in ("in place", "data", "training"):
        model.eval().model.layers.load_state_dict(kept)
        assert torch.equal(sweep.heads(layers=[1]).values, before)


def test_small_and_odd_weights_are_seen():
    """Tensors that are no whole number of eight bytes, views, half precision, tied weights."""
    handle = copy.copy(Sweep(*pair("llama"), METRIC, progress=False).handle)
    module = torch.nn.Module()
    module.odd = torch.nn.Parameter(torch.arange(7, dtype=torch.bfloat16))
    module.turned = torch.nn.Parameter(torch.arange(12.0).view(3, 4).T)
    module.eval().register_buffer("flags", torch.zeros(3, dtype=torch.bool))
    object.__setattr__(handle, "text", module)
    handle.__dict__["layers"] = [module]
    weights = Weights(handle, None)
    weights.check()
    for name, index in (("odd", 6), ("turned", (3, 2)), ("flags", 1)):
        tensor = getattr(module, name)
        old = tensor.data[index].clone()
        tensor.data[index] = 1
        with pytest.raises(ValueError, match=name):
            weights.check()
        tensor.data[index] = old
        weights.check()


@pytest.mark.parametrize("edit", ["add", "route", "head"])
def test_a_plan_in_the_model_is_refused(edit):
    model, clean, corrupt = pair("llama")
    plan = {
        "add": Plan([AddVector([1], torch.ones(32), by=0.4)]),
        "route": Plan([BoostRoute([(1, 0)], to="last", source="query", by=2.0)]),
        "head": Plan([ScaleHead([(1, 0)], by=0.0)]),
    }[edit]
    made = Sweep(model, clean, corrupt, METRIC, progress=False)
    with patch(model, plan):
        for late in (lambda: Sweep(model, clean, corrupt, METRIC, progress=False), made.heads):
            with pytest.raises(ValueError, match="is inside patch"):
                late()
    assert made.heads().values.shape == (3, 4)


class Wrapped(torch.nn.Linear):
    """As an adapter or a quantised layer: no plain linear layer, and other numbers than its weight's."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("how", ["class", "forward"])
@pytest.mark.parametrize("target", ["heads", "neurons", "qkv"])
def test_layers_that_are_not_plain(how, target, tmp_path):
    model, clean, corrupt = pair("llama")
    model = copy.deepcopy(model)
    layer = model.model.layers[2]
    owner, name = (layer.mlp, "down_proj") if target == "neurons" else (layer.self_attn, "o_proj")
    old = getattr(owner, name)
    if how == "class":
        new = Wrapped(old.in_features, old.out_features, bias=False, dtype=torch.float64)
        new.eval().load_state_dict(old.state_dict())
        setattr(owner, name, new)
    else:
        old.forward = lambda x, plain=old.forward: 2 * plain(x)
    sweep = Sweep(model, clean, corrupt, METRIC, out=tmp_path, progress=False)
    with pytest.raises(NotImplementedError, match=r"layer 2.*in place of a|layer 2.*forward"):
        getattr(sweep, target)()
    assert not list(tmp_path.rglob("*.parquet")), "refused before anything runs"
    found = sweep.residual("each")  # runs the layer itself
    agree(found.values, oracle.sweep(model, corrupt, clean, "residual", difference), 1e-10, found.gap)
    with contextlib.suppress(AttributeError):
        del old.forward


def test_an_unembedding_with_a_forward_of_its_own():
    model, clean, corrupt = pair("llama")
    model = copy.deepcopy(model)
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x) * torch.arange(1, VOCAB + 1).double()
    found = Sweep(model, clean, corrupt, METRIC, progress=False).residual("each")
    agree(found.values, oracle.sweep(model, corrupt, clean, "residual", difference), 1e-10, found.gap)


def test_a_function_that_writes_into_its_logits():
    model, clean, corrupt = pair("llama")

    def writes(x):
        x[0, -1] -= x[0, -1].mean()
        x *= 2
        return x[0, -1, A] - x[0, -1, B]

    twice = lambda x: 2 * difference(x)  # noqa: E731
    found = Sweep(model, clean, corrupt, writes, batch=1, progress=False).residual("each")
    agree(found.values, oracle.sweep(model, corrupt, clean, "residual", twice), 1e-10, found.gap)


def test_inputs_that_are_written_into_later(tmp_path):
    model, clean, corrupt = pair("llama")
    clean, corrupt = ({k: v.clone() for k, v in x.items()} for x in (clean, corrupt))
    one = Sweep(model, clean, corrupt, METRIC, out=tmp_path / "one", progress=False)
    several = Sweep(model, [clean, clean], [corrupt, corrupt], METRIC, progress=False)
    kept = {k: v.clone() for k, v in corrupt.items()}
    expected = several.heads().pairs[0]
    corrupt["input_ids"][0, 4] = 33
    assert torch.equal(one.heads().values, expected)
    again = Sweep(model, clean, kept, METRIC, out=tmp_path / "one", progress=False)
    assert torch.equal(again.heads().values, expected), "the folder is of what was run"
    with pytest.raises(ValueError, match="pair 1 of 2: its inputs were written into"):
        several.heads()


def test_autocast_around_a_part_of_it():
    model, clean, corrupt = pair("llama", torch.float32)
    model = copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        sweep = Sweep(model, clean, corrupt, METRIC, progress=False)
    with pytest.raises(ValueError, match=r"under another torch\.autocast"):
        sweep.heads()


def test_a_role_that_is_elsewhere_in_the_other_prompt():
    model, clean, corrupt = pair("llava")
    image = (clean["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    moved = clean["input_ids"].clone()
    moved[0, image[0] - 1], moved[0, image[-1]] = IMAGE, 20
    sweep = Sweep(model, {**clean, "input_ids": moved}, corrupt, METRIC, progress=False)
    with pytest.raises(ValueError, match="VISUAL is in other columns of the clean prompt than of the corrupt one"):
        sweep.residual("visual")
    given = {**clean, "input_ids": moved}
    found = sweep.residual([image[0] - 1, image[0]], layers=[1])
    expected = oracle.sweep(model, corrupt, given, "residual", difference, [image[0] - 1, image[0]], layers=[1])
    agree(found.values, expected, 1e-10, found.gap)


def test_positions_of_the_prompts_own():
    """Position ids that do not count from 0 are those that resumed layers use."""
    model, clean, corrupt = pair("llama")
    ids = torch.tensor([[3, 4, 5, 9, 10, 11, 12, 20, 21]])
    clean, corrupt = {**clean, "position_ids": ids}, {**corrupt, "position_ids": ids}
    found = Sweep(model, clean, corrupt, METRIC, progress=False).heads("each", layers=[0, 1])
    expected = oracle.sweep(model, corrupt, clean, "heads", difference, "each", HEADS, layers=[0, 1])
    agree(found.values, expected, 1e-10, found.gap)


def test_attention_that_loses_the_cap_of_its_logits():
    model, _, make_inputs, _ = harness.built("Gemma 2")
    model.set_attn_implementation("eager")
    inputs = make_inputs(1, "none")
    logits = trace(open_model(model), inputs, "clean")[1]
    refuse_lost_cap(open_model(model), inputs, logits)

    def without(*given, softcap=None, **more):  # as old releases run SDPA, which they choose by themselves
        return sdpa_attention_forward(*given, **more)

    AttentionInterface.register("without_cap", without)
    AttentionMaskInterface.register("without_cap", sdpa_mask)
    model.set_attn_implementation("without_cap")
    with pytest.raises(ValueError, match="without its cap of attention logits; load it with attn_impl"):
        Sweep(model, inputs, {**inputs, "input_ids": inputs["input_ids"].flip(1)}, METRIC, progress=False)


def test_numbers_that_are_none():
    for wrong in (9.5, "9", None):
        with pytest.raises(TypeError, match="expected the id of a token"):
            logit_diff(A, wrong)
        with pytest.raises(TypeError, match="expected the id of a token"):
            log_prob(wrong)
    assert logit_diff(torch.tensor(A), B) == METRIC
    model, clean, corrupt = pair("llama")
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="expected a whole number of prompts"):
            Sweep(model, clean, corrupt, METRIC, batch=wrong, progress=False)
