# SPDX-License-Identifier: Apache-2.0
"""The tensor-core kernels of quant_gemm, which plans choose on GPUs only, on the CPU executor."""

import dataclasses
import functools
import importlib
import itertools

import numpy as np
import pytest
import test_fixtures
from coded_weights import FORMS, coded_weight
from compare import assert_same_bits, dtype_of, poison

import cupyattn
from cupyattn import QMatrix
from cupyattn.matmul import plans as matmul_plans
from cupyattn.quant.coded import CodedWeight
from cupyattn.quant.layout import Form
from cupyattn.runtime import arrival_counters
from cupyattn.runtime.cpu import settings

op = importlib.import_module("cupyattn.ops.quant_gemm")
SCHEDULES = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch):
    monkeypatch.setattr(op, "_version", lambda *args: ("mma", "chosen by the test"))
    monkeypatch.setattr(op, "INVARIANT_TOKENS", 2**30, raising=False)   # never BLAS


@functools.lru_cache(maxsize=64)
def _weight(form, n, k, group=None):
    """(QMatrix, its weights in float64)."""
    if form in ("float16", "bfloat16"):
        w = np.random.default_rng((n, k)).standard_normal((n, k)).astype(dtype_of(form))
        return QMatrix.from_dense(w), w.astype(np.float64)
    coded = coded_weight(form, n, k, group)
    return QMatrix.from_coded(coded), coded.dequantize()


def _x(m, k, dtype, seed=0):
    return np.random.default_rng((m, k, seed)).standard_normal((m, k)).astype(dtype_of(dtype))


def _product(x, matrix, dtype="float32", **options):
    out = poison(np.empty((len(x), matrix.shape[0]), dtype_of(dtype)))
    cupyattn.quant_gemm(x, matrix, out=out, **options)
    assert not arrival_counters(np, 0).any()
    return out


def _error(got, want):
    return np.linalg.norm(np.asarray(got).astype(np.float64) - want) / np.linalg.norm(want)


def _assert_right(matrix, w, m, dtype):
    x = _x(m, w.shape[1], dtype)
    got = _product(x, matrix)
    assert _error(got, x.astype(np.float64) @ w.T) <= 1e-5
    return got


@pytest.mark.parametrize("form, dtype", [
    *((form, ("float16", "bfloat16")[i % 2]) for i, form in enumerate(FORMS)),
    *((form, ("bfloat16", "float16")[list(FORMS).index(form) % 2]) for form in
      ("int2 plain float16", "int3 plain float16", "int4 plain float16", "int5 plain float16", "int6 plain float16",
       "int8 plain float16", "iq4 plain float16", "nf4 plain float32", "fp4 plain float32", "e4m3 plain float32",
       "e2m1 plain float8_e8m0fnu", "e5m2 plain float16")),
    ("float16", "float16"), ("bfloat16", "bfloat16")])
def test_every_form(form, dtype):
    matrix, w = _weight(form, 40, 320)
    _assert_right(matrix, w, 3, dtype)
    columns = [0, 1, 2, 3, 4, 15, 16, 63, 64, 127, 128, 319]
    x = np.zeros((len(columns), 320), dtype_of(dtype))
    x[range(len(columns)), columns] = 1
    got = np.concatenate([_product(part, matrix) for part in (x[:8], x[8:])])   # the same kernel as above
    wide = ("nf4", "fp4") if "float32" in form else ()
    if form.startswith(wide or "-") or form in ("e2m1 plain float8_e4m3fn float32", "int8 minimum float32"):
        # more digits than float32, or two mmas, have: not exact, but close
        np.testing.assert_allclose(got, w[:, columns].T, rtol=0, atol=2.0**-17 * np.abs(w).max())
    else:
        np.testing.assert_array_equal(got, w[:, columns].T.astype(np.float32))


@pytest.mark.parametrize("form, dtype", [("int4 zero float16", "float16"), ("int6 plain int8 float16", "bfloat16"),
                                         ("int5 minimum int8 float16", "float16"), ("float16", "float16"),
                                         ("int4 zero float16", "bfloat16"),
                                         ("int4 minimum int8 float16", "float16"), ("nf4 plain float32", "float16"),
                                         ("e2m1 plain float8_e4m3fn float32", "bfloat16")])
def test_a_row_has_the_same_bits_whatever_stands_around_it(form, dtype):
    matrix, w = _weight(form, 136, 1088)
    whole = _assert_right(matrix, w, 130, dtype)     # three tiles of 64, of several pieces
    x = _x(130, 1088, dtype)
    for start, stop in ((0, 1), (129, 130), (5, 7), (3, 11), (1, 10), (7, 23), (10, 40), (9, 73)):
        assert_same_bits(_product(x[start:stop], matrix), whole[start:stop])


@pytest.mark.parametrize("n, k, group", [(1, 64, 64), (8, 8, 8), (65, 72, 128), (129, 200, 128), (100, 520, 256),
                                         (16, 8256, 64), (40, 1000, 1000), (24, 640, 48)])
def test_odd_sizes(n, k, group):
    matrix, w = _weight("int4 zero float16", n, k, group)
    for m in (1, 9, 33, 130):
        _assert_right(matrix, w, m, "float16")


@pytest.mark.parametrize("dtype, bound", [("float16", 3e-4), ("bfloat16", 2e-3)])
def test_bias_accumulate_and_out(dtype, bound):
    matrix, w = _weight("int4 plain float16", 72, 1088)
    x, held, bias = _x(9, 1088, dtype), _x(9, 72, dtype, 1), _x(1, 144, dtype, 2)[0][::2]
    want = x.astype(np.float64) @ w.T + bias.astype(np.float64)
    assert _error(_product(x, matrix, dtype, bias=bias), want) <= bound
    base = np.full((9, 100), np.nan, dtype_of(dtype))
    base[:, 5:77] = held
    cupyattn.quant_gemm(x, matrix, bias=bias, accumulate=True, out=base[:, 5:77])
    assert _error(base[:, 5:77], want + held.astype(np.float64)) <= bound
    assert np.isnan(base[:, :5].astype(np.float32)).all() and np.isnan(base[:, 77:].astype(np.float32)).all()


@pytest.mark.parametrize("form", ["nf4 plain float32", "fp4 plain float32", "iq4 plain float16"])
@pytest.mark.parametrize("dtype, bound", [("float16", 3e-4), ("bfloat16", 2e-3)])
def test_tables_into_narrow_outputs(form, dtype, bound):
    matrix, w = _weight(form, 72, 1088)
    x = _x(12, 1088, dtype)
    whole = _product(x, matrix, dtype)
    assert _error(whole, x.astype(np.float64) @ w.T) <= bound
    assert_same_bits(_product(x[4:7], matrix, dtype), whole[4:7])


def _mixed(n, parts, seed=3):
    """A weight of several segments whose columns are x's in a random order."""
    rng = np.random.default_rng(seed)
    coded = [coded_weight(form, n, k, group) for form, k, group in parts]
    k = sum(part.shape[1] for part in coded)
    return CodedWeight("mixed", (n, k), tuple(part.segments[0] for part in coded), rng.permutation(k).astype(np.int32))


def test_segments_share_their_sums():
    coded = _mixed(72, (("int6 plain float16", 96, 32), ("int4 plain float16", 1184, 32),
                        ("int3 plain float16", 320, 64)))
    matrix, w = QMatrix.from_coded(coded), coded.dequantize()
    whole = _assert_right(matrix, w, 20, "float16")
    assert_same_bits(_product(_x(20, 1600, "float16")[3:8], matrix), whole[3:8])


def test_nan_and_infinity_stay_in_their_row():
    matrix, _ = _weight("int4 zero float16", 24, 96)
    for m in (8, 20):
        x = _x(m, 96, "float16")
        clean = _product(x, matrix)
        x[2, 5], x[m - 1, 95] = np.nan, np.inf
        got = _product(x, matrix)
        assert np.isnan(got[2]).all() and not np.isfinite(got[m - 1]).any()
        rest = [i for i in range(m) if i not in (2, m - 1)]
        assert_same_bits(got[rest], clean[rest])


def test_columns_past_the_last_are_never_seen():
    matrix, _ = _weight("int4 zero float16", 24, 72, 128)
    for m in (3, 20):
        base = np.full((m + 2, 128), np.nan, np.float16)
        base[1:-1, 16:88] = _x(m, 72, "float16")
        assert_same_bits(_product(base[1:-1, 16:88], matrix), _product(_x(m, 72, "float16"), matrix))


def test_outliers_and_partial_sums_past_float16():
    matrix, w = _weight("int8 plain float16", 24, 1632)
    x = _x(2, 1632, "float16")
    x[:, ::200] *= 100
    assert _error(_product(x, matrix, "float16"), x.astype(np.float64) @ w.T) <= 3e-4
    ones = QMatrix.from_dense(np.concatenate([np.ones((8, 800)), -np.ones((8, 792))], axis=1).astype(np.float16))
    got = _product(np.full((1, 1592), 1000, np.float16), ones, "float16")
    np.testing.assert_array_equal(got, np.full((1, 8), 8000, np.float16))


def test_scales_that_vary_between_neighbouring_groups():
    for group in (16, 32, 64, 128, 256, 1088):
        coded = coded_weight("int4 plain float16", 24, 1088, group)
        coded.segments[0].scale[:, ::2] *= np.float16(2.0**-12)
        _assert_right(QMatrix.from_coded(coded), coded.dequantize(), 2, "float16")


@pytest.mark.parametrize("form, dtype", [("int4 zero float16", "float16"), ("int6 plain int8 float16", "bfloat16"),
                                         ("int3 plain float16", "float16"), ("bfloat16", "bfloat16")])
def test_checked(form, dtype):
    matrix, w = _weight(form, 40, 1088)
    for m in (3, 17):
        x = _x(m, 1088, dtype)
        want = _product(x, matrix)
        for schedule, seed in SCHEDULES:
            with settings(check=True, schedule=schedule, seed=seed):
                assert_same_bits(_product(x, matrix), want)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_on_several_os_threads(workers):
    matrix, _ = _weight("int4 zero float16", 136, 8256)
    x = _x(5, 8256, "float16")
    want = _product(x, matrix)
    for schedule, seed in SCHEDULES:
        with settings(workers=workers, schedule=schedule, seed=seed):
            assert_same_bits(_product(x, matrix), want)


@pytest.mark.parametrize("tiles_per_scale", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("rows, column_tiles", [(8, 1), (8192, 128), (28672, 128), (1024, 65), (4096, 224), (64, 4097)])
def test_pieces_and_chunks_cover_the_columns(rows, column_tiles, tiles_per_scale):
    cut = matmul_plans.partition(rows, column_tiles, Form(4, "int", 8, "float16", tiles_per_scale=tiles_per_scale))
    assert cut.unit == (1 if tiles_per_scale % 2 else 2) and cut.tiles_per_piece % cut.unit == 0
    assert 0 < column_tiles - (cut.pieces - 1) * cut.tiles_per_piece <= cut.tiles_per_piece
    assert 8 * cut.units_per_chunk * cut.unit >= cut.tiles_per_piece
    assert cut.pieces == 1 or cut.tiles_per_piece >= 8


@pytest.mark.parametrize("rows, column_tiles, pieces",
                         [(8192, 128, 2), (4096, 64, 4), (28672, 128, 1), (1024, 128, 8)])
def test_two_blocks_for_each_of_132_multiprocessors(rows, column_tiles, pieces):
    assert matmul_plans.partition(rows, column_tiles, Form(4, "int", 8, "float16", tiles_per_scale=2)).pieces == pieces


@pytest.mark.parametrize("spec", list(matmul_plans.mma_specs(core=True)), ids=str)
def test_shared_memory_fits_everywhere(spec):
    constants = dict(spec.constants)
    form = next(form for form in matmul_plans._FORMS if form.trait == constants["FORMAT"])
    plan = matmul_plans.plan_mma(constants["M_TILE"], 4096, 2, constants["UNIT"], form, "float16", "float16", "float32",
                                 "sm_120a", "")
    assert plan.shared_bytes <= 99 * 1024 and "pieces" in repr(plan)


def _forms():
    """Forms of all fixtures, of what `quantize` makes, of every type in dequant.cuh; of all these with wide scales."""
    found = {}
    for name in test_fixtures.NAMES:
        for segment in QMatrix.from_coded(test_fixtures.read(name)[0]).segments:
            found.setdefault(segment.form)
    w = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    for scheme in ("int4", "int8-g16", "int8-g16-asym", "int4-g32-asym", "fp8", "nf4-g16", "mxfp4", "nvfp4"):
        for scale in (1, 1e-7):
            for segment in QMatrix.quantize(w * np.float32(scale), scheme).segments:
                found.setdefault(segment.form)
    found.update(dict.fromkeys(matmul_plans._FORMS))
    for form in list(found):
        if form.scale in ("float16", "bfloat16", "float32"):
            for mode, groups in itertools.product(("PLAIN", "ZERO", "MINIMUM"), (1, 2, 4)):
                found.setdefault(dataclasses.replace(form, scale="float32", mode=mode, groups=groups))
    return [form for form in found if form.kind != "float32"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_form_fits_the_smallest_gpu_and_keeps_48_KiB_on_their_way():
    """A block of sm_86, sm_89 and sm_120 has 99 KiB; two blocks share 228 KiB less 1 KiB each on sm_90."""
    forms = _forms()
    assert len(forms) > 60 and Form(8, "int", 128, "float32", "ZERO", 4) in {
        dataclasses.replace(form, tiles_per_scale=1, group=0) for form in forms}
    for form, m_tile in itertools.product(forms, (8, 16, 32, 64)):
        row_tiles, warps, stages, shared = matmul_plans.shape_of(form, m_tile)
        assert shared <= 96 * 1024 and stages >= 2, form
        if m_tile == 8:
            assert matmul_plans.in_flight(form, row_tiles, warps, stages) >= 48 * 1024, form


def test_large_scales_of_small_groups():
    """Two stages of four row tiles do not fit; segments that do share the shape of the one that does not."""
    form = "int8 minimum float32"
    matrix, w = _weight(form, 72, 1088, 16)
    assert matmul_plans.shape_of(matrix.segments[0].form, 8)[0] == 2
    _assert_right(matrix, w, 3, "float16")
    _assert_right(matrix, w, 70, "bfloat16")
    coded = _mixed(72, (("int4 plain float16", 320, 32), (form, 640, 16), ("int3 plain float16", 640, 64)))
    matrix, w = QMatrix.from_coded(coded), coded.dequantize()
    for m in (3, 20):
        _assert_right(matrix, w, m, "float16")
