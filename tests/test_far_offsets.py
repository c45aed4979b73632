# SPDX-License-Identifier: Apache-2.0
"""Caches of more than 2**31 elements and 4 GiB: pages far apart give what the same pages give side by side."""

import resource

import numpy as np
import pytest
from compare import assert_same_bits, dtype_of, poison, sparse_array
from selective_models import Model

import cupyattn
from cupyattn import QMatrix
from cupyattn.attn import plans as attention_plans
from cupyattn.quant.layout import PackedSegment
from cupyattn.reference.kv_codec import quantize
from cupyattn.runtime.cpu import settings

PAGE_SIZE, HEADS, HEAD_DIM = 4, 2, 64
PER_PAGE = PAGE_SIZE * HEADS * HEAD_DIM
CASES = [pytest.param(dtype, check, id=f"{dtype}-{'checked' if check else 'plain'}")
         for dtype in ("float16", "float32") for check in (False, True)]


def _far_pages(dtype):
    """Page ids around 2**31 and 2**32 elements and bytes, in no order; the last one is the last of the cache."""
    size = dtype_of(dtype).itemsize
    limits = sorted({n // PER_PAGE for limit in (2**31, 2**32) for n in (limit, limit // size)})
    return np.int32([page for limit in reversed(limits) for page in (limit, limit - 1, limit + 1)] + [limits[-1] + 9])


def _wrapped(pages, num_pages):
    """Where the pages would lie if an offset in elements or bytes were 32 bits wide."""
    step = 2**31 // PER_PAGE // 4
    found = {int(p) - k * step for p in pages for k in range(1, 12)} - set(pages.tolist())
    return np.array(sorted(p for p in found if 0 <= p < num_pages))


def _caches(dtype, pages):
    """(far, near): K and V over `pages` of a huge cache, NaN where a short offset would lead; and side by side."""
    num_pages = int(pages.max()) + 1
    values = np.random.default_rng(7).standard_normal((2, pages.size, PAGE_SIZE, HEADS, HEAD_DIM)).astype(dtype)
    far = []
    for kind in values:
        cache = sparse_array((num_pages, PAGE_SIZE, HEADS, HEAD_DIM), dtype)
        for page in _wrapped(pages, num_pages):
            poison(cache[page])
        cache[pages] = kind
        far.append(cache)
    assert far[0].size > 2**32 and far[0].nbytes > 2**33
    return far, list(values)


@pytest.mark.parametrize("dtype, check", CASES)
def test_paged_decode(dtype, check):
    pages = _far_pages(dtype)
    far, near = _caches(dtype, pages)
    q = np.random.default_rng(8).standard_normal((2, 6, HEAD_DIM)).astype(dtype)
    seqlens = np.int32([pages.size * PAGE_SIZE - 1, 7])
    table = np.stack([np.arange(pages.size, dtype=np.int32)] * 2)
    with settings(check=check):
        want = cupyattn.paged_decode(q, *near, block_table=table, cache_seqlens=seqlens)
        got = cupyattn.paged_decode(q, *far, block_table=pages[table], cache_seqlens=seqlens)
    assert_same_bits(got, want)


@pytest.mark.parametrize("dtype, check", CASES)
def test_kv_append(dtype, check):
    pages = _far_pages(dtype)
    far, near = _caches(dtype, pages)
    k, v = np.random.default_rng(9).standard_normal((2, pages.size, HEADS, HEAD_DIM)).astype(dtype)
    slots = np.arange(pages.size) * PAGE_SIZE + np.arange(pages.size) % PAGE_SIZE
    far_slots = slots % PAGE_SIZE + pages.astype(np.int64) * PAGE_SIZE
    positions = (slots[::-1]).astype(np.int32)
    with settings(check=check):
        for cache, at, ids in ((near, slots, np.arange(pages.size, dtype=np.int32)), (far, far_slots, pages)):
            cupyattn.kv_append(k, v, *cache, slots=at)
            cupyattn.kv_append(v, k, *cache, block_table=ids[None], positions=positions,
                               batch_indices=np.zeros(pages.size, np.int32))
    for huge, small in zip(far, near, strict=True):
        assert_same_bits(huge[pages], small)
        for page in _wrapped(pages, len(huge)):
            assert np.isnan(huge[page]).all(), f"page {page} was written"


@pytest.mark.parametrize("check", [False, True], ids=["plain", "checked"])
def test_pools_of_states(check):
    """Slots of the state kernels; the convolution's windows are the same memory."""
    slots = _far_pages("float32")
    model = Model(heads=HEADS, channels=16, states=16)
    near = model.pool(slots.size, np.arange(slots.size))
    far = sparse_array((int(slots.max()) + 1, *near.shape[1:]), "float32")
    for slot in _wrapped(slots, len(far)):
        poison(far[slot])
    far[slots] = near
    inputs, side_by_side = model.inputs(slots.size), np.arange(slots.size, dtype=np.int32)
    starts, weight = np.arange(slots.size + 1, dtype=np.int32), np.ones((PER_PAGE // 4, 4), np.float32)
    x = np.random.default_rng(3).standard_normal((slots.size, PER_PAGE // 4)).astype(np.float32)
    q, slopes = x.reshape(slots.size, -1, 16)[:, :HEADS] / 4, np.float32([0.1, 0.5])

    def call(pool, at):
        windows = pool.reshape(len(pool), PER_PAGE // 4, 4)
        yield cupyattn.selective_state_update(pool, **inputs, dt_softplus=True, state_batch_indices=at)
        yield cupyattn.selective_scan(**inputs, dt_softplus=True, state=pool, cu_seqlens=starts, slots=at)
        yield cupyattn.causal_conv1d_update(x, windows, weight, conv_state_indices=at)
        yield cupyattn.causal_conv1d(x, weight, conv_states=windows, cu_seqlens=starts, slots=at)
        yield cupyattn.lightning_attention(q, q, q, pool, slopes, slots=at)
        yield cupyattn.lightning_attention(q, q, q, pool, slopes, cu_seqlens=starts, slots=at)

    with settings(check=check):
        for got, want in zip(call(far, slots), call(near, side_by_side), strict=True):
            assert_same_bits(got, want)
    assert_same_bits(far[slots], near)
    for slot in _wrapped(slots, len(far)):
        assert np.isnan(far[slot]).all(), f"slot {slot} was written"


@pytest.mark.parametrize("check", [False, True], ids=["plain", "checked"])
def test_rows_of_the_state_kernels(check):
    """Tokens more than 2**31 bytes apart, all of them in columns of one array; and side by side."""
    tokens, model = 5, Model(heads=HEADS, channels=16, states=16)
    inputs, starts = model.inputs(tokens), np.int32([0, tokens])
    by_token = {name: inputs.pop(name) for name in ("x", "dt", "B", "C", "z")}
    base = sparse_array((tokens, 2**29 + 64), "float32")

    def far(array, column):
        view = base[:, column:column + array[0].size].reshape(array.shape)
        assert np.shares_memory(view, base)
        view[...] = array
        return view

    apart = {name: far(array, 512 * i) for i, (name, array) in enumerate(by_token.items())}
    x, weight, slopes = by_token["x"].reshape(tokens, -1), np.ones((32, 4), np.float32), np.float32([0.1, 0.5])

    def call(rows, x, out):
        pool, windows = np.zeros((tokens, HEADS, 16, 16), np.float32), np.zeros((tokens, 32, 4), np.float32)
        flat = out.reshape(tokens, -1)
        yield cupyattn.selective_state_update(pool, **rows, **inputs, dt_softplus=True, out=out)
        yield cupyattn.selective_scan(**rows, **inputs, dt_softplus=True, state=pool, cu_seqlens=starts, out=out)
        yield cupyattn.causal_conv1d_update(x, windows, weight, out=flat)
        yield cupyattn.causal_conv1d(x, weight, conv_states=windows, cu_seqlens=starts, out=flat)
        q = rows["x"]
        yield cupyattn.lightning_attention(q, q, q, pool, slopes, out=out)
        yield cupyattn.lightning_attention(q, q, q, pool, slopes, cu_seqlens=starts, out=out)

    far_out, near_out = far(by_token["x"], 4096), np.empty_like(by_token["x"])
    with settings(check=check):
        for got, want in zip(call(apart, far(x, 8192), far_out), call(by_token, x, near_out), strict=True):
            assert_same_bits(got, want)


# ---- reading -------------------------------------------------------------------------------------------------

MODES = [pytest.param((kernels, check), id=f"{kernels}-{'checked' if check else 'plain'}")
         for kernels in ("cores", "mma") for check in (False, True)]


@pytest.fixture
def mode(request, monkeypatch):
    """Kernels on CUDA cores or on tensor cores, with or without the executor's checks."""
    kernels, check = request.param
    monkeypatch.setattr(attention_plans, "version", lambda facts: (kernels, "chosen by the test"))
    with settings(check=check):
        yield


def _batch(pages):
    """(q, lists) of a chunk of prefill over all pages and of one decoded token: two kernels on tensor cores."""
    q_lens, lengths = np.int32([30, 1]), np.int32([pages.size * PAGE_SIZE - 1, 9])
    q = np.random.default_rng(8).standard_normal((31, 3 * HEADS, HEAD_DIM)).astype("float16")
    return q, {"cu_seqlens_q": np.int32([0, *np.cumsum(q_lens)]), "cache_seqlens": lengths}


@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_attention_over_pages(mode):
    """Rows of a table, CSR lists, and addresses of blocks in which V lies more than 8 GiB behind K."""
    pages = _far_pages("float16")
    num_pages = int(pages.max()) + 1
    far = sparse_array((2, num_pages, PAGE_SIZE, HEADS, HEAD_DIM))
    near = np.random.default_rng(7).standard_normal((2, pages.size, PAGE_SIZE, HEADS, HEAD_DIM)).astype("float16")
    for cache, values in zip(far, near, strict=True):
        for page in _wrapped(pages, num_pages):
            poison(cache[page])
        cache[pages] = values
    q, lists = _batch(pages)
    table = np.stack([np.arange(pages.size, dtype=np.int32)] * 2)
    want = cupyattn.attention(q, *near, block_table=table, **lists)
    got = cupyattn.attention(q, *far, block_table=pages[table], **lists)
    assert_same_bits(got, want)

    ids, starts = pages[table].reshape(-1), np.int32([0, pages.size, 2 * pages.size])
    csr = cupyattn.PageTable.csr(ids, starts)
    assert_same_bits(cupyattn.attention(q, *far, block_table=csr, **lists), want)

    k, v = (cupyattn.BlockKV("float16", PAGE_SIZE, HEADS, HEAD_DIM, offset=i * far[0].nbytes,
                             stride_token=HEADS * HEAD_DIM, stride_head=HEAD_DIM) for i in range(2))
    addresses = far.ctypes.data + ids.astype(np.uint64) * np.uint64(far[0, 0].nbytes)
    blocks = cupyattn.PageTable.pointers(addresses, starts, buffers=(far,))
    assert_same_bits(cupyattn.attention(q, k, v, block_table=blocks, **lists), want)


@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_attention_over_ragged_arrays(mode):
    """Tokens of q, k, v and out that lie past 2**32 elements, of which nothing before them is touched."""
    q, lists = _batch(_far_pages("float16"))
    q_starts, k_starts = lists["cu_seqlens_q"], np.int32([0, 50, 59])
    k, v = np.random.default_rng(7).standard_normal((2, 59, HEADS, HEAD_DIM)).astype("float16")
    want, want_lse = cupyattn.attention(q, k, v, cu_seqlens_q=q_starts, cu_seqlens_k=k_starts, return_lse=True)

    def far(near):
        per_token = near[0].size
        first = 2**32 // per_token + 3
        array = sparse_array((first + len(near), *near.shape[1:]))
        for limit in (2**30, 2**31, 3 * 2**30, 2**32):
            at = first - limit // per_token
            poison(array[at:at + len(near)])
        array[first:] = near
        return array, np.int32(first)

    (q, first), (k, first_key), (v, _), (out, _) = map(far, (q, k, v, poison(np.empty_like(want))))
    before = out[3:3 + len(want)].copy()
    _, lse = cupyattn.attention(q, k, v, cu_seqlens_q=q_starts + first, cu_seqlens_k=k_starts + first_key, out=(
        out, np.empty(q.shape[:2], np.float32)), return_lse=True)
    assert_same_bits(out[first:], want)
    assert_same_bits(lse[first:], want_lse)
    assert_same_bits(out[3:3 + len(want)], before)


def _spread(near, pages):
    """`near` [pages, PAGE_SIZE, HEADS, ...] as pages of an array with HEAD_DIM elements for each token and head."""
    num_pages = int(pages.max()) + 1
    far = sparse_array((num_pages, PAGE_SIZE, HEADS, HEAD_DIM), near.dtype)
    for page in _wrapped(pages, num_pages):
        poison(far[page])
    view = far[..., 0] if near.ndim == 3 else far[..., :near.shape[3]]
    view[pages] = near
    return view


def _quantized(formats, pages):
    """(far, near): K and V in `formats`; codes, scales and zeros each past 4 GiB and 2**32 elements."""
    values = np.random.default_rng(7).standard_normal((2, pages.size, PAGE_SIZE, HEADS, HEAD_DIM)).astype(np.float32)
    near = [quantize(x, format) for x, format in zip(values, formats, strict=True)]
    far = [[part if part is None else _spread(part, pages) for part in parts] for parts in near]
    return [[cupyattn.QuantizedKV(*parts, format=format) for parts, format in zip(side, formats, strict=True)]
            for side in (far, near)]


@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_quantized_caches(mode):
    pages = _far_pages("float16")
    far, near = _quantized(("int8", "int4"), pages)
    q, lists = _batch(pages)
    table = np.stack([np.arange(pages.size, dtype=np.int32)] * 2)
    want = cupyattn.attention(q, *near, block_table=table, **lists)
    assert_same_bits(cupyattn.attention(q, *far, block_table=pages[table], **lists), want)


@pytest.mark.parametrize("check", [False, True], ids=["plain", "checked"])
def test_kv_flatten(check):
    """Out of far pages, into rows that are 256 MiB apart."""
    pages = _far_pages("float16")
    starts = np.int32([0, pages.size * PAGE_SIZE - 1])
    table = np.arange(pages.size, dtype=np.int32)[None]
    plain = _caches("float16", pages)
    for far, near in (plain, _quantized(("int8", "int8"), pages)):
        out = [sparse_array((int(starts[-1]), HEADS, 2**26))[..., :HEAD_DIM] for _ in "kv"]
        with settings(check=check):
            want = cupyattn.kv_flatten(*near, block_table=table, cu_seqlens_k=starts)
            cupyattn.kv_flatten(*far, block_table=pages[table], cu_seqlens_k=starts, out=tuple(out))
        for found, right in zip(out, want, strict=True):
            assert_same_bits(found, right)


def test_the_last_rows_of_a_large_weight():
    """131072 x 16640, more than 2**31 weights and bytes of codes: all 0, but for the last rows."""
    rows, columns = 131072, 16640
    tail = QMatrix.quantize(np.random.default_rng(9).standard_normal((16, columns), np.float32), "int8-g128")
    (segment,) = tail.segments
    codes, scales = (sparse_array((rows // 16, *part.shape[1:]), "uint8") for part in (segment.codes, segment.scales))
    codes[-1], scales[-1] = segment.codes[0], segment.scales[0]
    assert codes.nbytes > 2**31
    large = QMatrix(tail.format, (rows, columns), (PackedSegment(codes, scales, None, segment.form, columns),))
    assert_same_bits(cupyattn.dequantize(large, rows=(rows - 5, rows)), tail.reconstruct()[-5:])
    assert_same_bits(cupyattn.embedding(np.array([rows - 1]), large), tail.reconstruct()[-1:])


def test_sparse_arrays_and_their_shadow_take_no_memory():
    array = sparse_array((40, 2**30), "uint8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    caches = [array[:20].view(np.float16).reshape(-1, PAGE_SIZE, HEADS, HEAD_DIM) for array in (array, array[20:])]
    new = np.ones((1, HEADS, HEAD_DIM), np.float16)
    with settings(check=True):
        cupyattn.kv_append(new, new, *caches, slots=np.int64([caches[0].shape[0] * PAGE_SIZE - 1]))
    assert (caches[0][-1, -1] == 1).all() and (caches[1][-1, -1] == 1).all() and not caches[0][0].any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000   # KiB
