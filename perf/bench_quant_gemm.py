# SPDX-License-Identifier: Apache-2.0
import functools

import numpy as np
import pytest
from shapes import MODELS, models
from timing import DEVICE

import cupyattn
from cupyattn import QMatrix

BLOCK = {"Q4_1": (20, 4), "Q8_0": (34, 2), "Q4_0": (18, 2)}


@functools.lru_cache(maxsize=1)
def random_weight(n, k, kind):
    """A random matrix and its float32 values, in host memory; blocks of random codes, sane scales."""
    size, header = BLOCK[kind]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (n, k // 32, size), np.uint8)
    scales = rng.uniform(0.001, 0.01, (n, k // 32, header // 2)).astype(np.float16)
    scales[..., 1:] *= -7
    raw[..., :header] = scales.view(np.uint8)
    matrix = QMatrix.from_gguf(raw, kind, (n, k))
    return matrix, matrix.reconstruct()


def _shapes():
    for model in models():
        yield f"{model} gate-up", 2 * model.intermediate_size, model.hidden_size, "Q4_1"
        yield f"{model} down", model.hidden_size, model.intermediate_size, "Q4_1"
    model = MODELS["smollm2-135m"]
    yield f"{model} lm_head", model.vocab_size, model.hidden_size, "Q8_0"


@pytest.mark.parametrize("tokens", [1, 8, 256] if DEVICE.is_gpu else [1, 8])
@pytest.mark.parametrize("name, n, k, kind", list(_shapes()), ids=lambda v: str(v).replace(" ", "-"))
def bench_quant_gemm(bench, name, n, k, kind, tokens):
    """float16 activations; the baseline multiplies by weights dequantized beforehand (float32 NumPy, float16 CuPy)."""
    matrix, dense = random_weight(n, k, kind)
    dtype = np.float16 if DEVICE.is_gpu else np.float32
    plain = DEVICE.array(dense.astype(dtype))

    def make(rng):
        return rng.standard_normal((tokens, k)).astype(np.float16), np.empty((tokens, n), np.float32), matrix

    def call(x, out, matrix):
        return cupyattn.quant_gemm(x, matrix, out=out)

    def expected(x, out, matrix):
        return x.astype(np.float32) @ dense.T

    def by_array_library(x, out, matrix):
        out[...] = x.astype(dtype) @ plain.T

    bench(f"{name} {n}x{k} {kind} tokens {tokens}", make, call, expected, tolerance=(1e-3, 1e-3),
          nbytes=matrix.nbytes + tokens * (2 * k + 4 * n), flops=2 * tokens * n * k, baseline=by_array_library)
