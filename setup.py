"""Builds csrc/ into ``emokernels/_C.abi3.so`` when there is something to build it with.

``EMOKERNELS_BUILD_CUDA=auto`` (default) builds when nvcc and torch are there, and says in one line when it does not;
``0`` never builds; ``1`` makes whatever is missing, or a failure, fatal.
``TORCH_CUDA_ARCH_LIST`` chooses architectures.

nvcc is called directly: torch's own build step refuses a CPU build of torch and a CUDA version other than its own, and
neither matters to code on torch's stable ABI. Objects are kept in build/csrc, by the contents of everything they are
made from. ``python setup.py build_ext --inplace`` builds without installing.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
ARCHITECTURES = "8.0+PTX;9.0a;10.0a"
"""Without a GPU torch's own list is empty, so it is always ours. The PTX serves what is newer than this list."""
STABLE_ABI = "0x020b000000000000"
"""The oldest torch that the library can be loaded into: 2.11."""


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] or [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def why_not() -> str | None:
    """The reason csrc is not built here, or None when it can be."""
    if sys.platform != "linux":
        return "csrc is built on Linux only"
    if find_nvcc() is None:
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    try:
        import torch
    except ImportError:
        return "torch cannot be imported; install it first and use pip install --no-build-isolation"
    if not (Path(torch.__file__).parent / "include/torch/headeronly/core/ScalarType.h").exists():
        return f"torch {torch.__version__} has no stable ABI; 2.11 or newer is needed"
    return None


def gencodes(nvcc: str) -> list[str]:
    """nvcc options for the architectures of the list that this nvcc knows."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    options = []
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES).replace(";", " ").split():
        name, _, ptx = entry.partition("+")
        arch = name.replace(".", "")
        if f"compute_{arch.rstrip('af')}" not in known:
            print(f"emokernels: this nvcc does not know {name}, so csrc is built without it")
            continue
        options += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        if ptx:
            options += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    if not options:
        raise CompileError("none of the requested architectures is known to this nvcc")
    return options


class BuildNative(build_ext):
    """Compiles csrc/ops/*.cu and csrc/registration.cpp with nvcc and links them against torch."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("nvcc was not found")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        import torch

        torch_root = Path(torch.__file__).parent
        flags = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas"]
        flags += [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DPy_LIMITED_API=0x030b0000"]
        flags += [f"-I{CSRC / 'include'}", "-isystem", str(torch_root / "include")]
        sources = [CSRC / "registration.cpp", *sorted((CSRC / "ops").glob("*.cu"))]
        architectures = gencodes(nvcc)
        commands = [[nvcc, "--threads=0", *architectures, *flags, "-c", str(source)] for source in sources]
        kept = ROOT / "build" / "csrc" / self._digest(nvcc, torch.__version__, commands)
        kept.mkdir(parents=True, exist_ok=True)
        objects = [kept / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(self._compile, commands, objects))
        # The CUDA runtime is linked statically: torch may bring another version of the shared one.
        link = [nvcc, *architectures, "-shared", "-cudart=static", *map(str, objects), "-o", str(target)]
        link += [f"-L{torch_root / 'lib'}", "-Xlinker", "--no-as-needed,--exclude-libs,ALL", "-ltorch", "-ltorch_cpu"]
        self._run(link)

    @staticmethod
    def _digest(nvcc: str, torch_version: str, commands: list[list[str]]) -> str:
        version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
        digest = hashlib.sha256(repr((version, torch_version, commands)).encode())
        for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def _compile(self, command: list[str], out: Path) -> None:
        if not out.exists():
            part = out.with_suffix(f".{os.getpid()}.o")
            self._run([*command, "-o", str(part)])
            part.replace(out)

    @staticmethod
    def _run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def extensions() -> list[Extension]:
    choice = os.environ.get("EMOKERNELS_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"EMOKERNELS_BUILD_CUDA is {choice!r}; expected auto, 0 or 1")
    reason = "EMOKERNELS_BUILD_CUDA=0" if choice == "0" else why_not()
    if reason is None:
        # No Python source: torch loads the library and finds its ops. In "auto", a failed build is told and left out.
        return [Extension("emokernels._C", sources=[], py_limited_api=True, optional=choice == "auto")]
    if choice == "1":
        raise SystemExit(f"EMOKERNELS_BUILD_CUDA=1, but the native kernels cannot be built: {reason}")
    print(f"emokernels: native kernels not built ({reason})")
    return []


modules = extensions()
setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if modules else {},
)
