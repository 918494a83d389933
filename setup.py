"""Builds csrc/ into ``emokernels._C`` when there is something to build and something to build it with.

``EMOKERNELS_BUILD_CUDA=auto`` (default) builds when csrc holds sources and nvcc and torch are there, and says in one
line when it does not; ``0`` never builds; ``1`` makes whatever is missing fatal.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

# With no GPU torch's own list of architectures is empty, so the list is always ours.
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0a")


def why_not() -> str | None:
    """The reason csrc is not built here, or None when it can be."""
    if not sources():
        return "csrc holds no CUDA sources"
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        return "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch cannot be imported; install it first and use pip install --no-build-isolation"
    return None


def sources() -> list[str]:
    return sorted(str(p) for pattern in ("ops/*.cu", "registration.cpp") for p in Path("csrc").glob(pattern))


def extensions() -> tuple[list, dict]:
    choice = os.environ.get("EMOKERNELS_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"EMOKERNELS_BUILD_CUDA is {choice!r}; expected auto, 0 or 1")
    reason = "EMOKERNELS_BUILD_CUDA=0" if choice == "0" else why_not()
    if reason is not None:
        if choice == "1":
            raise SystemExit(f"EMOKERNELS_BUILD_CUDA=1, but the native kernels cannot be built: {reason}")
        print(f"emokernels: native kernels not built ({reason})")
        return [], {}
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030b0000"]
    module = CUDAExtension(
        "emokernels._C",
        sources(),
        include_dirs=[str(Path("csrc/include").resolve())],
        extra_compile_args={"cxx": ["-O3", "-std=c++20", *flags], "nvcc": ["-O3", "-std=c++20", *flags]},
        py_limited_api=True,
    )
    return [module], {"build_ext": BuildExtension}


ext_modules, cmdclass = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ext_modules else {},
)
