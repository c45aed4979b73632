# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import models, token_counts

import cupyattn
from cupyattn.reference.rms_norm import rms_norm as reference


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("tokens", token_counts())
@pytest.mark.parametrize("model", models(), ids=str)
def bench_rms_norm(bench, model, tokens, with_residual):
    """float16 in and out, with the float32 residual stream added in front or not."""
    shape = (tokens, model.hidden_size)

    def make(rng):
        x, weight = rng.standard_normal(shape).astype(np.float16), rng.uniform(0.5, 2, shape[1]).astype(np.float32)
        return (x, weight, np.empty_like(x), *((np.zeros(shape, np.float32),) if with_residual else ()))

    def call(x, weight, out, residual=None):
        return cupyattn.rms_norm(x, weight, residual=residual, out=out)

    def expected(x, weight, out, residual=None):
        return reference(x, weight, residual=residual)

    bench(f"{model} tokens {tokens} {'residual' if with_residual else 'plain'} float16", make, call, expected,
          tolerance=(1e-6, 2.0**-10), nbytes=tokens * model.hidden_size * (12 if with_residual else 4),
          flops=tokens * model.hidden_size * 4)
