"""One compiled kernel measured, and what is wrong with it."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from . import sass
from .compile import compile_launch
from .kernels import Case, Expects
from .limits import LIMITS, resident_warps


@dataclass
class Record:
    """What the audit knows of one kernel in one configuration.

    Bytes for memory, counts for instructions. `loop` are the operations in one pass of the main loop by kind, `extra`
    those that the kernel it is compared with (`plain`) does not have. `seconds` of a processor that compiling took.
    `problems` make the audit fail.
    """

    arch: str
    module: str
    name: str
    kernel: str
    num_warps: int
    num_stages: int
    elements: float
    expects: Expects
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    resident_warps: int = 0
    instructions: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    loads: int = 0
    wide_loads: int = 0
    stores: int = 0
    wide_stores: int = 0
    loop_instructions: int = 0
    loop_loads: int = 0
    loop_wide_loads: int = 0
    loop: dict[str, int] = field(default_factory=dict)
    loop_opcodes: dict[str, int] = field(default_factory=dict)
    plain: str | None = None
    extra: dict[str, int] | None = None
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(case: Case) -> Record:
    """Compile a case and look at it alone; a compiler's error is a problem of the record."""
    launch = case.launch
    record = Record(
        case.arch, case.module, case.name, launch.kernel.__name__, launch.num_warps, launch.num_stages, case.elements,
        case.expects, plain=case.expects.get("plain"),
    )  # fmt: skip
    started = _processor_seconds()
    try:
        made = compile_launch(launch, case.arch)
    except Exception as error:  # the compiler raises what it likes
        record.problems.append(f"does not compile: {_first_cause(error)}")
        record.seconds = _processor_seconds() - started
        return record
    functions = sass.parse(made.sass)
    code = [one for function in functions.values() for one in function]
    body = max(functions.values(), key=len)
    opcodes = sass.counts(code)
    record.registers, record.stack, record.shared = made.registers, made.stack, made.shared
    record.tensor_memory = made.tensor_memory
    record.resident_warps = resident_warps(
        case.arch, launch.num_warps, made.registers, made.shared, made.tensor_memory
    )  # fmt: skip
    record.spills = sum(opcodes[name] for name in sass.SPILLS)
    record.instructions = len(code)
    record.matrix = dict(sass.matrix(code))
    record.wide_loads, record.loads = sass.wide(code, sass.LOADS)
    record.wide_stores, record.stores = sass.wide(code, sass.STORES)
    if loop := sass.main_loop(body):
        record.loop_instructions = loop.size
        record.loop_wide_loads, record.loop_loads = sass.wide(loop.instructions)
        record.loop = sass.work(loop.instructions)
        record.loop_opcodes = dict(sass.counts(loop.instructions).most_common())
    record.seconds = _processor_seconds() - started
    record.problems += _alone(record)
    return record


def _first_cause(error: BaseException) -> str:
    """What went wrong in the innermost function: errors of those that call it only quote their source."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = [line.strip() for line in str(error).splitlines() if re.search(r"\w", line)]
    return f"{type(error).__name__}: {text[-1] if text else ''}"


def _processor_seconds() -> float:
    """Of this process and the assemblers it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _alone(record: Record) -> list[str]:
    problems = []
    limits, expects = LIMITS[record.arch], record.expects
    if record.spills or record.stack:
        problems.append(f"spills: {record.spills} local loads and stores, {record.stack} bytes of stack a thread")
    if record.shared > limits.shared:
        problems.append(f"shared memory: {record.shared} bytes, {record.arch} has {limits.shared}")
    if record.tensor_memory > limits.tensor_memory:
        problems.append(f"tensor memory: {record.tensor_memory} columns, {record.arch} has {limits.tensor_memory}")
    wanted = expects.get("matrix", False)
    native = sass.NATIVE_MATRIX[record.arch]
    if wanted == "native" and not any(record.matrix.get(name) for name in native):
        problems.append(f"matrix instructions: no {'/'.join(native)}")
    elif wanted and not record.matrix:
        problems.append("matrix instructions: none")
    if expects.get("wide"):
        wide, loads, where = record.wide_loads, record.loads, ""
        if record.loop_loads:
            wide, loads, where = record.loop_wide_loads, record.loop_loads, " of the main loop"
        if 2 * wide <= loads:
            problems.append(f"wide loads: {wide} of {loads} loads{where} move 16 bytes")
    return problems


def compare(records: list[Record]) -> None:
    """Fill `extra` of the records that are compared with another one, and add a problem where work per element shows.

    Work per element is one operation for each element a thread has in a pass: in a loop over 32 elements the list of
    blocks, addresses and numbers that are kept per row may cost a handful of instructions, an operation per element
    costs 32, or 16 where one instruction does two, or 8 where it moves 16 bytes. Three quarters of 32, half of 16 and
    more than 8 fail. Where a thread has fewer elements, only arithmetic tells.
    """
    known = {(one.arch, one.module, one.name): one for one in records}
    for record in records:
        if record.plain is None:
            continue
        plain = known.get((record.arch, record.module, record.plain))
        if plain is None:
            record.problems.append(f"nothing is called {record.plain!r}, with which it is compared")
            continue
        if not record.loop or not plain.loop:
            if not any(one.startswith("does not compile") for one in (*record.problems, *plain.problems)):
                record.problems.append("no main loop was found to compare")
            continue
        record.extra = {kind: n - plain.loop[kind] for kind, n in record.loop.items()}
        if not record.expects.get("free"):
            continue
        if record.matrix.keys() != plain.matrix.keys() or not _same_products(record, plain):
            record.problems.append("main loop: its products differ from those of the kernel without routes")
        limits = {
            "arithmetic": record.elements / 4,
            "logic": max(3 * record.elements / 4, 24),
            "memory": max(record.elements / 4, 8),
        }
        for kind, limit in limits.items():
            if record.extra[kind] > limit:
                record.problems.append(
                    f"main loop: {record.extra[kind]} more {kind} instructions than without routes, for "
                    f"{record.elements:g} elements a thread"
                )


def _same_products(record: Record, plain: Record) -> bool:
    return all(record.loop_opcodes.get(name, 0) == plain.loop_opcodes.get(name, 0) for name in sass.MATRIX)
