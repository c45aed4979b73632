// SPDX-License-Identifier: Apache-2.0
// cp_async.cuh - copies from global to shared memory that run behind the thread's back (cp.async, sm_80).
//
// A thread issues copies and closes them into a group with cp_async_commit(); after cp_async_wait<N>() all but its
// N youngest groups have landed, and other threads see them after a barrier. Below sm_80 and on the CPU a copy is
// done at once; in the CPU's checking build data lands as late as the rules allow.
#ifndef CUPYATTN_CP_ASYNC_CUH
#define CUPYATTN_CP_ASYNC_CUH

#include "prelude.cuh"

#if CA_CPU || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)

// BYTES from global to shared, or BYTES zeros.
template <int BYTES, bool WHOLE_LINE = true>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid) {
#if CA_CPU && CA_CHECK
  ca::ca_cp_async(shared, global, BYTES, valid);
#else
  struct alignas(BYTES) Chunk {
    uint32_t words[BYTES / 4];
  };
  *static_cast<Chunk*>(shared) = valid ? *static_cast<const Chunk*>(global) : Chunk{};
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if CA_CPU && CA_CHECK
  ca::ca_cp_async_commit();
#endif
}

// Waits until at most PENDING of this thread's groups are still on their way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
#if CA_CPU && CA_CHECK
  ca::ca_cp_async_wait(PENDING);
#endif
}

#else

// 16 bytes bypass L1; with WHOLE_LINE they bring their 128-byte line into L2. Smaller copies exist only through L1.
template <int BYTES, bool WHOLE_LINE = true>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int read = valid ? BYTES : 0;  // the rest of the destination is filled with zeros
  if constexpr (BYTES == 16 && WHOLE_LINE) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read)
                 : "memory");
  } else if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(read)
                 : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are still on their way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif

// The first `bytes` of 16 (a multiple of 4), then zeros; only those are read.
template <bool WHOLE_LINE = true>
__device__ __forceinline__ void cp_async16_part(void* shared, const void* global, int bytes) {
#if CA_CPU || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
  if (bytes == 0 || bytes == 16) {
    cp_async<16>(shared, global, bytes > 0);
    return;
  }
  for (int at = 0; at < 16; at += 4)
    cp_async<4>(static_cast<char*>(shared) + at, static_cast<const char*>(global) + at, at < bytes);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (WHOLE_LINE)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#endif
}

// Both addresses aligned to the size. Zeros when !valid; `global` is then not read.
__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool valid = true) {
  cp_async<4>(shared, global, valid);
}
__device__ __forceinline__ void cp_async8(void* shared, const void* global, bool valid = true) {
  cp_async<8>(shared, global, valid);
}
template <bool WHOLE_LINE = true>
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
  cp_async<16, WHOLE_LINE>(shared, global, valid);
}

#endif  // CUPYATTN_CP_ASYNC_CUH
