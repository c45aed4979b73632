# SPDX-License-Identifier: Apache-2.0
"""Weights as GGUF blocks, and the values the blocks stand for.

By the gguf package, which shares no code with ours. A machine that only runs the tests marked gpu may lack it: then by
the formulas of the three formats, which test_qmatrix.py holds against the package.
"""

import numpy as np

try:
    import gguf
except ImportError:
    gguf = None


def quantized(name, w):
    """(uint8 blocks, float32 values) of float32 `w` [n, k] in format `name`: "Q4_0", "Q4_1" or "Q8_0"."""
    if gguf is None:
        return by_formula(name, w)
    kind = gguf.GGMLQuantizationType[name]
    raw = gguf.quants.quantize(w, kind)
    return raw, gguf.quants.dequantize(raw, kind)


def by_formula(name, w):
    """`quantized` without the package; it may round to other codes, but its values are what its blocks mean."""
    blocks = w.reshape(len(w), -1, 32)
    low = blocks.min(axis=-1, keepdims=True) if name == "Q4_1" else np.zeros((*blocks.shape[:2], 1), np.float32)
    low = low.astype(np.float16)
    steps, offset = {"Q4_0": (7, 8), "Q4_1": (15, 0), "Q8_0": (127, 0)}[name]
    scale = (np.abs(blocks - low).max(axis=-1, keepdims=True) / steps).astype(np.float16)
    codes = np.rint((blocks - low) / scale) + offset
    codes = codes.clip(-127, 127).astype(np.int8) if name == "Q8_0" else codes.clip(0, 15).astype(np.uint8)
    values = scale.astype(np.float32) * (codes.astype(np.float32) - offset) + low.astype(np.float32)
    header = [scale.view(np.uint8), low.view(np.uint8)] if name == "Q4_1" else [scale.view(np.uint8)]
    packed = codes.view(np.uint8) if name == "Q8_0" else codes[..., :16] | codes[..., 16:] << 4
    return np.concatenate([*header, packed], axis=-1).reshape(len(w), -1), values.reshape(w.shape)
