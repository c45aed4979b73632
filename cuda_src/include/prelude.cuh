// SPDX-License-Identifier: Apache-2.0
// prelude.cuh - what every kernel file starts with: entry and shared-memory spelling, element conversion,
// aligned vector access. On the CPU the executor's header (cuda_src/cpu/cuda_cpu.h) comes first and the
// <cuda_fp16.h> family resolves to cuda_src/cpu; on the GPU it is CUDA's own.
#ifndef CUPYATTN_PRELUDE_CUH
#define CUPYATTN_PRELUDE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ints.h"

#ifndef CA_CPU
#define CA_CPU 0  // 1 in the CPU build
#endif
#ifndef CA_FUSED
#define CA_FUSED 0  // 1 in the CPU build when tile-level helpers take their fused host body
#endif

#define CA_KERNEL extern "C" __global__

#if !CA_CPU
// Dynamic shared memory of the block, 16-byte aligned, as an array of `type`.
#define CA_DYN_SMEM(type, name)                   \
  extern __shared__ uint4 ca_dynamic_shared[];    \
  type* const name = reinterpret_cast<type*>(ca_dynamic_shared)
#endif

constexpr uint32_t FULL_MASK = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// N elements moved by one load or store. The address must be a multiple of sizeof(Vec).
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load_vec(const T* p) {
#if CA_CPU
  return ca::load(reinterpret_cast<const Vec<T, N>*>(p));  // one access for the checking mode too
#else
  return *reinterpret_cast<const Vec<T, N>*>(p);
#endif
}

template <typename T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& x) {
#if CA_CPU
  ca::store(reinterpret_cast<Vec<T, N>*>(p), x);
#else
  *reinterpret_cast<Vec<T, N>*>(p) = x;
#endif
}

template <typename T, int N>
__device__ __forceinline__ void to_float(const Vec<T, N>& x, float (&out)[N]) {
#if CA_CPU
  ca::to_float(x.v, out);  // F16C where the host has it
#else
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(x.v[i]);
#endif
}

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> from_float(const float (&x)[N]) {
  Vec<T, N> out;
#if CA_CPU
  ca::from_float(x, out.v);
#else
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = from_float<T>(x[i]);
#endif
  return out;
}

#endif  // CUPYATTN_PRELUDE_CUH
