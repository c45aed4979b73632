# SPDX-License-Identifier: Apache-2.0
"""EasyDeL's paged attention cache: pools of pages for each layer, and where the tokens of a step go."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kv.quantized import QuantizedKV
from ..ops.kv_append import kv_append
from ..runtime.arrays import array_namespace
from ..runtime.checks import check_shape
from .base import Cache, Record, View, check_given, check_quantizer, is_array, one_array, zeros_pool
from .hbm_pages import PagedAttentionCacheMetaData
from .paged import PagedCache
from .paged_step import step_of

ABSENT = 1_000_000   # what stands, as an array without axes, where a step has no prefill or no decodes


@dataclass(eq=False, repr=False)
class PagedAttentionMetadata(Record):
    """Where the tokens of a step go; int32 arrays. What a step has not is an array without axes.

    A step with a prompt and decodes is made from all five; one of one kind by `prefill` or `decode`. What kernels need
    beyond them is worked out once for all layers of a step, which share the object. A layer that comes again begins
    another step, and so does assigning a field: between steps the arrays may be changed in place. A layer that made
    no call of the step before sees new contents of NumPy arrays, which are read; with CuPy arrays assign a field.

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

    _step = None   # the latest PagedStep

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name != "_step":
            self._step = None

    def __getstate__(self):
        return dict(self._items())

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
        return cls(metadata, layer_index, *(zeros_pool(name, shape, dtype, quantizer, xp) for _ in "kv"))

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
        array_namespace(name, key_pages=one_array(self.key_pages), key=key, value=value, prefill_position=position,
                        prefill_page_table=table, **lengths)
        check_shape(name, "prefill_position", position, key.shape[:1], "[chunk]")
        step = step_of(name, metadata, self, "prefill")
        return self._write(name, key, value, step, slice(step.chunk))

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
        array_namespace(name, key_pages=one_array(self.key_pages), key=key, value=value, decodes_position=position,
                        decodes_page_table=table)
        check_shape(name, "decodes_position", position, key.shape[:1], "[batch]")
        step = step_of(name, metadata, self, "decodes")
        return self._write(name, key, value, step, slice(step.chunk, None))

    def _write(self, name, key, value, step, tokens=slice(None)):
        """Write the `tokens` of a PagedStep in one launch, for the method `name`; returns self."""
        heads, dim = self.metadata.num_kv_heads, self.metadata.kv_head_dim_size
        for label, new in (("key", key), ("value", value)):
            check_shape(name, label, new, (None, heads, dim), "[tokens, num_kv_heads, head_dim]")
        kv_append(key, value, self.k_cache, self.v_cache, **step.places(name, tokens))
        return self


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

    def paged_cache(self, manager):
        """These pages as a `PagedCache`, whose other methods, and `QAttn.forward`, then work on them.

        Its `step` makes room for sequences of ``manager.pages``, which share what they begin with, and its `defragment`
        gives them pages in a row. Page 0 and pages held as lists stay where they are.

        Parameters
        ----------
        manager : HBMPageManager

        Returns
        -------
        PagedCache
            Over the arrays the views have now.
        """
        views = [self.view_of(layer) for layer in range(len(self))]
        return PagedCache.over([view.k_cache for view in views], [view.v_cache for view in views], manager.pages)

    @classmethod
    def init_empty(cls, num_hidden_layers=0, *args, **kwargs):
        """A cache of layers that have no view yet; EasyDeL takes any arguments here and returns None."""
        return super().init_empty(num_hidden_layers)


def _axes(array):
    """Axes of an array; a plain number has none."""
    return getattr(array, "ndim", 0)


def _absent(xp):
    return xp.full((), ABSENT, np.int32)


def _as_cache(pages):
    return pages if isinstance(pages, QuantizedKV) else pages.transpose(1, 2, 0, 3)
