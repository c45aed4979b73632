# SPDX-License-Identifier: Apache-2.0
"""The folder of a Hugging Face model: config.json and safetensors, weights in any format `QMatrix` reads."""

import re
from pathlib import Path

import numpy as np

from ..quant import QMatrix, Safetensors
from ..quant.checkpoint import quantization_config, read_json, read_layer
from .gguf import ModelError

# GGUF's names in Hugging Face's words
_NAMES = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
# frequencies, which config.json says too, and scales of caches in FP8, which ours does without
_UNUSED = re.compile(r".*(rotary_emb\.inv_freq|\.[qkv]_scale)")
_FLOATS = ("float16", "bfloat16", "float32")


def read_config(path):
    """config.json of a folder, a dict; ModelError without one."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ModelError("config.json is missing; a model is a GGUF file or the folder of a Hugging Face model")
    try:
        return read_json(path / "config.json")
    except ValueError as error:
        raise ModelError(str(error)) from None


class HuggingFaceTensors:
    """What `Weights` takes weights from: the safetensors of a Hugging Face model, by GGUF's names.

    Each layer is read in the format its own tensors are in, so a head that is not quantized is no special case. Rows
    of q and k stay as they are: their RoPE is of style neox.

    Parameters
    ----------
    path : str or Path
        The folder.
    config : dict
        Its config.json.

    Raises
    ------
    ModelError
        A damaged file, or none.
    """

    def __init__(self, path, config):
        try:
            self._files = Safetensors(path)
            self._quantization = quantization_config(Path(path))
        except ValueError as error:
            raise ModelError(str(error)) from None
        self._left = set(self._files)
        # some files have the tied head a second time
        self._tied = bool(config.get("tie_word_embeddings")) and {
            name for name in self._left if name.startswith("lm_head.")} <= {"lm_head.weight"}

    def __contains__(self, name):
        return not (name == "output" and self._tied)

    def _take(self, name):
        """(prefix, tensors by name) of a layer."""
        block, _, part = name.rpartition(".")
        prefix = f"model.layers.{block.removeprefix('blk.')}.{_LAYER_NAMES[part]}" if block else _NAMES[name]
        if prefix not in self._files.layers:
            raise ModelError(f"tensor {prefix}.weight is missing, or what stands for it")
        try:
            tensors = self._files.layer(prefix)
        except (ValueError, NotImplementedError) as error:
            raise ModelError(str(error)) from None
        self._left -= {f"{prefix}.{tensor}" for tensor in tensors}
        return prefix, tensors

    def vector(self, name, size):
        """float32 [size], NumPy."""
        prefix, tensors = self._take(name)
        return _vector(prefix + ".weight", tensors.pop("weight", None), size)

    def linear(self, name, shape):
        """(QMatrix on the host, bias float32 [rows] or None)."""
        prefix, tensors = self._take(name)
        bias = tensors.pop("bias", None)
        if bias is not None:
            bias = _vector(prefix + ".bias", bias, shape[0])
            bias = bias if bias.any() else None   # some GPTQ checkpoints have one of zeros everywhere
        try:
            weight = read_layer(tensors, self._quantization, shape)
            matrix = QMatrix.from_dense(weight) if isinstance(weight, np.ndarray) else QMatrix.from_coded(weight)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ModelError(f"layer {prefix}: {error}") from None
        return matrix, bias

    def unused(self):
        """Names that nobody took, but for those that say nothing of a weight."""
        return sorted(name for name in self._left
                      if not (_UNUSED.fullmatch(name) or self._tied and name == "lm_head.weight"))


def _vector(name, array, size):
    if array is None or array.shape != (size,) or array.dtype.name not in _FLOATS:
        found = "none" if array is None else f"{array.dtype.name} {list(array.shape)}"
        raise ModelError(f"tensor {name} must be {' or '.join(_FLOATS)} [{size}], got {found}")
    return array.astype(np.float32)
