# SPDX-License-Identifier: Apache-2.0
"""Bound launches, and steps that are captured once and replayed: a whole decode step, and what a capture refuses."""

import contextlib
import importlib
import itertools
from types import SimpleNamespace

import launch_cost
import numpy as np
import pytest
from coded_weights import coded_weight
from conftest import NumpyArrays

import cupyattn
from cupyattn.errors import CaptureError
from cupyattn.graphs import BoundSteps, capture, place
from cupyattn.quant.coded import CodedWeight
from cupyattn.runtime import Bound, Plan, Specialisation, arch_of, cpu, cuda, make_args, recording
from cupyattn.runtime.bound import LibraryCall, in_order
from cupyattn.runtime.capturing import taping

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 64
BATCH, MAX_PAGES, PAGE_SIZE = 3, 12, 16
OPTIONS = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


def put(array, values):
    """Change an array in place."""
    if isinstance(array, np.ndarray):
        array[...] = values
    else:
        array.set(np.ascontiguousarray(values, array.dtype))


class Decode:
    """One token for each of three sequences through two layers of attention: arrays of `xp`, and the step as ops."""

    def __init__(self, xp, given_outs):
        rng = np.random.default_rng(7)
        self.xp, self.given_outs = xp, given_outs
        self.num_pages = BATCH * MAX_PAGES + 4
        self.x = xp.array(np.zeros((BATCH, HIDDEN), np.float16))
        self.residual = xp.array(np.zeros((BATCH, HIDDEN), np.float32))
        self.lengths, self.positions = (xp.array(np.ones(BATCH, np.int32)) for _ in "ab")
        self.table = xp.array(np.zeros((BATCH, MAX_PAGES), np.int32))
        heads = HEADS + 2 * KV_HEADS
        self.layers = [
            (xp.array(rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)),
             *(cupyattn.QMatrix.quantize(rng.standard_normal(shape).astype(np.float32) / 8, "int4-g64").to(xp.module)
               for shape in ((heads * HEAD_DIM, HIDDEN), (HIDDEN, HEADS * HEAD_DIM))),
             *(xp.array(rng.standard_normal((self.num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)).astype(np.float16))
               for _ in "kv")) for _ in range(2)]
        self.cos, self.sin = (xp.array(t) for t in cupyattn.RopeParams(rotary_dim=HEAD_DIM).tables(
            MAX_PAGES * PAGE_SIZE))
        self.outs = [None] * 5
        if given_outs:
            self.outs = [xp.array(np.zeros(shape, np.float16)) for shape in (
                (BATCH, HIDDEN), (BATCH, heads * HEAD_DIM), (BATCH, HEADS, HEAD_DIM), (BATCH, HEADS, HEAD_DIM),
                (BATCH, HIDDEN))]
        self.made = cupyattn.schedule(self.lengths, max_k_len=MAX_PAGES * PAGE_SIZE, **OPTIONS)

    def step(self):
        """The output of the last layer; the caches and the residual stream are changed in place."""
        h_out, qkv_out, q_out, mixed_out, delta_out = self.outs
        work = cupyattn.schedule(self.lengths, out=self.made, **OPTIONS)
        delta = self.x
        for norm, qkv, o, k_cache, v_cache in self.layers:
            h = cupyattn.rms_norm(delta, norm, residual=self.residual, out=h_out)
            heads = cupyattn.quant_gemm(h, qkv, out=qkv_out).reshape(BATCH, -1, HEAD_DIM)
            q = cupyattn.kv_append(
                heads[:, HEADS:-KV_HEADS], heads[:, -KV_HEADS:], k_cache, v_cache, block_table=self.table,
                positions=self.positions, q=heads[:, :HEADS], q_out=q_out, cos=self.cos, sin=self.sin)
            mixed = cupyattn.paged_decode(q, k_cache, v_cache, block_table=self.table, cache_seqlens=self.lengths,
                                          schedule=work, out=mixed_out)
            delta = cupyattn.quant_gemm(mixed.reshape(BATCH, -1), o, out=delta_out)
        return delta

    def change(self, seed):
        """Other inputs, lengths, positions and pages, in place."""
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, MAX_PAGES * PAGE_SIZE, BATCH, endpoint=True).astype(np.int32)
        put(self.x, rng.standard_normal((BATCH, HIDDEN)).astype(np.float16))
        put(self.residual, rng.standard_normal((BATCH, HIDDEN)).astype(np.float32))
        put(self.lengths, lengths)
        put(self.positions, lengths - 1)
        put(self.table, rng.permutation(self.num_pages)[:BATCH * MAX_PAGES].reshape(BATCH, MAX_PAGES))

    def state(self):
        """All that a step changes, on the host."""
        return [self.xp.numpy(a) for a in (self.residual, *(cache for layer in self.layers for cache in layer[3:]))]


@contextlib.contextmanager
def only_launches_in_capture(xp):
    """On the stand-in: between begin and end of the capture nothing but launches is counted."""
    if xp.name != "standin":
        yield
        return
    from unittest import mock

    stream, found = xp.module.cuda.Stream, []
    begin, end = stream.begin_capture, stream.end_capture

    def begin_capture(self, mode=None):
        xp.events.clear()
        begin(self, mode)

    def end_capture(self):
        found.append(set(xp.events))
        return end(self)

    with mock.patch.object(stream, "begin_capture", begin_capture), mock.patch.object(stream, "end_capture",
                                                                                      end_capture):
        yield
    assert found == [{"launches"}]


@pytest.mark.parametrize("given_outs", [True, False], ids=["outs", "no outs"])
def test_replayed_decode_steps_equal_eager_ones(xp, given_outs):
    eager, replayed = Decode(xp, True), Decode(xp, given_outs)
    for decode in (eager, replayed):
        decode.change(0)
    with only_launches_in_capture(xp):
        graph = capture(replayed.step, xp=xp.module)
    for _ in range(2):   # the warm-ups
        eager.step()
    for held, want in zip(replayed.state(), eager.state(), strict=True):
        np.testing.assert_array_equal(held, want, err_msg="a capture must not run")
    names = ["schedule", *["rms_norm", "quant_gemm", "kv_append", "paged_decode", "quant_gemm"] * 2]
    assert [launch.plan.spec.kernel.removesuffix("_mma") for launch in graph.launches] == names
    assert repr(graph).startswith("Graph(11 launches: schedule, rms_norm, ")
    seen = []
    for seed in (1, 2, 3, 1):
        for decode in (eager, replayed):
            decode.change(seed)
        want, found = xp.numpy(eager.step()), xp.numpy(graph.replay())
        assert found.any()
        np.testing.assert_array_equal(found, want)
        for held, expected in zip(replayed.state(), eager.state(), strict=True):
            np.testing.assert_array_equal(held, expected)
        seen.append(found)
    assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()


def test_replayed_mixed_batches_equal_eager_ones(xp):
    """Prefill beside decode: how many new tokens each sequence has changes too."""
    rng = np.random.default_rng(3)
    tokens, most = 40, 38
    k_cache, v_cache = (xp.array(rng.standard_normal((40, PAGE_SIZE, KV_HEADS, HEAD_DIM)).astype(np.float16))
                        for _ in "kv")
    q = xp.array(rng.standard_normal((tokens, HEADS, HEAD_DIM)).astype(np.float16))
    table = xp.array(rng.permutation(40)[:BATCH * MAX_PAGES].reshape(BATCH, MAX_PAGES).astype(np.int32))
    starts, lengths = xp.array(np.int32([0, 1, 2, 40])), xp.array(np.int32([1, 190, 60]))
    options = OPTIONS | {"cu_seqlens_q": starts, "max_q_len": most}
    made, other = (cupyattn.schedule(lengths, max_k_len=MAX_PAGES * PAGE_SIZE, **options) for _ in "12")

    def step(made):
        work = cupyattn.schedule(lengths, out=made, **options)
        return cupyattn.attention(q, k_cache, v_cache, cu_seqlens_q=starts, cache_seqlens=lengths, block_table=table,
                                  max_q_len=most, schedule=work, return_lse=True)

    graph = capture(step, made, xp=xp.module)
    for new, held in (([0, 30, 31, 40], [100, 1, 9]), ([0, 1, 39, 40], [192, 38, 77]),
                      ([0, 13, 26, 40], [13, 50, 192])):
        put(starts, np.int32(new))
        put(lengths, np.int32(held))
        for found, want in zip(graph.replay(), step(other), strict=True):
            np.testing.assert_array_equal(xp.numpy(found), xp.numpy(want))


def test_graphs_of_one_model_alternate(xp):
    """Two graphs and eager steps between them, over the same workspace and caches."""
    eager, replayed = Decode(xp, False), Decode(xp, False)
    for decode in (eager, replayed):
        decode.change(0)
    one, two = (capture(replayed.step, xp=xp.module) for _ in "12")
    for _ in range(4):
        eager.step()
    for seed, run in zip((4, 5, 6, 7), (one.replay, two.replay, replayed.step, one.replay), strict=True):
        for decode in (eager, replayed):
            decode.change(seed)
        want = xp.numpy(eager.step())
        np.testing.assert_array_equal(xp.numpy(run()), want)
    for held, expected in zip(replayed.state(), eager.state(), strict=True):
        np.testing.assert_array_equal(held, expected)


def test_arguments_and_default_kind(xp):
    x, weight = xp.array(np.ones((2, 8), np.float32)), xp.array(np.ones(8, np.float32))
    graph = capture(lambda a, w: (cupyattn.rms_norm(a, w), cupyattn.silu_mul(a, a)), x, weight)
    put(x, np.full((2, 8), -3, np.float32))
    normed, gated = graph.replay()
    assert normed is graph.result[0]
    np.testing.assert_allclose(xp.numpy(normed), -1, rtol=1e-6)
    np.testing.assert_allclose(xp.numpy(gated), 9 / (1 + np.exp(3)), rtol=1e-5)


def test_products_by_blas_are_replayed(xp):
    rng = np.random.default_rng(0)
    weight = cupyattn.QMatrix.from_dense(rng.standard_normal((32, 64)).astype(np.float32)).to(xp.module)
    x, bias = xp.array(np.zeros((400, 64), np.float32)), xp.array(rng.standard_normal(32).astype(np.float32))
    with cpu.settings(blas=True):
        graph = capture(lambda x: cupyattn.quant_gemm(x, weight, bias=bias), x)
        names = {launch.name for launch in graph.launches if not isinstance(launch, Bound)}
        assert names <= {"blas", "cublas", "copy"} and (xp.name != "numpy" or "blas" in names)
        steps = BoundSteps(xp.module)
        for _ in range(3):
            put(x, rng.standard_normal((400, 64)).astype(np.float32))
            want = xp.numpy(cupyattn.quant_gemm(x, weight, bias=bias))
            np.testing.assert_array_equal(xp.numpy(graph.replay()), want)
            again = steps.run((), lambda: cupyattn.quant_gemm(x, weight, bias=bias))
            np.testing.assert_array_equal(xp.numpy(again), want)


def test_a_current_stream_is_the_one_that_captures(xp):
    if xp.name == "numpy":
        pytest.skip("NumPy has no streams")
    x, weight = xp.array(np.ones((2, 8), np.float32)), xp.array(np.ones(8, np.float32))
    stream = xp.module.cuda.Stream(non_blocking=True)
    with stream:
        graph = capture(cupyattn.rms_norm, x, weight)
        assert graph._kept[0] is stream and not stream.is_capturing()
        np.testing.assert_allclose(xp.numpy(graph.replay()), 1, rtol=1e-6)


def test_a_graph_takes_its_scratch_with_it():
    """Captures on streams of their own leave no memory behind, once their graphs are gone or closed."""
    import standin_device
    from standin import install

    with install() as xp:
        memory = standin_device.state.memory   # of live allocations
        decode = Decode(xp, True)
        decode.change(1)
        decode.step()
        graphs = [capture(decode.step, xp=xp.module)]
        decode.change(1)
        want = xp.numpy(graphs[0].replay())
        first = len(memory)
        graphs.append(capture(decode.step, xp=xp.module))
        each = len(memory) - first
        assert each > 0
        graphs += [capture(decode.step, xp=xp.module) for _ in range(3)]
        assert len(memory) == first + 4 * each
        graphs[1].close()
        assert repr(graphs[1]) == "Graph(closed)" and len(memory) == first + 3 * each
        with pytest.raises(ValueError, match=r"must not be used after close\(\)"):
            graphs[1].replay()
        del graphs[1:]
        with pytest.raises(CaptureError), xp.module.cuda.Stream.null:
            capture(_reads(xp, decode.x, None), xp=xp.module)
        assert len(memory) == first
        decode.change(1)
        np.testing.assert_array_equal(xp.numpy(graphs[0].replay()), want)


def test_steps_of_several_gpus():
    """NCCL over GPUs of one process is not kept; with a process for each GPU it is."""
    import standin_nccl
    from standin import install

    from cupyattn import InProcessCommunicator, NCCLCommunicator

    with install(devices=2) as xp, standin_nccl.install():
        both, one = NCCLCommunicator.local([0, 1]), NCCLCommunicator.over(InProcessCommunicator(1))
        arrays = [xp.array(np.ones(4, np.float32))]
        with xp.module.cuda.Device(1):
            arrays.append(xp.array(np.ones(4, np.float32)))
        steps = BoundSteps(xp.module)
        steps.run(("both",), lambda: both.all_reduce(arrays))
        with pytest.raises(CaptureError, match="must not exchange arrays between GPUs of one process"):
            steps.run(("both",), lambda: both.all_reduce(arrays))
        calls = []
        for _ in range(4):
            steps.run(("one",), lambda: calls.append(0) or one.all_reduce(arrays[:1]))
        assert len(calls) == 2 and sum(kind == "allReduce" for _, kind, *_ in standin_nccl.log) == 2 + 4


# ---- steps run before -------------------------------------------------------------------------------------


def test_steps_run_before_are_only_launched(xp):
    eager, again = Decode(xp, True), Decode(xp, False)
    steps, calls = BoundSteps(xp.module), []

    def step(extra=()):
        key = *map(place, (again.x, again.lengths, again.table, again.positions)), *extra
        return steps.run(key, lambda: calls.append(extra) or again.step())

    for seed in (1, 2, 3, 4):
        for decode in (eager, again):
            decode.change(seed)
        want, found = xp.numpy(eager.step()), step()
        assert found.size and len(calls) == min(seed, 2)
        np.testing.assert_array_equal(xp.numpy(found), want)
        for held, expected in zip(again.state(), eager.state(), strict=True):
            np.testing.assert_array_equal(held, expected)
    step(("another option",))
    assert len(calls) == 3
    again.x = xp.array(np.zeros((BATCH, HIDDEN), np.float16))
    step()
    assert len(calls) == 4


def test_steps_with_other_surroundings(xp):
    """Another stream has another workspace; a recording or a capture sees the step itself."""
    x, weight, out = (xp.array(np.ones(shape, np.float32)) for shape in ((2, 8), 8, (2, 8)))
    steps, calls = BoundSteps(xp.module, most=2), []

    def step(option=0):
        return steps.run((place(x), place(None), option), lambda: calls.append(option) or cupyattn.rms_norm(
            x, weight, out=out))

    assert step() is step() is step() is out and calls == [0, 0]
    with recording() as wanted:
        step()
    assert [spec.kernel for spec in wanted] == ["rms_norm"] and calls == [0] * 3
    assert len(capture(step, xp=xp.module).launches) == 1 and calls == [0] * 6
    with cpu.settings(workers=1) if xp.name == "numpy" else xp.module.cuda.Stream(non_blocking=True):
        assert step() is step() is step()
    assert calls == [0] * 8
    step(1), step(), step(1), step()   # the oldest went when a third one came
    assert calls == [0] * 8 + [1, 0, 1, 0]
    step(), step(1)
    assert calls == [0] * 8 + [1, 0, 1, 0]


def test_a_step_that_fails_is_not_kept(xp):
    steps, x = BoundSteps(xp.module), xp.array(np.ones((2, 8), np.float32))
    for weight in (xp.array(np.ones(7, np.float32)), xp.array(np.ones(8, np.float32))):
        with contextlib.suppress(ValueError):
            out = steps.run((), lambda weight=weight: cupyattn.rms_norm(x, weight))
    np.testing.assert_allclose(xp.numpy(out), 1, rtol=1e-6)


# ---- what a capture refuses --------------------------------------------------------------------------------


def _growing(xp, x, weight):
    sizes = itertools.count(8)
    return lambda: xp.module.empty(100 * next(sizes), np.float32)


def _once(xp, x, weight):
    """Allocates in the warm-up and keeps it."""
    kept = []
    return lambda: kept or kept.append(xp.module.empty(100, np.float32))


def _reads(xp, x, weight):
    return lambda: x.get()


def _writes(xp, x, weight):
    return lambda: x.set(np.ones((2, 8), np.float32))


def _waits(xp, x, weight):
    return lambda: xp.module.cuda.runtime.deviceSynchronize()


def _waits_for_the_stream(xp, x, weight):
    return lambda: xp.module.cuda.get_current_stream().synchronize()


def _compiles(xp, x, weight):
    """A version of rms_norm that only the second step needs."""
    outs = iter([xp.array(np.zeros((2, 8), np.float16)), xp.array(np.zeros((2, 8), np.float32))])
    return lambda: cupyattn.rms_norm(x, weight, out=next(outs))


def _host_lengths(xp, x, weight):
    made = cupyattn.schedule(np.int32([3]), max_k_len=32, xp=xp.module, **OPTIONS)
    options = OPTIONS if xp.name != "numpy" else OPTIONS | {"max_k_len": 32}
    return lambda: cupyattn.schedule(np.int32([3]), out=None if xp.name == "numpy" else made, xp=xp.module, **options)


def _no_schedule(xp, x, weight):
    cache = xp.array(np.zeros((2, 16, 2, 64), np.float16))
    q, lengths, table = xp.array(np.zeros((1, 4, 64), np.float16)), xp.array(np.int32([3])), xp.array(np.int32([[1]]))
    out = xp.array(np.zeros((1, 4, 64), np.float16))
    return lambda: cupyattn.paged_decode(q, cache, cache, block_table=table, cache_seqlens=lengths, out=out)


def _captures(xp, x, weight):
    calls = itertools.count()
    return lambda: next(calls) and capture(cupyattn.rms_norm, x, weight)


DEVICE_ONLY = {"allocates more": (_growing, "an allocation of 3600 bytes where that had 3200 bytes"),
               "allocates once": (_once, "got 0 of 1 allocations; give more warmups"),
               "reads": (_reads, "without reading arrays on the host.*(ndarray.get|cudaError)"),
               "writes": (_writes, "without reading arrays on the host.*ndarray.set"),
               "waits": (_waits, "or waiting for the device.*(deviceSynchronize|cudaError)"),
               "waits for the stream": (_waits_for_the_stream, "waiting for the device.*(Stream.synchronize|cudaErr)")}
ANYWHERE = {"compiles": (_compiles, r"must not compile.*rms_norm\[.*U=float32"),
            "host lengths": (_host_lengths, "must not call schedule with lengths in host memory"),
            "no schedule": (_no_schedule, "must not call paged_decode without schedule|schedule must be given while a"),
            "captures": (_captures, "must not capture another")}


@pytest.mark.parametrize("name", [*DEVICE_ONLY, *ANYWHERE])
def test_refused(xp, name, monkeypatch):
    if xp.name == "numpy" and name in DEVICE_ONLY:
        pytest.skip("costs a NumPy step nothing and is replayed with the arrays it made")
    if (xp.name, name) == ("cupy", "writes"):
        pytest.skip("CUDA may capture a copy from the host, with what the host held then")
    monkeypatch.setattr(cpu, "_kernels", {})   # so that every kernel has to be loaded
    monkeypatch.setattr(cuda, "_kernels", {})
    monkeypatch.setattr(cuda, "_prepared", {})
    make, message = (DEVICE_ONLY | ANYWHERE)[name]
    x, weight = xp.array(np.ones((2, 8), np.float32)), xp.array(np.ones(8, np.float32))
    step = make(xp, x, weight)
    with pytest.raises((CaptureError, ValueError), match=message):
        capture(step, xp=xp.module, warmups=1)
    # nothing is left behind
    np.testing.assert_allclose(xp.numpy(cupyattn.rms_norm(x, weight)), 1, rtol=1e-6)
    graph = capture(cupyattn.rms_norm, x, weight)
    np.testing.assert_allclose(xp.numpy(graph.replay()), 1, rtol=1e-6)


def test_arrays_of_another_kind():
    x, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    from standin import install

    with install() as standin:
        for kind, xp in (("numpy", standin.module), ("cupy", np)):
            arrays = (x, weight) if kind == "numpy" else (standin.array(x), standin.array(weight))
            with pytest.raises(CaptureError, match=rf"xp must be {kind} for a step that launches Bound\(rms_norm"):
                capture(lambda arrays=arrays: cupyattn.rms_norm(*arrays), xp=xp)


@pytest.mark.parametrize("warmups", [0, -1, 1.0, True])
def test_warmups_that_are_none(warmups):
    with pytest.raises(ValueError, match="capture: warmups must be an integer of at least 1"):
        capture(lambda: None, warmups=warmups)


# ---- the stand-in's own capture ----------------------------------------------------------------------------


@pytest.mark.parametrize("call, message", [
    (lambda xp, x: xp.module.empty(100, np.float32), "allocating 400 bytes"),
    (lambda xp, x: x.get(), "ndarray.get"), (lambda xp, x: xp.module.asnumpy(x), "ndarray.get"),
    (lambda xp, x: x.set(np.ones(4, np.float32)), "ndarray.set"),
    (lambda xp, x: xp.module.asarray(np.ones(4)), "asarray"),
    (lambda xp, x: xp.module.cuda.runtime.deviceSynchronize(), "deviceSynchronize"),
    (lambda xp, x: cuda.kernel(_norm_plan(xp).spec, 0), "compiling rms_norm"),
    (lambda xp, x: xp.module.cuda.Event().synchronize(), "Event.synchronize")])
def test_the_standin_refuses(call, message, monkeypatch):
    """Also without our helper."""
    from standin import install

    with install() as xp:
        x, stream = xp.array(np.ones(4, np.float32)), xp.module.cuda.Stream(non_blocking=True)
        monkeypatch.setattr(cuda, "_kernels", {})
        with stream:
            stream.begin_capture()
            with pytest.raises(RuntimeError, match=f"{message} during graph capture"):
                call(xp, x)
            with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureInvalidated"):
                stream.end_capture()


# ---- bound launches ----------------------------------------------------------------------------------------


def _norm_plan(xp):
    spec = Specialisation("rms_norm", "rms_norm", "RmsNormArgs",
                          {"T": "float32", "W": "float32", "R": "float32", "U": "float32", "VEC": 1, "RESIDUAL": 0})
    return Plan(spec, arch_of(xp.module), (2,), (32,), shared_bytes=128)


def _norm_fields(x, weight, out):
    return {"x": {"data": x, "stride_row": 8}, "weight": weight, "residual": None,
            "out": {"data": out, "stride_row": 8}, "rows": 2, "hidden": 8, "eps": 0.0, "reserved": 0}


def test_bound_launches_read_what_arrays_hold(xp):
    x, weight, out = (xp.array(np.ones(shape, np.float32)) for shape in ((2, 8), 8, (2, 8)))
    plan = _norm_plan(xp)
    bound = plan.bind(**_norm_fields(x, weight, out))
    assert repr(bound).startswith("Bound(rms_norm, ") and bound.plan is plan
    assert bound.args.data == make_args(plan, **_norm_fields(x, weight, out)).data
    for value in (2.0, -5.0):
        put(x, np.full((2, 8), value, np.float32))
        out.fill(np.nan)
        assert bound() is None
        np.testing.assert_allclose(xp.numpy(out), np.sign(value), rtol=1e-6)
    with pytest.raises(TypeError, match="RmsNormArgs: missing fields"):
        plan.bind(x=None)
    Plan(plan.spec, plan.arch, (0,), (32,)).bind(**_norm_fields(x, weight, out))()   # no blocks, no launch


def test_bound_launches_keep_their_arrays(xp):
    plan, weight, out = _norm_plan(xp), xp.array(np.ones(8, np.float32)), xp.array(np.zeros((2, 8), np.float32))
    bound = plan.bind(**_norm_fields(xp.array(np.full((2, 8), 3, np.float32)), weight, out))
    for _ in range(8):   # would take the place of a freed array
        xp.array(np.full((2, 8), -3, np.float32))
    bound()
    np.testing.assert_allclose(xp.numpy(out), 1, rtol=1e-6)


def test_bound_launches_keep_the_settings_of_the_executor():
    x, weight, out = np.ones((2, 8), np.float32), np.ones(8, np.float32), np.zeros((2, 8), np.float32)

    class Arrays:
        module = np

    plan = _norm_plan(Arrays)
    with cpu.settings(check=True):
        bound = plan.bind(**(_norm_fields(x, weight, out) | {"rows": 2, "hidden": 9}))   # one element too many
    with pytest.raises(cupyattn.KernelCheckError, match="out_of_bounds|outside|bounds"):
        bound()
    with cpu.settings(check=True):
        bound = plan.bind(**_norm_fields(x, weight, out))
    with cpu.counters() as counters:
        bound()
        bound()
    assert [c.counts["blocks"] for c in counters] == [2, 2]


def test_aborted_bound_launches_can_be_launched_again(monkeypatch):
    """What counts arrivals is zero again."""
    decode = Decode(NumpyArrays(), True)
    decode.change(1)
    decode.step()

    def interrupted(*_):
        raise KeyboardInterrupt

    real = cpu._kernel
    monkeypatch.setattr(cpu, "_kernel", lambda *key: real(*key)._replace(
        executor=SimpleNamespace(ca_launch=interrupted, ca_abandon=lambda: None)))
    with taping("cpu", keep=True, capturing=True) as tape:
        decode.step()
    bound = next(launch for launch in tape.launches if launch.plan.spec.kernel == "paged_decode")
    decode.made.decode.counters[...] = 3
    with pytest.raises(KeyboardInterrupt):
        bound()
    assert decode.made.decode.counters.size and not decode.made.decode.counters.any()


def test_launches_cut_short_between_two_can_be_run_again(xp, monkeypatch):
    """The segments of a weight count arrivals together."""
    op = importlib.import_module("cupyattn.ops.quant_gemm")
    monkeypatch.setattr(op, "_version", lambda *of: ("mma", "chosen by the test"))
    parts = [coded_weight(f"int{bits} plain float16", 24, k, 32).segments[0] for bits, k in ((6, 96), (4, 320))]
    coded = CodedWeight("mixed", (24, 416), tuple(parts), None)
    weight = cupyattn.QMatrix.from_coded(coded).to(xp.module)
    x, out = xp.array(np.ones((3, 416), np.float16)), xp.array(np.zeros((3, 24), np.float32))
    with taping(arch_of(xp.module), keep=True) as tape:
        cupyattn.quant_gemm(x, weight, out=out)
    *first, second = tape.launches   # columns in order, and a segment each
    assert len(first) == 2

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_order([*first, LibraryCall("interrupt", interrupt), second])()
    run = in_order(tape.launches)
    for seed in range(3):
        rows = np.random.default_rng(seed).standard_normal((3, 416)).astype(np.float16)
        put(x, rows)
        run()
        np.testing.assert_allclose(xp.numpy(out), rows.astype(np.float64) @ coded.dequantize().T, atol=1e-3)


def test_bound_launches_stay_on_their_device():
    from standin import install

    with install(devices=2) as xp:
        x, weight, out = (xp.array(np.ones(shape, np.float32)) for shape in ((2, 8), 8, (2, 8)))
        plan = _norm_plan(xp)
        bound = plan.bind(**_norm_fields(x, weight, out))
        with xp.module.cuda.Device(1):
            with pytest.raises(ValueError, match="rms_norm: x.data must be on the current device 1"):
                plan.bind(**_norm_fields(x, weight, out))
            with pytest.raises(ValueError, match="a bound launch for device 0 must run there, the current device is 1"):
                bound()
        bound()


def test_what_python_costs():
    """The bench's rows; its times are not judged, but a prepared launch must be the cheaper one."""
    rows = launch_cost.measure(np, np.array, rounds=3)
    assert [launches for _, launches, _, _ in rows] == [1] * 8 + [8, 8]
    assert all(bound < eager for name, _, eager, bound in rows if name != "step, BoundSteps")
    assert rows[-1][2] < rows[-2][2]
    assert launch_cost.markdown(rows).count("\n") == 11
