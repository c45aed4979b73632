// SPDX-License-Identifier: Apache-2.0
// cuda_fp16.h - __half and __half2 for the CPU executor, under CUDA's names.
//
// Only what kernels use, and stricter than CUDA: no implicit conversions, no operators. float2 comes from
// cuda_cpu.h, which every kernel build includes first.
#ifndef CUPYATTN_CPU_CUDA_FP16_H
#define CUPYATTN_CPU_CUDA_FP16_H

#include "half_ops.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct __half_raw {  // what the fp8 conversions speak
  unsigned short x;
};
struct alignas(4) __half2_raw {
  unsigned short x, y;
};

namespace ca {

template <int N>
CA_INLINE void to_float(const __half (&v)[N], float (&out)[N]) {
  for_lane_groups<N>([&](auto offset, auto count) {
    widen_half<decltype(count)::value>(v + offset.value, out + offset.value);
  });
}

template <int N>
CA_INLINE void from_float(const float (&x)[N], __half (&out)[N]) {
  for_lane_groups<N>([&](auto offset, auto count) {
    narrow_half<decltype(count)::value>(x + offset.value, out + offset.value);
  });
}

template <>
struct Narrow<__half> {
  using pair = __half2;
  static CA_INLINE float widen(__half a) {
    float out;
    widen_half<1>(&a, &out);
    return out;
  }
  static CA_INLINE __half narrow(float x) {
    __half out;
    narrow_half<1>(&x, &out);
    return out;
  }
};
template <>
struct PairOf<__half2> {
  using element = __half;
};

}  // namespace ca

CA_INLINE float __half2float(__half a) { return ca::Narrow<__half>::widen(a); }
CA_INLINE __half __float2half_rn(float x) { return ca::Narrow<__half>::narrow(x); }
CA_INLINE __half __float2half(float x) { return __float2half_rn(x); }

CA_INLINE unsigned short __half_as_ushort(__half a) { return a.bits; }
CA_INLINE short __half_as_short(__half a) { return static_cast<short>(a.bits); }
CA_INLINE __half __ushort_as_half(unsigned short bits) { return __half{bits}; }
CA_INLINE __half __short_as_half(short bits) { return __half{static_cast<uint16_t>(bits)}; }

CA_INLINE __half2 __halves2half2(__half low, __half high) { return __half2{low, high}; }
CA_INLINE __half2 __half2half2(__half a) { return __half2{a, a}; }
CA_INLINE __half __low2half(__half2 a) { return a.x; }
CA_INLINE __half __high2half(__half2 a) { return a.y; }
CA_INLINE __half2 __low2half2(__half2 a) { return __half2{a.x, a.x}; }
CA_INLINE __half2 __high2half2(__half2 a) { return __half2{a.y, a.y}; }
CA_INLINE __half2 __lows2half2(__half2 a, __half2 b) { return __half2{a.x, b.x}; }
CA_INLINE __half2 __highs2half2(__half2 a, __half2 b) { return __half2{a.y, b.y}; }

CA_INLINE __half2 __floats2half2_rn(float low, float high) {
  const float x[2] = {low, high};
  __half2 out;
  ca::narrow_half<2>(x, &out);
  return out;
}
CA_INLINE __half2 __float22half2_rn(float2 a) { return __floats2half2_rn(a.x, a.y); }
CA_INLINE __half2 __float2half2_rn(float x) { return __half2half2(__float2half_rn(x)); }
CA_INLINE float2 __half22float2(__half2 a) {
  float out[2];
  ca::widen_half<2>(&a, out);
  return float2{out[0], out[1]};
}

#endif  // CUPYATTN_CPU_CUDA_FP16_H
