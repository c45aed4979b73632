# SPDX-License-Identifier: Apache-2.0
"""What Python costs a decode step: every op called anew, beside its bound launches. Kernels do not run.

``python perf/launch_cost.py`` prints microseconds of processor time, the best of many rounds. NumPy: what calls into
the executor's library reaches a function that does nothing. A GPU: launches are real, of arrays so small that the
device keeps up.
"""

import contextlib
import ctypes
import functools
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from timing import DEVICE

import cupyattn
from cupyattn.graphs import BoundSteps, capture, place
from cupyattn.runtime import cpu

BATCH, PAGE_SIZE, MAX_PAGES = 4, 16, 16
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 9, 3, 64, 576, 1536   # SmolLM2-135M
HEAD_OPTIONS = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


@contextlib.contextmanager
def without_kernels():
    """Launches on the CPU stop where the executor's library would begin."""
    nothing = ctypes.CDLL(None).pthread_self   # returns an address, which no launch returns
    real = cpu._kernel

    @functools.cache
    def kernel(*key):
        found = real(*key)
        nothing.argtypes = found.executor.ca_launch.argtypes
        return found._replace(executor=SimpleNamespace(ca_launch=nothing))

    with mock.patch.object(cpu, "_kernel", kernel):
        yield


def decode_ops(array, to):
    """Ops of a decode step by name: functions without arguments. `array` copies NumPy arrays to the device, `to` a
    QMatrix."""
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=np.float16):
        return array(rng.standard_normal(shape).astype(dtype))

    def weights(rows, columns):
        return to(cupyattn.QMatrix.quantize(rng.standard_normal((rows, columns)).astype(np.float32), "int4-g64"))

    heads = HEADS + 2 * KV_HEADS
    x, h, gain, residual = normal(BATCH, HIDDEN), normal(BATCH, HIDDEN), normal(HIDDEN), normal(BATCH, HIDDEN)
    projected, (q, mixed) = normal(BATCH, heads * HEAD_DIM), (normal(BATCH, HEADS, HEAD_DIM) for _ in "qm")
    gate_up, activated = normal(BATCH, 2 * INTERMEDIATE), normal(BATCH, INTERMEDIATE)
    qkv, o, down = weights(heads * HEAD_DIM, HIDDEN), weights(HIDDEN, HIDDEN), weights(HIDDEN, INTERMEDIATE)
    k_cache, v_cache = (normal(BATCH * MAX_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM) for _ in "kv")
    table = array(np.arange(BATCH * MAX_PAGES, dtype=np.int32).reshape(BATCH, MAX_PAGES))
    lengths = np.int32([40, 7, 100, 200])
    lengths, positions = array(lengths), array(lengths - 1)
    cos, sin = (normal(PAGE_SIZE * MAX_PAGES, HEAD_DIM // 2, dtype=np.float32) for _ in "cs")
    made = cupyattn.schedule(lengths, max_k_len=PAGE_SIZE * MAX_PAGES, **HEAD_OPTIONS)
    split = projected.reshape(BATCH, heads, HEAD_DIM)
    queries, keys, values = split[:, :HEADS], split[:, HEADS:-KV_HEADS], split[:, -KV_HEADS:]
    gate, up = gate_up[:, :INTERMEDIATE], gate_up[:, INTERMEDIATE:]
    flat = mixed.reshape(BATCH, HIDDEN)
    return {
        "schedule": lambda: cupyattn.schedule(lengths, out=made, **HEAD_OPTIONS),
        "rms_norm": lambda: cupyattn.rms_norm(x, gain, residual=residual, out=h),
        "quant_gemm qkv": lambda: cupyattn.quant_gemm(h, qkv, out=projected),
        "kv_append": lambda: cupyattn.kv_append(keys, values, k_cache, v_cache, block_table=table, positions=positions,
                                                q=queries, q_out=q, cos=cos, sin=sin),
        "paged_decode": lambda: cupyattn.paged_decode(q, k_cache, v_cache, block_table=table, cache_seqlens=lengths,
                                                      schedule=made, out=mixed),
        "quant_gemm o": lambda: cupyattn.quant_gemm(flat, o, out=x),
        "silu_mul": lambda: cupyattn.silu_mul(gate, up, out=activated),
        "quant_gemm down": lambda: cupyattn.quant_gemm(activated, down, out=x)}


def seconds(call, rounds, wait):
    """Processor time of a call: the best round of 20."""
    times = []
    for _ in range(rounds):
        wait()
        start = time.thread_time()
        for _ in range(20):
            call()
        times.append((time.thread_time() - start) / 20)
    return min(times)


def measure(xp, array, rounds=100):
    """Rows (op, launches, seconds of an eager call, of its bound launches); the last two are all ops in order.

    ``"step, BoundSteps"`` is the step where four of its arrays say that it was called with them before.
    `array` copies a NumPy array to where `xp` has its own.
    """
    ops = decode_ops(array, lambda matrix: matrix.to(xp))

    def wait():
        if xp is not np:
            xp.cuda.get_current_stream().synchronize()

    def step():
        for op in ops.values():
            op()

    steps, inputs = BoundSteps(xp), [array(np.zeros((4, 64), np.float16)) for _ in range(4)]

    def step_again():
        steps.run(tuple(map(place, inputs)), step)

    rows = []
    with without_kernels() if xp is np else contextlib.nullcontext():
        for name, op in {**ops, "step": step, "step, BoundSteps": step_again}.items():
            launches = [launch.run for launch in capture(op, xp=xp).launches]

            def bound(launches=launches):
                for launch in launches:
                    launch()

            rows.append((name, len(launches), seconds(op, rounds, wait), seconds(bound, rounds, wait)))
    return rows


def markdown(rows):
    lines = ["| op | launches | eager, µs | bound, µs | ratio |", "|---|---:|---:|---:|---:|"]
    return "\n".join(lines + [f"| {name} | {launches} | {1e6 * eager:.1f} | {1e6 * bound:.1f} | {eager / bound:.1f} |"
                              for name, launches, eager, bound in rows])


if __name__ == "__main__":
    print(f"Python per launch on: {DEVICE.name}\n")
    print(markdown(measure(DEVICE.xp, DEVICE.array)))
