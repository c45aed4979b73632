# SPDX-License-Identifier: Apache-2.0
"""quant_gemm by BLAS: rows of the weight are dequantized, a chunk at a time, and multiplied as a plain matrix.

A chunk is 24 MiB, in the type of x or, on the host, in float32: it stays in a GPU's L2 between the two, and makes few
calls of the host's BLAS, whose threads wait for each other in each. With so few tokens that a chunk's product would
leave multiprocessors idle, a GPU's is as large as one wave of tiles of out needs: rows * tokens >= 132 * (128 * 256),
up to 128 MiB.
"""

import numpy as np

from ..ops.dequantize import dequantize
from ..runtime import blas, workspace
from ..runtime.launch import run_library

_CHUNK, _CHUNK_LIMIT = 24 << 20, 128 << 20   # bytes
_WAVE = 132 * 128 * 256   # numbers of out that occupy a nominal GPU once
_TOKENS = 2**14           # rows of x per round where scratch is taken for them: 1/40 of the time goes into the chunks


def rows_per_chunk(tokens, rows, row_bytes):
    """Rows of the weight that a GPU dequantizes at a time, for `tokens` rows of x."""
    chunk = min(max(_CHUNK, -(-_WAVE // tokens) * row_bytes), _CHUNK_LIMIT)
    return min(rows, max(16, chunk // row_bytes // 16 * 16))


@np.errstate(all="ignore")   # infinities and NaN are the caller's affair, as on a GPU
def multiply_on_host(x, qmatrix, bias, accumulate, out):
    """NumPy arrays x [tokens, K], out [tokens, N]; float32 sums, then bias and what out holds, one rounding."""
    rows, columns = qmatrix.shape
    step = min(rows, max(16, _CHUNK // (4 * columns) // 16 * 16))
    wide, direct = x.dtype == np.float32, out.dtype == np.float32 and not accumulate
    for start in range(0, len(x), _TOKENS):
        some, to = x[start:start + _TOKENS], out[start:start + _TOKENS]
        tokens = len(some)
        sizes = step * columns, 0 if wide else tokens * columns, 0 if direct else tokens * step
        weights, x32, sums = np.split(workspace(np, 4 * sum(sizes))[:4 * sum(sizes)].view(np.float32),
                                      np.cumsum(sizes)[:2])
        weights = weights.reshape(step, columns)
        if not wide:
            x32 = x32.reshape(tokens, columns)
            x32[...] = some
        for first in range(0, rows, step):
            last = min(first + step, rows)
            chunk = dequantize(qmatrix, rows=(first, last), out=weights[:last - first])
            part = to[:, first:last]
            made = part if direct else sums[:tokens * (last - first)].reshape(tokens, last - first)
            blas.multiply(some if wide else x32, chunk, made)
            if bias is not None:
                np.add(made, bias[first:last], out=made)
            if not direct:
                part[...] = made + part if accumulate else made


def multiply_on_gpu(xp, x, qmatrix, bias, accumulate, out):
    """CuPy arrays x [tokens, K], out [tokens, N]; weights are rounded to x.dtype, bias and the sums to out.dtype."""
    if bias is not None:
        run_library("copy", "gpu", lambda: out.__setitem__(..., bias))   # which cuBLAS adds to
    rows, columns = qmatrix.shape
    row_bytes = columns * x.itemsize
    step = rows_per_chunk(len(x), rows, row_bytes)
    weights = workspace(xp, step * row_bytes)[:step * row_bytes].view(x.dtype).reshape(step, columns)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        dequantize(qmatrix, rows=(first, last), out=weights[:last - first])
        blas.multiply(x, weights[:last - first], out[:, first:last], add=accumulate or bias is not None)
