# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import nvrtc
import pytest
from compare import ROUNDING, assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

import cupyattn
from cupyattn.ops import lightning_attention as op
from cupyattn.reference.lightning_attention import lightning_attention as expected
from cupyattn.runtime import cuda
from cupyattn.runtime.cpu import counters, settings

rng = np.random.default_rng(11)
BOUNDS = {"float32": (2e-6, 2e-6), "float16": (1e-3, 2.0**-11), "bfloat16": (4e-3, 2.0**-8)}
SCHEDULES = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))


def make(tokens, heads, key_dim, value_dim, dtype="float32", generator=rng):
    """q, k, v whose results are about 1, and slopes from those of a slow head to a fast one's."""
    q, k = (generator.standard_normal((tokens, heads, key_dim)) / key_dim**0.5 for _ in "qk")
    v = generator.standard_normal((tokens, heads, value_dim))
    slopes = np.geomspace(0.004, 0.9, heads).astype(np.float32)
    return *(x.astype(dtype_of(dtype)) for x in (q, k, v)), slopes


def make_state(slots, heads, key_dim, value_dim, dtype="float32", generator=rng):
    return generator.standard_normal((slots, heads, key_dim, value_dim)).astype(dtype_of(dtype))


def check(xp, q, k, v, state, slopes, *, used=None, lists=None, bounds=None, lost=0.0, **options):
    """Runs the op on arrays of `xp` and compares with the reference; slots not in `used` are NaN and must stay so.

    `lost`: of the largest number of a state, beyond float32's rounding.
    """
    used = range(len(state)) if used is None else used
    unused = [s for s in range(len(state)) if s not in used]
    state[unused] = np.nan
    before, want_state = state.copy(), state.astype(np.float64)
    lists = lists or {}
    want = expected(q, k, v, want_state, slopes, **lists, **options)
    device = xp.array(state)
    got = cupyattn.lightning_attention(*(xp.array(x) for x in (q, k, v)), device, xp.array(slopes),
                                       **{name: xp.array(x) for name, x in lists.items()}, **options)
    assert got.dtype == q.dtype and isinstance(got, xp.module.ndarray)
    assert_close(xp.numpy(got), want, *(bounds or BOUNDS[q.dtype.name]))
    after = xp.numpy(device)
    assert_same_bits(after[unused], before[unused])
    atol, rtol = ROUNDING[state.dtype.name]
    want_state = want_state[list(used)]
    assert_close(after[list(used)], want_state, 2 * atol + lost * np.abs(want_state).max(initial=0), rtol)


def plan_for(monkeypatch, arch):
    """Calls of the test run what a GPU would, on the CPU executor; returns the list of their plans."""
    plans = []

    def planned_by(make_plan):
        def planned(*args):
            plan, *rest = make_plan.__wrapped__(*args[:-1], arch)   # not from the cache, for it is changed
            object.__setattr__(plan, "arch", "cpu")
            plans.append(plan)
            return plan, *rest

        return planned

    for name in ("_plan_lightning_attention", "_plan_lightning_attention_prefill"):
        monkeypatch.setattr(op, name, planned_by(getattr(op, name)))
    monkeypatch.setattr(op._prepared, "_remembered", {})
    return plans


# ---- one token per sequence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, state", [("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32"),
                                          ("float16", "float16"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("heads, key_dim, value_dim", [(3, 128, 128), (5, 24, 40), (1, 8, 256), (2, 232, 8)])
def test_step(xp, heads, key_dim, value_dim, dtype, state):
    slots = np.int32([4, -1, 0, 2])
    x = make(4, heads, key_dim, value_dim, dtype)
    pool = make_state(6, heads, key_dim, value_dim, state) / 4
    check(xp, *x[:3], pool.astype(dtype_of(state)), x[3], used=[4, 0, 2], lists={"slots": slots}, scale=0.7)


def test_step_starts_from_zeros_and_masks(xp):
    q, k, v, slopes = make(4, 2, 16, 16)
    state = make_state(4, 2, 16, 16)
    state[1] = np.nan                     # not read
    v[2], k[2] = np.nan, np.inf           # masked
    lists = {"has_state": np.array([True, False, True, True]), "mask": np.uint8([1, 1, 0, 7])}
    check(xp, q, k, v, state, slopes, lists=lists)


def test_step_many_states(xp):
    """Enough of them for blocks that take whole rows."""
    q, k, v, slopes = make(130, 4, 16, 128)
    check(xp, q, k, v, make_state(130, 4, 16, 128) / 4, slopes)


def test_scale_and_hand_worked_numbers(xp):
    """state = [[2], [4]] in the first two dims; slope log 2; k = (1, 3), v = 5, q = (1, 10)."""
    q, k, v = (np.zeros((1, 1, 8), np.float32) for _ in range(3))
    state = np.zeros((1, 1, 8, 8), np.float32)
    q[0, 0, :2], k[0, 0, :2], v[0, 0, 0], state[0, 0, :2, 0] = (1, 10), (1, 3), 5, (2, 4)
    for starts in (None, xp.array(np.int32([0, 1]))):
        device = xp.array(state)
        out = cupyattn.lightning_attention(*(xp.array(x) for x in (q, k, v)), device,
                                           xp.array(np.log(np.float32([2]))), scale=0.5, cu_seqlens=starts)
        assert_close(xp.numpy(device)[0, 0, :2, 0], [6, 17], 1e-6, 1e-6)
        assert_close(xp.numpy(out)[0, 0, 0], 88, 1e-6, 1e-6)


# ---- any number of tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, state", [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("heads, key_dim, value_dim", [(3, 64, 72), (1, 16, 8), (2, 8, 136)])
def test_prefill(xp, heads, key_dim, value_dim, dtype, state):
    lists = {"cu_seqlens": np.int32([0, 45, 45, 46, 79]), "slots": np.int32([3, 1, 0, -1]),
             "has_state": np.array([True, True, False, True])}
    x = make(79, heads, key_dim, value_dim, dtype)
    pool = (make_state(5, heads, key_dim, value_dim) / 4).astype(dtype_of(state))
    lost = 2.0**-17 if xp.name != "numpy" and dtype != "float32" else 0.0   # on tensor cores
    check(xp, *x[:3], pool, x[3], used=[3, 1, 0], lists=lists, scale=1.3, lost=lost)


@pytest.mark.parametrize("heads, key_dim, value_dim, dtype, state, arch", [
    (3, 72, 72, "bfloat16", "float32", "sm_90a"), (1, 16, 8, "float16", "bfloat16", "sm_90a"),
    (64, 8, 40, "float16", "float16", "sm_120a"), (1, 256, 40, "bfloat16", "float32", "sm_80")])
def test_prefill_on_tensor_cores(heads, key_dim, value_dim, dtype, state, arch, monkeypatch):
    plans = plan_for(monkeypatch, arch)
    lists = {"cu_seqlens": np.int32([0, 65, 65, 66, 216]), "slots": np.int32([3, 1, 0, -1]),
             "has_state": np.array([True, True, False, True]), "mask": np.arange(216) % 11 != 7}
    q, k, v, slopes = make(216, heads, key_dim, value_dim, dtype)
    k[7], v[18] = np.nan, np.inf                      # masked
    pool = (make_state(5, heads, key_dim, value_dim) / 4).astype(dtype_of(state))
    from conftest import NumpyArrays

    check(NumpyArrays(), q, k, v, pool, slopes, used=[3, 1, 0], lists=lists, scale=1.3, lost=2.0**-17)
    assert plans[0].spec.kernel == "lightning_attention_mma"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensor_cores_keep_any_range(dtype, monkeypatch):
    """Scores and states past 65504, and tiny ones beside large ones; a head that never fades beside a fast one."""
    plan_for(monkeypatch, "sm_90a")
    q, k, v, _ = make(130, 2, 64, 32, dtype)
    starts, slopes = np.int32([0, 130]), np.float32([0, 3])
    for state_size, q_size, v_size in ((1e6, 1, 1), (1, 3000, 1e-3), (1e-6, 1e-3, 100), (0, 1, 1)):
        k_size, pool = q_size, make_state(1, 2, 64, 32) * np.float32(state_size)
        x = [(a.astype(np.float32) * size).astype(a.dtype) for a, size in ((q, q_size), (k, k_size), (v, v_size))]
        size = state_size * q_size + q_size**2 * v_size * 3          # of the results
        want_state, state = pool.astype(np.float64), pool.copy()
        want = expected(*x, want_state, slopes, cu_seqlens=starts, scale=1 / size)
        got = cupyattn.lightning_attention(*x, state, slopes, cu_seqlens=starts, scale=1 / size)
        assert_close(got, want, *BOUNDS[dtype])
        assert_close(state, want_state, 2e-5 * np.abs(want_state).max(), 0)


def test_what_runs_on_tensor_cores():
    """The plans of a GPU: MiniMax's shape fills an H200 with a sequence; what else goes to CUDA cores says why."""
    def plan(heads=64, key_dim=128, value_dim=128, block_size=None, x="bfloat16", align=16, arch="sm_90a"):
        return op._plan_lightning_attention_prefill(1, heads, key_dim, value_dim, block_size, x, "float32", align, arch)

    for arch, most in (("sm_80", 163), ("sm_89", 99), ("sm_90a", 227), ("sm_120a", 99)):
        for key_dim in (8, 64, 128, 256):
            made, columns, _, block_size = plan(key_dim=key_dim, arch=arch)
            assert made.shared_bytes <= most * 1024 and columns in (16, 32, 64)
            assert made.spec.kernel.endswith("_mma") or (key_dim == 256 and most == 99)
            assert block_size == (64 if made.spec.kernel.endswith("_mma") else 32)
    made, columns, *_ = plan()
    assert made.grid[0] == 128 * 2 and columns == 64 and plan(heads=32)[0].grid[0] == 128 * 2   # and of rows behind
    for options, why in (({"x": "float32"}, "float32 on sm_90a"), ({"arch": "sm_75"}, "bfloat16 on sm_75"),
                         ({"align": 8}, "alignment 8"), ({"block_size": 65}, "block_size 65"),
                         ({"arch": "sm_89", "key_dim": 256}, "101376 bytes of shared memory")):
        assert plan(**options)[0].note.startswith(f"CUDA cores: {why}; tiles of ")


def test_prefill_of_the_largest_dims(xp):
    check(xp, *make(40, 1, 256, 256)[:3], make_state(1, 1, 256, 256) / 4, np.float32([0.05]),
          lists={"cu_seqlens": np.int32([0, 40])})


def test_block_sizes_agree(xp):
    q, k, v, slopes = make(300, 2, 32, 24)
    pool = make_state(2, 2, 32, 24)
    results = []
    for block_size in (1, 2, 5, 8, 16, 31, 32, 33, 64, 100, 128, 255, 256):
        state = xp.array(pool)
        out = cupyattn.lightning_attention(*(xp.array(x) for x in (q, k, v)), state, xp.array(slopes),
                                           cu_seqlens=xp.array(np.int32([0, 290, 300])), block_size=block_size)
        results.append((xp.numpy(out), xp.numpy(state)))
    want_state = pool.astype(np.float64)
    want = expected(q, k, v, want_state, slopes, cu_seqlens=np.int32([0, 290, 300]))
    for out, state in results:
        assert_close(out, want, 1e-5, 0)
        assert_close(state, want_state, 1e-5, 0)


@pytest.mark.parametrize("block_size", [None, 1, 32])
def test_a_slow_head_remembers(block_size):
    """A decay of 1 - 5e-5 over 2000 tokens; with a factor rounded to float32 2e-5 would be lost."""
    k = np.zeros((2000, 1, 8), np.float32)
    state, slope = np.full((1, 1, 8, 8), 3, np.float32), np.float32([5e-5])
    if block_size is None:
        for _ in range(2000):
            cupyattn.lightning_attention(k[:1], k[:1], k[:1], state, slope)
    else:
        cupyattn.lightning_attention(k, k, k, state, slope, cu_seqlens=np.int32([0, 2000]), block_size=block_size)
    assert_close(state, np.full(state.shape, 3 * np.exp(-2000 * float(slope[0]))), 0, 1e-5)


def onnx_gated(q, k, v, state, slopes, scale):
    """(out, state) of com.microsoft.LinearAttention with the rule "gated" for sequences of one length, [batch, tokens,
    heads, dim]; its gate is the logarithm of the decay."""
    import onnxruntime
    from onnx import TensorProto, helper

    batch, tokens, heads, _ = q.shape
    gate = np.broadcast_to(-slopes, (batch, tokens, heads)).astype(np.float32)
    feed = {name: x.reshape(batch, tokens, -1) for name, x in (("q", q), ("k", k), ("v", v), ("gate", gate))}
    feed["state"] = state
    node = helper.make_node("LinearAttention", ["q", "k", "v", "state", "gate"], ["out", "present"],
                            domain="com.microsoft", q_num_heads=heads, kv_num_heads=heads, update_rule="gated",
                            scale=float(scale))
    graph = helper.make_graph([node], "gated", [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in feed.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("out", "present")])
    model = helper.make_model(graph, ir_version=10, opset_imports=[
        helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out, present = session.run(["out", "present"], feed)
    return out.reshape(v.shape), present


@pytest.mark.parametrize("tokens", [1, 75])
def test_onnxruntime_says_the_same(tokens):
    q, k, v, slopes = make(2 * tokens, 3, 32, 16)
    state = make_state(2, 3, 32, 16) / 4
    want, want_state = onnx_gated(*(x.reshape(2, tokens, *x.shape[1:]) for x in (q, k, v)), state, slopes, 0.3)
    starts = None if tokens == 1 else np.int32([0, tokens, 2 * tokens])
    got = cupyattn.lightning_attention(q, k, v, state, slopes, scale=0.3, cu_seqlens=starts)
    assert_close(got, want.reshape(got.shape), 1e-5, 1e-5)
    assert_close(state, want_state, 1e-5, 1e-5)


@pytest.mark.parametrize("cut", [1, 7, 32, 39])
def test_a_sequence_in_two_calls(xp, cut):
    """With and without history in front, so that it must fade as in one call."""
    q, k, v, slopes = make(40, 3, 24, 16)
    pool = make_state(1, 3, 24, 16)
    for fresh in (False, True):
        start = {} if not fresh else {"has_state": xp.array(np.zeros(1, bool))}
        whole, parts = xp.array(pool), xp.array(pool)

        def call(state, begin, end, **options):
            return xp.numpy(cupyattn.lightning_attention(
                *(xp.array(x)[begin:end] for x in (q, k, v)), state, xp.array(slopes), block_size=16,
                cu_seqlens=xp.array(np.int32([0, end - begin])), **options))

        want = call(whole, 0, 40, **start)
        got = np.concatenate([call(parts, 0, cut, **start), call(parts, cut, 40)])
        assert_close(got, want, 4e-6, 2e-6)
        assert_close(xp.numpy(parts), xp.numpy(whole), 2e-6, 2e-6)


def test_prefill_is_a_loop_of_steps(xp):
    q, k, v, slopes = (xp.array(x) for x in make(70, 3, 16, 40))
    pool = make_state(1, 3, 16, 40)
    state, stepped = xp.array(pool), xp.array(pool)
    out = cupyattn.lightning_attention(q, k, v, state, slopes, cu_seqlens=xp.array(np.int32([0, 70])))
    steps = [xp.numpy(cupyattn.lightning_attention(q[t:t + 1], k[t:t + 1], v[t:t + 1], stepped, slopes))
             for t in range(70)]
    assert_close(xp.numpy(out), np.concatenate(steps), 4e-6, 2e-6)
    assert_close(xp.numpy(state), xp.numpy(stepped), 2e-6, 2e-6)


def test_left_padding_by_mask_is_exact(xp):
    q, k, v, slopes = make(40, 2, 16, 16, "float16")
    k[:7], v[:7] = np.nan, np.inf
    padded, bare = xp.array(make_state(1, 2, 16, 16)), xp.array(np.zeros((1, 2, 16, 16), np.float32))
    got = cupyattn.lightning_attention(
        *(xp.array(x) for x in (q, k, v)), padded, xp.array(slopes), cu_seqlens=xp.array(np.int32([0, 40])),
        mask=xp.array(np.arange(40) >= 7), has_state=xp.array(np.zeros(1, bool)))
    want = cupyattn.lightning_attention(*(xp.array(x)[7:] for x in (q, k, v)), bare, xp.array(slopes),
                                        cu_seqlens=xp.array(np.int32([0, 33])))
    assert not xp.numpy(got)[:7].any()
    assert_close(xp.numpy(got)[7:], xp.numpy(want), 1e-3, 2.0**-10)
    assert_close(xp.numpy(padded), xp.numpy(bare), 2e-6, 2e-6)


@pytest.mark.parametrize("slope", [0.0, 50.0, 1e30, 3e38, np.inf])
@pytest.mark.parametrize("starts", [None, np.int32([0, 20, 20])], ids=["step", "prefill"])
def test_slopes_of_any_size(xp, slope, starts):
    q, k, v, _ = make(2 if starts is None else 20, 1, 16, 16)
    check(xp, q, k, v, make_state(2, 1, 16, 16) / 4, np.float32([slope]),
          lists={} if starts is None else {"cu_seqlens": starts}, bounds=(1e-5, 2e-6))


@pytest.mark.parametrize("lists", [{}, {"cu_seqlens": np.int32([0, 33, 40])}], ids=["step", "prefill"])
def test_strided_and_offset_views(xp, lists):
    """A fused projection [tokens, 3, heads, dim], 16-byte rows or not, and a pool with its axes in another order."""
    tokens, slots = (4, 4) if not lists else (40, 3)
    base = rng.standard_normal((tokens, 3, 2, 16 + 11)) / 4
    pool = rng.standard_normal((2, slots, 16, 24)) / 4
    for offset, dtype, places in ((8, "float16", 0), (3, "float16", 0), (8, "float32", 3)):
        qkv = base.astype(dtype)
        q, k, v = (qkv[:, i, :, offset:offset + 16] for i in range(3))
        view = xp.array(qkv)
        state = pool.astype(np.float32).transpose(1, 0, 2, 3)[..., places:places + 16]
        want_state = state.astype(np.float64)
        slopes = np.float32([0.1, 9, 0.2, 9])
        want = expected(q, k, v, want_state, slopes[::2], **lists)
        device = xp.array(pool.astype(np.float32))
        device_state = device.transpose(1, 0, 2, 3)[..., places:places + 16]
        wide = xp.array(np.full((tokens, 2, 40), np.nan, dtype))
        out = cupyattn.lightning_attention(
            *(view[:, i, :, offset:offset + 16] for i in range(3)), device_state, xp.array(slopes)[::2],
            **{name: xp.array(x) for name, x in lists.items()}, out=wide[..., 8:24])
        host = xp.numpy(wide)
        assert_close(xp.numpy(out), want, *BOUNDS[dtype])
        assert np.isnan(host[..., :8]).all() and np.isnan(host[..., 24:]).all()
        after = xp.numpy(device).transpose(1, 0, 2, 3)
        assert_close(after[..., places:places + 16], want_state, 2e-6, 2e-6)
        rest = np.delete(after, np.s_[places:places + 16], axis=-1)
        assert_same_bits(rest, np.delete(pool.astype(np.float32).transpose(1, 0, 2, 3), np.s_[places:places + 16], -1))


def test_empty(xp):
    q, k, v, slopes = (xp.array(x) for x in make(0, 2, 16, 8))
    pool = make_state(2, 2, 16, 8)
    state = xp.array(pool)
    assert cupyattn.lightning_attention(q, k, v, state, slopes).shape == (0, 2, 8)
    for starts in ([0], [0, 0, 0]):
        out = cupyattn.lightning_attention(q, k, v, state, slopes, cu_seqlens=xp.array(np.int32(starts)))
        assert out.shape == (0, 2, 8)
    assert_same_bits(xp.numpy(state), pool)


def test_sequences_without_tokens_keep_even_a_state_they_need_not(xp):
    q, k, v, slopes = (xp.array(x) for x in make(3, 1, 8, 8))
    pool = make_state(3, 1, 8, 8)
    state = xp.array(pool)
    cupyattn.lightning_attention(q, k, v, state, slopes, cu_seqlens=xp.array(np.int32([0, 0, 3, 3])),
                                 has_state=xp.array(np.zeros(3, bool)))
    assert_same_bits(xp.numpy(state)[[0, 2]], pool[[0, 2]])


@pytest.mark.parametrize("starts", [None, [-7, 1, 2, 3, 90]], ids=["step", "prefill"])
@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_on_a_device_wild_slots_and_offsets_touch_nothing(xp, starts):
    q, k, v, slopes = make(4, 2, 16, 16)
    pool = make_state(3, 2, 16, 16)
    state, out = xp.array(pool), xp.array(np.full((4, 2, 16), np.nan, np.float32))
    lists = {"slots": np.int32([3, 1, 2**31 - 1, -(2**31)])}
    if starts is not None:
        lists["cu_seqlens"] = np.int32(starts)
    cupyattn.lightning_attention(*(xp.array(x) for x in (q, k, v)), state, xp.array(slopes), out=out,
                                 **{name: xp.array(x) for name, x in lists.items()})
    assert_same_bits(xp.numpy(state)[[0, 2]], pool[[0, 2]])
    assert (xp.numpy(state)[1] != pool[1]).all()
    got = xp.numpy(out)
    assert not got[[0, 2, 3]].any() and got[1].all()


def test_sequences_do_not_see_each_other(xp):
    """Bits of a sequence beside others and alone."""
    q, k, v, slopes = (xp.array(x) for x in make(60, 2, 16, 16, "bfloat16"))
    pool = make_state(3, 2, 16, 16)
    both = xp.array(pool)
    starts = np.int32([0, 21, 22, 60])
    out = xp.numpy(cupyattn.lightning_attention(q, k, v, both, slopes, cu_seqlens=xp.array(starts)))
    for b in range(3):
        begin, end = starts[b:b + 2]
        alone = xp.array(pool[b:b + 1])
        got = cupyattn.lightning_attention(q[begin:end], k[begin:end], v[begin:end], alone, slopes,
                                           cu_seqlens=xp.array(np.int32([0, end - begin])))
        assert_same_bits(xp.numpy(got), out[begin:end])
        assert_same_bits(xp.numpy(alone)[0], xp.numpy(both)[b])


# ---- the CPU executor's checks --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("on", ["cpu", "sm_90a"])
def test_lightning_attention_checked(dtype, on, monkeypatch):
    """Both kernels, with the CPU's blocks of one thread and with a GPU's."""
    if on != "cpu":
        plan_for(monkeypatch, on)
    q, k, v, slopes = make(47, 2, 16, 72, dtype)
    step, lists = slice(0, 3), {"cu_seqlens": np.int32([0, 5, 5, 47]), "has_state": np.uint8([0, 1, 1])}
    results = []
    for schedule, seed in SCHEDULES:
        states = [make_state(4, 2, 16, 72, generator=np.random.default_rng(1)) for _ in "123"]
        with settings(check=True, schedule=schedule, seed=seed):
            results.append([
                cupyattn.lightning_attention(q[step], k[step], v[step], states[0], slopes,
                                             slots=np.int32([3, -1, 0])),
                cupyattn.lightning_attention(q, k, v, states[1], slopes, **lists),
                cupyattn.lightning_attention(q, k, v, states[2], slopes, **lists, block_size=65), *states])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)
    want_state = make_state(4, 2, 16, 72, generator=np.random.default_rng(1)).astype(np.float64)
    assert_close(results[0][1], expected(q, k, v, want_state, slopes, **lists), *BOUNDS[dtype])
    assert_close(results[0][4], want_state, 2e-6, 2e-6)


def test_tensor_cores_with_one_stage_checked(monkeypatch):
    """Where shared memory is too short for two: the next tokens are fetched once nobody reads these any more."""
    plans = plan_for(monkeypatch, "sm_80")
    q, k, v, slopes = make(70, 1, 136, 8, "bfloat16")
    results = []
    for schedule, seed in (("forward", 0), ("random", 3)):
        state = make_state(1, 1, 136, 8, generator=np.random.default_rng(1))
        with settings(check=True, schedule=schedule, seed=seed):
            out = cupyattn.lightning_attention(q, k, v, state, slopes, cu_seqlens=np.int32([0, 70]), block_size=48)
        results.append((out, state))
    assert dict(plans[0].spec.constants)["STAGES"] == 1
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    want_state = make_state(1, 1, 136, 8, generator=np.random.default_rng(1)).astype(np.float64)
    want = expected(q, k, v, want_state, slopes, cu_seqlens=np.int32([0, 70]))
    assert_close(results[0][0], want, *BOUNDS["bfloat16"])


@pytest.mark.parametrize("starts", [None, [0, 20, 20, 60]], ids=["step", "prefill"])
@pytest.mark.parametrize("on", ["cpu", "sm_90a"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_state_moves_once_each_way(starts, on, dtype, monkeypatch):
    plan_for(monkeypatch, on)
    batch, tokens = 3, 3 if starts is None else 60
    q, k, v, slopes = make(tokens, 2, 32, 128, "float16")
    state = np.empty(5 * 2 * 32 * 128 + 16, dtype)
    state = state[-state.ctypes.data % 32 // state.itemsize:][:5 * 2 * 32 * 128]             # at a sector's beginning
    state = state.reshape(5, 2, 32, 128)
    state[...] = make_state(*state.shape)
    lists = {} if starts is None else {"cu_seqlens": np.int32(starts)}
    with settings(check=True), counters() as launches:
        cupyattn.lightning_attention(q, k, v, state, slopes, slots=np.int32([4, 2, 0]), **lists,
                                     has_state=np.uint8([1, 1, 0]))
    moved = launches[0].buffers["state"]
    one = state[0].nbytes
    went_on = 2 if starts is None else 1          # sequence 1 of the prefill has no token
    assert moved["bytes_read"] == went_on * one
    assert moved["bytes_written"] == (batch if starts is None else 2) * one
    assert launches[0].buffers["out.data"]["bytes_written"] == v.nbytes
    for kind in ("ldmatrix", "read", "write"):   # a step's only writes are its sums, of 8 numbers with 16-bit states
        assert launches[0].shared[kind]["conflicts"] == 0 or (starts is None and dtype != "float32" and kind == "write")
    if on != "cpu" and starts is None:   # coalesced: whole sectors
        assert moved["sectors_read"] == moved["bytes_read"] // 32
        assert moved["sectors_written"] == moved["bytes_written"] // 32


@pytest.mark.parametrize("spec, wide", [(op.CORE[0], 8), (op.CORE[2], 8), (op.CORE[3], 4), (op.CORE[4], 4)], ids=str)
def test_a_step_asks_for_many_rows_before_it_waits(spec, wide):
    """All wide loads of a round stand before the first number is used or stored, without a branch between them."""
    compiled = nvrtc.compile_code(cuda.code(spec), cuda.options(spec, "sm_90a"), "sm_90a")
    loop = next(body for body in nvrtc.loops(compiled.cubin, spec.kernel) if any("LDG.E.128" in x for x in body))
    assert sum("LDG.E.128" in line for line in loop) == wide and nvrtc.bytes_asked_for(loop) >= 16 * wide
    assert nvrtc.resources(compiled, spec.kernel).registers <= (102 if wide == 4 else 85)


# ---- shapes, arguments, slopes --------------------------------------------------------------------------------


@hypothesis_settings(max_examples=30, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 70), max_size=4), heads=st.integers(1, 3), key_dim=st.integers(1, 6),
       value_dim=st.integers(1, 10), block_size=st.integers(1, 80), dtype=st.sampled_from(["float32", "bfloat16"]),
       seed=st.integers(0, 2**31))
def test_shapes(lengths, heads, key_dim, value_dim, block_size, dtype, seed):
    generator = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    q, k, v, slopes = make(int(starts[-1]), heads, 8 * key_dim, 8 * value_dim, dtype, generator)
    state = make_state(len(lengths) + 1, heads, 8 * key_dim, 8 * value_dim, generator=generator) / 4
    slots = generator.permutation(len(lengths) + 1)[:len(lengths)].astype(np.int32)
    lists = {"cu_seqlens": starts, "slots": slots, "has_state": generator.random(len(lengths)) < 0.5}
    want_state = state.astype(np.float64)
    want = expected(q, k, v, want_state, slopes, **lists)
    got = cupyattn.lightning_attention(q, k, v, state, slopes, block_size=block_size, out=poison(np.empty_like(v)),
                                       **lists)
    assert_close(got, want, *BOUNDS[dtype])
    assert_close(state, want_state, 4e-6, 2e-6)


def test_errors():
    q, k, v, slopes = make(3, 2, 16, 8)
    state = make_state(4, 2, 16, 8)

    def call(error, match, q=q, k=k, v=v, state=state, slopes=slopes, **options):
        with pytest.raises(error, match="lightning_attention: " + match):
            cupyattn.lightning_attention(q, k, v, state, slopes, **options)

    call(TypeError, "q must be float16 or bfloat16 or float32, got float64", q=q.astype(np.float64))
    call(TypeError, "k must be float32, got float16", k=k.astype(np.float16))
    call(ValueError, r"k must be \[tokens, heads, key_dim\] = \[3, 2, 16\], got \[3, 2, 8\]", k=k[..., :8])
    call(ValueError, "q must have a key_dim that is a multiple of 8 up to 256, got 4", q=q[..., :4], k=k[..., :4])
    call(ValueError, "v must have a value_dim that is a multiple of 8 up to 256, got 264",
         v=np.zeros((3, 2, 264), np.float32))
    call(ValueError, r"state must be .* = \[\*, 2, 16, 8\], got \[4, 2, 8, 16\]", state=state.reshape(4, 2, 8, 16))
    call(ValueError, "state must have a contiguous last axis", state=state.reshape(4, 2, 8, 16).swapaxes(2, 3))
    call(ValueError, "slots must be given when the pool has fewer slots than there are sequences, got none for 3 "
         "sequences and 2 slots", state=state[:2])
    call(TypeError, "slopes must be float32, got float64", slopes=slopes.astype(np.float64))
    call(ValueError, r"slopes must be \[heads\] = \[2\], got \[1\]", slopes=slopes[:1])
    call(ValueError, "block_size must be from 1 to 256, got 257", block_size=257)
    call(ValueError, "block_size must be an int32 of at least 1, got 0", block_size=0)
    call(TypeError, "block_size must be an integer, got float", block_size=1.5)
    call(ValueError, "scale must be a finite float32, got nan", scale=math.nan)
    call(TypeError, "slots must be int32, got int64", slots=np.arange(3))
    call(ValueError, "slots must be below the 4 slots of the pool or negative, got 4", slots=np.int32([0, 4, -1]))
    call(ValueError, "slots must name no slot twice, got slot 1 more than once", slots=np.int32([1, 0, 1]))
    call(ValueError, r"slots must be \[batch\] = \[3\], got \[2\]", slots=np.int32([1, 0]))
    for starts in ([0, 4], [0, 2, 1], [1, 3], [-1, 3]):
        call(ValueError, "cu_seqlens must start at 0, not decrease and end within the 3 rows, got", slots=None,
             cu_seqlens=np.int32(starts))
    call(ValueError, r"cu_seqlens must be \[batch \+ 1\], got no entry", cu_seqlens=np.int32([]))
    call(TypeError, "has_state must be bool or uint8, got int32", has_state=np.int32([1, 1, 1]))
    call(ValueError, r"mask must be \[tokens\] = \[3\], got \[2\]", mask=np.ones(2, bool))
    call(TypeError, "out must be float32, got float16", out=np.empty((3, 2, 8), np.float16))
    frozen = state.copy()
    frozen.flags.writeable = False
    call(ValueError, "state must be writeable", state=frozen)
    call(ValueError, "state must not repeat elements", state=as_strided(state, strides=(0, *state.strides[1:])))
    assert_same_bits(frozen, state)       # refused calls change nothing


def test_slopes_of_every_convention():
    """Worked out by hand from each model's formula."""
    assert_close(cupyattn.lightning_slopes(4, 0, 5), 2.0 ** -np.arange(2, 10, 2) * (1 + 1e-5), 0, 1e-6)
    assert_close(cupyattn.lightning_slopes(8, 3, 5), 2.0 ** -np.arange(1, 9) * (1 - 3 / 4.00001 + 1e-5), 0, 1e-6)
    alibi = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]              # of 4 heads, then every second one of 8
    assert_close(cupyattn.lightning_slopes(6, 1, 3, convention="easydel"), np.array(alibi) * (0.5 + 1e-5), 0, 1e-6)
    same, other = (cupyattn.lightning_slopes(6, 1, 3, convention=c) for c in ("minimax", "easydel"))
    assert abs(same - other).max() > 0.05                           # 6 is no power of two
    assert_close(cupyattn.lightning_slopes(64, 7, 80), cupyattn.lightning_slopes(64, 7, 80, convention="easydel"),
                 0, 1e-5)
    assert_close(cupyattn.lightning_slopes(4, 3, 12, convention="fla"), [0, 1.5, 3, 4.5], 0, 1e-6)
    for convention in op.CONVENTIONS:
        one = cupyattn.lightning_slopes(3, 0, 1, convention=convention)
        assert one.dtype == np.float32 and one.shape == (3,) and np.isfinite(one).all()
    last = [cupyattn.lightning_slopes(2, 4, 5, convention=c) for c in ("minimax", "easydel")]
    assert all((slopes > 0).all() for slopes in last)               # what the 1e-5 is for


@pytest.mark.parametrize("error, arguments, message", [
    (ValueError, (0, 0, 1), "num_heads must be an int32 of at least 1, got 0"),
    (ValueError, (2, 3, 3), "layer must be below num_layers = 3, got 3"),
    (TypeError, (2, 0.5, 3), "layer must be an integer, got float"),
    (ValueError, (2, 0, 0), "num_layers must be an int32 of at least 1, got 0")])
def test_slopes_errors(error, arguments, message):
    with pytest.raises(error, match=f"lightning_slopes: {message}"):
        cupyattn.lightning_slopes(*arguments)
    with pytest.raises(ValueError, match="lightning_slopes: convention must be one of .*, got 'alibi'"):
        cupyattn.lightning_slopes(2, 0, 1, convention="alibi")
