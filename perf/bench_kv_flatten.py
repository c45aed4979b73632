# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import models
from timing import DEVICE

import cupyattn
from cupyattn.reference import kv_codec
from cupyattn.reference.kv_flatten import kv_flatten as reference

PAGE_SIZE = 64


@pytest.mark.parametrize("format", ["float16", "int8", "int4", "fp8_e4m3", "hadamard8", "hadamard4"])
@pytest.mark.parametrize("model", models(), ids=str)
def bench_kv_flatten(bench, model, format):
    """Four sequences out of shuffled pages into float16."""
    lengths = np.int32([2048, 1024, 512, 512]) * (16 if DEVICE.is_gpu else 1)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    tokens, pages = int(starts[-1]), int(starts[-1]) // PAGE_SIZE
    row = (model.num_kv_heads, model.head_dim)

    def make(rng):
        table = np.zeros((4, lengths[0] // PAGE_SIZE), np.int32)
        order = iter(rng.permutation(pages).tolist())
        for b, n in enumerate(lengths):
            table[b, :n // PAGE_SIZE] = [next(order) for _ in range(n // PAGE_SIZE)]
        caches = []
        for x in rng.standard_normal((2, 16, PAGE_SIZE, *row)).astype(np.float32):   # repeated to fill the pages
            parts = (x.astype(np.float16),) if format == "float16" else kv_codec.quantize(x, format)
            parts = [part if part is None else np.resize(part, (pages, *part.shape[1:])) for part in parts]
            caches.append(parts[0] if format == "float16" else cupyattn.QuantizedKV(*parts, format=format))
        return (table, starts, *np.zeros((2, tokens, *row), np.float16), *caches)

    def call(table, starts, k_out, v_out, k_cache, v_cache):
        cupyattn.kv_flatten(k_cache, v_cache, block_table=table, cu_seqlens_k=starts, out=(k_out, v_out))
        return v_out

    def expected(table, starts, k_out, v_out, k_cache, v_cache):
        numbers = v_cache if format == "float16" else v_cache.dequantize()
        return reference(numbers, numbers, block_table=table, cu_seqlens_k=starts)[1]

    plain = 2 * row[0] * row[1]   # bytes of a token's keys
    cached = plain if format == "float16" else cupyattn.QuantizedKV.empty(
        1, 1, *row, format=format, granularity="token" if format == "fp8_e4m3" else None).nbytes
    bench(f"{model} tokens {tokens} from {format}", make, call, expected, tolerance=(1e-3, 1e-3),
          nbytes=2 * tokens * (plain + cached))
