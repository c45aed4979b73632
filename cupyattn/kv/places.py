# SPDX-License-Identifier: Apache-2.0
"""Where ``kv_append`` writes tokens: by slots or by a page table. The arguments fit, and on the host their content."""

from typing import NamedTuple

import numpy as np

from ..devices import on_host
from ..paging.table import NO_PAGES, PageTable
from ..runtime.checks import check_array, check_number, value_range
from .quantized import FORMATS, BlockKV

_OP = "kv_append"


class Places(NamedTuple):
    """Where each new token goes: all arguments of the op that have a say; none of them without k and v."""

    slots: object = None
    table: object = None      # PageTable
    positions: object = None
    batch_indices: object = None
    readonly_tokens: object = None
    key_stride: int = 1
    key_offset: int = 0
    q_len: int | None = None   # tokens of each sequence, of the first of which positions are; None: of all tokens

    def of_call(self, slots, block_table, positions, batch_indices, readonly_tokens):
        """Places of a call's own arrays, where these here stand for all that are alike."""
        if self.table is not None and not isinstance(block_table, PageTable):
            block_table = self.table.with_parts(block_table, None, None)
        return Places(slots, block_table, positions, batch_indices, readonly_tokens, self.key_stride, self.key_offset,
                      self.q_len)

    def fields(self, cache):
        """Fields of the kernel's struct, positions apart, for an array, QuantizedKV or BlockKV `cache`."""
        slots, table, wide = self.slots, self.table, self.slots is not None and self.slots.dtype.itemsize == 8
        pages, page_size = (0, 0) if cache is None else cache.shape[:2]
        return {"table": NO_PAGES | {"page_size": page_size, "num_pages": pages} if table is None else
                table.fields(pages, page_size), "batch": 0 if table is None else table.batch,
                "slots32": None if wide else slots, "slots64": slots if wide else None, "stride_slot": stride_of(slots),
                "batch_indices": self.batch_indices, "stride_batch_index": stride_of(self.batch_indices),
                "readonly": self.readonly_tokens, "stride_readonly": stride_of(self.readonly_tokens),
                "key_stride": self.key_stride, "key_offset": self.key_offset}


def stride_of(array):
    """Stride of a one-dimensional array in elements, 0 for none."""
    return 0 if array is None else array.strides[0] // array.itemsize


def no_places(**given):
    """Places of a call without k and v, where nothing else about the caches may be `given` either."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{_OP}: {name} must come with k and v, got it without them")
    return Places()


def check_index(name, array, length, axes, dtypes=("int32",)):
    check_array(_OP, name, array, dtypes, (length,), axes, contiguous=False)


def prepare_places(slots, block_table, positions, batch_indices, readonly_tokens, key_stride, key_offset, tokens,
                   q_len=None):
    """Exactly one way to say where tokens go, and its arrays fit; returns Places."""
    if (slots is None) == (block_table is None) or block_table is not None and positions is None:
        given = [name for name, array in (("slots", slots), ("block_table", block_table), ("positions", positions))
                 if array is not None]
        raise ValueError(f"{_OP}: places must be given by slots, or by block_table and positions, got "
                         f"{' and '.join(given) or 'neither'}")
    check_number(_OP, "key_stride", key_stride, least=1, integer=True)
    check_number(_OP, "key_offset", key_offset, least=0, integer=True)
    if key_offset >= key_stride:
        raise ValueError(f"{_OP}: key_offset must be below key_stride = {key_stride}, got {key_offset}")
    if slots is not None:
        for name, given in (("batch_indices", batch_indices is not None), ("key_stride", key_stride != 1),
                            ("readonly_tokens", readonly_tokens is not None)):
            if given:
                raise ValueError(f"{_OP}: {name} must come with block_table, got slots")
        check_index("slots", slots, tokens, "[tokens]", ("int32", "int64"))
        return Places(slots)
    table = block_table if isinstance(block_table, PageTable) else PageTable(block_table)
    if batch_indices is not None:
        if q_len is not None:
            raise ValueError(f"{_OP}: batch_indices must be None with q_len, got an array")
        check_index("batch_indices", batch_indices, tokens, "[tokens]")
    elif q_len is not None:
        if tokens != table.batch * q_len:
            raise ValueError(f"{_OP}: q_len must be that of the {table.batch} sequences of block_table, got {q_len} "
                             f"for {tokens} tokens")
    elif tokens != table.batch:
        raise ValueError(f"{_OP}: batch_indices must be given unless there is one token per sequence, got {tokens} "
                         f"tokens for {table.batch} sequences of block_table")
    if readonly_tokens is not None:
        check_index("readonly_tokens", readonly_tokens, table.batch, "[batch]")
    return Places(None, table, positions, batch_indices, readonly_tokens, key_stride, key_offset, q_len)


def check_blocks(places, **caches):
    """Block pointers go with BlockKV caches, whose elements they leave aligned, and nothing else does."""
    pointers = places.table is not None and places.table.form == "pointers"
    for name, cache in caches.items():
        if isinstance(cache, BlockKV) != pointers:
            raise ValueError(f"{_OP}: {name} must be {'a BlockKV' if pointers else 'no BlockKV'} with "
                             f"{'block pointers' if pointers else 'slots or page ids'}, got {type(cache).__name__}")
        if not pointers:
            continue
        element = cache.scale_dtype if cache.format in FORMATS and cache.scale is None else cache.format
        needed = 1 if element in FORMATS else 4 if element == "float32" else 2
        if places.table.alignment < needed:
            raise ValueError(f"{_OP}: block_table must have an alignment of at least {needed} bytes for {name}, got "
                             f"{places.table.alignment}")


def check_range(name, values, low, high, what):
    if values.size == 0:
        return
    smallest, largest = value_range(values)
    if smallest < low or largest >= high:
        found = smallest if smallest < low else largest
        raise ValueError(f"{_OP}: {name} must be in [{low}, {high}), {what}, got {found}")


def check_places(places, caches):
    """Content: every token goes to a place inside the caches, and no two to the same one. Copies CuPy arrays."""
    if places.slots is None and places.table is None:
        return
    num_pages, page_size = caches[0].shape[:2]
    if _are_certainly_right(places, num_pages, page_size):
        return
    if places.slots is not None:
        slots = on_host(places.slots)
        check_range("slots", slots, -1, num_pages * page_size, "num_pages * page_size or -1 to skip the token")
        wanted = slots[slots >= 0]
        pages, slots = wanted // page_size, wanted % page_size
    else:
        pages, slots = _pages_of_positions(places, num_pages, page_size, caches)
    order = np.lexsort((slots, pages))
    pages, slots = pages[order], slots[order]
    twice = np.flatnonzero((pages[1:] == pages[:-1]) & (slots[1:] == slots[:-1]))
    if twice.size:
        page, slot = pages[twice[0]].item(), slots[twice[0]]
        raise ValueError(f"{_OP}: places must differ from token to token, got page "
                         f"{page if num_pages is not None else hex(page)} slot {slot} twice")


def _are_certainly_right(places, num_pages, page_size):
    """A shortcut for a few tokens of a few sequences, in host memory; False says nothing."""
    table, positions, q_len, wanted = places.table, places.positions, places.q_len or 1, []
    if table is None or table.form != "dense" or places.batch_indices is not None or places.key_stride > 1 or \
            not isinstance(positions, np.ndarray) or not len(positions) == table.batch <= 16 // q_len:
        return False
    page_of = table.block_table.item
    for sequence, first in enumerate(positions.tolist()):
        if not 0 <= first <= table.max_pages * page_size - q_len:
            return False
        for position in range(first, first + q_len):
            page = page_of(sequence, position // page_size)
            if not 0 <= page < num_pages:
                return False
            wanted.append((page, position % page_size))
    return len(set(wanted)) == len(wanted)


def _pages_of_positions(places, num_pages, page_size, caches):
    """Page id or block address, and slot, of every token that is written."""
    table, stride = places.table, places.key_stride
    positions = on_host(places.positions)
    sequences = np.arange(table.batch) if places.batch_indices is None else on_host(places.batch_indices)
    if places.q_len is not None and places.q_len > 1:
        positions = np.where(positions < 0, -1, positions + np.arange(places.q_len)[:, None]).T.ravel()
        sequences = np.repeat(sequences, places.q_len)
    check_range("batch_indices", sequences, 0, table.batch, "the sequences of block_table")
    entries = on_host(table.block_table if table.block_ptrs is None else table.block_ptrs)
    starts = None if table.indptr is None else on_host(table.indptr)
    limits = np.int64(page_size * stride) * (table.max_pages if starts is None else np.diff(starts)[sequences])
    here = positions % stride == places.key_offset   # the other ranks' tokens need no page
    wrong = np.flatnonzero((positions < -1) | (here & (positions >= limits)))
    if wrong.size:
        limit = limits if starts is None else limits[wrong[0]]
        raise ValueError(f"{_OP}: positions must be in [-1, {limit}), what block_table can hold, or -1 to skip the "
                         f"token, got {positions[wrong[0]]}")
    writes = here & (positions >= 0)
    if places.readonly_tokens is not None:
        writes &= positions >= on_host(places.readonly_tokens)[sequences]
    tokens, sequences = positions[writes] // stride, sequences[writes]
    columns = tokens // page_size
    pages = entries[sequences, columns] if starts is None else entries[starts[sequences] + columns]
    if table.block_ptrs is None:
        check_range("block_table", pages, 0, num_pages, "the pages of the cache, where a token is written")
    else:
        table.check_addresses(_OP, pages, max(cache.nbytes_needed() for cache in caches))
    return pages, tokens % page_size


