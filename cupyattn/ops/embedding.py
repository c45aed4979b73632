# SPDX-License-Identifier: Apache-2.0
"""Rows of a table by index. Kernel: ``cuda_src/embedding.cu``."""

import functools

import numpy as np

from ..quant import QMatrix
from ..quant.layout import FORMATS
from ..runtime import Plan, Specialisation, arch_of, env, launch, make_args
from ..runtime.arrays import alignment, array_namespace, as_rows, row_view
from ..runtime.checks import FLOATS, check_dtype, check_element_strides, check_last_axis, check_shape, check_writeable


def _spec(table, out, ids, packed, vec):
    return Specialisation("embedding", "embedding", "EmbeddingArgs",
                          {"W": "float32" if packed else table, "U": out, "ID": f"{ids}_t", "PACKED": int(packed),
                           "FORMAT": FORMATS[table].trait, "VEC": vec})


CORE = [_spec(*case) for case in (
    ("q8_0", "float32", "int32", True, 1), ("q4_1", "float16", "int64", True, 1),
    ("q4_0", "bfloat16", "int32", True, 1), ("float16", "float32", "int64", True, 1),
    ("float16", "float16", "int32", False, 8), ("bfloat16", "float32", "int64", False, 4),
    ("float32", "bfloat16", "int32", False, 1), ("float32", "float32", "int64", False, 4),
)]
ALL = [*CORE, *(spec for table in FORMATS for out in FLOATS for ids in ("int32", "int64")
                for packed in (True, False) if packed or table in FLOATS for vec in ((1,) if packed else (1, 4, 8))
                if (vec < 8 or "float32" not in (table, out)) and
                (spec := _spec(table, out, ids, packed, vec)) not in CORE)]


@functools.lru_cache(maxsize=1024)
def _plan_embedding(tokens, columns, table, packed, out, ids, align, arch):
    """Plan from the number of ids, the row length, format or dtype names, the common alignment and arch."""
    vec = 16 // max(4 if name == "float32" else 2 for name in (table, out))
    if packed or align < 16 or columns % vec:
        vec = 1
    threads = 32 if arch == "cpu" else min(256, -(-columns // (32 * (16 if packed else vec))) * 32)
    note = "packed table" if packed else f"{vec} elements per access"
    return Plan(_spec(table, out, ids, packed, vec), arch, (tokens,), (threads,), note=note)


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
    xp = array_namespace("embedding", ids=ids, table=table.packed if packed else table, out=out)
    ids_dtype = check_dtype("embedding", "ids", ids, ("int32", "int64"))
    kind = table.format if packed else check_dtype("embedding", "table", table, FLOATS)
    if not packed:
        check_shape("embedding", "table", table, (None, None), "[rows, columns]")
        check_last_axis("embedding", "table", table)
        check_element_strides("embedding", "table", table)
    rows, columns = table.shape
    if out is None:
        out = xp.empty((*ids.shape, columns), out_dtype or ("float32" if packed else table.dtype))
    dtype = check_dtype("embedding", "out", out, FLOATS)
    check_shape("embedding", "out", out, (*ids.shape, columns), "[..., columns]")
    check_writeable("embedding", "out", out)
    flat_ids, out_rows = as_rows("embedding", "ids", ids[..., None])[:, 0], as_rows("embedding", "out", out[None])
    if out.size == 0:
        return out
    if xp is np or env.check():
        _check_ids(ids, rows)
    align = alignment(out_rows) if packed else min(alignment(table), alignment(out_rows))
    plan = _plan_embedding(flat_ids.size, columns, kind, packed, dtype, ids_dtype, align, arch_of(xp))
    launch(plan, make_args(plan, table=None if packed else row_view(table), out=row_view(out_rows),
                           packed=table.packed if packed else None, ids=flat_ids,
                           stride_id=flat_ids.strides[0] // flat_ids.itemsize, tokens=flat_ids.size, rows=rows,
                           columns=columns, column_tiles=table.packed.shape[1] if packed else 0))
    return out


def _check_ids(ids, rows):
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        raise ValueError(f"embedding: ids must be in [0, {rows}), got {low if low < 0 else high}")
