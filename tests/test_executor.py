# SPDX-License-Identifier: Apache-2.0
"""CUDA's execution model on the CPU: indices, barriers, shared memory, atomics, schedules, and what they cost."""

import time
from pathlib import Path

import numpy as np
import pytest

from cupyattn.runtime import Plan, Specialisation, launch, make_args
from cupyattn.runtime.cpu import settings

SOURCE = str(Path(__file__).parent / "kernels" / "executor.cu")
SCHEDULES = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]


def _run(kernel, grid, block, n, *, repeat=1, shared_bytes=4096, out=None):
    plan = Plan(Specialisation(SOURCE, kernel, "ExecutorArgs", {}), "cpu", grid, block, shared_bytes=shared_bytes)
    out = np.zeros(n, np.float32) if out is None else out
    ints = np.full(n, -7, np.int32) if kernel != "atomics" else np.zeros(n, np.int32)
    launch(plan, make_args(plan, out=out, ints=ints, n=n, repeat=repeat))
    return out, ints


@pytest.mark.parametrize("grid, block", [((3, 2, 2), (5, 3, 2)), ((7,), (33,)), ((1,), (1024,)),
                                         ((1, 1, 5), (1, 1, 64))])
def test_indices(grid, block):
    n = int(np.prod(grid) * np.prod(block))
    np.testing.assert_array_equal(_run("indices", grid, block, n)[1], np.arange(n))


@pytest.mark.parametrize("schedule, seed", SCHEDULES)
@pytest.mark.parametrize("threads", [1, 31, 64, 100, 1024])
def test_barriers_and_shared_memory(threads, schedule, seed):
    with settings(schedule=schedule, seed=seed):
        _, ints = _run("rotate", (5,), (threads,), 5 * threads, repeat=9)
    np.testing.assert_array_equal(ints.reshape(5, threads), np.tile((np.arange(threads) + 9) % threads, (5, 1)))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_atomics_across_blocks(workers):
    with settings(workers=workers):
        out, ints = _run("atomics", (50,), (96,), 4)
    assert ints[0] == 4800 and out[0] == 2400


@pytest.mark.parametrize("schedule, seed", SCHEDULES)
def test_early_exit(schedule, seed):
    with settings(schedule=schedule, seed=seed):
        _, ints = _run("early_exit", (3,), (70,), 210)
    i = np.arange(210)
    np.testing.assert_array_equal(ints, np.where(i % 3 == 0, -7, i))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("schedule, seed", SCHEDULES)
@pytest.mark.parametrize("threads", [32, 128, 1024])
def test_block_sum_has_the_same_bits_in_every_schedule(threads, schedule, seed, fused):
    with settings(schedule=schedule, seed=seed, fused=fused):
        out, _ = _run("block_sums", (3,), (threads,), 3 * threads)
    want = threads * (threads - 1) / 2 + threads * np.arange(3)
    np.testing.assert_array_equal(out.reshape(3, threads), np.repeat(want, threads).reshape(3, threads).astype("f4"))


def test_fast_maths():
    x = np.concatenate([np.linspace(-126, 127.9, 1000), [-1000, 0, np.inf, -np.inf, np.nan, 200, 1e-3, 3, 9, 4, 2, 1,
                                                       0.5, 80, -80, 88.5, -87, -1e-6, 1e-6, 127.999, 5, 6, 7, 8]])
    x = x.astype(np.float32)
    n = x.size
    assert n == 1024
    out, _ = _run("maths", (1,), (n,), 5 * n, out=np.concatenate([x, np.full(4 * n, np.nan, np.float32)]))
    exp2, exp, rsqrt, top = out.reshape(5, n)[1:]
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        for got, want in ((exp2, np.exp2(wide)), (exp, np.exp(wide))):
            want[want > np.finfo(np.float32).max] = np.inf
            want[want < np.finfo(np.float32).tiny] = 0
            np.testing.assert_allclose(np.where(want == 0, 0, got), want, rtol=3e-7)
        np.testing.assert_allclose(rsqrt[wide > 0], (1 / np.sqrt(wide))[wide > 0], rtol=2e-7)
    np.testing.assert_array_equal(top, np.fmax(x, np.float32(0)))


def test_bad_blocks_are_refused():
    for block in ((0,), (1025,), (32, 33)):
        with pytest.raises(ValueError, match="a block must have 1 to 1024 threads"):
            _run("indices", (1,), block, 2048)


def test_an_empty_launch_is_cheap():
    """Generous bounds: the machine may be busy. Measured idle: 5 µs with one worker, 5 to 10 µs with two."""
    plan = Plan(Specialisation(SOURCE, "early_exit", "ExecutorArgs", {}), "cpu", (2,), (3,))
    args = make_args(plan, out=np.zeros(6, np.float32), ints=np.zeros(6, np.int32), n=6, repeat=0)
    for workers in (1, 2):
        with settings(workers=workers):
            best = 1.0
            for _ in range(500):
                start = time.perf_counter()
                launch(plan, args)
                best = min(best, time.perf_counter() - start)
        print(f"empty launch, {workers} workers: {best * 1e6:.1f} µs")
        assert best < 100e-6
