# SPDX-License-Identifier: Apache-2.0
import numpy as np


def rms_norm(x, weight, /, *, eps=1e-6, residual=None, out_dtype=None):
    """out = h * weight / sqrt(mean(h**2) + eps) in float64; `residual` is updated in place when given.

    An infinite h of float16 counts as 65504, with its sign. The result is float64 unless `out_dtype` is given.
    """
    h, kind = x.astype(np.float64), x.dtype
    if residual is not None:
        residual[...] = (residual.astype(np.float64) + h).astype(residual.dtype)
        h, kind = residual.astype(np.float64), residual.dtype
    if kind == np.float16:
        h = np.clip(h, -65504, 65504)
    out = h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + eps) * weight.astype(np.float64)
    return out if out_dtype is None else out.astype(out_dtype)
