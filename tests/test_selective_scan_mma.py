# SPDX-License-Identifier: Apache-2.0
"""selective_scan on tensor cores: a GPU's plans, on the executor or a GPU."""

import numpy as np
import pytest
from compare import assert_close, assert_same_bits
from selective_models import BOUNDS, BY_ROW, Model, check_scan

import cupyattn
from cupyattn.ops import selective_scan as module
from cupyattn.ops.selective_scan import _plan_selective_scan
from cupyattn.reference.selective_scan import selective_scan as reference
from cupyattn.runtime.cpu import counters, settings

# of float32 states: what two 16-bit numbers hold of the factors
STATE_BOUNDS = {"float16": (2e-6, 2e-6), "bfloat16": (3e-5, 2e-5)}
LENGTHS, SLOTS = [3, 0, 150, 1, 40, 64, 129], np.int32([6, 3, 1, 0, -7, 4, 2])
HAS_STATE = np.array([True, True, False, False, True, True, True])


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """The GPU's plans on the executor, too."""
    for name in ("_plan_selective_scan", "_plan_carry"):
        original = getattr(module, name)

        def planned(*arguments, original=original):
            if arguments[-1] != "cpu":
                return original(*arguments)
            plan = original(*arguments[:-1], "sm_90a")
            return type(plan)(plan.spec, "cpu", plan.grid, plan.block, plan.shared_bytes, note=plan.note)

        monkeypatch.setattr(module, name, planned)


def _compare(got, want, bounds):
    atol, rtol = bounds
    assert_close(got, want, atol * max(1, np.abs(want).max(initial=0)), rtol)


def _compare_states(got, want, model):
    """Each state of a sequence against the largest of them."""
    bounds = STATE_BOUNDS[model.dtype] if model.state_dtype == "float32" else BOUNDS[model.state_dtype]
    _compare(got, want.astype(np.float64), bounds)


def _check(xp, model, *args, **options):
    check_scan(xp, model, *args, **options, compare=lambda got, want: _compare(got, want, BOUNDS[model.dtype]),
               compare_states=lambda got, want: _compare_states(got, want, model))


@pytest.mark.parametrize("chunk_size", [32, 128])
@pytest.mark.parametrize("heads, dims, groups, states, dtype, dt_dtype, state_dtype", [
    (2, 64, 2, 128, "float16", "float16", "float32"), (2, 64, 1, 64, "bfloat16", "float32", "float32"),
    (2, 24, 1, 40, "float16", "float32", "bfloat16"), (1, 80, 1, 136, "bfloat16", "bfloat16", "float32")])
def test_sequences(xp, heads, dims, groups, states, dtype, dt_dtype, state_dtype, chunk_size):
    model = Model(heads=heads, channels=dims, groups=groups, states=states, dtype=dtype, dt_dtype=dt_dtype,
                  state_dtype=state_dtype)
    _check(xp, model, LENGTHS, SLOTS, HAS_STATE, more_rows=5, chunk_size=chunk_size, dt_limit=(0.001, 0.5))


@pytest.mark.parametrize("missing", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")], ids="-".join)
def test_optional_inputs(missing):
    inputs = Model(heads=2, channels=16, states=8, dtype="bfloat16", missing=missing).inputs(40)
    for softplus in (False, True):
        steps = {**inputs, "dt": np.abs(inputs["dt"]) * np.float32(0.1)}
        if inputs["dt_bias"] is not None:
            steps["dt_bias"] = np.abs(inputs["dt_bias"])
        _compare(cupyattn.selective_scan(**steps, dt_softplus=softplus), reference(**steps, dt_softplus=softplus),
                 BOUNDS["bfloat16"])


def _rows(inputs, begin, end):
    return {name: a[begin:end] if name in BY_ROW and a is not None else a for name, a in inputs.items()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_recurrence_is_the_dual_form(dtype):
    """256 tokens on tensor cores, and token by token, which an axis of states in A asks for."""
    model = Model(heads=2, channels=64, groups=1, states=128, dtype=dtype)
    inputs, state = model.inputs(256), model.pool(1, np.arange(1))
    token_by_token = state.copy()
    rates = {**inputs, "A": np.ascontiguousarray(np.broadcast_to(inputs["A"][:, None, None], (2, 64, 128)))}
    want = cupyattn.selective_scan(**rates, dt_softplus=True, state=token_by_token).astype(np.float64)
    for chunk_size in (64, 96, 256):
        pool = state.copy()
        got = cupyattn.selective_scan(**inputs, dt_softplus=True, state=pool, chunk_size=chunk_size)
        _compare(got, want, BOUNDS[dtype])
        _compare_states(pool, token_by_token, model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_outputs_are_rounded_once(dtype):
    """On average they are no farther from float64 than its own rounding: both parts of all factors count."""
    model = Model(heads=1, channels=64, states=64, dtype=dtype, missing=("D", "z"))
    inputs, state = model.inputs(128), model.pool(1, np.arange(1))
    want = reference(**inputs, dt_softplus=True, state=state.copy())
    got = cupyattn.selective_scan(**inputs, dt_softplus=True, state=state)
    rounding = np.abs(want.astype(got.dtype).astype(np.float64) - want).mean()
    assert rounding < np.abs(got.astype(np.float64) - want).mean() * 1.02 < 1.05 * rounding


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_prefill_then_updates_are_one_prefill(dtype):
    model = Model(heads=2, channels=24, groups=2, states=32, dtype=dtype)
    inputs, state = model.inputs(140), model.pool(2, np.int32([1]))
    slots = np.int32([1])
    whole, parts = state.copy(), state.copy()
    want = cupyattn.selective_scan(**inputs, dt_softplus=True, state=whole, slots=slots, chunk_size=64)
    got = [cupyattn.selective_scan(**_rows(inputs, 0, 130), dt_softplus=True, state=parts, slots=slots, chunk_size=64)]
    got += [cupyattn.selective_state_update(parts, **_rows(inputs, t, t + 1), dt_softplus=True,
                                            state_batch_indices=slots) for t in range(130, 140)]
    _compare(np.concatenate(got), want.astype(np.float64), BOUNDS[dtype])
    _compare_states(parts[1], whole[1], model)


def test_a_sequence_does_not_see_the_others():
    model = Model(heads=2, channels=16, states=16, dtype="float16")
    starts = np.int32([0, 37, 200, 230])
    inputs, state = model.inputs(230), model.pool(3, np.arange(3))
    pool = state.copy()
    whole = cupyattn.selective_scan(**inputs, dt_softplus=True, state=pool, cu_seqlens=starts, chunk_size=64)
    for b in range(3):
        alone = state[b:b + 1].copy()
        assert_same_bits(cupyattn.selective_scan(**_rows(inputs, starts[b], starts[b + 1]), dt_softplus=True,
                                                 state=alone, chunk_size=64), whole[starts[b]:starts[b + 1]])
        assert_same_bits(alone[0], pool[b])


# ---- inputs that hurt ------------------------------------------------------------------------------------

def _check_steps(inputs, model):
    state = model.pool(1, np.arange(1))
    want_state = state.copy()
    want = reference(**inputs, dt_softplus=True, state=want_state)
    got = cupyattn.selective_scan(**inputs, dt_softplus=True, state=state, chunk_size=64)
    _compare(got, want, BOUNDS[model.dtype])
    _compare_states(state, want_state, model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("large", [30.0, 1e4, 1e30, 3e38])
def test_small_steps_after_large_ones(dtype, large):
    """A difference of running float32 sums would have lost the small steps' digits; x there is small or zero."""
    model = Model(heads=2, channels=16, states=16, dtype=dtype, missing=("dt_bias", "z"))
    inputs = model.inputs(150)
    inputs["dt"][...] = -1
    at = [3, 10, 11, 50, 70]
    inputs["dt"][at] = large
    inputs["x"][at] = (inputs["x"][at].astype(np.float32) * np.float32(0.5 / large)).astype(inputs["x"].dtype)
    _check_steps(inputs, model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("step", [-30.0, -1e30, -3e38])
def test_steps_far_below_zero(dtype, step):
    model = Model(heads=2, channels=16, states=16, dtype=dtype, missing=("dt_bias",))
    inputs = model.inputs(70)
    inputs["dt"][...] = step
    _check_steps(inputs, model)


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**11])
def test_range_of_float16(scale):
    """Scores and states far from what a float16 holds."""
    model = Model(heads=2, channels=16, states=16, dtype="float16", missing=("z", "D"))
    inputs = model.inputs(150)
    scaled = {**inputs, **{name: inputs[name] * np.float16(scale) for name in "BC"}}
    scaled["x"] = (inputs["x"].astype(np.float32) / np.float32(scale**2)).clip(-6e4, 6e4).astype(np.float16)
    state = model.pool(1, np.arange(1)) * np.float32(scale**-2)
    pool, want_state = state.copy(), state.copy()
    want = reference(**scaled, dt_softplus=True, state=want_state)
    in_range = np.abs(want) < 6e4
    assert in_range.mean() > 0.5
    got = cupyattn.selective_scan(**scaled, dt_softplus=True, state=pool, chunk_size=64)
    _compare(got[in_range], want[in_range], BOUNDS["float16"])
    _compare(pool / np.abs(want_state).max(), want_state.astype(np.float64) / np.abs(want_state).max(),
             STATE_BOUNDS["float16"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_not_a_number_stays_in_its_sequence(dtype):
    model = Model(heads=2, channels=16, states=16, dtype=dtype)
    inputs, starts = model.inputs(220), np.int32([0, 150, 220])
    clean = cupyattn.selective_scan(**inputs, dt_softplus=True, cu_seqlens=starts, chunk_size=64)
    for name, bad in (("dt", np.nan), ("x", np.inf), ("x", np.nan), ("B", np.nan), ("A", np.nan)):
        poisoned = {**inputs, name: inputs[name].copy()}
        poisoned[name][80 if name != "A" else slice(None)] = bad
        got = cupyattn.selective_scan(**poisoned, dt_softplus=True, cu_seqlens=starts, chunk_size=64)
        if name == "A":
            assert np.isnan(got).all()
            continue
        assert_same_bits(got[:64], clean[:64])
        assert not np.isfinite(got[80:150].astype(np.float32)).any()
        assert_same_bits(got[150:], clean[150:])


# ---- the executor's view ---------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, states", [("float16", 64), ("bfloat16", 16)])
def test_selective_scan_mma_checked(dtype, states):
    model = Model(heads=2, channels=64, states=states, dtype=dtype)
    starts, slots = np.int32([0, 75, 75, 80]), np.int32([2, 0, -1])
    inputs, results = model.inputs(82), []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        state = model.pool(4, slots[:1])
        with settings(check=True, schedule=schedule, seed=seed), counters() as launches:
            out = cupyattn.selective_scan(**inputs, dt_softplus=True, state=state, cu_seqlens=starts, slots=slots,
                                          chunk_size=64)
        results.append((out, state))
        assert [launch.kernel for launch in launches] == ["selective_scan_mma", "selective_scan_carry",
                                                          "selective_scan_mma"]
        states_, _, outputs = (launch.buffers for launch in launches)
        slot = state[0].nbytes
        assert states_["carried"]["bytes_written"] == slot                # all chunks but the last
        assert outputs["carried"]["bytes_read"] == 2 * slot
        assert outputs["state"]["bytes_written"] == slot and outputs["state"]["bytes_read"] == 0
        assert outputs["out.data"]["bytes_written"] == out.nbytes
        assert outputs["in.B.data"]["bytes_read"] == 2 * 75 * states * 2   # by two heads, of rows with a slot
        for launch in (launches[0], launches[2]):
            assert launch.shared["ldmatrix"]["conflicts"] == 0
    want_state = model.pool(4, slots[:1])
    want = reference(**inputs, dt_softplus=True, state=want_state, cu_seqlens=starts, slots=slots)
    _compare(results[0][0], want, BOUNDS[dtype])
    _compare_states(results[0][1][2], want_state[2], model)
    for out, state in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(state, results[0][1])


def test_which_arrays_run_on_tensor_cores():
    def plan(x="float16", arch="sm_90a", head_dim=64, states=128, align=16, per_head=True):
        return _plan_selective_scan(1000, 4, 8, head_dim, states, x, "float32", "float32", False, per_head, 256, True,
                                    align, arch)

    for arch, most in (("sm_80", 163), ("sm_89", 99), ("sm_90a", 227), ("sm_120a", 99)):
        for states in (8, 64, 72, 128, 136, 256):
            made = plan(arch=arch, states=states)
            assert made.spec.kernel == "selective_scan_mma" and made.shared_bytes <= most * 1024
            assert dict(made.spec.constants)["STATES"] >= states
            assert made.grid == (1000 // 256 + 5, 8, 1) and plan(head_dim=72).grid[2] == 2
    for options, why in (({"x": "float32"}, "float32 on sm_90a"), ({"arch": "sm_75"}, "float16 on sm_75"),
                         ({"arch": "cpu"}, "float16 on cpu"), ({"align": 8}, "alignment 8"),
                         ({"head_dim": 20}, "20 dims"), ({"states": 20}, "20 states")):
        made = plan(**options)
        assert made.spec.kernel == "selective_scan_dual" and why in made.note
    assert plan(per_head=False).spec.kernel == plan(states=264).spec.kernel == "selective_scan"


def test_unaligned_rows_run_on_cuda_cores():
    model = Model(heads=2, channels=16, states=16, dtype="float16")
    inputs = model.inputs(70)
    wider = np.zeros((70, 2, 17), np.float16)
    wider[..., 1:] = inputs["x"]
    want = cupyattn.selective_scan(**inputs, dt_softplus=True)
    with settings(check=True), counters() as launches:
        got = cupyattn.selective_scan(**{**inputs, "x": wider[..., 1:]}, dt_softplus=True)
    assert [launch.kernel for launch in launches] == ["selective_scan_dual"]
    _compare(got, want.astype(np.float64), BOUNDS["float16"])
