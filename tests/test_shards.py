# SPDX-License-Identifier: Apache-2.0
"""Rows and columns of packed matrices for tensor parallel; constructors on arrays of every kind."""

from dataclasses import replace

import numpy as np
import pytest
from coded_weights import FORMS, coded_weight
from compare import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import gptq, mixed
from test_formats_integer import Matrix, exl2_tensors

from cupyattn import QMatrix
from cupyattn.quant import layout

RNG = np.random.default_rng(7)


def act_order():
    tensors, _ = gptq(40, 256)
    return QMatrix.from_gptq(tensors | {"g_idx": RNG.permutation(np.repeat(np.arange(4, dtype=np.int32), 64))})


def uneven_act_order():
    """Groups of 40, 30 and 18 columns, filled up to 64, 32 and 32."""
    g_idx = RNG.permutation(np.repeat(np.arange(3), (40, 30, 18)))
    return QMatrix.from_gptq(Matrix(3, (40, 88), g_idx=g_idx).gptq(g_idx=g_idx))


def act_order_of_compressed_tensors():
    g_idx = RNG.permutation(np.repeat(np.arange(3, dtype=np.int32), 32))
    return QMatrix.from_compressed_tensors(Matrix(4, (40, 96), g_idx=g_idx).compressed(weight_g_idx=g_idx))


def exl2():
    return QMatrix.from_exl2(exl2_tensors([(6, 32), (5, 64), (4, 96), (3, 32), (2, 16)], 64)[0])


MATRICES = {
    **{scheme: (lambda scheme=scheme: QMatrix.quantize(RNG.standard_normal((40, 272)).astype(np.float32), scheme))
       for scheme in ("int4", "int4-g128-asym", "int8-g48", "fp8", "nf4", "mxfp4", "nvfp4")},
    "dense": lambda: QMatrix.from_dense(RNG.standard_normal((40, 272)).astype(np.float16)),
    "segments in a random order": mixed, "act-order": act_order, "uneven act-order": uneven_act_order,
    "act-order of compressed-tensors": act_order_of_compressed_tensors, "exl2": exl2,
    "q4_k": lambda: QMatrix.from_gguf(RNG.integers(0, 60, 40 * 144 * 2, np.uint8), "Q4_K", (40, 512)),
}


def weights(matrix):
    """float64 [N, K] by plain NumPy."""
    if matrix.segments[0].form.kind in layout.DENSE:
        (segment,) = matrix.segments
        whole = layout.unpack_codes(segment.codes, segment.form).astype(np.float64)
        return whole[:matrix.shape[0], :matrix.shape[1]]
    return layout.unpack(matrix.segments, matrix.order, matrix.format, matrix.shape).dequantize()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", MATRICES)
def test_shards_are_the_matrix(name, size):
    matrix = MATRICES[name]()
    whole = weights(matrix)
    rows = [matrix.row_shard(rank, size) for rank in range(size)]
    assert_same_bits(np.concatenate([weights(shard) for shard in rows]), whole)
    assert_same_bits(weights(QMatrix.concat(rows)), whole)
    assert all(shard.shape[0] % 16 == 0 for shard in rows[:-1])
    columns = [matrix.column_shard(rank, size) for rank in range(size)]
    assert_same_bits(np.concatenate([weights(shard) for shard in columns], axis=1), whole)
    assert all(shard.shape[1] % 16 == 0 for shard in columns[:-1])


def test_k_quants_keep_their_scales_of_scales():
    shard = MATRICES["q4_k"]().column_shard(1, 2)
    assert shard.shape == (40, 256) and shard.segments[0].supers is not None and shard.order is None
    assert MATRICES["nvfp4"]().column_shard(1, 2).segments[0].supers is not None


@pytest.mark.parametrize("name", ["int4-g128-asym", "segments in a random order", "act-order", "uneven act-order",
                                  "act-order of compressed-tensors", "exl2"])
def test_two_layers_in_tensor_parallel(name):
    """y = W2 (W1 x): each rank has rows of W1 and columns of W2, and only the sum of y is exchanged."""
    after = MATRICES[name]()
    before = QMatrix.quantize(RNG.standard_normal((after.shape[1], 64)).astype(np.float32), "int8")
    x = RNG.standard_normal((5, 64)).astype(np.float32)
    expected = after.matmul(before.matmul(x))
    for size in (2, 4):
        found = sum(after.column_shard(rank, size).matmul(before.row_shard(rank, size).matmul(x))
                    for rank in range(size))
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def any_coded(name, rows, columns, group, seed, with_order):
    """A CodedWeight of form `name`, its columns in a random order, some of them of no x."""
    weight = coded_weight(name, rows, columns, group, seed)
    if not with_order:
        return weight
    rng = np.random.default_rng(seed)
    order = rng.permutation(columns).astype(np.int32)
    order[order >= columns - 8 * (seed % 3 if columns > 16 else 0)] = -1   # as groups that are filled up have
    return replace(weight, shape=(rows, int((order >= 0).sum())), order=order)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(name=st.sampled_from(list(FORMS)), rows=st.integers(1, 6), eighths=st.integers(2, 50), sizes=st.data(),
       with_order=st.booleans(), group=st.sampled_from([8, 16, 24, 32, 48, 64, 96, 128, 256]),
       seed=st.integers(0, 99))
def test_shards_of_any_weight_joined_are_the_weight(name, rows, eighths, sizes, with_order, group, seed):
    """Rows cut and joined by concat, columns cut and laid side by side, and columns of rows: the same numbers."""
    shape = 16 * rows - 8 * (seed % 2), 8 * eighths
    coded = any_coded(name, *shape, group, seed, with_order)
    matrix, whole = QMatrix.from_coded(coded), coded.dequantize()
    assert_same_bits(weights(matrix), whole)
    by_rows, by_columns = (sizes.draw(st.integers(1, min(4, -(-n // 16)))) for n in matrix.shape)
    shards = [matrix.row_shard(rank, by_rows) for rank in range(by_rows)]
    joined = QMatrix.concat(shards)
    assert joined.shape == matrix.shape and joined.nbytes == matrix.nbytes
    assert_same_bits(weights(joined), whole)
    for name in ("codes", "scales", "supers"):
        for found, want in zip(joined.segments, matrix.segments, strict=True):
            if getattr(want, name) is not None:
                assert_same_bits(getattr(found, name), getattr(want, name))
    parts = [[shard.column_shard(rank, by_columns) for rank in range(by_columns)] for shard in shards]
    assert_same_bits(np.block([[weights(part) for part in row] for row in parts]), whole)
    columns = [QMatrix.concat(column) for column in zip(*parts, strict=True)]   # forms and orders still agree
    assert_same_bits(np.concatenate([weights(column) for column in columns], axis=1), whole)


@pytest.mark.parametrize(("rank", "size", "message"), [
    (0, 0, "size must be from 1 to 3, the sixteens of 40 features, got 0"), (0, 4, "size must be from 1 to 3"),
    (2, 2, "rank must be from 0 to 1, got 2"), (-1, 2, "rank must be from 0 to 1, got -1")])
def test_shards_that_are_none(rank, size, message):
    with pytest.raises(ValueError, match=message):
        MATRICES["int4"]().row_shard(rank, size)


def test_arrays_of_every_kind(xp):
    """Constructors take host or device arrays, and the matrix is where they are."""
    tensors, weight = gptq(48, 128)
    matrix = QMatrix.from_gptq({name: xp.array(array) for name, array in tensors.items()})
    assert matrix.xp is xp.module
    np.testing.assert_allclose(xp.numpy(matrix.reconstruct()), weight, rtol=1e-6)
    assert matrix.column_shard(1, 2).xp is xp.module
    assert QMatrix.from_gptq(tensors, xp=xp.module).xp is xp.module


@pytest.mark.parametrize("name", MATRICES)
def test_ranges_with_borders_of_heads(name):
    """Heads of 8 and of 24 rows or columns: borders that are no sixteens."""
    matrix = MATRICES[name]()
    whole = weights(matrix)
    rows, columns = matrix.shape
    for first, last in ((0, 16), (8, rows), (16, 24), (24, rows)):
        assert_same_bits(weights(matrix.row_range(first, last)), whole[first:last])
    for first, last in ((0, 48), (24, 72), (48, columns - 8)):
        assert_same_bits(weights(matrix.column_range(first, last)), whole[:, first:last])
    aligned = matrix.row_range(16, rows)
    assert np.shares_memory(aligned.segments[0].codes, matrix.segments[0].codes)


@pytest.mark.parametrize(("start", "stop"), [(-1, 8), (8, 8), (16, 8), (0, 41)])
def test_ranges_that_are_none(start, stop):
    with pytest.raises(ValueError, match=f"start and stop must hold some of the 40 out_features, got {start} to"):
        MATRICES["int4"]().row_range(start, stop)
    with pytest.raises(ValueError, match="some of the 272 in_features"):
        MATRICES["int4"]().column_range(0, 280)
