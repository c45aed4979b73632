# SPDX-License-Identifier: Apache-2.0
import numpy as np

from ..quant.layout import unpack, unpack_codes


def dequantize(qmatrix, /, *, rows=None, out_dtype=None):
    """The weight, or rows (first, last) of it, by what its packed bytes mean; float64 unless `out_dtype` is given."""
    qmatrix = qmatrix.to(np)
    n, k = qmatrix.shape
    first = qmatrix.segments[0]
    if first.form.scale is None:
        weight = unpack_codes(first.codes, first.form)[:n, :k].astype(np.float64)
    else:
        weight = unpack(qmatrix.segments, qmatrix.order, qmatrix.format, qmatrix.shape).dequantize()
    return weight[slice(*(rows or (0, n)))].astype(np.float64 if out_dtype is None else out_dtype)
