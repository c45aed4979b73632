# SPDX-License-Identifier: Apache-2.0
"""TPContext: heads dealt out to ranks, shards of the projections, and the lists of Params.prep_tp."""

import numpy as np
import pytest
from compare import assert_same_bits

from cupyattn import InProcessCommunicator, PagedParams, Params, QMatrix, TPContext, split_heads

RNG = np.random.default_rng(3)


def context(size=3, *, num_heads=16, num_kv_heads=8, head_dim=8, hidden_size=96, **options):
    return TPContext(InProcessCommunicator(size), num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
                     hidden_size=hidden_size, **options)


def test_split_heads():
    assert split_heads(8, [24, 8]) == [6, 2]
    assert split_heads(8, [1, 1, 1]) == [3, 3, 2]
    assert split_heads(7, [1, 1]) == [4, 3]
    assert split_heads(8, [1, 0, 1]) == [4, 0, 4]
    assert split_heads(3, [0.4, 0.35, 0.25]) == [1, 1, 1]
    assert split_heads(10, [5.9, 2.05, 2.05]) == [6, 2, 2]
    for heads in range(20):
        for weights in ([1], [1, 2, 3], [0.1] * 7, [1e-9, 1], [3, 3, 1]):
            counts = split_heads(heads, weights)
            assert sum(counts) == heads
            assert all(abs(c - heads * w / sum(weights)) < 1 for c, w in zip(counts, weights, strict=True))
    for weights in ([], [0, 0], [-1, 2], [float("nan")], [float("inf")], [1e308, 1e308]):
        with pytest.raises(ValueError, match="split_heads: weights must be numbers of at least 0, not all 0"):
            split_heads(4, weights)
    with pytest.raises(TypeError, match="split_heads: num_heads must be an integer"):
        split_heads(4.0, [1])
    for weights, message in (("24", "a sequence of numbers, got '24'"), (3, "a sequence of numbers, got 3"),
                             (["24", "8"], "numbers, got '24'"), ([1, None], "numbers, got None"),
                             ([True, 1], "numbers, got True")):
        with pytest.raises(TypeError, match=f"split_heads: weights must be {message}"):
            split_heads(4, weights)
    assert split_heads(8, np.float32([24, 8])) == split_heads(8, (n for n in (24, 8))) == [6, 2]


def test_heads_of_ranks():
    three = context(3)
    assert (three.kv_heads, three.q_heads) == ([3, 3, 2], [6, 6, 4])
    assert three.kv_split == [("cpu", 0, 3), ("cpu", 3, 6), ("cpu", 6, 8)]
    assert three.q_split == [("cpu", 0, 6), ("cpu", 6, 12), ("cpu", 12, 16)]
    assert three.heads(2, "q") == (12, 16)
    assert context(2, weights=[24, 8]).kv_heads == [6, 2]
    assert context(2, num_heads=7, num_kv_heads=7).q_heads == [4, 3]
    assert "heads 6+6+4, KV heads 3+3+2 of 8, hidden_size 96" in repr(three)


WEIGHTS = {
    "float16": lambda w: QMatrix.from_dense(w.astype(np.float16)), "array": lambda w: w.astype(np.float32),
    "int4-g32": lambda w: QMatrix.quantize(w, "int4-g32"), "mxfp4": lambda w: QMatrix.quantize(w, "mxfp4"),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(("size", "options"), [(2, {}), (3, {}), (2, {"num_heads": 7, "num_kv_heads": 7}),
                                               (2, {"weights": [24, 8]})])
def test_shards_of_projections(name, size, options):
    """Heads of 8 dims, borders that are no sixteens: the ranks' parts are the whole."""
    tp = context(size, **options)
    q_size, kv_size, hidden = 8 * tp.num_heads, 8 * tp.num_kv_heads, tp.hidden_size
    ranks = range(size)

    def values(weight):
        return weight.reconstruct() if isinstance(weight, QMatrix) else weight

    for kind, features in (("q", q_size), ("kv", kv_size)):
        weight = WEIGHTS[name](RNG.standard_normal((features, hidden)).astype(np.float32))
        parts = [tp.shard_rows(weight, rank, kind) for rank in ranks]
        assert [part.shape[0] for part in parts] == [8 * n for n in (tp.q_heads if kind == "q" else tp.kv_heads)]
        assert_same_bits(np.concatenate([values(part) for part in parts]), values(weight))
    weight = WEIGHTS[name](RNG.standard_normal((hidden, q_size)).astype(np.float32))
    parts = [tp.shard_columns(weight, rank) for rank in ranks]
    assert_same_bits(np.concatenate([values(part) for part in parts], axis=1), values(weight))
    parts = [tp.shard_output_rows(weight, rank) for rank in ranks]
    assert [part.shape[0] for part in parts] == [stop - start for start, stop in map(tp.hidden_range, ranks)]
    assert_same_bits(np.concatenate([values(part) for part in parts]), values(weight))


def test_shards_of_what_heads_have():
    tp = context(3)
    norm, bias, sinks = RNG.random((8, 8)), RNG.random(128), RNG.random(16)
    assert_same_bits(np.concatenate([tp.shard_heads(norm, rank, "kv") for rank in range(3)]), norm)
    assert_same_bits(np.concatenate([tp.shard_heads(bias, rank, "q") for rank in range(3)]), bias)
    assert_same_bits(tp.shard_heads(sinks, 2, "q"), sinks[12:])
    assert tp.shard_heads(None, 0, "q") is None
    with pytest.raises(ValueError, match=r"TPContext: array must be \[16 heads, ...\] or \[128, ...\], got \[9\]"):
        tp.shard_heads(np.ones(9), 0, "q")
    for array, error, message in ((np.ones(9), ValueError, r"sinks must be \[8 heads, ...\] or \[64, ...\], got \[9\]"),
                                  (np.float32(1), TypeError, "sinks must be a NumPy or CuPy array, got float32"),
                                  (np.array(1.0), ValueError, "sinks must be .*, got \\[\\]"),
                                  ([1.0] * 8, TypeError, "sinks must be a NumPy or CuPy array, got list")):
        with pytest.raises(error, match=f"TPContext: {message}"):
            tp.shard_heads(array, 0, "kv", name="sinks")


def test_prep_tp(xp):
    """Params' lists, one entry for each rank of this process, where the rank has its arrays."""
    device = None if xp.name == "numpy" else 0
    tp = TPContext(InProcessCommunicator(3, device=device), num_heads=16, num_kv_heads=8, head_dim=8, hidden_size=96)
    params = Params(2, 3, 4, position_offsets=[[-1], [0]])
    params.prep_tp(tp)
    for past, offsets in zip(params.past_len_tp, params.position_offsets_tp, strict=True):
        assert isinstance(past, xp.module.ndarray) and xp.numpy(past).tolist() == [4, 4]
        assert xp.numpy(offsets).tolist() == [[-1], [0]]
    paged = PagedParams(2, [[0, 1], [3, 2]], [5, 0], 5, page_size=4, q_len=2)
    paged.prep_tp(tp)
    assert len(paged.block_index_tp) == 3
    for table, before, after in zip(paged.block_index_tp, paged.cache_seqlens_tp, paged.cache_seqlens_after_tp,
                                    strict=True):
        assert isinstance(table, xp.module.ndarray)
        assert xp.numpy(table).tolist() == [[0, 1], [3, 2]]
        assert (xp.numpy(before).tolist(), xp.numpy(after).tolist()) == ([5, 0], [7, 2])


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: context(3, num_heads=2, num_kv_heads=2), NotImplementedError, r"every rank a KV head, got \[1, 1, 0\]"),
    (lambda: context(2, weights=[1, 0]), NotImplementedError, r"every rank a KV head, got \[8, 0\]"),
    (lambda: context(2, weights=[1]), ValueError, "weights must hold one for each of the 2 ranks, got 1"),
    (lambda: context(2, num_heads=12), ValueError, "num_heads must be a multiple of num_kv_heads, got 12 and 8"),
    (lambda: context(2, head_dim=0), ValueError, "head_dim must be"),
    (lambda: TPContext(2, num_heads=1, num_kv_heads=1, head_dim=8, hidden_size=8), TypeError,
     "communicator must be a Communicator, got int"),
    (lambda: context(2).heads(2, "q"), ValueError, "rank must be from 0 to 1, got 2"),
    (lambda: context(2).heads(1, "k"), ValueError, "kind must be 'q' or 'kv', got 'k'"),
    (lambda: context(2).shard_rows(np.ones((3, 4)), 0, "q"), ValueError, r"= \[128, 96\], got \[3, 4\]"),
    (lambda: context(2).shard_columns(np.ones((3, 4)), 0), ValueError, r"= \[96, 128\], got \[3, 4\]"),
    (lambda: context(2).shard_rows([1], 0, "q"), TypeError, "weight must be a NumPy or CuPy array, got list"),
])
def test_refused(call, error, message):
    with pytest.raises(error, match=f"TPContext: .*{message}"):
        call()
