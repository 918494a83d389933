"""What the audit makes of numbers; nothing is compiled here."""

import pytest
import torch

from emokernels.audit import check, kernels, report
from emokernels.audit.check import Record
from emokernels.fused.launch import Launch


def record(name="routed", opcodes=None, **fields):
    given = {"elements": 32.0, "num_warps": 8, "num_stages": 3, "matrix": {"HGMMA": 12}, "expects": {}}
    found = Record(arch="sm_90", module="m", name=name, kernel="k", **{**given, **fields})
    found.loop = fields.get("loop", {"arithmetic": 200, "logic": 10, "memory": 10, "other": 100})
    found.loop_opcodes = opcodes or {"HGMMA": 12}
    found.plain = found.expects.get("plain")
    return found


def routed(arithmetic=0, logic=0, memory=0, other=0, **fields):
    loop = {"arithmetic": 200 + arithmetic, "logic": 10 + logic, "memory": 10 + memory, "other": 100 + other}
    return record(loop=loop, expects={"plain": "plain", "free": True}, **fields)


@pytest.mark.parametrize(
    ("more", "fails"),
    [
        ({"other": 40, "logic": 20, "memory": 4}, False),  # per pass
        ({"arithmetic": 4}, False),  # per row
        ({"arithmetic": 32}, True),
        ({"arithmetic": 16}, True),  # two elements at a time
        ({"logic": 32}, True),
        ({"memory": 9}, True),  # 16 bytes at a time
    ],
)
def test_work_per_element_fails(more, fails):
    one = routed(**more)
    check.compare([record("plain"), one])
    assert bool(one.problems) == fails
    assert one.extra == {"arithmetic": 0, "logic": 0, "memory": 0, "other": 0, **more}


def test_what_is_compared_must_exist_and_do_the_same_products():
    alone, different = routed(), routed(opcodes={"HGMMA": 8})
    check.compare([alone])
    assert "'plain'" in alone.problems[0]
    check.compare([record("plain"), different])
    assert "products differ" in different.problems[0]


def test_table_shows_zero_and_names_what_fails():
    plain, one, bad = record("plain"), routed(), record("bad")
    check.compare([plain, one])
    bad.problems.append("shared memory: 300000 bytes, sm_90 has 232448")
    text = report.text([plain, one, bad], ["m.broken cannot be imported: ImportError: x"])
    assert "| +0 |" in " ".join(text.split())
    assert "sm_90 bad: shared memory: 300000 bytes" in text
    assert text.endswith("3 kernels compiled, 2 problems")
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1, "columns are aligned"


class Kernel:
    def __init__(self, name):
        self.__name__ = name


def case(name, kernel="k", dtype=torch.bfloat16, dim=None, **expects):
    args = {"roles": torch.empty(1, dtype=torch.uint8), "q": torch.empty(1, dtype=dtype)}
    meta = {} if dim is None else {"DIM": dim}
    return kernels.Case("sm_90", "m", name, Launch(Kernel(kernel), (1,), args, meta), expects)


def test_pattern_takes_names_globs_and_what_is_compared():
    every = [case("a plain"), case("a routed", plain="a plain"), case("b plain"), case("c", kernel="sort")]
    names = lambda pattern: [one.name for one in kernels.chosen(every, pattern)]  # noqa: E731
    assert names("ROUTED") == ["a plain", "a routed"]
    assert names("b*") == ["b plain"]
    assert names("sort") == ["c"]
    assert names(None) == ["a plain", "a routed", "b plain", "c"]


def test_quick_keeps_one_dtype_and_one_dimension_of_each_kernel():
    every = [
        case("half", dim=128), case("small", dim=64), case("other", dtype=torch.float16, dim=128),
        case("float only", kernel="f", dtype=torch.float32), case("no 128", kernel="g", dim=16),
    ]  # fmt: skip
    assert [one.name for one in kernels.chosen(every, quick=True)] == ["half", "float only", "no 128"]
