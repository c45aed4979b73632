# SPDX-License-Identifier: Apache-2.0
"""Inputs of selective state space models, whose outputs and states are about 1."""

from dataclasses import dataclass

import numpy as np
from compare import dtype_of, poison

BOUNDS = {"float32": (2e-6, 2e-6), "float16": (1e-3, 2.0**-11), "bfloat16": (4e-3, 2.0**-8)}   # atol, rtol


@dataclass
class Model:
    """Mamba-1 without `heads`, else Mamba-2 with `channels` dims in each."""

    channels: int
    states: int
    heads: int | None = None
    groups: int = 1
    dtype: str = "float32"
    dt_dtype: str = "float32"
    state_dtype: str = "float32"
    per_dim: bool = False        # steps, skips and biases of dims, not heads
    missing: tuple = ()
    seed: int = 0

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)

    @property
    def dims(self):
        return (self.channels,) if self.heads is None else (self.heads, self.channels)

    def _normal(self, *shape, dtype=None, scale=1.0):
        return (self.rng.standard_normal(shape) * scale).astype(dtype_of(dtype or self.dtype))

    def inputs(self, rows):
        """Arguments of the ops by name."""
        bc = (rows, self.states) if self.heads is None else (rows, self.groups, self.states)
        shared = self.dims[:1] if self.heads is not None and not self.per_dim else self.dims
        rates = (self.channels, self.states) if self.heads is None else (self.heads,)
        scale = self.states ** -0.5
        inputs = {"x": self._normal(rows, *self.dims), "dt": self._normal(rows, *shared, dtype=self.dt_dtype),
                  "A": -np.exp(self._normal(*rates, dtype="float32")), "B": self._normal(*bc),
                  "C": self._normal(*bc, scale=scale), "D": self._normal(*shared, dtype="float32"),
                  "z": self._normal(rows, *self.dims), "dt_bias": self._normal(*shared, dtype="float32")}
        return {name: None if name in self.missing else array for name, array in inputs.items()}

    def pool(self, slots, used):
        """States of NaN but for the slots in `used` that are not negative."""
        pool = poison(np.empty((slots, *self.dims, self.states), dtype_of(self.state_dtype)))
        used = used[used >= 0]
        shape = (len(used), *self.dims, self.states)
        pool[used] = np.random.default_rng(self.seed + 1).standard_normal(shape).astype(pool.dtype)
        return pool
