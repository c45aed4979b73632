# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import models
from timing import DEVICE

import cupyattn
from cupyattn.reference.page_move import page_move as reference

PAGE_SIZE = 64


@pytest.mark.parametrize("moves", [1, 256] if DEVICE.is_gpu else [1, 32])
@pytest.mark.parametrize("model", models(), ids=str)
def bench_page_move(bench, model, moves):
    """Scattered pages of a float16 layer, keys and values."""
    shape = (2, 2 * moves, PAGE_SIZE, model.num_kv_heads, model.head_dim)

    def make(rng):
        ids = rng.permutation(2 * moves).astype(np.int32)
        return rng.integers(-99, 99, shape).astype(np.float16), ids[:moves].copy(), ids[moves:].copy()

    def call(pools, sources, destinations):
        cupyattn.page_move([pools[0], pools[1]], sources, destinations)
        return pools

    def expected(pools, sources, destinations):
        reference([*pools], sources, destinations)
        return pools

    def baseline(pools, sources, destinations):
        pools[:, destinations] = pools[:, sources]

    bench(f"{model} {moves} pages of {PAGE_SIZE}", make, call, expected, tolerance=(0, 0),
          nbytes=2 * int(np.prod(shape)), baseline=baseline)
