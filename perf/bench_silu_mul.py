# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import models, token_counts
from timing import DEVICE

import cupyattn
from cupyattn.reference.silu_mul import silu_mul as reference


def _by_array_library(gate_up, out):
    gate, up = DEVICE.xp.split(gate_up, 2, axis=1)
    gate = gate.astype("float32")
    out[...] = gate / (1 + DEVICE.xp.exp(-gate)) * up


@pytest.mark.parametrize("tokens", token_counts())
@pytest.mark.parametrize("model", models(), ids=str)
def bench_silu_mul(bench, model, tokens):
    """float16, the two halves of a fused gate-up projection."""
    cols = model.intermediate_size

    def make(rng):
        return rng.standard_normal((tokens, 2 * cols)).astype(np.float16), np.empty((tokens, cols), np.float16)

    def call(gate_up, out):
        return cupyattn.silu_mul(gate_up[:, :cols], gate_up[:, cols:], out=out)

    def expected(gate_up, out):
        return reference(gate_up[:, :cols], gate_up[:, cols:])

    bench(f"{model} tokens {tokens} float16", make, call, expected, tolerance=(1e-6, 2.0**-10),
          nbytes=tokens * cols * 6, flops=tokens * cols * 5, baseline=_by_array_library)
