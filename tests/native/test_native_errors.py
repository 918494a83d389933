"""Refusals name the argument and the way out; what keeps the library from loading is told, not swallowed."""

import re

import pytest
import torch
from emulated import emulated  # noqa: F401
from native_problems import problem, routes

import emokernels as emo
from emokernels import native
from emokernels.native import attention as native_attention
from emokernels.native import library


def refused(call, pattern):
    with pytest.raises(NotImplementedError, match=pattern) as error:
        call()
    assert re.search(r"expected .*, got .*\. .*(Use|Pass)", str(error.value)), str(error.value)


PROBLEMS = {
    "prefill": ({"n": 9, "keys": 9}, "q: .*at most 8 queries"),
    "odd head dimension": ({"dim": 12}, "q: .*multiple of 8"),
    "large head dimension": ({"dim": 264}, "q: .*up to 256"),
    "float64": ({"dtype": torch.float64}, "q: .*float32, float16 or bfloat16"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_native_attention_cannot_do(name):
    changes, pattern = PROBLEMS[name]
    made = problem(**changes)
    refused(lambda: native.attend(made), pattern)
    refused(lambda: native_attention.attention(*made), pattern)


def test_a_strided_last_dimension_is_refused():
    made = problem()
    strided = made._replace(v=torch.stack([made.v, made.v], -1)[..., 0])
    refused(lambda: native.attend(strided), r"v: .*stride 1")
    gate = torch.randn(1, 2, 8, 2)[..., 0]
    refused(lambda: native.activate(gate, None, None, None, None, None, None, "silu"), r"gate: .*stride 1")
    refused(lambda: native.activate(gate.contiguous(), gate, None, None, None, None, None, "silu"), r"up: .*stride 1")


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "gain"])
def test_gradients_are_refused_never_dropped(emulated, monkeypatch, name):  # noqa: F811
    monkeypatch.setattr(native_attention, "_multiprocessors", lambda device: 8)
    made = problem(fields=("bias", "gain"))
    wanted = made._replace(**{name: getattr(made, name).clone().requires_grad_()})
    refused(lambda: native.attend(wanted), f"{name}: .*need no gradient")
    refused(lambda: native_attention.attention(*wanted), "need no gradient")
    with torch.no_grad():
        native.attend(wanted)


@pytest.mark.parametrize("name", ["gate", "up", "scale"])
def test_gradients_of_the_activation_are_refused(emulated, name):  # noqa: F811
    tensors = {"gate": torch.randn(1, 2, 8), "up": torch.randn(1, 2, 8), "scale": torch.ones(1, 1, 1)}
    tensors[name].requires_grad_()
    arguments = (tensors["gate"], tensors["up"], torch.tensor([3]), tensors["scale"], None, None, None, "silu")
    refused(lambda: native.activate(*arguments), f"{name}: .*need no gradient")
    refused(lambda: native.activation.gated_activation(*arguments), "need no gradient")
    with torch.no_grad():
        native.activate(*arguments)


def test_a_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "PACKAGE", tmp_path)
    library.why_not.cache_clear()
    try:
        assert "no compiled CUDA kernels are part of this build" in library.why_not()
        assert "--no-build-isolation" in emo.backends()[-1].reason
        refused(library.ops, "no compiled CUDA kernels")
        library.why_not.cache_clear()
        (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
        assert re.search(r"could not|could be loaded: .*_C.abi3.so", library.why_not())
        assert "_C.abi3.so" in emo.backends()[-1].reason
    finally:
        library.why_not.cache_clear()


@pytest.mark.usefixtures("emulated")
class TestBinding:
    """The op of csrc itself refuses what would read or write foreign memory."""

    def call(self, **changes):
        made = problem(batch=2, fields=("gain",), rows=2)
        z, lse = native_attention.empty_outputs(made.q)
        arguments = {
            **made._asdict(), "splits": 2, "z": z, "lse": lse, "partial_z": torch.empty(2, *made.q.shape),
            "partial_lse": torch.empty(2, *made.q.shape[:3]), **changes,
        }  # fmt: skip
        library.ops().decode_attention(**arguments)

    @pytest.mark.parametrize(
        ("changes", "pattern"),
        [
            ({"v": torch.zeros(2, 2, 69, 64)}, "k, v: "),
            ({"k": torch.zeros(2, 3, 70, 64), "v": torch.zeros(2, 3, 70, 64)}, "multiple of the key heads"),
            ({"q": torch.zeros(2, 4, 1, 64, dtype=torch.float16)}, "q, k, v, z: "),
            ({"z": torch.zeros(2, 4, 2, 64)}, "z: "),
            ({"lse": torch.zeros(2, 5)}, "lse: "),
            ({"partial_z": None}, "partial_z"),
            ({"partial_lse": torch.zeros(1, 2, 4, 1)}, "partial_lse"),
            ({"splits": 0}, "splits: "),
            ({"splits": 129}, "splits: "),
            ({"roles": None}, "roles: "),
            ({"roles": torch.zeros(2, 69, dtype=torch.uint8)}, "roles: "),
            ({"query_roles": torch.zeros(2, 1)}, "query_roles: "),
            ({"gain": torch.zeros(2, 3, 6, 6)}, "gain: "),
            ({"gain": torch.zeros(2, 4, 6, 6, dtype=torch.float64)}, "gain: "),
            ({"mask": torch.ones(2, 1, 1, 69, dtype=torch.bool)}, "mask: "),
            ({"mask": torch.ones(2, 1, 1, 70, dtype=torch.int32)}, "mask: "),
            ({"lengths": torch.ones(3, dtype=torch.int32)}, "lengths: "),
            ({"lengths": torch.ones(2, dtype=torch.int64)}, "lengths: "),
        ],
        ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
    )
    def test_attention(self, changes, pattern):
        with pytest.raises(RuntimeError, match=pattern):
            self.call(**changes)
        self.call()

    @pytest.mark.parametrize(
        ("changes", "pattern"),
        [
            ({"up": torch.zeros(2, 3, 7)}, "up: "),
            ({"index": torch.zeros(3, 1, dtype=torch.int64)}, "index: "),
            ({"index": torch.zeros(1, dtype=torch.int32)}, "index: "),
            ({"scale": torch.ones(2, 4, 1)}, "scale: "),
            ({"mask": None}, "mask: "),
            ({"act": 5}, "act: "),
            ({"out": torch.zeros(2, 3, 9)}, "out: "),
        ],
        ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
    )
    def test_activation(self, changes, pattern):
        good = {
            "gate": torch.zeros(2, 3, 8), "up": None, "index": torch.zeros(1, dtype=torch.int64),
            "scale": torch.ones(1, 1, 1), "shift": None, "replace": torch.ones(1, 1, 1),
            "mask": torch.ones(1, 1, 1, dtype=torch.bool), "act": 0, "out": torch.zeros(2, 3, 8),
        }  # fmt: skip
        with pytest.raises(RuntimeError, match=pattern):
            library.ops().gated_activation(**{**good, **changes})
        library.ops().gated_activation(**good)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_ops_compile_and_follow_their_tables(emulated, monkeypatch):  # noqa: F811
    monkeypatch.setattr(native_attention, "_multiprocessors", lambda device: 8)
    made = problem(batch=2, fields=("bias", "gain"))
    gate = torch.randn(2, 3, 16)
    index, scale = torch.tensor([3, 9]), torch.full((1, 1, 2), 1.5)

    def step(q, gain, scale):
        z, lse = native.attend(made._replace(q=q, gain=gain))
        return z * 2, lse, native.activate(gate, gate, index, scale, None, None, None, "silu") + 1

    fast = compiled(step)
    for factor in (1.0, 0.3):
        made.gain.mul_(factor)
        scale.mul_(factor)
        for a, b in zip(fast(made.q, made.gain, scale), step(made.q, made.gain, scale), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", ["attention", "activation"])
def test_opcheck(emulated, monkeypatch, which):  # noqa: F811
    monkeypatch.setattr(native_attention, "_multiprocessors", lambda device: 8)
    if which == "attention":
        made = problem(batch=2, n=2, dtype=torch.float16, fields=("gain",), mask="bool", layout="transposed")
        torch.library.opcheck(native_attention.attention, tuple(made))
    else:
        gate = torch.randn(2, 3, 16)
        arguments = (gate.transpose(0, 1), None, torch.tensor([1]), torch.ones(1, 1, 1), None, None, None, "gelu")
        torch.library.opcheck(native.activation.gated_activation, arguments)


def test_backend_native_is_refused_with_its_reason_here():
    if torch.cuda.is_available() and native.why_not() is None:
        pytest.skip("the native kernels run here")
    made = problem(fields=("gain",))
    with pytest.raises(NotImplementedError, match=r"backend: .*'native': .*Use"):
        emo.attention(made.q, made.k, made.v, roles=made.roles, routes=routes(4), backend="native")
