"""Tile sizes of the attention backward: a static table by architecture, bytes of an element and head dimension.

What keeps these tiles from being larger is registers: both passes hold sums of the size of their tile and two products
at a time. Where more numbers per pair come in (softcap, Routes.abs, sums for gradients of tables) the tiles of the
second column serve. `python -m emokernels.audit` shows what spills.
"""

from __future__ import annotations

from ..problem import Problem
from .launch import Config, padded_dim

Choice = tuple[Config, Config]
"""The usual configuration, and that of problems with more numbers per pair."""

# (architecture, bytes of an element): {padded head dimension: configurations}; block_m query rows, block_n keys
QUERIES: dict[tuple[str, int], dict[int, Choice]] = {
    ("sm_80", 2): {
        64: (Config(128, 32, 8, 2), Config(128, 32, 8, 2)),
        128: (Config(64, 64, 8, 2), Config(32, 64, 4, 2)),
        256: (Config(64, 32, 8, 2), Config(32, 16, 8, 1)),
    },
    ("sm_90", 2): {
        64: (Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
        128: (Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
        256: (Config(128, 32, 8, 2), Config(128, 16, 8, 2)),
    },
    ("sm_100", 2): {
        64: (Config(128, 32, 8, 2), Config(128, 32, 8, 2)),
        128: (Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
        256: (Config(128, 32, 8, 1), Config(128, 16, 8, 1)),
    },
    ("sm_80", 4): {
        64: (Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
        128: (Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
        256: (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    },
    ("sm_90", 4): {
        64: (Config(64, 32, 8, 1), Config(64, 32, 8, 1)),
        128: (Config(64, 16, 8, 1), Config(64, 16, 8, 1)),
        256: (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    },
    ("sm_100", 4): {
        64: (Config(64, 32, 4, 1), Config(64, 32, 4, 1)),
        128: (Config(64, 32, 8, 1), Config(64, 32, 8, 1)),
        256: (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
    },
}
KEYS: dict[tuple[str, int], dict[int, Choice]] = {
    ("sm_80", 2): {
        64: (Config(32, 128, 8, 2), Config(32, 128, 8, 2)),
        128: (Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
        256: (Config(64, 64, 8, 1), Config(32, 64, 8, 1)),
    },
    ("sm_90", 2): {
        64: (Config(64, 128, 8, 2), Config(32, 128, 8, 2)),
        128: (Config(32, 128, 8, 3), Config(16, 128, 8, 3)),
        256: (Config(32, 128, 8, 1), Config(32, 128, 8, 1)),
    },
    ("sm_100", 2): {
        64: (Config(64, 128, 8, 2), Config(32, 128, 8, 2)),
        128: (Config(64, 128, 8, 2), Config(32, 128, 8, 2)),
        256: (Config(64, 128, 8, 1), Config(32, 128, 8, 1)),
    },
    ("sm_80", 4): {
        64: (Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
        128: (Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
        256: (Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
    },
    ("sm_90", 4): {
        64: (Config(16, 64, 8, 1), Config(16, 64, 8, 1)),
        128: (Config(16, 64, 8, 1), Config(16, 64, 8, 1)),
        256: (Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
    },
    ("sm_100", 4): {
        64: (Config(16, 64, 8, 1), Config(16, 64, 8, 1)),
        128: (Config(16, 64, 8, 1), Config(16, 64, 8, 1)),
        256: (Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
    },
}
APART: dict[int, int] = {2: 256, 4: 128}
"""By bytes of an element: from this padded head dimension on, dk and dv do not fit into registers together.

They are launched one after the other then, which computes the products of q and k once more.
"""


def queries_config(problem: Problem, arch: str, tables: bool) -> Config:
    """The tiles of the pass over queries; `tables` says whether a gradient of a table is wanted."""
    return _chosen(QUERIES, problem, arch)[tables or _crowded(problem)]


def keys_config(problem: Problem, arch: str) -> tuple[Config, bool]:
    """The tiles of the pass over keys, and whether dk and dv are apart."""
    size, dim = problem.q.element_size(), padded_dim(problem.q.shape[3])
    return _chosen(KEYS, problem, arch)[_crowded(problem)], dim >= APART[size]


def _chosen(table: dict[tuple[str, int], dict[int, Choice]], problem: Problem, arch: str) -> Choice:
    """Padded head dimensions below 64 use the tiles of 64."""
    return table[arch, problem.q.element_size()][max(64, padded_dim(problem.q.shape[3]))]


def _crowded(problem: Problem) -> bool:
    return problem.softcap > 0 or problem.magnitude is not None
