# SPDX-License-Identifier: Apache-2.0
"""Context parallelism with every rule of what a query sees: ranks merged by split_reduce give what one rank gives."""

from dataclasses import replace

import numpy as np
import pytest
from compare import assert_close, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_attention import SINKS, SLOPES, TOLERANCE, WILD, check, make

import cupyattn
from cupyattn.attn import attend as road
from cupyattn.attn import plans as attention_plans


def rank_case(case, owned):
    """`case` on a rank that holds the tokens owned[b] of its sequences, in this order; all else is poison."""
    k, v = poison(np.empty_like(case.k)), poison(np.empty_like(case.v))
    table = np.full_like(case.table, WILD)
    page_size = k.shape[1]
    for b, tokens in enumerate(owned):
        local, columns = np.arange(len(tokens)), -(-len(tokens) // page_size)
        table[b, :columns] = case.table[b, :columns]
        places = table[b, local // page_size], local % page_size
        there = case.table[b, tokens // page_size], tokens % page_size
        k[places], v[places] = case.k[there], case.v[there]
    return replace(case, k=k, v=v, table=table)


def ranks(case, cp_size, contiguous):
    """(case, arguments) of every rank."""
    starts, counts = cupyattn.contiguous_shards(case.lengths, cp_size)
    for r in range(cp_size):
        if contiguous:
            yield (rank_case(case, [s + np.arange(n) for s, n in zip(starts[r], counts[r], strict=True)]),
                   {"key_offsets": starts[r], "key_counts": counts[r]})
        else:
            yield (rank_case(case, [np.arange(r, n, cp_size) for n in case.lengths]),
                   {"cp_rank": r, "cp_size": cp_size})


def merged(case, cp_size, contiguous, num_splits, sinks=None, **options):
    """(out, lse) of all ranks together, both float32."""
    parts = []
    for local, where in ranks(case, cp_size, contiguous):
        part = [np.full((num_splits, *shape), np.nan, np.float32)
                for shape in ((*case.q.shape[:2], case.v.shape[3]), case.q.shape[:2])]
        cupyattn.attention(local.q, local.k, local.v, cu_seqlens_q=local.cu, block_table=local.table,
                           cache_seqlens=local.lengths, num_splits=num_splits, partials=tuple(part), **where, **options)
        parts.append(part)
    return cupyattn.split_reduce(*(np.concatenate(side) for side in zip(*parts, strict=True)), sinks=sinks,
                                 return_lse=True)


@st.composite
def calls(draw, dtype):
    """(case, options, number of ranks, contiguous shards, splits of a rank)."""
    lengths = draw(st.lists(st.integers(0, 260), min_size=1, max_size=3))
    q_lens = [draw(st.integers(0, min(n + 1, 40))) for n in lengths]
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    case = make(lengths, q_lens, page_size=draw(st.sampled_from([1, 7, 16])), dtype=dtype)
    batch, longest = len(lengths), max(1, *q_lens)
    options = {}

    def sometimes(**found):
        if draw(st.booleans()):
            options.update(found)

    sometimes(window_size=draw(st.integers(1, 100)))
    sometimes(softcap=2.0)
    sometimes(causal=False)
    sometimes(sinks=SINKS)
    sometimes(alibi_slopes=SLOPES)
    sometimes(finished=generator.random(batch) < 0.4)
    sometimes(cache_starts=generator.integers(0, 50, batch).astype(np.int32))
    sometimes(tree_mask=generator.integers(0, 2**32, (len(case.q), -(-longest // 32)), dtype=np.uint32))
    shape = [n if draw(st.booleans()) else 1 for n in (batch, 4, longest)]
    mask = generator.standard_normal((*shape, draw(st.integers(1, 300)))).astype(np.float32)
    sometimes(mask=mask > -0.7 if draw(st.booleans()) else np.where(mask < -1.5, np.float32(-np.inf), mask))
    if "cache_starts" in options:   # nobody may read what lies before
        for b, first in enumerate(options["cache_starts"]):
            pages, slots = (a[:first] for a in case.tokens(b))
            case.k[pages, slots] = case.v[pages, slots] = np.nan
    return case, options, draw(st.integers(2, 4)), draw(st.booleans()), draw(st.sampled_from([1, 3]))


def check_ranks(call):
    case, options, cp_size, contiguous, num_splits = call
    check(case, **options)
    if len(case.q) == 0:
        return
    out, lse = merged(case, cp_size, contiguous, num_splits, **options)
    want, want_lse = case.expected(**options)
    assert_close(out, want, *TOLERANCE[case.q.dtype.name])
    assert_close(lse, want_lse, 2e-6, 1e-6)


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(calls("float32"))
def test_ranks_give_what_one_gives(call):
    check_ranks(call)


@pytest.mark.full
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_ranks_on_tensor_cores(decode, monkeypatch):
    every = (1, 2**31 - 1)
    monkeypatch.setattr(attention_plans, "version", lambda facts: ("mma", "chosen by the test"))
    monkeypatch.setattr(road, "list_ranges", lambda *of: (every, None) if decode else (None, every))

    @hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
    @given(calls("float16"))
    def examples(call):
        check_ranks(call)

    examples()
