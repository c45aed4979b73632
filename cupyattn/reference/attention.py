# SPDX-License-Identifier: Apache-2.0
"""The meaning of `cupyattn.attention` in plain NumPy, float64 inside."""

import numpy as np

from ..kv.quantized import QuantizedKV


def attention(q, k, v, /, *, cu_seqlens_q, cu_seqlens_k=None, cache_seqlens=None, block_table=None, cache_starts=None,
              causal=True, softmax_scale=None, window_size=0, softcap=0.0, sinks=None, mask=None, tree_mask=None,
              alibi_slopes=None, finished=None, cp_rank=0, cp_size=1, key_offsets=None, key_counts=None,
              return_lse=False):
    """Attention of ragged sequences; the arguments of the op with a dense `block_table`, float64 out."""
    k, v = (x.dequantize("float64") if isinstance(x, QuantizedKV) else np.asarray(x, np.float64) for x in (k, v))
    q = np.asarray(q, np.float64)
    tokens, num_heads, head_dim = q.shape
    group = num_heads // k.shape[-2]
    scale = head_dim ** -0.5 if softmax_scale is None else softmax_scale
    sinks = np.full(num_heads, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    slopes = np.zeros(num_heads) if alibi_slopes is None else np.asarray(alibi_slopes, np.float64)
    out = np.zeros((tokens, num_heads, v.shape[-1]))
    lse = np.full((tokens, num_heads), -np.inf)
    batch = len(cu_seqlens_q) - 1
    if mask is not None:
        queries = mask.shape[-2] if mask.ndim > 1 and mask.shape[-2] > 1 else max(tokens, 1)
        mask = np.broadcast_to(mask, (batch, num_heads, queries, mask.shape[-1]))
    for b in range(batch):
        if finished is not None and finished[b]:
            continue
        rows = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        q_len = rows.stop - rows.start
        seqlen = int(cache_seqlens[b]) if cu_seqlens_k is None else int(cu_seqlens_k[b + 1]) - int(cu_seqlens_k[b])
        step, offset = (cp_size, cp_rank) if key_offsets is None else (1, int(key_offsets[b]))
        positions = np.arange(offset, seqlen, step)            # of the local keys
        if key_counts is not None:
            positions = positions[:int(key_counts[b])]
        local = np.arange(len(positions))
        if cu_seqlens_k is None:
            keys, values, known = _gather(k, v, block_table[b], local)
        else:
            keys, values, known = k[int(cu_seqlens_k[b]) + local], v[int(cu_seqlens_k[b]) + local], local >= 0
        n = seqlen - q_len + np.arange(q_len)[:, None]         # positions of the queries
        visible = np.broadcast_to(known, (q_len, len(local))).copy()
        if cache_starts is not None:
            visible &= positions >= cache_starts[b]
        if causal and tree_mask is None:
            visible &= positions <= n
        if window_size:
            visible &= (positions > n - window_size) & (positions < n + window_size)
        if tree_mask is not None:
            visible &= _tree_bits(tree_mask[rows], positions - (seqlen - q_len))
        for h in range(num_heads):
            see, bias = visible, -slopes[h] * np.abs(n - positions)
            if mask is not None:
                see, bias = _masked(mask[b, h, :q_len], positions, see, bias)
            out[rows, h], lse[rows, h] = _attend(q[rows, h], keys[:, h // group], values[:, h // group], see, bias,
                                                 scale, softcap, sinks[h])
    return (out, lse) if return_lse else out


def _attend(q, k, v, visible, bias, scale, softcap, sink):
    """Outputs [q_len, head_dim_v] and lse [q_len] of one head."""
    shown = visible.any(axis=0)   # what nobody sees may be anything
    k, v = np.where(shown[:, None], k, 0), np.where(shown[:, None], v, 0)
    scores = q @ k.T * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(visible, scores + np.where(visible, bias, 0), -np.inf)
    top = scores.max(axis=1, initial=-np.inf, keepdims=True)
    top = np.where(top == -np.inf, 0, top)
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, top + np.log(total), -np.inf)
    share = total + np.exp(sink - top)
    return np.where(total > 0, weights @ v / np.where(total > 0, share, 1), 0), lse[:, 0]


def _gather(k, v, block_table, tokens):
    """Keys and values of `tokens` of a sequence, and which of them are in a page."""
    num_pages, page_size = k.shape[:2]
    columns = tokens // page_size
    pages = np.append(block_table, -1)[np.minimum(columns, len(block_table))]
    known = (pages >= 0) & (pages < num_pages)
    at = np.where(known, pages, 0), tokens % page_size
    return k[at], v[at], known


def _tree_bits(words, new):
    """[q_len, keys]: new token `new` (history below 0) is visible by its bit of `words` [q_len, words], if any."""
    bits = np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), axis=1, bitorder="little")
    bits = np.pad(bits, ((0, 0), (0, 1)))
    return (new < 0) | bits[:, np.clip(new, 0, bits.shape[1] - 1)].astype(bool)


def _masked(mask, positions, visible, bias):
    """`visible` and `bias` with the user's mask [queries, keys] on top; past its end they are as they were."""
    mask = np.pad(mask, ((0, len(visible) - len(mask)), (0, 0)), constant_values=mask.dtype == bool)
    inside = positions < mask.shape[1]
    rows = mask[:, np.minimum(positions, mask.shape[1] - 1)]
    if mask.dtype == bool:
        return visible & (rows | ~inside), bias
    added = np.where(inside, rows.astype(np.float64), 0)
    return visible & (added > -np.inf), bias + added
