# SPDX-License-Identifier: Apache-2.0
"""Rows of a table by index. Kernel: ``cuda_src/embedding.cu``."""

import functools
import itertools

import numpy as np

from ..quant import QMatrix
from ..quant.layout import TRAITS
from ..runtime import Plan, Specialisation, arch_of, env, launch, make_args
from ..runtime.arrays import alignment, array_namespace, as_rows, dtype_name, row_view
from ..runtime.checks import FLOATS, check_array, check_dtype, check_shape, check_writeable, out_dtype_or


def _spec(table, out, ids, trait, vec):
    """`trait` of a packed table, whose `table` is ignored; None for a plain one."""
    return Specialisation("embedding", "embedding", "EmbeddingArgs",
                          {"W": table, "U": out, "ID": f"{ids}_t", "PACKED": int(trait is not None),
                           "FORMAT": trait or "Weights<Dense<float>,NoScales>", "VEC": vec})


CORE = [_spec(*case) for case in (
    ("float32", "float32", "int32", "Weights<Ints<8,128>,Scales<__half,PLAIN,2>>", 4),
    ("float32", "float16", "int64", "Weights<Ints<4,0>,Scales<__half,MINIMUM,2>>", 1),
    ("float32", "bfloat16", "int32", "Weights<Ints<6,32>,SuperScales<int8_t,__half,PLAIN,4>>", 4),
    ("float32", "float32", "int64", "Weights<Dense<__half>,NoScales>", 1),
    ("float16", "float16", "int32", None, 8), ("bfloat16", "float32", "int64", None, 4),
    ("float32", "bfloat16", "int32", None, 1), ("float32", "float32", "int64", None, 4),
)]


def more_specs():
    """Every legal one; of packed tables every format once."""
    for table, out, ids, vec in itertools.product(FLOATS, FLOATS, ("int32", "int64"), (1, 4, 8)):
        if vec < 8 or "float32" not in (table, out):
            yield _spec(table, out, ids, None, vec)
    for i, trait in enumerate(TRAITS):
        yield _spec("float32", FLOATS[i % 3], ("int32", "int64")[i % 2], trait, (1, 4)[i // 2 % 2])


@functools.lru_cache(maxsize=1024)
def _plan_embedding(tokens, columns, table, trait, out, ids, align, arch):
    """Plan from the number of ids, the row length, dtype names, a packed table's C++ format or None, the common
    alignment and arch."""
    if trait is not None:
        vec, columns_per_thread = 4 if align >= (16 if out == "float32" else 8) else 1, 16
    else:
        vec = 16 // max(4 if name == "float32" else 2 for name in (table, out))
        vec = columns_per_thread = 1 if align < 16 or columns % vec else vec
    threads = 32 if arch == "cpu" else min(256, -(-columns // (32 * columns_per_thread)) * 32)
    note = f"{'packed table, ' if trait else ''}{vec} elements per access"
    return Plan(_spec(table, out, ids, trait, vec), arch, (tokens,), (threads,), note=note)


def embedding(ids, table, /, *, out_dtype=None, out=None):
    """Rows of `table` by index.

    out[i] = table[ids[i]]

    Parameters
    ----------
    ids : ndarray [...], int32 or int64
        Row per token.
    table : ndarray [rows, columns], float16, bfloat16 or float32; or QMatrix [rows, columns]
        A QMatrix is read in its packed layout: a weight tied to the output projection is stored once.
    out_dtype : dtype, optional
        Default the table's dtype, float32 for a quantized table; ignored when `out` is given.
    out : ndarray [..., columns], float16, bfloat16 or float32, optional
        Where to write. Must overlap no input.

    Returns
    -------
    out : ndarray [..., columns]
        Same kind (NumPy or CuPy) as `ids`.

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, or an unsupported dtype.
    ValueError
        Shapes that do not fit, a last axis that is not contiguous, or an id outside the table (NumPy arrays, and
        CuPy arrays under ``CUPYATTN_CHECK=1``; elsewhere such an id gives a row of NaN).

    Notes
    -----
    Exact up to the rounding to the output type. On CuPy arrays asynchronous on the current stream.
    Kernel: ``cuda_src/embedding.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> cupyattn.embedding(np.array([2, 0]), np.arange(6, dtype=np.float32).reshape(3, 2))
    array([[4., 5.],
           [0., 1.]], dtype=float32)
    """
    packed = isinstance(table, QMatrix)
    xp = array_namespace("embedding", ids=ids, table=table.segments[0].codes if packed else table, out=out)
    ids_dtype = check_dtype("embedding", "ids", ids, ("int32", "int64"))
    if not packed:
        check_array("embedding", "table", table, FLOATS, (None, None), "[rows, columns]")
    rows, columns = table.shape
    if out is None:
        default = "float32" if packed else table.dtype
        out = xp.empty((*ids.shape, columns), out_dtype_or("embedding", out_dtype, default))
    dtype = check_dtype("embedding", "out", out, FLOATS)
    check_shape("embedding", "out", out, (*ids.shape, columns), "[..., columns]")
    check_writeable("embedding", "out", out)
    flat_ids, out_rows = as_rows("embedding", "ids", ids[..., None])[:, 0], as_rows("embedding", "out", out[None])
    if out.size == 0:
        return out
    if xp is np or env.check():
        _check_ids(ids, rows)
    fields = {"out": row_view(out_rows), "ids": flat_ids, "stride_id": flat_ids.strides[0] // flat_ids.itemsize,
              "tokens": flat_ids.size, "rows": rows, "out_columns": columns}
    if not packed:
        plan = _plan_embedding(flat_ids.size, columns, dtype_name(table), None, dtype, ids_dtype,
                               min(alignment(table), alignment(out_rows)), arch_of(xp))
        launch(plan, make_args(plan, table=row_view(table), weight=None, order=None, columns=columns, **fields))
        return out
    first = 0
    for segment in table.segments:
        plan = _plan_embedding(flat_ids.size, segment.columns, "float32", segment.form.trait, dtype, ids_dtype,
                               alignment(out_rows), arch_of(xp))
        order = None if table.order is None else table.order[first:first + segment.columns]
        launch(plan, make_args(plan, table=None, weight=segment.view, order=order, columns=segment.columns, **fields))
        first += segment.columns
    return out


def _check_ids(ids, rows):
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        raise ValueError(f"embedding: ids must be in [0, {rows}), got {low if low < 0 else high}")
