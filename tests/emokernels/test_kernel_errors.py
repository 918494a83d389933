"""Every refusal names the argument, what was expected, what was given, and the way out."""

import logging

import pytest
import torch
from problems import qkv, random_routes

import emokernels as emo
from emokernels import attention as attention_function
from emokernels.attention import _announced, make_problem
from emokernels.backends import resolve

ROLES = torch.ones(1, 6, dtype=torch.uint8)
f32 = torch.float32


def call(**changes):
    q, k, v = qkv(n=4, keys=6, dim=8, dtype=f32)
    arguments = {"q": q, "k": k, "v": v, **changes}
    return attention_function(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def tensor(*shape, dtype=f32, device=None):
    return torch.zeros(*shape, dtype=dtype, device=device)


ATTENTION = {
    "q no tensor": (TypeError, "q:", {"q": [1.0]}),
    "q rank": (ValueError, "q:", {"q": tensor(4, 4, 8)}),
    "q integer": (TypeError, "q:", {"q": tensor(1, 4, 4, 8, dtype=torch.int32)}),
    "k dtype": (TypeError, "k:", {"k": tensor(1, 2, 6, 8, dtype=torch.float64)}),
    "k device": (ValueError, "k:", {"k": tensor(1, 2, 6, 8, device="meta")}),
    "k batch": (ValueError, "k:", {"k": tensor(2, 2, 6, 8)}),
    "k head dimension": (ValueError, "k:", {"k": tensor(1, 2, 6, 4)}),
    "v shape": (ValueError, "v:", {"v": tensor(1, 2, 5, 8)}),
    "v empty": (ValueError, "v:", {"v": tensor(1, 2, 0, 8)}),
    "heads not divisible": (ValueError, "divisible", {"k": tensor(1, 3, 6, 8), "v": tensor(1, 3, 6, 8)}),
    "roles missing": (ValueError, "roles:", {"routes": random_routes()}),
    "roles dtype": (TypeError, "roles:", {"roles": tensor(1, 6, dtype=torch.int64)}),
    "roles length": (ValueError, "roles:", {"roles": tensor(1, 5, dtype=torch.uint8)}),
    "roles rows": (ValueError, "roles:", {"roles": tensor(2, 6, dtype=torch.uint8)}),
    "roles value": (ValueError, "roles:", {"roles": torch.full((1, 6), 6, dtype=torch.uint8)}),
    "roles device": (ValueError, "roles:", {"roles": tensor(1, 6, dtype=torch.uint8, device="meta")}),
    "query_roles length": (ValueError, "query_roles:", {"query_roles": tensor(1, 6, dtype=torch.uint8)}),
    "routes type": (TypeError, "routes:", {"roles": ROLES, "routes": {"gain": 1}}),
    "routes heads": (ValueError, "routes.bias:", {"roles": ROLES, "routes": random_routes(3)}),
    "routes rows": (ValueError, "routes.bias:", {"roles": ROLES, "routes": random_routes(4, rows=2)}),
    "routes device": (
        ValueError,
        "routes.gain:",
        {"roles": ROLES, "routes": emo.Routes.identity(4, fields=("gain",), device="meta")},
    ),
    "heads type": (TypeError, "heads:", {"heads": 3}),
    "heads shape": (ValueError, "heads.scale:", {"heads": emo.HeadEdits(scale=tensor(1, 3, 4))}),
    "heads width": (ValueError, "heads.shift:", {"heads": emo.HeadEdits(shift=tensor(1, 1, 4, 7))}),
    "mask dtype": (TypeError, "mask:", {"mask": tensor(1, 1, 4, 6, dtype=torch.int64)}),
    "mask rank": (ValueError, "mask:", {"mask": tensor(1, 6).bool()}),
    "mask shape": (ValueError, "mask:", {"mask": tensor(1, 1, 4, 5).bool()}),
    "mask device": (ValueError, "mask:", {"mask": tensor(1, 1, 4, 6, device="meta")}),
    "more queries than keys": (ValueError, "causal:", {"q": tensor(1, 4, 7, 8)}),
    "query_roles for more queries than keys": (
        ValueError,
        "query_roles:",
        {"q": tensor(1, 4, 7, 8), "causal": False, "roles": ROLES, "routes": random_routes()},
    ),
    "scale type": (TypeError, "scale:", {"scale": "big"}),
    "scale infinite": (ValueError, "scale:", {"scale": float("inf")}),
    "softcap zero": (ValueError, "softcap:", {"softcap": 0.0}),
    "window zero": (ValueError, "window:", {"window": 0}),
    "window type": (TypeError, "window:", {"window": 2.5}),
    "window both ways": (NotImplementedError, "window:", {"window": 3, "causal": False}),
    "backend unknown": (ValueError, "backend:", {"backend": "magic"}),
    "backend native": (NotImplementedError, "'native'", {"backend": "native"}),
    "lengths dtype": (TypeError, "lengths:", {"lengths": tensor(1)}),
    "lengths shape": (ValueError, "lengths:", {"lengths": torch.ones(2, dtype=torch.int32)}),
    "lengths value": (ValueError, "lengths:", {"lengths": torch.full((1,), 7, dtype=torch.int32)}),
    "lengths, roles of queries": (
        ValueError,
        "query_roles:",
        {"lengths": torch.ones(1, dtype=torch.int32), "roles": ROLES, "routes": random_routes()},
    ),
    "prefix type": (TypeError, "prefix:", {"prefix": tensor(1, 2, 3, 8)}),
    "prefix dtype": (TypeError, "prefix\\[1\\]:", {"prefix": (tensor(1, 2, 3, 8), tensor(1, 2, 3, 8).half())}),
    "prefix shape": (ValueError, "prefix\\[0\\]:", {"prefix": (tensor(2, 2, 3, 8), tensor(2, 2, 3, 8))}),
    "prefix pair": (ValueError, "prefix\\[1\\]:", {"prefix": (tensor(1, 2, 3, 8), tensor(1, 2, 4, 8))}),
}


def complete(error):
    """All four parts are there: 'argument: expected ..., got .... way out'."""
    text = str(error.value)
    argument, rest = text.split(": expected ", 1)
    expected, rest = rest.split(", got ", 1)
    assert argument
    assert expected
    assert ". " in rest
    assert text.endswith((".", ")."))


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case):
    kind, words, changes = ATTENTION[case]
    with pytest.raises(kind, match=words.replace(".", r"\.")) as error:
        call(**changes)
    complete(error)


CONSTRUCTION = {
    "table type": (TypeError, lambda: emo.Routes(bias=1.0)),
    "table dtype": (TypeError, lambda: emo.Routes(bias=tensor(1, 4, 6, 6, dtype=torch.float16))),
    "table shape": (ValueError, lambda: emo.Routes(gain=tensor(1, 4, 5, 6))),
    "table rank": (ValueError, lambda: emo.Routes(gain=tensor(4, 6, 6))),
    "table nan": (ValueError, lambda: emo.Routes(gain=torch.full((1, 4, 6, 6), torch.nan))),
    "bias inf": (ValueError, lambda: emo.Routes(bias=torch.full((1, 4, 6, 6), torch.inf))),
    "gain -inf": (ValueError, lambda: emo.Routes(gain=torch.full((1, 4, 6, 6), -torch.inf))),
    "tables disagree in heads": (ValueError, lambda: emo.Routes(tensor(1, 4, 6, 6), gain=tensor(1, 5, 6, 6))),
    "tables disagree in rows": (ValueError, lambda: emo.Routes(tensor(2, 4, 6, 6), gain=tensor(3, 4, 6, 6))),
    "tables disagree in dtype": (ValueError, lambda: emo.Routes(tensor(1, 4, 6, 6), tensor(1, 4, 6, 6).double())),
    "unknown field": (ValueError, lambda: emo.Routes.identity(4, fields=("boost",))),
    "replace alone": (ValueError, lambda: emo.HeadEdits(replace=tensor(1, 1, 4, 8))),
    "head mask alone": (ValueError, lambda: emo.HeadEdits(mask=tensor(1, 1, 4).bool())),
    "head mask dtype": (TypeError, lambda: emo.HeadEdits(replace=tensor(1, 1, 4, 8), mask=tensor(1, 1, 4))),
    "head scale rank": (ValueError, lambda: emo.HeadEdits(scale=tensor(4))),
    "head scale integer": (TypeError, lambda: emo.HeadEdits(scale=tensor(1, 1, 4, dtype=torch.int64))),
    "head fields disagree": (ValueError, lambda: emo.HeadEdits(tensor(1, 1, 4), tensor(1, 1, 5, 8))),
    "index type": (TypeError, lambda: emo.NeuronEdits([1, 2])),
    "index dtype": (TypeError, lambda: emo.NeuronEdits(tensor(2))),
    "index empty": (ValueError, lambda: emo.NeuronEdits(tensor(0, dtype=torch.int64))),
    "index negative": (ValueError, lambda: emo.NeuronEdits(torch.tensor([-1, 2]))),
    "index twice": (ValueError, lambda: emo.NeuronEdits(torch.tensor([[1, 2], [3, 3]]))),
    "neuron scale shape": (ValueError, lambda: emo.NeuronEdits(torch.tensor([1, 2]), scale=tensor(1, 1, 3))),
    "neuron scale integer": (
        TypeError,
        lambda: emo.NeuronEdits(torch.tensor([1]), scale=tensor(1, 1, 1, dtype=torch.int64)),
    ),
    "neuron mask dtype": (
        TypeError,
        lambda: emo.NeuronEdits(torch.tensor([1]), replace=tensor(1, 1, 1), mask=tensor(1, 1, 1)),
    ),
    "neuron replace alone": (ValueError, lambda: emo.NeuronEdits(torch.tensor([1]), replace=tensor(1, 1, 1))),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case):
    kind, build = CONSTRUCTION[case]
    with pytest.raises(kind) as error:
        build()
    complete(error)


gate = torch.zeros(2, 3, 8)
MLP = {
    "gate type": (TypeError, "gate:", (None, None), {}),
    "gate dtype": (TypeError, "gate:", (gate.long(), None), {}),
    "gate rank with neurons": (ValueError, "gate:", (gate[0], None), {"neurons": emo.NeuronEdits(torch.tensor([1]))}),
    "up shape": (ValueError, "up:", (gate, gate[:1]), {}),
    "up dtype": (TypeError, "up:", (gate, gate.double()), {}),
    "act unknown": (ValueError, "act:", (gate, gate), {"act": "swish"}),
    "backend unknown": (ValueError, "backend:", (gate, gate), {"backend": "gpu"}),
    "neurons type": (TypeError, "neurons:", (gate, gate), {"neurons": [3]}),
    "index out of range": (ValueError, "neurons.index:", (gate, gate), {"neurons": emo.NeuronEdits(torch.tensor([8]))}),
    "index rows": (
        ValueError,
        "neurons.index:",
        (gate, gate),
        {"neurons": emo.NeuronEdits(torch.tensor([[1], [2], [3]]))},
    ),
    "scale rows": (
        ValueError,
        "neurons.scale:",
        (gate, gate),
        {"neurons": emo.NeuronEdits(torch.tensor([1]), scale=tensor(3, 1, 1))},
    ),
}


@pytest.mark.parametrize("case", MLP)
def test_gated_activation(case):
    kind, words, arguments, options = MLP[case]
    with pytest.raises(kind, match=words.replace(".", r"\.")) as error:
        emo.gated_activation(*arguments, **options)
    complete(error)


class TestFused:
    """What the Triton kernels refuse; an explicit backend never falls back, "auto" takes another."""

    def test_float64(self):
        q, k, v = qkv()
        with pytest.raises(NotImplementedError, match=r"float64.*'reference'"):
            emo.attention(q, k, v, backend="fused")
        assert emo.attention(q, k, v).z.dtype == torch.float64

    def test_head_dimension(self):
        q, k, v = qkv(n=2, keys=2, dim=264, dtype=f32)
        with pytest.raises(NotImplementedError, match=r"q: expected.*256.*264"):
            emo.attention(q, k, v, backend="fused")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    def test_no_gpu(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        q, k, v = qkv(dtype=f32)
        with pytest.raises(NotImplementedError, match="no CUDA GPU"):
            emo.attention(q, k, v, backend="fused")
        assert {b.name: b.available for b in emo.backends()}["fused"] is False

    def test_gradients_of_a_forward_only_call(self):
        q, k, v = (x.requires_grad_() for x in qkv(n=1, keys=4, dtype=f32))
        none = (None,) * 6
        problem = make_problem(q, k, v, None, None, None, None, True, None, None, None)
        z, _ = torch.ops.emokernels.attention_fused_edited(*problem, *none)
        with pytest.raises(NotImplementedError, match="requires_grad=True"):
            z.sum().backward()


def test_backends_are_listed_with_reasons():
    listed = {backend.name: backend for backend in emo.backends()}
    assert set(listed) == {"reference", "composed", "fused", "native"}
    assert listed["reference"].available
    assert listed["composed"].available
    assert all(backend.reason for backend in listed.values())
    for backend in listed.values():
        if backend.available:
            assert resolve(backend.name) == backend.name
        else:
            with pytest.raises(NotImplementedError, match="backend"):
                resolve(backend.name)


def test_auto_says_once_what_it_chose(caplog):
    _announced.clear()
    with caplog.at_level(logging.INFO, logger="emokernels"):
        call()
        call()
    assert [record.message for record in caplog.records] == ["backend='auto' uses 'composed' for attention on cpu"]
