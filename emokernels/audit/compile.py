"""Compile a `Launch` for an architecture without a GPU, specialised as a launch on one would be."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..fused.launch import Launch

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.uint8: "*u8",
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What a kernel became.

    `sass` is the listing of ``cuobjdump -sass``; `registers` a thread, `stack` in bytes a thread, `shared` memory in
    bytes a block, `tensor_memory` in columns a block (sm_100).
    """

    sass: str
    ptx: str
    registers: int
    stack: int
    shared: int
    tensor_memory: int


@dataclass(frozen=True)
class Specialised:
    """Arguments as Triton's compiler takes them."""

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]


def specialise(launch: Launch) -> Specialised:
    """Types, constants and attributes of a launch's arguments.

    As Triton does at a launch: a 1 becomes a constant, sizes and pointers divisible by 16 are marked so (tensors on the
    "meta" device count as aligned), absent tensors become None; arguments in `do_not_specialize` keep their type alone.
    """
    values: dict[str, Any] = {**launch.args, **launch.meta}
    found = Specialised({}, {}, {})
    for position, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, values[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            found.signature[name] = "constexpr"
            found.constants[position,] = value
            continue
        aligned = False
        if isinstance(value, Tensor):
            found.signature[name] = _POINTERS[value.dtype]
            aligned = value.is_meta or value.data_ptr() % 16 == 0
        elif isinstance(value, bool):
            found.signature[name] = "u1"
        elif isinstance(value, int):
            found.signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            found.signature[name] = "fp32"
        if parameter.annotation_type:
            found.signature[name] = parameter.annotation_type
        if aligned and not free and not parameter.do_not_specialize_on_alignment:
            found.attributes[position,] = [["tt.divisibility", 16]]
    return found


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """The launch compiled for "sm_80", "sm_90" or "sm_100". Raises whatever Triton's compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = specialise(launch)
    source = ASTSource(
        fn=launch.kernel, signature=given.signature, constexprs=given.constants, attrs=given.attributes
    )  # fmt: skip
    made = triton.compile(
        source,
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True},
    )
    registers, stack, static = 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        sass = _cuobjdump("-sass", str(binary))
        for found in _USAGE.findall(_cuobjdump("--dump-resource-usage", str(binary))):
            registers, stack, static = (max(a, int(b)) for a, b in zip((registers, stack, static), found, strict=True))
    return Compiled(
        sass, made.asm["ptx"], registers, stack, made.metadata.shared + static,
        getattr(made.metadata, "tmem_size", None) or 0,
    )  # fmt: skip


def _cuobjdump(*arguments: str) -> str:
    """Triton carries this tool; what it says on stderr about old and new formats is of no interest."""
    from triton import knobs

    return subprocess.run([knobs.nvidia.cuobjdump.path, *arguments], check=True, capture_output=True, text=True).stdout
