# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import decode, normal
from timing import DEVICE

import cupyattn
from cupyattn.kv.quantized import FORMATS
from cupyattn.reference import kv_codec
from cupyattn.reference.paged_decode import paged_decode as reference


def gather_and_matmul(q, k_cache, v_cache, block_table, cache_seqlens, out):
    """The same by the array library alone, float32: per sequence gather pages, matmul, softmax, matmul."""
    xp = DEVICE.xp if DEVICE.is_gpu else np
    batch, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    length = block_table.shape[1] * page_size   # every sequence is full, so no length is read
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


def first_and_last(q, k_cache, v_cache, block_table, cache_seqlens, out):
    """float64 truth of two sequences: of all of them it would take longer than the bench."""
    result = []
    for b in (0, -1):
        caches = []
        for cache in (k_cache, v_cache):
            if isinstance(cache, cupyattn.QuantizedKV):
                parts = [part if part is None or part.shape[:1] != cache.shape[:1] else part[block_table[b]]
                         for part in (cache.codes, cache.scale, cache.zero)]
                caches.append(kv_codec.dequantize(*parts, format=cache.format))
            else:
                caches.append(cache[block_table[b]])
        result.append(reference(q[b:][:1], *caches, block_table=np.arange(len(block_table[b]))[None],
                                cache_seqlens=cache_seqlens[:1]))
    return np.concatenate(result)


def random_cache(rng, shape, format):
    """An array or a QuantizedKV of `shape`; of the latter some pages repeat, for quantising takes its time."""
    if format not in FORMATS:
        return normal(rng, shape, format)
    scale = np.ones(1, np.float32) if format.startswith("fp8") else None
    parts = kv_codec.quantize(normal(rng, (min(64, shape[0]), *shape[1:]), "float32"), format, scale=scale)
    return cupyattn.QuantizedKV(*(part if part is None or part is scale else
                                  np.resize(part, (shape[0], *part.shape[1:])) for part in parts), format=format)


def token_bytes(kv_heads, head_dim, format):
    """Bytes of a token's keys and values in all heads, with their scales."""
    if format not in FORMATS:
        return 2 * kv_heads * head_dim * (4 if format == "float32" else 2)
    one, two = (cupyattn.QuantizedKV.empty(pages, 1, kv_heads, head_dim, format=format).nbytes for pages in (1, 2))
    return 2 * (two - one)


@pytest.mark.parametrize("model, batch, context, page_size, dtype, kv", decode(), ids=str)
def bench_paged_decode(bench, model, batch, context, page_size, dtype, kv):
    """One decode step over full pages in random order, its schedule made beforehand."""
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    pages = context // page_size
    schedules = []

    def make(rng):
        cache = [random_cache(rng, (batch * pages, page_size, kv_heads, head_dim), kv) for _ in "kv"]
        q = normal(rng, (batch, heads, head_dim), dtype)
        table = rng.permutation(batch * pages).reshape(batch, pages).astype(np.int32)
        return q, *cache, table, np.full(batch, context, np.int32), np.empty_like(q)

    def call(q, k_cache, v_cache, block_table, cache_seqlens, out):
        if not schedules:   # made once per step, for all layers
            schedules.append(cupyattn.schedule(
                np.full(batch, context, np.int32), num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
                dtype=dtype, kv_format=kv, xp=DEVICE.xp))
        return cupyattn.paged_decode(q, k_cache, v_cache, block_table=block_table, cache_seqlens=cache_seqlens,
                                     schedule=schedules[0], out=out)

    item = 4 if dtype == "float32" else 2
    small = batch * context * kv_heads <= 2**20   # the array library's version takes seconds otherwise
    bench(f"{model} {heads}/{kv_heads} batch {batch} context {context} page {page_size} {dtype} kv {kv}", make, call,
          first_and_last,
          tolerance={"float16": (1e-3, 2.0**-10), "bfloat16": (4e-3, 2.0**-8), "float32": (2e-6, 0)}[dtype],
          nbytes=batch * (context * token_bytes(kv_heads, head_dim, kv) + 2 * heads * head_dim * item),
          flops=4 * batch * context * heads * head_dim,
          baseline=gather_and_matmul if kv not in FORMATS and small else None, checked=lambda out: out[[0, -1]])
