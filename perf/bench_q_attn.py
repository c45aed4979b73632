# SPDX-License-Identifier: Apache-2.0
"""A layer's attention, one decoding step of SmolLM2-135M's sizes: the time of the whole, and what its Python costs.

``python perf/bench_q_attn.py`` prints microseconds of processor time of one layer's call, kernels not run on the CPU,
beside what its launches cost by themselves: each made and called by ``plan.bind(...)()``, and made before.
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
from cupyattn.q_attn.attend import Options
from cupyattn.runtime.bound import Bound

BATCH, PAGE_SIZE, MAX_PAGES = 4, 16, 16
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 9, 3, 64, 576
PAST = [40, 7, 100, 200]
TABLE = np.arange(BATCH * MAX_PAGES, dtype=np.int32).reshape(BATCH, MAX_PAGES)


LAYERS = 30


def decoder(xp, array, layers=1):
    """(layers, x, params of a step, cache, tables) of random int4 weights."""
    rng = np.random.default_rng(0)
    shapes = {"q": (HEADS * HEAD_DIM, HIDDEN), "k": (KV_HEADS * HEAD_DIM, HIDDEN), "v": (KV_HEADS * HEAD_DIM, HIDDEN),
              "o": (HIDDEN, HEADS * HEAD_DIM)}
    weights = {f"q_{name}_proj": cupyattn.QMatrix.quantize(rng.standard_normal(shape).astype(np.float32), "int4-g64")
               for name, shape in shapes.items()}
    made = [cupyattn.QAttn(layernorm=np.ones(HIDDEN, np.float32), hidden_size=HIDDEN, num_heads=HEADS,
                           num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, residual_fp32=True, xp=xp, **weights)
            for _ in range(layers)]
    cache = cupyattn.PagedCache(layers, BATCH * MAX_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM, xp=xp)
    for pool in (*cache.k, *cache.v):
        pool.fill(0)
    cos, sin = cupyattn.RopeParams(rotary_dim=HEAD_DIM).tables(PAGE_SIZE * MAX_PAGES)
    x = array(rng.standard_normal((BATCH, 1, HIDDEN)).astype(np.float32))
    return made, x, new_params(), cache, {"sin": array(sin), "cos": array(cos)}


def new_params():
    return cupyattn.PagedParams(BATCH, TABLE, PAST, max(PAST), PAGE_SIZE, 1)


def python_cost(xp, array, rounds=60):
    """(seconds of a layer's call by what kind of call it is, its launches)."""
    layers, x, params, cache, tables = decoder(xp, array, LAYERS)
    layer, device = layers[0], None if xp is np else xp.cuda.runtime.getDevice()
    made, lengths = layer.schedule(params, cache), itertools.cycle(range(30))
    before, after = params.get_cache_seqlens(device), params.get_cache_seqlens_after(device)
    starts, advanced, fresh = array(np.int32(PAST)), new_params(), (new_params() for _ in itertools.count())

    def all_of_it():
        layer.checked(x, advanced, cache, 0, tables["sin"], tables["cos"], Options(), None, (), None, None)()

    def new_for_each_step():
        one = next(fresh)
        for n, layer in enumerate(layers):
            layer.forward(x, one, cache, n, **tables)

    def loop():
        before[...] = starts + next(lengths)
        after[...] = before + 1
        layer.schedule(params, cache, out=made)
        for n, one in enumerate(layers):
            one.forward(x, params, cache, n, **tables, schedule=made)

    def again():
        layer.forward(x, advanced, cache, 0, **tables)

    def wait():
        if xp is not np:
            xp.cuda.get_current_stream().synchronize()

    with without_kernels() if xp is np else contextlib.nullcontext():
        for _ in range(5):
            loop(), again()
        launches = capture(lambda: layer.forward(x, params, cache, 0, **tables, schedule=made), xp=xp).launches

        def bind():
            for launch in launches:
                Bound(launch.plan, launch.args, launch.buffers)()

        def bound():
            for launch in launches:
                launch()

        costs = {"with all of its Python": seconds(all_of_it, rounds, wait),
                 f"of {LAYERS} layers, new PagedParams and Schedule for each step":
                     seconds(new_for_each_step, rounds // 10, wait) / LAYERS,
                 f"of {LAYERS} layers, PagedParams and Schedule filled again for each step":
                     seconds(loop, rounds // 10, wait) / LAYERS,
                 "called again": seconds(again, rounds, wait), "plan.bind(...)() for each launch":
                     seconds(bind, rounds, wait), "launches bound before": seconds(bound, rounds, wait)}
    return costs, launches


def bench_q_attn(benchmark):
    (layer,), x, params, cache, tables = decoder(DEVICE.xp, DEVICE.array)
    benchmark.pedantic(lambda: layer.forward(x, params, cache, 0, **tables), rounds=20, iterations=5, warmup_rounds=2)


def main():
    costs, launches = python_cost(DEVICE.xp, DEVICE.array)
    print(f"QAttn.forward, {len(launches)} launches, Python on {DEVICE.name}:\n")
    *_, bind, bound = costs.values()
    print("| call | us | x plan.bind(...)() | x bound before |\n|---|---:|---:|---:|")
    for name, cost in costs.items():
        print(f"| {name} | {1e6 * cost:.1f} | {cost / bind:.2f} | {cost / bound:.1f} |")


if __name__ == "__main__":
    main()
