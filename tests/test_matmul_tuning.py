# SPDX-License-Identifier: Apache-2.0
"""cupyattn.tune: what it may choose, what it keeps, and what is never read."""

import importlib
import json
import warnings

import numpy as np
import pytest
from coded_weights import coded_weight
from compare import assert_same_bits, dtype_of
from standin import install

import cupyattn
from cupyattn import QMatrix
from cupyattn.matmul import choice as matmul_choice
from cupyattn.matmul import tuning as matmul_tuning
from cupyattn.quant.layout import Form
from cupyattn.runtime import compile_all, recording
from cupyattn.runtime.cpu import settings

op = importlib.import_module("cupyattn.ops.quant_gemm")
GPTQ = Form(4, "int", 8, "float16", "ZERO", tiles_per_scale=2)
rng = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of its own for files of results; little time for each choice."""
    monkeypatch.setattr(matmul_tuning, "_FOLDER", str(tmp_path / "tuned"))
    monkeypatch.setattr(matmul_tuning, "_ROUNDS", 2)
    monkeypatch.setattr(matmul_tuning, "_HOST_COLD_BYTES", 1)
    matmul_tuning._forget()
    yield tmp_path / "tuned"
    matmul_tuning._forget()
    matmul_tuning._stream.cache_clear()


def _weight(form="int4 zero float16", n=136, k=1088):
    return QMatrix.from_coded(coded_weight(form, n, k))


def _x(m, k=1088, dtype="float16"):
    return rng.standard_normal((m, k)).astype(dtype_of(dtype))


def _keep(matrix, tokens, choice, xp=np, **more):
    """A file that says `choice` is the fastest, as another process may have left it."""
    device = "cpu" if xp is np else xp.cuda.runtime.getDevice()
    key = matmul_tuning._key(matrix.geometry, matrix.shape, tokens, "float16", tokens > 64)
    matmul_tuning._write(device, {key: {"choice": {**choice._asdict(), **more}}})
    return matmul_tuning._file(device)


@pytest.fixture
def launched(monkeypatch):
    """Plans that were launched."""
    plans, launch = [], op.launch
    monkeypatch.setattr(op, "launch", lambda plan, args: (plans.append(plan), launch(plan, args)))
    return plans


def _constants(plan):
    return dict(plan.spec.constants)


# ---- what may be chosen ----------------------------------------------------------------------------------

def _assert_same_bits_whatever_is_chosen(matrix, x, version):
    """Of every number of rows from 1 to 64, all candidates."""
    want, tried = None, set()
    for tokens in (64, 33, 32, 17, 16, 9, 8, 5, 4, 2, 1):
        choices = matmul_choice.candidates(matrix.geometry, matmul_choice.bucket(tokens), version, "cpu", True)
        assert 1 < len(choices) <= 8 and "blas" not in {choice.kernel for choice in choices}
        out = np.empty((tokens, matrix.shape[0]), np.float32)
        with recording() as wanted:
            for choice in choices:
                op.multiply_as(choice, x[:tokens], matrix, out)
        compile_all(wanted, "cpu")
        for choice in choices:
            tried.add(choice)
            out[...] = np.nan
            op.multiply_as(choice, x[:tokens], matrix, out)
            want = out.copy() if want is None else want
            assert_same_bits(out, want[:tokens])
    return tried


def test_no_candidate_changes_a_bit():
    assert len(_assert_same_bits_whatever_is_chosen(_weight("int6 plain int8 float16"), _x(64), "core")) > 10


def test_no_candidate_changes_a_bit_on_tensor_cores(monkeypatch):
    monkeypatch.setattr(op, "_version", lambda *args: ("mma", "chosen by the test"))
    tried = _assert_same_bits_whatever_is_chosen(_weight(), _x(64), "mma")   # of two pieces
    assert {choice.m_tile for choice in tried} == {8, 16, 32, 64} and len(tried) >= 18


@pytest.mark.parametrize("form", [GPTQ, Form(16, "float16"), Form(8, "int", 128, "float16", "PLAIN", 2)])
@pytest.mark.parametrize("tokens", [1, 4, 8, 16, 32, 64, 128, 512, 4096])
def test_candidates(form, tokens):
    geometry = ((form, 256, 64, 4096),)
    for version, arch in (("mma", "sm_90a"), ("core", "cpu"), ("core", "sm_75")):
        found = matmul_choice.candidates(geometry, tokens, version, arch, True)
        assert 1 <= len(found) <= 8 and len(set(found)) == len(found)
        assert (matmul_choice.Choice("blas") in found) == (tokens > 64)
        first = matmul_choice.blas_from(form.bits_per_weight, version, arch)
        assert (found[0].kernel == "blas") == (tokens > 64 and tokens >= first)
        assert {choice.kernel for choice in found} <= {version, "blas"}
        options = geometry, tokens, 4096, ("float16", "float16", "float32"), 16, arch, version, "", 0
        (untuned,) = op._launches(*options, None).plans
        for choice in (choice for choice in found if choice.kernel == "mma"):
            (plan,) = op._launches(*options, choice).plans
            assert plan.grid[2] == untuned.grid[2] and plan.shared_bytes <= 99 * 1024   # columns are cut alike
    assert matmul_choice.bucket(tokens) == tokens


def test_buckets():
    assert [matmul_choice.bucket(n) for n in (1, 2, 3, 4, 5, 9, 65, 129, 5000)] == [1, 4, 4, 4, 8, 16, 128, 256, 8192]


# ---- measuring and reading -------------------------------------------------------------------------------

def test_tuned_on_numpy_arrays(folder, monkeypatch, launched):
    matrix, x, seen = _weight(), _x(70), []
    want = matrix.matmul(x[:3])
    assert not folder.exists()   # nothing is tuned unasked
    clock = iter([1.0, 0.5, *[1.0] * 100])
    monkeypatch.setattr(matmul_tuning._HostClock, "seconds", lambda self, run: next(clock) * run.calls)
    monkeypatch.setattr(matmul_tuning, "_ROUNDS", 1)
    (found,) = cupyattn.tune([matrix, matrix, _weight()], tokens=3, progress=lambda *args: seen.append(args))
    second = matmul_choice.candidates(matrix.geometry, 4, "core", "cpu", False)[1]
    assert found == ("int4 zero float16", (136, 1088), 3, str(second), 0.5, 1.0)
    assert seen == [(0, 1, "int4 zero float16 136x1088, 3 tokens"), (1, 1, "done")]
    (file,) = folder.iterdir()
    assert len(json.loads(file.read_text())["entries"]) == 1
    matmul_tuning._forget()
    launched.clear()
    for tokens in (2, 3, 4):
        assert_same_bits(matrix.matmul(x[:tokens])[:2], want[:2])
    assert [_constants(plan)["ROW_TILES"] for plan in launched] == [second.row_tiles] * 3
    assert all("tuned" in plan.note for plan in launched)
    launched.clear()
    matrix.matmul(x[:1])
    matrix.matmul(x[:3].astype(np.float32))
    monkeypatch.setenv("CUPYATTN_TUNED", "0")
    matmul_tuning._forget()
    matrix.matmul(x[:3])
    assert len(launched) == 3 and not any("tuned" in plan.note for plan in launched)


def test_real_times(folder):
    found = cupyattn.tune(_weight(), tokens=(1, np.int64(80)), dtype=np.float32)
    assert [f.tokens for f in found] == [1, 80]
    assert all(0 < f.seconds <= f.default_seconds < 1 for f in found)


@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_tuned_on_cupy_arrays(xp, folder, monkeypatch, launched):
    """Also that scratch is there before graphs are captured: the stand-in refuses to allocate during capture."""
    matrix, x = _weight().to(xp.module), xp.array(_x(80))
    fewer = matmul_choice.candidates
    monkeypatch.setattr(matmul_tuning, "candidates", lambda *args: fewer(*args)[::6])
    found = cupyattn.tune(matrix, tokens=(2, 80))
    assert [f.tokens for f in found] == [2, 80] and all(f.seconds <= f.default_seconds for f in found)
    assert len(list(folder.iterdir())) == 1
    launched.clear()
    matmul_tuning._forget()
    matrix.matmul(x[:2])
    assert "tuned" in launched[-1].note
    stream = xp.module.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="must not capture a graph; tune before the capture"):
            cupyattn.tune(matrix)
        stream.end_capture()


def test_blas_or_not_above_64(monkeypatch):
    matrix, x, shapes = _weight(), _x(200), []
    multiply = op.blas.multiply
    monkeypatch.setattr(op.blas, "multiply", lambda x, *rest: (shapes.append(len(x)), multiply(x, *rest)))
    _keep(matrix, 100, matmul_choice.Choice("blas"))
    _keep(matrix, 200, matmul_choice.candidates(matrix.geometry, 256, "core", "cpu", False)[0])
    with settings(blas=True):
        matrix.matmul(x[:70])
        assert set(shapes) == {70}
        assert_same_bits(matrix.matmul(x[:70], invariant=True), matrix.matmul(x)[:70])
    matrix.matmul(x[:70])
    assert set(shapes) == {70}


@pytest.mark.parametrize("choice, more", [
    (matmul_choice.Choice("blas"), {}), (matmul_choice.Choice("mma", 8, 4, 8, 3), {}),
    (matmul_choice.Choice("core", 4, 3), {}), (matmul_choice.Choice("core", 8, 8), {"pieces": 4})])
def test_what_is_no_candidate_is_refused(choice, more, launched):
    matrix, x = _weight(), _x(8)
    want = matrix.matmul(x)
    untuned, file = launched[-1], _keep(matrix, 8, choice, **more)
    with pytest.warns(RuntimeWarning, match="is no choice for that product") as caught:
        assert_same_bits(matrix.matmul(x), want)
    assert len(caught) == 1 and str(file) in str(caught[0].message)
    assert launched[-1] == untuned


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"facts": {"device": "another"}, "entries": {}}',
                                  "[" * 10**5], ids=range(6))
def test_a_file_that_is_no_result_of_this_machine(text, launched):
    matrix, x = _weight(), _x(8)
    file = _keep(matrix, 8, matmul_choice.candidates(matrix.geometry, 8, "core", "cpu", False)[1])
    file.write_text(text)
    with pytest.warns(RuntimeWarning, match="is ignored") as caught:
        for tokens in range(1, 9):
            matrix.matmul(x[:tokens])
    assert len(caught) == 1 and str(file) in str(caught[0].message)
    assert not any("tuned" in plan.note for plan in launched)
    with warnings.catch_warnings():   # written anew
        warnings.simplefilter("ignore")
        _keep(matrix, 8, matmul_choice.candidates(matrix.geometry, 8, "core", "cpu", False)[1])
    matrix.matmul(x)
    assert "tuned" in launched[-1].note


def test_another_source_or_device_has_another_file(monkeypatch, folder):
    matrix = _weight()
    choice = matmul_choice.candidates(matrix.geometry, 8, "core", "cpu", False)[1]
    mine = _keep(matrix, 8, choice)
    assert matmul_tuning.tuned_choice(np, matrix, 8, "float16") == choice
    monkeypatch.setattr(matmul_tuning, "_source", lambda host: "another")
    matmul_tuning._forget()
    assert matmul_tuning.tuned_choice(np, matrix, 8, "float16") is None
    assert _keep(matrix, 8, choice) != mine
    with install(capability="90") as xp:
        assert _keep(matrix, 8, choice, xp.module).name not in {mine.name}
    assert len(list(folder.iterdir())) == 3   # and no temporary file


@pytest.mark.parametrize("wrong, error, why", [
    ({"matrices": np.ones(3)}, TypeError, "matrices must be QMatrix objects, got float64"),
    ({"tokens": 0}, ValueError, r"tokens must be numbers of rows from 1 to 262144, got \[0\]"),
    ({"tokens": (1, 2.5)}, ValueError, "tokens must be numbers"),
    ({"dtype": "int8"}, TypeError, "dtype must be float16 or")])
def test_wrong_arguments(wrong, error, why):
    with pytest.raises(error, match=f"^tune: {why}"):
        cupyattn.tune(**{"matrices": _weight(), **wrong})
