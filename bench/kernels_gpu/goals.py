"""What the project promised, and what a record says about it: the worst case counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .contenders import activation, attention, generation

Case = dict[str, Any]
Evidence = Callable[[dict[str, Any], Case], float | None]
"""From a group's part and one of its cases to a value, or None where the case says nothing."""

LARGE = 200e6
"""Bytes from which a problem is bound by memory rather than by the launch: a few times the largest L2."""


class Goal(NamedTuple):
    """`limit` is the largest value where `most`, else the smallest."""

    what: str
    group: str
    limit: float
    most: bool
    evidence: Evidence
    unit: str = "x"

    @property
    def target(self) -> str:
        return f"{'at most' if self.most else 'at least'} {number(self.limit, self.unit)}"


class Finding(NamedTuple):
    """The worst value of a goal, the case it was seen in, and whether the goal is met there."""

    value: float
    case: str
    met: bool


def number(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value:.2f}{unit}"


def ratio_of(case: Case, of: str, to: str) -> dict[str, float] | None:
    """The ratio of the times of two contenders of a case, where both were timed."""
    return next((one for one in case["ratios"] if one["of"] == of and one["to"] == to), None)


def timed(case: Case, name: str) -> dict[str, Any] | None:
    """The figures of a contender, where it was timed."""
    return next((one for one in case["contenders"] if one["name"] == name and one["status"] == "timed"), None)


def _slower(of: str, to: str) -> Evidence:
    def evidence(part: dict[str, Any], case: Case) -> float | None:
        found = ratio_of(case, of, to)
        return None if found is None else found["median"]

    return evidence


def _faster(of: str, to: str, only: str = "") -> Evidence:
    def evidence(part: dict[str, Any], case: Case) -> float | None:
        found = ratio_of(case, of, to) if only in case["name"] else None
        return None if found is None else 1 / found["median"]

    return evidence


def _of_copy(of: str) -> Evidence:
    def evidence(part: dict[str, Any], case: Case) -> float | None:
        found = timed(case, of)
        return None if found is None or case["bytes"] < LARGE else found["gbps"] / part["ceilings"]["copy_gbps"]

    return evidence


def _large(inner: Evidence) -> Evidence:
    return lambda part, case: inner(part, case) if case["bytes"] >= LARGE else None


BOOST, ROUTES, PLAIN = attention.BOOST, attention.ROUTES, attention.PLAIN

GOALS = (
    Goal("prefill with a boost of 10 heads / without routes", "prefill", 1.02, True, _slower(BOOST, PLAIN)),
    Goal("prefill with bias and gain in all heads / without", "prefill", 1.02, True, _slower(ROUTES, PLAIN)),
    Goal("decode with a boost of 10 heads / without routes", "decode", 1.02, True, _slower(BOOST, PLAIN)),
    Goal("decode with bias and gain in all heads / without", "decode", 1.02, True, _slower(ROUTES, PLAIN)),
    Goal("prefill with a boost, speed against SDPA flash", "prefill", 1.0, False, _faster(BOOST, attention.FLASH)),
    Goal("prefill, bias and gain, speed against FlexAttention", "prefill", 1.2, False, _faster(ROUTES, attention.FLEX)),
    Goal(
        "prefill, bias and gain, speed against eager with a bias, 4k keys",
        "prefill", 5.0, False, _faster(ROUTES, attention.EAGER, "4096 keys"),
    ),
    Goal(
        "decode with a boost, share of copy bandwidth (caches over 0.2 GB)",
        "decode", 0.85, False, _of_copy(BOOST), "%",
    ),
    Goal(
        "MLP with edited neurons / act(gate) * up (over 0.2 GB)",
        "activation", 0.6, True, _large(_slower(activation.EDITED, activation.HF)),
    ),
    Goal(
        "generation with a VEENA-like plan / untouched model",
        "generation", 1.0, True, _slower(generation.VEENA, generation.UNTOUCHED),
    ),
)  # fmt: skip


def findings(goal: Goal, record: dict[str, Any]) -> Iterator[tuple[float, str]]:
    """Every value a record has for a goal, with its case."""
    part = record["groups"].get(goal.group)
    for case in part["cases"] if part else ():
        value = goal.evidence(part, case)
        if value is not None:
            yield value, case["name"]


def judge(goal: Goal, record: dict[str, Any]) -> Finding | None:
    """The worst value of a goal in a record; None when the record says nothing about it."""
    found = sorted(findings(goal, record))
    if not found:
        return None
    value, case = found[-1 if goal.most else 0]
    # Rounded as it is printed: a goal that reads as met is met.
    shown = round(value, 2)
    return Finding(value, case, shown <= goal.limit if goal.most else shown >= goal.limit)
