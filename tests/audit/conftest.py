import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package with one module of kernels; its name is what ``--package`` takes."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, launches):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "kernels.py").write_text(f"import fake_kernels as fake\n\n\ndef audit_launches(arch):\n{launches}")
        return name

    return write


@pytest.fixture
def audit(tmp_path):
    """Run the command in a process of its own, under the interpreter's variable as the tests are."""

    def run(*arguments):
        path = os.pathsep.join(map(str, (ROOT, HERE, tmp_path)))
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
        return subprocess.run(
            [sys.executable, "-m", "emokernels.audit", *arguments], env=environment, capture_output=True, text=True,
            cwd=tmp_path, timeout=600,
        )  # fmt: skip

    return run
