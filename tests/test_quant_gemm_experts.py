# SPDX-License-Identifier: Apache-2.0
"""quant_gemm with experts: rows of x sorted by the weight each is multiplied by."""

import functools
import importlib

import numpy as np
import pytest
from coded_weights import coded_weight
from compare import assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from standin import install

import cupyattn
from cupyattn import QExperts, QMatrix
from cupyattn.quant.coded import CodedWeight
from cupyattn.reference.quant_gemm import quant_gemm as expected_gemm
from cupyattn.runtime import arrival_counters
from cupyattn.runtime.cpu import counters, settings

op = importlib.import_module("cupyattn.ops.quant_gemm")
RAGGED = [0, 3, 3, 20, 21, 37]   # five experts, the second without a row
rng = np.random.default_rng(31)


@functools.lru_cache(maxsize=32)
def _experts(form, count, n, k, seed=0):
    """(matrices, QExperts, weights in float64 [experts, n, k])."""
    coded = [coded_weight(form, n, k, seed=seed + e) for e in range(count)]
    matrices = [QMatrix.from_coded(weight) for weight in coded]
    return matrices, QMatrix.stack(matrices), np.stack([weight.dequantize() for weight in coded])


def _x(m, k, dtype):
    return rng.standard_normal((m, k)).astype(dtype_of(dtype))


def _one_by_one(x, matrices, offsets, out, bias=None):
    """What separate calls give."""
    for e, matrix in enumerate(matrices):
        rows = slice(offsets[e], offsets[e + 1])
        cupyattn.quant_gemm(x[rows], matrix, bias=None if bias is None else bias[e], invariant=True, out=out[rows])
    return out


def _assert_right(x, matrices, stacked, w, offsets, dtype="float32", bound=1e-5, **options):
    out = cupyattn.quant_gemm(x, stacked, expert_offsets=np.int32(offsets), out=poison(
        np.empty((len(x), w.shape[1]), dtype_of(dtype))), **options)
    assert not arrival_counters(np, 0).any()
    assert_same_bits(out, _one_by_one(x, matrices, offsets, np.empty_like(out), **options))
    for e in range(len(matrices)):
        rows = slice(offsets[e], offsets[e + 1])
        want = x[rows].astype(np.float64) @ w[e].T
        error = np.linalg.norm(out[rows].astype(np.float64) - want)
        assert options or error <= bound * np.linalg.norm(want)
    return out


@pytest.mark.parametrize("form, dtype", [("int4 zero float16", "float16"), ("int6 plain int8 float16", "float32"),
                                         ("e2m1 plain float8_e8m0fnu", "bfloat16"),
                                         ("int4 plain int8 float16", "float32")])
def test_the_bits_of_separate_calls(form, dtype):
    matrices, stacked, w = _experts(form, 5, 40, 328)
    x = _x(37, 328, dtype)
    _assert_right(x, matrices, stacked, w, RAGGED)
    _assert_right(x, matrices, stacked, w, [0, 0, 0, 37, 37, 37])
    _assert_right(x[:2], matrices, stacked, w, [0, 0, 1, 1, 1, 2])
    _assert_right(x, matrices, stacked, w, RAGGED, bias=_x(5, 40, dtype))
    _assert_right(x, matrices, stacked, w, RAGGED, bias=_x(40, 5, "float32").T)


@pytest.mark.parametrize("form, dtype", [("int4 zero float16", "float16"), ("e2m1 plain float8_e8m0fnu", "bfloat16")])
def test_on_tensor_cores(monkeypatch, form, dtype):
    monkeypatch.setattr(op, "_version", lambda *args: ("mma", "chosen by the test"))
    matrices, stacked, w = _experts(form, 5, 40, 2120)   # several pieces
    for m, offsets in ((37, RAGGED), (150, [0, 70, 70, 149, 149, 150])):
        x = _x(m, 2120, dtype)
        _assert_right(x, matrices, stacked, w, offsets)
        _assert_right(x, matrices, stacked, w, offsets, bias=_x(5, 40, "float32"))


def test_every_kind_of_array(xp):
    matrices, stacked, w = _experts("int4 zero float16", 5, 40, 328)
    x, held = _x(37, 328, "float16"), _x(37, 40, "float16")
    out = xp.array(held)
    got = cupyattn.quant_gemm(xp.array(x), stacked.to(xp.module), expert_offsets=xp.array(np.int32(RAGGED)), out=out,
                              accumulate=True)
    assert got is out
    want = np.concatenate([x[a:b].astype(np.float64) @ w[e].T for e, (a, b) in enumerate(zip(RAGGED, RAGGED[1:],
                                                                                           strict=False))]) + held
    assert np.linalg.norm(xp.numpy(out) - want) <= 3e-4 * np.linalg.norm(want)
    one = stacked.to(xp.module).expert(2)
    assert repr(one) == repr(matrices[2])
    assert_same_bits(xp.numpy(one.matmul(xp.array(x[3:20]))), xp.numpy(stacked.to(xp.module).matmul(
        xp.array(x), expert_offsets=xp.array(np.int32(RAGGED))))[3:20])


def test_offsets_are_never_read_on_the_host():
    _, stacked, w = _experts("int4 zero float16", 5, 40, 328)
    with install() as xp:
        there, stream = stacked.to(xp.module), xp.module.cuda.Stream(non_blocking=True)
        x, offsets, out = xp.array(_x(37, 328, "float16")), xp.array(np.int32(RAGGED)), xp.array(_x(37, 40, "float16"))
        with stream:
            cupyattn.quant_gemm(x, there, expert_offsets=offsets, out=out)
            stream.begin_capture()
            cupyattn.quant_gemm(x, there, expert_offsets=offsets, out=out)
            graph = stream.end_capture()
        for changed in (RAGGED, [0, 37, 37, 37, 37, 37], [0, 1, 2, 3, 4, 37]):
            offsets.set(np.int32(changed))
            graph.launch(stream)
            for e in range(5):
                rows = slice(changed[e], changed[e + 1])
                np.testing.assert_allclose(out.get()[rows], x.get()[rows].astype(np.float64) @ w[e].T, 1e-2, 1e-2)


@pytest.mark.parametrize("offsets", [[0, 9, 4, 20, 21, 37], [5, 6, 7, 8, 9, 99], [-3, 2, 2, 2, 2, 2], [2**31 - 1] * 6])
def test_wild_offsets_stay_inside(monkeypatch, offsets):
    """On a GPU nothing looks at offsets before the kernel does: each is at least the one before and inside x."""
    monkeypatch.setattr(op, "_check_offsets", lambda *args: None)
    matrices, stacked, _ = _experts("int4 zero float16", 5, 40, 328)
    x = _x(37, 328, "float16")
    kept = [int(n) for n in np.maximum.accumulate(np.clip(offsets, 0, 37))]
    for version in (("core", ""), ("mma", "")):
        monkeypatch.setattr(op, "_version", lambda *args, version=version: version)
        held = np.full((37, 40), 7, np.float32)
        with settings(check=True):
            out = cupyattn.quant_gemm(x, stacked, expert_offsets=np.int32(offsets), out=held.copy())
            assert_same_bits(out, _one_by_one(x, matrices, kept, held))


@pytest.mark.parametrize("version", ["core", "mma"])
def test_many_experts_are_searched_by_all_lanes(monkeypatch, version):
    """70 of them: runs of three a lane, and lanes without any. No thread reads the offsets of all."""
    monkeypatch.setattr(op, "_version", lambda *args: (version, "chosen by the test"))
    matrices, stacked, _ = _experts("int4 zero float16", 70, 8, 64)
    sizes = np.random.default_rng(2).integers(0, 12, 70) * (np.arange(70) % 3 > 0)
    offsets = np.concatenate([[2], 2 + np.cumsum(sizes)])
    x = _x(offsets[-1] + 5, 64, "float16")
    held = np.full((len(x), 8), 7, np.float32)
    for check in (False, True):   # whose build may round otherwise
        with settings(check=check):
            want = _one_by_one(x, matrices, offsets, held.copy())
            with counters() as collected:
                out = cupyattn.quant_gemm(x, stacked, expert_offsets=np.int32(offsets), out=held.copy())
        assert_same_bits(out, want)
    (launched,) = collected
    loads = launched.buffers["experts.offsets"]["bytes_read"] / 4 / launched.counts["threads"]
    assert 3 < loads <= 3 + 3 + 3 + 2, loads


def test_columns_in_one_order_and_several_segments():
    order = np.random.default_rng(1).permutation(416).astype(np.int32)
    coded = []
    for e in range(3):
        parts = (coded_weight(f"int{bits} plain float16", 24, k, 32, seed=e) for bits, k in ((6, 96), (4, 320)))
        coded.append(CodedWeight("mixed", (24, 416), tuple(part.segments[0] for part in parts), order))
    matrices = [QMatrix.from_coded(weight) for weight in coded]
    w = np.stack([weight.dequantize() for weight in coded])
    for dtype in ("float16", "float32"):
        _assert_right(_x(20, 416, dtype), matrices, QMatrix.stack(matrices), w, [0, 11, 12, 20])


@pytest.mark.parametrize("version", ["core", "mma"])
@pytest.mark.parametrize("m, offsets", [(37, [0, 3, 20, 37]), (200, [0, 70, 70, 200])])
def test_sums_that_do_not_fit_the_workspace(monkeypatch, version, m, offsets):
    """Rounds of launches, each for as many tiles as fit, at least for one: the same bits."""
    monkeypatch.setattr(op, "_version", lambda *args: (version, "chosen by the test"))
    coded, order = [], np.random.default_rng(1).permutation(2144).astype(np.int32)
    for e in range(3):
        parts = (coded_weight(f"int{bits} plain float16", 40, k, 32, seed=e) for bits, k in ((6, 96), (4, 2048)))
        coded.append(CodedWeight("mixed", (40, 2144), tuple(part.segments[0] for part in parts), order))
    matrices, x = [QMatrix.from_coded(weight) for weight in coded], _x(m, 2144, "float16")
    stacked = QMatrix.stack(matrices)
    whole = _assert_right(x, matrices, stacked, np.stack([weight.dequantize() for weight in coded]), offsets)
    launch, workspace, launched, taken = op.launch, op.workspace, [], []
    monkeypatch.setattr(op, "launch", lambda plan, args: (launched.append(plan), launch(plan, args)))
    monkeypatch.setattr(op, "workspace", lambda xp, nbytes: (taken.append(nbytes), workspace(xp, nbytes))[1])

    def again(most):
        """(Tiles of a launch, launches for the two segments, bytes of sums) with `most` bytes for these."""
        monkeypatch.setattr(op, "_WORKSPACE_BYTES", most)
        op._launches.cache_clear()
        del launched[:], taken[:]
        got = cupyattn.quant_gemm(x, stacked, expert_offsets=np.int32(offsets), out=np.full_like(whole, np.nan))
        assert_same_bits(got, whole)
        gather, *products = launched
        assert {plan.grid[1] for plan in products} == {products[0].grid[1]}
        return products[0].grid[1], len(products), taken[0] - 2 * m * stacked.order.size

    tiles, launches, most = again(2**26)
    assert tiles > 2 and launches == 2
    assert again(most) == (tiles, 2, most)
    for parts in (2, 3):
        at_once, launches, sums = again(most // parts)
        assert sums <= most // parts and launches == 2 * -(-tiles // at_once) >= 2 * parts
    assert again(1) == (1, 2 * tiles, most // tiles)
    op._launches.cache_clear()


@pytest.mark.parametrize("version", ["core", "mma"])
def test_quant_gemm_experts_checked(monkeypatch, version):
    monkeypatch.setattr(op, "_version", lambda *args: (version, "chosen by the test"))
    matrices, stacked, w = _experts("int4 zero float16", 3, 24, 1096)
    x, found = _x(12, 1096, "float16"), []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        with settings(check=True, schedule=schedule, seed=seed):
            found.append(_assert_right(x, matrices, stacked, w, [0, 9, 9, 12]))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@hypothesis_settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 19), min_size=1, max_size=7), before=st.integers(0, 2), after=st.integers(0, 2))
def test_any_sizes(sizes, before, after):
    matrices, stacked, w = _experts("int4 zero float16", len(sizes), 24, 72)
    offsets = np.cumsum([before, *sizes]).tolist()
    m = offsets[-1] + after
    x = _x(m, 72, "float32")
    out = cupyattn.quant_gemm(x, stacked, expert_offsets=np.int32(offsets), out=np.full((m, 24), 7, np.float32))
    assert_same_bits(out, _one_by_one(x, matrices, offsets, np.full((m, 24), 7, np.float32)))


def test_errors():
    matrices, stacked, _ = _experts("int4 zero float16", 5, 40, 328)
    x = _x(37, 328, "float16")
    with pytest.raises(TypeError, match="expert_offsets must be given with a QExperts and with nothing else, got none"):
        cupyattn.quant_gemm(x, stacked)
    with pytest.raises(TypeError, match="got some with a QMatrix"):
        cupyattn.quant_gemm(x, matrices[0], expert_offsets=np.int32([0, 37]))
    with pytest.raises(ValueError, match=r"expert_offsets must be \[experts \+ 1\] = \[6\], got \[5\]"):
        cupyattn.quant_gemm(x, stacked, expert_offsets=np.int32(RAGGED[:-1]))
    with pytest.raises(TypeError, match="expert_offsets must be int32, got int64"):
        cupyattn.quant_gemm(x, stacked, expert_offsets=np.array(RAGGED))
    with pytest.raises(ValueError, match=r"must rise from 0 or more to at most 37 tokens, got \[0, 9, 4"):
        cupyattn.quant_gemm(x, stacked, expert_offsets=np.int32([0, 9, 4, 20, 21, 37]))
    with pytest.raises(ValueError, match=r"x must be \[tokens, in_features\] of at most"):
        cupyattn.quant_gemm(x[None], stacked, expert_offsets=np.int32(RAGGED))
    with pytest.raises(ValueError, match=r"bias must be \[experts, out_features\] = \[5, 40\], got \[40\]"):
        cupyattn.quant_gemm(x, stacked, expert_offsets=np.int32(RAGGED), bias=np.zeros(40, np.float32))
    with pytest.raises(ValueError, match="must agree in format and shape"):
        QMatrix.stack([matrices[0], QMatrix.from_coded(coded_weight("int4 zero float16", 24, 328))])
    with pytest.raises(ValueError, match="at least one QMatrix"):
        QMatrix.stack([])
    assert repr(stacked) == f"QExperts(int4 zero float16, 5 of 40x328, {stacked.nbytes} bytes)" and len(stacked) == 5
    assert stacked.nbytes == sum(matrix.nbytes for matrix in matrices)


def test_the_reference():
    _, stacked, _ = _experts("int4 zero float16", 5, 24, 96)
    x, bias, held = _x(40, 96, "float32"), _x(5, 24, "float32"), _x(40, 24, "float32")
    for options in ({}, {"bias": bias}, {"bias": bias, "accumulate": True}):
        want = expected_gemm(x, stacked, expert_offsets=RAGGED, out=held, **options)
        out = cupyattn.quant_gemm(x, stacked, expert_offsets=np.int32(RAGGED), out=held.copy(), **options)
        assert_close(out, want, 1e-4, 1e-5)
        assert_same_bits(out[37:], held[37:])
    nowhere = expected_gemm(x, stacked, expert_offsets=RAGGED)
    assert np.isnan(nowhere[37:]).all() and not np.isnan(nowhere[:37]).any()


@pytest.mark.parametrize("form", ["int4 zero float16", "int6 plain int8 float16", "nf4 plain float32"])
def test_saved_and_loaded(form, tmp_path, xp):
    _, stacked, w = _experts(form, 3, 24, 96)
    stacked.to(xp.module).save(tmp_path / "experts.safetensors")
    loaded = QExperts.load(tmp_path / "experts.safetensors", xp=xp.module)
    assert loaded.xp is xp.module and (loaded.shape, loaded.format) == (stacked.shape, stacked.format)
    for e in range(3):
        assert_same_bits(xp.numpy(loaded.expert(e).reconstruct()), w[e].astype(np.float32))
    with pytest.raises(ValueError, match="QMatrix: path must be a file of QMatrix.save"):
        QMatrix.load(tmp_path / "experts.safetensors")


def test_experts_of_one_tensor():
    """Blocks as gpt-oss keeps them: [experts, out, in / 32, 16]."""
    blocks = rng.integers(0, 256, (3, 32, 4, 16), np.uint8)
    scales = rng.integers(120, 130, (3, 32, 4), np.uint8)
    whole = QMatrix.from_mxfp4({"blocks": blocks, "scales": scales})
    stacked = QMatrix.stack([whole.row_shard(e, 3) for e in range(3)])
    assert stacked.shape == (3, 32, 128)
    for e in range(3):
        alone = QMatrix.from_mxfp4({"blocks": blocks[e], "scales": scales[e]})
        assert_same_bits(stacked.expert(e).reconstruct(), alone.reconstruct())
