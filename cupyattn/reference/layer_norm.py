# SPDX-License-Identifier: Apache-2.0
import numpy as np


def layer_norm(x, weight, bias=None, /, *, eps=1e-5, out_dtype=None):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float64.

    The result is float64 unless `out_dtype` is given.
    """
    x = x.astype(np.float64)
    centred = x - np.mean(x, axis=-1, keepdims=True)
    out = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps) * weight.astype(np.float64)
    if bias is not None:
        out = out + bias.astype(np.float64)
    return out if out_dtype is None else out.astype(out_dtype)
