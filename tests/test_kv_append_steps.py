# SPDX-License-Identifier: Apache-2.0
"""kv_append: bias, norm, RoPE and log-n in front of the cache, finished queries, context parallel ranks."""

import numpy as np
import pytest
from compare import ROUNDING, assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_kv_append import check, empty_caches, new_tokens

import cupyattn
from cupyattn.reference.kv_append import kv_append as expected_append
from cupyattn.runtime.cpu import settings

rng = np.random.default_rng(31)

POSITIONS = np.int32([0, 1, 2, 5, -1, 40, 63])   # of 2 sequences in pages of 16
PAGED = {"positions": POSITIONS, "block_table": np.int32([[3, 9, 1, 0, 5], [8, 2, 7, 4, 6]]),
         "batch_indices": np.int32([0, 0, 0, 1, 1, 1, 1])}
ROPE = ("positions", "cos", "sin", "style", "rotary_dim")
BIASES, NORMS = ("q_bias", "k_bias", "v_bias"), ("q_norm", "k_norm")


def steps_of(heads, kv_heads, head_dim, dtype="float16", style="neox", rotary_dim=None, gain=None, head_dim_v=None,
             tokens=7):
    """Random inputs of every step, and where the tokens go."""
    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype_of(dtype))

    head_dim_v, rotary_dim = head_dim_v or head_dim, rotary_dim or head_dim
    cos, sin = cupyattn.RopeParams(rotary_dim=rotary_dim).tables(64)
    return {"k": draw(tokens, kv_heads, head_dim), "v": draw(tokens, kv_heads, head_dim_v),
            "q": draw(tokens, heads, head_dim), "cos": cos, "sin": sin, "style": style, "rotary_dim": rotary_dim,
            "q_bias": draw(heads, head_dim), "k_bias": draw(kv_heads, head_dim), "v_bias": draw(kv_heads, head_dim_v),
            "q_norm": draw(head_dim).astype(dtype_of(gain or dtype)),
            "k_norm": draw(head_dim).astype(dtype_of(gain or dtype)), "logn_max_position": 16, **PAGED}


def on(xp, given):
    return {name: xp.array(a) if isinstance(a, np.ndarray) else a for name, a in given.items()}


def check_steps(xp, given, page_size=16, cache_dtype=None, q_out=None):
    """Append and finish queries on `xp`; everything is close to the reference, untouched slots keep their bits."""
    k, v = given["k"], given["v"]
    name = k.dtype.name
    caches = empty_caches(10, page_size, k.shape[1], k.shape[2], cache_dtype or name, v.shape[2])
    want = [cache.copy() for cache in caches]
    given = dict(given)
    expected_q = expected_append(given.pop("k"), given.pop("v"), *want, **given)
    device, inputs = [xp.array(cache) for cache in caches], on(xp, given)
    before = {name: xp.numpy(a) for name, a in inputs.items() if hasattr(a, "shape")}
    q_out = cupyattn.kv_append(xp.array(k), xp.array(v), *device, q_out=q_out, **inputs)
    for name_, a in before.items():
        assert_same_bits(xp.numpy(inputs[name_]), a)
    atol, rtol = ROUNDING[name]
    # two close numbers may round to neighbours; a norm over few elements divides by a small number
    for got, expected in zip(device, want, strict=True):
        assert_close(xp.numpy(got), expected, 8 * atol, 2 * rtol)
    if expected_q is None:
        assert q_out is None
    else:
        assert_close(xp.numpy(q_out), expected_q, 8 * atol, 2 * rtol)
    return device, q_out


@pytest.mark.parametrize("heads, kv_heads, head_dim, dtype, style, rotary_dim, gain, cache_dtype", [
    (3, 2, 64, "float16", "neox", 64, "float16", "float16"), (5, 1, 128, "bfloat16", "neox", 64, "float32", "bfloat16"),
    (2, 2, 32, "float32", "neox", 32, "float32", "float32"), (3, 3, 20, "float16", "neox", 10, "float32", "float16"),
    (7, 1, 80, "float16", "interleaved", 32, "float16", "float16"),
    (4, 2, 8, "float32", "interleaved", 6, "float32", "float16"),
    (3, 1, 256, "bfloat16", "interleaved", 256, "bfloat16", "float32")])
def test_all_steps(xp, heads, kv_heads, head_dim, dtype, style, rotary_dim, gain, cache_dtype):
    check_steps(xp, steps_of(heads, kv_heads, head_dim, dtype, style, rotary_dim, gain), cache_dtype=cache_dtype)


@pytest.mark.parametrize("names", [("q",), BIASES[1:], ("k_bias",), ("v_bias",), NORMS[1:], (*ROPE[1:],),
                                   ("q", *ROPE[1:]), ("q", *BIASES), ("q", "q_norm"), ("q", "logn_max_position"),
                                   ("q", *NORMS, *ROPE[1:])], ids="+".join)
def test_each_step_alone(xp, names):
    given = steps_of(3, 2, 64)
    check_steps(xp, {name: a for name, a in given.items() if name in (*names, "k", "v", *PAGED)})


@pytest.mark.parametrize("heads, kv_heads, head_dim, dtype, style, rotary_dim, gain, offset", [
    (3, 2, 64, "float16", "neox", 64, "float16", 0), (5, 1, 128, "float16", "neox", 64, "float32", 3),
    (3, 3, 20, "float32", "neox", 10, "float32", 2), (7, 1, 80, "float32", "interleaved", 32, "float32", 0),
    (2, 2, 264, "float32", "neox", 64, "float32", 2)])
def test_a_gain_for_every_head_and_layer_norms(xp, heads, kv_heads, head_dim, dtype, style, rotary_dim, gain, offset):
    given = steps_of(heads, kv_heads, head_dim, dtype, style, rotary_dim, gain)
    given |= {name: rng.standard_normal((n, head_dim)).astype(gain) for name, n in (("q_norm", heads),
                                                                                    ("k_norm", kv_heads))}
    check_steps(xp, given)
    given["k"], given["q"] = given["k"] + given["k"].dtype.type(offset), given["q"] + given["q"].dtype.type(offset)
    check_steps(xp, given | {"norm_is_rms": False})
    check_steps(xp, given | {"norm_is_rms": False, "k_norm": given["k_norm"][0]})


@pytest.mark.parametrize("rope", [
    {}, {"rope_rows": np.int32([3, -2])}, {"rope_rows": np.int32([-2, 9]), "rope_base": 5},
    {"rope_rows": np.int32([-2, 9]), "rope_base": -1}])
@pytest.mark.parametrize("positions", [[0, 29], [-1, 13]])
def test_tokens_of_each_sequence_from_its_first(xp, rope, positions):
    """q_len: positions and rows of the tables count from those of a sequence's first new token."""
    given = steps_of(3, 2, 64, tokens=6)
    del given["batch_indices"]
    given |= {"positions": np.int32(positions), "q_len": 3, "logn_max_position": 4, **rope}
    check_steps(xp, given)


def test_rows_of_the_tables_from_a_base(xp):
    given = steps_of(3, 2, 64, tokens=6) | {"q_len": 2, "rope_base": 7, "slots": np.int32([5, 9, 30, 31, 32, 0])}
    for name in (*PAGED, "logn_max_position"):
        del given[name]
    check_steps(xp, given)


def test_q_len_refused():
    given = steps_of(3, 2, 64, tokens=6)
    del given["batch_indices"]
    caches = empty_caches(10, 16, 2, 64, "float16")
    wrong = {
        "q_len must divide the 6 tokens, got 4": {"q_len": 4}, "rope_base must come with q_len": {"rope_base": 2},
        r"positions must be \[tokens / q_len\] = \[2\], got \[6\]": {"q_len": 3, "positions": POSITIONS[:6]},
        "q_len must be that of the 2 sequences of block_table, got 2 for 6": {"q_len": 2, "positions": POSITIONS[:3]},
        r"positions must be in \[-1, 64\), .* got 80": {"q_len": 3, "positions": np.int32([0, 78])},
        r"positions must be in \[-1, 64\), .* got 64": {"q_len": 3, "positions": np.int32([0, 62])},
        "block_table must be in .* got 10": {"q_len": 3, "positions": np.int32([0, 14]),
                                             "block_table": np.int32([[0, 1, 2, 3], [4, 10, 5, 6]])},
        "places must differ from token to token, got page 4 slot 2 twice": {
            "q_len": 3, "positions": np.int32([0, 2]), "block_table": np.int32([[4, 1, 2, 3], [4, 7, 5, 6]])},
        "rope_rows must be in .* got 64": {"q_len": 3, "positions": np.int32([0, 1]), "rope_rows": np.int32([0, 62])},
        "batch_indices must be None": {"q_len": 3, "positions": POSITIONS[:2], "batch_indices": np.int32([0] * 6)}}
    for message, change in wrong.items():
        now = given | change
        with pytest.raises(ValueError, match=message):
            cupyattn.kv_append(now.pop("k"), now.pop("v"), *caches, **now)


def test_queries_alone(xp):
    """Without k and v only q_out is written, here into a slice of something larger."""
    given = steps_of(3, 2, 64)
    base = xp.array(poison(np.empty((7, 5, 70), np.float16)))
    inputs = {name: given[name] for name in ("q", "q_bias", "q_norm", *ROPE)}
    want = expected_append(None, None, None, None, **inputs)
    out = base[:, 1:4, 3:67]
    assert cupyattn.kv_append(None, None, None, None, q_out=out, **on(xp, inputs)) is out
    got = xp.numpy(base)
    assert_close(got[:, 1:4, 3:67], want, 1e-5, 2e-3)
    got[:, 1:4, 3:67] = np.nan
    assert np.isnan(got).all()


def test_same_as_rope_then_append(xp):
    given = steps_of(3, 2, 64, "float32")
    turn = {name: given[name] for name in ("cos", "sin", "positions")}
    turn["positions"] = np.int32([0, 1, 2, 5, 7, 40, 63])
    caches = [xp.array(c) for c in empty_caches(1, 7, 2, 64, "float32")]
    rows = xp.array(np.arange(7, dtype=np.int32))
    q = cupyattn.kv_append(xp.array(given["k"]), xp.array(given["v"]), *caches, slots=rows, q=xp.array(given["q"]),
                           **on(xp, turn))
    assert_close(xp.numpy(q), xp.numpy(cupyattn.rope(xp.array(given["q"]), **on(xp, turn))), 1e-6, 1e-6)
    assert_close(xp.numpy(caches[0])[0], xp.numpy(cupyattn.rope(xp.array(given["k"]), **on(xp, turn))), 1e-6, 1e-6)
    assert_same_bits(xp.numpy(caches[1])[0], given["v"])


@pytest.mark.parametrize("style, rotary_dim, want", [
    ("interleaved", 8, [-1.272233, -1.838865, 1.683929, 4.707907, 4.817777, 6.147278, 6.975969, 8.020964]),
    ("interleaved", 4, [-1.272233, -1.838865, 2.878668, 4.088187, 5, 6, 7, 8])])
def test_rotation_goldens(xp, style, rotary_dim, want):
    x = np.arange(1, 9, dtype=np.float32).reshape(1, 1, 8)
    cos, sin = cupyattn.RopeParams(rotary_dim=rotary_dim, style=style).tables(4)
    out = cupyattn.kv_append(None, None, None, None, q=xp.array(x), cos=xp.array(cos), sin=xp.array(sin), style=style,
                             rotary_dim=rotary_dim, rope_rows=xp.array(np.int32([3])))
    assert_close(xp.numpy(out)[0, 0], np.array(want), 2e-6, 1e-6)


def test_logn_goldens(xp):
    """The scale depends on the 0-based position: 2048 still has 1."""
    positions = np.int32([0, 1, 2047, 2048, 2049, 4096, 8192])
    out = cupyattn.kv_append(None, None, None, None, q=xp.array(np.ones((7, 1, 8), np.float32)),
                             positions=xp.array(positions), logn_max_position=2048)
    assert_close(xp.numpy(out)[:, 0, 0], np.array([1, 1, 1, 1, 1.0000640, 1.0909091, 1.1818182]), 1e-7, 2e-7)


@pytest.mark.parametrize("heads, kv_heads", [(5, 1), (8, 3)])
def test_steps_of_a_fused_projection(xp, heads, kv_heads):
    """q, k and v are slices of rows that hold more than they; a packed copy gives the same bits."""
    given = steps_of(heads, kv_heads, 64)
    wide = poison(np.empty((7, (heads + 2 * kv_heads) * 64 + 40), np.float16))
    ends = np.cumsum([0, heads * 64, kv_heads * 64, kv_heads * 64])
    for name, first, last in zip("qkv", ends, ends[1:], strict=False):
        wide[:, first:last] = given[name].reshape(7, -1)
    base, results = xp.array(wide), []
    for packed in (False, True):
        device = [xp.array(c) for c in empty_caches(10, 16, kv_heads, 64)]
        inputs = on(xp, {name: a for name, a in given.items() if name not in "qkv"})
        q, k, v = (xp.array(given[name]) if packed else base[:, first:last].reshape(7, -1, 64)
                   for name, first, last in zip("qkv", ends, ends[1:], strict=False))
        results.append([*device, cupyattn.kv_append(k, v, *device, q=q, **inputs)])
    for one, other in zip(*results, strict=True):
        assert_same_bits(xp.numpy(one), xp.numpy(other))


def test_rope_rows_and_slots(xp):
    """Tables with a row per token, as for positions with several axes; row -1 leaves the token out."""
    given = steps_of(3, 2, 64)
    del given["block_table"], given["batch_indices"]
    given |= {"slots": np.int32([5, 4, -1, 100, 0, 9, 8]), "rope_rows": np.int32([6, 5, 4, 3, -1, 1, 0]),
              "positions": np.int32([1, 3, 500, 7, 9, 11, 600])}
    check_steps(xp, given)


def test_row_past_the_tables(xp):
    given = {name: a for name, a in steps_of(3, 2, 64).items() if name not in ("logn_max_position",)}
    given["rope_rows"] = np.int32([0, 64, 1, 2, 3, 4, 2**31 - 1])
    if xp.name == "numpy":
        with pytest.raises(ValueError, match=r"rope_rows must be in \[-1, 64\), the rows of cos"):
            check_steps(xp, given)
        return
    _, q_out = check_steps(xp, given)
    assert np.isnan(xp.numpy(q_out)[[1, 6]]).all()


@pytest.mark.parametrize("key_stride", [2, 3, 8])
def test_context_parallel(xp, key_stride):
    """Token p goes to rank p % key_stride; together the ranks hold every token once."""
    k, v = new_tokens(21, 2, 64)
    table, positions = np.int32([[2, 0], [1, 3]]), np.int32([*range(9), *range(12)])
    found = {}
    for rank in range(key_stride):
        caches = empty_caches(4, 6, 2, 64)
        places = {"block_table": table, "positions": positions, "batch_indices": np.int32([0] * 9 + [1] * 12)}
        device = [xp.array(c) for c in caches]
        want = [c.copy() for c in caches]
        expected_append(k, v, *want, **places, key_stride=key_stride, key_offset=rank)
        cupyattn.kv_append(xp.array(k), xp.array(v), *device, **on(xp, places), key_stride=key_stride, key_offset=rank)
        for got, expected in zip(device, want, strict=True):
            assert_same_bits(xp.numpy(got), expected)
        for sequence in range(2):
            for local in range(6):
                row = xp.numpy(device[0])[table[sequence, 0], local]
                if not np.isnan(row).any():
                    found[sequence, local * key_stride + rank] = row
    assert sorted(found) == [(0, p) for p in range(9)] + [(1, p) for p in range(12)]
    for token, p in enumerate(positions):
        assert_same_bits(found[int(token >= 9), int(p)], k[token])


def test_readonly_tokens(xp):
    k, v = new_tokens(6, 2, 64)
    check(xp, k, v, empty_caches(4, 4, 2, 64), block_table=np.int32([[0, 1], [2, 3]]),
          positions=np.int32([2, 3, 4, 0, 1, 2]), batch_indices=np.int32([0, 0, 0, 1, 1, 1]),
          readonly_tokens=np.int32([4, 1]))


def test_tables_of_the_call(xp):
    """A row per token, made for positions that no table reaches to."""
    angles = np.array([[200_000], [199_999]]) * cupyattn.RopeParams(rotary_dim=64).inv_freq()
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    given = steps_of(3, 2, 64, tokens=2)
    given |= {"cos": cos, "sin": sin, "rope_rows": np.int32([1, 0]), "positions": np.int32([3, 4]),
              "batch_indices": np.int32([1, 0])}
    check_steps(xp, given)


@pytest.mark.parametrize("xp", ["numpy", "standin"], indirect=True)
@pytest.mark.parametrize("style, head_dim", [("neox", 64), ("interleaved", 20)])
def test_steps_checked(xp, style, head_dim):
    """The same bits in every order of threads, nothing out of bounds."""
    given, first = steps_of(3, 2, head_dim, style=style, rotary_dim=head_dim - 4 if head_dim == 20 else None), None
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with settings(check=True, schedule=schedule, seed=seed):
            device, q_out = check_steps(xp, given)
        bits = [xp.numpy(a) for a in (*device, q_out)]
        for got, expected in zip(bits, first or bits, strict=True):
            assert_same_bits(got, expected)
        first = bits


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(heads=st.integers(0, 5), kv_heads=st.integers(1, 4), pairs=st.integers(1, 20), rest=st.integers(0, 9),
       step_names=st.sets(st.sampled_from([*BIASES, *NORMS, "logn_max_position"])), turned=st.booleans())
def test_any_shape_and_steps(heads, kv_heads, pairs, rest, step_names, turned):
    given = steps_of(heads, kv_heads, 2 * pairs + rest, rotary_dim=2 * pairs)
    names = {*step_names, "k", "v", *PAGED, *(("cos", "sin", "rotary_dim") if turned else ())}
    names = names | {"q"} if heads else names - {"q_bias", "q_norm", "logn_max_position"}
    check_steps(NUMPY, {name: a for name, a in given.items() if name in names})


class NUMPY:
    name, array, numpy = "numpy", staticmethod(np.array), staticmethod(np.array)


def test_errors_of_steps():
    good = steps_of(3, 2, 64)
    caches = empty_caches(10, 16, 2, 64)
    for error, message, change in (
            (ValueError, "k and v must be given together, or neither and q, got k and q", {"v": None}),
            (ValueError, "got none", {"k": None, "v": None, "q": None}),
            (ValueError, "k_cache must come with k and v", {"k": None, "v": None}),
            (ValueError, "q must be .* = \\[7, \\*, 64\\]", {"q": good["q"][..., :32]}),
            (TypeError, "q must be float16, got float32", {"q": good["q"].astype(np.float32)}),
            (ValueError, "q_out must come with q", {"q": None, "q_out": good["q"], "logn_max_position": None,
                                                    "q_bias": None, "q_norm": None}),
            (ValueError, "q_out must not be q", {"q_out": good["q"]}),
            (ValueError, "cos and sin must be given together, got cos alone", {"sin": None}),
            (ValueError, "cos must be .* = \\[\\*, 32\\]", {"cos": good["cos"][:, :16]}),
            (TypeError, "sin must be float32, got float16", {"sin": good["sin"].astype(np.float16)}),
            (ValueError, "rotary_dim must come with cos and sin", {"cos": None, "sin": None}),
            (ValueError, "rotary_dim must be even", {"rotary_dim": 33}),
            (ValueError, "style must be one of", {"style": "gptj"}),
            (ValueError, r"positions must be in \[-1, 20\), the rows of cos", {"cos": good["cos"][:20],
                                                                           "sin": good["sin"][:20]}),
            (ValueError, r"q_bias must be .* = \[3, 64\], got \[2, 64\]", {"q_bias": good["k_bias"]}),
            (TypeError, "k_bias must be float16, got float32", {"k_bias": good["k_bias"].astype(np.float32)}),
            (TypeError, "q_norm must be float16 or float32, got float64", {"q_norm": good["q_norm"].astype(float)}),
            (TypeError, "k_norm must be float16, got float32", {"k_norm": good["k_norm"].astype(np.float32)}),
            (ValueError, "norm_eps must be", {"norm_eps": -1.0}),
            (ValueError, "logn_max_position must be", {"logn_max_position": 1}),
            (ValueError, "key_offset must be below key_stride = 2, got 2", {"key_stride": 2, "key_offset": 2}),
            (ValueError, "key_stride must be", {"key_stride": 0}),
            (ValueError, r"readonly_tokens must be \[batch\] = \[2\]", {"readonly_tokens": POSITIONS}),
            (ValueError, "key_stride must come with block_table", {"slots": POSITIONS, "block_table": None,
                                                                  "batch_indices": None, "key_stride": 2})):
        given = {**good, **change}
        with pytest.raises(error, match=message):
            cupyattn.kv_append(given.pop("k"), given.pop("v"), *caches, **given)
    assert np.isnan(caches[0]).all()


def test_rows_longer_than_lanes_hold():
    k, v = new_tokens(1, 1, 1032)
    caches = empty_caches(1, 1, 1, 1032)
    cupyattn.kv_append(k, v, *caches, slots=np.int32([0]))   # copying has no limit
    with pytest.raises(NotImplementedError, match="head_dim must be at most 1024"):
        cupyattn.kv_append(k, v, *caches, slots=np.int32([0]), k_bias=k[0])
