# SPDX-License-Identifier: Apache-2.0
"""PagedCache: pools of every format, moved between kinds of arrays, and the pages beside them."""

import numpy as np
import pytest
from compare import assert_same_bits

from cupyattn import PagedCache, QuantizedKV, kv_append
from cupyattn.caches.paged import FORMATS
from cupyattn.runtime.arrays import dtype_of


@pytest.mark.parametrize("k_format", FORMATS)
def test_every_format(k_format):
    cache = PagedCache(2, 5, 4, 3, 32, k_format=k_format)
    assert len(cache.k) == len(cache.v) == 2 and (cache.k_format, cache.v_format) == (k_format, k_format)
    for pool in (*cache.k, *cache.v):
        assert pool.shape == (5, 4, 3, 32)
        if k_format in ("float16", "bfloat16", "float32"):
            assert pool.dtype == dtype_of(k_format)
        else:
            assert isinstance(pool, QuantizedKV) and pool.format == k_format
    assert cache.nbytes == sum(pool.nbytes for pool in (*cache.k, *cache.v))
    assert cache.pages.num_pages == 5 and cache.pages.page_size == 4


def test_formats_and_dtypes():
    mixed = PagedCache(1, 2, 4, 1, 32, dtype="bfloat16", k_format="int8", v_format="hadamard4")
    assert (mixed.k[0].format, mixed.v[0].format) == ("int8", "hadamard4")
    assert mixed.k[0].scale.dtype.name == "bfloat16" and "int8/hadamard4" in repr(mixed)
    assert PagedCache(1, 2, 4, 1, 32, dtype=np.float32).v[0].dtype == np.float32
    assert PagedCache(1, 2, 4, 1, 32, k_format="float16", v_format="int8").v_format == "int8"
    assert PagedCache(1, 2, 4, 1, 32, k_format="fp8_e4m3").k[0].granularity == "token"


def test_scales_known_beforehand():
    scales = [np.full(3, n + 1, np.float32) for n in range(2)]
    cache = PagedCache(2, 5, 4, 3, 32, k_format="int8_symmetric", v_format="int8", scales=(scales, None))
    assert [pool.granularity for pool in cache.k] == ["head", "head"] and cache.k[1].scale is scales[1]


def test_contiguous_is_one_page_per_sequence():
    cache = PagedCache.contiguous(2, 3, 100, 4, 64, dtype="float32")
    assert cache.k[0].shape == (3, 100, 4, 64) and cache.pages.num_free == 0 and cache.page_size == 100


@pytest.mark.parametrize("formats", [("float16", "float16"), ("hadamard8", "int4"), ("fp8_e4m3", "int8")])
def test_to_another_kind_of_array(xp, formats):
    here = PagedCache(2, 3, 4, 2, 32, k_format=formats[0], v_format=formats[1])
    pages = here.pages.allocate(2)
    rows = np.random.default_rng(0).standard_normal((2, 2, 2, 32)).astype(np.float16)
    for n in range(2):
        kv_append(rows[0] + n, rows[1] - n, here.k[n], here.v[n], slots=np.int32([1, 7]))
    there = here.to(xp.module)
    assert there.xp is xp.module and there.pages is here.pages and there.to(xp.module) is there
    assert pages == [0, 1] and there.pages.num_free == 1 and repr(there) == repr(here)
    back = there.to(np)
    for a, b in zip((*here.k, *here.v), (*back.k, *back.v), strict=True):
        a, b = (x.dequantize("float16") if isinstance(x, QuantizedKV) else x for x in (a, b))
        for at in ((0, 1), (1, 3)):
            assert_same_bits(a[at], b[at])


@pytest.mark.parametrize(("change", "message"), [
    ({"page_size": 0}, "PagedCache: page_size must be an int32 of at least 1, got 0"),
    ({"num_layers": 0}, "num_layers must be"), ({"num_pages": -1}, "num_pages must be"),
    ({"k_format": "int7"}, "k_format must be one of float16, .*hadamard4, got 'int7'"),
    ({"v_format": "q4"}, "v_format must be one of"), ({"dtype": "float64"}, "dtype must be float16, .* got 'float64'"),
    ({"k_format": "float16", "v_format": "float32"}, "v_format must be float16 like k_format or one of"),
    ({"k_format": "hadamard8", "head_dim": 40}, "head_dim must be a multiple of 32 in format hadamard8, got 40"),
    ({"k_format": "int8_channel", "scales": ([None], None)}, "one of k scales for each of the 2 layers, got 1"),
    ({"scales": ([np.ones(1, np.float32)] * 2, None)}, "scales must be None for float16")])
def test_refused(change, message):
    sizes = {"num_layers": 2, "num_pages": 3, "page_size": 4, "num_kv_heads": 2, "head_dim": 32} | change
    with pytest.raises(ValueError, match=message):
        PagedCache(**sizes)


def test_names():
    import cupyattn

    assert cupyattn.caches.PagedCache is cupyattn.PagedCache
