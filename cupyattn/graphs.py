# SPDX-License-Identifier: Apache-2.0
"""A step captured once and replayed while its inputs change: a CUDA graph for CuPy, bound launches for NumPy.

`capture` is for a step that is always the same, `BoundSteps` for calls among which earlier ones recur.
"""

import contextlib
import sys

import numpy as np

from .errors import CaptureError
from .runtime import arch_of, cpu, env
from .runtime.bound import in_order
from .runtime.capturing import taping
from .runtime.launch import is_watched, scratch_owner, take_blocks
from .runtime.structs import address


class Graph:
    """The launches of a step, to be replayed. From `capture`.

    Keeps alive what its launches use, scratch included; to be kept until its last replay is done. A context manager.

    Attributes
    ----------
    launches : tuple
        `Bound` launches and calls of other libraries, in order.
    result
        What the step returned: arrays that every replay writes anew.
    """

    def __init__(self, launches, result, replay, kept=()):
        self.launches, self.result = launches, result
        self._replay, self._kept = replay, kept

    def replay(self):
        """Launch the step again on what its arrays hold now; returns `result`.

        CuPy: asynchronous on the current stream. Nothing is checked: lengths, page ids and positions out of range read
        and write other memory in NumPy arrays, and are ignored or garbage in CuPy arrays as in the ops.
        """
        if self._replay is None:
            raise ValueError("Graph: it must not be used after close(), got a replay")
        self._replay()
        return self.result

    def close(self):
        """Let go of the step, its arrays and its scratch."""
        self.launches, self.result, self._replay, self._kept = (), None, None, ()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        if self._replay is None:
            return "Graph(closed)"
        return f"Graph({len(self.launches)} launches: {', '.join(map(_name, self.launches))})"


def capture(step, *args, xp=None, warmups=2):
    """Run a step to warm it up, then capture its launches for `Graph.replay`.

    Parameters
    ----------
    step : callable
        ``step(*args)`` launches ops; nothing else it does is replayed, so all that changes from step to step must
        stand in arrays that are changed in place: inputs, lengths, page tables, positions. Lengths must be read on the
        device: ``schedule(lengths, out=made, ...)`` inside the step, `made` before with ``max_k_len=``.
    *args
        Handed to `step`.
    xp : module, optional
        numpy or cupy. Default: the kind of the first array among `args`, else numpy.
    warmups : int
        How often `step` is run before; its effects on the arrays are those of as many steps. The last run makes the
        arrays of the replays: what it allocates the capture gets again, in the same order. So all that is made once
        only, compiled kernels and workspaces, must be made by the runs before. At least 1; default 2.

    Returns
    -------
    Graph

    Raises
    ------
    CaptureError
        While it was captured the step allocated what its last warm-up did not, read an array on the host, waited for
        the device, compiled a kernel, or launched on arrays that are not `xp`'s.

    Notes
    -----
    The capture itself changes no array. With CuPy it is that of the current stream, or where that is the default one,
    which cannot be captured, of a new one. Replays that may overlap, of one graph or of several captured by one thread
    on one stream, would share a workspace: do not overlap them, nor with eager ops of that thread on that stream.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> from cupyattn.graphs import capture
    >>> x, weight = np.ones((1, 8), np.float32), np.ones(8, np.float32)
    >>> graph = capture(cupyattn.rms_norm, x, weight)
    >>> x[:, 4:] = 7
    >>> graph.replay()
    array([[0.2, 0.2, 0.2, 0.2, 1.4, 1.4, 1.4, 1.4]], dtype=float32)
    >>> graph
    Graph(1 launches: rms_norm)
    """
    if isinstance(warmups, bool) or not isinstance(warmups, int) or warmups < 1:
        raise ValueError(f"capture: warmups must be an integer of at least 1, got {warmups!r}")
    xp = _module(args) if xp is None else xp
    if xp is np:
        return _capture_on_host(step, args, warmups)
    return _capture_on_device(xp, step, args, warmups)


def _module(args):
    """numpy or cupy, by the first array in `args`."""
    cupy = sys.modules.get("cupy")
    for arg in args:
        if isinstance(arg, np.ndarray):
            return np
        if cupy is not None and isinstance(arg, cupy.ndarray):
            return cupy
    return np


def _name(launch):
    return launch.plan.spec.kernel if hasattr(launch, "plan") else launch.name


def _capture_on_host(step, args, warmups):
    with taping("cpu"):
        for _ in range(warmups):
            step(*args)
    with taping("cpu", keep=True, capturing=True) as tape:
        result = step(*args)
    return Graph(tuple(tape.launches), result, in_order(tape.launches), (step, args))


def _capture_on_device(xp, step, args, warmups):
    stream = xp.cuda.get_current_stream()
    if stream.ptr not in (0, 1):
        return _capture_on_stream(xp, stream, step, args, warmups)
    before = stream.record()   # the default stream
    stream, scratch = xp.cuda.Stream(non_blocking=True), []
    stream.wait_event(before)
    try:
        return _capture_on_stream(xp, stream, step, args, warmups, scratch)
    finally:
        scratch += take_blocks(xp, stream)   # nobody else can use the stream


def _capture_on_stream(xp, stream, step, args, warmups, scratch=()):
    """Graph of a step captured on `stream`; the Graph keeps `scratch`, which may be filled later."""
    blocks = _Blocks(xp.cuda.get_allocator())
    with stream:
        with taping(arch_of(xp)):
            for _ in range(warmups - 1):
                step(*args)
            with xp.cuda.using_allocator(blocks.make):
                step(*args)
        stream.synchronize()
        with taping(arch_of(xp), keep=True, capturing=True) as tape, xp.cuda.using_allocator(blocks.reuse):
            graph, result = _captured(stream, step, args)
    blocks.check_all_used()
    return Graph(tuple(tape.launches), result, graph.launch, (stream, blocks, step, args, scratch))


def _captured(stream, step, args):
    """(cupy.cuda.Graph of what `step` enqueues on `stream`, what it returns)."""
    stream.begin_capture()
    try:
        result = step(*args)
        return stream.end_capture(), result
    except BaseException as error:
        with contextlib.suppress(Exception):   # the capture may be invalid
            stream.end_capture()
        if isinstance(error, RuntimeError) and not isinstance(error, CaptureError):   # CUDA's errors are
            raise CaptureError(f"capture: the step must only launch kernels, without reading arrays on the host or "
                               f"waiting for the device, got {error}") from error
        raise


class _Blocks:
    """Device memory of a warm-up, handed out again in the same order."""

    def __init__(self, allocator):
        self._allocator = allocator
        self._blocks = []   # (bytes, cupy.cuda.MemoryPointer)
        self._used = 0

    def make(self, size):
        """An allocator that keeps what it hands out."""
        block = self._allocator(size)
        self._blocks.append((size, block))
        return block

    def reuse(self, size):
        """An allocator of what `make` has handed out."""
        n, self._used = self._used, self._used + 1
        if n >= len(self._blocks) or self._blocks[n][0] != size:
            found = f"{self._blocks[n][0]} bytes" if n < len(self._blocks) else "none"
            raise CaptureError(f"capture: the step must allocate what its last warm-up allocated, got an allocation of "
                               f"{size} bytes where that had {found}; give outputs by out=, or more warmups")
        return self._blocks[n][1]

    def check_all_used(self):
        """The capture has asked for all of them: otherwise the warm-up made what something else may hold."""
        if self._used != len(self._blocks):
            raise CaptureError(f"capture: the step must allocate what its last warm-up allocated, got {self._used} of "
                               f"{len(self._blocks)} allocations; give more warmups")


class BoundSteps:
    """Steps that were run before are launched again without their Python.

    What an eager step costs on the host is nearly all in checks and in filling argument structs. Where it is called
    with the very arrays of earlier calls, only its bound launches are needed: the second call keeps them, and all later
    ones do nothing else. Keep the object with what the steps share, the metadata of a batch for instance, so that it
    does not outlive their arrays. Steps whose ranks are several GPUs of this process are refused by a `CaptureError`
    the second time; with a process for each GPU what ranks exchange is kept, too.

    Parameters
    ----------
    xp : module
        numpy or cupy: of the steps' arrays.
    most : int
        Steps remembered; with one more the oldest is dropped.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> from cupyattn.graphs import BoundSteps, place
    >>> weight, out, steps = np.ones(8, np.float32), np.empty((1, 8), np.float32), BoundSteps(np)
    >>> def norm(x):
    ...     return steps.run((place(x),), lambda: cupyattn.rms_norm(x, weight, eps=0.0, out=out))
    >>> x = np.ones((1, 8), np.float32)
    >>> for _ in range(2):
    ...     print(norm(x))
    [[1. 1. 1. 1. 1. 1. 1. 1.]]
    [[1. 1. 1. 1. 1. 1. 1. 1.]]
    >>> x[:, 4:] = 7
    >>> norm(x)
    array([[0.2, 0.2, 0.2, 0.2, 1.4, 1.4, 1.4, 1.4]], dtype=float32)
    """

    def __init__(self, xp, most=256):
        self._xp, self._most = xp, most
        self._steps = {}   # key -> (launches, result), or None after its first call

    def run(self, key, step):
        """The result of ``step()``, or when `key` is that of two earlier calls, of its launches run again.

        Parameters
        ----------
        key : tuple
            All that the launches depend on but the contents of arrays: `place` of every array that may be another one,
            and every option. Objects in it, and all arrays of the launches, are kept alive.
        step : callable
            Launches ops; as in `capture`, nothing else it does is done again, unless under ``CUPYATTN_CHECK=1`` or
            where ``CUPYATTN_DEBUG`` names launches. So its checks of contents are not: NumPy arrays of lengths and page
            ids must be right.

        Returns
        -------
        What `step` returned the second time: an array that it made then is written again.
        """
        return self.run_prepared(key, lambda: step)

    def run_prepared(self, key, prepare):
        """`run` of the function that ``prepare()`` returns; what `prepare` itself does is no part of the step."""
        if is_watched() or env.check() or env.debug() >= 2:
            return prepare()()
        xp = self._xp
        key = key, cpu.current_settings() if xp is np else None, scratch_owner(xp)
        known = self._steps.get(key, ())
        if known == ():
            result = prepare()()
            if len(self._steps) >= self._most:
                for oldest in list(self._steps)[:1]:   # a copy: other threads add to it
                    self._steps.pop(oldest, None)
            self._steps[key] = None
            return result
        if known is None:
            step = prepare()
            with taping(arch_of(xp), keep=True) as tape:
                result = step()
            self._steps[key] = in_order(tape.launches), result
            return result
        run, result = known
        run()
        return result


def place(array):
    """What a launch depends on of an array, its contents apart; None of None."""
    return None if array is None else (address(array), array.shape, array.strides, array.dtype)
