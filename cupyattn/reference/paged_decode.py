# SPDX-License-Identifier: Apache-2.0
"""The meaning of `cupyattn.paged_decode` in plain NumPy, float64 inside."""

import numpy as np


def paged_decode(q, k_cache, v_cache, /, *, block_table, cache_seqlens, cache_starts=None, softmax_scale=None,
                 window_size=0, softcap=0.0, sinks=None, return_lse=False):
    """Attention of the newest tokens of each sequence over its paged cache; the arguments of the op, float64 out."""
    single = q.ndim == 3
    q = np.asarray(q[:, None] if single else q, np.float64)  # [batch, q_len, heads, head_dim]
    batch, q_len, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    scale = head_dim ** -0.5 if softmax_scale is None else softmax_scale
    out = np.zeros(q.shape)
    lse = np.full(q.shape[:3], -np.inf)
    for b in range(batch):
        length = int(cache_seqlens[b])
        start = 0 if cache_starts is None else int(cache_starts[b])
        for i in range(q_len):
            position = length - q_len + i
            first = max(start, 0, position - window_size + 1 if window_size else 0)
            tokens = np.arange(first, position + 1)
            tokens = tokens[tokens < block_table.shape[1] * page_size]
            pages = np.asarray(block_table[b])[tokens // page_size]
            known = (pages >= 0) & (pages < num_pages)
            pages, slots = pages[known], (tokens % page_size)[known]
            if len(pages) == 0:
                continue
            keys = k_cache[pages, slots].astype(np.float64)  # [tokens, kv_heads, head_dim]
            values = v_cache[pages, slots].astype(np.float64)
            for h in range(num_heads):
                g = h // (num_heads // num_kv_heads)
                scores = keys[:, g] @ q[b, i, h] * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                top = scores.max()
                weights = np.exp(scores - top)
                lse[b, i, h] = top + np.log(weights.sum())
                sink = 0.0 if sinks is None else np.exp(np.float64(sinks[h]) - top)
                out[b, i, h] = weights @ values[:, g] / (weights.sum() + sink)
    if single:
        out, lse = out[:, 0], lse[:, 0]
    return (out, lse) if return_lse else out
