# SPDX-License-Identifier: Apache-2.0
"""Array metadata: which library an array belongs to, its alignment, and the views kernels take."""

import sys

import numpy as np

from .structs import address

_names = {}


def dtype_name(array):
    """``array.dtype.name``, which NumPy computes anew (3 µs) each time it is asked."""
    dtype = array.dtype
    name = _names.get(dtype)
    if name is None:
        name = _names[dtype] = dtype.name if dtype.isnative else f"{dtype.name} of foreign byte order"
    return name


def _kind(array):
    if isinstance(array, np.ndarray):
        return "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return "cupy"
    return None


def array_namespace(op, /, **arrays):
    """The module (numpy or cupy) all `arrays` belong to; None values are ignored.

    Raises
    ------
    TypeError
        An argument is no array, or NumPy and CuPy arrays are mixed.
    """
    kinds = {}
    for name, array in arrays.items():
        if array is None:
            continue
        kind = _kind(array)
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
    bits = address(array) | 16
    for size, stride in zip(array.shape[:-1], array.strides[:-1], strict=True):
        if size > 1:
            bits |= stride
    return bits & -bits


def strides(array):
    """Strides in elements."""
    size = array.itemsize
    return tuple(s // size for s in array.strides)


def as_rows(op, name, array):
    """`array` [..., n] as a view [rows, n]: contiguous last axis, one stride between rows, nothing copied."""
    if array.ndim == 0:
        raise ValueError(f"{op}: {name} must have at least one axis, got a 0-d array")
    if array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise ValueError(f"{op}: {name} must have a contiguous last axis, got strides {array.strides} bytes for "
                         f"{array.dtype.name}")
    if any(stride % array.itemsize for stride in array.strides):
        raise ValueError(f"{op}: {name} must have strides that are multiples of its itemsize {array.itemsize}, got "
                         f"{array.strides}")
    if array.ndim == 2:
        return array
    axes = [(n, s) for n, s in zip(array.shape[:-1], array.strides[:-1], strict=True) if n != 1]
    if any(outer != n * inner for (_, outer), (n, inner) in zip(axes, axes[1:], strict=False)) and array.size:
        raise ValueError(f"{op}: {name} must have one stride between its rows, got strides {array.strides} bytes for "
                         f"shape {list(array.shape)}")
    rows = 1
    for n in array.shape[:-1]:
        rows *= n
    return array.reshape(rows, array.shape[-1])


def row_view(array):
    """RowView of `array` [rows, row_size]; None gives a null view."""
    return None if array is None else {"data": array, "stride_row": array.strides[0] // array.itemsize}


def head_view(array):
    """HeadView of `array` [tokens, heads, head_dim]."""
    token, head, _ = strides(array)
    return {"data": array, "stride_token": token, "stride_head": head}
