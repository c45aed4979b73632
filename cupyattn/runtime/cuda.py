# SPDX-License-Identifier: Apache-2.0
"""The GPU back end: compiles a `.cu` through ``cupy.RawModule`` and launches it on the current CuPy stream.

CuPy keeps the compiled kernels in its own folder (``CUPY_CACHE_DIR``). Its key covers the text of the `.cu` and the
options but no included header, so the digest of the include closure is one of the options. Our cache folder holds a
marker per kernel that CuPy has compiled there: what `CUPYATTN_FORBID_COMPILE` and `cache_hits` go by.
"""

import functools
import hashlib
import os
import re
import shlex
import threading
import time
from pathlib import Path

from ..errors import CompileError
from . import env, source
from .capturing import refuse_to_compile

_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_BLOCK_LIMITS = (1024, 1024, 64)


def arch():
    """``"sm_80"``, ``"sm_90a"``, ... : what kernels for the current device are compiled for."""
    import cupy

    return _arch(cupy.cuda.runtime.getDevice())


@functools.lru_cache(maxsize=64)
def _arch(device):
    import cupy

    capability = cupy.cuda.Device(device).compute_capability
    # from Hopper on, wgmma, TMA and their successors exist only in the architecture-specific target
    return f"sm_{capability}a" if int(capability) >= 90 else f"sm_{capability}"


def options(spec, arch):
    """The options ``cupy.RawModule`` gets for `spec`; CuPy appends its own (tests/nvrtc.py lists them).

    CuPy appends ``-arch=sm_90`` for a Hopper GPU; an earlier ``-arch=sm_90a`` of the same number wins. That order is
    undocumented and pinned by a test.
    """
    digest = source.digest(source.path(spec.source), False)
    specific = (f"-arch={arch}",) if arch[-1].isalpha() else ()
    return ("-std=c++17", "-lineinfo", *(f"-I{folder}" for folder in source.include_dirs(cpu=False)),
            *spec.defines(), f"-DCA_SOURCE_HASH=0x{digest}", *specific)


def code(spec):
    """Text of the `.cu`, with a first line that makes messages and profilers name the file."""
    file = source.path(spec.source)
    return f'#line 1 "{file}"\n{file.read_text()}'


# ---- compiling -------------------------------------------------------------------------------------------

_kernels = {}
_hits = [0, 0]
_locks = {}
_lock = threading.Lock()


def kernel(spec, device):
    """The ``cupy.RawKernel`` of `spec` on `device`; one compilation however many threads ask.

    Raises
    ------
    cupyattn.CompileError
        NVRTC refused the source (the message holds its first errors and the options), the device is too old for the
        kernel, or compiling is forbidden.
    """
    key = (spec, device)
    found = _kernels.get(key)
    if found is not None:
        return found
    refuse_to_compile(spec)
    with _lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        found = _kernels.get(key)
        if found is None:
            found = _kernels[key] = _compile(spec, device)
    return found


def compiler_for(arch_name):
    """Function of a Specialisation that compiles it for the current device, to be called from any thread."""
    import cupy

    if arch_name != arch():
        raise ValueError(f"compile_all: arch must be {arch()!r}, the current device's, got {arch_name!r}")
    device = cupy.cuda.runtime.getDevice()
    return lambda spec: kernel(spec, device)


def cache_hits():
    """(kernels taken from CuPy's disk cache, kernels compiled) by this process."""
    return tuple(_hits)


def _compile(spec, device):
    import cupy

    target = _arch(device)
    if int(re.sub(r"\D", "", target)) < spec.min_sm:
        raise CompileError(f"{spec}: needs a GPU of compute capability {spec.min_sm / 10} or later, got {target}")
    flags = options(spec, target)
    marker = _marker(spec, flags)
    cached = marker.is_file()
    if env.forbid_compile() and not cached:
        raise CompileError(f"{spec} was not compiled before ({marker} is missing), and CUPYATTN_FORBID_COMPILE=1 "
                           "forbids compiling it")
    start = time.perf_counter()
    try:
        with cupy.cuda.Device(device):
            module = cupy.RawModule(code=code(spec), options=flags, backend="nvrtc")
            compiled = module.get_function(spec.kernel)
    except cupy.cuda.compiler.CompileException as error:
        raise _explain(spec, flags, error) from None
    _hits[not cached] += 1
    if not cached:
        _write(marker, "\n".join(flags))
    if env.debug() >= 1:
        env.log.debug("%s %s for %s in %.2f s: %d registers, %d bytes static shared, %d bytes local memory per thread",
                      "loaded" if cached else "compiled", spec, target, time.perf_counter() - start,
                      compiled.num_regs, compiled.shared_size_bytes, compiled.local_size_bytes)
    if env.debug() >= 3:
        env.log.debug("options: %s", shlex.join(flags))
    return compiled


def _marker(spec, flags):
    """File that says CuPy's cache folder holds this kernel, compiled by this NVRTC."""
    import cupy

    folder = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    key = repr((flags, code(spec), cupy.__version__, cupy.cuda.nvrtc.getVersion(), folder))
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return env.cache_dir() / "cuda" / f"{spec.kernel}.{digest}"


def _write(path, text):
    """Write a file so that other processes see all of it or nothing; a full disk costs only the marker."""
    temporary = Path(f"{path}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        env.log.debug("cannot write %s: %s", path, error)


def _explain(spec, flags, error):
    lines = str(error).splitlines()
    first = [line for line in lines if "error" in line][:8] or lines[:8]
    return CompileError(f"{spec}: NVRTC failed\n  " + "\n  ".join(first) +
                        f"\n  source: {source.path(spec.source)}\n  options: {shlex.join(flags)}")


# ---- launching -------------------------------------------------------------------------------------------

_prepared = {}


def launch(plan, args, buffers=(), const_buffers=()):
    """Enqueue `plan`'s kernel on the current stream of the current device and return at once.

    `buffers` and `const_buffers` are arrays beside those of `args`: only their device is looked at.
    """
    if 0 in plan.grid:
        return
    compiled, _ = _checked(plan, args, buffers, const_buffers)
    compiled(plan.grid, plan.block, (args.record(),), shared_mem=plan.shared_bytes)


def bind(plan, args, buffers=(), const_buffers=()):
    """A function without arguments that does what `launch` does, on the device that is current now."""
    if 0 in plan.grid:
        return lambda: None
    import cupy

    compiled, device = _checked(plan, args, buffers, const_buffers)
    grid, block, shared_bytes, arguments = plan.grid, plan.block, plan.shared_bytes, (args.record(),)
    current = cupy.cuda.runtime.getDevice

    def run():
        if current() != device:
            raise ValueError(f"{plan.spec.kernel}: a bound launch for device {device} must run there, the current "
                             f"device is {current()}; use `with cupy.cuda.Device({device}):`")
        compiled(grid, block, arguments, shared_mem=shared_bytes)

    return run


def _checked(plan, args, buffers, const_buffers):
    """(The compiled kernel of `plan`, the current device), which all arrays are on."""
    import cupy

    device = cupy.cuda.runtime.getDevice()
    compiled = _prepared.get((plan, device))
    if compiled is None:
        compiled = _prepared[plan, device] = _prepare(plan, device)
    if _device_count() == 1:
        return compiled, device
    for leaf, array in args.arrays:
        if array.data.device_id != device:
            raise _wrong_device(plan, leaf.path, array, device)
    for name, arrays in (("buffers", buffers), ("const_buffers", const_buffers)):
        for i, array in enumerate(arrays):
            if array.data.device_id != device:
                raise _wrong_device(plan, f"{name}[{i}]", array, device)
    return compiled, device


@functools.cache
def _device_count():
    import cupy

    return cupy.cuda.runtime.getDeviceCount()


def _wrong_device(plan, name, array, device):
    found = array.data.device_id
    return ValueError(f"{plan.spec.kernel}: {name} must be on the current device {device}, got an array on device "
                      f"{found}; use `with cupy.cuda.Device({found}):`")


def _prepare(plan, device):
    """The compiled kernel of `plan`, its launch shape checked and its shared memory opted in."""
    _check_shape(plan, "grid", plan.grid, _GRID_LIMITS)
    _check_shape(plan, "block", plan.block, _BLOCK_LIMITS)
    if plan.arch != _arch(device):
        raise ValueError(f"{plan.spec.kernel}: the plan is for {plan.arch}, the current device {device} is "
                         f"{_arch(device)}; make the plan while that device is current")
    compiled = kernel(plan.spec, device)
    threads = plan.block[0] * plan.block[1] * plan.block[2]
    if threads > compiled.max_threads_per_block:
        raise ValueError(f"{plan.spec.kernel}: {threads} threads per block are more than the "
                         f"{compiled.max_threads_per_block} the kernel can run with")
    static, limit = compiled.shared_size_bytes, _shared_limit(device)
    if static + plan.shared_bytes > limit:
        raise ValueError(f"{plan.spec.kernel}: {plan.shared_bytes} bytes of dynamic and {static} of static shared "
                         f"memory are more than the {limit} a block can have on device {device}")
    with _lock:   # 48 KiB less the static part unless asked for; another plan of the kernel may have asked for more
        if compiled.max_dynamic_shared_size_bytes < plan.shared_bytes:
            compiled.max_dynamic_shared_size_bytes = plan.shared_bytes
    return compiled


def _check_shape(plan, name, shape, limits):
    if any(not 0 < n <= limit for n, limit in zip(shape, limits, strict=True)):
        raise ValueError(f"{plan.spec.kernel}: {name} must be within {limits}, got {shape}; plan {plan!r}")


@functools.lru_cache(maxsize=64)
def _shared_limit(device):
    import cupy

    runtime = cupy.cuda.runtime
    return runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device)


def timed(run):
    """Call `run` between two events; a function that waits for them and returns the seconds between."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    run()
    end.record()

    def elapsed():
        end.synchronize()
        return cupy.cuda.get_elapsed_time(start, end) * 1e-3

    return elapsed
