# SPDX-License-Identifier: Apache-2.0
"""kv_append into quantized caches and into memory blocks reached by addresses."""

import numpy as np
import pytest
from compare import assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_kv_append import new_tokens

import cupyattn
from cupyattn.kv.quantized import FORMATS, BlockKV, QuantizedKV
from cupyattn.paging.table import PageTable
from cupyattn.reference import kv_codec
from cupyattn.reference.kv_append import kv_append as expected_append
from cupyattn.runtime.cpu import settings

rng = np.random.default_rng(37)
SLOTS = np.int32([11, 0, -1, 5, 6])


def known_scale(granularity, heads, head_dim):
    """Random scales of a granularity that is not written with the tokens, else None."""
    shape = {"tensor": (1,), "head": (heads,), "channel": (heads, head_dim)}.get(granularity)
    return None if shape is None else rng.uniform(0.01, 0.05, shape).astype(np.float32)


def cache_of(format, heads, head_dim, granularity=None, dtype="float16", pages=3, page_size=4):
    """A cache full of 0x7f, its scales of NaN where they are written."""
    granularity = granularity or FORMATS[format].granularities[0]
    scale = known_scale(granularity, heads, head_dim)
    cache = QuantizedKV.empty(pages, page_size, heads, head_dim, format=format, scale=scale, dtype=dtype,
                              **({} if scale is not None else {"granularity": granularity}))
    poison(cache.codes)
    if scale is None:
        poison(cache.scale)
    if cache.zero is not None:
        poison(cache.zero)
    return cache


def moved(cache, array):
    """A cache of the arrays array(a) of another."""
    return QuantizedKV(*map(array, cache.arrays.values()), format=cache.format)


def assert_same_cache(xp, got, want):
    for name, array in want.arrays.items():
        found = xp.numpy(got.arrays[name])
        if array.dtype.itemsize == 1:
            assert_same_bits(found, array)
        else:
            np.testing.assert_array_equal(found.astype(np.float64), array.astype(np.float64))


def check_formats(xp, k, v, caches, places, view=lambda array: array, **steps):
    """Append on `xp`: codes, scales and zeros are the reference's, and untouched places keep theirs."""
    want = [moved(cache, np.array) for cache in caches]
    expected_append(k, v, *(moved(cache, view) for cache in want), **places, **steps)
    device = [moved(cache, xp.array) for cache in caches]
    move = {name: xp.array(a) if isinstance(a, np.ndarray) else a for name, a in {**places, **steps}.items()}
    cupyattn.kv_append(xp.array(k), xp.array(v), *(moved(cache, view) for cache in device), **move)
    for got, cache in zip(device, want, strict=True):
        assert_same_cache(xp, got, cache)
    return device


PAIRS = [(("int8", "token"), ("int4", "token")), (("int8_symmetric", "tensor"), ("int8_channel", "channel")),
         (("int8_symmetric", "head"), ("int8_channel", "channel")), (("fp8_e4m3", "tensor"), ("fp8_e5m2", "head")),
         (("fp8_e4m3", "token"), ("fp8_e5m2", "token")), (("fp8_e4m3", "head"), ("fp8_e5m2", "tensor")),
         (("hadamard8", "group"), ("hadamard6", "group")), (("hadamard4", "group"), ("int8", "token"))]


@pytest.mark.parametrize("k_format, v_format", PAIRS, ids=lambda pair: "-".join(pair))
def test_every_format(xp, k_format, v_format):
    k, v = new_tokens(5, 3, 64)
    caches = [cache_of(format, 3, 64, granularity) for format, granularity in (k_format, v_format)]
    check_formats(xp, k, v, caches, {"slots": SLOTS})


@pytest.mark.parametrize("dtype, scale_dtype", [("bfloat16", "bfloat16"), ("float32", "float32"),
                                                ("float32", "float16"), ("float16", "bfloat16")])
def test_dtypes(xp, dtype, scale_dtype):
    k, v = new_tokens(5, 2, 32, dtype)
    caches = [cache_of(format, 2, 32, dtype=scale_dtype) for format in ("int8", "int4")]
    check_formats(xp, k, v, caches, {"slots": SLOTS})


@pytest.mark.full
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 192, 256, 576])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_head_dim(xp, format, dtype, head_dim):
    k, v = new_tokens(5, 3, head_dim, dtype)
    for granularity in FORMATS[format].granularities:
        check_formats(xp, k, v, [cache_of(format, 3, head_dim, granularity, dtype) for _ in "kv"], {"slots": SLOTS})


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(format=st.sampled_from(["int8", "int4", "hadamard6"]), heads=st.integers(1, 4), size=st.integers(1, 12),
       tokens=st.integers(0, 6), exponent=st.integers(-12, 10))
def test_shapes_and_magnitudes(format, heads, size, tokens, exponent):
    head_dim = size * FORMATS[format].multiple
    k, v = (x * np.float16(2.0**exponent) for x in new_tokens(tokens, heads, head_dim))
    slots = rng.permutation(12)[:tokens].astype(np.int64)
    check_formats(Numpy, k, v, [cache_of(format, heads, head_dim) for _ in "kv"], {"slots": slots})


class Numpy:
    array, numpy = staticmethod(np.array), staticmethod(np.array)


def test_goldens_of_turbomind(xp):
    """spec: scale, codes and packed word of [-1, -.5, 0, .25, .5, 1, 2, 3]."""
    x = np.float16([[[-1, -0.5, 0, 0.25, 0.5, 1, 2, 3]]])
    k_cache, v_cache = (moved(cache_of(format, 1, 8, pages=1, page_size=1), xp.array) for format in ("int8", "int4"))
    cupyattn.kv_append(xp.array(x), xp.array(x), k_cache, v_cache, slots=xp.array(np.int32([0])))
    assert xp.numpy(k_cache.codes).ravel().tolist() == [0, 32, 64, 80, 96, 128, 191, 255]
    assert xp.numpy(v_cache.codes).view(np.uint32).ravel().tolist() == [0xF852B640]
    assert [xp.numpy(c.scale).view(np.uint16).item() for c in (k_cache, v_cache)] == [0x2404, 0x3444]
    assert [xp.numpy(c.zero).item() for c in (k_cache, v_cache)] == [-1, -1]


@pytest.mark.parametrize("format, levels", [("int8", 255), ("int4", 15)])
def test_within_a_code_of_half_arithmetic(format, levels):
    """TurboMind rounds every step to float16; our float32 steps differ from that by one code at most."""
    k, _ = new_tokens(64, 2, 128)
    low = k.min(-1, keepdims=True)
    span = k.max(-1, keepdims=True).astype(np.float32) - low.astype(np.float32)
    scale = (span / np.float32(levels)).astype(np.float16)
    inverse = (1 / scale.astype(np.float32)).astype(np.float16)
    theirs = np.rint((k - low) * inverse).clip(0, levels).astype(np.int32)
    cache, other = (cache_of(format, 2, 128, pages=1, page_size=64) for _ in "kv")
    cupyattn.kv_append(k, k, cache, other, slots=np.arange(64, dtype=np.int32))
    ours = kv_codec.unpack(cache.codes[0], format)
    assert_same_bits(cache.scale[0], scale[..., 0])
    assert abs(ours - theirs).max() <= 1
    assert abs(cache.dequantize()[0] - k.astype(np.float32)).max() <= 0.502 * scale.astype(np.float32).max()


def special_rows(dtype):
    """Constant rows, zeros, NaN and infinities here and there, the largest numbers, tiny differences."""
    x = rng.standard_normal((8, 2, 64)).astype(np.float32)
    x[0], x[1], x[2, 0, 5], x[3, 1, 40] = 3.25, 0, np.nan, np.inf
    x[4], x[5], x[6, :, :32], x[7] = 2100, 65504, -65504, 1 + x[7] / 1024
    return x.astype(dtype_of(dtype))


@pytest.mark.parametrize("k_format, v_format", [PAIRS[n] for n in (0, 1, 4, 6)], ids=lambda pair: "-".join(pair))
def test_special_rows(xp, k_format, v_format):
    x = special_rows("float16")
    caches = [cache_of(format, 2, 64, granularity) for format, granularity in (k_format, v_format)]
    with np.errstate(invalid="ignore", over="ignore"):
        device = check_formats(xp, x, x, caches, {"slots": np.arange(8, dtype=np.int32)})
        for cache in device:
            rows = moved(cache, xp.numpy).dequantize().reshape(12, 2, 64)[:8]
            usual = np.isfinite(x).all((1, 2))
            assert np.isfinite(rows[usual]).all()
            if cache.granularity in ("token", "group"):
                assert not rows[1].any(), "zeros stay zeros"


def test_nan_and_constant_rows_of_turbomind(xp):
    """NaN has code 0; a constant row is exact."""
    x = special_rows("float16")
    with np.errstate(invalid="ignore"):
        device = check_formats(xp, x, x, [cache_of(format, 2, 64) for format in ("int8", "int4")],
                               {"slots": np.arange(8, dtype=np.int32)})
        for cache in device:
            assert not xp.numpy(cache.codes).reshape(12, 2, -1)[2, 0].any()
            np.testing.assert_array_equal(moved(cache, xp.numpy).dequantize().reshape(12, 2, 64)[0], 3.25)


def test_codes_of_finished_keys(xp):
    """The codes are those of what a plain cache of k's dtype gets after bias and RoPE; q_out does not mind."""
    k, v = new_tokens(5, 3, 64)
    cos, sin = cupyattn.RopeParams(rotary_dim=64).tables(32)
    steps = {"k_bias": k[0] / 4, "v_bias": v[0] / 4, "q_bias": k[1], "cos": cos, "sin": sin, "q": k * 2,
             "positions": np.int32([30, 4, 5, 17, 0])}
    inputs = {name: xp.array(a) for name, a in steps.items()} | {"slots": xp.array(SLOTS)}
    plain = [xp.array(poison(np.empty((3, 4, 3, 64), np.float16))) for _ in "kv"]
    q_plain = cupyattn.kv_append(xp.array(k), xp.array(v), *plain, **inputs)
    caches = [cache_of(format, 3, 64) for format in ("hadamard8", "int4")]
    device = [moved(cache, xp.array) for cache in caches]
    q_out = cupyattn.kv_append(xp.array(k), xp.array(v), *device, **inputs)
    assert_same_bits(xp.numpy(q_out), xp.numpy(q_plain))
    keys, values = (xp.numpy(cache).reshape(12, 3, 64)[SLOTS] for cache in plain)
    expected_append(keys, values, *caches, slots=SLOTS)
    for got, want in zip(device, caches, strict=True):
        assert_same_cache(xp, got, want)


def test_strides(xp):
    k, v = new_tokens(5, 3, 64)
    bases = [np.full((3, 3, 4, 67), 0x7F, np.uint8), poison(np.empty((3, 3, 4, 2), np.float16)),
             np.full((3, 3, 4, 32), 0x7F, np.uint8), poison(np.empty((3, 3, 4, 2), np.float16))]

    def caches(codes8, both8, codes4, both4):
        """Rows at odd addresses, heads before tokens, pages backwards; scale and zero side by side."""
        both8, both4 = both8.transpose(0, 2, 1, 3), both4.transpose(0, 2, 1, 3)[::-1]
        return (QuantizedKV(codes8[..., 1:65].transpose(0, 2, 1, 3), both8[..., 0], both8[..., 1], format="int8"),
                QuantizedKV(codes4.transpose(0, 2, 1, 3)[::-1], both4[..., 0], both4[..., 1], format="int4"))

    device = [xp.array(base) for base in bases]
    expected_append(k, v, *caches(*bases), slots=SLOTS)
    cupyattn.kv_append(xp.array(k), xp.array(v), *caches(*device), slots=xp.array(SLOTS))
    for got, want in zip(device, bases, strict=True):
        if want.dtype == np.uint8:
            assert_same_bits(xp.numpy(got), want)
        else:
            np.testing.assert_array_equal(xp.numpy(got), want)


def test_odd_addresses_of_every_packing(xp):
    """Words that lie across their natural boundaries are stored byte by byte."""
    k, v = new_tokens(5, 3, 64)

    def views(array):
        return array[..., 1:] if array.dtype == np.uint8 else array

    caches = []
    for format in ("hadamard6", "hadamard4"):
        cache = cache_of(format, 3, 64)
        codes = np.full((*cache.codes.shape[:3], cache.codes.shape[3] + 1), 0x7F, np.uint8)
        caches.append((codes, cache.scale, format))
    device = [(xp.array(codes), xp.array(scale), format) for codes, scale, format in caches]
    def quantized(cases):
        return [QuantizedKV(views(codes), scale, format=format) for codes, scale, format in cases]

    expected_append(k, v, *quantized(caches), slots=SLOTS)
    cupyattn.kv_append(xp.array(k), xp.array(v), *quantized(device), slots=xp.array(SLOTS))
    for got, want in zip(device, caches, strict=True):
        assert_same_bits(xp.numpy(got[0]), want[0])
        np.testing.assert_array_equal(xp.numpy(got[1]), want[1])


def test_float8_arrays(xp):
    """Codes may be arrays of a float8 dtype."""
    import ml_dtypes

    k, v = new_tokens(5, 3, 64)
    codes = np.zeros((3, 4, 3, 64), ml_dtypes.float8_e4m3fn)
    caches = [QuantizedKV(xp.array(codes.view(np.uint8)), xp.array(np.float32([0.5])), format="fp8_e4m3")
              for codes in (codes, codes)]
    if xp.name == "numpy":
        caches = [QuantizedKV(codes.copy(), np.float32([0.5]), format="fp8_e4m3") for _ in "kv"]
    cupyattn.kv_append(xp.array(k), xp.array(v), *caches, slots=xp.array(SLOTS))
    want = (k.astype(np.float32) * 2).astype(ml_dtypes.float8_e4m3fn)
    assert_same_bits(xp.numpy(caches[0].codes).view(np.uint8).reshape(12, 3, 64)[[11, 0, 5, 6]],
                     want.view(np.uint8)[[0, 1, 3, 4]])


def test_lists_of_pages(xp):
    """CSR and dense page tables that say the same give the same bits."""
    k, v = new_tokens(6, 3, 64)
    positions, sequences = np.int32([3, 4, 0, 8, 9, 1]), np.int32([0, 0, 1, 2, 2, 1])
    tables = PageTable(xp.array(np.int32([[4, 0, -1], [5, -1, -1], [2, 1, 3]]))), PageTable.csr(
        xp.array(np.int32([4, 0, 5, 2, 1, 3])), xp.array(np.int32([0, 2, 3, 6])))
    results = []
    for table in tables:
        caches = [xp.array(poison(np.empty((6, 4, 3, 64), np.float16))) for _ in "kv"]
        cupyattn.kv_append(xp.array(k), xp.array(v), *caches, block_table=table, positions=xp.array(positions),
                           batch_indices=xp.array(sequences))
        results.append([xp.numpy(cache) for cache in caches])
    for dense, listed in zip(*results, strict=True):
        assert_same_bits(dense, listed)
    assert_same_bits(results[0][0][[4, 0, 5, 3, 3, 5], [3, 0, 0, 0, 1, 1]], k)


def test_past_the_list_of_a_sequence(xp):
    """A position past a sequence's own pages does not reach into the next one's."""
    k, v = new_tokens(2, 3, 64)
    caches = [xp.array(poison(np.empty((6, 4, 3, 64), np.float16))) for _ in "kv"]
    table = PageTable.csr(xp.array(np.int32([4, 0, 5])), xp.array(np.int32([0, 2, 3])))
    given = {"block_table": table, "positions": xp.array(np.int32([8, 0]))}
    if xp.name == "numpy":
        with pytest.raises(ValueError, match=r"positions must be in \[-1, 8\), what block_table can hold"):
            cupyattn.kv_append(k, v, *caches, **given)
        return
    cupyattn.kv_append(xp.array(k), xp.array(v), *caches, **given)
    found = xp.numpy(caches[0])
    assert_same_bits(found[5, 0], k[1])
    found[5, 0] = np.nan
    assert np.isnan(found).all()


# ---- memory blocks -------------------------------------------------------------------------------------------

def turbomind_views(pool, layer, heads, head_dim, page_size, policy):
    """K and V of a layer as arrays over the bytes of a pool [blocks, bytes], by the formulas of the specification."""
    token = head_dim * (policy or 16) // 8
    data, parameters = page_size * token, page_size * 4 if policy else 0
    start = layer * heads * 2 * (data + parameters)
    found = []
    for side in range(2):
        rows = pool[:, start:start + heads * 2 * data].reshape(-1, heads, 2, page_size, token)[:, :, side]
        rows = rows.transpose(0, 2, 1, 3)
        if not policy:
            found.append(rows.view(np.float16))
            continue
        first = start + heads * 2 * data
        both = pool[:, first:first + heads * 2 * parameters].view(np.float16).reshape(-1, heads, 2, page_size, 2)
        both = both[:, :, side].transpose(0, 2, 1, 3)
        found.append(QuantizedKV(rows, both[..., 0], both[..., 1], format="int8" if policy == 8 else "int4"))
    return found


def block_case(policy, blocks=9, page_size=4, heads=3, head_dim=64, layers=2, layer=1):
    sides = BlockKV.turbomind(heads, head_dim, page_size, quant_policy=policy, layer=layer)
    pool = np.full((blocks, layers * sides.nbytes), 0x7F, np.uint8)
    table = rng.permutation(blocks)[:8].astype(np.int32).reshape(2, 4)
    return sides, pool, table


@pytest.mark.parametrize("policy", [0, 8, 4])
def test_turbomind_blocks(xp, policy):
    """Every byte of blocks that hold two layers, in shuffled order."""
    k, v = new_tokens(7, 3, 64)
    sides, pool, table = block_case(policy)
    places = {"positions": np.int32([0, 5, 6, 15, 3, 4, -1]), "batch_indices": np.int32([0, 0, 0, 0, 1, 1, 1])}
    want = pool.copy()
    expected_append(k, v, *turbomind_views(want, 1, 3, 64, 4, policy), block_table=table, **places)
    device = xp.array(pool)
    cupyattn.kv_append(xp.array(k), xp.array(v), sides.k, sides.v, block_table=PageTable.from_pool(device, table),
                       **{name: xp.array(a) for name, a in places.items()})
    assert_same_bits(xp.numpy(device), want)


@pytest.mark.parametrize("policy, offsets", [(0, (99584, 115968)), (8, (49792, 57984, 132628, 132884)),
                                             (4, (24896, 28992, 67092, 67348))])
def test_byte_offsets_of_turbomind(policy, offsets):
    """spec: K and V of head 3, token 5 and their parameters, 8 heads of 128 in blocks of 64 tokens."""
    x = np.float16(1) + np.arange(8 * 128, dtype=np.float16).reshape(1, 8, 128) / 1024
    sides = BlockKV.turbomind(8, 128, 64, quant_policy=policy)
    pool = np.full((1, sides.nbytes), 0x7F, np.uint8)
    cupyattn.kv_append(x, -x, sides.k, sides.v, block_table=PageTable.from_pool(pool, np.int32([[0]])),
                       positions=np.int32([5]))
    for side, sign in enumerate((1, -1)):
        row = sign * x[0, 3]
        if not policy:
            want = row.view(np.uint8)
        else:
            codes, scale, zero = kv_codec.quantize(row, "int8" if policy == 8 else "int4")
            want = codes
            parameters = np.float16([scale, zero]).view(np.uint8)
            assert_same_bits(pool[0, offsets[2 + side]:offsets[2 + side] + 4], parameters)
        assert_same_bits(pool[0, offsets[side]:offsets[side] + want.size], want)


def test_blocks_that_are_not_there(xp):
    """A null pointer and a position past a sequence's blocks: NumPy refuses, the device writes nothing."""
    k, v = new_tokens(3, 3, 64)
    sides, pool, table = block_case(8)
    device = xp.array(pool)
    full = PageTable.from_pool(device, table)
    pointers = xp.numpy(full.block_ptrs)
    pointers[1] = 0
    holes = PageTable.pointers(xp.array(pointers), xp.array(np.int32([0, 2, 3])), buffers=device)
    for positions, message in (([4, 1, 2], "block_ptrs must not be 0"), ([8, 1, 2], r"positions must be in \[-1, 8\)")):
        given = {"block_table": holes, "positions": xp.array(np.int32(positions)),
                 "batch_indices": xp.array(np.int32([0, 1, 1]))}
        if xp.name == "numpy":
            with pytest.raises(ValueError, match=message):
                cupyattn.kv_append(k, v, sides.k, sides.v, **given)
            assert_same_bits(pool, device)
            continue
        want = pool.copy()
        expected_append(k[1:], v[1:], *turbomind_views(want, 1, 3, 64, 4, 8), positions=np.int32([1, 2]),
                        block_table=table[:, 2:].reshape(4, 1)[:1], batch_indices=np.int32([0, 0]))
        cupyattn.kv_append(xp.array(k), xp.array(v), sides.k, sides.v, **given)
        assert_same_bits(xp.numpy(device), want)
        device[...] = 0x7F


def test_errors_of_blocks():
    k, v = new_tokens(2, 3, 64)
    sides, pool, table = block_case(8)
    pages = PageTable.from_pool(pool, table)
    array = np.zeros((9, 4, 3, 64), np.float16)
    given = {"positions": np.int32([0, 1])}
    last = PageTable.from_pool(pool, np.int32([[0], [8]]))
    askew = PageTable.pointers(last.block_ptrs + np.uint64(16), last.indptr, buffers=pool)   # the last one sticks out
    for message, caches, places in (
            ("k_cache must be no BlockKV with slots or page ids", sides[:2], {"slots": np.int32([0, 1])}),
            ("k_cache must be no BlockKV with slots or page ids", sides[:2], {"block_table": table, **given}),
            ("k_cache must be a BlockKV with block pointers, got ndarray", (array, array),
             {"block_table": pages, **given}),
            ("v_cache must be a BlockKV with block pointers", (sides.k, array[:, :, :, :]),
             {"block_table": pages, **given}),
            ("places must differ .* got page 0x[0-9a-f]+ slot 1 twice", sides[:2],
             {"block_table": pages, "positions": np.int32([1, 1]), "batch_indices": np.int32([1, 1])}),
            ("alignment of at least 2 bytes for k_cache, got 1", sides[:2],
             {"block_table": PageTable.pointers(pages.block_ptrs, pages.indptr, buffers=pool, alignment=1), **given}),
            ("block_ptrs must lie in the buffers with .* bytes each", sides[:2], {"block_table": askew, **given})):
        with pytest.raises(ValueError, match=message):
            cupyattn.kv_append(k, v, *caches, **places)
    assert (pool == 0x7F).all()


def test_errors_of_formats():
    k, v = new_tokens(2, 3, 64)
    good = cache_of("int8", 3, 64), cache_of("int4", 3, 64)
    slots = np.int32([0, 1])
    for error, message, caches in (
            (ValueError, r"k_cache must be .* = \[\*, \*, 3, 64\], got \[3, 4, 3, 32\]",
             (cache_of("int8", 3, 32), good[1])),
            (ValueError, r"v_cache must be .* = \[3, 4, 3, 64\], got \[3, 4, 2, 64\]",
             (good[0], cache_of("int4", 2, 64))),
            (ValueError, "k_cache and v_cache must be given with k and v", (good[0], None)),
            (TypeError, "v_cache must be float16 like k_cache, got float32",
             (np.zeros((3, 4, 3, 64), np.float16), np.zeros((3, 4, 3, 64), np.float32)))):
        with pytest.raises(error, match=message):
            cupyattn.kv_append(k, v, *caches, slots=slots)
    good[1].zero.flags.writeable = False
    with pytest.raises(ValueError, match="v_cache.zero must be writeable"):
        cupyattn.kv_append(k, v, *good, slots=slots)
    known = cache_of("int8_symmetric", 3, 64)
    known.scale.flags.writeable = False   # only read
    cupyattn.kv_append(k, v, known, cache_of("int8_symmetric", 3, 64), slots=slots)


@pytest.mark.parametrize("xp", ["numpy", "standin"], indirect=True)
@pytest.mark.parametrize("case", ["int4 and hadamard6", "fp8 and int8_channel", "blocks"])
def test_formats_checked(xp, case):
    """The same bits in every order of threads, nothing out of bounds, also of blocks."""
    k, v = new_tokens(5, 3, 64)
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with settings(check=True, schedule=schedule, seed=seed):
            if case == "blocks":
                test_turbomind_blocks(xp, 4)
            elif case == "int4 and hadamard6":
                check_formats(xp, k, v, [cache_of(format, 3, 64) for format in ("int4", "hadamard6")], {"slots": SLOTS})
            else:
                check_formats(xp, k, v, [cache_of("fp8_e4m3", 3, 64, "token"), cache_of("int8_channel", 3, 64)],
                              {"slots": SLOTS})
