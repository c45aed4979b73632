# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from compare import ROUNDING, assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn.reference.split_reduce import split_reduce as expected_merge
from cupyattn.runtime.cpu import settings

rng = np.random.default_rng(19)


def partials(splits, tokens, heads, head_dim, empty=0.3):
    """Partial results, a share of them of empty key sets: lse -inf, data NaN."""
    out = rng.standard_normal((splits, tokens, heads, head_dim)).astype(np.float32)
    lse = rng.uniform(-5, 5, (splits, tokens, heads)).astype(np.float32)
    lse[rng.random(lse.shape) < empty] = -np.inf
    out[np.isneginf(lse)] = np.nan
    return out, lse


def check(got, got_lse, want, want_lse, dtype="float32"):
    atol, rtol = ROUNDING[dtype]
    assert_close(got, want, atol + 1e-6, rtol)
    assert_close(got_lse, want_lse, 1e-6, 1e-6)


@pytest.mark.parametrize("splits", [1, 2, 7, 40])
@pytest.mark.parametrize("head_dim", [128, 6, 1])
def test_split_reduce(xp, splits, head_dim):
    out, lse = partials(splits, 3, 5, head_dim)
    sinks = rng.standard_normal(5).astype(np.float32)
    got, got_lse = cupyattn.split_reduce(xp.array(out), xp.array(lse), sinks=xp.array(sinks), return_lse=True)
    assert got.dtype == got_lse.dtype == np.float32
    check(xp.numpy(got), xp.numpy(got_lse), *expected_merge(out, lse, sinks=sinks, return_lse=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_strided_outputs(xp, dtype):
    out, lse = partials(3, 4, 2, 16)
    place = xp.array(poison(np.empty((4, 2, 40), dtype_of(dtype))))
    got_lse = xp.array(poison(np.empty((4, 2), np.float32)))
    result = cupyattn.split_reduce(xp.array(out), xp.array(lse), out=(place[:, :, 5:21], got_lse), return_lse=True)
    assert result[1] is got_lse
    host = xp.numpy(place)
    check(host[:, :, 5:21], xp.numpy(got_lse), *expected_merge(out, lse, return_lse=True), dtype)
    assert np.isnan(host[:, :, :5].astype(np.float32)).all() and np.isnan(host[:, :, 21:].astype(np.float32)).all()


def test_strided_partials(xp):
    """Token-major partials, and rows off a 16-byte boundary."""
    out, lse = partials(4, 3, 2, 9)
    turned = xp.array(out.transpose(1, 2, 0, 3).copy()).transpose(2, 0, 1, 3)[..., 1:]
    turned_lse = xp.array(lse.transpose(2, 1, 0).copy()).transpose(2, 1, 0)
    got, got_lse = cupyattn.split_reduce(turned, turned_lse, return_lse=True)
    check(xp.numpy(got), xp.numpy(got_lse), *expected_merge(out[..., 1:], lse, return_lse=True))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_list_of_partials(xp, count):
    """The bits of the same partials stacked."""
    out, lse = partials(count, 3, 2, 32)
    stacked = cupyattn.split_reduce(xp.array(out), xp.array(lse), return_lse=True)
    listed = cupyattn.split_reduce([xp.array(o) for o in out], [xp.array(w) for w in lse], return_lse=True)
    for a, b in zip(stacked, listed, strict=True):
        assert_same_bits(xp.numpy(a), xp.numpy(b))


def test_merging_one_partial_returns_its_bits(xp):
    out, lse = partials(3, 5, 3, 64, empty=0)
    lse[[0, 2]] = -np.inf
    out[[0, 2]] = np.nan
    got, got_lse = cupyattn.split_reduce(xp.array(out), xp.array(lse), return_lse=True)
    assert_same_bits(xp.numpy(got), out[1])
    assert_same_bits(xp.numpy(got_lse), lse[1])


def test_nothing_to_merge(xp):
    """All splits empty: zeros and -inf, sink or not."""
    out, lse = partials(2, 3, 2, 8, empty=1)
    for sinks in (None, xp.array(np.float32([1, -np.inf]))):
        got, got_lse = cupyattn.split_reduce(xp.array(out), xp.array(lse), sinks=sinks, return_lse=True)
        assert (xp.numpy(got) == 0).all() and np.isneginf(xp.numpy(got_lse)).all()


def test_extreme_weights():
    """lse far apart and far from zero, and sinks that take all or nothing."""
    out, _ = partials(3, 1, 4, 8, empty=0)
    lse = np.float32([[[9e4, -9e4, 300, 0]], [[9e4, -9e4, -300, -80]], [[0, -1e5, 299, -90]]])
    for sinks in ([0, 0, 0, 0], [2e5, -2e5, 300, 90], [-np.inf] * 4):
        got, got_lse = cupyattn.split_reduce(out, lse, sinks=np.float32(sinks), return_lse=True)
        check(got, got_lse, *expected_merge(out, lse, sinks=np.float32(sinks), return_lse=True))


def test_empty():
    out = cupyattn.split_reduce(np.zeros((2, 0, 3, 8), np.float32), np.zeros((2, 0, 3), np.float32))
    assert out.shape == (0, 3, 8) and out.dtype == np.float32


def test_errors():
    out, lse = partials(2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"partial_lse must be \[splits, tokens, heads\] = \[2, 3, 4\], got \[2, 4"):
        cupyattn.split_reduce(out, lse.transpose(0, 2, 1))
    with pytest.raises(TypeError, match="partial_out must be float32, got float16"):
        cupyattn.split_reduce(out.astype(np.float16), lse)
    with pytest.raises(ValueError, match="at least one split"):
        cupyattn.split_reduce(out[:0], lse[:0])
    with pytest.raises(ValueError, match="lists of the same length"):
        cupyattn.split_reduce(list(out), list(lse[:1]))
    with pytest.raises(NotImplementedError, match="up to 8, got 9; stack them"):
        cupyattn.split_reduce([out[0]] * 9, [lse[0]] * 9)
    with pytest.raises(ValueError, match=r"sinks must be \[heads\] = \[4\], got \[3\]"):
        cupyattn.split_reduce(out, lse, sinks=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="partial_out must be .splits"):
        cupyattn.split_reduce(out[0], lse[0])
    with pytest.raises(ValueError, match="lse must be contiguous"):
        places = np.empty_like(out[0]), np.empty((4, 3), np.float32).T
        cupyattn.split_reduce(out, lse, out=places, return_lse=True)


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(splits=st.integers(1, 9), tokens=st.integers(0, 5), heads=st.integers(1, 5), head_dim=st.integers(1, 40))
def test_shapes(splits, tokens, heads, head_dim):
    out, lse = partials(splits, tokens, heads, head_dim)
    check(*cupyattn.split_reduce(out, lse, return_lse=True), *expected_merge(out, lse, return_lse=True))


def test_split_reduce_checked():
    out, lse = partials(5, 7, 3, 24)
    results = []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        with settings(check=True, schedule=schedule, seed=seed):
            results.append(cupyattn.split_reduce(out, lse, sinks=np.zeros(3, np.float32)))
    for other in results[1:]:
        assert_same_bits(other, results[0])
