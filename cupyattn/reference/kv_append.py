# SPDX-License-Identifier: Apache-2.0
import numpy as np

from ..kv.quantized import QuantizedKV
from .kv_codec import quantize
from .rope import rope


def _place(token, num_pages, page_size, slots, block_table, positions, batch_indices, readonly_tokens, key_stride,
           key_offset):
    """(page, slot) of a token, None for nowhere."""
    if slots is not None:
        page, slot = divmod(int(slots[token]), page_size)
    else:
        position = int(positions[token])
        sequence = token if batch_indices is None else int(batch_indices[token])
        if position < 0 or position % key_stride != key_offset or not 0 <= sequence < len(block_table):
            return None
        if readonly_tokens is not None and position < readonly_tokens[sequence]:
            return None
        column, slot = divmod(position // key_stride, page_size)
        if column >= block_table.shape[1]:
            return None
        page = int(block_table[sequence, column])
    return (page, slot) if 0 <= page < num_pages else None


def _finish(x, bias, gain, eps, is_rms, cos, sin, rows, style, rotary_dim):
    """Bias, norm and RoPE of x [tokens, heads, dims] in float64."""
    y = x.astype(np.float64)
    if bias is not None:
        y = y + bias.astype(np.float64)
    if gain is not None:
        y = y if is_rms else y - y.mean(-1, keepdims=True)
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + eps) * gain.astype(np.float64)
    if cos is not None:
        y = rope(y, cos=cos, sin=sin, positions=rows, style=style, rotary_dim=rotary_dim)
    return y


def _store(cache, place, rows):
    """Write rows [heads, dims] to (page, slot) of an array or a QuantizedKV."""
    if not isinstance(cache, QuantizedKV):
        cache[place] = rows.astype(cache.dtype)
        return
    by_token = cache.granularity in ("token", "group")
    codes, scale, zero = quantize(rows, cache.format, scale=None if by_token else cache.scale,
                                  scale_dtype=cache.scale.dtype)
    cache.codes[place] = codes.view(cache.codes.dtype)
    if by_token:
        cache.scale[place] = scale
    if zero is not None:
        cache.zero[place] = zero


def kv_append(k, v, k_cache, v_cache, /, *, slots=None, block_table=None, positions=None, batch_indices=None, q=None,
              cos=None, sin=None, rope_rows=None, style="neox", rotary_dim=None, q_bias=None, k_bias=None, v_bias=None,
              q_norm=None, k_norm=None, norm_eps=1e-6, norm_is_rms=True, q_len=None, rope_base=0,
              logn_max_position=None, key_stride=1, key_offset=0, readonly_tokens=None):
    """Write k, v [tokens, num_kv_heads, head_dim] into caches, arrays or QuantizedKV; returns finished queries.

    Queries are float64 [tokens, num_heads, head_dim]. Keys and values are rounded to their own dtype, then the cache's.
    """
    tokens = len(q if k is None else k)
    if q_len is not None:
        steps, entries = np.arange(tokens) % q_len, np.arange(tokens) // q_len
        if rope_rows is not None or positions is None:
            first = np.zeros(tokens // q_len, np.int64) if rope_rows is None else rope_rows.astype(np.int64)
            first = np.maximum(first, 0) if rope_base < 0 else first + rope_base
            rope_rows = np.maximum(first[entries] + steps, 0)
        if positions is not None:
            positions = np.where(positions[entries] < 0, -1, positions[entries] + steps)
            batch_indices = entries
    rows = rope_rows if rope_rows is not None else positions if positions is not None else np.zeros(tokens, np.int32)
    if positions is not None:
        rows = np.where(positions < 0, -1, rows)
    turn = (cos, sin, rows, style, rotary_dim)
    if k is not None:
        keys = _finish(k, k_bias, k_norm, norm_eps, norm_is_rms, *turn).astype(k.dtype)
        values = _finish(v, v_bias, None, norm_eps, True, None, None, None, None, None).astype(v.dtype)
        for token in range(tokens):
            place = _place(token, *k_cache.shape[:2], slots, block_table, positions, batch_indices, readonly_tokens,
                           key_stride, key_offset)
            if place is not None and 0 <= rows[token] and (cos is None or rows[token] < len(cos)):
                _store(k_cache, place, keys[token])
                _store(v_cache, place, values[token])
    if q is None:
        return None
    queries = _finish(q, q_bias, q_norm, norm_eps, norm_is_rms, *turn)
    if logn_max_position is not None:
        late = positions > logn_max_position
        queries[late] *= (np.log(positions[late]) / np.log(logn_max_position))[:, None, None]
    queries[np.asarray(rows) < 0] = 0.0
    return queries
