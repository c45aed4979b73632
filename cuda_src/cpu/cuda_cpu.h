// SPDX-License-Identifier: Apache-2.0
// cuda_cpu.h - the CUDA language for a host compiler, included before every kernel of a CPU build.
//
// A block runs on one OS thread, each of its CUDA threads on a fiber. Everything here that makes a thread wait goes
// through three calls of the executor: ca_barrier, ca_collective and ca_yield. This file holds the keywords, vector
// types, indices and those primitives; cuda_warp.h, cuda_memory.h and cuda_math.h hold CUDA's functions on top.
#ifndef CUPYATTN_CPU_CUDA_CPU_H
#define CUPYATTN_CPU_CUDA_CPU_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "api.h"

#ifndef CA_CHECK
#define CA_CHECK 0  // 1 in the instrumented build of the checking mode
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ thread_local  // a block never leaves its OS thread, which runs one block at a time
#define __builtin_assume(condition) ((void)0)

#define CA_HOST_INLINE inline __attribute__((always_inline))

// ---- vector types ----------------------------------------------------------------------------------------

#define CA_VECTOR_TYPES(name, scalar)                                                                   \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                                          \
  struct name##3 { scalar x, y, z; };                                                                   \
  struct alignas(4 * sizeof(scalar) < 16 ? 4 * sizeof(scalar) : 16) name##4 { scalar x, y, z, w; };     \
  CA_HOST_INLINE name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                          \
  CA_HOST_INLINE name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }             \
  CA_HOST_INLINE name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CA_VECTOR_TYPES(char, signed char)
CA_VECTOR_TYPES(uchar, unsigned char)
CA_VECTOR_TYPES(short, short)
CA_VECTOR_TYPES(ushort, unsigned short)
CA_VECTOR_TYPES(int, int)
CA_VECTOR_TYPES(uint, unsigned int)
CA_VECTOR_TYPES(longlong, long long)
CA_VECTOR_TYPES(ulonglong, unsigned long long)
CA_VECTOR_TYPES(float, float)
CA_VECTOR_TYPES(double, double)
#undef CA_VECTOR_TYPES

struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
};

// ---- what a kernel sees of its thread and block ----------------------------------------------------------

namespace ca {

struct Block {
  uint3 index;
  dim3 size, grid;
  char* shared;  // dynamic shared memory, aligned to a page
};

struct Thread {
  uint3 index;
  uint32_t lane, warp;
  Block* block;
};

// The running CUDA thread. __thread and initial-exec: dynamic TLS would make a barrier a third dearer.
extern __attribute__((visibility("default"), tls_model("initial-exec"))) __thread Thread* ca_self;

// clang would merge the calls of two branches into one, and a report would name the wrong line.
#if defined(__clang__)
#define CA_KEEP __attribute__((nomerge))
#else
#define CA_KEEP
#endif

// Runs `meet` once over the operands of all lanes of `mask`, on the stack of the last lane to arrive.
// operands[lane] is null for a lane outside the mask. `file` and `line` are the caller's: in the checking mode the
// lanes must come from one place.
using Meet = void (*)(void* const* operands, uint32_t mask);
CA_API CA_KEEP void ca_collective(uint32_t mask, Meet meet, void* operand, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE());
// bar.sync (bar.arrive if `arrive_only`) of `threads` threads, 0 for the whole block. Barrier 0 is __syncthreads.
CA_API CA_KEEP void ca_barrier(int id, uint32_t threads, int arrive_only, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE());
// Lets other warps run: for loops that wait for another warp.
CA_API void ca_yield(void);

// Asynchronous copies as a checked launch sees them: the data lands when the thread waits for its group.
CA_API void ca_cp_async(void* to, const void* from, uint32_t bytes, int valid);
CA_API void ca_cp_async_commit(void);
CA_API void ca_cp_async_wait(uint32_t pending);

// Counted in checked launches.
enum Event { COUNT_MMA, COUNT_LDMATRIX, COUNT_SHUFFLE };
CA_API void ca_count(int event, uint64_t amount);

// Checked builds: one access of its true width, a copy that is not an access, and __threadfence.
CA_API void ca_access(const void* address, uint32_t bytes, uint32_t alignment, CaAccess access);
CA_API void ca_copy_unseen(void* to, const void* from, uint32_t bytes);
CA_API void ca_fence(void);

// Every lane of `mask` deposits its operand; MEET computes for all of them and writes results through the pointers.
template <typename Operand, void (*MEET)(Operand* const*, uint32_t)>
CA_HOST_INLINE void collective(uint32_t mask, Operand& operand, const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
  const Meet meet = [](void* const* all, uint32_t m) { MEET(reinterpret_cast<Operand* const*>(all), m); };
  ca_collective(mask, meet, &operand, file, line);
}

CA_HOST_INLINE int lane() { return static_cast<int>(ca_self->lane); }

// *p in one access of its true width: the compiler's instrumentation would split a vector into its elements.
template <typename T>
CA_HOST_INLINE T load(const T* p, [[maybe_unused]] CaAccess access = CA_READ) {
#if CA_CHECK
  T out;
  ca_access(p, sizeof(T), alignof(T), access);
  ca_copy_unseen(&out, p, sizeof(T));
  return out;
#else
  return *p;
#endif
}

template <typename T>
CA_HOST_INLINE void store(T* p, const T& value) {
#if CA_CHECK
  ca_access(p, sizeof(T), alignof(T), CA_WRITE);
  ca_copy_unseen(p, &value, sizeof(T));
#else
  *p = value;
#endif
}

}  // namespace ca

#define threadIdx (ca::ca_self->index)
#define blockIdx (ca::ca_self->block->index)
#define blockDim (ca::ca_self->block->size)
#define gridDim (ca::ca_self->block->grid)
constexpr int warpSize = 32;

#define CA_DYN_SMEM(type, name) type* const name = reinterpret_cast<type*>(ca::ca_self->block->shared)

#include "cuda_memory.h"
#include "cuda_warp.h"
#include "cuda_math.h"

// ---- what a kernel library exports -----------------------------------------------------------------------

namespace ca {

template <typename P>
struct KindOf { static constexpr const char* name = __is_class(P) ? "struct:" : "int:"; };
template <typename P>
struct KindOf<P*> { static constexpr const char* name = "ptr:"; };
template <>
struct KindOf<float> { static constexpr const char* name = "float:"; };
template <>
struct KindOf<double> { static constexpr const char* name = "float:"; };

inline char* append(char* at, const char* text) {
  while (*text) *at++ = *text++;
  return at;
}
inline char* append(char* at, unsigned n) {
  if (n >= 10) at = append(at, n / 10);
  *at++ = static_cast<char>('0' + n % 10);
  return at;
}

// "struct:88" or "ptr:8,int:4": kind and size of each parameter.
template <typename... P>
inline const char* signature(void (*)(P...)) {
  static char text[16 * sizeof...(P) + 1];
  char* at = text;
  ((at = append(append(append(at, at == text ? "" : ","), KindOf<P>::name), static_cast<unsigned>(sizeof(P)))), ...);
  *at = 0;
  return text;
}

template <typename P>
CA_HOST_INLINE const P& take(const char*& at) {
  at += (alignof(P) - reinterpret_cast<uintptr_t>(at) % alignof(P)) % alignof(P);
  const P& found = *reinterpret_cast<const P*>(at);
  at += sizeof(P);
  return found;
}

// `args` holds the parameters one after the other, each at its natural alignment.
template <typename... P>
CA_HOST_INLINE void call(void (*kernel)(P...), const void* args) {
  struct Call {  // braces, unlike a call, fix the order of evaluation
    CA_HOST_INLINE Call(void (*k)(P...), const P&... p) { k(p...); }
  };
  const char* at = static_cast<const char*>(args);
  (void)at;
  Call{kernel, take<P>(at)...};
}

}  // namespace ca

#define CA_CPU_ENTRY(name)                                                \
  CA_API void ca_entry_##name(const void* args) { ca::call(name, args); } \
  CA_API const char* ca_signature_##name(void) { return ca::signature(name); }

#endif  // CUPYATTN_CPU_CUDA_CPU_H
