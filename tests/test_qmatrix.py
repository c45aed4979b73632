# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from coded_weights import coded_weight
from compare import assert_same_bits
from ggml_blocks import by_formula, quantized
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cupyattn import QMatrix
from cupyattn.quant.coded import FLOAT8
from cupyattn.runtime.arrays import dtype_of

BITS = {"Q4_0": 4.5, "Q4_1": 5, "Q8_0": 8.5}
rng = np.random.default_rng(3)
ORDERS = [rng.permutation(96).astype(np.int32) for _ in range(2)]


def _quantized(name, n, k, generator=rng):
    return quantized(name, generator.standard_normal((n, k)).astype(np.float32))


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("shape", [(16, 64), (1, 32), (8, 32), (24, 96), (33, 576), (576, 1536)])
def test_reconstruct_is_ggufs_dequantizer(xp, name, shape):
    raw, want = _quantized(name, *shape)
    kept = raw.copy()
    matrix = QMatrix.from_gguf(raw, name, shape, xp=xp.module)
    assert_same_bits(raw, kept)
    got = matrix.reconstruct()
    arrays = [array for array in matrix.segments[0].arrays if array is not None]
    assert all(isinstance(array, xp.module.ndarray) for array in (got, *arrays)) and matrix.xp is xp.module
    assert_same_bits(xp.numpy(got), want)
    assert matrix.shape == shape and matrix.format == name.lower()
    # one group of all columns takes one scale a tile
    bits = BITS[name] if shape[1] > 32 else BITS[name] - (BITS[name] - int(BITS[name]) or 1) / 2
    tiles = -(-shape[0] // 16) * -(-shape[1] // 64)
    assert matrix.nbytes == tiles * 16 * 64 * bits / 8
    assert repr(matrix) == (f"QMatrix({name.lower()}, {shape[0]}x{shape[1]}, {bits:g} bits per weight, "
                            f"{matrix.nbytes} bytes)")


@pytest.mark.parametrize("name", BITS)
def test_every_block_content_is_read_as_gguf_reads_it(name):
    import gguf

    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[name]
    raw = rng.integers(0, 256, (48, 4, size), np.uint8)
    header = 4 if name == "Q4_1" else 2
    raw[..., :header] = rng.standard_normal((48, 4, header // 2)).astype(np.float16).view(np.uint8)
    kind = gguf.GGMLQuantizationType[name]
    want = gguf.quants.dequantize(raw.reshape(48, -1), kind)
    for spelling in (name, name.lower(), int(kind), kind):
        np.testing.assert_array_equal(QMatrix.from_gguf(raw, spelling, (48, 128)).reconstruct(), want)


@pytest.mark.parametrize("name", BITS)
def test_formulas_of_the_blocks_are_ggufs(name):
    import gguf

    raw, values = by_formula(name, rng.standard_normal((24, 96)).astype(np.float32))
    assert_same_bits(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]), values)


def test_type_and_layout_of_dense_gguf_tensors():
    w = rng.standard_normal((16, 24)).astype(np.float32)
    for name, dtype in (("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
        values = w.astype(dtype)
        matrix = QMatrix.from_gguf(values.view(np.uint8), name, (16, 24))
        assert matrix.format == np.dtype(dtype).name
        assert_same_bits(matrix.reconstruct(), values.astype(np.float32))


def test_one_tile_is_laid_out_as_documented():
    w = np.arange(16 * 64, dtype=np.float32).reshape(16, 64)
    packed = QMatrix.from_dense(w).segments[0].codes
    chunks = packed[0, 0].view(np.float32).reshape(8, 8, 4, 4)          # [chunk, r, c, 4 values]
    for r, c, t, half in ((0, 0, 0, 0), (5, 3, 2, 1), (7, 1, 3, 0)):
        columns = 16 * t + 4 * c + np.array([0, 2, 1, 3])
        np.testing.assert_array_equal(chunks[4 * half + t, r, c], w[r + 8 * half, columns])


def test_concat():
    parts = [_quantized("Q4_1", n, 96) for n in (32, 16, 7)]
    joined = QMatrix.concat(QMatrix.from_gguf(raw, "Q4_1", want.shape) for raw, want in parts)
    assert joined.shape == (55, 96)
    assert_same_bits(joined.reconstruct(), np.concatenate([want for _, want in parts]))
    odd, other = QMatrix.from_dense(np.zeros((7, 96), np.float16)), QMatrix.from_dense(np.zeros((16, 8), np.float16))
    with pytest.raises(ValueError, match="must agree in format and in_features"):
        QMatrix.concat([joined, odd])
    with pytest.raises(ValueError, match="must agree in format and in_features"):
        QMatrix.concat([odd, other])
    with pytest.raises(ValueError, match="out_features a multiple of 16, got QMatrix"):
        QMatrix.concat([odd, odd])
    with pytest.raises(ValueError, match="at least one"):
        QMatrix.concat([])


def test_concat_of_orders():
    weights = [replace(coded_weight("int4 zero float16", n, 96, group=24), order=ORDERS[o])
               for n, o in ((32, 0), (24, 0), (24, 1))]
    a, b, c = map(QMatrix.from_coded, weights)
    joined = QMatrix.concat([a, b])
    want = np.concatenate([weights[0].dequantize(), weights[1].dequantize()]).astype(np.float32)
    assert_same_bits(joined.reconstruct(), want)
    with pytest.raises(ValueError, match="must agree in the order of their columns"):
        QMatrix.concat([a, c])


def test_matrices_move(xp):
    matrix = QMatrix.from_coded(replace(coded_weight("int4 zero float16", 24, 96, group=24), order=ORDERS[0]))
    there = matrix.to(xp.module)
    assert (there is matrix) == (xp.module is np) and there.nbytes == matrix.nbytes
    assert_same_bits(xp.numpy(there.reconstruct()), matrix.reconstruct())
    assert_same_bits(there.to(np).reconstruct(), matrix.reconstruct())


def test_errors():
    raw, _ = _quantized("Q4_0", 16, 64)
    with pytest.raises(NotImplementedError, match="type must be one of Q4_0, Q4_1, .*, F32, F16, BF16, got 'TQ1_0'"):
        QMatrix.from_gguf(raw, "TQ1_0", (16, 64))
    with pytest.raises(ValueError, match="data must hold 64 blocks of 18 bytes, got 576 bytes"):
        QMatrix.from_gguf(raw, "Q4_0", (16, 128))
    with pytest.raises(ValueError, match=r"data must have 32 rows for shape \[32, 32\], got shape \[16, 36\]"):
        QMatrix.from_gguf(raw, "Q4_0", (32, 32))
    square, _ = _quantized("Q8_0", 64, 32)
    with pytest.raises(ValueError, match=r"data must have 32 rows for shape \[32, 64\], got shape \[64, 34\]"):
        QMatrix.from_gguf(square, "Q8_0", (32, 64))      # ne as it is in the file
    with pytest.raises(ValueError, match=r"data must have 8 rows for shape \[8, 16\], got shape \[16, 16\]"):
        QMatrix.from_gguf(np.zeros((16, 8), np.float16).view(np.uint8), "F16", (8, 16))
    with pytest.raises(ValueError, match="in_features a multiple of 32 for Q4_0"):
        QMatrix.from_gguf(raw, "Q4_0", (16, 40))
    with pytest.raises(TypeError, match="data must be uint8 or bytes, got float32"):
        QMatrix.from_gguf(raw.view(np.float32), "Q4_0", (16, 64))
    with pytest.raises(ValueError, match="in_features a multiple of 8"):
        QMatrix.from_dense(np.zeros((16, 12), np.float16))
    with pytest.raises(TypeError, match="w must be float16 or bfloat16 or float32, got float64"):
        QMatrix.from_dense(np.zeros((16, 16)))
    with pytest.raises(ValueError, match=r"w must be \[out_features, in_features\]"):
        QMatrix.from_dense(np.zeros(16, np.float16))
    assert_same_bits(QMatrix.from_gguf(raw.tobytes(), 2, (16, 64)).reconstruct(),
                     QMatrix.from_gguf(raw, "Q4_0", (16, 64)).reconstruct())
    with pytest.raises(ValueError, match="both at least 1"):
        QMatrix.from_gguf(raw[:0], "Q4_0", (0, 64))


@pytest.mark.parametrize("kind, bad, message", [
    ("e4m3", (0x7F, 0xFF, 0xFF), "3 codes of 512 that are NaN$"),
    ("e5m2", (0x7C, 0xFC, 0x7D, 0xFF), "4 codes of 512 that are NaN or infinity$")])
def test_fp8_that_is_not_finite_is_refused(kind, bad, message):
    codes = np.full((16, 32), {"e4m3": 0xFE, "e5m2": 0xFB}[kind], np.uint8)   # the least number of all
    weight = codes.view(dtype_of(FLOAT8[kind]))
    tensors = {"weight": weight, "weight_scale": np.float32(1)}
    np.testing.assert_array_equal(QMatrix.from_fp8(tensors).reconstruct(), weight.astype(np.float32))
    codes.reshape(-1)[5:5 + len(bad)] = bad
    with pytest.raises(ValueError, match="QMatrix: weight must hold finite numbers only, got " + message):
        QMatrix.from_fp8(tensors)


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(1, 70), groups=st.integers(1, 9), name=st.sampled_from(list(BITS)), seed=st.integers(0, 2**32 - 1))
def test_any_shape_round_trips(n, groups, name, seed):
    raw, want = _quantized(name, n, 32 * groups, np.random.default_rng(seed))
    assert_same_bits(QMatrix.from_gguf(raw, name, want.shape).reconstruct(), want)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        dense = want[:, :max(8, 8 * (seed % (4 * groups)))].astype(dtype)
        assert_same_bits(QMatrix.from_dense(dense).reconstruct(), dense.astype(np.float32))
