# SPDX-License-Identifier: Apache-2.0
"""CuPy without a GPU: real ``cupy.ndarray`` objects over host memory, kernels on the CPU executor.

``with install() as xp:`` replaces the CuPy calls listed in `REPLACED`, nothing else: allocation, copies, streams,
capture, device properties, cuBLAS, function launch, and the little arithmetic that masks and page tables need. A launch
first compiles the same source and options with NVRTC for the pretended GPU and enforces CuPy's and CUDA's rules. Any
other CuPy call that needs a driver fails, so code that passes its tests here uses our kernels and these calls alone.
test_cuda_backend.py checks each of them on a GPU too.
"""

import bisect
import contextlib
import ctypes
import importlib
import re
import struct
import sys
from unittest import mock

import cupy
import numpy as np
import nvrtc
import standin_blas
import standin_device as device

from cupyattn.runtime import Plan, Specialisation, blas, cpu, cuda
from cupyattn.runtime.structs import Args

SHARED_DEFAULT = 48 * 1024   # bytes of shared memory a block has without opting in


# ---- modules and launches --------------------------------------------------------------------------------

class RawModule:
    """cupy.RawModule: compiles with NVRTC for the pretended GPU, runs on the CPU executor."""

    def __init__(self, *, code=None, path=None, options=(), backend="nvrtc", translate_cucomplex=False,
                 enable_cooperative_groups=False, name_expressions=None, jitify=None):
        assert path is None and backend == "nvrtc" and name_expressions is None and isinstance(options, tuple)
        self.code = code
        self.options = options

    def get_function(self, name):
        device.refuse_in_capture(f"compiling {name}")
        compiled = nvrtc.compile_code(self.code, self.options, f"sm_{device.state.capability}")
        return RawKernel(self, name, nvrtc.resources(compiled, name))


class RawKernel:
    """A kernel of a RawModule, launched under CuPy's and CUDA's rules."""

    def __init__(self, module, name, resources):
        self.name = name
        self.max_threads_per_block = resources.max_threads
        self.shared_size_bytes = resources.static_shared_bytes
        self.num_regs = resources.registers
        self.local_size_bytes = resources.stack_bytes
        self._dynamic = SHARED_DEFAULT - resources.static_shared_bytes
        self._spec = _specialisation(module, name)

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._dynamic

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        if size + self.shared_size_bytes > device.SHARED_LIMIT:
            raise device.error(f"CUDA_ERROR_INVALID_VALUE: {size} bytes of dynamic shared memory")
        self._dynamic = size

    def __call__(self, grid, block, args, *, shared_mem=0):
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError("grid and block must be tuples")
        grid = tuple(max(1, n) for n in (*grid, 1, 1)[:3])    # as CuPy does: a zero grid launches one block
        block = tuple(max(1, n) for n in (*block, 1, 1)[:3])
        if any(n > limit for n, limit in zip(grid + block, (2**31 - 1, 65535, 65535, 1024, 1024, 64), strict=True)):
            raise device.error(f"CUDA_ERROR_INVALID_VALUE: grid {grid}, block {block}")
        if block[0] * block[1] * block[2] > self.max_threads_per_block:
            raise device.error(f"CUDA_ERROR_INVALID_VALUE: block {block}, at most {self.max_threads_per_block} threads")
        if shared_mem > self._dynamic:
            raise device.error(f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of dynamic shared memory, "
                               f"{self._dynamic} allowed; set max_dynamic_shared_size_bytes")
        values = [_argument(a) for a in args]
        expected = self._spec.layout.dtype.itemsize
        if [len(v) for v in values] != [expected]:
            raise device.error(f"{self.name} takes one struct of {expected} bytes, got arguments of "
                               f"{[len(v) for v in values]} bytes")
        plan = Plan(self._spec, "cpu", grid, block, shared_mem)
        device.state.events["launches"] += 1
        device.enqueue(lambda: cpu.launch(plan, _args(self._spec.layout, values[0])))


def _argument(value):
    """The bytes CuPy would hand to the driver for one kernel argument."""
    if isinstance(value, cupy.ndarray):
        return struct.pack("<Q", value.data.ptr)
    if value is None:
        return bytes(8)
    for kind, dtype in ((bool, np.bool_), (int, np.int64), (float, np.float64), (complex, np.complex128)):
        if type(value) is kind:   # Python numbers are as wide as NumPy's default
            return dtype(value).tobytes()
    if isinstance(value, np.generic):
        return value.tobytes()
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise TypeError(f"Unsupported type {type(value)}: NumPy arrays of size {value.size} cannot be passed")
        return ctypes.string_at(value.__array_interface__["data"][0], value.nbytes)
    raise TypeError(f"Unsupported type {type(value)}")


def _args(layout, data):
    """Args of a launch of which only the bytes are known; a pointer may reach the whole allocation it points into.

    So may the addresses in an array whose field is called ``..._ptrs``.
    """
    record = np.frombuffer(data, layout.dtype)[0]
    blocks = sorted(device.state.memory.values(), key=lambda block: block.address)
    starts = [block.address for block in blocks]

    def allocation(address):
        i = bisect.bisect(starts, address) - 1
        return blocks[i] if i >= 0 and address < starts[i] + blocks[i].bytes.size else None

    arrays = []
    for leaf in layout.leaves:
        if leaf.is_pointer:
            address = record[leaf.top]
            for name in leaf.sub:
                address = address[name]
            block = allocation(address)
            if block is None:
                continue
            arrays.append((leaf, block.bytes))
            if leaf.path.endswith("_ptrs"):
                start = int(address) - block.address
                held = block.bytes[start:start + (block.bytes.size - start) // 8 * 8].view(np.int64)
                reached = {id(b): b for b in map(allocation, held) if b is not None}
                arrays += [(leaf._replace(read_only=False, sub=(*leaf.sub, str(n))), b.bytes)
                           for n, b in enumerate(reached.values())]
    return Args(layout, data, arrays)


def _specialisation(module, kernel):
    """The Specialisation whose source and options a RawModule was made from."""
    file, text = re.fullmatch(r'#line 1 "([^"]+)"\n(.*)', module.code, re.DOTALL).groups()
    constants = {}
    for option in module.options:
        name, _, value = option.partition("=")
        if name.startswith("-DCA_") and name not in ("-DCA_SIZEOF_ARGS", "-DCA_SOURCE_HASH"):
            constants[name.removeprefix("-DCA_")] = int(value) if value.lstrip("-").isdigit() else value
    struct_name = re.search(rf"\b{kernel}\(const __grid_constant__ (\w+) ", text).group(1)
    return Specialisation(file, kernel, struct_name, constants)


# ---- installing ------------------------------------------------------------------------------------------

REPLACED = {
    cupy: {"RawModule": RawModule,
           **{name: getattr(device, name) for name in ("arange", "array", "asarray", "ascontiguousarray", "asnumpy",
                                                       "copyto", "full", "take_along_axis", "where", "zeros",
                                                       "zeros_like")}},
    cupy.ndarray: {"__cuda_array_interface__": device.ndarray_interface, "__repr__": device.ndarray_repr,
                   "__iadd__": device.ndarray_iadd, "__setitem__": device.ndarray_setitem,
                   "astype": device.ndarray_astype, "copy": device.ndarray_copy,
                   "device": device.ndarray_device, "fill": device.ndarray_fill, "get": device.ndarray_get,
                   "set": device.ndarray_set,
                   **{name: device.ndarray_operator(name)
                      for name in ("__add__", "__sub__", "__mod__", "__and__", "__or__", "__lt__", "__ge__", "__eq__",
                                   "__ne__")}},
    cupy.cuda: {"is_available": lambda: True,
                **{name: getattr(device, name) for name in ("Device", "Event", "Graph", "Stream", "get_current_stream",
                                                            "get_elapsed_time")}},
    cupy.cuda.device: {"get_cublas_handle": standin_blas.get_cublas_handle},
    cupy.cuda.runtime: {name: getattr(device, f"runtime_{name}")
                        for name in ("deviceGetAttribute", "deviceSynchronize", "getDevice", "getDeviceCount",
                                     "getDeviceProperties", "setDevice")},
}
_compiled = {}   # capability: kernels of runtime.cuda, kept from one test to the next


class Arrays:
    """What the `xp` fixture yields; `events` counts allocations, copies, synchronizations and launches."""

    name = "standin"
    module = cupy

    @property
    def events(self):
        return device.state.events

    def array(self, a):
        return device.new(np.asarray(a))

    def numpy(self, a):
        return device.host(a).copy()


@contextlib.contextmanager
def install(capability="90", devices=1, cublas=True):
    """Put the stand-in in CuPy's place inside a ``with`` block; yields `Arrays`. `cublas`: whether it is installed."""
    assert device.state is None, "the stand-in is already installed"
    state = device.state = device.State(capability, devices)
    held = _compiled.setdefault(capability, {})
    allocator = cupy.cuda.get_allocator()
    with contextlib.ExitStack() as stack:
        for owner, names in REPLACED.items():
            for name, value in names.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(sys.modules, {"cupy_backends.cuda.libs.cublas":
                                                          standin_blas if cublas else None}))
        stack.enter_context(mock.patch.object(blas, "library", lambda: standin_blas))
        stack.enter_context(mock.patch.object(cuda, "_kernels", held))
        stack.enter_context(mock.patch.object(cuda, "_prepared", {}))
        module = importlib.import_module("cupyattn.runtime.launch")   # the package's `launch` is the function
        stack.enter_context(mock.patch.object(module, "_gpu_workspaces", {}))
        cupy.cuda.set_allocator(device.allocate)
        stack.callback(cupy.cuda.set_allocator, allocator)
        _forget_device()
        stack.callback(_forget_device)
        try:
            yield Arrays()
        finally:
            for block in list(state.memory.values()):
                block.check()
            device.state = None
    assert not state.overruns, f"memory beside allocations of {state.overruns} bytes was written"


def _forget_device():
    cuda._arch.cache_clear()
    cuda._shared_limit.cache_clear()
    cuda._device_count.cache_clear()
    blas.cublas.cache_clear()
