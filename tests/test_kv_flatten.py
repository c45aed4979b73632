# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest
from compare import ROUNDING, assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn import BlockKV, PageTable, QuantizedKV
from cupyattn.kv.quantized import FORMATS
from cupyattn.ops.kv_flatten import _plan_kv_flatten
from cupyattn.reference import kv_codec
from cupyattn.reference.kv_flatten import kv_flatten as expected
from cupyattn.runtime.checks import FLOATS
from cupyattn.runtime.cpu import settings

rng = np.random.default_rng(21)
LENGTHS = (0, 1, 13, 6, 0, 10)   # tokens of the sequences


def paging(lengths, page_size, pages):
    """A block table over shuffled pages; entries past a length are no pages."""
    counts = [-(-n // page_size) for n in lengths]
    free = iter(rng.permutation(pages).tolist())
    table = np.full((len(lengths), max(counts, default=0) + 2), 2_147_480_000, np.int32)
    for b, count in enumerate(counts):
        table[b, :count] = [next(free) for _ in range(count)]
    return table


def used_slots(table, lengths, pages, page_size):
    """bool [pages, page_size]: slots that hold a token."""
    used = np.zeros((pages, page_size), bool)
    for row, n in zip(table, lengths, strict=True):
        for t in range(n):
            if 0 <= row[t // page_size] < pages:
                used[row[t // page_size], t % page_size] = True
    return used


def make_cache(format, used, heads, head_dim, scale_dtype="float16"):
    """(array or QuantizedKV, its numbers); slots that hold no token are poisoned in the first only."""
    shape = (*used.shape, heads, head_dim)
    x = rng.standard_normal(shape).astype(np.float32) * rng.uniform(0.5, 8)
    if format in FLOATS:
        cache = x.astype(dtype_of(format))
        numbers = cache.astype(np.float64)
        cache[~used] = np.nan
        return cache, numbers
    fixed = {"int8_symmetric": (heads,), "int8_channel": (heads, head_dim), "fp8_e4m3": (1,)}.get(format)
    scale = None if fixed is None else rng.uniform(0.05, 0.2, fixed).astype(np.float32)
    codes, scale, zero = kv_codec.quantize(x, format, scale=scale, scale_dtype=dtype_of(scale_dtype))
    cache = QuantizedKV(codes, scale, zero, format=format)
    numbers = cache.dequantize("float64")
    codes[~used] = 0x7F
    for part in (scale, zero):
        if part is not None and part.shape[:2] == used.shape:
            part[~used] = np.nan
    return cache, numbers


def on(xp, cache):
    """`cache` with its arrays on xp."""
    if isinstance(cache, np.ndarray):
        return xp.array(cache)
    return QuantizedKV(*(None if a is None else xp.array(a) for a in (cache.codes, cache.scale, cache.zero)),
                       format=cache.format)


def starts_of(lengths, gap=0):
    return np.cumsum([0, *(n + gap for n in lengths)]).astype(np.int32)


def check(xp, formats=("float16", "float16"), lengths=LENGTHS, page_size=5, heads=2, head_dims=(64, 64), dtype=None,
          gap=2, table_form="dense", seqlens=True):
    """Flatten on xp into poisoned arrays: numbers, zeros and rows that keep their bits are all as the reference has."""
    pages = sum(-(-n // page_size) for n in lengths) + 2
    table = paging(lengths, page_size, pages)
    used = used_slots(table, lengths, pages, page_size)
    made = [make_cache(f, used, heads, d) for f, d in zip(formats, head_dims, strict=True)]
    gap = gap if seqlens else 0
    starts = starts_of(lengths, gap)
    want = expected(*(numbers for _, numbers in made), block_table=table, cu_seqlens_k=starts, cache_seqlens=lengths)
    dtype = dtype or "float32"
    outs = [xp.array(poison(np.empty((starts[-1] + 1, heads, d), dtype_of(dtype)))) for d in head_dims]
    if table_form == "csr":
        counts = [-(-n // page_size) for n in lengths]
        ids = np.concatenate([row[:n] for row, n in zip(table, counts, strict=True)])
        block_table = PageTable.csr(xp.array(ids), xp.array(starts_of(counts)))
    else:
        block_table = xp.array(table)
    got = cupyattn.kv_flatten(*(on(xp, cache) for cache, _ in made), block_table=block_table,
                              cu_seqlens_k=xp.array(starts), out=outs,
                              cache_seqlens=xp.array(np.int32(lengths)) if seqlens else None)
    assert got is outs
    for out, reference in zip(outs, want, strict=True):
        out = xp.numpy(out)
        assert np.isnan(out[-1].astype(np.float32)).all()
        assert_close(out[:-1], reference, *ROUNDING[dtype])
    return [xp.numpy(out) for out in outs]


@pytest.mark.parametrize("format", [*FORMATS, *FLOATS])
def test_formats(xp, format):
    check(xp, (format, format))


@pytest.mark.parametrize("formats, dtype", [
    (("float16", "float32"), "bfloat16"), (("int8", "int4"), "float16"), (("hadamard8", "hadamard4"), "float32"),
    (("hadamard6", "fp8_e5m2"), "bfloat16"), (("int8_channel", "bfloat16"), "float16")])
def test_formats_and_head_dims_of_k_and_v_differ(xp, formats, dtype):
    check(xp, formats, head_dims=(96, 64), heads=3, dtype=dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("formats", list(itertools.pairwise([*FORMATS, *FLOATS, "int8"])))
def test_every_format_on_each_side(xp, formats, dtype):
    check(xp, formats, dtype=dtype)
    check(xp, formats, head_dims=(160, 32), heads=5, page_size=1, dtype=dtype)


@pytest.mark.parametrize("form", ["dense", "csr"])
@pytest.mark.parametrize("page_size", [1, 4, 16, 100])
def test_tables(xp, form, page_size):
    check(xp, ("hadamard8", "hadamard8"), page_size=page_size, table_form=form)


@pytest.mark.parametrize("head_dim", [8, 24, 40, 256, 576])
def test_head_dims(xp, head_dim):
    check(xp, ("int4", "int4"), head_dims=(head_dim, head_dim), heads=3)
    check(xp, ("hadamard4", "fp8_e4m3"), head_dims=(32, head_dim), heads=1)


def test_lengths_by_rows_alone(xp):
    check(xp, ("int8", "int8"), seqlens=False)


def test_many_sequences(xp):
    check(xp, ("int4", "int4"), lengths=tuple(rng.integers(0, 30, 90).tolist()), page_size=7, heads=1)


@pytest.mark.parametrize("format", FORMATS)
def test_what_kv_append_wrote(xp, format):
    """Codes and scales bit for bit as the codec makes them, and the numbers back."""
    x = rng.standard_normal((7, 2, 64)).astype(np.float16)
    scale = {"int8_symmetric": np.float32([0.03]), "int8_channel": np.full((2, 64), 0.03, np.float32)}.get(format)
    codes, made, zero = kv_codec.quantize(x, format, scale=scale)
    token_scales = scale is None
    cache = QuantizedKV.empty(4, 3, 2, 64, format=format, scale=scale,
                              granularity="token" if format.startswith("fp8") else None)
    (cache, other), slots = (on(xp, cache) for _ in "kv"), np.int32([11, 0, 4, 5, 3, 8, 7])
    cupyattn.kv_append(xp.array(x), xp.array(x), cache, other, slots=xp.array(slots))
    for part, want in ((cache.codes, codes), (cache.scale if token_scales else None, made), (cache.zero, zero)):
        if part is not None:
            found = xp.numpy(part)
            assert_same_bits(found.reshape(12, *found.shape[2:])[slots], want)
    numbers, _ = cupyattn.kv_flatten(cache, cache, block_table=xp.array(np.int32([[0, 1, 2, 3]])), num_tokens=12,
                                     cu_seqlens_k=xp.array(np.int32([0, 12])), dtype="float32")
    assert_close(xp.numpy(numbers)[slots], kv_codec.dequantize(codes, made, zero, format=format),
                 *ROUNDING["float32"])


@pytest.mark.parametrize("format", FLOATS)
def test_same_dtype_keeps_bits(xp, format):
    cache = dtype_of(format).type(1) * np.zeros((2, 3, 2, 8), dtype_of(format))
    cache.view(np.uint8)[...] = rng.integers(0, 256, cache.nbytes).reshape(cache.view(np.uint8).shape)
    outs = [xp.array(np.zeros((5, 2, 8), cache.dtype)) for _ in "kv"]
    device = xp.array(cache)
    cupyattn.kv_flatten(device, device[::-1], block_table=xp.array(np.int32([[1, 0]])),
                        cu_seqlens_k=xp.array(np.int32([0, 5])), out=outs)
    assert_same_bits(xp.numpy(outs[0]), cache[::-1].reshape(6, 2, 8)[:5])
    assert_same_bits(xp.numpy(outs[1]), cache.reshape(6, 2, 8)[:5])


LAYOUTS = {"hnd": lambda c: np.ascontiguousarray(c.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
           "head_major": lambda c: np.ascontiguousarray(c.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3),
           "offset_by_one": lambda c: np.pad(c, ((0, 0), (0, 0), (0, 0), (1, 2)))[..., 1:-2],
           "every_second_page": lambda c: np.repeat(c, 2, axis=0)[::2],
           "backwards": lambda c: np.ascontiguousarray(c[::-1])[::-1]}


@pytest.mark.parametrize("format", ["float16", "int8", "int4", "hadamard6", "fp8_e4m3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, format):
    """Codes and scales of any strides and alignment."""
    used = np.ones((4, 3), bool)
    cache, numbers = make_cache(format, used, 2, 32)
    if format == "float16":
        moved = LAYOUTS[layout](cache)
    else:
        scale, zero = cache.scale, cache.zero
        if zero is not None:
            scale, zero = (part[..., 0] for part in np.split(np.stack([scale, zero], -1), 2, -1))
        moved = QuantizedKV(LAYOUTS[layout](cache.codes), scale, zero, format=format)
    table, starts = np.int32([[3, 0], [1, 2]]), np.int32([0, 5, 11])
    got = cupyattn.kv_flatten(moved, moved, block_table=table, cu_seqlens_k=starts, dtype="float32")
    for found, want in zip(got, expected(numbers, numbers, block_table=table, cu_seqlens_k=starts), strict=True):
        assert_close(found, want, *ROUNDING["float32"])


def test_linear_buffer(xp):
    """[num_kv_heads][K, V][tokens][head_dim], with spare tokens at the end that keep their bits."""
    used = np.ones((3, 4), bool)
    (k_cache, k), (v_cache, v) = make_cache("int8", used, 2, 16), make_cache("int4", used, 2, 16)
    table, starts = np.int32([[2, 0], [1, 99]]), np.int32([0, 7, 10])
    out = xp.array(poison(np.empty((2, 2, 12, 16), np.float16)))
    got = cupyattn.kv_flatten(on(xp, k_cache), on(xp, v_cache), block_table=xp.array(table),
                              cu_seqlens_k=xp.array(starts), out=out)
    assert got is out
    found, want = xp.numpy(out), expected(k, v, block_table=table, cu_seqlens_k=starts)
    for i in range(2):
        assert_close(found[:, i, :10].transpose(1, 0, 2), want[i], *ROUNDING["float16"])
    assert np.isnan(found[:, :, 10:]).all()


# ---- memory blocks ---------------------------------------------------------------------------------------------

def turbomind_block_bytes(k, v, policy):
    """One layer of a block, byte for byte as spec'd: data [heads][K, V][tokens][head_dim], then parameters."""
    page_size, heads, _ = k.shape
    data, parameters = b"", b""
    for h in range(heads):
        for x in (k, v):
            if policy == 0:
                data += x[:, h].astype(np.float16).tobytes()
                continue
            codes, scale, zero = kv_codec.quantize(x[:, h], {8: "int8", 4: "int4"}[policy])
            data += codes.tobytes()
            for t in range(page_size):
                parameters += scale[t].tobytes() + zero[t].tobytes()
    return data + parameters


@pytest.mark.parametrize("policy", [0, 4, 8])
def test_turbomind_blocks(xp, policy):
    """Two layers in blocks at shuffled addresses; what one layer holds does not reach the other."""
    heads, head_dim, page_size, blocks = 3, 32, 4, 5
    x = rng.standard_normal((2, 2, blocks, page_size, heads, head_dim)).astype(np.float32)   # layer, K or V
    layers = [BlockKV.turbomind(heads, head_dim, page_size, quant_policy=policy, layer=i) for i in range(2)]
    raw = [b"".join(turbomind_block_bytes(x[i, 0, n], x[i, 1, n], policy) for i in range(2)) for n in range(blocks)]
    assert len(raw[0]) == 2 * layers[0].nbytes
    pool = xp.array(np.frombuffer(b"".join(raw), np.uint8).reshape(blocks, -1))
    ids, counts, starts = np.array([[4, 0, 2], [3, 9, 9]]), [3, 1], np.int32([0, 11, 14])
    table = PageTable.from_pool(pool, ids, counts)
    for i, layer in enumerate(layers):
        numbers = x[i].astype(np.float16).astype(np.float64)
        if policy:
            format = {8: "int8", 4: "int4"}[policy]
            numbers = kv_codec.dequantize(*kv_codec.quantize(x[i], format), format=format)
        outs = [xp.array(poison(np.empty((14, heads, head_dim), np.float16))) for _ in "kv"]
        cupyattn.kv_flatten(layer.k, layer.v, block_table=table, cu_seqlens_k=xp.array(starts), out=outs)
        want = expected(*numbers, block_table=ids, cu_seqlens_k=starts)
        for out, reference in zip(outs, want, strict=True):
            assert_close(xp.numpy(out), reference, *ROUNDING["float16"])


def test_blocks_with_scales_elsewhere(xp):
    """fp8 codes in blocks, scales of heads outside; hadamard codes and scales in blocks of 36-byte rows."""
    x = rng.standard_normal((3, 4, 2, 32)).astype(np.float32)
    scale = np.float32([0.01, 0.02])
    codes, _, _ = kv_codec.quantize(x, "fp8_e4m3", scale=scale)
    made, made_scale, _ = kv_codec.quantize(x, "hadamard4")
    rows = np.concatenate([codes, made, made_scale.view(np.uint8), np.zeros((3, 4, 2, 2), np.uint8)], -1)
    pool = xp.array(rows)                                   # rows of 32 + 16 + 2 + 2 bytes
    table = PageTable.from_pool(pool, [[2, 1, 0]])
    assert table.alignment >= 4
    k = BlockKV("fp8_e4m3", 4, 2, 32, stride_token=104, stride_head=52, scale=xp.array(scale))
    v = BlockKV("hadamard4", 4, 2, 32, offset=32, stride_token=104, stride_head=52, scale_offset=48,
                scale_stride_token=52, scale_stride_head=26)
    got = cupyattn.kv_flatten(k, v, block_table=table, cu_seqlens_k=xp.array(np.int32([0, 12])), num_tokens=12,
                              dtype="float32")
    want = [kv_codec.dequantize(codes, scale, format="fp8_e4m3"),
            kv_codec.dequantize(made, made_scale, format="hadamard4")]
    for found, numbers in zip(got, want, strict=True):
        assert_close(xp.numpy(found), numbers[::-1].reshape(12, 2, 32), *ROUNDING["float32"])


def test_null_block_pointer_gives_zeros(xp):
    pool = xp.array(np.ones((2, 4, 1, 8), np.float16))
    table = PageTable.from_pool(pool, [[0, 1]])
    addresses = xp.numpy(table.block_ptrs)
    addresses[0] = 0
    table = PageTable.pointers(xp.array(addresses), table.indptr, trusted_pointers=True)
    k = BlockKV("float16", 4, 1, 8, stride_token=8, stride_head=8)
    options = {"block_table": table, "cu_seqlens_k": xp.array(np.int32([0, 8])), "num_tokens": 8}
    if xp.name == "numpy":
        with pytest.raises(ValueError, match="kv_flatten: block_ptrs must not be 0"):
            cupyattn.kv_flatten(k, k, **options)
        return
    found = xp.numpy(cupyattn.kv_flatten(k, k, **options)[0])
    assert (found[:4] == 0).all() and (found[4:] == 1).all()


# ---- what is refused -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ids", [[[0, 3]], [[0, -1]], [[0, 2**31 - 1]], [[0]]])
def test_tokens_without_a_page(xp, ids):
    """NumPy: refused. On the device zeros, and nothing is read."""
    cache, table = xp.array(np.ones((3, 4, 1, 8), np.float16)), xp.array(np.int32(ids))
    options = {"block_table": table, "cu_seqlens_k": xp.array(np.int32([0, 6])), "num_tokens": 6}
    if xp.name == "numpy":
        with pytest.raises(ValueError, match="kv_flatten: (block_table must hold page ids|cache_seqlens must be at "
                                             "most 4, what block_table holds of sequence 0, got 6)"):
            cupyattn.kv_flatten(cache, cache, **options)
        return
    found = xp.numpy(cupyattn.kv_flatten(cache, cache, **options)[0])
    assert (found[:4] == 1).all() and (found[4:] == 0).all()


@pytest.mark.parametrize("xp", ["standin"], indirect=True)
def test_content_of_device_arrays_is_checked_on_request(xp, monkeypatch):
    monkeypatch.setenv("CUPYATTN_CHECK", "1")
    cache = xp.array(np.ones((3, 4, 1, 8), np.float16))
    for ids, starts, message in (([[0, 3]], [0, 6], "block_table must hold page ids"),
                                 ([[0, 1]], [0, 7], "cu_seqlens_k must not decrease")):
        with pytest.raises(ValueError, match=f"kv_flatten: {message}"):
            cupyattn.kv_flatten(cache, cache, block_table=xp.array(np.int32(ids)), num_tokens=6,
                                cu_seqlens_k=xp.array(np.int32(starts)))


@pytest.mark.parametrize("starts, lengths, message", [
    ([0, 3, 2], None, "cu_seqlens_k must not decrease from 0 on and end within the 6 rows of out, got"),
    ([-1, 3, 4], None, "cu_seqlens_k must not decrease"), ([0, 3, 7], None, "cu_seqlens_k must not decrease"),
    ([0, 3, 6], [3, 4], "cache_seqlens must be from 0 to the 3 rows that cu_seqlens_k gives sequence 1, got 4"),
    ([0, 3, 6], [-1, 3], "cache_seqlens must be from 0 to the 3 rows .* sequence 0, got -1")])
def test_rows_out_of_range(xp, starts, lengths, message):
    """NumPy: refused. On the device nothing is written outside the outputs' rows."""
    cache, guarded = xp.array(np.ones((3, 4, 1, 8), np.float16)), xp.array(np.zeros((8, 1, 8), np.float16))
    outs = [guarded[1:7], xp.array(np.zeros((6, 1, 8), np.float16))]
    options = {"block_table": xp.array(np.int32([[0, 1], [2, 1]])), "cu_seqlens_k": xp.array(np.int32(starts)),
               "cache_seqlens": None if lengths is None else xp.array(np.int32(lengths)), "out": outs}
    if xp.name == "numpy":
        with pytest.raises(ValueError, match=f"kv_flatten: {message}"):
            cupyattn.kv_flatten(cache, cache, **options)
        return
    cupyattn.kv_flatten(cache, cache, **options)
    assert not xp.numpy(guarded)[[0, 7]].any()


CACHE, TABLE, STARTS = np.zeros((3, 4, 2, 8), np.float16), np.zeros((2, 2), np.int32), np.int32([0, 2, 4])
BLOCK = BlockKV("float16", 4, 2, 8, stride_token=8, stride_head=32)


@pytest.mark.parametrize("error, message, k, v, options", [
    (TypeError, "k_cache must be float16, bfloat16, float32 or a QuantizedKV, got int8", CACHE.view(np.int8), CACHE,
     {}),
    (TypeError, "v_cache must be a NumPy or CuPy array, got list", CACHE, [1], {}),
    (ValueError, r"v_cache must have the pages, page_size and num_kv_heads of k_cache, \[3, 4, 2\], got \[2, 4, 2\]",
     CACHE, CACHE[:2], {}),
    (ValueError, "v_cache must have a head_dim that is a multiple of 8, got 7", CACHE, CACHE[..., :7], {}),
    (TypeError, "k_cache must be an array or a QuantizedKV with a dense block_table, got a BlockKV", BLOCK, BLOCK, {}),
    (TypeError, "k_cache must be a BlockKV with a pointers block_table, got float16", CACHE, CACHE,
     {"block_table": PageTable.from_pool(CACHE, TABLE)}),
    (ValueError, r"cu_seqlens_k must be \[batch \+ 1\] = \[3\], got \[2\]", CACHE, CACHE, {"cu_seqlens_k": STARTS[:2]}),
    (TypeError, "cu_seqlens_k must be int32, got int64", CACHE, CACHE, {"cu_seqlens_k": STARTS.astype(np.int64)}),
    (ValueError, r"cache_seqlens must be \[batch\] = \[2\], got \[3\]", CACHE, CACHE, {"cache_seqlens": STARTS}),
    (TypeError, "dtype must be float16 or bfloat16 or float32, got float64", CACHE, CACHE, {"dtype": np.float64}),
    (ValueError, "num_tokens must be an int32 of at least 0, got -1", CACHE, CACHE, {"num_tokens": -1}),
    (ValueError, r"out must be \[num_kv_heads, 2, tokens, head_dim\] = \[2, 2, \*, 8\], got \[4, 2, 8\]", CACHE, CACHE,
     {"out": np.zeros((4, 2, 8), np.float16)}),
    (ValueError, r"out\[1\] must be .* = \[4, 2, 8\], got \[5, 2, 8\]", CACHE, CACHE,
     {"out": (np.zeros((4, 2, 8), np.float16), np.zeros((5, 2, 8), np.float16))}),
    (TypeError, r"out\[1\] must be float16, got float32", CACHE, CACHE,
     {"out": (np.zeros((4, 2, 8), np.float16), np.zeros((4, 2, 8), np.float32))}),
    (TypeError, r"out\[0\] must be float32, got float16", CACHE, CACHE,
     {"dtype": "float32", "out": (np.zeros((4, 2, 8), np.float16),) * 2}),
    (ValueError, "out must be an array or a pair of arrays, got 3 arrays", CACHE, CACHE, {"out": (CACHE,) * 3}),
    (TypeError, r"block_table must be int32, got int64", CACHE, CACHE, {"block_table": TABLE.astype(np.int64)})])
def test_errors(error, message, k, v, options):
    with pytest.raises(error, match=f"^(kv_flatten|PageTable): {message}"):
        cupyattn.kv_flatten(k, v, **{"block_table": TABLE, "cu_seqlens_k": STARTS, **options})


@pytest.mark.parametrize("xp", ["standin"], indirect=True)
def test_kinds_are_not_mixed(xp):
    with pytest.raises(TypeError, match="kv_flatten: all arrays must be of one kind"):
        cupyattn.kv_flatten(xp.array(CACHE), xp.array(CACHE), block_table=TABLE, cu_seqlens_k=STARTS)
    with pytest.raises(ValueError, match="kv_flatten: num_tokens must be given with CuPy arrays"):
        cupyattn.kv_flatten(xp.array(CACHE), xp.array(CACHE), block_table=xp.array(TABLE),
                            cu_seqlens_k=xp.array(STARTS))


def test_empty(xp):
    cache = xp.array(CACHE)
    for batch, tokens in ((0, 0), (2, 0), (0, 3)):
        k, v = cupyattn.kv_flatten(cache, cache, block_table=xp.array(TABLE[:batch]), num_tokens=tokens,
                                   cu_seqlens_k=xp.array(np.zeros(batch + 1, np.int32)))
        assert k.shape == v.shape == (tokens, 2, 8)


def test_default_dtype():
    for format, scale_dtype, want in (("float32", None, "float32"), ("int8", "bfloat16", "bfloat16"),
                                      ("fp8_e4m3", None, "float16"), ("hadamard8", None, "float16")):
        cache = np.zeros((1, 1, 1, 32), np.float32) if scale_dtype is None and format == "float32" else \
            QuantizedKV.empty(1, 1, 1, 32, format=format, dtype=scale_dtype or "float16")
        k, _ = cupyattn.kv_flatten(cache, cache, block_table=np.int32([[0]]), cu_seqlens_k=np.int32([0, 1]))
        assert k.dtype == dtype_of(want)


# ---- offsets, schedules, shapes --------------------------------------------------------------------------------

def test_offsets_beyond_32_bits(tmp_path):
    """Page 3 of these codes lies 6.4e9 bytes in, row 3 of the outputs 6e9 elements."""
    codes = np.memmap(tmp_path / "codes", np.uint8, "w+", shape=(2**31 * 3 + 2**10,))
    codes = np.lib.stride_tricks.as_strided(codes, (4, 2, 1, 32), (2**31, 32, 32, 1))
    codes[3] = rng.integers(0, 256, (2, 1, 32))
    cache = QuantizedKV(codes, np.float32([0.5]), format="fp8_e4m3")
    base = np.memmap(tmp_path / "out", np.float16, "w+", shape=(2**31 * 3 + 2**10,))
    out = np.lib.stride_tricks.as_strided(base, (4, 1, 32), (2**32, 64, 2))
    cupyattn.kv_flatten(cache, cache, block_table=np.int32([[3], [3]]), cu_seqlens_k=np.int32([0, 2, 4]),
                        out=(out, np.empty((4, 1, 32), np.float16)))
    want = kv_codec.dequantize(codes[3], np.float32([0.5]), format="fp8_e4m3")
    assert_close(out[2:], want, *ROUNDING["float16"])


@pytest.mark.parametrize("xp", ["numpy", "standin"], indirect=True)
@pytest.mark.parametrize("formats", [("hadamard6", "int4"), ("fp8_e4m3", "int8_channel")])
def test_kv_flatten_checked(xp, formats):
    global rng
    first = None
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        rng = np.random.default_rng(8)
        with settings(check=True, schedule=schedule, seed=seed):
            outs = check(xp, formats, lengths=(3, 0, 7), page_size=4, head_dims=(32, 64), table_form="csr", gap=1)
        first = first or outs
        for a, b in zip(first, outs, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("xp", ["numpy", "standin"], indirect=True)
def test_blocks_checked(xp):
    """The checking mode knows the buffers behind the pointers, and only those."""
    pool = xp.array(np.ones((3, 4, 1, 8), np.float16))
    table = PageTable.from_pool(pool, [[2, 0]])
    k = BlockKV("float16", 4, 1, 8, stride_token=8, stride_head=8)
    options = {"cu_seqlens_k": xp.array(np.int32([0, 8])), "num_tokens": 8}
    with settings(check=True):
        found = cupyattn.kv_flatten(k, k, block_table=table, **options)
        assert (xp.numpy(found[1]) == 1).all()
        if xp.name == "numpy":   # the stand-in's memory is known as a whole
            blind = PageTable.pointers(table.block_ptrs, table.indptr, trusted_pointers=True)
            with pytest.raises(cupyattn.KernelCheckError):
                cupyattn.kv_flatten(k, k, block_table=blind, **options)


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 20), max_size=6), page_size=st.integers(1, 9), heads=st.integers(1, 5),
       groups=st.integers(1, 5), formats=st.sampled_from([("hadamard4", "hadamard4"), ("float16", "float16")]),
       gap=st.integers(0, 3), form=st.sampled_from(["dense", "csr"]))
def test_shapes(lengths, page_size, heads, groups, formats, gap, form):
    if form == "csr" and not lengths:
        lengths = [0]
    from conftest import NumpyArrays

    check(NumpyArrays(), formats, lengths=tuple(lengths), page_size=page_size, heads=heads,
          head_dims=(32 * groups, 32 * groups), gap=gap, table_form=form)


@pytest.mark.parametrize("sizes", list(itertools.product((1, 7, 100000), (1, 5, 128), (8, 40, 64, 576), (8, 96, 512))))
def test_plans(sizes):
    """Blocks the GPU can launch; where threads meet, whole warps of which each row has a multiple of four."""
    tokens, heads, head_dim, head_dim_v = sizes
    plan, tile = _plan_kv_flatten(*sizes, "KvHadamard8", "KvPlain<__half>", "float16", True, "sm_90a")
    lanes, rows, _ = plan.block
    assert lanes * rows <= 256 and plan.grid[0] * tile >= tokens > (plan.grid[0] - 1) * tile
    assert plan.shared_bytes == 16 * tile <= 48 * 1024
    if max(head_dim, head_dim_v) >= 32:
        assert lanes % 4 == 0 and lanes * rows % 32 == 0
