"""The benchmarks' shapes, percentiles, ratios and goals."""

import numpy as np
import pytest
import torch

from bench.kernels_gpu import goals, inputs, shapes
from bench.kernels_gpu.ratios import interval, percentile, ratio
from bench.kernels_gpu.timing import FEWEST, MOST, Timer, WallTimer
from emokernels import Role


@pytest.mark.parametrize("chosen", shapes.SETS)
def test_every_group_has_cases_with_names_of_their_own(chosen):
    groups = shapes.SETS[chosen]()
    assert tuple(groups) == tuple(shapes.SHARES)
    for cases in groups.values():
        names = [case.name for case in cases]
        assert names
        assert len(set(names)) == len(names)


def test_the_full_set_holds_what_was_promised():
    full = shapes.SETS["full"]()
    assert {case.batch for case in full["decode"]} == {1, 8, 64, 256}
    assert {1024, 4096, 16384} <= {case.keys for case in full["decode"]} & {case.keys for case in full["prefill"]}
    assert {case.model.name for case in full["prefill"]} == {"LLaVA-1.5-7B", "Qwen3-VL-8B", "LLaVA-OneVision-7B"}
    assert {case.width for case in full["activation"]} == {11008, 12288, 14336, 18944}
    assert {case.tokens for case in full["activation"]} == {1, 16, 1024, 8192}
    assert any(case.dtype == torch.float16 for case in full["prefill"])
    assert max(case.model.visual for case in full["prefill"]) > 6000


def test_pairs_operations_and_bytes():
    case = shapes.prefill(shapes.QWEN, 4)
    assert case.pairs == 4 + 3 + 2 + 1
    assert case.flops == 4 * 32 * 128 * 10
    step = shapes.decode(shapes.QWEN, 100, 3)
    assert step.pairs == 100
    assert step.bytes == 2 * (2 * 3 * 100 * 8 * 128 + 2 * 3 * 32 * 128)
    shared = shapes.Attention(shapes.QWEN, 100, 1, 3, prefix=90)
    assert step.bytes - shared.bytes == 2 * 2 * 2 * 90 * 8 * 128, "two of three rows do not read the prefix"


@pytest.mark.parametrize("case", [shapes.prefill(shapes.LLAVA, 1024), shapes.decode(shapes.ONEVISION, 8192, 1)])
def test_roles_of_a_prompt(case):
    row = inputs.role_row(case)
    assert len(row) == case.keys
    assert row.count(Role.VISUAL) == case.model.visual
    assert row.index(Role.VISUAL) == case.model.system
    assert row[-1] == (Role.LAST if case.rows > 1 else Role.GENERATED)
    assert row == sorted(row)


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).random(23).tolist()
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert percentile(values, share) == pytest.approx(np.quantile(values, share))


def test_a_ratio_is_taken_within_rounds():
    """A machine that is ten times slower in some rounds slows both sides of a pair."""
    slow = [10.0 if number % 3 == 0 else 1.0 for number in range(21)]
    found = ratio([1.5 * x for x in slow], slow)
    assert found["median"] == found["low"] == found["high"] == pytest.approx(1.5)


def test_the_interval_covers_the_true_median():
    generator = np.random.default_rng(1)
    inside = 0
    for seed in range(60):
        low, high = interval(generator.lognormal(0.0, 0.3, 31).tolist(), seed)
        inside += low <= 1.0 <= high
    assert inside >= 52, "95 % of 60 is 57"


def test_contenders_take_turns():
    calls = []
    timer = Timer("cpu", seconds=0.0)
    times, host = timer.rounds({name: lambda name=name: calls.append(name) for name in "abc"})
    assert set(times) == set(host) == set("abc")
    assert {len(rounds) for rounds in times.values()} == {FEWEST}
    timed = calls[-3 * FEWEST :]
    rounds = [tuple(timed[start : start + 3]) for start in range(0, len(timed), 3)]
    assert all(set(one) == set("abc") for one in rounds)
    assert len(set(rounds)) > 1, "the order changes from round to round"


def test_time_bounds_the_rounds():
    times, _ = Timer("cpu", seconds=3600.0).rounds({"a": lambda: None})
    assert len(times["a"]) == MOST
    times, host = WallTimer("cpu", seconds=0.0).rounds({"a": lambda: None})
    assert len(times["a"]) == FEWEST
    assert host["a"] == 0.0


def record_with(group, name, ratios, contenders=(), nbytes=10**9):
    case = {"name": name, "flops": 0, "bytes": nbytes, "contenders": list(contenders), "ratios": ratios}
    return {"groups": {group: {"cases": [case], "ceilings": {"copy_gbps": 3000.0, "matmul_tflops": 700.0}}}}


def ratio_row(of, to, median):
    return {"of": of, "to": to, "median": median, "low": median, "high": median}


@pytest.mark.parametrize(("median", "met"), [(1.01, True), (1.02, True), (1.03, False)])
def test_a_goal_with_a_largest_value(median, met):
    goal = goals.GOALS[0]
    found = goals.judge(goal, record_with("prefill", "x", [ratio_row(goals.BOOST, goals.PLAIN, median)]))
    assert (found.value, found.case, found.met) == (median, "x", met)


@pytest.mark.parametrize(("median", "met"), [(0.8, True), (1.25, False)])
def test_a_goal_with_a_smallest_value(median, met):
    goal = next(one for one in goals.GOALS if "SDPA flash" in one.what)
    found = goals.judge(goal, record_with("prefill", "x", [ratio_row(goals.BOOST, "SDPA flash", median)]))
    assert found.value == pytest.approx(1 / median)
    assert found.met == met


def test_the_share_of_bandwidth_counts_large_caches_only():
    goal = next(one for one in goals.GOALS if one.unit == "%")
    row = {"name": goals.BOOST, "status": "timed", "gbps": 2700.0}
    assert goals.judge(goal, record_with("decode", "x", [], [row])).value == pytest.approx(0.9)
    assert goals.judge(goal, record_with("decode", "x", [], [row], nbytes=10**6)) is None


def test_a_record_without_the_group_says_nothing():
    assert goals.judge(goals.GOALS[0], {"groups": {}}) is None


def test_the_worst_case_counts():
    record = record_with("prefill", "good", [ratio_row(goals.BOOST, goals.PLAIN, 1.0)])
    bad = record_with("prefill", "bad", [ratio_row(goals.BOOST, goals.PLAIN, 1.1)])["groups"]["prefill"]["cases"]
    record["groups"]["prefill"]["cases"] += bad
    assert goals.judge(goals.GOALS[0], record).case == "bad"
