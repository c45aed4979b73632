# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from bench_quant_gemm import BLOCK, random_weight
from shapes import models

import cupyattn
from cupyattn.reference.dequantize import dequantize as reference


@pytest.mark.parametrize("kind", BLOCK)
@pytest.mark.parametrize("model", models(), ids=str)
def bench_dequantize(bench, model, kind):
    """4096 rows of a down projection to float16; the baseline copies as many float16 numbers."""
    n, k = min(4096, model.hidden_size), model.intermediate_size
    matrix, dense = random_weight(n, k, kind)

    def make(rng):
        return matrix, dense.astype(np.float16), np.empty((n, k), np.float16)

    def call(matrix, plain, out):
        return cupyattn.dequantize(matrix, out=out)

    def by_array_library(matrix, plain, out):
        out[...] = plain

    bench(f"{model} {n}x{k} {kind} to float16", make, call, lambda matrix, plain, out: reference(matrix),
          tolerance=(1e-7, 2.0**-11), nbytes=matrix.nbytes + 2 * n * k, baseline=by_array_library)
