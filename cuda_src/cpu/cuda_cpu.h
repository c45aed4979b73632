// SPDX-License-Identifier: Apache-2.0
// cuda_cpu.h - CUDA's language, for one block at a time on one OS thread: every CUDA thread is a fiber.
#ifndef CUPYATTN_CPU_CUDA_CPU_H
#define CUPYATTN_CPU_CUDA_CPU_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "api.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __align__(n) alignas(n)

struct uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace ca {

struct Block {
  uint3 index;
  dim3 size, grid;
  char* shared;  // dynamic shared memory
};

struct Thread {  // what kernels see of a fiber
  uint3 index;
  uint32_t lane, warp;
  Block* block;
};

// The running fiber. __thread, not thread_local: no initialisation to ask about at every use.
extern __attribute__((visibility("default"), tls_model("initial-exec"))) __thread Thread* ca_self;

// Runs `meet` once over the operands of all lanes of `mask`, on the stack of the last lane to arrive.
// operands[lane] is null for a lane outside the mask.
using Meet = void (*)(void* const* operands, uint32_t mask);
// clang would merge the calls of two branches into one, and hide a divergence
#if defined(__clang__)
#define CA_KEEP __attribute__((nomerge))
#else
#define CA_KEEP
#endif
CA_API CA_KEEP void ca_collective(uint32_t mask, Meet meet, void* operand);
CA_API CA_KEEP void ca_barrier(int id, uint32_t threads, int arrive_only);  // id 0 and threads 0: __syncthreads

// Asynchronous copies as a checked launch sees them: the data lands when the thread waits for its group.
CA_API void ca_cp_async(void* to, const void* from, uint32_t bytes, int valid);
CA_API void ca_cp_async_commit(void);
CA_API void ca_cp_async_wait(uint32_t pending);

// Counted in checked launches.
enum Event { COUNT_MMA, COUNT_LDMATRIX, COUNT_SHUFFLE };
CA_API void ca_count(int event, uint64_t amount);

template <typename Operand, void (*MEET)(Operand* const*, uint32_t)>
inline void collective(uint32_t mask, Operand& operand) {
  ca_collective(mask, [](void* const* all, uint32_t m) { MEET(reinterpret_cast<Operand* const*>(all), m); }, &operand);
}

}  // namespace ca

#define threadIdx (ca::ca_self->index)
#define blockIdx (ca::ca_self->block->index)
#define blockDim (ca::ca_self->block->size)
#define gridDim (ca::ca_self->block->grid)
#define CA_DYN_SMEM(type, name) type* const name = reinterpret_cast<type*>(ca::ca_self->block->shared)

// always inline: the barrier's return address is the line a divergence is reported with
__forceinline__ void __syncthreads() { ca::ca_barrier(0, 0, 0); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { ca::ca_collective(mask, [](void* const*, uint32_t) {}, nullptr); }

namespace ca {

template <typename T>
struct Shuffle { T value, result; int source; };

template <typename T>
inline void meet_shuffle(Shuffle<T>* const* all, uint32_t mask) {
  for (uint32_t left = mask; left; left &= left - 1) {
    Shuffle<T>* own = all[__builtin_ctz(left)];
    const Shuffle<T>* from = all[own->source];
    if (from) own->result = from->value; else memset(&own->result, 0xff, sizeof(T));
  }
}
template <typename T>
inline T shuffle(uint32_t mask, T value, int source) {
  Shuffle<T> operand{value, value, source};
  collective<Shuffle<T>, meet_shuffle<T>>(mask, operand);
  return operand.result;
}
inline int lane() { return ca_self->lane; }

struct Vote { uint32_t value; };
inline void meet_ballot(Vote* const* all, uint32_t mask) {
  uint32_t votes = 0;
  for (uint32_t left = mask; left; left &= left - 1) { int l = __builtin_ctz(left); votes |= (all[l]->value != 0) << l; }
  for (uint32_t left = mask; left; left &= left - 1) all[__builtin_ctz(left)]->value = votes;
}

}  // namespace ca

template <typename T> inline T __shfl_sync(uint32_t m, T v, int src, int width = 32) { int l = ca::lane(); return ca::shuffle(m, v, (l & ~(width - 1)) | (src & (width - 1))); }
template <typename T> inline T __shfl_xor_sync(uint32_t m, T v, int x, int width = 32) { int l = ca::lane(); int s = l ^ x; return ca::shuffle(m, v, (s & ~(width - 1)) > (l & ~(width - 1)) ? l : s); }
template <typename T> inline T __shfl_down_sync(uint32_t m, T v, int d, int width = 32) { int l = ca::lane(); int s = l + d; return ca::shuffle(m, v, (s & ~(width - 1)) != (l & ~(width - 1)) ? l : s); }
template <typename T> inline T __shfl_up_sync(uint32_t m, T v, int d, int width = 32) { int l = ca::lane(); int s = l - d; return ca::shuffle(m, v, s < (l & ~(width - 1)) ? l : s); }
inline uint32_t __ballot_sync(uint32_t m, int p) { ca::Vote v{static_cast<uint32_t>(p != 0)}; ca::collective<ca::Vote, ca::meet_ballot>(m, v); return v.value; }
inline int __any_sync(uint32_t m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(uint32_t m, int p) { return __ballot_sync(m, p) == m; }

template <typename T> inline T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline float atomicAdd(float* p, float v) {
  uint32_t* bits = reinterpret_cast<uint32_t*>(p);
  uint32_t old = __atomic_load_n(bits, __ATOMIC_SEQ_CST);
  for (;;) {
    float f; memcpy(&f, &old, 4); const float sum = f + v; uint32_t next; memcpy(&next, &sum, 4);
    if (__atomic_compare_exchange_n(bits, &old, next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return f;
  }
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}
template <typename T> inline T __ldg(const T* p) { return *p; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
namespace ca {
// fmaxf, fminf: of a number and a NaN the number. Unlike the library's they are inlined and vectorise.
__forceinline__ float max_number(float a, float b) { return (a > b) | (b != b) ? a : b; }
__forceinline__ float min_number(float a, float b) { return (a < b) | (b != b) ? a : b; }
}  // namespace ca
#define fmaxf ca::max_number
#define fminf ca::min_number
#define fmaf __builtin_fmaf
#define fabsf __builtin_fabsf
#define sqrtf __builtin_sqrtf
#define tanhf __builtin_tanhf
#define logf __builtin_logf
#define log2f __builtin_log2f
#define sinf __builtin_sinf
#define cosf __builtin_cosf
#define floorf __builtin_floorf
#define isinf __builtin_isinf
#define isnan __builtin_isnan
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(uint32_t x) { float f; memcpy(&f, &x, 4); return f; }
inline uint32_t __float_as_uint(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
inline int __float_as_int(float x) { int u; memcpy(&u, &x, 4); return u; }
inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }
namespace ca {
// 2^(whole + f) to about 1e-7 relative, whole an integer and |f| <= 0.5, where the result is a normal number. The
// power of two goes into the exponent bits: a product of two factors could be reassociated, and then overflow.
inline float exp2_parts(float whole, float f) {
  float p = 1.5353362e-4f; p = p * f + 1.3398874e-3f; p = p * f + 9.6184373e-3f; p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f; p = p * f + 6.9314720e-1f; p = p * f + 1.0f;
  return __uint_as_float(__float_as_uint(p) + (static_cast<uint32_t>(static_cast<int>(whole)) << 23));
}
// Branch-free, so that loops over them vectorise. Results below 2^-126 are 0, as with the GPU's -ftz=true.
inline float exp2_fast(float x) {
  const float c = x < -126.0f ? -126.0f : (x > 127.999f ? 127.999f : x);
  const float whole = __builtin_floorf(c + 0.5f);
  const float r = exp2_parts(whole, c - whole);
  return x != x ? x : x < -126.0f ? 0.0f : x >= 128.0f ? __builtin_huge_valf() : r;
}
inline float exp_fast(float x) {
  const float c = x < -87.33f ? -87.33f : (x > 88.722f ? 88.722f : x);
  const float whole = __builtin_floorf(c * 1.4426950408889634f + 0.5f);
  // log2(e) in two parts: rounding c * log2(e) would cost as many digits as c has
  const float f = __builtin_fmaf(c, 1.92596303e-8f, __builtin_fmaf(c, 1.44269502f, -whole));
  const float r = exp2_parts(whole, f);
  return x != x ? x : x < -87.33f ? 0.0f : x > 88.722f ? __builtin_huge_valf() : r;
}
}
#define exp2f(x) ca::exp2_fast(x)
#define __expf(x) ca::exp_fast(x)
#define expf(x) ca::exp_fast(x)

namespace ca {
template <typename T> constexpr const char* kind_of() { return __is_class(T) ? "struct:" : "scalar:"; }
template <typename... P> struct Parameters { static constexpr int count = sizeof...(P); };
inline char* put(char* at, const char* text) { while (*text) *at++ = *text++; return at; }
inline char* put(char* at, unsigned n) { if (n >= 10) at = put(at, n / 10); *at++ = '0' + n % 10; return at; }
template <typename P> struct Kind { static constexpr const char* name = __is_class(P) ? "struct:" : "int:"; };
template <typename P> struct Kind<P*> { static constexpr const char* name = "ptr:"; };
template <> struct Kind<float> { static constexpr const char* name = "float:"; };
template <typename... P> const char* signature(void (*)(P...)) {
  static char text[256];
  char* at = text;
  ((at = put(put(put(at, at == text ? "" : ","), Kind<P>::name), static_cast<unsigned>(sizeof(P)))), ...);
  *at = 0;
  return text;
}
template <typename P> void call(void (*kernel)(P), const void* args) {
  alignas(64) char own[sizeof(P)];
  memcpy(own, args, sizeof(P));
  kernel(*reinterpret_cast<const P*>(own));
}
template <typename... P> void call(void (*)(P...), const void*) {}
}  // namespace ca

#define CA_CPU_ENTRY(name)                                                               \
  CA_API void ca_entry_##name(const void* args) { ca::call(name, args); }                \
  CA_API const char* ca_signature_##name(void) { return ca::signature(name); }

#endif
