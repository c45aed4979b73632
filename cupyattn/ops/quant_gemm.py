# SPDX-License-Identifier: Apache-2.0
"""Activations times a packed weight. Kernel: ``cuda_src/quant_gemm.cu``."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import numpy as np

from ..matmul.blas import multiply_on_gpu, multiply_on_host
from ..matmul.choice import INVARIANT_TOKENS, Product, by_blas
from ..matmul.plans import Partition, core_tile, mma_specs, partition, plan_mma, tile_of_out, tiles_of_tokens
from ..matmul.tuning import tuned_choice
from ..quant import QExperts, QMatrix
from ..quant.layout import TRAITS
from ..runtime import (
    Plan,
    Specialisation,
    arch_of,
    arrival_counters,
    blas,
    compile_first,
    env,
    launch,
    make_args,
    workspace,
)
from ..runtime.arrays import alignment, array_namespace, as_rows, dtype_name, row_view
from ..runtime.checks import FLOATS, check_array, check_dtype, check_flag, check_shape, check_writeable
from ..runtime.launch import on_host

_MAX_TOKENS = 2**18        # rows of x per launch: grid.y ends at 65535 tiles
_WORKSPACE_TOKENS = 2**12  # rows of x per launch that takes scratch for them
_WORKSPACE_BYTES = 2**26   # of a launch's sums, if a tile of all rows of the weight is no more
_SLICE_TILES = 24          # MAX_SLICE_TILES of the kernel
_WARPS = 4                 # of a block on a GPU
_WHOLE = Partition(1, 1, 0, 0)   # how CUDA cores, which do not look at it, sum a segment: as one piece


def _spec(x, out, bias, trait, m_tile, row_tiles, warps, vec, experts=False):
    """CUDA cores."""
    return Specialisation("quant_gemm", "quant_gemm", "QuantGemmArgs",
                          {"T": x, "U": out, "B": bias, "FORMAT": trait, "M_TILE": m_tile,
                           "ROW_TILES": row_tiles, "WARPS": warps, "VEC": vec, "TENSOR_CORES": 0,
                           "EXPERTS": int(experts)},
                          # one-warp blocks are the CPU executor's: a GPU would keep some of their sums in memory
                          spill_bytes=1024 if warps == 1 else 0)


def _gather_spec(x):
    """`gather_columns`, which looks at the type of x only."""
    return Specialisation("quant_gemm", "gather_columns", "QuantGemmArgs",
                          {"T": x, "U": x, "B": x, "FORMAT": "Weights<Dense<float>,NoScales>", "M_TILE": 1,
                           "ROW_TILES": 1, "WARPS": 1, "VEC": 1, "TENSOR_CORES": 0, "EXPERTS": 0})


_Q4_0, _Q4_1, _Q8_0, _GPTQ, *_DENSE = _USUAL = (
    "Weights<Ints<4,8>,Scales<__half,PLAIN,2>>", "Weights<Ints<4,0>,Scales<__half,MINIMUM,2>>",
    "Weights<Ints<8,128>,Scales<__half,PLAIN,2>>", "Weights<Ints<4,8>,Scales<__half,ZERO,1>>",
    "Weights<Dense<__half>,NoScales>", "Weights<Dense<__nv_bfloat16>,NoScales>", "Weights<Dense<float>,NoScales>")
CORE = [*(_spec(*case) for case in (
    ("float16", "float16", "float32", _Q4_1, 1, 32, 1, 8), ("float16", "float32", "float16", _Q8_0, 1, 8, 1, 8),
    ("float32", "float32", "float32", _Q4_1, 8, 8, 1, 4), ("float32", "float16", "float32", _Q4_0, 2, 1, 1, 1),
    ("bfloat16", "bfloat16", "bfloat16", _GPTQ, 4, 1, 4, 8), ("bfloat16", "float32", "float32", _Q8_0, 8, 1, 4, 8),
    ("float16", "bfloat16", "float32", _DENSE[0], 4, 2, 1, 8), ("float32", "float32", "float32", _DENSE[2], 1, 1, 4, 4),
    ("bfloat16", "float16", "float32", _DENSE[1], 2, 1, 4, 1), ("float16", "float16", "float32", _Q4_1, 8, 1, 4, 1),
    ("float32", "bfloat16", "float32", "Weights<Ints<6,32>,SuperScales<int8_t,__half,PLAIN,4>>", 2, 1, 4, 4),
    ("float16", "float32", "float32", "Weights<Ints<3,4>,Scales<__nv_bfloat16,PLAIN,1>>", 4, 8, 1, 8),
    ("bfloat16", "bfloat16", "float32", "Weights<Table<NF4>,Scales<float,PLAIN,1>>", 1, 4, 1, 8),
    ("float32", "float16", "float32", "Weights<Table<E2M1>,SuperScales<E4M3,float,PLAIN,4>>", 8, 1, 4, 1),
    ("float16", "float16", "float16", "Weights<Float8<E4M3>,Scales<float,PLAIN,1>>", 2, 1, 4, 8),
)), _spec("float16", "float16", "float32", _Q4_1, 2, 4, 1, 8, experts=True),
    _spec("float32", "float32", "float32", _GPTQ, 8, 1, 4, 4, experts=True), _gather_spec("float16"),
    _gather_spec("float32"), *mma_specs(core=True)]


def more_specs():
    """What plans pick on a GPU: every pair of constants, not all products; every format at least once."""
    for x in FLOATS:
        yield _gather_spec(x)
    turns = itertools.count()
    for x, m_tile in itertools.product(FLOATS, (1, 2, 4, 8)):
        vecs = 1, 4 if x == "float32" else 8
        for out, bias, vec in itertools.product(FLOATS, dict.fromkeys((x, "float32")), vecs):
            yield _spec(x, out, bias, _USUAL[next(turns) % len(_USUAL)], m_tile, 1, _WARPS, vec)
        for trait, vec in itertools.product(_USUAL, vecs):
            yield _spec(x, FLOATS[next(turns) % 3], "float32", trait, m_tile, 1, _WARPS, vec)
        for trait in _USUAL:
            yield _spec(x, x, "float32", trait, m_tile, 1, _WARPS, vecs[1], experts=True)
    for i, trait in enumerate(TRAITS):
        yield _spec(FLOATS[i % 3], "float32", "float32", trait, 1 << i % 4, 1, _WARPS, 1)
    yield from mma_specs(core=False)


@functools.lru_cache(maxsize=1024)
def _version(kinds, x, arch):
    """("mma" or "core", why) from the kinds of the weight's codes, x's dtype name and arch."""
    if x == "float32" or "float32" in kinds:
        return "core", "CUDA cores: float32 is not rounded for tensor cores"
    other = [kind for kind in kinds if kind in FLOATS and kind != x]
    if other:
        return "core", f"CUDA cores: {other[0]} weights with {x} x"
    if arch == "cpu":
        return "core", "CUDA cores, the faster version on the CPU"
    if int(arch[3:].rstrip("af")) < 80:
        return "core", f"CUDA cores: {arch} is older than sm_80"
    return "mma", "tensor cores"


def version_of(geometry, x, arch):
    """"mma" or "core", whichever multiplies a weight of this QMatrix.geometry."""
    return _version(tuple(dict.fromkeys(form.kind for form, *_ in geometry)), x, arch)[0]


@functools.lru_cache(maxsize=4096)
def _plan_quant_gemm(tokens, row_tiles, trait, x, out, bias, align, arch, why, experts=0, choice=None):
    """Plan from the rows of x, the weight's row tiles and format, dtype names, x's alignment, arch, why this version.

    `experts`: how many share the rows of x, 0 for a weight for all of them. `choice`: a tuned matmul_choice.Choice.
    """
    vec = 16 // (4 if x == "float32" else 2) if align == 16 else 1
    m_tile, tiles_per_block = core_tile(tokens, row_tiles, arch, experts)
    if choice is not None:
        m_tile, tiles_per_block = choice.m_tile, choice.row_tiles
    warps = 1 if arch == "cpu" else _WARPS   # a GPU's threads are many, the CPU's dear
    spec = _spec(x, out, bias, trait, m_tile, tiles_per_block, warps, vec, experts > 0)
    grid = -(-row_tiles // tiles_per_block), tiles_of_tokens(tokens, m_tile, experts)
    return Plan(spec, arch, grid, (32 * warps,),
                4 * m_tile * 64 * _SLICE_TILES,
                note=f"{why}; {m_tile} rows of x per block, {vec} elements per load")


@functools.lru_cache(maxsize=1024)
def _plan_gather(tokens, columns, x, arch):
    """Plan from the number of rows of x, the columns of the segments, x's dtype name and arch."""
    threads = 32 if arch == "cpu" else 256
    return Plan(_gather_spec(x), arch, (tokens, 1 if arch == "cpu" else -(-columns // 1024)), (threads,),
                note="x in the order of the weight's columns")


def quant_gemm(x, qmatrix, /, *, expert_offsets=None, bias=None, accumulate=False, invariant=False, out=None):
    """Product of activations and a packed weight matrix.

    out = x @ W.T + bias (+ out with ``accumulate=True``)

    Parameters
    ----------
    x : ndarray [..., K], float16, bfloat16 or float32
        Rows may be strided (a slice of a wider array); the last axis is contiguous.
    qmatrix : QMatrix [N, K] or QExperts [E, N, K]
    expert_offsets : ndarray [E + 1], int32
        With QExperts, and x [M, K]: rows ``expert_offsets[e]`` to ``expert_offsets[e + 1]`` of x are expert e's, any
        number of them. Rows of `out` before the first and after the last stay as they are. Never read on the host.
    bias : ndarray [N] or, with QExperts, [E, N], float32 or x.dtype, optional
    accumulate : bool
        Add to what `out` holds instead of replacing it. Needs `out`.
    invariant : bool
        A row of `out` has the same bits whatever the number of rows. False: only for up to 64 rows, with QExperts, or
        where BLAS is not used.
    out : ndarray [..., N], float16, bfloat16 or float32, optional
        Default: a new array of x.dtype. Must overlap no input.

    Returns
    -------
    out : ndarray [..., N]
        Same kind (NumPy or CuPy) as `x`.

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, an unsupported dtype, or `qmatrix` no QMatrix.
    ValueError
        Shapes that do not fit, a last axis that is not contiguous, ``accumulate=True`` without `out`, or offsets that
        run backwards or past x: seen in NumPy arrays, and in others under ``CUPYATTN_CHECK=1``; without it such an
        expert has fewer rows.
    RuntimeError
        The current CuPy stream captures a graph and lacks the scratch: call the op once before the capture.

    Notes
    -----
    Products and sums are float32, weights are never rounded; the store is the only rounding. float16 and bfloat16 `x`
    run on tensor cores from sm_80 on (numbers of NF4 and FP4 are then within 2^-17 of the largest), all else on CUDA
    cores. With many rows (CuPy with cuBLAS: about 250, ``cupyattn/matmul/choice.py`` says when; NumPy: 128, and only
    under ``runtime.cpu.settings(blas=True)``) the weight is dequantized by chunks for BLAS to multiply, its sums
    float32 too. On a GPU that rounds weights to the type of `x`, and `bias` to that of `out`: done only where `out`
    keeps within 3e-4 of the truth for float16, 2e-3 for bfloat16 and 1e-5 for float32. On CuPy arrays asynchronous on
    the current stream. Kernel: ``cuda_src/quant_gemm.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> w = cupyattn.QMatrix.from_dense(np.eye(2, 8, dtype=np.float16))
    >>> cupyattn.quant_gemm(np.arange(8, dtype=np.float32), w)
    array([0., 1.], dtype=float32)
    """
    if not isinstance(qmatrix, QMatrix | QExperts):
        raise TypeError(f"quant_gemm: qmatrix must be a QMatrix, got {type(qmatrix).__name__}; "
                        "make one with QMatrix.from_dense(w)")
    xp = array_namespace("quant_gemm", x=x, qmatrix=qmatrix.segments[0].codes, expert_offsets=expert_offsets, bias=bias,
                         out=out)
    dtype, bias_dtype = check_dtype("quant_gemm", "x", x, FLOATS), "float32"
    *experts, rows, columns = qmatrix.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"quant_gemm: x must be [..., in_features={columns}], got {list(x.shape)}")
    check_flag("quant_gemm", "accumulate", accumulate)
    if bias is not None:
        bias_dtype = check_array("quant_gemm", "bias", bias, tuple(dict.fromkeys(("float32", dtype))),
                                 (*experts, rows), "[experts, out_features]" if experts else "[out_features]",
                                 contiguous=False)
    if out is None:
        if accumulate:
            raise ValueError("quant_gemm: out must be given with accumulate=True, got None")
        out = xp.empty((*x.shape[:-1], rows), x.dtype)
    out_dtype = check_dtype("quant_gemm", "out", out, FLOATS)
    check_shape("quant_gemm", "out", out, (*x.shape[:-1], rows), "[..., out_features]")
    check_writeable("quant_gemm", "out", out)
    if expert_offsets is not None or experts:
        _check_offsets(x, qmatrix, expert_offsets)
    if out.size == 0:
        return out
    x_rows = as_rows("quant_gemm", "x", x if x.ndim > 1 else x[None])
    out_rows = as_rows("quant_gemm", "out", out if out.ndim > 1 else out[None])
    tuned = None if experts else tuned_choice(xp, qmatrix, len(x_rows), dtype)
    _multiply(xp, x_rows, qmatrix, expert_offsets, bias, accumulate, invariant, out_rows,
              (dtype, out_dtype, bias_dtype), tuned)
    return out


def multiply_as(choice, x, qmatrix, out):
    """quant_gemm of x [M, K] into out [M, N] by one of ``matmul_choice.candidates``, whatever is tuned."""
    _multiply(array_namespace("quant_gemm", x=x), x, qmatrix, None, None, False, False, out,
              (dtype_name(x), dtype_name(out), "float32"), choice)


def _multiply(xp, x, qmatrix, offsets, bias, accumulate, invariant, out, dtypes, choice):
    """By BLAS or a kernel; `choice` is a matmul_choice.Choice or None."""
    arch, geometry = arch_of(xp), qmatrix.geometry
    version, why = _version(qmatrix.kinds, dtypes[0], arch)
    if len(x) > INVARIANT_TOKENS and not invariant and offsets is None:
        product = Product(tuple(form for form, *_ in geometry), len(x), dtypes[0], dtypes[1], bias is not None,
                          bool(accumulate), _blas_alignment(x), _blas_alignment(out))
        fits, why_blas = by_blas(product, version, arch, blas.available(xp), choice)
        if fits:
            if arch == "cpu":
                on_host("blas", lambda: multiply_on_host(x, qmatrix, bias, accumulate, out))
            else:
                multiply_on_gpu(xp, x, qmatrix, bias, accumulate, out)
            return
        why = f"{why}; {why_blas}"
    if choice is not None:
        choice = choice if choice.kernel == version else None
        why = why if choice is None else f"{why}; tuned"
    rows = qmatrix.shape[-2]
    fields = {"bias": bias, "stride_bias": 0 if bias is None else bias.strides[-1] // bias.itemsize, "rows": rows,
              "accumulate": int(accumulate), "order": None, "experts": None}
    # the tensor-core kernels read 16 bytes at a time, and columns in the order of the weight's
    align = alignment(x)
    copied = qmatrix.order is not None or (version == "mma" and align < 16)
    options = dtypes, 16 if copied else align, arch, version, why, 0 if offsets is None else len(qmatrix), choice
    tokens = len(x)
    step = tokens if offsets is not None else _tokens_per_launch(geometry, rows, version, copied)
    if tokens <= step:
        _launch(xp, x, copied, qmatrix, offsets, out, _launches(geometry, tokens, rows, *options), arch, fields)
        return
    for start in range(0, tokens, step):
        some = x[start:start + step]
        _launch(xp, some, copied, qmatrix, offsets, out[start:start + step],
                _launches(geometry, len(some), rows, *options), arch, fields)


def _check_offsets(x, qmatrix, offsets):
    """What must be true of `expert_offsets`, which only QExperts have."""
    if (offsets is None) == isinstance(qmatrix, QExperts):
        raise TypeError(f"quant_gemm: expert_offsets must be given with a QExperts and with nothing else, got "
                        f"{'none' if offsets is None else 'some'} with a {type(qmatrix).__name__}")
    if offsets is None:
        return
    if x.ndim != 2 or len(x) > _MAX_TOKENS:
        raise ValueError(f"quant_gemm: x must be [tokens, in_features] of at most {_MAX_TOKENS} tokens with "
                         f"expert_offsets, got {list(x.shape)}")
    check_array("quant_gemm", "expert_offsets", offsets, "int32", (len(qmatrix) + 1,), "[experts + 1]")
    if isinstance(offsets, np.ndarray) or env.check():
        host = offsets if isinstance(offsets, np.ndarray) else offsets.get()
        if host[0] < 0 or host[-1] > len(x) or (np.diff(host) < 0).any():
            raise ValueError(f"quant_gemm: expert_offsets must rise from 0 or more to at most {len(x)} tokens, got "
                             f"{host.tolist()}")


def _blas_alignment(rows):
    """Alignment of rows for cuBLAS; 0 where they overlap, run backwards or lie too far apart for it."""
    return alignment(rows) if rows.shape[1] * rows.itemsize <= rows.strides[0] < 2**31 * rows.itemsize else 0


@functools.lru_cache(maxsize=1024)
def _tokens_per_launch(geometry, rows, version, copied):
    """As many rows of x as a grid and the scratch for them allow."""
    step = _WORKSPACE_TOKENS if copied else _MAX_TOKENS
    pieces = sum(cut.pieces for cut in _cuts(geometry, rows, version))
    if pieces > 1:
        step = min(step, max(128, _WORKSPACE_BYTES // (4 * rows * pieces) // 64 * 64))
    return step


def _cuts(geometry, rows, version):
    """Partition of each segment."""
    if version == "core":
        return [_WHOLE] * len(geometry)
    return [partition(rows, column_tiles, form) for form, _, column_tiles, _ in geometry]


class _Launches(NamedTuple):
    """What multiplies some rows of x by all segments of a weight, made once; no arrays."""

    plans: tuple    # one a segment
    columns: tuple  # slices of the columns of x
    fields: tuple   # dict of those fields of the struct that are known without arrays
    first_tiles: range   # of rows of x, of each round: tiles of experts whose sums take too much scratch need several
    counted: int    # tiles of out of a round whose pieces are counted
    sums: int       # bytes of partial sums


@functools.lru_cache(maxsize=4096)
def _launches(geometry, tokens, rows, dtypes, align, arch, version, why, experts, choice):
    """The _Launches for `tokens` rows of x, from a QMatrix.geometry, dtype names, x's alignment, arch and so on."""
    cuts = _cuts(geometry, rows, version)
    pieces = sum(cut.pieces for cut in cuts)
    if version == "mma":
        others = tuple(form for form, *_ in geometry) if len(cuts) > 1 else ()
        plans = [plan_mma(tokens, rows, cut.pieces, cut.unit, form, *dtypes, arch, why, experts, others, choice)
                 for cut, (form, *_) in zip(cuts, geometry, strict=True)]
    else:
        plans = [_plan_quant_gemm(tokens, row_tiles, form.trait, *dtypes, align, arch, why, experts, choice)
                 for form, row_tiles, _, _ in geometry]
    tiles_x, tiles, _ = plans[0].grid
    m_tile, block_rows = tile_of_out(plans[0])
    # of a tile of rows of x: tensor cores keep all pieces, by tiles of out, CUDA cores all but the last
    sums = 0 if pieces == 1 else 4 * m_tile * (tiles_x * block_rows * pieces if version == "mma" else
                                               rows * (pieces - 1))
    at_once = tiles
    if experts and tiles * sums > _WORKSPACE_BYTES:
        rounds = -(-tiles // max(1, _WORKSPACE_BYTES // sums))
        at_once = -(-tiles // rounds)   # those of the last round that there are not do nothing
        plans = [dataclasses.replace(plan, grid=(plan.grid[0], at_once, plan.grid[2])) for plan in plans]
    columns, fields, column, piece = [], [], 0, 0
    for cut, (*_, width) in zip(cuts, geometry, strict=True):
        columns.append(slice(column, column + width))
        fields.append({"tokens": tokens, "columns": width, "pieces": pieces, "first_piece": piece,
                       "tiles_per_piece": cut.tiles_per_piece, "units_per_chunk": cut.units_per_chunk})
        column, piece = column + width, piece + cut.pieces
    counted = tiles_x * at_once if sums and version == "mma" else 0
    return _Launches(tuple(plans), tuple(columns), tuple(fields), range(0, tiles, at_once), counted, at_once * sums)


def _launch(xp, x, copied, qmatrix, offsets, out, launches, arch, fields):
    """One launch per segment, behind one that puts the columns of `x` in order if the weight has an order."""
    plans = launches.plans
    if len(plans) > 1:
        compile_first(plans)
    partials = arrived = None
    if copied or launches.sums:
        x, partials = _scratch(xp, x, copied, qmatrix.order, launches.sums, arch)
    if launches.counted:
        arrived = arrival_counters(xp, launches.counted)
    to = row_view(out)
    try:
        for first_tile in launches.first_tiles:
            for plan, columns, known, segment in zip(plans, launches.columns, launches.fields, qmatrix.segments,
                                                     strict=True):
                if offsets is not None:
                    fields["experts"] = _experts(segment, offsets, fields["bias"], first_tile)
                launch(plan, make_args(plan, x=row_view(x if len(plans) == 1 else x[:, columns]), out=to,
                                       weight=segment.view, partials=partials, counters=arrived, **known, **fields))
    except BaseException:
        if arrived is not None:
            arrived.fill(0)   # those launched have counted arrivals of pieces whose last will never come
        raise


def _experts(segment, offsets, bias, first_tile):
    """Fields of the kernels' ``Experts``."""
    codes, scales, supers = (0 if array is None else array.strides[0] for array in segment.arrays)
    return {"offsets": offsets, "stride_codes": codes, "stride_scales": scales, "stride_supers": supers,
            "stride_bias": 0 if bias is None else bias.strides[0] // bias.itemsize, "count": len(offsets) - 1,
            "first_tile": first_tile}


def _scratch(xp, x, copied, order, sums, arch):
    """(x or a copy with its columns in `order`, if there is one; float32 room of `sums` bytes or None)."""
    if not copied:
        return x, workspace(xp, sums)[:sums].view("float32") if sums else None
    tokens, columns = len(x), x.shape[1] if order is None else order.size
    nbytes = -(-tokens * columns * x.itemsize // 16) * 16
    scratch = workspace(xp, nbytes + sums)
    copy = scratch[:tokens * columns * x.itemsize].view(x.dtype).reshape(tokens, columns)
    plan = _plan_gather(tokens, columns, dtype_name(x), arch)
    launch(plan, make_args(plan, x=row_view(x), out=row_view(copy), weight=None, experts=None, order=order, bias=None,
                           stride_bias=0, rows=columns, accumulate=0, partials=None, counters=None, tokens=tokens,
                           columns=columns, pieces=1, first_piece=0, tiles_per_piece=0, units_per_chunk=0))
    return copy, scratch[nbytes:nbytes + sums].view("float32") if sums else None
