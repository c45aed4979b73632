# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import models, token_counts

import cupyattn
from cupyattn.reference.layer_norm import layer_norm as reference


@pytest.mark.parametrize("tokens", token_counts())
@pytest.mark.parametrize("model", models(), ids=str)
def bench_layer_norm(bench, model, tokens):
    """float16 in and out, weight and bias float16."""
    shape = (tokens, model.hidden_size)

    def make(rng):
        x, weight, bias = rng.standard_normal(shape), rng.uniform(0.5, 2, shape[1]), rng.standard_normal(shape[1])
        return (*(a.astype(np.float16) for a in (x, weight, bias)), np.empty(shape, np.float16))

    def call(x, weight, bias, out):
        return cupyattn.layer_norm(x, weight, bias, out=out)

    def expected(x, weight, bias, out):
        return reference(x, weight, bias)

    def by_array_library(x, weight, bias, out):
        x = x.astype("float32")
        x -= x.mean(axis=1, keepdims=True)
        out[...] = x / (((x * x).mean(axis=1, keepdims=True) + 1e-5) ** 0.5) * weight + bias

    bench(f"{model} tokens {tokens} float16", make, call, expected, tolerance=(4e-6, 2.0**-10),
          nbytes=tokens * model.hidden_size * 4, flops=tokens * model.hidden_size * 8, baseline=by_array_library)
