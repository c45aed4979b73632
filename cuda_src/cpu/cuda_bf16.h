// SPDX-License-Identifier: Apache-2.0
// cuda_bf16.h - __nv_bfloat16 and __nv_bfloat162 for the CPU executor, under CUDA's names.
//
// As cuda_fp16.h: explicit conversions only. Conversions keep subnormals, as the GPU does (AVX-512's
// vcvtneps2bf16 flushes them, so it is not used).
#ifndef CUPYATTN_CPU_CUDA_BF16_H
#define CUPYATTN_CPU_CUDA_BF16_H

#include "half_ops.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __nv_bfloat16_raw {  // what the fp8 conversions speak
  unsigned short x;
};
struct alignas(4) __nv_bfloat162_raw {
  unsigned short x, y;
};

namespace ca {

template <int N>
CA_INLINE void to_float(const __nv_bfloat16 (&v)[N], float (&out)[N]) {
  for_lane_groups<N>([&](auto offset, auto count) {
    widen_lanes<Bfloat16, decltype(count)::value>(v + offset.value, out + offset.value);
  });
}

template <int N>
CA_INLINE void from_float(const float (&x)[N], __nv_bfloat16 (&out)[N]) {
  for_lane_groups<N>([&](auto offset, auto count) {
    narrow_lanes<Bfloat16, decltype(count)::value>(x + offset.value, out + offset.value);
  });
}

template <>
struct Narrow<__nv_bfloat16> {
  using pair = __nv_bfloat162;
  static CA_INLINE float widen(__nv_bfloat16 a) { return bit_cast<float>(static_cast<uint32_t>(a.bits) << 16); }
  static CA_INLINE __nv_bfloat16 narrow(float x) {
    const uint32_t code = Bfloat16::narrow<Lanes<1>>(bit_cast<uint32_t>(x));
    return __nv_bfloat16{static_cast<uint16_t>(code)};
  }
};
template <>
struct PairOf<__nv_bfloat162> {
  using element = __nv_bfloat16;
};

}  // namespace ca

CA_INLINE float __bfloat162float(__nv_bfloat16 a) { return ca::Narrow<__nv_bfloat16>::widen(a); }
CA_INLINE __nv_bfloat16 __float2bfloat16_rn(float x) { return ca::Narrow<__nv_bfloat16>::narrow(x); }
CA_INLINE __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }

CA_INLINE unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
CA_INLINE short __bfloat16_as_short(__nv_bfloat16 a) { return static_cast<short>(a.bits); }
CA_INLINE __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16{bits}; }
CA_INLINE __nv_bfloat16 __short_as_bfloat16(short bits) {
  return __nv_bfloat16{static_cast<uint16_t>(bits)};
}

CA_INLINE __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) {
  return __nv_bfloat162{low, high};
}
CA_INLINE __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return __nv_bfloat162{a, a}; }
CA_INLINE __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
CA_INLINE __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
CA_INLINE __nv_bfloat162 __low2bfloat162(__nv_bfloat162 a) { return __nv_bfloat162{a.x, a.x}; }
CA_INLINE __nv_bfloat162 __high2bfloat162(__nv_bfloat162 a) { return __nv_bfloat162{a.y, a.y}; }

CA_INLINE __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return __nv_bfloat162{__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
CA_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 a) { return __floats2bfloat162_rn(a.x, a.y); }
CA_INLINE __nv_bfloat162 __float2bfloat162_rn(float x) { return __bfloat162bfloat162(__float2bfloat16_rn(x)); }
CA_INLINE float2 __bfloat1622float2(__nv_bfloat162 a) { return float2{__low2float(a), __high2float(a)}; }

#endif  // CUPYATTN_CPU_CUDA_BF16_H
