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

// `p`, which is in global memory. The compiler does not see that of a pointer that lay in memory or may be null, and
// accesses through it would have to find out where it points. Never for what may be in shared memory.
template <typename T>
__device__ __forceinline__ T* in_global(T* p) {
#if !CA_CPU
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// To any memory. The compiler takes a struct's store apart and joins the members again only where nothing stands
// between them: under a condition, or among stores of other rows, eight 2-byte stores may be left of one of 16 bytes.
template <typename T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& x) {
#if CA_CPU
  ca::store(reinterpret_cast<Vec<T, N>*>(p), x);
#else
  *reinterpret_cast<Vec<T, N>*>(p) = x;
#endif
}

// To global memory, always as one instruction of 4, 8 or 16 bytes; single elements as they are. (uint4 is taken apart,
// too.) No load moves across those of 8 and 16 bytes, so that a loop whose loads have to run ahead is better off with
// store_vec as long as that stays whole; tests/test_instructions.py sees it.
template <typename T, int N>
__device__ __forceinline__ void store_global(T* p, const Vec<T, N>& x) {
#if CA_CPU
  store_vec(p, x);
#else
  static_assert(N == 1 || sizeof(x) == 4 || sizeof(x) == 8 || sizeof(x) == 16, "store_global: not one instruction");
  if constexpr (N == 1) {
    *p = x.v[0];
  } else {
    uint32_t words[sizeof(x) / 4];
    memcpy(words, &x, sizeof(x));
    if constexpr (sizeof(x) == 4) {
      *reinterpret_cast<uint32_t*>(p) = words[0];
    } else if constexpr (sizeof(x) == 8) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(words[0]), "r"(words[1]) : "memory");
    } else {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                   "r"(words[3])
                   : "memory");
    }
  }
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
