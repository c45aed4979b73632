# SPDX-License-Identifier: Apache-2.0
"""GGUF blocks: 32, 64 or 256 numbers along a row behind their scales, little-endian.

    blocks of 32, d and m float16
    Q4_0   d, 16 bytes                      d * (q - 8)
    Q4_1   d, m, 16 bytes                   d * q + m
    Q5_0   d, 32 fifth bits, 16 bytes       d * (q - 16)
    Q5_1   d, m, 32 fifth bits, 16 bytes    d * q + m
    Q8_0   d, 32 int8                       d * q
    IQ4_NL d, 16 bytes                      d * TABLES["iq4"][q]
    MXFP4  e8m0, 16 bytes                   2**(e - 127) * e2m1
    blocks of 64
    NVFP4  4 unsigned e4m3, 32 bytes        s * e2m1, s of 16 numbers
    blocks of 256: integers s and m of 16 (32 in Q4_K, Q5_K, IQ4_XS) numbers, d and dmin of all
    Q2_K   16 x (s, m) of 4 bits, 64 bytes, d, dmin               d * s * q - dmin * m
    Q3_K   32 bytes third bits, 64 bytes, 16 x s of 6 bits, d     d * (s - 32) * (q - 4)
    Q4_K   d, dmin, 8 x (s, m) of 6 bits, 128 bytes               d * s * q - dmin * m
    Q5_K   d, dmin, 8 x (s, m), 32 bytes fifth bits, 128 bytes    d * s * q - dmin * m
    Q6_K   128 bytes, 64 bytes upper bits, 16 x s int8, d         d * s * (q - 32)
    IQ4_XS d, 8 x s of 6 bits (2 bytes upper, 4 lower), 128 bytes d * (s - 32) * TABLES["iq4"][q]

Codes lie in planes: a run of bytes holds the lowest bits of as many neighbouring numbers, above them those of the
next run's worth of numbers, and so on.
"""

import numpy as np

from ..runtime.arrays import dtype_of
from .coded import CodedWeight, Segment

DENSE = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_NUMBERS = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k",
            12: "q4_k", 13: "q5_k", 14: "q6_k", 20: "iq4_nl", 23: "iq4_xs", 30: "bf16", 39: "mxfp4", 40: "nvfp4"}


def type_name(kind):
    """Lower-case name of a ``GGMLQuantizationType``, its number or its name.

    Raises
    ------
    NotImplementedError
        The type has no reader; lists those that have.
    """
    if not isinstance(kind, str | int):
        raise TypeError(f"QMatrix: type must be a GGMLQuantizationType, its number or name, got {kind!r}")
    name = kind.lower() if isinstance(kind, str) else _NUMBERS.get(int(kind), getattr(kind, "name", str(kind)))
    if name not in BLOCKS and name not in DENSE:
        raise NotImplementedError(_one_of((*BLOCKS, *DENSE), kind))
    return name


def _one_of(names, kind):
    return f"QMatrix: type must be one of {', '.join(n.upper() for n in names)}, got {kind!r}"


def read(data, name, shape):
    """The weight that raw GGUF blocks stand for.

    Parameters
    ----------
    data : ndarray, uint8
        Blocks of N rows in order, any shape. Left as it is.
    name : str
        A key of `BLOCKS`.
    shape : (int, int)
        (N, K): GGUF's ``ne`` reversed. K is a multiple of the block's numbers.

    Returns
    -------
    CodedWeight
    """
    rows = shape[0]
    held = blocks(data, name, shape)
    found = BLOCKS[name][2](held)
    found = {key: value.reshape(rows, -1) if isinstance(value, np.ndarray) else value for key, value in found.items()}
    return CodedWeight(name, tuple(shape), (Segment(**found),))


def blocks(data, name, shape):
    """`data` as [N, blocks of a row, bytes of a block]; `read` takes ranges of its rows, too."""
    if name not in BLOCKS:
        raise NotImplementedError(_one_of(BLOCKS, name))
    columns, size, _ = BLOCKS[name]
    rows, width = shape
    if rows < 1 or width < 1 or width % columns:
        raise ValueError(f"QMatrix: shape must have in_features a multiple of {columns} for {name.upper()}, "
                         f"got {list(shape)}")
    if data.dtype != np.uint8:
        raise TypeError(f"QMatrix: data must be uint8, got {data.dtype.name}")
    if data.size != rows * width // columns * size:
        raise ValueError(f"QMatrix: data must hold {rows * width // columns} blocks of {size} bytes, "
                         f"got {data.size} bytes")
    return np.ascontiguousarray(data).reshape(rows, width // columns, size)


def check_rows(data, shape):
    """ValueError where the axes of `data` are of other rows than `shape`: its in_features and out_features swapped."""
    if data.ndim > 1 and shape[0] not in np.cumprod(data.shape):
        raise ValueError(f"QMatrix: data must have {shape[0]} rows for shape {list(shape)}, "
                         f"got shape {list(data.shape)}")


def _words(data):
    """Bytes [..., n] in one piece as words of 8 bytes, or of 1 where n is no multiple of 8. NumPy copies whole records
    and shifts whole words much faster than bytes."""
    size = data.shape[-1]
    return np.ascontiguousarray(data.view(f"V{size}")).view("u8" if size % 8 == 0 else "u1")


def _planes(data, run, bits):
    """Fields of `bits` bits out of bytes [..., n], run by run, lowest plane first: [..., 8 / bits * n]."""
    words = _words(data)
    mask = np.full(words.itemsize, (1 << bits) - 1, np.uint8).view(words.dtype)
    out = np.empty((*data.shape[:-1], data.shape[-1] // run, 8 // bits), f"V{run}")
    for plane in range(8 // bits):
        field = words >> words.dtype.type(plane * bits)
        field &= mask
        out[..., plane] = field.view(f"V{run}")
    return out.view(np.uint8).reshape(*data.shape[:-1], -1)


def _float16(blocks, at):
    return np.ascontiguousarray(blocks[..., at:at + 2]).view(np.float16)


def _join(low, high, bits):
    """low | high << bits, all below 256, in the memory of `high`."""
    word = np.dtype("u8" if high.shape[-1] % 8 == 0 else "u1")
    words = high.view(word)
    words <<= word.type(bits)
    words |= low.view(word)
    return high


def _q4_0(blocks):
    return {"codes": _planes(blocks[..., 2:], 16, 4), "bits": 4, "kind": "int", "centre": 8, "group": 32,
            "scale": _float16(blocks, 0)}


def _q4_1(blocks):
    return {"codes": _planes(blocks[..., 4:], 16, 4), "bits": 4, "kind": "int", "group": 32,
            "scale": _float16(blocks, 0), "minimum": _float16(blocks, 2)}


def _five_bits(blocks, at):
    fifth = np.unpackbits(np.ascontiguousarray(blocks[..., at:at + 4]), axis=-1, bitorder="little")
    return _join(_planes(blocks[..., at + 4:], 16, 4), fifth, 4)


def _q5_0(blocks):
    return {"codes": _five_bits(blocks, 2), "bits": 5, "kind": "int", "centre": 16, "group": 32,
            "scale": _float16(blocks, 0)}


def _q5_1(blocks):
    return {"codes": _five_bits(blocks, 4), "bits": 5, "kind": "int", "group": 32, "scale": _float16(blocks, 0),
            "minimum": _float16(blocks, 2)}


def _q8_0(blocks):
    return {"codes": _words(blocks[..., 2:]).view(np.uint8) ^ np.uint8(128), "bits": 8, "kind": "int",
            "centre": 128, "group": 32, "scale": _float16(blocks, 0)}


def _iq4_nl(blocks):
    return {"codes": _planes(blocks[..., 2:], 16, 4), "bits": 4, "kind": "iq4", "group": 32,
            "scale": _float16(blocks, 0)}


def _mxfp4(blocks):
    return {"codes": _planes(blocks[..., 1:], 16, 4), "bits": 4, "kind": "e2m1", "group": 32,
            "scale": blocks[..., :1].copy().view(dtype_of("float8_e8m0fnu"))}


def _nvfp4(blocks):
    scale = blocks[..., :4] & 127            # unsigned; a NaN stands for 0 here
    scale[scale == 127] = 0
    return {"codes": _planes(blocks[..., 4:], 8, 4), "bits": 4, "kind": "e2m1", "group": 16,
            "scale": scale.view(dtype_of("float8_e4m3fn"))}


def _minima(scale, minimum, d):
    """Fields of s, m [..., n] below 64 and the pair (d, dmin) [..., 2]."""
    return {"scale": scale.view(np.int8), "minimum": -minimum.view(np.int8),
            "super_scale": d[..., :1], "super_minimum": d[..., 1:], "super_group": 256}


def _q2_k(blocks):
    d = np.ascontiguousarray(blocks[..., 80:]).view(np.float16)
    return {"codes": _planes(blocks[..., 16:80], 32, 2), "bits": 2, "kind": "int", "group": 16,
            **_minima(blocks[..., :16] & 15, blocks[..., :16] >> 4, d)}


def _q3_k(blocks):
    scale = _join(_planes(blocks[..., 96:104], 8, 4), _planes(blocks[..., 104:108], 4, 2), 4)
    return {"codes": _join(_planes(blocks[..., 32:96], 32, 2), _planes(blocks[..., :32], 32, 1), 2),
            "bits": 3, "kind": "int", "centre": 4, "group": 16, "scale": scale.view(np.int8) - np.int8(32),
            "super_scale": _float16(blocks, 108), "super_group": 256}


def _scales_of_4_and_5(blocks):
    """d, dmin and the 12 bytes of 6-bit s and m.

    Byte i of the first four holds s[i] and the upper bits of s[i + 4], of the next four likewise m; of the last four
    the lower bits of s[i + 4] and, above, m[i + 4].
    """
    s, m, low = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    return _minima(np.concatenate([s & 63, (low & 15) | (s >> 2 & 48)], axis=-1),
                   np.concatenate([m & 63, (low >> 4) | (m >> 2 & 48)], axis=-1),
                   np.ascontiguousarray(blocks[..., :4]).view(np.float16))


def _q4_k(blocks):
    return {"codes": _planes(blocks[..., 16:], 32, 4), "bits": 4, "kind": "int", "group": 32,
            **_scales_of_4_and_5(blocks)}


def _q5_k(blocks):
    return {"codes": _join(_planes(blocks[..., 48:], 32, 4), _planes(blocks[..., 16:48], 32, 1), 4), "bits": 5,
            "kind": "int", "group": 32, **_scales_of_4_and_5(blocks)}


def _q6_k(blocks):
    return {"codes": _join(_planes(blocks[..., :128], 64, 4), _planes(blocks[..., 128:192], 32, 2), 4), "bits": 6,
            "kind": "int", "centre": 32, "group": 16, "scale": blocks[..., 192:208].copy().view(np.int8),
            "super_scale": _float16(blocks, 208), "super_group": 256}


def _iq4_xs(blocks):
    scale = _join(_planes(blocks[..., 4:8], 1, 4), _planes(blocks[..., 2:4], 1, 2), 4)
    return {"codes": _planes(blocks[..., 8:], 16, 4), "bits": 4, "kind": "iq4", "group": 32,
            "scale": scale.view(np.int8) - np.int8(32), "super_scale": _float16(blocks, 0), "super_group": 256}


# name: (numbers, bytes of a block, fields of its Segment)
BLOCKS = {
    "q4_0": (32, 18, _q4_0), "q4_1": (32, 20, _q4_1), "q5_0": (32, 22, _q5_0), "q5_1": (32, 24, _q5_1),
    "q8_0": (32, 34, _q8_0), "q2_k": (256, 84, _q2_k), "q3_k": (256, 110, _q3_k), "q4_k": (256, 144, _q4_k),
    "q5_k": (256, 176, _q5_k), "q6_k": (256, 210, _q6_k), "iq4_nl": (32, 18, _iq4_nl), "iq4_xs": (256, 136, _iq4_xs),
    "mxfp4": (32, 17, _mxfp4), "nvfp4": (64, 36, _nvfp4),
}
