# SPDX-License-Identifier: Apache-2.0
"""quant_gemm between its launches: what a call leaves behind when it fails there, and what calls share."""

import functools
import importlib
import itertools
import threading

import numpy as np
import pytest
from coded_weights import coded_weight
from compare import dtype_of
from standin import install

import cupyattn
from cupyattn import QMatrix
from cupyattn.errors import CompileError
from cupyattn.quant.coded import CodedWeight
from cupyattn.runtime import cuda

op = importlib.import_module("cupyattn.ops.quant_gemm")


@functools.lru_cache(maxsize=4)
def _segments(n=24):
    """(QMatrix of two segments whose columns are x's in a random order, its weights in float64)."""
    parts = [coded_weight(f"int{bits} plain float16", n, k, 32).segments[0] for bits, k in ((6, 96), (4, 320))]
    order = np.random.default_rng(5).permutation(416).astype(np.int32)
    coded = CodedWeight("mixed", (n, 416), tuple(parts), order)
    return QMatrix.from_coded(coded), coded.dequantize()


def _x(m, k, dtype="float16", seed=0):
    return np.random.default_rng((m, k, seed)).standard_normal((m, k)).astype(dtype_of(dtype))


def _error(got, want):
    return np.linalg.norm(np.asarray(got).astype(np.float64) - want) / np.linalg.norm(want)


def _assert_right(xp, matrix, w, m, seed=0):
    x = _x(m, w.shape[1], seed=seed)
    assert _error(xp.numpy(cupyattn.quant_gemm(xp.array(x), matrix)), x.astype(np.float64) @ w.T) <= 3e-4


# ---- calls that fail between two launches

@pytest.mark.parametrize("error", [KeyboardInterrupt, CompileError])
def test_calls_after_one_that_was_cut_short(monkeypatch, error):
    matrix, w = _segments()
    with install() as xp:
        there, launch, launched = matrix.to(xp.module), op.launch, []

        def cut_short(plan, args):
            if len(launched) == 2:
                raise error("between the segments")
            launched.append(plan.spec.kernel)
            launch(plan, args)

        monkeypatch.setattr(op, "launch", cut_short)
        with pytest.raises(error):
            cupyattn.quant_gemm(xp.array(_x(3, 416)), there)
        assert launched == ["gather_columns", "quant_gemm_mma"]
        monkeypatch.setattr(op, "launch", launch)
        for seed in range(3):
            _assert_right(xp, there, w, 3, seed)


def test_every_segment_is_compiled_before_the_first_launch(monkeypatch):
    matrix, w = _segments()
    with install() as xp:
        there, x, compile_ = matrix.to(xp.module), xp.array(_x(3, 416)), cuda._compile
        monkeypatch.setattr(cuda, "_kernels", {})

        def interrupted(spec, device):
            if "Ints<4" in str(spec):   # the second segment
                raise KeyboardInterrupt
            return compile_(spec, device)

        monkeypatch.setattr(cuda, "_compile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cupyattn.quant_gemm(x, there)
        assert xp.events["launches"] == 0
        monkeypatch.setattr(cuda, "_compile", compile_)
        _assert_right(xp, there, w, 3)


# ---- threads that share a stream

def test_two_threads_on_one_stream_have_scratch_of_their_own(monkeypatch):
    """One is held between the launches of its call while the other makes a whole call."""
    matrix, w = _segments()
    with install() as xp:
        there, launch, main = matrix.to(xp.module), op.launch, threading.get_ident()
        _assert_right(xp, there, w, 3)
        waiting, go_on, failed = threading.Event(), threading.Event(), []

        def held(plan, args):
            launch(plan, args)
            if threading.get_ident() != main and plan.spec.kernel == "quant_gemm_mma" and not waiting.is_set():
                waiting.set()
                assert go_on.wait(60)

        def other():
            try:
                _assert_right(xp, there, w, 3, seed=1)
            except BaseException as error:   # for the thread that waits
                failed.append(error)

        monkeypatch.setattr(op, "launch", held)
        thread = threading.Thread(target=other)
        thread.start()
        assert waiting.wait(60)
        _assert_right(xp, there, w, 3, seed=2)
        go_on.set()
        thread.join()
        assert not failed, failed


# ---- graphs

ON_GPU = pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)


@ON_GPU
def test_the_first_call_in_a_capture_is_refused_and_its_cure_works(xp):
    matrix, w = _segments()
    there, stream = matrix.to(xp.module), xp.module.cuda.Stream(non_blocking=True)
    x, out = xp.array(_x(3, 416)), xp.array(np.full((3, 24), np.nan, np.float32))
    cupyattn.quant_gemm(x, there, out=out)   # compiled, on another stream
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="bytes must be there before a graph is captured; call the op once"):
            cupyattn.quant_gemm(x, there, out=out)
        stream.end_capture()
        cupyattn.quant_gemm(x, there, out=out)
        stream.begin_capture()
        cupyattn.quant_gemm(x, there, out=out)
        graph = stream.end_capture()
        for seed in range(3):
            x.set(_x(3, 416, seed=seed))
            graph.launch(stream)
            stream.synchronize()
            assert _error(xp.numpy(out), _x(3, 416, seed=seed).astype(np.float64) @ w.T) <= 1e-5


def _cases():
    """What takes scratch: several pieces, several segments, experts. (matrix, weight or weights of experts)."""
    one = coded_weight("int4 zero float16", 40, 1088)
    parts = [coded_weight(f"int{bits} plain float16", 40, k, 32).segments[0] for bits, k in ((6, 96), (4, 1184))]
    mixed = CodedWeight("mixed", (40, 1280), tuple(parts), np.random.default_rng(6).permutation(1280).astype(np.int32))
    experts = [coded_weight("int4 zero float16", 40, 1088, seed=e) for e in range(3)]
    return {"pieces": (QMatrix.from_coded(one), one.dequantize()),
            "segments": (QMatrix.from_coded(mixed), mixed.dequantize()),
            "experts": (QMatrix.stack([QMatrix.from_coded(e) for e in experts]),
                        np.stack([e.dequantize() for e in experts]))}


@ON_GPU
@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("case", ["pieces", "segments", "experts"])
def test_a_captured_call_follows_its_inputs(xp, case, m):
    """Also after calls that took other scratch on the same stream; in the capture nothing but launches."""
    matrix, w = _cases()[case]
    there, stream, columns = matrix.to(xp.module), xp.module.cuda.Stream(non_blocking=True), w.shape[-1]
    x, out = xp.array(_x(m, columns)), xp.array(np.full((m, 40), np.nan, np.float32))
    offsets = xp.array(np.int32([0, 0, 1, m])) if case == "experts" else None

    def want(rows, bounds):
        rows = rows.astype(np.float64)
        if case != "experts":
            return rows @ w.T
        return np.concatenate([rows[a:b] @ w[e].T for e, (a, b) in enumerate(itertools.pairwise(bounds))])

    with stream:
        cupyattn.quant_gemm(x, there, expert_offsets=offsets, out=out)
        stream.synchronize()
        if xp.name == "standin":
            xp.events.clear()
        stream.begin_capture()
        cupyattn.quant_gemm(x, there, expert_offsets=offsets, out=out)
        graph = stream.end_capture()
        if xp.name == "standin":
            assert set(xp.events) == {"launches"}
        for seed in range(12):
            rows, bounds = _x(m, columns, seed=seed), [0, *sorted(np.random.default_rng(seed).integers(0, m, 2)), m]
            x.set(rows)
            if offsets is not None:
                offsets.set(np.int32(bounds))
            if seed in (3, 6):   # an eager call, of more tokens each time
                more, limits = _x(30 * seed, columns, seed=seed), [0, 1, 40, 30 * seed]
                others = None if offsets is None else xp.array(np.int32(limits))
                other = cupyattn.quant_gemm(xp.array(more), there, invariant=True, expert_offsets=others)
                assert _error(xp.numpy(other), want(more, limits)) <= 3e-4
            out.fill(np.nan)
            graph.launch(stream)
            stream.synchronize()
            assert _error(xp.numpy(out), want(rows, bounds)) <= 1e-5
