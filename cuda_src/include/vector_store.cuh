// SPDX-License-Identifier: Apache-2.0
// vector_store.cuh - stores to global memory that stay whole.
//
// The compiler takes a struct's store apart and joins the members again only where nothing stands between them: under a
// condition, or among stores of other rows, eight 2-byte stores are what is left of one of 16 bytes.
#ifndef CUPYATTN_VECTOR_STORE_CUH
#define CUPYATTN_VECTOR_STORE_CUH

#include "eight_floats.cuh"

// store_vec to global memory, as one instruction for 16 and 8 bytes.
template <typename T, int N>
__device__ __forceinline__ void store_global(T* p, const Vec<T, N>& x) {
#if CA_CPU
  store_vec(p, x);
#else
  if constexpr (sizeof(x) == 16) {
    uint32_t words[4];
    memcpy(words, &x, 16);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  } else if constexpr (sizeof(x) == 8) {
    uint32_t words[2];
    memcpy(words, &x, 8);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(words[0]), "r"(words[1]) : "memory");
  } else {
    store_vec(p, x);
  }
#endif
}

// N floats rounded to T, in stores of at most 16 bytes.
template <int N, typename T>
__device__ __forceinline__ void store_floats(T* p, const Floats<N>& x) {
  constexpr int PIECE = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int j = 0; j < N; j += PIECE) {
    float some[PIECE];
#pragma unroll
    for (int i = 0; i < PIECE; ++i) some[i] = x.x[j + i];
    store_global(p + j, from_float<T, PIECE>(some));
  }
}

#endif  // CUPYATTN_VECTOR_STORE_CUH
