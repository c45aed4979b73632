# SPDX-License-Identifier: Apache-2.0
"""EasyDeL's Mamba-2 cache."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.checks import check_number
from .base import Record, advanced, check_given, check_positive
from .recurrent import RecurrentCache, RecurrentView


@dataclass(eq=False, repr=False)
class Mamba2CacheMetaData(Record):
    """Sizes of a Mamba-2 cache.

    Parameters
    ----------
    partition_axis : object
        Kept, means nothing here.
    num_hidden_layers, batch_size : int
    intermediate_size : int
        num_heads * head_dim.
    num_heads, head_dim, state_size, conv_kernel_size : int
    n_groups : int
        Groups of heads that share B and C; divides num_heads.
    """

    partition_axis: Any
    num_hidden_layers: int
    batch_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    state_size: int
    conv_kernel_size: int
    n_groups: int

    @classmethod
    def create(cls, parition_axis=None, num_hidden_layers=None, batch_size=None, intermediate_size=None,
               num_heads=None, head_dim=None, state_size=None, conv_kernel_size=None, n_groups=None, *,
               partition_axis=None):
        """The metadata, checked; EasyDeL spells the first argument so, `partition_axis` is the same.

        Raises
        ------
        ValueError
            A size other than num_hidden_layers is not positive, or they do not fit each other.
        TypeError
            Both spellings are given, or a size is missing or no integer.
        """
        name = "Mamba2CacheMetaData.create"
        if parition_axis is not None and partition_axis is not None:
            raise TypeError(f"{name}: partition_axis must be given once, got parition_axis too")
        sizes = {"batch_size": batch_size, "intermediate_size": intermediate_size, "num_heads": num_heads,
                 "head_dim": head_dim, "state_size": state_size, "conv_kernel_size": conv_kernel_size,
                 "n_groups": n_groups}
        check_given(name, num_hidden_layers=num_hidden_layers, **sizes)
        check_positive(name, **sizes)
        if num_heads * head_dim != intermediate_size:
            raise ValueError(f"{name}: intermediate_size must be num_heads * head_dim = {num_heads * head_dim}, got "
                             f"{intermediate_size}")
        if num_heads % n_groups:
            raise ValueError(f"{name}: n_groups must divide num_heads = {num_heads}, got {n_groups}")
        return cls(partition_axis=partition_axis if parition_axis is None else parition_axis,
                   num_hidden_layers=num_hidden_layers, **sizes)

    @property
    def conv_shape(self):
        """Shape of the window of a layer: x, B and C pass through the convolution."""
        channels = self.intermediate_size + 2 * self.n_groups * self.state_size
        return self.batch_size, channels, self.conv_kernel_size

    @property
    def ssm_shape(self):
        """Shape of the recurrent state of a layer."""
        return self.batch_size, self.num_heads, self.head_dim, self.state_size


@dataclass(eq=False, repr=False)
class Mamba2CacheView(RecurrentView):
    """What a Mamba-2 layer keeps; `init` makes one of zeros, methods write in place and return it.

    Parameters
    ----------
    conv_states : ndarray [batch, intermediate_size + 2 * n_groups * state_size, conv_kernel_size]
        The last inputs of the convolution, the newest last.
    ssm_states : ndarray [batch, num_heads, head_dim, state_size]
    positions : ndarray [batch], int32
    seqlen_offset : int
        Tokens seen.
    metadata : Mamba2CacheMetaData
    layer_index : int, optional
    """

    conv_states: Any
    ssm_states: Any
    positions: Any
    seqlen_offset: int
    metadata: Mamba2CacheMetaData
    layer_index: int | None = None

    _begins_with = {"seqlen_offset": 0}

    def reset(self, *, positions=False):
        """Zero the window and the state, with `positions` also positions and seqlen_offset. Returns self."""
        if positions:
            self.seqlen_offset = 0
        return super().reset(positions=positions)


@dataclass(eq=False, repr=False)
class Mamba2Cache(RecurrentCache):
    """What the layers of a Mamba-2 model keep.

    Parameters
    ----------
    views : list of Mamba2CacheView or None

    Examples
    --------
    >>> import cupyattn
    >>> metadata = cupyattn.Mamba2CacheMetaData.create(None, 2, 3, 8, 4, 2, 16, 4, 2)
    >>> cache = cupyattn.Mamba2Cache.init_cache(2, metadata)
    >>> cache.update_seq(5)[1].positions, cache[1].seqlen_offset
    (array([5, 5, 5], dtype=int32), 5)
    """

    views: list[Mamba2CacheView | None]

    @classmethod
    def init_cache(cls, num_hidden_layers, metadata, dtype=None, partition_specs=None, *, ssm_dtype="float32", xp=np):
        """A cache of zeros; the windows are bfloat16 unless `dtype` says otherwise. See `Mamba2CacheView.init`."""
        return cls([Mamba2CacheView.init(metadata, partition_specs, dtype or "bfloat16", layer, ssm_dtype=ssm_dtype,
                                         xp=xp) for layer in range(num_hidden_layers)])

    def update_seq(self, num):
        """Every sequence is `num` tokens further, in every layer that has a view. Returns self."""
        check_number("Mamba2Cache.update_seq", "num", num, integer=True)
        for view in self.views:
            if view is not None:
                view.positions = advanced(view.positions, num)
                view.seqlen_offset += num
        return self


@dataclass(eq=False, repr=False)
class Mamba2Metadata(Record):
    """What a Mamba-2 layer is told of a step: nothing."""
