// SPDX-License-Identifier: Apache-2.0
// cuda_math.h - CUDA's maths and bit functions for the host. Included by cuda_cpu.h.
//
// exp, exp2, log, log2, tanh, min and max are written without branches or calls, so that g++ vectorises loops over
// them; the others are libm's. <cmath> must stay out: it is slow to compile and declares the same names.
// Where the order of operations matters they use fmaf or bits, which -fassociative-math leaves alone.
#ifndef CUPYATTN_CPU_CUDA_MATH_H
#define CUPYATTN_CPU_CUDA_MATH_H

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif
#ifndef NAN
#define NAN __builtin_nanf("")
#endif

CA_HOST_INLINE float __int_as_float(int x) { return ca::reinterpret_bits<float>(x); }
CA_HOST_INLINE float __uint_as_float(unsigned x) { return ca::reinterpret_bits<float>(x); }
CA_HOST_INLINE int __float_as_int(float x) { return ca::reinterpret_bits<int>(x); }
CA_HOST_INLINE unsigned __float_as_uint(float x) { return ca::reinterpret_bits<unsigned>(x); }
CA_HOST_INLINE long long __double_as_longlong(double x) { return ca::reinterpret_bits<long long>(x); }
CA_HOST_INLINE double __longlong_as_double(long long x) { return ca::reinterpret_bits<double>(x); }

namespace ca {

CA_HOST_INLINE float maximum(float a, float b) { return ((a > b) | (b != b)) ? a : b; }  // a NaN loses
CA_HOST_INLINE float minimum(float a, float b) { return ((a < b) | (b != b)) ? a : b; }

// 2^f to about 1e-7 relative where |f| <= 0.5, of a float or a vector of them.
template <typename V>
CA_HOST_INLINE V exp2_polynomial(V f) {
  V p = 1.5353362e-4f * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  return p * f + 1.0f;
}

// 2^(whole + f) to about 1e-7 relative, whole an integer and |f| <= 0.5, where the result is a normal number. The
// power of two goes into the exponent bits: a product of two factors could be reassociated, and then overflow.
CA_HOST_INLINE float exp2_parts(float whole, float f) {
  const float p = exp2_polynomial(f);
  return __uint_as_float(__float_as_uint(p) + (static_cast<unsigned>(static_cast<int>(whole)) << 23));
}

// Results below 2^-126 are 0, as with the GPU's -ftz=true.
CA_HOST_INLINE float exp2(float x) {
  const float c = x < -126.0f ? -126.0f : (x > 127.999f ? 127.999f : x);
  const float whole = __builtin_floorf(c + 0.5f);
  const float r = exp2_parts(whole, c - whole);
  return x != x ? x : x < -126.0f ? 0.0f : x >= 128.0f ? __builtin_inff() : r;
}

CA_HOST_INLINE float exp(float x) {
  const float c = x < -87.33f ? -87.33f : (x > 88.722f ? 88.722f : x);
  const float whole = __builtin_floorf(c * 1.4426950408889634f + 0.5f);
  // log2(e) in two parts: rounding c * log2(e) would cost as many digits as c has
  const float f = __builtin_fmaf(c, 1.92596303e-8f, __builtin_fmaf(c, 1.44269502f, -whole));
  const float r = exp2_parts(whole, f);
  return x != x ? x : x < -87.33f ? 0.0f : x > 88.722f ? __builtin_inff() : r;
}

// log2 of x = 2^e * m with m in [sqrt(1/2), sqrt(2)): e and log2(m) are added by the callers' scale.
CA_HOST_INLINE float log_scaled(float x, float per_octave, float per_neper) {
  const bool tiny = x < 1.17549435e-38f;
  const unsigned bits = __float_as_uint(tiny ? x * 8388608.0f : x);
  const int shifted = static_cast<int>(bits - 0x3f3504f3u);
  const int e = (shifted >> 23) - (tiny ? 23 : 0);
  const float m = __uint_as_float(bits - (static_cast<unsigned>(shifted >> 23) << 23)) - 1.0f;
  const float s = m / (2.0f + m), z = s * s;  // ln(1 + m) = 2 atanh(s)
  float p = __builtin_fmaf(0.24279079f, z, 0.28498787f);
  p = __builtin_fmaf(p, z, 0.40000972f);
  p = __builtin_fmaf(p, z, 0.66666663f);
  const float ln = __builtin_fmaf(s * z, p, 2.0f * s);
  const float y = __builtin_fmaf(static_cast<float>(e), per_octave, ln * per_neper);
  const float special = x == 0.0f ? -__builtin_inff() : x < 0.0f || x != x ? __builtin_nanf("") : x;
  return x > 0.0f && x < __builtin_inff() ? y : special;
}

CA_HOST_INLINE float tanh(float x) {
  const float a = __builtin_fabsf(x), t = exp(-2.0f * a), z = x * x;
  const float far = (1.0f - t) / (1.0f + t);
  float p = __builtin_fmaf(2.18694885e-2f, z, -5.39682540e-2f);  // odd Taylor series near zero
  p = __builtin_fmaf(p, z, 1.33333333e-1f);
  p = __builtin_fmaf(p, z, -3.33333333e-1f);
  const float near = __builtin_fmaf(x * z, p, x);
  return a < 0.3f ? near : __builtin_copysignf(far, x);
}

}  // namespace ca

// CUDA's names as macros: libm's own declarations, if a header brings them, stay as they are.
#define exp2f(x) ca::exp2(x)
#define expf(x) ca::exp(x)
#define __expf(x) ca::exp(x)
#define logf(x) ca::log_scaled(x, 0.693147181f, 1.0f)
#define __logf(x) ca::log_scaled(x, 0.693147181f, 1.0f)
#define log2f(x) ca::log_scaled(x, 1.0f, 1.44269504f)
#define __log2f(x) ca::log_scaled(x, 1.0f, 1.44269504f)
#define tanhf(x) ca::tanh(x)
#define fmaxf(a, b) ca::maximum(a, b)
#define fminf(a, b) ca::minimum(a, b)
#define fmaf(a, b, c) __builtin_fmaf(a, b, c)
#define fabsf(x) __builtin_fabsf(x)
#define sqrtf(x) __builtin_sqrtf(x)
#define rsqrtf(x) (1.0f / __builtin_sqrtf(x))
#define floorf(x) __builtin_floorf(x)
#define ceilf(x) __builtin_ceilf(x)
#define truncf(x) __builtin_truncf(x)
#define rintf(x) __builtin_rintf(x)
#define nearbyintf(x) __builtin_rintf(x)
#define roundf(x) __builtin_roundf(x)
#define copysignf(x, y) __builtin_copysignf(x, y)
#define sinf(x) __builtin_sinf(x)
#define cosf(x) __builtin_cosf(x)
#define sincosf(x, s, c) (*(s) = __builtin_sinf(x), *(c) = __builtin_cosf(x), (void)0)
#define __sinf(x) __builtin_sinf(x)
#define __cosf(x) __builtin_cosf(x)
#define powf(x, y) __builtin_powf(x, y)
#define __powf(x, y) __builtin_powf(x, y)
#define erff(x) __builtin_erff(x)
#define log1pf(x) __builtin_log1pf(x)
#define expm1f(x) __builtin_expm1f(x)
#define fmodf(x, y) __builtin_fmodf(x, y)
#define isnan(x) __builtin_isnan(x)
#define isinf(x) __builtin_isinf(x)
#define isfinite(x) __builtin_isfinite(x)

CA_HOST_INLINE float __fdividef(float a, float b) { return a / b; }
CA_HOST_INLINE float __frcp_rn(float x) { return 1.0f / x; }
CA_HOST_INLINE float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
CA_HOST_INLINE float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

namespace ca {
// Pins a value where -fassociative-math would reorder the sums of one kernel differently from those of another:
// a register the compiler may not look into. No instruction.
CA_HOST_INLINE float in_this_order(float x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#else
  __asm__("" : "+w"(x));
#endif
  return x;
}
}  // namespace ca
// Neither fused with other operations nor taken in another order.
CA_HOST_INLINE float __fadd_rn(float a, float b) {
  return ca::in_this_order(ca::in_this_order(a) + ca::in_this_order(b));
}
CA_HOST_INLINE float __fmul_rn(float a, float b) {
  return ca::in_this_order(ca::in_this_order(a) * ca::in_this_order(b));
}

CA_HOST_INLINE float __saturatef(float x) { return x > 1.0f ? 1.0f : x > 0.0f ? x : 0.0f; }

#define CA_MIN_MAX(T)                                            \
  CA_HOST_INLINE T min(T a, T b) { return b < a ? b : a; }       \
  CA_HOST_INLINE T max(T a, T b) { return a < b ? b : a; }
CA_MIN_MAX(int)
CA_MIN_MAX(unsigned)
CA_MIN_MAX(long)
CA_MIN_MAX(unsigned long)
CA_MIN_MAX(long long)
CA_MIN_MAX(unsigned long long)
#undef CA_MIN_MAX
CA_HOST_INLINE float min(float a, float b) { return ca::minimum(a, b); }
CA_HOST_INLINE float max(float a, float b) { return ca::maximum(a, b); }
extern "C" int abs(int) noexcept;  // as glibc's <stdlib.h> declares it; compilers inline it

// ---- conversions: the GPU saturates and turns NaN into 0, x86 would give INT_MIN ----------------------------

namespace ca {
CA_HOST_INLINE int to_int(float x) {
  return x != x ? 0 : x >= 2147483648.0f ? 2147483647 : x <= -2147483648.0f ? -2147483647 - 1 : static_cast<int>(x);
}
CA_HOST_INLINE unsigned to_uint(float x) {
  return x != x || x <= 0.0f ? 0 : x >= 4294967296.0f ? 4294967295u : static_cast<unsigned>(x);
}
}  // namespace ca
CA_HOST_INLINE unsigned __float2uint_rz(float x) { return ca::to_uint(x); }
CA_HOST_INLINE unsigned __float2uint_rn(float x) { return ca::to_uint(__builtin_rintf(x)); }
CA_HOST_INLINE int __float2int_rz(float x) { return ca::to_int(x); }
CA_HOST_INLINE int __float2int_rn(float x) { return ca::to_int(__builtin_rintf(x)); }
CA_HOST_INLINE int __float2int_rd(float x) { return ca::to_int(__builtin_floorf(x)); }
CA_HOST_INLINE int __float2int_ru(float x) { return ca::to_int(__builtin_ceilf(x)); }
CA_HOST_INLINE float __int2float_rn(int x) { return static_cast<float>(x); }
CA_HOST_INLINE float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

// ---- bits ------------------------------------------------------------------------------------------------

CA_HOST_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
CA_HOST_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
CA_HOST_INLINE int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
CA_HOST_INLINE int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
CA_HOST_INLINE int __ffs(int x) { return __builtin_ffs(x); }
CA_HOST_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }
CA_HOST_INLINE unsigned __brev(unsigned x) {
  x = __builtin_bswap32(x);
  x = (x & 0x0f0f0f0fu) << 4 | (x >> 4 & 0x0f0f0f0fu);
  x = (x & 0x33333333u) << 2 | (x >> 2 & 0x33333333u);
  return (x & 0x55555555u) << 1 | (x >> 1 & 0x55555555u);
}
// Byte i of the result is byte s_i of y:x, or its sign spread over the byte if bit 3 of s_i is set.
CA_HOST_INLINE unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i) & 15;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    out |= byte << (8 * i);
  }
  return out;
}
CA_HOST_INLINE unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
CA_HOST_INLINE unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
CA_HOST_INLINE unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
CA_HOST_INLINE unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}
CA_HOST_INLINE int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<signed char>(a >> (8 * i)) * static_cast<signed char>(b >> (8 * i));
  return c;
}
CA_HOST_INLINE unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 0xff) * (b >> (8 * i) & 0xff);
  return c;
}
CA_HOST_INLINE int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
CA_HOST_INLINE unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

#endif  // CUPYATTN_CPU_CUDA_MATH_H
