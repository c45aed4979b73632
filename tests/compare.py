# SPDX-License-Identifier: Apache-2.0
"""Comparing results, filling memory with values that must not matter, and arrays larger than the memory."""

import mmap

import numpy as np


def assert_close(actual, reference, atol, rtol):
    """|actual - reference| ≤ atol + rtol·|reference| everywhere, NaN and infinities in the same places; `atol` may be
    an array."""
    actual = np.asarray(actual).astype(np.float64)
    reference = np.asarray(reference).astype(np.float64)
    assert actual.shape == reference.shape, f"shape {actual.shape}, want {reference.shape}"
    for what, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differ = test(actual) != test(reference)
        if differ.any():
            at = tuple(int(i) for i in np.argwhere(differ)[0])
            raise AssertionError(f"{what} differs at {at} ({differ.sum()} places): {actual[at]}, want {reference[at]}")
    finite = np.isfinite(reference)
    with np.errstate(invalid="ignore"):
        allowed = atol + rtol * np.abs(reference)
        excess = np.where(finite, np.abs(actual - reference) - allowed, -np.inf)
    if excess.size and excess.max() > 0:
        at = tuple(int(i) for i in np.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(f"worst at {at} ({(excess > 0).sum()} of {excess.size} off): {actual[at]:.9g}, want "
                             f"{reference[at]:.9g}, allowed {allowed[at]:.3g}")


def assert_same_bits(a, b):
    """Same dtype, shape and bytes."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype} {a.shape} and {b.dtype} {b.shape}"
    differ = np.ascontiguousarray(a).view(np.uint8) != np.ascontiguousarray(b).view(np.uint8)
    assert not differ.any(), f"{differ.sum()} of {differ.size} bytes differ"


# one rounding of a float32 result to the output type, and float32's own error in a short sum
ROUNDING = {"float32": (1e-6, 2e-6), "float16": (1e-6, 2.0**-11 * 1.02), "bfloat16": (1e-6, 2.0**-8 * 1.02)}


def dtype_of(name):
    """NumPy dtype by name, bfloat16 included."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def poison(array):
    """Fill with NaN (floats) or 0x7f7f7f7f (integers); returns the array."""
    if array.dtype.kind in "iu":
        array.view(np.uint8)[...] = 0x7F
    else:
        array[...] = np.nan
    return array


_MAP_NORESERVE = 0x4000   # of Linux; Python names it from 3.13 on


def sparse_array(shape, dtype="float16"):
    """Zeros of any size: pages of 4 KiB take memory once they are written to, and reading one costs next to nothing.

    For offsets past 4 GiB or 2**31 elements. Never pass it to what walks over all of it.
    """
    dtype = dtype_of(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)   # a touched page would otherwise become 2 MiB
    return np.frombuffer(memory, dtype).reshape(shape)
