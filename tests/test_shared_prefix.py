# SPDX-License-Identifier: Apache-2.0
"""Attention of sequences that begin with the same pages."""

from contextlib import nullcontext
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
from compare import assert_close, assert_same_bits
from conftest import NumpyArrays
from standin import install

import cupyattn
from cupyattn.attn import attend
from cupyattn.attn import plans as attention_plans
from cupyattn.reference.attention import attention as expected_attention

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, SHARED = 4, 2, 64, 64, 17   # pages in common: 1088 keys
SIZES = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
TOLERANCE = {"float16": (1e-3, 2.0**-11), "float32": (2e-6, 0.0)}
rng = np.random.default_rng(29)


@pytest.fixture(params=["cores-float32", "cores-float16", "mma-float16"])
def dtype(request, monkeypatch):
    """Both versions of the kernels, whichever the plan would choose."""
    name, dtype = request.param.split("-")
    monkeypatch.setattr(attention_plans, "version", lambda facts: (name, "chosen by the test"))
    return dtype


@dataclass
class Case:
    q: np.ndarray   # [batch, heads, head_dim]: one query each
    k: np.ndarray
    v: np.ndarray
    table: np.ndarray
    lengths: np.ndarray

    def some(self, n):
        """The first `n` sequences."""
        return Case(self.q[:n], self.k, self.v, self.table[:n], self.lengths[:n])

    def attend(self, op, **options):
        """(out, lse) of `op`."""
        if op == "attention":
            options["cu_seqlens_q"] = np.arange(len(self.q) + 1, dtype=np.int32)
        return getattr(cupyattn, op)(self.q, self.k, self.v, block_table=self.table, cache_seqlens=self.lengths,
                                     return_lse=True, **options)

    def schedule(self, op="paged_decode", **options):
        if op == "attention":
            options["cu_seqlens_q"] = np.arange(len(self.q) + 1, dtype=np.int32)
        return cupyattn.schedule(self.lengths, **SIZES, dtype=self.q.dtype.name,
                                 **{"block_table": self.table, "page_size": PAGE_SIZE, **options})


def make(lengths, dtype="float32"):
    """Sequences that have SHARED pages in common, and then none."""
    lengths = np.int32(lengths)
    pages = -(-int(lengths.max()) // PAGE_SIZE)
    table = np.arange(len(lengths) * pages, dtype=np.int32).reshape(len(lengths), pages)
    table[:, :SHARED] = table[0, :SHARED]
    k, v = rng.standard_normal((2, table.size, PAGE_SIZE, KV_HEADS, HEAD_DIM), np.float32).astype(dtype)
    return Case(rng.standard_normal((len(lengths), HEADS, HEAD_DIM)).astype(dtype), k, v, table, lengths)


def shared(made):
    """Sequences that attend to a prefix together."""
    return sum(len(work.members) for work in (made.decode, made.prefill) if work is not None)


def assert_all_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("op", ["paged_decode", "attention"])
def test_invariant_bits(dtype, op):
    """The same with a shared prefix and without, among others and alone."""
    case = make([1100, 1300, 2100, 1090], dtype)
    policy = {"invariant": True, "one_list": op == "attention"}
    on, off = (case.schedule(op, share_prefix=share, **policy) for share in (True, False))
    assert shared(off) == 0
    for list_on, list_off in ((on.decode, off.decode), (on.prefill, off.prefill)):
        assert (list_on and list_on.rows) == (list_off and list_off.rows)
    if on.prefill is not None or on.decode.rows >= 2 * HEADS // KV_HEADS:
        assert shared(on) == 4
    want = case.attend(op, schedule=off, invariant=True)
    assert_all_same(case.attend(op, schedule=on, invariant=True), want)
    alone = case.some(1)
    for options in ({}, {"schedule": alone.schedule(op, **policy)}):
        assert_all_same(alone.attend(op, invariant=True, **options), [a[:1] for a in want])


def test_values(dtype):
    """With everything that changes scores, against float64."""
    case = make([1100, 1300, 1500, 1090, 1091], dtype)
    made = case.schedule("attention")
    assert shared(made) == 5
    every = {"mask": rng.standard_normal((5, HEADS, 1, 1500)).astype(np.float32), "softcap": 3.0,
             "alibi_slopes": np.float32([0.1, 0.2, 0.01, 0.4]), "sinks": np.float32([1, 2, -3, 4])}
    for options in ({}, every, {**every, "mask": every["mask"] < 0.5}):
        out, lse = case.attend("attention", schedule=made, **options)
        want, want_lse = expected_attention(
            case.q, case.k, case.v, cu_seqlens_q=np.arange(6, dtype=np.int32), block_table=case.table,
            cache_seqlens=case.lengths, return_lse=True, **options)
        assert_close(out, want, *TOLERANCE[dtype])
        assert_close(lse, want_lse, 2e-5, 1e-6)


@pytest.mark.parametrize("form", ["dense", "csr", "pointers"])
def test_schedule_of_other_pages(form):
    """Refused when sequences no longer share them, taken when they share others."""
    case = make([1100, 1300, 1200])
    apart = np.arange(case.table.size, dtype=np.int32).reshape(case.table.shape)
    moved = case.table.copy()
    moved[:, :SHARED] = moved[:, :SHARED][:, ::-1]
    k = v = case.k
    if form == "pointers":
        k = v = cupyattn.BlockKV("float32", PAGE_SIZE, KV_HEADS, HEAD_DIM, stride_token=KV_HEADS * HEAD_DIM,
                                 stride_head=HEAD_DIM)

    def table(ids):
        starts = (np.arange(4) * ids.shape[1]).astype(np.int32)
        if form == "csr":
            return cupyattn.PageTable.csr(ids.reshape(-1), starts)
        return ids if form == "dense" else cupyattn.PageTable.from_pool(case.k, ids)

    made = case.schedule(block_table=table(case.table))
    assert shared(made) == 3
    for ids in (case.table, moved):
        cupyattn.paged_decode(case.q, k, v, block_table=table(ids), cache_seqlens=case.lengths, schedule=made)
    with pytest.raises(ValueError, match=r"paged_decode: schedule must be made for this block_table, got one for "
                                         r"sequences \[0, 1, 2\] with the same pages of 1088 keys"):
        cupyattn.paged_decode(case.q, k, v, block_table=table(apart), cache_seqlens=case.lengths, schedule=made)
    starts = np.int32([0, 1, 2, 3])
    made = case.schedule("attention", block_table=table(case.table))
    rows = np.zeros((3600, KV_HEADS, HEAD_DIM), np.float32)
    with pytest.raises(ValueError, match="must be made without shared pages for cu_seqlens_k, got one for sequences "
                                         "that share 1088 keys"):
        cupyattn.attention(case.q, rows, rows, cu_seqlens_q=starts, cu_seqlens_k=np.int32([0, 1100, 2400, 3600]),
                           schedule=made)


def test_ops_find_what_is_shared(dtype):
    """Without a schedule: the bits of one that shares, and the values of one that does not."""
    case = make([1100, 1300, 1500, 1090], dtype)
    for op in ("paged_decode", "attention"):
        with mock.patch.object(attend, "launch_work", wraps=attend.launch_work) as launch_work:
            got = case.attend(op)
        assert sum(len(call.args[2].members) for call in launch_work.call_args_list) == 4
        assert_all_same(got, case.attend(op, schedule=case.schedule(op)))
        for a, b in zip(got, case.attend(op, schedule=case.schedule(op, share_prefix=False)), strict=True):
            assert_close(a, b, *TOLERANCE[dtype])
    got = case.attend("attention", invariant=True)
    assert_all_same(got, case.attend("attention", invariant=True, schedule=case.schedule(
        "attention", invariant=True, one_list=True, share_prefix=False)))


@pytest.mark.parametrize("name", ["paged_decode", "attention"])
def test_any_number_of_multiprocessors(name):
    """Invariant: the same bits whichever planner, host or device, plans for however many of them."""
    case, op = make([2100, 70, 1100, 1300], "float16"), getattr(cupyattn, name)
    starts = {} if name == "paged_decode" else {"cu_seqlens_q": np.arange(5, dtype=np.int32)}
    policy = {"invariant": True, "one_list": name == "attention", "dtype": "float16", **SIZES}
    for place in ("numpy", "standin"):
        results = []
        with install() if place == "standin" else nullcontext(NumpyArrays()) as xp:
            arrays = {"block_table": xp.array(case.table), "cache_seqlens": xp.array(case.lengths),
                      **{key: xp.array(value) for key, value in starts.items()}}
            q, k, v = (xp.array(a) for a in (case.q, case.k, case.v))
            device = {**policy, **({"max_q_len": 1} if starts else {}), "max_k_len": 2112}
            for count in (1, 7, 132):
                with mock.patch.object(attend, "sm_count", lambda xp, count=count: count):
                    results.append(op(q, k, v, invariant=True, **arrays))
                key = {"cu_seqlens_q": arrays["cu_seqlens_q"]} if starts else {}
                made = [cupyattn.schedule(case.lengths, **starts, num_workers=count, xp=xp.module, **policy),
                        cupyattn.schedule(arrays["cache_seqlens"], **key, num_workers=count, **device)]
                results += [op(q, k, v, invariant=True, schedule=work, **arrays) for work in made]
            results = [xp.numpy(out) for out in results]
        for out in results[1:]:
            assert_same_bits(out, results[0])
