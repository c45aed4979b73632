# SPDX-License-Identifier: Apache-2.0
"""Named shapes of real models, and the batches they decode."""

from dataclasses import dataclass

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

# (sequences, tokens already in the cache of each)
DECODE = ((1, 1024), (8, 4096), (64, 2048), (1, 131072))


def models():
    """Every model on a GPU; the two small ones on the CPU executor."""
    names = MODELS if DEVICE.is_gpu else ("smollm2-135m", "llama3-8b")
    return [MODELS[name] for name in names]


def token_counts():
    """New tokens of one step: single decode, batched decode, a prefill chunk."""
    return (1, 64, 4096) if DEVICE.is_gpu else (1, 8, 256)


def decode():
    """(batch, context) pairs; on the CPU executor the one that NumPy is compared with."""
    return DECODE if DEVICE.is_gpu else ((4, 2048),)
