// SPDX-License-Identifier: Apache-2.0
// kv_format.cuh - reading rows of keys and values in every cache format. cupyattn/reference/kv_codec.py says what
// each format means; cupyattn/kv/quantized.py names the tags.
//
// A tag is a struct with
//   Code, Scale              element types of the codes of a row and of its scales
//   HAS_SCALE, HAS_ZERO      x = number * scale (+ zero), where eight() gives the number
//   GROUP                    dims with one scale; 0: one scale for the whole row
//   CHANNEL                  the scale belongs to a dim, not to a token: see channel_scales()
//   ROTATED                  every 32 dims are multiplied by hadamard32's matrix, its own inverse
//   row_codes(head_dim)      elements of Code in a row; a row is contiguous, so those bytes are all there is to stage
//   ROW_ALIGN                bytes a row's address must be a multiple of for eight()
//   BITS, HIGH_BITS          dims d to d + 7 lie in BITS bytes from byte d * BITS / 8 of the row, and with HIGH_BITS
//                            (2) also in 4 bytes from head_dim * BITS / 8 + d / 16 * 4
//   eight(row, head_dim, d)  numbers d to d + 7 exactly, d a multiple of 8; eight<false> takes any address
#ifndef CUPYATTN_KV_FORMAT_CUH
#define CUPYATTN_KV_FORMAT_CUH

#include "eight_floats.cuh"
#include "page_table.cuh"
#include "params.h"
#include "prelude.cuh"

// ---- eight codes of one byte each, or spread out of a word, as floats ------------------------------------------

struct TwoWords {
  uint32_t x, y;
};

template <bool ALIGNED>
__device__ __forceinline__ uint32_t load_word(const uint8_t* p) {
  if constexpr (ALIGNED) {
    return load_vec<uint32_t, 1>(reinterpret_cast<const uint32_t*>(p)).v[0];
  } else {
    return p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24;
  }
}
template <bool ALIGNED>
__device__ __forceinline__ TwoWords load_two_words(const uint8_t* p) {
  if constexpr (ALIGNED) {
    const Vec<uint32_t, 2> both = load_vec<uint32_t, 2>(reinterpret_cast<const uint32_t*>(p));
    return {both.v[0], both.v[1]};
  } else {
    return {load_word<false>(p), load_word<false>(p + 4)};
  }
}

#if CA_CPU && CA_FUSED
namespace ca {
typedef int32_t Codes8 __attribute__((vector_size(32)));

// Eight bytes as int32. GCC makes 8 scalar conversions of a vector conversion over two widths.
template <bool SIGNED>
CA_INLINE Codes8 widen_codes(TwoWords bytes) {
#if defined(__AVX2__) && !defined(__clang__)
  typedef char Chars16 __attribute__((vector_size(16)));
  typedef long long Longs2 __attribute__((vector_size(16)));
  const Chars16 raw = bit_cast<Chars16>(Longs2{bit_cast<long long>(bytes), 0});
  return SIGNED ? bit_cast<Codes8>(__builtin_ia32_pmovsxbd256(raw)) : bit_cast<Codes8>(__builtin_ia32_pmovzxbd256(raw));
#else
  typedef uint8_t Bytes8 __attribute__((vector_size(8)));
  typedef uint16_t Shorts8 __attribute__((vector_size(16)));
  typedef int8_t SignedBytes8 __attribute__((vector_size(8)));
  typedef int16_t SignedShorts8 __attribute__((vector_size(16)));
  if (SIGNED) {
    const SignedShorts8 wide = __builtin_convertvector(bit_cast<SignedBytes8>(bytes), SignedShorts8);
    return __builtin_convertvector(wide, Codes8);
  }
  return __builtin_convertvector(__builtin_convertvector(bit_cast<Bytes8>(bytes), Shorts8), Codes8);
#endif
}
CA_INLINE EightFloats::Numbers to_numbers(const Codes8& codes) {
  return __builtin_convertvector(codes, EightFloats::Numbers);
}
// Nibbles of a word in the order of the elements they hold.
CA_INLINE Codes8 spread_nibbles(uint32_t word) {
  typedef uint32_t Words8 __attribute__((vector_size(32)));
  return bit_cast<Codes8>((word - Words8{} >> Words8{0, 16, 4, 20, 8, 24, 12, 28}) & 15);
}
// Likewise the pairs of bits of one half of a word of high bits, as bits 4 and 5.
CA_INLINE Codes8 spread_pairs(uint32_t half) {
  typedef uint32_t Words8 __attribute__((vector_size(32)));
  return bit_cast<Codes8>((half - Words8{} >> Words8{0, 16, 2, 18, 4, 20, 6, 22}) << 4 & 48);
}
}  // namespace ca
#endif

// Byte i of a word in the mantissa of a float: one permutation of bytes and one addition.
template <int ZERO>
struct Integers {  // byte - ZERO: 2^23 + byte
  static __device__ __forceinline__ float number(uint32_t four, int i) {
    return __uint_as_float(__byte_perm(four, 0x4b00u, 0x5440u | i)) - (8388608.0f + ZERO);
  }
#if CA_CPU && CA_FUSED
  static CA_INLINE EightFloats::Numbers numbers(const ca::Codes8& codes) { return ca::to_numbers(codes - ZERO); }
#endif
};
template <int LOG_M>
struct MidPoints {  // (byte - (m - 1/2)) / m, m = 2^LOG_M: 2^E + (byte + 1/2) / m has the byte in bits 8 to 15
  static constexpr int E = 15 - LOG_M;
  static_assert(E % 2 == 0, "bit 23 of the float must be set");
  static __device__ __forceinline__ float number(uint32_t four, int i) {
    constexpr uint32_t AROUND = (127u + E) / 2 << 8 | 0x80u;
    return __uint_as_float(__byte_perm(four, AROUND, 0x5404u | i << 4)) - ((1 << E) + 1.0f);
  }
#if CA_CPU && CA_FUSED
  static CA_INLINE EightFloats::Numbers numbers(const ca::Codes8& codes) {
    return ca::to_numbers(codes + codes + (1 - (2 << LOG_M))) * (0.5f / (1 << LOG_M));
  }
#endif
};

// ---- rows of codes ---------------------------------------------------------------------------------------------

// What most formats share. No `Number` here: fp8 has its own.
template <typename S, int BITS_, bool ZERO, int GROUP_, bool ROTATED_, bool CHANNEL_>
struct KvCodes {
  using Code = uint8_t;
  using Scale = S;
  static constexpr bool HAS_SCALE = true, HAS_ZERO = ZERO, ROTATED = ROTATED_, CHANNEL = CHANNEL_;
  static constexpr int GROUP = GROUP_, BITS = BITS_, HIGH_BITS = 0, ROW_ALIGN = BITS_;
  static __host__ __device__ constexpr int row_codes(int head_dim) { return head_dim * BITS_ / 8; }
};

// One byte each.
template <typename Number, bool SIGNED, typename S, bool ZERO, int GROUP, bool ROTATED, bool CHANNEL = false>
struct KvBytes : KvCodes<S, 8, ZERO, GROUP, ROTATED, CHANNEL> {
  template <bool ALIGNED = true>
  static __device__ __forceinline__ EightFloats eight(const uint8_t* row, int, int d) {
    const TwoWords bytes = load_two_words<ALIGNED>(row + d);
    EightFloats out;
#if CA_CPU && CA_FUSED
    // a signed byte is ZERO more as the unsigned one that Number takes
    out.x = SIGNED ? ca::to_numbers(ca::widen_codes<true>(bytes)) : Number::numbers(ca::widen_codes<false>(bytes));
#else
    constexpr uint32_t FLIP = SIGNED ? 0x80808080u : 0u;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out.x[j] = Number::number(bytes.x ^ FLIP, j);
      out.x[4 + j] = Number::number(bytes.y ^ FLIP, j);
    }
#endif
    return out;
  }
};

// Half a byte each: in a word of 8 elements the nibbles low to high hold 0, 2, 4, 6, 1, 3, 5, 7.
// The even nibbles are then the elements 0, 4, 1, 5 and the odd ones 2, 6, 3, 7, in bytes of their own.
template <typename Number>
__device__ __forceinline__ EightFloats numbers_of(TwoWords even_odd) {
  EightFloats out;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    out.x[j] = Number::number(j & 2 ? even_odd.y : even_odd.x, (j & 1) * 2 + (j >> 2));
  return out;
}

template <typename Number, typename S, bool ZERO, int GROUP, bool ROTATED>
struct KvNibbles : KvCodes<S, 4, ZERO, GROUP, ROTATED, false> {
  template <bool ALIGNED = true>
  static __device__ __forceinline__ EightFloats eight(const uint8_t* row, int, int d) {
    const uint32_t word = load_word<ALIGNED>(row + d / 2);
#if CA_CPU && CA_FUSED
    EightFloats out;
    out.x = Number::numbers(ca::spread_nibbles(word));
    return out;
#else
    return numbers_of<Number>({word & 0x0f0f0f0fu, word >> 4 & 0x0f0f0f0fu});
#endif
  }
};

// fp8: half holds every number exactly.
template <bool IS_E4M3>
__device__ __forceinline__ float2 two_fp8(uint32_t pair) {  // the two low bytes
  const uint32_t upper = __byte_perm(pair, 0, 0x1404u);     // each as the upper byte of a half
  if constexpr (!IS_E4M3) {
    return __half22float2(reinterpret_cast<const __half2&>(upper));
  } else {
    uint32_t halves;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<unsigned short>(pair)));
    return __half22float2(reinterpret_cast<const __half2&>(halves));
#else
    // one exponent bit less than half has: the exponent is short by 8. The only NaN becomes 480.
    halves = (upper & 0x80008000u) | (upper & 0x7f007f00u) >> 1;
    float2 x = __half22float2(reinterpret_cast<const __half2&>(halves));
    x.x *= 256.0f, x.y *= 256.0f;
    const float nan = __uint_as_float(0x7fc00000u);
    return {fabsf(x.x) > 448.0f ? nan : x.x, fabsf(x.y) > 448.0f ? nan : x.y};
#endif
  }
}

template <bool IS_E4M3>
struct KvFp8 : KvCodes<float, 8, false, 0, false, false> {
  template <bool ALIGNED = true>
  static __device__ __forceinline__ EightFloats eight(const uint8_t* row, int, int d) {
    const TwoWords bytes = load_two_words<ALIGNED>(row + d);
    EightFloats out;
#if CA_CPU && CA_FUSED
    typedef ca::Lanes<8> Lanes;
    const Lanes::u32 codes = ca::bit_cast<Lanes::u32>(ca::widen_codes<false>(bytes));
    const Lanes::u16 halves = Lanes::narrow(IS_E4M3 ? (codes & 0x80u) << 8 | (codes & 0x7fu) << 7 : codes << 8);
    float numbers[8];
    ca::widen_half<8>(&halves, numbers);  // faster than arithmetic, subnormals included
    __builtin_memcpy(&out.x, numbers, sizeof(out.x));
    if (IS_E4M3) {
      const Lanes::u32 nan = ca::mask_of<Lanes::u32>((codes & 0x7fu) == 0x7fu) & 0x7fc00000u;
      out.x = ca::bit_cast<EightFloats::Numbers>(ca::bit_cast<Lanes::u32>(out.x * 256.0f) | nan);
    }
#else
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float2 two = two_fp8<IS_E4M3>((j < 4 ? bytes.x : bytes.y) >> (j & 2) * 8);
      out.x[j] = two.x;
      out.x[j + 1] = two.y;
    }
#endif
    return out;
  }
};

// ---- the tags --------------------------------------------------------------------------------------------------

template <typename T>
struct KvPlain {
  using Code = T;
  using Scale = float;
  static constexpr bool HAS_SCALE = false, HAS_ZERO = false, ROTATED = false, CHANNEL = false;
  static constexpr int GROUP = 0, BITS = 8 * sizeof(T), HIGH_BITS = 0, ROW_ALIGN = 16;
  static __host__ __device__ constexpr int row_codes(int head_dim) { return head_dim; }
  // As they are, 16 bytes at a time: a whole Vec<float, 8> in memory would have to be 32-byte aligned.
  template <bool ALIGNED = true>
  static __device__ __forceinline__ Vec<T, 8> load(const T* p) {
    constexpr int WIDTH = ALIGNED ? 16 / static_cast<int>(sizeof(T)) : 1;
    Vec<T, 8> out;
#pragma unroll
    for (int i = 0; i < 8; i += WIDTH) store_vec(out.v + i, load_vec<T, WIDTH>(p + i));
    return out;
  }
  template <bool ALIGNED = true>
  static __device__ __forceinline__ void store(T* p, const Vec<T, 8>& x) {
#if CA_CPU && !CA_CHECK
    __builtin_memcpy(p, &x, sizeof(x));  // g++ takes neighbouring stores of structs apart, element by element
#else
    constexpr int WIDTH = ALIGNED ? 16 / static_cast<int>(sizeof(T)) : 1;
#pragma unroll
    for (int i = 0; i < 8; i += WIDTH) store_global(p + i, load_vec<T, WIDTH>(x.v + i));
#endif
  }
  template <bool ALIGNED = true>
  static __device__ __forceinline__ EightFloats eight(const T* row, int, int d) {
    return EightFloats::from(load<ALIGNED>(row + d));
  }
};

template <typename S>
using KvInt8 = KvBytes<Integers<0>, false, S, true, 0, false>;
template <typename S>
using KvInt4 = KvNibbles<Integers<0>, S, true, 0, false>;
using KvInt8Sym = KvBytes<Integers<128>, true, float, false, 0, false>;
using KvInt8Channel = KvBytes<Integers<128>, true, float, false, 1, false, true>;
using KvE4M3 = KvFp8<true>;
using KvE5M2 = KvFp8<false>;
using KvHadamard8 = KvBytes<MidPoints<7>, false, __half, false, 32, true>;
using KvHadamard4 = KvNibbles<MidPoints<3>, __half, false, 32, true>;

// The low nibbles of all dims, then the two high bits: in a word of 16 elements the pairs of bits low to high hold
// 0, 2, .., 14, 1, 3, .., 15.
struct KvHadamard6 : KvCodes<__half, 4, false, 32, true, false> {
  static constexpr int HIGH_BITS = 2;
  static __host__ __device__ constexpr int row_codes(int head_dim) { return head_dim / 4 * 3; }
  template <bool ALIGNED = true>
  static __device__ __forceinline__ EightFloats eight(const uint8_t* row, int head_dim, int d) {
    const uint32_t word = load_word<ALIGNED>(row + d / 2);
    const uint32_t half = load_word<ALIGNED>(row + head_dim / 2 + d / 16 * 4) >> (d & 8);
#if CA_CPU && CA_FUSED
    EightFloats out;
    out.x = MidPoints<5>::numbers(ca::spread_nibbles(word) | ca::spread_pairs(half));
    return out;
#else
    const uint32_t even = (half & 0x00030003u) << 4 | (half & 0x00300030u) << 8;  // beside nibbles 0, 4, 1, 5
    const uint32_t odd = (half & 0x000c000cu) << 2 | (half & 0x00c000c0u) << 6;   // beside nibbles 2, 6, 3, 7
    return numbers_of<MidPoints<5>>({(word & 0x0f0f0f0fu) | even, (word >> 4 & 0x0f0f0f0fu) | odd});
#endif
  }
};

// ---- scales ----------------------------------------------------------------------------------------------------

struct RowScale {
  float scale, zero;
};

// Scale and zero of the row of a token that is in a page; group is d / 32 where GROUP is 32, else 0. Formats with a
// scale per dim, or none, give 1 and 0.
template <typename F>
__device__ __forceinline__ RowScale load_row_scale(const KvScale& view, const PageTable& table, TokenSlot at,
                                                   int64_t head, int group = 0) {
  using S = typename F::Scale;
  RowScale out = {1.0f, 0.0f};
  if constexpr (F::HAS_SCALE && !F::CHANNEL) {
    out.scale = to_float(*kv_scale<const S>(view, table, at, head, group));
    if constexpr (F::HAS_ZERO) out.zero = to_float(*kv_zero<const S>(view, table, at, head, group));
  }
  return out;
}

// Scales of dims d to d + 7 of a head, in a format with one per dim.
__device__ __forceinline__ EightFloats channel_scales(const KvScale& view, int64_t head, int d) {
  const float* scale = static_cast<const float*>(view.scale) + head * view.stride_head + d * view.stride_group;
  EightFloats out;
#pragma unroll
  for (int j = 0; j < 8; ++j) out.x[j] = scale[j * view.stride_group];
  return out;
}

// Dims d to d + 7 of a row as they were before quantising, but for the rotation. `zero` is used where F has one.
template <typename F>
__device__ __forceinline__ void apply_scale(EightFloats& x, RowScale s) {
  if constexpr (F::HAS_ZERO) {
    EightFloats out = EightFloats::all(s.zero);
    out.add_product(s.scale, x);
    x = out;
  } else if constexpr (F::HAS_SCALE && !F::CHANNEL) {
    x *= s.scale;
  }
}

#endif  // CUPYATTN_KV_FORMAT_CUH
