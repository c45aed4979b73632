# SPDX-License-Identifier: Apache-2.0
"""Every CORE specialisation builds for the CPU, as released and as checked; kernel tests in the other builds."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from cupyattn import ops
from cupyattn.runtime import compile_all, host_compiler
from cupyattn.runtime.cpu import settings

STEMS = [m.name for m in pkgutil.iter_modules(ops.__path__)]
TESTS = Path(__file__).parent
KERNEL_TESTS = sorted(f"tests/{file.name}" for stem in (*STEMS, "instructions")   # test_x.py, test_x_formats.py, ...
                      for file in {*TESTS.glob(f"test_{stem}.py"), *TESTS.glob(f"test_{stem}_*.py")})


@pytest.mark.parametrize("check", [False, True], ids=["release", "check"])
@pytest.mark.parametrize("stem", STEMS)
def test_core_builds(stem, check):
    core = importlib.import_module(f"cupyattn.ops.{stem}").CORE
    assert 0 < len(core)
    with settings(check=check):
        compile_all(core, "cpu")


def _run(*options):
    """Kernel tests on NumPy arrays; on the stand-in the same kernels would run once more."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not standin", *options,
               *KERNEL_TESTS]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.full
@pytest.mark.parametrize("executor", ["fused=0", "sanitize=undefined", "workers=1", "schedule=reverse",
                                      "schedule=random"])
def test_kernel_tests_in_other_builds_and_schedules(executor):
    _run("--executor", executor)


@pytest.mark.full
@pytest.mark.parametrize("compiler", host_compiler.available()[1:], ids=lambda c: c.family)
def test_kernel_tests_with_every_compiler(compiler):
    _run("--executor", f"cxx={' '.join(compiler.command)}")
