# SPDX-License-Identifier: Apache-2.0
"""Where a small array lives: None or "cpu" means NumPy on the host, an int means CuPy on that GPU."""

import numpy as np


def to_host(value):
    """A NumPy copy of an array-like, NumPy or CuPy array."""
    if hasattr(value, "__cuda_array_interface__"):
        import cupy

        return cupy.asnumpy(value)
    return np.array(value)


def on_host(array):
    """A NumPy array itself, or a copy of a CuPy array."""
    return array if isinstance(array, np.ndarray) else to_host(array)


def device_key(op, device):
    """`device` as ``"cpu"`` or an int, whichever way it was spelled."""
    if device is None or (isinstance(device, str) and device == "cpu"):
        return "cpu"
    if isinstance(device, bool) or not isinstance(device, int | np.integer):
        raise TypeError(f"{op}: device must be None, 'cpu' or the number of a GPU, got {device!r}")
    if device < 0:
        raise ValueError(f"{op}: device must not be negative, got {device}")
    return int(device)


def to_device(op, array, device):
    """`array` on `device`, without a copy where it is there already.

    Raises
    ------
    RuntimeError
        CuPy or the GPU is missing; the message names the extra to install.
    """
    device = device_key(op, device)
    if device == "cpu":
        return array if isinstance(array, np.ndarray) else to_host(array)
    cupy = _cupy(op, device)
    with cupy.cuda.Device(device):
        return cupy.asarray(array)


def _cupy(op, device):
    """The cupy module, once it is certain that GPU number `device` exists."""
    extra = "pip install 'cupyattn[cuda13]' (or [cuda12])"
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"{op}: device {device} needs CuPy; {extra}") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"{op}: device {device} needs an NVIDIA GPU, its driver and a CuPy that fits it, {extra}; "
                           f"CUDA says {error}") from error
    if device >= count:
        raise RuntimeError(f"{op}: device {device} does not exist, CUDA sees {count} GPU{'s' * (count != 1)}; "
                           f"with another GPU: {extra}")
    return cupy
