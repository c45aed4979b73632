# SPDX-License-Identifier: Apache-2.0
import numpy as np
import nvrtc
import pytest
from compare import ROUNDING, assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn.ops import causal_conv1d as module
from cupyattn.ops.causal_conv1d import CORE, _plan_causal_conv1d
from cupyattn.reference import causal_conv1d as reference
from cupyattn.runtime import cuda
from cupyattn.runtime.cpu import counters, settings

rng = np.random.default_rng(21)


def _normal(shape, dtype="float32"):
    return rng.standard_normal(shape).astype(dtype_of(dtype))


def _weights(channels, width, dtype="float32"):
    return _normal((channels, width), dtype), _normal(channels, dtype)


def _pool(slots, channels, length, dtype="float32", layout="rows"):
    """A pool of NaN, contiguous over time ("rows") or over channels."""
    shape = (slots, channels, length) if layout == "rows" else (slots, length, channels)
    pool = poison(np.empty(shape, dtype_of(dtype)))
    return pool if layout == "rows" else pool.transpose(0, 2, 1)


def _on(xp, pool):
    """`pool` on the device with its layout."""
    swapped = pool.strides[1] < pool.strides[2]
    return xp.array(pool.transpose(0, 2, 1).copy()).transpose(0, 2, 1) if swapped else xp.array(pool)


# ---- packed prefill --------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, state_len", [(1, 0), (1, 2), (2, 1), (3, 4), (4, 3), (4, 4), (5, 4), (8, 9)])
@pytest.mark.parametrize("channels", [64, 65])
def test_prefill(xp, width, state_len, channels):
    """Sequences of 0 to 300 tokens with and without history; skipped ones and rows of none give zeros."""
    lengths = [3, 0, 300, 1, 2, 70]
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    x = _normal((starts[-1] + 5, channels))
    x[starts[-1]:] = np.nan
    x[starts[4]:starts[5]] = np.nan
    weight, bias = _weights(channels, width)
    slots, has_state = np.int32([6, 3, 1, 0, -7, 4]), np.uint8([1, 1, 0, 0, 1, 7])
    pool = _pool(8, channels, state_len, layout="rows" if width % 2 else "channels")
    pool[[6, 4]] = _normal((2, channels, state_len))
    want_pool = pool.copy()
    want = reference.causal_conv1d(x, weight, bias, conv_states=want_pool, cu_seqlens=starts, slots=slots,
                                   has_state=has_state, activation="silu")
    states = _on(xp, pool)
    got = cupyattn.causal_conv1d(
        xp.array(x), xp.array(weight), xp.array(bias), conv_states=states, cu_seqlens=xp.array(starts),
        slots=xp.array(slots), has_state=xp.array(has_state), activation="silu", out=poison(xp.array(x)))
    assert_close(xp.numpy(got), want, 2e-6, 2e-6)
    assert_same_bits(xp.numpy(states), want_pool)


@pytest.mark.parametrize("dtype, weight_dtype, state_dtype", [
    ("float16", "float16", "float32"), ("float16", "float32", "float16"), ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "float32"), ("float32", "float32", "float16")])
@pytest.mark.parametrize("layout", ["rows", "channels"])
def test_dtypes(xp, dtype, weight_dtype, state_dtype, layout):
    x, (weight, bias) = _normal((90, 48), dtype), _weights(48, 4, weight_dtype)
    pool = _pool(3, 48, 4, state_dtype, layout)
    pool[:2] = _normal((2, 48, 4), state_dtype)
    want_pool = pool.copy()
    starts = np.int32([0, 20, 90])
    want = reference.causal_conv1d(x, weight, bias, conv_states=want_pool, cu_seqlens=starts)
    states = _on(xp, pool)
    device = {name: xp.array(a) for name, a in (("x", x), ("weight", weight), ("bias", bias))}
    got = cupyattn.causal_conv1d(**device, conv_states=states, cu_seqlens=xp.array(starts))
    assert got.dtype == x.dtype and isinstance(got, xp.module.ndarray)
    assert_close(xp.numpy(got), want, ROUNDING[dtype][0] + 2e-6, ROUNDING[dtype][1])
    assert_same_bits(xp.numpy(states), want_pool)
    token = _normal((2, 48), dtype)
    want = reference.causal_conv1d_update(token, want_pool, weight, bias, "swish")
    got = cupyattn.causal_conv1d_update(xp.array(token), states, device["weight"], device["bias"], "swish")
    assert_close(xp.numpy(got), want, ROUNDING[dtype][0] + 2e-6, ROUNDING[dtype][1])
    assert_same_bits(xp.numpy(states), want_pool)


@pytest.mark.parametrize("width", range(1, 9))
def test_prefill_and_updates_are_the_full_convolution(width):
    x, (weight, bias) = _normal((40, 24)), _weights(24, width)
    whole = cupyattn.causal_conv1d(x, weight, bias, activation="silu")
    taps = np.zeros((40, 24))
    for t in range(40):
        for j in range(width):
            if t - j >= 0:
                taps[t] += weight[:, width - 1 - j].astype(np.float64) * x[t - j]
    taps += bias
    assert_close(whole, taps / (1 + np.exp(-taps)), 2e-6, 2e-6)
    pool = poison(np.empty((1, 24, width), np.float32))
    parts = [cupyattn.causal_conv1d(x[:15], weight, bias, conv_states=pool, has_state=np.array([False]),
                                    activation="silu"),
             cupyattn.causal_conv1d(x[15:17], weight, bias, conv_states=pool, activation="silu")]
    parts += [cupyattn.causal_conv1d_update(x[t:t + 1], pool, weight, bias, "silu") for t in range(17, 30)]
    parts.append(cupyattn.causal_conv1d_update(x[None, 30:].transpose(0, 2, 1), pool, weight, bias, "silu")[0].T)
    assert_close(np.concatenate(parts), whole, 1e-6, 1e-6)
    assert_same_bits(pool[0], np.ascontiguousarray(x[40 - width:].T))


def test_a_sequence_does_not_see_the_others():
    x, (weight, bias) = _normal((500, 40), "float16"), _weights(40, 4)
    starts = np.int32([0, 37, 400, 500])
    whole = cupyattn.causal_conv1d(x, weight, bias, cu_seqlens=starts)
    for a, b in zip(starts, starts[1:], strict=False):
        assert_same_bits(whole[a:b], cupyattn.causal_conv1d(x[a:b], weight, bias))


# ---- update ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("circular", [False, True], ids=["rolling", "circular"])
@pytest.mark.parametrize("width, state_len", [(1, 0), (1, 4), (2, 4), (3, 4), (4, 3), (4, 4), (4, 7), (6, 5), (8, 8)])
@pytest.mark.parametrize("tokens", [None, 1, 2, 9])
def test_update(xp, circular, width, state_len, tokens):
    channels, slots = 33, np.int32([4, -1, 0, 2])
    x = _normal((4, channels) if tokens is None else (4, channels, tokens))
    x[1] = np.nan
    weight, bias = _weights(channels, width)
    pool = _pool(6, channels, state_len)
    pool[[4, 0, 2]] = _normal((3, channels, state_len))
    positions = np.int32([0, 2**31 - 1, 5, 1003]) if circular else None
    want_pool = pool.copy()
    want = reference.causal_conv1d_update(x, want_pool, weight, bias, "silu", positions, slots)
    states = xp.array(pool)
    got = cupyattn.causal_conv1d_update(
        xp.array(x), states, xp.array(weight), xp.array(bias), "silu", xp.array(positions) if circular else None,
        xp.array(slots), out=poison(xp.array(x)))
    assert_close(xp.numpy(got), want, 2e-6, 2e-6)
    assert_same_bits(xp.numpy(states), want_pool)


@pytest.mark.parametrize("circular", [False, True], ids=["rolling", "circular"])
@pytest.mark.parametrize("width, state_len", [(4, 3), (4, 4), (4, 7), (3, 4), (6, 5)])
@pytest.mark.parametrize("dtype, state_dtype", [
    ("float32", "float32"), ("bfloat16", "float16"), ("float16", "float32")])
def test_update_of_states_by_channels(xp, circular, width, state_len, dtype, state_dtype):
    """Windows whose channels are neighbours, and columns of a wider weight: its taps are then not one access."""
    slots, positions = np.int32([4, -1, 0, 2]), np.int32([7, 2, 5, 1003]) if circular else None
    x, wide = _normal((4, 200), dtype), _normal((200, 7), dtype)
    bias = _normal(200, dtype)
    pool = _pool(6, 200, state_len, state_dtype, "channels")
    pool[[4, 0, 2]] = _normal((3, 200, state_len), state_dtype)
    for weight in (wide[:, 1:width + 1].copy(), wide[:, 1:width + 1]):
        want_pool, states = pool.copy(), _on(xp, pool)
        want = reference.causal_conv1d_update(x, want_pool, weight, bias, None, positions, slots)
        on_device = xp.array(weight) if weight.flags.c_contiguous else xp.array(wide)[:, 1:width + 1]
        got = cupyattn.causal_conv1d_update(xp.array(x), states, on_device, xp.array(bias), None,
                                            xp.array(positions) if circular else None, xp.array(slots))
        assert_close(xp.numpy(got), want, ROUNDING[dtype][0] + 2e-6, ROUNDING[dtype][1])
        assert_same_bits(xp.numpy(states), want_pool)


@pytest.mark.parametrize("dtype, state_dtype", [("float32", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("channels", [1, 127, 128, 129, 700])
def test_update_of_rows_at_the_edges(xp, channels, dtype, state_dtype):
    """A thread's channels are a block apart, and the last ones may not exist."""
    x, (weight, bias) = _normal((2, channels), dtype), _weights(channels, 4, dtype)
    pool = _pool(3, channels, 4, state_dtype)
    pool[:2] = _normal((2, channels, 4), state_dtype)
    want_pool, states = pool.copy(), xp.array(pool)
    want = reference.causal_conv1d_update(x, want_pool, weight, bias, "silu")
    got = cupyattn.causal_conv1d_update(xp.array(x), states, xp.array(weight), xp.array(bias), "silu",
                                        out=poison(xp.array(x)))
    assert_close(xp.numpy(got), want, ROUNDING[dtype][0] + 2e-6, ROUNDING[dtype][1])
    assert_same_bits(xp.numpy(states), want_pool)


def test_circular_and_rolling_agree():
    weight, _ = _weights(16, 4)
    rolling, ring = np.zeros((2, 16, 5), np.float32), np.zeros((2, 16, 5), np.float32)
    positions = np.int32([0, 3])
    for _ in range(12):
        x = _normal((2, 16))
        assert_same_bits(cupyattn.causal_conv1d_update(x, ring, weight, None, None, positions),
                         cupyattn.causal_conv1d_update(x, rolling, weight))
        positions += 1


def test_strided_and_offset_views(xp):
    base, states = _normal((3, 120), "float16"), _normal((5, 2, 60, 4))
    weight = _normal((4, 60))
    want_states = states.copy()
    want = reference.causal_conv1d_update(base[:, 3:63], want_states[1:4, 1], weight.T)
    pool, out = xp.array(states), xp.array(np.full((3, 80), np.nan, np.float16))
    cupyattn.causal_conv1d_update(xp.array(base)[:, 3:63], pool[1:4, 1], xp.array(weight).T, out=out[:, 5:65])
    host = xp.numpy(out)
    assert_close(host[:, 5:65], want, *ROUNDING["float16"])
    assert np.isnan(host[:, :5]).all() and np.isnan(host[:, 65:]).all()
    assert_same_bits(xp.numpy(pool), want_states)
    rows = xp.array(np.ascontiguousarray(base[:, 4:64].T))   # channels by tokens
    want = reference.causal_conv1d(base[:, 4:64], weight.T)
    assert_close(xp.numpy(cupyattn.causal_conv1d(rows.T, xp.array(weight).T)), want, *ROUNDING["float16"])


def test_wild_indices_on_the_device():
    """What nobody can check on a GPU: slots past the pool are skipped, offsets outside the rows are cut."""
    from standin import install

    x, (weight, _) = _normal((6, 8)), _weights(8, 4)
    pool = _normal((3, 8, 4))
    with install() as xp:
        states = xp.array(pool)
        got = cupyattn.causal_conv1d_update(xp.array(x), states, xp.array(weight), conv_state_indices=xp.array(
            np.int32([3, 2**31 - 1, -2**31, 1, 500, -1])))
        want_pool = pool.copy()
        known = np.int32([-1, -1, -1, 1, -1, -1])
        want = reference.causal_conv1d_update(x, want_pool, weight, conv_state_indices=known)
        assert_close(xp.numpy(got), want, 2e-6, 2e-6)
        assert_same_bits(xp.numpy(states), want_pool)
        for starts in ([0, 2**31 - 1], [-2**31, 2**31 - 1, 4], [5, 2, 100, -4], [9, 9]):
            got = cupyattn.causal_conv1d(xp.array(x), xp.array(weight), conv_states=xp.array(pool),
                                         cu_seqlens=xp.array(np.int32(starts)))
            assert got.shape == x.shape


def test_extreme_values(xp):
    x = np.float32([[500, -500, 3e38, np.inf, np.nan, 1, 1, 1]])
    weight = np.float32([[1], [1], [1], [1], [1], [0], [np.inf], [-90]])
    got = xp.numpy(cupyattn.causal_conv1d(xp.array(x), xp.array(weight), activation="silu"))
    assert_close(got, [[500, 0, 3e38, np.inf, np.nan, 0, np.inf, 0]], 1e-35, 1e-6)


def test_an_infinity_leaves_the_window():
    """Taps past the width do not touch older inputs."""
    pool = np.full((1, 8, 4), np.inf, np.float32)
    pool[:, :, 3:] = 1
    weight = np.ones((8, 2), np.float32)
    for layout in ("rows", "channels"):
        state = _pool(1, 8, 4, layout=layout)
        state[...] = pool
        assert (cupyattn.causal_conv1d_update(np.ones((1, 8), np.float32), state, weight) == 2).all()
        state[...] = pool
        assert (cupyattn.causal_conv1d(np.ones((2, 8), np.float32), weight, conv_states=state) == 2).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(xp, shape):
    x, weight = xp.array(np.zeros(shape, np.float16)), xp.array(np.zeros((shape[1], 4), np.float16))
    pool = xp.array(np.zeros((3, shape[1], 4), np.float16))
    assert cupyattn.causal_conv1d(x, weight, conv_states=pool).shape == shape
    assert cupyattn.causal_conv1d_update(x, pool, weight).shape == shape
    starts = xp.array(np.zeros(3, np.int32))
    assert cupyattn.causal_conv1d(x, weight, conv_states=pool, cu_seqlens=starts).shape == shape


@pytest.mark.parametrize("width, tokens, activation", [(4, 1, "silu"), (3, 17, "none"), (2, 300, "silu")])
def test_onnxruntime_agrees(width, tokens, activation):
    """com.microsoft's CausalConvWithState, from a state and to one."""
    import onnxruntime
    from onnx import TensorProto, helper

    names = ["x", "weight", "bias", "state", "out", "new_state"]
    node = helper.make_node("CausalConvWithState", names[:4], names[4:], domain="com.microsoft", activation=activation,
                            ndim=1)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph([node], "conv", values[:4], values[4:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21),
                                                    helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x, (weight, bias), pool = _normal((2, 24, tokens)), _weights(24, width), _normal((2, 24, width - 1))
    want, want_pool = session.run(None, {"x": x, "weight": weight[:, None], "bias": bias, "state": pool})
    ours = None if activation == "none" else activation
    packed, states = np.ascontiguousarray(x.transpose(0, 2, 1)).reshape(-1, 24), pool.copy()
    got = cupyattn.causal_conv1d(packed, weight, bias, conv_states=states, activation=ours,
                                 cu_seqlens=np.int32([0, tokens, 2 * tokens]))
    assert_close(got.reshape(2, tokens, 24).transpose(0, 2, 1), want, 2e-6, 2e-6)
    assert_same_bits(states, want_pool)
    assert_close(cupyattn.causal_conv1d_update(x, pool, weight, bias, ours), want, 2e-6, 2e-6)
    assert_same_bits(pool, want_pool)


# ---- the executor's view ---------------------------------------------------------------------------------

@pytest.mark.parametrize("on", ["cpu", "sm_90a"])
@pytest.mark.parametrize("layout, dtype, state_dtype, width", [
    ("rows", "float32", "float32", 4), ("rows", "bfloat16", "float16", 4), ("rows", "bfloat16", "float16", 3),
    ("channels", "float16", "float32", 4), ("channels", "bfloat16", "bfloat16", 4)])
def test_update_moves_each_element_of_the_state_once(layout, dtype, state_dtype, width, on, monkeypatch):
    """Read at most once and written once; other slots are not touched. With the CPU's blocks and with a GPU's."""
    if on != "cpu":
        monkeypatch.setattr(module, "_plan_causal_conv1d", lambda *args: _for_cpu(_plan_causal_conv1d(*args[:-1], on)))
    x, (weight, bias) = _normal((3, 168), dtype), _weights(168, width, dtype)
    pool = _pool(5, 168, 4, state_dtype, layout)
    pool[[1, 4, 2]] = _normal((3, 168, 4), state_dtype)
    results = []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        states = pool.copy() if layout == "rows" else pool.transpose(0, 2, 1).copy().transpose(0, 2, 1)
        with settings(check=True, schedule=schedule, seed=seed), counters() as launches:
            out = cupyattn.causal_conv1d_update(x, states, weight, bias, "silu",
                                                conv_state_indices=np.int32([1, 4, 2]))
        results.append((out, states))
        moved = launches[0].buffers
        whole = 3 * 168 * 4 * pool.itemsize
        assert moved["state"]["bytes_written"] == whole
        assert moved["state"]["bytes_read"] == (whole if layout == "rows" else whole * 3 // 4)
        assert moved["out.data"]["bytes_written"] == x.nbytes
    for out, states in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(states, results[0][1])


def _for_cpu(found):
    """A GPU's plan as one of the executor."""
    plan, piece = found
    return type(plan)(plan.spec, "cpu", plan.grid, plan.block, note=plan.note), piece


def test_a_ring_is_read_once_and_written_where_it_changes():
    x, (weight, _) = _normal((2, 64)), _weights(64, 4)
    pool = _normal((2, 64, 16))
    with settings(check=True), counters() as launches:
        cupyattn.causal_conv1d_update(x, pool, weight, cache_seqlens=np.int32([3, 31]))
    assert launches[0].buffers["state"]["bytes_read"] == 2 * 64 * 3 * 4
    assert launches[0].buffers["state"]["bytes_written"] == 2 * 64 * 4


@pytest.mark.parametrize("width", [4, 6])
def test_prefill_checked(width):
    x, (weight, bias) = _normal((400, 40), "float16"), _weights(40, width)
    starts, slots = np.int32([0, 2, 2, 330, 390]), np.int32([2, 0, 3, -1])
    pool = _pool(5, 40, width)
    pool[2] = 1
    results = []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        states = pool.copy()
        with settings(check=True, schedule=schedule, seed=seed):
            out = cupyattn.causal_conv1d(x, weight, bias, conv_states=states, cu_seqlens=starts, slots=slots,
                                         has_state=np.array([True, True, False, True]))
        results.append((out, states))
    want_pool = pool.copy()
    want = reference.causal_conv1d(x, weight, bias, conv_states=want_pool, cu_seqlens=starts, slots=slots,
                                   has_state=[1, 1, 0, 1])
    assert_close(results[0][0], want, 2e-6, ROUNDING["float16"][1])
    assert_same_bits(results[0][1], want_pool)
    for out, states in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(states, results[0][1])


SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@pytest.mark.parametrize("spec", [s for s in CORE if dict(s.constants)["STEP"]], ids=str)
def test_a_step_asks_for_everything_before_it_waits(spec):
    """In SASS: state, x, taps and biases; of state and x 32 KiB, with the blocks that the registers allow."""
    compiled = nvrtc.compile_code(cuda.code(spec), cuda.options(spec, "sm_90a"), "sm_90a")
    asked = max(nvrtc.bytes_asked_for(body) for body in nvrtc.loops(compiled.cubin, spec.kernel))
    constants = dict(spec.constants)
    state, x, weight = (SIZE[constants[name]] for name in "STW")
    channels = 32 // (4 * state) if constants["ROW"] else constants["VEC"]
    streamed = channels * ((4 if constants["ROW"] else 3) * state + x)
    assert asked == streamed + channels * 5 * weight
    registers = nvrtc.resources(compiled, spec.kernel).registers
    assert 65536 // (128 * (-(-registers // 8) * 8)) * 128 * streamed >= 32 * 1024


@pytest.mark.parametrize("spec", [CORE[1], CORE[2], CORE[7], CORE[11]], ids=str)
def test_states_and_vectors_of_channels_stay_whole(spec):
    """In SASS: no store is taken apart, and of packed rows eight tokens are asked for before the first is used."""
    compiled = nvrtc.compile_code(cuda.code(spec), cuda.options(spec, "sm_90a"), "sm_90a")
    loops = nvrtc.loops(compiled.cubin, spec.kernel)
    constants = dict(spec.constants)
    wide = constants["VEC"] * SIZE[constants["S"]] * 8
    stores = {nvrtc.mnemonic(line) for body in loops for line in body if "STG" in line}
    assert stores == {"STG.E.128", f"STG.E.{min(128, wide)}"}
    if not constants["STEP"]:
        assert max(nvrtc.bytes_asked_for(body) for body in loops if any("MUFU.EX2" in x for x in body)) >= 8 * 16
        assert nvrtc.resources(compiled, spec.kernel).registers <= 168   # 3 blocks, 48 KiB


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 90), max_size=5), channels=st.integers(1, 40), width=st.integers(1, 6),
       more=st.integers(0, 3), offset=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_shapes(lengths, channels, width, more, offset, seed):
    generator = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    x = generator.standard_normal((starts[-1] + offset, channels + offset)).astype(np.float32)[:, offset:]
    weight = generator.standard_normal((channels, width)).astype(np.float32)
    pool = generator.standard_normal((len(lengths) + 2, channels, width - 1 + more)).astype(np.float32)
    slots = generator.permutation(len(lengths) + 2)[:len(lengths)].astype(np.int32)
    slots[generator.random(len(lengths)) < 0.2] = -1
    has_state = generator.random(len(lengths)) < 0.5
    want_pool = pool.copy()
    options = {"cu_seqlens": starts, "slots": slots, "has_state": has_state}
    want = reference.causal_conv1d(x, weight, conv_states=want_pool, **options)
    assert_close(cupyattn.causal_conv1d(x, weight, conv_states=pool, **options), want, 4e-6, 2e-6)
    assert_same_bits(pool, want_pool)
    if lengths:
        tokens = int(generator.integers(1, 4))
        x = generator.standard_normal((len(lengths), channels, tokens)).astype(np.float32)
        ring = generator.integers(0, 99, len(lengths)).astype(np.int32) if generator.random() < 0.5 else None
        want = reference.causal_conv1d_update(x, want_pool, weight, None, None, ring, slots)
        assert_close(cupyattn.causal_conv1d_update(x, pool, weight, None, None, ring, slots), want, 4e-6, 2e-6)
        assert_same_bits(pool, want_pool)


def test_plan_covers_all():
    for arch in ("cpu", "sm_90a"):
        for channels in (1, 8, 5120, 8193):
            for width in (1, 4, 200):
                for layout in ("rows", "channels", "any"):
                    for packed in (True, False):
                        plan, piece = _plan_causal_conv1d(7, 1000, packed, channels, width, width == 4, "float16",
                                                          "float32", "float32", True, layout, arch)
                        constants = dict(plan.spec.constants)
                        assert piece >= width - 1 and channels % constants["VEC"] == 0 and plan.block[0] <= 128
                        assert not constants["ROW"] or piece >= 1000


def test_errors():
    x, weight, pool = np.zeros((3, 8), np.float16), np.zeros((8, 4), np.float16), np.zeros((3, 8, 3), np.float16)
    with pytest.raises(TypeError, match="causal_conv1d: x must be float16 or bfloat16 or float32, got float64"):
        cupyattn.causal_conv1d(x.astype(np.float64), weight)
    with pytest.raises(ValueError, match=r"weight must be \[channels, width\] = \[8, \*\], got \[4, 8\]"):
        cupyattn.causal_conv1d(x, weight.T)
    with pytest.raises(ValueError, match="causal_conv1d: activation must be None, 'silu' or 'swish', got 'relu'"):
        cupyattn.causal_conv1d(x, weight, activation="relu")
    with pytest.raises(ValueError, match="causal_conv1d: slots must come with conv_states"):
        cupyattn.causal_conv1d(x, weight, slots=np.int32([0]))
    with pytest.raises(ValueError, match="causal_conv1d: conv_states must keep at least width - 1 = 3 inputs"):
        cupyattn.causal_conv1d(x, weight, conv_states=pool[:, :, 1:])
    for starts in ([0, 2, 1], [1, 3], [0, 4]):
        with pytest.raises(ValueError, match="cu_seqlens must start at 0, not decrease and end within the 3 rows"):
            cupyattn.causal_conv1d(x, weight, cu_seqlens=np.int32(starts))
    with pytest.raises(ValueError, match="conv_state_indices must name no slot twice, got slot 1 more than once"):
        cupyattn.causal_conv1d_update(x, pool, weight, conv_state_indices=np.int32([1, -1, 1]))
    with pytest.raises(ValueError, match="conv_state_indices must be below the 3 slots of the pool or negative, got 3"):
        cupyattn.causal_conv1d_update(x, pool, weight, conv_state_indices=np.int32([1, -1, 3]))
    with pytest.raises(ValueError, match="got none for 3 sequences and 2 slots"):
        cupyattn.causal_conv1d_update(x, pool[:2], weight)
    frozen = pool.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="causal_conv1d_update: conv_state must be writeable"):
        cupyattn.causal_conv1d_update(x, frozen, weight)
    with pytest.raises(TypeError, match="has_state must be bool or uint8, got int32"):
        cupyattn.causal_conv1d(x, weight, conv_states=pool, has_state=np.int32([1]))


def test_every_core_version_is_chosen_by_some_call():
    chosen = {_plan_causal_conv1d(2, tokens, packed, 64, width, width == 4, x, weight, state, wide, layout,
                                  "sm_90a")[0].spec
              for tokens in (1, 100) for packed in (True, False) for width in (4, 5)
              for x, weight, state in {(c["T"], c["W"], c["S"]) for c in (dict(s.constants) for s in CORE)}
              for wide in (True, False) for layout in ("any", "rows", "channels")}
    assert set(CORE) <= chosen
