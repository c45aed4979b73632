# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from cupyattn import PageTable


def blocks(count=6, nbytes=64):
    """Memory blocks, at multiples of 16 bytes."""
    raw = np.zeros(count * nbytes + 16, np.uint8)
    start = -raw.ctypes.data % 16
    return raw[start:start + count * nbytes].reshape(count, nbytes)


def pointers(pool, ids, counts, **options):
    addresses = np.uint64(pool.ctypes.data) + np.uint64(pool.strides[0]) * np.uint64(ids)
    return PageTable.pointers(addresses, np.cumsum([0, *counts]).astype(np.int32), **options)


def test_dense(xp):
    wide = xp.array(np.arange(24, dtype=np.int32).reshape(3, 8))
    table = PageTable(wide[:, 2:7])
    assert (table.batch, table.max_pages, table.capacity(16)) == (3, 5, 80)
    fields = table.fields(100, 16)
    assert fields["stride_seq"] == 8 and fields["max_pages"] == 5 and fields["page_size"] == 16
    assert fields["num_pages"] == 100 and fields["indptr"] is fields["block_ptrs"] is fields["row_starts"] is None
    assert repr(table) == "PageTable(dense, batch=3, max_pages=5)" and list(table.arrays) == ["block_table"]


def test_csr(xp):
    table = PageTable.csr(xp.array(np.int32([7, 2, 5])), xp.array(np.int32([0, 2, 2, 3])))
    assert (table.batch, table.max_pages, table.capacity(4)) == (3, 3, 12)
    fields = table.fields(8, 4)
    assert fields["indptr"] is table.indptr and fields["block_table"] is table.block_table
    assert fields["stride_seq"] == 0 and fields["max_pages"] == 3


@pytest.mark.parametrize("xp", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_lengths_by_last_page(xp):
    table = PageTable.csr(xp.array(np.int32([7, 2, 5])), xp.array(np.int32([0, 2, 2, 3])),
                          xp.array(np.int32([4, 0, 1])))
    lengths = table.cache_seqlens(4)
    assert xp.numpy(lengths).tolist() == [8, 0, 1] and lengths.dtype == np.int32


def test_pointers():
    pool = blocks()
    table = pointers(pool, [3, 1, 5], [2, 1], buffers=pool)
    fields = table.fields(None, 4)
    assert fields["block_ptrs"].dtype == np.int64 and fields["block_table"] is None and fields["num_pages"] == 0
    assert table.buffers[0] is pool and table.alignment == 16
    assert pointers(pool, [3], [1], buffers=[pool[:2], pool[2:]]).batch == 1
    assert pointers(pool + 0, [3], [1], trusted_pointers=True).buffers == ()


def test_from_pool(xp):
    pool = xp.array(blocks())
    table = PageTable.from_pool(pool, np.array([[3, 1], [5, 99]]), [2, 1])
    first = pool.ctypes.data if xp.name == "numpy" else pool.data.ptr
    assert [int(p) for p in xp.numpy(table.block_ptrs)] == [first + 64 * i for i in (3, 1, 5)]
    assert xp.numpy(table.indptr).tolist() == [0, 2, 3] and table.buffers[0] is pool
    table.check("op", np.array([8, 4]), None, 4, 64)
    assert PageTable.from_pool(pool[:, :40], np.zeros((1, 1), int)).alignment in (8, 16)


def test_alignment_of_a_pool_of_odd_blocks():
    raw = blocks(1, 400)[0]
    assert PageTable.from_pool(raw[:360].reshape(10, 36), np.zeros((1, 1), int)).alignment == 4


INT, POINTERS = np.int32([0, 1, 2]), np.uint64([16, 32])


@pytest.mark.parametrize("error, message, make", [
    (TypeError, "block_table must be int32, got int64", lambda: PageTable(np.zeros((2, 2), np.int64))),
    (TypeError, "block_table must be a NumPy or CuPy array, got list", lambda: PageTable([[1]])),
    (ValueError, r"block_table must be \[batch, max_pages\] .* got \[3\]", lambda: PageTable(INT)),
    (ValueError, "block_table must have a contiguous last axis", lambda: PageTable(np.zeros((4, 4), np.int32).T)),
    (TypeError, "indices must be int32, got float32", lambda: PageTable.csr(np.zeros(3, np.float32), INT)),
    (ValueError, r"indptr must be \[batch \+ 1\]", lambda: PageTable.csr(INT, np.zeros((1, 3), np.int32))),
    (ValueError, r"indptr must have at least one entry, got \[0\]", lambda: PageTable.csr(INT, INT[:0])),
    (ValueError, r"indptr must not decrease and stay within the 3 entries, got \[0, 2, 1\]",
     lambda: PageTable.csr(INT, np.int32([0, 2, 1]))),
    (ValueError, "indptr must not decrease and stay within the 3 entries",
     lambda: PageTable.csr(INT, np.int32([0, 4]))),
    (ValueError, "indptr must not decrease", lambda: PageTable.csr(INT, np.int32([-1, 2]))),
    (ValueError, r"last_page_len must be \[batch\] = \[2\], got \[3\]", lambda: PageTable.csr(INT, INT, INT)),
    (ValueError, "last_page_len must be given", lambda: PageTable.csr(INT, INT).cache_seqlens(4)),
    (ValueError, "buffers must be given, or trusted_pointers=True, got neither",
     lambda: PageTable.pointers(POINTERS, INT)),
    (ValueError, "buffers must be given", lambda: PageTable.pointers(POINTERS, INT, trusted_pointers=1)),
    (TypeError, "block_ptrs must be uint64 or int64, got int32", lambda: PageTable.pointers(INT, INT, buffers=INT)),
    (TypeError, r"buffers\[0\] must be a NumPy or CuPy array, got bytes",
     lambda: PageTable.pointers(POINTERS, INT, buffers=[b""])),
    (ValueError, "block_ptrs must lie in the buffers", lambda: PageTable.pointers(POINTERS, INT, buffers=INT)),
    (ValueError, "block_ptrs must be multiples of 16, got 0x8",
     lambda: PageTable.pointers(POINTERS // 2, INT, trusted_pointers=True)),
    (ValueError, "alignment must be 1, 2, 4, 8 or 16, got 32",
     lambda: PageTable.pointers(POINTERS, INT, trusted_pointers=True, alignment=32)),
    (ValueError, "pool must have entries that are contiguous", lambda: PageTable.from_pool(blocks().T, [[0]])),
    (ValueError, "block_table must hold ids of the 6 blocks of pool, got 0 to 6",
     lambda: PageTable.from_pool(blocks(), [[0, 6]])),
    (ValueError, r"num_blocks must be \[batch=1\] from 0 to 2, got \[3\]",
     lambda: PageTable.from_pool(blocks(), [[0, 1]], [3]))])
def test_errors(error, message, make):
    with pytest.raises(error, match=f"^PageTable: {message}"):
        make()


def _dense(ids):
    return PageTable(np.int32(ids))


@pytest.mark.parametrize("table, lengths, starts, message", [
    (_dense([[0, 1, 9], [2, 9, 9]]), [8, 4], None, None),
    (_dense([[0, 1, 9], [2, 9, 9]]), [9, 4], None, "page ids from 0 to 2, got 9 at page 2 of sequence 0"),
    (_dense([[0, 1, 2], [-1, 0, 0]]), [12, 1], None, "page ids from 0 to 2, got -1"),
    (_dense([[9, 1, 2], [9, 9, 0]]), [12, 12], [4, 8], None),
    (_dense([[0, 1, 2], [0, 0, 0]]), [13, 0], None, "cache_seqlens must be at most 12, .* of sequence 0, got 13"),
    (PageTable.csr(np.int32([0, 1, 9]), np.int32([0, 2, 3])), [8, 0], None, None),
    (PageTable.csr(np.int32([0, 1, 9]), np.int32([0, 2, 3])), [8, 1], None, "page ids from 0 to 2, got 9"),
    (PageTable.csr(np.int32([0, 1, 2]), np.int32([0, 2, 3])), [9, 0], None, "at most 8, .* of sequence 0, got 9")])
def test_content(table, lengths, starts, message):
    if message is None:
        table.check("op", np.array(lengths), 3, 4, starts=starts if starts is None else np.array(starts))
        return
    with pytest.raises(ValueError, match=f"^op: .*{message}"):
        table.check("op", np.array(lengths), 3, 4, starts=starts)


def test_content_of_blocks():
    pool = blocks()
    table = pointers(pool, [3, 1, 5], [2, 1], buffers=pool)
    table.check("op", np.array([8, 4]), None, 4, 64)
    with pytest.raises(ValueError, match="op: block_ptrs must lie in the buffers with 65 bytes each"):
        table.check("op", np.array([8, 4]), None, 4, 65)
    table.check("op", np.array([8, 0]), None, 4, 65)   # only the last block is too short
    table.block_ptrs[1] = 0
    table.check("op", np.array([4, 4]), None, 4, 64)
    with pytest.raises(ValueError, match="op: block_ptrs must not be 0 up to each sequence's length"):
        table.check("op", np.array([5, 4]), None, 4, 64)
    table.indptr[1] = 5
    with pytest.raises(ValueError, match="op: block_table.indptr must not decrease"):
        table.check("op", np.array([5, 4]), None, 4, 64)
