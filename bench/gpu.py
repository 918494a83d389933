"""What `make gpu` runs: the GPU tests, the kernel benchmarks, the page of figures, what VEENA costs two models, and a
sweep of a 7B model.

    python bench/gpu.py [--skip-tests] [--skip-benchmarks] [--skip-overhead] [--skip-sweep] [--workers N]
                        [options of python -m bench.kernels_gpu]

Needs an NVIDIA GPU, and pytest; installs nothing. Without a GPU it says so and exits with 0. It exits with 1 when a
test fails, or when a kernel of ours gives a wrong answer in a benchmark; the benchmarks run also after a test has
failed, since time on a GPU is scarce and every contender is checked before it is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

TESTS = ("tests/gpu", "tests/fused", "tests/native")
OVERHEAD = ("llava-1.5-7b", "qwen3-vl-8b")
"""Shapes, with random weights, for `emocircuits bench`."""
OVERHEAD_OPTIONS = (
    "--random-weights", "--dtype", "bfloat16", "--cache", "static", "--compile", "--new-tokens", "64",
    "--seconds", "60", "--prepare-seconds", "300",
)  # fmt: skip
OVERHEAD_TIMEOUT = 540
WORKERS = 12
"""Processes of the tests, where pytest-xdist is there: most of their time is compilation on one core."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-tests", action="store_true", help="only the benchmarks")
    parser.add_argument("--skip-benchmarks", action="store_true", help="only the tests")
    parser.add_argument("--skip-overhead", action="store_true", help="leave out `emocircuits bench` (minutes a model)")
    parser.add_argument("--skip-sweep", action="store_true", help="leave out bench/sweep_gpu.py (some minutes)")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes of the tests (default {WORKERS})")
    parser.add_argument("--test-seconds", type=float, default=300, help="stop the tests after this time (default 300)")
    options, rest = parser.parse_known_args(arguments)
    if not _sees_a_gpu():
        print("no GPU is visible to torch: the GPU tests and benchmarks were not run")
        return 0
    from bench.kernels_gpu.__main__ import parser as benchmarks

    chosen = benchmarks().parse_args(rest)
    build_native()
    code, tests = (0, None) if options.skip_tests else run_tests(options.workers, options.test_seconds)
    if not options.skip_benchmarks:
        code = max(code, _run([sys.executable, "-m", "bench.kernels_gpu", *rest]))
    if tests is not None:
        note(tests, chosen.device, chosen.commit, chosen.results)
    _run([sys.executable, "-m", "bench.kernels_gpu.report", "--results", str(chosen.results)])
    if not options.skip_overhead:
        code = max(code, run_overhead(chosen.results))
    if not options.skip_sweep:
        commit = [] if chosen.commit is None else ["--commit", chosen.commit]
        code = max(code, _run([sys.executable, "bench/sweep_gpu.py", "--results", str(chosen.results), *commit]))
    return code


def run_overhead(
    results: Path, device: str = "cuda", shapes: Sequence[str] = OVERHEAD, more: Sequence[str] = ()
) -> int:
    """Run `emocircuits bench` on every shape and keep its record; 1 when one of them fails."""
    code = 0
    name = _python("import torch; print(torch.cuda.get_device_name())") if device.startswith("cuda") else device
    for shape in shapes:
        options = ["--config", shape, "--device", device, *OVERHEAD_OPTIONS, *more]
        command = [sys.executable, "-m", "emocircuits.cli", "bench", *options, "--json"]
        print(" ".join(["emocircuits", *command[3:]]), flush=True)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True, check=False,
                timeout=OVERHEAD_TIMEOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{shape}: stopped after {OVERHEAD_TIMEOUT} s")
            code = 1
            continue
        if done.returncode:
            code = 1
            continue
        from bench.kernels_gpu.machine import slug
        from emocircuits.files import write_json
        from emocircuits.overhead import report

        record = json.loads(done.stdout)
        print(report.table(record))
        code = max(code, *(one["kind"] == "ours" and one["status"] == "failed" for one in record["contenders"]))
        write_json(results / f"overhead-{slug(shape)}-{slug(name)}.json", record)
    return code


def build_native() -> None:
    """Compile csrc where it lies, for this GPU, where that is possible and was not done: nothing is installed."""
    from emokernels import native

    if native.why_not() is None:
        return
    architecture = _python("import torch; print('%d.%d' % torch.cuda.get_device_capability())")
    # Kernels that use the instructions of one architecture alone need its name with an a.
    environment = {**_environment(), "TORCH_CUDA_ARCH_LIST": architecture + ("a" if float(architecture) >= 9 else "")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    begin = time.perf_counter()
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said = [line for line in (built.stdout + built.stderr).splitlines() if line.strip()]
    print(f"csrc, {time.perf_counter() - begin:.0f} s: " + ("built" if built.returncode == 0 else "not built"))
    print("\n".join(said[-3:]))


def run_tests(workers: int, seconds: float) -> tuple[int, dict[str, object]]:
    """0 or 1 as the GPU tests pass or not, and what came out of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers), "--dist", "worksteal"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    alarm = threading.Timer(seconds, process.terminate)
    alarm.start()
    last = ""
    for line in process.stdout or ():
        print(line, end="", flush=True)
        last = line if line.strip() else last
    code = process.wait()
    alarm.cancel()
    shown = " ".join(["python", *command[1:]])
    about = {"command": shown, **counts(last), "exit": code, "seconds": time.perf_counter() - begin}
    return (1 if code else 0), about


def counts(line: str) -> dict[str, int]:
    """Numbers in pytest's last line.

    >>> counts("2 failed, 61 passed, 3 skipped, 1 error in 80.12s")
    {'passed': 61, 'failed': 3, 'skipped': 3}
    """
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", line)}
    failed = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)
    return {"passed": found.get("passed", 0), "failed": failed, "skipped": found.get("skipped", 0)}


def note(tests: dict[str, object], device: str, commit: str | None, results: Path) -> None:
    """Write the tests' result into the record of this device."""
    from bench.kernels_gpu import record

    state = record.load_or_start(record.fresh(device, commit), results)
    record.save({**state, "tests": tests}, results)


def _sees_a_gpu() -> bool:
    return (
        importlib.util.find_spec("torch") is not None
        and _python("import torch; print(torch.cuda.is_available())") == "True"
    )


def _python(code: str) -> str:
    """What a line of Python prints in a process of its own: this one leaves the GPU to the others."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    return done.stdout.strip()


def _run(command: list[str]) -> int:
    return subprocess.run(command, cwd=ROOT, env=_environment(), check=False).returncode


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    sys.exit(main())
