# SPDX-License-Identifier: Apache-2.0
"""EasyDeL's transformer cache: keys and values of every sequence in one row of slots."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..devices import to_host
from ..kv.quantized import QuantizedKV
from ..ops.kv_append import kv_append
from ..runtime.arrays import array_namespace
from ..runtime.checks import check_flag, check_number, check_shape
from .base import Cache, Record, View, advanced, check_given, check_positive, check_quantizer, is_array, zeros_pool
from .visibility import check_masks, visible_slots

_CONCATENATE = "TransformerCacheView.concatenate_to_cache"


@dataclass(eq=False, repr=False)
class TransformerCacheMetaData(Record):
    """Sizes of a transformer cache.

    Parameters
    ----------
    batch_size : int
        Sequences the cache holds.
    sequence_length : int
        Tokens of each.
    num_hidden_layers, pad_token_id : int
    num_heads, head_dim : int, optional
    key_heads, value_heads, key_dim, value_dim : int
        Of keys and values.
    update_causal_mask, create_attention_bias : bool
        Kept, like pad_token_id, for whoever asks; the cache does not.
    """

    batch_size: int
    sequence_length: int
    num_hidden_layers: int
    pad_token_id: int
    num_heads: int | None
    head_dim: int | None
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    update_causal_mask: bool
    create_attention_bias: bool

    @classmethod
    def create(cls, batch_size, sequence_length, num_hidden_layers, pad_token_id, num_heads=None, head_dim=None,
               key_heads=None, value_heads=None, key_dim=None, value_dim=None, update_causal_mask=True,
               create_attention_bias=True):
        """The metadata, checked: num_heads and head_dim are what keys and values have unless told otherwise.

        Raises
        ------
        ValueError
            batch_size or sequence_length is not positive, or heads or dims are missing; 0 counts as missing.
        """
        name = "TransformerCacheMetaData.create"
        check_positive(name, batch_size=batch_size, sequence_length=sequence_length)
        key_dim, value_dim = key_dim or head_dim, value_dim or head_dim
        if not (key_dim and value_dim):
            raise ValueError(f"{name}: Either head_dim or both key_dim and value_dim must be specified")
        key_heads, value_heads = key_heads or num_heads, value_heads or num_heads
        if not (key_heads and value_heads):
            raise ValueError(f"{name}: Either num_heads or both key_heads and value_heads must be specified")
        check_positive(name, key_heads=key_heads, value_heads=value_heads, key_dim=key_dim, value_dim=value_dim)
        return cls(batch_size, sequence_length, num_hidden_layers, pad_token_id, num_heads, head_dim, key_heads,
                   value_heads, key_dim, value_dim, update_causal_mask, create_attention_bias)


@dataclass(eq=False, repr=False)
class TransformerCacheView(View):
    """Keys and values of one layer; every sequence is as long as its `index` says.

    Parameters
    ----------
    key : ndarray or QuantizedKV [batch, sequence_length, key_heads, key_dim]
        What `attention` and `paged_decode` take as a cache with one page for each sequence, `block_table`.
    value : ndarray or QuantizedKV [batch, sequence_length, value_heads, value_dim]
    index : ndarray [batch], int32
        Tokens of each sequence, which is where the next one goes; `cache_seqlens` of the ops.
    starts : ndarray [batch], int32
        Pad tokens each sequence begins with; `cache_starts` of the ops.
    metadata : TransformerCacheMetaData
    layer_index : int, optional
    """

    key: Any
    value: Any
    index: Any
    starts: Any
    metadata: TransformerCacheMetaData
    layer_index: int | None = None

    @classmethod
    def init(cls, mesh=None, dtype="bfloat16", metadata=None, quantizer=None, partition_manager=None, starts=None,
             layer_index=None, *, xp=np):
        """A view of zeros.

        Parameters
        ----------
        mesh, partition_manager : optional
            Mean nothing here.
        dtype : dtype
            float16, bfloat16 or float32; with a quantizer that of the activations.
        metadata : TransformerCacheMetaData
        quantizer : str, optional
            A format of `QuantizedKV`; TypeError for anything else.
        starts : int array [batch], optional
            Default zeros.
        layer_index : int, optional
        xp : numpy or cupy
        """
        name = "TransformerCacheView.init"
        check_given(name, metadata=metadata)
        check_quantizer(name, quantizer)
        if quantizer is not None and metadata.key_heads != metadata.value_heads:
            raise ValueError(f"{name}: value_heads must be key_heads = {metadata.key_heads} with a quantizer, got "
                             f"{metadata.value_heads}")
        rows = metadata.batch_size, metadata.sequence_length
        starts = np.zeros(rows[0], np.int32) if starts is None else _counts(name, "starts", starts, rows[1])
        check_shape(name, "starts", starts, rows[:1], "[batch]")
        return cls(key=zeros_pool(name, (*rows, metadata.key_heads, metadata.key_dim), dtype, quantizer, xp),
                   value=zeros_pool(name, (*rows, metadata.value_heads, metadata.value_dim), dtype, quantizer, xp),
                   index=xp.zeros(rows[:1], np.int32), starts=xp.array(starts), metadata=metadata,
                   layer_index=layer_index)

    @property
    def is_empty(self):
        """Whether there are no keys and values."""
        return self.key is None

    @property
    def block_table(self):
        """Page table [batch, 1] for the ops: page b is sequence b."""
        xp = array_namespace("TransformerCacheView", index=self.index)
        return xp.arange(len(self.index), dtype=np.int32)[:, None]

    def concatenate_to_cache(self, query, key, value, quantizer=None, cache_metadata=None, attention_mask=None,
                             partition_manager=None, causal_mask=None, token_type_ids=None, *, window_size=0,
                             return_view=False):
        """Write new tokens behind those each sequence has, and say which slots their queries see.

        Query t of sequence b is at position ``index[b] + t`` and sees slot s where all of these hold:
        ``s < index[b] + T``; `attention_mask` is true; `causal_mask` is true and s is in the window, or t and s are
        new tokens of one type. So without a causal mask new tokens see each other, whatever their order.

        Parameters
        ----------
        query : ndarray [batch, T, ...]
            Only T is read.
        key : ndarray [batch, T, key_heads, key_dim], float16, bfloat16 or float32
            Rounded to the cache's dtype, or quantized.
        value : ndarray [batch, T, value_heads, value_dim], dtype of key
        quantizer : str, optional
            The format the view has.
        cache_metadata, partition_manager : optional
            Mean nothing here.
        attention_mask : ndarray [batch, sequence_length], or broadcastable to [batch, 1, T, sequence_length], optional
            bool or integers. Left padding is false here.
        causal_mask : ndarray [1 or batch, 1, rows, sequence_length], bool or integers, optional
            Row p is for a query at position p.
        token_type_ids : ndarray [batch, T], integers, optional
            Types of the new tokens, 0 for none.
        window_size : int
            Of W > 0 tokens, the query's own and the W - 1 before it: ``position - W < s <= position``.
        return_view : bool
            Leave this view as it is and return a new one.

        Returns
        -------
        key, value : the view's, new tokens included
        mask : ndarray [batch, 1, T, sequence_length], bool
            A row may see nothing (a pad token's query); `attention` gives zeros for it.
        view : TransformerCacheView
            With ``return_view=True``.

        Raises
        ------
        ValueError
            Shapes that do not fit; on NumPy arrays also a sequence that would outgrow the cache. With CuPy arrays such
            tokens are not stored. Nothing is changed then.

        Notes
        -----
        Kernel: ``cuda_src/kv_append.cu``. Attention itself is faster with ``cache_seqlens=view.index,
        cache_starts=view.starts`` and `window_size` than with the mask.
        """
        masks = {"attention_mask": attention_mask, "causal_mask": causal_mask, "token_type_ids": token_type_ids}
        xp = array_namespace(_CONCATENATE, index=self.index, query=query, key=key, value=value, **masks)
        self._check_new(query, key, value, quantizer)
        check_number(_CONCATENATE, "window_size", window_size, least=0, integer=True)
        check_flag(_CONCATENATE, "return_view", return_view)
        tokens, capacity = query.shape[1], self.key.shape[1]
        check_masks(_CONCATENATE, (len(self.index), tokens, capacity), **masks)
        if xp is np and tokens and len(self.index):
            self._check_room(tokens, causal_mask)
        mask = visible_slots(xp, self.index, tokens, capacity, window_size=window_size, **masks)
        view = self.copy() if return_view else self
        view._append(key, value)
        return (view.key, view.value, mask, view) if return_view else (view.key, view.value, mask)

    def _check_new(self, query, key, value, quantizer):
        """New tokens fit the view's shapes."""
        check_quantizer(_CONCATENATE, quantizer)
        if self.is_empty:
            raise ValueError(f"{_CONCATENATE}: key of the view must be an array, got None")
        found = self.key.format if isinstance(self.key, QuantizedKV) else None
        if quantizer not in (None, found):
            raise ValueError(f"{_CONCATENATE}: quantizer must be None or the view's, {found}, got {quantizer}")
        batch, tokens = len(self.index), query.shape[1] if len(query.shape) > 1 else None
        if tokens is None or query.shape[0] != batch:
            raise ValueError(f"{_CONCATENATE}: query must be [batch = {batch}, T, ...], got {list(query.shape)}")
        for name, new, held in (("key", key, self.key), ("value", value, self.value)):
            check_shape(_CONCATENATE, name, new, (batch, tokens, *held.shape[2:]), "[batch, T, heads, dim]")

    def _check_room(self, tokens, causal_mask):
        """The longest sequence and `tokens` more fit the cache and the causal mask."""
        capacity, longest = self.key.shape[1], int(self.index.max())
        if longest + tokens > capacity:
            raise ValueError(f"{_CONCATENATE}: index + T must be at most sequence_length = {capacity}, got "
                             f"{longest} + {tokens}")
        if causal_mask is not None and longest + tokens > causal_mask.shape[2]:
            raise ValueError(f"{_CONCATENATE}: causal_mask must have a row for each position up to {longest + tokens}, "
                             f"got {causal_mask.shape[2]}")

    def _append(self, key, value):
        """Write [batch, T, heads, dim] at each sequence's index and move it on."""
        batch, tokens = key.shape[:2]
        if not batch * tokens:
            return
        rows, caches = (key, value), (self.key, self.value)
        if key.shape[2] != value.shape[2]:   # plain copies: a row of all heads is as good as one of a head
            rows, caches = ([a.reshape(*a.shape[:2], 1, -1) for a in pair] for pair in (rows, caches))
        kv_append(*(a.reshape(batch * tokens, *a.shape[2:]) for a in rows), *caches, block_table=self.block_table,
                  positions=self.index, q_len=tokens)
        self.index = advanced(self.index, tokens)

    def _check_insert(self, other, slot):
        """The sequences of `other` fit at `slot`."""
        name = "TransformerCache.insert"
        _check_slot(name, slot, len(other.index), len(self.index))
        for part in ("key", "value"):
            here, there = getattr(self, part), getattr(other, part)
            formats = [a.format if isinstance(a, QuantizedKV) else "plain" for a in (here, there)]
            if formats[0] != formats[1]:
                raise ValueError(f"{name}: {part} of other must be {formats[0]}, got {formats[1]}")
            if there.shape[1] > here.shape[1] or there.shape[2:] != here.shape[2:]:
                raise ValueError(f"{name}: {part} of other must have {list(here.shape[2:])} behind at most "
                                 f"{here.shape[1]} tokens, got {list(there.shape)}")
            for (label, a), b in zip(_parts(here), (b for _, b in _parts(there)), strict=True):
                array_namespace(name, **{f"{part}.{label}": a, f"other.{part}.{label}": b})
            if formats[0] != "plain" and here.granularity not in ("token", "group") and not np.array_equal(
                    to_host(here.scale), to_host(there.scale)):
                raise ValueError(f"{name}: {part} of other must have the scales of this cache, got others")

    def _insert(self, other, slot):
        """Copy the sequences of `other` to `slot` and those behind it."""
        rows = slice(slot, slot + len(other.index))
        for here, there in ((self.key, other.key), (self.value, other.value)):
            for (_, a), (_, b) in zip(_parts(here), _parts(there), strict=True):
                a[rows, :b.shape[1]] = b
        self.index[rows], self.starts[rows] = other.index, other.starts


@dataclass(eq=False, repr=False)
class TransformerCache(Cache):
    """Keys and values of all layers.

    Parameters
    ----------
    views : list of TransformerCacheView or None

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> metadata = cupyattn.TransformerCacheMetaData.create(2, 4, 1, 0, num_heads=1, head_dim=8)
    >>> cache = cupyattn.TransformerCache.init_cache(metadata=metadata, dtype="float32")
    >>> _ = cache.insert_index(2, 1)                        # sequence 1 has two tokens already
    >>> x = np.ones((2, 1, 1, 8), np.float32)
    >>> key, value, mask = cache[0].concatenate_to_cache(x, x, x)
    >>> key[:, :, 0, 0]
    array([[1., 0., 0., 0.],
           [0., 0., 1., 0.]], dtype=float32)
    >>> mask[:, 0, 0]
    array([[ True, False, False, False],
           [ True,  True,  True, False]])
    """

    views: list[TransformerCacheView | None]

    @classmethod
    def init_cache(cls, mesh=None, metadata=None, partition_manager=None, dtype=None, starts=None, quantizer=None, *,
                   xp=np):
        """A cache of zeros, bfloat16 unless `dtype` says otherwise. See `TransformerCacheView.init`."""
        check_given("TransformerCache.init_cache", metadata=metadata)
        return cls([TransformerCacheView.init(mesh, dtype or "bfloat16", metadata, quantizer, partition_manager, starts,
                                              layer, xp=xp) for layer in range(metadata.num_hidden_layers)])

    def insert(self, other, slot, quantizer=None, partition_manager=None):
        """Copy the sequences of another cache to `slot` and those behind it, in every layer.

        Parameters
        ----------
        other : TransformerCache
            As many layers, heads and dims; its sequences may have fewer slots, then the others keep what they hold.
        slot : int
            IndexError unless its sequences fit from there on.
        quantizer : str, optional
            A format of `QuantizedKV`; both caches have theirs already, and it must be the same.
        partition_manager : optional
            Means nothing here.

        Returns
        -------
        self
        """
        check_quantizer("TransformerCache.insert", quantizer)
        if len(other) != len(self):
            raise ValueError(f"TransformerCache.insert: other must have {len(self)} layers, got {len(other)}")
        pairs = [(self.view_of(layer), other.view_of(layer)) for layer in range(len(self))]
        for here, there in pairs:
            here._check_insert(there, slot)
        for here, there in pairs:
            here._insert(there, slot)
        return self

    def insert_index(self, index, slot, partition_manager=None):
        """Set how many tokens the sequences from `slot` on have, in every layer.

        Parameters
        ----------
        index : int or int array
            Between 0 and sequence_length (ValueError); a CuPy array is not read.
        slot : int
            IndexError unless all of `index` fits from there on.
        partition_manager : optional
            Means nothing here.

        Returns
        -------
        self
        """
        return self._insert_counts("index", index, slot)

    def insert_starts(self, starts, slot, partition_manager=None):
        """Set how many pad tokens the sequences from `slot` on begin with, as `insert_index` does. Returns self."""
        return self._insert_counts("starts", starts, slot)

    def _insert_counts(self, field, values, slot):
        name = f"TransformerCache.insert_{field}"
        views = [self.view_of(layer) for layer in range(len(self))]
        held = [getattr(view, field) for view in views]
        if not is_array(values) or isinstance(values, np.ndarray):
            values = _counts(name, field, values, min(
                (view.key.shape[1] for view in views if not view.is_empty), default=2**31 - 1))
        values = values.reshape(-1)
        for array in held:
            _check_slot(name, slot, len(values), len(array))
        for array in held:
            array[slot:slot + len(values)] = array_namespace(name, held=array).asarray(values)
        return self


@dataclass(eq=False, repr=False)
class TransformerMetadata(Record):
    """What a transformer layer is told of a step.

    Parameters
    ----------
    postpadded : bool
    index : int or ndarray, optional
    """

    postpadded: bool = False
    index: Any = None


def _counts(op, name, values, most):
    """Integers between 0 and `most` as a new int32 NumPy array."""
    values = to_host(values)
    if values.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name} must be integers, got {values.dtype.name}")
    wrong = values[(values < 0) | (values > most)]
    if wrong.size:
        raise ValueError(f"{op}: {name} must be between 0 and sequence_length = {most}, got {wrong[0]}")
    return values.astype(np.int32)


def _check_slot(op, slot, count, batch):
    check_number(op, "slot", slot, integer=True)
    if not 0 <= slot <= batch - count:
        raise IndexError(f"{op}: slot must be in [0, {batch - count}], so that {count} of {batch} sequences fit, got "
                         f"{slot}")


def _parts(cache):
    """The arrays [batch, sequence_length, ...] of keys or values, with names."""
    return cache.arrays_in_pages.items() if isinstance(cache, QuantizedKV) else [("array", cache)]
