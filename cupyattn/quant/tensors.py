# SPDX-License-Identifier: Apache-2.0
"""Arrays of a checkpoint by name, checked; and what readers of integers say alike."""

import numpy as np

SCALES = ("float16", "bfloat16", "float32")
WORDS = ("int32", "uint32")


def take(tensors, name, dtypes, shape):
    """The array `name` of a dict, its dtype and shape checked.

    Parameters
    ----------
    tensors : dict of str to ndarray
    name : str
    dtypes : sequence of str
    shape : tuple of int or None
        None for an axis of any size.

    Raises
    ------
    ValueError
        No such array, or another shape.
    TypeError
        Another dtype.
    """
    if name not in tensors:
        raise ValueError(f"QMatrix: tensors must have {name!r}, got {', '.join(sorted(tensors)) or 'none'}")
    array = np.asarray(tensors[name])
    if array.dtype.name not in dtypes:
        raise TypeError(f"QMatrix: {name} must be {' or '.join(dtypes)}, got {array.dtype.name}")
    if array.ndim != len(shape) or any(rule not in (None, size) for rule, size in zip(shape, array.shape, strict=True)):
        rule = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"QMatrix: {name} must have shape [{rule}], got {list(array.shape)}")
    return array


def check_matrix(name, shape):
    """`shape` of the matrix `name` as two ints: any out_features, and in_features a multiple of 8."""
    sizes = tuple(shape) if isinstance(shape, tuple | list | np.ndarray) else ()
    if not all(isinstance(size, int | np.integer) for size in sizes) or not sizes:
        raise TypeError(f"QMatrix: {name} must be (out_features, in_features), got {shape!r}")
    sizes = tuple(int(size) for size in sizes)
    if len(sizes) != 2 or sizes[0] < 1 or sizes[1] < 8 or sizes[1] % 8:
        raise ValueError(f"QMatrix: {name} must be [out_features, in_features], both at least 1 and in_features a "
                         f"multiple of 8, got {list(sizes)}")
    return sizes


def check_shape(shape):
    """`shape` of a checkpoint's layer as two ints; both must be multiples of 8."""
    shape = tuple(int(size) for size in shape)
    if len(shape) != 2 or any(size < 8 or size % 8 for size in shape):
        raise ValueError(f"QMatrix: shape must be (out_features, in_features), multiples of 8, got {shape}")
    return shape


def zero_points(zero, scale):
    """Zero points less their centre, in the dtype of `scale`; None when all are 0."""
    return zero.astype(scale.dtype) if zero.any() else None


def only(name, candidates, evidence):
    """The one candidate; ValueError when the shapes leave `name` open or allow no value."""
    if len(candidates) != 1:
        found = f"{evidence}, which fits {' and '.join(map(str, candidates)) or 'none'}"
        raise ValueError(f"QMatrix: {name} must follow from the shapes or be given, got {found}")
    return candidates[0]
