# SPDX-License-Identifier: Apache-2.0
"""AWQ (AutoAWQ "gemm"): w[k, n] = (code[k, n] - zero[k // group_size, n]) * scales[k // group_size, n].

    qweight    int32 [K, N * bits / 32]    field i of a word is column `_COLUMNS[bits][i]` of the word's
    qzeros     int32 [groups, N * bits / 32]    likewise; the zero point as it is
    scales     [groups, N]
"""

import numpy as np

from .bit_stream import transposed
from .coded import CodedWeight, Segment
from .groups import group_columns
from .tensors import SCALES, WORDS, check_shape, only, take, zero_points

_COLUMNS = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_CHUNK_WORDS = 1 << 15   # in flight


def read(tensors, bits=None, group_size=None, *, version="gemm"):
    """An AWQ weight.

    Parameters
    ----------
    tensors : dict of str to ndarray
        ``qweight``, ``qzeros`` and ``scales`` (float16, bfloat16 or float32).
    bits : int, optional
        4, or 8. Default what the shapes say.
    group_size : int, optional
        -1 for all of K. Default what the shapes say.
    version : str
        Only ``"gemm"``.

    Returns
    -------
    CodedWeight

    Raises
    ------
    ValueError, TypeError
        A tensor is missing, or of another shape or dtype; named in the message.
    NotImplementedError
        The layouts gemv and gemv_fast.
    """
    _check_layout(tensors, version)
    scales = take(tensors, "scales", SCALES, (None, None))
    groups, rows = scales.shape
    qweight = take(tensors, "qweight", WORDS, (None, None))
    in_features, words = qweight.shape
    fit = [b for b in _COLUMNS if bits in (None, b) and words * 32 == rows * b]
    bits = only("bits", fit, f"qweight {list(qweight.shape)}, scales {list(scales.shape)}")
    qzeros = take(tensors, "qzeros", WORDS, (groups, words))
    shape = check_shape((rows, in_features))
    group, _, _ = group_columns(in_features, groups, group_size)
    scale = np.ascontiguousarray(scales.T)
    centre = 1 << bits - 1
    zero = zero_points(_columns(qzeros, bits).astype(np.int16) - centre, scale)
    return CodedWeight("awq", shape, (Segment(_columns(qweight, bits), bits, "int", group, scale, centre, zero),))


def _columns(words, bits):
    """Fields of words [rows, words] as uint8 [columns, rows]."""
    words = transposed(words).view(np.uint32)
    fields = np.empty((len(words), 32 // bits, words.shape[1]), np.uint8)
    step = max(1, _CHUNK_WORDS // words.shape[1])
    for start in range(0, len(words), step):
        some, found = words[start:start + step], fields[start:start + step]
        for byte in range(4):
            eight = (some >> np.uint32(8 * byte)).astype(np.uint8)
            if bits == 8:
                found[:, _COLUMNS[8][byte]] = eight
            else:
                np.bitwise_and(eight, np.uint8(15), out=found[:, _COLUMNS[4][2 * byte]])
                np.right_shift(eight, np.uint8(4), out=found[:, _COLUMNS[4][2 * byte + 1]])
    return fields.reshape(-1, words.shape[1])


def _check_layout(tensors, version):
    """NotImplementedError for the layouts other than gemm, told by name or by the shape of their tensors."""
    if not isinstance(version, str):
        raise TypeError(f"QMatrix: version must be a str, got {version!r}")
    version = version.lower()
    if {"qweight", "scales"} <= tensors.keys():
        qweight, scales = tensors["qweight"], tensors["scales"]
        if qweight.dtype.name == "int16":
            version = "gemv_fast"
        elif version == "gemm" and qweight.shape[1] * 8 != scales.shape[-1] and len(qweight) == len(scales):
            version = "gemv"
    if version != "gemm":
        raise NotImplementedError(f"QMatrix: version must be 'gemm' for awq, whose qweight is int32 [K, N/8], "
                                  f"got the layout {version!r}")
