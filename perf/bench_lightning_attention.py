# SPDX-License-Identifier: Apache-2.0
"""The layers of MiniMax-01: 64 heads of 128 dims, a float32 state of 4 MiB per sequence and layer."""

import numpy as np
import pytest
from timing import DEVICE

import cupyattn
from cupyattn.reference.lightning_attention import lightning_attention as reference

HEADS, DIM = 64 if DEVICE.is_gpu else 8, 128


def _inputs(rng, tokens):
    """q, k, v, out and slopes."""
    x = rng.standard_normal((3, tokens, HEADS, DIM)).astype(np.float16)
    x[:2] /= np.float16(DIM**0.5)
    return *x, np.empty_like(x[0]), cupyattn.lightning_slopes(HEADS, 10, 80)


@pytest.mark.parametrize("batch", [1, 8, 64, 256] if DEVICE.is_gpu else [1, 8])
def bench_step(bench, batch):
    """One token per sequence, float16 in and out."""
    def make(rng):
        return (*_inputs(rng, batch), rng.standard_normal((batch, HEADS, DIM, DIM), np.float32))

    def call(q, k, v, out, slopes, state):
        return cupyattn.lightning_attention(q, k, v, state, slopes, out=out)

    def expected(q, k, v, out, slopes, state):
        return reference(q, k, v, state, slopes)

    def baseline(q, k, v, out, slopes, state):
        state *= DEVICE.xp.exp(-slopes)[:, None, None]
        state += k[..., None] * v[..., None, :]
        out[...] = DEVICE.xp.matmul(q[..., None, :].astype(np.float32), state)[..., 0, :]

    bench(f"{HEADS} heads of {DIM}, batch {batch} float16", make, call, expected, tolerance=(1e-3, 2.0**-10),
          nbytes=batch * HEADS * DIM * DIM * 8, flops=batch * HEADS * DIM * DIM * 5, baseline=baseline)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("tokens", [1024, 16384] if DEVICE.is_gpu else [512])
def bench_prefill(bench, tokens, dtype):
    """One sequence from zeros."""
    def make(rng):
        q, k, v, out, slopes = _inputs(rng, tokens)
        return (*(x.astype(dtype) for x in (q, k, v, out)), slopes, np.zeros((1, HEADS, DIM, DIM), np.float32),
                np.int32([0, tokens]), np.zeros(1, np.uint8))

    def call(q, k, v, out, slopes, state, starts, fresh):
        return cupyattn.lightning_attention(q, k, v, state, slopes, cu_seqlens=starts, has_state=fresh, out=out)

    def expected(q, k, v, out, slopes, state, starts, fresh):
        return reference(q, k, v, state, slopes, cu_seqlens=starts, has_state=fresh)

    def baseline(q, k, v, out, slopes, state, starts, fresh):
        _blocks(DEVICE.xp, q, k, v, out, slopes, state[0])

    numbers = tokens * HEADS * DIM
    bench(f"{HEADS} heads of {DIM}, {tokens} tokens {dtype}", make, call, expected, tolerance=(2e-3, 2.0**-9),
          nbytes=4 * numbers * np.dtype(dtype).itemsize + HEADS * DIM * DIM * 4, flops=4 * numbers * DIM,
          baseline=baseline, matmul=True)


def _blocks(xp, q, k, v, out, slopes, state, size=64):
    """The block form by the array library's batched products."""
    q, k, v = (x.swapaxes(0, 1).astype(np.float32) for x in (q, k, v))   # [heads, tokens, dim]
    state[...] = 0
    i = xp.arange(size, dtype=np.float32)
    lower = xp.exp(-slopes[:, None, None] * xp.maximum(i[:, None] - i, 0)) * (i[:, None] >= i)
    ahead, behind = (xp.exp(-slopes[:, None] * n)[..., None] for n in (i + 1, size - 1 - i))
    for begin in range(0, q.shape[1], size):
        qb, kb, vb = (x[:, begin:begin + size] for x in (q, k, v))
        o = (qb @ kb.swapaxes(1, 2) * lower) @ vb + qb @ state * ahead
        out[begin:begin + size] = o.swapaxes(0, 1)
        state *= xp.exp(-slopes * size)[:, None, None]
        state += (kb * behind).swapaxes(1, 2) @ vb
