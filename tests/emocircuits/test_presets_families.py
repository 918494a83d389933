"""Gates and contrasts on every vision-language family: caps, windows and image blocks of attention, stacked inputs."""

import families_harness as harness
import oracle
import oracle_edits
import pytest
import torch
from families_vision_models import VISION
from transformers import AttentionInterface

from emocircuits import GateHeads, GateRoute, Plan, patch, presets
from emocircuits.presets import Contrast

TEXT = ["query", "last", "generated"]
GATES = [
    GateRoute([(0, 1), (2, 3), (1, 0)], TEXT, by=0.1, threshold=0.3, to=["last", "generated"]),
    GateHeads([1, 2], keep=2, by=0.3, to=TEXT),  # the images of a random Gemma 3 are zero at layer 0: heads would tie
    GateHeads([1], keep=1, by=-0.5, measure="weights", to=["last", "generated"]),
]
OPTIONS = dict(max_new_tokens=harness.STEPS, do_sample=False, suppress_tokens=harness.SUPPRESS)


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    plan, roles = module._oracle
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    s = query @ key.mT * scaling
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1e30
    visible = visible[:, :, : s.shape[2], : s.shape[3]].expand(s.shape[0], -1, -1, -1)
    weights = s.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
    p = weights.clone()

    def keys(edit, row, i):
        return [j for j, role in enumerate(roles[row]) if role in edit.source and visible[row, 0, i, j]]

    for edit in oracle_edits.named(plan, "GateRoute"):
        for row, i in oracle_edits.tokens(edit, roles):
            for layer, head in edit.heads:
                read = keys(edit, row, i)
                if layer == module.layer_idx and weights[row, head, i, read].sum() >= edit.threshold:
                    p[row, head, i, read] *= edit.by
    z = p @ value
    for edit in oracle_edits.named(plan, "GateHeads"):
        for row, i in oracle_edits.tokens(edit, roles) if module.layer_idx in edit.layers else ():
            read = keys(edit, row, i)
            if read:
                score = (weights if edit.measure == "weights" else s)[row, :, i, read].sum(-1)
                z[row, score.argsort(descending=True)[edit.keep :], i] *= edit.by
    return z.transpose(1, 2), None


@pytest.fixture
def gate_oracle():
    """The oracle, whose attention knows gates and nothing else."""
    AttentionInterface.register("oracle", _attention)
    yield
    AttentionInterface.register("oracle", oracle._attention)


@pytest.mark.parametrize("family", sorted(VISION))
def test_gates(family, gate_oracle):
    model, make_inputs = VISION[family](torch.float64)
    inputs, plan = make_inputs(2, "left"), Plan(GATES)
    with patch(model, plan):
        tokens, logits = harness.generate(model, inputs)
    expected = harness.Expected(model, inputs, plan).steps(tokens)
    assert harness.distance(logits.double(), expected) < 1e-6  # generate() gives its logits in float32
    assert harness.distance(harness.generate(model, inputs)[1].double(), expected) > 1e-2


@pytest.mark.parametrize("family", sorted(VISION))
def test_branches_of_a_contrast_do_not_meet(family):
    """Whatever a family stacks, every branch decodes what it does alone: other images, other lengths, no image."""
    model, make_inputs = VISION[family](torch.float64)
    inputs, other = make_inputs(2, "left"), make_inputs(2, "none")
    ids = torch.randint(8, harness.VOCAB, (2, 4), generator=torch.Generator().manual_seed(0))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    text |= {name: torch.zeros_like(ids) for name in inputs if name.endswith("type_ids")}
    branches = [inputs, other, text]
    alone = [model.generate(**branch, **OPTIONS)[:, -harness.STEPS :] for branch in branches]
    for n in range(3):
        weights = [float(n == b) for b in range(3)]
        together = Contrast(model, branches, weights, plausibility=0.0).generate(**OPTIONS)
        # Equal when the other branches add nothing; their tokens then are those of this one.
        assert torch.equal(together[:, -harness.STEPS :], alone[n])
    noised = presets.vcd(model, inputs, generator=torch.Generator().manual_seed(0)).generate(**OPTIONS)
    assert torch.equal(noised[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
