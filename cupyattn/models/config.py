# SPDX-License-Identifier: Apache-2.0
"""Sizes of a Llama-family model, from GGUF metadata or from the config.json of a Hugging Face model."""

import math
from dataclasses import dataclass

from ..rope_params import RopeParams
from .gguf import ModelError, field

_MODEL_TYPES = ("llama", "mistral", "qwen2")   # one architecture: Qwen2 has biases, which its tensors tell


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama-family model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # tokens
    rope: RopeParams
    rms_eps: float


SMOLLM2_135M = LlamaConfig(
    num_layers=30, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64,
    vocab_size=49152, context_length=8192, rms_eps=1e-5,
    rope=RopeParams(rotary_dim=64, base=100000.0, style="interleaved"))


def config_from(metadata):
    """LlamaConfig from GGUF metadata.

    Raises
    ------
    ModelError
        Another architecture than llama, a key that is missing or holds what no model can have, or a RoPE scaling
        this reader does not know.
    """
    architecture = field(metadata, "general.architecture", str)
    if architecture != "llama":
        raise ModelError(f"model architecture must be llama, got {architecture}")
    if experts := field(metadata, "llama.expert_count", int, 0):
        raise ModelError(f"mixture-of-experts models are not supported, got llama.expert_count = {experts}")

    def size(name, default=None):
        value = field(metadata, "llama." + name, int, default)
        if not 1 <= value < 2**31:
            raise ModelError(f"metadata llama.{name} must be from 1 to {2**31 - 1}, got {value}")
        return value

    heads, hidden = size("attention.head_count"), size("embedding_length")
    kv_heads = size("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ModelError(f"metadata llama.attention.head_count_kv must divide the {heads} heads, got {kv_heads}")
    head_dim = field(metadata, "llama.attention.key_length", int, hidden // heads)
    if head_dim not in range(8, 257, 8):
        raise ModelError("metadata llama.attention.key_length (without it embedding_length / head_count) must be "
                         f"a multiple of 8 from 8 to 256, got {head_dim}")
    eps = field(metadata, "llama.attention.layer_norm_rms_epsilon", float)
    if not (math.isfinite(eps) and eps >= 0):
        raise ModelError(f"metadata llama.attention.layer_norm_rms_epsilon must be finite and at least 0, got {eps}")
    return LlamaConfig(
        num_layers=size("block_count"), hidden_size=hidden, intermediate_size=size("feed_forward_length"),
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, vocab_size=_vocab_size(metadata),
        context_length=size("context_length"), rms_eps=eps, rope=_rope_from(metadata, head_dim))


def _vocab_size(metadata):
    """Rows of the embedding: one for each token of the vocabulary."""
    tokens = field(metadata, "tokenizer.ggml.tokens", list)
    vocab_size = field(metadata, "llama.vocab_size", int, len(tokens))
    if vocab_size != len(tokens):
        raise ModelError(f"metadata llama.vocab_size must be the number of tokenizer.ggml.tokens, {len(tokens)}, "
                         f"got {vocab_size}")
    return vocab_size


def _rope_from(metadata, head_dim):
    """RopeParams from GGUF metadata."""
    key = "llama.rope."
    rotary_dim = field(metadata, key + "dimension_count", int, head_dim)
    if not 2 <= rotary_dim <= head_dim:
        raise ModelError(f"metadata {key}dimension_count must be from 2 to the {head_dim} of a head, got {rotary_dim}")
    scaling = field(metadata, key + "scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise ModelError(f"metadata {key}scaling.type must be none or linear, got {scaling}")
    base = field(metadata, key + "freq_base", float, 10000.0)
    factor = field(metadata, key + "scaling.factor", float, 1.0)
    try:
        return RopeParams(rotary_dim=rotary_dim, base=base, style="interleaved", scaling=scaling, factor=factor)
    except ValueError as error:
        raise ModelError(f"metadata {key}dimension_count, freq_base and scaling.factor: {error}") from None


def config_from_hugging_face(config):
    """LlamaConfig from the config.json of a Hugging Face model.

    Parameters
    ----------
    config : dict

    Raises
    ------
    ModelError
        Another model_type than llama, mistral or qwen2, a key that is missing or holds what no model can have, or a
        RoPE scaling that is not known.

    Notes
    -----
    Where attention has a sliding window the context ends with it: up to there it is no different.
    """
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ModelError(f"config.json: model_type must be one of {', '.join(_MODEL_TYPES)}, got {kind!r}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"config.json: hidden_act must be silu, got {config['hidden_act']!r}")

    def size(name, default=None):
        value = config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise ModelError(f"config.json: {name} must be an integer from 1 to {2**31 - 1}, got {value!r}")
        return value

    heads, hidden, context = size("num_attention_heads"), size("hidden_size"), size("max_position_embeddings")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"config.json: num_key_value_heads must divide the {heads} heads, got {kv_heads}")
    head_dim = size("head_dim", hidden // heads)
    if head_dim not in range(8, 257, 8):
        raise ModelError("config.json: head_dim (without it hidden_size / num_attention_heads) must be a multiple of 8 "
                         f"from 8 to 256, got {head_dim}")
    if kind == "mistral" or config.get("use_sliding_window"):
        context = min(context, size("sliding_window", context))
    eps = config.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, int | float) or not (math.isfinite(eps) and eps >= 0):
        raise ModelError(f"config.json: rms_norm_eps must be finite and at least 0, got {eps!r}")
    try:
        rope = RopeParams.from_hf_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"config.json: {error}") from None
    return LlamaConfig(
        num_layers=size("num_hidden_layers"), hidden_size=hidden, intermediate_size=size("intermediate_size"),
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, vocab_size=size("vocab_size"),
        context_length=context, rms_eps=float(eps), rope=rope)
