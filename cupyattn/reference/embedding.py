# SPDX-License-Identifier: Apache-2.0
import numpy as np

from .dequantize import dequantize


def embedding(ids, table, /, *, out_dtype=None):
    """out = table[ids], `table` an array or a QMatrix; float64 unless `out_dtype` is given."""
    table = table if isinstance(table, np.ndarray) else dequantize(table)
    return table[ids].astype(np.float64 if out_dtype is None else out_dtype)
