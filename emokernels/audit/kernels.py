"""Which launches there are to compile: every module of a package that defines ``audit_launches``."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..fused.launch import Launch
from .compile import specialise

PACKAGE = "emokernels.fused"


class Expects(TypedDict, total=False):
    """What must be true of a kernel beyond: no spills, and not more shared memory than there is.

    * `matrix`: True when it has matrix instructions; "native" when it has the architecture's own (HMMA on sm_80, HGMMA
      on sm_90, UTCHMMA on sm_100). False by default, for kernels without a product.
    * `wide`: True when most loads from global memory in its main loop (or anywhere, when that has none) move 16 bytes.
    * `plain`: the name of the launch of the same architecture, without interventions, to compare the main loop with.
    * `free`: True when that comparison must show no work per element.
    * `elements`: elements that a thread has to do with in one pass of the main loop; BLOCK_M * BLOCK_N over the threads
      by default.
    * `note`: what the table says beside the numbers.
    """

    matrix: bool | str
    wide: bool
    plain: str
    free: bool
    elements: float
    note: str


@dataclass(frozen=True)
class Case:
    """One launch to compile for one architecture."""

    arch: str
    module: str
    name: str
    launch: Launch
    expects: Expects

    @property
    def elements(self) -> float:
        """Elements a thread has to do with in one pass of the main loop; 0 when unknown."""
        meta = self.launch.meta
        if "elements" in self.expects:
            return self.expects["elements"]
        return meta.get("BLOCK_M", 0) * meta.get("BLOCK_N", 0) / (32 * self.launch.num_warps)

    @property
    def key(self) -> str:
        """Equal for cases that are the same code: their compiled kernels are one."""
        given = specialise(self.launch)
        same = (given.signature, sorted(given.constants.items()), sorted(given.attributes.items()))
        kernel = self.launch.kernel
        return repr(
            (self.arch, kernel.__module__, kernel.__name__, same, self.launch.num_warps, self.launch.num_stages)
        )

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of its first floating-point tensor: what it is a kernel for."""
        tensors = (value for value in self.launch.args.values() if isinstance(value, Tensor))
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)

    @property
    def dim(self) -> int | None:
        """The head dimension, where it has one."""
        return next(
            (self.launch.meta[name] for name in ("DIM", "HEAD_DIM", "BLOCK_D") if name in self.launch.meta), None
        )


class Broken(Exception):
    """A module cannot say what it launches; the message names it."""


def discover(package: str = PACKAGE) -> list[str]:
    """The modules of a package that define ``audit_launches``, in alphabetical order.

    Raises:
        Broken: one of them cannot be imported.
    """
    root = importlib.import_module(package)
    found = []
    for one in sorted(pkgutil.walk_packages(root.__path__, f"{package}."), key=lambda one: one.name):
        try:
            module = importlib.import_module(one.name)
        except Exception as error:
            raise Broken(f"{one.name} cannot be imported: {_line(error)}") from error
        if hasattr(module, "audit_launches"):
            found.append(one.name)
    return found


def cases(module: str, arch: str) -> list[Case]:
    """The launches of a module for an architecture, in its order.

    Raises:
        Broken: its `audit_launches` failed, or gave one name twice.
    """
    found: dict[str, Case] = {}
    try:
        for name, launch, *rest in importlib.import_module(module).audit_launches(arch):
            if name in found:
                raise ValueError(f"two launches are called {name!r}")
            found[name] = Case(arch, module, name, launch, rest[0] if rest else {})
    except Exception as error:
        raise Broken(f"{module}.audit_launches({arch!r}) failed: {_line(error)}") from error
    return list(found.values())


def chosen(every: Sequence[Case], pattern: str | None = None, quick: bool = False) -> list[Case]:
    """The cases to compile: those whose name (or kernel) has `pattern` in it, or matches it as a glob.

    `quick` keeps one dtype and one head dimension of each kernel: bfloat16 and 128, where it has them. What a case is
    compared with comes along.
    """
    kept = [case for case in every if pattern is None or _matches(pattern, case)]
    if quick:
        kept = _typical(kept, lambda case: case.dtype, torch.bfloat16)
        kept = _typical(kept, lambda case: case.dim, 128)
    wanted = {(case.arch, case.module, case.name) for case in kept}
    wanted |= {(case.arch, case.module, case.expects["plain"]) for case in kept if "plain" in case.expects}
    return [case for case in every if (case.arch, case.module, case.name) in wanted]


def _matches(pattern: str, case: Case) -> bool:
    text = pattern.lower()
    if re.search(r"[*?\[]", text):
        return fnmatch.fnmatch(case.name.lower(), text)
    return text in case.name.lower() or text in case.launch.kernel.__name__.lower()


def _typical(given: Iterable[Case], of: Any, value: Any) -> list[Case]:
    """Of every kernel the cases with `value`, or all of them when it has none with it."""
    given = list(given)
    having = {(case.arch, case.module, case.launch.kernel.__name__) for case in given if of(case) == value}
    return [
        case
        for case in given
        if of(case) == value or (case.arch, case.module, case.launch.kernel.__name__) not in having
    ]


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
