// SPDX-License-Identifier: Apache-2.0
// element_types.cu - conversions and arithmetic of the 16-bit and 8-bit element types, one thread per 16 elements.
#include "prelude.cuh"
#include "params.h"

#include <cuda_fp8.h>

struct ElementTypesArgs {
  const void* x;  // [n] float32 or T
  const void* y;  // T [n]
  const void* z;  // T [n]
  void* out;      // [results, n]
  int64_t n;      // elements, a multiple of 16
};
static_assert(sizeof(ElementTypesArgs) == CA_SIZEOF_ARGS, "element_types: Python and CUDA disagree on the struct");

using T = CA_T;

__device__ __forceinline__ int64_t first_element() { return (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) * 16; }

template <int N>
__device__ void widen_by(const T* x, float* out) {
  for (int i = 0; i < 16; i += N) {
    float wide[N];
    to_float(load_vec<T, N>(x + i), wide);
    for (int j = 0; j < N; ++j) out[i + j] = wide[j];
  }
}

template <int N>
__device__ void narrow_by(const float* x, T* out) {
  for (int i = 0; i < 16; i += N) {
    float wide[N];
    for (int j = 0; j < N; ++j) wide[j] = x[i + j];
    store_vec(out + i, from_float<T>(wide));
  }
}

// out[0..4] = x as float32, converted 1, 2, 4, 8 and 16 at a time
CA_KERNEL void widen(const __grid_constant__ ElementTypesArgs args) {
  const int64_t i = first_element(), n = args.n;
  if (i >= n) return;
  const T* x = static_cast<const T*>(args.x) + i;
  float* out = static_cast<float*>(args.out) + i;
  widen_by<1>(x, out);
  widen_by<2>(x, out + n);
  widen_by<4>(x, out + 2 * n);
  widen_by<8>(x, out + 3 * n);
  widen_by<16>(x, out + 4 * n);
}

// out[0..4] = x rounded to T, 1, 2, 4, 8 and 16 at a time
CA_KERNEL void narrow(const __grid_constant__ ElementTypesArgs args) {
  const int64_t i = first_element(), n = args.n;
  if (i >= n) return;
  const float* x = static_cast<const float*>(args.x) + i;
  T* out = static_cast<T*>(args.out) + i;
  narrow_by<1>(x, out);
  narrow_by<2>(x, out + n);
  narrow_by<4>(x, out + 2 * n);
  narrow_by<8>(x, out + 3 * n);
  narrow_by<16>(x, out + 4 * n);
}

__device__ __forceinline__ __half2 pair_of(__half low, __half high) { return __halves2half2(low, high); }
__device__ __forceinline__ __nv_bfloat162 pair_of(__nv_bfloat16 low, __nv_bfloat16 high) {
  return __halves2bfloat162(low, high);
}
__device__ __forceinline__ void split(__half2 pair, __half* out) {
  out[0] = __low2half(pair);
  out[1] = __high2half(pair);
}
__device__ __forceinline__ void split(__nv_bfloat162 pair, __nv_bfloat16* out) {
  out[0] = __low2bfloat16(pair);
  out[1] = __high2bfloat16(pair);
}

// out = x + y, x - y, x * y, x / y, x * y + z, max, min, then the same without / on pairs
CA_KERNEL void arithmetic(const __grid_constant__ ElementTypesArgs args) {
  const int64_t begin = first_element(), n = args.n;
  for (int64_t i = begin; i < begin + 16 && i < n; i += 2) {
    const T* x = static_cast<const T*>(args.x) + i;
    const T* y = static_cast<const T*>(args.y) + i;
    const T* z = static_cast<const T*>(args.z) + i;
    T* out = static_cast<T*>(args.out) + i;
    for (int j = 0; j < 2; ++j) {
      out[j] = __hadd(x[j], y[j]);
      out[n + j] = __hsub(x[j], y[j]);
      out[2 * n + j] = __hmul(x[j], y[j]);
      out[3 * n + j] = __hdiv(x[j], y[j]);
      out[4 * n + j] = __hfma(x[j], y[j], z[j]);
      out[5 * n + j] = __hmax(x[j], y[j]);
      out[6 * n + j] = __hmin(x[j], y[j]);
    }
    const auto a = pair_of(x[0], x[1]), b = pair_of(y[0], y[1]), c = pair_of(z[0], z[1]);
    split(__hadd2(a, b), out + 7 * n);
    split(__hsub2(a, b), out + 8 * n);
    split(__hmul2(a, b), out + 9 * n);
    split(__hfma2(a, b, c), out + 10 * n);
    split(__hmax2(a, b), out + 11 * n);
    split(__hmin2(a, b), out + 12 * n);
  }
}

constexpr __nv_fp8_interpretation_t FORMAT = CA_E5M2 ? __NV_E5M2 : __NV_E4M3;

// out uint8 [2, n] = float32 x as fp8, saturating and not
CA_KERNEL void fp8_encode(const __grid_constant__ ElementTypesArgs args) {
  const int64_t begin = first_element(), n = args.n;
  for (int64_t i = begin; i < begin + 16 && i < n; ++i) {
    const float x = static_cast<const float*>(args.x)[i];
    uint8_t* out = static_cast<uint8_t*>(args.out) + i;
    out[0] = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, FORMAT);
    out[n] = __nv_cvt_float_to_fp8(x, __NV_NOSAT, FORMAT);
  }
}

// out float32 [n] = fp8 x, through half
CA_KERNEL void fp8_decode(const __grid_constant__ ElementTypesArgs args) {
  const int64_t begin = first_element(), n = args.n;
  for (int64_t i = begin; i < begin + 16 && i < n; ++i) {
    const __half_raw half = __nv_cvt_fp8_to_halfraw(static_cast<const uint8_t*>(args.x)[i], FORMAT);
    static_cast<float*>(args.out)[i] = __half2float(__ushort_as_half(half.x));
  }
}

// out float32 [n] = pairs of fp8 x, through half2
CA_KERNEL void fp8_decode_pairs(const __grid_constant__ ElementTypesArgs args) {
  const int64_t begin = first_element(), n = args.n;
  for (int64_t i = begin; i < begin + 16 && i < n; i += 2) {
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + i;
    const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<uint16_t>(x[0] | x[1] << 8), FORMAT);
    const float2 wide = __half22float2(__halves2half2(__ushort_as_half(raw.x), __ushort_as_half(raw.y)));
    static_cast<float*>(args.out)[i] = wide.x;
    static_cast<float*>(args.out)[i + 1] = wide.y;
  }
}

__device__ __forceinline__ uint8_t to_fp8(__half, uint16_t x, __nv_saturation_t saturate) {
  __half_raw raw;
  raw.x = x;
  return __nv_cvt_halfraw_to_fp8(raw, saturate, FORMAT);
}
__device__ __forceinline__ uint16_t to_fp8(__half, uint16_t x, uint16_t y, __nv_saturation_t saturate) {
  __half2_raw raw;
  raw.x = x;
  raw.y = y;
  return __nv_cvt_halfraw2_to_fp8x2(raw, saturate, FORMAT);
}
__device__ __forceinline__ uint8_t to_fp8(__nv_bfloat16, uint16_t x, __nv_saturation_t saturate) {
  __nv_bfloat16_raw raw;
  raw.x = x;
  return __nv_cvt_bfloat16raw_to_fp8(raw, saturate, FORMAT);
}
__device__ __forceinline__ uint16_t to_fp8(__nv_bfloat16, uint16_t x, uint16_t y, __nv_saturation_t saturate) {
  __nv_bfloat162_raw raw;
  raw.x = x;
  raw.y = y;
  return __nv_cvt_bfloat16raw2_to_fp8x2(raw, saturate, FORMAT);
}

// out uint8 [4, n] = T x as fp8: saturating and not, then the same in pairs
CA_KERNEL void fp8_encode_narrow(const __grid_constant__ ElementTypesArgs args) {
  const int64_t begin = first_element(), n = args.n;
  for (int64_t i = begin; i < begin + 16 && i < n; i += 2) {
    const uint16_t* x = static_cast<const uint16_t*>(args.x) + i;
    uint8_t* out = static_cast<uint8_t*>(args.out) + i;
    for (int j = 0; j < 2; ++j) {
      out[j] = to_fp8(T{}, x[j], __NV_SATFINITE);
      out[n + j] = to_fp8(T{}, x[j], __NV_NOSAT);
    }
    const uint16_t saturated = to_fp8(T{}, x[0], x[1], __NV_SATFINITE);
    const uint16_t plain = to_fp8(T{}, x[0], x[1], __NV_NOSAT);
    for (int j = 0; j < 2; ++j) {
      out[2 * n + j] = static_cast<uint8_t>(saturated >> (8 * j));
      out[3 * n + j] = static_cast<uint8_t>(plain >> (8 * j));
    }
  }
}

__device__ __forceinline__ float2 wide_pair(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 wide_pair(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ __half2 narrow_pair(__half, float2 x) { return __float22half2_rn(x); }
__device__ __forceinline__ __nv_bfloat162 narrow_pair(__nv_bfloat16, float2 x) { return __float22bfloat162_rn(x); }
__device__ __forceinline__ __half2 both(__half, float x) { return __float2half2_rn(x); }
__device__ __forceinline__ __nv_bfloat162 both(__nv_bfloat16, float x) { return __float2bfloat162_rn(x); }

using Pair = decltype(both(T{}, 0.0f));

__device__ __forceinline__ Pair as_pair(uint32_t word) { return *reinterpret_cast<const Pair*>(&word); }

// out float32 [2, n] = T x in pairs as float2, and that narrowed in pairs and widened again
CA_KERNEL void widen_pairs(const __grid_constant__ ElementTypesArgs args) {
  const int64_t begin = first_element(), n = args.n;
  for (int64_t i = begin; i < begin + 16 && i < n; i += 2) {
    const T* x = static_cast<const T*>(args.x) + i;
    float* out = static_cast<float*>(args.out) + i;
    const float2 wide = wide_pair(pair_of(x[0], x[1]));
    const Pair again = narrow_pair(T{}, wide);
    out[0] = wide.x;
    out[1] = wide.y;
    out[n] = __low2float(again);
    out[n + 1] = __high2float(again);
  }
}

__device__ __forceinline__ void put_pair(float* out, Pair x) {
  const float2 wide = wide_pair(x);
  out[0] = wide.x;
  out[1] = wide.y;
}

// How codes become T without a conversion: they are put into the mantissa of a power of two, which is subtracted.
// A word holds uint16 x twice. out float32 [n, 8] = nibbles 0 to 3 and as signed numbers bytes 0 and 1 in both halves
CA_KERNEL void unpack(const __grid_constant__ ElementTypesArgs args) {
  const int64_t begin = first_element(), n = args.n;
  constexpr bool HALF = CA_HALF;
  constexpr uint32_t ONE_HIGH = HALF ? 0x64006400u : 0x43004300u;  // 1024 or 128: the last bit counts 1
  const Pair high = both(T{}, HALF ? 1024.0f : 128.0f);
  for (int64_t i = begin; i < begin + 16 && i < n; ++i) {
    const uint32_t x = static_cast<const uint16_t*>(args.x)[i] * 0x10001u;
    float* out = static_cast<float*>(args.out) + 8 * i;
    float nibbles[4][2];
    for (int k = 0; k < 4; ++k) put_pair(nibbles[k], __hsub2(as_pair((x >> (4 * k) & 0x000f000fu) | ONE_HIGH), high));
    for (int k = 0; k < 4; ++k) out[k] = nibbles[k][k % 2];
    // bytes: half has the bits for them; bfloat16 goes through float32
    if (HALF) {
      const uint32_t biased = __byte_perm(x ^ 0x80808080u, 0x64646464u, 0x4140);
      put_pair(out + 4, __hsub2(as_pair(biased), both(T{}, 1024.0f + 128.0f)));
      // a nibble that was not shifted: one multiplication and subtraction
      put_pair(out + 6, __hfma2(as_pair((x & 0x00f000f0u) | ONE_HIGH), both(T{}, 0.0625f), both(T{}, -64.0f)));
    } else {
      float2 wide;
      wide.x = __uint_as_float(__byte_perm(x ^ 0x80808080u, 0x4b000000u, 0x7440)) - (8388608.0f + 128.0f);
      wide.y = __uint_as_float(__byte_perm(x ^ 0x80808080u, 0x4b000000u, 0x7441)) - (8388608.0f + 128.0f);
      put_pair(out + 4, narrow_pair(T{}, wide));
      const uint32_t nibble = x >> 4 & 0x000f000fu;
      put_pair(out + 6, __hfma2(as_pair(nibble | ONE_HIGH), both(T{}, 1.0f), both(T{}, -128.0f)));
    }
  }
}

// out float32 [n] = fp8 x by moving its bits into place and one exact product, in pairs
CA_KERNEL void fp8_by_bits(const __grid_constant__ ElementTypesArgs args) {
  const int64_t begin = first_element(), n = args.n;
  constexpr int EXPONENT_BITS = CA_HALF ? 5 : 8, FP8_EXPONENT_BITS = CA_E5M2 ? 5 : 4;
  constexpr int SHIFT = EXPONENT_BITS - FP8_EXPONENT_BITS;
  constexpr int BIAS = (1 << (EXPONENT_BITS - 1)) - (1 << (FP8_EXPONENT_BITS - 1));
  const Pair scale = both(T{}, __uint_as_float(static_cast<uint32_t>(127 + BIAS) << 23));
  for (int64_t i = begin; i < begin + 16 && i < n; i += 2) {
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + i;
    const uint32_t word = static_cast<uint32_t>(x[0]) << 8 | static_cast<uint32_t>(x[1]) << 24;
    put_pair(static_cast<float*>(args.out) + i,
             __hmul2(as_pair((word & 0x80008000u) | (word & 0x7f007f00u) >> SHIFT), scale));
  }
}
