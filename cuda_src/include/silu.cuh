// SPDX-License-Identifier: Apache-2.0
// silu.cuh - y * sigmoid(y) of several numbers, which the host computes as one vector.
#ifndef CUPYATTN_SILU_CUH
#define CUPYATTN_SILU_CUH

#include "eight_floats.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// 2^a of any number; the host's exp2 wants it below 128, where it gives infinity.
template <int N>
__device__ __forceinline__ Floats<N> exp2_of_any(Floats<N> a) {
#if CA_CPU
  a.x = a.x > 128.0f ? 128.0f - typename Floats<N>::Numbers{} : a.x;
#endif
  return exp2(a);
}

template <int N>
__device__ __forceinline__ Floats<N> silu(const Floats<N>& y) {
  Floats<N> e = y;
  e *= -LOG2_E;
  e = exp2_of_any(e);
#if CA_CPU
  e.x = y.x / (1.0f + e.x);
#else
#pragma unroll
  for (int j = 0; j < N; ++j) e.x[j] = __fdividef(y.x[j], 1.0f + e.x[j]);
#endif
  return e;
}

#endif  // CUPYATTN_SILU_CUH
