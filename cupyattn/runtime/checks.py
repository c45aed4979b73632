# SPDX-License-Identifier: Apache-2.0
"""Metadata checks shared by the ops. Each message names the op, the argument, the rule and what was found."""

from .arrays import dtype_name

FLOATS = ("float16", "bfloat16", "float32")


def check_dtype(op, name, array, allowed):
    """`array.dtype.name` is one of `allowed` (a name or a tuple of names); returns it."""
    found = dtype_name(array)
    if found != allowed and (isinstance(allowed, str) or found not in allowed):
        allowed = (allowed,) if isinstance(allowed, str) else allowed
        raise TypeError(f"{op}: {name} must be {' or '.join(allowed)}, got {found}")
    return found


def check_shape(op, name, array, expected, axes):
    """`array.shape` equals `expected` (None matches any size); `axes` names them, e.g. ``"[batch, head_dim]"``."""
    shape = array.shape
    if shape == expected:
        return
    if len(shape) != len(expected) or any(e is not None and s != e for s, e in zip(shape, expected, strict=True)):
        want = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} must be {axes} = [{want}], got {list(shape)}")


def check_last_axis(op, name, array):
    """The last axis is contiguous (of an empty array or a size of 1 it always is)."""
    if array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise ValueError(f"{op}: {name} must have a contiguous last axis, got strides {array.strides} bytes for "
                         f"{array.dtype.name}")


def check_element_strides(op, name, array):
    """Every stride is a whole number of elements."""
    if any(s % array.itemsize for s in array.strides):
        raise ValueError(f"{op}: {name} must have strides that are multiples of its itemsize {array.itemsize}, "
                         f"got {array.strides}")


def check_writeable(op, name, array):
    """A NumPy output may be written to."""
    if not getattr(array.flags, "writeable", True):
        raise ValueError(f"{op}: {name} must be writeable, got a read-only array")


def value_range(array):
    """(smallest, largest) of a 1-d integer array that is not empty."""
    if array.size > 64:
        return int(array.min()), int(array.max())
    values = array.tolist()   # for a few numbers far cheaper than two reductions
    return min(values), max(values)
