# SPDX-License-Identifier: Apache-2.0
"""EasyDeL's Mamba cache."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Record, check_given, check_positive
from .recurrent import RecurrentCache, RecurrentView


@dataclass(eq=False, repr=False)
class MambaCacheMetaData(Record):
    """Sizes of a Mamba cache.

    Parameters
    ----------
    num_hidden_layers : int
    partition_axis : object
        Kept, means nothing here.
    batch_size : int
        Sequences, or slots of the pools of states.
    intermediate_size : int
        Channels.
    ssm_state_size : int
    conv_kernel_size : int
        Width of the convolution.
    """

    num_hidden_layers: int
    partition_axis: Any
    batch_size: int
    intermediate_size: int
    ssm_state_size: int
    conv_kernel_size: int

    @classmethod
    def create(cls, num_hidden_layers=None, partition_axis=None, batch_size=None, intermediate_size=None,
               ssm_state_size=None, conv_kernel_size=None):
        """The metadata, checked: sizes other than num_hidden_layers must be positive (ValueError)."""
        sizes = {"batch_size": batch_size, "intermediate_size": intermediate_size, "ssm_state_size": ssm_state_size,
                 "conv_kernel_size": conv_kernel_size}
        check_given("MambaCacheMetaData.create", num_hidden_layers=num_hidden_layers, **sizes)
        check_positive("MambaCacheMetaData.create", **sizes)
        return cls(num_hidden_layers=num_hidden_layers, partition_axis=partition_axis, **sizes)

    @property
    def conv_shape(self):
        """Shape of the window of a layer."""
        return self.batch_size, self.intermediate_size, self.conv_kernel_size

    @property
    def ssm_shape(self):
        """Shape of the recurrent state of a layer."""
        return self.batch_size, self.intermediate_size, self.ssm_state_size


@dataclass(eq=False, repr=False)
class MambaCacheView(RecurrentView):
    """What a Mamba layer keeps; `init` makes one of zeros, methods write in place and return it.

    Parameters
    ----------
    conv_states : ndarray [batch, intermediate_size, conv_kernel_size]
        The last inputs of the convolution, the newest last.
    ssm_states : ndarray [batch, intermediate_size, ssm_state_size]
    positions : ndarray [batch], int32
    metadata : MambaCacheMetaData
    layer_index : int, optional
    """

    conv_states: Any
    ssm_states: Any
    positions: Any
    metadata: MambaCacheMetaData
    layer_index: int | None = None


@dataclass(eq=False, repr=False)
class MambaCache(RecurrentCache):
    """What the layers of a Mamba model keep.

    Parameters
    ----------
    views : list of MambaCacheView or None

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> metadata = cupyattn.MambaCacheMetaData.create(2, None, 1, 1, 16, 4)
    >>> cache = cupyattn.MambaCache.init_cache(metadata, "float32")
    >>> for x in (1, 2, 3):
    ...     cache = cache.append_conv_state(0, np.full((1, 1), x, np.float32))
    >>> cache[0].conv_states[0, 0]
    array([0., 1., 2., 3.], dtype=float32)
    >>> cupyattn.MambaCache.from_json(cache.to_json()) == cache
    True
    """

    views: list[MambaCacheView | None]

    @classmethod
    def init_cache(cls, metadata, dtype=None, partition_specs=None, *, ssm_dtype="float32", xp=np):
        """A cache of zeros; the windows are bfloat16 unless `dtype` says otherwise. See `MambaCacheView.init`."""
        return cls([MambaCacheView.init(metadata, partition_specs, dtype or "bfloat16", layer, ssm_dtype=ssm_dtype,
                                        xp=xp) for layer in range(metadata.num_hidden_layers)])


@dataclass(eq=False, repr=False)
class MambaMetadata(Record):
    """What a Mamba layer is told of a step: nothing."""
