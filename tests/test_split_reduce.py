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


def test_list_of_partials_of_several_splits(xp):
    out, lse = partials(6, 3, 2, 32)
    stacked = cupyattn.split_reduce(xp.array(out), xp.array(lse))
    listed = cupyattn.split_reduce([xp.array(out[:2]), xp.array(out[2:4]), xp.array(out[4:])],
                                   [xp.array(lse[:2]), xp.array(lse[2:4]), xp.array(lse[4:])])
    assert_same_bits(xp.numpy(stacked), xp.numpy(listed))


def turbomind_merge(partial_o, partial_ml, counts, scale):
    """out [tokens, heads, head_dim] of numerators [tokens, heads, splits, head_dim], (raw maximum, sum): groups of 32
    splits are merged into their first one, then those; only the last merge divides."""
    out = np.full((*partial_o.shape[:2], partial_o.shape[3]), np.nan)
    c = scale * np.log2(np.e)
    for t, h in np.ndindex(partial_o.shape[:2]):
        pieces = [(*partial_ml[t, h, s].astype(float), partial_o[t, h, s].astype(float)) for s in range(counts[t])]
        while pieces:
            groups = []
            for start in range(0, len(pieces), 32):
                group = pieces[start:start + 32]
                top = max(m for m, _, _ in group)
                w = [0.0 if m == -np.inf else 2.0 ** ((m - top) * c) for m, _, _ in group]
                groups.append((top, sum(x * total for x, (_, total, _) in zip(w, group, strict=True)),
                               sum(x * np.where(x, o, 0) for x, (_, _, o) in zip(w, group, strict=True))))
            pieces = groups
            if len(pieces) == 1:
                out[t, h] = pieces[0][2] / pieces[0][1] if pieces[0][1] else 0
                break
    return out


@pytest.mark.parametrize("splits", [3, 32, 33, 70, 1030])
def test_partials_as_turbomind_leaves_them(xp, splits):
    """Numerators, raw maxima and sums, read by stride; tokens whose row is final; slots that hold nothing."""
    scale = 0.088
    counts = np.int32([splits, 0, 1, splits // 2])
    partial_o = rng.standard_normal((4, 2, splits, 16)).astype(np.float32)
    partial_ml = np.stack([rng.uniform(-60, 60, (4, 2, splits)), rng.uniform(1, 50, (4, 2, splits))], -1)
    partial_ml = partial_ml.astype(np.float32)
    partial_ml[0, 0, 1:] = -np.inf, 0
    partial_ml[3, 1] = -np.inf, 0
    for t, count in enumerate(counts):   # never read
        partial_o[t, :, count:] = np.nan
        partial_ml[t, :, count:] = np.nan
    partial_o[0, 0, 1:] = partial_o[3, 1] = np.nan
    want = turbomind_merge(partial_o, partial_ml, counts, scale)
    place = rng.standard_normal((4, 2, 16)).astype(np.float32)
    o, ml, out = xp.array(partial_o), xp.array(partial_ml), xp.array(place)
    result = cupyattn.split_reduce(o.transpose(2, 0, 1, 3), ml[..., 0].transpose(2, 0, 1),
                                   partial_sum=ml[..., 1].transpose(2, 0, 1), lse_scale=scale,
                                   split_counts=xp.array(counts), out=out)
    assert result is out
    got = xp.numpy(out)
    assert_same_bits(got[1], place[1])
    assert_close(got[[0, 2, 3]], want[[0, 2, 3]], 2e-6, 2e-6)
    if splits < 100:
        reference = expected_merge(partial_o.transpose(2, 0, 1, 3), partial_ml[..., 0].transpose(2, 0, 1),
                                   partial_sum=partial_ml[..., 1].transpose(2, 0, 1), lse_scale=scale,
                                   split_counts=counts)
        assert_close(reference[[0, 2, 3]], want[[0, 2, 3]], 1e-12, 1e-12)


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
    with pytest.raises(ValueError, match="out must be given with split_counts"):
        cupyattn.split_reduce(out, lse, split_counts=np.zeros(3, np.int32))
    with pytest.raises(TypeError, match="split_counts must be int32, got int64"):
        cupyattn.split_reduce(out, lse, split_counts=np.zeros(3, np.int64), out=out[0].copy())
    with pytest.raises(ValueError, match="lse_scale must be greater than 0, got 0"):
        cupyattn.split_reduce(out, lse, lse_scale=0.0)
    with pytest.raises(ValueError, match=r"partial_sum must be \[splits, tokens, heads\] = \[2, 3, 4\], got \[2, 3\]"):
        cupyattn.split_reduce(out, lse, partial_sum=lse[..., 0])
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
