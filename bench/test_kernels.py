"""The kernels under pytest-benchmark, to follow one kernel from commit to commit.

    python -m pytest bench --benchmark-autosave -k "fused and decode"
    python -m pytest bench --benchmark-compare -k "fused and decode"

Cases and contenders are those of `kernels_gpu`, checked against float64 first. These times include the launch, one call
at a time; comparisons between kernels, in turn and without the host, are what `python -m bench.kernels_gpu` is for.
"""

import functools

import pytest
import torch

from bench.kernels_gpu.contenders import Unavailable
from bench.kernels_gpu.measure import contenders_of, problem, ready
from bench.kernels_gpu.shapes import SETS, Generation
from bench.kernels_gpu.timing import Timer


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    device = option("--device")
    cases = SETS["tiny" if device == "cpu" else option("--cases")]()
    pairs = [
        pytest.param(case, contender.name, device, id=f"{group}-{contender.name}-{case.name}")
        for group, members in cases.items()
        for case in members
        if not isinstance(case, Generation)
        for contender in contenders_of(case, device)
    ]
    metafunc.parametrize(("case", "name", "device"), pairs)


@functools.lru_cache(maxsize=1)
def made(case, device):
    """The inputs and answers of one case, shared by its contenders, which follow each other."""
    return problem(case, device, seed=1)


@functools.cache
def timer(device):
    return Timer(device)


def test_kernel(case, name, device, benchmark):
    found = made(case, device)
    contender = next(one for one in found.contenders if one.name == name)
    try:
        call, error = ready(contender, found)
    except Unavailable as reason:
        pytest.skip(str(reason))
    except torch.OutOfMemoryError:
        pytest.skip("it does not fit into the memory of this device")
    clock = timer(device)

    def once():
        result = call()
        clock.synchronize()
        return result

    def cold():
        if clock.on_gpu:
            clock.flush()
            clock.synchronize()

    benchmark.group = case.name
    benchmark.extra_info.update(flops=case.flops, bytes=case.bytes, error=error)
    with torch.no_grad():
        benchmark.pedantic(once, setup=cold, rounds=30 if clock.on_gpu else 3, warmup_rounds=3)
