# SPDX-License-Identifier: Apache-2.0
"""Metadata checks shared by the ops. Each message names the op, the argument, the rule and what was found."""

import functools
import math
import numbers
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from .arrays import dtype_name, dtype_of
from .structs import address, extent

FLOATS = ("float16", "bfloat16", "float32")
_FLOAT_MAX, _INT_MAX = (2 - 2**-23) * 2.0**127, 2**31 - 1   # of the float and int32_t fields of a kernel's arguments


def _no_array(op, name, value):
    return TypeError(f"{op}: {name} must be a NumPy or CuPy array, got {type(value).__name__}")


def check_dtype(op, name, array, allowed):
    """`array.dtype.name` is one of `allowed` (a name or a tuple of names); returns it."""
    try:
        found = dtype_name(array)
    except AttributeError:
        raise _no_array(op, name, array) from None
    if found != allowed and (isinstance(allowed, str) or found not in allowed):
        allowed = (allowed,) if isinstance(allowed, str) else allowed
        raise TypeError(f"{op}: {name} must be {' or '.join(allowed)}, got {found}")
    return found


def out_dtype_or(op, out_dtype, default):
    """`out_dtype`, a dtype or its name, or else `default`."""
    if out_dtype is None:
        return default
    try:
        dtype = dtype_of(out_dtype)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in FLOATS:
        raise TypeError(f"{op}: out_dtype must be {' or '.join(FLOATS)}, got {out_dtype if dtype is None else dtype}")
    return dtype


def check_shape(op, name, array, expected, axes):
    """`array.shape` equals `expected` (None matches any size); `axes` names them, e.g. ``"[batch, head_dim]"``."""
    try:
        shape = array.shape
    except AttributeError:
        raise _no_array(op, name, array) from None
    if shape != expected and not _fits(shape, expected):
        want = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} must be {axes} = [{want}], got {list(shape)}")


@functools.lru_cache(maxsize=4096)
def _fits(shape, expected):
    return len(shape) == len(expected) and all(e is None or s == e for s, e in zip(shape, expected, strict=True))


def check_last_axis(op, name, array):
    """The last axis is contiguous (of an empty array or a size of 1 it always is)."""
    if array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise ValueError(f"{op}: {name} must have a contiguous last axis, got strides {array.strides} bytes for "
                         f"{array.dtype.name}")


def check_element_strides(op, name, array):
    """Every stride is a whole number of elements."""
    if not _whole_elements(array.strides, array.itemsize):
        raise ValueError(f"{op}: {name} must have strides that are multiples of its itemsize {array.itemsize}, "
                         f"got {array.strides}")


@functools.lru_cache(maxsize=4096)
def _whole_elements(strides, itemsize):
    return not any(s % itemsize for s in strides)


class _Metadata(NamedTuple):
    """What the checks above ask of an array."""

    dtype: np.dtype
    shape: tuple
    strides: tuple

    @property
    def itemsize(self):
        return self.dtype.itemsize

    @property
    def size(self):
        return math.prod(self.shape)


def check_array(op, name, array, dtypes, shape, axes, *, contiguous=True):
    """`check_dtype`, `check_shape`, `check_element_strides` and, if `contiguous`, `check_last_axis`; the dtype's name.

    What passed once passes at once the next time.
    """
    try:
        facts = _Metadata(array.dtype, array.shape, array.strides)
    except AttributeError:
        raise _no_array(op, name, array) from None
    return _checked(op, name, facts, dtypes, shape, axes, contiguous)


@functools.lru_cache(maxsize=4096)
def _checked(op, name, facts, dtypes, shape, axes, contiguous):
    found = check_dtype(op, name, facts, dtypes)
    check_shape(op, name, facts, shape, axes)
    if contiguous:
        check_last_axis(op, name, facts)
    check_element_strides(op, name, facts)
    return found


def check_writeable(op, name, array):
    """An array the op writes is no read-only NumPy array and gives every element a place of its own along each axis."""
    if not getattr(array.flags, "writeable", True):
        raise ValueError(f"{op}: {name} must be writeable, got a read-only array")
    if 0 in array.strides and array.size and any(
            s == 0 and n > 1 for s, n in zip(array.strides, array.shape, strict=True)):
        raise ValueError(f"{op}: {name} must not repeat elements, got strides {array.strides} for shape "
                         f"{list(array.shape)}; it is written")


def check_apart(op, written, read=()):
    """Arrays that are written share no element with each other, nor with those that are read.

    Parameters
    ----------
    op : str
    written, read : sequence of (name, ndarray)
        Views of one array may lie between each other: the heads of two ranks in one cache, say.
    """
    spans = [(*extent(array), n, name, array) for n, (name, array) in enumerate((*written, *read)) if array.size]
    spans.sort(key=lambda span: span[0])
    reaching = []   # those before that end behind the start of the next
    for span in spans:
        reaching = [other for other in reaching if other[1] > span[0]]
        for other in reaching:
            (n, first, one), (_, second, two) = sorted((other[2:], span[2:]), key=lambda s: s[0])
            if n < len(written) and np.shares_memory(_memory(one), _memory(two)):
                raise ValueError(f"{op}: {second} must share no memory with {first}, got "
                                 f"{'the same array twice' if one is two else 'arrays that overlap'}")
        reaching.append(span)


def _memory(array):
    """A NumPy array for `np.shares_memory`, which asks only where its elements are; on a GPU nothing else can."""
    if isinstance(array, np.ndarray):
        return array
    return np.asarray(SimpleNamespace(__array_interface__={
        "version": 3, "shape": array.shape, "strides": array.strides, "typestr": f"|V{array.itemsize}",
        "data": (address(array), True)}))


def check_number(op, name, value, *, least=None, integer=False):
    """`value` is a real number (or with `integer` an integer), finite in the kernel's type and at least `least`."""
    kind = type(value)
    if kind is not int and (integer or kind is not float):   # perhaps a NumPy scalar
        if kind is bool or not isinstance(value, numbers.Integral if integer else numbers.Real):
            raise TypeError(f"{op}: {name} must be {'an integer' if integer else 'a number'}, got {kind.__name__}")
        value = int(value) if integer else float(value)
    most = _INT_MAX if integer else _FLOAT_MAX
    if not (-most if least is None else least) <= value <= most:   # NaN fails as well
        rule = f"{'an int32' if integer else 'a finite float32'}{'' if least is None else f' of at least {least}'}"
        raise ValueError(f"{op}: {name} must be {rule}, got {value}")


def check_flag(op, name, value):
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def value_range(array):
    """(smallest, largest) of a 1-d integer array that is not empty."""
    if array.size > 64:
        return int(array.min()), int(array.max())
    values = array.tolist()   # for a few numbers far cheaper than two reductions
    return min(values), max(values)
