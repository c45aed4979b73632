// SPDX-License-Identifier: Apache-2.0
// bits.cuh - logic instructions the compiler does not form by itself.
#ifndef CUPYATTN_BITS_CUH
#define CUPYATTN_BITS_CUH

#include "prelude.cuh"

// (x & mask) | bits in one instruction; the compiler makes two of it when mask and bits are both constants.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
#if CA_CPU
  return (x & mask) | bits;
#else
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(x), "r"(mask), "r"(bits));
  return out;
#endif
}

// x, in a register: the compiler must not compute it again from what it was made of.
__device__ __forceinline__ int kept(int x) {
#if !CA_CPU
  asm volatile("" : "+r"(x));
#endif
  return x;
}

#endif  // CUPYATTN_BITS_CUH
