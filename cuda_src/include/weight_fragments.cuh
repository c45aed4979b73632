// SPDX-License-Identifier: Apache-2.0
// weight_fragments.cuh - codes of packed weights as the A operand of mma.m16n8k16, half or bfloat16.
//
//   WeightFragments<Codes, T, ROUNDED>   Codes of weight_codes.cuh, T of x
//     PARTS                  operands whose sum is the weights: 1 where T holds every code's number or ROUNDED, else 2
//     FACTOR                 what their sums of products are to be multiplied by
//     OFFSET                 what the operands are larger by than the numbers: taken off with zero point or minimum
//     make(words, t, a)      step t, known at compile time, of LaneCodes' words
//
// Numbers are those of the codes, centred but not scaled. They are exact, but for NF4: the sum of the nearest T and the
// T nearest to the rest, 2^-17 (bfloat16) or 2^-22 (half) of the largest away; ROUNDED, for an output no wider than T,
// the nearest T of numbers multiplied so that they lie close to one: 6.2e-5 (half) or 6.3e-4 (bfloat16) of their size.
//
// Fields of up to 6 bits become numbers by or-ing them into the mantissa of 2^10 (half) or 2^7 (bfloat16): where the
// lowest bit of the field counts 2^at, one subtraction, or multiplication by 2^-at and subtraction, leaves the number.
#ifndef CUPYATTN_WEIGHT_FRAGMENTS_CUH
#define CUPYATTN_WEIGHT_FRAGMENTS_CUH

#include "bits.cuh"
#include "prelude.cuh"
#include "weight_codes.cuh"

template <typename Codes, typename T, bool ROUNDED = false>
struct WeightFragments;

struct OneOperand {
  static constexpr int PARTS = 1;
  static constexpr float FACTOR = 1.0f;
  static constexpr int OFFSET = 0;
};

// ---- pairs of T ------------------------------------------------------------------------------------------------

template <typename T>
struct PairOps;

template <>
struct PairOps<__half> {
  using Two = __half2;
  static constexpr int MANTISSA = 10, MIN_EXPONENT = -14, EXPONENT_BITS = 5;
  static __device__ __forceinline__ Two both(float x) { return __float2half2_rn(x); }
};

template <>
struct PairOps<__nv_bfloat16> {
  using Two = __nv_bfloat162;
  static constexpr int MANTISSA = 7, MIN_EXPONENT = -126, EXPONENT_BITS = 8;
  static __device__ __forceinline__ Two both(float x) { return __float2bfloat162_rn(x); }
};

__host__ __device__ constexpr uint32_t twice(uint32_t x) { return x << 16 | x; }

template <typename Two>
__device__ __forceinline__ Two as_pair(uint32_t bits) { return reinterpret_cast<const Two&>(bits); }
template <typename Two>
__device__ __forceinline__ uint32_t as_bits(const Two& pair) { return reinterpret_cast<const uint32_t&>(pair); }

// `word` with bit n at n - down; down may be negative.
__device__ __forceinline__ uint32_t moved_down(uint32_t word, int down) {
  return down < 0 ? word << -down : word >> down;
}

// __byte_perm where no nibble of `selector` is above 7, which the compiler would see to.
__device__ __forceinline__ uint32_t chosen_bytes(uint32_t x, uint32_t y, uint32_t selector) {
#if CA_CPU
  return __byte_perm(x, y, selector);
#else
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(selector));
  return out;
#endif
}

// x, in a register of each lane: from a uniform one, where the compiler would put it, it would be copied for every use.
__device__ __forceinline__ uint32_t in_lanes(uint32_t x) {
#if !CA_CPU
  asm volatile("{.reg .u32 zero;\nmov.u32 zero, %%tid.z;\nadd.u32 %0, %0, zero;}" : "+r"(x));
#endif
  return x;
}

// x * factor of both
template <typename T>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t x, float factor) {
  using Ops = PairOps<T>;
  return as_bits(__hmul2(as_pair<typename Ops::Two>(x), Ops::both(factor)));
}

// Both fields at bit `at` of 2^MANTISSA + field * 2^at, less `centre`.
template <typename T>
__device__ __forceinline__ uint32_t unbiased_pair(uint32_t biased, int at, int centre) {
  using Ops = PairOps<T>;
  const auto pair = as_pair<typename Ops::Two>(biased);
  if (at == 0) return as_bits(__hsub2(pair, Ops::both(static_cast<float>(1 << Ops::MANTISSA) + centre)));
  const float bias = static_cast<float>(1 << (Ops::MANTISSA - at)) + centre;
  return as_bits(__hfma2(pair, Ops::both(1.0f / (1 << at)), Ops::both(-bias)));
}

// ---- integers --------------------------------------------------------------------------------------------------

template <int BITS, int CENTRE, typename T, bool ROUNDED>
struct WeightFragments<Ints<BITS, CENTRE>, T, ROUNDED> : OneOperand {
  static __device__ __forceinline__ void make(const uint32_t (&words)[BITS], int t, uint32_t (&a)[PARTS][4]) {
    using Ops = PairOps<T>;
    constexpr int LOW = low_plane(BITS), HIGH = BITS - LOW;
    constexpr int ROOM = Ops::MANTISSA - BITS;  // where a field may start at most
    constexpr uint32_t ONE = Ops::MANTISSA == 10 ? 0x64006400u : 0x43004300u;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const int number = 4 * t + pair;
      int at = LOW * number % 16;
      // fields too high come down by 8 if they can: pairs share that shift
      const int down = at <= ROOM ? 0 : at >= 8 && at - 8 <= ROOM ? 8 : at;
      at -= down;
      uint32_t biased = and_or(words[LOW * number / 16] >> down, twice(((1u << LOW) - 1) << at), ONE);
      if constexpr (HIGH > 0) {
        const uint32_t above = moved_down(words[LOW + HIGH * number / 16], HIGH * number % 16 - LOW - at);
        biased = and_or(above, twice(((1u << HIGH) - 1) << (LOW + at)), biased);
      }
      a[0][pair] = unbiased_pair<T>(biased, at, CENTRE);
    }
  }
};

// Of 4 bits where multiples of sums of x are added anyway: fields go to the top of the mantissa of 16, which costs sums
// few digits.
template <int CENTRE, typename T>
struct OffsetFours : OneOperand {
  static constexpr int OFFSET = 16 + CENTRE;
  static __device__ __forceinline__ void make(const uint32_t (&words)[4], int t, uint32_t (&a)[PARTS][4]) {
    constexpr int AT = PairOps<T>::MANTISSA - 4;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      a[0][pair] = and_or(moved_down(words[t], 4 * pair - AT), twice(15u << AT), AT == 6 ? 0x4c004c00u : 0x41804180u);
    }
  }
};

// Of 8 bits: words of row r, then of row r + 8; bytes 0 and 2 are columns 0 and 1 of a step, 1 and 3 columns 2 and 3.
template <int CENTRE, bool ROUNDED>
struct WeightFragments<Ints<8, CENTRE>, __half, ROUNDED> : OneOperand {
  static __device__ __forceinline__ void make(const uint32_t (&words)[8], int t, uint32_t (&a)[PARTS][4]) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t word = words[pair % 2 * 4 + t] >> (pair / 2 * 8);
      a[0][pair] = unbiased_pair<__half>(and_or(word, 0x00ff00ffu, 0x64006400u), 0, CENTRE);
    }
  }
};

// 2^7 leaves room for 7 bits: the eighth is or-ed into another 2^7, of which it makes 2^8.
template <int CENTRE, bool ROUNDED>
struct WeightFragments<Ints<8, CENTRE>, __nv_bfloat16, ROUNDED> : OneOperand {
  static __device__ __forceinline__ void make(const uint32_t (&words)[8], int t, uint32_t (&a)[PARTS][4]) {
    using Ops = PairOps<__nv_bfloat16>;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t word = words[pair % 2 * 4 + t] >> (pair / 2 * 8);
      const auto low = as_pair<Ops::Two>(and_or(word, 0x007f007fu, 0x43004300u));
      const auto top = as_pair<Ops::Two>(and_or(word, 0x00800080u, 0x43004300u));
      a[0][pair] = as_bits(__hadd2(low, __hsub2(top, Ops::both(256.0f + CENTRE))));
    }
  }
};

// ---- small floats ----------------------------------------------------------------------------------------------

// Sign, exponent and mantissa are moved into their places in T, and the difference of the exponents' biases is
// multiplied in, which takes care of subnormal codes.
template <int EXPONENT_BITS, typename T>
__host__ __device__ constexpr float bias_factor() {
  float factor = 1.0f;
  for (int i = (1 << (EXPONENT_BITS - 1)); i < 1 << (PairOps<T>::EXPONENT_BITS - 1); ++i) factor *= 2.0f;
  return factor;
}

// Halves of nothing but their upper bytes: [pairs 0 and 2, pairs 1 and 3], bytes 0 and 2 of the lower, 1 and 3 of the
// higher pair.
__device__ __forceinline__ void upper_bytes(const uint32_t (&bytes)[2], uint32_t (&a)[4]) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) a[pair] = __byte_perm(bytes[pair % 2], 0, pair < 2 ? 0x2404 : 0x3414);
}

// A half's upper byte is sign, five exponent bits, two of the mantissa: four codes at a time become such bytes, of
// 2^-14 times the number.
template <bool ROUNDED>
struct WeightFragments<Table<E2M1>, __half, ROUNDED> : OneOperand {
  static constexpr float FACTOR = 16384.0f;
  static __device__ __forceinline__ void make(const uint32_t (&words)[4], int t, uint32_t (&a)[PARTS][4]) {
    const uint32_t odd = words[t] & 0xf0f0f0f0u, even = words[t] & 0x0f0f0f0fu;  // pairs 1 and 3, 0 and 2
    const uint32_t bytes[2] = {(even << 4 | even << 1) & 0x8e8e8e8eu, (odd | odd >> 3) & 0x8e8e8e8eu};
    upper_bytes(bytes, a[0]);
  }
};

// Of bfloat16 it is sign and the lowest bits of exponent and mantissa in their places, by one multiplication where that
// is up; 2^-126 times the number.
template <bool ROUNDED>
struct WeightFragments<Table<E2M1>, __nv_bfloat16, ROUNDED> : OneOperand {
  static __device__ __forceinline__ void make(const uint32_t (&words)[4], int t, uint32_t (&a)[PARTS][4]) {
    constexpr uint32_t PLACES = 0x81c081c0u;
    const uint32_t word = words[t];
    const uint32_t bits[4] = {(word & 0x000f000fu) * 0x1040u, (word & 0x00f000f0u) * 0x104u,
                              (word >> 2 & 0x03c003c0u) * 0x41u, (word & 0xf000f000u) | (word >> 6 & 0x03c003c0u)};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
      a[0][pair] = scaled_pair<__nv_bfloat16>(bits[pair] & PLACES, bias_factor<2, __nv_bfloat16>());
  }
};

// Of codes with so many bits of exponent.
template <int EXPONENT_BITS>
__device__ __forceinline__ void make_bfloat16(const uint32_t (&words)[8], int t, uint32_t (&a)[4]) {
  constexpr int UP = EXPONENT_BITS;  // of a code in the lower byte
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const uint32_t word = words[row * 4 + t];
    const uint32_t low = and_or(word << UP, twice(0x7fu << UP), word << 8 & 0x80008000u);
    const uint32_t high = and_or(word >> (8 - UP), twice(0x7fu << UP), word & 0x80008000u);
    a[row] = scaled_pair<__nv_bfloat16>(low, bias_factor<EXPONENT_BITS, __nv_bfloat16>());
    a[row + 2] = scaled_pair<__nv_bfloat16>(high, bias_factor<EXPONENT_BITS, __nv_bfloat16>());
  }
}

template <bool ROUNDED>
struct WeightFragments<Float8<E4M3>, __half, ROUNDED> : OneOperand {
  static __device__ __forceinline__ void make(const uint32_t (&words)[8], int t, uint32_t (&a)[PARTS][4]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      e4m3_halves(__byte_perm(words[row * 4 + t], 0, 0x3120), a[0][row], a[0][row + 2]);
    }
  }
};

// Codes that are NaN are not told apart: they read 480.
template <bool ROUNDED>
struct WeightFragments<Float8<E4M3>, __nv_bfloat16, ROUNDED> : OneOperand {
  static __device__ __forceinline__ void make(const uint32_t (&words)[8], int t, uint32_t (&a)[PARTS][4]) {
    make_bfloat16<4>(words, t, a[0]);
  }
};

template <bool ROUNDED>
struct WeightFragments<Float8<E5M2>, __half, ROUNDED> : OneOperand {
  static __device__ __forceinline__ void make(const uint32_t (&words)[8], int t, uint32_t (&a)[PARTS][4]) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) a[0][pair] = words[pair % 2 * 4 + t] << (8 - pair / 2 * 8) & 0xff00ff00u;
  }
};

// Infinities and NaN become finite numbers.
template <bool ROUNDED>
struct WeightFragments<Float8<E5M2>, __nv_bfloat16, ROUNDED> : OneOperand {
  static __device__ __forceinline__ void make(const uint32_t (&words)[8], int t, uint32_t (&a)[PARTS][4]) {
    make_bfloat16<5>(words, t, a[0]);
  }
};

// ---- tables ----------------------------------------------------------------------------------------------------

// The T nearest to v, without infinities; and the number it is.
template <typename T>
__host__ __device__ constexpr uint32_t nearest_bits(double v) {
  using Ops = PairOps<T>;
  double size = v < 0 ? -v : v, unit = 1.0;
  int exponent = 0;
  for (; exponent > Ops::MIN_EXPONENT && unit > size; --exponent) unit *= 0.5;
  for (; unit * 2 <= size; ++exponent) unit *= 2;
  const double scaled = size / unit * (1 << Ops::MANTISSA);
  uint32_t digits = static_cast<uint32_t>(scaled);
  const double rest = scaled - digits;
  if (rest > 0.5 || (rest == 0.5 && digits % 2 == 1)) ++digits;
  return (v < 0 ? 0x8000u : 0u) | ((static_cast<uint32_t>(exponent - Ops::MIN_EXPONENT) << Ops::MANTISSA) + digits);
}

template <typename T>
__host__ __device__ constexpr double number_of_bits(uint32_t bits) {
  using Ops = PairOps<T>;
  uint32_t digits = bits & ((1u << Ops::MANTISSA) - 1);
  int exponent = static_cast<int>((bits & 0x7fffu) >> Ops::MANTISSA);
  if (exponent == 0) exponent = 1;
  else digits += 1u << Ops::MANTISSA;
  double v = digits;
  for (int e = exponent - 1 + Ops::MIN_EXPONENT - Ops::MANTISSA; e < 0; ++e) v *= 0.5;
  for (int e = exponent - 1 + Ops::MIN_EXPONENT - Ops::MANTISSA; e > 0; --e) v *= 2;
  return bits & 0x8000u ? -v : v;
}

// What the numbers of a table are multiplied by. FP4's times 3 have two digits. NF4's have less of a rest.
template <typename Kind, typename T>
struct TableUnit {
  static constexpr double VALUE = 1.0;
};
template <typename T>
struct TableUnit<FP4, T> {
  static constexpr double VALUE = 3.0;
};
template <>
struct TableUnit<NF4, __half> {
  static constexpr double VALUE = 1.6776894330978394;
};
template <>
struct TableUnit<NF4, __nv_bfloat16> {
  static constexpr double VALUE = 1.4370059967041016;
};

// The nearest float to a number times the unit, where floats are a little off what they stand for.
template <typename Kind, typename T>
__host__ __device__ constexpr double table_number(int code) {
  return static_cast<float>(Kind::numbers()[code] * TableUnit<Kind, T>::VALUE);
}

// Bytes of 16 numbers of T, four to a word: [lower byte, upper byte].
struct ByteTable {
  uint32_t words[2][4];
};

// Of the numbers themselves (part 0), or of what is missing from them (part 1).
template <typename Kind, typename T>
__host__ __device__ constexpr ByteTable byte_table(int part) {
  ByteTable table = {};
  for (int code = 0; code < 16; ++code) {
    const double v = table_number<Kind, T>(code);
    uint32_t bits = nearest_bits<T>(v);
    if (part == 1) bits = nearest_bits<T>(v - number_of_bits<T>(bits));
    table.words[0][code / 4] |= (bits & 0xffu) << (code % 4 * 8);
    table.words[1][code / 4] |= bits >> 8 << (code % 4 * 8);
  }
  return table;
}

template <typename Kind, typename T>
__host__ __device__ constexpr bool holds_numbers() {
  const ByteTable rests = byte_table<Kind, T>(1);
  for (int i = 0; i < 8; ++i)
    if ((rests.words[i / 4][i % 4] & (i < 4 ? 0xffffffffu : 0x7f7f7f7fu)) != 0) return false;
  return true;
}

// Bytes of a table of 16 for four codes at a time. Of each half of the table one word is an immediate operand of the
// instruction, the other is kept in a register.
struct ByteLookup {
  uint32_t first, third, second, fourth;
  __device__ __forceinline__ explicit ByteLookup(const uint32_t (&words)[4])
      : first(in_lanes(words[0])), third(in_lanes(words[2])), second(words[1]), fourth(words[3]) {}
  // `low`: lower three bits of each code; `choose`: its place, plus 4 where the highest bit is set.
  __device__ __forceinline__ uint32_t operator()(uint32_t low, uint32_t choose) const {
    return chosen_bytes(chosen_bytes(first, second, low), chosen_bytes(third, fourth, low), choose);
  }
};

template <typename Kind, typename T, bool ROUNDED>
struct WeightFragments<Table<Kind>, T, ROUNDED> {
  static constexpr int PARTS = ROUNDED || holds_numbers<Kind, T>() ? 1 : 2;
  static constexpr float FACTOR = static_cast<float>(1.0 / TableUnit<Kind, T>::VALUE);
  static constexpr int OFFSET = 0;
  static constexpr ByteTable NUMBERS = byte_table<Kind, T>(0), RESTS = byte_table<Kind, T>(1);
  ByteLookup lower = ByteLookup(NUMBERS.words[0]), upper = ByteLookup(NUMBERS.words[1]);
  ByteLookup rest_lower = ByteLookup(RESTS.words[0]), rest_upper = ByteLookup(RESTS.words[1]);

  __device__ __forceinline__ void make(const uint32_t (&words)[4], int t, uint32_t (&a)[PARTS][4]) const {
    const uint32_t low = words[t] & 0x77777777u, choose = and_or(words[t] >> 1, 0x44444444u, 0x32103210u);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      uint32_t numbers[2][2];  // even, odd columns of pairs 0 and 1, 2 and 3
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const uint32_t l = (part == 0 ? lower : rest_lower)(low >> 16 * odd, choose >> 16 * odd);
        const uint32_t u = (part == 0 ? upper : rest_upper)(low >> 16 * odd, choose >> 16 * odd);
        numbers[0][odd] = __byte_perm(l, u, 0x5140u);
        numbers[1][odd] = __byte_perm(l, u, 0x7362u);
      }
#pragma unroll
      for (int pair = 0; pair < 4; ++pair)
        a[part][pair] = __byte_perm(numbers[pair / 2][0], numbers[pair / 2][1], pair % 2 == 0 ? 0x5410u : 0x7632u);
    }
  }
};

// Numbers and 128 are bytes.
template <bool ROUNDED>
struct WeightFragments<Table<IQ4>, __half, ROUNDED> : OneOperand {
  ByteLookup bytes = ByteLookup({0x3f2d1801u, 0x766a5d4fu, 0xa6998d81u, 0xf1d9c5b5u});
  __device__ __forceinline__ void make(const uint32_t (&words)[4], int t, uint32_t (&a)[PARTS][4]) const {
    const uint32_t low = words[t] & 0x77777777u, choose = and_or(words[t] >> 1, 0x44444444u, 0x32103210u);
    const uint32_t even = bytes(low, choose), odd = bytes(low >> 16, choose >> 16);  // columns of all pairs
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t two = __byte_perm(even, odd, i == 0 ? 0x5410 : 0x7632);  // pairs i and i + 1
      a[0][i] = unbiased_pair<__half>(__byte_perm(two, 0x64646464u, 0x4240), 0, 128);
      a[0][i + 1] = unbiased_pair<__half>(__byte_perm(two, 0x64646464u, 0x4341), 0, 128);
    }
  }
};

// Sizes are upper bytes of a half.
template <bool ROUNDED>
struct WeightFragments<Table<FP4>, __half, ROUNDED> : OneOperand {
  static constexpr float FACTOR = static_cast<float>(1.0 / TableUnit<FP4, __half>::VALUE);
  static constexpr ByteTable NUMBERS = byte_table<FP4, __half>(0);
  static_assert(holds_numbers<FP4, __half>(), "weight_fragments: FP4 times 3 is exact");
  uint32_t first = in_lanes(NUMBERS.words[1][0]);
  __device__ __forceinline__ void make(const uint32_t (&words)[4], int t, uint32_t (&a)[PARTS][4]) const {
    const uint32_t low = words[t] & 0x77777777u;
    const uint32_t even = chosen_bytes(first, NUMBERS.words[1][1], low);
    const uint32_t odd = chosen_bytes(first, NUMBERS.words[1][1], low >> 16);
    const uint32_t bytes[2] = {__byte_perm(even, odd, 0x6420) | (words[t] << 4 & 0x80808080u),
                               and_or(words[t], 0x80808080u, __byte_perm(even, odd, 0x7531))};
    upper_bytes(bytes, a[0]);
  }
};

// ---- uncompressed ----------------------------------------------------------------------------------------------

template <typename T, bool ROUNDED>
struct WeightFragments<Dense<T>, T, ROUNDED> : OneOperand {
  static __device__ __forceinline__ void make(const uint32_t (&words)[16], int t, uint32_t (&a)[PARTS][4]) {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) a[0][pair] = words[pair % 2 * 8 + 2 * t + pair / 2];
  }
};

#endif  // CUPYATTN_WEIGHT_FRAGMENTS_CUH
