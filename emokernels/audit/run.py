"""Compile many cases, in a few processes, each kernel once."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from tqdm import tqdm

from .check import Record, measure
from .kernels import Case, cases

_Place = tuple[str, str, str]
_cases: dict[tuple[str, str], dict[str, Case]] = {}


def _measure(place: _Place) -> Record:
    """In a worker: launches hold functions that cannot be sent, so it builds the case anew."""
    arch, module, name = place
    if (arch, module) not in _cases:
        _cases[arch, module] = {case.name: case for case in cases(module, arch)}
    return measure(_cases[arch, module][name])


def run(given: Sequence[Case], jobs: int) -> list[Record]:
    """The records of the cases, in their order. Cases that are the same code are compiled once."""
    first: dict[str, Case] = {}
    same = [first.setdefault(case.key, case) for case in given]
    made: dict[_Place, Record] = {}
    with tqdm(total=len(first), unit="kernel", disable=not sys.stderr.isatty(), leave=False) as bar:
        for place, record in _records(list(first.values()), jobs):
            made[place] = record
            bar.set_postfix_str(record.name, refresh=False)
            bar.update()
    records = []
    for case, compiled in zip(given, same, strict=True):
        record = made[_place(compiled)]
        if case is not compiled:
            record = dataclasses.replace(
                record, module=case.module, name=case.name, expects=case.expects, plain=case.expects.get("plain"),
                problems=list(record.problems), seconds=0.0,
            )  # fmt: skip
        records.append(record)
    return records


def _place(case: Case) -> _Place:
    return case.arch, case.module, case.name


def _records(given: list[Case], jobs: int) -> Iterator[tuple[_Place, Record]]:
    if jobs <= 1 or len(given) < 2:
        for case in given:
            yield _place(case), measure(case)
        return
    # Fresh processes: a fork of one that has threads (torch, tqdm) may hang.
    with ProcessPoolExecutor(min(jobs, len(given)), mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_measure, _place(case)): _place(case) for case in given}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
