# SPDX-License-Identifier: Apache-2.0
"""A small Llama-family decoder over the kernels, and the readers of its files."""

from .config import SMOLLM2_135M, LlamaConfig
from .gguf import GGUF, ModelError
from .llama import Llama, random_llama

__all__ = ["GGUF", "SMOLLM2_135M", "Llama", "LlamaConfig", "ModelError", "random_llama"]
