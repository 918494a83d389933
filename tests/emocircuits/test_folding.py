"""patch(..., fold=True): the same model as with the factors at run time, at no cost, and back bit for bit."""

import copy
from types import SimpleNamespace

import models
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from emocircuits import AddVector, BoostRoute, Plan, ScaleHead, ScaleNeurons, patch
from emocircuits.folding import Folding, split

GAINS = [ScaleNeurons({0: [3, 7], 2: [11, 40, 2]}, by=1.8), ScaleNeurons({2: [11]}, by=0.5)]
OTHERS = [
    BoostRoute([(0, 1), (2, 3)], to="query", source="visual", by=1.7),
    ScaleHead([(1, 2)], by=0.3),
    AddVector([1], [0.1] * 32, by=0.3),
]
PLAN = Plan([*OTHERS, *GAINS])


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[n], t) for n, t in before.items())


def run(model, inputs, plan, **options):
    with torch.no_grad(), patch(model, plan, **options):
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        return model(**inputs).logits, tokens


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_does_what_the_factors_do(family):
    model = models.build(family, "qwen2" if family != "llava" else "llama", torch.float64)
    inputs, before = models.prompt(model, 3, 5), weights(model)
    expected, tokens = run(model, inputs, PLAN)
    without, _ = run(model, inputs, Plan(OTHERS))
    got, folded_tokens = run(model, inputs, PLAN, fold=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=float(1e-12 * expected.abs().max()))
    assert torch.equal(tokens, folded_tokens)
    assert (expected - without).abs().max() > 1e-6 * expected.abs().max(), "the gains do something"
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_come_back_bit_for_bit_also_after_an_exception(dtype):
    model = models.build("text", dtype=dtype)
    before = weights(model)
    with pytest.raises(RuntimeError, match="inside"), patch(model, Plan(GAINS), fold=True):
        w = model.model.layers[2].mlp.down_proj.weight
        old = before["model.layers.2.mlp.down_proj.weight"]
        assert torch.equal(w[:, 2], (old[:, 2].float() * 1.8).to(dtype))
        assert torch.equal(w[:, 11], (old[:, 11].float() * 0.9).to(dtype))
        assert not same(model, before)
        raise RuntimeError("inside")
    assert same(model, before)


def test_nothing_is_left_to_do_at_run_time():
    model = models.build("text")
    with patch(model, Plan(GAINS), fold=True):
        assert all("forward" not in layer.mlp.down_proj.__dict__ for layer in model.model.layers)
    with patch(model, Plan(GAINS)):
        assert "forward" in model.model.layers[0].mlp.down_proj.__dict__


def test_another_plan_takes_the_place_of_the_first():
    model = models.build("llava", dtype=torch.float64)
    inputs, before = models.prompt(model, 3, 5), weights(model)
    second = Plan([*OTHERS, ScaleNeurons({0: [3], 1: [5]}, by=2.5)])
    with torch.no_grad():
        with patch(model, second):
            expected = model(**inputs).logits
        with patch(model, PLAN, fold=True) as patched:
            model(**inputs)
            patched.replace(second)
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-10)
            patched.replace(Plan(OTHERS))
            model(**inputs)
            assert same(model, before)
            with pytest.raises(ValueError, match="cannot be folded"):
                patched.replace(Plan([ScaleNeurons({0: [3]}, rows=[0])]))
            assert patched.plan == Plan(OTHERS)
    assert same(model, before)


def test_a_plan_that_names_rows_elsewhere_is_folded_with_its_prompt():
    model = models.build("llava", dtype=torch.float64)
    inputs, before = models.prompt(model, 3, 5), weights(model)
    plan = Plan([ScaleHead([(1, 2)], by=0.3, rows=[0]), *GAINS])
    expected, _ = run(model, inputs, plan)
    got, _ = run(model, inputs, plan, fold=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=float(1e-12 * expected.abs().max()))
    assert same(model, before)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (ScaleNeurons({0: [3]}, by=2.0, rows=[0, 2]), r"batch rows \[0, 2\]"),
        (ScaleNeurons({0: [3]}, by=2.0, phase="decode"), "phase='decode'"),
        (ScaleNeurons({0: [3]}, by=2.0, phase="prefill"), "phase='prefill'"),
        (ScaleNeurons({0: [3]}, by=2.0, to=["query", "last"]), "role query, last"),
    ],
    ids=["rows", "decode", "prefill", "roles"],
)
def test_what_varies_is_refused(edit, reason):
    model = models.build("text")
    before = weights(model)
    with pytest.raises(ValueError, match=rf"edit 2 \(ScaleNeurons\) cannot be folded.*{reason}.*fold=False"):
        patch(model, Plan([*GAINS, edit]), fold=True)
    assert same(model, before)


def test_every_role_by_name_is_every_row():
    roles = ["pad", "system", "visual", "query", "last", "generated"]
    gains, rest = split(Plan([ScaleNeurons({1: [4]}, by=2.0, to=roles)]))
    assert gains == {1: {4: 2.0}}
    assert len(rest) == 0


def test_weights_that_cannot_be_scaled_are_refused():
    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x):
            return self.base(x)

    model = models.build("text")
    layers = model.model.layers
    plain = layers[0].mlp.down_proj
    layers[0].mlp.down_proj = Adapter(plain)
    with pytest.raises(ValueError, match=r"layer 0 cannot be folded: its down projection is a .*Adapter"):
        patch(model, Plan(GAINS), fold=True)
    layers[0].mlp.down_proj = plain
    layers[1].mlp.down_proj = layers[2].mlp.down_proj
    with pytest.raises(ValueError, match="layer 2 cannot be folded: layer 1 has the same weight"):
        patch(model, Plan(GAINS), fold=True)
    model = models.build("text")
    before = copy.deepcopy(model.model.layers[0].mlp.down_proj.weight)
    quantised = torch.zeros(32, 48).to(torch.float8_e4m3fn)
    model.model.layers[2].mlp.down_proj.weight = torch.nn.Parameter(quantised, requires_grad=False)
    with (
        pytest.raises(ValueError, match="layer 2 cannot be folded: weight: expected float32"),
        patch(model, Plan(GAINS), fold=True),
    ):
        pass
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before), "what was folded before is undone"


def test_gpt2s_layout():
    module = Conv1D(8, 12)
    before = module.weight.detach().clone()
    folding = Folding(SimpleNamespace(down_projections=[module]))
    folding.put(Plan([ScaleNeurons({0: [9]}, by=2.0)]))
    assert torch.equal(module.weight[9], before[9] * 2)
    folding.undo()
    assert torch.equal(module.weight, before)
