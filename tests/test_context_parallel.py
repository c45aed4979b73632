# SPDX-License-Identifier: Apache-2.0
"""Context parallelism in one process: a list of shards gives what one rank gives."""

import numpy as np
import pytest
from compare import assert_close, assert_same_bits
from conftest import NumpyArrays
from mpi_ranks import run
from turbomind_float64 import ATTENDED, Layer

import cupyattn
from cupyattn import BlockIteratorParams, InProcessCommunicator, LinearIteratorParams, RopeParams

NUMPY = NumpyArrays()
PAIRS = RopeParams(rotary_dim=32, style="interleaved")
SMALL = dict(num_heads=8, num_kv_heads=2, head_dim=32, rope=PAIRS, block_len=16)


def whole(layer, new):
    """Blocks of one rank that holds everything, filled by process_kv, and its output."""
    pool = layer.pool.copy()
    cupyattn.process_kv(layer.params(NUMPY, pool, layer.k_lens, finished=None))
    return pool, cupyattn.invoke_attention(layer.params(NUMPY, pool, new))


class Shards:
    """The ranks of a layer, each with blocks for its own tokens."""

    def __init__(self, layer, xp, cp_size, contiguous=False):
        self.layer, self.xp, self.cp_size = layer, xp, cp_size
        self.lens = [cupyattn.round_robin(layer.k_lens, r, cp_size)[0] for r in range(cp_size)]
        self.offsets = None
        if contiguous:
            self.offsets, self.lens = cupyattn.contiguous_shards(layer.k_lens, cp_size)
        self.pools, self.blocks = [], []
        for lens in self.lens:
            counts = -(-lens // layer.block_len)
            ids = layer.rng.permutation(counts.sum() + 1)
            table = np.zeros((len(lens), max(counts.max(), 1)), np.int32)
            table[np.arange(table.shape[1]) < counts[:, None]] = ids[:counts.sum()]
            pool = xp.array(np.full((len(ids), layer.layers * layer.layer_bytes), 0xFF, np.uint8))
            self.pools.append(pool)
            self.blocks.append(BlockIteratorParams.from_pool(pool, table, counts, layer_id=layer.layer_id,
                                                             block_len=layer.block_len))

    def params(self, new, k_lens=None, **changes):
        """AttentionParams of every rank."""
        found = []
        for r in range(self.cp_size):
            fields = {"cp_rank": r, "cp_size": self.cp_size}
            if self.offsets is not None:   # only tokens of the shard that exist yet
                k = self.layer.k_lens if k_lens is None else np.asarray(k_lens)
                counts = np.clip(k - self.offsets[r], 0, self.lens[r]).astype(np.int32)
                fields = {"cp_offsets": self.xp.array(self.offsets[r]), "cp_counts": self.xp.array(counts)}
            found.append(self.layer.params(self.xp, self.pools[r], new, k_lens, block_iter_params=self.blocks[r],
                                           **fields | changes).with_partials(changes.get("max_split_k", 2)))
        return found

    def append(self, new, k_lens=None):
        for params in self.params(new, k_lens, finished=None):
            cupyattn.process_kv(params)


def test_owners():
    """Nine tokens on two ranks."""
    for rank, tokens in enumerate(([0, 2, 4, 6, 8], [1, 3, 5, 7])):
        lens, rows = cupyattn.round_robin([9], rank, 2)
        assert lens.tolist() == [len(tokens)] and rows.tolist() == tokens
    lens, rows = cupyattn.round_robin(np.int32([3, 0, 5]), 1, 3)
    assert lens.tolist() == [1, 0, 2] and rows.tolist() == [1, 4, 7]
    for cp_size in (1, 2, 3, 7, 32):
        parts = [cupyattn.round_robin([13, 1, 100], r, cp_size) for r in range(cp_size)]
        assert sum(lens for lens, _ in parts).tolist() == [13, 1, 100]
        assert sorted(np.concatenate([rows for _, rows in parts])) == list(range(114))
        offsets, counts = cupyattn.contiguous_shards([13, 1, 100], cp_size)
        assert counts.sum(0).tolist() == [13, 1, 100] and (counts >= 0).all()
        assert (offsets[1:] == (offsets + counts)[:-1]).all() and (offsets[0] == 0).all()


@pytest.mark.parametrize("contiguous", [False, True], ids=["round-robin", "contiguous"])
@pytest.mark.parametrize("cp_size", [2, 4, 8])
@pytest.mark.parametrize("options", [
    dict(dtype="float32", window=50, sinks=True), dict(policy=8, sinks=True)], ids=["plain", "int8"])
def test_ranks_give_what_one_gives(options, cp_size, contiguous):
    layer = Layer((1, 300, 77), **SMALL, **options)
    new = (1, 1, 1)
    pool, one = whole(layer, new)
    shards = Shards(layer, NUMPY, cp_size, contiguous)
    history = layer.k_lens - 1
    shards.append(history, history)
    ranks = shards.params(new)
    for params in ranks:
        assert cupyattn.invoke_decoding(params) is not None
        assert (params.split_cnt >= 1).all()
    out, lse = cupyattn.merge_shards(ranks, return_lse=True)
    assert_close(out, layer.attended(pool, new), *ATTENDED[layer.dtype])
    atol, rtol = ATTENDED[layer.dtype]
    assert_close(out, one.astype(np.float64), 2 * atol, 2 * rtol)
    assert np.isfinite(lse).all()
    # every rank holds its own tokens, in their order, bit by bit what one rank holds
    for r, params in enumerate(ranks):
        for b in range(len(layer.k_lens)):
            mine = np.arange(shards.lens[r][b])
            tokens = mine + shards.offsets[r][b] if contiguous else mine * cp_size + r
            found = cupyattn.create_cache_iter_factory(params)
            expected = cupyattn.create_cache_iter_factory(layer.params(NUMPY, pool, new))
            for h in range(layer.kv_heads):
                for side in ("key_address", "value_address"):
                    at = getattr(found, side)(b, h, mine) - shards.pools[r].ctypes.data
                    want = getattr(expected, side)(b, h, tokens) - pool.ctypes.data
                    row = np.arange(layer.row)
                    assert_same_bits(shards.pools[r].reshape(-1)[at[:, None] + row],
                                     pool.reshape(-1)[want[:, None] + row])


def test_on_the_device(xp):
    layer = Layer((5, 130), **SMALL, dtype="float32", sinks=True)
    new = (1, 1)
    pool, _ = whole(layer, new)
    shards = Shards(layer, xp, 4)
    shards.append(layer.k_lens - 1, layer.k_lens - 1)
    ranks = shards.params(new)
    for params in ranks:
        cupyattn.invoke_decoding(params)
    assert_close(xp.numpy(cupyattn.merge_shards(ranks)), layer.attended(pool, new), *ATTENDED["float32"])


@pytest.mark.parametrize("contiguous", [False, True], ids=["round-robin", "contiguous"])
def test_prefill_over_ranks(contiguous):
    """Chunked prefill: new tokens fall on all ranks; the linear buffer of a rank holds its tokens."""
    layer = Layer((40, 3, 150), **SMALL, dtype="float32", sinks=True)
    new = (20, 3, 33)
    pool, _ = whole(layer, new)
    shards = Shards(layer, NUMPY, 3, contiguous)
    shards.append(layer.k_lens - new, layer.k_lens - new)
    shards.append(new)
    want = layer.attended(pool, new)
    ranks = shards.params(new)
    for params in ranks:
        cupyattn.invoke_attention(params)
    assert_close(cupyattn.merge_shards(ranks), want, *ATTENDED["float32"])
    total = int(layer.k_lens.sum())
    flat = []
    for params in ranks:
        linear = LinearIteratorParams.empty(2, total, 32, dtype=np.float32)
        linear.kv_cache[...] = np.nan
        params = params.replace(linear_iter_params=linear)
        cupyattn.flatten_kv(params)
        cupyattn.invoke_attention(params)
        flat.append(params)
    assert_close(cupyattn.merge_shards(flat), want, *ATTENDED["float32"])


def test_empty_ranks_and_sinks_once():
    """More ranks than tokens, and a window that hides all of rank 0's."""
    layer = Layer((2, 10, 1), **SMALL, window=2, sinks=True, dtype="float32")
    new = (1, 1, 1)
    pool, _ = whole(layer, new)
    want = layer.attended(pool, new)
    for cp_size in (8, 16):
        for contiguous in (False, True):
            shards = Shards(layer, NUMPY, cp_size, contiguous)
            shards.append(layer.k_lens)
            ranks = shards.params(new)
            for params in ranks:
                cupyattn.invoke_attention(params)
            assert_close(cupyattn.merge_shards(ranks), want, *ATTENDED["float32"])
            _, lse = cupyattn.rank_result(ranks[-1])
            assert np.isneginf(lse[2]).all()


def test_finished_sequences():
    layer = Layer((20, 30), **SMALL, dtype="float32", finished=[True, False], sinks=True)
    pool, _ = whole(layer, (1, 1))
    shards = Shards(layer, NUMPY, 2)
    shards.append(layer.k_lens - 1, layer.k_lens - 1)
    before = [p.copy() for p in shards.pools]
    ranks = shards.params((1, 1))
    for params in ranks:
        cupyattn.invoke_decoding(params)
    out, lse = cupyattn.merge_shards(ranks, return_lse=True)
    assert_close(out, layer.attended(pool, (1, 1)), *ATTENDED["float32"])
    assert (out[0] == 0).all() and np.isneginf(lse[0]).all()
    changed = [(a != b).sum() for a, b in zip(before, shards.pools, strict=True)]
    assert changed[0] == 0 and changed[1] > 0   # token 29 is rank 1's


def decoded_by(communicator, xp=NUMPY):
    """(output, lse) of a layer whose tokens are dealt out to the ranks of a communicator."""
    layer = Layer((1, 300, 77), **SMALL, dtype="float32", sinks=True)
    shards = Shards(layer, xp, communicator.size)
    shards.append(layer.k_lens - 1, layer.k_lens - 1)
    mine = [params for r, params in enumerate(shards.params((1, 1, 1))) if r in communicator.ranks]
    for params in mine:
        cupyattn.invoke_decoding(params)
    return cupyattn.merge_shards(mine, communicator=communicator, return_lse=True)


def test_merged_over_a_communicator(tmp_path, xp):
    layer = Layer((1, 300, 77), **SMALL, dtype="float32", sinks=True)
    pool, _ = whole(layer, (1, 1, 1))
    one = InProcessCommunicator(3, device=None if xp.name == "numpy" else 0)
    out, lse = map(xp.numpy, decoded_by(one, xp))
    assert_close(out, layer.attended(pool, (1, 1, 1)), *ATTENDED["float32"])
    if xp.name == "numpy":
        for result in run("context_parallel", 3, tmp_path):
            assert_same_bits(result["out"], out)
            assert_same_bits(result["lse"], lse)


def test_given_output_and_errors():
    layer = Layer((20,), **SMALL, dtype="float32")
    shards = Shards(layer, NUMPY, 2)
    shards.append(layer.k_lens)
    ranks = shards.params((1,), out=np.zeros((1, 8, 32), np.float32))
    for params in ranks:
        cupyattn.invoke_attention(params)
    assert cupyattn.merge_shards(ranks) is ranks[0].out
    place = np.zeros_like(ranks[0].out)
    assert cupyattn.merge_shards(ranks, out=place) is place
    assert_same_bits(place, ranks[0].out)
    with pytest.raises(TypeError, match="merge_shards: shards must be a list of AttentionParams"):
        cupyattn.merge_shards(ranks[0])
    for i, wrong in enumerate(([1], [ranks[0], None])):
        with pytest.raises(TypeError, match=rf"^merge_shards: shards\[{i}\] must be an AttentionParams, got "):
            cupyattn.merge_shards(wrong)
    with pytest.raises(ValueError, match=r"merge_shards: shards\[1\] must have the softmax_scale of the first"):
        cupyattn.merge_shards([ranks[0], ranks[1].replace(inv_sqrt_dh=1.0)])
    with pytest.raises(ValueError, match=r"merge_shards: shards must be a list of one for each .* \[0, 1, 2\], got 2"):
        cupyattn.merge_shards(ranks, communicator=InProcessCommunicator(3))
    with pytest.raises(TypeError, match="merge_shards: communicator must be a Communicator, got int"):
        cupyattn.merge_shards(ranks, communicator=2)
    with pytest.raises(ValueError, match="reduce_split_k: cp_size must be 1"):
        cupyattn.reduce_split_k(ranks[0])
    bare = ranks[0].replace(split_cnt=None, partial_O=None, partial_ML=None)
    for call in (cupyattn.invoke_decoding, cupyattn.invoke_attention):
        with pytest.raises(ValueError, match=f"{call.__name__}: partial_O must be given with context parallelism"):
            call(bare)
    for call, words in ((lambda: cupyattn.round_robin([3], 2, 2), "cp_rank must be below cp_size 2"),
                        (lambda: cupyattn.round_robin([-3], 0, 2), "lengths must be integers"),
                        (lambda: cupyattn.contiguous_shards([3], 0), "cp_size must be an int32 of at least 1")):
        with pytest.raises(ValueError, match=words):
            call()


def test_negative_offsets_are_refused():
    q, cache = np.zeros((1, 2, 8), np.float32), np.zeros((2, 16, 2, 8), np.float32)
    with pytest.raises(ValueError, match="attention: key_offsets must be ≥ 0, got -3"):
        cupyattn.attention(q, cache, cache, cu_seqlens_q=np.int32([0, 1]), block_table=np.int32([[0, 1]]),
                           cache_seqlens=np.int32([20]), key_offsets=np.int32([-3]), key_counts=np.int32([20]))
