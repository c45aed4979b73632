# SPDX-License-Identifier: Apache-2.0
"""The packing kernel against the packer in NumPy and the layout as it is written down, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from coded_weights import FORMS, coded_weight
from compare import assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn.quant import layout
from cupyattn.quant.coded import CodedWeight
from cupyattn.reference.repack import repack as expected_packing
from cupyattn.runtime.cpu import settings

ARRAYS = ("scale", "zero", "minimum", "super_scale", "super_minimum")
SCHEDULES = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))


def segment_of(name, rows, columns, group=None):
    return coded_weight(name, rows, columns, group=group).segments[0]


def moved(segment, xp):
    """(segment on `xp`, keywords of repack): CuPy has no FP8 dtypes."""
    keywords = {}
    if xp.name != "numpy" and segment.scale.dtype.name.startswith("float8"):
        keywords = {"scale_dtype": segment.scale.dtype.name}
        segment = replace(segment, scale=segment.scale.view(np.uint8))
    return replace(segment, codes=xp.array(segment.codes), **{
        name: xp.array(getattr(segment, name)) for name in ARRAYS if getattr(segment, name) is not None}), keywords


def assert_packed(found, want, xp=None):
    assert found.form == want.form and found.columns == want.columns
    for name in ("codes", "scales", "supers"):
        array = getattr(found, name)
        if array is None or getattr(want, name) is None:
            assert array is getattr(want, name)
            continue
        if xp is not None:
            assert isinstance(array, xp.module.ndarray)
            array = xp.numpy(array)
        assert_same_bits(array, getattr(want, name))


@pytest.mark.parametrize("name", FORMS)
def test_repack(xp, name):
    for shape in ((33, 584), (5, 72)):
        segment = segment_of(name, *shape)
        on_xp, keywords = moved(segment, xp)
        assert_packed(cupyattn.repack(on_xp, **keywords), layout.pack_segment(segment), xp)


@pytest.mark.parametrize("name", FORMS)
def test_reference(name):
    segment = segment_of(name, 24, 136)
    want = expected_packing(segment)
    assert_packed(layout.pack_segment(segment), want)
    assert_packed(cupyattn.repack(segment), want)


@pytest.mark.parametrize("name", ["int4 zero float16", "int3 plain bfloat16", "int8 minimum float32",
                                  "e2m1 plain float8_e4m3fn float32"])
@pytest.mark.parametrize("group", [8, 16, 20, 23, 40, 48, 64, 192, 1000])
def test_groups(xp, name, group):
    segment = segment_of(name, 24, 328, group=group)
    on_xp, keywords = moved(segment, xp)
    packed = cupyattn.repack(on_xp, **keywords)
    assert_packed(packed, layout.pack_segment(segment), xp)
    assert packed.columns == 328 or group in (8, 20, 23, 40)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(16, 64), (1, 8), (33, 584), (17, 67)])
def test_uncompressed(xp, dtype, shape):
    w = np.random.default_rng(3).standard_normal(shape, np.float32).astype(dtype_of(dtype))
    packed = cupyattn.repack(xp.array(w))
    assert_packed(packed, layout.pack_dense(w), xp)
    assert_packed(packed, expected_packing(w), xp)


@pytest.mark.parametrize("name", ["int4 zero float16", "int3 plain int8 float16", "int8 minimum float16"])
def test_views_of_larger_arrays(xp, name):
    """Columns off alignment, transposed arrays, arrays of every other row: nothing beside them is read."""
    segment = segment_of(name, 20, 144)
    want = layout.pack_segment(segment)

    def framed(array, transposed):
        shape = (2 * array.shape[0], array.shape[1] + 5)
        wide = poison(np.empty(shape[::-1] if transposed else shape, array.dtype))
        inner = wide[3:-2, ::2].T if transposed else wide[::2, 3:-2]
        inner[...] = array
        wide = xp.array(wide)
        return wide[3:-2, ::2].T if transposed else wide[::2, 3:-2]

    for transposed in (False, True):
        views = {name: framed(getattr(segment, name), transposed) for name in ("codes", *ARRAYS)
                 if getattr(segment, name) is not None}
        assert_packed(cupyattn.repack(replace(segment, **views)), want, xp)
    dense = framed(np.arange(20 * 144, dtype=np.float32).reshape(20, 144), True)
    assert_packed(cupyattn.repack(dense), layout.pack_dense(np.ascontiguousarray(xp.numpy(dense))), xp)


def test_into_given_arrays(xp):
    first, second = (segment_of("int5 minimum int8 float16", 33, 584), coded_weight(
        "int5 minimum int8 float16", 33, 584, seed=1).segments[0])
    out = cupyattn.repack(moved(first, xp)[0])
    assert cupyattn.repack(moved(second, xp)[0], out=out) is out
    assert_packed(out, layout.pack_segment(second), xp)


@pytest.mark.parametrize("with_order", [False, True])
def test_weights_of_several_segments(with_order):
    parts = [segment_of(f"int{bits} plain float16", 24, columns, group=group)
             for bits, columns, group in ((6, 96, 24), (3, 40, 32), (2, 64, 32))]
    order = np.random.default_rng(2).permutation(200).astype(np.int32) if with_order else None
    weight = CodedWeight("mixed", (24, 200), tuple(parts), order)
    segments, columns = layout.pack(weight, cupyattn.repack)
    want, want_columns = layout.pack(weight)
    for found, expected in zip(segments, want, strict=True):
        assert_packed(found, expected)
    assert_same_bits(columns, want_columns)


@pytest.mark.parametrize("name", ["int3 plain int8 float16", "int4 zero float16", "e2m1 plain float8_e8m0fnu",
                                  "e2m1 plain float8_e4m3fn float32"])
@pytest.mark.parametrize("group", [16, 24])
def test_matrix_packed_where_it_lives(xp, name, group):
    weight = coded_weight(name, 24, 136, group=group)
    if group == 24:
        weight = replace(weight, order=np.random.default_rng(2).permutation(136).astype(np.int32))
    want, matrix = cupyattn.QMatrix.from_coded(weight), cupyattn.QMatrix.from_coded(weight, xp=xp.module)
    assert matrix.xp is xp.module and matrix.shape == want.shape
    assert_packed(matrix.segments[0], want.segments[0], xp)
    assert (matrix.order is None) == (group == 16)
    if group == 24:
        assert_same_bits(xp.numpy(matrix.order), want.order)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_uncompressed_matrix_packed_where_it_lives(xp, dtype):
    w = np.random.default_rng(3).standard_normal((24, 136), np.float32).astype(dtype_of(dtype))
    for source, module in ((w, xp.module), (xp.array(w), None), (xp.array(w).T, None), (xp.array(w), np)):
        matrix = cupyattn.QMatrix.from_dense(source, xp=module)
        assert matrix.xp is (module or xp.module)
        want = layout.pack_dense(w if source.shape == w.shape else np.ascontiguousarray(w.T))
        assert_packed(matrix.segments[0], want, xp if module is not np else None)


def test_supers_within_a_tile_join_the_scales():
    segment = segment_of("int4 plain int8 float16", 16, 256)
    odd = replace(segment, super_group=32, super_scale=segment.super_scale.repeat(8, axis=1))
    packed = cupyattn.repack(odd)
    assert packed.form.scale == "float32" and packed.supers is None
    assert_packed(packed, layout.pack_segment(odd))


@pytest.mark.parametrize("name, group", [("int4 zero float16", 128), ("int5 minimum int8 float16", 32),
                                         ("int3 plain float16", 20), ("int8 plain float16", 23),
                                         ("e2m1 plain float8_e4m3fn float32", 16)])
def test_repack_checked(name, group):
    segment = segment_of(name, 20, 200, group=group)
    want = layout.pack_segment(segment)
    for schedule, seed in SCHEDULES:
        with settings(check=True, schedule=schedule, seed=seed):
            assert_packed(cupyattn.repack(segment), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_uncompressed_checked(dtype):
    w = np.random.default_rng(3).standard_normal((20, 200), np.float32).astype(dtype_of(dtype))
    for schedule, seed in SCHEDULES:
        with settings(check=True, schedule=schedule, seed=seed):
            assert_packed(cupyattn.repack(w), layout.pack_dense(w))


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 40), columns=st.integers(1, 300), group=st.integers(1, 200), name=st.sampled_from(list(FORMS)))
def test_any_shape(n, columns, group, name):
    segment = segment_of(name, n, columns, group=group)
    assert_packed(cupyattn.repack(segment), layout.pack_segment(segment))


def _bad(**changes):
    return replace(segment_of("int4 zero float16", 16, 128, group=32), **changes)


@pytest.mark.parametrize("error, segment, rule", [
    (TypeError, [1], "segment must be a NumPy or CuPy array, got list"),
    (TypeError, np.zeros((16, 64)), "segment must be float16 or bfloat16 or float32, got float64"),
    (ValueError, np.zeros((0, 64), np.float16), r"segment must be \[N, columns\], both at least 1, got \[0, 64\]"),
    (TypeError, _bad(codes=np.zeros((16, 128), np.int8)), "segment.codes must be uint8, got int8"),
    (ValueError, _bad(codes=np.zeros(16, np.uint8)), r"segment.codes must be \[N, columns\]"),
    (NotImplementedError, _bad(bits=7), "segment must be of 2, 3, 4, 5, 6, 8 bits for kind 'int', got 7 bits"),
    (NotImplementedError, _bad(kind="nf5"), "segment must be of kind int, nf4, fp4, e2m1, iq4, e4m3, e5m2, got 'nf5'"),
    (ValueError, _bad(minimum=np.zeros((16, 4), np.float16)), "segment must have zero or minimum, got both"),
    (TypeError, _bad(scale=np.zeros((16, 4))), "segment.scale must be .*, got float64"),
    (ValueError, _bad(scale=np.zeros((16, 5), np.float16)), r"segment.scale must be \[N, groups\] = \[16, 4\], got"),
    (TypeError, _bad(zero=np.zeros((16, 4), np.float32)), "segment.zero must be of the dtype of scale, got float32"),
    (ValueError, _bad(group=0), "segment.group must be an int32 of at least 1, got 0"),
    (ValueError, _bad(super_group=48, super_scale=np.zeros((16, 3), np.float16)),
     "segment.super_group must be a multiple of group 32, got 48"),
])
def test_errors(error, segment, rule):
    with pytest.raises(error, match=f"repack: {rule}"):
        cupyattn.repack(segment)


def test_errors_of_keywords():
    segment = segment_of("e2m1 plain float8_e4m3fn float32", 16, 128)
    coded = replace(segment, scale=segment.scale.view(np.uint8))
    with pytest.raises(TypeError, match="repack: segment.scale must be .*, got uint8"):
        cupyattn.repack(coded)
    with pytest.raises(TypeError, match="repack: scale_dtype must be float8_e4m3fn or float8_e8m0fnu, got 'float16'"):
        cupyattn.repack(coded, scale_dtype="float16")
    assert_packed(cupyattn.repack(coded, scale_dtype="float8_e4m3fn"), layout.pack_segment(segment))
    small = replace(coded, super_group=32, super_scale=np.ones((16, 4), np.float32))
    with pytest.raises(NotImplementedError, match="repack: segment must have one super_scale per whole tiles"):
        cupyattn.repack(small, scale_dtype="float8_e4m3fn")
    out = cupyattn.repack(segment)
    with pytest.raises(ValueError, match="repack: out must be a PackedSegment of Form.*, got Form"):
        cupyattn.repack(segment_of("nf4 plain float32", 16, 128), out=out)
    with pytest.raises(ValueError, match=r"repack: out.codes must be .* = \[2, 2, 512\], got \[1, 2, 512\]"):
        cupyattn.repack(segment_of("e2m1 plain float8_e4m3fn float32", 17, 128), out=out)
    with pytest.raises(ValueError, match="repack: out.scales must be contiguous"):
        cupyattn.repack(segment, out=replace(out, scales=np.empty((1, 2, 128), np.uint8)[..., ::2]))
