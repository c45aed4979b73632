# SPDX-License-Identifier: Apache-2.0
"""Formats and numbers of tokens at the shapes of real models; beside other libraries: ``perf/peers_quant_gemm.py``."""

import functools
import itertools

import numpy as np
import pytest
from coded_weights import coded_weight
from shapes import matmuls
from timing import DEVICE

import cupyattn
from cupyattn import QMatrix
from cupyattn.runtime import blas

BLOCK = {"Q4_1": (20, 4), "Q8_0": (34, 2), "Q4_0": (18, 2)}
# format: (its name in coded_weights.py, group)
FORMATS = {"int4-g128": ("int4 zero float16", 128), "int8-g128": ("int8 plain float16", 128),
           "q4_1": ("int4 minimum float16", 32), "q8_0": ("int8 plain float16", 32),
           "q4_k": ("int4 minimum int8 float16", 32), "q6_k": ("int6 plain int8 float16", 16),
           "fp8": ("e4m3 plain float32", 128), "nf4": ("nf4 plain float32", 64),
           "mxfp4": ("e2m1 plain float8_e8m0fnu", 32), "nvfp4": ("e2m1 plain float8_e4m3fn float32", 16)}
CHECKED_TOKENS = 8   # of the first and the last: all of them would take longer than the bench


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


@functools.lru_cache(maxsize=1)
def _weight(n, k, format):
    """A random matrix of a format, its values in float32 as its definition in NumPy gives them, and in the baseline's
    type on the device."""
    if format == "float16":
        values = np.random.default_rng(1).standard_normal((n, k), np.float32).astype(np.float16)
        matrix = QMatrix.from_dense(values)
    else:
        parts = [coded_weight(FORMATS[format][0], rows, k, FORMATS[format][1], seed=first)
                 for first in range(0, n, 1024) for rows in [min(1024, n - first)]]   # float64 takes room
        matrix = QMatrix.concat([QMatrix.from_coded(part) for part in parts])
        values = np.concatenate([part.dequantize().astype(np.float32) for part in parts])
    plain = values.astype(np.float16) if DEVICE.is_gpu else values.astype(np.float32)
    copies = [DEVICE.array(plain) for _ in range(DEVICE.copies(plain.nbytes))]   # cold for the baseline, too
    return matrix, values, copies


def _cases():
    for m in matmuls():
        for format, tokens in itertools.product(m.formats, m.tokens):
            yield pytest.param(m, format, tokens, id=f"{m.name} {format} {tokens}".replace(" ", "-"))


@pytest.mark.parametrize("shape, format, tokens", list(_cases()))
def bench_quant_gemm(bench, shape, format, tokens):
    """float16 x; the baseline multiplies by weights dequantized beforehand: float32 NumPy, float16 cuBLAS."""
    n, k = shape.rows, shape.columns
    matrix, values, plain = _weight(n, k, format)
    dtype = np.float16 if DEVICE.is_gpu else np.float32
    turn = itertools.cycle(plain)

    def make(rng):
        x = np.resize(rng.standard_normal(min(tokens * k, 2**22), np.float32), (tokens, k)).astype(np.float16)
        return x, np.empty((tokens, n), dtype), matrix

    def call(x, out, matrix):
        return cupyattn.quant_gemm(x, matrix, out=out)

    some = np.unique([*range(min(tokens, CHECKED_TOKENS // 2)), *range(max(0, tokens - CHECKED_TOKENS // 2), tokens)])

    def expected(x, out, matrix):
        return x[some].astype(np.float32) @ values.T.astype(np.float32)

    def by_array_library(x, out, matrix):
        blas.multiply(x if DEVICE.is_gpu else x.astype(np.float32), next(turn), out)

    size = float(np.abs(values[:64].astype(np.float32)).mean()) * k**0.5   # of a number of out, about
    bench(f"{shape.name} {n}x{k} {format} tokens {tokens}", make, call, expected,
          tolerance=((2e-3 if DEVICE.is_gpu else 1e-4) * size, 2.0**-10),
          nbytes=matrix.nbytes + tokens * (2 * k + dtype().itemsize * n), flops=2 * tokens * n * k,
          baseline=by_array_library, checked=lambda out: out[some], matmul=True)
