# SPDX-License-Identifier: Apache-2.0
"""Documentation that runs: README's session, every docstring example, and docstrings that name real parameters."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import cupyattn

README = Path(__file__).parent.parent / "README.md"
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = [m.name for m in pkgutil.walk_packages(cupyattn.__path__, "cupyattn.") if not m.name.endswith("__main__")]


def test_readme_session():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=OPTIONS)
    for i, block in enumerate(blocks):
        runner.run(parser.get_doctest(block, {}, f"README block {i}", str(README), 0))
    assert runner.summarize().failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=OPTIONS).failed == 0


@pytest.mark.parametrize("name", [n for n in cupyattn.__all__ if inspect.isfunction(getattr(cupyattn, n))])
def test_docstring_parameters_are_the_signature(name):
    function = getattr(cupyattn, name)
    section = re.search(r"Parameters\n *-+\n(.*?)\n *(?:Returns|Raises)\n", inspect.getdoc(function), re.DOTALL)
    assert section, f"{name} has no Parameters section followed by Returns or Raises"
    documented = []
    for line in re.findall(r"^(\w[\w, ]*) : ", section.group(1), re.MULTILINE):
        documented += [part.strip() for part in line.split(",")]
    assert documented == list(inspect.signature(function).parameters), name
