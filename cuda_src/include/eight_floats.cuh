// SPDX-License-Identifier: Apache-2.0
// eight_floats.cuh - eight float32 numbers of one lane. On the CPU they are one vector register: g++ does not
// reliably turn arrays of accumulators into vectors by itself.
#ifndef CUPYATTN_EIGHT_FLOATS_CUH
#define CUPYATTN_EIGHT_FLOATS_CUH

#include "prelude.cuh"

struct EightFloats {
#if CA_CPU
  typedef float Numbers __attribute__((vector_size(32)));
  Numbers x;
#else
  float x[8];
#endif

  // The same number eight times.
  static __device__ __forceinline__ EightFloats all(float value) {
    EightFloats out;
#if CA_CPU
    out.x = value - Numbers{};
#else
#pragma unroll
    for (int j = 0; j < 8; ++j) out.x[j] = value;
#endif
    return out;
  }
  template <typename T>
  static __device__ __forceinline__ EightFloats from(const Vec<T, 8>& values) {
    float converted[8];
    to_float(values, converted);
    EightFloats out;
#if CA_CPU
    __builtin_memcpy(&out.x, converted, sizeof(out.x));
#else
#pragma unroll
    for (int j = 0; j < 8; ++j) out.x[j] = converted[j];
#endif
    return out;
  }
  template <typename T>
  __device__ __forceinline__ Vec<T, 8> to() const {
    float values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = x[j];
    return from_float<T, 8>(values);
  }
  // From and to 16-byte aligned memory.
  static __device__ __forceinline__ EightFloats load(const float* p) {
    EightFloats out;
#if CA_CPU
    __builtin_memcpy(&out.x, p, sizeof(out.x));
#else
#pragma unroll
    for (int j = 0; j < 8; j += 4) store_vec(out.x + j, load_vec<float, 4>(p + j));
#endif
    return out;
  }
  __device__ __forceinline__ void store(float* p) const {
#if CA_CPU
    __builtin_memcpy(p, &x, sizeof(x));
#else
#pragma unroll
    for (int j = 0; j < 8; j += 4) store_vec(p + j, load_vec<float, 4>(x + j));
#endif
  }

  __device__ __forceinline__ void add_product(const EightFloats& a, const EightFloats& b) {
#if CA_CPU
    x += a.x * b.x;
#else
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = fmaf(a.x[j], b.x[j], x[j]);
#endif
  }
  __device__ __forceinline__ void add_product(float a, const EightFloats& b) { add_product(all(a), b); }
  __device__ __forceinline__ void operator*=(float factor) {
#if CA_CPU
    x *= factor;
#else
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] *= factor;
#endif
  }
  __device__ __forceinline__ float sum() const {
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  }
};

#endif  // CUPYATTN_EIGHT_FLOATS_CUH
