# SPDX-License-Identifier: Apache-2.0
"""CUDA's execution model on the CPU: indices, barriers, shared memory, atomics, schedules, and what they cost."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import cupyattn
from cupyattn.runtime import Plan, Specialisation, compile_all, launch, make_args
from cupyattn.runtime.cpu import counters, settings

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


def test_logarithms_and_tanh():
    random = np.random.default_rng(0)
    x = np.concatenate([random.uniform(-5, 5, 500), 10.0 ** random.uniform(-44, 38, 500),
                        1 + random.uniform(-0.01, 0.01, 18), [0, -1, np.inf, -np.inf, np.nan, 1]]).astype(np.float32)
    out, _ = _run("more_maths", (1,), (1024,), 4096, out=np.concatenate([x, np.zeros(3 * 1024, np.float32)]))
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        for got, want in zip(out.reshape(4, 1024)[1:], (np.log(wide), np.log2(wide), np.tanh(wide)), strict=True):
            np.testing.assert_allclose(got, want, rtol=4e-7)


@pytest.mark.parametrize("schedule, seed", SCHEDULES)
def test_warp_instructions(schedule, seed):
    threads = 96
    with settings(schedule=schedule, seed=seed):
        _, ints = _run("collectives", (1,), (threads,), 12 * threads)
    i = np.arange(threads)
    warp, lane = i // 32 * 32, i % 32
    v, p = 7 * i % 11, i % 3 == 0

    def at(source, width):
        start = lane // width * width
        return v[warp + np.where((source >= start) & (source < start + width), source, lane)]

    def per_warp(f):
        return np.repeat([f(slice(w, w + 32)) for w in range(0, threads, 32)], 32)

    want = [v[warp + (lane + 5) % 32], v[warp + lane // 8 * 8 + 3], at(lane - 3, 16), at(lane + 3, 8), at(lane ^ 5, 32),
            per_warp(lambda s: sum(1 << k for k in range(32) if p[s][k])),
            per_warp(lambda s: int((v[s] == 10).any()) + 2),
            [sum(1 << k for k in range(32) if v[w + k] == x) for w, x in zip(warp, v, strict=True)],
            per_warp(lambda s: v[s].sum()), per_warp(lambda s: v[s].max()),
            v[warp + np.where(lane % 2, lane ^ 2, lane ^ 4)], v[warp + (lane ^ 1)]]
    np.testing.assert_array_equal(ints.reshape(12, threads), np.array(want, np.int64).astype(np.int32))


@pytest.mark.parametrize("workers", [1, 3])
def test_more_atomics(workers):
    plan = Plan(Specialisation(SOURCE, "more_atomics", "ExecutorArgs", {}), "cpu", (10,), (50,))
    ints = np.zeros(6, np.int32)
    with settings(workers=workers):
        launch(plan, make_args(plan, out=np.zeros(1, np.float32), ints=ints, n=6, repeat=0))
    assert ints.tolist() == [499, -499, 500 % 7, (1 << 20) - 1, -1000, 499 * 500 // 2]


def test_bit_functions():
    n = 256
    x = np.random.default_rng(1).integers(-2**31, 2**31, n).astype(np.int32)
    x[:4] = 0, -1, 1, 2**31 - 1
    plan = Plan(Specialisation(SOURCE, "bits", "ExecutorArgs", {}), "cpu", (1,), (n,))
    ints = np.concatenate([x, np.zeros(13 * n, np.int32)])
    launch(plan, make_args(plan, out=np.zeros(1, np.float32), ints=ints, n=n, repeat=0))
    for a, *got in ints.reshape(14, n).T.tolist():
        u = a % 2**32
        w = u * 2654435761 % 2**32
        both = w << 32 | u
        text = format(u, "032b")
        a_bytes, w_bytes = np.array([u, w], np.uint32).view(np.int8).reshape(2, 4).astype(int)
        want = [text.count("1"), 32 - u.bit_length(), (u & -u).bit_length(), int(text[::-1], 2),
                sum((both >> 8 * s & 255) << 8 * k for k, s in enumerate((0, 5, 2, 7))),
                (both << 7 >> 32) % 2**32, (both >> 7) % 2**32, int(a_bytes @ w_bytes) + 5,
                int((a_bytes % 256) @ (w_bytes % 256)) + 5,
                sum((both >> 8 * (u >> 16 + 4 * k & 7) & 255) << 8 * k for k in range(4)),
                (both << min(w >> 26, 32) >> 32) % 2**32, (both >> min(w >> 26, 32)) % 2**32,
                u & 0x0f0f0f0f | 0x64006400]
        assert [g % 2**32 for g in got] == [y % 2**32 for y in want], hex(u)


def test_floats_to_integers_saturate():
    x = np.array([0, -0.5, 0.5, 1.5, 2.5, -1.5, 3e9, -3e9, 5e9, np.inf, -np.inf, np.nan, 2147483520, 4294967040, 1e-40,
                  7.9], np.float32)
    n = x.size
    out, ints = np.concatenate([x, np.zeros(3 * n, np.float32)]), np.zeros(4 * n, np.int32)
    plan = Plan(Specialisation(SOURCE, "to_integers", "ExecutorArgs", {}), "cpu", (1,), (n,))
    launch(plan, make_args(plan, out=out, ints=ints, n=n, repeat=0))
    wide = np.nan_to_num(x.astype(np.float64), nan=0, posinf=1e20, neginf=-1e20)
    for got, rounded in zip(ints.reshape(2, 2, n), (np.int32, np.uint32), strict=True):
        limits = np.iinfo(rounded)
        for row, value in zip(got, (np.rint(wide), np.trunc(wide)), strict=True):
            np.testing.assert_array_equal(row.view(rounded), np.clip(value, limits.min, limits.max).astype(rounded))


@pytest.mark.parametrize("schedule, seed", SCHEDULES)
def test_a_warp_may_wait_for_another(schedule, seed):
    with settings(schedule=schedule, seed=seed):
        _, ints = _run("wait_for_last_warp", (1,), (128,), 128, repeat=1)
    assert (ints[:32] == 42).all()


def test_endless_waiting_is_reported():
    with pytest.raises(cupyattn.KernelCheckError, match="deadlock.*spin without end"):
        _run("wait_for_last_warp", (1,), (64,), 64, repeat=0)


def test_interrupt_inside_a_block(interrupts):
    plan = Plan(Specialisation(SOURCE, "many_barriers", "ExecutorArgs", {}), "cpu", (1,), (64,))
    args = make_args(plan, out=np.zeros(1, np.float32), ints=np.zeros(1, np.int32), n=1, repeat=2_000_000_000)
    compile_all([plan.spec], "cpu")
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        launch(plan, args)
    assert time.perf_counter() - start < 5
    assert _run("many_barriers", (2,), (64,), 2, repeat=3)[1].tolist() == [3, 3]


def test_a_signal_handler_cannot_launch_into_a_launch():
    seen = []

    def handler(number, frame):
        try:
            _run("early_exit", (1,), (3,), 3)
        except ValueError as error:
            seen.append(str(error))

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        _run("many_barriers", (1,), (64,), 1, repeat=600_000)   # about half a second: several time slices
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert len(seen) == 1 and "a launch cannot start inside a launch" in seen[0]


@pytest.mark.parametrize("row_length, ways", [(32, 32), (33, 1), (34, 2)])
def test_bank_conflicts_are_counted(row_length, ways):
    with settings(check=True), counters() as launches:
        out, _ = _run("transpose", (1,), (1024,), 2048, repeat=row_length, shared_bytes=34 * 128,
                      out=np.arange(2048, dtype=np.float32))
    np.testing.assert_array_equal(out[1024:].reshape(32, 32), np.arange(1024).reshape(32, 32).T)
    assert launches[0].shared["write"] == {"requests": 32, "conflicts": 0, "max_ways": 1}
    read = {"requests": 32, "conflicts": 32 * (ways - 1), "max_ways": ways}
    assert launches[0].shared["read"] == read
    line = Path(SOURCE).read_text().split("tile[column * args.repeat + row]")[0].count("\n") + 1
    assert launches[0].conflicts == ({(f"{SOURCE}:{line}", "read"): read} if ways > 1 else {})


@pytest.mark.parametrize("row_bytes, ways", [(64, 4), (128, 8), (144, 1)])
def test_bank_conflicts_of_matrix_instructions_and_asynchronous_copies(row_bytes, ways):
    out = np.zeros(1024 + 128, np.float32)[:1024]
    with settings(check=True), counters() as launches:
        _run("matrix_tile", (1,), (32,), out.size, repeat=row_bytes, shared_bytes=32 * 144, out=out)
    found = launches[0]
    # eight rows of 16 bytes a request: rows 64 bytes apart share banks with every second one
    conflicting = {"requests": 4, "conflicts": 4 * (ways - 1), "max_ways": ways}
    assert found.shared["cp_async"] == found.shared["ldmatrix"] == conflicting
    assert found.shared["read"]["requests"] == found.shared["write"]["requests"] == 0
    assert found.counts["ldmatrix"] == 1 and found.counts["cp_async_bytes"] == 512
    assert sorted(access for _, access in found.conflicts) == (["cp_async", "ldmatrix"] if ways > 1 else [])
    assert all("/executor.cu:" in line for line, _ in found.conflicts)
    assert found.buffers["out"]["bytes_read"] == found.buffers["out"]["bytes_written"] == 512


def test_lanes_that_leave_out_a_round_do_not_lag():
    out = np.zeros(1024 + 8, np.float32)
    out = out[(-out.ctypes.data % 32) // 4:][:1024]
    with settings(check=True), counters() as launches:
        _run("rounds_left_out", (1,), (32,), 1024, out=out)
    found = launches[0].buffers["out"]
    assert found["bytes_read"] == 31 * 32 * 4 and found["sectors_read"] == 32 * 4


def test_copies_of_zeros_are_told_from_reads():
    with settings(check=True), counters() as launches:
        _run("half_a_tile", (1,), (32,), 128)
    assert launches[0].shared["cp_async"] == {"requests": 3 * 4, "conflicts": 0, "max_ways": 1}
    assert launches[0].shared["read"]["requests"] == launches[0].shared["write"]["requests"] == 0
    assert launches[0].buffers["out"]["bytes_read"] == 3 * 16 * 16 and launches[0].buffers["out"]["bytes_written"] == 0


@pytest.mark.parametrize("step, sectors", [(4, 16), (8, 32), (16, 32)])
def test_sectors_of_vector_accesses(step, sectors):
    out = np.zeros(2 * 32 * step + 8, np.float32)
    out = out[(-out.ctypes.data % 32) // 4:][:2 * 32 * step]   # starts at a sector
    with settings(check=True), counters() as launches:
        _run("vector_copy", (1,), (32,), out.size, repeat=step, out=out)
    assert launches[0].buffers["out"] == {"bytes_read": 512, "bytes_written": 512, "sectors_read": sectors,
                                          "sectors_written": sectors}


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
