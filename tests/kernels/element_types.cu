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
