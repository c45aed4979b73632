# SPDX-License-Identifier: Apache-2.0
"""A layer's attention, one decoding step of SmolLM2-135M's sizes: the time of the whole, and what its Python costs.

``python perf/bench_q_attn.py`` prints microseconds of processor time of one call, kernels not run on the CPU: with new
Params (as a model makes them for every token), and of the bound launches.
"""

import contextlib
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from launch_cost import seconds, without_kernels
from timing import DEVICE

import cupyattn
from cupyattn.graphs import capture

BATCH, PAGE_SIZE, MAX_PAGES = 4, 16, 16
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 9, 3, 64, 576
TABLE = np.arange(BATCH * MAX_PAGES, dtype=np.int32).reshape(BATCH, MAX_PAGES)


def decoder(xp, array):
    """(layer, x, params of a step, cache, tables) of random int4 weights."""
    rng = np.random.default_rng(0)
    shapes = {"q": (HEADS * HEAD_DIM, HIDDEN), "k": (KV_HEADS * HEAD_DIM, HIDDEN), "v": (KV_HEADS * HEAD_DIM, HIDDEN),
              "o": (HIDDEN, HEADS * HEAD_DIM)}
    weights = {f"q_{name}_proj": cupyattn.QMatrix.quantize(rng.standard_normal(shape).astype(np.float32), "int4-g64")
               for name, shape in shapes.items()}
    layer = cupyattn.QAttn(layernorm=np.ones(HIDDEN, np.float32), hidden_size=HIDDEN, num_heads=HEADS,
                           num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, residual_fp32=True, xp=xp, **weights)
    cache = cupyattn.PagedCache(1, BATCH * MAX_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM, xp=xp)
    for pool in (*cache.k, *cache.v):
        pool.fill(0)
    cos, sin = cupyattn.RopeParams(rotary_dim=HEAD_DIM).tables(PAGE_SIZE * MAX_PAGES)
    x = array(rng.standard_normal((BATCH, 1, HIDDEN)).astype(np.float32))
    return layer, x, new_params(), cache, {"sin": array(sin), "cos": array(cos)}


def new_params():
    return cupyattn.PagedParams(BATCH, TABLE, [40, 7, 100, 200], 200, PAGE_SIZE, 1)


def python_cost(xp, array, rounds=60):
    """Seconds of (a call with new Params, its bound launches), and their number."""
    layer, x, params, cache, tables = decoder(xp, array)
    many = itertools.cycle([new_params() for _ in range(3)])

    def anew():
        layer.forward(x, next(many), cache, 0, **tables)

    def given():
        layer.forward(x, params, cache, 0, **tables, schedule=plan)

    plan = layer.schedule(params, cache)

    def wait():
        if xp is not np:
            xp.cuda.get_current_stream().synchronize()

    with without_kernels() if xp is np else contextlib.nullcontext():
        for _ in range(3):
            anew()
        launches = capture(given, xp=xp).launches

        def bound():
            for launch in launches:
                launch()

        return *(seconds(f, rounds, wait) for f in (anew, bound)), len(launches)


def bench_q_attn(benchmark):
    layer, x, params, cache, tables = decoder(DEVICE.xp, DEVICE.array)
    benchmark.pedantic(lambda: layer.forward(x, params, cache, 0, **tables), rounds=20, iterations=5, warmup_rounds=2)


if __name__ == "__main__":
    anew, bound, launches = python_cost(DEVICE.xp, DEVICE.array)
    print(f"QAttn.forward, {launches} launches, Python on {DEVICE.name}: {1e6 * anew:.1f} us, bound launches "
          f"{1e6 * bound:.1f} us")
