# SPDX-License-Identifier: Apache-2.0
import numpy as np

from .dequantize import dequantize


def quant_gemm(x, qmatrix, /, *, expert_offsets=None, bias=None, accumulate=False, out=None):
    """out = x @ W.T + bias (+ out) in float64; returns float64 and leaves `out` alone.

    With `expert_offsets` rows offsets[e] to offsets[e + 1] are multiplied by expert e; rows of none are those of `out`,
    or NaN.
    """
    if expert_offsets is not None:
        y = np.full((len(x), qmatrix.shape[1]), np.nan) if out is None else out.astype(np.float64)
        for e in range(len(qmatrix)):
            rows = slice(expert_offsets[e], expert_offsets[e + 1])
            y[rows] = quant_gemm(x[rows], qmatrix.expert(e), bias=None if bias is None else bias[e],
                                 accumulate=accumulate, out=None if out is None else out[rows])
        return y
    y = x.astype(np.float64) @ dequantize(qmatrix).T
    if bias is not None:
        y = y + bias.astype(np.float64)
    return y + out.astype(np.float64) if accumulate else y
