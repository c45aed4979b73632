# SPDX-License-Identifier: Apache-2.0
"""One launch for every kernel, and what can stand around it: recording, profiling, compiling ahead."""

import contextlib
import contextvars
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

from . import cpu, cuda, env
from .bound import Bound, LibraryCall
from .capturing import tape

_recorder = contextvars.ContextVar("cupyattn_recorder", default=None)
_profiler = contextvars.ContextVar("cupyattn_profiler", default=None)
_host_workspaces = threading.local()
# (use, device, stream, thread) -> blocks, the newest last; an older one may be part of a captured graph, which is why
# they outlive their threads. A graph captured on a stream of its own takes that stream's
_gpu_workspaces = {}


def arch_of(xp):
    """``"cpu"`` for NumPy, the current device's ``"sm_90a"``-style name for CuPy."""
    if xp is np:
        return "cpu"
    return cuda.arch()


def launch(plan, args, *, buffers=(), const_buffers=()):
    """Run `plan`'s kernel: on the CPU executor before returning, or asynchronously on the current CuPy stream.

    Parameters
    ----------
    plan : Plan
    args : Args
        From `make_args`. Arrays behind its pointers are known to the launch.
    buffers, const_buffers : sequence of ndarray
        Arrays the kernel reaches only through addresses stored in other arrays: those it may write, and those it only
        reads. The checking mode knows their memory, and no other, and counts their traffic as ``buffers[0]``, ... On
        a GPU they must be on the current device.

    Notes
    -----
    On a GPU the launch holds no array until the kernel has run, nor need it: memory that CuPy's pool gets back is
    handed out again on the stream it was allocated on, behind the kernel. As ever with CuPy, an array allocated on
    one stream and used by a kernel on another must be kept until that kernel is done, and what a captured graph uses
    until its last replay.
    """
    if env.debug() >= 2:
        env.log.debug("launch %r", plan)
    recorded = _recorder.get()
    if recorded is not None:
        recorded.setdefault(plan.spec, plan.arch)
        return
    under_capture = tape()
    if under_capture is not None:
        under_capture.add(Bound(plan, args, buffers, const_buffers), plan.arch == "cpu")
        return
    run = cpu.launch if plan.arch == "cpu" else cuda.launch
    profile = _profiler.get()
    if profile is None:
        run(plan, args, buffers, const_buffers)
    else:
        profile.add(plan.spec.kernel, plan.arch, lambda: run(plan, args, buffers, const_buffers))


def run_library(name, arch, run):
    """Call `run`, which has another library work on the current stream, where `launch` would launch a kernel.

    It does not run while recording, is kept as a launch is while a step is captured, and is profiled as a kernel called
    `name`; `arch` is "cpu" or anything else.
    """
    if env.debug() >= 2:
        env.log.debug("launch %s", name)
    if _recorder.get() is not None:
        return
    under_capture = tape()
    if under_capture is not None:
        under_capture.add(LibraryCall(name, run), arch == "cpu")
        return
    profile = _profiler.get()
    if profile is None:
        run()
    else:
        profile.add(name, arch, run)


def on_host(name, run):
    """Call `run`, which computes in NumPy and may launch; while a step is captured it is kept as launches are."""
    under_capture = tape()
    if under_capture is None:
        run()
    else:
        under_capture.add(LibraryCall(name, run), True)


def is_watched():
    """Whether something stands around launches here: a recording, a profile or a capture."""
    return _recorder.get() is not None or _profiler.get() is not None or tape() is not None


@contextlib.contextmanager
def recording():
    """Collect what would be launched without compiling or running anything.

    Yields a dict ``{Specialisation: arch}``. Outputs of ops called inside hold garbage.
    """
    wanted = {}
    token = _recorder.set(wanted)
    try:
        yield wanted
    finally:
        _recorder.reset(token)


def compile_all(specs, arch, progress=None):
    """Compile `specs` for `arch` in parallel; kernels already in the cache cost next to nothing.

    Parameters
    ----------
    specs : iterable of Specialisation
    arch : str
        ``"cpu"`` or ``"sm_90a"`` and the like.
    progress : callable, optional
        ``progress(done, total, spec)`` after each kernel.
    """
    specs = list(dict.fromkeys(specs))
    build = _compiler(arch)
    with ThreadPoolExecutor(max(1, min(len(specs), os.cpu_count() or 1))) as pool:
        jobs = {pool.submit(build, spec): spec for spec in specs}
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                if progress is not None:
                    progress(done, len(specs), jobs[job])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)   # a failure or Ctrl-C does not wait for the rest
            raise


def compile_first(plans):
    """Compile the kernels of `plans`, so that none of their launches does once another has been made."""
    if _recorder.get() is None:
        for plan in plans:
            _compiler(plan.arch)(plan.spec)


def _compiler(arch):
    """Function of a Specialisation that compiles it for `arch`, once."""
    if arch == "cpu":
        return cpu.compiler_for_current_settings()
    return cuda.compiler_for(arch)


class Profile:
    """Time and launch count per kernel, filled while `profiling()` is active."""

    def __init__(self):
        self._pending = []
        self._seconds = {}
        self._launches = {}

    def add(self, name, arch, run):
        self._launches[name] = self._launches.get(name, 0) + 1
        if arch == "cpu":
            start = time.perf_counter()
            run()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
        else:
            self._pending.append((name, cuda.timed(run)))

    def rows(self):
        """List of (kernel, launches, seconds), longest first. Waits for the GPU."""
        for name, elapsed in self._pending:
            self._seconds[name] = self._seconds.get(name, 0.0) + elapsed()
        self._pending.clear()
        return sorted(((n, self._launches[n], s) for n, s in self._seconds.items()), key=lambda r: -r[2])


@contextlib.contextmanager
def profiling():
    """Measure every launch inside; yields a Profile."""
    profile = Profile()
    token = _profiler.set(profile)
    try:
        yield profile
    finally:
        _profiler.reset(token)


def workspace(xp, nbytes):
    """Scratch of at least `nbytes`, shared by all ops of this thread (NumPy), on this device and stream (CuPy).

    uint8, 256-byte aligned, zeroed when it is made; what an op leaves in it is garbage to the next. A larger request
    makes a larger block; on a GPU the smaller ones stay, since a captured graph may write to them. So a graph must be
    replayed where nothing else uses its block meanwhile: on the stream that captured it or ordered with it, and not
    while the thread that captured it is inside an op on that stream.

    Raises
    ------
    RuntimeError
        The current stream captures a graph, and this thread has no block as large for it: memory made then would have
        its zeros only once the graph is launched.
    """
    return _block(xp, "workspace", nbytes)


def layer_workspace(xp, nbytes, use="layer"):
    """Scratch as `workspace`, for what a layer keeps from one op to the next: a block for each `use`, none the ops'."""
    return _block(xp, use, nbytes)


def arrival_counters(xp, count):
    """int32 [count or more], all zero, for kernels that count arrivals and reset what they have counted.

    Shared as a workspace is, but by those kernels only. Who makes several launches that count together must put them
    back to zero when it does not get to the last one.
    """
    found = _block(xp, "counters", 4 * count).view(np.int32)
    if xp is np:
        found[:count] = 0   # an aborted launch has counted some arrivals
    return found


def take_blocks(xp, stream):
    """The blocks made so far on a stream of the current device, which are its ops' no more: a list of uint8 arrays."""
    of_stream = xp.cuda.runtime.getDevice(), stream.ptr
    return [block for key in list(_gpu_workspaces) if key[1:3] == of_stream for block in _gpu_workspaces.pop(key)]


def scratch_owner(xp):
    """(device, stream, thread) whose scratch and counters launches from here use, which those of others overlap."""
    if xp is np:
        return None, None, threading.get_ident()
    return xp.cuda.runtime.getDevice(), xp.cuda.get_current_stream().ptr, threading.get_ident()


def _block(xp, use, nbytes):
    """uint8 block of at least `nbytes` of this thread, on a GPU of this device and stream; zeroed when it is made."""
    if xp is np:
        blocks = _host_workspaces.__dict__.setdefault(use, [])
    else:
        stream = xp.cuda.get_current_stream()
        blocks = _gpu_workspaces.setdefault((use, *scratch_owner(xp)), [])
    if not blocks or blocks[-1].size < nbytes:
        size = 1 << max(16, (nbytes - 1).bit_length())
        if xp is np:
            raw = np.zeros(size + 256, np.uint8)
            start = -raw.__array_interface__["data"][0] % 256
            blocks[:] = [raw[start:start + size]]
        elif stream.ptr and stream.is_capturing():
            raise RuntimeError(f"workspace: {nbytes} bytes must be there before a graph is captured; call the op once, "
                               "with arrays of these shapes, on the same stream and from the same thread before "
                               "begin_capture()")
        else:
            blocks.append(xp.zeros(size, np.uint8))
    return blocks[-1]
