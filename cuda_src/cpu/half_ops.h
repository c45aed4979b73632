// SPDX-License-Identifier: Apache-2.0
// half_ops.h - CUDA's arithmetic on __half/__half2 and __nv_bfloat16/__nv_bfloat162, written once for both.
//
// Each operation is done in float32 and rounded once; float32 has more than twice the digits of either type,
// so the second rounding of + - * / changes nothing. A type takes part by specialising ca::Narrow.
#ifndef CUPYATTN_CPU_HALF_OPS_H
#define CUPYATTN_CPU_HALF_OPS_H

#include "convert.h"

namespace ca {

// widen(H) -> float, narrow(float) -> H, and the pair type; only our types have one, which SFINAE relies on.
template <typename H>
struct Narrow;

// The scalar type of a pair type.
template <typename H2>
struct PairOf;

template <typename H>
using Pair = typename Narrow<H>::pair;
template <typename H>
using PairElement = typename PairOf<H>::element;

// a * b + c rounded once. The product is exact in double; the sum is too, or it loses c whole, and then one
// double ulp towards c is enough for the final rounding to see on which side of a tie it lies.
template <typename H>
CA_INLINE H fma_once(H a, H b, H c) {
  const double product = static_cast<double>(Narrow<H>::widen(a)) * Narrow<H>::widen(b);
  const double addend = Narrow<H>::widen(c);
  double sum = product + addend;
  const uint64_t sum_bits = bit_cast<uint64_t>(sum);
  // Infinity and NaN are left alone: only a finite product can swallow an addend.
  const bool finite = (sum_bits & 0x7fffffffffffffffu) < 0x7ff0000000000000u;
  if (finite && addend != 0 && sum_bits == bit_cast<uint64_t>(product))
    sum = bit_cast<double>(sum_bits + ((addend < 0) == (product < 0) ? 1 : -1));
  // double -> float must not round to nearest: keep the dropped bits as a sticky last bit (round to odd).
  const float truncated = static_cast<float>(sum);
  uint32_t bits = bit_cast<uint32_t>(truncated);
  const double back = truncated;
  if (back != sum && (bits & 0x7fffffffu) < 0x7f800000u) {
    if ((back > sum) == (sum > 0)) bits -= 1;
    bits |= 1;
  }
  return Narrow<H>::narrow(bit_cast<float>(bits));
}

}  // namespace ca

#define CA_NARROW_BINARY(name, expression)                                      \
  template <typename H, typename = ca::Pair<H>>                                 \
  CA_INLINE H name(H a, H b) {                                                  \
    const float x = ca::Narrow<H>::widen(a), y = ca::Narrow<H>::widen(b);       \
    return ca::Narrow<H>::narrow(expression);                                   \
  }                                                                             \
  template <typename H2, typename H = ca::PairElement<H2>>                      \
  CA_INLINE H2 name##2(H2 a, H2 b) {                                            \
    return H2{name(a.x, b.x), name(a.y, b.y)};                                  \
  }
CA_NARROW_BINARY(__hadd, x + y)
CA_NARROW_BINARY(__hsub, x - y)
CA_NARROW_BINARY(__hmul, x * y)
CA_NARROW_BINARY(__hmax, x != x ? y : y != y ? x : x > y ? x : y)
CA_NARROW_BINARY(__hmin, x != x ? y : y != y ? x : x < y ? x : y)
#undef CA_NARROW_BINARY

template <typename H, typename = ca::Pair<H>>
CA_INLINE H __hdiv(H a, H b) {
  return ca::Narrow<H>::narrow(ca::Narrow<H>::widen(a) / ca::Narrow<H>::widen(b));
}
template <typename H2, typename H = ca::PairElement<H2>>
CA_INLINE H2 __h2div(H2 a, H2 b) { return H2{__hdiv(a.x, b.x), __hdiv(a.y, b.y)}; }

template <typename H, typename = ca::Pair<H>>
CA_INLINE H __hfma(H a, H b, H c) { return ca::fma_once(a, b, c); }
template <typename H2, typename H = ca::PairElement<H2>>
CA_INLINE H2 __hfma2(H2 a, H2 b, H2 c) { return H2{__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

template <typename H, typename = ca::Pair<H>>
CA_INLINE H __hneg(H a) { a.bits ^= 0x8000; return a; }
template <typename H, typename = ca::Pair<H>>
CA_INLINE H __habs(H a) { a.bits &= 0x7fff; return a; }
template <typename H2, typename H = ca::PairElement<H2>>
CA_INLINE H2 __hneg2(H2 a) { return H2{__hneg(a.x), __hneg(a.y)}; }
template <typename H2, typename H = ca::PairElement<H2>>
CA_INLINE H2 __habs2(H2 a) { return H2{__habs(a.x), __habs(a.y)}; }

#define CA_NARROW_COMPARE(name, op)                                             \
  template <typename H, typename = ca::Pair<H>>                                 \
  CA_INLINE bool name(H a, H b) { return ca::Narrow<H>::widen(a) op ca::Narrow<H>::widen(b); }
CA_NARROW_COMPARE(__heq, ==)
CA_NARROW_COMPARE(__hne, !=)
CA_NARROW_COMPARE(__hlt, <)
CA_NARROW_COMPARE(__hle, <=)
CA_NARROW_COMPARE(__hgt, >)
CA_NARROW_COMPARE(__hge, >=)
#undef CA_NARROW_COMPARE
template <typename H, typename = ca::Pair<H>>
CA_INLINE bool __hisnan(H a) { return __builtin_isnan(ca::Narrow<H>::widen(a)); }

template <typename H2, typename H = ca::PairElement<H2>>
CA_INLINE float __low2float(H2 a) { return ca::Narrow<H>::widen(a.x); }
template <typename H2, typename H = ca::PairElement<H2>>
CA_INLINE float __high2float(H2 a) { return ca::Narrow<H>::widen(a.y); }

#endif  // CUPYATTN_CPU_HALF_OPS_H
