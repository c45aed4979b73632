# SPDX-License-Identifier: Apache-2.0
"""What is promised of quant_gemm, of every family of its kernels by the same test."""

import contextvars
import functools
import itertools
import threading

import families
import numpy as np
import pytest
from coded_weights import FORMS, SOME, coded_weight
from compare import assert_same_bits, dtype_of, sparse_array
from families import FAMILIES, assert_right, assert_rows_alone, error
from test_formats_integer import Matrix

import cupyattn
from cupyattn import QMatrix
from cupyattn.matmul import choice as matmul_choice
from cupyattn.quant.coded import CodedWeight
from cupyattn.quant.layout import DENSE
from cupyattn.runtime.cpu import settings

BITS_16 = ("float16", "bfloat16")
INT4 = "int4 zero float16"


@pytest.fixture(params=FAMILIES)
def family(request):
    with families.forced(request.param) as family:
        yield family


@functools.lru_cache(maxsize=64)
def weight_of(form, n, k, group=None):
    """(QMatrix, its weights in float64)."""
    if form in DENSE:
        w = np.random.default_rng((n, k)).standard_normal((n, k)).astype(dtype_of(form))
        return QMatrix.from_dense(w), w.astype(np.float64)
    coded = coded_weight(form, n, k, group)
    return QMatrix.from_coded(coded), coded.dequantize()


def x_of(m, k, dtype, seed=0):
    return np.random.default_rng((m, k, seed)).standard_normal((m, k)).astype(dtype_of(dtype))


# ---- every format

def x_dtype(family, form):
    """One type of x for each form, by turns."""
    if form in DENSE:
        return form
    return BITS_16[list(FORMS).index(form) % 2] if family.name in ("stream", "pipeline", "cublas") else "float32"


@pytest.mark.parametrize("family, form", [(family, form) for family in FAMILIES for form in (*FORMS, *DENSE)
                                          if form != "float32" or family in ("cores", "blas")], indirect=["family"])
def test_every_form(family, form):
    """The product; and, exactly, columns picked by rows of x with a single 1."""
    matrix, w = weight_of(form, 40, 320)
    dtype = x_dtype(family, form)
    for m in family.some_tokens[:1]:
        assert_right(family, matrix, w, x_of(m, 320, dtype))
    columns = [0, 1, 7, 8, 15, 16, 63, 64, 127, 128, 319]
    x = np.zeros((len(columns), 320), dtype_of(dtype))
    x[range(len(columns)), columns] = 1
    got, want = family.by_parts(x, matrix), w[:, columns].T
    if form.startswith(("nf4", "fp4")) or "float32" in form.split()[-1:] and form not in DENSE:
        # more digits than float32 or, on tensor cores, two numbers of 16 bits have
        np.testing.assert_allclose(got, want, rtol=2.0**-23 if family.name in ("cores", "blas") else 0,
                                   atol=2.0**-17 * np.abs(w).max() if family.name in ("stream", "pipeline") else 0)
    else:
        np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize("form", SOME)
def test_types_of_out(family, form):
    dtype = BITS_16[SOME.index(form) % 2]
    matrix, w = weight_of(form, 40, 320)
    assert_right(family, matrix, w, x_of(family.some_tokens[-1], 320, dtype), dtype)


@pytest.mark.full
@pytest.mark.parametrize("form", [*FORMS, *DENSE])
def test_every_form_and_type(family, form):
    matrix, w = weight_of(form, 136, 320)     # many numbers, for an error that is their usual one
    for x in DENSE:
        if family.takes(x, matrix.kinds):
            for m, out in itertools.product(family.some_tokens, dict.fromkeys((x, "float32"))):
                assert_right(family, matrix, w, x_of(m, 320, x), out)


@pytest.mark.parametrize("form", [pytest.param(form, marks=[] if form in SOME[:3] else pytest.mark.full)
                                  for form in (*FORMS, *DENSE)])
def test_every_form_and_type_by_cublas(form):
    """What is left to cuBLAS keeps the bounds, though weights are rounded to the type of x, like `out` is."""
    matrix, w = weight_of(form, 48, 320)
    with families.forced("cublas") as family:
        for x in DENSE:
            for out in dict.fromkeys((x, "float32")):
                asked = matmul_choice.Product(tuple(s.form for s in matrix.segments), 66, x, out, False, False, 16, 16)
                if matmul_choice.blas_objection(asked, "sm_90a", True) is None:
                    assert_right(family, matrix, w, x_of(66, 320, x), out, roundings=2)


# ---- sizes

@pytest.mark.parametrize("k", [128, 4096, 28672])
def test_tokens_and_columns(family, k):
    matrix, w = weight_of(INT4, 24, k, 128)
    most = {128: 1024, 4096: 257, 28672: 65}[k]
    for m in (m for m in family.tokens if m <= most and (k < 28672 or m in (1, 8, 9, 17, 65))):
        x = x_of(m, k, "float16")
        assert_right(family, matrix, w, x)
        assert_right(family, matrix, w, x, "float16")


@pytest.mark.parametrize("n, k", [(8, 32), (24, 48), (40, 56), (8, 8), (1, 64), (65, 72), (7392, 128), (24, 10944),
                                  (2032, 4032), (4160, 4224)])
def test_odd_sizes(family, n, k):
    matrix, w = weight_of(INT4, n, k, 128)
    for m in family.some_tokens[:1 if n * k > 1e6 else 3]:
        assert_right(family, matrix, w, x_of(m, k, "float16"))


def test_a_shard_of_odd_width(family):
    """7392 = 16 * 462 columns of 14784, whose border is in the middle of a group."""
    whole, w = weight_of(INT4, 24, 14784, 128)
    for rank in range(2):
        shard = whole.column_shard(rank, 2)
        assert shard.shape == (24, 7392)
        columns = slice(7392 * rank, 7392 * (rank + 1))
        assert_right(family, shard, w[:, columns], x_of(family.some_tokens[0], 14784, "float16")[:, columns])


@pytest.mark.parametrize("k", [1, 4, 12, 33, 100])
def test_columns_no_multiple_of_eight_are_refused_before_anything_runs(k):
    with pytest.raises(ValueError, match=rf"in_features a multiple of 8, got \[16, {k}\]"):
        QMatrix.from_coded(coded_weight("int4 plain float16", 16, k))
    with pytest.raises(ValueError, match="multiples? of 8"):
        QMatrix.quantize(np.zeros((16, k), np.float32), "int4")


# ---- outliers, boundaries of groups

def test_outliers_and_partial_sums_past_float16(family):
    matrix, w = weight_of("int8 plain float16", 24, 1632)
    m = family.some_tokens[0]
    x = x_of(m, 1632, "float16")
    x[:, ::204] *= 100
    scale = 3e4 / np.abs(x.astype(np.float64) @ w.T).max()
    w32 = coded_weight("int8 plain float16", 24, 1632)
    w32.segments[0].scale[...] *= np.float16(scale)
    matrix, w = QMatrix.from_coded(w32), w32.dequantize()
    got = assert_right(family, matrix, w, x, "float16")
    assert np.isfinite(got).all() and np.abs(got).max() > 1e4
    ones = QMatrix.from_dense(np.concatenate([np.ones((8, 800)), -np.ones((8, 792))], axis=1).astype(np.float16))
    np.testing.assert_array_equal(family.product(np.full((m, 1592), 1000, np.float16), ones, "float16"),
                                  np.full((m, 8), 8000, np.float16))


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, 1088])
@pytest.mark.parametrize("form", ["int4 plain float16", "int4 zero float16", "int5 minimum float16"])
def test_scales_that_vary_between_neighbouring_groups(family, form, group):
    coded = coded_weight(form, 24, 1088, group)
    coded.segments[0].scale[:, ::2] *= np.float16(2.0**-12)
    matrix, w = QMatrix.from_coded(coded), coded.dequantize()
    assert_right(family, matrix, w, x_of(family.some_tokens[0], 1088, "float16"))
    assert_right(family, matrix, w[:, :], x_of(family.some_tokens[-1], 1088, "float16"), "float16")


# ---- act-order, zero points

@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", ["permuted", "partial", "negative", "zeros"])
def test_act_order(family, kind, group):
    k = 4 * group + (group // 2 if kind == "partial" else 0)
    g_idx = np.random.default_rng(group).permutation(np.arange(k) // group)
    if kind == "zeros":                               # several groups, and a g_idx that says nothing
        matrix, given = Matrix(4, (40, k), group), np.zeros(k, int)
    else:
        matrix = Matrix(4, (40, k), g_idx=g_idx)
        given = np.where(np.arange(k) % 3 == 0, g_idx - len(matrix.zeros), g_idx) if kind == "negative" else g_idx
    whole, w = QMatrix.from_gptq(matrix.gptq(g_idx=given), group_size=group), matrix.weight()
    assert (whole.order is None) == (kind == "zeros")
    for m in family.some_tokens[:2]:
        x = x_of(m, k, "float16")
        assert_right(family, whole, w, x)
        for size in (2, 4):
            starts = [sum(whole.column_shard(r, size).shape[1] for r in range(rank)) for rank in range(size)]
            parts = [whole.column_shard(rank, size) for rank in range(size)]
            total = sum(family.product(np.ascontiguousarray(x[:, at:at + part.shape[1]]), part).astype(np.float64)
                        for at, part in zip(starts, parts, strict=True))
            assert error(total, x.astype(np.float64) @ w.T) <= 1e-5


def test_one_matrix_in_every_convention_of_zero_points(family):
    matrix = Matrix(4, (40, 128), 32)
    assert {0, 15} <= set(matrix.zeros.flat)
    stored = [QMatrix.from_gptq(matrix.gptq(-1)), QMatrix.from_gptq(matrix.gptq(0), checkpoint_format="gptq_v2"),
              QMatrix.from_awq(matrix.awq()), QMatrix.from_compressed_tensors(matrix.compressed())]
    symmetric = Matrix(4, (40, 128), 32, symmetric=True)
    with pytest.warns(UserWarning, match="every field is 8, which 'gptq_v2' stores"):
        mislabelled = QMatrix.from_gptq(symmetric.gptq(0), checkpoint_format="gptq")
    same = [mislabelled, QMatrix.from_gptq(symmetric.gptq(-1)), QMatrix.from_awq(symmetric.awq()),
            QMatrix.from_compressed_tensors(symmetric.compressed())]
    for source, group in ((matrix, stored), (symmetric, same)):
        x = x_of(family.some_tokens[0], 128, "float16")
        first = assert_right(family, group[0], source.weight(), x)
        for other in group[1:]:
            assert_same_bits(family.product(x, other), first)


# ---- determinism

@pytest.mark.parametrize("version", ["cores", "mma"])
@pytest.mark.parametrize("form, dtype", [(INT4, "float16"), ("int6 plain int8 float16", "bfloat16"),
                                         ("e2m1 plain float8_e8m0fnu", "float16"), ("float16", "float16")])
def test_rows_have_the_same_bits_for_every_number_of_tokens(version, form, dtype):
    """M = 1 alone, among 2, 8, 16 and 64: on tensor cores by both families."""
    matrix, w = weight_of(form, 72, 1088)
    x = x_of(64, 1088, dtype)
    names = {"cores": ("cores", "cores"), "mma": ("stream", "pipeline")}[version]
    with families.forced(names[1]) as family:
        whole = assert_right(family, matrix, w, x)
        among_16 = family.product(x[:16], matrix)
    assert_same_bits(among_16, whole[:16])
    with families.forced(names[0]) as family:
        for start, stop in ((0, 2), (0, 8), (56, 64)):
            assert_same_bits(family.product(x[start:stop], matrix), whole[start:stop])
        assert_rows_alone(family, matrix, x[:16], whole[:16])


def test_the_same_bits_a_hundred_times(family):
    matrix, _ = weight_of(INT4, 72, 1088)
    x = x_of(family.some_tokens[-1], 1088, "float16")
    first = family.product(x, matrix)
    for run in range(99):
        with settings(workers=1 + run % 3, schedule=("forward", "reverse", "random")[run // 3 % 3], seed=run):
            assert_same_bits(family.product(x, matrix), first)


def test_layers_at_the_same_time(xp):
    """Two layers, each in a thread and stream of its own, over and over: what they give one after the other."""
    layers = [weight_of(INT4, 72, 1088)[0].to(xp.module), weight_of("int8 plain float16", 136, 1088)[0].to(xp.module)]
    rows = [xp.array(x_of(m, 1088, "float16")) for m in (3, 20)]
    alone = [xp.numpy(layer.matmul(x)) for layer, x in zip(layers, rows, strict=True)]
    found, failed = [[], []], []

    def run(i):
        try:
            if xp.name == "numpy":
                found[i] = [layers[i].matmul(rows[i]) for _ in range(30)]
                return
            stream = xp.module.cuda.Stream(non_blocking=True)
            with stream:
                outs = [layers[i].matmul(rows[i]) for _ in range(30)]
            stream.synchronize()
            found[i] = [xp.numpy(out) for out in outs]
        except Exception as error:   # for the thread that waits
            failed.append(error)

    # threads begin with the executor's defaults, where another build may have been asked for
    threads = [threading.Thread(target=contextvars.copy_context().run, args=(run, i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for outs, want in zip(found, alone, strict=True):
        assert len(outs) == 30
        for out in outs:
            assert_same_bits(out, want)


# ---- what stays in its row; views

@pytest.mark.parametrize("form", [INT4, "e4m3 plain float32", "int5 minimum float16", "nf4 plain float32", "float16"])
def test_nan_and_infinity_stay_in_their_row(family, form):
    matrix, _ = weight_of(form, 24, 96, 24 if form == INT4 else None)
    m = family.some_tokens[1]
    x = x_of(m, 96, "float16")
    clean = family.product(x, matrix)
    x[0, 5], x[m - 1, 95] = np.nan, np.inf
    got = family.product(x, matrix)
    assert np.isnan(got[0]).all() and not np.isfinite(got[m - 1]).any()
    assert_same_bits(got[1:m - 1], clean[1:m - 1])


@pytest.mark.parametrize("form, bad", [
    *itertools.product(("int4 plain float16", INT4, "int5 minimum float16", "int3 plain bfloat16",
                        "int6 plain int8 float16", "e4m3 plain float32"), (np.nan, np.inf)),
    ("e2m1 plain float8_e8m0fnu", np.nan), ("e2m1 plain float8_e4m3fn float32", np.nan)])   # these have no infinity
def test_scales_that_are_not_finite_reach_their_rows_of_the_weight(family, form, bad):
    coded = coded_weight(form, 40, 256)
    segment = coded.segments[0]
    scale = segment.super_scale if segment.scale.dtype == np.int8 else segment.scale
    clean = family.product(x_of(family.some_tokens[0], 256, "float16"), QMatrix.from_coded(coded))
    scale[5, 0] = scale[19, -1] = bad
    got = family.product(x_of(family.some_tokens[0], 256, "float16"), QMatrix.from_coded(coded))
    assert not np.isfinite(got[:, [5, 19]]).any()
    rest = [n for n in range(40) if n not in (5, 19)]
    assert_same_bits(got[:, rest], clean[:, rest])


def test_no_tokens_launch_nothing(family):
    matrix, _ = weight_of(INT4, 40, 96)
    for shape in ((0, 96), (2, 0, 96)):
        got = cupyattn.quant_gemm(np.zeros(shape, np.float16), matrix)
        assert got.shape == (*shape[:-1], 40) and got.dtype == np.float16
    family.product(np.zeros((0, 96), np.float16), matrix)
    assert not family.launched


def test_views(family):
    """Rows far apart, at 2 bytes past any alignment, into a part of out; a last axis with gaps is refused."""
    matrix, w = weight_of(INT4, 40, 96)
    m = family.some_tokens[1]
    base = np.full((2 * m, 131), np.nan, np.float16)
    for start in (0, 1, 5, 8):
        x = base[::2, start:start + 96]
        x[...] = x_of(m, 96, "float16", start)
        whole = np.full((m, 57), np.nan, np.float32)
        assert_right(family, matrix, w, x, out=whole[:, 3:43])
        assert np.isnan(whole[:, :3]).all() and np.isnan(whole[:, 43:]).all()
        assert_same_bits(whole[:, 3:43], family.product(np.ascontiguousarray(x), matrix))
    with pytest.raises(ValueError, match="x must have a contiguous last axis"):
        cupyattn.quant_gemm(np.zeros((96, m), np.float16).T, matrix)
    with pytest.raises(ValueError, match="out must have a contiguous last axis"):
        cupyattn.quant_gemm(np.zeros((m, 96), np.float16), matrix, out=np.zeros((40, m), np.float16).T)
    with pytest.raises(ValueError, match="x must be .*in_features=96"):
        cupyattn.quant_gemm(np.zeros((m, 104), np.float16), matrix)


def test_bias_accumulate_and_segments(family):
    """Columns in any order, of three widths of codes; bias and what out holds are added before the one rounding."""
    parts = [coded_weight(form, 72, k, group) for form, k, group in
             (("int6 plain float16", 96, 32), ("int4 plain float16", 1184, 32), ("int3 plain float16", 320, 64))]
    order = np.random.default_rng(3).permutation(1600).astype(np.int32)
    coded = CodedWeight("mixed", (72, 1600), tuple(part.segments[0] for part in parts), order)
    matrix, w = QMatrix.from_coded(coded), coded.dequantize()
    m = family.some_tokens[0]
    x, bias, held = x_of(m, 1600, "float16"), x_of(1, 72, "float16")[0], x_of(m, 72, "float32")
    want = x.astype(np.float64) @ w.T + bias
    assert error(family.product(x, matrix, bias=bias), want) <= 1e-5
    family.product(x, matrix, out=held, bias=bias, accumulate=True)
    assert error(held, want + x_of(m, 72, "float32")) <= 1e-5


# ---- graphs

@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("m", [1, 20])
def test_a_captured_call_follows_its_input_a_thousand_times(xp, m):
    matrix = Matrix(4, (40, 128), g_idx=np.random.default_rng(1).permutation(np.arange(128) // 32))
    layer, w = QMatrix.from_gptq(matrix.gptq(g_idx=matrix.g_idx), xp=xp.module), matrix.weight()
    inputs = [x_of(m, 128, "float16", seed) for seed in range(8)]
    x, out = xp.array(inputs[0]), xp.array(np.full((m, 40), np.nan, np.float32))
    stream = xp.module.cuda.Stream(non_blocking=True)
    with stream:
        layer.matmul(x, out=out)
        stream.synchronize()
        if xp.name == "standin":
            xp.events.clear()
        stream.begin_capture()
        layer.matmul(x, out=out)
        graph = stream.end_capture()
        if xp.name == "standin":
            assert set(xp.events) == {"launches"}, "no allocation, copy or wait"
        wanted = [rows.astype(np.float64) @ w.T for rows in inputs]
        for run in range(1000):
            x.set(inputs[run % 8])
            graph.launch(stream)
            stream.synchronize()
            assert error(xp.numpy(out), wanted[run % 8]) <= 1e-5


# ---- sizes past 32 bits

@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.full if name == "pipeline" else [])
                                    for name in FAMILIES], indirect=True)
def test_more_weights_than_32_bits_count(family):
    """131072 x 16640 codes of 8 bits, all 0 but for the first and the last 16 rows: those are what they should be."""
    rows, k = 131072, 16640
    coded = coded_weight("int8 plain float16", 32, k)
    small, w = QMatrix.from_coded(coded), coded.dequantize()
    (segment,) = small.segments

    def spread(array):
        if array is None:
            return None
        large = sparse_array((rows // 16, *array.shape[1:]), array.dtype.name)
        large[[0, -1]] = array
        return large

    matrix = QMatrix(small.format, (rows, k), [segment.with_arrays(spread)])
    assert matrix.segments[0].codes.nbytes > 2**31
    m = family.some_tokens[0]
    x = x_of(m, k, "float16")
    got = family.product(x, matrix)
    assert not got[:, 16:-16].any()
    assert error(np.concatenate([got[:, :16], got[:, -16:]], axis=1), x.astype(np.float64) @ w.T) <= 1e-5
