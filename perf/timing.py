# SPDX-License-Identifier: Apache-2.0
"""Time per call on the device the kernels run on.

GPU: calls are captured into one CUDA graph over rotating copies of their arrays (together four times the L2 cache, so
every call finds it cold) and timed by CUDA events, launch overhead excluded (but for products by CuPy, which it
does not capture). CPU executor: plain calls and ``perf_counter``, warm, Python's overhead included.
"""

import functools
import statistics
import time

import numpy as np


class CpuExecutor:
    """NumPy arrays; the label says that no GPU was involved."""

    name = "cpu executor"
    is_gpu = False
    xp = np
    array = staticmethod(np.array)
    numpy = staticmethod(np.asarray)
    now = staticmethod(time.perf_counter)

    def copies(self, nbytes):
        """Argument sets to rotate over."""
        return 1

    def repeated(self, call, sets, calls):
        """A function that makes `calls` calls over the rotating `sets`."""
        def run():
            for i in range(calls):
                call(*sets[i % len(sets)])
        return run

    def calls_for(self, seconds):
        """Calls per timed round for a call of `seconds`: a round of about 5 ms."""
        return max(1, min(200, round(5e-3 / max(seconds, 1e-7))))


class Gpu:
    """CuPy arrays on the current device."""

    is_gpu = True

    def __init__(self, cupy):
        self.xp = cupy
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        self.name = properties["name"].decode()
        self.num_sms = properties["multiProcessorCount"]
        self._l2_bytes = properties["l2CacheSize"]
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._seconds, self._last = 0.0, None

    def array(self, a):
        return self.xp.asarray(a)

    def numpy(self, a):
        return a.get()

    def now(self):
        """A clock of device time: a CUDA event, waited for. Differences of single events would lose digits."""
        event = self.xp.cuda.Event()
        event.record(self._stream)
        event.synchronize()
        if self._last is not None:
            self._seconds += self.xp.cuda.get_elapsed_time(self._last, event) * 1e-3
        self._last = event
        return self._seconds

    def copies(self, nbytes):
        free = self.xp.cuda.runtime.memGetInfo()[0]
        return max(1, min(256, -(-4 * self._l2_bytes // max(nbytes, 1)), free // (2 * max(nbytes, 1))))

    def repeated(self, call, sets, calls):
        self.xp.cuda.runtime.deviceSynchronize()   # copies of the sets may be under way on the default stream
        with self._stream:
            call(*sets[0])   # compiled and allocated before the capture
            self._stream.synchronize()
            self._stream.begin_capture()
            try:
                for i in range(calls):
                    call(*sets[i % len(sets)])
            except NotImplementedError:   # CuPy's own products are not captured
                self._stream.end_capture()
                return functools.partial(self._loop, call, sets, calls)
            graph = self._stream.end_capture()
            graph.upload()

        def run():
            graph.launch(self._stream)
        return run

    def _loop(self, call, sets, calls):
        """The calls one by one, launch overhead included where the GPU waits for it."""
        with self._stream:
            for i in range(calls):
                call(*sets[i % len(sets)])

    def calls_for(self, seconds):
        """Calls per graph: about 2 ms, so that the graph's own launch (some 10 µs) stays below a percent.

        At least 4: over fewer copies of their arrays calls would not find them cold.
        """
        return max(4, min(400, round(2e-3 / max(seconds, 1e-6))))


def find_device():
    """The GPU when CuPy sees one, else the CPU executor."""
    try:
        import cupy
    except ImportError:
        return CpuExecutor()
    return Gpu(cupy) if cupy.cuda.is_available() else CpuExecutor()


DEVICE = find_device()


def seconds_per_call(call, sets, rounds=10):
    """Median time of one call over `rounds` rounds on the device."""
    start = DEVICE.now()
    DEVICE.repeated(call, sets, 1)()
    calls = DEVICE.calls_for(DEVICE.now() - start)
    run = DEVICE.repeated(call, sets, calls)
    run()
    times = []
    for _ in range(rounds):
        start = DEVICE.now()
        run()
        times.append((DEVICE.now() - start) / calls)
    return statistics.median(times)
