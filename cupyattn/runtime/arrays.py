# SPDX-License-Identifier: Apache-2.0
"""Array metadata: which library an array belongs to, its alignment, and the views kernels take."""

import functools
import math
import sys

import numpy as np

from .known import Known
from .structs import address

_names = {}
_namespaces = {}   # set of types of arguments -> numpy or cupy


def dtype_name(array):
    """``array.dtype.name``, which NumPy computes anew (3 µs) each time it is asked."""
    dtype = array.dtype
    name = _names.get(dtype)
    if name is None:
        name = _names[dtype] = dtype.name if dtype.isnative else f"{dtype.name} of foreign byte order"
    return name


def dtype_of(dtype):
    """NumPy's dtype of a dtype or its name, the names of ml_dtypes included; TypeError for any other."""
    if isinstance(dtype, str) and not hasattr(np, dtype):
        import ml_dtypes

        dtype = getattr(ml_dtypes, dtype, dtype)
    return np.dtype(dtype)


def kind_of(array):
    """"numpy", "cupy", or None for what is no array."""
    if isinstance(array, np.ndarray):
        return "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return "cupy"
    return array.kind if isinstance(array, Known) else None


def array_namespace(op, /, **arrays):
    """The module (numpy or cupy) all `arrays` belong to; None values are ignored.

    Raises
    ------
    TypeError
        An argument is no array, or NumPy and CuPy arrays are mixed.
    """
    types = frozenset(map(type, arrays.values()))
    found = _namespaces.get(types)
    if found is None:
        found = _namespaces[types] = _namespace(op, arrays)
    return found


def _namespace(op, arrays):
    """`array_namespace` of arguments of types that it has not seen together."""
    kinds = {}
    for name, array in arrays.items():
        if array is None:
            continue
        kind = kind_of(array)
        if kind is None:
            raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got {type(array).__name__}")
        kinds.setdefault(kind, name)
    if not kinds:
        raise TypeError(f"{op}: {next(iter(arrays))} must be a NumPy or CuPy array, got NoneType")
    if len(kinds) > 1:
        raise TypeError(f"{op}: all arrays must be of one kind, got NumPy {kinds['numpy']} and CuPy {kinds['cupy']}; "
                        "copy one of them over")
    return sys.modules[next(iter(kinds))]


def alignment(array):
    """Largest power of two ≤ 16 (bytes) that divides the base address and every stride but the last axis'."""
    bits = address(array) | _stride_bits(array.shape, array.strides)
    return bits & -bits


@functools.lru_cache(maxsize=4096)
def _stride_bits(shape, strides):
    """16 and the strides that matter to `alignment`, by OR."""
    bits = 16
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size > 1:
            bits |= stride
    return bits


def strides(array):
    """Strides in elements."""
    return _in_elements(array.strides, array.itemsize)


@functools.lru_cache(maxsize=4096)
def _in_elements(strides, itemsize):
    return tuple(s // itemsize for s in strides)


def as_rows(op, name, array):
    """`array` [..., n] as a view [rows, n]: contiguous last axis, one stride between rows, nothing copied."""
    shape, strides, itemsize = array.shape, array.strides, array.itemsize
    problem = _why_no_rows(shape, strides, itemsize)
    if problem is not None:
        raise ValueError(f"{op}: {name} must {problem.format(dtype=array.dtype.name)}")
    return array if len(shape) == 2 else array.reshape(math.prod(shape[:-1]), shape[-1])


@functools.lru_cache(maxsize=4096)
def _why_no_rows(shape, strides, itemsize):
    """What `as_rows` cannot take, as the end of its message; None when it can."""
    if not shape:
        return "have at least one axis, got a 0-d array"
    if 0 not in shape and shape[-1] > 1 and strides[-1] != itemsize:
        return f"have a contiguous last axis, got strides {strides} bytes for {{dtype}}"
    if any(stride % itemsize for stride in strides):
        return f"have strides that are multiples of its itemsize {itemsize}, got {strides}"
    axes = [(n, s) for n, s in zip(shape[:-1], strides[:-1], strict=True) if n != 1]
    if len(shape) > 2 and 0 not in shape and any(
            outer != n * inner for (_, outer), (n, inner) in zip(axes, axes[1:], strict=False)):
        return f"have one stride between its rows, got strides {strides} bytes for shape {list(shape)}"
    return None


def row_view(array):
    """RowView of `array` [rows, row_size]; None gives a null view."""
    return None if array is None else {"data": array, "stride_row": array.strides[0] // array.itemsize}


def head_view(array):
    """HeadView of `array` [tokens, heads, head_dim]."""
    token, head, _ = strides(array)
    return {"data": array, "stride_token": token, "stride_head": head}
