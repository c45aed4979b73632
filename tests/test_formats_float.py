# SPDX-License-Identifier: Apache-2.0
"""FP8, bitsandbytes, MXFP4 and NVFP4 checkpoints against slow decoders; and what `quantize` does to a weight.

The decoders here go number by number through the formats' definitions and share nothing with the package.
"""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from compare import dtype_of
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyattn.quant import bitsandbytes, fp8, mxfp4, nvfp4
from cupyattn.quant.quantize import quantize

E2M1 = [0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6]
NF4 = [-1, -.6961928009986877, -.5250730514526367, -.39491748809814453, -.28444138169288635, -.18477343022823334,
       -.09105003625154495, 0, .07958029955625534, .16093020141124725, .24611230194568634, .33791524171829224,
       .44070982933044434, .5626170039176941, .7229568362236023, 1]
FP4 = [float(np.float32(s * v / 12)) for s in (1, -1) for v in (0, 1 / 16, 8, 12, 4, 6, 2, 3)]
TABLES = {"nf4": NF4, "fp4": FP4}


def e4m3(byte):
    byte = int(byte)
    sign, exponent, fraction = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0**(exponent - 10))


def e5m2(byte):
    sign, exponent, fraction = -1 if byte >> 7 else 1, byte >> 2 & 31, byte & 3
    if exponent == 31:
        return math.nan if fraction else sign * math.inf
    return sign * (fraction * 2.0**-16 if exponent == 0 else (4 + fraction) * 2.0**(exponent - 17))


def e8m0(byte):
    return math.nan if byte == 255 else 2.0**(int(byte) - 127)


def code_bytes(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def equal(coded, want):
    assert coded.shape == np.shape(want)
    assert np.array_equal(coded.dequantize(), np.array(want, np.float64), equal_nan=True)


# FP8

@pytest.mark.parametrize(("dtype", "decode"), [("float8_e4m3fn", e4m3), ("float8_e5m2", e5m2)])
def test_fp8_every_code(dtype, decode):
    weight = np.arange(256, dtype=np.uint8).reshape(8, 32)
    coded = fp8.read({"weight": weight.view(getattr(ml_dtypes, dtype)), "weight_scale": np.float32(0.5)})
    equal(coded, [[0.5 * decode(byte) for byte in row] for row in weight.tolist()])
    assert coded.segments[0].scale.shape == (8, 1)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(136, 264), (8, 8), (256, 128), (128, 136), (16, 1032)])
def test_fp8_blocks(shape, name):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.1, 2, (-(-shape[0] // 128), -(-shape[1] // 128))).astype(np.float32)
    coded = fp8.read({"weight": weight, name: scale, "input_scale": np.float32(3)})
    equal(coded, [[e4m3(weight[n, k].tobytes()[0]) * float(scale[n // 128, k // 128]) for k in range(shape[1])]
                  for n in range(shape[0])])
    (segment,) = coded.segments
    assert segment.kind == "e4m3" and segment.scale.dtype == np.float32 and len(segment.scale) == shape[0]


def test_fp8_scales_of_tensor_row_and_other_blocks():
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(24, 40)).astype(ml_dtypes.float8_e4m3fn)
    numbers = weight.astype(np.float64)
    rows = rng.uniform(0.1, 2, 24).astype(dtype_of("bfloat16"))
    for scale in (np.full((), 3, np.float16), np.full(1, 3, np.float32), np.full((1, 1), 3, np.float32)):
        equal(fp8.read({"weight": weight, "weight_scale": scale}), 3 * numbers)
    for scale in (rows, rows[:, None]):
        equal(fp8.read({"weight": weight, "weight_scale": scale}), numbers * rows.astype(np.float64)[:, None])
    powers = code_bytes(rng, 24, 2).clip(100, 150)
    coded = fp8.read({"weight": weight, "weight_scale": powers.view(ml_dtypes.float8_e8m0fnu)}, block=(1, 32))
    equal(coded, numbers * [[e8m0(powers[n, k // 32]) for k in range(40)] for n in range(24)])


def test_fp8_refusals():
    weight = np.zeros((16, 136), ml_dtypes.float8_e4m3fn)
    one = np.ones(1, np.float32)
    for tensors, error, message in (
            ({"weight": weight}, ValueError, "tensors must have 'weight_scale', got weight"),
            ({"weight": weight.view(np.uint8), "weight_scale": one}, TypeError,
             "weight must be float8_e4m3fn or float8_e5m2, got uint8"),
            ({"weight": weight, "weight_scale": np.ones(1)}, TypeError, "weight_scale must be float16 .*got float64"),
            ({"weight": weight, "weight_scale_inv": np.ones((2, 1), np.float32)}, ValueError,
             r"weight_scale_inv must have shape .*\[16, 1\] or, for blocks of 128 x 128, \[1, 2\], got \[2, 1\]"),
            ({"weight": weight[:12], "weight_scale": one}, ValueError, "multiples of 8, got \\(12, 136\\)"),
            ({"weight": weight[:, :12], "weight_scale": one}, ValueError, "multiples of 8, got \\(16, 12\\)")):
        with pytest.raises(error, match=message):
            fp8.read(tensors)


# bitsandbytes

def bnb_tensors(rng, shape, kind, blocksize, *, nested=False, storage=np.uint8):
    """What the package would write, and the weight it stands for, number by number of the flat weight."""
    count = shape[0] * shape[1]
    packed = code_bytes(rng, count // 2)
    blocks = -(-count // blocksize)
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {"weight": packed.view(storage).reshape(-1, 1), "weight.quant_map": np.array(TABLES[kind], np.float32)}
    absmax = rng.uniform(0.01, 2, blocks).astype(np.float32)
    if nested:
        codes, table = code_bytes(rng, blocks), np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        above = rng.uniform(0.1, 2, -(-blocks // 256)).astype(np.float32)
        offset = float(np.float32(0.37))
        tensors |= {"weight.absmax": codes, "weight.nested_absmax": above, "weight.nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        absmax = [np.float32(np.float32(table[codes[i]] * above[i // 256]) + np.float32(offset)) for i in range(blocks)]
    else:
        tensors["weight.absmax"] = absmax
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    flat = [TABLES[kind][packed[i // 2] >> 4 if i % 2 == 0 else packed[i // 2] & 15] * float(absmax[i // blocksize])
            for i in range(count)]
    return tensors, np.reshape(flat, shape)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "blocksize", "group"), [
    ((16, 128), 64, 64), ((8, 4096), 4096, 4096), ((24, 96), 64, 32), ((24, 40), 64, 8), ((16, 72), 32, 8),
    ((8, 8), 128, 8), ((40, 1032), 4096, 8), ((40, 1024), 4096, 1024), ((520, 64), 32, 32)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes(kind, shape, blocksize, group, nested):
    tensors, want = bnb_tensors(np.random.default_rng(2), shape, kind, blocksize, nested=nested)
    coded = bitsandbytes.read(tensors)
    assert coded.format == kind and coded.shape == shape and coded.segments[0].group == group
    weight = coded.dequantize()
    np.testing.assert_array_equal(weight, want) if kind == "nf4" else np.testing.assert_allclose(weight, want, 1e-15)


def test_bitsandbytes_by_hand():
    # high nibble first: codes 15, 0, 7, 8; blocks of 32 numbers
    tensors = {"weight": np.tile(np.array([0xF0, 0x78], np.uint8), 16),
               "weight.absmax": np.array([2, 0.5], np.float32)}
    weight = bitsandbytes.read(tensors, {"quant_type": "nf4", "blocksize": 32, "shape": (8, 8)}).dequantize()
    row = [1, -1, 0, 0.07958029955625534] * 2
    assert np.array_equal(weight, 2 * np.array([row] * 4 + [np.divide(row, 4)] * 4))


def test_bitsandbytes_stored_as_other_numbers():
    rng = np.random.default_rng(3)
    for storage in (dtype_of("bfloat16"), np.float32, np.int8):
        tensors, want = bnb_tensors(rng, (8, 64), "nf4", 64, storage=storage)
        equal(bitsandbytes.read(tensors), want)


def test_bitsandbytes_refusals():
    tensors, _ = bnb_tensors(np.random.default_rng(4), (16, 128), "nf4", 64, nested=True)
    name = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].tobytes())

    def changed(**changes):
        return {**tensors, name: np.frombuffer(json.dumps(state | changes).encode(), np.uint8)}

    def without(name):
        return {key: value for key, value in tensors.items() if key != name}

    for given_tensors, error, message in (
            (without(name), ValueError, "tensors must have one weight.quant_state.bitsandbytes__"),
            (without("weight"), ValueError, "tensors must have 'weight', got"),
            (without("weight.nested_quant_map"), ValueError, "tensors must have 'weight.nested_quant_map'"),
            (without("weight.nested_absmax"), TypeError, "weight.absmax must be float32, got uint8"),
            (changed(quant_type="nf2"), NotImplementedError, "quant_type must be one of nf4, fp4, got 'nf2'"),
            (changed(blocksize=48), NotImplementedError, "blocksize must be one of 32, .*4096, got 48"),
            (changed(shape=[16, 132]), ValueError, "multiples of 8, got \\(16, 132\\)"),
            (changed(shape=[16, 64]), ValueError, "weight must hold 512 bytes for \\[16, 64\\], got 1024"),
            (changed(nested_offset=None), ValueError, "quant_state must say nested_offset, got None"),
            (changed(nested_blocksize=8), ValueError, "weight.nested_absmax must have shape \\[4\\], got \\[1\\]"),
            ({**tensors, name: np.frombuffer(b"{nf4", np.uint8)}, ValueError, "must be JSON, got b'{nf4'"),
            ({**tensors, "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}, NotImplementedError,
             "weight.quant_map must be the table of nf4")):
        with pytest.raises(error, match=message):
            bitsandbytes.read(given_tensors)


# MXFP4, NVFP4

def e2m1_rows(packed, scale):
    """scale(n, k) * E2M1, low nibble first, of bytes [N, K / 2]."""
    return [[E2M1[row[k // 2] >> 4 * (k % 2) & 15] * scale(n, k) for k in range(2 * len(row))]
            for n, row in enumerate(packed.tolist())]


@pytest.mark.parametrize("leading", [(16,), (3, 8)])
def test_mxfp4(leading):
    rng = np.random.default_rng(5)
    blocks, scales = code_bytes(rng, *leading, 3, 16), code_bytes(rng, *leading, 3)
    scales.reshape(-1)[:6] = 0, 1, 127, 253, 254, 255
    packed, flat = blocks.reshape(-1, 48), scales.reshape(-1, 3)
    want = e2m1_rows(packed, lambda n, k: e8m0(flat[n, k // 32]))
    coded = mxfp4.read({"blocks": blocks, "scales": scales})
    equal(coded, want)
    assert np.isnan(coded.dequantize()[1, 64:]).all()
    for scale in (flat, flat.view(ml_dtypes.float8_e8m0fnu)):
        equal(mxfp4.read({"weight_packed": packed, "weight_scale": scale}), want)


def test_nvfp4():
    rng = np.random.default_rng(6)
    packed, scale = code_bytes(rng, 16, 40), code_bytes(rng, 16, 5) & 127
    scale[0] = 0, 1, 8, 126, 127
    number = np.float32(2.0**-12)
    want = e2m1_rows(packed, lambda n, k: e4m3(scale[n, k // 16]) * 2.0**-12)
    scales = {"weight_scale": scale.view(ml_dtypes.float8_e4m3fn)}
    for shape in ((), (1,)):
        for tensors in ({"weight": packed, "weight_scale_2": np.full(shape, number), "input_scale": number},
                        {"weight_packed": packed, "weight_global_scale": np.full(shape, 1 / number)}):
            coded = nvfp4.read(tensors | scales)
            equal(coded, want)
            (segment,) = coded.segments
            assert segment.scale.dtype.name == "float8_e4m3fn" and segment.group == 16 and segment.super_group == 80
            assert segment.super_scale.shape == (16, 1) and segment.super_scale.dtype == np.float32


def test_four_bit_float_refusals():
    packed, scale = np.zeros((8, 32), np.uint8), np.zeros((8, 2), np.uint8)
    e4, number = np.zeros((8, 4), ml_dtypes.float8_e4m3fn), np.ones(1, np.float32)
    for read, tensors, error, message in (
            (mxfp4.read, {}, ValueError, "tensors must have 'weight_packed', got none"),
            (mxfp4.read, {"blocks": np.zeros((8, 2, 16), np.uint8)}, ValueError, "tensors must have 'scales'"),
            (mxfp4.read, {"blocks": np.zeros((8, 2, 8), np.uint8)}, ValueError,
             "blocks must have shape \\[8, 2, 16\\], got \\[8, 2, 8\\]"),
            (mxfp4.read, {"blocks": np.zeros((8, 16), np.uint8)}, ValueError, "blocks must have shape \\[..., N"),
            (mxfp4.read, {"weight_packed": packed[:, :24], "weight_scale": scale}, ValueError,
             "in_features a multiple of 32, got 48"),
            (mxfp4.read, {"weight_packed": packed, "weight_scale": scale[:, :1]}, ValueError,
             "weight_scale must have shape \\[8, 2\\], got \\[8, 1\\]"),
            (mxfp4.read, {"weight_packed": packed[:4], "weight_scale": scale[:4]}, ValueError, "multiples of 8"),
            (nvfp4.read, {"weight_packed": packed, "weight_scale": e4}, ValueError, "must have 'weight_global_scale'"),
            (nvfp4.read, {"weight_packed": packed, "weight_scale": e4.view(np.uint8), "weight_global_scale": number},
             TypeError, "weight_scale must be float8_e4m3fn, got uint8"),
            (nvfp4.read, {"weight": packed, "weight_scale": e4, "weight_scale_2": np.float32(0)}, ValueError,
             "weight_scale_2 must be one number above 0, got 0"),
            (nvfp4.read, {"weight_packed": packed[:, :28], "weight_scale": e4, "weight_global_scale": number},
             ValueError, "weight_packed must have in_features a multiple of 16, got 56")):
        with pytest.raises(error, match=message):
            read(tensors)


# quantize

SCHEMES = ["int4", "int8", "int4-g128", "int4-g32", "int8-g128", "int4-asym", "int4-g128-asym", "int8-g48-asym", "fp8",
           "fp8-block128", "nf4", "nf4-g128", "mxfp4", "nvfp4"]


def check_errors(w, scheme):
    """No number is off by more than half the distance of the two codes it lies between, as its scale has them."""
    coded = quantize(w, scheme)
    assert coded.format == scheme and coded.shape == w.shape
    (segment,) = coded.segments
    columns = w.shape[1]
    scale = np.repeat(segment.scale.astype(np.float64), segment.group, axis=1)[:, :columns]
    assert np.isfinite(scale).all()
    if segment.super_scale is not None:
        scale = scale * segment.super_scale.astype(np.float64)
    if segment.zero is not None:
        zero = segment.zero.astype(np.float64) + segment.centre
        assert "asym" in scheme and (zero == np.rint(zero)).all() and 0 <= zero.min() <= zero.max() < 2**segment.bits
    weight = coded.dequantize()
    error, w, scale = np.abs(weight - w.astype(np.float64)), np.abs(w.astype(np.float64)), np.abs(scale)
    kind = scheme.split("-")[0]
    if kind in ("int4", "int8"):
        allowed = 0.5 * scale
    elif kind == "nf4":
        allowed = (1 - 0.6961928) / 2 * scale
    elif kind == "fp8":
        allowed = np.maximum(w * 2.0**-4, scale * 2.0**-10)
    else:                       # E2M1: gaps of 1/2, 1, 2; and what lies above 6 by the rounding of the scale
        gap = np.select([w <= 2 * scale, w <= 4 * scale, w <= 7 * scale], [0.25, 0.5, 1], 2 if kind == "mxfp4" else 1)
        allowed = gap * scale
        if kind == "nvfp4":     # scales of groups below 2^-10 of the row's largest are 0
            largest = np.abs(w).max(axis=1, keepdims=True)
            allowed = np.maximum(allowed, np.where(scale == 0, largest / 448 * 2.0**-10, 0))
            subnormal = segment.scale.astype(np.float64) < 2.0**-6
            allowed += np.repeat(subnormal, segment.group, axis=1)[:, :columns] * largest / 448 * 2.0**-10
    assert (error <= allowed * (1 + 3e-5) + 1e-40).all(), f"off by {(error / allowed).max()} of what is allowed"
    return coded


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize(scheme, dtype):
    rng = np.random.default_rng(7)
    w = (rng.standard_t(4, (40, 264)) * 0.05).astype(dtype_of(dtype))
    w[3] = 0
    w[:, 128:256][5:9] = 0
    w[10] = np.abs(w[10])
    w[11] = -np.abs(w[11])
    before = w.copy()
    coded = check_errors(w, scheme)
    assert not coded.dequantize()[3].any() and not coded.dequantize()[5:9, 128:256].any()
    assert np.array_equal(w.view(np.uint8), before.view(np.uint8))
    wanted = {"fp8": "float32", "mxfp4": "float8_e8m0fnu", "nvfp4": "float8_e4m3fn"}
    assert coded.segments[0].scale.dtype.name == wanted.get(scheme.split("-")[0], "float16")


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(scheme=st.sampled_from(SCHEMES), rows=st.integers(1, 20), columns=st.integers(1, 40), seed=st.integers(0, 999),
       exponent=st.integers(-40, 30), spread=st.integers(0, 8))
def test_quantize_any_shape_and_size(scheme, rows, columns, seed, exponent, spread):
    rng = np.random.default_rng(seed)
    shape = (8 * rows, 8 * columns)
    w = np.ldexp(rng.normal(size=shape), exponent + rng.integers(-spread, spread + 1, shape)).astype(np.float32)
    w[rng.random(shape) < 0.1] = 0
    check_errors(w, scheme)


def test_symmetric_integers_keep_the_largest_and_lose_less():
    w = np.random.default_rng(8).normal(size=(64, 1024)).astype(np.float32)
    weight = quantize(w, "int4-g128").dequantize()
    groups, got = w.reshape(64, 8, 128), weight.reshape(64, 8, 128)
    low, high = groups.min(-1), groups.max(-1)
    sides = np.minimum(-low, high) <= np.maximum(-low, high) * 7.5 / 8      # no wider scale than the larger side asks
    at = np.abs(groups).argmax(-1)[..., None]
    np.testing.assert_allclose(np.take_along_axis(got, at, -1)[sides], np.take_along_axis(groups, at, -1)[sides], 1e-3)
    scale = np.abs(groups).max(-1, keepdims=True) / 7
    plain = np.rint(groups / scale) * scale
    assert np.linalg.norm(got - groups) < 0.9 * np.linalg.norm(plain - groups)
    codes = quantize(w, "int4-g128").segments[0].codes
    assert codes.min() == 0 and codes.max() == 15


@pytest.mark.parametrize(("scheme", "expected"), [
    ("int4-g128", 0.105), ("int4-g32", 0.087), ("int4-g128-asym", 0.102), ("int8-g128", 0.0066), ("fp8", 0.0268),
    ("fp8-block128", 0.0268), ("nf4", 0.093), ("mxfp4", 0.113), ("nvfp4", 0.097)])
def test_relative_error_of_normal_numbers(scheme, expected):
    w = np.random.default_rng(9).normal(size=(64, 2048)).astype(np.float32)
    error = np.linalg.norm(quantize(w, scheme).dequantize() - w) / np.linalg.norm(w)
    assert 0.97 * expected < error < expected


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "int8-g48-asym"])
def test_representable_weights_come_back(scheme):
    rng = np.random.default_rng(10)
    w = quantize(rng.normal(size=(16, 256)).astype(np.float32), scheme).dequantize()
    again = quantize(w.astype(np.float32), scheme).dequantize()
    np.testing.assert_allclose(again, w, rtol=0, atol=2e-3 if scheme != "nvfp4" else 0.35)


def test_codes_by_hand():
    w = np.zeros((8, 32), np.float32)
    w[0, :16] = [0, .25, .75, 1.25, 1.75, 2.5, 3.5, 5, 6, -.25, -.26, -5, -5.01, -6.9, .24, -.75]
    coded = quantize(w, "mxfp4")
    assert coded.segments[0].scale[0, 0] == 1       # ties go to the even code
    assert coded.dequantize()[0, :16].tolist() == [0, 0, 1, 1, 2, 2, 4, 4, 6, 0, -.5, -4, -6, -6, 0, -1]
    w[0] = 1.5
    w[0, 0] = 7.5                                   # 6 or 8; but 1.5 would become 2
    assert quantize(w, "mxfp4").segments[0].scale[0, 0] == 1
    w[0, 1:] = 2
    assert quantize(w, "mxfp4").segments[0].scale[0, 0] == 2
    w[:] = 0
    w[0, 0], w[1, :3] = 448, (896, -480, 1e-3)
    coded = quantize(w, "fp8")
    assert coded.segments[0].scale[:2, 0].tolist() == [1, 2] and coded.dequantize()[1, :3].tolist() == [896, -480, 0]
    w[:2] = 0
    w[0, :3] = (-8, 7, 3.4)
    segment = quantize(w, "int4").segments[0]
    assert segment.scale[0, 0] == 1 and segment.codes[0, :4].tolist() == [0, 15, 11, 8] and segment.zero is None
    w[0, :3] = (8, -7, 3.4)
    segment = quantize(w, "int4").segments[0]
    assert segment.scale[0, 0] == -1 and segment.codes[0, :4].tolist() == [0, 15, 5, 8]
    w[0, :3] = (-3, 12, 3.4)
    segment = quantize(w, "int4-asym").segments[0]
    assert segment.scale[0, 0] == 1 and segment.codes[0, :4].tolist() == [0, 15, 6, 3] and segment.zero[0, 0] == 3 - 8


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-g32-asym", "nf4-g32"])
@pytest.mark.parametrize(("size", "dtype"), [(1e-3, "float16"), (1e-7, "float32"), (1e-30, "float32"),
                                             (1e7, "float32"), (3e38, "float32")])
def test_scales_outside_float16_are_float32(scheme, size, dtype):
    w = np.random.default_rng(11).uniform(-size, size, (8, 64)).astype(np.float32)
    w[1] = 0
    assert check_errors(w, scheme).segments[0].scale.dtype == dtype


@pytest.mark.parametrize("scheme", SCHEMES)
def test_smallest_and_largest_numbers(scheme):
    rng = np.random.default_rng(12)
    w = rng.uniform(-1, 1, (16, 128)).astype(np.float32)
    for size in (3e38, 1e-32):
        weight = check_errors(w * np.float32(size), scheme).dequantize()
        assert np.abs(weight / size - w).max() < 0.18   # half the gap of 4 and 6, a rounded scale
    for size in (1e-36, 1e-38, 1e-40, 8.5e-43, 1e-42, 3e-45):
        weight = quantize(w * np.float32(size), scheme).dequantize()
        assert (np.abs(weight) <= 2e-36).all()      # and no NaN


def test_quantize_refusals():
    w = np.zeros((8, 64), np.float32)
    for scheme in ("int3", "int4-128", "int4-g0", "fp8-g64", "mxfp4-asym", "nf4-asym", "int4-asym-g128", "", "INT4"):
        with pytest.raises(NotImplementedError, match="scheme must be one of int4, .*, nvfp4, got"):
            quantize(w, scheme)
    with pytest.raises(ValueError, match="groups of a multiple of 16 columns, got 'int4-g24'"):
        quantize(w, "int4-g24")
    for wrong in (w.astype(np.float64), w.astype(np.int8), w.tolist()):
        with pytest.raises(TypeError, match="w must be an array of float16, bfloat16, float32, got"):
            quantize(wrong, "int4")
    for wrong in (w[:0], w[:, :12], w[0]):
        with pytest.raises(ValueError, match="in_features a multiple of 8"):
            quantize(wrong, "int4")
    for scheme in SCHEMES:
        for value in (np.nan, np.inf, -np.inf):
            w[3, 40] = value
            with pytest.raises(ValueError, match="w must be finite"):
                quantize(w, scheme)
