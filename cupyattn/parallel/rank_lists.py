# SPDX-License-Identifier: Apache-2.0
"""Lists with an entry for each rank of this process: how they are checked and walked through."""

import contextlib

import numpy as np

from ..runtime.arrays import array_namespace, dtype_name


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
