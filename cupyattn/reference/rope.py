# SPDX-License-Identifier: Apache-2.0
import numpy as np


def rope(x, /, *, cos, sin, positions, style="neox", rotary_dim=None):
    """Rotate pairs of x [tokens, heads, head_dim] in float64; a position outside the tables gives a row of NaN."""
    rotary_dim = x.shape[-1] if rotary_dim is None else rotary_dim
    half = rotary_dim // 2
    if style == "neox":
        first, second = slice(0, half), slice(half, rotary_dim)
    else:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    if cos.shape[-1] == rotary_dim:  # full width: every pair is there twice
        cos, sin = cos[:, first], sin[:, first]
    out = x.astype(np.float64)
    for token, position in enumerate(positions):
        if not 0 <= position < len(cos):
            out[token] = np.nan
            continue
        c, s = cos[position].astype(np.float64), sin[position].astype(np.float64)
        a, b = x[token, :, first].astype(np.float64), x[token, :, second].astype(np.float64)
        out[token, :, first] = a * c - b * s
        out[token, :, second] = b * c + a * s
    return out
