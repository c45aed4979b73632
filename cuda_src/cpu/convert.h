// SPDX-License-Identifier: Apache-2.0
// convert.h - float <-> 16-bit and 8-bit floats on the host, one lane or N lanes at a time.
//
// Every conversion is written once over "lanes": an unsigned integer, or a vector of them (GCC/Clang vector
// extensions), so the scalar functions of <cuda_fp16.h> and the array forms share their rounding. Half goes
// through F16C where the host has it, by builtins: <immintrin.h> would double a small kernel's compile time.
#ifndef CUPYATTN_CPU_CONVERT_H
#define CUPYATTN_CPU_CONVERT_H

#include <stdint.h>

#define CA_INLINE inline __attribute__((always_inline))

// Vectors are passed by value, but only between functions that are always inlined: no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace ca {

template <typename To, typename From>
CA_INLINE To bit_cast(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To out;
  __builtin_memcpy(&out, &x, sizeof(out));
  return out;
}

// N lanes of each width; one lane is the plain scalar.
template <int N>
struct Lanes {
  typedef float f32 __attribute__((vector_size(4 * N)));
  typedef uint32_t u32 __attribute__((vector_size(4 * N)));
  typedef uint16_t u16 __attribute__((vector_size(2 * N)));
  template <typename V>
  static CA_INLINE u32 widen(const V& x) { return __builtin_convertvector(x, u32); }
  template <typename V>
  static CA_INLINE u16 narrow(const V& x) { return __builtin_convertvector(x, u16); }
};
template <>
struct Lanes<1> {
  typedef float f32;
  typedef uint32_t u32;
  typedef uint16_t u16;
  static CA_INLINE u32 widen(u16 x) { return x; }
  static CA_INLINE u16 narrow(u32 x) { return static_cast<u16>(x); }
};

// All ones where the comparison holds: vectors compare to 0/-1 lanes already, a scalar to bool.
template <typename U, typename M>
CA_INLINE U mask_of(const M& cmp) { return bit_cast<U>(cmp); }
template <>
CA_INLINE uint32_t mask_of<uint32_t, bool>(const bool& cmp) { return 0u - static_cast<uint32_t>(cmp); }

template <typename U>
CA_INLINE U select(const U& mask, const U& a, const U& b) { return (mask & a) | (~mask & b); }

// A float format narrower than float32. MAX is the largest finite code; with HAS_INF the code after it is
// infinity, otherwise the code after it is the only NaN (e4m3).
template <int EXP_BITS, int MANTISSA_BITS, bool HAS_INF>
struct SmallFloat {
  static constexpr int M = MANTISSA_BITS;
  static constexpr int BIAS = (1 << (EXP_BITS - 1)) - 1;
  static constexpr uint32_t SIGN = 1u << (EXP_BITS + M);
  static constexpr uint32_t INF = HAS_INF ? ((1u << EXP_BITS) - 1) << M : SIGN - 1;  // e4m3: its NaN
  static constexpr uint32_t MAX = INF - 1;
  static constexpr uint32_t QUIET_NAN = HAS_INF ? INF | 1u << (M - 1) : INF;

  // Code in the low bits of each lane -> float32 bits. The payload of a NaN is kept.
  template <typename L>
  static CA_INLINE typename L::u32 widen(const typename L::u32& code) {
    typedef typename L::u32 U;
    typedef typename L::f32 F;
    const U magnitude = code & (SIGN - 1);
    // Read as a float with the wrong bias, then scaled: exact, and turns subnormals into normals.
    const F scale = bit_cast<float>(static_cast<uint32_t>(127 + 127 - BIAS) << 23) + F{};
    U bits = bit_cast<U>(static_cast<F>(bit_cast<F>(static_cast<U>(magnitude << (23 - M))) * scale));
    bits |= mask_of<U>(magnitude >= INF) & 0x7f800000u;
    return bits | ((code & SIGN) << (31 - EXP_BITS - M));
  }

  // float32 bits -> code, round to nearest even. Past MAX: INF, or MAX itself if `saturate` (infinity too).
  template <typename L>
  static CA_INLINE typename L::u32 narrow(const typename L::u32& bits, bool saturate = false) {
    typedef typename L::u32 U;
    typedef typename L::f32 F;
    const U a = bits & 0x7fffffffu;
    // Subnormal result: adding the power of two whose ulp is the format's smallest step rounds in the FPU.
    const float magic = bit_cast<float>(static_cast<uint32_t>(127 + 1 - BIAS - M + 23) << 23);
    const U tiny = bit_cast<U>(static_cast<F>(bit_cast<F>(a) + magic)) - bit_cast<uint32_t>(magic);
    const U odd = (a >> (23 - M)) & 1u;
    U normal = (a + odd + ((1u << (22 - M)) - 1) - (static_cast<uint32_t>(127 - BIAS) << 23)) >> (23 - M);
    normal = select<U>(mask_of<U>(normal > MAX), U{} + (saturate ? MAX : INF), normal);
    U code = select<U>(mask_of<U>(a < (static_cast<uint32_t>(127 + 1 - BIAS) << 23)), tiny, normal);
    code = select<U>(mask_of<U>(a > 0x7f800000u), U{} + QUIET_NAN, code);
    return code | ((bits >> (31 - EXP_BITS - M)) & SIGN);
  }
};

using Half = SmallFloat<5, 10, true>;
using E4m3 = SmallFloat<4, 3, false>;
using E5m2 = SmallFloat<5, 2, true>;

// bfloat16 is the upper half of a float32; a NaN becomes the hardware's canonical 0x7fff.
struct Bfloat16 {
  template <typename L>
  static CA_INLINE typename L::u32 widen(const typename L::u32& code) { return code << 16; }

  template <typename L>
  static CA_INLINE typename L::u32 narrow(const typename L::u32& bits) {
    typedef typename L::u32 U;
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return select<U>(mask_of<U>((bits & 0x7fffffffu) > 0x7f800000u), U{} + 0x7fffu, rounded);
  }
};

// N codes <-> N floats through format S; codes and floats are addressed as raw memory.
template <typename S, int N>
CA_INLINE void widen_lanes(const void* codes, float* out) {
  typedef Lanes<N> L;
  typename L::u16 raw;
  __builtin_memcpy(&raw, codes, sizeof(raw));
  const typename L::u32 bits = S::template widen<L>(L::widen(raw));
  __builtin_memcpy(out, &bits, sizeof(bits));
}

template <typename S, int N>
CA_INLINE void narrow_lanes(const float* x, void* codes) {
  typedef Lanes<N> L;
  typename L::u32 bits;
  __builtin_memcpy(&bits, x, sizeof(bits));
  const typename L::u16 raw = L::narrow(S::template narrow<L>(bits));
  __builtin_memcpy(codes, &raw, sizeof(raw));
}

#if defined(__F16C__) && defined(__clang__)
template <int N>
CA_INLINE void widen_half(const void* codes, float* out) {
  _Float16 raw[N];
  __builtin_memcpy(raw, codes, sizeof(raw));
  for (int i = 0; i < N; ++i) out[i] = static_cast<float>(raw[i]);
}
template <int N>
CA_INLINE void narrow_half(const float* x, void* codes) {
  _Float16 raw[N];
  for (int i = 0; i < N; ++i) raw[i] = static_cast<_Float16>(x[i]);
  __builtin_memcpy(codes, raw, sizeof(raw));
}
#elif defined(__F16C__)
typedef short v8i16 __attribute__((vector_size(16)));
typedef float v4f32 __attribute__((vector_size(16)));
typedef float v8f32 __attribute__((vector_size(32)));

// Fewer than eight lanes use the four-lane instruction on a zero-padded register.
template <int N>
CA_INLINE void widen_half(const void* codes, float* out) {
  v8i16 raw = {};
  __builtin_memcpy(&raw, codes, 2 * N);
  if constexpr (N == 8) {
    const v8f32 wide = __builtin_ia32_vcvtph2ps256(raw);
    __builtin_memcpy(out, &wide, 4 * N);
  } else {
    const v4f32 wide = __builtin_ia32_vcvtph2ps(raw);
    __builtin_memcpy(out, &wide, 4 * N);
  }
}

template <int N>
CA_INLINE void narrow_half(const float* x, void* codes) {
  if constexpr (N == 8) {
    v8f32 wide;
    __builtin_memcpy(&wide, x, 4 * N);
    const v8i16 raw = __builtin_ia32_vcvtps2ph256(wide, 0);  // 0: to nearest even
    __builtin_memcpy(codes, &raw, 2 * N);
  } else {
    v4f32 wide = {};
    __builtin_memcpy(&wide, x, 4 * N);
    const v8i16 raw = __builtin_ia32_vcvtps2ph(wide, 0);
    __builtin_memcpy(codes, &raw, 2 * N);
  }
}
#else
template <int N>
CA_INLINE void widen_half(const void* codes, float* out) { widen_lanes<Half, N>(codes, out); }
template <int N>
CA_INLINE void narrow_half(const float* x, void* codes) { narrow_lanes<Half, N>(x, codes); }
#endif

// Calls f(offset, count) over 0..N in groups of 8, 4, 2, 1 lanes; the counts are compile-time constants.
template <int I>
struct Constant {
  static constexpr int value = I;
};
template <int N, int OFFSET = 0, typename F>
CA_INLINE void for_lane_groups(const F& f) {
  constexpr int LEFT = N - OFFSET;
  if constexpr (LEFT > 0) {
    constexpr int COUNT = LEFT >= 8 ? 8 : LEFT >= 4 ? 4 : LEFT >= 2 ? 2 : 1;
    f(Constant<OFFSET>{}, Constant<COUNT>{});
    for_lane_groups<N, OFFSET + COUNT>(f);
  }
}

template <int N>
CA_INLINE void to_float(const float (&v)[N], float (&out)[N]) { __builtin_memcpy(out, v, sizeof(out)); }
template <int N>
CA_INLINE void from_float(const float (&x)[N], float (&out)[N]) { __builtin_memcpy(out, x, sizeof(out)); }

}  // namespace ca

#endif  // CUPYATTN_CPU_CONVERT_H
