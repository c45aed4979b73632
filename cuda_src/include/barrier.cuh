// SPDX-License-Identifier: Apache-2.0
// barrier.cuh - named barriers: some warps of a block wait for each other while the rest go on.
//
// Barrier `id` (1 to 15; 0 is __syncthreads) opens when `threads`, a multiple of 32, have come to it.
#ifndef CUPYATTN_BARRIER_CUH
#define CUPYATTN_BARRIER_CUH

#include "prelude.cuh"

// Comes and waits.
__device__ __forceinline__ void bar_sync(int id, int threads) {
#if CA_CPU
  ca::ca_barrier(id, threads, 0);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Comes without waiting: what this thread wrote before is seen by those that wait.
__device__ __forceinline__ void bar_arrive(int id, int threads) {
#if CA_CPU
  ca::ca_barrier(id, threads, 1);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

#endif  // CUPYATTN_BARRIER_CUH
