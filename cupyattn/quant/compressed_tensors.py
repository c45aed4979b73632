# SPDX-License-Identifier: Apache-2.0
"""Integers of compressed-tensors: w[n, k] = (q[n, k] - z[n, group of k]) * weight_scale[n, group of k], q signed.

pack-quantized
    weight_packed        int32 [N, words]    q + 2^(bits-1) along K
    weight_scale         [N, groups], or [N, 1]
    weight_zero_point    int32 [words, groups], optional    z + 2^(bits-1) down N; or int8 like weight_scale: z
    weight_g_idx         int32 [K], optional    group of each column; -1 throughout is as good as none
    weight_shape         int [2], optional
int-quantized, naive-quantized
    weight               int8 [N, K]
    weight_scale         [N, groups], [N, 1] or one number
    weight_zero_point    int8 like weight_scale, optional

Words hold a dense stream, or, in older files, ``32 // bits`` codes each and none across two words.
"""

import numpy as np

from .bit_stream import unpack_stream
from .coded import CodedWeight, Segment
from .groups import group_columns
from .tensors import SCALES, WORDS, check_shape, only, take, zero_points

BITS = (2, 3, 4, 5, 6, 8)


def read(tensors, bits=None, group_size=None, *, shape=None):
    """A weight of integers saved by compressed-tensors.

    Parameters
    ----------
    tensors : dict of str to ndarray
        ``weight_packed`` or ``weight`` (int8), ``weight_scale`` (float16, bfloat16 or float32), and perhaps
        ``weight_zero_point``, ``weight_g_idx`` and ``weight_shape``.
    bits : int, optional
        2 to 6 or 8. Default what the shapes say.
    group_size : int, optional
        -1 for all of K. Default what the shapes say; not looked at for act-order.
    shape : (int, int), optional
        (out_features, in_features), for files without ``weight_shape``. Default what the other shapes say.

    Returns
    -------
    CodedWeight

    Raises
    ------
    ValueError, TypeError
        A tensor is missing, or of another shape or dtype; named in the message.
    NotImplementedError
        Another number of bits.
    """
    if bits is not None and bits not in BITS:
        raise NotImplementedError(f"QMatrix: bits must be one of {BITS} for compressed-tensors, got {bits!r}")
    if "weight_packed" in tensors:
        bits, columns = _packing(tensors, bits, shape)
        whole = _whole_codes(tensors, bits, columns)
        codes = _unpack(tensors["weight_packed"], bits, 1, columns, whole)
    else:
        bits, whole = 8, False
        codes = take(tensors, "weight", ("int8",), shape or (None, None)).view(np.uint8) ^ np.uint8(128)
    rows, in_features = shape = check_shape(codes.shape)
    scale = _scale(tensors, rows)
    groups = scale.shape[1]
    g_idx = take(tensors, "weight_g_idx", ("int32", "int64"), (in_features,)) if "weight_g_idx" in tensors else None
    group, index, order = group_columns(in_features, groups, group_size, g_idx)
    if order is not None:
        codes = np.take(codes, order, axis=1, mode="wrap")
    scale = np.ascontiguousarray(scale[:, index])
    zero = _zeros(tensors, bits, rows, groups, whole)
    zero = None if zero is None else zero_points(zero[:, index], scale)
    segment = Segment(np.ascontiguousarray(codes), bits, "int", group, scale, 1 << bits - 1, zero)
    return CodedWeight("compressed-tensors", shape, (segment,), order)


def _packing(tensors, bits, shape):
    """(bits, K) of weight_packed."""
    words = take(tensors, "weight_packed", WORDS, (None, None))
    if shape is None and "weight_shape" in tensors:
        shape = take(tensors, "weight_shape", ("int64", "int32"), (2,)).tolist()
    if shape is not None and shape[0] != len(words):
        raise ValueError(f"QMatrix: weight_packed must have {shape[0]} rows for shape {list(shape)}, "
                         f"got {list(words.shape)}")
    width = words.shape[1]
    columns = shape[1] if shape is not None else None
    if columns is None and "weight_g_idx" in tensors:
        columns = tensors["weight_g_idx"].shape[0]
    if columns is None:
        fit = [] if bits is None or width * 32 % bits else [width * 32 // bits]
        columns = only("shape", fit, f"weight_packed {list(words.shape)} of {bits or 'unknown'} bits")
    fit = [b for b in BITS if bits in (None, b) and width in _widths(columns, b)]
    full = [b for b in fit if columns * b == 32 * width]
    return only("bits", full or fit, f"weight_packed {list(words.shape)} and K = {columns}"), columns


def _scale(tensors, rows):
    """weight_scale as [N, groups]."""
    if "weight_scale" in tensors and np.size(tensors["weight_scale"]) == 1:
        scale = np.asarray(tensors["weight_scale"])
        one = take({"weight_scale": scale.reshape(1, 1)}, "weight_scale", SCALES, (1, 1))
        return np.repeat(one, rows, axis=0)
    return take(tensors, "weight_scale", SCALES, (rows, None))


def _zeros(tensors, bits, rows, groups, whole):
    """Signed zero points [N, groups], or None."""
    if "weight_zero_point" not in tensors:
        return None
    given = tensors["weight_zero_point"]
    if given.dtype.name == "int8":
        if given.size == 1:
            return np.full((rows, groups), given.reshape(()))
        return take(tensors, "weight_zero_point", ("int8",), (rows, groups))
    words = take(tensors, "weight_zero_point", WORDS, (_widths(rows, bits)[whole], groups))
    return _unpack(words, bits, 0, rows, whole).astype(np.int16) - (1 << bits - 1)


def _widths(count, bits):
    """Words of `count` codes: (dense, whole codes in each word)."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def _whole_codes(tensors, bits, columns):
    """Whether the packing is the older one, by the number of words of the weight or its zero points.

    Where both packings take as many (few codes), words that all leave their top bits 0 are taken for the older.
    """
    if 32 % bits == 0:
        return False
    streams = [(tensors["weight_packed"].shape[1], columns)]
    zeros = tensors.get("weight_zero_point")
    if zeros is not None and zeros.dtype.name in WORDS:
        streams.append((len(zeros), len(tensors["weight_packed"])))
    for width, count in streams:
        dense, whole = _widths(count, bits)
        if dense != whole:
            return width == whole
    return not (tensors["weight_packed"].view(np.uint32) >> np.uint32(32 // bits * bits)).any()


def _unpack(words, bits, axis, count, whole):
    if not whole:
        return unpack_stream(words, bits, axis, count)
    words = np.moveaxis(words, axis, -1).view(np.uint32)
    codes = np.empty((*words.shape, 32 // bits), np.uint8)
    for i in range(codes.shape[-1]):
        np.bitwise_and(words >> np.uint32(i * bits), np.uint32((1 << bits) - 1), out=codes[..., i], casting="unsafe")
    return np.moveaxis(codes.reshape(*words.shape[:-1], -1)[..., :count], -1, axis)
