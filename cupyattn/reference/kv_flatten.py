# SPDX-License-Identifier: Apache-2.0
import numpy as np


def kv_flatten(k_cache, v_cache, /, *, block_table, cu_seqlens_k, cache_seqlens=None):
    """Keys and values [tokens, num_kv_heads, head_dim], float64; NaN where there is no token, 0 where there is no page.

    Caches are arrays of numbers [pages, page_size, ...] (`QuantizedKV.dequantize` makes them); block_table holds page
    ids [batch, max_pages].
    """
    outs = []
    for cache in (k_cache, v_cache):
        pages, page_size = cache.shape[:2]
        out = np.full((cu_seqlens_k[-1], *cache.shape[2:]), np.nan)
        for b, row in enumerate(cu_seqlens_k[:-1]):
            rows = cu_seqlens_k[b + 1] - row
            for t in range(rows if cache_seqlens is None else min(rows, cache_seqlens[b])):
                column, slot = divmod(t, page_size)
                page = block_table[b][column] if column < len(block_table[b]) else -1
                out[row + t] = cache[page, slot].astype(np.float64) if 0 <= page < pages else 0
        outs.append(out)
    return tuple(outs)
