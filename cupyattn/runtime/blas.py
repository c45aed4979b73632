# SPDX-License-Identifier: Apache-2.0
"""Products of plain arrays by a BLAS library: NumPy's on the host, cuBLAS through CuPy's binding on a GPU."""

import ctypes
import functools
import importlib

import numpy as np

from . import cpu
from .arrays import dtype_name
from .launch import run_library

# CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, which CuPy has no name for: parts of K are not added in 16 bits
_WIDE_SUMS = 16
_SCALARS = np.array([0, 1], np.float32)   # beta and alpha, which cuBLAS reads from host memory during the call


@functools.cache
def cublas():
    """CuPy's binding of cuBLAS; None where the library (package nvidia-cublas) is not installed."""
    try:
        return importlib.import_module("cupy_backends.cuda.libs.cublas")   # loads the library, too
    except ImportError:
        return None


@functools.cache
def library():
    """The cuBLAS that the binding has loaded, to be called during capture: cuBLAS allows it, the binding does not."""
    import cupy

    found = ctypes.CDLL(f"libcublas.so.{cupy.cuda.runtime.runtimeGetVersion() // 1000}")
    address, number = ctypes.c_void_p, ctypes.c_int
    found.cublasSetStream_v2.argtypes = address, address
    found.cublasGemmEx.argtypes = (address, *[number] * 5, address, *[address, number, number] * 2, address,
                                   address, *[number] * 4)
    return found


def available(xp):
    """Whether `multiply` works on arrays of `xp`; on NumPy's also whether the executor's settings ask for it."""
    return cpu.blas() if xp is np else cublas() is not None


def multiply(x, w, out, *, add=False):
    """out = x @ w.T (+ out), sums in float32, one rounding on store.

    Parameters
    ----------
    x : ndarray [M, K]
        Row stride at least K elements.
    w : ndarray [N, K], contiguous, x.dtype
        NumPy: float32, as x and out.
    out : ndarray [M, N]
        x.dtype or float32. Row stride at least N elements.
    add : bool
        Add what `out` holds. CuPy only.

    Notes
    -----
    CuPy arrays: at multiples of 16 bytes; asynchronous on the current stream, no temporaries. float32 is never TF32.
    """
    if isinstance(x, np.ndarray):
        run_library("blas", "cpu", lambda: np.matmul(x, w.T, out=out))
    else:
        run_library("cublas", "gpu", lambda: _gemm_ex(x, w, out, add))


def _gemm_ex(x, w, out, add):
    import cupy

    blas, handle = cublas(), cupy.cuda.device.get_cublas_handle()
    runtime = cupy.cuda.runtime
    types = {"float16": runtime.CUDA_R_16F, "bfloat16": runtime.CUDA_R_16BF, "float32": runtime.CUDA_R_32F}
    kind = types[dtype_name(x)]
    compute = blas.CUBLAS_COMPUTE_32F_PEDANTIC if kind == runtime.CUDA_R_32F else blas.CUBLAS_COMPUTE_32F
    (tokens, columns), rows, scalars = x.shape, len(w), _SCALARS.ctypes.data
    modes = blas.getPointerMode(handle), blas.getMathMode(handle)
    blas.setPointerMode(handle, blas.CUBLAS_POINTER_MODE_HOST)
    blas.setMathMode(handle, _WIDE_SUMS)
    try:
        # cuBLAS counts by columns: out.T [rows, tokens] = w @ x.T, where row-major w is the transpose of what it sees
        _call(blas, (handle, blas.CUBLAS_OP_T, blas.CUBLAS_OP_N, rows, tokens, columns,
                     scalars + 4, w.data.ptr, kind, columns, x.data.ptr, kind, _pitch(x),
                     scalars + 4 * add, out.data.ptr, types[dtype_name(out)], _pitch(out), compute,
                     blas.CUBLAS_GEMM_DEFAULT))
    finally:
        blas.setPointerMode(handle, modes[0])
        blas.setMathMode(handle, modes[1])


def _call(blas, arguments):
    """gemmEx on the current stream, which may capture a graph."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    if not stream.ptr or not stream.is_capturing():
        blas.gemmEx(*arguments)
        return
    status = library().cublasSetStream_v2(arguments[0], stream.ptr) or library().cublasGemmEx(*arguments)
    if status:
        raise RuntimeError(f"cuBLAS: status {status} of a product during capture")


def _pitch(array):
    """Elements between rows; of a single row, whose stride means nothing, its length."""
    return array.strides[0] // array.itemsize if len(array) > 1 else array.shape[1]
