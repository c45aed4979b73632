// SPDX-License-Identifier: Apache-2.0
// runs.cuh - 16 floats of one lane at a time: a run of weights or activations, and sums of products of runs.
//
// On the host with CA_FUSED a run is one vector (a register with AVX-512, several otherwise) and a RunSum 16 partial
// sums; elsewhere both are plain floats. Below are also the vector conversions that dequant.cuh makes runs with.
#ifndef CUPYATTN_RUNS_CUH
#define CUPYATTN_RUNS_CUH

#include "prelude.cuh"

constexpr int RUN = 16;

#if CA_CPU && CA_FUSED
namespace ca {
typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));
typedef float Floats16Unaligned __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints16 __attribute__((vector_size(64)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef int8_t SignedBytes16 __attribute__((vector_size(16)));

// 16 bytes as 16 int32. GCC makes 16 scalar conversions of a vector conversion over two widths.
#if defined(__clang__)
CA_INLINE Ints16 widen_bytes(const Bytes16& bytes) { return __builtin_convertvector(bytes, Ints16); }
CA_INLINE Ints16 widen_bytes(const SignedBytes16& bytes) { return __builtin_convertvector(bytes, Ints16); }
#elif defined(__AVX512F__)
typedef char Chars16 __attribute__((vector_size(16)));
CA_INLINE Ints16 widen_bytes(const Bytes16& bytes) {
  return __builtin_ia32_pmovzxbd512_mask(bit_cast<Chars16>(bytes), Ints16{}, 0xffff);
}
CA_INLINE Ints16 widen_bytes(const SignedBytes16& bytes) {
  return __builtin_ia32_pmovsxbd512_mask(bit_cast<Chars16>(bytes), Ints16{}, 0xffff);
}
#else
typedef uint16_t Shorts16 __attribute__((vector_size(32)));
typedef int16_t SignedShorts16 __attribute__((vector_size(32)));
CA_INLINE Ints16 widen_bytes(const Bytes16& bytes) {
  return __builtin_convertvector(__builtin_convertvector(bytes, Shorts16), Ints16);
}
CA_INLINE Ints16 widen_bytes(const SignedBytes16& bytes) {
  return __builtin_convertvector(__builtin_convertvector(bytes, SignedShorts16), Ints16);
}
#endif

#if __has_builtin(__builtin_shufflevector)
// p[I] 16 / N times, then p[I + 1] and so on: N numbers.
template <int I, int N, typename V>
CA_INLINE Floats16 spread(const V& p) {
  constexpr int B = I + (N > 2), C = I + N / 2, D = I + N / 2 + (N > 2);
  return __builtin_shufflevector(p, p, I, I, I, I, B, B, B, B, C, C, C, C, D, D, D, D);
}
// Elements FIRST, ... of x.
template <typename V, int FIRST, typename X>
CA_INLINE V slice(const X& x) {
  if constexpr (sizeof(V) == sizeof(Floats8)) {
    return __builtin_shufflevector(x, x, FIRST, FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 4, FIRST + 5, FIRST + 6,
                                   FIRST + 7);
  } else {
    return __builtin_shufflevector(x, x, FIRST, FIRST + 1, FIRST + 2, FIRST + 3);
  }
}
// Four by four in the order 0, 2, 1, 3.
CA_INLINE Floats16 swap_middle(const Floats16& x) {
  return __builtin_shufflevector(x, x, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
}
CA_INLINE Floats16 join(const Floats8& low, const Floats8& high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else  // GCC before 12
template <int I, int N, typename V>
CA_INLINE Floats16 spread(const V& p) {
  const float a = p[I], b = p[I + (N > 2)], c = p[I + N / 2], d = p[I + N / 2 + (N > 2)];
  return Floats16{a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d};
}
template <typename V, int FIRST, typename X>
CA_INLINE V slice(const X& x) {
  V part;
  __builtin_memcpy(&part, reinterpret_cast<const float*>(&x) + FIRST, sizeof(part));
  return part;
}
CA_INLINE Floats16 swap_middle(const Floats16& x) {
  return __builtin_shuffle(x, Ints16{0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15});
}
CA_INLINE Floats16 join(const Floats8& low, const Floats8& high) {
  Floats16 both;
  __builtin_memcpy(&both, &low, sizeof(low));
  __builtin_memcpy(reinterpret_cast<Floats8*>(&both) + 1, &high, sizeof(high));
  return both;
}
#endif

// Eight float16 numbers, kept out of memory, where they would be reloaded wider than they were stored.
CA_INLINE Floats8 widen_halves(long long low, long long high) {
#if defined(__F16C__)
  typedef long long Longs2 __attribute__((vector_size(16)));
  const Longs2 raw = {low, high};
#if defined(__clang__)
  typedef _Float16 Halves8 __attribute__((vector_size(16)));
  return __builtin_convertvector(bit_cast<Halves8>(raw), Floats8);
#else
  typedef short Shorts8 __attribute__((vector_size(16)));
  return __builtin_ia32_vcvtph2ps256(bit_cast<Shorts8>(raw));
#endif
#else
  __half halves[8];
  __builtin_memcpy(halves, &low, 8);
  __builtin_memcpy(halves + 4, &high, 8);
  float wide[8];
  for (int i = 0; i < 8; ++i) wide[i] = to_float(halves[i]);
  return bit_cast<Floats8>(wide);
#endif
}

// 16 numbers at p as floats.
CA_INLINE Floats16 widen_numbers(const __half* p) {
  long long words[4];
  __builtin_memcpy(words, p, sizeof(words));
  return join(widen_halves(words[0], words[1]), widen_halves(words[2], words[3]));
}
CA_INLINE Floats16 widen_numbers(const __nv_bfloat16* p) {
  typedef Lanes<16> L;
  L::u16 raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return bit_cast<Floats16>(L::widen(raw) << 16);
}
CA_INLINE Floats16 widen_numbers(const float* p) {
  Floats16 numbers;
  __builtin_memcpy(&numbers, p, sizeof(numbers));
  return numbers;
}

// As ca::in_this_order of one number.
#if defined(__x86_64__)
#define CA_PIN(x) __asm__("" : "+v"(x))
#else
#define CA_PIN(x) __asm__("" : "+w"(x))
#endif
CA_INLINE Floats16 in_this_order(Floats16 x) {
#if defined(__AVX512F__)
  CA_PIN(x);
#else
#if defined(__AVX__)
  typedef Floats8 Register;
#else
  typedef float Register __attribute__((vector_size(16)));
#endif
  Register parts[sizeof(x) / sizeof(Register)];
  __builtin_memcpy(parts, &x, sizeof(x));
#pragma GCC unroll 4
  for (Register& part : parts) CA_PIN(part);
  __builtin_memcpy(&x, parts, sizeof(x));
#endif
  return x;
}
#undef CA_PIN
}  // namespace ca

struct Run {
  ca::Floats16 v;
};
// 16 running sums on the host, where they are one vector register; added up by total().
struct RunSum {
  ca::Floats16 v = {};
  CA_INLINE void add_product(const Run& a, const Run& b) { v = ca::in_this_order(v + a.v * b.v); }
  CA_INLINE float total() const {
    const ca::Floats8 half = ca::slice<ca::Floats8, 0>(v) + ca::slice<ca::Floats8, 8>(v);
    const ca::Floats4 quarter = ca::slice<ca::Floats4, 0>(half) + ca::slice<ca::Floats4, 4>(half);
    return ca::in_this_order(ca::in_this_order(quarter[0] + quarter[2]) + ca::in_this_order(quarter[1] + quarter[3]));
  }
};
CA_INLINE Run load_run(const float* p) { return {*reinterpret_cast<const ca::Floats16Unaligned*>(p)}; }
#else
struct Run {
  float v[RUN];
};
struct RunSum {
  float v = 0.0f;
  __device__ __forceinline__ void add_product(const Run& a, const Run& b) {
#pragma unroll
    for (int i = 0; i < RUN; ++i) v = fmaf(a.v[i], b.v[i], v);
  }
  __device__ __forceinline__ float total() const { return v; }
};
// 64 bytes of shared memory at a multiple of 16
__device__ __forceinline__ Run load_run(const float* p) {
  Run run;
#pragma unroll
  for (int i = 0; i < RUN; i += 4) {
    const Vec<float, 4> part = load_vec<float, 4>(p + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) run.v[i + j] = part.v[j];
  }
  return run;
}
#endif

#endif  // CUPYATTN_RUNS_CUH
