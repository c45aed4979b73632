# SPDX-License-Identifier: Apache-2.0
import ml_dtypes
import numpy as np
import pytest
from compare import ROUNDING, assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn import reference
from cupyattn.reference.rms_norm import rms_norm as expected_norm
from cupyattn.runtime.cpu import settings

rng = np.random.default_rng(7)


def _data(rows, hidden, dtype, residual=None):
    x = rng.standard_normal((rows, hidden)).astype(dtype_of(dtype))
    weight = rng.uniform(0.5, 2, hidden).astype(np.float32)
    r = None if residual is None else rng.standard_normal((rows, hidden)).astype(dtype_of(residual))
    return x, weight, r


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("residual", [None, "float32", "same"])
@pytest.mark.parametrize("hidden", [576, 1, 33, 4096])
def test_rms_norm(xp, dtype, residual, hidden):
    residual = dtype if residual == "same" else residual
    x, weight, r = _data(3, hidden, dtype, residual)
    want_r = None if r is None else r.copy()
    want = expected_norm(x, weight, eps=1e-5, residual=want_r)
    device_r = None if r is None else xp.array(r)
    out = poison(xp.array(np.empty_like(x))) if xp.name == "numpy" else None
    got = cupyattn.rms_norm(xp.array(x), xp.array(weight), eps=1e-5, residual=device_r, out=out)
    assert got.dtype == x.dtype and isinstance(got, xp.module.ndarray)
    atol, rtol = ROUNDING[dtype]
    assert_close(xp.numpy(got), want, atol, rtol + 3e-6)
    if r is not None:
        assert_close(xp.numpy(device_r), want_r, *ROUNDING[residual])


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32"])
def test_out_dtype_and_float32_stream(xp, out_dtype):
    x, weight, r = _data(2, 576, "float32", "float32")
    r *= 27000   # the residual stream of a real model
    want = expected_norm(x, weight, residual=r.copy())
    got = cupyattn.rms_norm(xp.array(x), xp.array(weight), residual=xp.array(r), out_dtype=dtype_of(out_dtype))
    assert_close(xp.numpy(got), want, ROUNDING[out_dtype][0], ROUNDING[out_dtype][1] + 3e-6)


def test_strided_offset_and_stacked_views(xp):
    base = rng.standard_normal((4, 2, 100)).astype(np.float16)
    weight = np.ones(64, np.float16)
    view = xp.array(base)[:, :, 3:67]                      # rows 200 bytes apart, 6 bytes off alignment
    want = expected_norm(base[:, :, 3:67], weight)
    assert_close(xp.numpy(cupyattn.rms_norm(view, xp.array(weight))), want, *ROUNDING["float16"])
    out = xp.array(np.full((4, 2, 80), np.nan, np.float16))
    cupyattn.rms_norm(view, xp.array(weight), out=out[:, :, 8:72])
    host = xp.numpy(out)
    assert_close(host[:, :, 8:72], want, *ROUNDING["float16"])
    assert np.isnan(host[:, :, :8]).all() and np.isnan(host[:, :, 72:]).all()


def test_in_place_nan_row_and_huge_values(xp):
    x = rng.standard_normal((3, 128)).astype(np.float32) * 1e15
    x[1, 5] = np.nan
    want = expected_norm(x, np.ones(128))
    device = xp.array(x)
    cupyattn.rms_norm(device, xp.array(np.ones(128, np.float32)), out=device)
    assert_close(xp.numpy(device), want, *ROUNDING["float32"])


@pytest.mark.parametrize("residual", [None, "float32", "same"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("hidden", [128, 33])
def test_infinities_and_nan(xp, dtype, residual, hidden):
    """Those of float16 are its largest number; others leave nothing of their row, nor does NaN."""
    residual = dtype if residual == "same" else residual
    x, weight, r = _data(5, hidden, dtype, residual)
    x[0, 3], x[1, 30], x[2, 5], x[2, 6], x[3, 7] = np.inf, -np.inf, np.inf, -np.inf, np.nan
    if residual == "float16":
        x[4, 8], r[4, 8] = 60000, 60000   # their sum overflows
    want_r = None if r is None else r.copy()
    with np.errstate(all="ignore"):
        want = expected_norm(x, weight, residual=want_r)
    device_r = None if r is None else xp.array(r)
    found = xp.numpy(cupyattn.rms_norm(xp.array(x), xp.array(weight), residual=device_r))
    assert_close(found, want, ROUNDING[dtype][0], ROUNDING[dtype][1] + 3e-6)
    if r is not None:
        assert_close(xp.numpy(device_r), want_r, *ROUNDING[residual])
    assert np.isnan(found[3].astype(np.float32)).all()
    rows = found[:3].astype(np.float32)
    if (residual or dtype) == "float16":
        assert np.isfinite(rows).all() and rows[0, 3] > 2 and rows[1, 30] < -2 and abs(rows[0]).astype(bool).sum() > 5
        assert residual is None or xp.numpy(device_r)[4, 8] == np.inf and found[4, 8] > 2
    else:
        assert np.isnan(rows).sum() == 4 and np.nansum(np.abs(rows)) == 0


def test_empty(xp):
    out = cupyattn.rms_norm(xp.array(np.zeros((0, 8), np.float16)), xp.array(np.ones(8, np.float16)))
    assert out.shape == (0, 8) and out.dtype == np.float16


def test_rows_do_not_see_each_other(xp):
    x, weight, _ = _data(17, 576, "float16")
    whole = xp.numpy(cupyattn.rms_norm(xp.array(x), xp.array(weight)))
    for i in (0, 5, 16):
        assert_same_bits(whole[i:i + 1], xp.numpy(cupyattn.rms_norm(xp.array(x[i:i + 1]), xp.array(weight))))


def test_errors():
    x, weight = np.zeros((2, 8), np.float16), np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[hidden\] = \[8\], got \[4\]"):
        cupyattn.rms_norm(x, weight[:4])
    with pytest.raises(TypeError, match="rms_norm: x must be float16 or bfloat16 or float32, got float64"):
        cupyattn.rms_norm(x.astype(np.float64), weight)
    with pytest.raises(ValueError, match="rms_norm: x must have a contiguous last axis"):
        cupyattn.rms_norm(np.zeros((8, 8), np.float16).T, weight)
    with pytest.raises(ValueError, match="rms_norm: residual must be"):
        cupyattn.rms_norm(x, weight, residual=np.zeros((1, 8), np.float32))
    with pytest.raises(TypeError, match="rms_norm: x must be a NumPy or CuPy array, got list"):
        cupyattn.rms_norm([1.0], weight)
    frozen = np.zeros((2, 8), np.float16)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="rms_norm: out must be writeable"):
        cupyattn.rms_norm(x, weight, out=frozen)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rms_norm_checked(dtype):
    x, weight, r = _data(3, 100, dtype, "float32")
    results = []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        stream = r.copy()
        with settings(check=True, schedule=schedule, seed=seed):
            results.append((cupyattn.rms_norm(x, weight, residual=stream), stream))
    for out, stream in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(stream, results[0][1])


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(0, 5), hidden=st.integers(1, 300), offset=st.integers(0, 9), data=st.randoms())
def test_shapes(rows, hidden, offset, data):
    generator = np.random.default_rng(data.randrange(2**32))
    base = generator.standard_normal((rows, hidden + offset)).astype(ml_dtypes.bfloat16)
    x = base[:, offset:]
    weight = generator.standard_normal(hidden).astype(np.float32)
    assert_close(cupyattn.rms_norm(x, weight), reference.rms_norm.rms_norm(x, weight), 1e-6, 2.0**-8 * 1.02)


def test_residual_must_be_writeable_and_strides_whole():
    x, weight, residual = np.zeros((2, 8), np.float16), np.ones(8, np.float32), np.zeros((2, 8), np.float32)
    residual.flags.writeable = False
    with pytest.raises(ValueError, match="rms_norm: residual must be writeable"):
        cupyattn.rms_norm(x, weight, residual=residual)
    fields = np.zeros((4,), np.dtype([("a", np.float16, 8), ("pad", np.uint8)]))["a"]   # rows 17 bytes apart
    with pytest.raises(ValueError, match="rms_norm: x must have strides that are multiples of its itemsize 2"):
        cupyattn.rms_norm(fields, weight)


@pytest.mark.parametrize("error, eps, rule", [
    (ValueError, -1.0, "a finite float32 of at least 0, got -1.0"),
    (ValueError, float("nan"), "a finite float32 of at least 0, got nan"),
    (ValueError, 1e39, r"a finite float32 of at least 0, got 1e\+39"), (TypeError, "a", "a number, got str"),
    (TypeError, None, "a number, got NoneType"), (TypeError, np.zeros(1), "a number, got ndarray")])
def test_eps(error, eps, rule):
    x, weight = np.ones((1, 8), np.float32), np.ones(8, np.float32)
    with pytest.raises(error, match=f"rms_norm: eps must be {rule}"):
        cupyattn.rms_norm(x, weight, eps=eps)
    assert_same_bits(cupyattn.rms_norm(x, weight, eps=np.float16(1)), cupyattn.rms_norm(x, weight, eps=1))
