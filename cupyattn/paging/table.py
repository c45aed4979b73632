# SPDX-License-Identifier: Apache-2.0
"""Which page or memory block holds which tokens of a sequence."""

import numpy as np

from ..devices import to_host
from ..runtime.arrays import array_namespace
from ..runtime.checks import check_array, check_dtype, check_last_axis, check_shape, value_range
from ..runtime.structs import address, extent

_OP = "PageTable"
# fields of the kernels' PageTable that has no pages
NO_PAGES = {"block_table": None, "indptr": None, "block_ptrs": None, "row_starts": None, "stride_seq": 0,
            "max_pages": 0, "page_size": 1, "num_pages": 0, "reserved": 0}


class PageTable:
    """Pages of every sequence, in one of three forms. Stands where an op takes `block_table`.

    ``PageTable(block_table)`` is what an op makes of a plain array; `csr` and `pointers` make the other forms. Holds
    the arrays given, copies nothing: a table filled in place for the next step needs no new object.

    Parameters
    ----------
    block_table : ndarray [batch, max_pages], int32
        Page of token t of sequence b is ``block_table[b, t // page_size]``; entries past a sequence's length are not
        read.

    Attributes
    ----------
    batch : int
        Number of sequences.
    max_pages : int
        Pages a sequence has at most.
    buffers : tuple of ndarray
        Arrays that hold the blocks; empty but for `pointers`.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> cupyattn.PageTable.csr(np.int32([7, 2, 5]), np.int32([0, 2, 3]))
    PageTable(csr, batch=2, max_pages=3)
    """

    PARTS = ("block_table", "indptr", "block_ptrs")   # see runtime.Prepared

    def __init__(self, block_table):
        self._set(array_namespace(_OP, block_table=block_table), "dense", block_table=block_table)
        check_array(_OP, "block_table", block_table, "int32", (None, None), "[batch, max_pages]")
        self.batch, self.max_pages = block_table.shape

    def _set(self, xp, form, *, block_table=None, indptr=None, block_ptrs=None, last_page_len=None, buffers=(),
             alignment=16):
        self.xp, self.form = xp, form
        self.block_table, self.indptr, self.block_ptrs, self.last_page_len = (block_table, indptr, block_ptrs,
                                                                              last_page_len)
        self.buffers, self.alignment = buffers, alignment

    @classmethod
    def _lists(cls, names, entries, indptr, dtypes, **fields):
        """A table of lists: `entries` and where each sequence's begin, checked under their argument `names`."""
        self = cls.__new__(cls)
        self._set(array_namespace(_OP, **dict(zip(names, (entries, indptr), strict=True)),
                                  last_page_len=fields.get("last_page_len")), indptr=indptr, **fields)
        check_dtype(_OP, names[0], entries, dtypes)
        check_shape(_OP, names[0], entries, (None,), "[entries]")
        check_dtype(_OP, names[1], indptr, "int32")
        check_shape(_OP, names[1], indptr, (None,), "[batch + 1]")
        for name, array in zip(names, (entries, indptr), strict=True):
            check_last_axis(_OP, name, array)
        if indptr.size == 0:
            raise ValueError(f"{_OP}: {names[1]} must have at least one entry, got [0]")
        self.batch, self.max_pages = indptr.size - 1, entries.size
        if self.xp is np:
            self._check_indptr(_OP, names[1], indptr)
        return self

    @classmethod
    def csr(cls, indices, indptr, last_page_len=None):
        """Page ids of all sequences in one list.

        Parameters
        ----------
        indices : ndarray [pages of all sequences], int32
            Page of token t of sequence b is ``indices[indptr[b] + t // page_size]``.
        indptr : ndarray [batch + 1], int32
            First entry of each sequence, and the end.
        last_page_len : ndarray [batch], int32, optional
            Tokens in the last page of each sequence, for `cache_seqlens`.

        Returns
        -------
        PageTable

        Raises
        ------
        TypeError, ValueError
            Arrays that do not fit; for NumPy arrays also an `indptr` that decreases or leaves `indices`.
        """
        self = cls._lists(("indices", "indptr"), indices, indptr, "int32", form="csr", block_table=indices,
                          last_page_len=last_page_len)
        if last_page_len is not None:
            check_dtype(_OP, "last_page_len", last_page_len, "int32")
            check_shape(_OP, "last_page_len", last_page_len, (self.batch,), "[batch]")
        return self

    @classmethod
    def pointers(cls, block_ptrs, cu_block_nums, *, buffers=None, trusted_pointers=False, alignment=16):
        """Addresses of the memory blocks of all sequences in one list; goes with `BlockKV` caches.

        Parameters
        ----------
        block_ptrs : ndarray [blocks of all sequences], uint64 or int64
            Token t of sequence b is in slot ``t % page_size`` of the block at
            ``block_ptrs[cu_block_nums[b] + t // page_size]``. 0 is no block. NumPy arrays hold addresses of the host,
            CuPy arrays addresses of the device.
        cu_block_nums : ndarray [batch + 1], int32
            First entry of each sequence, and the end.
        buffers : array or sequence of arrays, optional
            What the blocks lie in. For NumPy arrays every call checks that the blocks it uses lie in them, for CuPy
            arrays under ``CUPYATTN_CHECK=1``.
        trusted_pointers : bool
            Must be True when there are no `buffers`: then nothing keeps the blocks alive or checks their addresses.
        alignment : int
            Power of two up to 16 that divides every address.

        Returns
        -------
        PageTable

        Raises
        ------
        TypeError, ValueError
            Arrays that do not fit; neither `buffers` nor ``trusted_pointers=True``; for NumPy arrays also a
            `cu_block_nums` that decreases or leaves `block_ptrs`, and an address outside the buffers.
        """
        if buffers is None and trusted_pointers is not True:
            raise ValueError(f"{_OP}: buffers must be given, or trusted_pointers=True, got neither; a wrong address "
                             "would read or overwrite any memory")
        if alignment not in (1, 2, 4, 8, 16):
            raise ValueError(f"{_OP}: alignment must be 1, 2, 4, 8 or 16, got {alignment!r}")
        if buffers is None:
            buffers = ()
        elif not isinstance(buffers, tuple | list):
            buffers = (buffers,)
        self = cls._lists(("block_ptrs", "cu_block_nums"), block_ptrs, cu_block_nums, ("uint64", "int64"),
                          form="pointers", block_ptrs=block_ptrs, buffers=tuple(buffers), alignment=alignment)
        array_namespace(_OP, block_ptrs=block_ptrs, **{f"buffers[{i}]": b for i, b in enumerate(buffers)})
        if self.xp is np:
            self.check_addresses(_OP, block_ptrs[block_ptrs != 0], 1)
        return self

    @classmethod
    def from_pool(cls, pool, block_table, num_blocks=None):
        """Addresses of blocks that are the entries of one array.

        Parameters
        ----------
        pool : ndarray [blocks, ...]
            ``pool[i]`` is block i, contiguous in itself.
        block_table : int array [batch, max_blocks]
            Blocks of each sequence. A CuPy array is copied to the host.
        num_blocks : int array [batch], optional
            Blocks each sequence has; default all.

        Returns
        -------
        PageTable
            As `pointers` makes it, with `pool` as its buffer.
        """
        xp = array_namespace(_OP, pool=pool)
        if pool.ndim == 0 or not pool[:1].flags.c_contiguous:
            raise ValueError(f"{_OP}: pool must have entries that are contiguous in themselves, got strides "
                             f"{pool.strides}")
        table = to_host(block_table)
        if table.ndim != 2 or table.dtype.kind not in "iu":
            raise ValueError(f"{_OP}: block_table must be integers [batch, max_blocks], got {table.dtype.name} "
                             f"{list(table.shape)}")
        counts = np.full(len(table), table.shape[1]) if num_blocks is None else to_host(num_blocks)
        if counts.shape != table.shape[:1] or (counts < 0).any() or (counts > table.shape[1]).any():
            raise ValueError(f"{_OP}: num_blocks must be [batch={len(table)}] from 0 to {table.shape[1]}, got "
                             f"{counts.tolist()}")
        used = table[np.arange(table.shape[1]) < counts[:, None]].astype(np.int64)
        if used.size and not 0 <= used.min() <= used.max() < len(pool):
            raise ValueError(f"{_OP}: block_table must hold ids of the {len(pool)} blocks of pool, got {used.min()} to "
                             f"{used.max()}")
        first = address(pool)
        pointers = (first + used * pool.strides[0]).astype(np.uint64)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        bits = first | (pool.strides[0] if len(pool) > 1 else 0) | 16
        return cls.pointers(xp.asarray(pointers), xp.asarray(starts), buffers=(pool,), alignment=bits & -bits)

    def capacity(self, page_size):
        """Tokens that no sequence of this table exceeds."""
        return self.max_pages * page_size

    def cache_seqlens(self, page_size):
        """Lengths by `last_page_len`.

        Returns
        -------
        ndarray [batch], int32
        """
        if self.last_page_len is None:
            raise ValueError(f"{_OP}: last_page_len must be given to `csr` for cache_seqlens, got none")
        pages = self.indptr[1:] - self.indptr[:-1]
        return self.xp.where(pages > 0, (pages - 1) * page_size + self.last_page_len, 0).astype("int32")

    def fields(self, num_pages, page_size):
        """Fields of the kernels' PageTable for caches of `num_pages` pages (None with block pointers)."""
        ids, pointers = self.block_table, self.block_ptrs
        return {**NO_PAGES, "block_table": ids, "indptr": self.indptr,
                "block_ptrs": None if pointers is None else pointers.view("int64"),
                "stride_seq": ids.strides[0] // 4 if self.form == "dense" else 0, "max_pages": self.max_pages,
                "page_size": page_size, "num_pages": 0 if num_pages is None else num_pages}

    @property
    def signature(self):
        return self.form, self.batch, self.max_pages, self.alignment

    def with_parts(self, block_table, indptr, block_ptrs):
        """This table with other arrays alike, and without `last_page_len` and buffers."""
        made = type(self).__new__(type(self))
        made._set(self.xp, self.form, block_table=block_table, indptr=indptr, block_ptrs=block_ptrs,
                  alignment=self.alignment)
        made.batch, made.max_pages = self.batch, self.max_pages
        return made

    @property
    def arrays(self):
        """The arrays behind the table, by name."""
        found = {"block_table": self.block_table, "indptr": self.indptr, "block_ptrs": self.block_ptrs}
        return {name: array for name, array in found.items() if array is not None}

    def check(self, op, lengths, num_pages, page_size, block_bytes=0, *, starts=None):
        """Content: the pages of tokens 0 to `lengths` exist. Copies CuPy arrays to the host.

        Parameters
        ----------
        op : str
            Whose messages these are.
        lengths : int array [batch]
        num_pages : int or None
            Pages of the caches; None with block pointers.
        page_size : int
        block_bytes : int
            With block pointers: bytes from a block's start that are used.
        starts : int array [batch], optional
            First token used.

        Raises
        ------
        ValueError
            A length past the table, an id that is no page, an address outside the buffers or not aligned.
        """
        if self.all_entries_are_pages(lengths, num_pages, page_size):
            return
        lengths = to_host(lengths).astype(np.int64)
        if self.form == "dense":
            first, columns = np.arange(self.batch) * self.max_pages, np.full(self.batch, self.max_pages)
            entries = to_host(self.block_table).reshape(-1)
        else:
            indptr = to_host(self.indptr).astype(np.int64)
            self._check_indptr(op, "block_table.indptr", indptr)
            first, columns = indptr[:-1], np.diff(indptr)
            entries = to_host(self.block_ptrs if self.form == "pointers" else self.block_table)
        self.check_room(op, lengths, page_size, columns)
        last = -(-np.maximum(lengths, 0) // page_size)
        begin = np.zeros_like(last) if starts is None else np.minimum(to_host(starts) // page_size, last).clip(0)
        counts = last - begin
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        used = entries[np.repeat(first + begin, counts) + steps]
        if self.form == "pointers":
            self.check_addresses(op, used, block_bytes)
        else:
            wrong = np.flatnonzero((used < 0) | (used >= num_pages))
            if wrong.size:
                b = int(np.searchsorted(np.cumsum(counts), wrong[0], side="right"))
                raise ValueError(f"{op}: block_table must hold page ids from 0 to {num_pages - 1}, got "
                                 f"{used[wrong[0]]} at page {begin[b] + steps[wrong[0]]} of sequence {b}")

    def check_room(self, op, lengths, page_size, columns=None):
        """`lengths` tokens, on the host, are no more than the table, on the host, has pages (`columns`) for."""
        if columns is None:
            columns = np.full(self.batch, self.max_pages) if self.form == "dense" else np.diff(self.indptr)
        short = np.flatnonzero(-(-lengths // page_size) > columns)
        if short.size:
            b = short[0]
            raise ValueError(f"{op}: cache_seqlens must be at most {columns[b] * page_size}, what block_table holds of "
                             f"sequence {b}, got {lengths[b]}")

    def all_entries_are_pages(self, lengths, num_pages, page_size):
        """True is certain: a shortcut for small tables on the host without odd entries past the `lengths`."""
        table = self.block_table
        return (self.form == "dense" and isinstance(table, np.ndarray) and 0 < table.size <= 8192
                and value_range(lengths)[1] <= self.max_pages * page_size
                and int(table.view(np.uint32).max()) < num_pages)   # a negative one is far above

    def _check_indptr(self, op, name, indptr):
        if indptr[0] < 0 or indptr[-1] > self.max_pages or (np.diff(indptr) < 0).any():
            raise ValueError(f"{op}: {name} must not decrease and stay within the {self.max_pages} entries, got "
                             f"{np.asarray(indptr).tolist() if indptr.size <= 20 else 'other numbers'}")

    def check_addresses(self, op, used, block_bytes):
        """Addresses of blocks that are used are not 0, aligned, and inside the buffers with `block_bytes` bytes."""
        used = used.astype(np.uint64)
        if (used == 0).any():
            raise ValueError(f"{op}: block_ptrs must not be 0 up to each sequence's length, got 0")
        odd = used % np.uint64(self.alignment) != 0
        if odd.any():
            raise ValueError(f"{op}: block_ptrs must be multiples of {self.alignment}, got {hex(used[odd][0])}; say "
                             "alignment= otherwise")
        if not self.buffers:   # trusted
            return
        inside = np.zeros(used.shape, bool)
        for buffer in self.buffers:
            start, end = extent(buffer)
            if end - start >= block_bytes:
                inside |= (used >= np.uint64(start)) & (used <= np.uint64(end - block_bytes))
        if not inside.all():
            raise ValueError(f"{op}: block_ptrs must lie in the buffers with {block_bytes} bytes each, got "
                             f"{hex(used[~inside][0])}")

    def __repr__(self):
        return f"PageTable({self.form}, batch={self.batch}, max_pages={self.max_pages})"
