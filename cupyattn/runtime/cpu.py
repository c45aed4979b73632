# SPDX-License-Identifier: Apache-2.0
"""The CPU back end: builds a `.cu` against ``cuda_src/cpu`` and runs it on the executor in that folder."""

import contextlib
import contextvars
import ctypes
import functools
import os
import platform
import sys
import threading
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..errors import CompileError
from . import cpu_report as report
from . import env, host_compiler, source
from .capturing import refuse_to_compile

_RELEASE = ("-O3", "-march=native", "-fassociative-math", "-fno-signed-zeros", "-DCA_CPU=1")
_FUSED, _UNFUSED = (*_RELEASE, "-DCA_FUSED=1"), (*_RELEASE, "-DCA_FUSED=0")
_CHECK = ("-O1", "-g1", "-gdwarf-4", "-fsanitize=thread", "-march=native", "-DCA_CPU=1", "-DCA_CHECK=1", "-DCA_FUSED=0")
_SCHEDULES = {"forward": 0, "reverse": 1, "random": 2}


@dataclass(frozen=True)
class Settings:
    """How the CPU executor runs kernels; see `settings`."""

    workers: int | None = None
    schedule: str = "forward"
    seed: int = 0
    fused: bool = True
    check: bool | None = None
    sanitize: str | None = None
    cxx: str | None = None
    blas: bool = False

    def checking(self):
        return env.check() if self.check is None else self.check

    def num_workers(self):
        return self.workers or len(os.sched_getaffinity(0))


_settings = contextvars.ContextVar("cupyattn_cpu_settings", default=Settings())
_counters = contextvars.ContextVar("cupyattn_cpu_counters", default=None)


@contextlib.contextmanager
def settings(**changes):
    """Change how kernels run on the CPU inside a ``with`` block.

    Parameters
    ----------
    workers : int, optional
        OS threads, the caller included; default: the CPUs this process may use.
    schedule : {"forward", "reverse", "random"}
        Order in which runnable threads of a block are taken.
    seed : int
        Of the random schedule.
    fused : bool
        Tile-level helpers take their fused host body (default) or run instruction by instruction.
    check : bool, optional
        The checking mode; default ``CUPYATTN_CHECK``. Always instruction by instruction.
    sanitize : {"undefined", "address"}, optional
        Build with UBSan, or with ASan: Python must then run with ``LD_PRELOAD=libasan.so``. Either ends the process.
    cxx : str, optional
        Compiler command; default ``CUPYATTN_CXX``, else the first one found.
    blas : bool
        `quant_gemm` leaves 128 tokens and more to NumPy's BLAS, on as many threads as that has, whatever `workers` is.
        Up to 1.7 times as fast where those have cores to themselves, several times slower where they have not. Not in
        the checking mode. Default False.
    """
    new = replace(_settings.get(), **changes)
    if new.schedule not in _SCHEDULES:
        raise ValueError(f"settings: schedule must be one of {', '.join(_SCHEDULES)}, got {new.schedule!r}")
    if new.sanitize not in (None, "undefined", "address"):
        raise ValueError(f"settings: sanitize must be 'undefined' or 'address', got {new.sanitize!r}")
    token = _settings.set(new)
    try:
        yield new
    finally:
        _settings.reset(token)


def current_settings():
    """What a launch depends on beside its arguments."""
    options = _settings.get()
    return options, options.checking()


def blas():
    """Whether the settings leave products of plain matrices to NumPy's BLAS."""
    options = _settings.get()
    return options.blas and not options.checking()


# ---- the C structs of cuda_src/cpu/api.h -----------------------------------------------------------------

class _Buffer(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("writeable", ctypes.c_int32),
                ("argument", ctypes.c_int32)]


class _BufferCounters(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("bytes_read", "bytes_written", "sectors_read", "sectors_written")]


class _SharedCounters(ctypes.Structure):
    _fields_ = [("pc", ctypes.c_uint64), ("access", ctypes.c_int32), ("reserved", ctypes.c_int32),
                ("requests", ctypes.c_uint64), ("conflicts", ctypes.c_uint64), ("max_ways", ctypes.c_uint64)]


_MAX_INSTRUCTIONS = 1 << 14


class _Counters(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_uint64) for n in report.COUNTS), ("per_buffer", ctypes.POINTER(_BufferCounters)),
                ("shared", ctypes.POINTER(_SharedCounters)), ("num_shared", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_ = [("entry", ctypes.c_void_p), ("args", ctypes.c_char_p), ("args_bytes", ctypes.c_uint64),
                ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared_bytes", ctypes.c_uint32),
                ("workers", ctypes.c_int32), ("schedule", ctypes.c_int32), ("seed", ctypes.c_uint64),
                ("check", ctypes.c_int32), ("late_async", ctypes.c_int32), ("num_buffers", ctypes.c_int32),
                ("buffers", ctypes.POINTER(_Buffer)), ("counters", ctypes.POINTER(_Counters))]


class _Error(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("argument", ctypes.c_int32), ("pc", ctypes.c_uint64),
                ("other_pc", ctypes.c_uint64), ("address", ctypes.c_uint64), ("bytes", ctypes.c_uint64),
                ("block", ctypes.c_uint32 * 3), ("thread", ctypes.c_uint32 * 3), ("other_block", ctypes.c_uint32 * 3),
                ("other_thread", ctypes.c_uint32 * 3), ("shared_offset", ctypes.c_int32),
                ("message", ctypes.c_char * 512)]


@contextlib.contextmanager
def counters():
    """Collect a LaunchCounters per launch inside; needs ``settings(check=True)``.

    Yields a list. Of each launch in it:

    kernel : str
        Symbol of the kernel.
    counts : dict
        blocks, threads, switches (of fibers), barriers and collectives (arrivals of a thread, meetings of a warp),
        mma, ldmatrix and shuffles (of a warp), cp_async_bytes (read by cp.async).
    buffers : dict
        Argument to its bytes_read, bytes_written, sectors_read and sectors_written. An argument is a pointer field
        of the struct with the fields it is nested in (``"k.data"``, ``"k_scale.scale"``), or ``"buffers[0]"``, ... for
        arrays registered with `launch`. Bytes are those the lanes asked for: one byte read by two threads counts
        twice. Sectors are the distinct 32 bytes of each warp-wide request; nothing is cached between requests. A
        request joins the n-th time each lane ran an instruction since the warp met in a barrier or collective.
        An access counts for one argument; where arrays overlap, for one that may be written, else for the one that
        starts last.
    shared : dict
        "read", "write", "ldmatrix" and "cp_async" to requests (of at most 128 bytes: a quarter of a warp for 16-byte
        accesses), conflicts (wavefronts beyond one a request) and max_ways (wavefronts of the worst; 1: no conflict,
        0: no request). An atomic is a read and a write.
    conflicts : dict
        ``("file:line", access)`` to the same three, only lines that had conflicts, the worst first.
    """
    collected = []
    token = _counters.set(collected)
    try:
        yield collected
    finally:
        _counters.reset(token)


# ---- building --------------------------------------------------------------------------------------------

_executor_lock = threading.Lock()


def _executor(compiler):
    """Path and handle of the executor's shared library, built once per machine and compiler."""
    with _executor_lock:
        return _load_executor(compiler)


@functools.lru_cache(maxsize=4)
def _load_executor(compiler):
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise CompileError(f"the CPU executor runs on Linux x86-64 and aarch64, not on {sys.platform} "
                           f"{platform.machine()}; use CuPy arrays on a GPU")
    folder = source.root() / "cpu"
    files = sorted(folder.glob("*.cpp"))
    compile_flags, link_flags = ("-O3", "-march=native", f"-I{folder}", "-pthread"), ("-pthread", "-ldl")
    digest = host_compiler.digest_of(compiler, compile_flags, link_flags, *(source.digest(f, True) for f in files))
    # kernels find it by this name among the libraries already loaded, so a cache folder may be moved
    soname = f"-Wl,-soname,libexecutor.{digest}.so"
    path, _ = host_compiler.build(compiler, "executor", digest, files, "libexecutor.so", compile_flags,
                                  (*link_flags, soname))
    library = ctypes.CDLL(str(path))
    library.ca_launch.argtypes = (ctypes.POINTER(_Launch), ctypes.POINTER(_Error))
    library.ca_resume.argtypes = (ctypes.POINTER(_Error),)
    library.ca_abandon.argtypes = ()
    return path, library


class _Kernel(NamedTuple):
    entry: int          # address of the entry that runs one CUDA thread
    executor: object    # the library that calls it
    path: object
    cached: bool        # found on disk


_kernels = {}
_build_locks = {}
_registry_lock = threading.Lock()


def cache_hits():
    """(kernels taken from the disk cache, kernels compiled) by this process."""
    hits = sum(kernel.cached for kernel in _kernels.values())
    return hits, len(_kernels) - hits


def _flavour(options):
    """Compile flags that the settings ask for."""
    if options.checking():
        return _CHECK
    flags = _FUSED if options.fused else _UNFUSED
    sanitizer = ("-g1", f"-fsanitize={options.sanitize}", "-fno-sanitize-recover=all") if options.sanitize else ()
    return (*flags, *sanitizer)


def _kernel(spec, flavour, cxx):
    """The compiled kernel of `spec`; one build per specialisation however many threads ask."""
    key = (spec, flavour, cxx)
    found = _kernels.get(key)
    if found is not None:
        return found
    refuse_to_compile(spec)
    with _registry_lock:
        lock = _build_locks.setdefault(key, threading.Lock())
    with lock:
        found = _kernels.get(key)
        if found is None:
            found = _kernels[key] = _build(spec, flavour, host_compiler.compiler(cxx))
    return found


def _build(spec, flavour, compiler):
    path, executor = _executor(compiler)
    file = source.path(spec.source)
    stub = f'#include "cuda_cpu.h"\n#include "{file}"\nCA_CPU_ENTRY({spec.kernel})\n'
    includes = tuple(f"-I{folder}" for folder in source.include_dirs(cpu=True))
    compile_flags = (*flavour, *spec.defines(), *includes)
    # -fsanitize=thread only instruments: the executor supplies its callbacks, libtsan is not linked
    link_flags = (str(path), *(f for f in flavour if f in ("-fsanitize=undefined", "-fsanitize=address")))
    if "-fsanitize=address" in flavour and not hasattr(ctypes.CDLL(None), "__asan_init"):   # it would end the process
        raise CompileError("sanitize='address' needs its library in the process from the start; run Python with "
                           "LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0")
    digest = host_compiler.digest_of(compiler, spec.kernel, compile_flags, path.parent.name, source.digest(file, True),
                                     source.digest(source.root() / "cpu" / "cuda_cpu.h", True))
    library_path, cached = host_compiler.build(compiler, spec.kernel, digest, {"stub.cpp": stub}, "kernel.so",
                                               compile_flags, link_flags)
    library = ctypes.CDLL(str(library_path))
    signature_of = getattr(library, f"ca_signature_{spec.kernel}")
    signature_of.restype = ctypes.c_char_p
    signature, expected = signature_of().decode(), f"struct:{spec.layout.dtype.itemsize}"
    if signature != expected:
        raise TypeError(f"{spec.kernel}: the kernel takes ({signature}), the launcher passes ({expected}): one "
                        f"{spec.args} by value; mend the kernel's parameter list or params.h")
    entry = ctypes.cast(getattr(library, f"ca_entry_{spec.kernel}"), ctypes.c_void_p).value
    return _Kernel(entry, executor, library_path, cached)


def compiler_for_current_settings():
    """Function of a Specialisation that builds it as a launch with the current settings would need it."""
    options = _settings.get()
    return lambda spec: _kernel(spec, _flavour(options), options.cxx)


# ---- launching -------------------------------------------------------------------------------------------

def launch(plan, args, buffers=(), const_buffers=()):
    """Run `plan`'s kernel to its end. Releases the GIL; Ctrl-C abandons the launch.

    `buffers` and `const_buffers` are arrays beside those of `args`; only the checking mode looks at them.

    Raises
    ------
    KernelCheckError
        The checking mode found a fault, or the kernel dead-locked.
    """
    bind(plan, args, buffers, const_buffers)()


def bind(plan, args, buffers=(), const_buffers=()):
    """A function without arguments that does what `launch` does, under the settings of now."""
    if 0 in plan.grid:
        return _launch_nothing
    options = _settings.get()
    checking = options.checking()
    kernel = _kernel(plan.spec, _flavour(options), options.cxx)
    request = _Launch.from_buffer_copy(_request(kernel.entry, plan.grid, plan.block, plan.shared_bytes,
                                                options.schedule, options.seed, checking))
    request.args, request.args_bytes, request.workers = args.data, len(args.data), options.num_workers()
    if checking:
        known = _known_arrays(args, buffers, const_buffers)
        request.num_buffers, request.buffers = len(known), _ranges(known)
        return functools.partial(_launch_checked, plan, args, kernel, request, [name for name, _, _ in known])
    ca_launch, by_reference = kernel.executor.ca_launch, ctypes.byref(request)

    def run():
        error = _Error()
        _drive(plan, args, (), kernel, ca_launch, by_reference, error)

    return run


@functools.lru_cache(maxsize=1024)
def _request(entry, grid, block, shared_bytes, schedule, seed, checking):
    """Bytes of the _Launch of a kernel without what each call has of its own."""
    return bytes(_Launch(entry, None, 0, grid, block, shared_bytes, 0, _SCHEDULES[schedule], seed, checking, checking))


def _launch_nothing():
    """A launch of no blocks."""


def _launch_checked(plan, args, kernel, request, names):
    """Launch in the checking mode; `names` are those of the memory it may touch."""
    collected = _counters.get()
    if collected is None:
        request.counters = None
    else:
        counts = _Counters(per_buffer=(_BufferCounters * (len(names) + 1))(),
                           shared=(_SharedCounters * _MAX_INSTRUCTIONS)(), num_shared=_MAX_INSTRUCTIONS)
        request.counters = ctypes.pointer(counts)
    _drive(plan, args, names, kernel, kernel.executor.ca_launch, request, _Error())
    if collected is not None:
        instructions = counts.shared[:min(counts.num_shared, _MAX_INSTRUCTIONS)]
        collected.append(report.collect(plan, names, kernel.path, counts, instructions))


def _drive(plan, args, names, kernel, ca_launch, request, error):
    """Run `request` to its end; `names` are those of the arrays the executor may name in `error`."""
    try:
        code = ca_launch(request, error)
        while code == 2:
            code = kernel.executor.ca_resume(error)
    except BaseException:   # KeyboardInterrupt between two time slices
        kernel.executor.ca_abandon()
        reset_counters(args)
        raise
    if code == 1:
        reset_counters(args)
        raise report.explain(plan, names, kernel.path, error)


def reset_counters(args):
    """What an aborted launch has counted: only one that gets to its end leaves zeros, which the next one needs."""
    for leaf, array in args.arrays:
        if leaf.path.endswith("counters"):
            array[...] = 0


def _known_arrays(args, buffers, const_buffers):
    """(name, array, whether it may be written) of all memory of a launch."""
    return [*((leaf.path, array, not leaf.read_only) for leaf, array in args.arrays),
            *((f"buffers[{i}]", array, True) for i, array in enumerate(buffers)),
            *((f"const_buffers[{i}]", array, False) for i, array in enumerate(const_buffers))]


def _ranges(known):
    """The address ranges of `known` as the executor takes them."""
    ranges = (_Buffer * len(known))()
    for i, (_, array, writeable) in enumerate(known):
        low, high = np.lib.array_utils.byte_bounds(array)
        ranges[i] = _Buffer(low, high - low, writeable, i)
    return ranges
