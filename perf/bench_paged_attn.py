# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import MODELS, normal
from timing import DEVICE

import cupyattn
from cupyattn.reference.paged_decode import paged_decode as reference

PAGE_SIZE = 16


def steps():
    """(model, rows of a prompt's chunk, tokens of the prompt, sequences that decode, tokens of each, dtype)."""
    if DEVICE.is_gpu:
        return [("llama3-8b", *sizes, "bfloat16") for sizes in ((2048, 8192, 0, 0), (0, 0, 64, 4096),
                                                                (512, 8192, 64, 4096))]
    return [(model, *sizes, dtype) for model in ("smollm2-135m", "llama3-8b") for dtype in ("float16", "float32")
            for sizes in ((128, 1024, 0, 0), (0, 0, 4, 2048), (64, 512, 4, 1024))]


def attended(xp, q, k, v, first):
    """Of rows [n, heads, head_dim] at positions `first` and on over one sequence, by the array library, float32."""
    k, v = (a.astype(np.float32).transpose(1, 0, 2) for a in (k, v))
    rows, group = q.astype(np.float32).transpose(1, 0, 2), q.shape[1] // len(k)
    hidden = xp.arange(k.shape[1]) > first + xp.arange(len(q))[:, None]
    result = xp.empty(q.shape, np.float32)
    for head in range(len(rows)):
        scores = xp.matmul(rows[head], k[head // group].T) * np.float32(q.shape[2]**-0.5)
        scores[hidden] = -np.inf
        scores = xp.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        result[:, head] = xp.matmul(scores, v[head // group])
    return result


@pytest.mark.parametrize("model, chunk, context, batch, length, dtype", steps())
def bench_paged_attn(bench, model, chunk, context, batch, length, dtype):
    """A step over full pages in random order, its schedule made beforehand; one of both kinds also stores its tokens.

    Checked at the chunk's last row and that of the last sequence.
    """
    sizes, schedules = MODELS[model], []
    heads, kv_heads, head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    own, each = context // PAGE_SIZE, length // PAGE_SIZE
    num_pages = 1 + own + batch * each
    impl = cupyattn.PagedAttn(cupyattn.AttentionMetadata())
    last = ([chunk - 1] if chunk else []) + ([chunk + batch - 1] if batch else [])

    def make(rng):
        facts = cupyattn.PagedAttentionCacheMetaData(batch, 1, num_pages, max(own, each), max(context, length),
                                                     PAGE_SIZE, kv_heads, head_dim, 0.5)
        view = cupyattn.PagedAttentionCacheView(
            facts, 0, *(normal(rng, (kv_heads, num_pages, PAGE_SIZE, head_dim), dtype) for _ in "kv"))
        pages = rng.permutation(np.arange(1, num_pages, dtype=np.int32))
        table = pages[own:].reshape(batch, each)
        position = np.arange(context - chunk, context, dtype=np.int32)
        step = cupyattn.PagedAttentionMetadata.init_empty()
        if chunk:
            step = step.replace(prefill_length=np.array(context, np.int32), prefill_position=position,
                                prefill_page_table=pages[:own])
        if batch:
            step = step.replace(decodes_position=np.full(batch, length - 1, np.int32), decodes_page_table=table)
        written = (np.concatenate([pages[:own][position // PAGE_SIZE], table[:, -1:].ravel()]),
                   np.concatenate([position % PAGE_SIZE, np.full(batch, PAGE_SIZE - 1)]))
        k, v = view.k_cache[written], view.v_cache[written]   # storing them changes nothing
        return normal(rng, (chunk + batch, heads, head_dim), dtype), k, v, view, step

    def call(q, k, v, view, step):
        if not schedules:   # made once per step, for all layers
            schedules.append(impl.schedule(q, view, step))
        return impl.forward_tpu(q, k, v, view, step, schedule=schedules[0]).attention_outputs

    def tables(step):
        return ([step.prefill_page_table] if chunk else []) + (list(step.decodes_page_table) if batch else [])

    def expected(q, k, v, view, step):
        rows = tables(step)
        return np.concatenate([reference(q[row:row + 1], view.k_cache, view.v_cache, block_table=table[None],
                                         cache_seqlens=[len(table) * PAGE_SIZE])
                               for row, table in zip(last, (rows[0], rows[-1])[-len(last):], strict=True)])

    def baseline(q, k, v, view, step):
        xp = DEVICE.xp if DEVICE.is_gpu else np
        rows = ([slice(0, chunk)] if chunk else []) + [slice(chunk + b, chunk + b + 1) for b in range(batch)]
        for row, table in zip(rows, tables(step), strict=True):
            k, v = (cache[table].reshape(-1, kv_heads, head_dim) for cache in (view.k_cache, view.v_cache))
            attended(xp, q[row], k, v, len(k) - len(q[row]))

    item = 4 if dtype == "float32" else 2
    pairs = chunk * context - chunk * (chunk - 1) // 2 + batch * length   # visible (query, key) pairs of a head
    kinds = [f"chunk {chunk} of {context}"] * bool(chunk) + [f"{batch} decodes of {length}"] * bool(batch)
    bench(f"{model} {heads}/{kv_heads} d{head_dim} {', '.join(kinds)} {dtype}", make, call, expected,
          tolerance={"float16": (1e-3, 2.0**-11), "bfloat16": (4e-3, 2.0**-8), "float32": (2e-6, 0)}[dtype],
          nbytes=2 * ((context + batch * length) * kv_heads + (chunk + batch) * heads) * head_dim * item,
          flops=4 * pairs * heads * head_dim, baseline=baseline, checked=lambda out: out[last])
