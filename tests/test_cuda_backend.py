# SPDX-License-Identifier: Apache-2.0
"""The GPU back end, run on the CuPy stand-in and, where there is one, on a GPU.

The first half holds CuPy itself to what the stand-in imitates: each of these tests runs on both.
"""

import importlib
import itertools
import re
import struct
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from conftest import CupyArrays
from standin import REPLACED, install

import cupyattn
from cupyattn.runtime import (
    Plan,
    Specialisation,
    arch_of,
    blas,
    compile_all,
    cpu,
    cuda,
    launch,
    make_args,
    profiling,
    recording,
    workspace,
)

KERNELS = Path(__file__).parent / "kernels"
_tags = itertools.count()


@pytest.fixture(params=["standin", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    """The stand-in, or CuPy on a GPU."""
    if request.param == "cupy":
        yield CupyArrays()
    else:
        with install() as arrays:
            yield arrays


def _spec(kernel, source="probe", struct_name="ProbeArgs", **constants):
    return Specialisation(str(KERNELS / f"{source}.cu"), kernel, struct_name, constants)


def _plan(kernel, grid=(1,), block=(32,), shared_bytes=0):
    import cupy

    return Plan(_spec(kernel), arch_of(cupy), grid, block, shared_bytes)


def _run(plan, out):
    launch(plan, make_args(plan, out=out))


# ---- what CuPy does --------------------------------------------------------------------------------------

def _raw(xp, kernel):
    spec = _spec(kernel, TAG=3000 + next(_tags))   # of its own: modules are kept, and what a kernel opted in to
    module = xp.module.RawModule(code=cuda.code(spec), options=cuda.options(spec, cuda.arch()), backend="nvrtc")
    return module.get_function(kernel)


def test_every_replaced_name_is_tested_here():
    text = Path(__file__).read_text()
    for names in REPLACED.values():
        for name in names:
            assert re.search(rf"[. ]{name}\b", text), f"{name} is replaced by the stand-in and not tested"


def test_python_numbers_and_scalars_keep_their_own_width(xp):
    kernel = _raw(xp, "probe_grid")
    out = xp.array(np.zeros(3, np.int64))
    pointer = out.data.ptr
    as_float, = struct.unpack("<d", struct.pack("<Q", pointer))
    for argument in (pointer, as_float, np.uint64(pointer), np.array(pointer, np.uint64), np.array([pointer]), out):
        out.fill(0)
        kernel((3,), (32,), (argument,))
        np.testing.assert_array_equal(out.get(), [3, 3, 3])
    with pytest.raises(TypeError):
        kernel((3,), (32,), (np.array([pointer, pointer]),))
    with pytest.raises(TypeError):
        kernel((3,), (32,), ("text",))
    with pytest.raises(TypeError):
        kernel([3], (32,), (pointer,))


def test_cublas_reads_and_writes_rows_of_wider_arrays(xp):
    if not blas.available(xp.module):
        pytest.skip("cuBLAS is not installed")
    handle = xp.module.cuda.device.get_cublas_handle()
    modes = blas.cublas().getPointerMode(handle), blas.cublas().getMathMode(handle)
    x, w = np.arange(48, dtype=np.float16).reshape(3, 16), np.eye(8, dtype=np.float16)
    out = xp.array(np.ones((3, 16), np.float16))
    for _ in range(2):
        blas.multiply(xp.array(x)[:, 8:], xp.array(w), out[:, :8], add=True)
    np.testing.assert_array_equal(out.get(), np.hstack([1 + 2 * x[:, 8:], np.ones((3, 8))]))
    assert (blas.cublas().getPointerMode(handle), blas.cublas().getMathMode(handle)) == modes


def test_a_zero_grid_launches_one_block(xp):
    out = xp.array(np.zeros(1, np.int64))
    _raw(xp, "probe_grid")((0,), (0,), (out.data.ptr,))
    assert out.get() == [1]


def test_dynamic_shared_memory_needs_opting_in(xp):
    kernel = _raw(xp, "probe_shared")
    assert kernel.shared_size_bytes == 4096 and kernel.max_dynamic_shared_size_bytes == 45056
    out = xp.array(np.array([7000, 0]))
    with pytest.raises(RuntimeError):
        kernel((1,), (32,), (out.data.ptr,), shared_mem=60000)
    kernel.max_dynamic_shared_size_bytes = 60000
    kernel((1,), (32,), (out.data.ptr,), shared_mem=60000)
    np.testing.assert_array_equal(out.get(), [500, 7])
    with pytest.raises(RuntimeError):
        kernel.max_dynamic_shared_size_bytes = 4 << 20


def test_launch_limits_of_the_driver(xp):
    out = xp.array(np.zeros(1, np.int64))
    bound, grid = _raw(xp, "probe_bound"), _raw(xp, "probe_grid")
    assert bound.max_threads_per_block == 64 and bound.num_regs > 0 and bound.local_size_bytes == 0
    for kernel, shape, block in ((bound, (1,), (128,)), (grid, (1, 65536), (32,)), (grid, (1,), (2048,))):
        with pytest.raises(RuntimeError):
            kernel(shape, block, (out.data.ptr,))
    bound((1,), (64,), (out.data.ptr,))
    assert out.get() == [64]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32])
def test_arrays_and_copies(xp, dtype):
    cupy = xp.module
    values = np.arange(12).reshape(3, 4).astype(dtype)
    a = cupy.asarray(values)
    assert a.dtype == dtype and cupy.asarray(a) is a and cupy.ascontiguousarray(a) is a
    np.testing.assert_array_equal(a.get(), values)
    np.testing.assert_array_equal(cupy.asnumpy(a[1:, ::2]), values[1:, ::2])
    np.testing.assert_array_equal(cupy.asnumpy(values), values)
    np.testing.assert_array_equal(cupy.ascontiguousarray(a.T).get(), values.T)
    b = cupy.array(a)
    b.set(values + values)
    np.testing.assert_array_equal(b.get(), values + values)
    np.testing.assert_array_equal(a.get(), values)
    for wrong, error in ((values.astype(np.int8), TypeError), (values[:2], ValueError), ([1], TypeError)):
        with pytest.raises(error):
            b.set(wrong)
    c = a.copy()
    c[0] = a[2]
    c[1:, :2] = 7
    np.testing.assert_array_equal(c.get()[0], values[2])
    np.testing.assert_array_equal(c.get()[1:, :2], np.full((2, 2), 7, dtype))
    cupy.copyto(c, a)
    np.testing.assert_array_equal(c.get(), values)
    c.fill(3)
    np.testing.assert_array_equal(c.get(), np.full((3, 4), 3, dtype))
    for made, want in ((cupy.zeros((2, 3), dtype), 0), (cupy.zeros_like(a), 0), (cupy.full((2,), 5, dtype), 5)):
        assert made.dtype == dtype
        np.testing.assert_array_equal(made.get(), np.full(made.shape, want, dtype))
    held = c
    c += 1   # ndarray.__iadd__: in place
    c += c
    assert c is held
    np.testing.assert_array_equal(c.get(), np.full((3, 4), 8, dtype))
    assert "7" in a.__repr__()


def test_arithmetic(xp):
    cupy = xp.module
    host = np.array([[0, 3, 5], [1, -2, 7]], np.int32)
    first, few = host[:, :1], host < 2
    a, column = cupy.asarray(host), cupy.asarray(host[:, :1])
    along = cupy.asarray(np.array([[2, 0], [1, 4]]))   # an index out of range wraps around
    for made, want in ((a.__add__(column), host + first), (a.__sub__(2), host - 2), (a.__mod__(3), host % 3),
                       (a.__lt__(column), host < first), (a.__ge__(3), host >= 3), (a.__eq__(a), host == host),
                       (a.__ne__(0), host != 0), ((a < 2).__and__(column == 1), few & (first == 1)),
                       ((a < 2).__or__(a == 5), few | (host == 5)), (cupy.where(a < 0, -1, a), np.maximum(host, -1)),
                       (cupy.arange(3, dtype=np.int32), np.int32([0, 1, 2])),
                       (cupy.arange(1, 7, 2), np.array([1, 3, 5])),
                       (cupy.take_along_axis(a, along, axis=1), np.int32([[5, 0], [-2, -2]]))):
        assert isinstance(made, cupy.ndarray) and made.dtype == want.dtype
        np.testing.assert_array_equal(made.get(), want)


def test_numpy_arrays_cannot_be_assigned(xp):
    a = xp.module.zeros((2, 3), np.float32)
    with pytest.raises(TypeError):
        a[...] = np.ones((2, 3), np.float32)   # ndarray.__setitem__ takes scalars and CuPy arrays


def test_array_interface_is_zero_copy(xp):
    class Foreign:
        pass

    a = xp.array(np.arange(6, dtype=np.float32))
    foreign = Foreign()
    foreign.__cuda_array_interface__ = a.__cuda_array_interface__
    b = xp.module.asarray(foreign)
    assert b.data.ptr == a.data.ptr and b.dtype == np.float32 and b.shape == (6,)
    assert int(b.device) == int(a.device) == xp.module.cuda.runtime.getDevice()


def test_devices(xp):
    cuda_module = xp.module.cuda
    runtime = cuda_module.runtime
    assert cuda_module.is_available() and runtime.getDeviceCount() >= 1
    runtime.setDevice(0)
    with cuda_module.Device(0) as device:
        assert device.id == runtime.getDevice() == 0
        capability = int(device.compute_capability)
        device.synchronize()
    properties = runtime.getDeviceProperties(0)
    assert properties["major"] * 10 + properties["minor"] == capability
    assert properties["multiProcessorCount"] == runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, 0)
    attribute = runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin
    assert properties["sharedMemPerBlockOptin"] == runtime.deviceGetAttribute(attribute, 0) > 48 * 1024
    runtime.deviceSynchronize()


def test_streams_and_events(xp):
    cuda_module = xp.module.cuda
    default = cuda_module.get_current_stream()
    with cuda_module.Stream(non_blocking=True) as stream:
        assert cuda_module.get_current_stream().ptr == stream.ptr != default.ptr
        start, end = cuda_module.Event(), cuda_module.Event()
        start.record()
        stream.record(end)
        stream.wait_event(start)
        end.synchronize()
        assert end.done and cuda_module.get_elapsed_time(start, end) >= 0
        stream.synchronize()
    assert cuda_module.get_current_stream().ptr == default.ptr == cuda_module.Stream.null.ptr


def test_graph_capture(xp):
    out, other = xp.array(np.zeros(2, np.int64)), xp.array(np.ones(2, np.int64))
    plan = _plan("probe_grid", (2,))
    _run(plan, out)
    out.fill(0)
    xp.module.cuda.runtime.deviceSynchronize()
    stream = xp.module.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        assert stream.is_capturing()
        _run(plan, out)
        other.fill(0)
        graph = stream.end_capture()
        assert isinstance(graph, xp.module.cuda.Graph) and not stream.is_capturing()
        assert out.get().sum() == 0 and other.get().sum() == 2
        graph.upload(stream)
        graph.launch(stream)
        stream.synchronize()
        assert out.get().sum() == 4 and other.get().sum() == 0
        stream.begin_capture()
        with pytest.raises(RuntimeError):
            stream.synchronize()
        with pytest.raises(RuntimeError):
            stream.end_capture()
    with pytest.raises(RuntimeError):
        xp.module.cuda.Stream.null.begin_capture()


# ---- what the back end does with it ----------------------------------------------------------------------

def test_launch(xp):
    spec = _spec("scale", "scale", "ScaleArgs")
    plan = Plan(spec, arch_of(xp.module), (2,), (64,))
    x, out = xp.array(np.arange(100, dtype=np.float32)), xp.array(np.zeros(100, np.float32))
    launch(plan, make_args(plan, x=x, out=out, n=100, factor=3.0))
    np.testing.assert_array_equal(xp.numpy(out), 3 * np.arange(100))


def test_launch_shapes_are_checked(xp):
    out = xp.array(np.zeros(2, np.int64))
    _run(_plan("probe_grid", (0,)), out)
    _run(_plan("probe_grid", (4, 0)), out)
    assert out.get().sum() == 0
    for grid, block in (((1, 65536), (32,)), ((2**31,), (32,)), ((1,), (1, 1, 65)), ((-1,), (32,))):
        with pytest.raises(ValueError, match=r"probe_grid: (grid|block) must be within \(.*got \("):
            _run(_plan("probe_grid", grid, block), out)
    with pytest.raises(ValueError, match="probe_bound: 96 threads per block are more than the 64"):
        _run(_plan("probe_bound", block=(96,)), out)


def test_dynamic_shared_memory_is_opted_in(xp):
    out = xp.array(np.array([7000, 0]))
    for size, last in ((60000, 7000), (46 * 1024, 100), (60000, 7000)):
        out.set(np.array([last, 0]))
        _run(_plan("probe_shared", shared_bytes=size), out)
        np.testing.assert_array_equal(out.get(), [500, 7])
    with pytest.raises(ValueError, match="probe_shared: 1000000 bytes of dynamic and 4096 of static shared memory are "
                                         r"more than the \d+ a block can have on device 0"):
        _run(_plan("probe_shared", shared_bytes=1_000_000), out)


def test_plan_of_another_arch_is_refused(xp):
    plan = Plan(_spec("probe_grid"), "sm_70", (1,), (32,))
    with pytest.raises(ValueError, match=r"probe_grid: the plan is for sm_70, the current device 0 is sm_\d+"):
        _run(plan, xp.array(np.zeros(1, np.int64)))
    with pytest.raises(ValueError, match=r"compile_all: arch must be 'sm_\d+a?', the current device's, got 'sm_70'"):
        compile_all([plan.spec], "sm_70")


def test_compile_error_names_file_line_and_options(xp):
    with pytest.raises(cupyattn.CompileError) as caught:
        compile_all([_spec("broken", "broken", "RmsNormArgs")], cuda.arch())
    message = str(caught.value)
    assert "undeclared_name" in message and f"{KERNELS / 'broken.cu'}(6): error" in message
    assert "-DCA_SIZEOF_ARGS=" in message and "-std=c++17" in message


def test_too_old_a_gpu(xp):
    spec = Specialisation(str(KERNELS / "probe.cu"), "probe_grid", "ProbeArgs", {}, min_sm=200)
    with pytest.raises(cupyattn.CompileError, match=r"needs a GPU of compute capability 20.0 or later, got sm_"):
        compile_all([spec], cuda.arch())


def test_compile_all_in_parallel_with_progress(xp):
    specs = [_spec("probe_grid", TAG=next(_tags)) for _ in range(6)]
    seen = []
    compile_all(specs, arch_of(xp.module), lambda done, total, spec: seen.append((done, total)))
    assert seen == [(n, 6) for n in range(1, 7)]
    kernels = [cuda.kernel(spec, 0) for spec in specs]
    assert len(set(map(id, kernels))) == 6 and cuda.kernel(specs[0], 0) is kernels[0]


def test_forbid_compile_and_cache_hits(xp, monkeypatch, tmp_path):
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CUPYATTN_FORBID_COMPILE", "1")
    spec = _spec("probe_grid", TAG=1000 + next(_tags))
    with pytest.raises(cupyattn.CompileError, match="CUPYATTN_FORBID_COMPILE=1 forbids"):
        cuda.kernel(spec, 0)
    monkeypatch.delenv("CUPYATTN_FORBID_COMPILE")
    hits, compiled = cuda.cache_hits()
    cuda.kernel(spec, 0)
    assert cuda.cache_hits() == (hits, compiled + 1)
    monkeypatch.setenv("CUPYATTN_FORBID_COMPILE", "1")
    with mock.patch.object(cuda, "_kernels", {}):   # as in another process
        cuda.kernel(spec, 0)
    assert cuda.cache_hits() == (hits + 1, compiled + 1)


def test_debug_lines(xp, monkeypatch, caplog):
    monkeypatch.setenv("CUPYATTN_DEBUG", "3")
    with caplog.at_level("DEBUG", "cupyattn"):
        cuda.kernel(_spec("probe_shared", TAG=2000 + next(_tags)), 0)
    assert re.search(r"probe_shared\[TAG=\d+\] for sm_\w+ in [\d.]+ s: \d+ registers, 4096 bytes static", caplog.text)
    assert "options: -std=c++17" in caplog.text


def test_recording_and_profiling(xp):
    out = xp.array(np.zeros(1, np.int64))
    plan = _plan("probe_grid")
    with recording() as wanted:
        _run(plan, out)
    assert wanted == {plan.spec: plan.arch} and out.get() == [0]
    with profiling() as profile:
        for _ in range(3):
            _run(plan, out)
    (name, launches, seconds), = profile.rows()
    assert (name, launches) == ("probe_grid", 3) and 0 < seconds < 10


@pytest.fixture
def no_workspaces(monkeypatch):
    """As in another process: on a GPU, what earlier tests left is there."""
    monkeypatch.setattr(importlib.import_module("cupyattn.runtime.launch"), "_gpu_workspaces", {})


def test_workspace_is_one_per_stream_and_zeroed(xp, no_workspaces):
    cupy = xp.module
    first = workspace(cupy, 1000)
    assert first.size >= 1000 and not first.get().any() and first.data.ptr % 256 == 0
    assert workspace(cupy, 500).data.ptr == first.data.ptr
    with cupy.cuda.Stream(non_blocking=True):
        assert workspace(cupy, 500).data.ptr != first.data.ptr


def test_a_grown_workspace_leaves_the_old_block_to_captured_graphs(xp, no_workspaces):
    cupy = xp.module
    address = workspace(cupy, 1000).data.ptr
    grown = workspace(cupy, 2**20)
    assert grown.size >= 2**20 and grown.data.ptr != address
    assert workspace(cupy, 1000).data.ptr == grown.data.ptr
    blocks = importlib.import_module("cupyattn.runtime.launch")._gpu_workspaces
    assert address in [block.data.ptr for held in blocks.values() for block in held]


# ---- the stand-in alone: what one GPU cannot show --------------------------------------------------------

@pytest.mark.parametrize("capability, arch", [("75", "sm_75"), ("80", "sm_80"), ("89", "sm_89"), ("90", "sm_90a"),
                                              ("100", "sm_100a"), ("120", "sm_120a")])
def test_arch_names(capability, arch):
    with install(capability) as xp:
        assert arch_of(xp.module) == arch
        out = xp.array(np.zeros(1, np.int64))
        _run(_plan("probe_grid"), out)
        assert out.get() == [1]


def test_arrays_on_another_device_are_refused():
    with install(devices=2) as xp:
        cupy = xp.module
        out = xp.array(np.zeros(1, np.int64))
        plan = _plan("probe_grid")
        with cupy.cuda.Device(1):
            with pytest.raises(ValueError, match=r"probe_grid: out must be on the current device 1, got an array on "
                                                 r"device 0; use `with cupy.cuda.Device\(0\):`"):
                _run(plan, out)
            _run(plan, xp.array(np.zeros(1, np.int64)))
        _run(plan, out)


def test_standin_refuses_what_a_gpu_would_misread():
    with install() as xp:
        kernel = _raw(xp, "probe_grid")
        for arguments in ((np.int32(1),), (1, 2), ()):
            with pytest.raises(RuntimeError, match="probe_grid takes one struct of 8 bytes"):
                kernel((1,), (32,), arguments)
        with pytest.raises(RuntimeError, match="InsufficientDriver"):
            xp.array(np.ones(3)) * 2   # every other CuPy kernel is out of reach


def test_standin_notices_writes_beside_an_allocation():
    with pytest.raises(AssertionError, match="memory beside allocations of \\[8\\] bytes was written"):
        with install() as xp:
            out = xp.array(np.zeros(1, np.int64))
            _run(_plan("probe_grid", (2,)), out)


def test_standin_launches_can_be_checked():
    with install() as xp, cpu.settings(check=True):
        out = xp.array(np.zeros(4, np.int64))
        _run(_plan("probe_grid", (4,)), out)
        assert out.get().sum() == 16
        with pytest.raises(cupyattn.KernelCheckError, match="out of bounds"):
            _run(_plan("probe_grid", (5,)), out)


def test_standin_leaves_cupy_as_it_was():
    import cupy

    before = cupy.RawModule, cupy.cuda.Device, cupy.ndarray.get, cupy.cuda.get_allocator()
    with install():
        assert cupy.RawModule is not before[0]
    assert (cupy.RawModule, cupy.cuda.Device, cupy.ndarray.get, cupy.cuda.get_allocator()) == before
