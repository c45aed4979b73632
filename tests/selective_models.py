# SPDX-License-Identifier: Apache-2.0
"""Inputs of selective state space models, whose outputs and states are about 1, and the check of their prefill."""

from dataclasses import dataclass

import numpy as np
from compare import assert_same_bits, dtype_of, poison

import cupyattn
from cupyattn.reference.selective_scan import selective_scan as reference

BY_ROW = ("x", "dt", "B", "C", "z")
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


def check_scan(xp, model, lengths, slots, has_state, more_rows=0, *, compare, compare_states, **options):
    """`selective_scan` against float64: rows of no sequence and unused slots are not read, other slots not written."""
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    inputs = model.inputs(int(starts[-1]) + more_rows)
    unused = np.ones(len(inputs["x"]), bool)
    for b in np.flatnonzero(slots >= 0):
        unused[starts[b]:starts[b + 1]] = False
    for name in BY_ROW:
        if inputs[name] is not None:
            inputs[name][unused] = np.nan
    state = model.pool(int(slots.max(initial=0)) + 2, slots[has_state])
    options = {**options, "cu_seqlens": starts, "slots": slots, "has_state": has_state}
    want_state = state.astype(np.float32)
    want = reference(**inputs, state=want_state, dt_softplus=True,
                     **{k: v for k, v in options.items() if k != "chunk_size"})
    pool = xp.array(state)
    on_device = {k: xp.array(v) if isinstance(v, np.ndarray) else v for k, v in {**inputs, **options}.items()}
    got = cupyattn.selective_scan(**on_device, state=pool, dt_softplus=True, out=poison(xp.array(inputs["x"])))
    assert got.dtype == inputs["x"].dtype and isinstance(got, xp.module.ndarray)
    compare(xp.numpy(got), want)
    ended = slots[(slots >= 0) & (np.diff(starts) > 0)]
    others = np.setdiff1d(np.arange(len(state)), ended)
    compare_states(xp.numpy(pool)[ended], want_state[ended].astype(np.float64))
    assert_same_bits(xp.numpy(pool)[others], state[others])
