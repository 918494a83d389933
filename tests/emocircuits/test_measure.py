"""Measurements against transformers' own eager outputs and the oracle."""

import models
import oracle
import pytest
import torch
from test_patching import everything, generate

from emocircuits import BoostRoute, Plan, patch
from emocircuits.measure import attention_weights, capture, images_once


def test_attention_weights_equal_eager():
    model = models.build("llava", dtype=torch.float64)
    rows = [models.prompt(model, 3, 5), models.prompt(model, 1, 3, seed=1)]
    together = attention_weights(model, models.batch(rows), rows=3)
    alone = [attention_weights(model, row, rows=3) for row in rows]
    model.set_attn_implementation("eager")
    for i, (row, ours) in enumerate(zip(rows, alone, strict=True)):
        theirs = torch.stack(model(**row, output_attentions=True).attentions)[:, :, :, -3:]
        assert torch.allclose(ours.double(), theirs, atol=1e-6)
        keys = row["input_ids"].shape[1]
        assert torch.allclose(together[:, i : i + 1, ..., -keys:], ours, atol=1e-6)
        assert not together[:, i, ..., :-keys].any() or keys == together.shape[-1]


def test_attention_weights_under_a_plan_are_effective_weights():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 5)
    plan = Plan([BoostRoute([(1, 2)], to="last", source="visual", by=3.0)])
    plain, boosted = attention_weights(model, inputs), attention_weights(model, inputs, plan)
    visual = inputs["input_ids"][0] == models.IMAGE
    assert torch.allclose(boosted[1, 0, 2, 0, visual], 3 * plain[1, 0, 2, 0, visual], rtol=1e-5)
    assert torch.allclose(boosted[1, 0, 2, 0, ~visual], plain[1, 0, 2, 0, ~visual], rtol=1e-5)
    assert torch.allclose(boosted[:2, :, [0, 1, 3]], plain[:2, :, [0, 1, 3]])


def test_capture_equals_hidden_states_and_head_outputs():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 5)
    with capture(model, ["z", "neurons", "resid_pre", "resid_post"], columns=[-2, -1]) as seen:
        out = model(**inputs, output_hidden_states=True)
    hidden = torch.stack(out.hidden_states)[:, :, -2:]
    assert torch.equal(seen["resid_pre"], hidden[:-1])
    assert torch.equal(seen["resid_post"][:-1], hidden[1:-1])
    layer = model.model.language_model.layers[1]
    assert seen["z"].shape == (3, 1, 2, 4, 8)
    written = layer.self_attn.o_proj(seen["z"][1].flatten(-2)) + seen["resid_pre"][1]
    mlp = layer.mlp.down_proj(seen["neurons"][1])
    assert torch.allclose(written + mlp, seen["resid_post"][1])
    with pytest.raises(ValueError, match="unknown qq"), capture(model, ["qq"]):
        pass


def test_capture_sees_edited_values():
    model = models.build("llava", dtype=torch.float64)
    inputs = models.prompt(model, 3, 5)
    with patch(model, everything()), capture(model, ["resid_post"]) as seen:
        patched = model(**inputs).logits
    assert torch.allclose(model.lm_head(model.model.language_model.norm(seen["resid_post"][-1])), patched)
    assert torch.allclose(patched, oracle.logits(model, inputs, everything()), rtol=1e-9, atol=1e-9)


def test_images_once_changes_nothing_and_encodes_once():
    model = models.build("llava_next")
    first, second = models.prompt(model, 3, 5), models.prompt(model, 3, 5, [(16, 32)], seed=1)
    expected = [generate(model, x)[1] for x in (first, second)]
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *a: calls.append(1))
    with images_once(model):
        for _ in range(3):
            got = [generate(model, x)[1] for x in (first, second)]
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert len(calls) == 2
        first["pixel_values"].mul_(0.5)
        assert not torch.equal(generate(model, first)[1], expected[0])
        assert len(calls) == 3
    hook.remove()
    assert "get_image_features" not in model.model.__dict__
