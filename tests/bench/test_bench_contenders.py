"""Every contender that runs on a CPU is checked against float64 here, and the check itself against wrong answers."""

import dataclasses

import pytest
import torch

from bench.kernels_gpu import inputs, oracle
from bench.kernels_gpu.contenders import Contender, Unavailable, attention
from bench.kernels_gpu.measure import contenders_of, measure, problem, ready
from bench.kernels_gpu.oracle import Wrong
from bench.kernels_gpu.shapes import SETS, TINY, Generation, decode, prefill
from bench.kernels_gpu.timing import Timer

EVERYONE = [
    pytest.param(case, contender.name, id=f"{group}-{case.name}-{contender.name}")
    for group, cases in SETS["tiny"]().items()
    for case in cases
    if not isinstance(case, Generation)
    for contender in contenders_of(case, "cpu")
]


@pytest.fixture(scope="module")
def made():
    """Problems by case: inputs and float64 answers are the same for all contenders of a case."""
    found = {}

    def get(case):
        if case not in found:
            found[case] = problem(case, "cpu", seed=3)
        return found[case]

    return get


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("case", "name"), EVERYONE)
def test_contender_passes_the_check(case, name, made, monkeypatch):
    """Fused contenders run in the interpreter here, so that their calls are right before they meet a GPU."""
    monkeypatch.setattr("bench.kernels_gpu.contenders.sees_a_gpu", lambda: True)
    found = made(case)
    contender = next(one for one in found.contenders if one.name == name)
    try:
        _, error = ready(contender, found)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert (error is None) == (contender.variant not in found.gates)


CASE = prefill(TINY, 40, torch.float32)


def sabotage(variant, call):
    return Contender("sabotage", variant, lambda made: lambda: call(made), ours=True)


def right(made, variant="plain"):
    return attention.ours("reference", variant)(made)()


def test_the_check_accepts_the_definition(made):
    for variant in inputs.VARIANTS:
        _, error = ready(sabotage(variant, lambda x, v=variant: right(x, v)), made(CASE))
        assert error < 1e-6


@pytest.mark.parametrize("variant", ["bias", "routes", "boost", "every"])
def test_the_check_notices_routes_that_do_nothing(variant, made):
    with pytest.raises(Wrong, match="relative rms error"):
        ready(sabotage(variant, right), made(CASE))


def test_the_check_notices_a_boost_of_the_wrong_head(made):
    def wrong(x):
        table = x.tables["boost"]
        return right(dataclasses.replace(x, tables={"boost": type(table)(gain=table.gain.roll(1, 1))}), "boost")

    with pytest.raises(Wrong):
        ready(sabotage("boost", wrong), made(CASE))


def test_the_check_notices_an_entry_that_nobody_writes(made):
    """Also outside the sampled rows: memory that is handed out again holds NaN."""
    memory = []

    def lazy(x):
        z = right(x)
        if not memory:
            memory.append(z.clone())
            return memory[0]
        unwritten = memory[0]
        unwritten[:, 1:] = z[:, 1:]
        return unwritten

    with pytest.raises(Wrong):
        ready(sabotage("plain", lazy), made(CASE))


def test_the_check_notices_a_wrong_shape(made):
    with pytest.raises(Wrong, match="shape"):
        ready(sabotage("plain", lambda x: right(x).new_zeros(1, 4, 40, 8)), made(CASE))


def test_others_may_round_more_than_ours(made):
    def rough(x):
        z = right(x)
        return z * (1 + 6 * 2e-4 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0)))

    half = prefill(dataclasses.replace(TINY, name="tiny, half"), 40, torch.float16)
    found = made(half)
    assert 1e-5 < found.gates["plain"].plain[0] < 1e-3
    ready(Contender("theirs", "plain", lambda x: lambda: rough(x)), found)
    with pytest.raises(Wrong):
        ready(Contender("ours", "plain", lambda x: lambda: rough(x), ours=True), found)


def test_the_float64_gradients_are_those_of_autograd():
    case = SETS["tiny"]()["backward"][0]
    found = inputs.make(case, "cpu", seed=5)
    part, gates = oracle.backward_gates(found)
    leaves = [x.double().requires_grad_() for x in (found.q, found.k, found.v)]
    tables = {name: routes and routes for name, routes in found.tables.items()}
    for variant in inputs.VARIANTS:
        wide = dataclasses.replace(found, q=leaves[0], k=leaves[1], v=leaves[2], tables=tables)
        z = attention.ours("reference", variant)(wide)()
        grads = torch.autograd.grad(z, leaves, found.grad.double())
        for got, expected in zip(gates[variant].expected, part.of(*grads), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_a_dense_bias_says_what_the_table_says():
    for case in (CASE, decode(TINY, 40, 3, torch.float32)):
        found = inputs.make(case, "cpu", seed=1)
        mask = inputs.dense_bias(found, "bias", torch.bfloat16).float()
        bias, roles = found.tables["bias"].bias, found.roles[0].tolist()
        for head in range(TINY.heads):
            for row in range(case.rows):
                at = row + case.keys - case.rows
                for key in range(case.keys):
                    value = -torch.inf if case.causal and key > at else float(bias[0, head, roles[at], roles[key]])
                    assert mask[0, head, row, key] == value


def test_whoever_fails_is_recorded_and_the_others_are_timed(monkeypatch):
    def broken(made):
        raise ValueError("no such thing\nand more")

    def absent(made):
        raise Unavailable("not installed")

    everyone = [
        Contender("right", "plain", lambda made: lambda: right(made), ours=True),
        Contender("wrong", "boost", lambda made: lambda: right(made), ours=True),
        Contender("broken", "plain", broken, ours=True),
        Contender("absent", "plain", absent),
        Contender("huge", "plain", lambda made: lambda: torch.empty(1 << 60)),
    ]
    monkeypatch.setattr("bench.kernels_gpu.measure.contenders_of", lambda case, device: everyone)
    found = measure(CASE, "cpu", Timer("cpu", seconds=0.0))
    status = {one["name"]: one["status"] for one in found["contenders"]}
    assert status == {"right": "timed", "wrong": "wrong", "broken": "failed", "absent": "skipped", "huge": "failed"}
    reasons = {one["name"]: one.get("reason") for one in found["contenders"]}
    assert reasons["broken"] == "ValueError: no such thing"
    assert reasons["absent"] == "not installed"
    assert found["ratios"] == []
