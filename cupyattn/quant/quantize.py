# SPDX-License-Identifier: Apache-2.0
"""Weights rounded to a coded format: each number to the nearest its group can say, by float32 arithmetic.

How a group (columns g of a row) chooses its scale:

    int, symmetric    the number of largest magnitude becomes code -2^(b-1), so the scale may be negative; wider only
                      where numbers of the other sign would lie above 2^(b-1) - 1/2. No number is off by more than
                      half a scale, and 4-bit weights by 12 % less than with max|w| / (2^(b-1) - 1) (RMS, normal
                      numbers; Laplace and Student t alike), as one code more is used. At 8 bits they tie.
    int, asymmetric   (max - min) / (2^b - 1), 0 among the numbers, zero point an integer
    fp8               max|w| / 448
    nf4               max|w|
    mxfp4             2^floor(log2(max|w|)) / 4, which lets up to 8 scales become 6, or twice that: whichever gives the
                      smaller sum of squared errors, 3 % less RMS over all groups than always the former
    nvfp4             max|w| / 6 as e4m3 times max|w of the row| / (6 * 448)

Scales of int and nf4 are float16, rounded away from 0, unless that would overflow or widen one by more than 1/64: then
all of the weight are float32. A group of zeros has scale 0, but 1/8 in mxfp4, which has no 0.
"""

import re

import ml_dtypes
import numpy as np

from .coded import NF4, TABLES, CodedWeight, Segment
from .tensors import SCALES, check_matrix, zero_points

SCHEMES = ("int4", "int8", "int4-g<N>", "int8-g<N>", "any int with -asym", "fp8", "fp8-block128", "nf4", "nf4-g<N>",
           "mxfp4", "nvfp4")
_SCHEME = re.compile(r"int[48](-g[1-9]\d*)?(-asym)?|fp8(-block128)?|nf4(-g[1-9]\d*)?|mxfp4|nvfp4")
_GROUPS = {"nf4": 64, "mxfp4": 32, "nvfp4": 16}   # else a row
_PART = 1 << 18   # numbers rounded at a time, so that the steps meet in the cache
_E2M1 = np.array(TABLES["e2m1"], np.float32)
_NF4_BOUNDS = [(NF4[i] + NF4[i + 1]) / 2 for i in range(15)]


def quantize(w, scheme):
    """A weight rounded to `scheme`.

    Parameters
    ----------
    w : ndarray [N, K], float16, bfloat16 or float32
        N and K multiples of 8, all numbers finite. Left as it is.
    scheme : str
        ``"int4"`` or ``"int8"`` (a scale per row), with ``-g<N>`` a scale for each N columns of a row (a multiple of
        16), with ``-asym`` zero points too, as in ``"int4-g128-asym"``; ``"fp8"`` (e4m3, a scale per row) or
        ``"fp8-block128"`` (per 128 x 128); ``"nf4"`` (64 columns) or ``"nf4-g<N>"``; ``"mxfp4"``; ``"nvfp4"``. The
        last group of a row may be short.

    Returns
    -------
    CodedWeight
        Its format is `scheme`.

    Raises
    ------
    NotImplementedError
        Another scheme; lists those there are.
    TypeError, ValueError
        `w` is none of the above.
    """
    check_scheme(scheme)
    if not isinstance(w, np.ndarray) or w.dtype.name not in SCALES:
        raise TypeError(f"quantize: w must be an array of {', '.join(SCALES)}, got {getattr(w, 'dtype', type(w))}")
    shape = check_matrix("w", w.shape)
    kind, *options = scheme.split("-")
    sizes = [int(option[1:]) for option in options if option[0] == "g"]
    group = 128 if "block128" in options else (*sizes, _GROUPS.get(kind, shape[1]))[0]
    weight = _Grouped(w, min(group, max(shape[1], 128)))
    if kind.startswith("int"):
        segment = (_int_asymmetric if "asym" in options else _int_symmetric)(weight, int(kind[3:]))
    elif kind == "fp8":
        segment = _fp8(weight, 128 if options else 1)
    else:
        segment = {"nf4": _nf4, "mxfp4": _mxfp4, "nvfp4": _nvfp4}[kind](weight)
    return CodedWeight(scheme, shape, (segment,))


def check_scheme(scheme):
    """Raise what `quantize` raises for a scheme it does not know."""
    if not isinstance(scheme, str):
        raise TypeError(f"quantize: scheme must be a str, got {scheme!r}")
    found = _SCHEME.fullmatch(scheme)
    if not found:
        raise NotImplementedError(f"quantize: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if any(int(group[2:]) % 16 for group in found.groups() if group and group.startswith("-g")):
        raise ValueError(f"quantize: scheme must have groups of a multiple of 16 columns, got {scheme!r}")


class _Grouped:
    """A weight in parts of some rows, float32 [rows, groups, group], short groups filled with zeros."""

    def __init__(self, w, group):
        self.w, self.group = w, group
        self.groups = -(-w.shape[1] // group)

    def __iter__(self):
        rows, columns = self.w.shape
        step = max(1, _PART // columns)
        wide = self.groups * self.group
        for start in range(0, rows, step):
            part = self.w[start:start + step]
            if wide == columns:
                filled = part.astype(np.float32)
            else:
                filled = np.zeros((len(part), wide), np.float32)
                filled[:, :columns] = part
            yield slice(start, start + len(part)), filled.reshape(len(part), self.groups, self.group)

    def extremes(self):
        """The least and the largest number of each group, float32 [N, groups]."""
        low, high = np.empty((2, self.w.shape[0], self.groups), np.float32)
        for rows, numbers in self:
            numbers.min(axis=-1, out=low[rows])
            numbers.max(axis=-1, out=high[rows])
        if not (np.isfinite(low) & np.isfinite(high)).all():
            raise ValueError("quantize: w must be finite, got NaN or infinity")
        return low, high

    def largest(self):
        """The largest magnitude of each group, float32 [N, groups]."""
        low, high = self.extremes()
        return np.maximum(-low, high)

    def codes(self, scale, code):
        """code(numbers / scale, rows) of all parts, uint8 [N, K]; numbers of a scale 0 count as 0."""
        codes = np.empty(self.w.shape, np.uint8)
        scale = np.where(scale == 0, np.float32(np.inf), scale.astype(np.float32))
        for rows, numbers in self:
            numbers /= scale[rows, :, None]
            codes[rows] = code(numbers, rows).reshape(len(numbers), -1)[:, :codes.shape[1]]
        return codes


def _stored(scale):
    """Scales as they are stored: see the head of this file."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
        short = np.abs(half.astype(np.float32)) < np.abs(scale)
        half[short] = np.nextafter(half[short], np.copysign(np.float16(np.inf), half[short]))
    wide = np.abs(half.astype(np.float32)) > np.abs(scale) * np.float32(1 + 1 / 64)
    return scale if wide.any() else half


def _int_symmetric(weight, bits):
    half = 1 << bits - 1
    low, high = weight.extremes()
    larger, other = np.maximum(-low, high), np.minimum(-low, high)
    scale = np.maximum(larger / np.float32(half), other / np.float32(half - 0.5))
    scale = _stored(np.where(high > -low, -scale, scale))

    def code(numbers, rows):
        np.rint(numbers, out=numbers)
        numbers += half
        return np.clip(numbers, 0, 2 * half - 1, out=numbers)

    return Segment(weight.codes(scale, code), bits, "int", weight.group, scale, centre=half)


def _int_asymmetric(weight, bits):
    most = np.float32((1 << bits) - 1)
    low, high = weight.extremes()
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = _stored(high / most - low / most)
    zero = np.rint(-low / np.where(scale == 0, 1, scale.astype(np.float32)))

    def code(numbers, rows):
        np.rint(numbers, out=numbers)
        numbers += zero[rows, :, None]
        return np.clip(numbers, 0, most, out=numbers)

    centre = 1 << bits - 1
    return Segment(weight.codes(scale, code), bits, "int", weight.group, scale, centre=centre,
                   zero=zero_points(zero - centre, scale))


def _fp8(weight, block_rows):
    largest = np.float32(448)
    starts = np.arange(0, weight.w.shape[0], block_rows)
    scale = np.maximum.reduceat(weight.largest(), starts, axis=0) / largest
    scale = np.repeat(scale, block_rows, axis=0)[:weight.w.shape[0]]

    def code(numbers, rows):
        np.clip(numbers, -largest, largest, out=numbers)
        return numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)

    return Segment(weight.codes(scale, code), 8, "e4m3", weight.group, scale)


def _nf4(weight):
    scale = _stored(weight.largest())

    def code(numbers, rows):
        codes = np.zeros(numbers.shape, np.uint8)
        for bound in _NF4_BOUNDS:
            codes += numbers > bound
        return codes

    return Segment(weight.codes(scale, code), 4, "nf4", weight.group, scale)


def _e2m1(numbers, rows):
    """Nearest codes, ties to the even one."""
    size = np.abs(numbers)
    codes = np.signbit(numbers).astype(np.uint8) << 3
    for even, odd in ((0.25, 0.75), (1.25, 1.75), (2.5, 3.5)):
        codes += size > even
        codes += size >= odd
    codes += size > 5
    return codes


def _mxfp4(weight):
    _, exponent = np.frexp(weight.largest())   # a fraction of [1/2, 1)
    exponent = np.maximum(exponent - 3, -127)
    wider = np.empty(exponent.shape, bool)

    def code(numbers, rows):
        narrow = _e2m1(numbers, rows)
        lost = np.square(numbers - _E2M1[narrow]).sum(axis=-1)
        numbers /= 2
        wide = _e2m1(numbers, rows)
        wider[rows] = 4 * np.square(numbers - _E2M1[wide]).sum(axis=-1) < lost
        return np.where(wider[rows, :, None], wide, narrow)

    codes = weight.codes(np.ldexp(np.float32(1), exponent), code)
    scale = (exponent + wider + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
    return Segment(codes, 4, "e2m1", weight.group, scale)


def _nvfp4(weight):
    largest = weight.largest()
    above = largest.max(axis=1, keepdims=True) / np.float32(6 * 448)
    scale = np.minimum(largest / np.float32(6) / np.where(above == 0, np.float32(np.inf), above), 448)
    scale = scale.astype(ml_dtypes.float8_e4m3fn)
    return Segment(weight.codes(scale.astype(np.float32) * above, _e2m1), 4, "e2m1", weight.group, scale,
                   super_scale=above, super_group=weight.groups * weight.group)
