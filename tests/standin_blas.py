# SPDX-License-Identifier: Apache-2.0
"""cuBLAS of the CuPy stand-in (see standin.py): the part of ``cupy_backends.cuda.libs.cublas`` that is used.

`gemmEx` has the parameters of CuPy's binding (test_blas_gemm.py compares them with the installed one's) and refuses
what cuBLAS refuses, and what it is slow at: matrices that are not at multiples of 16 bytes.
"""

import ctypes
import operator

import cupy
import ml_dtypes
import numpy as np
import standin_device as device

CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE = 0, 1
CUBLAS_GEMM_DEFAULT, CUBLAS_GEMM_DEFAULT_TENSOR_OP = -1, 99
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_PEDANTIC = 68, 69
HANDLE = 0x5EED
_TYPES = {2: np.dtype(np.float16), 14: np.dtype(ml_dtypes.bfloat16), 0: np.dtype(np.float32)}
_INT_MAX = 2**31 - 1
CUBLAS_DEFAULT_MATH, TF32, WIDE_SUMS = 0, 3, 16   # of cublasMath_t; CuPy names only the first
pointer_mode = CUBLAS_POINTER_MODE_DEVICE   # as another user of the handle may have left them
math_mode = TF32


def get_cublas_handle():
    return HANDLE


def getPointerMode(handle):  # noqa: N802  CuPy's name
    assert handle == HANDLE
    return pointer_mode


def setPointerMode(handle, mode):  # noqa: N802
    global pointer_mode
    assert handle == HANDLE and mode in (CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE)
    pointer_mode = mode


def getMathMode(handle):  # noqa: N802
    assert handle == HANDLE
    return math_mode


def setMathMode(handle, mode):  # noqa: N802
    global math_mode
    assert handle == HANDLE and mode in (CUBLAS_DEFAULT_MATH, TF32, WIDE_SUMS)
    math_mode = mode


def _refuse(text):
    raise device.error(f"CUBLAS_STATUS_INVALID_VALUE: {text}")


def _matrix(name, address, kind, rows, columns, pitch):
    """Column-major [rows, columns] over memory of the stand-in, inside one allocation, as a NumPy view."""
    dtype = _TYPES.get(kind)
    if dtype is None:
        _refuse(f"{name}type {kind}")
    if pitch < max(1, rows):
        _refuse(f"ld{name.lower()} {pitch} of a matrix of {rows} rows")
    if address % 16 or pitch * dtype.itemsize % 16 and columns > 1:
        _refuse(f"{name} at {address:#x} with {pitch * dtype.itemsize} bytes between columns: cuBLAS would be slow")
    count = pitch * (columns - 1) + rows
    for block in list(device.state.memory.values()):
        if block.address <= address and address + count * dtype.itemsize <= block.address + block.bytes.size:
            start = address - block.address
            flat = block.bytes[start:start + count * dtype.itemsize].view(dtype)
            return np.lib.stride_tricks.as_strided(flat, (rows, columns), (dtype.itemsize, pitch * dtype.itemsize))
    return _refuse(f"{name} is no device memory")


def gemmEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc,  # noqa: N802, N803
           computeType, algo):  # noqa: N803
    """C = alpha * op(A) @ op(B) + beta * C, column-major, sums in float32; refused during capture, as CuPy does."""
    if device.get_current_stream().is_capturing():
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    cublasGemmEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc,
                 computeType, algo)


# ---- the library itself ----------------------------------------------------------------------------------

def cublasSetStream_v2(handle, stream):  # noqa: N802  cuBLAS' name
    assert handle == HANDLE and stream == device.get_current_stream().ptr
    return 0


def cublasGemmEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc,  # noqa: N802, N803
                 computeType, algo):  # noqa: N803
    integers = [operator.index(value) for value in (transa, transb, m, n, k, Atype, lda, Btype, ldb, Ctype, ldc,
                                                    computeType, algo)]
    if any(not -_INT_MAX <= value <= _INT_MAX for value in integers):
        raise OverflowError("value too large to convert to int")
    assert handle == HANDLE and all(operator.index(value) > 0 for value in (alpha, A, B, beta, C))
    if pointer_mode != CUBLAS_POINTER_MODE_HOST:
        _refuse("alpha and beta are addresses of host memory, the pointer mode is that of the device")
    if math_mode != WIDE_SUMS:
        _refuse(f"math mode {math_mode} lets 16-bit products add parts of K in 16 bits, and float32 ones be TF32")
    if not (m > 0 and n > 0 and k > 0 and {transa, transb} <= {CUBLAS_OP_N, CUBLAS_OP_T}):
        _refuse(f"m {m}, n {n}, k {k}, operations {transa} and {transb}")
    if algo not in (CUBLAS_GEMM_DEFAULT, CUBLAS_GEMM_DEFAULT_TENSOR_OP):
        _refuse(f"algorithm {algo}")
    if computeType not in (CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_PEDANTIC) or Atype != Btype or (
            Ctype not in (Atype, cupy.cuda.runtime.CUDA_R_32F)):
        _refuse(f"CUBLAS_STATUS_NOT_SUPPORTED: types {Atype}, {Btype} to {Ctype} computed as {computeType}")
    a = _matrix("A", A, Atype, *((m, k) if transa == CUBLAS_OP_N else (k, m)), lda)
    b = _matrix("B", B, Btype, *((k, n) if transb == CUBLAS_OP_N else (n, k)), ldb)
    c = _matrix("C", C, Ctype, m, n, ldc)
    one, held = (ctypes.c_float.from_address(address).value for address in (alpha, beta))   # read during the call

    @np.errstate(all="ignore")
    def work():
        left, right = (x.astype(np.float32) for x in (a.T if transa else a, b.T if transb else b))
        product = np.float32(one) * (left @ right)
        c[...] = product if held == 0 else product + np.float32(held) * c.astype(np.float32)

    device.state.events["gemms"] += 1
    device.enqueue(work)
    return 0
