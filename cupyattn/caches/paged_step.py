# SPDX-License-Identifier: Apache-2.0
"""The tokens of a PagedAttentionMetadata as sequences of a batch, worked out once for all layers of a step."""

import weakref
from functools import cached_property

import numpy as np

from ..runtime.arrays import array_namespace
from ..runtime.capturing import tape
from ..runtime.checks import check_array, check_shape
from ..runtime.launch import scratch_owner
from ..runtime.structs import address
from .base import is_array, one_array


def step_of(name, metadata, view, call):
    """The PagedStep of `metadata` for a layer's `view`, the same one for all layers that ask for it.

    A layer that makes the same `call` (anything hashable) once more begins another step: what stands in the arrays of
    `metadata` may have changed since. So do a field that was assigned, other sizes of pages, another thread, on a GPU
    another stream, and in NumPy arrays other contents.
    """
    cache = view.k_cache
    codes = one_array(cache)
    xp = array_namespace(name, key_pages=codes)
    sizes, where = cache.shape[:2], _where(xp)
    step, call = metadata._step, (call, address(codes))
    found = [value.tobytes() for _, value in metadata._items() if isinstance(value, np.ndarray)]
    if step is None or call in step.calls or (step.sizes, step.where, step.contents) != (sizes, where, found):
        metadata._step = step = PagedStep(name, metadata, sizes, where, found)
    step.calls.add(call)
    return step


def _where(xp):
    """What else must be the same for arrays to be shared: whose launches count in work lists, and on a GPU the capture
    under way."""
    capture = None
    if xp is not np and xp.cuda.get_current_stream().is_capturing():
        # what a graph does not make itself would be old in its replays
        capture = object() if tape() is None else weakref.ref(tape())
    return scratch_owner(xp), capture


class PagedStep:
    """The prompt's chunk, its padding (a sequence without keys), then each of the decodes.

    Parameters
    ----------
    name : str
        Of the method it is for.
    metadata : PagedAttentionMetadata
    sizes : (num_pages, page_size)
    where : tuple
    contents : list of bytes
        Of the NumPy arrays of `metadata`.

    Attributes
    ----------
    xp : module
    chunk, batch, tokens, max_q_len : int
        Rows of the chunk and of the decodes, all rows, and the most rows of a sequence.
    is_capturing : bool
        Its arrays are filled by the replays of a graph.
    calls : set
        What `step_of` has given it out for.
    schedules : dict
        Of those who attend.
    """

    def __init__(self, name, metadata, sizes, where, contents):
        self.sizes, self.where, self.contents = sizes, where, contents
        self.is_capturing = where[-1] is not None
        self.calls, self.schedules, self._is_checked = set(), {}, False
        given = [value for _, value in metadata._items()]
        self._prompt = None if metadata.is_decode_mode() else given[:3]
        self._decodes = None if metadata.is_prefill_mode() else given[3:]
        self.chunk = self.batch = 0
        self._first = 0 if self._prompt is None else 2   # sequence of the first of the decodes
        arrays = {}
        if self._prompt is not None:
            length, position, pages = self._prompt
            arrays |= {"prefill_position": position, "prefill_page_table": pages}
            check_array(name, "prefill_position", position, "int32", (None,), "[chunk]", contiguous=False)
            check_array(name, "prefill_page_table", pages, "int32", (None,), "[pages]", contiguous=False)
            if is_array(length):
                check_shape(name, "prefill_length", length, (), "one number")
            self.chunk = len(position)
        if self._decodes is not None:
            position, table = self._decodes
            arrays |= {"decodes_position": position, "decodes_page_table": table}
            check_array(name, "decodes_position", position, "int32", (None,), "[batch]", contiguous=False)
            self.batch = len(position)
            check_array(name, "decodes_page_table", table, "int32", (self.batch, None),
                        "[batch, num_pages_per_sequence]", contiguous=False)
        self.xp = array_namespace(name, **arrays)
        self.tokens, self.max_q_len = self.chunk + self.batch, max(self.chunk, min(self.batch, 1))
        if self._prompt is not None and not is_array(length):
            self._prompt = self.xp.full((), length, np.int32), *self._prompt[1:]

    @cached_property
    def block_table(self):
        """int32 [sequences, pages]; on a GPU, where nobody looks, page 0 is no page."""
        parts = [] if self._prompt is None else [(0, self._prompt[2][None])]
        if self._decodes is not None:
            parts.append((self._first, self._decodes[1]))
        table = self.xp.zeros((self._first + self.batch, max(part.shape[1] for _, part in parts)), np.int32)
        for first, part in parts:
            table[first:first + len(part), :part.shape[1]] = part
        return table if self.xp is np else self.xp.where(table == 0, -1, table)

    @cached_property
    def positions(self):
        """int32 [tokens]: where each token stands in its sequence, -1 for padding."""
        where, found = self.xp.where, self.xp.zeros(self.tokens, np.int32)
        if self._prompt is not None:
            length, position, _ = self._prompt
            found[:self.chunk] = where((position >= 0) & (position < length), position, -1)
        if self._decodes is not None:
            found[self.chunk:] = where(self._decodes[0] < 0, -1, self._decodes[0])
        return found

    @cached_property
    def rows(self):
        """int32 [tokens]: row of `block_table` of each token; None where it has one for each."""
        if self._prompt is None:
            return None
        found = self.xp.zeros(self.tokens, np.int32)
        found[self.chunk:] = self.xp.arange(self._first, self._first + self.batch, dtype=np.int32)
        return found

    def places(self, name, tokens=slice(None)):
        """Where `kv_append` is to write the `tokens`; on the host not on page 0."""
        table, positions = self.block_table, self.positions[tokens]
        rows = None if self.rows is None else self.rows[tokens]
        if self.xp is np:
            written = np.flatnonzero(positions >= 0)
            columns = np.minimum(positions[written] // self.sizes[1], table.shape[1] - 1)
            if table.size and (table[written if rows is None else rows[written], columns] == 0).any():
                raise ValueError(f"{name}: page table must not name page 0 where a token is written, it is reserved")
        return {"block_table": table, "positions": positions, "batch_indices": rows}

    @cached_property
    def _chunk_range(self):
        """[1] each: position of the chunk's first row, and how many of its rows are no padding."""
        (length, position, _), xp = self._prompt, self.xp
        start = position[:1] if self.chunk else xp.zeros(1, np.int32)
        count = length - start
        count = xp.where(count < self.chunk, count, self.chunk)
        return start, xp.where((start < 0) | (count < 0), 0, count)

    @cached_property
    def cu_seqlens_q(self):
        """int32 [sequences + 1]."""
        if self._prompt is None:
            return self.xp.arange(self.batch + 1, dtype=np.int32)
        starts = self.xp.arange(self.chunk - 2, self.tokens + 1, dtype=np.int32)
        starts[:1], starts[1:2] = 0, self._chunk_range[1]
        return starts

    @cached_property
    def cache_seqlens(self):
        """int32 [sequences]: tokens of each, the new ones included; 0 for padding."""
        seqlens = self.xp.zeros(self._first + self.batch, np.int32)
        if self._prompt is not None:
            start, count = self._chunk_range
            seqlens[:1] = self.xp.where(count < 1, 0, start + count)
        seqlens[self._first:] = self.positions[self.chunk:] + 1
        return seqlens

    def check_pages(self, name):
        """On the host a chunk's positions count up, and there is a page for each token of every sequence."""
        if self._is_checked or self.xp is not np:
            return
        if self._prompt is not None:
            length, position, pages = self._prompt
            start, rows = self._chunk_range[0], int(self._chunk_range[1][0])
            if ((position[:rows] != start + np.arange(rows)).any()
                    or ((position >= 0) & (position < length)).sum() != rows):
                raise ValueError(f"{name}: prefill_position must count up by one over the chunk's tokens below "
                                 f"prefill_length {int(length)}, got "
                                 f"{position.tolist() if self.chunk <= 20 else f'{self.chunk} others'}")
            _check_pages(f"{name}: prefill_page_table", pages[None], self.cache_seqlens[:1], *self.sizes)
        if self._decodes is not None:
            lengths = self.positions[self.chunk:].astype(np.int64) + 1
            _check_pages(f"{name}: decodes_page_table", self._decodes[1], lengths, *self.sizes)
        self._is_checked = True


def _check_pages(what, table, lengths, num_pages, page_size):
    """Pages of all tokens of every row of `table`, in host memory, exist; page 0 holds none."""
    needed = -(-lengths // page_size)
    if needed.max(initial=0) > table.shape[1]:
        raise ValueError(f"{what} must have a page for every token, got {table.shape[1]} pages of {page_size} for "
                         f"{lengths.max()} tokens")
    wrong = ((table < 1) | (table >= num_pages)) & (np.arange(table.shape[1]) < needed[:, None])
    if wrong.any():
        raise ValueError(f"{what} must hold page ids from 1 to {num_pages - 1} (page 0 is reserved), got "
                         f"{table[wrong][0]} where tokens are")
