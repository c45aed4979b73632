# SPDX-License-Identifier: Apache-2.0
"""Formats of KV caches: what quantising makes, what kernels read back, and the objects that describe them."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from compare import assert_same_bits, dtype_of

import cupyattn
from cupyattn import BlockKV, QuantizedKV
from cupyattn.kv.quantized import FORMATS, kv_side
from cupyattn.reference import kv_codec
from cupyattn.runtime import Plan, Specialisation, arch_of, launch, make_args
from cupyattn.runtime.cpu import settings

SOURCE = str(Path(__file__).parent / "kernels" / "kv_format.cu")
MODES = [dict(fused=True), dict(fused=False), dict(check=True, schedule="reverse")]
PLAIN = ("float16", "bfloat16", "float32")
SCALES = {"int8_symmetric": np.float32([4 / 127]), "int8_channel": np.full((2, 128), 4 / 127, np.float32)}
rng = np.random.default_rng(5)


def quantized(format, pages=3, page_size=4, heads=2, head_dim=128):
    """A random cache, and what went into it."""
    x = rng.standard_normal((pages, page_size, heads, head_dim)).astype(np.float32)
    scale = SCALES.get(format)
    return QuantizedKV(*kv_codec.quantize(x, format, scale=scale), format=format), x


# ---- the meaning of the formats --------------------------------------------------------------------------------

# worst relative RMS error on normal numbers; hadamard: 2^-bits times what a mid-point grid gives
ERRORS = {"int8": 0.0063, "int4": 0.107, "int8_symmetric": 0.0098, "int8_channel": 0.0098, "fp8_e4m3": 0.027,
          "fp8_e5m2": 0.054, "hadamard8": 0.0057, "hadamard6": 0.023, "hadamard4": 0.091}


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format):
    cache, x = quantized(format, pages=20)
    error = cache.dequantize("float64") - x
    relative = np.sqrt((error**2).mean() / (x**2.0).mean())
    assert ERRORS[format] / 1.2 < relative < ERRORS[format]


def test_nibble_order():
    """Values 0 to 7 pack to 0x75316420, TurboMind's order; the high bits of 16 elements likewise."""
    assert kv_codec.pack(np.arange(8), "int4").view("<u4") == [0x75316420]
    packed = kv_codec.pack(np.arange(32) * 2, "hadamard6")
    assert packed.size == 24 and packed[:4].view("<u4") == [0xEA62C840]
    for word, first in ((packed[16:20], 0), (packed[20:], 16)):
        bits = int(word.view("<u4")[0])
        held = [first + e for e in (*range(0, 16, 2), *range(1, 16, 2))]
        assert [bits >> 2 * i & 3 for i in range(16)] == [2 * e >> 4 for e in held]


@pytest.mark.parametrize("format, top", [("int4", 16), ("int8", 256), ("hadamard6", 64)])
def test_unpack_undoes_pack(format, top):
    codes = rng.integers(0, top, (3, 64))
    np.testing.assert_array_equal(kv_codec.unpack(kv_codec.pack(codes, format), format), codes)


def test_hadamard_is_sylvesters_matrix_and_its_own_inverse():
    signs = np.array([[(-1) ** bin(i & j).count("1") for i in range(32)] for j in range(32)]) / np.sqrt(32)
    x = rng.standard_normal(32)
    np.testing.assert_allclose(kv_codec.hadamard(x), signs @ x, atol=1e-14)
    np.testing.assert_allclose(kv_codec.hadamard(kv_codec.hadamard(x)), x, atol=1e-14)


def test_codes_of_minimum_and_range():
    """TurboMind: zero is the minimum, the maximum gets the top code; float32 arithmetic where float16 overflows."""
    x = np.float32([[0, 1e-4, 2e-4, 3e-4, 0, 0, 0, 3e-4]]).astype(np.float16).astype(np.float32)
    codes, scale, zero = kv_codec.quantize(x, "int4", scale_dtype="float32")
    np.testing.assert_array_equal(kv_codec.unpack(codes, "int4")[0], [0, 5, 10, 15, 0, 0, 0, 15])
    assert zero == [0.0] and scale.dtype == np.float32
    codes, scale, zero = kv_codec.quantize(np.full((1, 8), 7, np.float32), "int8")
    assert not codes.any() and scale == [0.0] and zero == [7.0]   # a row of equal numbers: scale 0, codes 0


def test_hadamard_scale_is_rounded_up():
    x = rng.standard_normal((50, 32)).astype(np.float32)
    _, scale, _ = kv_codec.quantize(x, "hadamard4")
    top = np.abs(kv_codec.hadamard(x)).max(-1)
    assert (scale[:, 0] >= top).all() and (np.nextafter(scale[:, 0], np.float16(0)) < top).all()
    _, scale, _ = kv_codec.quantize(np.full((1, 32), 6e4, np.float32), "hadamard4")
    assert scale == np.float16(65504)   # 3.4e5 after rotation: clipped, not infinite
    zeros = kv_codec.quantize(np.zeros((1, 32)), "hadamard8")
    assert not kv_codec.dequantize(*zeros, format="hadamard8").any()


def test_saturation():
    x = np.float32([[1e9, -1e9, 0, 500, -500, 1, 2, 3]])
    codes, scale, _ = kv_codec.quantize(x, "fp8_e4m3", scale=np.float32([1]))
    assert kv_codec.numbers(codes, "fp8_e4m3")[0].tolist() == [448, -448, 0, 448, -448, 1, 2, 3]
    codes, scale, _ = kv_codec.quantize(x, "int8_symmetric", scale=np.float32([0.5]))
    assert codes[0].tolist() == [127, -127, 0, 127, -127, 2, 4, 6]


# ---- what kernels read -----------------------------------------------------------------------------------------

def _launch(xp, kernel, row, out, shared=0, **fields):
    spec = Specialisation(SOURCE, kernel, "KvFormatArgs", {})
    plan = Plan(spec, arch_of(xp.module), (1,), (32,), shared_bytes=shared)
    on_device = xp.array(np.full(out, np.nan, np.float32))
    launch(plan, make_args(plan, row=row, out=on_device, **fields))
    return xp.numpy(on_device)


def read_row(xp, format, codes, head_dim, offset=0):
    """What the kernel's tag makes of the row `codes`, `offset` bytes past a 16-byte boundary."""
    index = (*FORMATS, *PLAIN).index(format)
    codes = codes.view(np.uint8)
    base = np.zeros(codes.size + 32, np.uint8)
    device = xp.array(base)
    start = -(device.ctypes.data if xp.name == "numpy" else device.data.ptr) % 16 + offset
    device[start:start + codes.size] = xp.array(codes)
    return _launch(xp, "read_row", device[start:], (head_dim,), format=index, aligned=int(offset == 0),
                   head_dim=head_dim, rows=1)


def in_every_mode(xp, run):
    """run() in every build of the CPU, which must agree; a NaN may have any sign."""
    if xp.name != "numpy":
        return run()
    results = []
    for mode in MODES:
        with settings(**mode):
            results.append(run())
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    return results[0]


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_kernels_read_every_code(xp, format, offset):
    """Every byte in every place, exactly."""
    head_dim = 512
    codes = np.concatenate([np.arange(256), rng.integers(0, 256, 256)]).astype(np.uint8)
    codes = codes[:FORMATS[format].row_codes(head_dim)]
    if format == "int8_symmetric" or format == "int8_channel":
        codes = codes.view(np.int8)
    want = kv_codec.numbers(codes, format)
    got = in_every_mode(xp, lambda: read_row(xp, format, codes, head_dim, offset))
    np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", PLAIN)
def test_kernels_read_plain_rows(xp, dtype, aligned):
    x = rng.standard_normal(64).astype(dtype_of(dtype))
    got = in_every_mode(xp, lambda: read_row(xp, dtype, x, 64, 0 if aligned else x.itemsize))
    assert_same_bits(got, x.astype(np.float32))


@pytest.mark.parametrize("rows, head_dim", [(1, 32), (3, 128), (5, 96), (2, 512)])
def test_kernels_rotate(xp, rows, head_dim):
    """In registers of one lane, of four lanes, and in shared memory: the same bits as in NumPy."""
    x = rng.standard_normal((rows, head_dim + 4)).astype(np.float32)
    want = kv_codec.hadamard(x[:, :head_dim])
    got = in_every_mode(xp, lambda: _launch(xp, "rotate", xp.array(x), (3, *x.shape), x.nbytes, format=0, aligned=1,
                                            head_dim=head_dim, rows=rows))
    for form in range(3):
        assert_same_bits(got[form, :, :head_dim], want)
    assert_same_bits(got[0, :, head_dim:], x[:, head_dim:])


# ---- QuantizedKV -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("format", FORMATS)
def test_empty(xp, format):
    cache = QuantizedKV.empty(3, 4, 2, 64, format=format, xp=xp.module)
    assert cache.shape == (3, 4, 2, 64) and cache.xp is xp.module
    assert cache.nbytes == sum(a.nbytes for a in cache.arrays.values())
    assert cache.bits == 8 * cache.codes.nbytes / (3 * 4 * 2 * 64)
    assert not np.isnan(cache.dequantize()).any() and cache.dequantize().dtype == np.float32
    assert f"QuantizedKV({format}, pages=3" in repr(cache)


@pytest.mark.parametrize("dtype", PLAIN)
def test_scale_dtype(dtype):
    cache = QuantizedKV.empty(1, 2, 3, 8, format="int8", dtype=dtype)
    assert cache.scale.dtype == cache.zero.dtype == dtype_of(dtype)
    assert cache.tag == {"float16": "KvInt8<__half>", "bfloat16": "KvInt8<__nv_bfloat16>",
                         "float32": "KvInt8<float>"}[dtype]


@pytest.mark.parametrize("format, granularity, shape", [
    ("fp8_e4m3", "tensor", (1,)), ("fp8_e5m2", "head", (2,)), ("fp8_e4m3", "token", (3, 4, 2)),
    ("int8_symmetric", "head", (2,)), ("int8_channel", "channel", (2, 64)), ("hadamard4", "group", (3, 4, 2, 2))])
def test_granularity(format, granularity, shape):
    cache = QuantizedKV.empty(3, 4, 2, 64, format=format, granularity=granularity)
    assert cache.granularity == granularity and cache.scale.shape == shape
    if granularity in ("tensor", "head", "channel"):
        given = rng.uniform(1, 2, shape).astype(np.float32)
        assert QuantizedKV.empty(3, 4, 2, 64, format=format, scale=given).granularity == granularity
        assert QuantizedKV.empty(3, 4, 2, 64, format=format, granularity=granularity, scale=0.5).scale.max() == 0.5


@pytest.mark.parametrize("xp", ["standin", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("format", ["int8", "fp8_e4m3", "hadamard6"])
def test_to(xp, format):
    cache, _ = quantized(format)
    if format == "fp8_e4m3":
        cache = QuantizedKV(cache.codes.view(ml_dtypes.float8_e4m3fn), cache.scale, format=format)
    moved = cache.to(xp.module)
    assert cache.to(np) is cache and moved.to(xp.module) is moved and moved.xp is xp.module
    back = moved.to(np)
    assert back.xp is np
    np.testing.assert_array_equal(back.dequantize(), cache.dequantize())


def test_views():
    """Strides of codes in bytes, of scales in elements, shared scales at stride 0; any layout."""
    pool = np.zeros((5, 2, 4, 96), np.uint8)           # [pages, heads, page_size, row + rest]
    codes = pool.transpose(0, 2, 1, 3)[1:, :, :, 16:80]
    parameters = np.zeros((4, 4, 2, 2), np.float16)    # scale and zero side by side
    cache = QuantizedKV(codes, parameters[..., 0], parameters[..., 1], format="int4")
    view, scale = cache.view()
    assert cache.shape == (4, 4, 2, 128) and view["data"] is codes
    assert [view[f"stride_{n}"] for n in ("page", "token", "head")] == [768, 96, 384]
    assert [scale[f"stride_{n}"] for n in ("page", "token", "head", "group")] == [16, 4, 2, 0]
    _, scale = QuantizedKV.empty(3, 4, 2, 64, format="hadamard8").view()
    assert [scale[f"stride_{n}"] for n in ("page", "token", "head", "group")] == [16, 4, 2, 1]
    _, scale = QuantizedKV.empty(3, 4, 2, 64, format="int8_channel").view()
    assert [scale[f"stride_{n}"] for n in ("page", "token", "head", "group")] == [0, 0, 64, 1]
    _, scale = QuantizedKV.empty(3, 4, 2, 64, format="fp8_e4m3").view()
    assert [scale[f"stride_{n}"] for n in ("page", "token", "head", "group")] == [0, 0, 0, 0]


def test_fp8_arrays():
    codes = np.array([1.5, -448, 0.015625, 2**-9], ml_dtypes.float8_e4m3fn).repeat(4).reshape(1, 1, 1, 16)
    cache = QuantizedKV(codes, np.float32([2]), format="fp8_e4m3")
    assert cache.dequantize()[0, 0, 0, ::4].tolist() == [3, -896, 0.03125, 2**-8]


def test_kv_side():
    plain = np.zeros((3, 4, 2, 16), np.float16)
    side = kv_side("op", "k_cache", plain)
    assert (side.tag, side.format, side.shape, side.alignment) == ("KvPlain<__half>", "float16", (3, 4, 2, 16), 16)
    assert side.arrays == {"k_cache": plain} and side.scale["scale"] is None
    side = kv_side("op", "k_cache", QuantizedKV.empty(3, 4, 2, 64, format="hadamard6"))
    assert side.tag == "KvHadamard6" and side.shape == (3, 4, 2, 64) and list(side.arrays) == ["k_cache.codes",
                                                                                              "k_cache.scale"]
    for error, message, array in ((TypeError, "op: k_cache must be float16, bfloat16, float32 or a QuantizedKV, got "
                                   "int8", np.zeros((1, 1, 1, 8), np.int8)),
                                  (TypeError, "op: k_cache must be a NumPy or CuPy array, got list", [1]),
                                  (ValueError, r"op: k_cache must be \[pages, .* got \[2, 8\]", np.zeros((2, 8), "f4")),
                                  (ValueError, "op: k_cache must have a contiguous last axis", plain[..., ::2])):
        with pytest.raises(error, match=message):
            kv_side("op", "k_cache", array)


CODES = np.zeros((3, 4, 2, 64), np.uint8)
SCALE = np.zeros((3, 4, 2), np.float16)


@pytest.mark.parametrize("error, message, codes, scale, zero, format", [
    (ValueError, "format must be one of int8, int4, .* got 'int3'", CODES, SCALE, SCALE, "int3"),
    (ValueError, r"codes must be \[pages, page_size, num_kv_heads, row\], got \[4, 2, 64\]", CODES[0], SCALE, SCALE,
     "int8"),
    (TypeError, "codes must be uint8 in format int8, got int8", CODES.view(np.int8), SCALE, SCALE, "int8"),
    (TypeError, "codes must be int8 in format int8_symmetric, got uint8", CODES, np.float32([1]), None,
     "int8_symmetric"),
    (ValueError, "codes must have a contiguous last axis", CODES[..., ::2], SCALE, SCALE, "int8"),
    (ValueError, "codes must have rows of whole 4 bytes in format int4, got 62", CODES[..., :62], SCALE, SCALE, "int4"),
    (ValueError, "codes must have rows of whole 24 bytes in format hadamard6, got 64", CODES, SCALE, None, "hadamard6"),
    (ValueError, "codes must have rows of whole 8 bytes in format int8, got 60", CODES[..., :60], SCALE, SCALE, "int8"),
    (TypeError, "scale must be float16 or bfloat16 or float32 in format int8, got float64", CODES,
     SCALE.astype(np.float64), SCALE, "int8"),
    (TypeError, "scale must be float16 in format hadamard8, got float32", CODES, np.zeros((3, 4, 2, 2), np.float32),
     None, "hadamard8"),
    (ValueError, r"scale must be \[3, 4, 2\] in format int8, got \[3, 4\]", CODES, SCALE[..., 0], SCALE, "int8"),
    (ValueError, r"scale must be \[1\] or \[2\] or \[3, 4, 2\] in format fp8_e4m3, got \[3\]", CODES,
     np.zeros(3, np.float32), None, "fp8_e4m3"),
    (ValueError, "zero must be given in format int8, got none", CODES, SCALE, None, "int8"),
    (ValueError, "zero must be None in format fp8_e5m2, got an array", CODES, np.float32([1]), np.float32([1]),
     "fp8_e5m2"),
    (ValueError, "zero must have the dtype, shape and strides of scale", CODES, SCALE, SCALE.transpose(0, 2, 1).copy()
     .transpose(0, 2, 1), "int8"),
    (TypeError, "codes must be a NumPy or CuPy array, got list", [1], SCALE, SCALE, "int8")])
def test_errors(error, message, codes, scale, zero, format):
    with pytest.raises(error, match=f"^QuantizedKV: {message}"):
        QuantizedKV(codes, scale, zero, format=format)


@pytest.mark.parametrize("message, options", [
    ("head_dim must be a multiple of 32 in format hadamard4, got 48", {"head_dim": 48, "format": "hadamard4"}),
    ("head_dim must be a multiple of 8 in format int4, got 20", {"head_dim": 20, "format": "int4"}),
    ("granularity must be token in format int8, got 'tensor'", {"format": "int8", "granularity": "tensor"}),
    ("scale must be None per token, as it is written with the tokens", {"format": "int8", "scale": 0.5})])
def test_errors_of_empty(message, options):
    with pytest.raises(ValueError, match=message):
        QuantizedKV.empty(**{"num_pages": 1, "page_size": 1, "num_kv_heads": 1, "head_dim": 64, **options})


# ---- BlockKV ---------------------------------------------------------------------------------------------------

# quant_policy: layer_size, then byte offsets of K and V data and K and V parameters of head 3, token 5
TURBOMIND = {0: (262144, 99584, 115968, None, None), 8: (135168, 49792, 57984, 132628, 132884),
             4: (69632, 24896, 28992, 67092, 67348)}


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("policy", TURBOMIND)
def test_turbomind_blocks(policy, layer):
    """8 KV heads, head_dim 128, 64 tokens, float16: the layout byte for byte."""
    layer_size, *places = TURBOMIND[policy]
    made = BlockKV.turbomind(8, 128, 64, quant_policy=policy, layer=layer)
    assert made.nbytes == layer_size
    by_offset = BlockKV.turbomind(8, 128, 64, quant_policy=policy, offset=layer * layer_size)
    assert made == by_offset
    found = []
    for side in (made.k, made.v):
        assert side.format == {0: "float16", 8: "int8", 4: "int4"}[policy] and side.shape == (None, 64, 8, 128)
        itemsize = 1 if policy else 2
        found.append(side.offset + itemsize * (3 * side.stride_head + 5 * side.stride_token) - layer * layer_size)
    for side in (made.k, made.v):
        at = side.scale_offset + 2 * (3 * side.scale_stride_head + 5 * side.scale_stride_token) - layer * layer_size
        found.append(at if policy else None)
        assert not policy or side.zero_offset == side.scale_offset + 2
    assert found == places
    assert max(side.nbytes_needed() for side in (made.k, made.v)) == (layer + 1) * layer_size


def test_turbomind_shares_one_copy():
    made = BlockKV.turbomind(1, 576, 32, one_copy=True)
    assert made.k == made.v and made.nbytes == 32 * 576 * 2


@pytest.mark.parametrize("message, make", [
    ("quant_policy must be 0, 4 or 8, got 42", lambda: BlockKV.turbomind(1, 8, 1, quant_policy=42)),
    ("format must be one of float16, .* got 'int7'", lambda: BlockKV("int7", 1, 1, 8)),
    ("head_dim must be a multiple of 32 in format hadamard8", lambda: BlockKV("hadamard8", 1, 1, 8)),
    ("scale_dtype must be float16 or bfloat16 or float32 in format int8, got None", lambda: BlockKV("int8", 1, 1, 8)),
    ("scale_offset must be a multiple of the scale's 2 bytes, got 3",
     lambda: BlockKV("int8", 1, 1, 8, scale_dtype="float16", scale_offset=3)),
    ("scale must be given in format int8_channel", lambda: BlockKV("int8_channel", 1, 1, 8)),
    (r"scale must be float32 \[1\] or float32 \[1\] in format fp8_e4m3, got float16 \[1\]",
     lambda: BlockKV("fp8_e4m3", 1, 1, 8, scale=np.float16([1])))])
def test_block_errors(message, make):
    with pytest.raises(ValueError, match=f"BlockKV: {message}"):
        make()


def test_exported():
    assert cupyattn.QuantizedKV is QuantizedKV and cupyattn.BlockKV is BlockKV
