# SPDX-License-Identifier: Apache-2.0
"""Writes folders of Hugging Face models: weights in checkpoint formats, and what they stand for.

The packers here go by the formats' definitions and share nothing with the package.
"""

import json

import ml_dtypes
import numpy as np
import safetensors.numpy

NAMES = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
PARTS = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
NF4 = np.float32([-1, -.6961928009986877, -.5250730514526367, -.39491748809814453, -.28444138169288635,
                  -.18477343022823334, -.09105003625154495, 0, .07958029955625534, .16093020141124725,
                  .24611230194568634, .33791524171829224, .44070982933044434, .5626170039176941, .7229568362236023, 1])
E2M1 = np.float32([0, .5, 1, 1.5, 2, 3, 4, 6])


def hugging_face_name(name):
    """Of a weight with GGUF name ``blk.3.attn_q`` and the like."""
    block, _, part = name.rpartition(".")
    return f"model.layers.{block[4:]}.{PARTS[part]}" if block else NAMES[name]


def to_halves(w, heads):
    """Rows of q or k from GGUF's order, pairs side by side, to Hugging Face's, halves of a head."""
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def words(codes, bits):
    """Codes [.., n], 32 / bits of them in each word, the first lowest: int32."""
    each = 32 // bits
    fields = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, each)
    return np.bitwise_or.reduce(fields << np.uint32(bits) * np.arange(each, dtype=np.uint32), axis=-1).view(np.int32)


def integers(w, group, symmetric):
    """(codes [N, K] of 4 bits, zero points and float16 scales [N, groups], the weight they stand for)."""
    g = w.reshape(len(w), -1, group)
    low, high = np.minimum(g.min(-1), 0), np.maximum(g.max(-1), 0)
    if symmetric:
        scale, zero = (np.maximum(-low, high) / 7).astype(np.float16), np.full(low.shape, 8)
    else:
        scale = ((high - low) / 15).astype(np.float16)
        zero = np.clip(np.rint(-low / scale.astype(np.float64)), 1, 15).astype(int)
    codes = np.clip(np.rint(g / scale[..., None].astype(np.float64)) + zero[..., None], 0, 15)
    weight = (codes - zero[..., None]) * scale[..., None].astype(np.float64)
    return codes.reshape(w.shape).astype(np.uint8), zero, scale, weight.reshape(w.shape)


def dense(w, rng):
    stored = w.astype(ml_dtypes.bfloat16)
    return {"weight": stored}, stored.astype(np.float64)


def float32(w, rng):
    return {"weight": w.astype(np.float32)}, w.astype(np.float32).astype(np.float64)


def gptq(w, rng, group=64):
    """Symmetric, in act-order: which columns share a scale is drawn."""
    order = rng.permutation(w.shape[1])
    codes, zero, scale, weight = integers(w[:, order], group, symmetric=True)
    back = np.argsort(order)
    tensors = {"qweight": words(codes[:, back], 4).T, "qzeros": words(zero.T - 1, 4), "scales": scale.T,
               "g_idx": (back // group).astype(np.int32), "bias": np.zeros(len(w), np.float16)}
    return tensors, weight[:, back]


def awq(w, rng, group=64):
    codes, zero, scale, weight = integers(w, group, symmetric=False)
    mixed = lambda a: words(a.T.reshape(-1, len(w) // 8, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(a.T), -1), 4)  # noqa: E731,E501
    return {"qweight": mixed(codes), "qzeros": mixed(zero), "scales": scale.T}, weight


def compressed_tensors(w, rng, group=64):
    codes, _, scale, weight = integers(w, group, symmetric=True)
    return {"weight_packed": words(codes, 4), "weight_scale": scale, "weight_shape": np.array(w.shape)}, weight


def fp8(w, rng):
    scale = (np.abs(w).max(axis=1, keepdims=True) / 448).astype(np.float32)
    stored = (w / scale).astype(ml_dtypes.float8_e4m3fn)
    return ({"weight": stored, "weight_scale": scale, "input_scale": np.float32([0.5])},
            stored.astype(np.float64) * scale)


def bitsandbytes(w, rng, block=64):
    g = w.reshape(-1, block)
    scale = np.abs(g).max(axis=1).astype(np.float32)
    codes = np.abs(g[..., None] / scale[:, None, None] - NF4).argmin(-1).reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": w.shape}
    return ({"weight": (codes[:, 0] << 4 | codes[:, 1]).astype(np.uint8)[:, None], "weight.absmax": scale,
             "weight.quant_map": NF4,
             "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8)},
            (NF4[codes].reshape(-1, block) * scale[:, None].astype(np.float64)).reshape(w.shape))


def e2m1(g):
    """Nearest codes."""
    return np.abs(np.abs(g)[..., None] - E2M1).argmin(-1) | (g < 0) << 3


def mxfp4(w, rng):
    g = w.reshape(len(w), -1, 32)
    exponent = np.floor(np.log2(np.abs(g).max(-1))).astype(int) - 2
    codes = e2m1(g / 2.0 ** exponent[..., None])
    weight = np.where(codes & 8, -1, 1) * E2M1[codes & 7] * 2.0 ** exponent[..., None]
    codes = codes.reshape(len(w), -1, 2)
    return ({"weight_packed": (codes[..., 0] | codes[..., 1] << 4).astype(np.uint8),
             "weight_scale": (exponent + 127).astype(np.uint8)}, weight.reshape(w.shape))


def nvfp4(w, rng):
    g = w.reshape(len(w), -1, 16)
    above = np.float32(np.abs(w).max() / (6 * 448))
    scale = (np.abs(g).max(-1) / 6 / above).astype(ml_dtypes.float8_e4m3fn)
    wide = scale.astype(np.float64)[..., None] * above
    codes = e2m1(g / wide)
    weight = np.where(codes & 8, -1, 1) * E2M1[codes & 7] * wide
    codes = codes.reshape(len(w), -1, 2)
    return ({"weight": (codes[..., 0] | codes[..., 1] << 4).astype(np.uint8), "weight_scale": scale,
             "weight_scale_2": above.reshape(())}, weight.reshape(w.shape))


def hqq(w, rng, group=64):
    codes, zero, scale, weight = integers(w, group, symmetric=False)
    half = codes.reshape(2, -1, group)
    return ({"W_q": half[0] << 4 | half[1], "scale": scale.reshape(-1, 1),
             "zero": zero.astype(np.float16).reshape(-1, 1)}, weight)


def exl2(w, rng):
    """The first half of the columns, drawn, in groups of 32 and 5 bits, the others in 4 bits."""
    order = rng.permutation(w.shape[1])
    count = w.shape[1] // 32
    bits = np.where(np.arange(count) < count // 2, 5, 4)
    g = w[:, order].reshape(len(w), count, 32)
    largest = np.abs(g).max(-1) / (2.0 ** (bits - 1) - 1)
    top = (largest.max(axis=0)).astype(np.float16)
    code = np.clip(np.ceil(np.sqrt(largest / top.astype(np.float64) * 256)) - 1, 0, 15).astype(int)
    scale = ((code + 1) ** 2).astype(np.float16) * (top * np.float16(1 / 256))
    half = (1 << bits - 1)[None, :, None]
    codes = np.clip(np.rint(g / scale[..., None].astype(np.float64)) + half, 0, 2 * half - 1).astype(int)
    stream, starts = [], []
    for i, b in enumerate(bits.tolist()):
        starts += [b, len(stream)]
        number = [sum(int(c) << b * e for e, c in enumerate(row)) for row in codes[:, i]]
        stream += [[value >> 32 * j & 0xFFFFFFFF for value in number] for j in range(b)]
    back = np.argsort(order)
    weight = ((codes - half) * scale[..., None].astype(np.float64)).reshape(w.shape)
    return ({"q_weight": np.array(stream, np.uint32).view(np.int32), "q_groups": np.array(starts, np.int16),
             "q_scale": words(code.T, 4), "q_scale_max": top, "q_invperm": back.astype(np.int32)}, weight[:, back])


CONFIGS = {
    gptq: {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": True},
    awq: {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    compressed_tensors: {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
                         "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 64}}}},
    hqq: {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}}},
}


def write_folder(folder, config, weights, form=dense, *, embedding=dense, biases=None, shards=2, seed=0):
    """A model's folder without a tokenizer.

    Parameters
    ----------
    folder : Path
    config : dict
        config.json but for its quantization_config.
    weights : dict of str to ndarray
        By GGUF's names without ``.weight``; rows of q and k in Hugging Face's order.
    form, embedding : callable
        Formats of the layers, and of the embedding, head and norms.
    biases : dict of str to ndarray, optional
        By the names of their weights.
    shards : int
    seed : int

    Returns
    -------
    dict of str to ndarray
        What the weights of the folder stand for, float64, by the same names.
    """
    rng, tensors, stands_for = np.random.default_rng(seed), {}, {}
    for name, w in weights.items():
        layer = w.ndim == 2 and name.startswith("blk.")
        found, stands_for[name] = (form if layer else embedding)(w, rng)
        tensors |= {f"{hugging_face_name(name)}.{tensor}": array for tensor, array in found.items()}
    for name, bias in (biases or {}).items():
        tensors[f"{hugging_face_name(name)}.bias"] = bias
    if form in CONFIGS:
        config = config | {"quantization_config": CONFIGS[form]}
    (folder / "config.json").write_text(json.dumps(config))
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(places.values())):
        safetensors.numpy.save_file({name: np.array(tensors[name], order="C")
                                     for name in tensors if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return stands_for


def write_tokenizer(folder, metadata):
    """The tokenizer of a GGUF file as tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [int(metadata["tokenizer.ggml.eos_token_id"])]}))
