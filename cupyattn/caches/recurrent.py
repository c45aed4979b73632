# SPDX-License-Identifier: Apache-2.0
"""What Mamba's and Mamba-2's caches have in common: a window of the convolution's inputs and a recurrent state."""

import numpy as np

from ..devices import to_host
from ..runtime.arrays import array_namespace
from .base import Cache, View, check_given, float_dtype


class RecurrentView(View):
    """Window ``conv_states [slots, channels, width]``, newest input last, and ``ssm_states [slots, ...]``.

    The arrays are what `causal_conv1d` and `selective_scan` take as pools of states; methods write them in place.
    """

    _begins_with = {}   # fields that only one of the classes has

    @classmethod
    def init(cls, metadata=None, partition_specs=None, dtype="bfloat16", layer_index=None, *, ssm_dtype="float32",
             xp=np):
        """A view of zeros.

        Parameters
        ----------
        metadata : MambaCacheMetaData or Mamba2CacheMetaData
        partition_specs : optional
            Means nothing here.
        dtype : dtype
            Of the window: float16, bfloat16 or float32.
        layer_index : int, optional
        ssm_dtype : dtype
            Of the recurrent state, whose roundings add up over time: float32 whatever `dtype` is, unless chosen.
        xp : numpy or cupy
        """
        name = f"{cls.__name__}.init"
        check_given(name, metadata=metadata)
        return cls(conv_states=xp.zeros(metadata.conv_shape, float_dtype(name, "dtype", dtype)),
                   ssm_states=xp.zeros(metadata.ssm_shape, float_dtype(name, "ssm_dtype", ssm_dtype)),
                   positions=xp.zeros((metadata.batch_size,), np.int32), metadata=metadata, layer_index=layer_index,
                   **cls._begins_with)

    def update_conv_state(self, new_conv_state, cache_position):
        """Shift the window left by one, then overwrite columns.

        Parameters
        ----------
        new_conv_state : ndarray [slots, channels], or [slots, channels, n] for n positions
        cache_position : int or int array [n]
            Columns, brought into 0 .. width - 1 first; of equal ones the last wins. A CuPy array is read by the host.
            Below width - 1 the oldest input stands after the new one: use `append_conv_state` to go on with a window.

        Returns
        -------
        self
        """
        name = f"{type(self).__name__}.update_conv_state"
        width = self.conv_states.shape[2]
        columns = np.clip(to_host(cache_position).astype(np.int64), 0, width - 1)
        if columns.ndim > 1:
            raise ValueError(f"{name}: cache_position must be a number or [n], got {list(columns.shape)}")
        _check_new(name, "new_conv_state", new_conv_state, self.conv_states.shape[:2] + columns.shape, self.conv_states)
        if columns.tolist() == list(range(width)):   # nothing of the old window stays
            self.conv_states[...] = new_conv_state
            return self
        oldest = self.conv_states[:, :, :1].copy()
        self._shift(1)
        self.conv_states[:, :, width - 1:] = oldest
        for n, column in enumerate(columns.reshape(-1).tolist()):
            self.conv_states[:, :, column] = new_conv_state[:, :, n] if columns.ndim else new_conv_state
        return self

    def append_conv_state(self, x):
        """Take new inputs into the window, the oldest ones leave it.

        Parameters
        ----------
        x : ndarray [slots, channels] or [slots, channels, tokens]

        Returns
        -------
        self
        """
        slots, channels, width = self.conv_states.shape
        tokens = getattr(x, "shape", ())[2:3]
        _check_new(f"{type(self).__name__}.append_conv_state", "x", x, (slots, channels, *tokens), self.conv_states)
        if not tokens:
            self._shift(1)
            self.conv_states[:, :, width - 1] = x
            return self
        kept = min(*tokens, width)
        if kept:
            self._shift(kept)
            self.conv_states[:, :, width - kept:] = x[:, :, x.shape[2] - kept:]
        return self

    def update_ssm_state(self, new_ssm_state):
        """Overwrite the recurrent state, which keeps its dtype.

        Parameters
        ----------
        new_ssm_state : ndarray, shape of ssm_states

        Returns
        -------
        self
        """
        _check_new(f"{type(self).__name__}.update_ssm_state", "new_ssm_state", new_ssm_state, self.ssm_states.shape,
                   self.ssm_states)
        self.ssm_states[...] = new_ssm_state
        return self

    def reset(self, *, positions=False):
        """Zero the window and the state, with `positions` also how far the sequences are.

        Returns
        -------
        self
        """
        self.conv_states.fill(0)
        self.ssm_states.fill(0)
        if positions:
            self.positions.fill(0)
        return self

    def _shift(self, columns):
        """Move the window left; its last `columns` columns are the caller's to write."""
        width = self.conv_states.shape[2]
        if columns < width:
            self.conv_states[:, :, :width - columns] = self.conv_states[:, :, columns:].copy()


class RecurrentCache(Cache):
    """`RecurrentView` of all layers. Its methods write in place and return the cache; `copy` makes a snapshot."""

    def update_conv_state(self, layer_idx, new_conv_state, cache_position):
        """`RecurrentView.update_conv_state` of one layer; ValueError when it has no view. Returns self."""
        self.view_of(layer_idx).update_conv_state(new_conv_state, cache_position)
        return self

    def append_conv_state(self, layer_idx, x):
        """`RecurrentView.append_conv_state` of one layer. Returns self."""
        self.view_of(layer_idx).append_conv_state(x)
        return self

    def update_ssm_state(self, layer_idx, new_ssm_state):
        """`RecurrentView.update_ssm_state` of one layer. Returns self."""
        self.view_of(layer_idx).update_ssm_state(new_ssm_state)
        return self

    def reset(self, *, positions=False):
        """`RecurrentView.reset` of every layer that has a view. Returns self."""
        for view in self.views:
            if view is not None:
                view.reset(positions=positions)
        return self


def _check_new(op, name, new, shape, old):
    """`new` is an array of the kind of `old` and of `shape`."""
    array_namespace(op, **{name: new}, cache=old)
    if new.shape != shape:
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(new.shape)}")
