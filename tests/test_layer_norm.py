# SPDX-License-Identifier: Apache-2.0
import ml_dtypes
import numpy as np
import pytest
from compare import ROUNDING, assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn.reference.layer_norm import layer_norm as expected_norm
from cupyattn.runtime.cpu import settings

rng = np.random.default_rng(5)


def _data(rows, hidden, dtype, weight_dtype="float32"):
    x = (rng.standard_normal((rows, hidden)) + 0.5).astype(dtype_of(dtype))
    weight = rng.uniform(0.5, 2, hidden).astype(dtype_of(weight_dtype))
    return x, weight, rng.standard_normal(hidden).astype(dtype_of(weight_dtype))


def _tolerance(dtype):
    """One rounding to `dtype`, and what float32 statistics cost where the terms of a result cancel."""
    atol, rtol = ROUNDING[dtype]
    return atol + 2e-6, rtol + 3e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("hidden", [768, 2, 33, 4096])
def test_layer_norm(xp, dtype, with_bias, hidden):
    x, weight, bias = _data(3, hidden, dtype)
    bias = bias if with_bias else None
    out = poison(xp.array(np.empty_like(x))) if xp.name == "numpy" else None
    got = cupyattn.layer_norm(xp.array(x), xp.array(weight), None if bias is None else xp.array(bias), out=out)
    assert got.dtype == x.dtype and isinstance(got, xp.module.ndarray)
    assert_close(xp.numpy(got), expected_norm(x, weight, bias), *_tolerance(dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_the_input_type(xp, dtype):
    x, weight, bias = _data(2, 768, dtype, dtype)
    got = cupyattn.layer_norm(xp.array(x), xp.array(weight), xp.array(bias), eps=1e-6)
    assert_close(xp.numpy(got), expected_norm(x, weight, bias, eps=1e-6), *_tolerance(dtype))


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32"])
def test_out_dtype(xp, out_dtype):
    x, weight, bias = _data(2, 576, "float32")
    got = cupyattn.layer_norm(xp.array(x), xp.array(weight), xp.array(bias), out_dtype=dtype_of(out_dtype))
    assert got.dtype == dtype_of(out_dtype)
    assert_close(xp.numpy(got), expected_norm(x, weight, bias), *_tolerance(out_dtype))


def test_a_large_offset_costs_nothing(xp):
    """Two passes: mean((x - mean)^2), not mean(x^2) - mean^2, which would be all rounding here."""
    x = rng.standard_normal((3, 1024)).astype(np.float32) + np.float32(20000)
    ones = np.ones(1024, np.float32)
    got = xp.numpy(cupyattn.layer_norm(xp.array(x), xp.array(ones)))
    assert_close(got, expected_norm(x, ones), 2e-3, 1e-4)   # the mean itself is known to 2^-24 of 20000
    assert abs(got.std() - 1) < 1e-4


def test_constant_rows_give_the_bias(xp):
    x = np.full((2, 64), 7, np.float16)
    _, weight, bias = _data(1, 64, "float16")
    got = cupyattn.layer_norm(xp.array(x), xp.array(weight), xp.array(bias))
    assert_same_bits(xp.numpy(got), np.broadcast_to(bias.astype(np.float16), (2, 64)))


def test_strided_offset_and_stacked_views(xp):
    base = rng.standard_normal((4, 2, 100)).astype(np.float16)
    weight = np.ones(64, np.float16)
    view = xp.array(base)[:, :, 3:67]                      # rows 200 bytes apart, 6 bytes off alignment
    want = expected_norm(base[:, :, 3:67], weight)
    out = xp.array(np.full((4, 2, 80), np.nan, np.float16))
    cupyattn.layer_norm(view, xp.array(weight), out=out[:, :, 8:72])
    host = xp.numpy(out)
    assert_close(host[:, :, 8:72], want, *_tolerance("float16"))
    assert np.isnan(host[:, :, :8]).all() and np.isnan(host[:, :, 72:]).all()


def test_in_place_with_a_nan_row(xp):
    x, weight, bias = _data(3, 128, "float32")
    x[1, 5] = np.nan
    want = expected_norm(x, weight, bias)
    device = xp.array(x)
    assert cupyattn.layer_norm(device, xp.array(weight), xp.array(bias), out=device) is device
    assert_close(xp.numpy(device), want, *_tolerance("float32"))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(xp, shape):
    out = cupyattn.layer_norm(xp.array(np.zeros(shape, np.float16)), xp.array(np.ones(shape[1], np.float16)))
    assert out.shape == shape and out.dtype == np.float16


def test_rows_do_not_see_each_other(xp):
    x, weight, bias = _data(17, 576, "float16")
    weight, bias = xp.array(weight), xp.array(bias)
    whole = xp.numpy(cupyattn.layer_norm(xp.array(x), weight, bias))
    for i in (0, 5, 16):
        assert_same_bits(whole[i:i + 1], xp.numpy(cupyattn.layer_norm(xp.array(x[i:i + 1]), weight, bias)))


def test_errors():
    x, weight = np.zeros((2, 8), np.float16), np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"layer_norm: weight must be \[hidden\] = \[8\], got \[4\]"):
        cupyattn.layer_norm(x, weight[:4])
    with pytest.raises(ValueError, match=r"layer_norm: bias must be \[hidden\] = \[8\], got \[1\]"):
        cupyattn.layer_norm(x, weight, weight[:1])
    with pytest.raises(TypeError, match="layer_norm: bias must be float32, got float16"):
        cupyattn.layer_norm(x, weight, weight.astype(np.float16))
    with pytest.raises(TypeError, match="layer_norm: weight must be float32 or float16, got float64"):
        cupyattn.layer_norm(x, weight.astype(np.float64))
    with pytest.raises(TypeError, match="layer_norm: x must be float16 or bfloat16 or float32, got int32"):
        cupyattn.layer_norm(x.astype(np.int32), weight)
    with pytest.raises(ValueError, match="layer_norm: x must have a contiguous last axis"):
        cupyattn.layer_norm(np.zeros((8, 8), np.float16).T, weight)
    with pytest.raises(ValueError, match=r"layer_norm: out must be \[..., hidden\] = \[2, 8\], got \[1, 8\]"):
        cupyattn.layer_norm(x, weight, out=x[:1])
    with pytest.raises(TypeError, match="layer_norm: weight must be a NumPy or CuPy array, got list"):
        cupyattn.layer_norm(x, [1.0])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_layer_norm_checked(dtype):
    x, weight, bias = _data(3, 100, dtype)
    results = []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with settings(check=True, schedule=schedule, seed=seed):
            results.append(cupyattn.layer_norm(x, weight, bias))
    assert_close(results[0], expected_norm(x, weight, bias), *_tolerance(dtype))
    for out in results[1:]:
        assert_same_bits(out, results[0])


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(0, 5), hidden=st.integers(1, 300), offset=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
def test_shapes(rows, hidden, offset, seed):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, hidden + offset)).astype(ml_dtypes.bfloat16)[:, offset:]
    weight, bias = generator.standard_normal((2, hidden)).astype(np.float32)
    assert_close(cupyattn.layer_norm(x, weight, bias), expected_norm(x, weight, bias), *_tolerance("bfloat16"))


@pytest.mark.parametrize("error, eps, rule", [
    (ValueError, -1.0, "a finite float32 of at least 0, got -1.0"),
    (ValueError, float("nan"), "a finite float32 of at least 0, got nan"),
    (ValueError, 1e39, r"a finite float32 of at least 0, got 1e\+39"), (TypeError, "a", "a number, got str"),
    (TypeError, None, "a number, got NoneType"), (TypeError, np.zeros(1), "a number, got ndarray")])
def test_eps(error, eps, rule):
    x, weight = np.ones((1, 8), np.float32), np.ones(8, np.float32)
    with pytest.raises(error, match=f"layer_norm: eps must be {rule}"):
        cupyattn.layer_norm(x, weight, eps=eps)
    assert_same_bits(cupyattn.layer_norm(x, weight, eps=np.float16(1)), cupyattn.layer_norm(x, weight, eps=1))
