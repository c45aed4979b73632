# SPDX-License-Identifier: Apache-2.0
"""Attention and quantized matmul kernels for NumPy and CuPy arrays, without torch.

NumPy arrays in: the `.cu` source runs on the CPU. CuPy arrays in: it runs on the GPU.
"""

from .attention_impl import AttentionImpl, AttentionMetadata, AttentionOutput, AttentionRegistry
from .caches import (
    HBMPageManager,
    LightningCache,
    LightningCacheMetaData,
    LightningCacheView,
    LightningMetadata,
    Mamba2Cache,
    Mamba2CacheMetaData,
    Mamba2CacheView,
    Mamba2Metadata,
    MambaCache,
    MambaCacheMetaData,
    MambaCacheView,
    MambaMetadata,
    PagedAttentionCache,
    PagedAttentionCacheMetaData,
    PagedAttentionCacheView,
    PagedAttentionMetadata,
    PagedCache,
    TransformerCache,
    TransformerCacheMetaData,
    TransformerCacheView,
    TransformerMetadata,
)
from .errors import CaptureError, CompileError, KernelCheckError
from .kv.quantized import BlockKV, QuantizedKV
from .matmul.tuning import tune
from .ops.attention import attention
from .ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from .ops.dequantize import dequantize
from .ops.embedding import embedding
from .ops.kv_append import kv_append
from .ops.kv_flatten import kv_flatten
from .ops.layer_norm import layer_norm
from .ops.lightning_attention import lightning_attention, lightning_slopes
from .ops.page_move import page_move
from .ops.paged_decode import paged_decode
from .ops.quant_gemm import quant_gemm
from .ops.repack import repack
from .ops.rms_norm import rms_norm
from .ops.rope import rope
from .ops.schedule import Schedule, schedule
from .ops.selective_scan import selective_scan
from .ops.selective_state_update import selective_state_update
from .ops.silu_mul import silu_mul
from .ops.split_reduce import split_reduce
from .paged_attn import PagedAttn
from .paging.pages import PageManager
from .paging.sequence import PageSequence
from .paging.table import PageTable
from .parallel.communicators import Communicator, InProcessCommunicator, MPICommunicator
from .parallel.context_parallel import contiguous_shards, merge_shards, rank_result, round_robin
from .parallel.nccl import NCCLCommunicator
from .parallel.tensor_parallel import TPContext, split_heads
from .parallel.tp_attn import TPAttn, TPShard
from .parallel.tp_functions import tp_attn_forward_, tp_attn_forward_paged_
from .params import PagedParams, Params
from .q_attn.functions import (
    ROPE_STYLE_GPTJ,
    ROPE_STYLE_NEOX,
    ROPE_STYLE_NONE,
    free_q_attn,
    make_q_attn,
    q_attn_forward_1,
    q_attn_forward_2,
    q_attn_set_loras,
)
from .q_attn.layer import QAttn
from .q_attn.lora import LoRA, load_lora
from .quant import QExperts, QMatrix
from .rope_params import RopeKernelParam, RopeParams
from .turbomind.attention_params import AttentionParams
from .turbomind.cache_iterators import BlockIteratorParams, LinearIteratorParams, QuantPolicy, create_cache_iter_factory
from .turbomind.entry_points import flatten_kv, invoke_attention, invoke_decoding, process_kv, reduce_split_k

__all__ = [
    "AttentionParams", "BlockIteratorParams", "BlockKV", "CaptureError", "CompileError", "KernelCheckError",
    "LinearIteratorParams", "LoRA", "PagedCache", "PagedParams", "PageManager", "PageSequence", "PageTable",
    "Params", "QAttn", "QExperts", "QMatrix", "QuantPolicy", "QuantizedKV", "ROPE_STYLE_GPTJ", "ROPE_STYLE_NEOX",
    "ROPE_STYLE_NONE", "RopeKernelParam", "RopeParams", "Schedule",
    "attention", "dequantize", "embedding", "kv_append", "kv_flatten", "layer_norm", "paged_decode", "quant_gemm",
    "repack", "rms_norm", "rope", "schedule", "silu_mul", "split_reduce", "tune",
    "causal_conv1d", "causal_conv1d_update", "lightning_attention", "lightning_slopes", "page_move",
    "selective_scan", "selective_state_update",
    "free_q_attn", "make_q_attn", "q_attn_forward_1", "q_attn_forward_2", "q_attn_set_loras", "load_lora",
    "contiguous_shards", "create_cache_iter_factory", "flatten_kv", "invoke_attention", "invoke_decoding",
    "merge_shards", "process_kv", "rank_result", "reduce_split_k", "round_robin",
    "Communicator", "InProcessCommunicator", "MPICommunicator", "NCCLCommunicator", "TPAttn", "TPContext",
    "TPShard", "split_heads", "tp_attn_forward_", "tp_attn_forward_paged_",
    "LightningCache", "LightningCacheMetaData", "LightningCacheView", "LightningMetadata",
    "HBMPageManager", "Mamba2Cache", "Mamba2CacheMetaData", "Mamba2CacheView", "Mamba2Metadata",
    "MambaCache", "MambaCacheMetaData", "MambaCacheView", "MambaMetadata",
    "PagedAttentionCache", "PagedAttentionCacheMetaData", "PagedAttentionCacheView", "PagedAttentionMetadata",
    "TransformerCache", "TransformerCacheMetaData", "TransformerCacheView", "TransformerMetadata",
    "AttentionImpl", "AttentionMetadata", "AttentionOutput", "AttentionRegistry", "PagedAttn",
]
__version__ = "0.1.0"
