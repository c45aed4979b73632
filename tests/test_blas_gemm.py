# SPDX-License-Identifier: Apache-2.0
"""quant_gemm with many tokens: chunks of the weight dequantized for BLAS."""

import functools
import inspect
import re
from pathlib import Path

import cupy_backends
import numpy as np
import pytest
import standin_blas
from coded_weights import FORMS, coded_weight
from compare import assert_same_bits, dtype_of
from standin import install

import cupyattn
from cupyattn import QMatrix, diagnosis
from cupyattn.graphs import capture
from cupyattn.matmul import blas as matmul_blas
from cupyattn.matmul import choice as matmul_choice
from cupyattn.quant.coded import CodedWeight
from cupyattn.quant.layout import Form
from cupyattn.runtime import blas, recording
from cupyattn.runtime.cpu import Settings, settings

BOUND = {"float32": 1e-5, "float16": 3e-4, "bfloat16": 2e-3}
GPTQ = Form(4, "int", 8, "float16", "ZERO")
rng = np.random.default_rng(21)


@functools.lru_cache(maxsize=32)
def _weight(form, n, k, group=None):
    """(QMatrix, its weights in float64)."""
    if form not in FORMS:
        w = np.random.default_rng((n, k)).standard_normal((n, k)).astype(dtype_of(form))
        return QMatrix.from_dense(w), w.astype(np.float64)
    coded = coded_weight(form, n, k, group)
    return QMatrix.from_coded(coded), coded.dequantize()


def _x(m, k, dtype):
    return rng.standard_normal((m, k)).astype(dtype_of(dtype))


def _error(got, want):
    return np.linalg.norm(np.asarray(got).astype(np.float64) - want) / np.linalg.norm(want)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """BLAS from 65 tokens on, on the host too, and 48 rows of these weights a chunk."""
    monkeypatch.setattr(matmul_choice, "fused_until", lambda bits: 65)
    monkeypatch.setattr(matmul_choice, "_HOST_TOKENS", 65)
    monkeypatch.setattr(matmul_blas, "_CHUNK", 48 * 200 * 2)
    monkeypatch.setattr(matmul_blas, "_WAVE", 1)
    with settings(blas=True):
        yield


@pytest.fixture
def multiplied(monkeypatch):
    """Shapes (M, N, K) of the products left to BLAS."""
    shapes, multiply = [], matmul_blas.blas.multiply

    def counted(x, w, out, **options):
        shapes.append((len(x), *w.shape))
        multiply(x, w, out, **options)

    monkeypatch.setattr(matmul_blas.blas, "multiply", counted)
    return shapes


@pytest.mark.parametrize("form, dtype, out_dtype", [
    ("int4 zero float16", "float16", "float16"), ("int6 plain int8 float16", "float16", "float16"),
    ("int4 zero float16", "float32", "float32"), ("nf4 plain float32", "float32", "float32"),
    ("float16", "float16", "float32"), ("bfloat16", "bfloat16", "bfloat16"), ("bfloat16", "bfloat16", "float32"),
    ("e2m1 plain float8_e8m0fnu", "bfloat16", "bfloat16")])
def test_within_bounds(xp, multiplied, form, dtype, out_dtype):
    matrix, w = _weight(form, 104, 200)
    x, bias, held = _x(70, 200, dtype), _x(1, 104, "float32")[0], _x(70, 104, out_dtype)
    want, there = x.astype(np.float64) @ w.T, matrix.to(xp.module)
    base = xp.array(np.full((70, 120), np.nan, dtype_of(out_dtype)))
    out = base[:, 8:112]
    cupyattn.quant_gemm(xp.array(x), there, out=out)
    assert len(multiplied) > 1 and sum(n for _, n, _ in multiplied) == 104
    host = xp.numpy(base).astype(np.float64)
    assert _error(host[:, 8:112], want) <= BOUND[out_dtype]
    assert np.isnan(host[:, :8]).all() and np.isnan(host[:, 112:]).all()
    cupyattn.quant_gemm(xp.array(x), there, bias=xp.array(bias), out=out)
    assert _error(xp.numpy(base)[:, 8:112], want + bias) <= BOUND[out_dtype]
    out = xp.array(held)
    cupyattn.quant_gemm(xp.array(x), there, accumulate=True, out=out)
    assert _error(xp.numpy(out), want + held.astype(np.float64)) <= BOUND[out_dtype]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_columns_in_any_order_need_no_gather(xp, multiplied, dtype):
    parts = [coded_weight(f"int{bits} plain float16", 72, columns, group=32).segments[0]
             for bits, columns in ((6, 96), (3, 1600), (2, 64))]
    coded = CodedWeight("mixed", (72, 1760), tuple(parts), rng.permutation(1760).astype(np.int32))
    matrix, x = QMatrix.from_coded(coded), _x(66, 1760, dtype)
    got = cupyattn.quant_gemm(xp.array(x), matrix.to(xp.module))
    assert multiplied and _error(xp.numpy(got), x.astype(np.float64) @ coded.dequantize().T) <= BOUND[dtype]


def test_types_of_numpy_and_both_bias_and_out(multiplied):
    matrix, w = _weight("nf4 plain float32", 104, 200)
    for dtype, out_dtype in (("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("bfloat16", "float32")):
        x, bias, held = _x(70, 200, dtype), _x(1, 104, dtype)[0], _x(70, 104, out_dtype)
        want = x.astype(np.float64) @ w.T + bias.astype(np.float64) + held.astype(np.float64)
        cupyattn.quant_gemm(x, matrix, bias=bias, accumulate=True, out=held)
        assert multiplied and _error(held, want) <= BOUND[out_dtype]


def test_64_tokens_or_invariant_have_the_bits_of_one(xp, multiplied):
    matrix, _ = _weight("int4 zero float16", 104, 200)
    x, there = xp.array(_x(66, 200, "float16")), matrix.to(xp.module)
    whole = xp.numpy(cupyattn.quant_gemm(x, there, invariant=True))
    assert_same_bits(xp.numpy(there.matmul(x[:64])), whole[:64])
    assert_same_bits(xp.numpy(there.matmul(x[65:])), whole[65:])
    assert not multiplied
    assert_same_bits(xp.numpy(there.matmul(x)), xp.numpy(there.matmul(x)))
    assert multiplied


def test_rows_of_x_stay_apart(xp, multiplied):
    matrix, _ = _weight("int4 zero float16", 104, 200)
    x = _x(70, 200, "float16")
    clean = xp.numpy(cupyattn.quant_gemm(xp.array(x), matrix.to(xp.module)))
    x[2, 5], x[69, 199] = np.nan, np.inf
    got = xp.numpy(cupyattn.quant_gemm(xp.array(x), matrix.to(xp.module)))
    assert multiplied and np.isnan(got[2]).all() and not np.isfinite(got[69]).any()
    rest = [i for i in range(70) if i not in (2, 69)]
    assert_same_bits(got[rest], clean[rest])


def test_captured_in_a_graph_without_allocation():
    matrix, w = _weight("int4 zero float16", 104, 200)
    with install() as xp:
        there, stream = matrix.to(xp.module), xp.module.cuda.Stream(non_blocking=True)
        x, out, bias = (xp.array(_x(m, n, "float16")) for m, n in ((80, 200), (80, 104), (1, 104)))
        with stream:
            cupyattn.quant_gemm(x, there, bias=bias[0], out=out)
            before = dict(xp.events)
            stream.begin_capture()
            cupyattn.quant_gemm(x, there, bias=bias[0], out=out)
            graph = stream.end_capture()
        after = dict(xp.events)
        assert after["gemms"] == 2 * before["gemms"] and {**after, "launches": 0, "gemms": 0} == {
            **before, "launches": 0, "gemms": 0}
        for _ in range(3):
            changed = _x(80, 200, "float16")
            x.set(changed)
            graph.launch(stream)
            want = changed.astype(np.float64) @ w.T + bias.get()[0].astype(np.float64)
            assert _error(out.get(), want) <= 3e-4


@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_captured_products_have_the_bits_of_eager_ones(xp):
    if not blas.available(xp.module):
        pytest.skip("cuBLAS is not installed")
    matrix, _ = _weight("int4 zero float16", 104, 200)
    there, x = matrix.to(xp.module), xp.array(_x(80, 200, "float16"))
    with capture(cupyattn.quant_gemm, x, there) as graph:
        assert "cublas" in [launch.name for launch in graph.launches if hasattr(launch, "name")]
        x.set(_x(80, 200, "float16"))
        got = graph.replay()
        xp.module.cuda.runtime.deviceSynchronize()
        assert_same_bits(xp.numpy(got), xp.numpy(cupyattn.quant_gemm(x, there)))


def test_modes_of_the_handle_are_left_as_they_were(monkeypatch):
    """The stand-in refuses products in another math mode than that of float32 sums."""
    matrix, _ = _weight("int4 zero float16", 104, 200)
    for modes in ((standin_blas.CUBLAS_POINTER_MODE_DEVICE, standin_blas.TF32),
                  (standin_blas.CUBLAS_POINTER_MODE_HOST, standin_blas.CUBLAS_DEFAULT_MATH)):
        monkeypatch.setattr(standin_blas, "pointer_mode", modes[0])
        monkeypatch.setattr(standin_blas, "math_mode", modes[1])
        with install() as xp:
            cupyattn.quant_gemm(xp.array(_x(80, 200, "float16")), matrix.to(xp.module))
            assert xp.events["gemms"]
        assert (standin_blas.pointer_mode, standin_blas.math_mode) == modes


@pytest.mark.parametrize("options, asked", [({}, True), ({"blas": False}, False), ({"check": True}, False)],
                         ids=["asked for", "default", "checking"])
def test_blas_of_the_host_is_asked_for(multiplied, options, asked):
    """Its threads are slow where they share cores, and take no orders from the executor's settings."""
    assert Settings().blas is False
    matrix, w = _weight("int4 zero float16", 104, 200)
    x = _x(70, 200, "float32")
    with settings(**options):
        got = cupyattn.quant_gemm(x, matrix)
    assert bool(multiplied) == asked and _error(got, x.astype(np.float64) @ w.T) <= 1e-5
    multiplied.clear()
    with settings(**options), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPYATTN_CHECK", "1")
        cupyattn.quant_gemm(x, matrix)
    assert not multiplied


def test_recording_multiplies_nothing(multiplied):
    matrix, _ = _weight("int4 zero float16", 104, 200)
    out = np.full((80, 104), 7, np.float32)
    with recording() as wanted:
        cupyattn.quant_gemm(_x(80, 200, "float32"), matrix, out=out)
    assert multiplied and (out == 7).all() and [spec.kernel for spec in wanted] == ["dequantize"]


def test_without_cublas_the_kernels_serve_every_number_of_tokens(caplog, monkeypatch):
    monkeypatch.setenv("CUPYATTN_DEBUG", "2")
    matrix, w = _weight("int4 zero float16", 104, 200)
    x = _x(70, 200, "float16")
    with install(cublas=False) as xp, caplog.at_level("DEBUG", "cupyattn"):
        got = xp.numpy(cupyattn.quant_gemm(xp.array(x), matrix.to(xp.module)))
        assert xp.events["gemms"] == 0
    assert _error(got, x.astype(np.float64) @ w.T) <= 3e-4
    assert "no cuBLAS installed" in caplog.text


@pytest.mark.parametrize("options, why", [
    ({"out": "bfloat16"}, "makes no bfloat16 from float16"), ({"out": "float32"}, "float32 sums of rounded weights"),
    ({"x": "bfloat16", "out": "bfloat16"}, "rounded to bfloat16 cost too much"),
    ({"bias": True, "accumulate": True}, "round twice"), ({"out_align": 8}, "rows of out"),
    ({"x_align": 0}, "rows of x"),
    ({"forms": (Form(8, "e4m3", 0, "float32"),)}, "rounded to float16 cost too much"),
    ({"forms": (GPTQ, Form(4, "int", 8, "bfloat16"))}, "rounded to float16 cost too much")])
def test_what_is_not_left_to_cublas(options, why):
    asked = {"forms": (GPTQ,), "tokens": 4096, "x": "float16", "out": "float16", "bias": False, "accumulate": False,
             "x_align": 16, "out_align": 16}
    product = matmul_choice.Product(**asked | options)
    assert matmul_choice.by_blas(matmul_choice.Product(**asked), "mma", "sm_90a", True)[0]
    fits, found = matmul_choice.by_blas(product, "mma", "sm_90a", True)
    assert not fits and why in found
    assert matmul_choice.by_blas(product, "core", "cpu", True)[0]


def test_binding_has_the_parameters_of_the_installed_cupy():
    """Read from the binary, which cannot be imported without cuBLAS."""
    module = next(Path(cupy_backends.__file__).parent.glob("cuda/libs/cublas.*.so")).read_bytes()
    signature = re.search(rb"\bgemmEx\(([^)]*)\)", module).group(1).decode()
    parameters = [part.split() for part in signature.split(", ")]
    assert [name for *_, name in parameters] == list(inspect.signature(standin_blas.gemmEx).parameters)
    assert {name: kind for kind, name in parameters}["alpha"] == "size_t"   # an address
    for name in vars(standin_blas):
        if name.startswith("CUBLAS_") or name.endswith("Mode"):
            assert name.encode() in module


@pytest.mark.parametrize("tokens, rows", [(4096, 1536), (1024, 4224), (600, 7200), (256, 8192)])
def test_chunks_fit_the_cache_and_fill_the_gpu(monkeypatch, tokens, rows):
    monkeypatch.undo()
    assert matmul_blas.rows_per_chunk(tokens, 28672, 2 * 8192) == rows
    assert matmul_blas.rows_per_chunk(tokens, 100, 2 * 8192) == 100
    assert matmul_blas.rows_per_chunk(tokens, 28672, 2 ** 27) == 16


@pytest.mark.parametrize("bits, tokens", [(4.125, 253), (8.5, 284), (16, 337)])
def test_model_of_where_blas_is_ahead(monkeypatch, bits, tokens):
    monkeypatch.undo()
    assert matmul_choice.fused_until(bits) == tokens


@pytest.mark.parametrize("cublas", [True, False])
def test_doctor_says_whether_cublas_is_there(cublas):
    with install(cublas=cublas):
        check = diagnosis._cublas_check()
    assert check.ok == cublas
    assert cublas or "cupyattn's own kernels" in check.found and "pip install nvidia-cublas" in check.remedy
