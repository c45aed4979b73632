# SPDX-License-Identifier: Apache-2.0
"""The covering set of shapes through every kernel for 16-bit queries that the CPU executor would not take by itself."""

import itertools

import pytest
from test_attention import AXES, FORMS, LENGTHS, check, covering, make

from cupyattn.attn import attend as road
from cupyattn.attn import plans as attention_plans

KERNELS = {"prefill on tensor cores": ("mma", 1), "decode on tensor cores": ("mma", 0),
           "decode on CUDA cores": ("cores", 0)}


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """All sequences take this kernel, on more blocks than there are units of most cases."""
    version, place = KERNELS[request.param]
    tiling = attention_plans.tiling

    def tiles(facts, *of):
        rows = 64 if max(facts.head_dim, facts.head_dim_v) > 128 else 128
        found = tiling(facts, *of)._replace(decode_workers=9, prefill_workers=5)
        return found._replace(prefill_rows=rows) if version == "mma" else found

    monkeypatch.setattr(attention_plans, "version", lambda facts: (version, "chosen by the test"))
    monkeypatch.setattr(road, "tiling", tiles)
    monkeypatch.setattr(road, "list_ranges",
                        lambda *of: ((1, 2**31 - 1), None) if place == 0 else (None, (1, 2**31 - 1)))
    return request.param


def check_shape(kernel, lengths, group, head_dim, head_dim_v, page_size, form, causal, dtype):
    lengths = [n for n in LENGTHS[lengths](page_size) if n >= 0]
    rows = 130 if max(lengths) < 2000 else 20
    q_lens = [(min(n, 1 + rows // group), 1, min(n, 3))[i % 3] for i, n in enumerate(lengths)]
    kv_heads = 2 if group < 4 else 1
    check(make(lengths, q_lens, heads=group * kv_heads, kv_heads=kv_heads, head_dim=head_dim,
               head_dim_v=head_dim if head_dim_v == "same" else head_dim_v, page_size=page_size, dtype=dtype),
          form=form, causal=causal, rounded_probs="tensor cores" in kernel)


@pytest.mark.parametrize("part", range(2))
def test_shapes(kernel, part):
    """Every pair of the lengths, groups, dims, page sizes, forms and both dtypes."""
    for values in [values for values in covering() if values["dtype"] != "float32"][part::2]:
        check_shape(kernel, **values)


@pytest.mark.full
@pytest.mark.parametrize("head_dim", AXES["head_dim"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_shapes(kernel, dtype, head_dim):
    """A share of the lengths, groups and page sizes for each dtype and head dim; together all of them."""
    share = (dtype == "bfloat16") + 2 * AXES["head_dim"].index(head_dim)
    every = list(itertools.product(LENGTHS, AXES["group"], AXES["page_size"]))
    for i, (lengths, group, page_size) in enumerate(every[share::18]):
        check_shape(kernel, lengths, group, head_dim, "same", page_size, FORMS[i % len(FORMS)], i % 3 > 0, dtype)
