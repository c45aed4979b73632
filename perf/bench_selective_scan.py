# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from bench_selective_state_update import SHAPES, by_array_library, inputs
from timing import DEVICE

import cupyattn
from cupyattn.reference.selective_scan import selective_scan as reference

CHECKED = 40   # tokens: the reference goes one by one


@pytest.mark.parametrize("dtype", ["float16", "float32"] if DEVICE.is_gpu else ["float16"])
@pytest.mark.parametrize("sequences, tokens", [(1, 4096), (16, 512), (1, 512)] if DEVICE.is_gpu else [(1, 256)])
@pytest.mark.parametrize("shape", SHAPES if DEVICE.is_gpu else SHAPES[::2], ids=str)
def bench_selective_scan(bench, shape, sequences, tokens, dtype):
    """Prefill from float32 states, softplus, skip and gate; Mamba-2 in float16 on tensor cores."""
    def make(rng):
        starts = np.arange(sequences + 1, dtype=np.int32) * tokens
        return (rng.standard_normal((sequences, *shape.dims, shape.states)).astype(np.float32), starts,
                *(a.astype(dtype) if a.dtype == np.float16 else a for a in inputs(rng, shape, sequences * tokens)),
                np.empty((sequences * tokens, *shape.dims), dtype))

    def call(state, starts, *arrays):
        return cupyattn.selective_scan(*arrays[:-1], dt_softplus=True, state=state, cu_seqlens=starts, out=arrays[-1])

    def expected(state, starts, x, dt, A, B, C, D, z, dt_bias, out):
        rows = (a[:CHECKED] for a in (x, dt, B, C, z))
        x, dt, B, C, z = rows
        return reference(x, dt, A, B, C, D, z, dt_bias, True, state=state[:1])

    def token_by_token(state, starts, x, dt, A, B, C, D, z, dt_bias, out):
        for t in range(tokens):
            row = slice(t, t + 1)
            by_array_library(state, x[row], dt[row], A, B[row], C[row], D, z[row], dt_bias, out[row])

    channels = int(np.prod(shape.dims))
    bench(f"{shape} {sequences} x {tokens} {dtype}", make, call, expected, tolerance=(4e-3, 2.0**-10),
          checked=lambda result: result[:CHECKED], nbytes=3 * sequences * tokens * channels * np.dtype(dtype).itemsize,
          flops=5 * sequences * tokens * channels * shape.states, baseline=None if DEVICE.is_gpu else token_by_token,
          matmul=True)
