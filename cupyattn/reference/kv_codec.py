# SPDX-License-Identifier: Apache-2.0
"""What every format of a quantized KV cache means: NumPy, float32 arithmetic when quantising, float64 when reading.

Rows run along the last axis: head_dim numbers become `Format.row_codes(head_dim)` bytes.
"""

import math

import numpy as np

from ..kv.quantized import FORMATS

# element held by each nibble of a 32-bit word, low to high, and by each pair of bits of a word of high bits
NIBBLES = np.array([0, 2, 4, 6, 1, 3, 5, 7])
PAIRS = np.array([0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15])
_FP8_MAX = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}


def _fp8(format):
    import ml_dtypes

    return np.dtype(ml_dtypes.float8_e4m3fn if format == "fp8_e4m3" else ml_dtypes.float8_e5m2)


def hadamard(x):
    """Every 32 numbers times H / sqrt(32), H the Sylvester matrix; in x's dtype, neighbours at distance 1 first."""
    x = x.reshape(*x.shape[:-1], -1, 32)
    for distance in (1, 2, 4, 8, 16):
        pair = x.reshape(*x.shape[:-1], -1, 2, distance)
        x = np.stack([pair[..., 0, :] + pair[..., 1, :], pair[..., 0, :] - pair[..., 1, :]], -2).reshape(x.shape)
    return (x * x.dtype.type(1 / math.sqrt(32))).reshape(*x.shape[:-2], -1)


def pack(codes, format):
    """Bytes of unsigned codes [..., head_dim] of a 4- or 6-bit format; 8-bit codes stay as they are."""
    bits, shape = FORMATS[format].bits, codes.shape[:-1]
    if bits == 8:
        return codes.astype(np.uint8, order="C")
    words = (codes & 15).reshape(*shape, -1, 8)[..., NIBBLES].astype(np.uint8)
    low = np.ascontiguousarray((words[..., 0::2] | words[..., 1::2] << 4).reshape(*shape, -1))
    if bits == 4:
        return low
    pairs = (codes >> 4).reshape(*shape, -1, 16)[..., PAIRS].astype(np.uint8).reshape(*shape, -1, 4)
    return np.concatenate([low, (pairs << np.uint8([0, 2, 4, 6])).sum(-1, dtype=np.uint8)], -1)


def unpack(packed, format):
    """Unsigned codes [..., head_dim] of bytes as `pack` makes them."""
    bits, shape = FORMATS[format].bits, packed.shape[:-1]
    if bits == 8:
        return packed.astype(np.int32)
    head_dim = packed.shape[-1] * 8 // bits
    low = packed[..., :head_dim // 2].astype(np.int32)
    codes = np.empty((*shape, head_dim // 8, 8), np.int32)
    codes[..., NIBBLES] = np.stack([low & 15, low >> 4], -1).reshape(codes.shape)
    codes = codes.reshape(*shape, head_dim)
    if bits == 6:
        pairs = packed[..., head_dim // 2:].astype(np.int32)[..., None] >> np.array([0, 2, 4, 6]) & 3
        high = np.empty((*shape, head_dim // 16, 16), np.int32)
        high[..., PAIRS] = pairs.reshape(high.shape)
        codes += high.reshape(*shape, head_dim) << 4
    return codes


def _whole(x, low, high):
    """Nearest integers, ties to even, saturated; NaN is 0."""
    return np.clip(np.nan_to_num(np.rint(x), nan=0.0, posinf=high, neginf=low), low, high).astype(np.int32)


def _inverse(scale):
    """1 / scale in float32, and 0 for a scale of 0: its codes are 0."""
    scale = np.asarray(scale, np.float32)
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _round_up_to_half(x):
    """Smallest float16 number ≥ x ≥ 0; the largest finite one where there is none."""
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    half = np.where(half.astype(np.float32) < x, np.nextafter(half, np.float16(np.inf)), half)
    return np.minimum(half, np.float16(65504))


def quantize(x, format, *, scale=None, scale_dtype="float16"):
    """Codes of rows [..., head_dim], with the scales this makes.

    Parameters
    ----------
    x : ndarray [..., num_kv_heads, head_dim]
        Taken as float32.
    format : str
        Key of ``FORMATS``.
    scale : ndarray, optional
        Fixed float32 scales, for int8_symmetric, int8_channel and fp8: [1], [num_kv_heads], or
        [num_kv_heads, head_dim] for int8_channel. Without them fp8 takes max|x| / largest number per row.
    scale_dtype : dtype
        Of the scale and zero of int8 and int4.

    Returns
    -------
    codes, scale, zero : ndarray
        codes uint8 (int8 for int8_symmetric, int8_channel) [..., row]; zero is None where the format has none.
    """
    x = np.asarray(x, np.float32)
    if format in ("int8", "int4"):
        levels = 255 if format == "int8" else 15
        low = x.min(-1)
        made = ((x.max(-1) - low) / np.float32(levels)).astype(scale_dtype)
        zero = low.astype(scale_dtype)
        shifted = x - zero.astype(np.float32)[..., None]
        return pack(_whole(shifted * _inverse(made.astype(np.float32))[..., None], 0, levels), format), made, zero
    if FORMATS[format].rotated:
        m = np.float32(2 ** (FORMATS[format].bits - 1))
        v = hadamard(x)
        groups = v.reshape(*v.shape[:-1], -1, 32)
        made = _round_up_to_half(np.abs(groups).max(-1))
        with np.errstate(divide="ignore", invalid="ignore"):
            grid = np.floor(groups / made.astype(np.float32)[..., None] * m + m)
        codes = _whole(np.where(made[..., None] == 0, 0, grid), 0, 2 * int(m) - 1)
        return pack(codes.reshape(v.shape), format), made, None
    if scale is None:
        scale = (np.abs(x).max(-1) / np.float32(_FP8_MAX[format])).astype(np.float32)
        by_row = scale[..., None]
    else:
        by_row = scale if format == "int8_channel" or scale.size == 1 else scale[..., None]
    scaled = x * _inverse(by_row)
    if format in _FP8_MAX:
        limit = np.float32(_FP8_MAX[format])
        return np.clip(scaled, -limit, limit).astype(_fp8(format), order="C").view(np.uint8), scale, None
    return _whole(scaled, -127, 127).astype(np.int8, order="C"), scale, None


def numbers(codes, format):
    """What the codes stand for before the scale, float64 [..., head_dim]: integers, fp8 numbers, or the grid -1..1."""
    if format in _FP8_MAX:
        return codes.view(_fp8(format)).astype(np.float64)
    if codes.dtype == np.int8:
        return codes.astype(np.float64)
    found = unpack(codes, format).astype(np.float64)
    if FORMATS[format].rotated:
        m = 2 ** (FORMATS[format].bits - 1)
        found = (found - (m - 0.5)) / m
    return found


def dequantize(codes, scale, zero=None, *, format, rotate_back=True):
    """float64 [..., num_kv_heads, head_dim] of codes and scales with the shapes that `quantize` has.

    With ``rotate_back=False`` a hadamard format stays rotated, as attention reads it.
    """
    x = numbers(codes, format)
    scale = np.asarray(scale).astype(np.float64)
    if FORMATS[format].rotated:
        x = (x.reshape(*x.shape[:-1], -1, 32) * scale[..., None]).reshape(x.shape)
        return hadamard(x) if rotate_back else x
    if format != "int8_channel" and scale.size > 1:
        scale = scale[..., None]
    x = x * scale
    return x if zero is None else x + np.asarray(zero).astype(np.float64)[..., None]
