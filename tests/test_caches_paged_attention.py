# SPDX-License-Identifier: Apache-2.0
"""The paged attention cache: who owns which page, how many fit the memory, and writing prompts and decodes."""

import copy
import pickle
import types

import numpy as np
import pytest
from attention_layers import Layer
from compare import assert_same_bits, dtype_of, poison
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyattn import (
    AttentionMetadata,
    HBMPageManager,
    PagedAttentionCache,
    PagedAttentionCacheMetaData,
    PagedAttentionCacheView,
    PagedAttentionMetadata,
    PagedAttn,
    PagedCache,
    QuantizedKV,
    page_move,
    paged_decode,
)
from cupyattn.caches import hbm_pages
from cupyattn.kv.quantized import FORMATS

PAGES, PS, H, D = 10, 4, 2, 8
SIZES = {"batch_size": 2, "num_hidden_layers": 3, "max_sequences": 17, "page_size": PS, "num_kv_heads": H,
         "kv_head_dim_size": D}


def metadata(pages=PAGES, layers=1, dim=D):
    return PagedAttentionCacheMetaData(2, layers, pages, 4, 16, PS, H, dim, 0.9)


def make(xp, dtype="float32", quantizer=None, dim=D):
    """A view whose pages are full of NaN, or empty with a quantizer."""
    view = PagedAttentionCacheView.init(None, dtype, metadata(dim=dim), 0, None, quantizer, xp=xp.module)
    if quantizer is None:
        view.key_pages.fill(np.nan)
        view.value_pages.fill(np.nan)
    return view


def rows(xp, tokens, dtype="float32", seed=0, dim=D):
    numbers = np.random.default_rng(seed).standard_normal((2, tokens, H, dim)).astype(dtype_of(dtype))
    return xp.array(numbers[0]), xp.array(numbers[1])


def ints(xp, values):
    return xp.array(np.int32(values))


def prompt(xp, length, start, chunk, table):
    return PagedAttentionMetadata.prefill(ints(xp, length), ints(xp, np.arange(start, start + chunk)), ints(xp, table))


def expected(xp, dtype, places):
    """Pools of NaN with `places` {(page, slot): row [H, D]} in them."""
    want = poison(np.empty((H, PAGES, PS, D), dtype_of(dtype)))
    for (page, slot), row in places.items():
        want[:, page, slot] = row
    return want


# ---- pages -----------------------------------------------------------------------------------------------

def test_manager():
    manager = HBMPageManager(metadata())
    assert (manager.metadata, manager.page_size, manager.current_page_index) == (metadata(), 4, 0)
    assert manager.num_free == 9   # page 0 is nobody's
    assert manager.alloc_hbm_pages(3) == [1, 2, 3]
    assert manager.alloc_hbm_pages(0) == manager.alloc_hbm_pages(-1) == manager.alloc_hbm_pages(7) == []
    assert manager.alloc_prefill_hbm_pages(0) == manager.alloc_prefill_hbm_pages(-5) == []
    assert manager.alloc_prefill_hbm_pages(9) == [4, 5, 6]
    assert manager.alloc_prefill_hbm_pages(8) == [7, 8]
    assert manager.alloc_prefill_hbm_pages(5) == [] and manager.num_free == 1   # nothing is granted in part
    manager.free_hbm_pages([5, 0, 2])
    assert manager.alloc_hbm_pages(3) == [9, 5, 2]   # first in, first out; page 0 was passed over


@pytest.mark.parametrize("freed,message", [([2, 1, 1], "page 1 2 times"), ([4], "page 4, which is already free"),
                                           ([1, 10], "10, which is no page id"), ([-1], "-1, which is no page id")])
def test_pages_are_freed_once(freed, message):
    manager = HBMPageManager(metadata())
    manager.alloc_hbm_pages(3)
    with pytest.raises(ValueError, match=message):
        manager.free_hbm_pages(freed)
    assert manager.num_free == 6 and manager.alloc_hbm_pages(6) == [4, 5, 6, 7, 8, 9]


def test_prompts_that_begin_alike_share_pages(xp):
    """The manager's sequences: whole pages are the other prompt's, a begun one is copied, lists go beside them."""
    manager, view = HBMPageManager(metadata()), make(xp)
    listed = manager.alloc_hbm_pages(2)
    k, v = rows(xp, 12)
    first = manager.pages.sequence(range(10))
    assert first.reserve(10) == {} and first.pages == [3, 4, 5] and listed == [1, 2]
    view.write_prefill_to_cache(k[:10], v[:10], prompt(xp, 10, 0, 10, first.pages))
    first.append(range(10))
    second = manager.pages.sequence([*range(7), 50])
    assert second.num_tokens == 7
    ((source, destination), tokens), = second.reserve(1).items()
    page_move([view.k_cache, view.v_cache], ints(xp, [source]), ints(xp, [destination]), tokens=ints(xp, [tokens]))
    view.write_prefill_to_cache(k[10:11], v[10:11], prompt(xp, 8, 7, 1, second.pages))
    second.append([50])
    assert second.pages == [3, 6] and manager.num_free == 3
    row = xp.numpy(k)
    places = {(first.pages[t // PS], t % PS): row[t] for t in range(10)}
    places |= {(6, t - 4): row[t if t < 7 else 10] for t in range(4, 8)}
    assert_same_bits(xp.numpy(view.key_pages), expected(xp, "float32", places))
    first.free()
    manager.free_hbm_pages(listed)
    assert manager.num_free == 7 and len(manager.alloc_hbm_pages(7)) == 7 and manager.alloc_hbm_pages(1) == []


@pytest.mark.parametrize("pages", [1, 0, -3])
def test_a_cache_without_pages(pages):
    manager = HBMPageManager(metadata(pages))
    assert manager.num_free == 0 and manager.alloc_hbm_pages(1) == []


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("pages", "prompt", "free")), st.integers(-1, 24)), max_size=40))
def test_no_page_is_granted_twice_and_none_is_lost(steps):
    manager, held = HBMPageManager(metadata()), []
    for what, number in steps:
        if what != "free":
            wanted = number % 8 - 1 if what == "pages" else -(-number // PS)
            pages = manager.alloc_hbm_pages(wanted) if what == "pages" else manager.alloc_prefill_hbm_pages(number)
            assert len(pages) == (wanted if 0 < wanted <= 9 - len(sum(held, [])) else 0)
            held += [pages] if pages else []
        elif held:
            manager.free_hbm_pages(held.pop(number % len(held)))
        granted = sum(held, [])
        assert len(set(granted)) == len(granted) and 0 not in granted and manager.num_free == 9 - len(granted)
    for pages in held:
        manager.free_hbm_pages(pages)
    assert sorted(manager.alloc_hbm_pages(9)) == list(range(1, 10))


# ---- how many pages fit ----------------------------------------------------------------------------------

def test_metadata_fields():
    made = PagedAttentionCacheMetaData(1, 2, 3, 4, 5, 6, 7, 8, 0.5)
    assert made.to_dict() == {"batch_size": 1, "num_hidden_layers": 2, "num_pages_per_layer": 3,
                              "num_pages_per_sequence": 4, "max_sequences": 5, "page_size": 6, "num_kv_heads": 7,
                              "kv_head_dim_size": 8, "hbm_utilization": 0.5}
    assert PagedAttentionCacheMetaData.from_json(made.to_json()) == made


@pytest.mark.parametrize("mesh,devices", [(None, 1), (4, 4), (types.SimpleNamespace(devices=np.empty((2, 4))), 8)])
def test_pages_by_memory(mesh, devices):
    def create(limit, **options):
        return PagedAttentionCacheMetaData.create(mesh, **SIZES, hbm_utilization=0.5, memory_bytes=limit, **options)

    page = 2 * PS * H * D * 2   # bytes of a page of bfloat16, K and V
    limit = 100_003
    made = create(limit)
    assert made.num_pages_per_layer == (int(limit * 0.5) * devices // 3) // page
    assert made.num_pages_per_sequence == 5   # ceil(17 / 4)
    assert create(limit, dtype="float32").num_pages_per_layer == (int(limit * 0.5) * devices // 3) // (2 * page)
    assert create(2 * 6 * page).num_pages_per_layer == 2 * devices
    if devices == 1:
        with pytest.raises(ValueError, match="room for 2 pages of 256 bytes in each of 3 layers, got 1535 bytes: 0.5 "
                                             "of 3070 less 0 in use, times 1 device$"):
            create(3070)


def test_the_host_s_memory(monkeypatch):
    made = PagedAttentionCacheMetaData.create(None, *SIZES.values(), 0.5)
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 1000 < made.num_pages_per_layer < total // (3 * 256)
    monkeypatch.setattr(hbm_pages, "MEMORY", "/proc/no_such_file")
    with pytest.raises(NotImplementedError, match="memory_bytes must be given where /proc/no_such_file cannot be read"):
        PagedAttentionCacheMetaData.create(None, *SIZES.values(), 0.5)


def test_the_device_s_memory(xp, monkeypatch):
    if xp.name == "standin":
        monkeypatch.setattr(xp.module.cuda.runtime, "memGetInfo", lambda: (700_000, 1_000_000))
        pool = types.SimpleNamespace(free_bytes=lambda: 100_000)   # held by CuPy, used by nobody
        monkeypatch.setattr(xp.module, "get_default_memory_pool", lambda: pool)
        made = PagedAttentionCacheMetaData.create(None, **SIZES, hbm_utilization=0.9, xp=xp.module)
        assert made.num_pages_per_layer == 700_000 // 3 // 256   # 900000 less 200000 in use
        with pytest.raises(ValueError, match="got -100000 bytes: 0.1 of 1000000 less 200000 in use"):
            PagedAttentionCacheMetaData.create(None, **SIZES, hbm_utilization=0.1, xp=xp.module)
    else:
        made = PagedAttentionCacheMetaData.create(None, **SIZES, hbm_utilization=0.9, xp=xp.module)
        assert made.num_pages_per_layer > 1000


def test_sizes_are_checked_in_order():
    wrong = dict.fromkeys(SIZES, 0)
    for name, size in SIZES.items():
        with pytest.raises(ValueError, match=f"`{name}` must be positive, got 0"):
            PagedAttentionCacheMetaData.create(None, **wrong, hbm_utilization=2.0, memory_bytes=10**6)
        wrong[name] = size
    for share in (0.0, 1.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="`hbm_utilization` must be between 0 and 1, both excluded"):
            PagedAttentionCacheMetaData.create(None, **wrong, hbm_utilization=share, memory_bytes=10**6)
    with pytest.raises(TypeError, match="page_size must be given"):
        PagedAttentionCacheMetaData.create(batch_size=1, num_hidden_layers=1, max_sequences=1)
    for limit, error in (("1", TypeError), (-1, ValueError), (float("inf"), ValueError)):
        with pytest.raises(error, match="memory_bytes must be"):
            PagedAttentionCacheMetaData.create(None, **SIZES, hbm_utilization=0.5, memory_bytes=limit)
    for mesh, error in ((0, ValueError), (2.5, TypeError), ("gpu", TypeError)):
        with pytest.raises(error, match="mesh must be"):
            PagedAttentionCacheMetaData.create(mesh, **SIZES, hbm_utilization=0.5)


# ---- views and caches ------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_init(xp, dtype):
    cache = PagedAttentionCache.init_cache(None, dtype, metadata(layers=3), None, xp=xp.module)
    assert [view.layer_index for view in cache.views] == [0, 1, 2] and len(cache) == 3
    for view in cache.views:
        assert_same_bits(xp.numpy(view.key_pages), np.zeros((H, PAGES, PS, D), dtype_of(dtype)))
        assert_same_bits(xp.numpy(view.value_pages), np.zeros((H, PAGES, PS, D), dtype_of(dtype)))
        assert isinstance(view.key_pages, xp.module.ndarray) and view.k_cache.shape == (PAGES, PS, H, D)
    cache[0].key_pages.fill(1)
    assert not xp.numpy(cache[1].key_pages).any() and not xp.numpy(cache[0].value_pages).any()
    assert cache.nbytes == 3 * 2 * H * PAGES * PS * D * dtype_of(dtype).itemsize
    with pytest.raises(NotImplementedError, match="write_decodes_to_cache, write_prefill_to_cache"):
        cache[0].concatenate_to_cache()
    with pytest.raises(TypeError, match="init: dtype must be float16, bfloat16, float32, got int8"):
        PagedAttentionCache.init_cache(None, "int8", metadata())
    for quantizer in ("int5", object()):
        with pytest.raises(TypeError, match="quantizer must be None or a format of QuantizedKV, int8, int4"):
            PagedAttentionCache.init_cache(None, dtype, metadata(), None, quantizer)


def test_empty_caches():
    cache = PagedAttentionCache.init_empty(2)
    assert cache.views == [None, None]
    assert not cache.init_empty() and not cache.init_empty(0, "anything", even=1)   # as false as EasyDeL's None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_lost(xp, dtype):
    cache = PagedAttentionCache.init_cache(None, dtype, metadata(layers=2), xp=xp.module)
    key, value = rows(xp, 8, dtype)
    cache[1].write_prefill_to_cache(key, value, prompt(xp, 6, 0, 8, [3, 1]))
    back = PagedAttentionCache.from_json(cache.to_json(), xp=xp.module)
    assert back == cache and back[1].metadata == metadata(layers=2)
    assert PagedAttentionCache.from_pure(*cache.to_pure()) == cache
    before = cache.copy()
    cache[0].key_pages.fill(3)
    assert before != cache and before == back
    step = prompt(xp, 6, 0, 8, [3, 1])
    assert PagedAttentionMetadata.from_json(step.to_json(), xp=xp.module) == step
    if xp.name == "numpy":   # what layers share of a step is not of the object
        cache[0].write_prefill_to_cache(key, value, step)
        for other in (pickle.loads(pickle.dumps(step)), copy.deepcopy(step), step.copy(), step.replace()):
            assert other == step
            cache[1].write_prefill_to_cache(key, value, other)
            assert other.to_dict() == step.to_dict() and "_step" not in repr(other)


# ---- prompts ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_prompt_in_one_chunk(xp, dtype):
    view, (key, value) = make(xp, dtype), rows(xp, 8, dtype)
    assert view.write_prefill_to_cache(key, value, prompt(xp, 6, 0, 8, [7, 3])) is view
    for pages, new in ((view.key_pages, xp.numpy(key)), (view.value_pages, xp.numpy(value))):
        places = {((7, 3)[t // PS], t % PS): new[t] for t in range(6)}   # rows 6 and 7 are padding: not stored
        assert_same_bits(xp.numpy(pages), expected(xp, dtype, places))


@pytest.mark.parametrize("chunks", [(8, 8), (5, 3, 8), (14,), (1,) * 14, (3, 13)])
def test_chunks_equal_one_chunk(xp, chunks):
    """14 tokens in any chunks, padded or not, aligned to pages or not."""
    view, (key, value) = make(xp), rows(xp, 16)
    table, start = [7, 3, 9, 1], 0
    for chunk in chunks:
        length = min(14, start + chunk)
        view.write_prefill_to_cache(key[start:start + chunk], value[start:start + chunk],
                                    prompt(xp, length, start, chunk, table))
        start += chunk
    for pages, new in ((view.key_pages, xp.numpy(key)), (view.value_pages, xp.numpy(value))):
        places = {(table[t // PS], t % PS): new[t] for t in range(14)}
        assert_same_bits(xp.numpy(pages), expected(xp, "float32", places))


def test_rounding_to_the_pages(xp):
    view, step = make(xp, "bfloat16"), prompt(xp, 1, 0, 1, [1])
    x = xp.array(np.full((1, H, D), 1.00390625 + 2**-12, np.float32))
    view.write_prefill_to_cache(x, x, step)
    assert (xp.numpy(view.key_pages)[:, 1, 0] == dtype_of("bfloat16").type(1.0078125)).all()
    for tie, even in ((1.00390625, 1.0), (1.01171875, 1.015625)):   # half-way between two of them
        x = xp.array(np.full((1, H, D), tie, np.float32))
        view.write_decodes_to_cache(x, x, PagedAttentionMetadata.decode(ints(xp, [1]), ints(xp, [[1]])))
        assert (xp.numpy(view.value_pages)[:, 1, 1] == dtype_of("bfloat16").type(even)).all()


def test_a_length_that_is_a_number(xp):
    view, (key, value) = make(xp), rows(xp, 4)
    view.write_prefill_to_cache(key, value, PagedAttentionMetadata.prefill(2, ints(xp, [0, 1, 2, 3]), ints(xp, [5])))
    new = xp.numpy(key)
    assert_same_bits(xp.numpy(view.key_pages), expected(xp, "float32", {(5, t): new[t] for t in range(2)}))


def test_negative_positions_of_a_prompt_are_skipped(xp):
    view, (key, value) = make(xp), rows(xp, 4)
    step = PagedAttentionMetadata.prefill(ints(xp, 3), ints(xp, [-1, -9, 1, 2]), ints(xp, [5]))
    new = xp.numpy(view.write_prefill_to_cache(key, value, step) and value)
    assert_same_bits(xp.numpy(view.value_pages), expected(xp, "float32", {(5, t): new[t + 1] for t in (1, 2)}))


def test_a_step_of_both_is_written_in_two_parts(xp):
    """Each method writes its rows of a step that has both, by the tables of the whole."""
    view, (key, value) = make(xp), rows(xp, 6)
    step = PagedAttentionMetadata(ints(xp, 3), ints(xp, np.arange(4)), ints(xp, [5]), ints(xp, [6, -1]),
                                  ints(xp, [[2, 8], [1, 1]]))
    view.write_prefill_to_cache(key[:4], value[:4], step)
    view.write_decodes_to_cache(key[4:], value[4:], step)
    new = xp.numpy(key)
    places = {(5, t): new[t] for t in range(3)} | {(8, 2): new[4]}
    assert_same_bits(xp.numpy(view.key_pages), expected(xp, "float32", places))


@pytest.mark.parametrize("table,length,message", [
    ([1], 5, "positions must be in"), ([1, 0], 5, "page 0 .* is reserved"),
    ([1, PAGES], 5, "block_table must be in"), ([], 1, "positions must be in")])
def test_prompts_without_pages(xp, table, length, message):
    view, (key, value) = make(xp), rows(xp, 8)
    before, step = view.copy(), prompt(xp, length, 0, 8, np.int32(table))
    if xp.name == "numpy":
        with pytest.raises(ValueError, match=message):
            view.write_prefill_to_cache(key, value, step)
        assert view == before
        return
    view.write_prefill_to_cache(key, value, step)   # tokens without a page are not stored, and nothing else is hit
    new = xp.numpy(key)
    places = {(1, t): new[t] for t in range(4)} if table else {}
    assert_same_bits(xp.numpy(view.key_pages), expected(xp, "float32", places))


# ---- decodes ---------------------------------------------------------------------------------------------

def test_decodes(xp):
    view, (key, value) = make(xp), rows(xp, 4)
    table = ints(xp, [[1, 5, 0], [2, 0, 0], [3, 4, 6], [7, 8, 0]])
    step = PagedAttentionMetadata.decode(ints(xp, [5, 0, 11, -7]), table)
    assert view.write_decodes_to_cache(key, value, step) is view
    for pages, new in ((view.key_pages, xp.numpy(key)), (view.value_pages, xp.numpy(value))):
        want = {(5, 1): new[0], (2, 0): new[1], (6, 3): new[2]}   # the last row is skipped, page 0 is not written
        assert_same_bits(xp.numpy(pages), expected(xp, "float32", want))


@pytest.mark.parametrize("position,table,message", [
    (12, [1, 2, 3], r"positions must be in \[-1, 12\)"), (4, [1, 0, 3], "page 0 .* is reserved"),
    (0, [PAGES, 0, 0], "block_table must be in"), (4, [1, -1, 3], "block_table must be in")])
def test_decodes_without_a_page(xp, position, table, message):
    view, (key, value) = make(xp), rows(xp, 2)
    before = view.copy()
    step = PagedAttentionMetadata.decode(ints(xp, [position, 1]), ints(xp, [table, [7, 0, 0]]))
    if xp.name == "numpy":
        with pytest.raises(ValueError, match=message):
            view.write_decodes_to_cache(key, value, step)
        assert view == before
        return
    view.write_decodes_to_cache(key, value, step)
    assert_same_bits(xp.numpy(view.value_pages), expected(xp, "float32", {(7, 1): xp.numpy(value)[1]}))


def test_two_tokens_for_one_place():
    view, key = PagedAttentionCacheView.init(metadata=metadata(), dtype="float32"), np.ones((2, H, D), np.float32)
    step = PagedAttentionMetadata.decode(np.int32([1, 1]), np.int32([[3], [3]]))
    with pytest.raises(ValueError, match="places must differ from token to token, got page 3 slot 1 twice"):
        view.write_decodes_to_cache(key, key, step)


# ---- both ------------------------------------------------------------------------------------------------

def test_modes(xp):
    position, table = ints(xp, [1]), ints(xp, [[1]])
    one = PagedAttentionMetadata.prefill(ints(xp, 2), position, table[0])
    other = PagedAttentionMetadata.decode(position, table)
    both = PagedAttentionMetadata(ints(xp, 2), position, table[0], position, table)
    none = PagedAttentionMetadata.init_empty(xp=xp.module)
    modes = [(step.is_prefill_mode(), step.is_decode_mode(), step.is_mixed_mode()) for step in (one, other, both, none)]
    assert modes == [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
    assert [xp.numpy(array).tolist() for _, array in none._items()] == [1_000_000] * 5
    assert PagedAttentionMetadata(3, position, table[0], 0, 0).is_prefill_mode()


def test_steps_that_do_not_fit(xp):
    view, (key, value) = make(xp), rows(xp, 4)
    step = prompt(xp, 4, 0, 4, [1])
    decode = PagedAttentionMetadata.decode(ints(xp, [1, 2, 3, 4]), ints(xp, [[1]] * 4))
    for wrong in (decode, PagedAttentionMetadata.init_empty(xp=xp.module)):
        with pytest.raises(ValueError, match="write_prefill_to_cache: metadata must have a prefill, got none"):
            view.write_prefill_to_cache(key, value, wrong)
    for wrong in (step, PagedAttentionMetadata.init_empty(xp=xp.module)):
        with pytest.raises(ValueError, match="write_decodes_to_cache: metadata must have decodes, got none"):
            view.write_decodes_to_cache(key, value, wrong)
    with pytest.raises(ValueError, match=r"prefill_position must be \[chunk\] = \[3\], got \[4\]"):
        view.write_prefill_to_cache(key[:3], value[:3], step)
    with pytest.raises(ValueError, match=r"decodes_position must be \[batch\] = \[3\], got \[4\]"):
        view.write_decodes_to_cache(key[:3], value[:3], decode)
    with pytest.raises(ValueError, match=r"value must be \[tokens, num_kv_heads, head_dim\]"):
        view.write_decodes_to_cache(key, value[:, :1], decode)
    if xp.name != "numpy":
        with pytest.raises(TypeError, match="all arrays must be of one kind"):
            view.write_prefill_to_cache(key, value, step.replace(prefill_page_table=np.int32([1])))


@pytest.mark.parametrize("quantizer", FORMATS)
def test_formats(xp, quantizer):
    """Pages of every format, a prompt and a decode: what attention reads is what went in."""
    view = make(xp, "float16", quantizer, dim=32)
    assert isinstance(view.key_pages, QuantizedKV) and view.k_cache is view.key_pages
    assert view.key_pages.shape == (PAGES, PS, H, 32)
    key, value = rows(xp, 6, "float16", dim=32)
    view.write_prefill_to_cache(key, value, prompt(xp, 6, 0, 6, [4, 2]))
    view.write_decodes_to_cache(key[:1], value[:1], PagedAttentionMetadata.decode(ints(xp, [6]), ints(xp, [[4, 2]])))
    held, again = view.k_cache.dequantize(), make(xp, "float16", quantizer, dim=32)
    error = {"int4": 0.25, "int8_symmetric": 0.51, "int8_channel": 0.51, "fp8_e4m3": 0.2, "fp8_e5m2": 0.35,
             "hadamard6": 0.12, "hadamard4": 0.5}.get(quantizer, 0.03)
    want = np.concatenate([xp.numpy(key), xp.numpy(key)[:1]]).astype(np.float32)
    assert np.abs(np.concatenate([held[4], held[2, :3]]) - want).max() < error
    assert not held[2, 3].any() and not held[[0, 1, 3]].any()
    if quantizer.startswith("fp8"):   # a scale of its own for each token and head: nothing need be known beforehand
        other = "fp8_e5m2" if quantizer == "fp8_e4m3" else "fp8_e4m3"
        assert view.key_pages.granularity == "token"
        assert again != make(xp, "float16", other, dim=32)   # the same bytes of another format
    assert again != view and PagedAttentionCacheView.from_json(view.to_json(), xp=xp.module) == view


@pytest.mark.parametrize("xp", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_decoding_over_pages(xp):
    """NaN on page 0, past the ends and on other pages changes nothing."""
    view, (key, value) = make(xp), rows(xp, 7)
    view.write_prefill_to_cache(key, value, prompt(xp, 7, 0, 7, [4, 2]))
    q = xp.array(np.random.default_rng(3).standard_normal((1, H, D)).astype(np.float32))
    out = paged_decode(q, view.k_cache, view.v_cache, block_table=ints(xp, [[4, 2, 0]]), cache_seqlens=ints(xp, [7]))
    scores = np.einsum("hd,thd->ht", xp.numpy(q)[0].astype(np.float64), xp.numpy(key)) * D**-0.5
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    want = np.einsum("ht,thd->hd", weights, xp.numpy(value))
    assert np.abs(xp.numpy(out)[0] - want).max() < 2e-6


@pytest.mark.parametrize("quantizer", [None, "int8", "hadamard4", "fp8_e4m3"])
def test_sequences_share_pages_and_move(xp, quantizer):
    """As a PagedCache: prompts that begin alike, and decodes over them, bit for bit, before and after they move."""
    cache = PagedAttentionCache.init_cache(None, "float16", metadata(24, layers=2, dim=32), None, quantizer,
                                           xp=xp.module)
    manager, attend = HBMPageManager(cache[0].metadata), PagedAttn(AttentionMetadata())
    paged = cache.paged_cache(manager)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((2, 99, H, 32)).astype(np.float16)   # keys and values of each token
    kept = manager.alloc_prefill_hbm_pages(6)                        # a list: it stays
    for view in cache:
        view.write_prefill_to_cache(*rows(xp, 6, "float16", dim=32), prompt(xp, 6, 0, 6, kept))
    made = []
    for text in ([*range(10)], [*range(6), 20, 21], [*range(10), 30]):
        sequence = manager.pages.sequence(text)
        assert sequence.num_tokens == (0, 6, 10)[len(made)]
        first, new = sequence.num_tokens, text[sequence.num_tokens:]
        paged.step([sequence], len(new))                             # room, and a copy of a begun page that is shared
        step = prompt(xp, len(text), first, len(new), sequence.pages)
        for view in cache:
            view.write_prefill_to_cache(*(xp.array(side[new]) for side in table), step)
        sequence.append(new)
        made.append(sequence)
    made.pop(0).free()
    q = xp.array(rng.standard_normal((2, 4, 32)).astype(np.float16))

    def outputs():
        step = PagedAttentionMetadata.decode(ints(xp, [sequence.num_tokens - 1 for sequence in made]), ints(
            xp, manager.pages.block_table([sequence.pages for sequence in made])))
        return np.stack([xp.numpy(attend(q, None, None, view, step).attention_outputs) for view in cache])

    before = outputs()
    assert paged.defragment() > 0 and kept == [1, 2]
    assert [sequence.pages for sequence in made] in ([[3, 4], [3, 5, 6]], [[3, 6], [3, 4, 5]])
    assert_same_bits(outputs(), before)
    if quantizer is None:   # the list's tokens are where they were
        for view in cache:
            pages = xp.numpy(view.k_cache)[kept].reshape(-1, H, 32)
            assert_same_bits(pages[:6], xp.numpy(rows(xp, 6, "float16", dim=32)[0]))
    manager.free_hbm_pages(kept)
    for sequence in made:
        sequence.free()
    assert manager.num_free == 23


def test_a_layer_over_these_pages(xp):
    """QAttn.forward gives the bits it gives over a PagedCache of its own, and pages that do not fit are refused."""
    layer, manager = Layer(xp), HBMPageManager(metadata(dim=32))
    cache = PagedAttentionCache.init_cache(None, "float32", manager.metadata, xp=xp.module)
    x, found = layer.inputs(1, 6), []
    for pages in (cache.paged_cache(manager), PagedCache(1, PAGES, PS, H, 32, dtype="float32", xp=xp.module)):
        sequence = pages.pages.sequence()
        got = layer.attn.forward(xp.array(x), pages.step([sequence], 6), pages, **layer.tables)
        found.append(xp.numpy(got))
    assert_same_bits(*found)
    assert xp.numpy(cache[0].key_pages)[:, 1].any() and not xp.numpy(cache[0].key_pages)[:, 0].any()
    with pytest.raises(ValueError, match=r"PagedCache.over: k\[0\] must be float32 \[7, 4, 2, 32\] like the first"):
        cache.paged_cache(HBMPageManager(metadata(pages=7)))
    with pytest.raises(ValueError, match="Cache view for layer 0 is None"):
        PagedAttentionCache.init_empty(1).paged_cache(manager)


def test_pages_in_the_other_layout(xp):
    """Pools [num_pages, page_size, num_kv_heads, head_dim] are taken by their strides."""
    pools = [xp.array(np.full((PAGES, PS, H, D), np.nan, np.float32)) for _ in "kv"]
    view = PagedAttentionCacheView(metadata(), 0, *(pool.transpose(2, 0, 1, 3) for pool in pools))
    (key, value), other = rows(xp, 6), make(xp)
    for each in (view, other):
        each.write_prefill_to_cache(key, value, prompt(xp, 6, 0, 6, [7, 3]))
    assert_same_bits(xp.numpy(pools[0]), xp.numpy(other.key_pages).transpose(1, 2, 0, 3))
    assert_same_bits(xp.numpy(view.value_pages), xp.numpy(other.value_pages))
