# SPDX-License-Identifier: Apache-2.0
"""Caches of more than 2**31 elements and 4 GiB: pages far apart give what the same pages give side by side."""

import resource

import numpy as np
import pytest
from compare import assert_same_bits, dtype_of, poison, sparse_array

import cupyattn
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


def test_sparse_arrays_and_their_shadow_take_no_memory():
    array = sparse_array((40, 2**30), "uint8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    caches = [array[:20].view(np.float16).reshape(-1, PAGE_SIZE, HEADS, HEAD_DIM) for array in (array, array[20:])]
    new = np.ones((1, HEADS, HEAD_DIM), np.float16)
    with settings(check=True):
        cupyattn.kv_append(new, new, *caches, slots=np.int64([caches[0].shape[0] * PAGE_SIZE - 1]))
    assert (caches[0][-1, -1] == 1).all() and (caches[1][-1, -1] == 1).all() and not caches[0][0].any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000   # KiB
