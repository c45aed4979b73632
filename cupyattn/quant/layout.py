# SPDX-License-Identifier: Apache-2.0
"""The one layout every weight is packed into, whatever checkpoint it came from.

A matrix [N, K] is cut into tiles of 16 rows and 64 columns, stored row of tiles by row of tiles. In a tile, lane
L = 4r + c of a warp owns rows r and r + 8 and, in each of the four 16-column steps t, columns 2c, 2c+8, 2c+1, 2c+9 of
the step: what a lane holds of the left operand of mma.m16n8k16. These 16 columns in the order (t, those four) are the
lane's *run*. A tile is the lanes' codes in chunks of 16 bytes, [chunk][lane][16 bytes], then the scales,
[r 8][lane scales]. Rows and columns past N and K are zero.

    4-bit codes   1 chunk: byte i = run code i of row r | run code i of row r + 8 << 4
    8-bit codes   2 chunks: the run of row r, the run of row r + 8
    16-bit        4 chunks: row r codes 0-7, 8-15, then row r + 8
    32-bit        8 chunks, likewise
    scales        float16 of (r, group 0), (r, group 1), (r + 8, group 0), (r + 8, group 1); groups are 32 columns;
                  formats with a minimum follow with their four minima
"""

from dataclasses import dataclass

import numpy as np

TILE_ROWS, TILE_COLUMNS, GROUP = 16, 64, 32

# column (of 64) at position 16c + 4t + b of the runs of lanes c = 0..3, b counting the four columns of a step
RUN = np.array([16 * t + 2 * c + (0, 8, 1, 9)[b] for c in range(4) for t in range(4) for b in range(4)])
_RUN_INVERSE = np.argsort(RUN)
# byte order of the 16 packed bytes of one 32-column group, as RUN orders one step
_STEP = np.array([2 * c + (0, 8, 1, 9)[b] for c in range(4) for b in range(4)])


@dataclass(frozen=True)
class Format:
    """How the numbers of a packed matrix are coded.

    Parameters
    ----------
    name : str
        ``"q4_0"``, …, or the dtype of an uncompressed matrix.
    trait : str
        The struct in ``dequant.cuh``.
    code_bits, scales : int
        Bits per code, and float16 numbers per lane in a tile (0, 4 or 8).
    """

    name: str
    trait: str
    code_bits: int
    scales: int

    @property
    def code_bytes(self):
        """Bytes of a tile's codes."""
        return TILE_ROWS * TILE_COLUMNS * self.code_bits // 8

    @property
    def tile_bytes(self):
        """Bytes of a tile."""
        return self.code_bytes + 8 * 2 * self.scales


FORMATS = {f.name: f for f in (
    Format("q4_0", "Q4_0", 4, 4), Format("q4_1", "Q4_1", 4, 8), Format("q8_0", "Q8_0", 8, 4),
    Format("float16", "Dense<__half>", 16, 0), Format("bfloat16", "Dense<__nv_bfloat16>", 16, 0),
    Format("float32", "Dense<float>", 32, 0))}


def tiles(shape):
    """(row tiles, column tiles) of a matrix [N, K]."""
    return -(-shape[0] // TILE_ROWS), -(-shape[1] // TILE_COLUMNS)


def padded(array, rows, columns):
    """`array` [N, K, ...] with zeros appended up to `rows` and `columns`; itself when it has them."""
    if array.shape[:2] == (rows, columns):
        return array
    out = np.zeros((rows, columns, *array.shape[2:]), array.dtype)
    out[:array.shape[0], :array.shape[1]] = array
    return out


def put_codes(packed, values):
    """Write `values` [16 Nt, 64 Kt] of 1, 2 or 4 bytes each as the codes of `packed` [Nt, Kt, tile_bytes]."""
    row_tiles, column_tiles = packed.shape[:2]
    size = values.itemsize
    runs = values.view(f"u{size}").reshape(-1, column_tiles, 64).take(RUN, axis=-1)
    # [tile row, half, r, tile column, c, chunk of the run] of 16-byte chunks -> [.., half, chunk, r, c]
    chunks = runs.view("u8").reshape(row_tiles, 2, 8, column_tiles, 4, size, 2)
    out = packed[..., :1024 * size].view("u8").reshape(row_tiles, column_tiles, 2, size, 8, 4, 2)
    out[...] = chunks.transpose(0, 3, 1, 5, 2, 4, 6)


def get_codes(packed, dtype):
    """The inverse of `put_codes`: [16 Nt, 64 Kt] of `dtype` (1, 2 or 4 bytes)."""
    row_tiles, column_tiles = packed.shape[:2]
    size = np.dtype(dtype).itemsize
    chunks = packed[..., :1024 * size].view("u8").reshape(row_tiles, column_tiles, 2, size, 8, 4, 2)
    runs = np.ascontiguousarray(chunks.transpose(0, 2, 4, 1, 5, 3, 6)).view(f"u{size}").reshape(-1, column_tiles, 64)
    return runs.take(_RUN_INVERSE, axis=-1).reshape(16 * row_tiles, 64 * column_tiles).view(dtype)


def put_nibbles(packed, blocks):
    """Write 4-bit codes: `blocks` [16 Nt, 2 Kt, 16] bytes, low nibbles columns 0-15 of a group, high 16-31."""
    row_tiles, column_tiles = packed.shape[:2]
    words = blocks.take(_STEP, axis=-1).view("u4").reshape(row_tiles, 2, 8, column_tiles, 2, 4)
    words = words.transpose(1, 0, 3, 2, 5, 4)                       # [half, tile row, tile column, r, c, group]
    low, high = words[0], words[1]
    out = packed[..., :512].view("u4").reshape(row_tiles, column_tiles, 8, 4, 2, 2)
    mask = np.uint32(0x0F0F0F0F)
    out[..., 0] = low & mask | (high & mask) << np.uint32(4)
    out[..., 1] = low >> np.uint32(4) & mask | high & ~mask


def get_nibbles(packed):
    """4-bit codes as uint8 [16 Nt, 64 Kt]."""
    row_tiles, column_tiles = packed.shape[:2]
    lanes = packed[..., :512].reshape(row_tiles, column_tiles, 8, 64)
    both = np.stack([lanes & 15, lanes >> 4], axis=1)               # [tile row, half, tile column, r, run]
    return both.transpose(0, 1, 3, 2, 4).take(_RUN_INVERSE, axis=-1).reshape(16 * row_tiles, 64 * column_tiles)


def put_scales(packed, form, *parameters):
    """Write float16 [16 Nt, 2 Kt] arrays (scale, then minimum) behind the codes."""
    row_tiles, column_tiles = packed.shape[:2]
    out = packed[..., form.code_bytes:].view("f2").reshape(row_tiles, column_tiles, 8, len(parameters), 2, 2)
    for i, values in enumerate(parameters):
        out[:, :, :, i] = values.reshape(row_tiles, 2, 8, column_tiles, 2).transpose(0, 3, 2, 1, 4)


def get_scales(packed, form):
    """float16 [parameters, 16 Nt, 2 Kt]."""
    row_tiles, column_tiles = packed.shape[:2]
    count = form.scales // 4
    held = packed[..., form.code_bytes:].view("f2").reshape(row_tiles, column_tiles, 8, count, 2, 2)
    return held.transpose(3, 0, 4, 2, 1, 5).reshape(count, 16 * row_tiles, 2 * column_tiles)
