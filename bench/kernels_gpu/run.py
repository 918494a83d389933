"""Groups one after the other, saved after every case; and a parent that starts again where a child has died.

A kernel that breaks the device (an illegal address) breaks every later call of its process. The file names the
contender that is running; the next child records the case as crashed there and goes on with the case after it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ceilings, record
from .measure import measure
from .record import Record
from .shapes import SETS, SHARES
from .timing import Timer

CASE_SECONDS = {"full": 1.2, "quick": 0.6, "tiny": 0.02}
"""How long the rounds of one case go on."""
TOTAL_SECONDS = {"full": 330.0, "quick": 90.0, "tiny": 600.0}
MOST_STARTS = 8
DIED = 70
"""Exit code of a child that met an error nobody expected; signals give codes below 0."""


def plan(groups: Sequence[str] | None, seconds: float) -> dict[str, float]:
    """The groups to run, in their order, and the seconds of each. Raises ValueError for names that do not exist."""
    chosen = list(SHARES) if groups is None else [group for group in SHARES if group in groups]
    unknown = sorted(set(groups or ()) - set(SHARES))
    if unknown:
        raise ValueError(f"groups: expected some of {', '.join(SHARES)}, got {', '.join(unknown)}")
    whole = sum(SHARES[group] for group in chosen)
    return {group: seconds * SHARES[group] / whole for group in chosen}


def run_groups(
    state: Record, groups: dict[str, float], chosen: str, device: str, folder: Path, command: str, say: Any = print
) -> Record:
    """Measure every group that is not complete in `state`, and save after every case."""
    timer: Timer | None = None
    for group, budget in groups.items():
        part = state["groups"].setdefault(group, _empty(chosen, command))
        if part["complete"]:
            continue
        _bury(part, say)
        begin = time.perf_counter() - part["seconds"]
        timer = timer or Timer(device, CASE_SECONDS[chosen])
        part["ceilings"] = ceilings.measure(timer, device, chosen == "tiny")
        done = {case["name"] for case in part["cases"]}
        for number, case in enumerate(SETS[chosen]()[group]):
            if case.name in done:
                continue
            if time.perf_counter() - begin > budget:
                part["cases"].append(_without(case, f"the {budget:.0f} s of its group were used up"))
            else:

                def progress(contender: str, name: str = case.name, part: dict[str, Any] = part) -> None:
                    part["running"] = {"case": name, "contender": contender}
                    record.save(state, folder, durable=False)

                part["cases"].append(measure(case, device, timer, seed=number + 1, progress=progress))
            part.pop("running", None)
            part["seconds"] = time.perf_counter() - begin
            record.save(state, folder)
            say(summary(group, part["cases"][-1]))
        part["complete"] = True
        record.save(state, folder)
    return state


def supervise(arguments: list[str], seconds: float, say: Any = print) -> int:
    """Run `arguments` as a child until it ends well; a child that dies is followed by another that resumes."""
    deadline = time.monotonic() + seconds
    for _ in range(MOST_STARTS):
        left = deadline - time.monotonic()
        if left <= 0:
            say(f"stopped after {seconds:.0f} s; --resume goes on from here")
            return 1
        try:
            code = subprocess.run([sys.executable, "-m", __package__, *arguments], timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            continue
        if 0 <= code < DIED:
            return code
        say(f"the measuring process ended with code {code}; starting again after the case it was at")
        if "--resume" not in arguments:
            arguments = [*arguments, "--resume"]
    say(f"gave up after {MOST_STARTS} starts")
    return 1


def _empty(chosen: str, command: str) -> dict[str, Any]:
    return {"command": command, "set": chosen, "seconds": 0.0, "complete": False, "ceilings": {}, "cases": []}


def _without(case: Any, reason: str) -> dict[str, Any]:
    about = {"name": case.name, "flops": case.flops, "bytes": case.bytes, "contenders": [], "ratios": []}
    return {**about, "skipped": reason}


def _bury(part: dict[str, Any], say: Any) -> None:
    """Record the case at which an earlier process died."""
    running = part.pop("running", None)
    if running is None:
        return
    reason = f"the process ended while {running['contender']} ran"
    case = {"name": running["case"], "flops": 0, "bytes": 0, "contenders": [], "ratios": [], "crashed": reason}
    part["cases"].append(case)
    say(f"{running['case']}: {reason}")


def summary(group: str, case: dict[str, Any]) -> str:
    """A few lines for who is watching."""
    lines = [f"{group}: {case['name']}" + (f" ({case['skipped']})" if "skipped" in case else "")]
    for one in case["contenders"]:
        if one["status"] == "timed":
            rate = f"{one['tflops']:8.1f} TFLOP/s" if "tflops" in one else ""
            rate += f"{one['gbps']:9.0f} GB/s" if "gbps" in one else ""
            lines.append(f"  {one['name']:52s} {one['p50_us']:11.1f} us {rate}  host {one['host_us']:.0f} us")
        else:
            lines.append(f"  {one['name']:52s} {one['status']}: {one['reason']}")
    return "\n".join(lines)
