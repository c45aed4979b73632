# SPDX-License-Identifier: Apache-2.0
"""How quant_gemm's kernels are cut and launched: those on tensor cores (``cuda_src/include/quant_gemm_mma.cuh``), and
the tiles of those on CUDA cores (``cuda_src/quant_gemm.cu``).

A tuned ``matmul_choice.Choice`` may replace tiles, warps and stages, never the `partition` of the columns.
"""

import functools
import itertools
from dataclasses import dataclass

from ..quant.layout import TILE_COLUMNS, TILE_ROWS, Form
from ..runtime import Plan, Specialisation

_BLOCKS = 2 * 132                  # a GPU the columns are cut for, whatever it runs on: two blocks a multiprocessor
_ROWS_PER_BLOCK = 64               # of the streaming kernel with codes of up to 8 bits
_MIN_PIECE_TILES, _MAX_PIECES = 8, 32
_CHUNKS = 8                        # of a piece
_STREAM_BYTES = 4096               # of codes that a streaming warp has on their way, if they fit
SHARED_BYTES = 96 * 1024           # of a block, which the smallest of GPUs with tensor cores have
IN_FLIGHT_BYTES = 48 * 1024       # of codes and scales that streams have on their way to a multiprocessor, at least
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
    blocks, units = -(-rows // _ROWS_PER_BLOCK), -(-column_tiles // unit)

    def units_one_after_another(pieces):
        waves, of_a_piece = -(-blocks * pieces // _BLOCKS), -(-units // pieces)
        return waves * -(-of_a_piece // _CHUNKS)

    legal = range(1, max(1, min(_MAX_PIECES, column_tiles // _MIN_PIECE_TILES)) + 1)
    fewest = min(map(units_one_after_another, legal))
    wanted = next(pieces for pieces in legal if 0.85 * units_one_after_another(pieces) <= fewest)
    per_piece = -(-units // wanted)
    return Partition(unit, -(-units // per_piece), per_piece * unit, -(-per_piece // _CHUNKS))


_GPTQ = Form(4, "int", 8, "float16", "ZERO")
_FORMS = (
    _GPTQ, Form(4, "int", 8, "float16"), Form(4, "int", 8, "float16", "PLAIN", 2),
    Form(4, "int", 0, "float16", "MINIMUM", 2), Form(8, "int", 128, "float16", "PLAIN", 2), Form(16, "float16"),
    Form(16, "bfloat16"), Form(2, "int", 2, "float16", "ZERO"), Form(3, "int", 4, "bfloat16"),
    Form(5, "int", 16, "float32", "ZERO"), Form(8, "int", 128, "bfloat16", "ZERO"),
    Form(6, "int", 32, "int8", "PLAIN", 4, "float16"), Form(4, "int", 0, "int8", "MINIMUM", 2, "float16"),
    Form(4, "nf4", 0, "float32"), Form(4, "fp4", 0, "float32"), Form(4, "iq4", 0, "int8", "PLAIN", 2, "float16"),
    Form(4, "e2m1", 0, "float8_e8m0fnu", "PLAIN", 2), Form(4, "e2m1", 0, "float8_e4m3fn", "PLAIN", 4, "float32"),
    Form(8, "e4m3", 0, "float32"), Form(8, "e5m2", 0, "float16"))
_CORE = (
    ("float16", "float16", "float16", 8, 2, _FORMS[1]), ("bfloat16", "bfloat16", "float32", 8, 2, _GPTQ),
    ("float16", "float32", "float32", 16, 1, _FORMS[4]), ("bfloat16", "float32", "bfloat16", 8, 1, _FORMS[3]),
    ("float16", "bfloat16", "float32", 32, 2, _GPTQ), ("bfloat16", "float16", "float32", 64, 1, _FORMS[2]),
    ("float16", "float16", "float32", 8, 1, _FORMS[5]), ("bfloat16", "bfloat16", "bfloat16", 64, 1, _FORMS[6]),
    ("float16", "float32", "float16", 64, 2, _FORMS[9]), ("bfloat16", "float32", "float32", 16, 2, _FORMS[8]),
    ("float16", "float16", "float32", 8, 1, _FORMS[11]), ("bfloat16", "float32", "float32", 32, 1, _FORMS[13]),
    ("float16", "float32", "float32", 8, 1, _FORMS[17]), ("bfloat16", "bfloat16", "float32", 8, 2, _FORMS[18]),
    ("float16", "bfloat16", "float16", 16, 1, _FORMS[15]), ("float16", "float32", "float16", 8, 2, _FORMS[7]))


def mma_spec(form, x, out, bias, m_tile, unit, row_tiles, warps, stages, experts=False):
    """Tensor cores: a stream with an `m_tile` of 8, else a pipeline."""
    return Specialisation("quant_gemm", "quant_gemm_mma", "QuantGemmArgs",
                          {"T": x, "U": out, "B": bias, "FORMAT": form.trait, "M_TILE": m_tile, "ROW_TILES": row_tiles,
                           "WARPS": warps, "VEC": 8, "TENSOR_CORES": 1, "EXPERTS": int(experts), "UNIT": unit,
                           "STAGES": stages},
                          min_sm=80, expects=("HMMA", "LDGSTS"))


def token_tile(tokens, experts=0):
    """Rows of x per block on tensor cores: the smallest tile that holds them all, else the largest."""
    return next((m for m in (8, 16, 32) if tokens <= m * max(1, experts)), 64)


def core_tile(tokens, row_tiles, arch, experts=0):
    """(rows of x, row tiles of the weight) per block on CUDA cores.

    On the CPU one warp has as many rows as leave a few blocks to share among the workers.
    """
    m_tile = next((m for m in (1, 2, 4) if tokens <= m * max(1, experts)), 8)
    if arch != "cpu":
        return m_tile, 1
    return m_tile, next((n for n in (32, 16, 8, 4, 2) if row_tiles >= 4 * n and n * m_tile <= 64), 1)


def _spec_of(form, x, out, bias, m_tile, unit, experts=False):
    row_tiles, warps, stages, _ = shape_of(form, m_tile)
    return mma_spec(form, x, out, bias, m_tile, unit, row_tiles, warps, stages, experts)


@functools.lru_cache(maxsize=1024)
def shape_of(form, m_tile, most=4):
    """(row tiles of a warp, warps, stages, shared bytes) of the kernel for `m_tile` tokens.

    At `most` so many row tiles; fewer where two stages do not fit or too little would be on its way.
    """
    # four row tiles of 5-bit codes with such records do not fit into the registers on sm_100 and later
    wide = form.bits > 8 or (form.bits, form.scale, form.mode) == (5, "float32", "ZERO")
    row_tiles = min(most, (2 if wide else 4) if m_tile == 8 else 2 if m_tile == 64 else 1)
    while True:
        warps, stages, shared = _rings(form, m_tile, row_tiles)
        few = m_tile == 8 and in_flight(form, row_tiles, warps, stages) < IN_FLIGHT_BYTES
        if row_tiles == 1 or (shared <= SHARED_BYTES and not few):
            return row_tiles, warps, stages, shared
        row_tiles //= 2


def shape_for(form, m_tile, others):
    """`shape_of` of a segment that shares its tiles of out with segments of forms `others`."""
    return shape_of(form, m_tile, min((shape_of(other, m_tile)[0] for other in others), default=4))


def in_flight(form, row_tiles, warps, stages):
    """Bytes on their way to a multiprocessor with two blocks of streams; scales of tiles that have their own count."""
    tile = form.tile_bytes + (TILE_ROWS * form.scale_bytes if form.groups > 1 else 0)
    return 2 * warps * (stages - 1) * row_tiles * tile


@functools.lru_cache(maxsize=1024)
def shape_as(form, choice):
    """`shape_of` of a tuned Choice."""
    return choice.row_tiles, *_rings(form, choice.m_tile, choice.row_tiles, choice.warps, choice.stages)


def _rings(form, m_tile, row_tiles, warps=None, wanted=None):
    """(Warps, stages, shared bytes) with `row_tiles` a warp; None: as many warps, stages wanted, as is usual."""
    stream = m_tile == 8
    warps = warps or (4 if m_tile == 64 else 8)
    sums = 512 * row_tiles * (m_tile // 8) * warps                       # of all lanes
    fixed = 0 if stream else sums + 4 * form.groups * m_tile
    weights = -(-row_tiles * (form.tile_bytes + TILE_ROWS * (form.scale_bytes + form.super_bytes)) // 128) * 128
    rings = warps if stream else 1                                       # of x
    stage = rings * 2 * TILE_COLUMNS * m_tile + warps * weights
    if wanted is None:
        wanted = 1 + -(-_STREAM_BYTES // (row_tiles * form.tile_bytes)) if stream else _MAX_STAGES
    stages = max(2, min(wanted, (SHARED_BYTES - fixed) // stage))
    return warps, stages, max(stages * stage + fixed, sums + 16 if stream else 0)


def mma_specs(*, core):
    """What the compile tests build: a covering dozen, or every form with every tile, the kinds of call by turns."""
    if core:
        for x, out, bias, m_tile, unit, form in _CORE:
            yield _spec_of(form, x, out, bias, m_tile, unit)
        yield _spec_of(_GPTQ, "float16", "float16", "float32", 8, 2, experts=True)
        yield _spec_of(_FORMS[16], "bfloat16", "bfloat16", "bfloat16", 16, 1, experts=True)
        return
    types = ("float16", "bfloat16"), ("bfloat16", "float16")
    for i, (form, (x, other)) in enumerate(itertools.product(_FORMS, types)):
        if form.kind in ("float16", "bfloat16"):
            if form.kind != x:
                continue
        units = (1, 2) if form.groups == 1 and form.scale else (1,)
        for j, (m_tile, unit) in enumerate(itertools.product((8, 16, 32, 64), units)):
            out, bias, experts = ((x, "float32", False), ("float32", x, False), (x, x, True))[(i + j) % 3]
            yield _spec_of(form, x, out, bias, m_tile, unit, experts=experts)
        yield _spec_of(form, x, other, "float32", 8, 1)


@functools.lru_cache(maxsize=4096)
def plan_mma(tokens, rows, pieces, unit, form, x, out, bias, arch, note, experts=0, others=(), choice=None):
    """Plan of one segment from the number of rows of x and of the weight, its `Partition`, dtype names and arch.

    `experts`: how many share the rows of x, 0 for a weight for all of them. `others`: forms of segments with which this
    one shares its tiles of out. `choice`: a tuned matmul_choice.Choice.
    """
    m_tile = token_tile(tokens, experts) if choice is None else choice.m_tile
    if choice is None:
        row_tiles, warps, stages, shared = shape_for(form, m_tile, others)
    else:
        row_tiles, warps, stages, shared = shape_as(form, choice)
    block_rows = TILE_ROWS * row_tiles * (1 if m_tile == 8 else warps)
    grid = -(-rows // block_rows), tiles_of_tokens(tokens, m_tile, experts), pieces
    spec = mma_spec(form, x, out, bias, m_tile, unit, row_tiles, warps, stages, experts > 0)
    return Plan(spec, arch, grid, (32 * warps,), shared,
                note=f"{note}; {m_tile} rows of x and {block_rows} of the weight per block, {pieces} pieces, "
                     f"{stages} stages")


def tiles_of_tokens(tokens, m_tile, experts):
    """Tiles of m_tile rows of x, at most where `experts` have tiles of their own."""
    return -(-(tokens + min(experts, tokens) * (m_tile - 1)) // m_tile)


def tile_of_out(plan):
    """(rows of x, rows of the weight) of a block."""
    constants = dict(plan.spec.constants)
    m_tile = constants["M_TILE"]
    return m_tile, TILE_ROWS * constants["ROW_TILES"] * (1 if m_tile == 8 else constants["WARPS"])
