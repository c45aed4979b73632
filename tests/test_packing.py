# SPDX-License-Identifier: Apache-2.0
"""The packed layout, on the host: what was put in comes out again, and lies where layout.py says."""

import time
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from coded_weights import FORMS, coded_weight
from compare import assert_same_bits
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cupyattn.quant import layout
from cupyattn.quant.coded import CodedWeight

INTEGERS = (2, 3, 4, 5, 6, 8)


def _assert_round_trip(weight):
    kept = [segment.codes.copy() for segment in weight.segments]
    segments, order = layout.pack(weight)
    back = layout.unpack(segments, order, weight.format, weight.shape)
    for before, after, codes in zip(weight.segments, back.segments, kept, strict=True):
        assert_same_bits(before.codes, codes)
        assert_same_bits(after.codes, codes)
        assert after.group == min(before.group, before.codes.shape[1])
        if before.super_scale is None:
            assert_same_bits(after.scale, before.scale)
    assert_same_bits(back.dequantize(), weight.dequantize())
    for segment in segments:
        row_tiles, column_tiles = segment.codes.shape[:2]
        assert segment.codes.shape[2] == segment.form.tile_bytes and row_tiles == -(-weight.shape[0] // 16)
        assert column_tiles == -(-segment.columns // 64)
    return segments, order


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", [(16, 64), (1, 8), (24, 96), (33, 584)])
def test_round_trip(name, shape):
    _assert_round_trip(coded_weight(name, *shape))


@pytest.mark.parametrize("name", ["int4 zero float16", "int3 plain bfloat16", "int8 minimum float32"])
@pytest.mark.parametrize("group", [8, 16, 24, 32, 48, 64, 96, 128, 192, 1000])
@pytest.mark.parametrize("columns", [8, 96, 328, 640])
def test_groups(name, group, columns):
    weight = coded_weight(name, 24, columns, group=group)
    (segment,), order = _assert_round_trip(weight)
    groups, spans = segment.form.groups, segment.form.tiles_per_scale
    if group >= columns:
        assert (groups, spans) == (1, -(-columns // 64))
    elif group % 16:
        wide = -(-group // 16) * 16
        assert len(order) == segment.columns and np.count_nonzero(order >= 0) == columns
        assert order[:group].tolist() == list(range(group)) and (order[group:wide] == -1).all()
    else:
        assert order is None
        assert groups * spans == (group // 64 if group % 64 == 0 else 2 if group % 32 == 0 else 4)


def test_order_of_columns():
    weight = coded_weight("int4 zero float16", 24, 104, group=24)
    order = np.random.default_rng(1).permutation(104).astype(np.int32)
    _, packed_order = _assert_round_trip(replace(weight, order=order))
    assert_same_bits(packed_order[packed_order >= 0], order)


@pytest.mark.parametrize("group", [24, 32])
def test_columns_of_no_x(group):
    weight = coded_weight("int4 zero float16", 24, 96, group=group)
    order = np.full(96, -1, np.int32)
    used = np.arange(96) % group < 20
    order[used] = np.random.default_rng(1).permutation(np.count_nonzero(used))
    weight = replace(weight, order=order, shape=(24, int(order.max()) + 1))
    (packed,), packed_order = layout.pack(weight)
    back = layout.unpack((packed,), packed_order, weight.format, weight.shape)
    assert_same_bits(back.dequantize(), weight.dequantize())


def test_segments_side_by_side():
    parts = [coded_weight(f"int{bits} plain float16", 24, columns, group=32).segments[0]
             for bits, columns in ((6, 96), (3, 40), (2, 64))]
    order = np.random.default_rng(2).permutation(200).astype(np.int32)
    segments, packed_order = _assert_round_trip(CodedWeight("mixed", (24, 200), tuple(parts), order))
    assert [s.columns for s in segments] == [128, 64, 64] and len(packed_order) == 256
    segments, packed_order = _assert_round_trip(CodedWeight("mixed", (24, 200), tuple(parts)))
    assert_same_bits(packed_order[packed_order >= 0], np.arange(200, dtype=np.int32))


@pytest.mark.parametrize("shape", [(16, 64), (24, 96), (5, 136), (33, 584)])
@pytest.mark.parametrize("group", [16, 24, 40])
def test_one_super_of_all_columns(shape, group):
    """Filling the groups up leaves it the only one."""
    (segment,), _ = _assert_round_trip(coded_weight("e2m1 plain float8_e4m3fn float32", *shape, group=group))
    assert segment.form.tiles_per_super == segment.codes.shape[1] and segment.supers.shape[1] == 1


@pytest.mark.parametrize("bits", INTEGERS)
def test_integers_lie_where_the_layout_says(bits):
    weight = coded_weight(f"int{bits} plain float16", 16, 64)
    codes = weight.segments[0].codes
    tile = layout.pack(weight)[0][0].codes[0, 0]
    for lane, t, half, i in ((0, 0, 0, 0), (13, 2, 1, 3), (31, 3, 0, 2), (7, 1, 1, 1)):
        r, c, at, value, shift = lane // 4, lane % 4, 0, 0, 0
        if bits == 8:
            value = tile.reshape(2, 32, 4, 4)[half, lane, t, (0, 2, 1, 3).index(i)]
        else:
            for plane in layout.PLANES[bits]:
                words = tile[at:at + 128 * plane].view(np.uint32).reshape(32, plane)[lane]
                pair = 4 * t + half + 2 * (i // 2)
                word = int(words[pair // (16 // plane)]) >> plane * (pair % (16 // plane)) + 16 * (i % 2)
                value |= (word & 2**plane - 1) << shift
                at, shift = at + 128 * plane, shift + plane
        assert value == codes[r + 8 * half, 16 * t + 4 * c + i]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("shape", [(16, 64), (1, 8), (33, 584)])
def test_uncompressed(dtype, shape):
    w = np.random.default_rng(3).standard_normal(shape).astype(dtype)
    packed = layout.pack_dense(w)
    held = layout.unpack_codes(packed.codes, packed.form)
    assert_same_bits(held[:shape[0], :shape[1]], w)
    assert not held[shape[0]:].any() and not held[:, shape[1]:].any()


def test_uncompressed_weights_lie_where_the_layout_says():
    w = np.arange(16 * 64).reshape(16, 64)
    wide = layout.pack_dense(w.astype(np.float32)).codes[0, 0].view(np.float32).reshape(2, 4, 8, 4, 4)
    narrow = layout.pack_dense(w.astype(np.float16)).codes[0, 0].view(np.float16).reshape(2, 2, 8, 4, 2, 4)
    for r, c, t, half in ((0, 0, 0, 0), (5, 3, 2, 1), (7, 1, 3, 0)):
        columns = w[r + 8 * half, 16 * t + 4 * c:16 * t + 4 * c + 4]
        np.testing.assert_array_equal(wide[half, t, r, c], columns[[0, 2, 1, 3]])
        np.testing.assert_array_equal(narrow[half, t // 2, r, c, t % 2], columns)


def test_scales_lie_where_the_layout_says():
    weight = coded_weight("int4 zero float16", 32, 256, group=32)
    segment = weight.segments[0]
    scales = layout.pack(weight)[0][0].scales.view(np.float16).reshape(2, 4, 8, 2, 2, 2)
    assert scales[1, 3, 5, 0, 1, 0] == segment.scale[16 + 8 + 5, 6]
    assert scales[1, 3, 5, 1, 0, 1] == segment.zero[16 + 5, 7]
    weight = coded_weight("int4 minimum int8 float16", 16, 512)             # as Q4_K
    segment, packed = weight.segments[0], layout.pack(weight)[0][0]
    assert (packed.form.groups, packed.form.tiles_per_super) == (2, 4)
    supers = packed.supers.view(np.float16).reshape(1, 2, 8, 2, 2)
    assert supers[0, 1, 3, 1, 0] == segment.super_scale[11, 1]
    assert supers[0, 1, 3, 0, 1] == segment.super_minimum[3, 1]


def test_supers_of_odd_groups_join_the_scales():
    weight = coded_weight("int4 plain int8 float16", 16, 256)
    segment = weight.segments[0]
    odd = replace(segment, super_group=32, super_scale=segment.super_scale.repeat(8, axis=1))
    (packed,), _ = layout.pack(replace(weight, segments=(odd,)))
    assert (packed.form.scale, packed.supers) == ("float32", None)
    back = layout.unpack((packed,), None, "x", weight.shape)
    assert_same_bits(back.dequantize(), replace(weight, segments=(odd,)).dequantize())


def _arrays(segment):
    return [value for value in vars(segment).values() if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("name, group", [
    ("int4 zero float16", 128), ("int8 minimum float16", 128), ("int2 minimum int8 float16", 16),
    ("int3 zero float16", 64), ("int5 minimum int8 float16", 32), ("int6 plain int8 float16", 16),
    ("nf4 plain float32", 64), ("e2m1 plain float8_e4m3fn float32", 16), ("int4 zero float16", 24)])
def test_packing_is_fast(name, group):
    """At least 200 MB/s of the segment's bytes, and 0.02 of the speed of copying them; the thread's own time, which
    other processes lengthen but little."""
    segment = coded_weight(name, 4096, 4096, group=group).segments[0]
    arrays = _arrays(segment)
    nbytes, copies = sum(array.nbytes for array in arrays), [np.empty_like(array) for array in arrays]
    copying, packing = [], []
    while len(packing) < 3 or len(packing) < 12 and min(copying[1:]) < 0.02 * min(packing):
        times = [time.thread_time()]
        for copy, array in zip(copies, arrays, strict=True):
            np.copyto(copy, array)
        times.append(time.thread_time())
        packed = layout.pack_segment(segment)
        times.append(time.thread_time())
        copying.append(times[1] - times[0])
        packing.append(times[2] - times[1])
    ratio, rate = min(copying[1:]) / min(packing), nbytes / min(packing)   # the first copy makes its pages
    print(f"{name}: {rate / 1e6:.0f} MB/s, {ratio:.3f} of a copy")
    assert packed.columns >= 4096
    assert rate >= 200e6 and ratio >= 0.02, f"{rate / 1e6:.0f} MB/s, {ratio:.3f} of a copy"


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(1, 40), eighths=st.integers(1, 40), group=st.integers(1, 26), name=st.sampled_from(list(FORMS)),
       seed=st.integers(0, 2**32 - 1))
def test_any_shape(n, eighths, group, name, seed):
    _assert_round_trip(coded_weight(name, n, 8 * eighths, group=8 * group, seed=seed))
