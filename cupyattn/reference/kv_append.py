# SPDX-License-Identifier: Apache-2.0


def kv_append(k, v, k_cache, v_cache, /, *, slots=None, block_table=None, positions=None, batch_indices=None):
    """Write k, v [tokens, num_kv_heads, head_dim] into caches [num_pages, page_size, ...], one token at a time."""
    num_pages, page_size = k_cache.shape[:2]
    for token in range(len(k)):
        if slots is not None:
            page, slot = divmod(int(slots[token]), page_size)
        else:
            position = int(positions[token])
            sequence = token if batch_indices is None else int(batch_indices[token])
            if position < 0 or not 0 <= sequence < len(block_table) or position // page_size >= block_table.shape[1]:
                continue
            page, slot = int(block_table[sequence, position // page_size]), position % page_size
        if 0 <= page < num_pages:
            k_cache[page, slot] = k[token].astype(k_cache.dtype)
            v_cache[page, slot] = v[token].astype(v_cache.dtype)
