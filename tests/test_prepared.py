# SPDX-License-Identifier: Apache-2.0
"""Calls checked and planned once for all arrays alike: what tells them apart, and what is never remembered."""

import gc
import weakref

import numpy as np
import pytest
from compare import assert_same_bits

import cupyattn
from cupyattn import PageTable, QuantizedKV
from cupyattn.runtime import Prepared, prepared
from cupyattn.runtime.arrays import alignment, as_rows, head_view, row_view
from cupyattn.runtime.known import KnownOnHost

rng = np.random.default_rng(5)


def known(array, index=0):
    return KnownOnHost(index, array.dtype, array.shape, array.strides, array.ctypes.data % 16,
                       array.flags.writeable)


@pytest.mark.parametrize("array", [
    np.zeros((2, 3, 8), np.float16), np.zeros((2, 3, 8), np.float32)[:, 1:, 2:6], np.zeros((1, 4, 16))[:, ::2],
    np.zeros((5, 1, 8), np.int32)[::-1], np.zeros((0, 3, 8), np.float16), np.zeros((4, 6), np.uint8)[:, 1:],
    np.zeros((1, 1, 3), np.float16), np.zeros(7, np.float32), np.zeros((3, 8), np.float32).T],
    ids=lambda a: f"{a.shape} {a.strides}")
def test_a_known_array_is_like_the_array(array):
    like = known(array)
    for name in ("dtype", "shape", "strides", "ndim", "size", "itemsize"):
        assert getattr(like, name) == getattr(array, name)
    assert (len(like), like.flags.c_contiguous) == (len(array), array.flags.c_contiguous)
    assert alignment(like) == alignment(array) and type(like).__name__ == type(array).__name__
    for at in range(array.ndim):
        other = array[(slice(None),) * at + (None,)]
        assert (like.with_axis(at).shape, like.with_axis(at).strides) == (other.shape, other.strides)
    if array.ndim == 3:
        assert head_view(like) == {**head_view(array), "data": like}
        try:
            want = as_rows("op", "x", array)
        except ValueError as error:
            with pytest.raises(ValueError, match="one stride between its rows"):
                as_rows("op", "x", like)
            assert "one stride between its rows" in str(error)
        else:
            got = as_rows("op", "x", like)
            assert got.shape == want.shape
            if want.shape[0] > 1:
                assert row_view(got)["stride_row"] == row_view(want)["stride_row"]


# ---- what tells calls apart ----------------------------------------------------------------------------------


def expected(x, weight):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True)) * weight


def test_the_same_objects_seen_anew():
    """Shape, strides and dtype of an array may change in place, and it may be another one at the same address."""
    x, weight = rng.standard_normal((4, 16)).astype(np.float32), np.ones(16, np.float32)
    for shape, gain in (((4, 16), weight), ((2, 2, 16), weight), ((8, 8), weight[:8]), ((4, 16), weight)):
        x.shape = shape
        np.testing.assert_allclose(cupyattn.rms_norm(x, gain, eps=0.0), expected(x, gain), rtol=1e-5)
    raw = np.zeros(4 * 16 * 4 + 16, np.uint8)
    for start in (0, 4, 8, 12, 0):   # alike but for their alignment
        view = raw[start:start + 256].view(np.float32).reshape(4, 16)
        view[...] = x
        np.testing.assert_allclose(cupyattn.rms_norm(view, weight, eps=0.0), expected(x, weight), rtol=1e-5)


def test_where_results_go(xp):
    """One call writes elsewhere, the next in place, a third into what the first has read."""
    x, weight = rng.standard_normal((3, 32)).astype(np.float32), xp.array(np.ones(32, np.float32))
    a, b = xp.array(x), xp.array(np.zeros_like(x))
    for source, target in ((a, b), (a, a), (b, b), (b, a)):
        for array in (a, b):
            array[...] = xp.array(x)
        assert cupyattn.rms_norm(source, weight, eps=0.0, out=target) is target
        np.testing.assert_allclose(xp.numpy(target), expected(x, 1.0), rtol=1e-5)
        other = b if target is a else a
        assert_same_bits(xp.numpy(other), x)


def test_options_of_another_type():
    x, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    for eps in (1, 1.0, np.float32(1)):
        cupyattn.rms_norm(x, weight, eps=eps)
    for eps, found in ((True, "bool"), (np.ones(1), "ndarray"), ([1], "list"), ("1", "str")):
        for _ in range(2):
            with pytest.raises(TypeError, match=f"rms_norm: eps must be a number, got {found}"):
                cupyattn.rms_norm(x, weight, eps=eps)
    for _ in range(2):
        with pytest.raises(ValueError, match="eps must be a finite float32 of at least 0, got nan"):
            cupyattn.rms_norm(x, weight, eps=float("nan"))


def test_arrays_that_become_wrong():
    """After a call that was right: what is no array, another dtype, strides, another kind, and a read-only result."""
    x, weight, out = np.ones((4, 8), np.float32), np.ones(8, np.float32), np.zeros((4, 8), np.float32)
    cupyattn.rms_norm(x, weight, out=out)
    for wrong, error, message in (
            (lambda: cupyattn.rms_norm(x.tolist(), weight), TypeError, "x must be a NumPy or CuPy array, got list"),
            (lambda: cupyattn.rms_norm(x, None), TypeError, "weight must be a NumPy or CuPy array, got NoneType"),
            (lambda: cupyattn.rms_norm(x, 3, out=out), TypeError, "weight must be a NumPy or CuPy array, got int"),
            (lambda: cupyattn.rms_norm(x, weight.astype(np.float64)), TypeError, "weight must be float32"),
            (lambda: cupyattn.rms_norm(x.astype(">f4"), weight), TypeError, "foreign byte order"),
            (lambda: cupyattn.rms_norm(np.ones((8, 4), np.float32).T, weight[:8]), ValueError, "contiguous last axis")):
        with pytest.raises(error, match=message):
            wrong()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable, got a read-only array"):
        cupyattn.rms_norm(x, weight, out=out)


def test_kinds_are_told_apart():
    from standin import install

    x, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    for capability in ("90", "80", "90"):   # each has kernels of its own
        with install(capability) as xp:
            there = xp.array(x), xp.array(weight)
            for _ in range(2):
                np.testing.assert_allclose(cupyattn.rms_norm(x, weight), 1, rtol=1e-5)
                np.testing.assert_allclose(xp.numpy(cupyattn.rms_norm(*there)), 1, rtol=1e-5)
            with pytest.raises(TypeError, match="all arrays must be of one kind, got NumPy x and CuPy weight"):
                cupyattn.rms_norm(x, there[1])


# ---- contents -------------------------------------------------------------------------------------------------


def decode_case(quantized):
    q = rng.standard_normal((2, 4, 32)).astype(np.float16)
    new = rng.standard_normal((2, 2, 32)).astype(np.float16)
    if quantized:
        caches = [QuantizedKV.empty(6, 4, 2, 32, format="int8") for _ in "kv"]
    else:
        caches = [np.zeros((6, 4, 2, 32), np.float16) for _ in "kv"]
    return q, new, caches, np.int32([[0, 1, 2], [3, 4, 5]]), np.int32([5, 12])


@pytest.mark.parametrize("quantized", [False, True])
def test_contents_are_checked_in_every_call(quantized):
    q, new, caches, table, lengths = decode_case(quantized)
    positions = lengths - 1
    append = lambda: cupyattn.kv_append(new, new, *caches, block_table=table, positions=positions)   # noqa: E731
    attend = lambda: cupyattn.paged_decode(q, *caches, block_table=table, cache_seqlens=lengths)     # noqa: E731
    for _ in range(2):
        append()
        attend()
    for array, place, value, call, message in (
            (positions, 1, 12, append, r"positions must be in \[-1, 12\)"),
            (positions, 0, -2, append, r"positions must be in \[-1, 12\)"),
            (table, (1, 2), 6, append, r"block_table must be in \[0, 6\)"),
            (table, (1, 2), -1, append, r"block_table must be in \[0, 6\)"),
            (table, (0, 1), 6, attend, "block_table must hold page ids from 0 to 5, got 6"),
            (table, (0, 1), -1, attend, "block_table must hold page ids from 0 to 5, got -1"),
            (lengths, 1, 13, attend, "cache_seqlens must be from 0 to 12"),
            (lengths, 1, -1, attend, "cache_seqlens must be from 0 to 12")):
        before = array[place]
        array[place] = value
        with pytest.raises(ValueError, match=message):
            call()
        array[place] = before
        call()
    table[1], positions[1] = table[0], positions[0]
    with pytest.raises(ValueError, match="places must differ from token to token, got page 1 slot 0 twice"):
        append()
    positions[1] = -1   # skipped
    append()


def test_a_query_array_that_becomes_its_own_result():
    q, new, caches, table, lengths = decode_case(False)
    options = {"block_table": table, "positions": lengths - 1, "q": q}
    cupyattn.kv_append(new, new, *caches, **options, q_out=np.empty_like(q))
    with pytest.raises(ValueError, match="q_out must not be q"):
        cupyattn.kv_append(new, new, *caches, **options, q_out=q)


# ---- what is remembered ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_no_array_is_kept(quantized):
    q, new, caches, table, lengths = decode_case(quantized)
    pages = PageTable(table)
    work = cupyattn.schedule(lengths, num_heads=4, num_kv_heads=2, head_dim=32, kv_format="int8" if quantized else None)
    starts = np.int32([0, 1, 2])
    weight = np.ones(32, np.float16)
    cupyattn.rms_norm(q, weight, out=q)
    cupyattn.kv_append(new, new, *caches, block_table=pages, positions=lengths - 1, q=q)
    cupyattn.paged_decode(q, *caches, block_table=pages, cache_seqlens=lengths, schedule=work, out=q)
    cupyattn.attention(q, *caches, block_table=pages, cu_seqlens_q=starts, cache_seqlens=lengths, out=q)
    held = [weakref.ref(o) for o in (q, new, *caches, table, lengths, pages, work, starts, weight)]
    del q, new, caches, table, lengths, pages, work, starts, weight
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_no_buffer_is_kept():
    pool = np.zeros((4, 4096), np.uint8)
    table = PageTable.from_pool(pool, np.int32([[0], [2]]))
    sides = cupyattn.BlockKV.turbomind(2, 32, 4)[:2]
    new = rng.standard_normal((2, 2, 32)).astype(np.float16)
    cupyattn.kv_append(new, new, *sides, block_table=table, positions=np.int32([0, 3]))
    cupyattn.paged_decode(new, *sides, block_table=table, cache_seqlens=np.int32([1, 4]))
    assert pool.any()
    held = [weakref.ref(o) for o in (pool, table)]
    del pool, table
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_only_so_many_kinds_are_remembered(monkeypatch):
    monkeypatch.setattr(prepared, "_MOST", 3)
    seen = []
    prepare = Prepared(lambda x, option: seen.append(x.shape) or (x.shape, option))
    for n in (1, 2, 1, 3, 1, 4, 1, 1):
        found, arrays, addresses = prepare((np.zeros(n),), "option")
        assert found == ((n,), "option") and arrays[0].shape == (n,) and addresses == [arrays[0].ctypes.data]
    assert seen == [(1,), (2,), (3,), (4,), (1,)]
