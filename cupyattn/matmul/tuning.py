# SPDX-License-Identifier: Apache-2.0
"""`tune`: which of quant_gemm's kernels is fastest here, measured on request and kept in a file.

A file ``tuned/matmul_<digest>.json`` in the cache folder holds Choices by weight, tokens and type of x. The digest is
of the device, driver, versions and this library's source, so that a file of another machine or version is never read;
what is read must be one of `matmul_choice.candidates`, so that no file can change a bit of a result up to
INVARIANT_TOKENS tokens. ``CUPYATTN_TUNED=0`` leaves the files alone.
"""

import functools
import hashlib
import itertools
import json
import os
import platform
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..runtime import arch_of, blas, compile_all, cpu, env, host_compiler, recording, source
from .choice import INVARIANT_TOKENS, Choice, Product, blas_objection, bucket, candidates

_FASTER = 0.97            # of the heuristic's time: what another choice must be below
_ROUNDS = 20              # of a choice, fewer after _SECONDS
_SECONDS = 0.5
_HOST_COLD_BYTES = 1 << 26   # more than the caches of a core hold
_MAX_COPIES = 64
_MAX_TOKENS = 2**18
_PYTHON = ("matmul/plans.py", "matmul/choice.py", "matmul/blas.py", "matmul/tuning.py", "ops/quant_gemm.py",
           "ops/dequantize.py", "quant/layout.py", "runtime/blas.py")
_FOLDER = "tuned"   # in the cache folder
_tables = {}        # device: what its file holds, {key: entry}
_lock = threading.Lock()


class Tuned(NamedTuple):
    """What `tune` found for one weight and number of tokens.

    Attributes
    ----------
    format : str
    shape : (int, int)
    tokens : int
    choice : str
        The fastest; "blas", or a kernel and its tiles.
    seconds, default_seconds : float
        Median time of a call with `choice`, and with what would be taken without tuning.
    """

    format: str
    shape: tuple
    tokens: int
    choice: str
    seconds: float
    default_seconds: float


# ---- reading ---------------------------------------------------------------------------------------------

def tuned_choice(xp, qmatrix, tokens, x):
    """The Choice measured for `tokens` rows of x, of dtype name `x`, on the current device, or None."""
    device = "cpu" if xp is np else xp.cuda.runtime.getDevice()
    return _lookup(device, qmatrix.geometry, qmatrix.shape, tokens, x, tokens > INVARIANT_TOKENS and blas.available(xp))


@functools.lru_cache(maxsize=4096)
def _lookup(device, geometry, shape, tokens, x, with_blas):
    table, key = _table(device), _key(geometry, shape, tokens, x, with_blas)
    if key not in table:
        return None
    legal = _candidates(device, geometry, tokens, x, with_blas)
    choice = _choice_of(table[key])
    if choice not in legal:
        _warn(_file(device), f"its entry {key!r} is no choice for that product")
        return None
    return choice


def _table(device):
    with _lock:
        if device not in _tables:
            _tables[device] = _read(device)
        return _tables[device]


def _read(device):
    """Entries of the device's file; none without one."""
    if not env.tuned() or not any((folder / _FOLDER).is_dir() for folder in env.cache_dirs()):
        return {}
    path, facts = _file(device), _facts(device)
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text())
        if held["facts"] != facts or not isinstance(held["entries"], dict):
            raise ValueError("it is about another device or version")
        return held["entries"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _warn(path, error if str(error) else type(error).__name__)
        return {}


def _choice_of(entry):
    """The Choice of an entry, or None if it is none."""
    try:
        return Choice(**entry["choice"])
    except (KeyError, TypeError):
        return None


def _warn(path, why):
    warnings.warn(f"cupyattn: {path} is ignored: {why}; cupyattn.tune writes it anew, CUPYATTN_TUNED=0 leaves it alone",
                  RuntimeWarning, stacklevel=2)


def _forget():
    """Read files again."""
    with _lock:
        _tables.clear()
    _lookup.cache_clear()


def _key(geometry, shape, tokens, x, with_blas):
    forms = "+".join(f"{form.trait},{form.tiles_per_scale},{form.tiles_per_super}x{columns}"
                     for form, _, _, columns in geometry)
    return f"{forms} {shape[0]}x{shape[1]} {x} {bucket(tokens)}{' blas' if with_blas else ''}"


def _candidates(device, geometry, tokens, x, with_blas):
    """Those for all numbers of tokens in the bucket of `tokens`, what is taken for `tokens` without tuning first."""
    from ..ops.quant_gemm import version_of  # which imports this module

    arch = "cpu" if device == "cpu" else arch_of(sys.modules["cupy"])
    version = version_of(geometry, x, arch)
    untuned = candidates(geometry, tokens, version, arch, with_blas)[0]
    return sorted(candidates(geometry, bucket(tokens), version, arch, with_blas), key=lambda choice: choice != untuned)


# ---- the file --------------------------------------------------------------------------------------------

def _facts(device):
    """What a measured time depends on; the file's name is a digest of it."""
    if device == "cpu":
        return {"device": _cpu_name(), "workers": cpu.Settings().num_workers(), "numpy": np.__version__,
                "compiler": host_compiler.compiler().identity, "source": _source(True)}
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(device)
    return {"device": properties["name"].decode(), "multiprocessors": properties["multiProcessorCount"],
            "driver": runtime.driverGetVersion(), "runtime": runtime.runtimeGetVersion(), "cupy": cupy.__version__,
            "source": _source(False)}


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def _source(host):
    """Hash of the kernels' source and of the Python files that choose and launch them."""
    total = hashlib.sha256()
    for stem in ("quant_gemm", "dequantize"):
        total.update(source.digest(source.path(stem), host).encode())
    for name in _PYTHON:
        total.update((Path(__file__).parent.parent / name).read_bytes())
    return total.hexdigest()[:16]


def _file(device, folder=None):
    digest = hashlib.sha256(json.dumps(_facts(device), sort_keys=True).encode()).hexdigest()[:16]
    found = [where / _FOLDER / f"matmul_{digest}.json" for where in ((folder,) if folder else env.cache_dirs())]
    return next((path for path in found if path.is_file()), found[0])


def _write(device, entries):
    """Add entries to the device's file, so that other processes see all of it or nothing."""
    def to(folder):
        path = _file(device, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{path}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(json.dumps({"facts": _facts(device), "entries": held | entries}, indent=1) + "\n")
        os.replace(temporary, path)

    held = _read(device)
    try:
        to(env.cache_dir())
    except OSError as error:
        to(env.fallback_cache_dir(error))
    _forget()


# ---- measuring -------------------------------------------------------------------------------------------

def tune(matrices, tokens=(1, 8, 64, 512), dtype="float16", *, progress=None):
    """Measure which kernels multiply these weights fastest on this machine, and remember it for later processes.

    Parameters
    ----------
    matrices : QMatrix or iterable of QMatrix
        NumPy ones are timed on the CPU, CuPy ones on the current GPU. Those of one format and shape count as one.
    tokens : int or iterable of int
        Rows of x. A result serves all numbers between two neighbours of 1, 4, 8, 16, 32, 64, 128, ..., the higher
        included.
    dtype : dtype or str
        Of x: float16, bfloat16 or float32.
    progress : callable, optional
        ``progress(done, total, what)`` before and after each product.

    Returns
    -------
    list of Tuned
        One per product.

    Raises
    ------
    RuntimeError
        The current CuPy stream captures a graph.

    Notes
    -----
    Each product is computed in at most 8 ways, in turns, with more copies of the weight than a cache holds; one must be
    3 % faster than what is taken without tuning to replace it. `quant_gemm` reads the results from a JSON file in the
    cache folder (``cupyattn cache`` says where); ``CUPYATTN_TUNED=0`` turns that off. Results of up to 64 rows keep
    their bits: only tiles, warps and stages change, never the order of additions. With more rows BLAS may replace a
    kernel, or a kernel BLAS. Nothing is ever tuned unasked.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> w = cupyattn.QMatrix.from_dense(np.eye(64, dtype=np.float16))
    >>> [found] = cupyattn.tune(w, tokens=1)   # doctest: +SKIP
    >>> found.choice, found.default_seconds / found.seconds   # doctest: +SKIP
    ('core m_tile=1 row_tiles=4', 1.06)
    """
    from ..quant import QMatrix

    matrices = [matrices] if isinstance(matrices, QMatrix) else list(matrices)
    for matrix in matrices:
        if not isinstance(matrix, QMatrix):
            raise TypeError(f"tune: matrices must be QMatrix objects, got {type(matrix).__name__}")
    tokens = [tokens] if isinstance(tokens, int | np.integer) else list(tokens)
    if not all(isinstance(n, int | np.integer) and 1 <= n <= _MAX_TOKENS for n in tokens):
        raise ValueError(f"tune: tokens must be numbers of rows from 1 to {_MAX_TOKENS}, got {tokens}")
    tokens = [int(n) for n in tokens]
    dtype = _float_type(dtype)
    for xp in {matrix.xp for matrix in matrices} - {np}:
        if xp.cuda.get_current_stream().is_capturing():
            raise RuntimeError("tune: the current stream must not capture a graph; tune before the capture")
    products = {}
    for matrix in matrices:
        device = "cpu" if matrix.xp is np else matrix.xp.cuda.runtime.getDevice()
        for n in tokens:
            with_blas = n > INVARIANT_TOKENS and blas.available(matrix.xp)
            key = _key(matrix.geometry, matrix.shape, n, dtype.name, with_blas)
            products.setdefault((device, key), (matrix, n))
    found, total = [], len(products)
    for done, ((device, key), (matrix, n)) in enumerate(products.items()):
        if progress is not None:
            progress(done, total, f"{matrix.format} {matrix.shape[0]}x{matrix.shape[1]}, {n} tokens")
        seconds = _measure(device, matrix, n, dtype)
        default, best = next(iter(seconds)), min(seconds, key=seconds.get)
        best = best if seconds[best] < _FASTER * seconds[default] else default
        _write(device, {key: {"choice": best._asdict(), "seconds": seconds[best], "default_seconds": seconds[default]}})
        found.append(Tuned(matrix.format, matrix.shape, n, str(best), seconds[best], seconds[default]))
    if progress is not None:
        progress(total, total, "done")
    return found


def _float_type(dtype):
    from ..runtime.arrays import dtype_of
    from ..runtime.checks import FLOATS

    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in FLOATS:
        raise TypeError(f"tune: dtype must be {' or '.join(FLOATS)}, got {name}")
    return dtype_of(name)


def _measure(device, matrix, tokens, dtype):
    """{Choice: median seconds of a call}, the heuristic's choice first."""
    from ..ops.quant_gemm import multiply_as

    xp, geometry, arch = matrix.xp, matrix.geometry, arch_of(matrix.xp)
    product = Product(tuple(form for form, *_ in geometry), tokens, dtype.name, dtype.name, False, False, 16, 16)
    allowed = tokens > INVARIANT_TOKENS and blas_objection(product, arch, blas.available(xp)) is None
    choices = _candidates(device, geometry, tokens, dtype.name, allowed)
    x = xp.asarray(np.random.default_rng(1).standard_normal((tokens, matrix.shape[1]), np.float32).astype(dtype))
    out = xp.empty((tokens, matrix.shape[0]), dtype)
    with recording() as wanted:
        for choice in choices:
            multiply_as(choice, x, matrix, out)
    compile_all(wanted, arch)
    clock = _HostClock() if xp is np else _DeviceClock(xp)
    count = min(_MAX_COPIES, max(2, -(-clock.cold_bytes // matrix.nbytes)))
    copies = [matrix, *(_copy(matrix) for _ in range(count - 1))]
    runs = {choice: clock.prepared([functools.partial(multiply_as, choice, x, copy, out) for copy in copies])
            for choice in choices}
    times = {choice: [] for choice in choices}
    for _ in range(_ROUNDS):
        for choice, run in runs.items():
            if len(times[choice]) < 3 or sum(times[choice]) < _SECONDS:
                times[choice].append(clock.seconds(run))
    return {choice: float(np.median(spent)) / runs[choice].calls for choice, spent in times.items()}


def _copy(matrix):
    return type(matrix)(matrix.format, matrix.shape, [part.with_arrays(lambda a: a.copy()) for part in matrix.segments],
                        matrix.order)


class _HostClock:
    """Plain calls of 5 ms together, over the copies in turn."""

    cold_bytes = _HOST_COLD_BYTES

    def prepared(self, calls):
        calls[0]()
        begin = time.perf_counter()
        calls[1]()
        turn, count = itertools.cycle(calls), max(1, round(5e-3 / max(time.perf_counter() - begin, 1e-6)))

        def run():
            for _ in range(count):
                next(turn)()
        run.calls = count
        return run

    def seconds(self, run):
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


class _DeviceClock:
    """Calls of all copies in one CUDA graph, timed by events, so that the host's work does not count."""

    def __init__(self, xp):
        self._xp = xp
        device = xp.cuda.runtime.getDevice()
        self.cold_bytes = 4 * xp.cuda.runtime.getDeviceProperties(device)["l2CacheSize"]
        self._stream = _stream(xp, device)
        xp.cuda.get_current_stream().synchronize()   # x and the copies are there

    def prepared(self, calls):
        with self._stream as stream:
            calls[0]()   # compiled, its scratch allocated
            stream.synchronize()
            stream.begin_capture()
            try:
                for call in calls:
                    call()
            finally:
                graph = stream.end_capture()

        def run():
            graph.launch(stream)
        run.calls = len(calls)
        return run

    def seconds(self, run):
        start, end = self._xp.cuda.Event(), self._xp.cuda.Event()
        start.record(self._stream)
        run()
        end.record(self._stream)
        end.synchronize()
        return self._xp.cuda.get_elapsed_time(start, end) * 1e-3


@functools.cache
def _stream(xp, device):
    """One for each device, for scratch stays with its stream."""
    return xp.cuda.Stream(non_blocking=True)
