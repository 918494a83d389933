"""`capture` on a tiny model of every family: what is read fits together, and nothing is changed by reading it."""

import families_harness as harness
import families_vision_models  # noqa: F401  registers its models
import pytest
import torch

from emocircuits.families import open_model
from emocircuits.measure import capture


@pytest.mark.parametrize("family", harness.BUILDERS)
@torch.no_grad()
def test_reading_fits_together(family):
    model, make_inputs = harness.BUILDERS[family](torch.float64)
    # Gemma 2 is eager by itself, and eager attention of padding rows is not a number in float64.
    inputs = make_inputs(2, "none" if family == "Gemma 2" else "left")
    handle = open_model(model)
    heads, neurons = handle.geometry.heads, handle.geometry.neurons
    what = ["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "q_proj", "k_proj", "pattern", "mass"]
    what += ["final_normalized", "logits", *(["neurons", "gate"] if neurons else [])]
    plain = model(**inputs, output_hidden_states=True)
    with capture(model, what) as seen:
        logits = model(**inputs).logits
    assert torch.equal(logits, plain.logits)
    assert torch.equal(seen["logits"], logits)
    assert torch.allclose(seen["resid_pre"][1:], seen["resid_post"][:-1])
    if not handle.family.between_layers:
        hidden = torch.stack(plain.hidden_states)
        assert torch.equal(seen["resid_pre"], hidden[:-1])
        assert torch.equal(seen["resid_post"][:-1], hidden[1:-1])
        assert torch.allclose(seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"], seen["resid_post"])
    real = inputs["attention_mask"].bool()
    values = seen["v"].repeat_interleave(heads // seen["v"].shape[3], 3)
    z = torch.einsum("lbihj,lbjhd->lbihd", seen["pattern"], values)
    assert torch.allclose(z[:, real], seen["z"][:, real], rtol=1e-5, atol=1e-5)  # eager ones round their softmax
    for layer, projection in enumerate(handle.output_projections):
        after = handle.sites["attn_out"][layer]
        written = projection(seen["z", layer].flatten(-2))
        written = written if after is handle.attentions[layer] else after(written)
        assert torch.allclose(written, seen["attn_out", layer])
    if neurons:
        assert seen["neurons"].shape[-1] == seen["gate"].shape[-1] == neurons
    rows = torch.ones(2, 6, dtype=torch.bool)
    rows[:, 0] = False
    for b in range(2):
        rows[b] &= torch.bincount(seen.index.role[b], minlength=6) > 0
    assert torch.allclose(seen["mass"].sum(-1), rows[None, :, None].to(logits.dtype).expand_as(seen["mass"].sum(-1)))
