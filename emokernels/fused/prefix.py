"""Many rows whose first keys are the same memory: those are read once for all rows, the rest row by row.

Softmax over ``[prefix; k]`` is the merge by log-sum-exp of the two: both are runs of keys for the decode kernels, the
prefix with the queries of all batch rows packed into tiles, the rest with a tile for each batch row.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import message
from ..heads import HeadEdits
from ..problem import Problem
from .decode import Keys, launches_of, same_for_all_rows


def runs_of(problem: Problem, prefix_k: Tensor, prefix_v: Tensor) -> list[Keys]:
    """The prefix and, unless it is empty, the rest as runs of keys.

    Raises:
        ValueError: the prefix is not ``[1|B, Hkv, P, D]`` like k, or its batch rows are not one memory.
    """
    batch, key_heads, rest, dim = problem.k.shape
    for name, prefix in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        fits = prefix.dim() == 4 and prefix.shape[0] in (1, batch) and prefix.shape[2] == prefix_k.shape[2]
        if not fits or prefix.shape[1::2] != (key_heads, dim) or prefix.dtype != problem.k.dtype:
            expected = f"[1|B={batch}, Hkv={key_heads}, P, D={dim}] {problem.k.dtype} like k"
            raise ValueError(message(name, expected, prefix, "Slice it from the cache of the shared prompt."))
        if prefix.shape[0] > 1 and prefix.stride(0) != 0:
            raise ValueError(
                message(name, "one memory for all batch rows", prefix, "Pass [1, Hkv, P, D], or attend to [prefix; k].")
            )
    length = prefix_k.shape[2]
    columns = length + rest
    runs = [Keys(prefix_k[:1], prefix_v[:1], 0, columns, True)] if length else []
    if rest:
        runs.append(Keys(problem.k, problem.v, length, columns, same_for_all_rows(problem.k, problem.v)))
    return runs


def attend(
    problem: Problem, prefix_k: Tensor, prefix_v: Tensor, heads: HeadEdits | None = None, need_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Attention over ``[prefix; k]``: z ``[B, H, N, D]`` (laid out as [B, N, H, D]) and lse ``[B, H, N]`` or None.

    Args:
        problem: q ``[B, H, N, D]``, k and v ``[B, Hkv, K, D]`` of what follows the prefix (K may be 0). Roles, mask and
            lengths cover the P + K columns of prefix and k together, and the last query sits at the last of them.
        prefix_k: ``[1, Hkv, P, D]``, or ``[B, Hkv, P, D]`` with stride 0 over the batch.
        prefix_v: like prefix_k.
        heads: edits of z.
        need_lse: whether lse is wanted.

    Raises:
        ValueError: the prefix does not fit.
    """
    launches, z, lse = launches_of(problem, runs_of(problem, prefix_k, prefix_v), heads, need_lse)
    for launch in launches:
        launch.run()
    return z, lse
