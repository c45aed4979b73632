# SPDX-License-Identifier: Apache-2.0
"""Uncompressed weights in the packed layout."""

import numpy as np

from . import layout


def pack(weight):
    """Packed tiles of `weight` [N, K], float16, bfloat16 or float32."""
    name = weight.dtype.name
    if name not in ("float16", "bfloat16", "float32"):
        raise TypeError(f"QMatrix: w must be float16 or bfloat16 or float32, got {name}")
    rows, columns = weight.shape
    if columns % 8:
        raise ValueError(f"QMatrix: w must have in_features a multiple of 8, got {list(weight.shape)}")
    form = layout.FORMATS[name]
    row_tiles, column_tiles = layout.tiles(weight.shape)
    packed = np.empty((row_tiles, column_tiles, form.tile_bytes), np.uint8)
    layout.put_codes(packed, layout.padded(np.ascontiguousarray(weight), 16 * row_tiles, 64 * column_tiles))
    return packed
