# SPDX-License-Identifier: Apache-2.0
import numpy as np
import nvrtc
import pytest
from compare import assert_close, assert_same_bits, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from selective_models import BOUNDS, Model

import cupyattn
from cupyattn.ops.selective_state_update import CORE, _plan_selective_state_update
from cupyattn.reference.selective_state_update import selective_state_update as reference
from cupyattn.runtime import cuda
from cupyattn.runtime.cpu import counters, settings


def _compare(got, want, dtype):
    assert_close(got, want, *BOUNDS[dtype])


def _check(xp, model, batch, slots, pool_slots=None, **options):
    """One step of `model` against the reference, in a pool of NaN but for the slots named."""
    inputs = model.inputs(batch)
    if not options.get("dt_softplus"):   # negative steps grow beyond all bounds
        inputs |= {name: np.abs(inputs[name]) for name in ("dt", "dt_bias")}
    for b in np.flatnonzero(slots < 0):
        for name in ("x", "dt", "B", "C", "z"):
            if inputs[name] is not None:
                inputs[name] = inputs[name].copy()
                inputs[name][b] = np.nan
    state = model.pool(pool_slots or batch + 3, slots)
    want_state = state.copy()
    want = reference(want_state, **inputs, state_batch_indices=slots, **options)
    device = {name: None if a is None else xp.array(a) for name, a in inputs.items()}
    pool = xp.array(state)
    got = cupyattn.selective_state_update(pool, **device, state_batch_indices=xp.array(slots),
                                          out=poison(xp.array(inputs["x"])), **options)
    assert got.dtype == inputs["x"].dtype and isinstance(got, xp.module.ndarray)
    _compare(xp.numpy(got), want, model.dtype)
    named = slots[slots >= 0]
    _compare(xp.numpy(pool)[named], want_state[named].astype(np.float64), model.state_dtype)
    others = np.setdiff1d(np.arange(len(state)), named)
    assert_same_bits(xp.numpy(pool)[others], state[others])


@pytest.mark.parametrize("channels, states", [(64, 16), (65, 16), (24, 4), (7, 1), (9, 17), (5, 130), (12, 256)])
@pytest.mark.parametrize("softplus", [False, True], ids=["raw", "softplus"])
def test_mamba1(xp, channels, states, softplus):
    _check(xp, Model(channels=channels, states=states), 4, np.int32([5, -1, 0, 3]), dt_softplus=softplus)


@pytest.mark.parametrize("heads, dims, groups, states", [(4, 64, 1, 128), (6, 33, 3, 16), (2, 1, 2, 64), (8, 8, 2, 7),
                                                         (3, 5, 1, 256)])
@pytest.mark.parametrize("per_dim", [False, True], ids=["per-head", "per-dim"])
def test_mamba2(xp, heads, dims, groups, states, per_dim):
    model = Model(heads=heads, channels=dims, groups=groups, states=states, per_dim=per_dim)
    _check(xp, model, 4, np.int32([5, -1, 0, 3]), dt_softplus=True, dt_limit=(0.001, 0.1))


@pytest.mark.parametrize("dtype, dt_dtype, state_dtype", [
    ("float16", "float16", "float32"), ("bfloat16", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16"),
    ("float16", "float32", "float16"), ("float32", "float32", "float16")])
@pytest.mark.parametrize("heads", [None, 4])
def test_dtypes(xp, dtype, dt_dtype, state_dtype, heads):
    model = Model(heads=heads, channels=40, groups=2, states=32, dtype=dtype, dt_dtype=dt_dtype,
                  state_dtype=state_dtype)
    _check(xp, model, 3, np.int32([1, 0, 4]), dt_softplus=True)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("missing", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")], ids="-".join)
def test_optional_inputs(xp, heads, missing):
    model = Model(heads=heads, channels=16, states=16, missing=missing)
    _check(xp, model, 2, np.int32([0, 1]), dt_softplus=True)


def test_repeated_rates_and_steps_are_those_of_heads():
    """The field's way to say Mamba-2: strides of 0."""
    model = Model(heads=4, channels=16, states=32)
    inputs, state = model.inputs(3), model.pool(3, np.arange(3))
    want_state = state.copy()
    want = cupyattn.selective_state_update(want_state, **inputs, dt_softplus=True)
    inputs["A"] = np.broadcast_to(inputs["A"][:, None, None], (4, 16, 32))
    inputs["dt"] = np.broadcast_to(inputs["dt"][:, :, None], (3, 4, 16))
    for name in ("D", "dt_bias"):
        inputs[name] = np.broadcast_to(inputs[name][:, None], (4, 16))
    assert_same_bits(cupyattn.selective_state_update(state, **inputs, dt_softplus=True), want)
    assert_same_bits(state, want_state)
    inputs["A"] = inputs["A"].copy()   # an axis of states, exp2 in place of exp
    state = model.pool(3, np.arange(3))
    _compare(cupyattn.selective_state_update(state, **inputs, dt_softplus=True), want.astype(np.float64), "float32")


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("step", [-30.0, 30.0, 20.0, -100.0, 1e30, -1e30, 3e38, -3e38, 1e-30])
def test_hard_steps(xp, heads, step):
    """softplus of what has no exponential in float32."""
    model = Model(heads=heads, channels=16, states=16, missing=("dt_bias", "z"))
    inputs, state = model.inputs(2), model.pool(2, np.arange(2))
    inputs["dt"][:] = step
    inputs["x"][:] = np.clip(inputs["x"], -0.5, 0.5)
    inputs["B"][:] = np.clip(inputs["B"], -1, 1) / 16
    want_state = state.copy()
    want = reference(want_state, **inputs, dt_softplus=True)
    pool = xp.array(state)
    got = cupyattn.selective_state_update(pool, **{k: None if v is None else xp.array(v) for k, v in inputs.items()},
                                          dt_softplus=True)
    scale = max(1, np.abs(want).max())
    assert_close(xp.numpy(got), want, 2e-6 * scale, 2e-6)
    assert_close(xp.numpy(pool), want_state, 2e-6 * scale, 2e-6)


def test_softplus_far_below_zero():
    """log(exp(d) + 1) would be 0 here."""
    state = np.zeros((1, 1, 1), np.float32)
    one = np.ones((1, 1), np.float32)
    got = cupyattn.selective_state_update(state, one, -30 * one, -one, one, one, dt_softplus=True)
    assert_close(got, [[9.357622968839299e-14]], 0, 1e-6)


def test_growing_states(xp):
    """Positive exponents: without softplus a negative step makes the state grow, at last to infinity."""
    one = np.ones((1, 4), np.float32)
    for step, grown in ((-30.0, np.exp(30.0)), (-1000.0, np.inf)):
        for A in (-np.ones((4, 8), np.float32), np.broadcast_to(np.float32([[-1]]), (4, 8))):
            pool = xp.array(np.ones((1, 4, 8), np.float32))
            rates = A if xp.name == "numpy" else xp.array(np.ascontiguousarray(A))
            B = np.zeros((1, 8), np.float32)
            got = cupyattn.selective_state_update(pool, xp.array(one), xp.array(step * one), rates, xp.array(B),
                                                  xp.array(B + 1))
            assert_close(xp.numpy(got), np.full((1, 4), 8 * grown), 0, 4e-6)


def test_not_a_number_stays_in_its_channel(xp):
    model = Model(channels=12, states=8)
    inputs, state = model.inputs(2), model.pool(2, np.arange(2))
    inputs["dt"][0, 3] = np.nan
    inputs["x"][1, 5] = np.inf
    pool = xp.array(state)
    got = xp.numpy(cupyattn.selective_state_update(
        pool, **{k: xp.array(v) for k, v in inputs.items()}, dt_softplus=True, dt_limit=(0.0, 1.0)))
    bad = np.zeros((2, 12), bool)
    bad[0, 3] = bad[1, 5] = True
    assert (np.isfinite(got) == ~bad).all()
    assert (np.isfinite(xp.numpy(pool)).all(-1) == ~bad).all()


def test_strided_and_offset_views(xp):
    """Halves of a fused projection, B and C behind x in one row, a pool inside a larger one."""
    generator = np.random.default_rng(3)
    fused = generator.standard_normal((3, 2 * 20 + 2 * 16 + 20)).astype(np.float32)
    pools = generator.standard_normal((6, 2, 20, 24)).astype(np.float32)
    A = -np.exp(generator.standard_normal((20, 16))).astype(np.float32)

    def call(function, fused, pool, A, **out):
        x, z, B, C, dt = (fused[:, a:b] for a, b in ((0, 20), (20, 40), (40, 56), (56, 72), (72, 92)))
        return function(pool[1::2, 1, :, 3:19], x, dt, A, B, C, None, z, None, True, **out)

    want_pool = pools.copy()
    want = call(reference, fused, want_pool, A)
    pool, out = xp.array(pools), xp.array(np.full((3, 30), np.nan, np.float32))
    call(cupyattn.selective_state_update, xp.array(fused), pool, xp.array(A), out=out[:, 7:27])
    host = xp.numpy(out)
    assert_close(host[:, 7:27], want, 2e-6, 2e-6)
    assert np.isnan(host[:, :7]).all() and np.isnan(host[:, 27:]).all()
    assert_close(xp.numpy(pool), want_pool, 2e-6, 2e-6)
    untouched = np.ones(pools.shape, bool)
    untouched[1::2, 1, :, 3:19] = False
    assert_same_bits(xp.numpy(pool)[untouched], pools[untouched])


def test_wild_slots_on_the_device():
    from standin import install

    model = Model(channels=9, states=16)
    inputs, state = model.inputs(4), model.pool(3, np.arange(3))
    want_state = state.copy()
    want = reference(want_state, **inputs, state_batch_indices=np.int32([-1, 1, -1, -1]))
    with install() as xp:
        pool = xp.array(state)
        got = cupyattn.selective_state_update(pool, **{k: xp.array(v) for k, v in inputs.items()},
                                              state_batch_indices=xp.array(np.int32([3, 1, 2**31 - 1, -2**31])))
        _compare(xp.numpy(got), want, "float32")
        assert_same_bits(xp.numpy(pool)[[0, 2]], state[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 2, 8), (3, 0, 8)])
def test_empty(xp, shape):
    heads = None if len(shape) == 2 else shape[1]
    model = Model(heads=heads, channels=shape[-1], states=16)
    inputs = model.inputs(shape[0])
    out = cupyattn.selective_state_update(xp.array(model.pool(4, np.arange(4))),
                                          **{k: xp.array(v) for k, v in inputs.items()})
    assert out.shape == shape


# ---- the executor's view ---------------------------------------------------------------------------------

@pytest.mark.parametrize("heads, dtype, state_dtype, states", [
    (None, "float16", "float32", 16), (4, "bfloat16", "bfloat16", 64), (3, "float32", "float32", 20)])
def test_each_element_of_the_state_moves_once(heads, dtype, state_dtype, states):
    model = Model(heads=heads, channels=21, states=states, dtype=dtype, state_dtype=state_dtype)
    slots = np.int32([4, -1, 2])
    inputs, results = model.inputs(3), []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        state = model.pool(5, slots)
        with settings(check=True, schedule=schedule, seed=seed), counters() as launches:
            out = cupyattn.selective_state_update(state, **inputs, dt_softplus=True, state_batch_indices=slots)
        results.append((out, state))
        moved = launches[0].buffers["state"]
        assert moved["bytes_read"] == moved["bytes_written"] == 2 * state[0].nbytes
    want = reference(model.pool(5, slots), **inputs, dt_softplus=True, state_batch_indices=slots)
    _compare(results[0][0], want, dtype)
    for out, state in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(state, results[0][1])


@pytest.mark.parametrize("heads, states", [(None, 16), (2, 128), (2, 20)])
def test_as_on_a_gpu(heads, states, monkeypatch):
    """The GPU's plans, whose lanes reduce together, on the executor."""
    from cupyattn.ops import selective_state_update as module

    original = module._plan_selective_state_update

    def planned(*arguments):
        plan = original(*arguments[:-1], "sm_90a")
        return type(plan)(plan.spec, "cpu", plan.grid, plan.block, note=plan.note)

    model = Model(heads=heads, channels=37, states=states)
    inputs, slots = model.inputs(2), np.int32([2, 0])
    want = reference(model.pool(3, slots), **inputs, dt_softplus=True, state_batch_indices=slots)
    monkeypatch.setattr(module, "_plan_selective_state_update", planned)
    results = []
    for check in (False, True):
        state = model.pool(3, slots)
        with settings(check=check), counters() as launches:
            out = cupyattn.selective_state_update(state, **inputs, dt_softplus=True, state_batch_indices=slots)
        _compare(out, want, "float32")
        results.append(state)
    moved = launches[0].buffers["state"]
    assert moved["bytes_read"] == moved["bytes_written"] == 2 * state[0].nbytes
    assert moved["sectors_read"] * 32 < 1.1 * moved["bytes_read"]   # whole sectors but at the ends
    _compare(results[0][slots], results[1][slots].astype(np.float64), "float32")


@pytest.mark.parametrize("spec", [*CORE[:4], CORE[9]], ids=str)
def test_all_states_are_asked_for_before_anything_is_waited_for(spec):
    """In SASS: of a tile of dims all wide loads stand before the first use of one, and every store of states is one of
    16 bytes; with the blocks that the registers allow 32 KiB of states are on their way to an SM."""
    compiled = nvrtc.compile_code(cuda.code(spec), cuda.options(spec, "sm_90a"), "sm_90a")
    tiles = nvrtc.loops(compiled.cubin, spec.kernel)
    constants = dict(spec.constants)
    size = 4 if constants["T"] == "float32" else 2
    states = constants["ROWS"] * 16
    rates = states * (constants["STATE_DECAYS"] and constants["VEC"] == 4)
    assert max(nvrtc.bytes_asked_for(body) for body in tiles) >= states + rates + 2 * constants["VEC"] * size
    stores = {name for name in map(nvrtc.mnemonic, tiles[-1]) if name.startswith("STG")}
    assert stores == {"STG.E.128", "STG.E" if size == 4 else "STG.E.U16"}   # of states, of outputs
    registers = nvrtc.resources(compiled, spec.kernel).registers
    assert 65536 // (128 * (-(-registers // 8) * 8)) * 128 * states >= 32 * 1024


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(batch=st.integers(0, 4), heads=st.sampled_from([None, 1, 2, 6]), channels=st.integers(1, 40),
       states=st.integers(1, 40), groups=st.sampled_from([1, 2]), seed=st.integers(0, 2**32 - 1))
def test_shapes(batch, heads, channels, states, groups, seed):
    generator = np.random.default_rng(seed)
    model = Model(heads=heads, channels=channels, states=states, groups=groups if heads in (2, 6) else 1, seed=seed)
    slots = generator.permutation(batch + 2)[:batch].astype(np.int32)
    state, inputs = model.pool(batch + 2, slots), model.inputs(batch)
    want_state = state.copy()
    want = reference(want_state, **inputs, dt_softplus=True, state_batch_indices=slots)
    got = cupyattn.selective_state_update(state, **inputs, dt_softplus=True, state_batch_indices=slots)
    _compare(got, want, "float32")
    _compare(state[slots], want_state[slots].astype(np.float64), "float32")


def test_plan_covers_all():
    for arch in ("cpu", "sm_90a"):
        for heads, dims in ((1, 5120), (80, 64), (3, 1), (1, 1), (70000, 2)):
            for states in (1, 15, 16, 20, 128, 256, 1000):
                plan = _plan_selective_state_update(4, heads, dims, states, "float16", "float16", "float32", False, 16,
                                                    arch)
                constants = dict(plan.spec.constants)
                assert states % constants["VEC"] == 0 and plan.block[0] % constants["LANES"] == 0
                assert constants["LANES"] == 1 or plan.block[0] % 32 == 0
                assert plan.grid[1] <= 65535 and plan.grid[2] <= 65535


def test_every_core_version_is_chosen_by_some_call():
    chosen = {_plan_selective_state_update(2, 4, 64, states, x, dt, state, decays, align, arch).spec
              for x, dt, state in {(c["T"], c["DT"], c["S"]) for c in (dict(s.constants) for s in CORE)}
              for states in (1, 7, 16, 32, 64, 128, 256) for decays in (True, False) for align in (2, 16)
              for arch in ("cpu", "sm_90a")}
    assert set(CORE) <= chosen


def test_errors():
    model = Model(heads=4, channels=8, states=16, groups=2)
    inputs, state = model.inputs(2), model.pool(2, np.arange(2))

    def call(message, error=ValueError, state=state, **changes):
        with pytest.raises(error, match=message):
            cupyattn.selective_state_update(state, **{**inputs, **changes})

    op = "selective_state_update: "
    call(op + "x must be float16 or bfloat16 or float32, got float64", TypeError, x=inputs["x"].astype(np.float64))
    call(op + r"B must be \[batch, groups, state_size\]", B=inputs["B"][0])
    call(op + r"B must have a state_size of at least 1, got \[2, 2, 0\]", B=inputs["B"][..., :0])
    with pytest.raises(ValueError, match=op + r"A must have a state_size of at least 1, got \[4, 0\]"):
        cupyattn.selective_state_update(np.zeros((2, 4, 0), np.float32), *np.ones((2, 2, 4), np.float32),
                                        np.zeros((4, 0), np.float32), *np.zeros((2, 2, 0), np.float32))
    call(op + "B must have a number of groups that divides the 4 heads, got 3", B=np.zeros((2, 3, 16), np.float32))
    call(op + r"C must be \[batch, groups, state_size\] = \[2, 2, 16\], got \[2, 1, 16\]", C=inputs["C"][:, :1])
    call(op + r"A must be \[heads\] = \[4\], got \[3\]", A=inputs["A"][:3])
    call(op + "A must be float32, got float16", TypeError, A=inputs["A"].astype(np.float16))
    call(op + r"A must be \[heads\] or \[heads, head_dim, state_size\], got \[4, 8\]", A=np.zeros((4, 8), np.float32))
    call(op + "dt must be float32, got float16", TypeError, dt=inputs["dt"].astype(np.float16))
    call(op + r"dt must be \[batch, heads\] = \[2, 4\], got \[2, 3\]", dt=inputs["dt"][:, :3])
    call(op + "D must be float32, got float16", TypeError, D=inputs["D"].astype(np.float16))
    call(op + r"state must be \[slots, heads, head_dim, state_size\]", state=state[:, 0])
    call(op + "state must have a contiguous last axis", state=np.zeros((2, 4, 16, 8), np.float32).swapaxes(2, 3))
    call(op + "state must be float16 or bfloat16 or float32, got float64", TypeError, state=state.astype(np.float64))
    call(op + "state_batch_indices must name no slot twice, got slot 1", state_batch_indices=np.int32([1, 1]))
    call(op + "state_batch_indices must be below the 2 slots of the pool or negative, got 2",
         state_batch_indices=np.int32([1, 2]))
    call(op + "state_batch_indices must be given when the pool has fewer slots", state=state[:1])
    call(op + "dt_softplus must be True or False, got 1", TypeError, dt_softplus=1)
    call(op + r"dt_limit must be a pair \(smallest, largest\) or None, got 3", TypeError, dt_limit=3)
    call(op + "dt_limit must be", dt_limit=(2.0, 1.0))
    frozen = state.copy()
    frozen.flags.writeable = False
    call(op + "state must be writeable", state=frozen)
