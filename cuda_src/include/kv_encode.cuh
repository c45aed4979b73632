// SPDX-License-Identifier: Apache-2.0
// kv_encode.cuh - the write side of every KV format: a row of floats in registers becomes codes, scales and zeros.
// The tags are those of kv_format.cuh, the arithmetic, bit for bit, that of cupyattn/reference/kv_codec.py.
//
// A row of `dims` elements is held by LANES neighbouring lanes; x[c] of lane l are its elements from
// (c * LANES + l) * 8 on, zero past its end. All lanes of a warp call together; a row that is not live stores nothing.
// A row with a NaN becomes codes 0 with a NaN for scale in int8, int4 and (each group of 32) the hadamard formats; with
// scales known in advance only the NaN itself becomes 0, in fp8 a NaN.
#ifndef CUPYATTN_KV_ENCODE_CUH
#define CUPYATTN_KV_ENCODE_CUH

#include <cuda_fp8.h>

#include "hadamard.cuh"
#include "kv_format.cuh"
#include "warp.cuh"

template <typename A, typename B>
struct SameType {
  static constexpr bool value = false;
};
template <typename A>
struct SameType<A, A> {
  static constexpr bool value = true;
};

// ---- eight elements of a row in memory -------------------------------------------------------------------------

// Elements d to d + 7 of a row in global memory, zero past its end. WIDE: dims is a multiple of 8, the row aligned to
// 16 bytes.
template <bool WIDE, typename E>
__device__ __forceinline__ EightFloats load_chunk(const E* row, int d, int dims) {
  if constexpr (WIDE) {
    return d < dims ? EightFloats::from(KvPlain<E>::load(in_global(row + d))) : EightFloats::all(0.0f);
  } else {
    EightFloats out;
#pragma unroll
    for (int i = 0; i < 8; ++i) out.x[i] = d + i < dims ? to_float(*in_global(row + d + i)) : 0.0f;
    return out;
  }
}

template <bool WIDE, typename E>
__device__ __forceinline__ void store_chunk(E* row, int d, int dims, const EightFloats& x) {
  const Vec<E, 8> rounded = x.to<E>();
  if constexpr (WIDE) {
    if (d < dims) KvPlain<E>::store(row + d, rounded);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (d + i < dims) row[d + i] = rounded.v[i];
    }
  }
}

// Rounds the values of a row to T.
template <typename T, int LANES, int CHUNKS>
__device__ __forceinline__ void round_to(EightFloats (&x)[CHUNKS], int dims) {
  if constexpr (SameType<T, float>::value) return;
#pragma unroll (LANES == 1 ? 1 : CHUNKS)
  for (int c = 0; c < CHUNKS; ++c) {
    if (LANES == 1 && c * 8 >= dims) break;
    x[c] = EightFloats::from(x[c].template to<T>());
  }
}

// ---- eight codes -----------------------------------------------------------------------------------------------

// The low bits of eight words; what stands above them does not matter.
struct EightCodes {
#if CA_CPU
  typedef uint32_t Words __attribute__((vector_size(32)));
  Words x;
#else
  uint32_t x[8];
#endif
};

struct CodeWords {
  uint32_t low, high;
};

// One byte each.
__device__ __forceinline__ CodeWords pack_bytes(const EightCodes& code) {
#if CA_CPU
  typedef uint16_t Shorts __attribute__((vector_size(16)));
  typedef uint8_t Bytes __attribute__((vector_size(8)));
  return ca::bit_cast<CodeWords>(__builtin_convertvector(__builtin_convertvector(code.x & 255, Shorts), Bytes));
#else
  const auto four = [&](int i) {
    return __byte_perm(__byte_perm(code.x[i], code.x[i + 1], 0x0040), __byte_perm(code.x[i + 2], code.x[i + 3], 0x0040),
                       0x5410);
  };
  return {four(0), four(4)};
#endif
}

// BITS of each from bit FIRST on, low to high those of elements 0, 2, 4, 6, 1, 3, 5, 7.
template <int FIRST, int BITS>
__device__ __forceinline__ uint32_t pack_bits(const EightCodes& code) {
#if CA_CPU
  typedef uint64_t Halves __attribute__((vector_size(32)));
  const EightCodes::Words at = {0, 4 * BITS, BITS, 5 * BITS, 2 * BITS, 6 * BITS, 3 * BITS, 7 * BITS};
  const Halves bits = ca::bit_cast<Halves>((code.x >> FIRST & ((1 << BITS) - 1)) << at);
  const uint64_t all = (bits[0] | bits[1]) | (bits[2] | bits[3]);
  return static_cast<uint32_t>(all | all >> 32);
#else
  uint32_t out = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) out |= (code.x[i] >> FIRST & ((1u << BITS) - 1)) << (i / 2 + i % 2 * 4) * BITS;
  return out;
#endif
}

template <bool WIDE>
__device__ __forceinline__ void store_word(uint8_t* p, uint32_t word) {
  if constexpr (WIDE) {
    store_global(reinterpret_cast<uint32_t*>(p), Vec<uint32_t, 1>{{word}});
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(word >> 8 * i);
  }
}

// Codes of elements d to d + 7.
template <typename F, bool WIDE>
__device__ __forceinline__ void store_codes(uint8_t* row, int dims, int d, const EightCodes& code) {
  if constexpr (F::BITS == 8) {
    const CodeWords words = pack_bytes(code);
    if constexpr (WIDE) {
      store_global(reinterpret_cast<uint32_t*>(row + d), Vec<uint32_t, 2>{{words.low, words.high}});
    } else {
      store_word<false>(row + d, words.low);
      store_word<false>(row + d + 4, words.high);
    }
  } else {
    store_word<WIDE>(row + d / 2, pack_bits<0, 4>(code));
    if constexpr (F::HIGH_BITS == 2) {  // half of a word that two lanes fill: even elements below the odd ones
      const uint32_t pairs = pack_bits<4, 2>(code);
      uint8_t* word = row + dims / 2 + d / 16 * 4 + d / 8 % 2;
      word[0] = static_cast<uint8_t>(pairs);
      word[2] = static_cast<uint8_t>(pairs >> 8);
    }
  }
}

// ---- from numbers to codes -------------------------------------------------------------------------------------

// The nearest integers from LOW <= 0 to HIGH, ties to even; 0 for NaN. 1.5 * 2^23 leaves them in the low bits.
template <int LOW, int HIGH>
__device__ __forceinline__ EightCodes whole(const EightFloats& x) {
  constexpr float low = LOW, high = HIGH, magic = 12582912.0f;
  EightCodes out;
#if CA_CPU
  typedef EightFloats::Numbers Numbers;
  Numbers v = x.x == x.x ? x.x : Numbers{};
  v = v > low ? v : low - Numbers{};
  v = v < high ? v : high - Numbers{};
  out.x = ca::bit_cast<EightCodes::Words>(v + magic);
#else
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float v = x.x[i] == x.x[i] ? x.x[i] : 0.0f;
    out.x[i] = __float_as_uint(fminf(fmaxf(v, low), high) + magic);
  }
#endif
  return out;
}

// fp8 numbers, saturated.
template <bool IS_E4M3>
__device__ __forceinline__ EightCodes to_fp8(const EightFloats& x) {
  EightCodes out;
#if CA_CPU
  const EightCodes::Words bits = ca::bit_cast<EightCodes::Words>(x.x);
  if constexpr (IS_E4M3) out.x = ca::E4m3::narrow<ca::Lanes<8>>(bits, true);
  else out.x = ca::E5m2::narrow<ca::Lanes<8>>(bits, true);
#else
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const uint32_t both = __nv_cvt_float2_to_fp8x2(make_float2(x.x[i], x.x[i + 1]), __NV_SATFINITE,
                                                   IS_E4M3 ? __NV_E4M3 : __NV_E5M2);
    out.x[i] = both;
    out.x[i + 1] = both >> 8;
  }
#endif
  return out;
}

__device__ __forceinline__ float inverse(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

struct MaxOrNan {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

__device__ __forceinline__ EightFloats max_or_nan(const EightFloats& a, const EightFloats& b) {
  EightFloats out;
#if CA_CPU
  out.x = (a.x > b.x) | (a.x != a.x) ? a.x : b.x;
#else
#pragma unroll
  for (int i = 0; i < 8; ++i) out.x[i] = MaxOrNan()(a.x[i], b.x[i]);
#endif
  return out;
}
__device__ __forceinline__ float max_or_nan(const EightFloats& a) {
  float out = a.x[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) out = MaxOrNan()(out, a.x[i]);
  return out;
}
__device__ __forceinline__ EightFloats magnitude(const EightFloats& a) {
  EightFloats out;
#if CA_CPU
  out.x = a.x < 0.0f ? -a.x : a.x;
#else
#pragma unroll
  for (int i = 0; i < 8; ++i) out.x[i] = fabsf(a.x[i]);
#endif
  return out;
}

// Largest numbers of W neighbouring lanes, NaN if there is one.
template <int W, int N>
__device__ __forceinline__ void lanes_max(float (&v)[N]) {
  if constexpr (W > 1) group_reduce<W, MaxOrNan>(v);
}

// The smallest half of at least x >= 0, the largest finite one where there is none; NaN stays.
__device__ __forceinline__ __half round_up_to_half(float x) {
  const __half near = __float2half_rn(x);
  uint32_t bits = __half_as_ushort(near);
  if (__half2float(near) < x) ++bits;
  return __ushort_as_half(static_cast<unsigned short>(bits == 0x7c00u ? 0x7bffu : bits));
}

// Where one row goes.
struct KvPlace {
  const KvView& view;
  const KvScale& scale;
  const PageTable& table;
  TokenSlot at;
  int64_t head;
  int dims;
  bool live;
};

template <typename F, int LANES, int CHUNKS, bool WIDE>
struct KvEncoder {
  using Row = EightFloats[CHUNKS];
  using Code = typename F::Code;
  using Scale = typename F::Scale;
  static constexpr int UNROLL = LANES == 1 ? 1 : CHUNKS;

  static __device__ __forceinline__ Code* codes(const KvPlace& to) {
    return kv_row<Code>(to.view, to.table, to.at, to.head);
  }
  static __device__ __forceinline__ Scale* scale(const KvPlace& to, int group = 0) {
    return kv_scale<Scale>(to.scale, to.table, to.at, to.head, group);
  }

  static __device__ __forceinline__ void plain(const Row& x, int lane, const KvPlace& to) {
    if (!to.live) return;
    Code* row = codes(to);
#pragma unroll UNROLL
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = (c * LANES + lane) * 8;
      if (LANES == 1 && d >= to.dims) break;
      store_chunk<WIDE>(row, d, to.dims, x[c]);
    }
  }

  // int8 and int4: x = code * scale + zero, zero the row's minimum.
  static __device__ __forceinline__ void with_zero(const Row& x, int lane, const KvPlace& to) {
    constexpr int LEVELS = F::BITS == 8 ? 255 : 15;
    const EightFloats none = EightFloats::all(0.0f), far = EightFloats::all(-__int_as_float(0x7f800000));
    EightFloats most = far, least = far;   // least: minus the minimum
#pragma unroll UNROLL
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = (c * LANES + lane) * 8;
      if (LANES == 1 && d >= to.dims) break;
      if (d < to.dims) {
        most = max_or_nan(most, x[c]);
        least = max_or_nan(least, none - x[c]);
      }
    }
    float ends[2] = {max_or_nan(most), max_or_nan(least)};
    lanes_max<LANES>(ends);
    if (!to.live) return;
    const Scale step = from_float<Scale>((ends[0] + ends[1]) / static_cast<float>(LEVELS));
    const Scale lowest = from_float<Scale>(-ends[1]);
    const EightFloats zero = EightFloats::all(to_float(lowest));
    const float factor = inverse(to_float(step));
    Code* row = codes(to);
#pragma unroll UNROLL
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = (c * LANES + lane) * 8;
      if (d >= to.dims) break;
      EightFloats v = x[c] - zero;
      v *= factor;
      store_codes<F, WIDE>(row, to.dims, d, whole<0, LEVELS>(v));
    }
    if (lane == 0) {
      *scale(to) = step;
      *kv_zero<Scale>(to.scale, to.table, to.at, to.head, 0) = lowest;
    }
  }

  // The hadamard formats: 32 dims with one scale are in this lane, or in four lanes.
  static __device__ __forceinline__ void rotated(const Row& x, int lane, const KvPlace& to) {
    constexpr int PARTS = LANES == 1 ? 4 : 1;
    constexpr float M = 1 << (F::BITS + F::HIGH_BITS - 1);
    static_assert(LANES == 1 || LANES >= 4, "kv_encode: 32 dims are in one lane or in four");
    static_assert(CHUNKS % PARTS == 0, "kv_encode: a lane holds whole groups");
#pragma unroll UNROLL
    for (int c = 0; c < CHUNKS; c += PARTS) {
      const int first = (c * LANES + lane) * 8;
      if (LANES == 1 && first >= to.dims) break;
      EightFloats v[PARTS];
#pragma unroll
      for (int part = 0; part < PARTS; ++part) v[part] = x[c + part];
      if constexpr (PARTS == 4) hadamard32(v);
      else hadamard32(v[0]);
      EightFloats most = magnitude(v[0]);
#pragma unroll
      for (int part = 1; part < PARTS; ++part) most = max_or_nan(most, magnitude(v[part]));
      float largest[1] = {max_or_nan(most)};
      lanes_max<PARTS == 4 ? 1 : 4>(largest);
      if (!to.live || first >= to.dims) continue;
      const Scale step = round_up_to_half(largest[0]);
      const float size = to_float(step);
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        EightFloats at;
#pragma unroll
        for (int i = 0; i < 8; ++i) at.x[i] = size == 0.0f ? 0.0f : floorf(v[part].x[i] / size * M + M);
        store_codes<F, WIDE>(codes(to), to.dims, first + part * 8, whole<0, static_cast<int>(2 * M) - 1>(at));
      }
      if (first % 32 == 0) *scale(to, first / 32) = step;
    }
  }

  // fp8 and the symmetric int8 formats: x = code * scale; only fp8 may make a scale, one for the row.
  static __device__ __forceinline__ void symmetric(const Row& x, int lane, const KvPlace& to, bool makes_scale) {
    constexpr bool E4M3 = SameType<F, KvE4M3>::value, FP8 = E4M3 || SameType<F, KvE5M2>::value;
    float step = 1.0f;
    if (FP8 && makes_scale) {  // the same in the whole launch
      EightFloats most = EightFloats::all(0.0f);
#pragma unroll UNROLL
      for (int c = 0; c < CHUNKS; ++c) {
        if (LANES == 1 && c * 8 >= to.dims) break;
        most = max_or_nan(most, magnitude(x[c]));   // zeros past the end do not matter
      }
      float largest[1] = {max_or_nan(most)};
      lanes_max<LANES>(largest);
      step = largest[0] / (E4M3 ? 448.0f : 57344.0f);
    }
    if (!to.live) return;
    if (!F::CHANNEL && !makes_scale) step = *scale(to);
    const EightFloats factor = EightFloats::all(inverse(step));
    Code* row = codes(to);
#pragma unroll UNROLL
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = (c * LANES + lane) * 8;
      if (d >= to.dims) break;
      EightFloats v = x[c];
      if constexpr (F::CHANNEL) {
        EightFloats factors = channel_scales(to.scale, to.head, d);
#pragma unroll
        for (int i = 0; i < 8; ++i) factors.x[i] = inverse(factors.x[i]);
        v *= factors;
      } else {
        v *= factor;
      }
      if constexpr (FP8) store_codes<F, WIDE>(row, to.dims, d, to_fp8<E4M3>(v));
      else store_codes<F, WIDE>(row, to.dims, d, whole<-127, 127>(v));
    }
    if (FP8 && makes_scale && lane == 0) *scale(to) = step;
  }

  // `makes_scale`: an fp8 row's scale is made from it and stored, not read.
  static __device__ __forceinline__ void store(const Row& x, int lane, const KvPlace& to, bool makes_scale) {
    if constexpr (!F::HAS_SCALE) {
      plain(x, lane, to);
    } else if constexpr (F::HAS_ZERO) {
      with_zero(x, lane, to);
    } else if constexpr (F::ROTATED) {
      rotated(x, lane, to);
    } else {
      symmetric(x, lane, to, makes_scale);
    }
  }
};

#endif  // CUPYATTN_KV_ENCODE_CUH
