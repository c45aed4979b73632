# SPDX-License-Identifier: Apache-2.0
"""AttentionParams as TurboMind's C struct."""

import math

import numpy as np

from ..runtime.arrays import strides
from ..runtime.structs import address, layout

_TYPES = {"none": 1, "linear": 2, "dynamic": 3, "yarn": 4, "llama3": 5, "ntk": 1}
_NO_WINDOW = 1 << 28
_CONTIGUOUS = ("out", "q_bias", "k_bias", "v_bias", "cu_q_len", "cu_k_len", "finished", "split_cnt", "partial_O",
               "partial_ML")
_NUMBERS = ("token_num", "batch_size", "max_q_len", "max_k_len", "num_heads", "num_kv_heads", "size_per_head",
            "max_split_k", "cp_rank")


def pod(params):
    """See ``AttentionParams.to_pod``."""
    record = np.zeros(1, layout("TurboMindAttentionParams").dtype)
    one = record[0]
    for name in ("q", "k", "v", *_CONTIGUOUS):
        array = getattr(params, name)
        if name in _CONTIGUOUS and array is not None and not array.flags.c_contiguous:
            raise _absent(name, "contiguous", f"strides {array.strides}")
        one[name] = 0 if array is None else address(array)
    for name in _NUMBERS:
        one[name] = getattr(params, name)
    one["stride"] = _stride(params)
    one["inv_sqrt_dh"] = params.softmax_scale * math.log2(math.e)
    one["window_size"] = params.window_size or _NO_WINDOW
    one["use_logn_attn"] = params.use_logn_attn
    one["max_position_embeddings"] = params.max_position_embeddings or 0
    if params.quant_policy.is_fp8:
        raise _absent("quant_policy", "0, 4 or 8", params.quant_policy)
    one["quant_policy"] = int(params.quant_policy)
    for name in ("sinks", "rope_positions"):
        if getattr(params, name) is not None:
            raise _absent(name, "None", "an array")
    if not params.causal:
        raise _absent("causal", "True", False)
    if params.invariant:
        raise _absent("invariant", "False", True)
    if params.cp_offsets is not None:
        raise _absent("cp_offsets", "None, tokens dealt out in turn", "contiguous shards")
    one["cp_size"] = fast_divmod(params.cp_size)
    one["arch"] = 0 if params.xp is np else int(params.xp.cuda.Device().compute_capability)
    one["stream"] = 0 if params.stream is None else params.stream.ptr
    _fill_iterators(one, params)
    if params.rope_param is not None:
        _fill_rope(one, params)
    return record


def _absent(name, rule, found):
    return NotImplementedError(f"to_pod: {name} must be {rule}, as only that is filled in, got {found!r}")


def _stride(params):
    found = {strides(array)[0] for array in (params.q, params.k, params.v) if array is not None}
    if len(found) != 1:
        raise _absent("q, k and v", "slices of one array", f"strides {sorted(found)}")
    heads = {strides(array)[1] for array in (params.q, params.k, params.v) if array is not None and array.shape[1] > 1}
    if heads - {params.size_per_head}:
        raise _absent("q, k and v", "contiguous within a token", f"strides {sorted(heads)} between heads")
    return found.pop()


def fast_divmod(divisor):
    """(divisor, multiplier, shift) with ``x // divisor == (x * multiplier >> 32) >> shift`` for 0 ≤ x < 2^31."""
    if divisor == 1:
        return 1, 0, 0
    shift = (divisor - 1).bit_length() - 1
    return divisor, -(-(1 << 32 + shift) // divisor), shift


def _fill_iterators(one, params):
    linear, blocks = params.linear_iter_params, params.block_iter_params
    if linear is not None:
        one["linear_iter_params"] = address(linear.kv_cache), linear.stride_h, linear.key_to_val
    if blocks is not None:
        if blocks.offset is not None:
            raise _absent("block_iter_params.offset", "None, a layer_id", blocks.offset)
        one["block_iter_params"] = (address(blocks.block_ptrs), address(blocks.cu_block_nums), blocks.layer_id,
                                    blocks.block_len)


def _fill_rope(record, params):
    one, rope, bases = record["rope_param"], params.rope_param, params.step.rope_bases
    if rope.scaling not in _TYPES:
        raise _absent("rope_param.scaling", " or ".join(_TYPES), rope.scaling)
    if rope.style != "interleaved":
        raise _absent("rope_param.style", "'interleaved'", rope.style)
    if rope.mrope_section is not None:
        raise _absent("rope_param.mrope_section", "None", rope.mrope_section)
    if bases is not None and rope.scaling in ("linear", "yarn", "llama3"):
        raise _absent("rope_theta", f"None with scaling {rope.scaling!r}", "an array")
    base = float(rope.bases())   # of NTK alpha, too
    # only type 3 reads bases: with a factor of 1 they are all it takes
    one["type"] = _TYPES[rope.scaling] if bases is None else _TYPES["dynamic"]
    one["dim"] = rope.rotary_dim
    one["base"] = 0 if bases is None else address(bases)
    record["rope_theta"] = 0 if params.rope_theta is None else one["base"]
    one["scale_factor"] = scale = -math.log2(base) / rope.rotary_dim
    one["inv_factor"] = 1.0 / rope.factor if rope.scaling in ("linear", "yarn", "llama3") else 1.0
    if rope.scaling == "yarn":
        low, high = rope.yarn_range()
        one["yarn"] = scale, rope.table_factor(), 0.5 / (high - low), low / (high - low)
    if rope.scaling == "llama3":
        width = rope.high_freq_factor - rope.low_freq_factor
        one["llama3"] = scale, rope.original_max_position / (2 * math.pi) / width, rope.low_freq_factor / width
