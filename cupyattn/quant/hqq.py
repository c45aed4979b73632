# SPDX-License-Identifier: Apache-2.0
"""HQQ, groups along the rows (axis 1): w = (code - zero) * scale with a zero that is no integer.

The weight [N, K] is seen as [R, group_size], R = N * K / group_size, and packed down R: part p of R holds field p of
every word, the first part in the highest bits.

    W_q            uint8 [R, group_size] 8 bits (also for 5 and 6)
                   uint8 [R / 2, group_size] 4 bits, [R / 4, group_size] 2 bits
                   int32 [ceil(R / 10), group_size] 3 bits, ten fields, the first at bits 27 to 29
    scale, zero    [R, 1]
    nbits, group_size, axis, shape    int, optional
"""

import numpy as np

from .coded import CodedWeight, Segment
from .tensors import SCALES, check_shape, only, take

BITS = (2, 3, 4, 5, 6, 8)
_FIELDS = {2: 4, 3: 10, 4: 2, 5: 1, 6: 1, 8: 1}   # in a word


def read(tensors, bits=None, shape=None, *, axis=None):
    """An HQQ weight.

    Parameters
    ----------
    tensors : dict of str to ndarray
        ``W_q`` (uint8, int32 for 3 bits, or those bytes seen as floats), ``scale`` and ``zero`` (float16, bfloat16 or
        float32), and perhaps ``nbits``, ``axis`` and ``shape``, which stand in for arguments not given.
    bits : int, optional
        2 to 6 or 8. Default what the shapes say: 8 for one code a byte.
    shape : (int, int)
        (out_features, in_features).
    axis : int, optional
        Default what the shape of ``scale`` says.

    Returns
    -------
    CodedWeight

    Raises
    ------
    ValueError, TypeError
        A tensor is missing, or of another shape or dtype; named in the message.
    NotImplementedError
        Axis 0, scales or zeros that are quantized themselves, other numbers of bits, groups across rows.
    """
    quantized = sorted({"scale_q", "zero_q", "meta_scale", "meta_zero"} & tensors.keys())
    if quantized:
        raise NotImplementedError(f"QMatrix: scale and zero must not be quantized themselves for hqq, got {quantized}")
    scale = take(tensors, "scale", SCALES, (None, None))
    axis = _given(tensors, "axis", axis)
    if axis == 0 or axis is None and scale.shape[0] == 1 < scale.shape[1]:
        raise NotImplementedError("QMatrix: axis must be 1 for hqq, got 0, whose groups run down out_features")
    parts = take(tensors, "scale", SCALES, (None, 1)).shape[0]
    zero = take(tensors, "zero", (scale.dtype.name,), (parts, 1))
    bits, words = _words(tensors, _given(tensors, "nbits", bits), parts)
    shape = tensors.get("shape") if shape is None else shape
    if shape is None:
        raise ValueError("QMatrix: shape must be given for hqq, or be a tensor, got neither")
    rows, in_features = shape = check_shape(shape)
    group = words.shape[1]
    if parts * group != rows * in_features:
        raise ValueError(f"QMatrix: scale must have {rows * in_features / group:g} rows for shape {list(shape)} and "
                         f"groups of {group}, got {parts}")
    if in_features % group:
        raise NotImplementedError(f"QMatrix: in_features must be a multiple of group_size for hqq, "
                                  f"got {in_features} and {group}")
    codes = _fields(words, bits)[:parts].reshape(shape)
    # centre 0: a float zero less a centre would be rounded
    segment = Segment(codes, bits, "int", group, scale.reshape(rows, -1), 0, zero.reshape(rows, -1))
    return CodedWeight("hqq", shape, (segment,))


def _given(tensors, name, value):
    if value is not None or name not in tensors:
        return value
    return np.asarray(tensors[name]).item()


def _words(tensors, bits, parts):
    """(bits, W_q as uint8, or uint32 for 3 bits)."""
    if bits is not None and bits not in BITS:
        raise NotImplementedError(f"QMatrix: bits must be one of {BITS} for hqq, got {bits:g}")
    words = take(tensors, "W_q", ("uint8", "int32", *SCALES), (None, None))
    # 3 bits come in int32; floats are the bytes of either, so what is left tells them apart
    fit = []
    for b in (bits,) if bits is not None else (2, 3, 4, 8):
        dtype = np.uint32 if b == 3 else np.uint8
        if words.dtype.kind == "f" or words.dtype.name == "bfloat16" or words.itemsize == np.dtype(dtype).itemsize:
            if len(words) == -(-parts // _FIELDS[b]):
                fit.append(b)
    bits = only("bits", fit, f"W_q {words.dtype.name} {list(words.shape)} and {parts} scales")
    return bits, np.ascontiguousarray(words).view(np.uint32 if bits == 3 else np.uint8)


def _fields(words, bits):
    """All parts of R, one after the other: uint8 [R, or up to 9 more, group_size]."""
    count = _FIELDS[bits]
    if count == 1:
        return words
    fields = np.empty((count, *words.shape), np.uint8)
    for i in range(count):
        shift, mask = words.dtype.type((count - 1 - i) * bits), words.dtype.type((1 << bits) - 1)
        np.bitwise_and(words >> shift, mask, out=fields[i], casting="unsafe")
    return fields.reshape(-1, words.shape[1])
