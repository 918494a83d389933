"""Tensors of any rank and strides as ``[outer, inner, width]``, without copies: what the MLP kernels walk over."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

DIMENSIONS = 3


def same_rows(tensors: list[Tensor | None], *, edited: bool) -> Iterator[list[Tensor | None]]:
    """Views ``[outer, inner, width]`` of tensors of one shape; several of them only when dimensions do not merge.

    Args:
        tensors: of one shape, with any strides each, or None for an absent one.
        edited: neurons are edited: the tensors are ``[B, N, F]`` and stay that, since rows and columns have a meaning.
            Otherwise dimensions merge wherever all strides allow it, and a problem of contiguous tensors is one row.
    """
    given = [t for t in tensors if t is not None]
    shape = given[0].shape
    if edited:
        yield tensors
        return
    sizes, strides = _merge(tuple(shape), [t.stride() for t in given])
    if len(sizes) <= DIMENSIONS:
        ones = DIMENSIONS - len(sizes)
        sizes = (1,) * ones + sizes
        views = iter([t.as_strided(sizes, (0,) * ones + s) for t, s in zip(given, strides, strict=True)])
        yield [None if t is None else next(views) for t in tensors]
        return
    shortest = min((d for d in range(len(shape) - 1) if shape[d] > 1), key=lambda d: shape[d])
    for i in range(shape[shortest]):
        yield from same_rows([None if t is None else t.select(shortest, i) for t in tensors], edited=False)


def _merge(shape: tuple[int, ...], strides: list[tuple[int, ...]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The fewest dimensions that address the same elements in the same order, for all the strides at once."""
    kept: list[int] = []
    sizes: list[int] = []
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if kept and all(s[kept[-1]] == s[d] * size for s in strides):
            sizes[-1] *= size
            kept[-1] = d
        else:
            sizes.append(size)
            kept.append(d)
    if not kept:
        return (1,), [(1,) for _ in strides]
    return tuple(sizes), [tuple(s[d] for d in kept) for s in strides]


def row_strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """Strides of a ``[B|1, N|1, F]`` tensor with 0 where it is broadcast; zeros for an absent one."""
    if tensor is None:
        return 0, 0, 0
    outer, inner, last = (
        0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return outer, inner, last


def addresses(name: str, tensor: Tensor | None) -> dict[str, Tensor | int | None]:
    """Kernel arguments of a ``[B|1, N|1, F]`` tensor: pointer `name` and strides `name`_b, `name`_n, `name`_f."""
    outer, inner, last = row_strides(tensor)
    return {name: tensor, f"{name}_b": outer, f"{name}_n": inner, f"{name}_f": last}
