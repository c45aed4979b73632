# SPDX-License-Identifier: Apache-2.0
import functools

import numpy as np
import pytest
from shapes import normal, prefill
from timing import DEVICE

import cupyattn


def matmul_softmax_matmul(q, k, v, cu_seqlens_q, cu_seqlens_k, out, causal=True):
    """The same by the array library alone, float32, all sequences of one length."""
    xp = DEVICE.xp if DEVICE.is_gpu else np
    batch, num_kv_heads = len(cu_seqlens_q) - 1, k.shape[1]
    q_len, k_len, group = len(q) // batch, len(k) // batch, q.shape[1] // num_kv_heads
    hidden = xp.arange(k_len) > xp.arange(q_len)[:, None] + (k_len - q_len)
    result = xp.empty(q.shape, np.float32)
    for b in range(batch):
        rows, keys, values = (a[b * n:(b + 1) * n].astype(np.float32).transpose(1, 0, 2)
                              for a, n in ((q, q_len), (k, k_len), (v, k_len)))
        for head in range(len(rows)):
            scores = xp.matmul(rows[head], keys[head // group].T) * np.float32(q.shape[2]**-0.5)
            if causal:
                scores[hidden] = -np.inf
            scores = xp.exp(scores - scores.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
            result[b * q_len:(b + 1) * q_len, head] = xp.matmul(scores, values[head // group])
    return result


def newest(q, k, v, cu_seqlens_q, cu_seqlens_k, out, causal=True):
    """float64 truth of the two newest queries of sequence 0: of all of them it would take longer than the bench."""
    from cupyattn.reference.attention import attention as reference

    q_len, k_len = len(q) // (len(cu_seqlens_q) - 1), len(k) // (len(cu_seqlens_q) - 1)
    last = reference(q[q_len - 2:q_len], k[:k_len], v[:k_len], cu_seqlens_q=np.int32([0, 2]),
                     cu_seqlens_k=np.int32([0, k_len]), causal=causal)
    return np.asarray(last)


@pytest.mark.parametrize("model, batch, q_len, context, dtype, causal", prefill(), ids=str)
def bench_attention(bench, model, batch, q_len, context, dtype, causal):
    """Prefill of the last q_len tokens of each context; checked at the two newest queries of sequence 0."""
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    schedules = {}

    def make(rng):
        q = normal(rng, (batch * q_len, heads, head_dim), dtype)
        k, v = (normal(rng, (batch * context, kv_heads, head_dim), dtype) for _ in "kv")
        starts = np.arange(batch + 1, dtype=np.int32)
        return q, k, v, starts * np.int32(q_len), starts * np.int32(context), np.empty_like(q)

    def run(q, k, v, cu_seqlens_q, cu_seqlens_k, out):
        if not schedules:   # made once per step, for all layers
            seqlens = np.full(batch, context, np.int32)
            schedules[0] = cupyattn.schedule(
                seqlens, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
                cu_seqlens_q=DEVICE.numpy(cu_seqlens_q), dtype=dtype, causal=causal, xp=DEVICE.xp)
        return cupyattn.attention(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_q_len=q_len,
                                  causal=causal, schedule=schedules[0], out=out)

    item = 4 if dtype == "float32" else 2
    # visible (query, key) pairs of a head
    pairs = q_len * context - (q_len * (q_len - 1) // 2 if causal else 0)
    small = batch * q_len * context <= 2**23   # the array library's version takes seconds otherwise
    bench(f"{model} {heads}/{kv_heads} d{head_dim} batch {batch} q_len {q_len} context {context} {dtype}"
          f"{'' if causal else ' not causal'}", make, run, functools.partial(newest, causal=causal),
          tolerance={"float16": (1e-3, 2.0**-11), "bfloat16": (4e-3, 2.0**-8), "float32": (2e-6, 0)}[dtype],
          nbytes=batch * (2 * context * kv_heads + 2 * q_len * heads) * head_dim * item,
          flops=4 * batch * pairs * heads * head_dim,
          baseline=functools.partial(matmul_softmax_matmul, causal=causal) if small else None,
          checked=lambda out: out[q_len - 2:q_len])
