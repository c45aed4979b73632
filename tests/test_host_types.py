# SPDX-License-Identifier: Apache-2.0
"""__half, __nv_bfloat16 and fp8 of the CPU executor, or CUDA's own on a GPU, against NumPy, ml_dtypes, fractions."""

import ctypes
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from compare import dtype_of

from cupyattn.runtime import Plan, Specialisation, arch_of, host_compiler, launch, make_args, source

SOURCE = str(Path(__file__).parent / "kernels" / "element_types.cu")
TYPES = ["float16", "bfloat16"]
FP8 = {False: ml_dtypes.float8_e4m3fn, True: ml_dtypes.float8_e5m2}


def _run(xp, kernel, out, dtype="float16", e5m2=False, **arrays):
    """`out` [results, n] of one kernel of element_types.cu; the last axis is padded to 16."""
    n = out.shape[-1]
    padded = -(-n // 16) * 16
    device = {k: None if k not in arrays else xp.array(np.pad(arrays[k], (0, padded - n))) for k in ("x", "y", "z")}
    spec = Specialisation(SOURCE, kernel, "ElementTypesArgs", {"T": dtype, "E5M2": int(e5m2),
                                                                "HALF": int(dtype == "float16")})
    plan = Plan(spec, arch_of(xp.module), (-(-padded // (16 * 64)),), (64,))
    device_out = xp.array(np.zeros((*out.shape[:-1], padded), out.dtype))
    launch(plan, make_args(plan, out=device_out, n=padded, **device))
    return xp.numpy(device_out)[..., :n]


def _assert_same_codes(got, want, inputs):
    """Bit for bit the same, except that any NaN stands for any other."""
    bits = f"u{want.dtype.itemsize}"
    both_nan = np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32))
    differ = (got.view(bits) != want.view(bits)) & ~both_nan
    if differ.any():
        at = int(np.argwhere(differ)[0][-1])
        raise AssertionError(f"{differ.sum()} differ; {inputs[at]!r} gives {got[..., at]}, want {want[..., at]}")


def _all_codes(dtype):
    return np.arange(1 << 8 * np.dtype(dtype).itemsize, dtype=f"u{np.dtype(dtype).itemsize}").view(dtype)


def _floats_around(dtype):
    """Every value of a type, every midpoint between two of them, their float32 neighbours, and random bit patterns."""
    with np.errstate(invalid="ignore", over="ignore"):
        values = _all_codes(dtype).astype(np.float32)
        finite = np.sort(values[np.isfinite(values)])
        step = finite[-1] - finite[-2]
        finite = np.concatenate([finite, [finite[-1] + step, -finite[-1] - step]]).astype(np.float32)
        finite = np.sort(finite[np.isfinite(finite)])
        points = np.concatenate([finite, finite[:-1] + (finite[1:] - finite[:-1]) / 2])
        near = np.concatenate([points, np.nextafter(points, np.float32(np.inf)),
                               np.nextafter(points, np.float32(-np.inf))])
    random = np.random.default_rng(3).integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38], np.float32)
    return np.concatenate([near, random, special]).astype(np.float32)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_code_widens_exactly(xp, dtype):
    codes = _all_codes(dtype_of(dtype))
    got = _run(xp, "widen", np.empty((5, codes.size), np.float32), dtype, x=codes)
    _assert_same_codes(got, np.broadcast_to(codes.astype(np.float32), got.shape), codes)


@pytest.mark.parametrize("dtype", TYPES)
def test_floats_round_to_nearest_even(xp, dtype):
    x = _floats_around(dtype_of(dtype))
    got = _run(xp, "narrow", np.empty((5, x.size), dtype_of(dtype)), dtype, x=x)
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(dtype_of(dtype))
    _assert_same_codes(got, np.broadcast_to(want, got.shape), x)


@pytest.mark.parametrize("e5m2", [False, True], ids=["e4m3", "e5m2"])
def test_fp8(xp, e5m2):
    codes = _all_codes(FP8[e5m2])
    got = _run(xp, "fp8_decode", np.empty((1, 256), np.float32), e5m2=e5m2, x=codes.view(np.uint8))
    _assert_same_codes(got, codes.astype(np.float32)[None], codes)

    x = _floats_around(FP8[e5m2])
    saturated, plain = _run(xp, "fp8_encode", np.empty((2, x.size), np.uint8), e5m2=e5m2, x=x).view(FP8[e5m2])
    largest = float(ml_dtypes.finfo(FP8[e5m2]).max)
    with np.errstate(over="ignore", invalid="ignore"):
        _assert_same_codes(plain, x.astype(FP8[e5m2]), x)
        _assert_same_codes(saturated, np.clip(x, -largest, largest).astype(FP8[e5m2]), x)


@pytest.mark.parametrize("e5m2", [False, True], ids=["e4m3", "e5m2"])
def test_every_pair_of_fp8_widens_exactly(xp, e5m2):
    codes = np.arange(1 << 16, dtype=np.uint16).view(FP8[e5m2])
    got = _run(xp, "fp8_decode_pairs", np.empty((1, codes.size), np.float32), e5m2=e5m2, x=codes.view(np.uint8))
    _assert_same_codes(got, codes.astype(np.float32)[None], codes)


@pytest.mark.parametrize("e5m2", [False, True], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_16_bit_float_becomes_fp8(xp, dtype, e5m2):
    x = _all_codes(dtype_of(dtype))
    got = _run(xp, "fp8_encode_narrow", np.empty((4, x.size), np.uint8), dtype, e5m2, x=x.view(np.uint16))
    wide, largest = x.astype(np.float32), float(ml_dtypes.finfo(FP8[e5m2]).max)
    with np.errstate(over="ignore", invalid="ignore"):
        want = np.array([np.clip(wide, -largest, largest).astype(FP8[e5m2]), wide.astype(FP8[e5m2])] * 2)
    _assert_same_codes(got.view(FP8[e5m2]), want, x)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_pair_widens_and_narrows(xp, dtype):
    codes = _all_codes(dtype_of(dtype))
    codes = np.concatenate([codes, np.roll(codes, 1)])   # each code in both places
    got = _run(xp, "widen_pairs", np.empty((2, codes.size), np.float32), dtype, x=codes)
    _assert_same_codes(got, np.broadcast_to(codes.astype(np.float32), got.shape), codes)


@pytest.mark.parametrize("dtype", TYPES)
def test_codes_unpack_through_mantissas(xp, dtype):
    x = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty((8, x.size), np.float32)
    got = _run(xp, "unpack", out, dtype, x=x).reshape(x.size, 8)
    nibbles = [x >> 4 * k & 15 for k in range(4)]
    signed = x.view(np.int8).reshape(-1, 2).T
    np.testing.assert_array_equal(got, np.stack([*nibbles, *signed, nibbles[1], nibbles[1]], axis=1))


@pytest.mark.parametrize("dtype, e5m2", [("float16", False), ("float16", True), ("bfloat16", False),
                                         ("bfloat16", True)])
def test_fp8_widens_by_bits(xp, dtype, e5m2):
    codes = _all_codes(FP8[e5m2])
    codes = codes[np.isfinite(codes.astype(np.float32))]   # infinity and NaN become large numbers
    codes = np.concatenate([codes, np.roll(codes, 1)])
    got = _run(xp, "fp8_by_bits", np.empty((1, codes.size), np.float32), dtype, e5m2, x=codes.view(np.uint8))
    _assert_same_codes(got, codes.astype(np.float32)[None], codes)


# ---- arithmetic ------------------------------------------------------------------------------------------

def _exact(codes, dtype):
    """Values of codes as fractions; infinity counts as the power of two after the largest value."""
    limit = {np.dtype(np.float16): 16, np.dtype(ml_dtypes.bfloat16): 128}[np.dtype(dtype)]
    values = codes.view(dtype).astype(np.float64)
    return [Fraction(2) ** limit * (1 if v > 0 else -1) if np.isinf(v) else Fraction(float(v)) for v in values]


def _round(exact, dtype):
    """The code of `dtype` nearest to a fraction, ties to the even code."""
    guess = float(min(abs(exact), Fraction(2) ** 128))
    with np.errstate(over="ignore"):
        code = int(np.array(guess).astype(np.float32).astype(dtype).view(np.uint16))
    infinity = int(np.array(np.inf, dtype).view(np.uint16))
    near = np.array([c for c in (code - 1, code, code + 1) if 0 <= c <= infinity], np.uint16)
    errors = [abs(value - abs(exact)) for value in _exact(near, dtype)]
    return min(zip(errors, near & 1, near, strict=True))[2]


def _tie_products(dtype):
    """100 pairs of numbers in [1, 2) whose product is half-way between two numbers of the type."""
    one, bits = (1024, 11) if dtype == "float16" else (128, 8)
    a, b = np.meshgrid(np.arange(one, 2 * one), np.arange(one, 2 * one))
    product = (a * b).ravel()
    dropped = np.floor(np.log2(product)).astype(int) + 1 - bits
    at = np.flatnonzero(product % (1 << dropped) == 1 << (dropped - 1))
    at = np.random.default_rng(1).choice(at, 100, replace=False)
    return (a.ravel()[at] / one).astype(dtype_of(dtype)), (b.ravel()[at] / one).astype(dtype_of(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_arithmetic_rounds_once(xp, dtype):
    kind, rng = dtype_of(dtype), np.random.default_rng(5)
    x, y, z = (rng.integers(0, 1 << 16, 3000, dtype=np.uint16).view(kind) for _ in range(3))
    x[:1500], y[:1500], z[:1500] = (rng.standard_normal(1500).astype(kind) for _ in range(3))
    # a product half-way between two results, and an addend far too small to show in float32 or float64
    x[1500:1600], y[1500:1600] = _tie_products(dtype)
    x[1550:1600] = -x[1550:1600]
    z[1500:1600] = np.tile(np.array([1e-7, -1e-7] if dtype == "float16" else [1e-30, -1e-30], kind), 50)

    got = _run(xp, "arithmetic", np.empty((13, x.size), kind), dtype, x=x, y=y, z=z)
    wide_x, wide_y, wide_z = (v.astype(np.float32) for v in (x, y, z))
    at = np.flatnonzero(np.isfinite(wide_x) & np.isfinite(wide_y) & np.isfinite(wide_z) & (wide_y != 0))
    a, b, c = (_exact(v[at].view(np.uint16), kind) for v in (x, y, z))
    results = {"+": (0, 7, [p + q for p, q in zip(a, b, strict=True)]),
               "-": (1, 8, [p - q for p, q in zip(a, b, strict=True)]),
               "*": (2, 9, [p * q for p, q in zip(a, b, strict=True)]),
               "/": (3, None, [p / q for p, q in zip(a, b, strict=True)]),
               "fma": (4, 10, [p * q + r for p, q, r in zip(a, b, c, strict=True)])}
    if xp.name == "cupy":
        del results["/"]   # CUDA divides by an approximate reciprocal and flushes; no kernel does it
    for name, (single, pair, exact) in results.items():
        want = np.array([_round(e, kind) for e in exact], np.uint16)
        codes = got[single, at].view(np.uint16) & 0x7fff
        differ = np.flatnonzero(codes != want)
        assert differ.size == 0, f"{name}: {differ.size} differ, first {x[at][differ[0]]} {y[at][differ[0]]} " \
                                 f"{z[at][differ[0]]}: {codes[differ[0]]:04x}, want {want[differ[0]]:04x}"
        sign = np.array([e < 0 for e in exact])
        assert (np.signbit(got[single, at].astype(np.float32)) == sign)[codes != 0].all(), name
        if pair is not None:
            _assert_same_codes(got[pair], got[single], x)
    for name, rows, larger in (("max", [5, 11], True), ("min", [6, 12], False)):
        with np.errstate(invalid="ignore"):
            first = np.isnan(wide_y) | ((wide_x > wide_y) == larger)   # of a number and a NaN, the number
        want = np.where(np.isnan(wide_x), wide_y, np.where(first, wide_x, wide_y))
        got_wide = got[rows].astype(np.float32)
        assert ((got_wide == want) | (np.isnan(got_wide) & np.isnan(want))).all(), name


# ---- a processor without F16C ----------------------------------------------------------------------------

_PORTABLE = """
#include "cuda_cpu.h"
#include "cuda_fp16.h"
CA_API void widen_all(const void* codes, float* out, long n) {
  for (long i = 0; i < n; i += 8) ca::widen_lanes<ca::Half, 8>(static_cast<const char*>(codes) + 2 * i, out + i);
}
CA_API void narrow_all(const float* x, void* codes, long n) {
  for (long i = 0; i < n; i += 8) ca::narrow_lanes<ca::Half, 8>(x + i, static_cast<char*>(codes) + 2 * i);
}
"""


def test_half_without_f16c():
    folder = source.root() / "cpu"
    flags = ("-O2", f"-I{folder}")
    digest = host_compiler.digest_of(host_compiler.compiler(), _PORTABLE, flags, (folder / "convert.h").read_text())
    path, _ = host_compiler.build(host_compiler.compiler(), "portable_half", digest, {"half.cpp": _PORTABLE},
                                  "half.so", flags)
    library = ctypes.CDLL(str(path))
    codes = _all_codes(np.float16)
    wide = np.empty(codes.size, np.float32)
    library.widen_all(codes.ctypes.data_as(ctypes.c_void_p), wide.ctypes.data_as(ctypes.c_void_p), codes.size)
    _assert_same_codes(wide, codes.astype(np.float32), codes)
    x = _floats_around(np.float16)
    x = np.pad(x, (0, -x.size % 8))
    out = np.empty(x.size, np.float16)
    library.narrow_all(x.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), x.size)
    with np.errstate(over="ignore", invalid="ignore"):
        _assert_same_codes(out, x.astype(np.float16), x)
