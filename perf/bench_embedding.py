# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import models, token_counts

import cupyattn
from cupyattn.reference.embedding import embedding as reference


@pytest.mark.parametrize("tokens", token_counts())
@pytest.mark.parametrize("model", models(), ids=str)
def bench_embedding(bench, model, tokens):
    """A float16 table; 16,384 of its rows are enough to be out of cache."""
    rows, columns = min(model.vocab_size, 16384), model.hidden_size

    def make(rng):
        table = rng.standard_normal((rows, columns), np.float32).astype(np.float16)
        return rng.integers(0, rows, tokens), table, np.empty((tokens, columns), np.float32)

    def call(ids, table, out):
        return cupyattn.embedding(ids, table, out=out)

    def by_array_library(ids, table, out):
        out[...] = table[ids]

    bench(f"{model} tokens {tokens} float16 to float32", make, call, lambda ids, table, out: reference(ids, table),
          tolerance=(0, 0), nbytes=tokens * columns * 6, baseline=by_array_library)
