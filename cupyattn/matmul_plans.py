# SPDX-License-Identifier: Apache-2.0
"""How quant_gemm's tensor-core kernels are cut and launched (``cuda_src/include/quant_gemm_mma.cuh``)."""

import functools
from dataclasses import dataclass

from .quant.layout import TILE_COLUMNS, TILE_ROWS, dtype
from .runtime import Plan, Specialisation

_BLOCKS = 2 * 132                  # a GPU the columns are cut for, whatever it runs on: two blocks a multiprocessor
_ROWS_PER_BLOCK = 64               # of the streaming kernel with codes of up to 8 bits
_MIN_PIECE_TILES, _MAX_PIECES = 8, 32
_CHUNKS = 8                        # of a piece
_STREAM_BYTES = 4096               # of codes that a streaming warp has on their way, if they fit
_SHARED_BYTES = 96 * 1024          # of a block
_MAX_STAGES = 12


@dataclass(frozen=True)
class Partition:
    """How the columns of a segment are summed: by pieces of eight chunks of whole units.

    Attributes
    ----------
    unit : int
        Tiles of a unit, which shares its scales.
    pieces : int
        Parts summed by blocks of their own.
    tiles_per_piece, units_per_chunk : int
    """

    unit: int
    pieces: int
    tiles_per_piece: int
    units_per_chunk: int


@functools.lru_cache(maxsize=1024)
def partition(rows, column_tiles, form):
    """Partition of a segment of `rows` rows; the same for every number of tokens and every device."""
    shared = form.scale is not None and form.groups == 1 and form.tiles_per_scale % 2 == 0
    unit = 2 if shared and (form.super_scale is None or form.tiles_per_super % 2 == 0) else 1
    blocks, most = -(-rows // _ROWS_PER_BLOCK), max(1, min(_MAX_PIECES, column_tiles // _MIN_PIECE_TILES))

    def share_of_waves(pieces):
        return blocks * pieces / (-(-blocks * pieces // _BLOCKS) * _BLOCKS)

    best = max(map(share_of_waves, range(1, most + 1)))
    wanted = next(pieces for pieces in range(1, most + 1) if share_of_waves(pieces) >= 0.9 * best)
    units = -(-(-(-column_tiles // unit)) // wanted)   # of a piece
    return Partition(unit, -(-column_tiles // (units * unit)), units * unit, -(-units // _CHUNKS))


def mma_spec(form, x, out, bias, m_tile, unit, row_tiles, warps, stages):
    """Tensor cores: the streaming kernel with an `m_tile` of 8, else the pipelined one."""
    return Specialisation("quant_gemm", "quant_gemm_mma", "QuantGemmArgs",
                          {"T": x, "U": out, "B": bias, "FORMAT": form.trait, "M_TILE": m_tile, "ROW_TILES": row_tiles,
                           "WARPS": warps, "VEC": 8, "TENSOR_CORES": 1, "UNIT": unit, "STAGES": stages},
                          min_sm=80, expects=("HMMA", "LDGSTS"))


def shape_of(form, m_tile, unit):
    """(row tiles of a warp, warps, stages, shared bytes) of the kernel for `m_tile` tokens."""
    stream = m_tile == 8
    row_tiles = (4 if form.bits <= 8 else 2) if stream else 2 if m_tile == 64 else 1
    warps = 4 if m_tile == 64 else 8
    sums = 512 * row_tiles * (m_tile // 8) * warps                       # of all lanes
    fixed = 0 if stream else sums + 4 * form.groups * m_tile
    record = 0 if form.scale is None else 2 * form.parameters * form.groups * dtype(form.scale).itemsize
    above = 0 if form.super_scale is None else 2 * form.supers * dtype(form.super_scale).itemsize
    weights = -(-row_tiles * (form.tile_bytes + 8 * (record + above)) // 128) * 128
    rings = warps if stream else 1                                       # of x
    stage = rings * 2 * TILE_COLUMNS * m_tile + warps * weights
    wanted = 1 + -(-_STREAM_BYTES // (row_tiles * form.tile_bytes)) if stream else _MAX_STAGES
    stages = max(2, min(wanted, (_SHARED_BYTES - fixed) // stage))
    return row_tiles, warps, stages, max(stages * stage + fixed, sums + 16 if stream else 0)


def plan_mma(tokens, rows, pieces, unit, form, x, out, bias, arch, note):
    """Plan of one segment from the number of rows of x and of the weight, its `Partition`, dtype names and arch."""
    m_tile = next((m for m in (8, 16, 32) if tokens <= m), 64)
    row_tiles, warps, stages, shared = shape_of(form, m_tile, unit)
    block_rows = TILE_ROWS * row_tiles * (1 if m_tile == 8 else warps)
    grid = -(-rows // block_rows), -(-tokens // m_tile), pieces
    return Plan(mma_spec(form, x, out, bias, m_tile, unit, row_tiles, warps, stages), arch, grid, (32 * warps,), shared,
                note=f"{note}; {m_tile} rows of x and {block_rows} of the weight per block, {pieces} pieces, "
                     f"{stages} stages")


def tile_of_out(plan):
    """(rows of x, rows of the weight) of a block."""
    constants = dict(plan.spec.constants)
    m_tile = constants["M_TILE"]
    return m_tile, TILE_ROWS * constants["ROW_TILES"] * (1 if m_tile == 8 else constants["WARPS"])
