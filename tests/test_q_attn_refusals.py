# SPDX-License-Identifier: Apache-2.0
"""What QAttn refuses: messages name the argument, the rule and what was found, and nothing has been written."""

import numpy as np
import pytest
from attention_layers import Layer, contiguous
from compare import assert_same_bits
from conftest import NumpyArrays

import cupyattn
from cupyattn import LoRA, PagedCache, PagedParams, Params, QAttn

PAGE_TABLE = np.int32([[7, 3, 4, 9, 0], [1, 2, 8, 6, 0]])


def _arguments(**change):
    w = {"q_q_proj": (128, 64), "q_k_proj": (64, 64), "q_v_proj": (64, 64), "q_o_proj": (64, 128)}
    given = {name: np.zeros(shape, np.float16) for name, shape in w.items()}
    return given | {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
                    "layernorm": np.ones(64, np.float32)} | change


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"q_k_proj": np.zeros((128, 64), np.float16)}, ValueError,
     r"q_k_proj must be \[num_kv_heads \* head_dim, hidden_size\] = \[64, 64\], got \[128, 64\]"),
    ({"q_o_proj": np.zeros((128, 64), np.float16)}, ValueError, r"q_o_proj must be .* = \[64, 128\]"),
    ({"q_q_proj": 5}, TypeError, "q_q_proj must be a QMatrix or an array, got int"),
    ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide the 4 heads, got 3"),
    ({"layernorm": np.ones(63, np.float32)}, ValueError, r"layernorm must be \[64\], got \[63\]"),
    ({"layernorm": np.ones(64)}, TypeError, "layernorm must be a float16, bfloat16, float32 array, got float64"),
    ({"layernorm_bias": np.ones(64, np.float32)}, ValueError, "layernorm_bias must come with a layernorm that is"),
    ({"q_norm": np.ones((2, 32), np.float32)}, ValueError, r"q_norm must be \[32\] or \[4, 32\], got \[2, 32\]"),
    ({"q_bias": np.ones(64, np.float32)}, ValueError, r"q_bias must be \[128\], got \[64\]"),
    ({"rope_style": 3}, ValueError, r"rope_style must be 0 \(none\), 1 \(GPT-J\), 2 \(NeoX\)"),
    ({"sincos_size": 34}, ValueError, "sincos_size must be even and at most head_dim 32, got 34"),
    ({"dtype": "float64"}, ValueError, "dtype must be float16, bfloat16, float32, got 'float64'"),
    ({"norm_epsilon": -1.0}, ValueError, "norm_epsilon must be"),
    ({"max_rows": 10, "temp_state": np.zeros(10 * 127)}, ValueError, "temp_state must have at least 1280 elements"),
    ({"temp_dq": np.zeros(128 * 64 - 1)}, ValueError, "temp_dq must have at least 8192 elements"),
    ({"hidden_size": 0}, ValueError, "hidden_size must be an int32 of at least 1, got 0"),
    ({"hidden_size": 60}, ValueError, "hidden_size must be a multiple of 8, got 60"),
    ({"num_heads": None}, TypeError, "num_heads must be an integer, got NoneType"),
    ({"hidden_size": 64.0}, TypeError, "hidden_size must be an integer, got float"),
    ({"head_dim": 12}, ValueError, "head_dim must be a multiple of 8 up to 256, got 12"),
    *(({name: np.zeros(shape)}, TypeError, f"{name} must be a QMatrix or float16, bfloat16, float32, got float64")
      for name, shape in (("q_q_proj", (128, 64)), ("q_k_proj", (64, 64)), ("q_v_proj", (64, 64)),
                          ("q_o_proj", (64, 128)))),
    ({"q_v_proj": np.zeros((64, 64), np.int8)}, TypeError, "q_v_proj must be a QMatrix or .*, got int8"),
    ({"q_o_proj": None}, TypeError, "q_o_proj must be a QMatrix or an array, got NoneType"),
    ({"temp_state": 5}, TypeError, "temp_state must be an array, got int"),
    ({"temp_dq": [1, 2]}, TypeError, "temp_dq must be an array, got list"),
    ({"rope_style": 2.0}, ValueError, r"rope_style must be 0 \(none\), .*, got 2.0"),
    ({"rope_style": True}, ValueError, "rope_style must be 0 .*, got True"),
    ({"rope_style": "llama"}, ValueError, "rope_style must be 0 .*, got 'llama'"),
    ({"rope_style": [2]}, ValueError, r"rope_style must be 0 .*, got \[2\]"),
    ({"dtype": 5}, TypeError, "dtype must be float16, bfloat16, float32, got 5"),
    ({"dtype": "half float"}, TypeError, "dtype must be float16, bfloat16, float32, got 'half float'"),
    ({"xp": "numpy"}, TypeError, "xp must be numpy or cupy, got 'numpy'"),
    ({"xp": pytest}, TypeError, "xp must be numpy or cupy, got <module 'pytest'"),
    ({"has_residual": "no"}, TypeError, "has_residual must be True or False, got 'no'"),
    ({"residual_fp32": 1}, TypeError, "residual_fp32 must be True or False, got 1"),
    ({"layernorm": [1.0] * 64}, TypeError, "layernorm must be a float16, bfloat16, float32 array, got list"),
    ({"norm_epsilon": "1e-6"}, TypeError, "norm_epsilon must be a number, got str"),
    ({"q_bias": 5}, TypeError, "q_bias must be a float16, .* array, got int")])
def test_constructor_refuses(change, error, message):
    with pytest.raises(error, match=f"QAttn: {message}"):
        QAttn(**_arguments(**change))


def test_calls_refuse():
    attn = QAttn(**_arguments(max_rows=8, max_seq_len=10))
    cos, sin = cupyattn.RopeParams(rotary_dim=32).tables(32)
    cache = PagedCache.contiguous(2, 2, 16, 2, 32)
    x, tables = np.zeros((2, 3, 64), np.float16), {"sin": sin, "cos": cos}

    def refused(error, message, x=x, params=None, cache=cache, layer=0, **change):
        with pytest.raises(error, match=message):
            attn.forward(x, params or Params(2, 3, 0), cache, layer, **tables | change)

    refused(TypeError, "x must be float16, got float32", x.astype(np.float32))
    refused(ValueError, r"x must be \[batch_size=2, q_len=3, 64\], got \[2, 3, 32\]", x[..., :32])
    refused(ValueError, "x must have at most max_rows 8 tokens, got 10", np.zeros((2, 5, 64), np.float16),
            Params(2, 5, 0))
    refused(ValueError, "at most max_seq_len 10 tokens, got 11", params=Params(2, 3, 8))
    refused(ValueError, "layer must be one of the cache's 2, got 2", layer=2)
    refused(ValueError, "layer must be one of the cache's 2, got -1", layer=-1)
    refused(TypeError, "params must be Params or PagedParams, got dict", params={"x": 1})
    refused(ValueError, "sin and cos must be given with rope_style neox, got neither", sin=None, cos=None)
    refused(ValueError, r"sin must be \[positions, 16\] or \[1, 1, positions, 32\]", sin=sin[:, :8], cos=cos[:, :8])
    refused(ValueError, "cache must have a page for each of the 2 sequences, got 1",
            cache=PagedCache.contiguous(1, 1, 16, 2, 32))
    refused(ValueError, "cache must be a list exactly with a past_len for each of its caches", cache=[cache, cache])
    refused(ValueError, "params must have the page_size 16 of the cache, got 8",
            params=PagedParams(2, [[0], [1]], [0, 0], 0, 8, q_len=3))
    refused(ValueError, "params must have page ids below the 2 pages of the cache, got 2",
            params=PagedParams(2, [[0], [2]], [0, 0], 0, 16, q_len=3))
    refused(ValueError, "params must have a seq_len", params=Params(2))
    blocks = Params(2, 3, 0)
    blocks.block_diag_layers = {0}
    refused(ValueError, "params must have cu_seqlens for block-diagonal layer 0, got None", params=blocks)
    blocks.cu_seqlens = [0, 5]
    refused(ValueError, r"params must have cu_seqlens up to its 6 tokens, got \[0, 5\]", params=blocks)
    for change, message in (({"past_len": -2}, "past_len must be"), ({"past_len": -1}, "past_lens must be given"),
                            ({"past_lens": np.zeros(3, np.int32)}, r"past_lens must be int32 \[batch_size=2\]"),
                            ({"past_len": 8}, "past_len \\+ q_len must be at most max_seq_len 10, got 11"),
                            ({"q": np.zeros((2, 3, 2, 32), np.float16)}, r"q must be \[batch_size=2, q_len=3, 4, 32\]"),
                            ({"k": np.zeros((2, 2, 3, 32), np.float16).transpose(0, 2, 1, 3)}, "k must have one")):
        with pytest.raises(ValueError, match=message):
            attn.forward_1(x, 2, 3, **{"past_len": 0} | tables | change)
    with pytest.raises(TypeError, match="q must be float16, got float32"):
        attn.forward_1(x, 2, 3, 0, q=np.zeros((2, 3, 4, 32), np.float32), **tables)
    with pytest.raises(ValueError, match="attn_output must be"):
        attn.forward_2(x, np.zeros((2, 3, 64), np.float16), 2, 3)


def test_out_and_x_overlap():
    layer = Layer(NumpyArrays(), dtype="float16")
    both = layer.rng.standard_normal((3, 3, 64)).astype(np.float16)
    before, cache = both.copy(), contiguous(layer, 2)
    for first, out in ((0, both[:2]), (0, both[1:]), (1, both[:2])):
        with pytest.raises(ValueError, match="x must share no memory with out, got arrays that overlap"):
            layer.attn.forward(both[first:first + 2], Params(2, 3, 0), cache, 0, **layer.tables, out=out)
    assert_same_bits(both, before)


def test_other_layouts_are_refused():
    """As many numbers in another order of axes."""
    layer = Layer(NumpyArrays(), dtype="float16")
    cache, params = contiguous(layer, 2), Params(2, 3, 0)
    x = layer.inputs(2, 3)
    with pytest.raises(ValueError, match=r"x must be \[batch_size=2, q_len=3, 64\], got \[3, 2, 64\]"):
        layer.attn.forward(np.ascontiguousarray(x.transpose(1, 0, 2)), params, cache, 0, **layer.tables)
    square = np.zeros((2, 3, 128), np.float16)
    wide = QAttn(**_arguments(q_o_proj=np.zeros((128, 128), np.float16), hidden_size=128,
                              q_q_proj=np.zeros((128, 128), np.float16), q_k_proj=np.zeros((64, 128), np.float16),
                              q_v_proj=np.zeros((64, 128), np.float16), layernorm=None))
    with pytest.raises(ValueError, match="attn_output must share no memory with x, got"):
        wide.forward_2(square, square, 2, 3)
    mixed = np.zeros((2, 4, 3, 32), np.float16)
    with pytest.raises(ValueError, match=r"attn_output must be .*, got \[2, 4, 3, 32\]"):
        layer.attn.forward_2(x, mixed, 2, 3)
    with pytest.raises(ValueError, match=r"k must be .*, got \[2, 2, 3, 32\]"):
        layer.attn.forward_1(x, 2, 3, 0, k=np.zeros((2, 2, 3, 32), np.float16), **layer.tables)


def test_a_refused_call_writes_nothing(xp):
    """Not even to the cache."""
    layer = Layer(xp, dtype="float16")
    layer.attn.set_loras({"name": {}})
    cache = PagedCache(1, 10, 4, 2, 32, xp=xp.module)
    for pool in (cache.k[0], cache.v[0]):
        pool[...] = xp.array(np.full(pool.shape, 0.5, np.float16))
    x = xp.array(layer.inputs(2, 1))
    rows, params = xp.numpy(x), PagedParams(2, PAGE_TABLE, [5, 9], 9, page_size=4, q_len=1)
    made = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "xp": xp.module}
    lengths = params.cache_seqlens_after
    for message, change in (
            ("sinks must be float32, got float16", {"sinks": xp.array(np.zeros(4, np.float16))}),
            ("sinks must be \\[num_heads\\] = \\[4\\], got \\[3\\]", {"sinks": xp.array(np.zeros(3, np.float32))}),
            ("sinks must be a NumPy or CuPy array, got list", {"sinks": [0.0] * 4}),
            ("window_size must be an int32 of at least 0, got -1", {"window_size": -1}),
            ("softcap must be a finite float32 of at least 0, got -1", {"softcap": -1}),
            ("softmax_scale must be a finite float32, got nan", {"softmax_scale": np.nan}),
            ("invariant must be True or False, got 2", {"invariant": 2}),
            ("layer must be one of the cache's 1, got 1", {"layer": 1}),
            ("layer must be an integer, got str", {"layer": "0"}),
            ("params must be Params or PagedParams, got int", {"params": 5}),
            ("params must be Params or PagedParams, got type", {"params": Params}),
            ("cache must be a PagedCache, a list of them or None, got int", {"cache": 5}),
            ("cache must be a PagedCache, a list of them or None, got a list with ndarray", {"cache": [rows]}),
            ("cache must be given for 9 cached tokens, got None", {"cache": None}),
            ("cache must have 2 heads of 32, got 1 of 32",
             {"cache": PagedCache(1, 10, 4, 1, 32, xp=xp.module)}),
            ("x must be a NumPy or CuPy array, got list", {"x": [1.0]}),
            ("sin must be an array, got int", {"sin": 5}),
            ("cos must be an array, got str", {"cos": "cos"}),
            ("loras must be a sequence of names, got 'name'", {"loras": "name"}),
            ("loras must be a sequence of names, got 5", {"loras": 5}),
            ("loras must hold names of adapters, got \\['name'\\]", {"loras": [["name"]]}),
            ("loras must be among 'name', got 'other'", {"loras": ["name", "other"]}),
            ("sequence_loras must be a sequence of names, one or None a sequence, got 'aa'", {"sequence_loras": "aa"}),
            ("sequence_loras must have a name or None for each of the 2 sequences, got 1",
             {"sequence_loras": ["name"]}),
            ("schedule must be a Schedule, got int", {"schedule": 5}),
            ("schedule must be made for batch 2, got one for 1",
             {"schedule": cupyattn.schedule(lengths[:1], **made)}),
            ("schedule must be made for num_heads 4, got one for 2",
             {"schedule": cupyattn.schedule(lengths, **made | {"num_heads": 2})}),
            ("schedule must be made for head_dim 32, got one for 64",
             {"schedule": cupyattn.schedule(lengths, **made | {"head_dim": 64})}),
            ("schedule must be made for window_size 3, got one for 0",
             {"schedule": cupyattn.schedule(lengths, **made), "window_size": 3}),
            ("schedule must be made for causal True, got one for False",
             {"schedule": cupyattn.schedule(lengths, **made, causal=False)}),
            ("schedule must be made for dtype float16, got one for float32",
             {"schedule": cupyattn.schedule(lengths, **made, dtype="float32")}),
            ("schedule must be made for kv_format float16, got one for int8",
             {"schedule": cupyattn.schedule(lengths, **made, kv_format="int8")}),
            ("schedule must be made for invariant True, got one for False",
             {"schedule": cupyattn.schedule(lengths, **made), "invariant": True}),
            ("schedule must be made for q_len 1, got one for cu_seqlens_q",
             {"schedule": cupyattn.schedule(lengths, **made, cu_seqlens_q=np.int32([0, 1, 2]))})):
        with pytest.raises((TypeError, ValueError), match=f"QAttn: {message}"):
            layer.attn.forward(**{"x": x, "params": params, "cache": cache, "layer": 0, **layer.tables, **change})
        assert_same_bits(xp.numpy(x), rows)
        assert (xp.numpy(cache.k[0]) == 0.5).all() and (xp.numpy(cache.v[0]) == 0.5).all()


def test_a_schedule_of_other_lengths_writes_nothing():
    layer = Layer(NumpyArrays(), dtype="float16")
    cache, x = PagedCache(1, 10, 4, 2, 32), layer.inputs(2, 1)
    for pool in (cache.k[0], cache.v[0]):
        pool[...] = 0.5
    params = PagedParams(2, PAGE_TABLE, [5, 9], 9, page_size=4, q_len=1)
    other = cupyattn.schedule(np.int32([6, 9]), num_heads=4, num_kv_heads=2, head_dim=32)
    with pytest.raises(ValueError, match=r"QAttn: schedule must be made for these cache_seqlens, got one for \[6, 9\]"):
        layer.attn.forward(x, params, cache, 0, **layer.tables, schedule=other)
    assert (cache.k[0] == 0.5).all() and (cache.v[0] == 0.5).all()


def test_layouts_without_rows_write_nothing():
    """Of x, `out` and attention's result, as [tokens, width]."""
    layer = Layer(NumpyArrays(), dtype="float16")
    cache, params, x = contiguous(layer, 2), Params(2, 3, 0), layer.inputs(2, 3).reshape(6, 64)
    for pool in (cache.k[0], cache.v[0]):
        pool[...] = 0.5
    for name, arrays in (("x", {"x": np.asfortranarray(x)}), ("out", {"x": x, "out": np.zeros((64, 6), np.float16).T})):
        with pytest.raises(ValueError, match=f"QAttn: {name} must have a contiguous last axis, got strides"):
            layer.attn.forward(**arrays, params=params, cache=cache, **layer.tables)
    with pytest.raises(ValueError, match="QAttn: attn_output must have a contiguous last axis"):
        layer.attn.forward_2(x, np.zeros((128, 6), np.float16).T, 2, 3)
    assert (cache.k[0] == 0.5).all() and (cache.v[0] == 0.5).all()


def test_pages_of_two_tokens_write_nothing():
    """Pages that are twice among those of new tokens, and one cache for two sequences."""
    layer = Layer(NumpyArrays(), dtype="float16")
    cache, x = PagedCache(1, 10, 4, 2, 32), layer.inputs(2, 3)
    for pool in (cache.k[0], cache.v[0]):
        pool[...] = 0.5
    rows = x.copy()
    for table, lengths in (([[1, 2], [1, 3]], [0, 2]), ([[1, 2], [3, 2]], [2, 4]), ([[1, 4], [3, 2]], [2, 5])):
        params = PagedParams(2, table, lengths, max(lengths), page_size=4, q_len=3)
        if table[0][1] == 4:
            layer.attn.forward(x.copy(), params, PagedCache(1, 10, 4, 2, 32), 0, **layer.tables)   # all apart
        else:
            with pytest.raises(ValueError, match="places must differ from token to token"):
                layer.attn.forward(x, params, cache, 0, **layer.tables)
    with pytest.raises(ValueError, match="QAttn: cache must be a list of different ones, got one twice"):
        layer.attn.forward(x, Params(2, 3, [0, 0]), [cache, cache], 0, **layer.tables)
    assert_same_bits(x, rows)
    assert (cache.k[0] == 0.5).all() and (cache.v[0] == 0.5).all()


def test_arrays_that_cannot_be_written():
    """x of a whole step and of the second half, and the outputs of the first."""
    layer = Layer(NumpyArrays(), dtype="float16")
    cache, params, x = contiguous(layer, 2), Params(2, 3, 0), layer.inputs(2, 3)
    for pool in (cache.k[0], cache.v[0]):
        pool[...] = 0.5
    mixed, q, k = (np.zeros((2, 3, n, 32), np.float16) for n in (4, 4, 2))
    for array in (x, q, k):
        array.flags.writeable = False
    rows = x.copy()
    with pytest.raises(ValueError, match="QAttn: x must be writeable, got a read-only array"):
        layer.attn.forward(x, params, cache, 0, **layer.tables)
    with pytest.raises(ValueError, match="QAttn: x must be writeable, got a read-only array"):
        layer.attn.forward_2(x, mixed, 2, 3)
    repeated = np.lib.stride_tricks.as_strided(rows[:1, :1], (2, 3, 64), (0, 0, 2))
    with pytest.raises(ValueError, match="QAttn: x must not repeat elements"):
        layer.attn.forward(repeated, params, cache, 0, **layer.tables)
    for name, array in (("q", q), ("k", k), ("v", k)):
        with pytest.raises(ValueError, match=f"QAttn: {name} must be writeable, got a read-only array"):
            layer.attn.forward_1(x, 2, 3, 0, **layer.tables, **{name: array})
    assert_same_bits(x, rows)
    assert (cache.k[0] == 0.5).all() and not q.any() and not k.any()
    assert all(a.any() for a in layer.attn.forward_1(x, 2, 3, 0, **layer.tables))   # which only reads x


def test_halves_refuse():
    layer = Layer(NumpyArrays(), dtype="float16", max_seq_len=10)
    x, rank = layer.inputs(2, 3), 4
    layer.attn.set_loras({"name": {"q": LoRA(np.zeros((rank, 64), np.float16), np.zeros((128, rank), np.float16))}})
    mixed = np.zeros((2, 3, 128), np.float16)
    for error, message, change in (
            (TypeError, "loras_temp must be an array, got int", {"loras": ["name"], "loras_temp": 5}),
            (ValueError, "loras_temp must have at least 24 elements, got 23",
             {"loras": ["name"], "loras_temp": np.zeros(23)}),
            (TypeError, "loras must be a sequence of names, got 'name'", {"loras": "name"}),
            (TypeError, "sequence_loras must be a sequence of names, .*, got 'ab'", {"sequence_loras": "ab"}),
            (TypeError, "batch_size must be an integer, got float", {"batch_size": 2.0}),
            (ValueError, "q_len must be an int32 of at least 1, got 0", {"q_len": 0})):
        options = {"batch_size": 2, "q_len": 3} | change
        before = x.copy()
        with pytest.raises(error, match=f"QAttn: {message}"):
            layer.attn.forward_1(x, past_len=0, **layer.tables, **options)
        with pytest.raises(error, match=f"QAttn: {message}"):
            layer.attn.forward_2(x, mixed, **options)
        assert_same_bits(x, before)
    for error, message, change in (
            (TypeError, "past_len must be an integer, got NoneType", {"past_len": None}),
            (TypeError, r"past_lens must be int32 \[batch_size=2\], got \[1.5, 2\]", {"past_lens": [1.5, 2]}),
            (TypeError, r"past_lens must be int32 \[batch_size=2\], got 'ab'", {"past_lens": "ab"}),
            (TypeError, r"past_lens must be int32 \[batch_size=2\], got \[\[1\], \[2, 3\]\]",
             {"past_lens": [[1], [2, 3]]}),
            (TypeError, r"past_lens must be int32 \[batch_size=2\], got \[1, 2147483648\]", {"past_lens": [1, 2**31]}),
            (ValueError, r"past_lens must be int32 \[batch_size=2\], got int64 \[2\]", {"past_lens": np.int64([1, 2])}),
            (ValueError, r"past_lens must be int32 \[batch_size=2\], got int32 \[1\]", {"past_lens": [1]}),
            (ValueError, "past_len \\+ past_lens \\+ q_len must be at most max_seq_len 10, got 11",
             {"past_len": 6, "past_lens": [0, 2]}),
            (TypeError, "q must be a NumPy or CuPy array, got int", {"q": 5})):
        with pytest.raises(error, match=f"QAttn: {message}"):
            layer.attn.forward_1(x, 2, 3, **{"past_len": 0} | layer.tables | change)


def test_adapters_of_the_wrong_kind():
    layer = Layer(NumpyArrays())
    good = {"q": LoRA(np.zeros((4, 64), np.float32), np.zeros((128, 4), np.float32))}
    assert layer.attn.set_loras({"good": good}) == 4
    for error, message, adapters in (
            (TypeError, r"adapters must be a dict of name to \(dict of projection to LoRA\), got int", 5),
            (TypeError, "adapters must be a dict .*, got str", "good"),
            (TypeError, r"loras\['bad'\] must be a dict of projection to LoRA, got LoRA", {"bad": good["q"]}),
            (TypeError, r"loras\['bad'\]\['q'\] must be a LoRA of two arrays, got int", {"bad": {"q": 5}}),
            (TypeError, r"loras\['bad'\]\['q'\].scale must be a number, got str",
             {"bad": {"q": good["q"]._replace(scale="1")}})):
        with pytest.raises(error, match=f"QAttn: {message}"):
            layer.attn.set_loras(adapters)
        assert list(layer.attn.loras.names) == ["good"]
    with pytest.raises(ValueError, match="QAttn: loras must be among 'good', got 'bad'"):
        layer.attn.forward(layer.inputs(1, 1), Params(1, 1), **layer.tables, loras=["bad"])


def test_functions_of_exllamav2_refuse():
    layer = Layer(NumpyArrays(), dtype="float16")
    x, out = layer.inputs(1, 1), [np.zeros((1, 1, n, 32), np.float16) for n in (4, 2, 2)]
    mixed = np.zeros((1, 1, 128), np.float16)
    a, b = np.zeros((64, 4), np.float16), np.zeros((4, 128), np.float16)
    for op, arguments in (("free_q_attn", ()), ("q_attn_forward_1", (x, 1, 1, 0, None, *out, None, None)),
                          ("q_attn_forward_2", (x, mixed, 1, 1)), ("q_attn_set_loras", ({},) * 8)):
        with pytest.raises(TypeError, match=f"{op}: q_attn must be a QAttn, from make_q_attn, got int"):
            getattr(cupyattn, op)(140123, *arguments)
    for loras in ("name", 5):
        with pytest.raises(TypeError, match=f"QAttn: loras must be a sequence of names, got {loras!r}"):
            cupyattn.q_attn_forward_1(layer.attn, x, 1, 1, 0, None, *out, *layer.tables.values(), loras)
        with pytest.raises(TypeError, match=f"QAttn: loras must be a sequence of names, got {loras!r}"):
            cupyattn.q_attn_forward_2(layer.attn, x, mixed, 1, 1, loras)
    assert cupyattn.q_attn_set_loras(layer.attn, {7: a}, {7: b}, *[{}] * 6) == 4
    for error, message, change in (
            (TypeError, "q_proj_lora_b must be a dict of key to array, got list", ({7: a}, [b])),
            (TypeError, r"q_proj_lora_a\[7\] must be an array of two axes, got int", ({7: 5}, {7: b})),
            (TypeError, r"q_proj_lora_b\[7\] must be an array of two axes, got ndarray", ({7: a}, {7: b[0]})),
            (ValueError, "q_proj_lora_a must have 8 like q_proj_lora_b, got none", ({7: a}, {7: b, 8: b}))):
        with pytest.raises(error, match=f"q_attn_set_loras: {message}"):
            cupyattn.q_attn_set_loras(layer.attn, *change, *[{}] * 6)
        assert list(layer.attn.loras.names) == [7]
