# SPDX-License-Identifier: Apache-2.0
"""Rows of a packed weight as a plain array. Kernel: ``cuda_src/dequantize.cu``."""

import functools

import numpy as np

from ..quant import QMatrix
from ..quant.layout import TRAITS
from ..runtime import Plan, Specialisation, arch_of, launch, make_args
from ..runtime.arrays import alignment, array_namespace, as_rows, row_view
from ..runtime.checks import FLOATS, check_dtype, check_shape, check_writeable, out_dtype_or


def _spec(out, trait, warps, vec):
    return Specialisation("dequantize", "dequantize", "DequantizeArgs",
                          {"U": out, "FORMAT": trait, "WARPS": warps, "VEC": vec})


CORE = [_spec(*case) for case in (
    ("float16", "Weights<Ints<4,8>,Scales<__half,PLAIN,2>>", 4, 4),
    ("bfloat16", "Weights<Ints<4,8>,Scales<__half,ZERO,1>>", 4, 1),
    ("float32", "Weights<Ints<4,0>,SuperScales<int8_t,__half,MINIMUM,2>>", 4, 4),
    ("float16", "Weights<Ints<6,32>,SuperScales<int8_t,__half,PLAIN,4>>", 1, 1),
    ("bfloat16", "Weights<Ints<3,4>,Scales<__half,PLAIN,1>>", 1, 4),
    ("float16", "Weights<Table<NF4>,Scales<float,PLAIN,1>>", 4, 4),
    ("float32", "Weights<Table<E2M1>,SuperScales<E4M3,float,PLAIN,4>>", 1, 1),
    ("bfloat16", "Weights<Float8<E4M3>,Scales<float,PLAIN,1>>", 4, 4),
    ("float32", "Weights<Dense<__nv_bfloat16>,NoScales>", 1, 4),
)]
# formats once each


def more_specs():
    """Every format once."""
    for i, trait in enumerate(TRAITS):
        yield _spec(FLOATS[i % 3], trait, (1, 4)[i % 2], (1, 4)[i // 2 % 2])


@functools.lru_cache(maxsize=1024)
def _plan_dequantize(row_tiles, column_tiles, out, trait, align, arch):
    """Plan from the row and column tiles met, out's dtype name and alignment, the C++ format and arch."""
    vec = 4 if align >= (16 if out == "float32" else 8) else 1
    warps = 1 if arch == "cpu" else 4
    columns = 1 if arch == "cpu" else min(-(-column_tiles // warps), 64)
    return Plan(_spec(out, trait, warps, vec), arch, (row_tiles, columns), (32 * warps,),
                note=f"{vec} elements per store")


def dequantize(qmatrix, /, *, rows=None, out_dtype=None, out=None):
    """A packed weight, or some of its rows, as a plain array.

    out[i, k] = W[rows[0] + i, k]

    Parameters
    ----------
    qmatrix : QMatrix [out_features, in_features]
    rows : (int, int), optional
        First row and the one after the last. Default all.
    out_dtype : dtype, optional
        float16, bfloat16 or float32, the default; ignored when `out` is given.
    out : ndarray [rows, in_features], float16, bfloat16 or float32, optional
        Where to write; rows may be strided.

    Returns
    -------
    out : ndarray [rows, in_features]
        Same kind (NumPy or CuPy) as `qmatrix`; columns in the order of x.

    Raises
    ------
    TypeError
        `qmatrix` no QMatrix, `out` of another kind than its arrays, or an unsupported dtype.
    ValueError
        Rows the matrix has not, or an `out` of another shape.

    Notes
    -----
    Weights are computed in float32; the store is the only further rounding. On CuPy arrays asynchronous on the current
    stream. Kernel: ``cuda_src/dequantize.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> w = cupyattn.QMatrix.from_dense(np.eye(3, 8, dtype=np.float16))
    >>> cupyattn.dequantize(w, rows=(1, 3))[:, :4]
    array([[0., 1., 0., 0.],
           [0., 0., 1., 0.]], dtype=float32)
    """
    if not isinstance(qmatrix, QMatrix):
        raise TypeError(f"dequantize: qmatrix must be a QMatrix, got {type(qmatrix).__name__}")
    xp = array_namespace("dequantize", qmatrix=qmatrix.segments[0].codes, out=out)
    first, last = _rows(rows, qmatrix.shape[0])
    shape = (last - first, qmatrix.shape[1])
    if out is None:
        out = xp.empty(shape, out_dtype_or("dequantize", out_dtype, "float32"))
    dtype = check_dtype("dequantize", "out", out, FLOATS)
    check_shape("dequantize", "out", out, shape, "[rows, in_features]")
    check_writeable("dequantize", "out", out)
    if out.size == 0:
        return out
    out_rows = as_rows("dequantize", "out", out)
    row_tiles, align, arch, start = (last - 1) // 16 - first // 16 + 1, alignment(out_rows), arch_of(xp), 0
    for segment in qmatrix.segments:
        plan = _plan_dequantize(row_tiles, segment.codes.shape[1], dtype, segment.form.trait, align, arch)
        order = None if qmatrix.order is None else qmatrix.order[start:start + segment.columns]
        launch(plan, make_args(plan, out=row_view(out_rows), weight=segment.view, order=order, first_row=first,
                               rows=last - first, columns=segment.columns, reserved=0))
        start += segment.columns
    return out


def _rows(rows, count):
    """(first row, the one after the last) of a matrix of `count` rows."""
    if rows is None:
        return 0, count
    if not isinstance(rows, tuple | list) or len(rows) != 2 or not all(isinstance(n, int | np.integer) for n in rows):
        raise TypeError(f"dequantize: rows must be (first, last), two integers, got {rows!r}")
    if not 0 <= rows[0] <= rows[1] <= count:
        raise ValueError(f"dequantize: rows must be (first, last) with 0 <= first <= last <= {count}, "
                         f"got {tuple(rows)}")
    return int(rows[0]), int(rows[1])
