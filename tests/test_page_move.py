# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from compare import assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn.kv.formats import FORMATS
from cupyattn.ops import page_move as op
from cupyattn.reference import kv_codec
from cupyattn.reference.page_move import page_move as expected_move
from cupyattn.runtime.cpu import counters, settings

rng = np.random.default_rng(23)


def make_pool(shape, dtype):
    """Any bytes: NaN of every kind among them."""
    dtype = dtype_of(dtype)
    return rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype)


def check(xp, pools, sources, destinations, tokens=None):
    """Moves in copies of `pools` on `xp`, and the same in NumPy: every byte agrees."""
    lists = [np.int32(sources), np.int32(destinations)]
    options = {} if tokens is None else {"tokens": np.int32(tokens)}
    devices = [xp.array(pool) for pool in pools]
    result = cupyattn.page_move(devices, *map(xp.array, lists), **{name: xp.array(x) for name, x in options.items()})
    assert result is None
    for pool, device in zip(pools, devices, strict=True):
        want = pool.copy()
        expected_move(want, *lists, **options)
        assert_same_bits(xp.numpy(device), want)


@pytest.mark.parametrize("shape, dtype", [
    ((6, 16, 2, 64), "float16"), ((6, 4, 3, 24), "bfloat16"), ((6, 5, 2, 20), "int8"), ((6, 3, 1, 6), "uint8"),
    ((6, 1, 3, 7), "uint8"), ((6, 16, 8), "float16"), ((6, 7), "float32"), ((6, 2, 3, 5, 4, 2), "float16")], ids=str)
def test_page_move(xp, shape, dtype):
    pools = [make_pool(shape, dtype) for _ in range(3)]
    check(xp, pools, [5, 0, -1, 5, 3], [1, 4, 2, 2, -7])
    check(xp, pools, [5, 0, 3], [1, 4, 2], tokens=[shape[1], 0, shape[1] // 2])


def test_views(xp):
    """Pools of another order of axes, at odd offsets, and slices of a wider array; what is not of them stays."""
    base = make_pool((2, 6, 3, 16, 48), "float16")            # [K or V, page, head, token, dim + 8]
    for offset in (0, 8, 3):
        device, want = xp.array(base), base.copy()

        def pools(array, offset=offset):
            return [array[i].transpose(0, 2, 1, 3)[..., offset:offset + 40] for i in range(2)]

        lists = [np.int32([[5, 9], [1, 9], [0, 9]])[:, 0], np.int32([2, 3, 4]), np.int32([16, 9, 1])]
        cupyattn.page_move(pools(device), xp.array(np.int32([5, 9, 1, 9, 0, 9]))[::2], xp.array(lists[1]),
                           tokens=xp.array(lists[2]))
        expected_move(pools(want), lists[0], lists[1], tokens=lists[2])
        assert_same_bits(xp.numpy(device), want)


def test_more_pools_than_a_launch_takes(xp):
    check(xp, [make_pool((4, 2, 8), "float32") for _ in range(2 * op.MAX_POOLS + 1)], [3, 2], [0, 1])


def test_nothing_to_do(xp):
    none = xp.array(np.zeros(0, np.int32))
    pool = make_pool((4, 2, 8), "float16")
    device = xp.array(pool)
    cupyattn.page_move(device, none, none)
    cupyattn.page_move([], none, none)
    cupyattn.page_move(xp.array(pool[:, :, :0]), xp.array(np.int32([1])), xp.array(np.int32([0])))
    assert_same_bits(xp.numpy(device), pool)


# ---- attention after a defragmentation -----------------------------------------------------------------------


def make_cache(xp, format, pages, page_size, heads, head_dim):
    """A pool with a value in every slot; formats of the first token granularity they have."""
    x = rng.standard_normal((pages, page_size, heads, head_dim)).astype(np.float32)
    if format not in FORMATS:
        return xp.array(x.astype(dtype_of(format)))
    made = cupyattn.QuantizedKV(*kv_codec.quantize(x, format), format=format)
    return made.to(xp.module) if xp.name != "numpy" else made


@pytest.mark.parametrize("format", ["float16", "int4", "hadamard6", "fp8_e4m3"])
def test_attention_gives_the_same_bits(xp, format):
    """Holes are closed by moving the last pages down; what was freed is filled with garbage."""
    tables, lengths = np.int32([[9, 2, 7], [4, 8, 0], [11, 1, 3]]), np.int32([44, 17, 48])
    k, v = (make_cache(xp, format, 12, 16, 2, 64) for _ in "kv")
    q = xp.array(rng.standard_normal((3, 4, 64)).astype(np.float16))

    def attend(table):
        return xp.numpy(cupyattn.paged_decode(q, k, v, block_table=xp.array(table), cache_seqlens=xp.array(lengths)))

    before = attend(tables)
    moves = {11: 5, 9: 6, 8: 10}                              # 5, 6 and 10 are free
    cupyattn.page_move([k, v], xp.array(np.int32(list(moves))), xp.array(np.int32(list(moves.values()))))
    for pool in (k, v):
        arrays = pool.arrays.values() if hasattr(pool, "arrays") else [pool]
        for array in arrays:
            if array.ndim > 1:
                array[8:10] = 0x7F if array.dtype.kind in "iu" else np.nan
                array[11] = 0x7F if array.dtype.kind in "iu" else np.nan
    after = attend(np.vectorize(lambda page: moves.get(page, page))(tables).astype(np.int32))
    assert np.abs(before.astype(np.float32)).max() > 0.01
    assert_same_bits(after, before)


def test_a_copy_of_a_partial_page(xp):
    """A sequence leaves a shared prefix in the middle of a page: it gets a copy of the tokens that both have."""
    k, v = (make_cache(xp, "int8", 4, 16, 1, 32) for _ in "kv")
    q = xp.array(rng.standard_normal((1, 2, 32)).astype(np.float16))
    for pool in (k, v):
        for array in pool.arrays.values():
            array[3] = 0x7F if array.dtype.kind in "iu" else np.nan
    cupyattn.page_move([k, v], xp.array(np.int32([2])), xp.array(np.int32([3])), tokens=xp.array(np.int32([5])))

    def attend(pages):
        return xp.numpy(cupyattn.paged_decode(q, k, v, block_table=xp.array(np.int32([pages])),
                                              cache_seqlens=xp.array(np.int32([21]))))

    assert_same_bits(attend([0, 3]), attend([0, 2]))
    assert np.isnan(xp.numpy(k.scale)[3, 5:].astype(np.float32)).all()      # no token more


def test_scales_shared_by_all_pages_stay(xp):
    made = cupyattn.QuantizedKV(xp.array(make_pool((4, 2, 3, 32), "int8")),
                                xp.array(rng.standard_normal((3, 32)).astype(np.float32)), format="int8_channel")
    codes, scale = xp.numpy(made.codes), xp.numpy(made.scale)
    cupyattn.page_move(made, xp.array(np.int32([3])), xp.array(np.int32([0])))
    codes[0] = codes[3]
    assert_same_bits(xp.numpy(made.codes), codes)
    assert_same_bits(xp.numpy(made.scale), scale)


def test_all_layers_of_a_paged_cache():
    cache = cupyattn.PagedCache(3, 5, 4, 2, 32, k_format="hadamard8", v_format="float16")
    for pool in (*cache.k, *cache.v):
        for array in pool.arrays.values() if hasattr(pool, "arrays") else [pool]:
            array[...] = np.arange(5).reshape(5, *[1] * (array.ndim - 1))
    cupyattn.page_move([*cache.k, *cache.v], np.int32([4, 3]), np.int32([0, 1]))
    for pool in (*cache.k, *cache.v):
        for array in pool.arrays.values() if hasattr(pool, "arrays") else [pool]:
            assert (array == np.array([4, 3, 2, 3, 4]).reshape(5, *[1] * (array.ndim - 1))).all()


# ---- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_on_a_device_wild_ids_touch_nothing(xp):
    pool = make_pool((4, 3, 8), "float16")
    device = xp.array(pool)
    cupyattn.page_move(device, xp.array(np.int32([4, 0, 2**31 - 1, -1, 1, 1])),
                       xp.array(np.int32([0, 4, 1, 1, -(2**31), 3])), tokens=xp.array(np.int32([3, 3, 3, 3, 3, 99])))
    pool[3] = pool[1]
    assert_same_bits(xp.numpy(device), pool)


def test_errors():
    pool, one, two = np.zeros((4, 2, 3, 8), np.float16), np.int32([1]), np.int32([2])

    def call(error, match, pools=pool, sources=one, destinations=two, **options):
        with pytest.raises(error, match="page_move: " + match):
            cupyattn.page_move(pools, sources, destinations, **options)

    call(ValueError, "destinations must be no sources, got page 2 in both", sources=np.int32([1, 2]),
         destinations=np.int32([2, 0]))
    call(ValueError, "destinations must be no sources, got page 1 in both", destinations=one)
    call(ValueError, "destinations must name a page once, got page 3 twice", sources=np.int32([0, 1]),
         destinations=np.int32([3, 3]))
    call(ValueError, "sources must be below the 4 pages of the pools, or negative for no move, got 4",
         sources=np.int32([4]))
    call(ValueError, "destinations must be below the 4 pages", destinations=np.int32([9]))
    call(ValueError, "tokens must be from 0 to the page_size 2, got 3", tokens=np.int32([3]))
    call(ValueError, "tokens must be from 0 to the page_size 2, got -1", tokens=np.int32([-1]))
    call(TypeError, "sources must be int32, got int64", sources=np.array([1]))
    call(TypeError, "sources must be a NumPy or CuPy array, got list", sources=[1])
    call(ValueError, r"destinations must be \[moves\] = \[1\], got \[2\]", destinations=np.int32([2, 3]))
    call(ValueError, r"sources must be \[moves\]", sources=np.int32([[1]]))
    call(ValueError, r"tokens must be \[moves\] = \[1\], got \[0\]", tokens=np.int32([]))
    call(ValueError, r"pools\[1\] must have the num_pages and page_size of pools\[0\], \[4, 2\], got \[5, 2\]",
         pools=[pool, np.zeros((5, 2, 1))])
    call(ValueError, r"pools must be \[num_pages, page_size, \.\.\.\], got \[4\]", pools=np.zeros(4))
    call(ValueError, "pools must have at most two axes behind page_size that are apart in memory",
         pools=np.zeros((4, 2, 4, 4, 4))[:, :, ::2, ::2, ::2])
    call(TypeError, r"pools\[0\] must be a NumPy or CuPy array, got str", pools=["pool"])
    frozen = pool.copy()
    frozen.flags.writeable = False
    call(ValueError, "pools must be writeable", pools=frozen)


@pytest.mark.parametrize("on", ["cpu", "sm_90a"])
@pytest.mark.parametrize("shape, dtype", [((5, 40, 2, 32), "float16"), ((5, 7, 3, 5), "uint8")], ids=str)
def test_page_move_checked(shape, dtype, on, monkeypatch):
    """Also with a GPU's blocks; every byte once each way."""
    if on != "cpu":
        monkeypatch.setattr(op, "_plan_page_move", as_planned_for(on))
    pool = make_pool(shape, dtype)
    want = pool.copy()
    expected_move(want, [4, 4], [0, 2])
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        got = pool.copy()
        with settings(check=True, schedule=schedule, seed=seed), counters() as launches:
            cupyattn.page_move(got, np.int32([4, 4]), np.int32([0, 2]))
        assert_same_bits(got, want)
        moved = launches[0].buffers["pools.pool0"]
        assert moved["bytes_read"] == moved["bytes_written"] == 2 * pool[0].nbytes


def as_planned_for(arch):
    """The plan for another arch, run on the CPU all the same."""
    make_plan = op._plan_page_move.__wrapped__   # not from the cache, for it is changed

    def planned(*args):
        plan, slices = make_plan(*args[:-1], arch)
        object.__setattr__(plan, "arch", "cpu")
        return plan, slices

    return planned


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), pages=st.integers(2, 9), page_size=st.integers(1, 20),
       rest=st.lists(st.integers(1, 9), max_size=2), dtype=st.sampled_from(["uint8", "float16", "float32"]))
def test_any_moves(data, pages, page_size, rest, dtype):
    order = data.draw(st.permutations(range(pages)))
    cut = data.draw(st.integers(0, pages - 1))
    destinations = order[:cut]
    sources = [data.draw(st.sampled_from(order[cut:])) for _ in destinations]
    tokens = data.draw(st.one_of(st.none(), st.lists(st.integers(0, page_size), min_size=cut, max_size=cut)))
    pool = make_pool((pages, page_size, *rest), dtype)
    got, want = pool.copy(), pool.copy()
    options = {} if tokens is None else {"tokens": np.int32(tokens)}
    cupyattn.page_move(got, np.int32(sources), np.int32(destinations), **options)
    expected_move(want, sources, destinations, **options)
    assert_same_bits(got, want)


def test_unmoved_garbage_is_not_read():
    """A page that takes no part may be anything, uninitialised in the checker's eyes included."""
    pool = poison(np.empty((3, 2, 8), np.float32))
    pool[1] = 1
    with settings(check=True), counters() as launches:
        cupyattn.page_move(pool, np.int32([1]), np.int32([0]))
    assert launches[0].buffers["pools.pool0"]["bytes_read"] == pool[1].nbytes
    assert (pool[:2] == 1).all() and np.isnan(pool[2]).all()
