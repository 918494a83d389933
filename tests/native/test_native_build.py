"""csrc compiles without a GPU, depends on torch's stable ABI alone, and its machine code is what was meant."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MUST = os.environ.get("EMOKERNELS_BUILD_CUDA") == "1"
"""Where a build was ordered, a missing tool is a failure; elsewhere its tests are skipped."""


def setup_py(*arguments, **environment):
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def missing(what):
    if MUST:
        pytest.fail(f"{what}, although EMOKERNELS_BUILD_CUDA=1")
    pytest.skip(what)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library, compiled now unless the objects of these sources are kept from before."""
    asked = setup_py("build_ext", "--dry-run", EMOKERNELS_BUILD_CUDA="auto")
    if "not built" in asked.stdout:
        missing(asked.stdout.strip().splitlines()[-1])
    out = tmp_path_factory.mktemp("csrc")
    with (Path(tempfile.gettempdir()) / f"emokernels-csrc-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers compile once
        done = setup_py("build_ext", f"--build-lib={out}", f"--build-temp={out}/temp", EMOKERNELS_BUILD_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "emokernels" / "_C.abi3.so"


def tool(name):
    """A program from the PATH, the CUDA toolkit, or the copy that Triton carries."""
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    try:
        import triton

        homes.append(str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    except ImportError:
        pass
    path = shutil.which(name) or shutil.which(name, path=":".join(homes))
    return path or missing(f"{name} was not found")


def run(*command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_only_the_stable_abi_is_used(built):
    symbols = run(tool("nm"), "-DC", str(built))
    assert not re.search(r"\b(at|c10|torch)::", symbols), symbols
    assert not re.search(r"\bPy[A-Z_]", symbols), symbols
    assert re.search(r"\bU aoti_torch_get_numel", symbols)
    assert re.search(r"\bw aoti_torch_get_current_cuda_stream", symbols), "the stream function must be a weak symbol"
    assert not re.search(r" [TWVD] .*(emokernels|cudaMalloc)", symbols), "kernels and the CUDA runtime stay private"


@pytest.mark.slow
def test_a_build_of_torch_without_cuda_loads_it_and_says_what_is_missing(built):
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    script = (
        "import sys; from pathlib import Path; import emokernels as emo; from emokernels.native import library\n"
        "library.PACKAGE = Path(sys.argv[1]).parent\n"
        "import torch; assert library.load(Path(sys.argv[1])) is None\n"
        "assert torch.ops.emokernels_native.decode_attention\n"
        "print(library.why_not()); print(emo.backends()[-1].reason)"
    )
    said = run(sys.executable, "-c", script, str(built)).splitlines()
    assert said == ["no compiled CUDA kernels can run: torch is built without CUDA"] * 2


def disassemble(path):
    """``{(arch, function): instructions}``."""
    listing = subprocess.Popen([tool("cuobjdump"), "--dump-sass", str(path)], stdout=subprocess.PIPE, text=True)
    functions, arch, current = defaultdict(list), "", None
    for line in listing.stdout:
        if found := re.search(r"code for (\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function : (\w+)", line):
            current = functions[arch, found[1]]
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            current.append(re.sub(r"^@!?U?P\w+\s+", "", found[1]))
    assert listing.wait() == 0
    return functions


@pytest.mark.slow
def test_machine_code(built):
    functions = disassemble(built)
    archs = {arch for arch, _ in functions}
    assert {"sm_80", "sm_90a", "sm_100a"} <= archs or "TORCH_CUDA_ARCH_LIST" in os.environ
    assert len({sum(arch == one for one, _ in functions) for arch in archs}) == 1, "some arch lacks a kernel"
    kinds = defaultdict(int)
    for (arch, name), instructions in functions.items():
        opcodes = {instruction.split()[0] for instruction in instructions}
        where = f"{name} on {arch}"

        def has(*prefixes, opcodes=opcodes):
            return all(any(opcode.startswith(prefix) for opcode in opcodes) for prefix in prefixes)

        spills = has("LDL") or has("STL")
        assert not spills, f"registers spill in {where}"
        if "decode_mma" in name:
            kinds["mma"] += 1
            assert has("LDG.E.128"), f"no 16-byte loads in {where}"
            assert has("HMMA.16816.F32", "MOVM"), f"no matrix instructions in {where}"
        elif "decode_simt" in name and "Lb1E" in name:
            kinds["simt"] += 1
            assert has("LDG.E.128"), f"no 16-byte loads in {where}"
        elif "decode_merge" in name:
            kinds["merge"] += 1
            assert has("LDG.E.128"), f"no 16-byte loads in {where}"
        elif "gated_activation" in name and re.search(r"Li[48]E", name):
            kinds["activation"] += 1
            assert has("LDG.E.128", "STG.E.128"), f"no 16-byte accesses in {where}"
    each = {kind: count // len(archs) for kind, count in kinds.items()}
    assert each == {"mma": 26, "simt": 3, "merge": 3, "activation": 6}


def test_a_build_without_nvcc():
    """One line and no failure by default; a failure where the build was ordered."""
    absent = {"CUDA_HOME": "/nonexistent"}
    done = setup_py("--name", **absent, EMOKERNELS_BUILD_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert "native kernels not built (nvcc was not found" in done.stdout
    assert "EMOKERNELS_BUILD_CUDA=0" in setup_py("--name", EMOKERNELS_BUILD_CUDA="0").stdout
    assert setup_py("--name", **absent, EMOKERNELS_BUILD_CUDA="1").returncode != 0
    assert "expected auto, 0 or 1" in setup_py("--name", EMOKERNELS_BUILD_CUDA="yes").stderr
