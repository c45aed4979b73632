# SPDX-License-Identifier: Apache-2.0
"""Memory, copies, devices, streams and graphs of the CuPy stand-in (see standin.py).

Functions here have the names and parameters of the CuPy calls they stand for; a parameter that means nothing on the
host is ignored.
"""

import collections
import ctypes
import operator
import threading
import time
import weakref

import cupy
import numpy as np

GUARD = 64                       # bytes on both sides of every allocation that must stay as they are
SHARED_LIMIT = 227 * 1024        # bytes of shared memory a block can opt in to


class State:
    """What a driver would know; one per `install`."""

    def __init__(self, capability, devices):
        self.capability = capability
        self.devices = devices
        self.events = collections.Counter()   # allocations, copies, synchronizations, launches
        self.memory = weakref.WeakValueDictionary()   # address: Block, of live allocations
        self.overruns = []
        self.thread = threading.local()


state = None    # a State while the stand-in is installed


def error(text):
    return RuntimeError(f"stand-in: {text}")


# ---- memory ----------------------------------------------------------------------------------------------

class Block:
    """One allocation: `size` bytes full of NaN between two guards, 256-byte aligned."""

    def __init__(self, size):
        self._raw = np.full(size + 2 * GUARD + 256, 0xFF, np.uint8)
        start = GUARD + -(self._raw.ctypes.data + GUARD) % 256
        self.bytes = self._raw[start:start + size]
        self.address = self._raw.ctypes.data + start
        self._guards = self._raw[start - GUARD:start], self._raw[start + size:start + size + GUARD]
        for guard in self._guards:
            guard[:] = 0xA5
        self._overruns = state.overruns

    def check(self):
        if any((guard != 0xA5).any() for guard in self._guards):
            self._overruns.append(self.bytes.size)

    __del__ = check


def allocate(size):
    """An allocator for cupy.cuda.set_allocator; refused during graph capture, where CUDA may have to allocate, too."""
    refuse_in_capture(f"allocating {size} bytes")
    state.events["allocations"] += 1
    block = Block(size)
    state.memory[block.address] = block
    memory = cupy.cuda.UnownedMemory(block.address, size, block, runtime_getDevice())
    return cupy.cuda.MemoryPointer(memory, 0)


def host(array):
    """NumPy array over the memory of a CuPy array."""
    memory = array.data.mem
    return np.ndarray(array.shape, array.dtype, (ctypes.c_uint8 * memory.size).from_address(memory.ptr),
                      array.data.ptr - memory.ptr, array.strides)


def refuse_in_capture(call):
    """A capture under way on the current stream does not survive `call`."""
    stream = get_current_stream()
    if stream.is_capturing():
        stream._invalid = True
        raise error(f"cudaErrorStreamCaptureUnsupported: {call} during graph capture")


def waiting(call, what="copies"):
    """Count something the host waits for; refused during graph capture."""
    refuse_in_capture(call)
    state.events[what] += 1


def new(values):
    """CuPy array with the content of a NumPy array."""
    made = cupy.empty(values.shape, values.dtype)
    host(made)[...] = values
    return made


# methods of cupy.ndarray

def ndarray_get(self, stream=None, order="C", out=None, blocking=True):
    waiting("ndarray.get")
    if out is None:
        return host(self).copy(order)
    out[...] = host(self)
    return out


def ndarray_set(self, arr, stream=None):
    if not isinstance(arr, np.ndarray):
        raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
    if self.dtype != arr.dtype:
        raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
    if self.shape != arr.shape:
        raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
    if not self.flags.c_contiguous and not self.flags.f_contiguous:
        raise RuntimeError("Cannot set to non-contiguous array")
    waiting("ndarray.set")
    host(self)[...] = arr


def ndarray_fill(self, value):
    enqueue(lambda: host(self).fill(value))


def ndarray_iadd(self, other):
    enqueue(lambda: np.add(host(self), host(other) if isinstance(other, cupy.ndarray) else other, out=host(self)))
    return self


def ndarray_astype(self, dtype, order="K", casting=None, subok=None, copy=True):
    made = cupy.empty(self.shape, dtype)
    enqueue(lambda: np.copyto(host(made), host(self), casting="unsafe"))
    return made


def ndarray_copy(self, order="C"):
    copied = cupy.empty(self.shape, self.dtype)
    enqueue(lambda: np.copyto(host(copied), host(self)))
    return copied


def ndarray_setitem(self, key, value):
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    target = self[key]
    enqueue(lambda: np.copyto(host(target), host(value) if isinstance(value, cupy.ndarray) else value))


def ndarray_operator(name):
    """An elementwise operator; its result is allocated, so none is captured."""
    function = getattr(operator, name)

    def method(self, other):
        return new(function(host(self), host(other) if isinstance(other, cupy.ndarray) else other))

    return method


def ndarray_repr(self):
    return f"stand-in {host(self)!r}"


@property
def ndarray_interface(self):
    """CUDA array interface, version 3; the stream is the default one."""
    strides = None if self.flags.c_contiguous else self.strides
    return {"shape": self.shape, "typestr": self.dtype.str, "descr": self.dtype.descr, "stream": 1, "version": 3,
            "strides": strides, "data": (self.data.ptr, False)}


@property
def ndarray_device(self):
    return Device(self.data.device_id)


# functions of the cupy module

def asarray(a, dtype=None, order=None, *, blocking=False):
    if isinstance(a, cupy.ndarray) and dtype in (None, a.dtype):
        return a
    interface = getattr(a, "__cuda_array_interface__", None)
    if interface is not None and not isinstance(a, cupy.ndarray):
        return _foreign(a, interface)
    waiting("asarray")
    return new(np.asarray(host(a) if isinstance(a, cupy.ndarray) else a, dtype))


def _foreign(owner, interface):
    """CuPy array over C-contiguous memory described by a CUDA array interface."""
    shape, dtype = interface["shape"], np.dtype(interface["typestr"])
    memory = cupy.cuda.UnownedMemory(interface["data"][0], int(np.prod(shape)) * dtype.itemsize, owner,
                                     runtime_getDevice())
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), interface.get("strides"))


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0):
    waiting("array")
    return new(np.array(host(obj) if isinstance(obj, cupy.ndarray) else obj, dtype, ndmin=ndmin))


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get() if isinstance(a, cupy.ndarray) else np.asarray(a)


def arange(start, stop=None, step=1, dtype=None):
    return new(np.arange(*((0, start) if stop is None else (start, stop)), step, dtype))


def ascontiguousarray(a, dtype=None):
    same = isinstance(a, cupy.ndarray) and a.flags.c_contiguous and dtype in (None, a.dtype)
    return a if same else array(a, dtype)


def full(shape, fill_value, dtype=None, order="C"):
    made = cupy.empty(shape, np.asarray(fill_value).dtype if dtype is None else dtype)
    ndarray_fill(made, fill_value)
    return made


def zeros(shape, dtype=float, order="C"):
    return full(shape, 0, dtype)


def take_along_axis(a, indices, axis):
    return new(np.take_along_axis(host(a), host(indices) % a.shape[axis], axis))   # CuPy wraps, too


def where(condition, x, y):
    return new(np.where(*(host(a) if isinstance(a, cupy.ndarray) else a for a in (condition, x, y))))


def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    return full(a.shape if shape is None else shape, 0, a.dtype if dtype is None else dtype)


def copyto(dst, src, casting="same_kind", where=None):
    enqueue(lambda: np.copyto(host(dst), host(src) if isinstance(src, cupy.ndarray) else src))


# ---- devices ---------------------------------------------------------------------------------------------

def runtime_getDevice():
    return getattr(state.thread, "device", 0)


def runtime_setDevice(device):
    if not 0 <= device < state.devices:
        raise error(f"cudaErrorInvalidDevice: {device}")
    state.thread.device = device


def runtime_getDeviceCount():
    return state.devices


def runtime_deviceGetAttribute(attribute, device):
    runtime = cupy.cuda.runtime
    return {runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin: SHARED_LIMIT,
            runtime.cudaDevAttrMultiProcessorCount: 132}[attribute]


def runtime_getDeviceProperties(device):
    return {"name": b"stand-in", "multiProcessorCount": 132, "sharedMemPerBlockOptin": SHARED_LIMIT,
            "major": int(state.capability[:-1]), "minor": int(state.capability[-1]), "totalGlobalMem": 2**34,
            "l2CacheSize": 2**16}


def runtime_deviceSynchronize():
    waiting("deviceSynchronize", "synchronizations")


class Device:
    """cupy.cuda.Device of a pretended GPU."""

    def __init__(self, device=None):
        self.id = runtime_getDevice() if device is None else int(device)

    @property
    def compute_capability(self):
        return state.capability

    def use(self):
        runtime_setDevice(self.id)

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return self.id == int(other)

    def __hash__(self):
        return hash(self.id)

    def __enter__(self):
        stack = state.thread.__dict__.setdefault("devices", [])
        stack.append(runtime_getDevice())
        self.use()
        return self

    def __exit__(self, *exc):
        runtime_setDevice(state.thread.devices.pop())

    def synchronize(self):
        runtime_deviceSynchronize()


# ---- streams, events, graphs -----------------------------------------------------------------------------

class Stream:
    """cupy.cuda.Stream; work is done when it is enqueued, or recorded while the stream captures."""

    _next = 1000

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr = 0
        if not null:
            Stream._next += 1
            self.ptr = Stream._next
        self._recorded = None   # work of a capture under way
        self._invalid = False

    def use(self):
        state.thread.stream = self
        return self

    def __enter__(self):
        state.thread.__dict__.setdefault("streams", []).append(get_current_stream())
        return self.use()

    def __exit__(self, *exc):
        state.thread.streams.pop().use()

    def synchronize(self):
        waiting("Stream.synchronize", "synchronizations")

    def record(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        pass

    def is_capturing(self):
        return self._recorded is not None

    def begin_capture(self, mode=None):
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self._recorded = []

    def end_capture(self):
        recorded, invalid, self._recorded, self._invalid = self._recorded, self._invalid, None, False
        if invalid:
            raise error("cudaErrorStreamCaptureInvalidated")
        return Graph(recorded)


Stream.null = Stream(null=True)


def get_current_stream(device_id=-1):
    return getattr(state.thread, "stream", Stream.null)


def enqueue(work):
    """Do `work` now, or record it when the current stream captures."""
    stream = get_current_stream()
    if stream.is_capturing():
        stream._recorded.append(work)
    else:
        work()


class Graph:
    """cupy.cuda.Graph: the launches of a captured stream, replayed by `launch`."""

    def __init__(self, recorded):
        self._recorded = recorded

    def launch(self, stream=None):
        for work in self._recorded:
            work()

    def upload(self, stream=None):
        pass


class Event:
    """cupy.cuda.Event."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.time = None

    def record(self, stream=None):
        self.time = time.perf_counter()

    def synchronize(self):
        waiting("Event.synchronize", "synchronizations")

    @property
    def done(self):
        return True


def get_elapsed_time(start, end):
    return (end.time - start.time) * 1e3
