# SPDX-License-Identifier: Apache-2.0
"""QAttn against a float64 layer of its dequantized weights, with every switch; its halves."""

import numpy as np
import pytest
from attention_layers import MAX_POSITIONS, Layer, contiguous
from compare import assert_same_bits
from conftest import CupyArrays, NumpyArrays

import cupyattn
from cupyattn import PagedCache, PagedParams, Params, QAttn, attention, kv_append
from cupyattn.q_attn.weights import tables as converted_tables
from cupyattn.runtime.cpu import settings


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def here(request):
    """As `xp`, without the stand-in: it would compile every kernel of every case with NVRTC."""
    return NumpyArrays() if request.param == "numpy" else CupyArrays()


def run(layer, steps, batch, cache, params_of, factor=1.0, reference=None, **options):
    """Steps of so many tokens each; x of every one is right. Returns the last x, got and wanted."""
    keys, values = layer.no_past(batch), layer.no_past(batch)
    for q_len in steps:
        x = layer.inputs(batch, q_len)
        params = params_of(len(keys[0]), q_len)
        want, keys, values = layer.expected(x, keys, values, **(options if reference is None else reference))
        got = layer.xp.array(x)
        assert layer.attn.forward(got, params, cache, 0, **layer.tables, **options) is got
        layer.check(got, want, factor)
    return got, want


def plain(batch):
    return lambda past, q_len: Params(batch_size=batch, seq_len=q_len, past_len=past)


SWITCHES = {
    "fp16": {"dtype": "float16", "formats": "float16"},
    "layer norm with bias": {"norm": "layer"}, "no norm": {"norm": None},
    "biases": {"biases": True}, "q4 in one launch": {"formats": "int4-g32", "biases": True},
    "four formats": {"formats": ("int4-g32", "int8", "float16", "nf4"), "dtype": "float16", "biases": True},
    "k and v of a format": {"formats": ("float16", "int8", "int8", "float32")},
    "gptj": {"rope_style": "gptj"}, "no rope": {"rope_style": "none"}, "partial": {"rotary_dim": 16},
    "partial gptj": {"rotary_dim": 8, "rope_style": "gptj", "dtype": "float16"},
    "head norms": {"head_norm": "shared"}, "head norms of each head": {"head_norm": "heads", "dtype": "float16"},
    "layer norms of heads": {"head_norm": "heads", "headnorm_is_rms": False},
    "layer norms of heads and x": {"head_norm": "shared", "headnorm_is_rms": False, "norm": "layer", "post": True},
    "head norms, no norm": {"head_norm": "heads", "norm": None, "norm_epsilon": 0.5},
    "head norms of 24 dims": {"heads": 3, "kv_heads": 1, "dim": 24, "hidden": 72, "head_norm": "heads"},
    "head norms of 256 dims": {"heads": 2, "kv_heads": 1, "dim": 256, "head_norm": "shared", "rope_style": "gptj"},
    "post-norm": {"post": True}, "post-norm with bias": {"post": True, "norm": "layer", "dtype": "float16"},
    "no residual": {"has_residual": False}, "post-norm, no residual": {"has_residual": False, "post": True},
    "fp32 residual": {"dtype": "float16", "residual_fp32": True},
    "fp32 residual, post-norm": {"dtype": "float16", "residual_fp32": True, "post": True},
    "fp32 residual, no norm": {"dtype": "float16", "residual_fp32": True, "norm": None},
    "epsilon": {"norm_epsilon": 0.5, "head_norm": "shared", "post": True},
    "wider than the model": {"hidden": 48, "heads": 6, "kv_heads": 3, "dim": 32, "dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16", "formats": "bfloat16"}, "one head": {"heads": 1, "kv_heads": 1, "dim": 64},
    "odd dims": {"heads": 3, "kv_heads": 3, "dim": 24, "hidden": 72, "rotary_dim": 12},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(here, name):
    """Prefill of two sequences, then a token each, then three."""
    layer = Layer(here, **SWITCHES[name])
    run(layer, (7, 1, 3), 2, contiguous(layer, 2), plain(2))


@pytest.mark.parametrize("name", ["four formats", "post-norm with bias", "fp32 residual, no norm"])
def test_some_switches_on_every_kind_of_array(xp, name):
    layer = Layer(xp, **SWITCHES[name])
    run(layer, (7, 1), 2, contiguous(layer, 2), plain(2))


def test_one_launch_for_one_format():
    assert len(Layer(NumpyArrays(), formats="int4-g32").attn.qkv) == 1
    two = Layer(NumpyArrays(), formats=("float16", "int8", "int8", "int8")).attn.qkv
    assert [linear.stop for linear in two] == [128, 256]
    layer = Layer(NumpyArrays(), formats="int4-g32")
    cache, params = contiguous(layer, 1), Params(1, 1, 3)
    with cupyattn.runtime.profiling() as profile:
        layer.attn.forward(layer.inputs(1, 1), params, cache, 0, **layer.tables)
    assert {name: n for name, n, _ in profile.rows()} == {
        "rms_norm": 1, "quant_gemm": 2, "kv_append": 1, "paged_decode": 1}


@pytest.mark.parametrize("formats", ["float16", ("float16", "float32", "float32", "float16")])
def test_plain_weights_where_they_are(xp, formats):
    """Arrays of any kind in place of matrices: joined, biases and gains beside them, as those made on the host."""
    layer = Layer(xp, dtype="float16", formats=formats, biases=True, head_norm="shared")
    plain = {f"q_{n}_proj": xp.array(layer.exact[f"{n}_proj"].astype(m.format)) for n, m in layer.matrices.items()}
    attn = QAttn(**plain, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=32,
                 **{name: xp.array(v) for name, v in layer.vectors.items()})
    assert attn.xp is xp.module and len(attn.qkv) == (1 if formats == "float16" else 2)
    x = layer.inputs(2, 3)
    one, other = xp.array(x), xp.array(x)
    layer.attn.forward(one, Params(2, 3, 0), contiguous(layer, 2), 0, **layer.tables)
    attn.forward(other, Params(2, 3, 0), contiguous(layer, 2), 0, **layer.tables)
    assert_same_bits(xp.numpy(one), xp.numpy(other))


@pytest.mark.parametrize("options", [{"softmax_scale": 0.3}, {"window_size": 3}, {"softcap": 2.0}, {"sinks": 1},
                                     {"invariant": True}, {"window_size": 2, "softcap": 1.5, "sinks": 1}])
def test_attention_options(here, options):
    layer = Layer(here, dtype="float32")
    reference = {k: v for k, v in options.items() if k != "invariant"}
    if "sinks" in options:
        sinks = np.float32([0.5, -1.0, 2.0, 0.0])
        options, reference = options | {"sinks": here.array(sinks)}, reference | {"sinks": sinks}
    run(layer, (9, 1, 4), 2, contiguous(layer, 2), plain(2), reference=reference, **options)


PAGE_TABLE = np.int32([[7, 3, 4, 9, 0], [1, 2, 8, 6, 0]])


def paged(page_size, table=PAGE_TABLE, **options):
    def params_of(past, q_len):
        return PagedParams(len(table), table, [past] * len(table), past, page_size=page_size, q_len=q_len, **options)
    return params_of


@pytest.mark.parametrize("formats, factor", [((None, None), 1), (("float16", None), 100), (("int8", None), 2000),
                                             (("hadamard8", "hadamard4"), 15000), (("fp8_e4m3", "int8"), 6000)])
def test_paged_cache(here, formats, factor):
    layer = Layer(here)
    cache = PagedCache(3, 10, 4, 2, 32, dtype="float32", k_format=formats[0], v_format=formats[1], xp=here.module)
    run(layer, (6, 1, 3, 1), 2, cache, paged(4), factor)


def test_paged_with_offsets_and_other_tables(xp):
    layer = Layer(xp, dtype="float32")
    cache = PagedCache(1, 10, 4, 2, 32, dtype="float32", xp=xp.module)
    cos, sin = cupyattn.RopeParams(rotary_dim=32, base=7.0).tables(MAX_POSITIONS)
    other = {"cpu": (sin, cos)}

    def params_of(past, q_len):
        return PagedParams(2, PAGE_TABLE, [past] * 2, past, page_size=4, q_len=q_len, rope_offsets=np.int32([5, -3]),
                           alt_rope_embed=other)

    keys, values = layer.no_past(2), layer.no_past(2)
    for q_len in (5, 1):
        x = layer.inputs(2, q_len)
        past = len(keys[0])
        positions = np.maximum(past + np.int32([[5], [-3]]) + np.arange(q_len), 0)
        want, keys, values = layer.expected(x, keys, values, positions, sin=sin, cos=cos)
        got = xp.array(x)
        layer.attn.forward(got, params_of(past, q_len), cache, 0, **layer.tables)
        layer.check(got, want)
    assert list(other) == ["cpu"]


def test_sequences_of_different_lengths(here):
    """A batch of ragged histories equals each sequence alone, bit for bit with invariant=True."""
    layer = Layer(here, dtype="float16")
    x, lengths = layer.inputs(2, 3), [9, 2]
    caches = [PagedCache(1, 10, 4, 2, 32, xp=here.module) for _ in range(2)]
    rng = np.random.default_rng(3)
    past = rng.standard_normal((2, 40, 2, 32)).astype(np.float16)
    for cache in caches:
        for pool, rows in ((cache.k[0], past[0]), (cache.v[0], past[1])):
            pool[...] = here.array(rows.reshape(10, 4, 2, 32))
    together = here.array(x)
    params = PagedParams(2, PAGE_TABLE, lengths, 9, page_size=4, q_len=3)
    layer.attn.forward(together, params, caches[0], 0, **layer.tables, invariant=True)
    for b in range(2):
        alone = here.array(x[b:b + 1])
        params = PagedParams(1, PAGE_TABLE[b:b + 1], lengths[b:b + 1], 9, page_size=4, q_len=3)
        layer.attn.forward(alone, params, caches[1], 0, **layer.tables, invariant=True)
        assert_same_bits(here.numpy(alone)[0], here.numpy(together)[b])
    for a, b in zip((caches[0].k[0], caches[0].v[0]), (caches[1].k[0], caches[1].v[0]), strict=True):
        assert_same_bits(here.numpy(a), here.numpy(b))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("hidden_value", [-np.inf, -65504.0, False])
def test_left_padding_equals_single_runs(here, dtype, hidden_value):
    """Short prompts on the left of a batch, with offsets and a mask, get what they get alone; decode too."""
    layer = Layer(here, dtype=dtype)
    pads, length = [0, 3, 6], 8
    x, later = layer.inputs(3, length), [layer.inputs(3, 1) for _ in range(2)]
    mask = np.zeros((3, length), np.float32) if hidden_value is not False else np.ones((3, length), bool)
    for b, pad in enumerate(pads):
        mask[b, :pad] = hidden_value
    offsets = -np.int32(pads)
    cache = contiguous(layer, 3)
    got = []
    for step, rows in enumerate([x, *later]):
        now = here.array(rows)
        params = Params(3, rows.shape[1], 0 if step == 0 else length + step - 1, mask, offsets)
        layer.attn.forward(now, params, cache, 0, **layer.tables)
        got.append(here.numpy(now))
    for b, pad in enumerate(pads):
        alone, past = contiguous(layer, 1), 0
        for rows, batch in zip([x[b:b + 1, pad:], *(y[b:b + 1] for y in later)], got, strict=True):
            now = here.array(np.ascontiguousarray(rows))
            layer.attn.forward(now, Params(1, rows.shape[1], past), alone, 0, **layer.tables)
            past += rows.shape[1]
            found = batch[b:b + 1, -rows.shape[1]:]
            layer.check(now, found.astype(np.float64), 0.5)
    assert np.isfinite(np.concatenate([g.ravel() for g in got]).astype(np.float64)).all()


@pytest.mark.parametrize("shape", [(2, 11), (2, 6, 11), (1, 1, 6, 11), (2, 4, 6, 11), (2, 5), (2, 1, 1, 40)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks(here, shape, kind):
    layer = Layer(here)
    cache, past = contiguous(layer, 2), 5
    rng = np.random.default_rng(1)
    first = layer.inputs(2, past)
    _, keys, values = layer.expected(first, layer.no_past(2), layer.no_past(2))
    layer.attn.forward(here.array(first), Params(2, past, 0), cache, 0, **layer.tables)
    mask = rng.random(shape) < 0.7 if kind == "bool" else rng.standard_normal(shape).astype(np.float32)
    mask[..., 0] = True if kind == "bool" else 0
    x = layer.inputs(2, 6)
    full = mask if mask.ndim == 4 else mask[:, None] if mask.ndim == 3 else mask[:, None, None]
    want, _, _ = layer.expected(x, keys, values, mask=full)
    got = here.array(x)
    layer.attn.forward(got, Params(2, 6, past, mask), cache, 0, **layer.tables)
    layer.check(got, want)


def test_masks_windows_and_softcap_together(here):
    """ExLlamaV2's paths without flash-attn drop one or the other, or cut the same keys from all queries."""
    layer = Layer(here)
    cache, past = contiguous(layer, 2), 7
    first = layer.inputs(2, past)
    _, keys, values = layer.expected(first, layer.no_past(2), layer.no_past(2))
    layer.attn.forward(here.array(first), Params(2, past, 0), cache, 0, **layer.tables)
    mask = np.ones((2, 12), bool)
    mask[0, :6] = mask[1, 8:10] = False
    x, options = layer.inputs(2, 5), {"window_size": 4, "softcap": 1.5, "softmax_scale": 0.4}
    want, _, _ = layer.expected(x, keys, values, mask=mask[:, None, None], **options)
    got = here.array(x)
    layer.attn.forward(got, Params(2, 5, past, mask), cache, 0, **layer.tables, **options)
    layer.check(got, want)


def test_not_causal(here):
    layer = Layer(here)
    cache = contiguous(layer, 2)
    params = lambda past, q_len: Params(2, q_len, past, non_causal_attn=True)  # noqa: E731
    run(layer, (6, 5), 2, cache, params, reference={"causal": False})
    run(layer, (6,), 2, None, params, reference={"causal": False})


@pytest.mark.parametrize("with_cache", [False, True])
def test_block_diagonal_layers(xp, with_cache):
    """Layer 1 attends in blocks over all tokens of the batch, layer 0 does not."""
    layer = Layer(xp, head_norm="heads")
    x, blocks = layer.inputs(2, 6), np.int32([0, 5, 5, 9, 12])
    params = Params(2, 6, 0)
    params.cu_seqlens, params.block_diag_layers = blocks, {1}
    cache = contiguous(layer, 2, layers=2) if with_cache else None
    for n, options in ((0, {}), (1, {"blocks": blocks})):
        want, keys, _ = layer.expected(x, layer.no_past(2), layer.no_past(2), **options)
        got = xp.array(x)
        layer.attn.forward(got, params, cache, n, **layer.tables)
        layer.check(got, want)
        if with_cache:
            layer.check(cache.k[n][:, :6], np.stack(keys), what="keys")


def test_no_cache(here):
    layer = Layer(here)
    run(layer, (6,), 2, None, plain(2))
    with pytest.raises(ValueError, match="cache must be given for 3 cached tokens, got None"):
        layer.attn.forward(here.array(layer.inputs(1, 1)), Params(1, 1, 3), None, 0, **layer.tables)


def test_no_cache_with_masks_and_offsets(here):
    """As encoders and left-padded batches have it, in both directions or one."""
    layer = Layer(here, head_norm="heads")
    x, offsets, mask = layer.inputs(2, 7), np.int32([[-3], [2]]), np.ones((2, 7), bool)
    mask[0, :3] = False
    positions = np.maximum(offsets + np.arange(7), 0)
    for causal in (True, False):
        want, _, _ = layer.expected(x, layer.no_past(2), layer.no_past(2), positions, mask=mask[:, None, None],
                                    causal=causal)
        got = here.array(x)
        layer.attn.forward(got, Params(2, 7, None, mask, offsets, non_causal_attn=not causal), **layer.tables)
        seen = mask[..., None].astype(float) if causal else 1.0   # a query of the padding sees nothing it should
        layer.check(here.array(here.numpy(got) * np.float32(seen)), want * seen)


@pytest.mark.parametrize("alt", ["tuple", "dict"])
def test_offsets_of_both_kinds_and_other_tables(xp, alt):
    """position = past + position_offset + rope_offset + t, at least 0, also with past; in the tables of params."""
    layer = Layer(xp, dtype="float32")
    cos, sin = cupyattn.RopeParams(rotary_dim=32, base=7.0).tables(MAX_POSITIONS)
    other = (sin, cos) if alt == "tuple" else {"cpu": (sin, cos)}
    cache, keys, values = contiguous(layer, 2), layer.no_past(2), layer.no_past(2)
    for q_len in (4, 1):
        x, past = layer.inputs(2, q_len), len(keys[0])
        positions = np.maximum(past + np.int32([[-6], [1]]) + 4 + np.arange(q_len), 0)
        want, keys, values = layer.expected(x, keys, values, positions, sin=sin, cos=cos)
        got = xp.array(x)
        params = Params(2, q_len, past, position_offsets=[-6, 1], rope_offsets=[4], alt_rope_embed=other)
        layer.attn.forward(got, params, cache, 0, **layer.tables)
        layer.check(got, want)


def test_several_histories_with_masks_and_windows(here):
    """A list of caches; each sequence has its row of the mask."""
    layer = Layer(here)
    caches, mask = [contiguous(layer, 1) for _ in range(2)], np.ones((2, 9), bool)
    mask[0, 2:4] = mask[1, 0] = False
    keys, values = [], []
    for cache, n in zip(caches, (5, 2), strict=True):
        past = layer.inputs(1, n)
        _, (k,), (v,) = layer.expected(past, layer.no_past(1), layer.no_past(1))
        layer.attn.forward(here.array(past), Params(1, n, 0), cache, 0, **layer.tables)
        keys.append(k)
        values.append(v)
    x, options = layer.inputs(2, 4), {"window_size": 5, "softcap": 2.0}
    want, _, _ = layer.expected(x, keys, values, mask=mask[:, None, None], **options)
    got = here.array(x)
    layer.attn.forward(got, Params(2, 4, [5, 2], mask), caches, 0, **layer.tables, **options)
    layer.check(got, want)


@pytest.mark.parametrize("listed", [False, True])
def test_several_histories(here, listed):
    """past_len as a list: one cache for all sequences, or one for each."""
    layer = Layer(here)
    lengths = [4, 1]
    caches = [contiguous(layer, 1) for _ in range(2)] if listed else None
    cache = contiguous(layer, 2)
    pasts = [layer.inputs(1, n) for n in lengths]
    keys, values = [], []
    for b, past in enumerate(pasts):
        _, (k,), (v,) = layer.expected(past, layer.no_past(1), layer.no_past(1))
        keys.append(k)
        values.append(v)
        if listed:
            layer.attn.forward(here.array(past), Params(1, lengths[b], 0), caches[b], 0, **layer.tables)
        else:
            for pool, rows in ((cache.k[0], k), (cache.v[0], v)):
                pool[b, :len(rows)] = here.array(rows.astype(np.float32))
    for q_len in (3, 1):
        x = layer.inputs(2, q_len)
        params = Params(2, q_len, [len(k) for k in keys], position_offsets=np.int32([2, 0]))
        positions = np.int32([[len(keys[0]) + 2], [len(keys[1])]]) + np.arange(q_len)
        want, keys, values = layer.expected(x, keys, values, positions)
        got = here.array(x)
        layer.attn.forward(got, params, caches if listed else cache, 0, **layer.tables)
        layer.check(got, want)


# ---- the halves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "head norms", "gptj", "partial gptj", "no rope", "four formats",
                                  "fp32 residual, post-norm"])
def test_whole_step_equals_its_halves_bit_for_bit(here, case):
    options = {"plain": {"dtype": "float16"}}.get(case) or SWITCHES[case]
    layer = Layer(here, **options)
    for batch, past in ((1, 0), (1, 5), (2, 5)):
        caches = [PagedCache(1, 10, 4, layer.kv_heads, layer.dim, dtype=layer.dtype, xp=here.module) for _ in range(2)]
        rng = np.random.default_rng(3)
        for cache in caches:
            for pool in (cache.k[0], cache.v[0]):
                rng = np.random.default_rng(3)
                pool[...] = here.array(rng.standard_normal(pool.shape).astype(pool.dtype))
        params = PagedParams(batch, PAGE_TABLE[:batch], [past] * batch, past, page_size=4, q_len=4)
        x = layer.inputs(batch, 4)
        whole = here.array(x)
        layer.attn.forward(whole, params, caches[0], 0, **layer.tables)
        halves = here.array(x)
        tables = (layer.tables.get("sin"), layer.tables.get("cos"))
        lens = here.array(np.full(batch, past, np.int32))
        q, k, v = layer.attn.forward_1(halves, batch, 4, 0, lens, None, None, None, *tables)
        assert_same_bits(here.numpy(halves), x)
        kv_append(k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:]), caches[1].k[0], caches[1].v[0],
                  slots=here.array(params.slot_mapping()))
        table = here.array(PAGE_TABLE[:batch])
        mixed = cupyattn.paged_decode(q, caches[1].k[0], caches[1].v[0], block_table=table,
                                      cache_seqlens=here.array(params.cache_seqlens_after))
        assert layer.attn.forward_2(halves, mixed, batch, 4) is halves
        assert_same_bits(here.numpy(whole), here.numpy(halves))
        for a, b in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v, strict=True):
            assert_same_bits(here.numpy(a), here.numpy(b))


@pytest.mark.parametrize(("q_len", "options"), [
    (6, {}), (1, {}), (6, {"rope_style": "none"}), (3, {"rope_style": "none", "biases": True, "dtype": "float32"}),
    (6, {"head_norm": "heads", "formats": ("int4-g32", "int8-g32", "float16", "int4-g32")})])
def test_into_the_pool_of_a_sequential_batch(xp, q_len, options):
    """k and v of forward_1 may be the rows of the cache at first_index; the step is the same, bit for bit."""
    layer = Layer(xp, **{"dtype": "float16", **options})
    params = PagedParams(1, [[2, 3, 4]], [5], 5, page_size=4, q_len=q_len)
    assert params.is_sequential and params.first_index == 13
    caches = [PagedCache(1, 10, 4, 2, 32, dtype=layer.dtype, xp=xp.module) for _ in range(2)]
    for cache in caches:
        for pool in (cache.k[0], cache.v[0]):
            pool[...] = xp.array(np.zeros(pool.shape, pool.dtype))
    rows = layer.inputs(1, q_len)
    x, other = xp.array(rows), xp.array(rows)
    k, v = caches[0].k[0], caches[0].v[0]
    q, *_ = layer.attn.forward_1(x, 1, q_len, 5, None, None, *(
        pool.reshape(40, 2, 32)[13:13 + q_len] for pool in (k, v)), **layer.tables)
    device = None if xp.name == "numpy" else 0
    mixed = cupyattn.paged_decode(q, k, v, block_table=params.get_block_index(device),
                                  cache_seqlens=params.get_cache_seqlens_after(device))
    layer.attn.forward_2(x, mixed, 1, q_len)
    layer.attn.forward(other, params, caches[1], 0, **layer.tables)
    assert_same_bits(xp.numpy(x), xp.numpy(other))
    for a, b in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v, strict=True):
        assert_same_bits(xp.numpy(a), xp.numpy(b))


@pytest.mark.parametrize("past_len, past_lens, first", [
    (5, None, [5, 5, 5]), (0, [0, 7, 3], [0, 7, 3]), (-1, [2, -4, 9], [2, 0, 9]), (4, [0, -2, -9], [4, 2, -5])])
@pytest.mark.parametrize("on_host", [False, True])
def test_positions(xp, past_len, past_lens, first, on_host):
    layer = Layer(xp)
    x = layer.inputs(3, 4)
    lens = None if past_lens is None else np.int32(past_lens)
    given = lens if lens is None or on_host else xp.array(lens)
    q, k, v = layer.attn.forward_1(xp.array(x), 3, 4, past_len, given, **layer.tables)
    positions = np.maximum(np.int32(first)[:, None] + np.arange(4), 0)
    _, keys, values = layer.expected(x, layer.no_past(3), layer.no_past(3), positions)
    layer.check(k, np.stack(keys), what="keys")
    layer.check(v, np.stack(values), what="values")
    assert q.shape == (3, 4, 4, 32)


@pytest.mark.parametrize("style", ["neox", "gptj"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tables_of_exllamav2(here, style, dtype):
    """[1, 1, positions, r]: frequencies side by side twice, or each one twice."""
    layer = Layer(here, rope_style=style, rotary_dim=16)
    wide = [np.concatenate([t, t], 1) if style == "neox" else np.repeat(t, 2, 1) for t in (layer.sin, layer.cos)]
    sin, cos = (t[None, None].astype(dtype) for t in wide)
    x = layer.inputs(2, 3)
    _, keys, _ = layer.expected(x, layer.no_past(2), layer.no_past(2), np.arange(3) + np.zeros((2, 1), int),
                                sin=sin[0, 0].astype(float), cos=cos[0, 0].astype(float))
    for _ in range(2):
        _, k, _ = layer.attn.forward_1(here.array(x), 2, 3, 0, sin=here.array(sin), cos=here.array(cos))
        layer.check(k, np.stack(keys), what="keys")


def test_tables_in_columns(here):
    """Tables whose positions are the last axis in memory are copied."""
    layer = Layer(here)
    x = here.array(layer.inputs(2, 3))
    columns = {name: here.array(np.ascontiguousarray(here.numpy(t).T)).T for name, t in layer.tables.items()}
    for a, b in zip(layer.attn.forward_1(x, 2, 3, 0, **columns), layer.attn.forward_1(x, 2, 3, 0, **layer.tables),
                    strict=True):
        assert_same_bits(here.numpy(a), here.numpy(b))


def test_strided_inputs_and_outputs(here):
    layer = Layer(here, dtype="float16")
    base = layer.rng.standard_normal((2, 3, 80)).astype(np.float16)
    x = here.array(base)[:, :, 8:72]
    out = [here.array(np.full((6, h + 1, 40), np.nan, np.float16)) for h in (4, 2, 2)]
    views = [o[:, :h, :32] for o, h in zip(out, (4, 2, 2), strict=True)]
    got = layer.attn.forward_1(x, 2, 3, 0, None, *views, **layer.tables)
    want = layer.attn.forward_1(here.array(np.ascontiguousarray(base[:, :, 8:72])), 2, 3, 0, **layer.tables)
    for a, b, o in zip(got, want, out, strict=True):
        assert_same_bits(here.numpy(a), here.numpy(b).reshape(here.numpy(a).shape))
        assert np.isnan(here.numpy(o)[:, -1]).all()
    mixed = here.array(layer.rng.standard_normal((6, 128)).astype(np.float16))
    layer.attn.forward_2(x, mixed, 2, 3)
    dense = here.array(np.ascontiguousarray(base[:, :, 8:72]))
    layer.attn.forward_2(dense, mixed, 2, 3)
    assert_same_bits(here.numpy(x), here.numpy(dense))


def test_functions_of_exllamav2(xp):
    layer = Layer(xp, dtype="float16", formats="int4-g32")
    m, n = layer.matrices, layer.vectors
    handle = cupyattn.make_q_attn(n["layernorm"], None, True, 1e-6, m["q"], m["k"], m["v"], m["o"], np.zeros(16 * 128),
                                  np.zeros(128 * 64), 16, 64, 4, 2, 32, 128, True, cupyattn.ROPE_STYLE_NEOX,
                                  xp=xp.module)
    x = layer.inputs(2, 3)
    device = xp.array(x)
    q, k, v = (xp.array(np.zeros((2, 3, h, 32), np.float16)) for h in (4, 2, 2))
    assert cupyattn.q_attn_forward_1(handle, device, 2, 3, 0, xp.array(np.int32([1, 2])), q, k, v,
                                     layer.tables["sin"], layer.tables["cos"]) is None
    wanted = layer.attn.forward_1(xp.array(x), 2, 3, 0, np.int32([1, 2]), **layer.tables)
    for a, b in zip((q, k, v), wanted, strict=True):
        assert_same_bits(xp.numpy(a), xp.numpy(b))
    mixed = attention(*(a.reshape(6, -1, 32) for a in (q, k, v)), cu_seqlens_q=xp.array(np.int32([0, 3, 6])),
                      cu_seqlens_k=xp.array(np.int32([0, 3, 6])))
    cupyattn.q_attn_forward_2(handle, device, mixed, 2, 3)
    layer.attn.forward_2(other := xp.array(x), mixed, 2, 3)
    assert_same_bits(xp.numpy(device), xp.numpy(other))
    cupyattn.free_q_attn(handle)
    with pytest.raises(ValueError, match="must not be used after close"):
        cupyattn.q_attn_forward_1(handle, device, 2, 3, 0, None, q, k, v, *layer.tables.values())
    with layer.attn as open_one:
        assert "int4-g32" in repr(open_one) and open_one.nbytes > 0
    assert repr(layer.attn) == "QAttn(closed)"


def test_checked():
    layer = Layer(NumpyArrays(), dtype="float16", formats="int4-g32", head_norm="heads", post=True)
    x, found = layer.inputs(2, 3), []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        with settings(check=True, schedule=schedule, seed=seed):
            got = x.copy()
            layer.attn.forward(got, Params(2, 3, 0), contiguous(layer, 2), 0, **layer.tables)
            found.append(got)
    for other in found[1:]:
        assert_same_bits(other, found[0])


# ---- regressions of ExLlamaV2's tracker --------------------------------------------------------------------


def test_scores_past_float16(here):
    """Qwen2-like activations: q · k is far beyond 65504, the result is what float64 says of the same q, k and v."""
    layer = Layer(here, dtype="float16", biases=True, rope_style="none", norm=None)
    biases = {n: np.full(size, 300.0, np.float32) for n, size in (("q_bias", 128), ("k_bias", 64))}
    attn = QAttn(**{f"q_{n}_proj": m for n, m in layer.matrices.items()}, hidden_size=64, num_heads=4, num_kv_heads=2,
                 head_dim=32, rope_style="none", xp=here.module, **layer.vectors | biases)
    x = layer.inputs(1, 6)
    q, k, v = (here.numpy(a).astype(np.float64)[0] for a in attn.forward_1(here.array(x), 1, 6, 0))
    scores = np.einsum("qhd,khd->hqk", q, k.repeat(2, 1))
    assert scores.min() > 2 * 65504
    scores = np.where(np.tri(6, dtype=bool), scores * 32**-0.5, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v.repeat(2, 1)).reshape(1, 6, 128)
    got = here.array(x)
    attn.forward(got, Params(1, 6, 0), contiguous(layer, 1), 0)
    layer.check(got, x + mixed @ layer.exact["o_proj"].T.astype(np.float64) + layer.vectors["o_bias"])


@pytest.mark.parametrize("formats", ["float16", "int4-g32"])
def test_the_same_prompt_everywhere_in_a_batch(here, formats):
    """Each copy gets the same bits, prefill and decode, beside other prompts, and again in a second run."""
    layer = Layer(here, dtype="float16", formats=formats)
    prompts, first = [layer.inputs(1, n).repeat(5, 0) for n in (9, 1, 1)], None
    for rows in prompts:
        rows[3] += 1   # another one among them
    for _ in range(2):
        cache, found, past = contiguous(layer, 5), [], 0
        for rows in prompts:
            x = here.array(rows)
            layer.attn.forward(x, Params(5, rows.shape[1], past), cache, 0, **layer.tables, invariant=True)
            past += rows.shape[1]
            found.append(here.numpy(x))
            for b in (1, 2, 4):
                assert_same_bits(found[-1][b], found[-1][0])
        for mine, other in zip(found, first or found, strict=True):
            assert_same_bits(mine, other)
        first = found


def test_wide_attention_outgrows_no_scratch(here):
    """num_heads * head_dim four times the hidden size, more tokens in every call."""
    layer = Layer(here, hidden=32, heads=4, kv_heads=1, dim=32)
    run(layer, (1, 40, 2), 1, contiguous(layer, 1), plain(1))


def test_the_last_token_fits_and_no_other(here):
    layer = Layer(here)
    cache = contiguous(layer, 1, max_seq_len=8)
    run(layer, (7, 1), 1, cache, plain(1))
    x = here.array(layer.inputs(1, 1))
    with pytest.raises(ValueError, match=r"params must have at most the 8 tokens of the cache, got 9 \(past_len"):
        layer.attn.forward(x, Params(1, 1, 8), cache, 0, **layer.tables)
    short = {name: table[:8] for name, table in layer.tables.items()}
    big = contiguous(layer, 1, max_seq_len=9)
    layer.attn.forward(x, Params(1, 1, 7), big, 0, **short)
    with pytest.raises(ValueError, match="sin and cos must have a row for position 8, got 8 rows"):
        layer.attn.forward(x, Params(1, 1, 8), big, 0, **short)
    with pytest.raises(ValueError, match="sin and cos must have a row for position 8, got 8 rows"):
        layer.attn.forward_1(x, 1, 1, 8, **short)


def test_other_tables_are_used_at_once(xp):
    """Tables that replace others between calls are never those of an earlier call."""
    layer = Layer(xp, dtype="float16")
    x = layer.inputs(1, 2)
    found = []
    for base in (10.0, 1000.0):
        cos, sin = cupyattn.RopeParams(rotary_dim=32, base=base).tables(16)
        wide = [xp.array(np.concatenate([t, t], 1)[None, None].astype(np.float16)) for t in (sin, cos)]
        _, keys, _ = layer.expected(x, layer.no_past(1), layer.no_past(1), np.int32([[5, 6]]), sin=sin, cos=cos)
        for tables in ((xp.array(sin), xp.array(cos)), wide):
            _, k, _ = layer.attn.forward_1(xp.array(x), 1, 2, 5, None, None, None, None, *tables)
            layer.check(k, np.stack(keys), what="keys")
            found.append(xp.numpy(k))
    assert np.abs(found[0].astype(float) - found[2]).max() > 0.1


def test_gemma(here):
    """Four norms' worth of layer: norms before and after, soft-capped scores, a window in every other layer."""
    layer = Layer(here, dtype="float16", residual_fp32=True, post=True, formats="int8", norm_epsilon=1e-5)
    cache = contiguous(layer, 2, layers=2)
    past = [(layer.no_past(2), layer.no_past(2)) for _ in range(2)]
    for step, q_len in enumerate((9, 1, 1)):
        x, params = layer.inputs(2, q_len), Params(2, q_len, 0 if step == 0 else 8 + step)
        want, got = x, here.array(x)
        for n, window in enumerate((0, 4)):
            options = {"softcap": 5.0, "window_size": window, "softmax_scale": 24 ** -0.5}
            want, *past[n] = layer.expected(want, *past[n], **options)
            layer.attn.forward(got, params, cache, n, **layer.tables, **options)
        layer.check(got, want, 2)


@pytest.mark.parametrize("options", [{"residual_fp32": True}, {"residual_fp32": True, "post": True}])
def test_float32_residual_over_pages(here, options):
    layer = Layer(here, dtype="float16", **options)
    cache = PagedCache(1, 10, 4, 2, 32, xp=here.module)
    run(layer, (6, 1), 2, cache, paged(4))


def test_tables_are_read_for_the_dims_turned():
    """The same full-width table, of half as many dims the second time."""
    table = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float16)
    for rotary_dim in (32, 64):
        cos, sin = converted_tables(table, table, "neox", rotary_dim, np)
        assert_same_bits(cos, table[:, :rotary_dim // 2].astype(np.float32))
        assert_same_bits(cos, sin)
