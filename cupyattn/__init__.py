# SPDX-License-Identifier: Apache-2.0
"""Attention and quantized matmul kernels for NumPy and CuPy arrays, without torch.

NumPy arrays in: the `.cu` source runs on the CPU. CuPy arrays in: it runs on the GPU.
"""

from .errors import CompileError, KernelCheckError
from .ops.rms_norm import rms_norm

__all__ = ["CompileError", "KernelCheckError", "rms_norm"]
__version__ = "0.1.0"
