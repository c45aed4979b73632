# SPDX-License-Identifier: Apache-2.0
"""Steps of QAttn that come again: what layers share, captured steps and what their replays see, threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from attention_layers import Layer, contiguous
from compare import assert_same_bits
from conftest import NumpyArrays

import cupyattn
from cupyattn import CaptureError, PagedCache, PagedParams, Params
from cupyattn.graphs import capture

PAGE_TABLE = np.int32([[7, 3, 4, 9, 0], [1, 2, 8, 6, 0]])


def filled(layer, xp, num_pages=10, page_size=4, **options):
    """A PagedCache of two layers, as it was before a step."""
    cache = PagedCache(2, num_pages, page_size, layer.kv_heads, layer.dim, dtype=layer.dtype, xp=xp.module, **options)
    refill(cache, xp)
    return cache


def refill(cache, xp):
    rng = np.random.default_rng(0)
    for pool in (*cache.k, *cache.v):
        put(pool, rng.standard_normal(pool.shape).astype(pool.dtype))


def put(array, values):
    """Change an array in place."""
    if isinstance(array, np.ndarray):
        array[...] = values
    else:
        array.set(np.ascontiguousarray(values, array.dtype))


def device_of(xp):
    return None if xp.name == "numpy" else 0


# ---- captured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"window_size": 5}, {"invariant": True}])
@pytest.mark.parametrize("q_len", [1, 2, 9])
def test_replays_see_what_changes(xp, q_len, options):
    """Two layers captured once: lengths, pages, tables and input change in place; each replay is an eager step."""
    layer = Layer(xp, dtype="float16", head_norm="heads")
    cache, other = filled(layer, xp), filled(layer, xp)
    params = PagedParams(2, PAGE_TABLE, [5, 2], 5, page_size=4, q_len=q_len)
    x, device = xp.array(layer.inputs(2, q_len)), device_of(xp)
    made = layer.attn.schedule(params, cache, **options)
    turned = {name: xp.array(xp.numpy(table)) for name, table in layer.tables.items()}

    def step():
        assert layer.attn.schedule(params, cache, **options, out=made).decode is made.decode
        for n in range(2):
            layer.attn.forward(x, params, cache, n, **turned, **options, schedule=made)
        return x

    graph = capture(step, xp=xp.module)
    assert sum("schedule" in repr(launch.plan) for launch in graph.launches) == 1
    for past, table, base in (([5, 11], PAGE_TABLE, 100.0), ([0, 7], PAGE_TABLE[::-1].copy(), 100.0),
                              ([11, 0], PAGE_TABLE[:, ::-1].copy(), 7.0)):
        table = np.where(table == 0, 5, table)
        cos, sin = cupyattn.RopeParams(rotary_dim=32, base=base).tables(128)
        rows, fresh = layer.inputs(2, q_len), PagedParams(2, table, past, max(past), page_size=4, q_len=q_len)
        for array, values in ((x, rows), (turned["cos"], cos), (turned["sin"], sin),
                              (params.get_cache_seqlens(device), fresh.cache_seqlens),
                              (params.get_cache_seqlens_after(device), fresh.cache_seqlens_after),
                              (params.get_block_index(device), table)):
            put(array, values)
        refill(cache, xp), refill(other, xp)
        assert graph.replay() is x
        eager = xp.array(rows)
        for n in range(2):
            layer.attn.forward(eager, fresh, other, n, sin=xp.array(sin), cos=xp.array(cos), **options)
        layer.check(x, xp.numpy(eager).astype(np.float64), 0.5)
        for n in range(2):
            layer.check(cache.k[n], xp.numpy(other.k[n]).astype(np.float64), 0.5, what="keys")


def test_a_captured_step_does_nothing_but_launch():
    """Nothing is allocated, read or compiled meanwhile, and what would be is refused before the stream is spoilt."""
    from standin import install

    with install() as xp:
        layer = Layer(xp, dtype="float16", head_norm="heads")
        cache, params = filled(layer, xp), PagedParams(2, PAGE_TABLE, [5, 9], 9, page_size=4, q_len=2)
        x, stream = xp.array(layer.inputs(2, 2)), xp.module.cuda.Stream(non_blocking=True)
        with stream:
            layer.attn.forward(x, params, cache, 0, **layer.tables)
            made = layer.attn.schedule(params, cache)
            layer.attn.forward(x, params, cache, 0, **layer.tables, schedule=made)
            xp.events.clear()
            stream.begin_capture()
            with pytest.raises(CaptureError, match="schedule must be given, with room .* is captured, got None"):
                layer.attn.forward(x, params, cache, 0, **layer.tables)
            layer.attn.schedule(params, cache, out=made)
            layer.attn.forward(x, params, cache, 0, **layer.tables, schedule=made)
            stream.end_capture()
            assert set(xp.events) == {"launches"}


def test_what_would_stay_is_refused_in_a_capture():
    layer = Layer(NumpyArrays(), dtype="float16")
    cache, x = filled(layer, NumpyArrays()), layer.inputs(2, 1)

    def refused(message, params, **options):
        before = x.copy()
        with pytest.raises(CaptureError, match=f"QAttn: {message}"):
            capture(lambda: layer.attn.forward(x, params, options.pop("cache", cache), 0, **layer.tables, **options),
                    xp=np)
        x[...] = before   # the warm-ups ran

    paged = PagedParams(2, PAGE_TABLE, [5, 9], 9, page_size=4, q_len=1)
    exact = cupyattn.schedule(paged.cache_seqlens_after, num_heads=4, num_kv_heads=2, head_dim=32)
    made = layer.attn.schedule(paged, cache)
    refused("schedule must be given, with room for other lengths, while .*, got None; QAttn.schedule makes it", paged)
    refused("schedule must be given, .*, got one of these lengths only", paged, schedule=exact)
    moved = PagedParams(2, PAGE_TABLE, [5, 9], 9, page_size=4, q_len=1, rope_offsets=[1, 2])
    refused("params must have no rope_offsets while a step over a cache is captured", moved, schedule=made)
    for params in (Params(2, 1, 3), Params(2, 1, [3, 2]), Params(2, 1, 3, np.ones((2, 4), bool))):
        refused("params must be PagedParams while a step over a cache is captured, got Params, whose past_len would",
                params, cache=contiguous(layer, 2))
    with pytest.raises(CaptureError, match="call schedule with lengths in host memory unless"):
        capture(lambda: layer.attn.schedule(paged, cache), xp=np)


@pytest.mark.parametrize("case", ["plain", "offsets and mask", "blocks"])
def test_captured_without_a_cache(xp, case):
    """All lengths are those of params; only the input changes, and no schedule is asked for."""
    layer = Layer(xp, dtype="float16")
    options = {"plain": {}, "blocks": {}, "offsets and mask": {
        "position_offsets": [-2, 0], "input_mask": np.array([[False] * 2 + [True] * 4, [True] * 6])}}[case]

    def new():
        params = Params(2, 6, **options)
        if case == "blocks":
            params.cu_seqlens, params.block_diag_layers = [0, 4, 5, 12], {0}
        return params

    x, params = xp.array(layer.inputs(2, 6)), new()
    graph = capture(lambda: layer.attn.forward(x, params, **layer.tables), xp=xp.module)
    assert not any("schedule" in repr(launch.plan) for launch in graph.launches)
    for _ in range(2):
        rows = layer.inputs(2, 6)
        put(x, rows)
        graph.replay()
        assert_same_bits(xp.numpy(x), xp.numpy(layer.attn.forward(xp.array(rows), new(), **layer.tables)))


# ---- what layers share -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["cache", "mask", "no cache", "blocks", "caches"])
def test_one_schedule_for_all_layers(xp, monkeypatch, case):
    """Made by the first layer of a step, or one for each cache of a list; other Params have others."""
    import cupyattn.q_attn.attend as module

    calls, original = [], module.schedule
    monkeypatch.setattr(module, "schedule", lambda *args, **options: calls.append(args) or original(*args, **options))
    layer = Layer(xp, dtype="float16")
    caches = {"no cache": None, "caches": [contiguous(layer, 1, layers=3) for _ in range(2)]}
    cache = caches.get(case, contiguous(layer, 2, layers=3) if case not in caches else None)
    for expected in (1, 2):
        params = Params(2, 6, [0, 0] if case == "caches" else 0, np.ones((2, 6), bool) if case == "mask" else None)
        if case == "blocks":
            params.cu_seqlens, params.block_diag_layers = [0, 4, 12], {0, 1, 2}
        for n in range(3):
            layer.attn.forward(xp.array(layer.inputs(2, 6)), params, cache, n, **layer.tables)
        assert len(calls) == expected * (2 if case == "caches" else 1)
    if xp.name == "standin":
        assert xp.events["launches"] and not any(hasattr(a, "get") for args in calls for a in args)   # host lengths


def test_schedule_is_that_of_forward(xp):
    """The same results with `QAttn.schedule` as without, prefill and decode, over pages and contiguous."""
    layer = Layer(xp, dtype="float16")
    for params, cache in ((PagedParams(2, PAGE_TABLE, [5, 9], 9, page_size=4, q_len=1), filled(layer, xp)),
                          (PagedParams(2, PAGE_TABLE, [0, 3], 3, page_size=4, q_len=9), filled(layer, xp)),
                          (Params(2, 3, 0), contiguous(layer, 2)),
                          (Params(2, 3, 0, np.ones((2, 3), bool)), contiguous(layer, 2))):
        rows = layer.inputs(2, params.seq_len)
        one, other = xp.array(rows), xp.array(rows)
        layer.attn.forward(one, params, cache, 0, **layer.tables)
        if params.paged:
            refill(cache, xp)
        made = layer.attn.schedule(params, cache)
        assert made.limits.max_k_len == (20 if params.paged else 64)
        layer.attn.forward(other, params, cache, 0, **layer.tables, schedule=made)
        layer.check(other, xp.numpy(one).astype(np.float64), 0.5)
    for wrong in (None, [contiguous(layer, 1)]):
        with pytest.raises(TypeError, match="cache must be a PagedCache for a schedule, got"):
            layer.attn.schedule(Params(1, 1, [0]), wrong)


def test_blocks_assigned_between_calls(xp):
    """What of Params may be assigned counts from the next call on."""
    layer, params = Layer(xp, dtype="float16"), Params(2, 6, 0)
    x, found = layer.inputs(2, 6), []
    for blocks, layers in (([0, 4, 12], set()), ([0, 4, 12], {0}), ([0, 7, 12], {0}), ([0, 7, 12], {1})):
        params.cu_seqlens, params.block_diag_layers = blocks, layers
        fresh = Params(2, 6, 0)
        fresh.cu_seqlens, fresh.block_diag_layers = blocks, layers
        found.append(xp.numpy(layer.attn.forward(xp.array(x), params, **layer.tables)))
        assert_same_bits(found[-1], xp.numpy(layer.attn.forward(xp.array(x), fresh, **layer.tables)))
    assert len({array.tobytes() for array in found}) == 3
    with pytest.raises(AttributeError, match="Params: past_len must stay as it is"):
        params.past_len = 2


def test_params_are_let_go():
    """What layers keep of Params goes with it."""
    import gc
    import weakref

    layer, cache = Layer(NumpyArrays(), dtype="float16"), None
    params = Params(2, 3, 0)
    layer.attn.forward(layer.inputs(2, 3), params, cache, **layer.tables)
    gone = weakref.ref(params)
    del params
    gc.collect()
    assert gone() is None


def test_lengths_changed_in_place_are_refused_without_a_schedule():
    """In NumPy arrays, which are read; with a schedule of the new lengths they are what counts."""
    layer, xp = Layer(NumpyArrays(), dtype="float16"), NumpyArrays()
    cache, other = filled(layer, xp), filled(layer, xp)
    params = PagedParams(2, PAGE_TABLE, [5, 9], 9, page_size=4, q_len=1)
    rows = layer.inputs(2, 1)
    layer.attn.forward(rows.copy(), params, cache, 0, **layer.tables)
    refill(cache, xp)
    params.get_cache_seqlens()[:] = [2, 3]
    with pytest.raises(ValueError, match=r"cache_seqlens_after = cache_seqlens \+ 1, got \[6, 10\] and \[2, 3\]"):
        layer.attn.forward(rows.copy(), params, cache, 0, **layer.tables)
    params.get_cache_seqlens_after()[:] = [3, 4]
    with pytest.raises(ValueError, match="schedule must be given for lengths of params that were changed in place"):
        layer.attn.forward(rows.copy(), params, cache, 0, **layer.tables)
    for pool, untouched in zip((*cache.k, *cache.v), (*other.k, *other.v), strict=True):
        assert_same_bits(pool, untouched)
    x, want = rows.copy(), rows.copy()
    layer.attn.forward(x, params, cache, 0, **layer.tables, schedule=layer.attn.schedule(params, cache))
    layer.attn.forward(want, PagedParams(2, PAGE_TABLE, [2, 3], 3, page_size=4, q_len=1), other, 0, **layer.tables)
    layer.check(x, want.astype(np.float64), 0.5)


def test_a_call_made_again_sees_what_changes(xp):
    """The same objects again and again, with other contents, are as new ones."""
    layer = Layer(xp, dtype="float16", formats="int4-g32")
    caches = [PagedCache(1, 10, 4, 2, 32, xp=xp.module) for _ in range(2)]
    params = PagedParams(2, PAGE_TABLE, [5, 9], 9, page_size=4, q_len=1)
    for cache in caches:
        for pool in (cache.k[0], cache.v[0]):
            pool[...] = xp.array(np.full(pool.shape, 0.5, np.float16))
    x = xp.array(layer.inputs(2, 1))
    for _ in range(5):
        rows = layer.inputs(2, 1)
        x[...] = xp.array(rows)
        assert layer.attn.forward(x, params, caches[0], 0, **layer.tables) is x
        fresh = xp.array(rows)
        layer.attn.forward(fresh, PagedParams(2, PAGE_TABLE, [5, 9], 9, page_size=4, q_len=1), caches[1], 0,
                           **{name: table[:] for name, table in layer.tables.items()})
        assert_same_bits(xp.numpy(x), xp.numpy(fresh))


def check_in_threads(work, inputs):
    """All that `work` finds in threads beside each other is, bit for bit, the first that it finds alone."""
    want = [work(rows)[0] for rows in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(work, inputs), want, strict=True):
            for x in found:
                assert_same_bits(x, right)


def test_threads_share_a_layer():
    """Each with a cache of its own, again and again with the same objects and with new ones."""
    layer = Layer(NumpyArrays(), dtype="float16")
    inputs = [layer.inputs(1, 1) for _ in range(4)]

    def work(rows):
        cache, params, x, found = contiguous(layer, 1), Params(1, 1, 0), rows.copy(), []
        for n in range(30):
            x[...] = rows
            layer.attn.forward(x, params if n % 5 else Params(1, 1, 0), cache, 0, **layer.tables)
            found.append(x.copy())
        return found

    check_in_threads(work, inputs)
