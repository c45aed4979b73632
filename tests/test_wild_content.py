# SPDX-License-Identifier: Apache-2.0
"""What stands in arrays on the device is not checked on the host: whatever it is, nothing outside the arrays is read or
written, and the sequences it does not speak of keep their bits.

On the CuPy stand-in, whose launches run instrumented here: an access outside an allocation is a KernelCheckError.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, poison
from standin import install

import cupyattn
from cupyattn.reference.attention import attention as expected_attention
from cupyattn.runtime.cpu import settings

NUMBERS = (-2**31, -2_000_000_000, -1, 100_000, 2_000_000_000, 2**31 - 1)
LENGTHS, Q_LENS = np.int32([70, 40, 90, 3]), np.int32([2, 1, 20, 1])
STARTS = np.int32([0, *np.cumsum(Q_LENS)])
PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 16, 4, 2, 64
PAGES = -(-LENGTHS // PAGE_SIZE)
NUM_PAGES = int(PAGES.sum())
rng = np.random.default_rng(41)


@pytest.fixture(autouse=True)
def xp():
    with install() as arrays, settings(check=True):
        yield arrays


@pytest.fixture(params=["float16", "float32"])   # tensor cores, CUDA cores
def case(request):
    """Arrays of one call, in host memory; those named as in the op may be replaced by wild ones."""
    def normal(*shape):
        return rng.standard_normal(shape).astype(request.param)

    ids = rng.permutation(NUM_PAGES).astype(np.int32)
    table = np.zeros((4, PAGES.max()), np.int32)
    table[np.arange(PAGES.max()) < PAGES[:, None]] = ids
    return SimpleNamespace(
        q=normal(STARTS[-1], HEADS, HEAD_DIM), k=normal(NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM),
        v=normal(NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM), ids=ids, table=table,
        indptr=np.int32([0, *np.cumsum(PAGES)]), ragged=normal(2, LENGTHS.sum(), KV_HEADS, HEAD_DIM),
        cu_seqlens_k=np.int32([0, *np.cumsum(LENGTHS)]), dtype=request.param)


def attend(xp, case, form, schedule=None, balanced=False, **wild):
    """`attention` with some arrays replaced; balanced or, by default, in the order that no batch changes."""
    lists = {"cu_seqlens_q": STARTS, "cache_seqlens": LENGTHS, "block_table": case.table, **wild}
    k, v = case.k, case.v
    if form == "ragged":
        k, v = case.ragged
        lists = {"cu_seqlens_k": case.cu_seqlens_k, **lists}
        del lists["cache_seqlens"], lists["block_table"]
    lists = {name: xp.array(a) for name, a in lists.items()}
    if form == "csr":
        lists["block_table"] = cupyattn.PageTable.csr(lists.pop("ids", xp.array(case.ids)),
                                                      lists.pop("indptr", xp.array(case.indptr)))
    out = xp.array(poison(np.empty_like(case.q)))
    cupyattn.attention(xp.array(case.q), xp.array(k), xp.array(v), **lists, out=out, max_q_len=32,
                       invariant=not balanced, schedule=schedule)
    return xp.numpy(out)


def same_outside(got, want, touched):
    """Rows of the sequences that are not in `touched`."""
    for b in set(range(4)) - set(touched):
        rows = slice(STARTS[b], STARTS[b + 1])
        assert_same_bits(got[rows], want[rows])


def changed(array, at, value):
    array = array.copy()
    array[at] = value
    return array


# name of the argument, form, its right content, what is replaced, sequences that this touches
SPOTS = [
    ("cache_seqlens", "dense", LENGTHS, 1, [1]), ("cache_starts", "dense", np.zeros(4, np.int32), 1, [1]),
    ("cu_seqlens_q", "dense", STARTS, 2, [1, 2]), ("cu_seqlens_q", "ragged", STARTS, 0, [0]),
    ("cu_seqlens_q", "dense", STARTS, 4, [3]), ("cu_seqlens_k", "ragged", None, 2, [1, 2]),
    ("cu_seqlens_k", "ragged", None, 4, [3]), ("block_table", "dense", None, 2, [2]),
    ("ids", "csr", None, slice(8, None, 2), [2, 3]), ("indptr", "csr", None, 2, [1, 2]),
    ("indptr", "csr", None, 4, [3]), ("key_offsets", "dense", np.zeros(4, np.int32), 1, [1]),
    ("key_counts", "dense", LENGTHS, 1, [1])]


@pytest.mark.parametrize("name, form, right, at, touched", SPOTS, ids=[f"{spot[0]}-{spot[1]}-{i}"
                                                                       for i, spot in enumerate(SPOTS)])
def test_attention(xp, case, name, form, right, at, touched):
    if right is None:
        right = case.table if name == "block_table" else getattr(case, name)
    others = {}
    if name.startswith("key_"):
        others = {"key_offsets": np.zeros(4, np.int32), "key_counts": LENGTHS}
    want = attend(xp, case, form, **others)
    for number in NUMBERS:
        got = attend(xp, case, form, **{**others, name: changed(right, at, number)})
        same_outside(got, want, touched)


def wild(generator, right):
    """`right` with about half of it replaced."""
    return np.where(generator.random(right.shape) < 0.5, right, generator.choice(NUMBERS, right.shape)).astype(np.int32)


@pytest.mark.parametrize("form", ["dense", "csr", "ragged"])
def test_attention_with_everything_wild(xp, case, form):
    """Only that nothing outside the arrays is touched. Queries keep their places: two of one row would race."""
    right = {"dense": {"block_table": case.table}, "csr": {"ids": case.ids, "indptr": case.indptr},
             "ragged": {"cu_seqlens_k": case.cu_seqlens_k}}[form]
    right |= {"cache_starts": np.zeros(4, np.int32), "key_offsets": np.zeros(4, np.int32), "key_counts": LENGTHS}
    if form != "ragged":
        right["cache_seqlens"] = LENGTHS
    for seed in range(6):
        generator = np.random.default_rng(seed)
        attend(xp, case, form, balanced=seed % 2 == 0, **{name: wild(generator, a) for name, a in right.items()})


def test_mask_and_slopes(xp, case):
    """What a key's position is counted from may be wild; with ALiBi and a mask it is an index."""
    extra = {"alibi_slopes": np.ones(HEADS, np.float32), "mask": rng.random((4, 1, 32, 80)) < 0.5}
    for name, right in (("cache_seqlens", LENGTHS), ("cu_seqlens_q", STARTS), ("cache_starts", np.zeros(4, np.int32))):
        want = attend(xp, case, "dense", **extra)
        for number in NUMBERS:
            same_outside(attend(xp, case, "dense", **extra, **{name: changed(right, 2, number)}), want, [1, 2])


@pytest.mark.parametrize("by", ["own lists", "a schedule"])
@pytest.mark.parametrize("kind", ["mask", "tree_mask"])
def test_max_q_len_below_the_queries(xp, case, kind, by):
    """A mask of that many rows, or a tree mask of one word: what they have no row or bit for is as documented."""
    q_lens, limit = np.int32([1, 3, 70, 40]), 3
    starts, lengths = np.int32([0, *np.cumsum(q_lens)]), np.int32([30, 40, 90, 90])
    table = rng.integers(NUM_PAGES, size=(4, 6), dtype=np.int32)
    q = rng.standard_normal((starts[-1], HEADS, HEAD_DIM)).astype(case.dtype)
    masks = {"mask": rng.random((4, HEADS, limit, 60)) < 0.5,
             "tree_mask": rng.integers(1 << 32, size=(starts[-1], 1), dtype=np.uint32)}
    lists = {"cu_seqlens_q": starts, "cache_seqlens": lengths, "block_table": table, kind: masks[kind]}
    made = None
    if by == "a schedule":
        made = cupyattn.schedule(lengths, cu_seqlens_q=starts, num_heads=HEADS, num_kv_heads=KV_HEADS,
                                 head_dim=HEAD_DIM, dtype=case.dtype, tree_mask=kind == "tree_mask", xp=xp.module)
    out = xp.array(poison(np.empty_like(q)))
    cupyattn.attention(xp.array(q), xp.array(case.k), xp.array(case.v), **{n: xp.array(a) for n, a in lists.items()},
                       out=out, max_q_len=limit, schedule=made)
    got = xp.numpy(out).astype(np.float64)
    want = expected_attention(q, case.k, case.v, **lists)
    written = ~np.isnan(got)
    for b in range(4):
        assert written[starts[b]:starts[b + 1] if made is not None else starts[b] + min(limit, q_lens[b])].all()
    assert_close(np.where(written, got, 0), np.where(written, want, 0), 2e-3, 2e-3)


# ---- schedules of other lengths --------------------------------------------------------------------------

OTHERS = [(LENGTHS[::-1].copy(), Q_LENS[::-1].copy()), (np.int32([5, 64, 1, 80]), np.int32([5, 1, 1, 17])),
          (np.int32([80, 80, 80, 80]), np.int32([1, 1, 1, 20])), (np.int32([0, 1, 0, 2]), np.int32([0, 1, 0, 2]))]


@pytest.mark.parametrize("policy", [{}, {"invariant": True, "one_list": True}], ids=["balanced", "invariant"])
@pytest.mark.parametrize("lengths, q_lens", OTHERS)
def test_schedules_of_other_lengths(xp, case, lengths, q_lens, policy):
    """Made on the host or on the device for one batch, taken for another."""
    starts = np.int32([0, *np.cumsum(q_lens)])
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": case.dtype, **policy}
    for made in (cupyattn.schedule(lengths, cu_seqlens_q=starts, xp=xp.module, **sizes),
                 cupyattn.schedule(xp.array(lengths), cu_seqlens_q=xp.array(starts), max_q_len=32, max_k_len=96,
                                   num_tokens=int(STARTS[-1]), **sizes)):
        attend(xp, case, "dense", schedule=made, balanced=not policy)


@pytest.mark.parametrize("q_lens", [[1, 1, 1, 1], [2, 1, 1, 9]], ids=str)
def test_schedules_of_other_shared_prefixes(xp, case, q_lens):
    """Made for four sequences that share pages and have two queries each."""
    table = np.tile(np.arange(25, dtype=np.int32), (4, 1))
    made = cupyattn.schedule(np.full(4, 400, np.int32), q_len=2, num_heads=HEADS, num_kv_heads=KV_HEADS,
                             head_dim=HEAD_DIM, dtype=case.dtype, block_table=table, page_size=PAGE_SIZE, xp=xp.module)
    assert (made.decode or made.prefill).members.size, "nothing is shared"
    made = replace(made, made_from=None)   # or the ops would refuse it
    starts = np.int32([0, *np.cumsum(q_lens)])
    for number in (70, *NUMBERS):
        attend(xp, case, "dense", schedule=made, balanced=True, cu_seqlens_q=starts,
               cache_seqlens=changed(LENGTHS, 1, number))
        attend(xp, case, "dense", schedule=made, balanced=True, cu_seqlens_q=changed(starts, 2, number))
    q = xp.array(rng.standard_normal((4, 8, HEADS, HEAD_DIM)).astype(case.dtype))   # more rows than a tile has
    cupyattn.paged_decode(q, xp.array(case.k), xp.array(case.v), block_table=xp.array(case.table),
                          cache_seqlens=xp.array(LENGTHS), schedule=made)


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [96, 96, 96, 96]], ids=str)
def test_schedules_of_other_splits(xp, case, lengths):
    """Partial results that are left to the caller: the number of a split comes from the lengths of the call."""
    made = cupyattn.schedule(np.int32(lengths), num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
                             dtype=case.dtype, num_splits=3, xp=xp.module)
    made = replace(made, made_from=None)   # or the op would refuse it for want of cache_starts
    q = xp.array(case.q[:4])
    for number in (70, *NUMBERS):
        partials = (xp.array(np.empty((3, 4, HEADS, HEAD_DIM), np.float32)),
                    xp.array(np.empty((3, 4, HEADS), np.float32)))
        cupyattn.paged_decode(q, xp.array(case.k), xp.array(case.v), block_table=xp.array(case.table), num_splits=3,
                              cache_seqlens=xp.array(changed(LENGTHS, 1, number)), partials=partials,
                              cache_starts=xp.array(np.int32([60, 0, 0, 0])), schedule=made)


# ---- the other ops ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, at", [("cache_seqlens", 1), ("cache_starts", 1), ("block_table", 1)])
def test_paged_decode(xp, case, name, at):
    lists = {"cache_seqlens": LENGTHS, "cache_starts": np.zeros(4, np.int32), "block_table": case.table}
    q, k, v = map(xp.array, (case.q[:4], case.k, case.v))

    def decode(lists):
        return xp.numpy(cupyattn.paged_decode(q, k, v, **{n: xp.array(a) for n, a in lists.items()}, invariant=True))

    want = decode(lists)
    for number in NUMBERS:
        got = decode({**lists, name: changed(lists[name], at, number)})
        assert_same_bits(np.delete(got, at, 0), np.delete(want, at, 0))


def test_kv_append(xp, case):
    """Tokens with a wild place are left out; the others arrive."""
    new = rng.standard_normal((5, KV_HEADS, HEAD_DIM)).astype(case.dtype)
    slots = np.int64([3, 40, 90, 17, 5])
    where = {"slots": slots, "positions": np.int32([3, 20, 7, 0, 60]), "batch_indices": np.int32([0, 1, 2, 3, 0]),
             "ids": case.ids, "indptr": case.indptr}
    names = [("slots",), ("positions", "batch_indices", "ids", "indptr")]

    def append(lists, **replaced):
        arrays = {name: xp.array(replaced.get(name, where[name])) for name in lists}
        if "ids" in arrays:
            arrays["block_table"] = cupyattn.PageTable.csr(arrays.pop("ids"), arrays.pop("indptr"))
        caches = [xp.array(poison(np.empty_like(a))) for a in (case.k, case.v)]
        cupyattn.kv_append(xp.array(new), xp.array(new), *caches, **arrays)
        return [xp.numpy(cache) for cache in caches]

    for lists in names:
        want = append(lists)
        for name in lists:
            for number in (*NUMBERS, *((2**62, -2**63) if name == "slots" else ())):
                got = append(lists, **{name: changed(where[name], 1, number)})
                if name in ("ids", "indptr"):
                    continue
                for found, right in zip(got, want, strict=True):   # without token 1, or as it was
                    differs = (found != right) & ~(np.isnan(found) & np.isnan(right))
                    assert differs.sum() in (0, KV_HEADS * HEAD_DIM)
                    assert np.isnan(found[differs]).all()


def test_kv_flatten(xp, case):
    where = {"cache_seqlens": LENGTHS, "cu_seqlens_k": case.cu_seqlens_k, "ids": case.ids, "indptr": case.indptr}

    def flatten(**replaced):
        arrays = {name: xp.array(replaced.get(name, right)) for name, right in where.items()}
        table = cupyattn.PageTable.csr(arrays.pop("ids"), arrays.pop("indptr"))
        out = [xp.array(np.zeros_like(case.ragged[0])) for _ in "kv"]
        cupyattn.kv_flatten(xp.array(case.k), xp.array(case.v), block_table=table, **arrays, out=tuple(out))
        return [xp.numpy(a) for a in out]

    want = flatten()
    for number in NUMBERS:
        for name, at, kept in (("cache_seqlens", 1, (0, 2, 3)), ("ids", 7, (0, 2, 3)), ("indptr", 2, (0, 3)),
                               ("cu_seqlens_k", 2, ()), ("cu_seqlens_k", 4, ()), ("cu_seqlens_k", 0, ())):
            got = flatten(**{name: changed(where[name], at, number)})
            for b in kept:
                rows = slice(case.cu_seqlens_k[b], case.cu_seqlens_k[b + 1])
                for found, right in zip(got, want, strict=True):
                    assert_same_bits(found[rows], right[rows])


@pytest.mark.parametrize("policy", [{}, {"invariant": True}, {"num_splits": 5}], ids=str)
def test_schedule(xp, policy):
    """Lists stay inside their arrays."""
    right = {"cache_seqlens": LENGTHS, "cu_seqlens_q": STARTS, "cache_starts": np.zeros(4, np.int32),
             "key_offsets": np.zeros(4, np.int32), "key_counts": LENGTHS}
    for seed in range(12):
        generator = np.random.default_rng(seed)
        arrays = {name: xp.array(wild(generator, a)) for name, a in right.items()}
        made = cupyattn.schedule(arrays.pop("cache_seqlens"), **arrays, num_heads=HEADS, num_kv_heads=KV_HEADS,
                                 head_dim=HEAD_DIM, max_q_len=32, max_k_len=96, num_tokens=24, **policy)
        for work in (made.decode, made.prefill):
            ends = xp.numpy(work.worker_items)
            assert ends[0] >= 0 and (np.diff(ends) >= 0).all() and ends[-1] <= len(work.items)
