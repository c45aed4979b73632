# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import numpy as np
import pytest
from timing import DEVICE

import cupyattn
from cupyattn.reference.selective_state_update import selective_state_update as reference


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer; Mamba-1 without heads."""

    name: str
    heads: int | None
    channels: int
    states: int
    groups: int = 1

    @property
    def dims(self):
        return (self.channels,) if self.heads is None else (self.heads, self.channels)

    def __str__(self):
        return self.name


SHAPES = [Shape("mamba-130m", None, 1536, 16), Shape("mamba-2.8b", None, 5120, 16),
          Shape("mamba2-130m", 24, 64, 128), Shape("mamba2-2.7b", 80, 64, 128)]


def inputs(rng, shape, rows):
    """x, dt, A, B, C, D, z, dt_bias in float16, parameters in float32."""
    def normal(*size, dtype=np.float16, scale=1.0):
        return (rng.standard_normal(size) * scale).astype(dtype)

    bc = (rows, shape.states) if shape.heads is None else (rows, shape.groups, shape.states)
    rates = (shape.channels, shape.states) if shape.heads is None else (shape.heads,)
    return (normal(rows, *shape.dims), normal(rows, shape.dims[0]), -np.exp(normal(*rates, dtype=np.float32)),
            normal(*bc), normal(*bc, scale=shape.states ** -0.5), normal(shape.dims[0], dtype=np.float32),
            normal(rows, *shape.dims), normal(shape.dims[0], dtype=np.float32))


@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
@pytest.mark.parametrize("batch", [1, 16, 64, 256] if DEVICE.is_gpu else [1, 8])
@pytest.mark.parametrize("shape", SHAPES if DEVICE.is_gpu else SHAPES[::2], ids=str)
def bench_selective_state_update(bench, shape, batch, state_dtype):
    """float16 tokens, softplus, skip and gate. The traffic is that of the states."""
    states = (batch, *shape.dims, shape.states)

    def make(rng):
        return (rng.standard_normal(states).astype(state_dtype), *inputs(rng, shape, batch),
                np.empty((batch, *shape.dims), np.float16))

    def call(state, *arrays):
        return cupyattn.selective_state_update(state, *arrays[:-1], dt_softplus=True, out=arrays[-1])

    def expected(state, *arrays):
        return reference(state, *arrays[:-1], dt_softplus=True)

    size = int(np.prod(states))
    bench(f"{shape} batch {batch} state {state_dtype}", make, call, expected, tolerance=(2e-3, 2.0**-10),
          nbytes=2 * size * np.dtype(state_dtype).itemsize, flops=5 * size, baseline=by_array_library)


def by_array_library(state, x, dt, A, B, C, D, z, dt_bias, out):
    """The same with one group, by the array library."""
    xp = DEVICE.xp
    if x.ndim == 3:   # a step and a rate per head; one group
        dt, dt_bias, D, A = dt[:, :, None], dt_bias[:, None], D[:, None], A[:, None, None]
        B, C = B[:, 0, None], C[:, 0, None]
    step = xp.logaddexp(0, dt.astype("float32") + dt_bias)[..., None]
    x, gate = x.astype("float32"), z.astype("float32")
    state[...] = xp.exp(step * A) * state + step * x[..., None] * B[:, None]
    out[...] = ((state * C[:, None]).sum(-1) + D * x) * gate / (1 + xp.exp(-gate))
