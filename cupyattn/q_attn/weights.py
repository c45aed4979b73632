# SPDX-License-Identifier: Apache-2.0
"""Arguments of QAttn's constructor as its kernels take them."""

import sys
from typing import NamedTuple

import numpy as np

from ..devices import to_host
from ..quant import QMatrix
from ..quant.layout import TILE_ROWS
from ..quant.packed import check_alike
from ..runtime.arrays import dtype_name, dtype_of
from ..runtime.checks import FLOATS
from ..runtime.structs import address

OP = "QAttn"
STYLES = (None, "interleaved", "neox")   # by the numbers of ExLlamaV2's ROPE_STYLE_*
_NAMES = {"none": 0, "gptj": 1, "interleaved": 1, "neox": 2}
_tables = {}   # (where, form) of tables of another form -> (they, cos, sin), the latest


class Linear(NamedTuple):
    """Columns `start` to `stop` of a buffer are x @ matrixᵀ + bias."""

    matrix: QMatrix
    bias: object   # float32 [rows], or None
    start: int
    stop: int


def rope_style_of(style, *, op=OP):
    """"neox", "interleaved" or None, from ExLlamaV2's number or a name."""
    number = _NAMES.get(style, -1) if isinstance(style, str) else 0 if style is None else style
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number not in (0, 1, 2):
        raise ValueError(f"{op}: rope_style must be 0 (none), 1 (GPT-J), 2 (NeoX) or {', '.join(_NAMES)}, got "
                         f"{style!r}")
    return STYLES[number]


def compute_dtype(dtype):
    """A dtype or its name as the dtype of activations."""
    try:
        found = dtype_of(dtype)
    except TypeError:
        raise TypeError(f"{OP}: dtype must be {', '.join(FLOATS)}, got {dtype!r}") from None
    if found.name not in FLOATS:
        raise ValueError(f"{OP}: dtype must be {', '.join(FLOATS)}, got {dtype!r}")
    return found


def matrix(name, weight, shape, axes, *, op=OP):
    """`weight`, a QMatrix or an array, as a QMatrix of that shape."""
    if not isinstance(weight, QMatrix) and not hasattr(weight, "dtype"):
        raise TypeError(f"{op}: {name} must be a QMatrix or an array, got {type(weight).__name__}")
    if weight.shape != shape:
        raise ValueError(f"{op}: {name} must be {axes} = {list(shape)}, got {list(weight.shape)}")
    if isinstance(weight, QMatrix):
        return weight
    if dtype_name(weight) not in FLOATS:
        raise TypeError(f"{op}: {name} must be a QMatrix or {', '.join(FLOATS)}, got {dtype_name(weight)}")
    return QMatrix.from_dense(weight)


def vector(name, array, shapes, xp, *, op=OP):
    """float32 array on `xp` of one of `shapes`; None for None."""
    if array is None:
        return None
    if not hasattr(array, "dtype") or dtype_name(array) not in FLOATS:
        raise TypeError(f"{op}: {name} must be a {', '.join(FLOATS)} array, got "
                        f"{dtype_name(array) if hasattr(array, 'dtype') else type(array).__name__}")
    if array.shape not in shapes:
        raise ValueError(f"{op}: {name} must be {' or '.join(str(list(s)) for s in shapes)}, got {list(array.shape)}")
    if array.dtype == np.float32 and not isinstance(array, np.ndarray) and xp is not np:
        return xp.ascontiguousarray(array)
    return xp.asarray(np.ascontiguousarray(to_host(array), np.float32))


def joined(matrices, biases, xp):
    """Linears of the rows of all, in order; neighbours of one format and order of columns are one matrix.

    Joined where the matrices are, then moved to `xp`. Biases are NumPy arrays, or None.
    """
    if len({m.xp for m in matrices}) > 1:
        matrices = [m.to(xp) for m in matrices]
    groups = []   # [(QMatrix, bias), ...] of what becomes one matrix
    for part in zip(matrices, biases, strict=True):
        if groups and _go_together(groups[-1][-1][0], part[0]):
            groups[-1].append(part)
        else:
            groups.append([part])
    linears, start = [], 0
    for group in groups:
        whole, bias = QMatrix.concat([m for m, _ in group]).to(xp), None
        if any(part is not None for _, part in group):
            bias = xp.asarray(np.concatenate([np.zeros(m.shape[0], np.float32) if part is None else part
                                              for m, part in group]))
        linears.append(Linear(whole, bias, start, start + whole.shape[0]))
        start += whole.shape[0]
    return tuple(linears)


def _go_together(above, below):
    """Whether two matrices can be one."""
    try:
        check_alike([above, below], QMatrix, rows=False)
    except ValueError:   # another format or order of columns
        return False
    return above.shape[0] % TILE_ROWS == 0


def check_scratch(name, array, least):
    """A scratch array of the seed's signature is large enough."""
    if array is None:
        return
    if not hasattr(array, "dtype"):
        raise TypeError(f"{OP}: {name} must be an array, got {type(array).__name__}")
    if array.size < least:
        raise ValueError(f"{OP}: {name} must have at least {least} elements, got {array.size}")


def lengths_of(name, lengths, batch_size, xp):
    """int32 [batch_size] on `xp`; those on the host may be integers of any kind."""
    if not hasattr(lengths, "dtype") or isinstance(lengths, np.ndarray) and xp is not np:
        try:
            given = np.asarray(lengths)
        except ValueError:   # of rows of different lengths
            given = np.asarray(None)
        if given.dtype.kind not in "iu" or given.size and not -2**31 <= given.min() <= given.max() < 2**31:
            raise TypeError(f"{OP}: {name} must be int32 [batch_size={batch_size}], got {lengths!r}")
        lengths = xp.asarray(given.astype(np.int32))
    if lengths.dtype != np.int32 or lengths.size != batch_size:
        raise ValueError(f"{OP}: {name} must be int32 [batch_size={batch_size}], got {lengths.dtype} "
                         f"{list(lengths.shape)}")
    return lengths.reshape(batch_size)


def tables(sin, cos, style, rotary_dim, xp, *, op=OP):
    """(cos, sin) float32 [rows, rotary_dim / 2] from tables of that form or of ExLlamaV2's."""
    if sin is None or cos is None:
        raise ValueError(f"{op}: sin and cos must be given with rope_style {style}, got "
                         f"{'neither' if sin is cos else 'one of them'}")
    for name, table in (("sin", sin), ("cos", cos)):
        if not hasattr(table, "dtype"):
            raise TypeError(f"{op}: {name} must be an array, got {type(table).__name__}")
    half = rotary_dim // 2
    if cos.ndim == 2 and cos.shape[1] == half and cos.dtype == np.float32 == sin.dtype and sin.shape == cos.shape \
            and cos.strides[1] == 4 == sin.strides[1]:
        return cos, sin
    for name, table in (("sin", sin), ("cos", cos)):
        if dtype_name(table) not in FLOATS:
            raise TypeError(f"{op}: {name} must be {', '.join(FLOATS)}, got {dtype_name(table)}")
        if table.shape != cos.shape or table.ndim < 2 or table.shape[-1] not in (half, rotary_dim) \
                or table.size != table.shape[-2] * table.shape[-1]:
            raise ValueError(f"{op}: {name} must be [positions, {half}] or [1, 1, positions, {rotary_dim}] for "
                             f"{rotary_dim} rotated dims, got {list(table.shape)}")
    device = None if xp is np else xp.cuda.runtime.getDevice()
    key = (xp.__name__, device, style, rotary_dim,
           *((address(t), t.shape, t.strides, dtype_name(t)) for t in (sin, cos)))
    found = _tables.get(key)
    if found is None:
        step = 2 if style == "interleaved" and cos.shape[-1] == rotary_dim else 1   # every pair is there twice
        made = [xp.asarray(np.ascontiguousarray(to_host(t).reshape(t.shape[-2:])[:, :half * step:step], np.float32))
                for t in (cos, sin)]
        for oldest in list(_tables)[:-15]:   # a copy: other threads add to it
            _tables.pop(oldest, None)
        found = _tables[key] = (sin, cos, *made)   # holds the given ones: their addresses stay theirs
    return found[2:]


def kind_of(weight, xp):
    """numpy or cupy: `xp`, or where a QMatrix or an array is."""
    if xp is not None:
        if xp is not np and getattr(xp, "__name__", None) != "cupy":
            raise TypeError(f"{OP}: xp must be numpy or cupy, got {xp!r}")
        return xp
    if isinstance(weight, QMatrix):
        return weight.xp
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(weight, cupy.ndarray) else np
