# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import models
from timing import DEVICE

import cupyattn
from cupyattn.reference.split_reduce import split_reduce as reference


def numpy_merge(partial_out, partial_lse, out):
    weights = partial_lse - partial_lse.max(axis=0)
    xp = DEVICE.xp if DEVICE.is_gpu else np
    weights = xp.exp(weights)
    return (weights[..., None] * partial_out).sum(axis=0) / weights.sum(axis=0)[..., None]


@pytest.mark.parametrize("tokens, splits", [(1, 16), (64, 4)] if DEVICE.is_gpu else [(4, 2), (1, 16)])
@pytest.mark.parametrize("model", models(), ids=str)
def bench_split_reduce(bench, model, tokens, splits):
    """Partial results of a decode step, merged to float16."""
    heads, head_dim = model.num_heads, model.head_dim

    def make(rng):
        return (rng.standard_normal((splits, tokens, heads, head_dim)).astype(np.float32),
                rng.standard_normal((splits, tokens, heads)).astype(np.float32),
                np.empty((tokens, heads, head_dim), np.float16))

    def call(partial_out, partial_lse, out):
        return cupyattn.split_reduce(partial_out, partial_lse, out=out)

    def expected(partial_out, partial_lse, out):
        return reference(partial_out, partial_lse)

    rows = tokens * heads
    bench(f"{model} tokens {tokens} splits {splits} float16", make, call, expected, tolerance=(1e-6, 2.0**-10),
          nbytes=rows * (splits * (head_dim + 1) * 4 + head_dim * 2), flops=2 * splits * rows * head_dim,
          baseline=numpy_merge)
