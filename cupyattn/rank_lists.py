# SPDX-License-Identifier: Apache-2.0
"""Lists with an entry for each rank of this process: how they are checked and walked through."""

import contextlib
from types import SimpleNamespace

import numpy as np

from .page_table import extent
from .runtime.arrays import array_namespace, dtype_name
from .runtime.structs import address


def check_list(op, name, values, ranks):
    """`values` is a list or tuple of one for each of `ranks`."""
    if not isinstance(values, list | tuple) or len(values) != len(ranks):
        found = len(values) if isinstance(values, list | tuple) else type(values).__name__
        raise ValueError(f"{op}: {name} must be a list of one for each of the ranks {list(ranks)}, got {found}")


def check_place(op, name, array, device):
    """`array` is where a rank has its arrays: NumPy for "cpu", else CuPy on the GPU of that number."""
    xp = array_namespace(op, **{name: array})
    if (xp is np) != (device == "cpu"):
        raise TypeError(f"{op}: {name} must be {'NumPy' if device == 'cpu' else 'CuPy'} arrays for this rank, got "
                        f"{xp.__name__}")
    if xp is not np and array.device.id != device:
        raise ValueError(f"{op}: {name} must be on GPU {device} for this rank, got GPU {array.device.id}")


def check_alike(op, name, arrays, devices):
    """Arrays where the ranks of `devices` have theirs, of the shape and dtype of the first."""
    for array, device in zip(arrays, devices, strict=True):
        check_place(op, name, array, device)
        if dtype_name(array) != dtype_name(arrays[0]):
            raise TypeError(f"{op}: {name} must be of one dtype on all ranks, got {dtype_name(arrays[0])} and "
                            f"{dtype_name(array)}")
        if array.shape != arrays[0].shape:
            raise ValueError(f"{op}: {name} must be of one shape on all ranks, got {list(arrays[0].shape)} and "
                             f"{list(array.shape)}")


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


def array_module(device):
    """numpy for "cpu", else cupy."""
    if device == "cpu":
        return np
    import cupy

    return cupy


def each_rank(communicator, values):
    """(n, value) of each rank of this process, with its GPU as the current one."""
    for n, (device, value) in enumerate(zip(communicator.devices, values, strict=True)):
        with contextlib.nullcontext() if device == "cpu" else array_module(device).cuda.Device(device):
            yield n, value
