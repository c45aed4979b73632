# SPDX-License-Identifier: Apache-2.0
"""What the device can do at best, measured: bytes read per second, and what one launch costs."""

import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from timing import DEVICE, seconds_per_call

import cupyattn
from cupyattn.runtime import Plan, Specialisation, arch_of, blas, launch, make_args

_UNROLL = 8


def read_plan(arch, num_sms):
    """Plan of the read-only kernel: every SM full of threads on a GPU, one thread per block on the CPU."""
    spec = Specialisation(str(Path(__file__).parent / "read_bandwidth.cu"), "read_bandwidth", "ReadBandwidthArgs",
                          {"UNROLL": _UNROLL})
    return Plan(spec, arch, (8 * num_sms,), (1 if arch == "cpu" else 256,))


def read_all(x, out, num_sms=1):
    """Read uint32 array `x` once with every SM."""
    plan = read_plan(arch_of(DEVICE.xp), num_sms)
    launch(plan, make_args(plan, x=x, out=out, count=x.size // 4))


@functools.cache
def read_bandwidth(nbytes=None):
    """Bytes per second of reading memory far larger than any cache: a kernel on a GPU, NumPy's max on the CPU."""
    if not DEVICE.is_gpu:
        return _numpy_read_bandwidth(nbytes or 2**28)
    nbytes = nbytes or 2**30
    sets = [(DEVICE.xp.zeros(nbytes // 4, np.uint32), DEVICE.xp.zeros(1, np.uint32)) for _ in range(2)]
    return nbytes / seconds_per_call(lambda x, out: read_all(x, out, DEVICE.num_sms), sets)


def _numpy_read_bandwidth(nbytes):
    """The best of a few rounds, with as many threads as the executor has workers."""
    workers = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(nbytes // 8, np.int64), workers)
    times = []
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            times.append(time.perf_counter() - start)
    return nbytes / min(times)


@functools.cache
def matmul_rate():
    """Floating-point operations per second of a large product of plain arrays: float16 on a GPU, float32 on the CPU."""
    n, dtype = (8192, np.float16) if DEVICE.is_gpu else (2048, np.float32)
    x = DEVICE.array(np.random.default_rng(1).standard_normal((n, n), np.float32).astype(dtype))
    out = DEVICE.xp.empty_like(x)
    return 2 * n**3 / seconds_per_call(blas.multiply, [(x, x, out)])


def launch_overhead():
    """Seconds per call of a tiny kernel: host side of a call, and back to back inside a CUDA graph.

    Returns
    -------
    dict
        ``{"rms_norm call, host": s, "rms_norm in a graph": s}``; on the CPU executor the host side only.
    """
    x = DEVICE.array(np.ones((1, 64), np.float16))
    weight, out = DEVICE.array(np.ones(64, np.float16)), DEVICE.array(np.ones((1, 64), np.float16))
    cupyattn.rms_norm(x, weight, out=out)
    calls = 2000
    start = time.perf_counter()
    for _ in range(calls):
        cupyattn.rms_norm(x, weight, out=out)
    table = {"rms_norm call, host": (time.perf_counter() - start) / calls}
    if DEVICE.is_gpu:
        table["rms_norm in a graph"] = seconds_per_call(lambda x, o: cupyattn.rms_norm(x, weight, out=o), [(x, out)])
    return table
