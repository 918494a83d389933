"""The file of results: one JSON per device, written whole after every case, merged group by group.

::

    {"schema": "emokernels-gpu-1", "smoke": false, "device": {...}, "versions": {...}, "commit": ..., "sources": ...,
     "tests": {"command", "passed", "failed", "skipped", "seconds", "exit"},
     "groups": {"prefill": {"command", "set", "seconds", "complete", "ceilings": {"matmul_tflops", "copy_gbps"},
       "cases": [{"name", "flops", "bytes",
         "contenders": [{"name", "ours", "variant", "status": "timed", "note", "error", "rounds", "host_us",
                         "p20_us", "p50_us", "p80_us", "tflops", "gbps"},
                        {"name", "ours", "variant", "status": "skipped" | "wrong" | "failed", "reason"}],
         "ratios": [{"of", "to", "median", "low", "high"}]}]}}}

Parts belong together when device, versions and sources agree; a file of another identity is replaced, not mixed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import machine

SCHEMA = "emokernels-gpu-1"
IDENTITY = ("schema", "smoke", "device", "versions", "sources")
STATUSES = ("timed", "skipped", "wrong", "failed")
TIMES = ("p20_us", "p50_us", "p80_us")

Record = dict[str, Any]


def fresh(device: str, commit: str | None = None) -> Record:
    about = machine.device(device)
    return {
        "schema": SCHEMA,
        "smoke": about["slug"] == "cpu-smoke",
        "device": about,
        "versions": machine.versions(),
        "commit": commit or machine.commit(),
        "sources": machine.sources(),
        "groups": {},
    }


def path_of(record: Record, folder: Path) -> Path:
    return folder / f"{record['device']['slug']}.json"


def load_or_start(record: Record, folder: Path) -> Record:
    """The file of the same identity as `record`, so that its groups are kept; otherwise `record`."""
    path = path_of(record, folder)
    if not path.exists():
        return record
    try:
        old = json.loads(path.read_text())
    except json.JSONDecodeError:
        return record
    if any(old.get(name) != record[name] for name in IDENTITY):
        return record
    return {**old, "commit": record["commit"] if record["commit"] != "unknown" else old["commit"]}


def save(record: Record, folder: Path, durable: bool = True) -> Path:
    """Write through a temporary file and a rename: whoever is killed leaves the old file or the new one.

    `durable` also outlives a machine that dies, and costs milliseconds.
    """
    path = path_of(record, folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_all(folder: Path) -> list[Record]:
    """Every committed record of a GPU in a folder, by device name; files of other kinds are not ours to read."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if isinstance(record, dict) and record.get("schema") == SCHEMA and not record["smoke"]:
            found.append(record)
    return found


def problems(record: Record) -> list[str]:
    """What is wrong with a record's form: empty when nothing is."""
    found = [f"no {name}" for name in (*IDENTITY, "commit", "groups") if name not in record]
    if found:
        return found
    if record["schema"] != SCHEMA:
        return [f"schema {record['schema']!r}, expected {SCHEMA!r}"]
    for group, part in record["groups"].items():
        missing = {"command", "set", "seconds", "complete", "ceilings", "cases"} - set(part)
        found += [f"{group}: no {name}" for name in sorted(missing)]
        for case in part.get("cases", []):
            found += [f"{group}: {case.get('name')}: {problem}" for problem in _problems_of_case(case)]
    return found


def _problems_of_case(case: Mapping[str, Any]) -> list[str]:
    found = [f"no {name}" for name in ("name", "flops", "bytes", "contenders", "ratios") if name not in case]
    timed = set()
    for one in case.get("contenders", []):
        name = one.get("name")
        if one.get("status") not in STATUSES:
            found.append(f"{name}: status {one.get('status')!r}")
        elif one["status"] != "timed":
            found += [] if one.get("reason") else [f"{name}: {one['status']} without a reason"]
        else:
            timed.add(name)
            times = [one.get(key) for key in TIMES]
            if None in times or not 0 < times[0] <= times[1] <= times[2]:
                found.append(f"{name}: times {times}")
    for ratio in case.get("ratios", []):
        if not {ratio["of"], ratio["to"]} <= timed:
            found.append(f"ratio of {ratio['of']} to {ratio['to']}: not both were timed")
        if not ratio["low"] <= ratio["median"] <= ratio["high"]:
            found.append(f"ratio of {ratio['of']} to {ratio['to']}: median outside its interval")
    return found


def failures(record: Record) -> list[str]:
    """What of ours went wrong: answers that differ from float64, exceptions, and processes that died."""
    found = []
    for group, part in record["groups"].items():
        for case in part["cases"]:
            if "crashed" in case:
                found.append(f"{group}: {case['name']}: {case['crashed']}")
            for one in case["contenders"]:
                if one["ours"] and one["status"] in ("wrong", "failed"):
                    found.append(f"{group}: {case['name']}: {one['name']}: {one['reason']}")
    return found
