# SPDX-License-Identifier: Apache-2.0
"""Arrays that a kernel knows by addresses only: registered with the launch, judged and counted like arguments."""

from pathlib import Path

import numpy as np
import pytest
from conftest import NumpyArrays

import cupyattn
from cupyattn.runtime import Plan, Specialisation, arch_of, launch, make_args, profiling
from cupyattn.runtime.cpu import counters, settings
from cupyattn.runtime.structs import address

SPEC = Specialisation(str(Path(__file__).parent / "kernels" / "pointers.cu"), "pointers", "PointersArgs", {})
NUMPY = NumpyArrays()


def _arrays(blocks, threads=64):
    sources = [np.arange(threads, dtype=np.float32) + 1000 * b for b in range(blocks)]
    return sources, [np.full(threads, np.nan, np.float32) for _ in sources]


def _copy(xp, sources, targets, *, threads=64, **known):
    """Launch over the given arrays with `known` registered."""
    plan = Plan(SPEC, arch_of(xp.module), (len(sources),), (threads,))

    def addresses(arrays):
        return xp.array(np.array([address(a) for a in arrays], np.int64))

    launch(plan, make_args(plan, from_ptrs=addresses(sources), to_ptrs=addresses(targets)), **known)


@pytest.mark.parametrize("check", [False, True])
def test_registered_arrays(xp, check):
    sources, targets = ([xp.array(a) for a in arrays] for arrays in _arrays(5))
    with settings(check=check), profiling():
        _copy(xp, sources, targets, buffers=targets, const_buffers=sources)
    for source, target in zip(sources, targets, strict=True):
        np.testing.assert_array_equal(xp.numpy(target), xp.numpy(source) + 1)


def test_memory_of_no_array_is_an_error():
    sources, targets = _arrays(3)
    for known in ({}, {"buffers": targets}, {"const_buffers": sources},
                  {"buffers": targets[:2], "const_buffers": sources}):
        with settings(check=True), pytest.raises(cupyattn.KernelCheckError) as caught:
            _copy(NUMPY, sources, targets, **known)
        assert caught.value.kind == "out_of_bounds"


def test_faults_name_the_array():
    sources, targets = _arrays(3)
    with settings(check=True), pytest.raises(cupyattn.KernelCheckError, match=r"argument const_buffers\[1\]") as caught:
        _copy(NUMPY, sources, targets, buffers=sources, const_buffers=[targets[2], targets[0], targets[1]])
    assert caught.value.kind == "read_only_write" and caught.value.argument == "const_buffers[1]"
    base = np.zeros(200, np.float32)
    with settings(check=True), pytest.raises(cupyattn.KernelCheckError, match="past the end") as caught:
        _copy(NUMPY, sources[:1], [base[:63]], buffers=[base[100:], base[:63]], const_buffers=sources)
    assert caught.value.argument == "buffers[1]" and caught.value.thread == (63, 0, 0)
    with settings(check=True), pytest.raises(cupyattn.KernelCheckError) as caught:
        _copy(NUMPY, sources[:2], [targets[0]] * 2, buffers=targets, const_buffers=sources)
    assert caught.value.kind == "global_race" and caught.value.argument == "buffers[0]"


def test_traffic_is_counted_by_array():
    sources, targets = _arrays(3)
    with settings(check=True), counters() as launches:
        _copy(NUMPY, sources, targets, buffers=targets, const_buffers=sources)
    found = launches[0].buffers
    assert list(found) == ["from_ptrs", "to_ptrs", *(f"buffers[{i}]" for i in range(3)),
                           *(f"const_buffers[{i}]" for i in range(3))]
    assert found["buffers[2]"]["bytes_written"] == found["const_buffers[2]"]["bytes_read"] == 256
    assert found["buffers[2]"]["bytes_read"] == found["const_buffers[2]"]["bytes_written"] == 0


def test_thousands_of_arrays_that_overlap():
    base = np.zeros(64 * 3000, np.float32)
    blocks = base.reshape(3000, 64)
    pieces = [base[i * 64:(i + 2) * 64] for i in np.random.default_rng(0).permutation(2999)]
    with settings(check=True):
        _copy(NUMPY, blocks[:200], blocks[1000:1200], buffers=pieces)
        with pytest.raises(cupyattn.KernelCheckError, match="written after a read|read after a write"):
            _copy(NUMPY, blocks[:200], blocks[1:201], buffers=pieces)
    assert (blocks[1000:1200] == 1).all()


def test_standin_knows_live_allocations_only():
    from standin import install

    with install() as xp, settings(check=True):
        sources, targets = ([xp.array(a) for a in arrays] for arrays in _arrays(2))
        _copy(xp, sources, targets)   # as a GPU, which is told nothing
        gone = np.zeros(64, np.float32)
        with pytest.raises(cupyattn.KernelCheckError) as caught:
            _copy(xp, sources, [targets[0], gone])
        assert caught.value.kind == "out_of_bounds"


def test_arrays_of_another_device_are_refused():
    import cupy
    from standin import install

    with install(devices=2) as xp:
        sources, targets = ([xp.array(a) for a in arrays] for arrays in _arrays(2))
        with cupy.cuda.Device(1):
            other = xp.array(np.zeros(64, np.float32))
        for known in ({"buffers": [*targets, other]}, {"const_buffers": [*sources, other]}):
            with pytest.raises(ValueError, match=r"uffers\[2\] must be on the current device 0, got an array on dev"):
                _copy(xp, sources, targets, **known)
