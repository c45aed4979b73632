# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from compare import assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn.reference.kv_append import kv_append as expected_append
from cupyattn.runtime.cpu import settings

FLOATS = ("float16", "bfloat16", "float32")
rng = np.random.default_rng(13)


def new_tokens(tokens, heads, head_dim, dtype="float16", head_dim_v=None):
    k = rng.standard_normal((tokens, heads, head_dim)).astype(dtype_of(dtype))
    return k, rng.standard_normal((tokens, heads, head_dim_v or head_dim)).astype(k.dtype)


def empty_caches(num_pages, page_size, heads, head_dim, dtype="float16", head_dim_v=None):
    """Caches full of NaN."""
    return tuple(poison(np.empty((num_pages, page_size, heads, d), dtype_of(dtype)))
                 for d in (head_dim, head_dim_v or head_dim))


def check(xp, k, v, caches, view=lambda cache: cache, **places):
    """Append on `xp` through `view` of the caches; every bit, written or not, is what the reference leaves."""
    want = [cache.copy() for cache in caches]
    expected_append(k, v, *map(view, want), **places)
    device = [xp.array(cache) for cache in caches]
    assert cupyattn.kv_append(xp.array(k), xp.array(v), *map(view, device),
                              **{name: xp.array(a) for name, a in places.items()}) is None
    for got, cache in zip(device, want, strict=True):
        assert_same_bits(xp.numpy(got), cache)


@pytest.mark.parametrize("cache_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads, head_dim", [(3, 64), (1, 20)])
def test_kv_append(xp, dtype, cache_dtype, heads, head_dim):
    k, v = new_tokens(5, heads, head_dim, dtype)
    check(xp, k, v, empty_caches(3, 4, heads, head_dim, cache_dtype), slots=np.int32([11, 0, -1, 5, 6]))


@pytest.mark.full
@pytest.mark.parametrize("cache_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("page_size", [1, 2, 7, 16, 64, 192, 256])
@pytest.mark.parametrize("head_dim, head_dim_v", [(8, 8), (72, 80), (96, 64), (100, 33), (128, 128), (192, 128)])
def test_every_specialisation(xp, dtype, cache_dtype, page_size, head_dim, head_dim_v):
    for heads in (1, 5, 8):
        k, v = new_tokens(11, heads, head_dim, dtype, head_dim_v)
        slots = rng.permutation(11 * page_size)[:11].astype(np.int64)
        check(xp, k, v, empty_caches(11, page_size, heads, head_dim, cache_dtype, head_dim_v), slots=slots)


@pytest.mark.parametrize("slot_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_slots(xp, slot_dtype, page_size):
    k, v = new_tokens(7, 2, 8)
    slots = rng.permutation(6 * page_size)[:7].astype(slot_dtype) if page_size > 1 else np.arange(-1, 6)[::-1]
    check(xp, k, v, empty_caches(6, page_size, 2, 8), slots=slots.astype(slot_dtype))


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_block_table_decode(xp, page_size):
    """One new token per sequence, one of them padding; ids no token falls on may be anything."""
    k, v = new_tokens(4, 3, 64)
    table = np.full((4, 5), 2_147_480_000, np.int32)
    positions = np.int32([0, 2 * page_size, -1, 5 * page_size - 1])
    table[0, 0], table[1, 2], table[3, 4] = 6, 0, 3
    check(xp, k, v, empty_caches(7, page_size, 3, 64), block_table=table, positions=positions)


def test_block_table_prefill_of_several_sequences(xp):
    k, v = new_tokens(9, 2, 16)
    table = rng.permutation(12).astype(np.int32).reshape(3, 4)
    check(xp, k, v, empty_caches(12, 3, 2, 16), block_table=table, positions=np.int32([5, 6, 7, 0, 1, 2, 3, -1, 11]),
          batch_indices=np.int32([2, 2, 2, 0, 0, 0, 0, 1, 1]))


LAYOUTS = {
    "nhd": ((6, 4, 3, 16), lambda c: c),
    "hnd": ((6, 3, 4, 16), lambda c: c.transpose(0, 2, 1, 3)),
    "head_major_pool": ((3, 6, 4, 16), lambda c: c.transpose(1, 2, 0, 3)),
    "padded_and_offset": ((6, 4, 3, 29), lambda c: c[:, :, :, 5:21]),
    "every_second_page": ((12, 4, 3, 16), lambda c: c[1::2]),
    "pages_backwards": ((6, 4, 3, 16), lambda c: c[::-1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(xp, layout):
    shape, view = LAYOUTS[layout]
    caches = [poison(np.empty(shape, np.float16)) for _ in "kv"]
    k, v = new_tokens(5, 3, 16)
    check(xp, k, v, caches, view, slots=np.int64([23, 0, 7, -1, 12]))


def test_contiguous_cache(xp):
    """[batch, capacity, heads, head_dim] is a cache with one page per sequence."""
    k, v = new_tokens(4, 3, 32)
    check(xp, k, v, empty_caches(4, 50, 3, 32), block_table=np.arange(4, dtype=np.int32)[:, None],
          positions=np.int32([49, 0, 17, 3]))


def test_key_and_value_caches_of_different_layout_and_head_dim(xp):
    k, v = new_tokens(3, 2, 24, head_dim_v=8)
    k_cache, v_cache = empty_caches(4, 2, 2, 24, head_dim_v=8)
    slots = np.int32([7, 2, 3])
    want = k_cache.copy(), v_cache.copy()
    expected_append(k, v, *want, slots=slots)
    device_k, device_v = xp.array(k_cache), xp.array(np.ascontiguousarray(v_cache.transpose(2, 0, 1, 3)))
    cupyattn.kv_append(xp.array(k), xp.array(v), device_k, device_v.transpose(1, 2, 0, 3), slots=xp.array(slots))
    assert_same_bits(xp.numpy(device_k), want[0])
    assert_same_bits(xp.numpy(device_v).transpose(1, 2, 0, 3), want[1])


def test_slices_of_a_fused_projection(xp):
    heads, kv_heads, head_dim = 4, 2, 16
    fused = rng.standard_normal((10, (heads + 2 * kv_heads) * head_dim + 3)).astype(np.float16)
    at_k, at_v, end = (n * head_dim for n in (heads, heads + kv_heads, heads + 2 * kv_heads))
    slots = rng.permutation(20)[:10].astype(np.int32)
    caches = empty_caches(5, 4, kv_heads, head_dim)
    want = [c.copy() for c in caches]
    expected_append(fused[:5, at_k:at_v].reshape(5, kv_heads, head_dim),
                    fused[:5, at_v:end].reshape(5, kv_heads, head_dim), *want, slots=slots[::2])
    base, device = xp.array(fused)[:5], [xp.array(c) for c in caches]
    cupyattn.kv_append(base[:, at_k:at_v].reshape(5, kv_heads, head_dim),
                       base[:, at_v:end].reshape(5, kv_heads, head_dim), *device, slots=xp.array(slots)[::2])
    for got, cache in zip(device, want, strict=True):
        assert_same_bits(xp.numpy(got), cache)


def test_nan_and_special_values_keep_their_bits(xp):
    bits = np.uint16([0x7E01, 0xFC00, 0x8000, 0x0001, 0xFDFF, 0x7C00, 0x03FF, 0xFE55])
    k = np.broadcast_to(bits.view(np.float16), (2, 3, 8)).copy()
    check(xp, k, k, empty_caches(1, 2, 3, 8), slots=np.int32([1, 0]))


def test_many_tokens(xp):
    k, v = new_tokens(1500, 3, 64)
    check(xp, k, v, empty_caches(100, 16, 3, 64), slots=rng.permutation(1600)[:1500].astype(np.int64))


def test_positions_200000(xp):
    k, v = new_tokens(2, 1, 8)
    table = np.zeros((2, 1600), np.int32)
    table[0, 200_000 // 128], table[1, 199_999 // 128] = 1, 2
    check(xp, k, v, empty_caches(3, 128, 1, 8), block_table=table, positions=np.int32([200_000, 199_999]))


def sparse_cache(file, pages, stride_page, page_size, heads, head_dim):
    """float16 cache whose pages lie `stride_page` elements apart in a file that exists only where it is written."""
    base = np.memmap(file, np.float16, "w+", shape=(pages * stride_page,))
    return np.lib.stride_tricks.as_strided(base, (pages, page_size, heads, head_dim),
                                           (2 * stride_page, 2 * heads * head_dim, 2 * head_dim, 2))


@pytest.mark.parametrize("by_table", [False, True])
def test_offsets_beyond_32_bits(tmp_path, by_table):
    """Page 3 of this cache lies 3.2e9 elements in."""
    k, v = new_tokens(2, 2, 16)
    k_cache, v_cache = (sparse_cache(tmp_path / name, 4, 2**30 + 16, 4, 2, 16) for name in "kv")
    places = {"block_table": np.int32([[3], [2]]), "positions": np.int32([1, 3])} if by_table else \
        {"slots": np.int64([13, 11])}
    cupyattn.kv_append(k, v, k_cache, v_cache, **places)
    for new, cache in ((k, k_cache), (v, v_cache)):
        assert_same_bits(cache[3, 1], new[0])
        assert_same_bits(cache[2, 3], new[1])
        assert not cache[3, [0, 2, 3]].any() and not cache[2, :3].any() and not cache[:2].any()


OUT_OF_RANGE = {
    "slot past the end": {"slots": np.int64([0, 12, 3])},
    "slot of 2**40": {"slots": np.int64([0, 2**40, 3])},
    "page id past the end": {"block_table": np.int32([[0], [3], [2]]), "positions": np.int32([0, 1, 2])},
    "page id negative": {"block_table": np.int32([[0], [-1], [2]]), "positions": np.int32([0, 1, 2])},
    "page id huge": {"block_table": np.int32([[0], [2**31 - 1], [2]]), "positions": np.int32([0, 1, 2])},
    "position past the table": {"block_table": np.int32([[0], [1], [2]]), "positions": np.int32([0, 4, 2])},
    "row past the table": {"block_table": np.int32([[0], [1]]), "positions": np.int32([0, 1, 2]),
                           "batch_indices": np.int32([0, 2, 1])},
    "row negative": {"block_table": np.int32([[0], [1]]), "positions": np.int32([0, 1, 2]),
                     "batch_indices": np.int32([0, -1, 1])},
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_out_of_range(xp, case):
    """NumPy: refused, nothing written. On the device: that token writes nothing."""
    k, v = new_tokens(3, 2, 8)
    caches = empty_caches(3, 4, 2, 8)
    if xp.name != "numpy":
        check(xp, k, v, caches, **OUT_OF_RANGE[case])
        return
    before = caches[0].copy()
    with pytest.raises(ValueError, match="kv_append: (slots|block_table|positions|batch_indices) must be in"):
        cupyattn.kv_append(k, v, *caches, **OUT_OF_RANGE[case])
    assert_same_bits(caches[0], before)


def test_cache_without_pages(xp):
    k, v = new_tokens(1, 2, 8)
    caches = empty_caches(0, 4, 2, 8)
    for places in ({"slots": np.int32([0])}, {"block_table": np.int32([[0]]), "positions": np.int32([0])}):
        if xp.name == "numpy":
            with pytest.raises(ValueError, match=r"must be in \[(-1|0), 0\)"):
                cupyattn.kv_append(k, v, *caches, **places)
        else:
            check(xp, k, v, caches, **places)
    check(xp, k, v, caches, slots=np.int32([-1]))


@pytest.mark.parametrize("places", [
    {"slots": np.int32([4, -1, -1, 4])},
    {"block_table": np.int32([[1, 0], [1, 2]]), "positions": np.int32([0, 4, -1, 0]),
     "batch_indices": np.int32([0, 1, 1, 1])}])
def test_duplicate_places(places):
    k, v = new_tokens(4, 2, 8)
    with pytest.raises(ValueError, match="kv_append: places must differ .* got page 1 slot 0 twice"):
        cupyattn.kv_append(k, v, *empty_caches(3, 4, 2, 8), **places)


def test_empty(xp):
    check(xp, *new_tokens(0, 2, 8), empty_caches(3, 4, 2, 8), slots=np.zeros(0, np.int32))
    check(xp, *new_tokens(2, 0, 8), empty_caches(3, 4, 0, 8), slots=np.zeros(2, np.int32))
    check(xp, *new_tokens(3, 2, 8), empty_caches(3, 4, 2, 8), slots=np.int32([-1, -1, -1]))


def test_errors():
    k, v = new_tokens(2, 3, 8)
    k_cache, v_cache = empty_caches(3, 4, 3, 8)
    slots, table, positions = np.int32([0, 1]), np.zeros((2, 2), np.int32), np.int32([0, 0])
    for error, message, arrays, places in (
            (ValueError, "kv_append: places must be given by slots, or by .* got neither", (k, v, k_cache, v_cache),
             {}),
            (ValueError, "got slots and block_table and positions", (k, v, k_cache, v_cache),
             {"slots": slots, "block_table": table, "positions": positions}),
            (ValueError, "got block_table", (k, v, k_cache, v_cache), {"block_table": table}),
            (ValueError, "batch_indices must come with block_table", (k, v, k_cache, v_cache),
             {"slots": slots, "batch_indices": slots}),
            (ValueError, "batch_indices must be given unless", (k, v, k_cache, v_cache),
             {"block_table": table[:1], "positions": positions}),
            (TypeError, "slots must be int32 or int64, got float64", (k, v, k_cache, v_cache),
             {"slots": slots.astype(float)}),
            (ValueError, r"slots must be \[tokens\] = \[2\], got \[1\]",
             (k, v, k_cache, v_cache), {"slots": slots[:1]}),
            (ValueError, r"k must be \[tokens, num_kv_heads, head_dim\]",
             (k[0], v, k_cache, v_cache), {"slots": slots}),
            (ValueError, r"v must be .* = \[2, 3, \*\], got \[1, 3, 8\]", (k, v[:1], k_cache, v_cache),
             {"slots": slots}),
            (ValueError, r"k_cache must be .* = \[\*, \*, 3, 8\], got \[3, 4, 2, 8\]",
             (k, v, k_cache[:, :, 1:], v_cache),
             {"slots": slots}),
            (ValueError, r"v_cache must be .* = \[3, 4, 3, 8\], got \[2, 4, 3, 8\]", (k, v, k_cache, v_cache[1:]),
             {"slots": slots}),
            (TypeError, "v must be float16, got float32",
             (k, v.astype(np.float32), k_cache, v_cache), {"slots": slots}),
            (TypeError, "k_cache must be float16, bfloat16, float32 or a QuantizedKV, got int8",
             (k, v, k_cache.astype(np.float32).view(np.int8)[..., :8], v_cache), {"slots": slots}),
            (ValueError, "k_cache must have a contiguous last axis", (k, v, k_cache[..., ::-1], v_cache),
             {"slots": slots}),
            (ValueError, "page_size of at least 1", (k, v, k_cache[:, :0], v_cache[:, :0]), {"slots": slots})):
        with pytest.raises(error, match=message):
            cupyattn.kv_append(*arrays, **places)
    v_cache.flags.writeable = False
    with pytest.raises(ValueError, match="kv_append: v_cache must be writeable"):
        cupyattn.kv_append(k, v, k_cache, v_cache, slots=slots)


@pytest.mark.parametrize("xp", ["numpy", "standin"], indirect=True)
@pytest.mark.parametrize("by_table", [False, True])
def test_kv_append_checked(xp, by_table):
    k, v = new_tokens(4, 3, 24)
    places = {"slots": np.int32([3, -1, 11, 0])}
    if by_table:
        places = {"block_table": np.int32([[0, 2], [1, 2_147_480_000]]), "positions": np.int32([3, 4, -1, 0]),
                  "batch_indices": np.int32([0, 0, 1, 1])}
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with settings(check=True, schedule=schedule, seed=seed):
            check(xp, k, v, empty_caches(3, 4, 3, 24), **places)


@hypothesis_settings(max_examples=30, deadline=None, derandomize=True)
@given(tokens=st.integers(0, 9), heads=st.integers(1, 5), head_dim=st.integers(1, 70), pages=st.integers(1, 5),
       page_size=st.integers(1, 9), offset=st.integers(0, 9), data=st.randoms())
def test_shapes(tokens, heads, head_dim, pages, page_size, offset, data):
    generator = np.random.default_rng(data.randrange(2**32))
    kv = generator.standard_normal((2, tokens, heads, head_dim + offset)).astype(np.float16)[..., offset:]
    k_cache, v_cache = empty_caches(pages, page_size, heads, head_dim)
    want = k_cache.copy(), v_cache.copy()
    slots = np.full(tokens, -1, np.int64)
    places = generator.permutation(pages * page_size)[:tokens]
    slots[:places.size] = places
    cupyattn.kv_append(*kv, k_cache, v_cache, slots=slots)
    expected_append(*kv, *want, slots=slots)
    assert_same_bits(k_cache, want[0])
    assert_same_bits(v_cache, want[1])
