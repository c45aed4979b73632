# SPDX-License-Identifier: Apache-2.0
import numpy as np


def quant_gemm(x, qmatrix, /, *, bias=None, accumulate=False, out=None):
    """out = x @ W.T + bias (+ out) in float64, W the reconstructed weight; returns float64 and leaves `out` alone."""
    y = x.astype(np.float64) @ qmatrix.reconstruct().astype(np.float64).T
    if bias is not None:
        y = y + bias.astype(np.float64)
    return y + out.astype(np.float64) if accumulate else y
