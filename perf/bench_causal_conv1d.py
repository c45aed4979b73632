# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import token_counts
from timing import DEVICE

import cupyattn
from cupyattn.reference.causal_conv1d import causal_conv1d as reference
from cupyattn.reference.causal_conv1d import causal_conv1d_update as update_reference

WIDTH = 4
CHANNELS = {"mamba-130m": 1536, "mamba-2.8b": 5120, "mamba2-2.7b": 5376}


def _by_array_library(x, weight, states, out):
    padded = DEVICE.xp.concatenate([DEVICE.xp.zeros((WIDTH - 1, x.shape[1]), "float32"), x.astype("float32")])
    total = sum(weight[:, j] * padded[j:j + len(x)] for j in range(WIDTH))
    out[...] = total / (1 + DEVICE.xp.exp(-total))


@pytest.mark.parametrize("tokens", token_counts()[1:])
@pytest.mark.parametrize("model", CHANNELS)
def bench_causal_conv1d(bench, model, tokens):
    """float16 prefill of one sequence, silu, into a float32 state."""
    channels = CHANNELS[model]

    def make(rng):
        return (rng.standard_normal((tokens, channels)).astype(np.float16),
                rng.standard_normal((channels, WIDTH)).astype(np.float32), np.zeros((1, channels, WIDTH), np.float32),
                np.empty((tokens, channels), np.float16))

    def call(x, weight, states, out):
        return cupyattn.causal_conv1d(x, weight, conv_states=states, has_state=begins, activation="silu",
                                      out=out)

    def expected(x, weight, states, out):
        return reference(x, weight, activation="silu")

    begins = DEVICE.array(np.zeros(1, np.uint8))
    bench(f"{model} tokens {tokens} float16", make, call, expected, tolerance=(2e-6, 2.0**-10),
          nbytes=tokens * channels * 4, flops=tokens * channels * 12, baseline=_by_array_library)


@pytest.mark.parametrize("layout", ["rows", "channels"])
@pytest.mark.parametrize("batch", [1, 8, 64, 256] if DEVICE.is_gpu else [1, 8])
@pytest.mark.parametrize("model", CHANNELS)
def bench_causal_conv1d_update(bench, model, batch, layout):
    """One float16 token of every sequence, silu, with a float32 state of 4 inputs."""
    channels = CHANNELS[model]

    def make(rng):
        shape = (batch, channels, WIDTH) if layout == "rows" else (batch, WIDTH, channels)
        return (rng.standard_normal((batch, channels)).astype(np.float16),
                rng.standard_normal((channels, WIDTH)).astype(np.float32),
                rng.standard_normal(shape).astype(np.float32), np.empty((batch, channels), np.float16))

    def state(array):
        return array if layout == "rows" else array.transpose(0, 2, 1)

    def call(x, weight, states, out):
        return cupyattn.causal_conv1d_update(x, state(states), weight, None, "silu", out=out)

    def expected(x, weight, states, out):
        return update_reference(x, state(states), weight, None, "silu")

    def baseline(x, weight, states, out):
        windows = state(states)
        windows[..., :-1] = windows[..., 1:]
        windows[..., -1] = x
        total = (windows * weight).sum(-1)
        out[...] = total / (1 + DEVICE.xp.exp(-total))

    bench(f"{model} batch {batch} {layout} float16", make, call, expected, tolerance=(2e-6, 2.0**-10),
          nbytes=batch * channels * (4 + 8 * WIDTH), flops=batch * channels * 12, baseline=baseline)
