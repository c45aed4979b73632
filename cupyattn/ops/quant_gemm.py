# SPDX-License-Identifier: Apache-2.0
"""Activations times a packed weight. Kernel: ``cuda_src/quant_gemm.cu``."""

import functools
import itertools

from ..quant import QMatrix
from ..quant.layout import FORMATS, tiles
from ..runtime import Plan, Specialisation, arch_of, launch, make_args
from ..runtime.arrays import alignment, array_namespace, as_rows, row_view
from ..runtime.checks import FLOATS, check_dtype, check_element_strides, check_shape, check_writeable

_MAX_TOKENS = 2**18     # rows of x per launch: grid.y ends at 65535 tiles
_SLICE_TILES, _MMA_SLICE_TILES = 24, 16   # MAX_SLICE_TILES of the two kernels
_WARPS = 4                                # of a block on a GPU


def _spec(x, out, bias, format, m_tile, row_tiles, warps, vec):
    """CUDA cores."""
    return Specialisation("quant_gemm", "quant_gemm", "QuantGemmArgs",
                          {"T": x, "U": out, "B": bias, "FORMAT": FORMATS[format].trait, "M_TILE": m_tile,
                           "ROW_TILES": row_tiles, "WARPS": warps, "VEC": vec, "TENSOR_CORES": 0},
                          # one-warp blocks are the CPU executor's: a GPU would keep some of their sums in memory
                          spill_bytes=1024 if warps == 1 else 0)


def _mma_spec(x, out, bias, format, m_tile, vec):
    """Tensor cores."""
    return Specialisation("quant_gemm", "quant_gemm_mma", "QuantGemmArgs",
                          {"T": x, "U": out, "B": bias, "FORMAT": FORMATS[format].trait, "M_TILE": m_tile,
                           "ROW_TILES": 1, "WARPS": _WARPS, "VEC": vec, "TENSOR_CORES": 1},
                          min_sm=80, expects=("HMMA", "LDG"))


CORE = [*(_spec(*case) for case in (
    ("float16", "float16", "float32", "q4_1", 1, 16, 1, 8), ("float16", "float32", "float16", "q8_0", 1, 8, 1, 8),
    ("float32", "float32", "float32", "q4_1", 8, 8, 1, 4), ("float32", "float16", "float32", "q4_0", 2, 1, 1, 1),
    ("bfloat16", "bfloat16", "bfloat16", "q4_0", 4, 1, 4, 8), ("bfloat16", "float32", "float32", "q8_0", 8, 1, 4, 8),
    ("float16", "bfloat16", "float32", "float16", 4, 2, 1, 8), ("float32", "float32", "float32", "float32", 1, 1, 4, 4),
    ("bfloat16", "float16", "float32", "bfloat16", 2, 1, 4, 1), ("float16", "float16", "float32", "q4_1", 8, 1, 4, 1),
)), *(_mma_spec(*case) for case in (
    ("float16", "float16", "float16", "q4_1", 8, 2), ("float16", "float32", "float32", "q8_0", 16, 2),
    ("bfloat16", "bfloat16", "float32", "q4_1", 16, 1), ("bfloat16", "float32", "bfloat16", "q8_0", 8, 2),
    ("float16", "bfloat16", "float32", "q4_0", 16, 1), ("bfloat16", "float16", "float32", "q4_0", 8, 2),
    ("float16", "float16", "float32", "float16", 8, 1), ("bfloat16", "bfloat16", "bfloat16", "bfloat16", 16, 2),
))]


def _all():
    """What plans pick; of the CPU's one-warp blocks those with a float32 bias, the other type is a conversion only."""
    for x in FLOATS:
        for out, bias, format in itertools.product(FLOATS, dict.fromkeys((x, "float32")), FORMATS):
            for m_tile, vec in itertools.product((1, 2, 4, 8), (1, 4 if x == "float32" else 8)):
                yield _spec(x, out, bias, format, m_tile, 1, _WARPS, vec)
                for row_tiles in (1, 2, 4, 8, 16):
                    if row_tiles * m_tile <= 64 and bias == "float32":
                        yield _spec(x, out, bias, format, m_tile, row_tiles, 1, vec)
            if _version(format, x, "sm_80")[0] == "mma":
                for m_tile, vec in itertools.product((8, 16), (1, 2)):
                    yield _mma_spec(x, out, bias, format, m_tile, vec)


def _version(format, x, arch):
    """("mma" or "core", why)."""
    if x == "float32" or format == "float32":
        return "core", "CUDA cores: float32 is not rounded for tensor cores"
    if format in FLOATS and format != x:
        return "core", f"CUDA cores: {format} weights with {x} x"
    if arch == "cpu":
        return "core", "CUDA cores, the faster version on the CPU"
    if int(arch[3:].rstrip("af")) < 80:
        return "core", f"CUDA cores: {arch} is older than sm_80"
    return "mma", "tensor cores"


ALL = list(dict.fromkeys((*CORE, *_all())))


@functools.lru_cache(maxsize=4096)
def _plan_quant_gemm(tokens, shape, format, x, out, bias, align, arch, version):
    """Plan from the number of rows of x, the weight's shape and format, dtype names, x's alignment, arch, version."""
    row_tiles, _ = tiles(shape)
    kernel, why = version
    if kernel == "mma":
        m_tile, vec = 8 if tokens <= 8 else 16, 2 if align >= 4 else 1
        spec, warps, tiles_per_block = _mma_spec(x, out, bias, format, m_tile, vec), _WARPS, 1
        shared = 128 * m_tile * _MMA_SLICE_TILES
    else:
        m_tile = next((m for m in (1, 2, 4) if tokens <= m), 8)
        vec = 16 // (4 if x == "float32" else 2) if align == 16 else 1
        warps, tiles_per_block = _WARPS, 1
        if arch == "cpu":
            # threads are dear here: one warp with as many rows as leave a few blocks to share among the workers
            warps, tiles_per_block = 1, next((n for n in (16, 8, 4, 2) if row_tiles >= 4 * n and n * m_tile <= 64), 1)
        spec = _spec(x, out, bias, format, m_tile, tiles_per_block, warps, vec)
        shared = 4 * m_tile * 64 * _SLICE_TILES
    return Plan(spec, arch, (-(-row_tiles // tiles_per_block), -(-tokens // m_tile)), (32 * warps,), shared,
                note=f"{why}; {m_tile} rows of x per block, {vec} elements per load")


def quant_gemm(x, qmatrix, /, *, bias=None, accumulate=False, out=None):
    """Product of activations and a packed weight matrix.

    out = x @ W.T + bias (+ out with ``accumulate=True``)

    Parameters
    ----------
    x : ndarray [..., K], float16, bfloat16 or float32
        Rows may be strided (a slice of a wider array); the last axis is contiguous.
    qmatrix : QMatrix [N, K]
    bias : ndarray [N], float32 or x.dtype, optional
    accumulate : bool
        Add to what `out` holds instead of replacing it. Needs `out`.
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
        Shapes that do not fit, a last axis that is not contiguous, or ``accumulate=True`` without `out`.

    Notes
    -----
    Products and sums are float32, weights are never rounded; the store is the only rounding. float16 and bfloat16 `x`
    run on tensor cores from sm_80 on, all else on CUDA cores. A row of `out` has the same bits whatever the number of
    rows. On CuPy arrays asynchronous on the current stream. Kernel: ``cuda_src/quant_gemm.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> w = cupyattn.QMatrix.from_dense(np.eye(2, 8, dtype=np.float16))
    >>> cupyattn.quant_gemm(np.arange(8, dtype=np.float32), w)
    array([0., 1.], dtype=float32)
    """
    if not isinstance(qmatrix, QMatrix):
        raise TypeError(f"quant_gemm: qmatrix must be a QMatrix, got {type(qmatrix).__name__}; "
                        "make one with QMatrix.from_dense(w)")
    xp = array_namespace("quant_gemm", x=x, qmatrix=qmatrix.packed, bias=bias, out=out)
    dtype, bias_dtype = check_dtype("quant_gemm", "x", x, FLOATS), "float32"
    rows, columns = qmatrix.shape
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"quant_gemm: x must be [..., in_features={columns}], got {list(x.shape)}")
    if bias is not None:
        bias_dtype = check_dtype("quant_gemm", "bias", bias, tuple(dict.fromkeys(("float32", dtype))))
        check_shape("quant_gemm", "bias", bias, (rows,), "[out_features]")
        check_element_strides("quant_gemm", "bias", bias)
    if out is None:
        if accumulate:
            raise ValueError("quant_gemm: out must be given with accumulate=True, got None")
        out = xp.empty((*x.shape[:-1], rows), x.dtype)
    out_dtype = check_dtype("quant_gemm", "out", out, FLOATS)
    check_shape("quant_gemm", "out", out, (*x.shape[:-1], rows), "[..., out_features]")
    check_writeable("quant_gemm", "out", out)
    if out.size == 0:
        return out
    x_rows = as_rows("quant_gemm", "x", x if x.ndim > 1 else x[None])
    out_rows = as_rows("quant_gemm", "out", out if out.ndim > 1 else out[None])
    arch = arch_of(xp)
    version, align = _version(qmatrix.format, dtype, arch), alignment(x_rows)
    row_tiles, column_tiles = qmatrix.packed.shape[:2]
    for start in range(0, x_rows.shape[0], _MAX_TOKENS):
        some, some_out = x_rows[start:start + _MAX_TOKENS], out_rows[start:start + _MAX_TOKENS]
        plan = _plan_quant_gemm(some.shape[0], qmatrix.shape, qmatrix.format, dtype, out_dtype, bias_dtype, align,
                                arch, version)
        launch(plan, make_args(plan, x=row_view(some), out=row_view(some_out), packed=qmatrix.packed, bias=bias,
                               stride_bias=0 if bias is None else bias.strides[0] // bias.itemsize,
                               tokens=some.shape[0], rows=rows, columns=columns, row_tiles=row_tiles,
                               column_tiles=column_tiles, accumulate=int(accumulate)))
    return out
