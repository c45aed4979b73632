# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import models, token_counts

import cupyattn
from cupyattn.kv.quantized import FORMATS, QuantizedKV
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


@pytest.mark.parametrize("format", ["float16", "int8", "int4", "fp8_e4m3", "hadamard4"])
@pytest.mark.parametrize("tokens", token_counts())
@pytest.mark.parametrize("model", models(), ids=str)
def bench_finished_tokens(bench, model, tokens, format):
    """A fused float16 projection: RoPE of queries and keys, queries to an array, keys and values to a cache."""
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    cos, sin = cupyattn.RopeParams(rotary_dim=head_dim).tables(8192)
    pages = -(-2 * tokens // PAGE_SIZE)
    made = {}   # the caches of a set of arrays: making them is not what is timed

    def cache(codes, parameters, side):
        if format == "float16":
            return codes
        if (id(codes), side) not in made:
            zero = parameters[..., 1] if format in ("int8", "int4") else None
            scale = parameters if zero is None else parameters[..., 0]
            made[id(codes), side] = QuantizedKV(codes, scale, zero, format=format)
        return made[id(codes), side]

    def make(rng):
        x = rng.standard_normal((tokens, heads + 2 * kv_heads, head_dim)).astype(np.float16)
        slots = rng.permutation(pages * PAGE_SIZE)[:tokens].astype(np.int64)
        shape = (pages, PAGE_SIZE, kv_heads)
        kind = FORMATS.get(format)
        codes = [np.zeros((*shape, head_dim), np.float16) if kind is None else
                 np.zeros((*shape, kind.row_codes(head_dim)), np.uint8) for _ in "kv"]
        parameters = np.ones(1, np.float32) if format == "fp8_e4m3" else np.zeros(
            (*shape, head_dim // 32 if format == "hadamard4" else 2), np.float16)
        return (x, np.empty((tokens, heads, head_dim), np.float16), *codes, parameters, parameters.copy(), slots, cos,
                sin, np.arange(tokens, dtype=np.int32))

    def arguments(x, q_out, k, v, k_parameters, v_parameters, slots, cos, sin, positions):
        return (x[:, heads:heads + kv_heads], x[:, heads + kv_heads:], cache(k, k_parameters, "k"),
                cache(v, v_parameters, "v")), {"slots": slots, "positions": positions, "q": x[:, :heads], "cos": cos,
                                               "sin": sin}

    def call(*arrays):
        new, steps = arguments(*arrays)
        cupyattn.kv_append(*new, **steps, q_out=arrays[1])
        return arrays[3]

    def expected(*arrays):
        new, steps = arguments(*(a.copy() for a in arrays))
        reference(*new, **steps)
        return new[3].codes if format in FORMATS else new[3]

    bits = FORMATS[format].bits if format in FORMATS else 16
    bench(f"{model} tokens {tokens} rope, queries, {format}", make, call, expected, tolerance=(0, 0),
          nbytes=tokens * head_dim * (heads * 4 + kv_heads * (4 + bits // 4) + 4))
