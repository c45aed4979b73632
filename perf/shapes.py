# SPDX-License-Identifier: Apache-2.0
"""Named shapes of real models, and the batches they decode."""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from timing import DEVICE


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder: widths in elements, the head counts, layers and vocabulary."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocab_size: int

    def __str__(self):
        return self.name


MODELS = {model.name: model for model in (
    Model("smollm2-135m", 576, 1536, 9, 3, 64, 30, 49152),
    Model("llama3-8b", 4096, 14336, 32, 8, 128, 32, 128256),
    Model("llama3-70b", 8192, 28672, 64, 8, 128, 80, 128256),
    Model("qwen2.5-7b", 3584, 18944, 28, 4, 128, 28, 152064),
    Model("phi3-mini", 3072, 8192, 32, 32, 96, 32, 32064),
    Model("gemma2-9b", 3584, 14336, 16, 8, 256, 42, 256000),
)}

def models():
    """Models whose projections and rows are timed."""
    names = ("llama3-8b", "llama3-70b", "smollm2-135m") if DEVICE.is_gpu else ("smollm2-135m", "llama3-8b")
    return [MODELS[name] for name in names]


def token_counts():
    """New tokens of one step: single decode, batched decode, a prefill chunk."""
    return (1, 64, 4096) if DEVICE.is_gpu else (1, 8, 256)


def decode():
    """(model, sequences, tokens in the cache of each, dtype); on the CPU executor what NumPy is compared with."""
    if not DEVICE.is_gpu:
        return [(MODELS[name], 4, 2048, dtype) for name in ("smollm2-135m", "llama3-8b")
                for dtype in ("float16", "float32")]
    lengths = [("llama3-8b", batch, context, "float16")
               for batch, context in ((1, 1024), (8, 4096), (64, 2048), (1, 131072))]
    heads = [(name, 8, 4096, "float16") for name in MODELS if name != "llama3-8b"]
    dtypes = [("llama3-8b", 8, 4096, "bfloat16"), ("llama3-8b", 8, 1024, "float32")]
    return [(MODELS[name], *rest) for name, *rest in (*lengths, *heads, *dtypes)]


def prefill():
    """(model, sequences, new tokens of each, tokens to attend to, dtype)."""
    if not DEVICE.is_gpu:
        return [(MODELS[name], 1, q_len, context, dtype) for name in ("smollm2-135m", "llama3-8b")
                for q_len, context in ((512, 512), (128, 1024)) for dtype in ("float16", "float32")]
    lengths = [("llama3-8b", batch, q_len, context, "bfloat16") for batch, q_len, context in (
        (1, 2048, 2048), (1, 8192, 8192), (1, 32768, 32768), (16, 1024, 1024), (4, 512, 8192))]
    others = [(name, 1, 8192, 8192, "float16") for name in ("llama3-70b", "smollm2-135m", "gemma2-9b", "phi3-mini")]
    return [(MODELS[name], *rest) for name, *rest in (*lengths, *others, ("smollm2-135m", 1, 1024, 1024, "float32"))]


def normal(rng, shape, dtype):
    """Normally distributed numbers; beyond four million they repeat, for drawing them would take longer than timing."""
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    drawn = rng.standard_normal(min(math.prod(shape), 2**22), np.float32).astype(dtype)
    return np.resize(drawn, shape)
