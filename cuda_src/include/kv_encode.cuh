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

// Elements d to d + 7 of a row, zero past its end. WIDE: dims is a multiple of 8, the row aligned to 16 bytes.
template <bool WIDE, typename E>
__device__ __forceinline__ void load_chunk(const E* row, int d, int dims, float (&out)[8]) {
  constexpr int NUM = WIDE ? 16 / static_cast<int>(sizeof(E)) : 1;  // elements per access
#pragma unroll
  for (int i = 0; i < 8; i += NUM) {
    float part[NUM] = {};
    if (d + i < dims) to_float(load_vec<E, NUM>(row + d + i), part);
#pragma unroll
    for (int n = 0; n < NUM; ++n) out[i + n] = part[n];
  }
}

template <bool WIDE, typename E>
__device__ __forceinline__ void store_chunk(E* row, int d, int dims, const float (&x)[8]) {
  constexpr int NUM = WIDE ? 16 / static_cast<int>(sizeof(E)) : 1;
#pragma unroll
  for (int i = 0; i < 8; i += NUM) {
    float part[NUM];
#pragma unroll
    for (int n = 0; n < NUM; ++n) part[n] = x[i + n];
    if (d + i < dims) store_vec(row + d + i, from_float<E, NUM>(part));
  }
}

// Rounds the values of a row to T.
template <typename T, int LANES, int CHUNKS>
__device__ __forceinline__ void round_to(float (&x)[CHUNKS][8], int dims) {
  if constexpr (SameType<T, float>::value) return;
#pragma unroll (LANES == 1 ? 1 : CHUNKS)
  for (int c = 0; c < CHUNKS; ++c) {
    if (LANES == 1 && c * 8 >= dims) break;
    to_float(from_float<T, 8>(x[c]), x[c]);
  }
}

template <int BYTES, bool WIDE>
__device__ __forceinline__ void store_word(uint8_t* p, uint32_t word) {
  if constexpr (WIDE) {
    store_vec(reinterpret_cast<uint32_t*>(p), Vec<uint32_t, 1>{{word}});
  } else {
#pragma unroll
    for (int i = 0; i < BYTES; ++i) p[i] = static_cast<uint8_t>(word >> 8 * i);
  }
}

// Codes of elements d to d + 7, the low bits of code[i].
template <typename F, bool WIDE>
__device__ __forceinline__ void store_codes(uint8_t* row, int dims, int d, const uint32_t (&code)[8]) {
  if constexpr (F::BITS == 8) {
    const uint32_t low = (code[0] & 255) | (code[1] & 255) << 8 | (code[2] & 255) << 16 | code[3] << 24;
    const uint32_t high = (code[4] & 255) | (code[5] & 255) << 8 | (code[6] & 255) << 16 | code[7] << 24;
    if constexpr (WIDE) {
      store_vec(reinterpret_cast<uint32_t*>(row + d), Vec<uint32_t, 2>{{low, high}});
    } else {
      store_word<4, false>(row + d, low);
      store_word<4, false>(row + d + 4, high);
    }
  } else {
    uint32_t nibbles = 0, pairs = 0;   // low to high elements 0, 2, 4, 6, 1, 3, 5, 7
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = i / 2 + i % 2 * 4;
      nibbles |= (code[i] & 15) << 4 * at;
      pairs |= code[i] >> 4 << 2 * at;
    }
    store_word<4, WIDE>(row + d / 2, nibbles);
    if constexpr (F::HIGH_BITS == 2) {   // half of a word that two lanes fill: even elements below the odd ones
      uint8_t* word = row + dims / 2 + d / 16 * 4 + d / 8 % 2;
      word[0] = static_cast<uint8_t>(pairs);
      word[2] = static_cast<uint8_t>(pairs >> 8);
    }
  }
}

// ---- from numbers to codes -------------------------------------------------------------------------------------

// The nearest integer from LOW to HIGH, ties to even; 0 for NaN.
template <int LOW, int HIGH>
__device__ __forceinline__ uint32_t whole(float x) {
  x = x > LOW ? x : x <= LOW ? LOW : 0.0f;
  return static_cast<uint32_t>(__float2int_rn(x < HIGH ? x : HIGH));
}

__device__ __forceinline__ float inverse(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

struct MaxOrNan {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// Largest numbers of W neighbouring lanes, NaN if there is one.
template <int W, int N>
__device__ __forceinline__ void lanes_max(float (&v)[N]) {
  if constexpr (W > 1) group_reduce<W, MaxOrNan>(v);
}

// max|x| / LARGEST of a row, or NaN.
template <int LANES, int CHUNKS>
__device__ __forceinline__ float largest(const float (&x)[CHUNKS][8], int lane, int dims) {
  float most[1] = {0.0f};
#pragma unroll (LANES == 1 ? 1 : CHUNKS)
  for (int c = 0; c < CHUNKS; ++c) {
    if (LANES == 1 && c * 8 >= dims) break;
#pragma unroll
    for (int i = 0; i < 8; ++i) most[0] = MaxOrNan()(most[0], fabsf(x[c][i]));   // zeros past the end do not matter
  }
  lanes_max<LANES>(most);
  return most[0];
}

// Every 32 dims times H / sqrt(32): a group's dims are in this lane, or in 4 lanes with 8 each.
template <int DIMS, int LANES>
__device__ __forceinline__ void hadamard32(float (&v)[DIMS]) {
#pragma unroll
  for (int distance = 1; distance < DIMS; distance *= 2) {
#pragma unroll
    for (int i = 0; i < DIMS; ++i) {
      if (i & distance) continue;
      const float a = v[i], b = v[i + distance];
      v[i] = a + b;
      v[i + distance] = a - b;
    }
  }
  if constexpr (LANES > 1) {
#pragma unroll
    for (int x = 1; x < 4; x *= 2) {
      const bool upper = threadIdx.x & x;
#pragma unroll
      for (int i = 0; i < DIMS; ++i) {
        const float other = __shfl_xor_sync(FULL_MASK, v[i], x);
        v[i] = upper ? other - v[i] : v[i] + other;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < DIMS; ++i) v[i] *= 0.17677669529663687f;
}

// The smallest half of at least x >= 0, the largest finite one where there is none; NaN stays.
__device__ __forceinline__ __half round_up_to_half(float x) {
  const __half near = __float2half_rn(x);
  uint32_t bits = __half_as_ushort(near);
  if (__half2float(near) < x) ++bits;
  return __ushort_as_half(static_cast<unsigned short>(bits == 0x7c00u ? 0x7bffu : bits));
}

// Where one row goes. `in_row`: scales are made here and stored with the row, else they are known and read.
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
  using Rows = float[CHUNKS][8];
  using Code = typename F::Code;
  using Scale = typename F::Scale;

  static __device__ __forceinline__ Code* codes(const KvPlace& to) {
    return kv_row<Code>(to.view, to.table, to.at, to.head);
  }
  static __device__ __forceinline__ Scale* scale(const KvPlace& to, int group = 0) {
    return kv_scale<Scale>(to.scale, to.table, to.at, to.head, group);
  }

  static __device__ __forceinline__ void plain(const Rows& x, int lane, const KvPlace& to) {
    if (!to.live) return;
#pragma unroll (LANES == 1 ? 1 : CHUNKS)
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = (c * LANES + lane) * 8;
      if (LANES == 1 && d >= to.dims) break;
      store_chunk<WIDE>(codes(to), d, to.dims, x[c]);
    }
  }

  // int8 and int4: x = code * scale + zero, zero the row's minimum.
  static __device__ __forceinline__ void with_zero(const Rows& x, int lane, const KvPlace& to) {
    constexpr int LEVELS = F::BITS == 8 ? 255 : 15;
    const float far = __int_as_float(0x7f800000);
    float ends[2] = {-far, -far};   // maximum and minus the minimum
#pragma unroll (LANES == 1 ? 1 : CHUNKS)
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = (c * LANES + lane) * 8;
      if (LANES == 1 && d >= to.dims) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (d < to.dims) {
          ends[0] = MaxOrNan()(ends[0], x[c][i]);
          ends[1] = MaxOrNan()(ends[1], -x[c][i]);
        }
      }
    }
    lanes_max<LANES>(ends);
    if (!to.live) return;
    const Scale step = from_float<Scale>((ends[0] + ends[1]) / static_cast<float>(LEVELS));
    const Scale lowest = from_float<Scale>(-ends[1]);
    const float zero = to_float(lowest), factor = inverse(to_float(step));
    Code* row = codes(to);
#pragma unroll (LANES == 1 ? 1 : CHUNKS)
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = (c * LANES + lane) * 8;
      if (d >= to.dims) break;
      uint32_t code[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) code[i] = whole<0, LEVELS>((x[c][i] - zero) * factor);
      store_codes<F, WIDE>(row, to.dims, d, code);
    }
    if (lane == 0) {
      *scale(to) = step;
      *kv_zero<Scale>(to.scale, to.table, to.at, to.head, 0) = lowest;
    }
  }

  // The hadamard formats.
  static __device__ __forceinline__ void rotated(const Rows& x, int lane, const KvPlace& to) {
    constexpr int GROUP_CHUNKS = LANES == 1 ? 4 : 1, DIMS = 8 * GROUP_CHUNKS;
    constexpr float M = 1 << (F::BITS + F::HIGH_BITS - 1);
    static_assert(LANES == 1 || LANES >= 4, "kv_encode: 32 dims are in one lane or in four");
    static_assert(CHUNKS % GROUP_CHUNKS == 0, "kv_encode: a lane holds whole groups");
#pragma unroll (LANES == 1 ? 1 : CHUNKS)
    for (int c = 0; c < CHUNKS; c += GROUP_CHUNKS) {
      const int first = (c * LANES + lane) * 8;
      if (LANES == 1 && first >= to.dims) break;
      float v[DIMS], most[1] = {0.0f};
#pragma unroll
      for (int i = 0; i < DIMS; ++i) v[i] = x[c + i / 8][i % 8];
      hadamard32<DIMS, LANES>(v);
#pragma unroll
      for (int i = 0; i < DIMS; ++i) most[0] = MaxOrNan()(most[0], fabsf(v[i]));
      lanes_max<LANES == 1 ? 1 : 4>(most);
      if (!to.live || first >= to.dims) continue;
      const Scale step = round_up_to_half(most[0]);
      const float size = to_float(step);
#pragma unroll
      for (int part = 0; part < DIMS; part += 8) {
        uint32_t code[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float at = size == 0.0f ? 0.0f : floorf(v[part + i] / size * M + M);
          code[i] = whole<0, static_cast<int>(2 * M) - 1>(at);
        }
        store_codes<F, WIDE>(codes(to), to.dims, first + part, code);
      }
      if (first % 32 == 0) *scale(to, first / 32) = step;
    }
  }

  // fp8 and the symmetric int8 formats: x = code * scale; only fp8 may make a scale, one for the row.
  static __device__ __forceinline__ void symmetric(const Rows& x, int lane, const KvPlace& to, bool makes_scale) {
    constexpr bool FP8 = SameType<F, KvE4M3>::value || SameType<F, KvE5M2>::value;
    constexpr float LIMIT = SameType<F, KvE4M3>::value ? 448.0f : 57344.0f;
    float step = 1.0f;
    if (FP8 && makes_scale) step = largest<LANES, CHUNKS>(x, lane, to.dims) / LIMIT;   // the same in the whole launch
    if (!to.live) return;
    if (!F::CHANNEL && !makes_scale) step = *scale(to);
    const float factor = inverse(step);
    Code* row = codes(to);
#pragma unroll (LANES == 1 ? 1 : CHUNKS)
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = (c * LANES + lane) * 8;
      if (d >= to.dims) break;
      EightFloats factors = EightFloats::all(factor);
      if constexpr (F::CHANNEL) {
        factors = channel_scales(to.scale, to.head, d);
#pragma unroll
        for (int i = 0; i < 8; ++i) factors.x[i] = inverse(factors.x[i]);
      }
      uint32_t code[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float scaled = x[c][i] * factors.x[i];
        if constexpr (FP8) {
          code[i] = __nv_cvt_float_to_fp8(scaled, __NV_SATFINITE,
                                          SameType<F, KvE4M3>::value ? __NV_E4M3 : __NV_E5M2);
        } else {
          code[i] = whole<-127, 127>(scaled);
        }
      }
      store_codes<F, WIDE>(row, to.dims, d, code);
    }
    if (FP8 && makes_scale && lane == 0) *scale(to) = step;
  }

  static __device__ __forceinline__ void store(const Rows& x, int lane, const KvPlace& to, bool makes_scale) {
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
