"""What the documentation says, runs."""

import doctest
import re
from pathlib import Path

import pytest

import emokernels
from emokernels import backends as backends_function


def test_the_example_of_docs_kernels_runs():
    page = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("thing", [emokernels, backends_function], ids=["package", "backends"])
def test_docstring_examples_run(thing):
    tests = doctest.DocTestFinder(recurse=False).find(thing, globs={**vars(emokernels)})
    assert tests
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0
