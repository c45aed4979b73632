// SPDX-License-Identifier: Apache-2.0
// cuda_fp8.h - __nv_fp8_e4m3, __nv_fp8_e5m2 and their conversion functions for the CPU executor.
//
// Round to nearest even. Converting a float to an object saturates to the largest finite value, as in CUDA.
#ifndef CUPYATTN_CPU_CUDA_FP8_H
#define CUPYATTN_CPU_CUDA_FP8_H

#include "cuda_bf16.h"
#include "cuda_fp16.h"

typedef unsigned char __nv_fp8_storage_t;
typedef unsigned short __nv_fp8x2_storage_t;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

CA_INLINE __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t saturate,
                                                   __nv_fp8_interpretation_t format) {
  const uint32_t bits = ca::bit_cast<uint32_t>(x);
  const bool clamp = saturate == __NV_SATFINITE;
  return static_cast<__nv_fp8_storage_t>(format == __NV_E4M3 ? ca::E4m3::narrow<ca::Lanes<1>>(bits, clamp)
                                                             : ca::E5m2::narrow<ca::Lanes<1>>(bits, clamp));
}

// Element x in the low byte.
CA_INLINE __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 x, __nv_saturation_t saturate,
                                                        __nv_fp8_interpretation_t format) {
  const unsigned low = __nv_cvt_float_to_fp8(x.x, saturate, format);
  const unsigned high = __nv_cvt_float_to_fp8(x.y, saturate, format);
  return static_cast<__nv_fp8x2_storage_t>(low | high << 8);
}

namespace ca {
CA_INLINE float fp8_to_float(__nv_fp8_storage_t code, __nv_fp8_interpretation_t format) {
  return bit_cast<float>(format == __NV_E4M3 ? E4m3::widen<Lanes<1>>(code) : E5m2::widen<Lanes<1>>(code));
}
}  // namespace ca

// Exact: half holds every e4m3 and e5m2 value.
CA_INLINE __half_raw __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t code, __nv_fp8_interpretation_t format) {
  return __half_raw{__half_as_ushort(__float2half_rn(ca::fp8_to_float(code, format)))};
}
CA_INLINE __half2_raw __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t codes, __nv_fp8_interpretation_t format) {
  return __half2_raw{__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(codes & 0xff), format).x,
                     __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(codes >> 8), format).x};
}

// From half and bfloat16: float holds both, so one rounding.
CA_INLINE __nv_fp8_storage_t __nv_cvt_halfraw_to_fp8(__half_raw x, __nv_saturation_t saturate,
                                                     __nv_fp8_interpretation_t format) {
  return __nv_cvt_float_to_fp8(__half2float(__ushort_as_half(x.x)), saturate, format);
}
CA_INLINE __nv_fp8x2_storage_t __nv_cvt_halfraw2_to_fp8x2(__half2_raw x, __nv_saturation_t saturate,
                                                          __nv_fp8_interpretation_t format) {
  const float2 wide{__half2float(__ushort_as_half(x.x)), __half2float(__ushort_as_half(x.y))};
  return __nv_cvt_float2_to_fp8x2(wide, saturate, format);
}
CA_INLINE __nv_fp8_storage_t __nv_cvt_bfloat16raw_to_fp8(__nv_bfloat16_raw x, __nv_saturation_t saturate,
                                                         __nv_fp8_interpretation_t format) {
  return __nv_cvt_float_to_fp8(__bfloat162float(__ushort_as_bfloat16(x.x)), saturate, format);
}
CA_INLINE __nv_fp8x2_storage_t __nv_cvt_bfloat16raw2_to_fp8x2(__nv_bfloat162_raw x, __nv_saturation_t saturate,
                                                              __nv_fp8_interpretation_t format) {
  const float2 wide{__bfloat162float(__ushort_as_bfloat16(x.x)), __bfloat162float(__ushort_as_bfloat16(x.y))};
  return __nv_cvt_float2_to_fp8x2(wide, saturate, format);
}

struct __nv_fp8_e4m3 {
  __nv_fp8_storage_t __x;
  __nv_fp8_e4m3() = default;
  explicit CA_INLINE __nv_fp8_e4m3(float x) : __x(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)) {}
  explicit CA_INLINE operator float() const { return ca::fp8_to_float(__x, __NV_E4M3); }
};

struct __nv_fp8_e5m2 {
  __nv_fp8_storage_t __x;
  __nv_fp8_e5m2() = default;
  explicit CA_INLINE __nv_fp8_e5m2(float x) : __x(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2)) {}
  explicit CA_INLINE operator float() const { return ca::fp8_to_float(__x, __NV_E5M2); }
};

#endif  // CUPYATTN_CPU_CUDA_FP8_H
