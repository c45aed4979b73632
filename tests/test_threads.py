# SPDX-License-Identifier: Apache-2.0
"""Any order of threads and any number of workers: the same bits, from every kernel of attention and its caches."""

import numpy as np
import pytest
import test_kv_append_formats
import test_kv_flatten
import test_split_reduce
from compare import assert_same_bits
from test_attention import SINKS, make
from test_kv_append import empty_caches, new_tokens

import cupyattn
from cupyattn.attn import attend as road
from cupyattn.attn import plans as attention_plans
from cupyattn.attn.plans import Tiling
from cupyattn.attn.scheduling import Lengths, Limits, Policy, empty_lists, fill_lists, list_ranges
from cupyattn.runtime.cpu import settings

ORDERS = [(schedule, seed, workers) for workers in (1, 2)
          for schedule, seed in (("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(5)))]


def assert_same_in_any_order(run, fused):
    """`run` returns arrays; every order of threads must give the bits of the first one."""
    first = None
    for schedule, seed, workers in ORDERS:
        with settings(schedule=schedule, seed=seed, workers=workers, fused=fused):
            found = [np.array(array) for array in run()]
        first = first or found
        for got, want in zip(found, first, strict=True):
            assert_same_bits(got, want)


def attend(op, dtype):
    """Arguments of a call whose units are cut in pieces."""
    decode = op is cupyattn.paged_decode
    case = make([45, 700, 0, 1100], [1, 1, 1, 1] if decode else [3, 33, 0, 1], dtype=dtype)
    places = {"block_table": case.table, "cache_seqlens": case.lengths, "sinks": SINKS}
    if not decode:
        places["cu_seqlens_q"] = case.cu
    return lambda: op(case.q, case.k, case.v, **places, return_lse=True)


def append(format):
    """What caches of a format hold after some tokens."""
    k, v = new_tokens(60, 3, 64)
    slots = np.random.default_rng(4).permutation(64)[:60] - 1

    def run():
        if format == "plain":
            caches = empty_caches(16, 4, 3, 64)
            arrays = caches
        else:
            caches = [test_kv_append_formats.cache_of(format, 3, 64, pages=16) for _ in "kv"]
            arrays = [array for cache in caches for array in cache.arrays.values()]
        cupyattn.kv_append(k, v, *caches, slots=slots)
        return arrays

    return run


def flatten(format):
    lengths = (3, 0, 17, 40)
    table = test_kv_flatten.paging(lengths, 4, 20)
    used = test_kv_flatten.used_slots(table, lengths, 20, 4)
    k, v = (test_kv_flatten.make_cache(format, used, 2, 64)[0] for _ in "kv")
    return lambda: cupyattn.kv_flatten(k, v, block_table=table, cu_seqlens_k=test_kv_flatten.starts_of(lengths),
                                       num_tokens=sum(lengths), dtype="float32")


def reduce():
    out, lse = test_split_reduce.partials(7, 9, 3, 128)
    return lambda: cupyattn.split_reduce(out, lse, sinks=SINKS[:3], return_lse=True)


def plan(policy):
    """Work lists that the device planner makes."""
    generator = np.random.default_rng(3)
    seqlens, q_lens = generator.integers(0, 3000, 90).astype(np.int32), generator.integers(0, 12, 90)
    tiles = Tiling(2, 8, 7, 3)
    ranges = list_ranges(tiles, 0, 10**6)
    lengths = Lengths(2, 2, seqlens, cu_seqlens_q=np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32))
    limits = Limits(int(q_lens.max()), int(seqlens.max()), int(q_lens.sum()), int(seqlens.sum()))

    def run():
        lists = empty_lists(np, lengths, limits, tiles, policy, ranges)
        for work in lists:
            for array in (work.items, work.worker_items, work.units, work.pieces):
                array[...] = 0x7F7F7F7F
        fill_lists(np, lengths, limits, policy, ranges, lists)
        return [getattr(work, name) for work in lists for name in work.ARRAYS]

    return run


FUSED = pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.full)], ids=["fused", "unfused"])


@FUSED
@pytest.mark.parametrize("op", [cupyattn.attention, cupyattn.paged_decode], ids=["attention", "paged_decode"])
@pytest.mark.parametrize("version, dtype", [("cores", "float32"), ("mma", "float16")])
def test_attention(op, version, dtype, fused, monkeypatch):
    """With pieces that the last block to arrive merges, whichever that is."""
    tiling, launch_work, slots = attention_plans.tiling, road.launch_work, []
    monkeypatch.setattr(attention_plans, "version", lambda facts: (version, "chosen by the test"))
    monkeypatch.setattr(road, "tiling", lambda *of: tiling(*of)._replace(decode_workers=9, prefill_workers=9))

    def launch(op, plan, work, *rest):
        slots.append(work.num_slots)
        launch_work(op, plan, work, *rest)

    monkeypatch.setattr(road, "launch_work", launch)
    assert_same_in_any_order(attend(op, dtype), fused)
    assert min(slots) > 1


OTHERS = {"kv_append": lambda: append("plain"), "kv_append int8": lambda: append("int8"),
          "kv_append hadamard4": lambda: append("hadamard4"), "kv_flatten": lambda: flatten("float16"),
          "kv_flatten hadamard4": lambda: flatten("hadamard4"), "split_reduce": reduce,
          "schedule": lambda: plan(Policy()), "schedule invariant": lambda: plan(Policy(invariant=True))}


@FUSED
@pytest.mark.parametrize("made", OTHERS.values(), ids=OTHERS)
def test_other_kernels(made, fused):
    assert_same_in_any_order(made(), fused)
