// SPDX-License-Identifier: Apache-2.0
// pairs.cuh - N pairs of consecutive numbers, split into first and second ones and merged again (one lane's registers).
#ifndef CUPYATTN_PAIRS_CUH
#define CUPYATTN_PAIRS_CUH

#include "prelude.cuh"

#if CA_CPU
// Host vectors with one pair, or one number of every pair, per lane: g++ does not find these shuffles by itself.
template <int N>
struct PairLanes {
  typedef uint64_t Pairs __attribute__((vector_size(8 * N)));
  typedef uint32_t Halves __attribute__((vector_size(4 * N)));
};
#endif

// first[n] = x[2n], second[n] = x[2n + 1]
template <int N>
__device__ __forceinline__ void split_pairs(const float (&x)[2 * N], float (&first)[N], float (&second)[N]) {
#if CA_CPU
  using Halves = typename PairLanes<N>::Halves;
  typename PairLanes<N>::Pairs pairs;
  __builtin_memcpy(&pairs, x, sizeof(pairs));
  const Halves low = __builtin_convertvector(pairs, Halves), high = __builtin_convertvector(pairs >> 32, Halves);
  __builtin_memcpy(first, &low, sizeof(low));
  __builtin_memcpy(second, &high, sizeof(high));
#else
#pragma unroll
  for (int n = 0; n < N; ++n) {
    first[n] = x[2 * n];
    second[n] = x[2 * n + 1];
  }
#endif
}

// x[2n] = first[n], x[2n + 1] = second[n]
template <int N>
__device__ __forceinline__ void merge_pairs(const float (&first)[N], const float (&second)[N], float (&x)[2 * N]) {
#if CA_CPU
  using Pairs = typename PairLanes<N>::Pairs;
  typename PairLanes<N>::Halves low, high;
  __builtin_memcpy(&low, first, sizeof(low));
  __builtin_memcpy(&high, second, sizeof(high));
  const Pairs pairs = __builtin_convertvector(low, Pairs) | (__builtin_convertvector(high, Pairs) << 32);
  __builtin_memcpy(x, &pairs, sizeof(pairs));
#else
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[2 * n] = first[n];
    x[2 * n + 1] = second[n];
  }
#endif
}

#endif  // CUPYATTN_PAIRS_CUH
