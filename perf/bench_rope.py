# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from shapes import models, token_counts

import cupyattn
from cupyattn.reference.rope import rope as reference
from cupyattn.rope_params import RopeParams


@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize("tokens", token_counts())
@pytest.mark.parametrize("model", models(), ids=str)
def bench_rope(bench, model, tokens, style):
    """Queries and keys of a fused projection, float16, into a new array."""
    heads, head_dim = model.num_heads + model.num_kv_heads, model.head_dim
    cos, sin = RopeParams(rotary_dim=head_dim).tables(8192)

    def make(rng):
        x = rng.standard_normal((tokens, heads + model.num_kv_heads, head_dim)).astype(np.float16)
        return x, np.empty((tokens, heads, head_dim), np.float16), cos, sin, np.arange(tokens, dtype=np.int32)

    def call(x, out, cos, sin, positions):
        return cupyattn.rope(x[:, :heads], cos=cos, sin=sin, positions=positions, style=style, out=out)

    def expected(x, out, cos, sin, positions):
        return reference(x[:, :heads], cos=cos, sin=sin, positions=positions, style=style)

    bench(f"{model} tokens {tokens} {style} float16", make, call, expected, tolerance=(1e-6, 2.0**-10),
          nbytes=tokens * (2 * heads * head_dim * 2 + head_dim * 4), flops=tokens * heads * head_dim * 3)
