# SPDX-License-Identifier: Apache-2.0
"""What holds for every kernel with a pool of recurrent states: slots, offsets, has_state, and what a refused call does.

A case is a function of (xp, tokens, dtype) that returns ``call(pool, out, slots, **lists)``, the shape of a state and
that of a row of `out`; rows past the first `tokens` and padded rows of its inputs are for the test to spoil.
"""

from functools import partial

import numpy as np
import pytest
from compare import assert_same_bits, dtype_of, poison
from conftest import NumpyArrays
from selective_models import Model

import cupyattn
from cupyattn import state_slots

PER_TOKEN = ("x", "dt", "B", "C", "z", "q", "k", "v")


def _causal_conv1d(xp, tokens, dtype, spoilt, update):
    generator = np.random.default_rng(1)
    x, weight = (generator.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((tokens, 40), (40, 4)))
    x[spoilt] = np.nan
    x, weight = xp.array(x), xp.array(weight)

    def call(pool, out, slots, **lists):
        if update:
            return cupyattn.causal_conv1d_update(x, pool, weight, conv_state_indices=slots, out=out)
        return cupyattn.causal_conv1d(x, weight, conv_states=pool, slots=slots, out=out, **lists)

    return call, (40, 4), (40,)


def _selective(xp, tokens, dtype, spoilt, update, heads):
    model = Model(heads=heads, channels=24, states=16, dtype=dtype)
    inputs = model.inputs(tokens)
    for name in PER_TOKEN:
        if name in inputs:
            inputs[name][spoilt] = np.nan
    inputs = {name: xp.array(a) for name, a in inputs.items()}

    def call(pool, out, slots, **lists):
        if update:
            return cupyattn.selective_state_update(pool, **inputs, dt_softplus=True, state_batch_indices=slots, out=out)
        return cupyattn.selective_scan(**inputs, dt_softplus=True, state=pool, slots=slots, out=out, chunk_size=32,
                                       **lists)

    return call, (*model.dims, 16), model.dims


def _lightning_attention(xp, tokens, dtype, spoilt):
    q, k, v = np.random.default_rng(1).standard_normal((3, tokens, 2, 24)).astype(dtype_of(dtype)) / 4
    for array in (q, k, v):
        array[spoilt] = np.nan
    q, k, v, slopes = xp.array(q), xp.array(k), xp.array(v[..., :16]), xp.array(np.float32([0.1, 0.5]))

    def call(pool, out, slots, **lists):
        return cupyattn.lightning_attention(q, k, v, pool, slopes, slots=slots, out=out, **lists)

    return call, (2, 24, 16), (2, 16)


UPDATES = {"causal_conv1d_update": partial(_causal_conv1d, update=True),
           "selective_state_update": partial(_selective, update=True, heads=None),
           "selective_state_update, heads": partial(_selective, update=True, heads=2),
           "lightning_attention": _lightning_attention}
PREFILLS = {"causal_conv1d": partial(_causal_conv1d, update=False),
            "selective_scan": partial(_selective, update=False, heads=None),
            "selective_scan, heads": partial(_selective, update=False, heads=2),
            "lightning_attention": _lightning_attention}
SLOTS_OF = {"causal_conv1d_update": "conv_state_indices", "selective_state_update": "state_batch_indices"}


def _pool(shape, slots, dtype, filler):
    """States about 1 in `slots`, `filler` in the others."""
    pool = np.full((8, *shape), filler, dtype_of(dtype))
    pool[slots] = np.random.default_rng(2).standard_normal((len(slots), *shape)).astype(pool.dtype)
    return pool


def _run(xp, case, tokens, dtype, state_dtype, filler, slots, spoilt, lists):
    """(out, pool) as NumPy arrays, out poisoned beforehand, and the pool before."""
    call, state_shape, row_shape = case(xp, tokens, dtype, spoilt)
    before = _pool(state_shape, slots[slots >= 0], state_dtype, filler)
    pool, out = xp.array(before), xp.array(poison(np.empty((tokens, *row_shape), dtype_of(dtype))))
    assert call(pool, out, xp.array(slots), **{name: xp.array(a) for name, a in lists.items()}) is out
    return xp.numpy(out), xp.numpy(pool), before


TYPES = [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")]


@pytest.mark.parametrize("dtype, state_dtype", TYPES)
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_sees_its_own_slots(xp, name, dtype, state_dtype):
    """Whatever the other slots hold, the same bits; a padded row of NaN gives zeros and touches nothing."""
    slots, results = np.int32([5, -1, 0, 7, -9]), []
    for filler in (0, np.nan, np.inf, -np.inf):
        out, pool, before = _run(xp, UPDATES[name], 5, dtype, state_dtype, filler, slots, [1, 4], {})
        assert_same_bits(pool[[1, 2, 3, 4, 6]], before[[1, 2, 3, 4, 6]])
        assert not out[[1, 4]].astype(np.float32).any() and np.isfinite(out.astype(np.float32)).all()
        assert all((pool[slot] != before[slot]).any() for slot in (5, 0, 7))
        results.append((out, pool[[5, 0, 7]]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype, state_dtype", TYPES)
@pytest.mark.parametrize("name", PREFILLS)
def test_a_prefill_sees_its_own_slots(xp, name, dtype, state_dtype):
    """As above; also sequences without tokens, one that begins here, and rows behind the last sequence."""
    slots = np.int32([5, -1, 0, 7, 2])
    lists = {"cu_seqlens": np.int32([0, 3, 9, 9, 79, 80]), "has_state": np.array([True, True, False, True, False])}
    padding, results = [*range(3, 9), *range(80, 99)], []
    for filler in (0, np.nan, np.inf):
        out, pool, before = _run(xp, PREFILLS[name], 99, dtype, state_dtype, filler, slots, padding, lists)
        assert_same_bits(pool[[0, 1, 3, 4, 6]], before[[0, 1, 3, 4, 6]])       # slot 0's sequence has no token
        assert not out[padding].astype(np.float32).any() and np.isfinite(out.astype(np.float32)).all()
        assert all((pool[slot] != before[slot]).any() for slot in (5, 7, 2))
        results.append((out, pool[[5, 7, 2]]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("starts", [[0], [0, 0], [0, 40]], ids=str)
@pytest.mark.parametrize("name", PREFILLS)
def test_rows_of_no_sequence_are_zeros(xp, name, starts, dtype):
    batch = len(starts) - 1
    slots, spoilt = np.arange(batch, dtype=np.int32), slice(starts[-1], None)
    out, pool, before = _run(xp, PREFILLS[name], 140, dtype, "float32", np.nan, slots, spoilt,
                             {"cu_seqlens": np.int32(starts)})
    assert not out[starts[-1]:].astype(np.float32).any() and out[:starts[-1]].astype(np.float32).all()
    assert_same_bits(pool[starts[-1] > 0:], before[starts[-1] > 0:])


@pytest.mark.parametrize("name", PREFILLS)
def test_a_new_state_is_not_read(xp, name):
    """has_state False with NaN in the slot is a slot of zeros, bit for bit."""
    results = []
    for filler, has_state in ((0, True), (np.nan, False)):
        call, state_shape, row_shape = PREFILLS[name](xp, 70, "float32", [])
        pool = xp.array(np.full((1, *state_shape), filler, np.float32))
        out = xp.array(np.zeros((70, *row_shape), np.float32))
        call(pool, out, None, cu_seqlens=xp.array(np.int32([0, 70])), has_state=xp.array(np.array([has_state])))
        results.append((xp.numpy(out), xp.numpy(pool)))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


# ---- refused calls -------------------------------------------------------------------------------------------

BAD_SLOTS = [(np.int32([1, 0, 1]), ValueError, "{slots} must name no slot twice, got slot 1 more than once"),
             (np.int32([1, 8, -1]), ValueError, "{slots} must be below the 8 slots of the pool or negative, got 8"),
             (np.int32([1, 0]), ValueError, r"{slots} must be \[batch\] = \[3\], got \[2\]"),
             (np.int64([1, 0, 2]), TypeError, "{slots} must be int32, got int64"),
             (np.int32([0, 9, 1, 9, 2, 9])[::2], ValueError, "{slots} must have a contiguous last axis, got strides"),
             ([1, 0, 2], TypeError, "{slots} must be a NumPy or CuPy array, got list")]
BAD_LISTS = [({"cu_seqlens": np.int32([1, 2, 3, 3])}, ValueError,
              r"cu_seqlens must start at 0, not decrease and end within the 3 rows, got \[1, 2, 3, 3\]"),
             ({"cu_seqlens": np.int32([0, 2, 1, 3])}, ValueError, "cu_seqlens must start at 0, not decrease"),
             ({"cu_seqlens": np.int32([0, 1, 2, 4])}, ValueError, "cu_seqlens must start at 0, not decrease and end"),
             ({"cu_seqlens": np.int32([])}, ValueError, r"cu_seqlens must be \[batch \+ 1\], got no entry"),
             ({"cu_seqlens": np.float32([0, 1, 2, 3])}, TypeError, "cu_seqlens must be int32, got float32"),
             ({"has_state": np.int32([1, 1, 1])}, TypeError, "has_state must be bool or uint8, got int32"),
             ({"has_state": np.ones(2, bool)}, ValueError, r"has_state must be \[batch\] = \[3\], got \[2\]")]


def _refused(xp, name, case, error, message, slots, lists):
    call, state_shape, row_shape = case(xp, 3, "float32", [])
    before, blank = _pool(state_shape, [0, 1, 2], "float32", np.nan), poison(np.empty((3, *row_shape), np.float32))
    pool, out = xp.array(before), xp.array(blank)
    op = name.split(",")[0]
    with pytest.raises(error, match=f"^{op}: " + message.format(slots=SLOTS_OF.get(op, "slots"))):
        call(pool, out, slots, **lists)
    assert_same_bits(xp.numpy(pool), before)
    assert_same_bits(xp.numpy(out), blank)


@pytest.mark.parametrize("slots, error, message", BAD_SLOTS, ids=[str(i) for i in range(len(BAD_SLOTS))])
@pytest.mark.parametrize("name", {**UPDATES, **PREFILLS})
def test_bad_slots_are_refused_and_nothing_changes(name, slots, error, message):
    for cases, lists in ((UPDATES, {}), (PREFILLS, {"cu_seqlens": np.int32([0, 1, 2, 3])})):
        if name in cases:
            _refused(NumpyArrays(), name, cases[name], error, message, slots, lists)


@pytest.mark.parametrize("lists, error, message", BAD_LISTS, ids=[str(i) for i in range(len(BAD_LISTS))])
@pytest.mark.parametrize("name", PREFILLS)
def test_bad_lists_are_refused_and_nothing_changes(name, lists, error, message):
    lists = {"cu_seqlens": np.int32([0, 1, 2, 3]), **lists}
    _refused(NumpyArrays(), name, PREFILLS[name], error, message, None, lists)


@pytest.mark.parametrize("name", PREFILLS)
def test_checked_contents_on_a_device(name, monkeypatch):
    """With CUPYATTN_CHECK=1 lists on a GPU are looked at, too."""
    from standin import install

    monkeypatch.setattr(state_slots.env, "check", lambda: True)
    with install() as xp:
        starts = xp.array(np.int32([0, 1, 2, 3]))
        _refused(xp, name, PREFILLS[name], ValueError, "slots must name no slot twice, got slot 2", xp.array(
            np.int32([2, 2, 0])), {"cu_seqlens": starts})
        _refused(xp, name, PREFILLS[name], ValueError, "cu_seqlens must start at 0", None,
                 {"cu_seqlens": xp.array(np.int32([0, 1, 2, 9]))})
