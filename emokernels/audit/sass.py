"""Reading machine code: instructions, the loops they form, and which kind an instruction is.

The text is what ``cuobjdump -sass`` prints. Loops are the natural loops of the control flow graph (a branch to a block
that dominates it), not merely branches backwards: waiting code that the assembler moves behind the kernel's end jumps
back into the middle of a loop without being one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_TEXT = re.compile(r"^(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*\}?$")
_ADDRESS = re.compile(r"(?:^|[\s,(])0x([0-9a-f]+)\)?$")
_JUMPS = ("BRA", "JMP", "BRX", "JMX")
_ENDS = ("EXIT", "RET", "BRX", "JMX")

MATRIX = ("HMMA", "IMMA", "DMMA", "QMMA", "OMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA")
"""Matrix instructions: a warp's (sm_80), a warp group's (sm_90), the tensor core's own (sm_100)."""
NATIVE_MATRIX = {"sm_80": ("HMMA",), "sm_90": ("HGMMA",), "sm_100": ("UTCHMMA",)}
"""The matrix instruction an architecture is fast with, for floating point."""
LOADS = ("LDG", "LDGSTS")
STORES = ("STG",)
SPILLS = ("LDL", "STL")
_BULK = ("UTMALDG", "UBLKCP", "UTMASTG")

_ARITHMETIC = (
    "FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FSET", "FCHK", "FSWZADD", "MUFU", "HADD2", "HMUL2", "HFMA2",
    "HMNMX2", "HSETP2", "HSET2", "DADD", "DMUL", "DFMA", "DSETP", "F2F", "F2FP", "F2I", "I2F", "I2FP", "I2IP", "FRND",
)  # fmt: skip
_DOUBLE = ("FADD2", "FMUL2", "FFMA2", "FMNMX3")
_LOGIC = ("ISETP", "LOP3", "SEL", "PRMT", "PLOP3", "SHF", "ISCADD", "IMNMX", "VIMNMX", "I2I", "POPC", "BMSK", "SGXT")
_MEMORY = ("LDG", "LDS", "LDL", "STL", "STS", "STG", "LD", "ST", "ATOMS", "ATOMG", "RED")


class Instruction(NamedTuple):
    """One instruction: where it is, its opcode with modifiers, its operands, whether a predicate guards it."""

    address: int
    opcode: str
    operands: str
    guarded: bool

    @property
    def base(self) -> str:
        """The opcode without modifiers.

        >>> Instruction(0, "LDG.E.128", "R4, [R2.64]", False).base
        'LDG'
        """
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address a jump goes to, None for everything else.

        BRA.DIV is taken by warps whose threads went different ways only, to a copy of the code behind the kernel's end:
        not a way that counts.
        """
        found = _ADDRESS.search(self.operands) if self.base in _JUMPS and ".DIV" not in self.opcode else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """False when the next instruction is never the next one executed."""
        if self.guarded:
            return True
        if self.base in _ENDS:
            return False
        # "BRA 0x10" always jumps; "BRA P1, 0x10" and "BRA.U UP0, 0x10" have a condition.
        return not (self.base in ("BRA", "JMP") and "," not in self.operands)


class Loop(NamedTuple):
    """A natural loop: the address of its head and its instructions, those of loops within it included."""

    head: int
    instructions: tuple[Instruction, ...]

    @property
    def size(self) -> int:
        """Instructions in it."""
        return len(self.instructions)


def parse(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every function of a ``cuobjdump -sass`` listing; padding behind the last jump is left out."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = functions.setdefault("", [])
    for line in text.splitlines():
        if named := _FUNCTION.match(line):
            current = functions.setdefault(named[1], [])
        elif (found := _LINE.match(line)) and (parts := _TEXT.match(found[2])):
            current.append(Instruction(int(found[1], 16), parts[2], parts[3], parts[1] is not None))
    return {name: _without_padding(found) for name, found in functions.items() if found}


def _without_padding(instructions: list[Instruction]) -> list[Instruction]:
    """Without the endless jump to itself and the NOPs that fill the last line of a function."""
    end = len(instructions)
    while end and (
        instructions[end - 1].base == "NOP" or instructions[end - 1].target == instructions[end - 1].address
    ):
        end -= 1
    return instructions[:end]


def counts(instructions: Iterable[Instruction]) -> Counter[str]:
    """How often each opcode occurs, without modifiers."""
    return Counter(one.base for one in instructions)


def matrix(instructions: Iterable[Instruction]) -> Counter[str]:
    """The matrix instructions among them."""
    return Counter({name: n for name, n in counts(instructions).items() if name in MATRIX})


def wide(instructions: Iterable[Instruction], names: Sequence[str] = LOADS) -> tuple[int, int]:
    """How many loads (or stores) from global memory move 16 bytes or more, and how many there are."""
    moved = [one for one in instructions if one.base in (*names, *_BULK)]
    return sum(".128" in one.opcode or ".256" in one.opcode or one.base in _BULK for one in moved), len(moved)


def kind(name: str) -> str:
    """What an opcode (without modifiers) does, as far as work on an element is concerned.

    "arithmetic", "logic" and "memory" may be work per element; "other" is what a loop needs once: addresses, uniform
    registers, moves, barriers, copies into shared memory, and the matrix instructions.
    """
    if name in _ARITHMETIC or name in _DOUBLE:
        return "arithmetic"
    return "logic" if name in _LOGIC else "memory" if name in _MEMORY else "other"


def work(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How many operations of each `kind`; an instruction that does two at once (FADD2, FMNMX3) counts twice."""
    found = {"arithmetic": 0, "logic": 0, "memory": 0, "other": 0}
    for name, n in counts(instructions).items():
        found[kind(name)] += 2 * n if name in _DOUBLE else n
    return found


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The natural loops, by address of their heads; those that share a head are one."""
    if not instructions:
        return []
    index = {one.address: n for n, one in enumerate(instructions)}
    starts = {0}
    for n, one in enumerate(instructions):
        if one.target is not None and one.target in index:
            starts.add(index[one.target])
        if (one.target is not None or not one.falls_through) and n + 1 < len(instructions):
            starts.add(n + 1)
    ordered = sorted(starts)
    block_at = {start: b for b, start in enumerate(ordered)}
    ends = [*ordered[1:], len(instructions)]
    following: list[list[int]] = []
    for end in ends:
        last = instructions[end - 1]
        following.append([])
        if last.falls_through and end in block_at:
            following[-1].append(block_at[end])
        if last.target is not None and last.target in index:
            following[-1].append(block_at[index[last.target]])
    bodies: dict[int, set[int]] = {}
    dominators, preceding = _dominators(following)
    for block, targets in enumerate(following):
        for head in targets:
            if block in dominators and head in dominators[block]:
                bodies.setdefault(head, {head}).update(_reaching(block, head, preceding))
    return [
        Loop(
            instructions[ordered[head]].address,
            tuple(i for b in sorted(body) for i in instructions[ordered[b] : ends[b]]),
        )
        for head, body in sorted(bodies.items())
    ]


def _dominators(following: list[list[int]]) -> tuple[dict[int, set[int]], list[list[int]]]:
    """For every block that can be reached, the blocks that every way to it passes; and the blocks before each."""
    reached: list[int] = []
    seen = {0}
    stack: list[tuple[int, int]] = [(0, 0)]
    while stack:  # depth first, in post-order
        block, n = stack.pop()
        if n < len(following[block]):
            stack.append((block, n + 1))
            if (target := following[block][n]) not in seen:
                seen.add(target)
                stack.append((target, 0))
        else:
            reached.append(block)
    reached.reverse()
    preceding: list[list[int]] = [[] for _ in following]
    for block in reached:
        for target in following[block]:
            preceding[target].append(block)
    everything = set(reached)
    dominators = dict.fromkeys(reached, everything)
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in reached[1:]:
            found = set.intersection(*(dominators[p] for p in preceding[block])) | {block}
            if found != dominators[block]:
                dominators[block], changed = found, True
    return dominators, preceding


def _reaching(block: int, head: int, preceding: list[list[int]]) -> set[int]:
    """The blocks from which `block` is reached without passing `head`, itself included."""
    found, stack = {block}, [block]
    while stack:
        current = stack.pop()
        if current == head:
            continue
        for before in preceding[current]:
            if before not in found:
                found.add(before)
                stack.append(before)
    return found


def main_loop(instructions: Sequence[Instruction]) -> Loop | None:
    """The loop a kernel spends its time in when nothing is special: where the matrix instructions are, cut to the bone.

    Of the loops with matrix instructions and no such loop within, those with the most of them, and of these the one
    with the fewest instructions: loops for special blocks (masks, mixed roles) do the same products and more around
    them.
    Without matrix instructions, the same with floating-point arithmetic.
    """
    found = loops(instructions)
    for weight in (
        lambda loop: matrix(loop.instructions).total(),
        lambda loop: work(loop.instructions)["arithmetic"],
    ):
        weighed = [(weight(loop), loop) for loop in found]
        weighed = [(value, loop) for value, loop in weighed if value]
        inner = [
            (value, loop)
            for value, loop in weighed
            if not any(other is not loop and _within(other, loop) for _, other in weighed)
        ]
        if inner:
            most = max(value for value, _ in inner)
            return min((loop for value, loop in inner if value == most), key=lambda loop: loop.size)
    return None


def _within(inner: Loop, outer: Loop) -> bool:
    return inner.head != outer.head and set(inner.instructions) < set(outer.instructions)
