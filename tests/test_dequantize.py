# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from coded_weights import FORMS, SOME, coded_weight
from compare import assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn import QMatrix
from cupyattn.quant import layout
from cupyattn.quant.coded import CodedWeight
from cupyattn.reference.dequantize import dequantize as expected_weight
from cupyattn.runtime.cpu import settings

rng = np.random.default_rng(9)
ROUNDING = {"float16": 2.0**-11 * 1.02, "bfloat16": 2.0**-8 * 1.02, "float32": 2.0**-23}


def _is_exact(form):
    """float32 holds the weights; else a product of two numbers is rounded."""
    return not form.startswith(("nf4", "fp4")) and "float32" not in form


def _mixed():
    parts = [coded_weight(f"int{bits} plain float16", 40, columns, group=24).segments[0]
             for bits, columns in ((6, 96), (3, 40))]
    return CodedWeight("mixed", (40, 136), tuple(parts), rng.permutation(136).astype(np.int32))


@pytest.mark.parametrize("form", SOME)
@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32"])
def test_dequantize(xp, form, out_dtype):
    weight = coded_weight(form, 40, 328)
    matrix = QMatrix.from_coded(weight, xp=xp.module)
    got = cupyattn.dequantize(matrix, out_dtype=dtype_of(out_dtype))
    assert isinstance(got, xp.module.ndarray)
    np.testing.assert_allclose(xp.numpy(got).astype(np.float64), weight.dequantize(), rtol=ROUNDING[out_dtype],
                               atol=1e-7)
    assert_same_bits(expected_weight(matrix), weight.dequantize())
    assert_same_bits(xp.numpy(matrix.reconstruct(out_dtype=dtype_of(out_dtype))), xp.numpy(got))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, fused):
    weight = coded_weight(form, 24, 200)
    with settings(fused=fused):
        got = cupyattn.dequantize(QMatrix.from_coded(weight))
    np.testing.assert_allclose(got, weight.dequantize(), rtol=0 if _is_exact(form) else ROUNDING["float32"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_every_number_of_8_bits(kind, fused):
    weight = coded_weight(f"{kind} plain {'float32' if kind == 'e4m3' else 'float16'}", 16, 16)
    weight.segments[0].codes[...] = np.arange(256).reshape(16, 16)
    weight.segments[0].scale[...] = 1
    with settings(fused=fused):
        # from_coded would refuse the NaN
        got = cupyattn.dequantize(QMatrix(weight.format, weight.shape, *layout.pack(weight)))
    np.testing.assert_array_equal(got, weight.dequantize())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_uncompressed_weights(xp, dtype):
    w = rng.standard_normal((33, 72)).astype(dtype_of(dtype))
    assert_same_bits(xp.numpy(cupyattn.dequantize(QMatrix.from_dense(w, xp=xp.module), out_dtype=w.dtype)), w)
    assert_same_bits(expected_weight(QMatrix.from_dense(w), out_dtype=w.dtype), w)


def test_columns_in_the_order_of_x(xp):
    weight = _mixed()
    got = cupyattn.dequantize(QMatrix.from_coded(weight, xp=xp.module))
    assert_same_bits(xp.numpy(got), weight.dequantize().astype(np.float32))


@pytest.mark.parametrize("rows", [(0, 40), (0, 1), (16, 32), (7, 8), (15, 33), (39, 40), (5, 5)])
def test_some_rows(xp, rows):
    weight = coded_weight("int5 minimum float16", 40, 96)
    matrix = QMatrix.from_coded(weight, xp=xp.module)
    want = weight.dequantize()[slice(*rows)].astype(np.float32)
    assert_same_bits(xp.numpy(cupyattn.dequantize(matrix, rows=rows)), want)
    assert_same_bits(expected_weight(matrix, rows=rows, out_dtype=np.float32), want)
    out = xp.array(np.full((len(want) + 2, 101), np.nan, np.float32))
    cupyattn.dequantize(matrix, rows=rows, out=out[1:-1, 3:99])
    host = xp.numpy(out)
    assert_same_bits(host[1:-1, 3:99].copy(), want)
    assert np.isnan(host[[0, -1]]).all() and np.isnan(host[:, [2, 99]]).all()


@pytest.mark.parametrize("form", [*SOME[:4], "mixed"])
def test_dequantize_checked(form):
    weight = _mixed() if form == "mixed" else coded_weight(form, 24, 136)
    matrix = QMatrix.from_coded(weight)
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1)):
        with settings(check=True, schedule=schedule, seed=seed):
            got = cupyattn.dequantize(matrix, rows=(3, 24), out=poison(np.empty((21, 136), np.float32)))
        assert_same_bits(got, weight.dequantize()[3:24].astype(np.float32))


def test_errors():
    matrix = QMatrix.from_coded(coded_weight("int4 zero float16", 40, 96))
    with pytest.raises(TypeError, match="qmatrix must be a QMatrix, got ndarray"):
        cupyattn.dequantize(np.zeros((40, 96)))
    with pytest.raises(TypeError, match="out_dtype must be float16 or bfloat16 or float32, got float64"):
        cupyattn.dequantize(matrix, out_dtype=np.float64)
    with pytest.raises(ValueError, match=r"out must be \[rows, in_features\] = \[40, 96\], got \[40, 95\]"):
        cupyattn.dequantize(matrix, out=np.zeros((40, 95), np.float32))
    for rows in ((0, 41), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="rows must be"):
            cupyattn.dequantize(matrix, rows=rows)


@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
@given(n=st.integers(1, 70), eighths=st.integers(1, 40), group=st.integers(1, 26), data=st.data())
def test_shapes(n, eighths, group, data):
    weight = coded_weight("int4 zero float16", n, 8 * eighths, 8 * group)
    first = data.draw(st.integers(0, n))
    last = data.draw(st.integers(first, n))
    got = cupyattn.dequantize(QMatrix.from_coded(weight), rows=(first, last))
    assert_same_bits(got, weight.dequantize()[first:last].astype(np.float32))
