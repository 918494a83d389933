"""What an intervention may cost, and whether it did not cost more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Bound(NamedTuple):
    """The ratio of ``contender`` to ``reference`` in ``phase`` may be at most ``limit``."""

    contender: str
    reference: str
    phase: str
    limit: float


BEST = "best"
BOUNDS = {
    "cpu": (Bound("veena", "sdpa", "decode", 1.05), Bound("empty", "sdpa", "decode", 1.02)),
    "cuda": (Bound("veena", BEST, "whole", 1.00),),
}
"""By type of the device. ``best`` is the fastest of the untouched models."""


def judge(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every bound of the record's device with the ratio that was measured and whether it is kept.

    Raises:
        ValueError: a contender that a bound is about was not timed.
    """
    rows = {row["name"]: row for row in record["contenders"]}
    found = []
    for bound in BOUNDS["cuda" if record["model"]["device"].startswith("cuda") else "cpu"]:
        row = rows.get(bound.contender)
        if row is None or row["status"] != "timed":
            why = "it was left out" if row is None else row["reason"]
            raise ValueError(f"--check needs the contender {bound.contender!r}, but {why}")
        reference = record["best_stock"] if bound.reference == BEST else bound.reference
        ratio = row["ratios"][reference][bound.phase]
        found.append({**bound._asdict(), "reference": reference, **ratio, "kept": ratio["median"] <= bound.limit})
    return found


def lines(judged: list[dict[str, Any]]) -> list[str]:
    """The bounds for people."""
    return [
        f"{'kept    ' if one['kept'] else 'EXCEEDED'} {one['contender']} / {one['reference']}, {one['phase']}: "
        f"{one['median']:.3f} [{one['low']:.3f}, {one['high']:.3f}], at most {one['limit']:.2f}"
        for one in judged
    ]
