# SPDX-License-Identifier: Apache-2.0
import numpy as np
import nvrtc
import pytest
from compare import assert_close, assert_same_bits
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from selective_models import BOUNDS, BY_ROW, Model, check_scan

import cupyattn
from cupyattn.ops import selective_scan as module
from cupyattn.ops.selective_scan import CORE, _dual_bytes, _plan_carry, _plan_selective_scan
from cupyattn.reference.selective_scan import selective_scan as reference
from cupyattn.runtime import cuda
from cupyattn.runtime.cpu import counters, settings


def _compare(got, want, dtype="float32"):
    assert_close(got, want, *BOUNDS[dtype])


def _rows(inputs, begin, end):
    return {name: a[begin:end] if name in BY_ROW and a is not None else a for name, a in inputs.items()}


def _whole_rates(inputs, model):
    """The same model with an axis of states in A, which the dual form cannot take."""
    return {**inputs, "A": np.ascontiguousarray(np.broadcast_to(inputs["A"][:, None, None],
                                                                (*model.dims, model.states)))}


def _check(xp, model, *args, **options):
    check_scan(xp, model, *args, **options, compare=lambda got, want: _compare(got, want, model.dtype),
               compare_states=lambda got, want: _compare(got, want, model.state_dtype))


LENGTHS, SLOTS = [3, 0, 150, 1, 40, 64, 33], np.int32([6, 3, 1, 0, -7, 4, 2])
HAS_STATE = np.array([True, True, False, False, True, True, True])


@pytest.mark.parametrize("chunk_size", [32, 64, 256])
@pytest.mark.parametrize("channels, states", [(40, 16), (33, 7), (5, 130)])
def test_mamba1(xp, channels, states, chunk_size):
    _check(xp, Model(channels=channels, states=states), LENGTHS, SLOTS, HAS_STATE, more_rows=5, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [32, 256])
@pytest.mark.parametrize("heads, dims, groups, states, per_dim", [
    (4, 64, 2, 32, False), (3, 17, 1, 7, False), (2, 70, 2, 16, False), (4, 9, 2, 16, True)])
def test_mamba2(xp, heads, dims, groups, states, per_dim, chunk_size):
    model = Model(heads=heads, channels=dims, groups=groups, states=states, per_dim=per_dim)
    _check(xp, model, LENGTHS, SLOTS, HAS_STATE, more_rows=5, chunk_size=chunk_size, dt_limit=(0.001, 0.5))


@pytest.mark.parametrize("dtype, dt_dtype, state_dtype", [
    ("float16", "float16", "float32"), ("bfloat16", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16"),
    ("float32", "float32", "float16")])
@pytest.mark.parametrize("heads", [None, 2])
def test_dtypes(xp, dtype, dt_dtype, state_dtype, heads):
    model = Model(heads=heads, channels=20, groups=2, states=16, dtype=dtype, dt_dtype=dt_dtype,
                  state_dtype=state_dtype)
    _check(xp, model, [50, 10], np.int32([1, 0]), np.array([True, True]), chunk_size=32)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("missing", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")], ids="-".join)
def test_optional_inputs(heads, missing):
    inputs = Model(heads=heads, channels=12, states=8, missing=missing).inputs(40)
    for softplus in (False, True):
        steps = {**inputs, "dt": np.abs(inputs["dt"]) * 0.1}
        if inputs["dt_bias"] is not None:
            steps["dt_bias"] = np.abs(inputs["dt_bias"])
        _compare(cupyattn.selective_scan(**steps, dt_softplus=softplus), reference(**steps, dt_softplus=softplus))


# ---- identities ------------------------------------------------------------------------------------------

def test_recurrence_is_the_dual_form():
    """256 tokens of Mamba-2 by both kernels, and by the quadratic form in float64."""
    model = Model(heads=4, channels=24, groups=2, states=32, missing=("z",))
    inputs, state = model.inputs(256), model.pool(1, np.arange(1))
    steps = np.log1p(np.exp(inputs["dt"].astype(np.float64) + inputs["dt_bias"]))
    logs = np.cumsum(steps * inputs["A"], axis=0)                                       # [tokens, heads]
    B, C = (np.repeat(inputs[name].astype(np.float64), 2, axis=1) for name in "BC")
    with np.errstate(over="ignore"):
        decays = np.where(np.tri(256, dtype=bool)[..., None], np.exp(logs[:, None] - logs), 0)
    scores = np.einsum("ihn,jhn->ijh", C, B) * decays * steps
    want = np.einsum("ijh,jhp->ihp", scores, inputs["x"]) + inputs["D"][:, None] * inputs["x"]
    want += np.einsum("ih,ihn,hpn->ihp", np.exp(logs), C, state[0].astype(np.float64))
    for chunk_size in (32, 128, 256):
        pools = state.copy(), state.copy()
        dual = cupyattn.selective_scan(**inputs, dt_softplus=True, state=pools[0], chunk_size=chunk_size)
        rates = _whole_rates(inputs, model)
        recurrence = cupyattn.selective_scan(**rates, dt_softplus=True, state=pools[1], chunk_size=chunk_size)
        _compare(dual, want)
        _compare(recurrence, want)
        _compare(pools[0], pools[1].astype(np.float64))


@pytest.mark.parametrize("heads", [None, 2])
def test_prefill_is_updates_one_by_one(heads):
    model = Model(heads=heads, channels=16, states=16)
    inputs, state = model.inputs(70), model.pool(2, np.int32([1]))
    pool, updated = state.copy(), state.copy()
    got = cupyattn.selective_scan(**inputs, dt_softplus=True, state=pool, slots=np.int32([1]), chunk_size=32)
    want = [cupyattn.selective_state_update(updated, **_rows(inputs, t, t + 1), dt_softplus=True,
                                            state_batch_indices=np.int32([1])) for t in range(70)]
    _compare(got, np.concatenate(want).astype(np.float64))
    _compare(pool[1], updated[1].astype(np.float64))


@pytest.mark.parametrize("heads", [None, 2])
def test_chunks_and_cuts_agree(heads):
    model = Model(heads=heads, channels=16, states=16)
    inputs, state = model.inputs(300), model.pool(1, np.int32([0]))
    whole_pool = state.copy()
    whole = cupyattn.selective_scan(**inputs, dt_softplus=True, state=whole_pool, chunk_size=512)
    for chunk_size in (32, 96, 256):
        pool = state.copy()
        _compare(cupyattn.selective_scan(**inputs, dt_softplus=True, state=pool, chunk_size=chunk_size),
                 whole.astype(np.float64))
        _compare(pool, whole_pool.astype(np.float64))
    for cut in (1, 31, 32, 33, 299):
        pool = state.copy()
        parts = [cupyattn.selective_scan(**_rows(inputs, *rows), dt_softplus=True, state=pool, chunk_size=64)
                 for rows in ((0, cut), (cut, 300))]
        _compare(np.concatenate(parts), whole.astype(np.float64))
        _compare(pool, whole_pool.astype(np.float64))


@pytest.mark.parametrize("heads", [None, 2])
def test_a_sequence_does_not_see_the_others(heads):
    model = Model(heads=heads, channels=16, states=16, dtype="float16")
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

@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("large", [30.0, 1e4, 1e30, 3e38])
def test_small_steps_after_large_ones(xp, heads, large):
    """A difference of running sums would have lost the small steps' digits."""
    model = Model(heads=heads, channels=8, states=8, missing=("dt_bias", "z"))
    inputs = model.inputs(80)
    inputs["x"][...] = np.clip(inputs["x"], -1, 1) * 0.5
    inputs["B"][...] = np.clip(inputs["B"], -1, 1) * 0.5
    inputs["dt"][...] = -1
    inputs["dt"][[3, 10, 11, 50]] = large
    inputs["x"][[3, 10, 11, 50]] *= np.float32(1 / large)
    want_state = model.pool(1, np.arange(1))
    pool = xp.array(want_state)
    want = reference(**inputs, dt_softplus=True, state=want_state)
    got = cupyattn.selective_scan(**{k: None if a is None else xp.array(a) for k, a in inputs.items()},
                                  dt_softplus=True, state=pool, chunk_size=32)
    _compare(xp.numpy(got), want)
    _compare(xp.numpy(pool), want_state.astype(np.float64))


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("step", [-30.0, -1e30, -3e38])
def test_steps_far_below_zero(heads, step):
    model = Model(heads=heads, channels=8, states=8, missing=("dt_bias",))
    inputs, state = model.inputs(40), model.pool(1, np.arange(1))
    inputs["dt"][...] = step
    want_state = state.copy()
    want = reference(**inputs, dt_softplus=True, state=want_state)
    _compare(cupyattn.selective_scan(**inputs, dt_softplus=True, state=state, chunk_size=32), want)
    _compare(state, want_state.astype(np.float64))


@pytest.mark.parametrize("heads", [None, 2])
def test_softplus_far_below_zero(xp, heads):
    """log(exp(d) + 1) would be 0 here; by both forms, in one chunk and in several."""
    ones = np.ones((70, 3) if heads is None else (70, heads, 3), np.float32)
    bc = np.ones((70, 1) if heads is None else (70, 1, 1), np.float32)
    rates = -np.ones((3, 1) if heads is None else heads, np.float32)
    arrays = [xp.array(a) for a in (ones, -30 * (ones if heads is None else ones[:, :, 0]), rates, bc, bc)]
    want = 9.357622968839299e-14 * np.arange(1, 71).reshape(-1, *[1] * (ones.ndim - 1)) * ones
    for chunk_size in (32, 256):
        got = cupyattn.selective_scan(*arrays, dt_softplus=True, chunk_size=chunk_size)
        assert_close(xp.numpy(got), want, 0, 2e-6)


def test_not_a_number_stays_in_its_sequence():
    for heads in (None, 2):
        model = Model(heads=heads, channels=8, states=8)
        inputs = model.inputs(120)
        clean = cupyattn.selective_scan(**inputs, dt_softplus=True, cu_seqlens=np.int32([0, 50, 120]), chunk_size=32)
        inputs["dt"][20] = np.nan
        inputs["x"][21] = np.inf
        got = cupyattn.selective_scan(**inputs, dt_softplus=True, cu_seqlens=np.int32([0, 50, 120]), chunk_size=32)
        assert_same_bits(got[:20] if heads is None else got[50:], clean[:20] if heads is None else clean[50:])
        assert np.isnan(got[20:50]).all()
        assert_same_bits(got[50:], clean[50:])


def test_strided_and_offset_views(xp):
    """x, B, C and dt as columns of one projection, a pool inside a larger one."""
    generator = np.random.default_rng(3)
    fused = generator.standard_normal((90, 3 + 2 * 20 + 2 * 16 + 20)).astype(np.float32)
    pools = generator.standard_normal((6, 2, 20, 24)).astype(np.float32)
    A = -np.exp(generator.standard_normal((20, 16))).astype(np.float32)

    def call(function, fused, pool, A, starts, **options):
        x, z, B, C, dt = (fused[:, a:b] for a, b in ((3, 23), (23, 43), (43, 59), (59, 75), (75, 95)))
        return function(x, dt, A, B, C, None, z, None, True, state=pool[1::2, 1, :, 3:19], cu_seqlens=starts, **options)

    want_pool, starts = pools.copy(), np.int32([0, 40, 41, 90])
    want = call(reference, fused, want_pool, A, starts)
    pool, out = xp.array(pools), xp.array(np.full((90, 30), np.nan, np.float32))
    call(cupyattn.selective_scan, xp.array(fused), pool, xp.array(A), xp.array(starts), out=out[:, 7:27], chunk_size=32)
    host = xp.numpy(out)
    _compare(host[:, 7:27], want)
    assert np.isnan(host[:, :7]).all() and np.isnan(host[:, 27:]).all()
    _compare(xp.numpy(pool), want_pool.astype(np.float64))
    untouched = np.ones(pools.shape, bool)
    untouched[1::2, 1, :, 3:19] = False
    assert_same_bits(xp.numpy(pool)[untouched], pools[untouched])


@pytest.mark.parametrize("heads", [None, 2])
def test_wild_indices_on_the_device(heads):
    """What nobody can check on a GPU: slots past the pool are skipped, offsets outside the rows are cut."""
    from standin import install

    model = Model(heads=heads, channels=8, states=8)
    inputs, state = model.inputs(100), model.pool(3, np.arange(3))
    with install() as xp:
        device, pool = {k: xp.array(a) for k, a in inputs.items()}, xp.array(state)
        got = xp.numpy(cupyattn.selective_scan(
            **device, state=pool, slots=xp.array(np.int32([2**31 - 1, 1, -2**31])), chunk_size=32, dt_softplus=True,
            cu_seqlens=xp.array(np.int32([0, 40, 80, 100]))))
        assert not got[:40].any() and not got[80:].any() and got[40:80].all()
        assert_same_bits(xp.numpy(pool)[[0, 2]], state[[0, 2]])
        for starts in ([0, 2**31 - 1], [-2**31, 2**31 - 1, 4], [50, 2, 100, -4], [999, 999]):
            got = cupyattn.selective_scan(**device, state=xp.array(state), cu_seqlens=xp.array(np.int32(starts)),
                                          chunk_size=32)
            assert got.shape == inputs["x"].shape


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 2, 8), (3, 0, 8)])
def test_empty(xp, shape):
    model = Model(heads=None if len(shape) == 2 else shape[1], channels=shape[-1], states=16)
    inputs, pool = model.inputs(shape[0]), model.pool(4, np.arange(4))
    device = {k: xp.array(a) for k, a in inputs.items()}
    assert cupyattn.selective_scan(**device, state=xp.array(pool)).shape == shape
    starts = xp.array(np.zeros(3, np.int32))
    assert cupyattn.selective_scan(**device, state=xp.array(pool), cu_seqlens=starts).shape == shape


# ---- the executor's view ---------------------------------------------------------------------------------

def _as_on_a_gpu(monkeypatch):
    """The GPU's plans on the executor."""
    for name in ("_plan_selective_scan", "_plan_carry"):
        original = getattr(module, name)

        def planned(*arguments, original=original):
            plan = original(*arguments[:-1], "sm_90a")
            return type(plan)(plan.spec, "cpu", plan.grid, plan.block, plan.shared_bytes, note=plan.note)

        monkeypatch.setattr(module, name, planned)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu-plan", "gpu-plan"])
@pytest.mark.parametrize("heads, channels, states", [(None, 10, 16), (None, 3, 40), (2, 18, 8)])
def test_selective_scan_checked(heads, channels, states, gpu, monkeypatch):
    if gpu:
        _as_on_a_gpu(monkeypatch)
    model = Model(heads=heads, channels=channels, states=states)
    starts, slots = np.int32([0, 75, 75, 80]), np.int32([2, 0, -1])
    inputs, results = model.inputs(82), []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        state = model.pool(4, slots[:1])
        with settings(check=True, schedule=schedule, seed=seed), counters() as launches:
            out = cupyattn.selective_scan(**inputs, dt_softplus=True, state=state, cu_seqlens=starts, slots=slots,
                                          chunk_size=32)
        results.append((out, state))
        assert [launch.kernel.removeprefix("selective_scan") for launch in launches] == \
            ["_dual", "_carry", "_dual"] if heads else ["", "_carry", ""]
        states_, carry, outputs = (launch.buffers for launch in launches)
        slot = state[0].nbytes
        assert states_["carried"]["bytes_written"] == 2 * slot   # all chunks but the last
        assert carry["carried"]["bytes_written"] == 3 * slot and carry["carried"]["bytes_read"] == 2 * slot
        assert carry["state"]["bytes_read"] == slot and outputs["carried"]["bytes_read"] == 3 * slot
        assert outputs["state"]["bytes_written"] == slot and outputs["state"]["bytes_read"] == 0
    want_state = model.pool(4, slots[:1])
    want = reference(**inputs, dt_softplus=True, state=want_state, cu_seqlens=starts, slots=slots)
    _compare(results[0][0], want)
    _compare(results[0][1][2], want_state[2].astype(np.float64))
    for out, state in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(state, results[0][1])


@pytest.mark.parametrize("heads, channels, states", [(None, 150, 16), (None, 5, 130), (3, 64, 128), (2, 9, 12)])
def test_as_on_a_gpu(heads, channels, states, monkeypatch):
    _as_on_a_gpu(monkeypatch)
    model = Model(heads=heads, channels=channels, states=states)
    inputs, state = model.inputs(130), model.pool(2, np.arange(2))
    want_state, starts = state.copy(), np.int32([0, 100, 130])
    want = reference(**inputs, dt_softplus=True, state=want_state, cu_seqlens=starts)
    _compare(cupyattn.selective_scan(**inputs, dt_softplus=True, state=state, cu_seqlens=starts, chunk_size=64), want)
    _compare(state, want_state.astype(np.float64))


@hypothesis_settings(max_examples=30, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 90), max_size=4), heads=st.sampled_from([None, 1, 2]),
       channels=st.integers(1, 20), states=st.integers(1, 20), chunk_size=st.sampled_from([32, 64]),
       seed=st.integers(0, 2**32 - 1))
def test_shapes(lengths, heads, channels, states, chunk_size, seed):
    from conftest import NumpyArrays

    generator = np.random.default_rng(seed)
    slots = generator.permutation(len(lengths) + 2)[:len(lengths)].astype(np.int32)
    slots[generator.random(len(lengths)) < 0.2] = -1
    _check(NumpyArrays(), Model(heads=heads, channels=channels, states=states, seed=seed), lengths, slots,
           generator.random(len(lengths)) < 0.5, more_rows=int(generator.integers(0, 4)), chunk_size=chunk_size)


@pytest.mark.parametrize("spec", [s for s in CORE if s.kernel == "selective_scan" and dict(s.constants)["VEC"] == 4],
                         ids=str)
def test_eight_tokens_are_asked_for_before_the_first_is_used(spec):
    """In SASS, of the recurrence for GPUs; a branch around each load would make their latencies add up."""
    compiled = nvrtc.compile_code(cuda.code(spec), cuda.options(spec, "sm_90a"), "sm_90a")
    constants = dict(spec.constants)
    widest = 4 if "float32" in (constants["T"], constants["DT"]) else 2
    loops = [body for body in nvrtc.loops(compiled.cubin, spec.kernel) if any("MUFU.EX2" in line for line in body)]
    assert max(nvrtc.bytes_asked_for(body) for body in loops) >= 8 * widest


def test_plans():
    for arch, most in (("cpu", None), ("sm_75", 64), ("sm_90a", 96)):
        for heads, dims in ((1, 5120), (80, 64), (3, 1)):
            for states in (1, 15, 16, 128, 256, 512):
                for per_head in (True, False):
                    plan = _plan_selective_scan(1000, 4, heads, dims, states, "float16", "float16", "float32", False,
                                                per_head, 256, True, 8, arch)
                    constants = dict(plan.spec.constants)
                    assert plan.grid[0] == 1000 // 256 + 5 and plan.grid[1] == heads
                    if plan.spec.kernel == "selective_scan":
                        assert constants["LANES"] * constants["COUNT"] * constants["VEC"] >= states
                        assert plan.grid[2] * plan.block[0] >= dims * constants["LANES"]
                        assert not per_head or states > 128
                    else:
                        assert plan.grid[2] * constants["DIMS"] >= dims
                        assert plan.shared_bytes == _dual_bytes(constants["DIMS"], states)
                    assert most is None or plan.shared_bytes <= most * 1024


def test_every_core_version_is_chosen_by_some_call():
    types = {(c["T"], c["DT"], c["S"]) for c in (dict(s.constants) for s in CORE)}
    chosen = {_plan_selective_scan(100, 2, 2, dims, states, *kinds, decays, per_head, 256, outputs, align, arch).spec
              for kinds in types for dims in (16, 32, 64) for states in (8, 16, 128, 256)
              for align, arch in ((2, "cpu"), (2, "sm_90a"), (16, "sm_90a"))
              for decays, per_head in ((True, False), (False, False), (False, True)) for outputs in (True, False)}
    chosen |= {_plan_carry(2, 100, state, decays, "cpu").spec for _, _, state in types for decays in (True, False)}
    assert set(CORE) <= chosen


def test_errors():
    model = Model(heads=4, channels=8, states=16, groups=2)
    inputs, state = model.inputs(5), model.pool(2, np.arange(2))

    def call(message, error=ValueError, **changes):
        with pytest.raises(error, match=message):
            cupyattn.selective_scan(**{**inputs, **changes})

    op = "selective_scan: "
    call(op + "x must be float16 or bfloat16 or float32, got float64", TypeError, x=inputs["x"].astype(np.float64))
    call(op + r"B must be \[tokens, groups, state_size\] = \[5, \*, \*\], got \[4, 2, 16\]", B=inputs["B"][1:])
    call(op + "chunk_size must be a multiple of 32, got 33", chunk_size=33)
    call(op + "chunk_size must be an int32 of at least 32, got 0", chunk_size=0)
    call(op + "slots must come with state", slots=np.int32([0]))
    call(op + "cu_seqlens must start at 0, not decrease and end within the 5 rows", cu_seqlens=np.int32([0, 6]))
    call(op + "slots must be below the 2 slots of the pool", state=state, slots=np.int32([2]))
    call(op + "has_state must be bool or uint8", TypeError, state=state, has_state=np.int32([2]))
    call(op + r"state must be \[slots, heads, head_dim, state_size\]", state=state[:, :, :4])
    wide = Model(channels=2, states=513).inputs(3)
    with pytest.raises(NotImplementedError, match="selective_scan: state_size must be at most 512, got 513"):
        cupyattn.selective_scan(**wide)
