# SPDX-License-Identifier: Apache-2.0
"""The transformer cache: rows written at each sequence's index, masks, slots of a pool, formats."""

import types

import numpy as np
import pytest
from compare import assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyattn import (
    QuantizedKV,
    TransformerCache,
    TransformerCacheMetaData,
    TransformerCacheView,
    TransformerMetadata,
    attention,
)
from cupyattn.kv.quantized import FORMATS

B, S, H, D = 2, 6, 2, 8
NUMPY = types.SimpleNamespace(array=np.array, numpy=np.array, module=np)


def metadata(layers=1, batch=B, capacity=S, **sizes):
    return TransformerCacheMetaData.create(batch, capacity, layers, 0, **{"num_heads": H, "head_dim": D, **sizes})


def make(xp, dtype="float32", index=(0, 0), quantizer=None, starts=None, **sizes):
    """A view whose sequences have `index` tokens, NaN (or what the format's zeros are) everywhere."""
    view = TransformerCacheView.init(None, dtype, metadata(**sizes), quantizer, starts=starts, xp=xp.module)
    if quantizer is None:
        view.key.fill(np.nan)
        view.value.fill(np.nan)
    view.index = xp.array(np.int32(index))
    return view


def new(xp, tokens, dtype="float32", heads=H, dim=D, batch=B, seed=0):
    rows = np.random.default_rng(seed).standard_normal((batch, tokens, heads, dim))
    return xp.array(rows.astype(dtype_of(dtype)))


def causal(rows=S, columns=S):
    return np.tril(np.ones((1, 1, rows, columns), bool))


def picture(xp, mask):
    """The mask as text, a line per sequence, a word per query."""
    return [" ".join("".join(".x"[int(s)] for s in row) for row in rows[0]) for rows in xp.numpy(mask)]


# ---- metadata --------------------------------------------------------------------------------------------

def test_metadata():
    made = TransformerCacheMetaData.create(1, 2, 3, 4, 5, 6)
    assert list(made.to_dict().values()) == [1, 2, 3, 4, 5, 6, 5, 5, 6, 6, True, True]
    assert list(made.to_dict()) == ["batch_size", "sequence_length", "num_hidden_layers", "pad_token_id", "num_heads",
                                    "head_dim", "key_heads", "value_heads", "key_dim", "value_dim",
                                    "update_causal_mask", "create_attention_bias"]
    made = TransformerCacheMetaData.create(1, 2, 3, 4, 5, 6, 7, 0, 9, 0, False, False)   # what is given wins, 0 is not
    assert list(made.to_dict().values()) == [1, 2, 3, 4, 5, 6, 7, 5, 9, 6, False, False]
    made = TransformerCacheMetaData.create(1, 2, 0, 4, key_heads=1, value_heads=2, key_dim=3, value_dim=4)
    assert (made.num_heads, made.head_dim, made.num_hidden_layers) == (None, None, 0)
    assert TransformerCacheMetaData.from_json(made.to_json()) == made


@pytest.mark.parametrize("given,message", [
    ({"batch_size": 0}, "batch_size must be positive, got 0"),
    ({"sequence_length": -1}, "sequence_length must be positive, got -1"),
    ({"head_dim": None}, "Either head_dim or both key_dim and value_dim must be specified"),
    ({"head_dim": 0, "key_dim": 3}, "Either head_dim or both key_dim and value_dim must be specified"),
    ({"num_heads": None, "value_heads": 3}, "Either num_heads or both key_heads and value_heads must be specified")])
def test_metadata_is_checked(given, message):
    with pytest.raises(ValueError, match=message):
        TransformerCacheMetaData.create(**{"batch_size": 1, "sequence_length": 2, "num_hidden_layers": 3,
                                           "pad_token_id": 4, "num_heads": 5, "head_dim": 6, **given})


def test_runtime_metadata():
    assert TransformerMetadata() == TransformerMetadata(False, None)
    made = TransformerMetadata(postpadded=True, index=np.int32([1, 2]))
    assert TransformerMetadata.from_json(made.to_json()) == made != TransformerMetadata(True, np.int32([1, 3]))


# ---- views -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_init(xp, dtype):
    sizes = metadata(key_heads=3, value_heads=1, key_dim=4, value_dim=16)
    view = TransformerCacheView.init(None, dtype, sizes, None, None, [1, 2], 7, xp=xp.module)
    assert_same_bits(xp.numpy(view.key), np.zeros((B, S, 3, 4), dtype_of(dtype)))
    assert_same_bits(xp.numpy(view.value), np.zeros((B, S, 1, 16), dtype_of(dtype)))
    assert_same_bits(xp.numpy(view.index), np.zeros(B, np.int32))
    assert_same_bits(xp.numpy(view.starts), np.int32([1, 2]))
    assert view.layer_index == 7 and view.metadata is sizes and isinstance(view.key, xp.module.ndarray)
    assert not view.is_empty and view.replace(key=None).is_empty


def test_init_cache(xp):
    starts = np.int32([1, 2])
    cache = TransformerCache.init_cache(metadata=metadata(layers=3), starts=starts, xp=xp.module)
    assert [view.layer_index for view in cache.views] == [0, 1, 2] and cache[0].key.dtype == dtype_of("bfloat16")
    cache[0].starts[0] = 9
    assert starts.tolist() == [1, 2] and xp.numpy(cache[1].starts).tolist() == [1, 2]   # arrays of its own
    assert cache.nbytes == 3 * (2 * B * S * H * D * 2 + 2 * B * 4)
    with pytest.raises(TypeError, match="init_cache: metadata must be given"):
        TransformerCache.init_cache(None)
    with pytest.raises(ValueError, match=r"starts must be \[batch\] = \[2\], got \[3\]"):
        TransformerCacheView.init(metadata=metadata(), starts=[1, 2, 3])
    with pytest.raises(TypeError, match="starts must be integers, got float64"):
        TransformerCacheView.init(metadata=metadata(), starts=[1.0, 2])
    for starts in ([0, S + 1], [-1, 0]):
        with pytest.raises(ValueError, match=r"init: starts must be between 0 and sequence_length = 6, got (7|-1)"):
            TransformerCacheView.init(metadata=metadata(), starts=starts)
    with pytest.raises(TypeError, match="init: dtype must be float16, bfloat16, float32, got float64"):
        TransformerCacheView.init(None, "float64", metadata())


@pytest.mark.parametrize("quantizer", ["int3", "float16", 8, lambda x: x])
def test_other_quantizers_are_refused(quantizer):
    view = TransformerCacheView.init(metadata=metadata(), dtype="float32")
    cache = TransformerCache([view])
    x = np.zeros((B, 1, H, D), np.float32)
    for call in (lambda: TransformerCacheView.init(None, "float16", metadata(), quantizer),
                 lambda: TransformerCache.init_cache(metadata=metadata(), quantizer=quantizer),
                 lambda: view.concatenate_to_cache(x, x, x, quantizer), lambda: cache.insert(cache, 0, quantizer)):
        with pytest.raises(TypeError, match="quantizer must be None or a format of QuantizedKV, int8, int4, int8_sym"):
            call()


# ---- new tokens ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_sequence_is_written_at_its_own_index(xp, dtype):
    view = make(xp, dtype, index=(0, 3))
    before = view.copy()
    key, value = new(xp, 2, dtype), new(xp, 2, dtype, seed=1)
    got = view.concatenate_to_cache(key, key, value)
    assert len(got) == 3 and got[0] is view.key and got[1] is view.value   # in place, three items
    for cache, rows in ((view.key, key), (view.value, value)):
        want = poison(np.empty((B, S, H, D), dtype_of(dtype)))
        want[0, :2], want[1, 3:5] = xp.numpy(rows)
        assert_same_bits(xp.numpy(cache), want)   # nothing else is touched
    assert xp.numpy(view.index).tolist() == [2, 5] and xp.numpy(before.index).tolist() == [0, 3]


def test_rounding_to_the_cache(xp):
    view = make(xp, "bfloat16")
    x = xp.array(np.full((B, 1, H, D), 1.00390625 + 2**-12, np.float32))
    view.concatenate_to_cache(x, x, x)
    assert (xp.numpy(view.key)[:, 0] == dtype_of("bfloat16").type(1.0078125)).all()
    view = make(xp, "float32")
    x = x.astype(np.float16)
    view.concatenate_to_cache(x, x, x)
    assert_same_bits(xp.numpy(view.value)[:, :1], xp.numpy(x).astype(np.float32))


def test_a_new_view_on_request(xp):
    view = make(xp, index=(1, 0))
    before, x = view.copy(), new(xp, 2)
    key, value, mask, other = view.concatenate_to_cache(x, x, x, return_view=True)
    assert view == before and other.key is key and other.value is value and xp.numpy(other.index).tolist() == [3, 2]
    again = view.concatenate_to_cache(x, x, x)
    assert view == other and picture(xp, again[2]) == picture(xp, mask)


def test_keys_and_values_of_other_sizes(xp):
    view = make(xp, key_heads=3, value_heads=1, key_dim=5, value_dim=7, index=(1, 4))
    key, value = new(xp, 2, heads=3, dim=5), new(xp, 2, heads=1, dim=7)
    view.concatenate_to_cache(new(xp, 2), key, value)
    for cache, rows in ((view.key, key), (view.value, value)):
        assert_same_bits(xp.numpy(cache)[1, 4:], xp.numpy(rows)[1])
        assert_same_bits(xp.numpy(cache)[0, 1:3], xp.numpy(rows)[0])
        assert np.isnan(xp.numpy(cache)[0, 3:]).all()
    with pytest.raises(ValueError, match="value_heads must be key_heads = 3 with a quantizer, got 1"):
        make(xp, key_heads=3, value_heads=1, quantizer="int8")


def test_no_new_tokens(xp):
    view = make(xp, index=(1, 2))
    before = view.copy()
    mask = view.concatenate_to_cache(new(xp, 0), new(xp, 0), new(xp, 0))[2]
    assert mask.shape == (B, 1, 0, S) and view == before


# ---- masks -----------------------------------------------------------------------------------------------

def test_mask_without_causal_mask_ends_behind_the_new_tokens(xp):
    mask = make(xp, index=(0, 3)).concatenate_to_cache(new(xp, 2), new(xp, 2), new(xp, 2))[2]
    assert mask.dtype == bool and mask.shape == (B, 1, 2, S)
    assert picture(xp, mask) == ["xx.... xx....", "xxxxx. xxxxx."]


def test_causal_mask_is_read_at_each_sequence_s_position(xp):
    x = new(xp, 2)
    for mask in (xp.array(causal()), xp.array(causal().astype(np.int32)), xp.array(np.repeat(causal(), B, axis=0))):
        got = make(xp, index=(0, 3)).concatenate_to_cache(x, x, x, causal_mask=mask)[2]
        assert picture(xp, got) == ["x..... xx....", "xxxx.. xxxxx."]
    rows = np.concatenate([causal(), np.zeros((1, 1, S, S), bool)])
    got = make(xp, index=(0, 3)).concatenate_to_cache(x, x, x, causal_mask=xp.array(rows))[2]
    assert picture(xp, got) == ["x..... xx....", "...... ......"]


def test_attention_mask_is_left_padding(xp):
    pads = np.ones((B, S), np.int32)
    pads[0, :2], pads[1, 0] = 0, 0
    x = new(xp, 3)
    view = make(xp)
    got = view.concatenate_to_cache(x, x, x, attention_mask=xp.array(pads), causal_mask=xp.array(causal()))[2]
    assert picture(xp, got) == ["...... ...... ..x...", "...... .x.... .xx..."]   # queries of pads see nothing
    x = new(xp, 1)
    got = view.concatenate_to_cache(x, x, x, attention_mask=xp.array(pads), causal_mask=xp.array(causal()))[2]
    assert picture(xp, got) == ["..xx..", ".xxx.."]


def test_attention_mask_of_four_axes(xp):
    x = new(xp, 2)
    full = np.ones((B, 1, 2, S), bool)
    full[0, 0, 1, 0] = False
    got = make(xp, index=(1, 1)).concatenate_to_cache(x, x, x, attention_mask=xp.array(full))[2]
    assert picture(xp, got) == ["xxx... .xx...", "xxx... xxx..."]
    row = np.ones((1, 1, 1, S), bool)
    row[..., 1] = False
    got = make(xp, index=(1, 1)).concatenate_to_cache(x, x, x, attention_mask=xp.array(row))[2]
    assert picture(xp, got) == ["x.x... x.x..."] * 2


@pytest.mark.parametrize("tokens,want", [(1, ["xx....", "...xx."]), (2, ["xx.... .xx...", "...xx. ....xx"])])
def test_window(xp, tokens, want):
    """Slots in (position - 2, position]: a single new token has a window, too."""
    x = new(xp, tokens)
    for options in ({}, {"causal_mask": xp.array(causal())}):
        got = make(xp, index=(1, 4)).concatenate_to_cache(x, x, x, window_size=2, **options)[2]
        assert picture(xp, got) == want
    got = make(xp, index=(1, 4)).concatenate_to_cache(x, x, x, window_size=2**31 - 1)[2]
    assert picture(xp, got) == {1: ["xx....", "xxxxx."], 2: ["xx.... xxx...", "xxxxx. xxxxxx"]}[tokens]


def test_token_types_by_query(xp):
    x, types = new(xp, 3), xp.array(np.int32([[0, 5, 5], [7, 0, 7]]))
    got = make(xp, index=(0, 2)).concatenate_to_cache(x, x, x, causal_mask=xp.array(causal()), token_type_ids=types)[2]
    assert picture(xp, got) == ["x..... xxx... xxx...", "xxx.x. xxxx.. xxxxx."]
    pads = np.ones((B, S), bool)
    pads[:, 4] = False
    got = make(xp, index=(0, 2)).concatenate_to_cache(x, x, x, causal_mask=xp.array(causal()), token_type_ids=types,
                                                      attention_mask=xp.array(pads), window_size=2)[2]
    assert picture(xp, got) == ["x..... xxx... .xx...", ".xx... ..xx.. ..xx.."]
    x = new(xp, 1)   # one token: types mean nothing
    got = make(xp, index=(0, 2)).concatenate_to_cache(x, x, x, causal_mask=xp.array(causal()),
                                                      token_type_ids=xp.array(np.int32([[5], [5]])))[2]
    assert picture(xp, got) == ["x.....", "xxx..."]


def seen(position, slot, index, tokens, window, is_causal, types):
    """The rule of `concatenate_to_cache`, attention_mask apart, for one query and one slot."""
    chosen = (not is_causal or slot <= position) and (not window or position - window < slot <= position)
    if types is not None and tokens > 1 and (is_causal or window) and index <= slot < index + tokens:
        chosen = chosen or types[slot - index] == types[position - index] != 0
    return chosen and slot < index + tokens


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_masks_and_rows(data):
    """Every sequence at its own index: the mask is the rule slot by slot, only the new tokens' slots are written."""
    tokens = data.draw(st.integers(0, S), "tokens")
    index = data.draw(st.lists(st.integers(0, S - tokens), min_size=B, max_size=B), "index")
    window, is_causal = data.draw(st.integers(0, S), "window"), data.draw(st.booleans(), "causal")
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "seed"))
    types = rng.integers(0, 3, (B, tokens)) if data.draw(st.booleans(), "types") else None
    shape = data.draw(st.sampled_from([(B, S), (B, 1, tokens, S), (1, 1, 1, S), (1, 1, tokens, 1)]), "shape")
    pads = rng.integers(0, 2, shape)
    view = make(NUMPY, index=index)
    x = new(NUMPY, tokens)
    mask = view.concatenate_to_cache(x, x, x, attention_mask=pads, causal_mask=causal() if is_causal else None,
                                     token_type_ids=types, window_size=window)[2]
    pads = np.broadcast_to(pads if pads.ndim == 4 else pads[:, None, None], mask.shape)
    for b, _, t, s in np.ndindex(mask.shape):
        rule = seen(index[b] + t, s, index[b], tokens, window, is_causal, None if types is None else types[b])
        assert mask[b, 0, t, s] == (rule and pads[b, 0, t, s] != 0)
    for b, first in enumerate(index):
        want = poison(np.empty((S, H, D), np.float32))
        want[first:first + tokens] = x[b]
        assert_same_bits(view.key[b], want)
    assert view.index.tolist() == [first + tokens for first in index]


# ---- what does not fit -----------------------------------------------------------------------------------

def test_a_full_cache(xp):
    view = make(xp, index=(0, S - 1))
    before, x = view.copy(), new(xp, 2)
    if xp.name == "numpy":
        with pytest.raises(ValueError, match="index . T must be at most sequence_length = 6, got 5 . 2"):
            view.concatenate_to_cache(x, x, x)
        assert view == before
        return
    view.concatenate_to_cache(x, x, x)   # what has no slot is not stored, and overwrites nothing
    want = xp.numpy(before.key)
    want[0, :2], want[1, S - 1] = xp.numpy(x)[0], xp.numpy(x)[1, 0]
    assert_same_bits(xp.numpy(view.key), want)


def test_wrong_arguments(xp):
    view, x = make(xp, index=(1, 1)), new(xp, 2)
    before = view.copy()
    wrong = [
        (ValueError, r"query must be \[batch = 2, T, ...\], got \[3, 2\]", (xp.array(np.zeros((3, 2))), x, x), {}),
        (ValueError, r"key must be \[batch, T, heads, dim\] = \[2, 2, 2, 8\], got", (x, x[:, :1], x), {}),
        (ValueError, r"value must be \[batch, T, heads, dim\]", (x, x, x[..., :4]), {}),
        (ValueError, "quantizer must be None or the view's, None, got int8", (x, x, x, "int8"), {}),
        (TypeError, "query must be a NumPy or CuPy array, got list", ([], x, x), {}),
        (ValueError, "window_size must be", (x, x, x), {"window_size": -1}),
        (TypeError, "return_view must be True or False", (x, x, x), {"return_view": 1}),
        (ValueError, r"attention_mask must be \[2, 6\], got \[2, 5\]", (x, x, x),
         {"attention_mask": xp.array(np.ones((B, S - 1), bool))}),
        (ValueError, r"attention_mask must be broadcastable to \[2, 1, 2, 6\], got \[2, 2, 2, 6\]", (x, x, x),
         {"attention_mask": xp.array(np.ones((B, 2, 2, S), bool))}),
        (TypeError, "attention_mask must be bool or integers, got float32", (x, x, x),
         {"attention_mask": xp.array(np.ones((B, S), np.float32))}),
        (ValueError, r"causal_mask must be \[2, 1, rows, 6\], got \[3, 1, 6, 6\]", (x, x, x),
         {"causal_mask": xp.array(np.repeat(causal(), 3, axis=0))}),
        (ValueError, r"token_type_ids must be \[2, 2\], got \[2, 3\]", (x, x, x),
         {"causal_mask": xp.array(causal()), "token_type_ids": xp.array(np.ones((B, 3), np.int32))})]
    for error, message, arguments, options in wrong:
        with pytest.raises(error, match=message):
            view.concatenate_to_cache(*arguments, **options)
    if xp.name == "numpy":
        with pytest.raises(ValueError, match="causal_mask must have a row for each position up to 3, got 2"):
            view.concatenate_to_cache(x, x, x, causal_mask=causal(rows=2))
    else:
        with pytest.raises(TypeError, match="all arrays must be of one kind"):
            view.concatenate_to_cache(x, x, x, attention_mask=np.ones((B, S), bool))
    with pytest.raises(ValueError, match="key of the view must be an array, got None"):
        view.replace(key=None).concatenate_to_cache(x, x, x)
    assert view == before


# ---- with the ops ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("xp", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_attention_over_the_cache(xp):
    """A left-padded prompt and two steps: by the mask and by index and starts, against float64."""
    view = make(xp, starts=[2, 0])
    pads = np.ones((B, S), bool)
    pads[0, :2] = False
    for step, tokens in enumerate((3, 1, 1)):
        q, k, v = (new(xp, tokens, seed=10 * step + n) for n in range(3))
        key, value, mask = view.concatenate_to_cache(q, k, v, attention_mask=xp.array(pads),
                                                     causal_mask=xp.array(causal()), window_size=3)
        rows = q.reshape(B * tokens, H, D)
        common = {"cu_seqlens_q": xp.array(np.arange(B + 1, dtype=np.int32) * tokens), "block_table": view.block_table,
                  "cache_seqlens": view.index, "max_q_len": tokens}
        by_mask = attention(rows, key, value, mask=mask, causal=False, **common)
        by_starts = attention(rows, key, value, cache_starts=view.starts, window_size=3, **common)
        seen = xp.numpy(mask)
        scores = np.einsum("bthd,bshd->bhts", xp.numpy(q).astype(np.float64), np.nan_to_num(xp.numpy(key))) * D**-0.5
        weights = np.exp(scores) * seen
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        want = np.einsum("bhts,bshd->bthd", weights, np.nan_to_num(xp.numpy(value))).reshape(B * tokens, H, D)
        assert_close(xp.numpy(by_mask), want, 2e-6, 0)
        assert_close(xp.numpy(by_starts), want, 2e-6, 0)
        if step == 0:
            assert not xp.numpy(by_mask)[:2].any()   # the pads' queries


# half a step of numbers within about 3, or with a scale of 1; fp8's relative step
ERRORS = {"int8": (0.015, 0), "int4": (0.25, 0), "int8_symmetric": (0.51, 0), "int8_channel": (0.51, 0),
          "fp8_e4m3": (0.01, 0.063), "fp8_e5m2": (0.01, 0.126), "hadamard8": (0.03, 0), "hadamard6": (0.12, 0),
          "hadamard4": (0.5, 0)}


@pytest.mark.parametrize("quantizer", FORMATS)
def test_formats(xp, quantizer):
    view = make(xp, "float16", index=(0, 3), quantizer=quantizer, head_dim=32)
    assert isinstance(view.key, QuantizedKV) and view.key.format == view.value.format == quantizer
    before = view.copy()
    key, value = new(xp, 2, "float16", dim=32), new(xp, 2, "float16", dim=32, seed=1)
    got = view.concatenate_to_cache(key, key, value, quantizer)
    assert got[0] is view.key and xp.numpy(view.index).tolist() == [2, 5]
    for side, rows in ((view.key, key), (view.value, value)):
        held, rows = side.dequantize(), xp.numpy(rows)
        assert_close(held[0, :2], rows[0], *ERRORS[quantizer])
        assert_close(held[1, 3:5], rows[1], *ERRORS[quantizer])
        assert not held[0, 2:].any() and not held[1, :3].any()
    untouched = before.copy()
    untouched.concatenate_to_cache(key, key, value)
    assert untouched == view and untouched != before
    assert TransformerCacheView.from_json(view.to_json(), xp=xp.module) == view
    assert view.to(np) == view and isinstance(view.to(np).key.codes, np.ndarray) and view.to(xp.module) is view
    other = TransformerCache([make(xp, "float16", quantizer=quantizer, head_dim=32, batch=3, index=(0, 0, 0))])
    other.insert(TransformerCache([view]), 1)
    assert_same_bits(other[0].key.dequantize()[1:], view.key.dequantize())
    assert not other[0].key.dequantize()[0].any() and xp.numpy(other[0].index).tolist() == [0, 2, 5]


# ---- slots of a pool -------------------------------------------------------------------------------------

def pool(xp, layers=2, batch=4, capacity=S):
    cache = TransformerCache.init_cache(metadata=metadata(layers, batch, capacity), dtype="float32", xp=xp.module)
    for view in cache.views:
        view.key.fill(-1)
        view.value.fill(-2)
    return cache


def test_insert(xp):
    cache = pool(xp)
    other = TransformerCache.init_cache(metadata=metadata(2, 2, 3), dtype="float32", starts=[1, 0], xp=xp.module)
    for layer, view in enumerate(other.views):
        view.key.fill(layer + 1)
        view.value.fill(layer + 10)
        view.index = xp.array(np.int32([3, 2]))
    assert cache.insert(other, 1, None, None) is cache
    for layer, view in enumerate(cache.views):
        key, value = xp.numpy(view.key), xp.numpy(view.value)
        assert (key[1:3, :3] == layer + 1).all() and (value[1:3, :3] == layer + 10).all()
        assert (key[1:3, 3:] == -1).all() and (value[[0, 3]] == -2).all()   # a longer target keeps its tail
        assert xp.numpy(view.index).tolist() == [0, 3, 2, 0] and xp.numpy(view.starts).tolist() == [0, 1, 0, 0]
    other[0].key.fill(99)
    assert not (xp.numpy(cache[0].key) == 99).any()


def test_insert_index_and_starts(xp):
    cache = pool(xp)
    assert cache.insert_index(5, 2) is cache and cache.insert_starts([[1], [2]], slot=1) is cache
    cache.insert_index(xp.array(np.int32([4])), 0, None)
    for view in cache.views:
        assert xp.numpy(view.index).tolist() == [4, 0, 5, 0] and xp.numpy(view.starts).tolist() == [0, 1, 2, 0]
    assert view.index.dtype == np.int32


def test_inserts_that_do_not_fit(xp):
    cache = pool(xp)
    before = cache.copy()
    small = TransformerCache.init_cache(metadata=metadata(2, 2), dtype="float32", xp=xp.module)
    for slot in (3, 4, -1):
        with pytest.raises(IndexError, match=rf"insert: slot must be in \[0, 2\], so that 2 of 4 .* got {slot}"):
            cache.insert(small, slot)
    for call in (lambda: cache.insert_index(1, 4), lambda: cache.insert_starts([1, 2], 3),
                 lambda: cache.insert_index(1, -1)):
        with pytest.raises(IndexError, match="slot must be in"):
            call()
    with pytest.raises(TypeError, match="slot must be an integer"):
        cache.insert(small, 1.0)
    with pytest.raises(TypeError, match="index must be integers"):
        cache.insert_index(1.5, 0)
    for wrong in (-1, S + 1):   # a negative index would drop tokens, one past the end has no room for any
        for insert in (cache.insert_index, cache.insert_starts):
            with pytest.raises(ValueError, match=f"must be between 0 and sequence_length = 6, got {wrong}"):
                insert([0, wrong], 1)
    with pytest.raises(ValueError, match="other must have 2 layers, got 1"):
        cache.insert(TransformerCache(small.views[:1]), 0)
    with pytest.raises(ValueError, match="at most 6 tokens"):
        cache.insert(pool(xp, capacity=S + 1), 0)
    with pytest.raises(ValueError, match="key of other must be plain, got int8"):
        cache.insert(TransformerCache.init_cache(metadata=metadata(2), quantizer="int8", xp=xp.module), 0)
    small.views[1] = None
    with pytest.raises(ValueError, match="Cache view for layer 1 is None"):
        cache.insert(small, 0)
    if xp.name != "numpy":
        with pytest.raises(TypeError, match="all arrays must be of one kind"):
            cache.insert(TransformerCache.init_cache(metadata=metadata(2), dtype="float32"), 0)
    assert cache == before


def test_inserted_codes_need_the_same_scales():
    caches = [TransformerCache.init_cache(metadata=metadata(), quantizer="int8_symmetric") for _ in range(2)]
    caches[1][0].value.scale[...] = 2
    with pytest.raises(ValueError, match="value of other must have the scales of this cache, got others"):
        caches[0].insert(caches[1], 0)


def test_pooled_sequences_go_on_at_their_own_lengths(xp):
    cache = pool(xp, layers=1)
    cache.insert_index([4, 0, 2, 1], 0)
    x = new(xp, 1, batch=4)
    mask = cache[0].concatenate_to_cache(x, x, x)[2]
    assert picture(xp, mask) == ["xxxxx.", "x.....", "xxx...", "xx...."]
    assert_same_bits(xp.numpy(cache[0].key)[np.arange(4), [4, 0, 2, 1]], xp.numpy(x)[:, 0])


# ---- saving ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nothing_is_lost(xp, dtype):
    cache = TransformerCache.init_cache(metadata=metadata(2), dtype=dtype, starts=[0, 1], xp=xp.module)
    x = new(xp, 3, dtype)
    cache[1].concatenate_to_cache(x, x, x)
    back = TransformerCache.from_json(cache.to_json(), xp=xp.module)
    assert back == cache and back[1].metadata == cache[1].metadata and back[1].key.dtype == dtype_of(dtype)
    pure, facts = cache.to_pure()
    assert facts is cache[1].metadata
    assert [a is b for a, b in zip(pure[1], (cache[1].key, cache[1].value, cache[1].index, cache[1].starts),
                                   strict=True)] == [True] * 4
    back = TransformerCache.from_pure(pure, facts)
    assert back == cache and [view.layer_index for view in back.views] == [0, 1]
    assert TransformerCache.init_empty(2).views == [None, None]
