"""Compile a `Launch` for an architecture without a GPU, specialised as a launch on one would be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..fused.launch import Launch

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.uint8: "*u8",
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What a kernel became: machine code as text, its binary, and the shared memory it asks for in bytes."""

    sass: str
    ptx: str
    cubin: bytes
    shared: int


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """The launch compiled for "sm_80", "sm_90" or "sm_100".

    Arguments are specialised as Triton does at a launch: a 1 becomes a constant, sizes and pointers divisible by 16
    are marked so (tensors on the "meta" device count as aligned), absent tensors become None.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel
    values: dict[str, Any] = {**launch.args, **launch.meta}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    unspecialised = set(kernel.do_not_specialize or ()) if hasattr(kernel, "do_not_specialize") else set()
    for position, name in enumerate(kernel.arg_names):
        value = values[name]
        free = name in unspecialised or position in unspecialised
        if name in launch.meta or value is None or (type(value) is int and value == 1 and not free):
            signature[name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            if value.is_meta or value.data_ptr() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True},
    )
    return Compiled(made.asm["sass"], made.asm["ptx"], made.asm["cubin"], made.metadata.shared)
