# SPDX-License-Identifier: Apache-2.0
"""TurboMind's entry points against a float64 layer that reads the blocks byte by byte."""

import numpy as np
import pytest
from compare import assert_close, assert_same_bits
from conftest import NumpyArrays
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_split_reduce import turbomind_merge
from turbomind_float64 import ATTENDED, Layer

import cupyattn
from cupyattn import LinearIteratorParams, RopeParams
from cupyattn.runtime.cpu import settings

NUMPY = NumpyArrays()
LENGTHS = (1, 150, 64, 97)
NEOX = RopeParams(rotary_dim=64, base=1e4)
PAIRS = RopeParams(rotary_dim=64, base=1e4, style="interleaved")
rng = np.random.default_rng(5)
MROPE = [rng.integers(0, 300, (3, n)) for n in LENGTHS]

# few kernels: six pairs of activations and cache format, four query heads per KV head but in one case
CASES = {
    "plain": dict(rope=PAIRS),
    "no bias, no rope": dict(bias=False, dtype="float32"),
    "int8": dict(policy=8, rope=PAIRS, sinks=True),
    "int8 and a window": dict(policy=8, rope=NEOX, window=33),
    "int4": dict(policy=4, dtype="bfloat16", rope=PAIRS, block_len=64, layers=3, layer_id=1, sinks=True, window=70),
    "fp8 e4m3": dict(policy=16, dtype="float32", rope=NEOX, num_heads=12, num_kv_heads=3),
    "fp8 e5m2": dict(policy=17, rope=PAIRS, layers=2, layer_id=1),
    "wide rows": dict(rope=PAIRS, extra=512, dtype="float32"),
    "partial rope": dict(rope=RopeParams(rotary_dim=24, style="interleaved"), dtype="float32"),
    "yarn": dict(rope=RopeParams(rotary_dim=64, base=150000.0, scaling="yarn", factor=32.0, original_max_position=4096,
                                 truncate=False), sinks=True, window=40, num_heads=4, num_kv_heads=1),
    "llama3": dict(rope=RopeParams(rotary_dim=64, base=5e5, scaling="llama3", factor=8.0, original_max_position=64)),
    "linear": dict(rope=RopeParams(rotary_dim=64, scaling="linear", factor=4.0), dtype="float32", block_len=5),
    "rope_theta": dict(rope=PAIRS, theta=[1e4, 5e3, 1e6, 3e4], dtype="float32"),
    "dynamic": dict(rope=RopeParams(rotary_dim=64, scaling="dynamic", factor=2.0, original_max_position=32),
                    prompt_len=[1, 140, 64, 12], dtype="float32"),
    "longrope": dict(rope=RopeParams(rotary_dim=64, scaling="longrope", factor=4.0, original_max_position=64,
                                     short_factor=[1.0] * 32, long_factor=[1.0 + j for j in range(32)]),
                     prompt_len=[1, 140, 64, 65]),
    "mrope": dict(rope=RopeParams(rotary_dim=64, mrope_section=(8, 12, 12)), positions=MROPE, dtype="float32"),
    "mrope interleaved": dict(rope=RopeParams(rotary_dim=64, mrope_section=(12, 10, 10), mrope_interleaved=True),
                              positions=MROPE),
    "log-n": dict(rope=PAIRS, logn=40, dtype="float32"),
    "finished": dict(rope=PAIRS, policy=8, finished=[False, True, False, True]),
    "scale": dict(rope=PAIRS, scale=0.15, sinks=True, dtype="float32", num_heads=2, num_kv_heads=2, head_dim=128),
}


def on_all(name, values, on_standin):
    """Parameters (xp, name): everything on NumPy and on a GPU, a few on the stand-in, where kernels build slowly."""
    gpu = pytest.mark.gpu
    return pytest.mark.parametrize(("xp", name), [
        *(("numpy", v) for v in values), *(("standin", v) for v in on_standin),
        *(pytest.param("cupy", v, marks=gpu) for v in values)], indirect=["xp"])


def filled(layer, xp, new):
    """An array of the layer's blocks with everything in them but the `new` tokens, stored by process_kv."""
    pool = xp.array(layer.pool)
    history = layer.k_lens - np.array(new)
    if history.any():
        cupyattn.process_kv(layer.params(xp, pool, history, history, finished=None, prompt_len=layer.prompt_len))
    return pool


def snapshot(xp, params):
    names = ("q", "k", "v", "q_bias", "k_bias", "v_bias", "cu_q_len", "cu_k_len", "sinks", "rope_theta")
    return {name: xp.numpy(getattr(params, name)) for name in names if getattr(params, name) is not None}


@on_all("name", CASES, on_standin=("plain", "int8", "rope_theta", "mrope", "log-n"))
def test_decoding(xp, name):
    """One new token per sequence: what is stored, what is attended to, what is left alone."""
    layer = Layer(LENGTHS, **CASES[name])
    new = (1, 1, 1, 1)
    pool = filled(layer, xp, new)
    before = xp.numpy(pool)
    params = layer.params(xp, pool, new)
    inputs = snapshot(xp, params)
    out = xp.numpy(cupyattn.invoke_decoding(params))
    after = xp.numpy(pool)
    layer.check_stored(after, [range(n - 1 if done else n) for n, done in zip(LENGTHS, layer.finished, strict=True)])
    assert_close(out, layer.attended(after, new), *ATTENDED[layer.dtype])
    for field, value in snapshot(xp, params).items():
        assert_same_bits(value, inputs[field])
    changed = (before != after).sum()
    assert 0 < changed <= (~layer.finished).sum() * layer.layer_bytes / layer.block_len


@pytest.mark.parametrize("name", CASES)
def test_prefill(name):
    """process_kv, then attention over the blocks and, after flatten_kv, over the linear buffer."""
    xp, layer = NUMPY, Layer(LENGTHS, **CASES[name])
    new = (1, 37, 64, 3)
    pool = filled(layer, xp, new)
    params = layer.params(xp, pool, new, out=np.full((sum(new), layer.heads, layer.dim), np.nan, layer.type))
    cupyattn.process_kv(params)
    layer.check_stored(pool, [range(n - m if done else n) for n, m, done in zip(LENGTHS, new, layer.finished,
                                                                               strict=True)])
    if layer.finished.any():
        for b, done in enumerate(layer.finished):   # readable numbers, seen by nobody
            if done:
                pool[layer.table[b, :layer.block_counts[b]]] = 0
    before = pool.copy()
    out = cupyattn.invoke_attention(params)
    assert out is params.out
    want = layer.attended(pool, new)
    assert_close(out, want, *ATTENDED[layer.dtype])
    total = sum(LENGTHS)
    linear = LinearIteratorParams.empty(layer.kv_heads, total + 64, layer.dim, dtype=layer.type)
    linear.kv_cache[...] = np.nan
    params = params.replace(linear_iter_params=linear, out=None)
    cupyattn.flatten_kv(params)
    assert np.isnan(linear.kv_cache[:, :, total:].astype(np.float32)).all()
    # dequantized numbers are rounded to the activations' dtype
    atol, rtol = ATTENDED[layer.dtype]
    allowed = (2 * atol, 2 * rtol) if layer.policy else (atol, rtol)
    assert_close(cupyattn.invoke_attention(params.replace(k=None, v=None, block_iter_params=None)), want, *allowed)
    assert_same_bits(pool, before)


def test_linear_buffer(xp):
    """flatten_kv writes every token's row, and attention reads them where they are."""
    layer = Layer((5, 0, 70), policy=8, rope=PAIRS)
    new = (2, 0, 40)
    pool = filled(layer, xp, (0, 0, 0))
    linear = LinearIteratorParams.from_array(xp.array(np.full((2, 2, 75, 64), np.nan, np.float16)))
    params = layer.params(xp, pool, new, linear_iter_params=linear)
    cupyattn.flatten_kv(params)
    rows, host = xp.numpy(linear.kv_cache), xp.numpy(pool)
    for value in (0, 1):
        want = np.concatenate([layer.stored(host, b, value)[0] for b in range(3)])
        assert_close(rows[:, value].transpose(1, 0, 2), want, 1e-6, 2.0**-11 * 1.01)
    out = cupyattn.invoke_attention(params.replace(k=None, v=None, block_iter_params=None))
    assert_close(xp.numpy(out), layer.attended(host, new), 2e-3, 2.0**-10)


def test_several_new_tokens_per_sequence(xp):
    """Speculative decoding: the new tokens see each other causally."""
    layer = Layer(LENGTHS, rope=PAIRS, policy=8, sinks=True)
    new = (1, 4, 0, 3)
    pool = filled(layer, xp, new)
    out = cupyattn.invoke_decoding(layer.params(xp, pool, new))
    layer.check_stored(xp.numpy(pool))
    assert_close(xp.numpy(out), layer.attended(xp.numpy(pool), new), *ATTENDED["float16"])


def test_not_causal():
    layer = Layer((40, 17), causal=False, rope=PAIRS, dtype="float32")
    pool = filled(layer, NUMPY, (0, 0))
    out = cupyattn.invoke_attention(layer.params(NUMPY, pool, (9, 17)))
    assert_close(out, layer.attended(pool, (9, 17)), *ATTENDED["float32"])


def test_parts_of_a_batch_share_their_buffers():
    """Decode and prefill group: cu_q_len of the second starts past 0, and both write their rows of one out."""
    layer = Layer((30, 41, 50), rope=PAIRS, dtype="float32")
    new = (1, 1, 50)
    pool = filled(layer, NUMPY, new)
    out = np.full((52, 8, 64), np.nan, np.float32)
    whole = layer.params(NUMPY, pool, new, out=out)
    blocks = whole.block_iter_params

    def part(first, last):
        starts = blocks.cu_block_nums[first:last + 1]
        return whole.replace(
            cu_q_len=whole.cu_q_len[first:last + 1], cu_k_len=whole.cu_k_len[first:last + 1],
            block_iter_params=cupyattn.BlockIteratorParams(blocks.block_ptrs, starts, block_len=16, buffers=[pool]))

    assert cupyattn.invoke_decoding(part(0, 2)) is out
    assert np.isnan(out[2:]).all() and not np.isnan(out[:2]).any()
    cupyattn.process_kv(part(2, 3))
    cupyattn.invoke_attention(part(2, 3))
    assert_close(out, layer.attended(pool, new), *ATTENDED["float32"])


def test_next_layer_reuses_the_step():
    layers = [Layer((33, 5), rope=PAIRS, policy=8, layers=2, layer_id=i) for i in range(2)]
    pool = layers[0].pool.copy()
    for layer in layers:   # the same tokens in both layers: their bytes must not touch
        history = layer.k_lens - 1
        cupyattn.process_kv(layer.params(NUMPY, pool, history, history))
    params = layers[0].params(NUMPY, pool, (1, 1))
    first = cupyattn.invoke_decoding(params)
    second = cupyattn.invoke_decoding(params.replace(block_iter_params=params.block_iter_params.at_layer(1)))
    assert_same_bits(first, second)
    for layer in layers:
        layer.check_stored(pool)


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 9)), min_size=1, max_size=5),
       block_len=st.integers(1, 70), window=st.sampled_from([0, 0, 1, 17, 64]), splits=st.integers(0, 4),
       finished=st.lists(st.booleans(), min_size=5, max_size=5), seed=st.integers(0, 99))
def test_ragged_batches(lengths, block_len, window, splits, finished, seed):
    """Contexts and numbers of new tokens of any size, nothing at all among them."""
    k_lens, new = [n for n, _ in lengths], [min(n, m) for n, m in lengths]
    layer = Layer(k_lens, dtype="float32", head_dim=32, rope=RopeParams(rotary_dim=32, style="interleaved"), sinks=True,
                  window=window, block_len=block_len, finished=finished[:len(k_lens)], seed=seed)
    pool = filled(layer, NUMPY, new)
    params = layer.params(NUMPY, pool, new)
    if splits:
        params = params.replace(num_splits=splits, max_split_k=4).with_partials()
    out = cupyattn.invoke_decoding(params)
    if sum(new):
        assert_close(out, layer.attended(pool, new), *ATTENDED["float32"])


def test_blocks_that_sequences_share(xp):
    """A prefix cache: leading blocks in common are attended to once, by the step's schedule."""
    layer = Layer((300, 270, 260, 90), num_heads=4, num_kv_heads=1, block_len=64, bias=False, sinks=True)
    for b in (1, 2):
        layer.tokens[b][:256], layer.table[b, :4] = layer.tokens[0][:256], layer.table[0, :4]
    pool = xp.array(layer.pool)
    history = layer.k_lens - 1
    cupyattn.process_kv(layer.params(xp, pool, (299, 13, 3, 89), history))
    params = layer.params(xp, pool, (1, 1, 1, 1))
    out = cupyattn.invoke_decoding(params)
    assert_close(xp.numpy(out), layer.attended(xp.numpy(pool), (1, 1, 1, 1)), *ATTENDED["float16"])
    (_, schedule), = params.step.schedules.values()
    assert len(schedule.decode.members) == (0 if xp.name == "numpy" else 3)   # CUDA cores: it would not pay
    again = params.replace(q=params.q)
    assert_same_bits(xp.numpy(cupyattn.invoke_decoding(again)), xp.numpy(out))
    assert again.step.schedules is params.step.schedules and len(again.step.schedules) == 1


def test_other_blocks_get_a_schedule_of_their_own():
    """Blocks that sequences share, then others that they do not, each at the place in memory of the ones before."""
    pool = rng.standard_normal((120, 1, 2, 64, 64)).astype(np.float32)
    shared = np.stack([np.r_[np.arange(8), [10 + 2 * b, 11 + 2 * b]] for b in range(8)])
    apart = np.arange(80).reshape(8, 10) + 40
    given = dict(q=rng.standard_normal((8, 1, 64)).astype(np.float32), num_kv_heads=1,
                 cu_q_len=np.arange(9, dtype=np.int32), cu_k_len=np.arange(0, 5400, 600, dtype=np.int32))

    def blocks(table):
        return cupyattn.BlockIteratorParams.from_pool(pool, table)

    want = [cupyattn.invoke_attention(cupyattn.AttentionParams(**given, block_iter_params=blocks(table)))
            for table in (shared, apart)]
    params = cupyattn.AttentionParams(**given, block_iter_params=blocks(shared))
    for i in rng.integers(0, 2, 60):
        params = params.replace(block_iter_params=blocks((shared, apart)[i]))
        out = cupyattn.invoke_attention(params)
        assert_same_bits(out, want[i])
        assert len(params.step.schedules) <= 16
    first = params
    for _ in range(20):   # the object still has its own schedule, of which a graph may know the addresses
        cupyattn.invoke_attention(params.replace(block_iter_params=blocks(shared)))
    kept, = first.schedules.values()
    assert all(kept is not made for _, made in first.step.schedules.values())
    cupyattn.invoke_attention(first)
    assert list(first.schedules.values()) == [kept]


@pytest.mark.parametrize(("dtype", "policy"), [("float32", 0), ("float16", 8)])
def test_invariant_rows(xp, dtype, policy):
    """The same bits alone, in a batch, and with or without the prefix shared."""
    layer = Layer((2600, 2300, 700, 5), num_heads=4, num_kv_heads=1, block_len=64, policy=policy, dtype=dtype,
                  sinks=True)
    layer.tokens[1][:2112], layer.table[1, :33] = layer.tokens[0][:2112], layer.table[0, :33]
    pool = xp.array(layer.pool)
    history = layer.k_lens - 1
    cupyattn.process_kv(layer.params(xp, pool, history - (0, 2112, 0, 0), history))
    params = layer.params(xp, pool, (1, 1, 1, 1), invariant=True)
    out = xp.numpy(cupyattn.invoke_decoding(params))
    assert_close(out, layer.attended(xp.numpy(pool), (1, 1, 1, 1)), *ATTENDED[dtype])
    made, = params.schedules.values()
    assert made.decode is None   # all through one kernel
    apart = params.replace(share_prefix=False)
    assert_same_bits(xp.numpy(cupyattn.invoke_attention(apart)), out)
    assert [len(p.schedules) for p in (params, apart)] == [1, 1] and len(params.step.schedules) == 2
    blocks = params.block_iter_params
    for b in range(4):
        one = cupyattn.BlockIteratorParams(blocks.block_ptrs, blocks.cu_block_nums[b:b + 2], buffers=[pool])
        alone = params.replace(cu_q_len=params.cu_q_len[b:b + 2], cu_k_len=params.cu_k_len[b:b + 2],
                               block_iter_params=one)
        assert_same_bits(xp.numpy(cupyattn.invoke_attention(alone))[b], out[b])


def test_prefixes_are_not_shared_unless_wanted():
    pool = rng.standard_normal((30, 1, 2, 64, 64)).astype(np.float32)
    table = np.stack([np.r_[np.arange(8), [10 + 2 * b, 11 + 2 * b]] for b in range(8)])
    params = cupyattn.AttentionParams(
        q=rng.standard_normal((8, 1, 64)).astype(np.float32), num_kv_heads=1, cu_q_len=np.arange(9, dtype=np.int32),
        cu_k_len=np.arange(0, 5400, 600, dtype=np.int32),
        block_iter_params=cupyattn.BlockIteratorParams.from_pool(pool, table))
    apart = params.replace(share_prefix=False)
    assert_close(cupyattn.invoke_attention(apart), cupyattn.invoke_attention(params), *ATTENDED["float32"])
    (shared,), (own,) = params.schedules.values(), apart.schedules.values()
    assert len(shared.decode.members) > 0 and len(own.decode.members) == 0


# ---- splits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tiles", "splits", "real"), [(17, 16, 9), (100, 64, 50), (10, 4, 4), (10, 1, 0), (1, 8, 0)])
def test_tiles_of_splits(tiles, splits, real):
    """Splits of ceil(tiles / S) tiles of 64 keys; those without a tile do not count, and one split is no split."""
    layer = Layer((64 * tiles,), num_heads=1, num_kv_heads=1, head_dim=8, bias=False, dtype="float32", block_len=64)
    pool = filled(layer, NUMPY, (1,))
    params = layer.params(NUMPY, pool, (1,), num_splits=splits, max_split_k=splits).with_partials()
    out = cupyattn.invoke_decoding(params)
    assert params.split_cnt.tolist() == [real]
    assert_close(out, layer.attended(pool, (1,)), *ATTENDED["float32"])


def test_window_tiles():
    """The first tile is that of the first visible key: 3 tiles hold keys 130 - 99 = 31 to 130."""
    layer = Layer((131,), window=100, num_heads=1, num_kv_heads=1, head_dim=8, dtype="float32")
    pool = filled(layer, NUMPY, (1,))
    params = layer.params(NUMPY, pool, (1,), num_splits=8, max_split_k=8).with_partials()
    cupyattn.invoke_decoding(params)
    assert params.split_cnt.tolist() == [3]


@on_all("splits", (1, 2, 3, 5, 8, 13, 16, 31, 32, 33, 48, 64), on_standin=(3, 33))
def test_any_number_of_splits(xp, splits):
    """The partial results merge to the output by TurboMind's own rule, groups of 32 and all; sinks count once."""
    layer = Layer((1, 2500, 640), num_heads=4, num_kv_heads=1, head_dim=16, dtype="float32", sinks=True,
                  rope=RopeParams(rotary_dim=16, style="interleaved"), block_len=64)
    new = (1, 1, 1)
    pool = filled(layer, xp, new)
    params = layer.params(xp, pool, new, num_splits=splits, max_split_k=64).with_partials()
    for name in ("partial_O", "partial_ML"):
        getattr(params, name)[...] = xp.array(np.full(getattr(params, name).shape, np.nan, np.float32))
    out = xp.numpy(cupyattn.invoke_decoding(params))
    want = layer.attended(xp.numpy(pool), new)
    assert_close(out, want, *ATTENDED["float32"])
    counts = xp.numpy(params.split_cnt)
    assert counts[0] == 0 and counts[1] == (0 if splits == 1 else -(-40 // -(-40 // splits)))
    merged = turbomind_merge(xp.numpy(params.partial_O), xp.numpy(params.partial_ML), counts, layer.scale)
    split = counts > 0
    assert_close(merged[split], want[split], *ATTENDED["float32"])
    # untouched past the count
    assert np.isnan(xp.numpy(params.partial_O)[1, :, counts[1]:]).all()
    again = cupyattn.reduce_split_k(params.replace(out=xp.array(np.zeros_like(out))))
    assert_same_bits(xp.numpy(again)[split], out[split])
    assert (xp.numpy(again)[~split] == 0).all()


def test_splits_of_its_own_choice():
    layer = Layer((2000, 3), head_dim=16, dtype="float32", bias=False)
    pool = filled(layer, NUMPY, (1, 1))
    for most, counts in ((64, [4, 0]), (3, [3, 0]), (1, [0, 0])):   # 16 units wanted on a CPU, 4 there are
        params = layer.params(NUMPY, pool, (1, 1), max_split_k=most).with_partials()
        assert_close(cupyattn.invoke_decoding(params), layer.attended(pool, (1, 1)), *ATTENDED["float32"])
        assert params.split_cnt.tolist() == counts


def test_extreme_scores_stay_finite():
    layer = Layer((300,), num_heads=2, num_kv_heads=1, head_dim=16, dtype="float32", scale=1e4, sinks=True)
    pool = filled(layer, NUMPY, (1,))
    params = layer.params(NUMPY, pool, (1,), num_splits=5, max_split_k=5).with_partials()
    assert_close(cupyattn.invoke_decoding(params), layer.attended(pool, (1,)), 1e-5, 1e-5)


# ---- executor, pointers, streams --------------------------------------------------------------------------


def test_checked_and_in_any_order():
    layer = Layer((40, 1, 100), policy=8, rope=PAIRS, sinks=True, finished=[False, False, True])
    new = (1, 1, 1)
    results = []
    for options in ({"check": False}, {"check": True}, {"check": True, "schedule": "reverse"},
                    {"check": True, "schedule": "random", "seed": 3}):
        pool = layer.pool.copy()
        with settings(**options):
            history = layer.k_lens - 1
            cupyattn.process_kv(layer.params(NUMPY, pool, history, history, finished=None))
            params = layer.params(NUMPY, pool, new, num_splits=2, max_split_k=2).with_partials()
            results.append((cupyattn.invoke_decoding(params), pool))
    (fused, stored), *checked = results
    for out, pool in checked:
        assert_same_bits(pool, stored)
        assert_same_bits(out, checked[0][0])
        assert_close(out, fused, 1e-3, 2.0**-10)


def test_trusted_pointers():
    """Addresses alone do what registered arrays do."""
    layer = Layer((40, 9), policy=8, rope=PAIRS)
    pool = filled(layer, NUMPY, (1, 1))
    blocks = layer.blocks(NUMPY, pool)
    alone = cupyattn.BlockIteratorParams(blocks.block_ptrs, blocks.cu_block_nums, block_len=16, trusted_pointers=True)
    out = cupyattn.invoke_decoding(layer.params(NUMPY, pool, (1, 1), block_iter_params=alone))
    assert_close(out, layer.attended(pool, (1, 1)), *ATTENDED["float16"])


@pytest.mark.parametrize("q_lens", [(1, 1, 1), (5, 3, 20)])
def test_blocks_that_are_gone(xp, q_lens):
    """No block before the window of the first new token, and none of a finished sequence, not even the number."""
    layer = Layer((150, 40, 97), rope=PAIRS, policy=8, window=33, finished=[False, True, False])
    pool = filled(layer, xp, q_lens)
    before = xp.numpy(pool)
    whole = layer.params(xp, pool, q_lens)
    out = xp.numpy(cupyattn.invoke_decoding(whole))
    assert_close(out, layer.attended(xp.numpy(pool), q_lens), *ATTENDED["float16"])
    stored = xp.numpy(pool)
    blocks = whole.block_iter_params
    starts = blocks.starts_host
    pointers = blocks.pointers_host.astype(np.uint64)
    gone = [(n - m - 32) // 16 for n, m in zip(layer.k_lens, q_lens, strict=True)]
    assert gone[0] > 1 and gone[2] > 1
    for b in (0, 2):
        pointers[starts[b]:starts[b] + gone[b]] = 0

    def lists(pointers, numbers):
        starts = np.append(0, np.cumsum(numbers)).astype(np.int32)
        return cupyattn.BlockIteratorParams(xp.array(pointers), xp.array(starts), block_len=16, buffers=[pool])

    numbers = np.diff(starts)
    none = np.where(np.repeat([False, True, False], numbers), 0, pointers).astype(np.uint64)
    fewer = np.delete(pointers, np.arange(starts[1], starts[2]))
    for blocks in (lists(none, numbers), lists(fewer, numbers * [1, 0, 1])):
        pool[...] = xp.array(before)
        params = layer.params(xp, pool, q_lens, block_iter_params=blocks)
        assert_same_bits(xp.numpy(cupyattn.invoke_decoding(params)), out)
        assert_same_bits(xp.numpy(pool), stored)
        linear = LinearIteratorParams.empty(2, 287, 64, dtype=np.float16, xp=params.xp)
        with pytest.raises(ValueError, match="^flatten_kv: block_ptrs must not be 0"):
            cupyattn.flatten_kv(params.replace(linear_iter_params=linear))
    pointers[starts[0] + gone[0]] = 0
    with pytest.raises(ValueError, match="^AttentionParams: block_ptrs must not be 0"):
        layer.params(xp, pool, q_lens, block_iter_params=lists(pointers, numbers))


def test_flattening_leaves_finished_sequences():
    layer = Layer((20, 30), finished=[True, False])
    pool = filled(layer, NUMPY, (0, 0))
    params = layer.params(NUMPY, pool, (1, 1), linear_iter_params=LinearIteratorParams.from_array(
        np.full((2, 2, 50, 64), np.nan, np.float16)))
    cupyattn.flatten_kv(params)
    rows = params.linear_iter_params.kv_cache
    assert np.isnan(rows[:, :, :20]).all() and not np.isnan(rows[:, :, 20:]).any()


def test_blocks_too_small_for_the_layer():
    layer = Layer((40,), policy=8)
    pool = layer.pool[:, :layer.layer_bytes - 8].copy()
    with pytest.raises(ValueError, match="^AttentionParams: block_ptrs must lie in the buffers with 4352 bytes each"):
        layer.params(NUMPY, pool, (40,))


def test_logn_factors():
    """From 0-based position max_position + 1 on."""
    q = cupyattn.kv_append(None, None, None, None, q=np.ones((4, 1, 8), np.float32), logn_max_position=2048,
                           positions=np.int32([2048, 2049, 4096, 8192]))
    np.testing.assert_allclose(q[:, 0, 0], [1, 1.0000640, 1.0909091, 1.1818182], atol=1.3e-7)


@pytest.mark.parametrize(("call", "field"), [
    (cupyattn.invoke_decoding, "block_iter_params"), (cupyattn.invoke_attention, "block_iter_params"),
    (cupyattn.process_kv, "block_iter_params"), (cupyattn.flatten_kv, "block_iter_params"),
    (cupyattn.reduce_split_k, "out"), (cupyattn.rank_result, "partial_O"),
])
def test_missing_fields_are_named(call, field):
    layer = Layer((40,))
    params = layer.params(NUMPY, layer.pool, (1,)).replace(block_iter_params=None)
    with pytest.raises(ValueError, match=f"^{call.__name__}: {field} must be given, got None"):
        call(params)


@pytest.mark.parametrize("call", [
    cupyattn.invoke_decoding, cupyattn.invoke_attention, cupyattn.process_kv, cupyattn.flatten_kv,
    cupyattn.reduce_split_k, cupyattn.rank_result, cupyattn.create_cache_iter_factory,
])
@pytest.mark.parametrize(("params", "kind"), [(1, "int"), (None, "NoneType")])
def test_parameters_of_another_kind(call, params, kind):
    with pytest.raises(TypeError, match=f"^{call.__name__}: params must be an AttentionParams, got {kind}$"):
        call(params)


def test_missing_keys_and_buffers_are_named():
    layer = Layer((40,))
    params = layer.params(NUMPY, layer.pool, (1,))
    for call in (cupyattn.invoke_decoding, cupyattn.process_kv):
        with pytest.raises(ValueError, match=f"^{call.__name__}: k must be given, got None"):
            call(params.replace(k=None, v=None))
    with pytest.raises(ValueError, match="^flatten_kv: linear_iter_params must be given, got None"):
        cupyattn.flatten_kv(params)
    with pytest.raises(ValueError, match="^reduce_split_k: partial_O must be given, got None"):
        cupyattn.reduce_split_k(params.replace(out=np.zeros((1, 8, 64), np.float16)))


def test_stream_is_entered(xp):
    layer = Layer((40,))
    if xp.name == "numpy":
        with pytest.raises(TypeError, match="stream must be None for NumPy arrays"):
            layer.params(xp, xp.array(layer.pool), (1,), stream=object())
        return
    pool = filled(layer, xp, (1,))
    stream = xp.module.cuda.Stream()
    out = cupyattn.invoke_decoding(layer.params(xp, pool, (1,), stream=stream))
    stream.synchronize()
    assert_close(xp.numpy(out), layer.attended(xp.numpy(pool), (1,)), *ATTENDED["float16"])


@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("partials", [False, True])
def test_captured_step(xp, partials):
    """With its outputs given a call that was made once only launches; the graph reads the inputs anew."""
    layer = Layer((300, 97), rope=PAIRS, policy=8, sinks=True)
    new = (1, 1)
    pool = filled(layer, xp, new)
    out, q_out = (xp.array(np.zeros((2, 8, 64), np.float16)) for _ in range(2))
    params = layer.params(xp, pool, new, out=out, q_out=q_out)
    params = params.with_partials(3) if partials else params
    stream = xp.module.cuda.Stream(non_blocking=True)
    xp.module.cuda.runtime.deviceSynchronize()
    with stream:
        cupyattn.invoke_decoding(params)   # compiles, plans, and makes this stream's workspace
        stream.synchronize()
        expected, filled_pool = xp.numpy(out), xp.numpy(pool)
        assert_close(expected, layer.attended(filled_pool, new), *ATTENDED["float16"])
        if xp.name == "standin":
            xp.events.clear()
        stream.begin_capture()
        cupyattn.invoke_decoding(params)
        graph = stream.end_capture()
        if xp.name == "standin":
            assert set(xp.events) == {"launches"}, "no allocation, copy or waiting"
        out.set(np.zeros_like(expected))
        pool.set(filled(layer, NUMPY, new))   # without the new tokens
        graph.launch(stream)
        stream.synchronize()
        assert_same_bits(xp.numpy(out), expected)
        assert_same_bits(xp.numpy(pool), filled_pool)
