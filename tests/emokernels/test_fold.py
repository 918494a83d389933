"""A gain in the weight does what a gain on the neuron does, and leaves no trace."""

import gc

import pytest
import torch
import torch.nn.functional as F

import emokernels as emo

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INDEX = torch.tensor([5, 0, 11])
SCALE = torch.tensor([1.6, 0.0, -2.5])


def weight(dtype=torch.float32, dim=1):
    w = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.nn.Parameter(w if dim == 1 else w.t().contiguous())


def project(a, w, dim):
    return F.linear(a, w) if dim == 1 else a @ w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 0])
def test_equals_the_edited_neurons_and_comes_back(dtype, dim):
    w, a = weight(dtype, dim), torch.randn(2, 3, 12).to(dtype)
    before, storage = w.detach().clone(), w.data_ptr()
    edits = emo.NeuronEdits(INDEX, scale=SCALE[None, None])
    expected = project(emo.edit_neurons(a.double(), edits), before.double(), dim)
    with emo.fold_gain(w, INDEX, SCALE, dim=dim) as folded:
        assert folded.active
        got = project(a.double(), w.detach().double(), dim)
        sizes = emo.edit_neurons(a.double().abs(), emo.NeuronEdits(INDEX, scale=SCALE.abs()[None, None]))
        bound = torch.finfo(dtype).eps / 2 * project(sizes, before.double().abs(), dim)  # products rounded once
        assert ((got - expected).abs() <= bound + 1e-6).all()
        assert w.data_ptr() == storage
        assert not torch.equal(w, before)
    assert not folded.active
    assert torch.equal(w, before)
    assert w.requires_grad


def test_only_the_named_columns_change_and_one_number_serves_all():
    w = weight()
    before = w.detach().clone()
    folded = emo.fold_gain(w, INDEX, 3)
    assert torch.equal(w[:, INDEX], before[:, INDEX] * 3)
    others = [i for i in range(12) if i not in INDEX.tolist()]
    assert torch.equal(w[:, others], before[:, others])
    folded.undo()
    folded.undo()
    assert torch.equal(w, before)
    with pytest.raises(ValueError, match="still folded"), folded:
        pass


def test_comes_back_after_an_exception_and_keeps_bits_that_no_product_does():
    w = torch.tensor([[1e-45, -0.0, float("nan"), float("inf")]])
    bits = w.view(torch.int32).clone()
    with pytest.raises(RuntimeError, match="inside"), emo.fold_gain(w, torch.arange(4), 1.7):
        raise RuntimeError("inside")
    assert torch.equal(w.view(torch.int32), bits)


def test_disjoint_folds_nest_and_overlapping_ones_are_refused():
    w, other = weight(), weight()
    before = w.detach().clone()
    with emo.fold_gain(w, torch.tensor([1, 2]), 2.0):
        with emo.fold_gain(w, torch.tensor([3]), 2.0), emo.fold_gain(other, torch.tensor([1]), 2.0):
            pass
        for same in (w, w.data, w.detach()):
            with pytest.raises(ValueError, match="neuron 2, which is"):
                emo.fold_gain(same, torch.tensor([3, 2]), 2.0)
        assert torch.equal(w[:, 3], before[:, 3])
    with emo.fold_gain(w, torch.tensor([3, 2]), 2.0):
        pass
    assert torch.equal(w, before)


def test_a_fold_out_of_order_is_undone_too():
    w = weight()
    before = w.detach().clone()
    first, second = emo.fold_gain(w, torch.tensor([1]), 2.0), emo.fold_gain(w, torch.tensor([2]), 2.0)
    first.undo()
    second.undo()
    assert torch.equal(w, before)


def test_a_fold_that_nobody_holds_is_for_good():
    w = weight()
    before = w.detach().clone()
    emo.fold_gain(w, INDEX, 2.0)
    gc.collect()
    assert torch.equal(w[:, INDEX], before[:, INDEX] * 2)


def test_follows_a_module_that_is_cast():
    module = torch.nn.Linear(12, 6, bias=False)
    expected = module.weight.detach().half()
    folded = emo.fold_gain(module.weight, INDEX, 2.0)
    module.half()
    folded.undo()
    assert torch.equal(module.weight, expected)


def test_index_and_views_are_not_shared_with_the_caller():
    w, index = weight(), INDEX.clone()
    before = w.detach().clone()
    folded = emo.fold_gain(w, index, 2.0)
    index.zero_()
    folded.undo()
    assert torch.equal(w, before)
    part = w.detach()[:, ::2]
    with emo.fold_gain(part, torch.tensor([1]), 2.0):
        assert torch.equal(w[:, 2], before[:, 2] * 2)
    assert torch.equal(w, before)


def test_inference_mode():
    with torch.inference_mode():
        made_inside = torch.randn(6, 12)
    for w in (made_inside, weight()):
        before = w.detach().clone()
        folded = emo.fold_gain(w, INDEX, 2.0)
        folded.undo()
        with torch.inference_mode(), emo.fold_gain(w, INDEX, 2.0):
            pass
        assert torch.equal(w, before)


class Sharded(torch.Tensor):
    pass


w32 = torch.randn(6, 12)
ints = torch.tensor
ERRORS = {
    "weight type": (TypeError, "weight:", ([1.0], ints([1]), 2.0), {}),
    "weight int8": (TypeError, "weight:", (torch.zeros(6, 12, dtype=torch.int8), ints([1]), 2.0), {}),
    "weight float8": (TypeError, "weight:", (torch.zeros(6, 12).to(torch.float8_e4m3fn), ints([1]), 2.0), {}),
    "weight subclass": (NotImplementedError, "weight:", (w32.as_subclass(Sharded), ints([1]), 2.0), {}),
    "weight meta": (
        NotImplementedError,
        "weight:",
        (torch.zeros(6, 12, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"), 2.0),
        {},
    ),
    "weight rank": (ValueError, "weight:", (w32[0], ints([1]), 2.0), {}),
    "dim": (ValueError, "dim:", (w32, ints([1]), 2.0), {"dim": 2}),
    "index type": (TypeError, "index:", (w32, [1], 2.0), {}),
    "index dtype": (TypeError, "index:", (w32, ints([1.0]), 2.0), {}),
    "index rank": (ValueError, "index:", (w32, ints([[1]]), 2.0), {}),
    "index empty": (ValueError, "index:", (w32, torch.zeros(0, dtype=torch.int64), 2.0), {}),
    "index negative": (ValueError, "index:", (w32, ints([-1]), 2.0), {}),
    "index too large": (ValueError, "index:", (w32, ints([12]), 2.0), {}),
    "index too large for Conv1D": (ValueError, "index:", (w32, ints([6]), 2.0), {"dim": 0}),
    "index twice": (ValueError, "neuron 3 twice", (w32, ints([1, 3, 3]), 2.0), {}),
    "scale type": (TypeError, "scale:", (w32, ints([1]), "2"), {}),
    "scale integer": (TypeError, "scale:", (w32, ints([1]), ints([2])), {}),
    "scale shape": (ValueError, "scale:", (w32, ints([1]), torch.ones(2)), {}),
    "scale gradient": (ValueError, "scale:", (w32, ints([1]), torch.ones(1, requires_grad=True)), {}),
    "overflow": (ValueError, "scale:", (torch.full((6, 12), 6e4).half(), ints([1]), 2.0), {}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    kind, words, arguments, options = ERRORS[case]
    before = arguments[0].clone() if isinstance(arguments[0], torch.Tensor) else None
    with pytest.raises(kind, match=words) as error:
        emo.fold_gain(*arguments, **options)
    text = str(error.value)
    assert ": expected " in text
    assert ", got " in text
    assert text.endswith(".")
    if before is not None and before.device.type != "meta":
        assert torch.equal(arguments[0].view(torch.uint8), before.view(torch.uint8)), "nothing was changed"
