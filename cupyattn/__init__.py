# SPDX-License-Identifier: Apache-2.0
"""Attention and quantized matmul kernels for NumPy and CuPy arrays, without torch.

NumPy arrays in: the `.cu` source runs on the CPU. CuPy arrays in: it runs on the GPU.
"""

from .errors import CompileError, KernelCheckError
from .ops.embedding import embedding
from .ops.kv_append import kv_append
from .ops.kv_flatten import kv_flatten
from .ops.layer_norm import layer_norm
from .ops.paged_decode import paged_decode
from .ops.quant_gemm import quant_gemm
from .ops.rms_norm import rms_norm
from .ops.rope import rope
from .ops.silu_mul import silu_mul
from .ops.split_reduce import split_reduce
from .page_table import PageTable
from .pages import PageManager
from .params import PagedParams, Params
from .quant import QMatrix
from .quantized_kv import BlockKV, QuantizedKV
from .rope_params import RopeKernelParam, RopeParams

__all__ = [
    "BlockKV", "CompileError", "KernelCheckError", "PagedParams", "PageManager", "PageTable", "Params", "QMatrix",
    "QuantizedKV", "RopeKernelParam", "RopeParams",
    "embedding", "kv_append", "kv_flatten", "layer_norm", "paged_decode", "quant_gemm", "rms_norm", "rope", "silu_mul",
    "split_reduce",
]
__version__ = "0.1.0"
