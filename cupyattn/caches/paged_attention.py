# SPDX-License-Identifier: Apache-2.0
"""EasyDeL's paged attention cache: pools of pages for each layer, who owns which page, and where a step's tokens go."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops.kv_append import kv_append
from ..pages import PageManager
from ..quantized_kv import QuantizedKV
from ..runtime.arrays import array_namespace, dtype_of
from ..runtime.checks import check_number, check_shape
from .base import Cache, Record, View, check_given, check_positive, check_quantizer, is_array, zeros_pool

ABSENT = 1_000_000   # what stands, as an array without axes, where a step has no prefill or no decodes


@dataclass(eq=False, repr=False)
class PagedAttentionCacheMetaData(Record):
    """Sizes of a paged attention cache.

    Parameters
    ----------
    batch_size, num_hidden_layers : int
    num_pages_per_layer : int
        Page 0 among them, which holds no tokens.
    num_pages_per_sequence : int
        Entries of a sequence's page table.
    max_sequences : int
        Tokens a sequence may have, whatever the name says.
    page_size : int
        Tokens of a page.
    num_kv_heads, kv_head_dim_size : int
    hbm_utilization : float
        Share of the memory the pages may take.
    """

    batch_size: int
    num_hidden_layers: int
    num_pages_per_layer: int
    num_pages_per_sequence: int
    max_sequences: int
    page_size: int
    num_kv_heads: int
    kv_head_dim_size: int
    hbm_utilization: float

    @classmethod
    def create(cls, mesh=None, batch_size=None, num_hidden_layers=None, max_sequences=None, page_size=None,
               num_kv_heads=None, kv_head_dim_size=None, hbm_utilization=None, dtype="bfloat16", *, memory_bytes=None,
               xp=np):
        """The metadata, with as many pages as the memory has room for.

        pages = (int(limit * hbm_utilization) - used) * devices // num_hidden_layers // (bytes of a page, K and V)

        Parameters
        ----------
        mesh : int or object with ``devices.size``, optional
            Devices that share the pages. Default 1.
        batch_size, num_hidden_layers, max_sequences, page_size, num_kv_heads, kv_head_dim_size : int
        hbm_utilization : float
            Between 0 and 1, both excluded.
        dtype : dtype
            Of the pages.
        memory_bytes : int, optional
            The limit, of which nothing counts as used. Default: with CuPy the device's memory and what is used of it,
            CuPy's idle blocks apart; with NumPy what the host has available.
        xp : numpy or cupy

        Raises
        ------
        ValueError
            A size is not positive, hbm_utilization is not between 0 and 1, or there is no room for two pages (page 0
            holds no tokens).
        """
        name = "PagedAttentionCacheMetaData.create"
        sizes = {"batch_size": batch_size, "num_hidden_layers": num_hidden_layers, "max_sequences": max_sequences,
                 "page_size": page_size, "num_kv_heads": num_kv_heads, "kv_head_dim_size": kv_head_dim_size}
        check_given(name, **sizes, hbm_utilization=hbm_utilization)
        check_positive(name, quote="`", **sizes)
        check_number(name, "hbm_utilization", hbm_utilization)
        if not 0.0 < hbm_utilization < 1.0:
            raise ValueError(f"{name}: `hbm_utilization` must be between 0 and 1, both excluded, got {hbm_utilization}")
        limit, used = _memory(xp) if memory_bytes is None else (memory_bytes, 0)
        devices = _devices(name, mesh)
        usable = (int(limit * hbm_utilization) - used) * devices
        page_bytes = 2 * page_size * num_kv_heads * kv_head_dim_size * dtype_of(dtype).itemsize
        pages = usable // num_hidden_layers // page_bytes
        if pages < 2:
            raise ValueError(f"{name}: memory must have room for 2 pages of {page_bytes} bytes in each of "
                             f"{num_hidden_layers} layers, got {usable} bytes: {hbm_utilization} of {limit} less "
                             f"{used} in use, times {devices} device{'s' * (devices != 1)}")
        return cls(num_pages_per_layer=pages, num_pages_per_sequence=-(-max_sequences // page_size),
                   hbm_utilization=hbm_utilization, **sizes)


class HBMPageManager:
    """Hands out the pages of a paged attention cache, first in, first out. Page 0 is never handed out.

    Parameters
    ----------
    metadata : PagedAttentionCacheMetaData

    Attributes
    ----------
    pages : PageManager
        Which does the work; e.g. to ``share`` pages of a prompt among sequences.

    Examples
    --------
    >>> import cupyattn
    >>> metadata = cupyattn.PagedAttentionCacheMetaData(1, 1, 10, 4, 16, 4, 2, 64, 0.5)
    >>> manager = cupyattn.HBMPageManager(metadata)
    >>> manager.alloc_hbm_pages(3), manager.alloc_hbm_pages(7), manager.alloc_prefill_hbm_pages(9)
    ([1, 2, 3], [], [4, 5, 6])
    >>> manager.free_hbm_pages([2, 0])
    >>> manager.num_free
    4
    """

    def __init__(self, metadata):
        self._metadata = metadata
        num_pages = max(metadata.num_pages_per_layer, 0)
        self.pages = PageManager(num_pages, metadata.page_size, reserved=range(min(num_pages, 1)))

    @property
    def metadata(self):
        """As given."""
        return self._metadata

    @property
    def page_size(self):
        """Tokens of a page."""
        return self._metadata.page_size

    @property
    def current_page_index(self):
        """0, as in EasyDeL."""
        return 0

    @property
    def num_free(self):
        """Pages that can be allocated now."""
        return self.pages.num_free

    def alloc_hbm_pages(self, n):
        """`n` pages as a list; an empty one when `n` is not positive or fewer are free, then nothing has changed."""
        return self.pages.allocate(n)

    def alloc_prefill_hbm_pages(self, prompt_len):
        """The pages a prompt of `prompt_len` tokens needs, as `alloc_hbm_pages`."""
        return self.pages.allocate(-(-prompt_len // self.page_size))

    def free_hbm_pages(self, pages):
        """Give pages back; they are handed out again after those free already. Page 0 is passed over.

        Raises
        ------
        ValueError
            A page is free already, named twice, or no page at all. Nothing is freed then.
        """
        self.pages.free([page for page in pages if page != 0])

    def __repr__(self):
        return f"HBMPageManager({self.pages.capacity} pages of {self.page_size} tokens, {self.num_free} free)"


@dataclass(eq=False, repr=False)
class PagedAttentionMetadata(Record):
    """Where the tokens of a step go; int32 arrays. What a step has not is an array without axes.

    A step with a prompt and decodes is made from all five; one of one kind by `prefill` or `decode`.

    Parameters
    ----------
    prefill_length : ndarray []
        Tokens of the prompt so far, this chunk included.
    prefill_position : ndarray [chunk]
        Index of each token in the prompt; tokens from prefill_length on are padding.
    prefill_page_table : ndarray [pages]
        Pages of the prompt in order.
    decodes_position : ndarray [batch]
        Index of the new token in each sequence; negative skips the row.
    decodes_page_table : ndarray [batch, num_pages_per_sequence]

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> step = cupyattn.PagedAttentionMetadata.decode(np.int32([9, 3]), np.int32([[1, 4, 5], [2, 0, 0]]))
    >>> step.is_prefill_mode(), step.is_decode_mode(), step.is_mixed_mode()
    (False, True, False)
    """

    prefill_length: Any
    prefill_position: Any
    prefill_page_table: Any
    decodes_position: Any
    decodes_page_table: Any

    @classmethod
    def prefill(cls, length, position, page_table):
        """A step with a chunk of one prompt only."""
        absent = _absent(array_namespace("PagedAttentionMetadata.prefill", position=position, page_table=page_table))
        return cls(length, position, page_table, absent, absent)

    @classmethod
    def decode(cls, position, page_table):
        """A step with one new token for each sequence only."""
        absent = _absent(array_namespace("PagedAttentionMetadata.decode", position=position, page_table=page_table))
        return cls(absent, absent, absent, position, page_table)

    @classmethod
    def init_empty(cls, *, xp=np):
        """A step of nothing; it is in prefill and in decode mode, and nothing can be written by it."""
        return cls(*[_absent(xp)] * 5)

    def is_prefill_mode(self):
        """Whether there are no decodes."""
        return _axes(self.decodes_position) == 0

    def is_decode_mode(self):
        """Whether there is no prefill."""
        return _axes(self.prefill_position) == 0

    def is_mixed_mode(self):
        """Whether there are a prefill and decodes."""
        return not (self.is_prefill_mode() or self.is_decode_mode())


@dataclass(eq=False, repr=False)
class PagedAttentionCacheView(View):
    """Pages of keys and values of one layer; `init` makes them, `write_*` methods write in place and return the view.

    Parameters
    ----------
    metadata : PagedAttentionCacheMetaData
    layer_index : int, optional
    key_pages, value_pages : ndarray [num_kv_heads, num_pages, page_size, head_dim]
        Or QuantizedKV [num_pages, page_size, num_kv_heads, head_dim].
    """

    metadata: PagedAttentionCacheMetaData
    layer_index: int | None
    key_pages: Any
    value_pages: Any

    @classmethod
    def init(cls, mesh=None, dtype="bfloat16", metadata=None, layer_index=None, partition_manager=None, quantizer=None,
             *, xp=np):
        """A view of zeros.

        Parameters
        ----------
        mesh, partition_manager : optional
            Mean nothing here.
        dtype : dtype
            float16, bfloat16 or float32; with a quantizer that of the activations.
        metadata : PagedAttentionCacheMetaData
        layer_index : int, optional
        quantizer : str, optional
            A format of `QuantizedKV`; TypeError for anything else.
        xp : numpy or cupy
        """
        name = "PagedAttentionCacheView.init"
        check_given(name, metadata=metadata)
        check_quantizer(name, quantizer)
        page, heads, dim = metadata.page_size, metadata.num_kv_heads, metadata.kv_head_dim_size
        shape = (heads, metadata.num_pages_per_layer, page, dim)
        if quantizer is not None:
            shape = (metadata.num_pages_per_layer, page, heads, dim)
        return cls(metadata, layer_index, *(zeros_pool(shape, dtype, quantizer, xp) for _ in "kv"))

    @property
    def k_cache(self):
        """The keys as the ops take them, [num_pages, page_size, num_kv_heads, head_dim]; nothing is copied."""
        return _as_cache(self.key_pages)

    @property
    def v_cache(self):
        """The values as the ops take them."""
        return _as_cache(self.value_pages)

    def write_prefill_to_cache(self, key, value, metadata):
        """Write a chunk of a prompt. Only its tokens are: neither padding nor the rest of a page.

        Parameters
        ----------
        key, value : ndarray [chunk, num_kv_heads, head_dim]
            Rounded to the pages' dtype, or quantized. Any number of tokens.
        metadata : PagedAttentionMetadata
            Row t is token ``prefill_position[t]`` of the prompt, padding from `prefill_length` on.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            No prefill, shapes that do not fit; on NumPy arrays also a token without a page, on page 0 or on a page
            that does not exist. With CuPy arrays such tokens are not stored.
        """
        name = "PagedAttentionCacheView.write_prefill_to_cache"
        length, position, table = metadata.prefill_length, metadata.prefill_position, metadata.prefill_page_table
        if metadata.is_decode_mode():
            raise ValueError(f"{name}: metadata must have a prefill, got none")
        lengths = {"prefill_length": length} if is_array(length) else {}
        xp = array_namespace(name, key_pages=_an_array(self.key_pages), key=key, value=value, prefill_position=position,
                             prefill_page_table=table, **lengths)
        check_shape(name, "prefill_position", position, key.shape[:1], "[chunk]")
        check_shape(name, "prefill_page_table", table, (None,), "[pages]")
        rows = xp.zeros(position.shape, np.int32)
        self._write(name, xp, key, value, xp.where(position < length, position, -1), table[None], rows)
        return self

    def write_decodes_to_cache(self, key, value, metadata):
        """Write one token of each sequence.

        Parameters
        ----------
        key, value : ndarray [batch, num_kv_heads, head_dim]
            Rounded to the pages' dtype, or quantized.
        metadata : PagedAttentionMetadata
            Row b is token ``decodes_position[b]`` of its sequence, on page ``decodes_page_table[b, position //
            page_size]``; rows with a negative position are skipped.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            No decodes, shapes that do not fit; on NumPy arrays also a token without a page, on page 0, on a page that
            does not exist, or in the place of another. With CuPy arrays only the last is not seen; the others are not
            stored.
        """
        name = "PagedAttentionCacheView.write_decodes_to_cache"
        position, table = metadata.decodes_position, metadata.decodes_page_table
        if metadata.is_prefill_mode():
            raise ValueError(f"{name}: metadata must have decodes, got none")
        xp = array_namespace(name, key_pages=_an_array(self.key_pages), key=key, value=value, decodes_position=position,
                             decodes_page_table=table)
        check_shape(name, "decodes_position", position, key.shape[:1], "[batch]")
        check_shape(name, "decodes_page_table", table, (*key.shape[:1], None), "[batch, num_pages_per_sequence]")
        self._write(name, xp, key, value, position, table, xp.arange(len(position), dtype=np.int32))
        return self

    def _write(self, name, xp, key, value, position, table, rows):
        """Write tokens at `position` of the sequences in `rows` of `table`; those at negative ones are skipped."""
        heads, dim = self.metadata.num_kv_heads, self.metadata.kv_head_dim_size
        for label, new in (("key", key), ("value", value)):
            check_shape(name, label, new, (None, heads, dim), "[tokens, num_kv_heads, head_dim]")
        position = xp.where(position < 0, -1, position)
        if xp is np:
            written = np.flatnonzero(position >= 0)
            columns = np.minimum(position[written] // self.metadata.page_size, table.shape[1] - 1)
            if table.size and (table[rows[written], columns] == 0).any():
                raise ValueError(f"{name}: page table must not name page 0 where a token is written, it is reserved")
        kv_append(key, value, self.k_cache, self.v_cache, block_table=xp.where(table == 0, -1, table),
                  positions=position, batch_indices=rows)


@dataclass(eq=False, repr=False)
class PagedAttentionCache(Cache):
    """Pages of keys and values of all layers.

    Parameters
    ----------
    views : list of PagedAttentionCacheView or None

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> metadata = cupyattn.PagedAttentionCacheMetaData.create(None, 1, 2, 8, 4, 1, 8, 0.5, memory_bytes=4096)
    >>> metadata.num_pages_per_layer, metadata.num_pages_per_sequence
    (8, 2)
    >>> cache = cupyattn.PagedAttentionCache.init_cache(None, "float32", metadata)
    >>> table = np.int32(cupyattn.HBMPageManager(metadata).alloc_prefill_hbm_pages(5))
    >>> step = cupyattn.PagedAttentionMetadata.prefill(5, np.arange(8, dtype=np.int32), table)
    >>> x = np.ones((8, 1, 8), np.float32)                     # 5 tokens and padding
    >>> cache[0].write_prefill_to_cache(x, x, step).key_pages[0, :4, :, 0]
    array([[0., 0., 0., 0.],
           [1., 1., 1., 1.],
           [1., 0., 0., 0.],
           [0., 0., 0., 0.]], dtype=float32)
    """

    views: list[PagedAttentionCacheView | None]

    @classmethod
    def init_cache(cls, mesh=None, dtype="bfloat16", metadata=None, partition_manager=None, quantizer=None, *, xp=np):
        """A cache of zeros with pools of its own for every layer. See `PagedAttentionCacheView.init`."""
        check_given("PagedAttentionCache.init_cache", metadata=metadata)
        return cls([PagedAttentionCacheView.init(mesh, dtype, metadata, layer, partition_manager, quantizer, xp=xp)
                    for layer in range(metadata.num_hidden_layers)])


def _devices(op, mesh):
    """How many devices a mesh has."""
    if mesh is None:
        return 1
    number = mesh.devices.size if hasattr(mesh, "devices") else mesh
    check_number(op, "mesh", number, least=1, integer=True)
    return int(number)


def _memory(xp):
    """(bytes of memory, bytes in use) of the current device, or what the host has available and 0."""
    if xp is not np:
        free, total = xp.cuda.runtime.memGetInfo()
        return total, total - free - xp.get_default_memory_pool().free_bytes()
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024, 0


def _axes(array):
    """Axes of an array; a plain number has none."""
    return getattr(array, "ndim", 0)


def _absent(xp):
    return xp.full((), ABSENT, np.int32)


def _an_array(pages):
    """One array of what may be a QuantizedKV."""
    return pages.codes if isinstance(pages, QuantizedKV) else pages


def _as_cache(pages):
    return pages if isinstance(pages, QuantizedKV) else pages.transpose(1, 2, 0, 3)
