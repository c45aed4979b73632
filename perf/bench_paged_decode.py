# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import decode, normal
from timing import DEVICE

import cupyattn
from cupyattn.reference.paged_decode import paged_decode as reference

PAGE_SIZE = 16


def gather_and_matmul(q, k_cache, v_cache, block_table, cache_seqlens, out):
    """The same by the array library alone, float32: per sequence gather pages, matmul, softmax, matmul."""
    xp = DEVICE.xp if DEVICE.is_gpu else np
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    length = block_table.shape[1] * PAGE_SIZE   # every sequence is full, so no length is read
    result = xp.empty(q.shape, np.float32)
    for b in range(batch):
        k, v = (cache[block_table[b]].reshape(length, num_kv_heads, head_dim).astype(np.float32)
                for cache in (k_cache, v_cache))
        rows = q[b].astype(np.float32).reshape(num_kv_heads, num_heads // num_kv_heads, head_dim)
        scores = xp.matmul(rows, k.transpose(1, 2, 0)) * np.float32(head_dim**-0.5)
        scores = xp.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        result[b] = xp.matmul(scores, v.transpose(1, 0, 2)).reshape(num_heads, head_dim)
    return result


@pytest.mark.parametrize("model, batch, context, dtype", decode(), ids=str)
def bench_paged_decode(bench, model, batch, context, dtype):
    """One decode step over full pages of 16 tokens in random order."""
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    pages = context // PAGE_SIZE

    def make(rng):
        cache = [normal(rng, (batch * pages, PAGE_SIZE, kv_heads, head_dim), dtype) for _ in "kv"]
        q = normal(rng, (batch, heads, head_dim), dtype)
        table = rng.permutation(batch * pages).reshape(batch, pages).astype(np.int32)
        return q, *cache, table, np.full(batch, context, np.int32), np.empty_like(q)

    def call(q, k_cache, v_cache, block_table, cache_seqlens, out):
        return cupyattn.paged_decode(q, k_cache, v_cache, block_table=block_table, cache_seqlens=cache_seqlens,
                                     out=out)

    def expected(q, k_cache, v_cache, block_table, cache_seqlens, out):
        return reference(q, k_cache, v_cache, block_table=block_table, cache_seqlens=cache_seqlens)

    item = 4 if dtype == "float32" else 2
    bench(f"{model} batch {batch} context {context} {dtype}", make, call, expected,
          tolerance={"float16": (1e-3, 2.0**-11), "bfloat16": (4e-3, 2.0**-8), "float32": (2e-6, 0)}[dtype],
          nbytes=batch * (2 * context * kv_heads + 2 * heads) * head_dim * item,
          flops=4 * batch * context * heads * head_dim, baseline=gather_and_matmul)
