# SPDX-License-Identifier: Apache-2.0
"""GGUF blocks: 32 numbers along a row behind a float16 scale.

    Q4_0   scale, 16 bytes    (q - 8) * scale
    Q4_1   scale, min, 16 bytes    q * scale + min
    Q8_0   scale, 32 int8    q * scale

Low nibbles are numbers 0-15 of the block, high nibbles 16-31.
"""

import numpy as np

from . import layout

BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
DENSE = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_NUMBERS = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 8: "q8_0", 30: "bf16"}
_CHUNK_BYTES = 1 << 20   # packed at a time, so that the steps of the packer meet in the cache


def type_name(kind):
    """Lower-case name of a ``GGMLQuantizationType``, its number or its name.

    Raises
    ------
    NotImplementedError
        No kernel reads the type; lists the ones there are.
    """
    name = kind.lower() if isinstance(kind, str) else _NUMBERS.get(int(kind), getattr(kind, "name", str(kind)))
    if name not in BLOCK_BYTES and name not in DENSE:
        known = ", ".join(n.upper() for n in (*BLOCK_BYTES, *DENSE))
        raise NotImplementedError(f"QMatrix: type must be one of {known}, got {kind!r}")
    return name


def pack(data, name, shape):
    """Packed tiles of raw GGUF blocks.

    Parameters
    ----------
    data : ndarray, uint8, N * K / 32 blocks
        Left as it is.
    name : str
        ``"q4_0"``, ``"q4_1"`` or ``"q8_0"``.
    shape : (int, int)
        (N, K).
    """
    rows, columns = shape
    size = BLOCK_BYTES[name]
    if columns % layout.GROUP:
        raise ValueError(f"QMatrix: shape must have in_features a multiple of 32 for {name.upper()}, got {list(shape)}")
    if data.size != rows * columns // layout.GROUP * size:
        raise ValueError(f"QMatrix: data must hold {rows * columns // layout.GROUP} blocks of {size} bytes, "
                         f"got {data.size} bytes")
    blocks = data.reshape(rows, columns // layout.GROUP, size)
    form = layout.FORMATS[name]
    row_tiles, column_tiles = layout.tiles(shape)
    packed = np.empty((row_tiles, column_tiles, form.tile_bytes), np.uint8)
    step = max(1, _CHUNK_BYTES // max(1, column_tiles * form.tile_bytes))
    for start in range(0, row_tiles, step):
        part = packed[start:start + step]
        _pack_part(part, form, layout.padded(blocks[16 * start:16 * (start + step)], 16 * len(part), 2 * column_tiles))
    return packed


def _pack_part(packed, form, blocks):
    header = form.scales // 2
    parameters = np.ascontiguousarray(blocks[..., :header]).view(np.float16)
    layout.put_scales(packed, form, *np.moveaxis(parameters, -1, 0))
    if form.code_bits == 4:
        layout.put_nibbles(packed, blocks[..., header:])
    else:
        codes = np.ascontiguousarray(blocks[..., header:])
        layout.put_codes(packed, codes.reshape(len(codes), -1))
