# SPDX-License-Identifier: Apache-2.0
import functools
import importlib

import numpy as np
import pytest
from coded_weights import FORMS, SOME, coded_weight
from compare import assert_close, assert_same_bits, dtype_of, poison
from ggml_blocks import quantized
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn import QMatrix
from cupyattn.quant.coded import CodedWeight
from cupyattn.reference.quant_gemm import quant_gemm as expected_gemm
from cupyattn.runtime.cpu import settings

op = importlib.import_module("cupyattn.ops.quant_gemm")
FORMATS = ("q4_0", "q4_1", "q8_0", "float16", "bfloat16", "float32")
# relative Frobenius error by output type
BOUND = {"float32": 1e-5, "float16": 3e-4, "bfloat16": 2e-3}
SCHEDULES = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))
rng = np.random.default_rng(11)


@functools.lru_cache(maxsize=128)
def _weight(format, n, k, group=None):
    """(QMatrix, its weights by an independent decoder, float32 or, of coded weights, float64)."""
    if format in FORMS:
        weight = coded_weight(format, n, k, group)
        return QMatrix.from_coded(weight), weight.dequantize()
    w = np.random.default_rng((n, k)).standard_normal((n, k)).astype(np.float32)
    if format.startswith("q"):
        raw, values = quantized(format.upper(), w)
        return QMatrix.from_gguf(raw, format, (n, k)), values
    dense = w.astype(dtype_of(format))
    return QMatrix.from_dense(dense), dense.astype(np.float32)


def _error(got, want):
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def _x(m, k, dtype):
    return rng.standard_normal((m, k)).astype(dtype_of(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype, out_dtype", [("float16", "float16"), ("float16", "float32"), ("bfloat16", "bfloat16"),
                                              ("float32", "float32")])
def test_against_gguf(xp, format, dtype, out_dtype):
    matrix, w = _weight(format, 80, 672)
    x = _x(3, 672, dtype)
    want = x.astype(np.float64) @ w.astype(np.float64).T
    out = poison(xp.array(np.empty((3, 80), dtype_of(out_dtype)))) if xp.name == "numpy" \
        else xp.array(np.full((3, 80), np.nan, dtype_of(out_dtype)))
    got = cupyattn.quant_gemm(xp.array(x), matrix.to(xp.module), out=out)
    assert got is out
    assert _error(xp.numpy(got), want) <= BOUND[out_dtype]
    assert_close(expected_gemm(x, matrix), want, 1e-12, 1e-12)


@pytest.mark.parametrize("m", [0, 1, 2, 3, 7, 8, 9, 17, 33])
@pytest.mark.parametrize("format", ["q4_1", "q8_0"])
def test_rows_of_x(xp, m, format):
    matrix, w = _weight(format, 40, 96)
    x = _x(m, 96, "float32")
    got = cupyattn.quant_gemm(xp.array(x), matrix.to(xp.module))
    assert got.shape == (m, 40) and got.dtype == np.float32
    if m:
        assert _error(xp.numpy(got), x.astype(np.float64) @ w.astype(np.float64).T) <= 1e-5


def _mixed(rows=24):
    """A weight of three segments of different bits in shuffled columns, and its float64 values."""
    parts = [coded_weight(f"int{bits} plain float16", rows, columns, group=32).segments[0]
             for bits, columns in ((6, 96), (3, 1600), (2, 64))]
    weight = CodedWeight("mixed", (rows, 1760), tuple(parts), rng.permutation(1760).astype(np.int32))
    return QMatrix.from_coded(weight), weight.dequantize()


@pytest.mark.parametrize("form", SOME)
def test_forms(xp, form):
    matrix, w = _weight(form, 40, 328)
    x = _x(2, 328, "float16")
    got = cupyattn.quant_gemm(xp.array(x), matrix.to(xp.module), out=xp.array(np.full((2, 40), np.nan, np.float32)))
    assert _error(xp.numpy(got), x.astype(np.float64) @ w.T) <= 1e-5
    assert_close(expected_gemm(x, matrix), x.astype(np.float64) @ w.T, 1e-12, 1e-12)


@pytest.mark.parametrize("group", [24, 96, 192])
def test_groups_of_any_size(xp, group):
    matrix, w = _weight("int4 zero float16", 40, 328, group)
    x = _x(3, 328, "float32")
    got = cupyattn.quant_gemm(xp.array(x), matrix.to(xp.module))
    assert _error(xp.numpy(got), x.astype(np.float64) @ w.T) <= 1e-5


@pytest.mark.parametrize("dtype, out_dtype", [("float16", "bfloat16"), ("float32", "float32")])
def test_several_segments_in_any_order(xp, dtype, out_dtype):
    matrix, w = _mixed()
    x, bias, held = _x(5, 1760, dtype), _x(1, 24, "float32")[0], _x(5, 24, out_dtype)
    out = xp.array(held)
    cupyattn.quant_gemm(xp.array(x), matrix.to(xp.module), bias=xp.array(bias), accumulate=True, out=out)
    want = x.astype(np.float64) @ w.T + bias + held.astype(np.float64)
    assert _error(xp.numpy(out), want) <= BOUND[out_dtype]
    alone = xp.array(held[3:4])
    matrix.to(xp.module).matmul(xp.array(x[3:4]), bias=xp.array(bias), accumulate=True, out=alone)
    assert_same_bits(xp.numpy(out)[3:4], xp.numpy(alone))


def test_one_hot_rows_of_several_segments():
    matrix, w = _mixed()
    columns = [0, 95, 96, 500, 1695, 1696, 1759]
    columns = [*columns, *matrix.order[[0, 127, 128, 1000, -1]][[0, 2, 3, 4]]]
    x = np.zeros((len(columns), 1760), np.float32)
    x[range(len(columns)), columns] = 1
    np.testing.assert_array_equal(cupyattn.quant_gemm(x, matrix), w[:, columns].T)


_COLUMNS = [0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 1535, 1536, 1695]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_a_one_hot_row_reads_a_column_exactly(format, fused):
    matrix, w = _weight(format, 24, 1696)       # two slices
    x = np.zeros((len(_COLUMNS), 1696), np.float32)
    x[range(len(_COLUMNS)), _COLUMNS] = 1
    with settings(fused=fused):
        np.testing.assert_array_equal(cupyattn.quant_gemm(x, matrix), w[:, _COLUMNS].T)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_one_hot_row_reads_a_column_of_any_form(form, fused):
    matrix, w = _weight(form, 24, 200)
    columns = [0, 1, 7, 8, 15, 16, 63, 64, 127, 128, 199]
    x = np.zeros((len(columns), 200), np.float32)
    x[range(len(columns)), columns] = 1
    with settings(fused=fused):
        got = cupyattn.quant_gemm(x, matrix)
    # a number of 24 bits times a scale of 24 is rounded, and so is a product of two scales
    exact = not form.startswith(("nf4", "fp4")) and "float32" not in form
    np.testing.assert_allclose(got, w[:, columns].T, rtol=0 if exact else 2.0**-23)


def _assert_batch_invariant(matrix, x):
    def product(rows):
        return cupyattn.quant_gemm(rows, matrix, out=np.empty((len(rows), matrix.shape[0]), np.float32))

    whole = product(x)
    for start, stop in ((0, 1), (16, 17), (3, 5), (3, 6), (1, 9), (2, 14)):
        assert_same_bits(whole[start:stop], product(x[start:stop]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("format", [*FORMATS, "int3 plain bfloat16", "int6 plain int8 float16", "nf4 plain float32"])
def test_a_row_has_the_same_bits_whatever_stands_around_it(format, fused):
    with settings(fused=fused):
        _assert_batch_invariant(_weight(format, 136, 1632)[0], _x(17, 1632, "float16"))


def test_bias_accumulate_and_out_dtype(xp):
    matrix, w = _weight("q4_1", 40, 96)
    x, held = _x(5, 96, "float16"), _x(5, 40, "float32")
    for bias in (_x(1, 40, "float32")[0], _x(1, 40, "float16")[0]):
        out = xp.array(held)
        matrix.to(xp.module).matmul(xp.array(x), bias=xp.array(bias), accumulate=True, out=out)
        want = expected_gemm(x, matrix, bias=bias, accumulate=True, out=held)
        assert_close(xp.numpy(out), want, 1e-5, 1e-6)
    reversed_bias = xp.array(np.repeat(bias, 2))[::2]
    assert_close(xp.numpy(cupyattn.quant_gemm(xp.array(x), matrix.to(xp.module), bias=reversed_bias)),
                 expected_gemm(x, matrix, bias=bias), 1e-3, 2.0**-11)


def test_strided_and_offset_views(xp):
    matrix, _ = _weight("q8_0", 40, 96)
    base = _x(6, 120, "bfloat16")
    want = expected_gemm(base[::2, 5:101], matrix)
    got = cupyattn.quant_gemm(xp.array(base)[::2, 5:101], matrix.to(xp.module))
    assert _error(xp.numpy(got), want) <= BOUND["bfloat16"]
    out = xp.array(np.full((3, 50), np.nan, np.float32))
    cupyattn.quant_gemm(xp.array(base)[::2, 5:101], matrix.to(xp.module), out=out[:, 3:43])
    host = xp.numpy(out)
    assert _error(host[:, 3:43], want) <= 1e-5
    assert np.isnan(host[:, :3]).all() and np.isnan(host[:, 43:]).all()
    one = cupyattn.quant_gemm(xp.array(base)[2, 5:101], matrix.to(xp.module))
    assert_same_bits(xp.numpy(one), xp.numpy(got)[1])
    three = cupyattn.quant_gemm(xp.array(base[:, 5:101]).reshape(2, 3, 96), matrix.to(xp.module))
    assert three.shape == (2, 3, 40)


@pytest.mark.parametrize("format", ["q4_1", "int4 zero float16", "e4m3 plain float32", "int5 minimum float16"])
def test_nan_and_infinity_stay_in_their_row(format):
    matrix, _ = _weight(format, 24, 96, None if format == "q4_1" else 24)
    x = _x(9, 96, "float16")
    clean = cupyattn.quant_gemm(x, matrix)
    x[2, 5], x[7, 95] = np.nan, np.inf
    got = cupyattn.quant_gemm(x, matrix)
    assert np.isnan(got[2]).all() and not np.isfinite(got[7]).any()
    rest = [i for i in range(9) if i not in (2, 7)]
    assert_same_bits(got[rest], clean[rest])


def test_outliers_and_partial_sums_past_float16():
    matrix, w = _weight("q8_0", 24, 1632)
    x = _x(2, 1632, "float16")
    x[:, ::200] *= 100
    assert _error(cupyattn.quant_gemm(x, matrix), x.astype(np.float64) @ w.astype(np.float64).T) <= 3e-4
    ones = QMatrix.from_dense(np.concatenate([np.ones((8, 800)), -np.ones((8, 792))], axis=1).astype(np.float16))
    got = cupyattn.quant_gemm(np.full((1, 1592), 1000, np.float16), ones)
    np.testing.assert_array_equal(got, np.full((1, 8), 8000, np.float16))


def test_errors():
    matrix, _ = _weight("q4_1", 40, 96)
    x = np.zeros((2, 96), np.float16)
    with pytest.raises(TypeError, match="qmatrix must be a QMatrix, got ndarray"):
        cupyattn.quant_gemm(x, np.zeros((40, 96), np.float16))
    with pytest.raises(ValueError, match=r"x must be \[..., in_features=96\], got \[2, 95\]"):
        cupyattn.quant_gemm(x[:, :95], matrix)
    with pytest.raises(TypeError, match="x must be float16 or bfloat16 or float32, got float64"):
        cupyattn.quant_gemm(x.astype(np.float64), matrix)
    with pytest.raises(ValueError, match=r"bias must be \[out_features\] = \[40\], got \[39\]"):
        cupyattn.quant_gemm(x, matrix, bias=np.zeros(39, np.float32))
    with pytest.raises(TypeError, match="bias must be float32 or float16, got bfloat16"):
        cupyattn.quant_gemm(x, matrix, bias=np.zeros(40, dtype_of("bfloat16")))
    with pytest.raises(ValueError, match="out must be given with accumulate=True"):
        cupyattn.quant_gemm(x, matrix, accumulate=True)
    with pytest.raises(ValueError, match="x must have a contiguous last axis"):
        cupyattn.quant_gemm(np.zeros((96, 2), np.float16).T, matrix)
    with pytest.raises(ValueError, match=r"out must be \[..., out_features\] = \[2, 40\], got \[2, 41\]"):
        cupyattn.quant_gemm(x, matrix, out=np.zeros((2, 41), np.float16))


@pytest.mark.parametrize("format, x, arch, why", [
    ("q4_1", "float16", "sm_90a", None), ("bfloat16", "bfloat16", "sm_120a", None),
    ("q4_1", "float16", "sm_75", "sm_75 is older than sm_80"),
    ("q4_1", "float32", "sm_90a", "float32 is not rounded"),
    ("float16", "bfloat16", "sm_90a", "float16 weights with bfloat16 x"),
    ("q8_0", "float16", "cpu", "faster version on the CPU")])
def test_the_version_and_why(format, x, arch, why):
    (segment,) = _weight(format, 40, 96)[0].segments
    version = op._version((segment.form.kind,), x, arch)
    assert version[0] == ("core" if why else "mma")
    if why:
        plan = op._plan_quant_gemm(9, 36, segment.form.trait, x, "float32", "float32", 16, arch, version[1])
        assert plan.spec.kernel == "quant_gemm" and why in repr(plan)
        assert plan.shared_bytes <= 49152
        if arch != "cpu":
            assert plan.grid == (36, 2, 1) and plan.block == (128, 1, 1)


@pytest.mark.parametrize("format, dtype", [("q4_0", "float16"), ("q8_0", "float32"), ("float16", "float16"),
                                           ("float32", "float32")])
def test_quant_gemm_checked(format, dtype):
    _assert_clean(format, dtype)


@pytest.mark.parametrize("form", SOME)
def test_forms_checked(form):
    _assert_clean(form, "float16", k=200, schedules=SCHEDULES[::3])


def test_quant_gemm_checked_over_slices():
    _assert_clean("q4_1", "bfloat16", m=17, k=2144, schedules=SCHEDULES[::2])


@pytest.mark.parametrize("schedule, seed", SCHEDULES[:3])
def test_several_segments_checked(schedule, seed):
    matrix, w = _mixed()
    x = _x(3, 1760, "bfloat16")
    with settings(check=True, schedule=schedule, seed=seed):
        got = cupyattn.quant_gemm(x, matrix, out=poison(np.empty((3, 24), np.float32)))
    assert _error(got, x.astype(np.float64) @ w.T) <= 1e-5


def _assert_clean(format, dtype, m=3, k=96, schedules=SCHEDULES):
    matrix, _ = _weight(format, 24, k)
    x = _x(m, k, dtype)
    want = expected_gemm(x, matrix)
    results = []
    for schedule, seed in schedules:
        with settings(check=True, schedule=schedule, seed=seed):
            results.append(cupyattn.quant_gemm(x, matrix, out=poison(np.empty((m, 24), np.float32))))
    assert _error(results[0], want) <= 1e-5
    for other in results[1:]:
        assert_same_bits(other, results[0])


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(m=st.integers(0, 10), n=st.integers(1, 72), groups=st.integers(1, 60), group=st.integers(1, 26),
       format=st.sampled_from(["q4_1", "float16", "int4 zero float16", "int3 plain float16"]),
       offset=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
def test_shapes(m, n, groups, group, format, offset, seed):
    k = 32 * groups if format == "q4_1" else 8 * groups
    matrix, w = _weight(format, n, k, 8 * group)
    x = np.random.default_rng(seed).standard_normal((m, k + offset)).astype(np.float32)[:, offset:]
    got = cupyattn.quant_gemm(x, matrix)
    assert got.shape == (m, n)
    if m:
        assert _error(got, x.astype(np.float64) @ w.astype(np.float64).T) <= 1e-5


def test_more_tokens_than_a_grid_has_rows():
    matrix = QMatrix.from_dense(np.eye(16, 8, dtype=np.float32))
    x = np.arange(8 * (2**18 + 5), dtype=np.float32).reshape(-1, 8)
    np.testing.assert_array_equal(cupyattn.quant_gemm(x, matrix)[:, :8], x)


def test_bias_strides_are_whole_elements():
    matrix = QMatrix.from_dense(np.eye(16, 8, dtype=np.float32))
    bias = np.zeros(16, np.dtype([("b", np.float32), ("pad", np.uint8)]))["b"]
    with pytest.raises(ValueError, match="quant_gemm: bias must have strides that are multiples of its itemsize 4"):
        cupyattn.quant_gemm(np.zeros((1, 8), np.float32), matrix, bias=bias)
