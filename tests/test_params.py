# SPDX-License-Identifier: Apache-2.0
"""Params and PagedParams: lengths, offsets, masks, RoPE tables, page arithmetic, copies per device."""

import sys

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from cupyattn import CaptureError
from cupyattn.graphs import capture
from cupyattn.params import PagedParams, Params

TABLE = np.array([[7, 3, 4, 9]], dtype=np.int32)


def paged(cached, q_len, *, table=TABLE, page_size=256, **options):
    cached = np.atleast_1d(np.array(cached, dtype=np.int32))
    return PagedParams(len(cached), table, cached, int(cached.max()), page_size, q_len=q_len, **options)


def expected_mask(batch, seq_len, past_len, key_mask=None):
    """The mask rule entry by entry."""
    mask = np.zeros((batch, 1, seq_len, past_len + seq_len), np.float16)
    for b, _, i, j in np.ndindex(mask.shape):
        values = [0.0 if j <= past_len + i else -65504.0]
        if key_mask is not None and j < key_mask.shape[1]:
            values.append(key_mask[b, j])
        mask[b, 0, i, j] = min(values)
    return mask


# ---- construction --------------------------------------------------------------------------------------

def test_defaults():
    params = Params()
    assert params.batch_size == 1
    assert params.multi_cache is params.paged is params.non_causal_attn is False
    assert params.block_diag_layers == set()
    for name in ("seq_len", "past_len", "past_lens", "input_mask", "position_offsets", "alt_rope_embed",
                 "alt_rope_embed_dict", "rope_offsets", "attn_mask", "attn_masks", "position_offsets_tp",
                 "past_lens_tensor", "past_len_tp", "block_diag_mask", "cu_seqlens", "cu_seqlens_max"):
        assert getattr(params, name) is None, name


def test_seed_argument_order():
    mask, offsets, tables = np.zeros((2, 5), np.float16), np.array([0, -1]), (np.zeros(3), np.ones(3))
    params = Params(2, 3, 2, mask, offsets, False, tables, True, np.array([4, 5]))
    assert (params.batch_size, params.seq_len, params.past_len) == (2, 3, 2)
    np.testing.assert_array_equal(params.input_mask, mask)
    np.testing.assert_array_equal(params.position_offsets, offsets)
    assert params.alt_rope_embed[0] is tables[0] and params.alt_rope_embed_dict is None
    assert params.non_causal_attn and not params.causal
    np.testing.assert_array_equal(params.rope_offsets, [4, 5])


def test_past_len_list_means_one_cache_each():
    params = Params(batch_size=2, seq_len=1, past_len=[3, 5])
    assert params.multi_cache and params.past_len is None and params.past_lens == [3, 5]
    lens = params.get_past_lens()
    assert lens.dtype == np.int32 and lens.tolist() == [3, 5]
    assert params.get_past_lens("cpu") is lens is params.past_lens_tensor
    assert not Params(past_len=3).multi_cache and Params(past_len=np.int64(3)).past_len == 3


def test_is_causal_looks_at_the_mask_only():
    assert Params().is_causal()
    assert Params(non_causal_attn=True).is_causal()
    assert not Params(input_mask=np.zeros((1, 4), np.float16)).is_causal()


def test_paged_params_have_every_field_of_params():
    params = paged(300, 1)
    assert params.paged and params.is_causal() and params.causal
    for name in vars(Params()):
        assert hasattr(params, name), name
    assert params.seq_len == params.q_len == 1 and params.past_len is None and params.alt_rope_embed_dict == {}


@pytest.mark.parametrize("seq_len", [1, 3])
def test_inputs_are_copied(seq_len):
    offsets, mask = np.array([-1, 0], np.int32), np.zeros((2, 6), np.float16)
    params = Params(2, seq_len, 2, mask, offsets, rope_offsets=offsets)
    table, cached = np.array([[0], [1]], np.int32), np.array([5, 9], np.int32)
    pages = PagedParams(2, table, cached, 9, 16, q_len=seq_len)
    offsets += 7
    mask -= 7
    table += 7
    cached += 1
    assert params.get_position_offsets().tolist() == params.get_rope_offsets().tolist() == [-1, 0]
    assert params.get_attn_mask().max() == 0
    assert pages.get_block_index().tolist() == [[0], [1]]
    assert pages.get_cache_seqlens().tolist() == [5, 9]
    assert pages.get_cache_seqlens_after().tolist() == [5 + seq_len, 9 + seq_len]


CHANGE = {"cu_seqlens", "block_diag_layers", "position_offsets_tp", "past_len_tp", "block_index_tp",
          "cache_seqlens_tp", "cache_seqlens_after_tp"}


@pytest.mark.parametrize("make", [
    lambda: Params(2, 3, 0, np.zeros((2, 3), np.float16), [0, 1], alt_rope_embed=(1, 2), rope_offsets=[0, 1]),
    lambda: Params(2, 3, [4, 5], alt_rope_embed={}), lambda: paged([5, 9], 1, table=np.int32([[0, 1], [2, 3]]))],
    ids=["Params", "several caches", "PagedParams"])
def test_attributes_stay(make):
    """Before and after they have been asked for; what may be assigned is what is looked at every time."""
    params = make()
    names = {name.removeprefix("_") for name in vars(params) if name not in ("_copies", "_slots")}
    assert CHANGE & names == CHANGE & set(dir(params))
    for ask in (lambda: None, params.get_positions, lambda: params.prep_tp([("cpu", 0, 1)])):
        ask()
        for name in names:
            if name in CHANGE:
                setattr(params, name, getattr(params, name))
                continue
            before = getattr(params, name)
            with pytest.raises(AttributeError, match=f"{type(params).__name__}: {name} must stay as it is"):
                setattr(params, name, 3)
            assert getattr(params, name) is before


def test_arrays_of_the_caller_stay():
    """What layers make something of once cannot be written; nor can it by way of the methods."""
    params = Params(2, 3, 0, np.zeros((2, 3), np.float16), [0, 1], rope_offsets=[0, 1])
    params.cu_seqlens = [0, 2, 6]
    for array in (params.input_mask, params.position_offsets, params.rope_offsets, params.cu_seqlens,
                  params.get_position_offsets(), params.get_rope_offsets(), params.get_cu_seqlens()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


# ---- masks ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("batch", "seq_len", "past_len"), [(1, 2, 0), (2, 3, 4), (3, 5, 1)])
def test_causal_mask(batch, seq_len, past_len):
    mask = Params(batch, seq_len, past_len).get_attn_mask()
    assert mask.dtype == np.float16
    np.testing.assert_array_equal(mask, expected_mask(batch, seq_len, past_len))
    assert (mask[:, :, -1] == 0).all()


@pytest.mark.parametrize("width", [1, 4, 7, 12])
@pytest.mark.parametrize("seq_len", [1, 3])
def test_key_mask_is_a_minimum_over_its_columns(width, seq_len):
    key_mask = np.zeros((2, width), np.float16)
    key_mask[0, :2] = -np.inf
    key_mask[1, 0] = -100
    mask = Params(2, seq_len, 4, key_mask).get_attn_mask()
    np.testing.assert_array_equal(mask, expected_mask(2, seq_len, 4, key_mask))


def test_a_padded_row_keeps_finite_entries():
    key_mask = np.array([[-np.inf, 0, 0]], np.float16)
    row = Params(1, 3, 0, key_mask).get_attn_mask()[0, 0, 0]
    assert row.tolist() == [-np.inf, -65504.0, -65504.0]


@given(batch=st.integers(1, 3), seq_len=st.integers(1, 5), past_len=st.integers(0, 6), width=st.integers(0, 14),
       seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_masks_of_any_shape(batch, seq_len, past_len, width, seed):
    key_mask = np.random.default_rng(seed).choice([0, -3.5, -65504, -np.inf], (batch, width)).astype(np.float16)
    expected = expected_mask(batch, seq_len, past_len, key_mask)
    np.testing.assert_array_equal(Params(batch, seq_len, past_len, key_mask).get_attn_mask(), expected)


def test_bool_mask_means_visible():
    visible = np.array([[False, True, True, True]])
    additive = np.where(visible, 0, -65504).astype(np.float16)
    np.testing.assert_array_equal(Params(1, 2, 2, visible).get_attn_mask(), expected_mask(1, 2, 2, additive))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_wider_masks_are_rounded_to_float16(dtype):
    mask = Params(1, 2, 1, np.array([[-3e38, -1.5, 0]], dtype)).get_attn_mask()
    assert mask.dtype == np.float16
    assert mask[0, 0].tolist() == [[-np.inf, -1.5, -65504.0], [-np.inf, -1.5, 0.0]]


def test_masks_per_query_and_per_head():
    rng = np.random.default_rng(0)
    causal = expected_mask(2, 3, 1)
    per_query = rng.choice([0, -9.0], (2, 3, 4)).astype(np.float16)
    np.testing.assert_array_equal(Params(2, 3, 1, per_query).get_attn_mask(), np.minimum(causal, per_query[:, None]))
    per_head = rng.choice([0, -9.0], (2, 5, 3, 4)).astype(np.float16)
    np.testing.assert_array_equal(Params(2, 3, 1, per_head).get_attn_mask(), np.minimum(causal, per_head))
    one_row = per_head[:1, :, :1]
    np.testing.assert_array_equal(Params(2, 3, 1, one_row).get_attn_mask(),
                                  np.minimum(causal, np.broadcast_to(one_row, (2, 5, 3, 4))))


def test_forced_mask_is_kept():
    params = Params(2, 1, 3)
    assert params.get_attn_mask() is None
    forced = params.get_attn_mask(force=True)
    np.testing.assert_array_equal(forced, np.zeros((2, 1, 1, 4), np.float16))
    assert params.get_attn_mask() is forced
    with_mask = Params(1, 1, 3, np.array([[-np.inf, 0]], np.float16))
    assert with_mask.get_attn_mask().tolist() == [[[[-np.inf, 0, 0, 0]]]]


def test_masks_of_a_multi_cache_call():
    masks = Params(2, 2, [1, 3]).get_attn_masks()
    for mask, past_len in zip(masks, (1, 3), strict=True):
        np.testing.assert_array_equal(mask, expected_mask(1, 2, past_len))
    assert Params(2, 1, [1, 3]).get_attn_masks() == [None, None]
    key_mask = np.array([[0, -5], [-7, 0]], np.float16)
    for seq_len in (1, 2):
        params = Params(2, seq_len, [1, 3], key_mask)
        for i, (mask, past_len) in enumerate(zip(params.get_attn_masks(), (1, 3), strict=True)):
            np.testing.assert_array_equal(mask, expected_mask(1, seq_len, past_len, key_mask[i:i + 1]))
        assert all(a is b for a, b in zip(params.get_attn_masks(), params.attn_masks, strict=True))
    with pytest.raises(ValueError, match="past_len must be an int for get_attn_mask, got a list; use get_attn_masks"):
        Params(2, 2, [1, 3]).get_attn_mask()


def test_block_diagonal_mask():
    params = Params(1, 5, 0)
    assert params.get_block_diag_mask() is params.get_cu_seqlens() is None
    params.cu_seqlens = np.array([0, 2, 2, 5])
    mask = params.get_block_diag_mask()
    assert mask.dtype == np.float16
    hidden = -65504.0
    assert mask.tolist() == [[0, 0, hidden, hidden, hidden]] * 2 + [[hidden, hidden, 0, 0, 0]] * 3
    assert params.get_block_diag_mask("cpu") is mask
    assert params.get_cu_seqlens().dtype == np.int32 and params.get_cu_seqlens().tolist() == [0, 2, 2, 5]
    assert params.get_cu_seqlens_max() == params.cu_seqlens_max == 3
    assert isinstance(params.get_cu_seqlens_max(), int)
    # a second assignment replaces everything derived from the first
    params.cu_seqlens = [0, 4]
    assert params.get_cu_seqlens_max() == 4 and params.get_cu_seqlens().tolist() == [0, 4]
    assert params.get_block_diag_mask().tolist() == [[0.0] * 4] * 4


# ---- positions -----------------------------------------------------------------------------------------

def test_positions():
    params = Params(2, 3, 4, position_offsets=np.array([[-6], [0]]))
    assert params.get_positions().tolist() == [0, 0, 0, 4, 5, 6]
    assert params.get_positions().dtype == np.int32
    assert Params(2, 2, 4, rope_offsets=np.array([7])).get_positions().tolist() == [11, 12, 11, 12]
    both = Params(2, 1, [3, 5], position_offsets=np.array([-1, -2]), rope_offsets=np.array([10, 20]))
    assert both.get_positions().tolist() == [12, 23]
    table = np.array([[0, 1], [2, 3]])
    assert paged([5, 2], 2, table=table, page_size=4, rope_offsets=np.array([0, 100])).get_positions().tolist() == [
        5, 6, 102, 103]


# ---- RoPE tables ---------------------------------------------------------------------------------------

def test_alternative_rope_tables_in_both_forms():
    sin, cos = np.zeros((4, 2), np.float16), np.ones((4, 2), np.float16)
    for params in (Params(alt_rope_embed=(sin, cos)), paged(0, 1, alt_rope_embed=(sin, cos)),
                   Params(alt_rope_embed={"cpu": (sin, cos)}), paged(0, 1, alt_rope_embed={"cpu": (sin, cos)})):
        got = params.get_alt_rope_embed()
        assert got[0] is sin and got[1] is cos
    for params in (Params(), Params(alt_rope_embed={}), paged(0, 1), Params(alt_rope_embed={3: (sin, cos)})):
        assert params.get_alt_rope_embed("cpu") is None


# ---- pages ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("cached", "q_len", "sequential", "first_index", "after"), [
    (300, 1, True, 812, 301),
    (255, 2, False, 2047, 257),
    (255, 1, True, 2047, 256),
    (456, 100, True, 968, 556),
    (700, 200, False, 4 * 256 + 188, 900),
    (0, 256, True, 1792, 256),
    (0, 257, False, 1792, 257),
    (256, 512, True, 768, 768),
])
def test_sequential_pages(cached, q_len, sequential, first_index, after):
    params = paged(cached, q_len)
    assert params.is_sequential is sequential
    assert params.first_index == first_index and isinstance(params.first_index, int)
    assert params.cache_seqlens_after.dtype == np.int32 and params.cache_seqlens_after.tolist() == [after]
    slots = params.slot_mapping()
    assert slots.dtype == np.int64 and slots[0] == first_index and slots.shape == (q_len,)
    assert (np.diff(slots) == 1).all() == sequential


def test_only_pages_of_new_tokens_count():
    params = paged(250, 1, table=np.array([[9, 5, 1, 3]]), page_size=64)
    assert params.is_sequential and params.first_index == 250


def test_batches_are_never_sequential():
    params = paged([3, 4], 2, table=np.array([[0, 1], [2, 3]]), page_size=4)
    assert params.is_sequential is False and params.first_index is None
    assert params.cache_seqlens_after.tolist() == [5, 6]
    assert params.slot_mapping().tolist() == [3, 4, 12, 13]


def test_table_entries_past_the_length_are_not_looked_at():
    params = paged([3, 0], 1, table=np.array([[5, -1], [6, 2_147_480_000]]), page_size=4)
    assert params.slot_mapping().tolist() == [23, 24]


@given(data=st.data(), page_size=st.integers(1, 7), max_pages=st.integers(1, 6), batch=st.integers(1, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_slots_of_any_table(data, page_size, max_pages, batch):
    order = data.draw(st.permutations(range(batch * max_pages)))
    table = np.array(order).reshape(batch, max_pages)
    q_len = data.draw(st.integers(1, page_size * max_pages))
    cached = data.draw(st.lists(st.integers(0, page_size * max_pages - q_len), min_size=batch, max_size=batch))
    params = paged(cached, q_len, table=table, page_size=page_size)
    slots = [table[b, p // page_size] * page_size + p % page_size
             for b in range(batch) for p in range(cached[b], cached[b] + q_len)]
    assert params.slot_mapping().tolist() == slots
    if batch == 1:
        touched = [int(s) // page_size for s in slots]
        assert params.is_sequential == all(b - a in (0, 1) for a, b in zip(touched, touched[1:], strict=False))
        assert params.first_index == slots[0]


def test_paged_calls_have_no_mask_array():
    with pytest.raises(NotImplementedError, match="PagedParams: get_attn_mask"):
        paged(3, 1).get_attn_mask("cpu")


# ---- tensor parallelism --------------------------------------------------------------------------------

class Shards:
    kv_split = [("cpu", 0, 4), (None, 4, 8)]


@pytest.mark.parametrize("model", [Shards(), Shards.kv_split])
def test_prep_tp(model):
    params = Params(2, 1, 7, position_offsets=np.array([-1, 0]))
    params.prep_tp(model)
    assert [a.tolist() for a in params.position_offsets_tp] == [[-1, 0]] * 2
    assert [a.tolist() for a in params.past_len_tp] == [[7, 7]] * 2
    assert params.past_len_tp[0].dtype == np.int32
    kept = params.position_offsets_tp
    params.prep_tp([("cpu", 0, 8)])
    assert params.position_offsets_tp is kept

    bare = Params(2)
    bare.prep_tp(model)
    assert bare.position_offsets_tp == bare.past_len_tp == [None, None]
    multi = Params(2, 1, [3, 4])
    multi.prep_tp(model)
    assert [a.tolist() for a in multi.past_len_tp] == [[3, 4]] * 2

    pages = paged([3, 4], 1, table=np.array([[0, 1], [2, 3]]), page_size=4)
    assert pages.block_index_tp is pages.cache_seqlens_tp is pages.cache_seqlens_after_tp is None
    pages.prep_tp(model)
    assert [a.tolist() for a in pages.block_index_tp] == [[[0, 1], [2, 3]]] * 2
    assert [a.tolist() for a in pages.cache_seqlens_tp] == [[3, 4]] * 2
    assert [a.tolist() for a in pages.cache_seqlens_after_tp] == [[4, 5]] * 2
    kept = pages.block_index_tp
    pages.prep_tp([("cpu", 0, 8)])
    assert pages.block_index_tp is kept


# ---- devices -------------------------------------------------------------------------------------------

def test_host_and_device_copies(xp):
    """On a GPU (or its stand-in) device 0 holds CuPy copies, made once; arrays from there are welcome."""
    device = None if xp.name == "numpy" else 0
    sin, cos = np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32)
    tables = {"cpu": (sin, cos)}
    params = Params(2, 2, 1, xp.array(np.zeros((2, 2), np.float16)), xp.array(np.array([-1, 0], np.int32)),
                    alt_rope_embed=tables, rope_offsets=xp.array(np.array([3, 4], np.int32)))
    params.cu_seqlens = xp.array(np.array([0, 1, 2], np.int32))
    pages = PagedParams(1, xp.array(TABLE), xp.array(np.array([300], np.int32)), 300, 256, q_len=1)
    for get, expected in [
        (params.get_position_offsets, [-1, 0]), (params.get_rope_offsets, [3, 4]), (params.get_cu_seqlens, [0, 1, 2]),
        (params.get_positions, [3, 4, 5, 6]), (params.get_attn_mask, expected_mask(2, 2, 1)),
        (params.get_block_diag_mask, [[0, -65504], [-65504, 0]]),
        (lambda d: params.get_alt_rope_embed(d)[1], cos), (Params(2, 1, [3, 5]).get_past_lens, [3, 5]),
        (pages.get_block_index, TABLE), (pages.get_cache_seqlens, [300]), (pages.get_cache_seqlens_after, [301]),
        (pages.slot_mapping, [812]), (lambda d: Params(2, 2, [1, 2]).get_attn_masks(d)[0], expected_mask(1, 2, 1)),
        (lambda d: params.build_single_attn_mask(1, 2, 0, d), expected_mask(1, 2, 0)),
    ]:
        there, here = get(device), get("cpu")
        assert isinstance(there, xp.module.ndarray) and isinstance(here, np.ndarray)
        np.testing.assert_array_equal(xp.numpy(there), expected)
        np.testing.assert_array_equal(here, expected)
    for get in (params.get_attn_mask, params.get_positions, pages.get_block_index, params.get_rope_offsets):
        assert get(device) is get(device) and get("cpu") is get(None)
    first = params.get_alt_rope_embed(device)
    assert params.get_alt_rope_embed(device)[0] is first[0]
    assert list(tables) == ["cpu"] and tables["cpu"] == (sin, cos)
    own = Params(alt_rope_embed={"cpu": (sin, cos), 0: (first[1], first[0])}).get_alt_rope_embed(device)
    assert (own[0] is first[1]) == (device == 0)
    pages.prep_tp([(device, 0, 1), ("cpu", 1, 2)])
    assert pages.block_index_tp[0] is pages.get_block_index(device)
    assert isinstance(pages.cache_seqlens_after_tp[1], np.ndarray)


def test_fill(xp):
    """Every array keeps its place, and what was made of the old lengths is made anew."""
    device = None if xp.name == "numpy" else 0
    params = paged(456, 100, rope_offsets=[3])
    names = "block_index", "cache_seqlens", "cache_seqlens_after"
    before = [getattr(params, f"get_{name}")(device) for name in names]
    hosts = [getattr(params, name) for name in names]
    slots, positions = params.slot_mapping(), params.get_positions()
    params.fill([[1, 0, 4, 9]], [200])
    new = paged(200, 100, table=np.int32([[1, 0, 4, 9]]), rope_offsets=[3])
    for name, array, host in zip(names, before, hosts, strict=True):
        assert getattr(params, f"get_{name}")(device) is array and getattr(params, name) is host
        np.testing.assert_array_equal(xp.numpy(array), getattr(new, name))
        np.testing.assert_array_equal(host, getattr(new, name))
    assert (params.is_sequential, params.first_index, params.max_cache_seqlen) == (False, 456, 200)
    np.testing.assert_array_equal(params.slot_mapping(), new.slot_mapping())
    np.testing.assert_array_equal(params.get_positions(), new.get_positions())
    assert not np.array_equal(slots, params.slot_mapping()) and not np.array_equal(positions, params.get_positions())
    for table, lengths, message in (([[1, 0]], [200], r"block_index must be \[1, 4\] as it was, got \[1, 2\]"),
                                    ([[1, 0, 4, 9]], [1000], "block_index must have 5 pages"),
                                    ([[1, -1, 4, 9]], [200], "page ids of at least 0"),
                                    ([[1, 0, 4, 9]] * 2, [2, 3], "must be \\[batch_size=1, max_pages\\]")):
        with pytest.raises(ValueError, match=f"PagedParams: .*{message}"):
            params.fill(table, lengths)
        np.testing.assert_array_equal(params.cache_seqlens_after, new.cache_seqlens_after)
    lengths = iter(range(201, 300))
    with pytest.raises(CaptureError, match="the step must not fill PagedParams; it is done between the replays"):
        capture(lambda: params.fill([[1, 0, 4, 9]], [next(lengths)]), xp=xp.module)
    assert params.cache_seqlens[0] == 202   # by two warm-ups


@pytest.mark.parametrize("make", [lambda: Params(1, 2, 1).get_attn_mask(0), lambda: paged(300, 1).get_block_index(0),
                                  lambda: paged(300, 1).prep_tp([("cpu", 0, 1), (0, 1, 2)])])
def test_without_cupy_or_gpu_the_extra_is_named(monkeypatch, make):
    import cupy

    def no_driver():
        raise cupy.cuda.runtime.CUDARuntimeError(35)

    with monkeypatch.context() as patch:
        patch.setattr(cupy.cuda.runtime, "getDeviceCount", no_driver)
        with pytest.raises(RuntimeError, match=r"Params: device 0 needs an NVIDIA GPU.*\[cuda13\].*Insufficient"):
            make()
        patch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
        with pytest.raises(RuntimeError, match=r"Params: device 0 does not exist, CUDA sees 0 GPUs.*\[cuda13\]"):
            make()
        patch.setitem(sys.modules, "cupy", None)
        with pytest.raises(RuntimeError, match=r"Params: device 0 needs CuPy; pip install 'cupyattn\[cuda13\]'"):
            make()


# ---- bad input -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("error", "argument", "call"), [
    (ValueError, "batch_size", lambda: Params(0)),
    (TypeError, "batch_size", lambda: Params(2.0)),
    (ValueError, "seq_len", lambda: Params(1, 0)),
    (TypeError, "seq_len", lambda: Params(1, True)),
    (ValueError, "past_len", lambda: Params(1, 1, -1)),
    (TypeError, "past_len", lambda: Params(1, 1, [1, "2"])),
    (TypeError, "input_mask", lambda: Params(1, 1, 1, np.zeros((1, 2), np.int32))),
    (ValueError, "input_mask", lambda: Params(2, 1, 1, np.zeros((3, 2), np.float16))),
    (ValueError, "input_mask", lambda: Params(2, 1, 1, np.zeros(2, np.float16))),
    (ValueError, "input_mask", lambda: Params(2, 3, 1, np.zeros((2, 2, 4), np.float16))),
    (ValueError, "input_mask", lambda: Params(2, 1, [1, 2, 3], np.zeros((2, 2), np.float16)).get_attn_masks()),
    (TypeError, "position_offsets", lambda: Params(2, position_offsets=np.zeros(2))),
    (ValueError, "position_offsets", lambda: Params(2, position_offsets=np.zeros(3, np.int32))),
    (ValueError, "position_offsets", lambda: Params(1, position_offsets=np.array([2**31]))),
    (ValueError, "position_offsets", lambda: Params(2).get_position_offsets()),
    (ValueError, "rope_offsets", lambda: Params(2, rope_offsets=np.zeros(3, np.int32))),
    (TypeError, "alt_rope_embed", lambda: Params(alt_rope_embed=np.zeros(3))),
    (TypeError, "alt_rope_embed", lambda: Params(alt_rope_embed={"cpu": (1, 2, 3)})),
    (ValueError, "past_lens", lambda: Params(2, 1, 3).get_past_lens()),
    (ValueError, "past_len", lambda: Params(1, 2).get_attn_mask()),
    (ValueError, "past_len", lambda: Params(1, 1, [1, 2]).get_positions()),
    (ValueError, "seq_len", lambda: Params(1, None, 2).get_attn_mask()),
    (ValueError, "cu_seqlens", lambda: Params().get_cu_seqlens_max()),
    (ValueError, "cu_seqlens", lambda: setattr(Params(), "cu_seqlens", [1, 2])),
    (ValueError, "cu_seqlens", lambda: setattr(Params(), "cu_seqlens", [0, 2, 1])),
    (TypeError, "device", lambda: Params(1, 2, 1).get_attn_mask("cuda:0")),
    (TypeError, "device", lambda: Params(1, 2, 1).get_attn_mask(False)),
    (ValueError, "device", lambda: Params(1, 2, 1).get_attn_mask(-1)),
    (TypeError, "model", lambda: Params(1, 2, 1).prep_tp(object())),
    (ValueError, "model", lambda: Params(1, 2, 1).prep_tp([("cpu", 3, 1)])),
])
def test_bad_arguments_of_params_are_named(error, argument, call):
    with pytest.raises(error, match=rf"^Params: {argument} must"):
        call()


@pytest.mark.parametrize(("error", "argument", "call"), [
    (ValueError, "q_len", lambda: PagedParams(1, TABLE, [3], 3, 256)),
    (ValueError, "page_size", lambda: PagedParams(1, TABLE, [3], 3, 0, q_len=1)),
    (TypeError, "max_cache_seqlen", lambda: PagedParams(1, TABLE, [3], None, 256, q_len=1)),
    (ValueError, "block_index", lambda: PagedParams(2, TABLE, [3, 3], 3, 256, q_len=1)),
    (ValueError, "block_index", lambda: PagedParams(1, TABLE[0], [3], 3, 256, q_len=1)),
    (TypeError, "block_index", lambda: PagedParams(1, TABLE.astype(np.float32), [3], 3, 256, q_len=1)),
    (ValueError, "block_index", lambda: PagedParams(1, -TABLE, [3], 3, 256, q_len=1)),
    (ValueError, "cache_seqlens", lambda: PagedParams(1, TABLE, [3, 4], 4, 256, q_len=1)),
    (ValueError, "cache_seqlens", lambda: PagedParams(1, TABLE, [-1], 0, 256, q_len=1)),
    (TypeError, "cache_seqlens", lambda: PagedParams(1, TABLE, [3.0], 3, 256, q_len=1)),
    (ValueError, "block_index", lambda: paged(1024, 1)),
    (ValueError, "rope_offsets", lambda: paged(3, 1, rope_offsets=np.zeros(2, np.int32))),
])
def test_bad_arguments_of_paged_params_are_named(error, argument, call):
    with pytest.raises(error, match=rf"^PagedParams: {argument} must"):
        call()


def test_a_short_table_says_what_is_missing():
    with pytest.raises(ValueError, match=r"block_index must have 5 pages of 256 for 1025 tokens .*, got 4"):
        paged(1024, 1)
