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
        some = rng.standard_normal((2, 16, PAGE_SIZE, *row)).astype(np.float32)   # repeated to fill the pages
        parts = []
        for x in some:
            made = (x.astype(np.float16),) if format == "float16" else [
                part for part in kv_codec.quantize(x, format) if part is not None]
            parts += [np.resize(part, (pages, *part.shape[1:])) for part in made]
        return (table, starts, *np.zeros((2, tokens, *row), np.float16), *parts)

    def caches(parts):
        half = len(parts) // 2
        sides = parts[:half], parts[half:]
        return [side[0] if format == "float16" else cupyattn.QuantizedKV(*side, format=format) for side in sides]

    def call(table, starts, k_out, v_out, *parts):
        cupyattn.kv_flatten(*caches(parts), block_table=table, cu_seqlens_k=starts, out=(k_out, v_out))
        return v_out

    def expected(table, starts, k_out, v_out, *parts):
        numbers = [c if format == "float16" else c.dequantize() for c in caches(parts)]
        return reference(*numbers, block_table=table, cu_seqlens_k=starts)[1]

    bits = 16 if format == "float16" else 8 * sum(
        a.nbytes for a in cupyattn.QuantizedKV.empty(1, 1, *row, format=format).arrays.values()) / (row[0] * row[1])
    bench(f"{model} tokens {tokens} from {format}", make, call, expected, tolerance=(1e-3, 1e-3),
          nbytes=int(2 * tokens * row[0] * row[1] * (2 + bits / 8)))
