# SPDX-License-Identifier: Apache-2.0
"""The `xp` fixture: every op test body runs on NumPy (CPU executor), on the CuPy stand-in and on a GPU."""

import functools
import importlib.util
import os
import signal
import sys
import tempfile

import numpy as np
import pytest

# what perf/gpu_suite.py runs on a machine with a GPU may not have these; nothing in the files is marked gpu
collect_ignore = []
if not all(importlib.util.find_spec(name) for name in ("gguf", "typer")):
    collect_ignore += ["test_cli.py", "test_formats_gguf.py", "test_gguf.py"]
if not all(importlib.util.find_spec(name) for name in ("gguf", "typer", "safetensors")):
    collect_ignore += ["test_hugging_face.py", "test_safetensors.py"]


@functools.cache
def _gpu_found():
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    try:
        import cupy
    except ImportError:
        return False
    return cupy.cuda.is_available()


class NumpyArrays:
    """Arrays on the host; kernels run on the CPU executor."""

    name = "numpy"
    module = np

    def array(self, a):
        return np.array(a)

    def numpy(self, a):
        return np.array(a)


class CupyArrays:
    """Arrays on a GPU."""

    name = "cupy"

    def __init__(self):
        import cupy

        self.module = cupy

    def array(self, a):
        made = self.module.asarray(a)
        self.module.cuda.get_current_stream().synchronize()   # a stream of the test's own does not wait for the copy
        return made

    def numpy(self, a):
        return a.get()


def pytest_addoption(parser):
    parser.addoption("--executor", default="", metavar="K=V[,K=V]",
                     help="run every test under runtime.cpu.settings(K=V, ...), e.g. fused=0 or sanitize=undefined")


@pytest.fixture(autouse=True)
def executor_settings(request):
    """Executor settings of the command line, around every test."""
    from cupyattn.runtime import cpu

    text = request.config.getoption("--executor")
    pairs = [pair.split("=", 1) for pair in text.split(",") if pair]
    with cpu.settings(**{key: bool(int(value)) if value in "01" else value for key, value in pairs}):
        yield


@pytest.fixture(params=["numpy", pytest.param("standin", id="standin"),
                        pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    """Arrays of one kind: ``.array(numpy array)``, ``.numpy(array)``, ``.name``, ``.module``."""
    if request.param == "numpy":
        yield NumpyArrays()
    elif request.param == "cupy":
        yield CupyArrays()
    else:
        from standin import install

        with install() as arrays:
            yield arrays


@pytest.fixture(autouse=True)
def gpu_errors(request):
    """What a kernel did wrong is told by the test that launched it; no other test runs in a process without a GPU."""
    yield
    if request.node.get_closest_marker("gpu") is None or not _gpu_found():
        return
    import cupy

    try:
        cupy.cuda.runtime.deviceSynchronize()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        lost = f"{request.node.nodeid}: {error}; nothing more can be done with the GPU in this process"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(lost, returncode=1)
        print(lost, file=sys.__stderr__, flush=True)
        os._exit(1)   # xdist calls the test failed and starts another process


def pytest_collection_modifyitems(config, items):
    if _gpu_found():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU with CuPy"))


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "NVIDIA GPU" in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests marked gpu did not run: no NVIDIA GPU with CuPy here")


def pytest_configure(config):
    # a cache of the test run's own, unless the caller names one to keep
    os.environ.setdefault("CUPYATTN_CACHE_DIR", os.path.join(tempfile.gettempdir(), "cupyattn-test-cache"))


@pytest.fixture
def interrupts():
    """Ctrl-C raises KeyboardInterrupt, also in a shell's background job, which begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
