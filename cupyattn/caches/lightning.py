# SPDX-License-Identifier: Apache-2.0
"""EasyDeL's cache for Lightning attention: one running state for each head, whatever the length."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops.lightning_attention import lightning_attention
from ..runtime.arrays import array_namespace
from ..runtime.checks import check_flag, check_shape
from .base import Cache, Record, View, check_positive, check_quantizer

_CONCATENATE = "LightningCacheView.concatenate_to_cache"


@dataclass(eq=False, repr=False)
class LightningCacheMetaData(Record):
    """Sizes of a Lightning attention cache; what is None is whatever the first keys and values have.

    Parameters
    ----------
    partition_axis : object
        Kept, means nothing here.
    batch_size : int, optional
    num_heads, head_dim : int, optional
        Of queries, and of keys and values unless told otherwise.
    key_heads, value_heads, key_dim, value_dim : int, optional
    """

    partition_axis: Any
    batch_size: int | None
    num_heads: int | None
    head_dim: int | None
    key_heads: int | None
    value_heads: int | None
    key_dim: int | None
    value_dim: int | None

    @classmethod
    def create(cls, partition_axis=None, batch_size=None, num_heads=None, head_dim=None, key_heads=None,
               value_heads=None, key_dim=None, value_dim=None):
        """The metadata; sizes that are given must be positive (ValueError)."""
        sizes = {"batch_size": batch_size, "num_heads": num_heads, "head_dim": head_dim, "key_heads": key_heads,
                 "value_heads": value_heads, "key_dim": key_dim, "value_dim": value_dim}
        check_positive("LightningCacheMetaData.create",
                       **{name: size for name, size in sizes.items() if size is not None})
        return cls(partition_axis, **sizes)

    @property
    def query_shape(self):
        """[batch, T, heads, dim] of queries; None where nothing is said."""
        return self.batch_size, None, self.num_heads, self.key_dim or self.head_dim

    @property
    def key_shape(self):
        """The same of keys."""
        return self.batch_size, None, self.key_heads or self.num_heads, self.key_dim or self.head_dim

    @property
    def value_shape(self):
        """The same of values."""
        return self.batch_size, None, self.value_heads or self.num_heads, self.value_dim or self.head_dim


@dataclass(eq=False, repr=False)
class LightningCacheView(View):
    """What a layer of Lightning attention keeps.

    Parameters
    ----------
    key_value : ndarray [batch, heads, key_dim, value_dim], float32, or None
        The faded sum of ``outer(key, value)`` over the tokens so far; None before the first.
    metadata : LightningCacheMetaData
    layer_index : int, optional
    """

    key_value: Any
    metadata: LightningCacheMetaData
    layer_index: int | None = None

    @classmethod
    def init(cls, metadata, layer_index=None):
        """A view without a state; the first keys and values make one, of their kind of arrays."""
        return cls(None, metadata, layer_index)

    def concatenate_to_cache(self, query, key, value, attention_mask=None, kv_sharding=None, quantizer=None,
                             causal_mask=None, token_type_ids=None, *, slopes=None, scale=1.0, return_output=False):
        """Let the state fade and add the new tokens' keys and values to it, in place.

        For each new token and head: ``key_value <- exp(-slope) * key_value + outer(key, value)``.

        Parameters
        ----------
        query, key : ndarray [batch, T, heads, key_dim], float16, bfloat16 or float32
            After the model's activation; key_dim and value_dim are multiples of 8 up to 256.
        value : ndarray [batch, T, heads, value_dim], dtype of query
        attention_mask : ndarray [batch, T], bool or integers, optional
            False: the token adds nothing, and the state fades all the same. Left padding of fresh sequences is exact.
        kv_sharding, causal_mask, token_type_ids : optional
            Mean nothing here: the attention is causal by itself.
        quantizer : optional
            None: the state stays float32.
        slopes : ndarray [heads], float32
            Decay of each head, see `lightning_slopes`.
        scale : float
            Of the output.
        return_output : bool
            Also return what `lightning_attention` made of the queries.

        Returns
        -------
        key, value, attention_mask : as given
        output : ndarray [batch, T, heads, value_dim], dtype of query
            With ``return_output=True``.

        Raises
        ------
        ValueError
            No slopes, or shapes that do not fit each other, the state or the metadata; nothing is changed then.
        TypeError
            A quantizer that is no format of `QuantizedKV`. NotImplementedError for one that is.

        Notes
        -----
        Kernel: ``cuda_src/lightning_attention.cu``.
        """
        if slopes is None:
            raise ValueError(f"{_CONCATENATE}: slopes must be given, e.g. cupyattn.lightning_slopes(num_heads, layer, "
                             "num_layers)")
        check_quantizer(_CONCATENATE, quantizer)
        if quantizer is not None:
            raise NotImplementedError(f"{_CONCATENATE}: quantizer must be None, the state is float32; got {quantizer}")
        check_flag(_CONCATENATE, "return_output", return_output)
        xp = array_namespace(_CONCATENATE, query=query, key=key, value=value, slopes=slopes, key_value=self.key_value,
                             attention_mask=attention_mask)
        axes, facts = "[batch, T, heads, dim]", self.metadata
        for name, new, shape in (("query", query, facts.query_shape), ("key", key, facts.key_shape),
                                 ("value", value, facts.value_shape)):
            check_shape(_CONCATENATE, name, new, shape, axes)
        batch, tokens, heads, key_dim = query.shape
        check_shape(_CONCATENATE, "key", key, query.shape, axes)
        check_shape(_CONCATENATE, "value", value, (batch, tokens, heads, None), axes)
        state = self.key_value
        if state is None:
            state = xp.zeros((batch, heads, key_dim, value.shape[3]), np.float32)
        check_shape(_CONCATENATE, "key_value of the view", state, (batch, heads, key_dim, value.shape[3]),
                    "[batch, heads, key_dim, value_dim]")
        mask = None
        if attention_mask is not None:
            check_shape(_CONCATENATE, "attention_mask", attention_mask, (batch, tokens), "[batch, T]")
            mask = (attention_mask != 0).reshape(-1)
        starts = xp.arange(0, batch * tokens + 1, tokens, dtype=np.int32) if tokens > 1 else None
        output = lightning_attention(*(new.reshape(batch * tokens, *new.shape[2:]) for new in (query, key, value)),
                                     state, slopes, scale=scale, cu_seqlens=starts, mask=mask)
        self.key_value = state
        found = key, value, attention_mask
        return (*found, output.reshape(value.shape)) if return_output else found

    def reset(self):
        """Zero the state. Returns self."""
        if self.key_value is not None:
            self.key_value.fill(0)
        return self


@dataclass(eq=False, repr=False)
class LightningCache(Cache):
    """The states of all layers.

    Parameters
    ----------
    views : list of LightningCacheView or None

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> cache = cupyattn.LightningCache.init_cache(2, cupyattn.LightningCacheMetaData.create())
    >>> x = np.ones((1, 3, 1, 8), np.float32)                   # three tokens, one head
    >>> halving = np.log(np.float32([2]))
    >>> *_, output = cache[1].concatenate_to_cache(x, x, x, slopes=halving, return_output=True)
    >>> cache[1].key_value[0, 0, 0, 0], output[0, :, 0, 0]     # 1, 1 + 1/2, 1 + 1/2 + 1/4, each times 8 dims
    (np.float32(1.75), array([ 8., 12., 14.], dtype=float32))
    """

    views: list[LightningCacheView | None]

    @classmethod
    def init_cache(cls, num_hidden_layers, metadata):
        """A cache without states; see `LightningCacheView.init`."""
        return cls([LightningCacheView.init(metadata, layer) for layer in range(num_hidden_layers)])

    def reset(self):
        """Zero the states of all layers. Returns self."""
        for view in self.views:
            if view is not None:
                view.reset()
        return self


@dataclass(eq=False, repr=False)
class LightningMetadata(Record):
    """What a layer of Lightning attention is told of a step: nothing."""
