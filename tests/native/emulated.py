"""Loads csrc compiled for the CPU: a plain C++ compiler, emulator.h for the kernels, the bindings as they are.

What runs is everything but the GPU: Python's glue, the op of csrc with its checks, the choice of kernel, and the kernel
bodies thread by thread. The library is cached by the contents of its sources.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from emokernels.native import library

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
NAMESPACE = "emokernels_emulated"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def _sources():
    return [CSRC / "registration.cpp", *sorted((CSRC / "ops").glob("*.cu"))]


@functools.cache
def build():
    """Path of the library, or None without a C++ compiler."""
    if COMPILER is None:
        return None
    headers = [*sorted((CSRC / "ops").glob("*.h")), *sorted((CSRC / "include").glob("*.cuh")), HERE / "emulator.h"]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in (*_sources(), *headers):
        digest.update(path.read_bytes())
    out = Path(tempfile.gettempdir()) / f"{NAMESPACE}-{os.getuid()}-{digest.hexdigest()[:16]}.so"
    torch_root = Path(torch.__file__).parent
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers build it once
        if not out.exists():
            part = out.with_suffix(".part")
            command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
            command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DEMO_DISPATCH_KEY=CPU"]
            command += [f"-DEMO_NAMESPACE={NAMESPACE}", f"-I{CSRC / 'include'}", f"-I{HERE}"]
            command += ["-isystem", str(torch_root / "include"), f"-L{torch_root / 'lib'}", "-o", str(part)]
            command += ["-x", "c++", *map(str, _sources()), "-x", "none"]
            command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
            subprocess.run(command, check=True)
            part.replace(out)
    return out


@functools.cache
def _load():
    path = build()
    assert library.load(path) is None, library.load(path)


@pytest.fixture
def emulated(monkeypatch):
    """native's Python glue on the emulated library."""
    if build() is None:
        pytest.skip("no C++ compiler: the kernels of csrc cannot be emulated")
    _load()
    monkeypatch.setattr(library, "NAMESPACE", NAMESPACE)
    monkeypatch.setattr(library, "why_not", lambda: None)
