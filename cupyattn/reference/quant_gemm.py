# SPDX-License-Identifier: Apache-2.0
import numpy as np

from .dequantize import dequantize


def quant_gemm(x, qmatrix, /, *, bias=None, accumulate=False, out=None):
    """out = x @ W.T + bias (+ out) in float64; returns float64 and leaves `out` alone."""
    y = x.astype(np.float64) @ dequantize(qmatrix).T
    if bias is not None:
        y = y + bias.astype(np.float64)
    return y + out.astype(np.float64) if accumulate else y
