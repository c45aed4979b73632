# SPDX-License-Identifier: Apache-2.0
"""A layer's attention spread over ranks of this process, beside the plain `QAttn`: what dealing out its heads costs.

``python perf/bench_tp_attn.py`` prints, for a decoding step and a prompt of Llama-3.2-1B's sizes, milliseconds of
`QAttn` and the ratios of `TPAttn` with 1 and 2 ranks and of ExLlamaV2's `tp_attn_forward_paged_` with 2, measured in
turn. Ranks of one process share its cores or its GPU, one after the other: 1.0 would be the exchange for nothing.
Then microseconds of processor time that Python takes for a step, kernels not run on the CPU.
"""

import contextlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest
from launch_cost import seconds as python_seconds
from launch_cost import without_kernels
from timing import DEVICE

import cupyattn

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 32, 8, 64, 2048
PAGE_SIZE, SCALE = 16, HEAD_DIM ** -0.5
STEPS = {"decode 4 x 1": (4, 1, 200), "prompt 1 x 128": (1, 128, 0)}   # batch, new tokens, tokens before them


def steps(batch, q_len, past):
    """{what: (function of one step, its x)} over equal caches, weights and inputs, on the device."""
    xp, array, rng = DEVICE.xp, DEVICE.array, np.random.default_rng(0)
    pages = -(-(past + q_len) // PAGE_SIZE)
    table = np.arange(batch * pages, dtype=np.int32).reshape(batch, pages)
    shapes = {"q": (HEADS * HEAD_DIM, HIDDEN), "k": (KV_HEADS * HEAD_DIM, HIDDEN), "v": (KV_HEADS * HEAD_DIM, HIDDEN),
              "o": (HIDDEN, HEADS * HEAD_DIM)}
    weights = {name: cupyattn.QMatrix.quantize((rng.standard_normal(shape) / 64).astype(np.float32), "int4-g64")
               for name, shape in shapes.items()}
    layer = {f"q_{name}_proj": weight for name, weight in weights.items()} | {"layernorm": np.ones(HIDDEN, np.float32)}
    cos, sin = map(array, cupyattn.RopeParams(rotary_dim=HEAD_DIM).tables(PAGE_SIZE * pages))
    x = rng.standard_normal((batch, q_len, HIDDEN)).astype(np.float16)
    params = cupyattn.PagedParams(batch, table, [past] * batch, past, PAGE_SIZE, q_len)

    def cache(heads):
        made = cupyattn.PagedCache(1, batch * pages, PAGE_SIZE, heads, HEAD_DIM, xp=xp)
        for pool in (*made.k, *made.v):
            pool.fill(0)
        return made

    def context(size):
        return cupyattn.TPContext(cupyattn.InProcessCommunicator(size, device=0 if DEVICE.is_gpu else None),
                                  num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, hidden_size=HIDDEN)

    def plain():
        attn, mine, own = cupyattn.QAttn(**layer, hidden_size=HIDDEN, num_heads=HEADS, num_kv_heads=KV_HEADS,
                                         head_dim=HEAD_DIM, xp=xp), array(x), cache(KV_HEADS)
        return lambda: attn.forward(mine, params, own, sin=sin, cos=cos), [mine]

    def spread(size):
        ranks = context(size)
        attn, caches = cupyattn.TPAttn.from_layer(ranks, **layer), [cache(heads) for heads in ranks.kv_heads]
        mine = [array(x) for _ in range(size)]
        return lambda: attn.forward(mine, params, caches, sin=sin, cos=cos), mine

    def listed(size):
        ranks = context(size)
        caches, mine, all_ranks = [cache(heads) for heads in ranks.kv_heads], array(x), range(size)
        q, k, v = ([ranks.shard_rows(weights[name], rank, kind).to(xp) for rank in all_ranks]
                   for name, kind in (("q", "q"), ("k", "kv"), ("v", "kv")))
        o = [ranks.shard_output_rows(weights["o"], rank).to(xp) for rank in all_ranks]
        gains = [array(np.ones(HIDDEN, np.float32)) for _ in all_ranks]
        widths = {"bc0": [HIDDEN] * size, "bc1": [HIDDEN] * size, "bc2": [HEADS * HEAD_DIM] * size,
                  **{name: [matrix.shape[0] for matrix in of_ranks] for name, of_ranks in
                     (("q", q), ("k", k), ("v", v), ("o", o))}}
        temps = [[xp.empty((batch * q_len, width), np.float16) for width in of_ranks] for of_ranks in widths.values()]
        params.prep_tp(ranks)

        def step():
            mine[...] = cupyattn.tp_attn_forward_paged_(
                ranks, mine, *temps, [one.k[0] for one in caches], [one.v[0] for one in caches], gains, 1e-6, q, k, v,
                o, HEAD_DIM, 2, batch, q_len, [sin] * size, [cos] * size, params.cache_seqlens_tp,
                params.block_index_tp, SCALE)

        return step, [mine]

    return {"QAttn": plain(), "TPAttn, 1 rank": spread(1), "TPAttn, 2 ranks": spread(2),
            "tp_attn_forward_paged_, 2 ranks": listed(2)}


def checked_steps(name):
    """`steps` of one of STEPS that have been run once and found equal; nothing is timed that is wrong."""
    made = steps(*STEPS[name])
    for step, _ in made.values():
        step()
    want = DEVICE.numpy(made["QAttn"][1][0]).astype(np.float64)
    for what, (_, arrays) in made.items():
        for x in arrays:
            found = DEVICE.numpy(x).astype(np.float64).reshape(want.shape)
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-3 * np.abs(want).max(), err_msg=f"{name}: {what}")
    return {what: step for what, (step, _) in made.items()}


def seconds(name, rounds=40):
    """{what: seconds of a step}: the best of rounds in which all take their turn."""
    made = checked_steps(name)
    times = {what: [] for what in made}
    for _ in range(rounds):
        for what, step in made.items():
            _wait()
            start = time.perf_counter()
            step()
            _wait()
            times[what].append(time.perf_counter() - start)
    return {what: min(of_what) for what, of_what in times.items()}


def python_cost(name, rounds=20):
    """{what: seconds of processor time of a step}, without its kernels on the CPU."""
    made = checked_steps(name)
    with contextlib.nullcontext() if DEVICE.is_gpu else without_kernels(), np.errstate(all="ignore"):
        return {what: python_seconds(step, rounds, _wait) for what, step in made.items()}


def _wait():
    if DEVICE.is_gpu:
        DEVICE.xp.cuda.get_current_stream().synchronize()


@pytest.mark.parametrize("what", ["QAttn", "TPAttn, 1 rank", "TPAttn, 2 ranks", "tp_attn_forward_paged_, 2 ranks"])
@pytest.mark.parametrize("name", STEPS)
def bench_tp_attn(benchmark, name, what):
    benchmark.pedantic(checked_steps(name)[what], rounds=10, iterations=2, warmup_rounds=1)


if __name__ == "__main__":
    print(f"Attention of a layer on {DEVICE.name}")
    for row in STEPS:
        plain, *others = seconds(row).items()
        print(f"{row}: {plain[0]} {1e3 * plain[1]:.2f} ms; " + "; ".join(
            f"{what} x{of_what / plain[1]:.2f}" for what, of_what in others))
    print("Python of a decoding step: " + "; ".join(
        f"{what} {1e6 * of_what:.0f} us" for what, of_what in python_cost("decode 4 x 1").items()))
