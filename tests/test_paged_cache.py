# SPDX-License-Identifier: Apache-2.0
"""PagedCache: pools of every format, moved between kinds of arrays, and the pages beside them."""

import numpy as np
import pytest
from compare import assert_same_bits

from cupyattn import PagedCache, Params, QuantizedKV, kv_append, paged_decode
from cupyattn.caches.paged import FORMATS
from cupyattn.paging.pages import PageManager
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
    with pytest.raises(TypeError, match="PagedCache: dtype must be float16, bfloat16, float32, got float64"):
        PagedCache(1, 2, 4, 1, 32, dtype="float64")


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
    ({"v_format": "q4"}, "v_format must be one of"),
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


def test_over_pools_there_are():
    """Any strides, the pools themselves; what does not fit is named."""
    pools = [np.zeros((2, 6, 4, 32), np.float16).transpose(1, 2, 0, 3) for _ in range(4)]
    cache = PagedCache.over(pools[:2], pools[2:], PageManager(6, 4, reserved=[0]))
    assert repr(cache).startswith("PagedCache(2 layers, 6 pages of 4 tokens, 2 heads of 32, float16, 12288 bytes, 5 p")
    assert all(a is b for a, b in zip((*cache.k, *cache.v), pools, strict=True))
    first = cache.pages.sequence()
    feed(cache, [first], [range(6)])
    second = first.fork()
    feed(cache, [second], [[7]])
    assert (first.pages, second.pages) == ([1, 2], [1, 3]) and np.array_equal(
        values(cache, second)[:, :6], values(cache, first))
    int8 = QuantizedKV.empty(6, 4, 2, 32, format="int8")
    assert PagedCache.over(pools[:1], [int8], cache.pages).v_format == "int8"
    for k, v, pages, message in (
            (pools, pools[1:], (6, 4), "k and v must have a pool for each layer, got 4 and 3"),
            ([], [], (6, 4), "k and v must have a pool for each layer, got 0 and 0"),
            (pools, pools, (5, 4), r"k\[0\] must be float16 \[5, 4, 2, 32\] like .* got float16 \[6, 4, 2, 32\]"),
            (pools[:2], [pools[0], int8], (6, 4), r"v\[1\] must be float16 .* got int8"),
            (pools[:1], [pools[0][:, :, :1]], (6, 4), r"v\[0\] must be .* got float16 \[6, 4, 1, 32\]")):
        with pytest.raises(ValueError, match=f"PagedCache.over: {message}"):
            PagedCache.over(k, v, PageManager(*pages))


def values(cache, sequence):
    """Keys and values of a sequence's tokens in all layers, as floats."""
    at = np.arange(sequence.num_tokens)
    page = np.array(sequence.pages, np.int64)[at // cache.page_size]
    pools = [pool.dequantize("float32") if isinstance(pool, QuantizedKV) else pool for pool in (*cache.k, *cache.v)]
    return np.stack([np.asarray(pool)[page, at % cache.page_size] for pool in pools])


def feed(cache, sequences, tokens):
    """Append a list of tokens to each; keys and values tell the token, its position, the layer and which of both."""
    count = len(tokens[0])
    params = cache.step(sequences, count)
    rng = np.random.default_rng(0)
    for n in range(cache.num_layers):
        shape = len(sequences) * count, cache.num_kv_heads, cache.head_dim
        position = np.concatenate([s.num_tokens + np.arange(count) for s in sequences])
        k, v = (np.sin(np.reshape(tokens, -1) * a + position * b + n)[:, None, None] * rng.uniform(0.5, 1.5, shape[1:])
                for a, b in ((0.7, 0.3), (0.2, 0.9)))
        kv_append(k.astype(np.float16), v.astype(np.float16), cache.k[n], cache.v[n], slots=params.slot_mapping())
    for sequence, some in zip(sequences, tokens, strict=True):
        sequence.append(some)


@pytest.mark.parametrize("formats", [("float16", None), ("hadamard8", "hadamard4"), ("int8", "int4"),
                                     ("fp8_e4m3", "float16")])
def test_shared_pages_hold_what_separate_ones_would(formats):
    """A prompt's copy of a begun page, forks, refused drafts: all formats keep every token of everyone."""
    texts = [[*range(10)], [*range(6), 20, 21, 22, 23], [*range(10)], [*range(4), 30]]
    caches = [PagedCache(2, 20, 4, 2, 32, k_format=formats[0], v_format=formats[1]) for _ in "ab"]
    for share, cache in zip((True, False), caches, strict=True):
        made = []
        for text in texts:
            sequence = cache.pages.sequence(text, share_prefix=share)
            assert sequence.num_tokens == (0 if not share or not made else (0, 6, 10, 4)[len(made)])
            if sequence.num_tokens < len(text):
                feed(cache, [sequence], [text[sequence.num_tokens:]])
            made.append(sequence)
        made.append(made[0].fork())
        feed(cache, made, [[40 + n, 50 + n, 60 + n] for n in range(5)])    # a draft
        for n, sequence in enumerate(made):
            sequence.truncate(sequence.num_tokens - n % 4)                 # of which some is refused
        feed(cache, made, [[70 + n, 80 + n] for n in range(5)])
        cache.made = made
    for shared, alone in zip(caches[0].made, caches[1].made, strict=True):
        assert np.array_equal(values(caches[0], shared), values(caches[1], alone))
    assert caches[0].pages.num_free > caches[1].pages.num_free
    before = [values(caches[0], sequence) for sequence in caches[0].made]
    caches[0].made[1].free()
    assert caches[0].defragment() > 0 and caches[0].defragment() == 0
    for n in (0, 2, 3, 4):
        assert np.array_equal(values(caches[0], caches[0].made[n]), before[n])
    again = caches[0].pages.sequence([*range(6), 20, 21, 22, 23])          # what is remembered has moved along
    assert again.num_tokens == 10 and np.array_equal(values(caches[0], again), before[1][:, :10])


def test_defragmentation_keeps_every_bit_of_attention():
    """Decoding over quantized caches before and after, on pages in the order of a long history."""
    cache = PagedCache(1, 24, 4, 2, 32, k_format="hadamard8", v_format="hadamard4")
    made = [cache.pages.sequence() for _ in range(4)]
    for step in range(5):
        for n, sequence in enumerate(made):                                # pages of all in turn
            feed(cache, [sequence], [[100 * n + 4 * step + i for i in range(3 + n % 2)]])
    made.pop(1).free()
    q = np.random.default_rng(1).standard_normal((3, 4, 32)).astype(np.float16)

    def decode():
        params = cache.step(made, 1)
        return paged_decode(q, cache.k[0], cache.v[0], block_table=params.block_index,
                            cache_seqlens=params.cache_seqlens)

    before = decode()
    assert any(np.diff(sequence.pages).tolist() != [1] * (len(sequence.pages) - 1) for sequence in made)
    assert cache.defragment() > 0
    assert all(np.diff(sequence.pages).tolist() == [1] * (len(sequence.pages) - 1) for sequence in made)
    assert_same_bits(decode(), before)


def test_other_caches_of_the_same_pages(xp):
    """A draft model's cache gets the same copies and moves, on any kind of arrays."""
    caches = [PagedCache(2, 8, 4, 1, 8), PagedCache(1, 8, 4, 1, 8, dtype="float32")]
    for cache in caches:
        for pool in (*cache.k, *cache.v):
            pool[...] = np.arange(8)[:, None, None, None]
    cache, draft = (cache.to(xp.module) for cache in caches)

    def contents():
        return [xp.numpy(pool)[..., 0, 0].tolist() for pool in (*cache.k, *cache.v, *draft.k, *draft.v)]

    first = cache.pages.sequence()
    cache.step([first], 6, others=[draft])
    first.append(range(6))
    second = first.fork()
    params = cache.step([second], 1, others=[draft])
    assert params.block_index.tolist() == [[0, 2]]
    assert all(pool[2] == [1, 1, 2, 2] for pool in contents())
    second.append([6])
    first.free()
    assert cache.defragment(others=[draft]) == 2                           # page 1 is remembered and makes way
    assert second.pages == [0, 1] and cache.pages.sequence(range(6)).pages == [0, 3]
    assert all(pool[:2] == [[0] * 4, [1, 1, 2, 2]] and pool[3] == [1] * 4 for pool in contents())


def test_a_step_without_pages_for_all_loses_nothing():
    """The copy for the first sequence is made, though the second finds no page; the message names the numbers."""
    cache = PagedCache(1, 3, 4, 1, 8)
    cache.k[0][...] = np.arange(3)[:, None, None, None]
    first = cache.pages.sequence()
    cache.step([first], 6)
    first.append(range(6))
    forks = [first.fork(), first.fork()]
    with pytest.raises(MemoryError, match="PageSequence.reserve: 1 tokens after 6 need 1 more pages of 4, 1 of them "
                                          "for a copy of a shared one, got 0 free of 3"):
        cache.step(forks, 1)
    assert forks[0].pages == [0, 2] and cache.k[0][2, :, 0, 0].tolist() == [1, 1, 2, 2]
    first.free()
    assert cache.step(forks, 1).block_index.tolist() == [[0, 2], [0, 1]]


def test_copies_of_one_step_that_depend_on_each_other():
    """A page that one sequence leaves can be another's next one in the same step."""
    cache = PagedCache(1, 4, 4, 1, 8)
    cache.k[0][...] = np.arange(4)[:, None, None, None]
    for text in ([1, 2, 3], [5, 6, 7]):
        sequence = cache.pages.sequence()
        cache.step([sequence], 3)
        sequence.append(text)
        sequence.free()
    kept = cache.pages.allocate(2)                   # nothing is empty now, 0 and 1 are remembered
    a, b = cache.pages.sequence([1, 2]), cache.pages.sequence([5, 6])
    cache.pages.free(kept[:1])                       # one page is: a takes it and leaves 0, which b takes
    cache.step([a, b], 1)
    assert (a.pages, b.pages) == ([2], [0])
    assert cache.k[0][:3, :, 0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 2, 2]]


def test_steps_that_are_refused():
    cache, other = PagedCache(1, 4, 4, 1, 8), PagedCache(1, 4, 2, 1, 8)
    own, foreign = cache.pages.sequence(), other.pages.sequence()
    for sequences, options, message in (
            ([own, foreign], {}, r"of this cache's pages, got sequences\[1\] of another PageManager"),
            ([own, own], {}, r"name each once, got sequences\[1\] twice"),
            ([own], {"others": [other]}, r"4 pages of 4 tokens like this cache, got others\[0\] with 4 of 2"),
            ([], {}, "PagedParams: batch_size must be at least 1, got 0")):
        with pytest.raises(ValueError, match=message):
            cache.step(sequences, 1, **options)
    assert own.pages == [] and cache.pages.num_free == 4
    with pytest.raises(ValueError, match="PagedCache.defragment: others must have"):
        cache.defragment(others=[other])


def test_a_step_into_earlier_params():
    cache = PagedCache(1, 6, 4, 1, 8)
    sequences = [cache.pages.sequence(range(n)) for n in (3, 6)]
    for sequence, n in zip(sequences, (3, 6), strict=True):
        cache.step([sequence], n)
        sequence.append(range(n))
    params = cache.step(sequences, 1, max_pages=3)
    arrays = params.block_index, params.cache_seqlens, params.cache_seqlens_after
    for n in range(5):
        found = cache.step(sequences, 1, out=params if n else None, max_pages=3)
        expected = cache.step(sequences, 1, max_pages=3)
        if n:
            assert found is params and all(now is then for now, then in zip(
                (params.block_index, params.cache_seqlens, params.cache_seqlens_after), arrays, strict=True))
        for name in ("block_index", "cache_seqlens", "cache_seqlens_after"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        for sequence in sequences:
            sequence.append([n])
    with pytest.raises(TypeError, match="PagedCache.step: out must be PagedParams, got Params"):
        cache.step(sequences, 1, out=Params(2, 1, 0))
    for wrong in ((sequences[:1], 1), (sequences, 2)):
        free = cache.pages.num_free
        with pytest.raises(ValueError, match="PagedCache.step: out must be of .*, got 2, 1 and 4"):
            cache.step(*wrong, out=params)
        assert cache.pages.num_free == free
