"""What the hardware gives a kernel, per architecture, and how many warps of a kernel fit on one multiprocessor.

Source: NVIDIA's CUDA programming guide, "Compute Capabilities", and the tuning guides of Ampere, Hopper and Blackwell.
"""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """Shared memory in bytes of a block and of a multiprocessor, tensor memory in columns; the rest is alike."""

    shared: int
    shared_per_sm: int
    tensor_memory: int


LIMITS = {
    "sm_80": Limits(163 << 10, 164 << 10, 0),
    "sm_90": Limits(227 << 10, 228 << 10, 0),
    "sm_100": Limits(227 << 10, 228 << 10, 512),
}
_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32
_RESERVED = 1 << 10
"""Shared memory that the system takes of every block."""


def resident_warps(arch: str, num_warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """Warps of a kernel that fit on one multiprocessor at a time.

    >>> resident_warps("sm_90", 8, 168, 100 << 10)
    8
    >>> resident_warps("sm_90", 4, 32, 0)
    64
    """
    limits = LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(_BLOCKS, _WARPS // num_warps, _REGISTERS // max(per_warp, 1) // num_warps)
    blocks = min(blocks, limits.shared_per_sm // (shared + _RESERVED))
    if tensor_memory and limits.tensor_memory:
        blocks = min(blocks, limits.tensor_memory // tensor_memory)
    return blocks * num_warps
