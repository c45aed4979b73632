# SPDX-License-Identifier: Apache-2.0
"""A Llama-family decoder and a BERT encoder over the kernels, and the readers of its files."""

from .bert import Bert
from .config import SMOLLM2_135M, LlamaConfig
from .gguf import GGUF, ModelError
from .llama import Llama, random_llama

__all__ = ["GGUF", "SMOLLM2_135M", "Bert", "Llama", "LlamaConfig", "ModelError", "random_llama"]
