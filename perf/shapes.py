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
    Model("llama2-7b", 4096, 11008, 32, 32, 128, 32, 32000),
    Model("qwen2.5-7b", 3584, 18944, 28, 4, 128, 28, 152064),
    Model("phi3-mini", 3072, 8192, 32, 32, 96, 32, 32064),
    Model("gemma2-9b", 3584, 14336, 16, 8, 256, 42, 256000),
    Model("gpt-oss-20b", 2880, 2880, 64, 8, 64, 24, 201088),
)}

def models():
    """Models whose projections and rows are timed."""
    names = ("llama3-8b", "llama3-70b", "smollm2-135m") if DEVICE.is_gpu else ("smollm2-135m", "llama3-8b")
    return [MODELS[name] for name in names]


@dataclass(frozen=True)
class Matmul:
    """A weight [rows, columns] of a model, and the formats and numbers of tokens it is timed with."""

    name: str
    rows: int
    columns: int
    formats: tuple
    tokens: tuple


def matmuls():
    """The projections of a decoder; on a GPU all of two models whose figures peers publish, on the CPU a few."""
    if not DEVICE.is_gpu:
        small, large = MODELS["smollm2-135m"], MODELS["llama3-8b"]
        return [Matmul(f"{small} gate-up", 2 * small.intermediate_size, small.hidden_size,
                       ("q4_1", "int4-g128", "q4_k", "nf4"), (1, 8, 16, 64, 512)),
                Matmul(f"{small} lm_head", small.vocab_size, small.hidden_size, ("q8_0",), (1, 8)),
                Matmul(f"{large} qkv", *_projections(large)["qkv"], ("int4-g128", "fp8"), (1, 8, 64, 512))]
    everything = ("int4-g128", "int8-g128", "q4_k", "q6_k", "q8_0", "fp8", "nf4", "mxfp4", "nvfp4", "float16")
    found = []
    for model, formats in ((MODELS["llama3-8b"], everything), (MODELS["llama3-70b"], ("int4-g128", "fp8", "q4_k"))):
        for name, (rows, columns) in _projections(model).items():
            some = formats if name in ("gate-up", "down") else formats[:1]
            found.append(Matmul(f"{model} {name}", rows, columns, some, (1, 8, 16, 64, 512, 4096)))
    square = Matmul("square", 8192, 8192, ("int4-g128",), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096))
    return [square, *found]


def _projections(model):
    """(rows, columns) of the weights of a layer."""
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {"qkv": (heads + 2 * kv_heads, model.hidden_size), "o": (model.hidden_size, heads),
            "gate-up": (2 * model.intermediate_size, model.hidden_size),
            "down": (model.hidden_size, model.intermediate_size)}


def token_counts():
    """New tokens of one step: single decode, batched decode, a prefill chunk."""
    return (1, 64, 4096) if DEVICE.is_gpu else (1, 8, 256)


def decode():
    """(model, sequences, tokens in the cache of each, tokens of a page, dtype of q, format of the cache).

    On the CPU executor what NumPy is compared with; on a GPU first the shapes that peers publish figures for.
    """
    def rows(names, sizes, page_sizes, formats):
        return [(MODELS[name], *size, page_size, "bfloat16" if kv == "bfloat16" else "float16", kv)
                for kv in formats for name in names for page_size in page_sizes for size in sizes]

    quantized = ("fp8_e4m3", "int8", "int4", "hadamard8", "hadamard4")
    if not DEVICE.is_gpu:
        plain = [(MODELS[name], 4, 2048, 16, dtype, dtype) for name in ("smollm2-135m", "llama3-8b")
                 for dtype in ("float16", "float32")]
        return plain + rows(("smollm2-135m",), [(4, 512)], (64,), ("int8", "hadamard4"))
    sizes = [(8, 32768), (16, 4096), (8, 4096), (8, 1024), (1, 1024), (1, 32768)]
    peers = rows(("llama3-8b",), sizes, (16,), ("bfloat16", *quantized))
    peers += rows(("llama3-70b", "llama2-7b"), sizes[:5:2] + sizes[5:], (16,), ("bfloat16", "fp8_e4m3"))
    peers += rows(("llama3-8b", "llama3-70b", "llama2-7b"), sizes[:5:2], (64,), ("bfloat16", "fp8_e4m3", "int4"))
    lengths = [("llama3-8b", 64, 2048, 16), ("llama3-8b", 1, 131072, 16)]
    heads = [(name, 8, 4096, 16) for name in MODELS if name != "llama3-8b"]
    return peers + [(MODELS[name], *rest, "float16", "float16") for name, *rest in lengths + heads] + [
        (MODELS["llama3-8b"], 8, 1024, 16, "float32", "float32")]


def prefill():
    """(model, sequences, new tokens of each, tokens to attend to, dtype, causal); on a GPU first what peers publish."""
    if not DEVICE.is_gpu:
        return [(MODELS[name], 1, q_len, context, dtype, True) for name in ("smollm2-135m", "llama3-8b")
                for q_len, context in ((512, 512), (128, 1024)) for dtype in ("float16", "float32")]
    lengths = (2048, 4096, 8192, 16384, 32768)
    peers = [(name, 1, n, n, "bfloat16", causal) for name, causal in (("llama3-70b", True), ("llama3-8b", True),
                                                                     ("llama3-70b", False), ("gpt-oss-20b", True))
             for n in (lengths if causal and name != "gpt-oss-20b" else lengths[::2])]
    others = [("llama3-8b", 1, 512, 512, "bfloat16", True), ("llama3-8b", 16, 1024, 1024, "bfloat16", True),
              ("llama3-8b", 4, 512, 8192, "bfloat16", True),
              *((name, 1, 8192, 8192, "float16", True) for name in ("smollm2-135m", "gemma2-9b", "phi3-mini")),
              ("smollm2-135m", 1, 1024, 1024, "float32", True)]
    return [(MODELS[name], *rest) for name, *rest in peers + others]


def normal(rng, shape, dtype):
    """Normally distributed numbers; beyond four million they repeat, for drawing them would take longer than timing."""
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    drawn = rng.standard_normal(min(math.prod(shape), 2**22), np.float32).astype(dtype)
    return np.resize(drawn, shape)
