// SPDX-License-Identifier: Apache-2.0
// weight_codes.cuh - the codes of a packed weight (cupyattn/quant/layout.py) and the numbers they stand for.
//
// A kind of code is a struct with BITS and
//   values(words, half)   the 16 numbers of row r + 8 * half of a lane, in the order of a run: step t, columns 0, 2, 1, 3
// where `words` are the lane's 32 codes, plane after plane.
#ifndef CUPYATTN_WEIGHT_CODES_CUH
#define CUPYATTN_WEIGHT_CODES_CUH

#include "prelude.cuh"
#include "runs.cuh"

constexpr int TILE_ROWS = 16;
constexpr int TILE_COLUMNS = 64;

// Bits of the plane that holds the low bits of a code; those above are the other plane.
__host__ __device__ constexpr int low_plane(int bits) { return bits < 4 ? 2 : bits < 8 ? 4 : bits; }

// The 32 codes of lane 4r + c: BITS words.
template <int BITS>
struct LaneCodes {
  static constexpr int LOW = low_plane(BITS), HIGH = BITS - LOW;
  alignas(BITS % 4 == 0 ? 16 : 4) uint32_t words[BITS];

  __device__ __forceinline__ void load(const uint8_t* tile, int lane) {
    if constexpr (LOW == 2) {
      load_words<2>(tile, lane, 0);
    } else {
#pragma unroll
      for (int i = 0; i < LOW; i += 4) load_words<4>(tile + 128 * i, lane, i);
    }
    if constexpr (HIGH > 0) load_words<HIGH>(tile + 128 * LOW, lane, LOW);
  }

 private:
  template <int N>
  __device__ __forceinline__ void load_words(const uint8_t* chunk, int lane, int first) {
    const Vec<uint32_t, N> part = load_vec<uint32_t, N>(reinterpret_cast<const uint32_t*>(chunk) + N * lane);
#if CA_CPU
    __builtin_memcpy(words + first, &part, sizeof(part));  // as one vector
#else
#pragma unroll
    for (int i = 0; i < N; ++i) words[first + i] = part.v[i];
#endif
  }
};

// ---- integers --------------------------------------------------------------------------------------------------

// Bits of step t, row r + 8 * half, in a plane of P bits: four bytes, columns 0, 2, 1, 3.
template <int P>
__device__ __forceinline__ uint32_t four_of_plane(const uint32_t* words, int t, int half) {
  if constexpr (P == 4) return words[t] >> (4 * half) & 0x0f0f0f0fu;
  const uint32_t x = words[t * P / 4] >> (4 * t % (16 / P) * P + P * half);
  if constexpr (P == 2) return (x & 0x00030003u) | (x << 4 & 0x03000300u);
  return (x & 0x00010001u) | (x << 6 & 0x01000100u);
}

template <int BITS>
__device__ __forceinline__ uint32_t four_codes(const uint32_t (&words)[BITS], int t, int half) {
  if constexpr (BITS == 8) {
    return words[4 * half + t];
  } else {
    constexpr int LOW = low_plane(BITS);
    uint32_t four = four_of_plane<LOW>(words, t, half);
    if constexpr (BITS > LOW) four |= four_of_plane<BITS - LOW>(words + LOW, t, half) << LOW;
    return four;
  }
}

// Four unsigned bytes less ZERO as floats: 2^23 + byte has the byte in its last bits.
template <int ZERO>
__device__ __forceinline__ void bytes_to_float(uint32_t four, float* out) {
#pragma unroll
  for (int b = 0; b < 4; ++b) out[b] = __uint_as_float(0x4b000000u | (four >> (8 * b) & 0xffu)) - (8388608.0f + ZERO);
}

#if CA_CPU && CA_FUSED
namespace ca {
typedef uint32_t Words16 __attribute__((vector_size(64)));

template <int P>
CA_INLINE Ints16 sixteen_of_plane(const uint32_t* words, int half) {
  if constexpr (P == 4) {
    Bytes16 bytes;
    __builtin_memcpy(&bytes, words, sizeof(bytes));
    return widen_bytes(half ? bytes >> 4 : bytes & 15);
  } else if constexpr (P == 2) {
    const uint32_t a = words[0] >> (2 * half), b = words[1] >> (2 * half);
    const Words16 both = {a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
    return bit_cast<Ints16>(both >> Words16{0, 4, 16, 20, 8, 12, 24, 28, 0, 4, 16, 20, 8, 12, 24, 28} & 3);
  } else {
    const Words16 all = Words16{} + (words[0] >> half);
    return bit_cast<Ints16>(all >> Words16{0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30} & 1);
  }
}

// Less CENTRE.
template <int BITS, int CENTRE>
CA_INLINE Ints16 sixteen_codes(const uint32_t (&words)[BITS], int half) {
  if constexpr (BITS == 8) {
    Bytes16 bytes;
    __builtin_memcpy(&bytes, words + 4 * half, sizeof(bytes));
    if constexpr (CENTRE == 128) return widen_bytes(bit_cast<SignedBytes16>(bytes ^ 128));
    return widen_bytes(bytes) - CENTRE;
  } else {
    constexpr int LOW = low_plane(BITS);
    Ints16 codes = sixteen_of_plane<LOW>(words, half);
    if constexpr (BITS > LOW) codes |= sixteen_of_plane<BITS - LOW>(words + LOW, half) << LOW;
    return codes - CENTRE;
  }
}
}  // namespace ca
#endif

// code - CENTRE
template <int BITS_, int CENTRE_>
struct Ints {
  static constexpr int BITS = BITS_, CENTRE = CENTRE_;
  static __device__ __forceinline__ Run values(const uint32_t (&words)[BITS], int half) {
    Run run;
#if CA_CPU && CA_FUSED
    run.v = __builtin_convertvector(ca::sixteen_codes<BITS, CENTRE>(words, half), ca::Floats16);
#else
#pragma unroll
    for (int t = 0; t < 4; ++t) bytes_to_float<CENTRE>(four_codes<BITS>(words, t, half), run.v + 4 * t);
#endif
    return run;
  }
};

// ---- tables ----------------------------------------------------------------------------------------------------

// Numbers of the 16 codes, as cupyattn/quant/coded.py has them.
__device__ constexpr float NF4_NUMBERS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
__device__ constexpr float FP4_NUMBERS[16] = {
    0.0f, 0.005208333333333333f, 0.6666666666666666f, 1.0f, 0.3333333333333333f, 0.5f, 0.16666666666666666f, 0.25f,
    -0.0f, -0.005208333333333333f, -0.6666666666666666f, -1.0f, -0.3333333333333333f, -0.5f, -0.16666666666666666f,
    -0.25f};
__device__ constexpr float E2M1_NUMBERS[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                           -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
__device__ constexpr float IQ4_NUMBERS[16] = {-127.0f, -104.0f, -83.0f, -65.0f, -49.0f, -35.0f, -22.0f, -10.0f,
                                          1.0f,    13.0f,   25.0f,  38.0f,  53.0f,  69.0f,  89.0f,  113.0f};
struct NF4 {
  static constexpr __device__ __forceinline__ const float* numbers() { return NF4_NUMBERS; }
};
struct FP4 {
  static constexpr __device__ __forceinline__ const float* numbers() { return FP4_NUMBERS; }
};
struct E2M1 {
  static constexpr __device__ __forceinline__ const float* numbers() { return E2M1_NUMBERS; }
};
struct IQ4 {
  static constexpr __device__ __forceinline__ const float* numbers() { return IQ4_NUMBERS; }
};

// Name::numbers()[code]: 64 bytes that stay in the first-level cache.
template <typename Name_>
struct Table {
  using Name = Name_;
  static constexpr int BITS = 4;
  static __device__ __forceinline__ Run values(const uint32_t (&words)[BITS], int half) {
    Run run;
#if CA_CPU && CA_FUSED
    const ca::Ints16 codes = ca::sixteen_codes<BITS, 0>(words, half);
#if defined(__clang__)
    for (int i = 0; i < RUN; ++i) run.v[i] = Name::numbers()[codes[i]];
#else
    run.v = __builtin_shuffle(load_run(Name::numbers()).v, codes);
#endif
#else
#pragma unroll
    for (int i = 0; i < RUN; ++i) run.v[i] = Name::numbers()[four_codes<BITS>(words, i / 4, half) >> (8 * (i % 4)) & 15];
#endif
    return run;
  }
};

// ---- floats of 8 bits ------------------------------------------------------------------------------------------

// What fp8 is as half: e5m2 its upper byte; e4m3 has one exponent bit less, the number is `SCALE` times the half.
struct E4M3 {
  static constexpr float SCALE = 256.0f;
  template <typename Words>
  static __device__ __forceinline__ Words half_bits(const Words& code) {
    return (code & 0x80u) << 8 | (code & 0x7fu) << 7;
  }
};
struct E5M2 {
  static constexpr float SCALE = 1.0f;
  template <typename Words>
  static __device__ __forceinline__ Words half_bits(const Words& code) {
    return code << 8;
  }
};

// A NaN of e4m3 (codes 0x7f, 0xff), which becomes 480, is none again.
__device__ __forceinline__ float nan_past_448(float x) { return fabsf(x) > 448.0f ? __uint_as_float(0x7fc00000u) : x; }

// The halves that bytes 0 and 1, and 2 and 3, of e4m3 codes are. Below sm_89 NaN codes read 480.
__device__ __forceinline__ void e4m3_halves(uint32_t four, uint32_t& low, uint32_t& high) {
#if !CA_CPU && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("{.reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;}"
      : "=r"(low), "=r"(high)
      : "r"(four));
#else
  uint32_t* const halves[2] = {&low, &high};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t codes = __byte_perm(four, 0, i == 0 ? 0x1404 : 0x3424);  // in upper bytes
    const uint32_t small = (codes & 0x80008000u) | (codes >> 1 & 0x3f803f80u);
    const __half2 scaled = __hmul2(reinterpret_cast<const __half2&>(small), __float2half2_rn(E4M3::SCALE));
    *halves[i] = reinterpret_cast<const uint32_t&>(scaled);
#if CA_CPU
    for (int at = 0; at < 32; at += 16)
      if ((*halves[i] >> at & 0x7fffu) == 0x5f80u) *halves[i] |= 0x7fffu << at;
#endif
  }
#endif
}

template <typename Name>
__device__ __forceinline__ float fp8_to_float(uint32_t code) {
#if !CA_CPU && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if constexpr (Name::SCALE != 1.0f) {
    uint32_t low, high;
    e4m3_halves(code, low, high);
    const unsigned short half = static_cast<unsigned short>(low);
    return to_float(reinterpret_cast<const __half&>(half));
  }
#endif
  const unsigned short bits = static_cast<unsigned short>(Name::half_bits(code));
  const float x = to_float(reinterpret_cast<const __half&>(bits)) * Name::SCALE;
  return Name::SCALE == 1.0f ? x : nan_past_448(x);
}

template <typename Name_>
struct Float8 {
  using Name = Name_;
  static constexpr int BITS = 8;
  static __device__ __forceinline__ Run values(const uint32_t (&words)[BITS], int half) {
    Run run;
#if CA_CPU && CA_FUSED
    typedef ca::Lanes<16> Lanes;
    const Lanes::u32 codes = ca::bit_cast<Lanes::u32>(ca::sixteen_codes<BITS, 0>(words, half));
    const Lanes::u16 halves = Lanes::narrow(Name::half_bits(codes));
    run.v = ca::widen_numbers(reinterpret_cast<const __half*>(&halves)) * Name::SCALE;
    if (Name::SCALE != 1.0f) {
      const Lanes::u32 nan = ca::mask_of<Lanes::u32>((codes & 0x7fu) == 0x7fu) & 0x7fc00000u;
      run.v = ca::bit_cast<ca::Floats16>(ca::bit_cast<Lanes::u32>(run.v) | nan);
    }
#else
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      run.v[i] = fp8_to_float<Name>(four_codes<BITS>(words, i / 4, half) >> (8 * (i % 4)) & 0xffu);
    }
#endif
    return run;
  }
};

// ---- uncompressed ----------------------------------------------------------------------------------------------

template <typename W_>
struct Dense {
  using W = W_;
  static constexpr int BITS = 8 * sizeof(W);
  static __device__ __forceinline__ Run values(const uint32_t (&words)[BITS], int half) {
    Run run;
    const uint32_t* row = words + BITS / 2 * half;
#if CA_CPU && CA_FUSED
    run.v = ca::widen_numbers(reinterpret_cast<const W*>(row));
    if (BITS == 16) run.v = ca::swap_middle(run.v);
#else
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if constexpr (BITS == 32) {
#pragma unroll
        for (int j = 0; j < 4; ++j) run.v[4 * t + j] = __uint_as_float(row[4 * t + j]);
      } else {
        float step[4];
        to_float(reinterpret_cast<const Vec<W, 4>&>(row[2 * t]), step);
#pragma unroll
        for (int j = 0; j < 4; ++j) run.v[4 * t + (j % 2 * 2 + j / 2)] = step[j];
      }
    }
#endif
    return run;
  }
};

#endif  // CUPYATTN_WEIGHT_CODES_CUH
