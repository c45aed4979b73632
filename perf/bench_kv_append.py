# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import models, token_counts

import cupyattn
from cupyattn.reference.kv_append import kv_append as reference

PAGE_SIZE = 16


@pytest.mark.parametrize("cache_dtype", ["float16", "float32"])
@pytest.mark.parametrize("tokens", token_counts())
@pytest.mark.parametrize("model", models(), ids=str)
def bench_kv_append(bench, model, tokens, cache_dtype):
    """New float16 tokens to scattered slots of a pool twice their number."""
    shape = (tokens, model.num_kv_heads, model.head_dim)
    pages = -(-2 * tokens // PAGE_SIZE)

    def make(rng):
        slots = rng.permutation(pages * PAGE_SIZE)[:tokens].astype(np.int64)
        caches = np.zeros((2, pages, PAGE_SIZE, *shape[1:]), cache_dtype)
        return (*rng.standard_normal((2, *shape)).astype(np.float16), *caches, slots)

    def call(k, v, k_cache, v_cache, slots):
        cupyattn.kv_append(k, v, k_cache, v_cache, slots=slots)
        return v_cache

    def expected(k, v, k_cache, v_cache, slots):
        reference(k, v, k_cache, v_cache, slots=slots)
        return v_cache

    bench(f"{model} tokens {tokens} float16 to {cache_dtype}", make, call, expected, tolerance=(0, 0),
          nbytes=tokens * (2 * model.num_kv_heads * model.head_dim * (2 + np.dtype(cache_dtype).itemsize) + 8))
