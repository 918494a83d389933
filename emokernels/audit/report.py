"""The audit's table, in Markdown that reads as plain text, and its JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from .check import Record
from .limits import LIMITS

_HEADER = (
    "kernel", "warps x stages", "registers", "spills", "shared KiB", "warps/SM", "matrix", "16-byte loads",
    "main loop", "extra arithmetic", "extra rest", "per element", "",
)  # fmt: skip


def table(records: Sequence[Record]) -> str:
    """One line for each record, aligned."""
    rows = [_HEADER, *(_row(record) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    left = (0, 6, len(_HEADER) - 1)

    def line(row: Sequence[str]) -> str:
        cells = (
            text.ljust(w) if n in left else text.rjust(w) for n, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(cells)} |"

    rule = ["-" * width if n in left else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    return "\n".join((line(rows[0]), f"| {' | '.join(rule)} |", *(line(row) for row in rows[1:])))


def _row(record: Record) -> tuple[str, ...]:
    extra = record.extra
    per_element = ""
    if extra is not None and record.elements:
        per_element = f"{extra['arithmetic'] / record.elements:.2f}"
    return (
        record.name,
        f"{record.num_warps} x {record.num_stages}",
        str(record.registers),
        str(record.spills),
        f"{record.shared / 1024:.0f}",
        str(record.resident_warps),
        " ".join(f"{n} {name}" for name, n in record.matrix.items()),
        f"{record.wide_loads}/{record.loads}",
        str(record.loop_instructions or ""),
        "" if extra is None else f"{extra['arithmetic']:+d}",
        "" if extra is None else f"{sum(extra.values()) - extra['arithmetic']:+d}",
        per_element,
        "FAILS" if record.problems else record.expects.get("note", ""),
    )


def text(records: Sequence[Record], broken: Sequence[str]) -> str:
    """The whole report: a table an architecture, what is wrong, and one line that sums up."""
    parts = []
    for arch in dict.fromkeys(record.arch for record in records):
        mine = [record for record in records if record.arch == arch]
        parts.append(f"{arch}: at most {LIMITS[arch].shared >> 10} KiB shared memory a block\n\n{table(mine)}\n")
    wrong = [f"{record.arch} {record.name}: {problem}" for record in records for problem in record.problems]
    wrong += broken
    parts += wrong
    if wrong:
        parts.append(f"{len(records)} kernels compiled, {len(wrong)} problems")
    else:
        parts.append(
            f"{len(records)} kernels compiled: no spills, shared memory fits, matrix instructions where expected"
        )
    return "\n".join(parts)


def as_json(records: Sequence[Record], broken: Sequence[str]) -> str:
    """Everything that was measured, one object."""
    found: dict[str, Any] = {
        "triton": version("triton"), "torch": version("torch"), "python": platform.python_version(),
        "passed": not broken and not any(record.problems for record in records),
        "broken": list(broken), "kernels": [record.as_dict() for record in records],
    }  # fmt: skip
    return json.dumps(found, indent=1)
