// SPDX-License-Identifier: Apache-2.0
// weight_scales.cuh - scales, zeros and minima of a packed weight (cupyattn/quant/layout.py).
//
// A kind of scales is a struct with
//   load(weight, row_tile, first, t, r)   the record of rows r and r + 8 in column tile first + t
//   apply<HALF>(run)                      makes weights of the values of row r + 8 * HALF, in float32
// GROUPS (1, 2, 4) is how many groups a tile has.
#ifndef CUPYATTN_WEIGHT_SCALES_CUH
#define CUPYATTN_WEIGHT_SCALES_CUH

#include "params.h"
#include "prelude.cuh"
#include "runs.cuh"
#include "weight_codes.cuh"

// v * s; (v - z) * s; v * s + m
enum Mode { PLAIN, ZERO, MINIMUM };

struct E8M0;  // 2^(byte - 127)

// ---- numbers of a record ---------------------------------------------------------------------------------------

template <typename S>
struct ScaleType {  // float, __half or __nv_bfloat16; else see below
  using Bits = S;
  static __device__ __forceinline__ float number(S x) { return to_float(x); }
};
template <>
struct ScaleType<int8_t> {
  using Bits = int8_t;
  static __device__ __forceinline__ float number(int8_t x) { return static_cast<float>(x); }
};
template <>
struct ScaleType<E4M3> {
  using Bits = uint8_t;
  static __device__ __forceinline__ float number(uint8_t x) { return fp8_to_float<E4M3>(x); }
};
template <>
struct ScaleType<E8M0> {
  using Bits = uint8_t;
  static __device__ __forceinline__ float number(uint8_t x) {
    return __uint_as_float(x == 255 ? 0x7fc00000u : max(static_cast<uint32_t>(x) << 23, 0x00400000u));
  }
};

constexpr bool is_half(const __half*) { return true; }
constexpr bool is_half(const void*) { return false; }

// N consecutive numbers of type S as floats; on the host with CA_FUSED a vector of at least N.
template <typename S, int N>
struct Numbers {
  using Bits = typename ScaleType<S>::Bits;
#if CA_CPU && CA_FUSED
  static constexpr bool IS_HALF = is_half(static_cast<S*>(nullptr)) && N <= 8;
  static constexpr int WIDTH = IS_HALF ? 8 : N <= 4 ? 4 : N;
  typename ca::Lanes<WIDTH>::f32 v;
  CA_INLINE void load(const uint8_t* p) {
    if constexpr (IS_HALF) {
      long long low = 0, high = 0;
      __builtin_memcpy(&low, p, N < 4 ? 2 * N : 8);
      if (N == 8) __builtin_memcpy(&high, p + 8, 8);
      v = ca::widen_halves(low, high);
    } else if constexpr (N == 16 && sizeof(Bits) > 1) {
      v = ca::widen_numbers(reinterpret_cast<const Bits*>(p));
    } else {
      Bits raw[N];
      __builtin_memcpy(raw, p, sizeof(raw));
      for (int i = 0; i < WIDTH; ++i) v[i] = i < N ? ScaleType<S>::number(raw[i]) : 0.0f;
    }
  }
#else
  float v[N];
  __device__ __forceinline__ void load(const uint8_t* p) {
    constexpr int WIDTH = N * sizeof(Bits) <= 16 ? N : 16 / sizeof(Bits);
#pragma unroll
    for (int i = 0; i < N; i += WIDTH) {
      const Vec<Bits, WIDTH> part = load_vec<Bits, WIDTH>(reinterpret_cast<const Bits*>(p) + i);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) v[i + j] = ScaleType<S>::number(part.v[j]);
    }
  }
#endif
  // GROUPS of them from FIRST on, each as often as its group has columns in a run.
  template <int FIRST, int GROUPS>
  __device__ __forceinline__ Run spread() const {
    Run run;
#if CA_CPU && CA_FUSED
    run.v = ca::spread<FIRST, GROUPS>(v);
#else
#pragma unroll
    for (int i = 0; i < RUN; ++i) run.v[i] = v[FIRST + i * GROUPS / RUN];
#endif
    return run;
  }
};

// tile / tiles, where (tile + 1) * tiles < 2^32; all but a multiplication can leave a loop over tiles.
__device__ __forceinline__ int span_of(int tile, int tiles) {
  return static_cast<int>(__umulhi(static_cast<uint32_t>(tile) + 1, 0xffffffffu / static_cast<uint32_t>(tiles)));
}

// Where rows r and r + 8 have their record in column tile first + t: `bytes` each, `tiles` tiles a record.
__device__ __forceinline__ const uint8_t* record_of(const uint8_t* records, const WeightView& weight, int tiles,
                                                    int row_tile, int first, int t, int r, int bytes) {
  if (tiles == 1) return records + ((int64_t{row_tile} * weight.column_tiles + first) * 8 + r) * bytes + t * (8 * bytes);
  const int64_t span = int64_t{row_tile} * ceil_div(weight.column_tiles, tiles) + span_of(first + t, tiles);
  return records + (span * 8 + r) * bytes;
}

__device__ __forceinline__ Run times(const Run& a, const Run& b) {
  Run out;
#if CA_CPU && CA_FUSED
  out.v = a.v * b.v;
#else
#pragma unroll
  for (int i = 0; i < RUN; ++i) out.v[i] = a.v[i] * b.v[i];
#endif
  return out;
}

// Makes weights of values.
template <Mode MODE>
__device__ __forceinline__ void scale_values(Run& run, const Run& scale, const Run& second) {
#if CA_CPU && CA_FUSED
  if (MODE == ZERO) run.v -= second.v;
  run.v *= scale.v;
  if (MODE == MINIMUM) run.v += second.v;
  run.v = ca::in_this_order(run.v);
#else
#pragma unroll
  for (int i = 0; i < RUN; ++i) {
    if (MODE == ZERO) run.v[i] -= second.v[i];
    run.v[i] *= scale.v[i];
    if (MODE == MINIMUM) run.v[i] += second.v[i];
  }
#endif
}

// ---- kinds of scales -------------------------------------------------------------------------------------------

struct NoScales {
  static constexpr int GROUPS = 1;
  __device__ __forceinline__ void load(const WeightView&, int, int, int, int) {}
  template <int HALF>
  __device__ __forceinline__ void apply(Run&) const {}
};

template <typename S, Mode MODE_, int GROUPS_>
struct Scales {
  using Number = S;
  static constexpr Mode MODE = MODE_;
  static constexpr int GROUPS = GROUPS_, COUNT = (MODE == PLAIN ? 2 : 4) * GROUPS;  // numbers of a record
  static constexpr int BYTES = COUNT * sizeof(typename ScaleType<S>::Bits);
  Numbers<S, COUNT> numbers;  // [scale, zero or minimum][row r, row r + 8][group]

  __device__ __forceinline__ void load(const WeightView& weight, int row_tile, int first, int t, int r) {
    const int tiles = GROUPS > 1 ? 1 : weight.tiles_per_scale;
    numbers.load(record_of(weight.scales, weight, tiles, row_tile, first, t, r, BYTES));
  }
  template <int HALF>
  __device__ __forceinline__ void apply(Run& run) const {
    const Run scale = numbers.template spread<HALF * GROUPS, GROUPS>();
    scale_values<MODE>(run, scale, MODE == PLAIN ? scale : numbers.template spread<second(HALF), GROUPS>());
  }

 private:
  static constexpr int second(int half) { return MODE == PLAIN ? 0 : (2 + half) * GROUPS; }
};

// Scales and minima are products of two numbers, in float32.
template <typename S, typename Super, Mode MODE_, int GROUPS_>
struct SuperScales {
  using Number = S;
  using SuperNumber = Super;
  static constexpr Mode MODE = MODE_;
  static constexpr int GROUPS = GROUPS_;
  static constexpr int SUPERS = MODE == MINIMUM ? 4 : 2;
  Scales<S, MODE, GROUPS> scales;
  Numbers<Super, SUPERS> supers;  // [row r, row r + 8][scale, minimum]

  __device__ __forceinline__ void load(const WeightView& weight, int row_tile, int first, int t, int r) {
    scales.load(weight, row_tile, first, t, r);
    supers.load(record_of(weight.supers, weight, weight.tiles_per_super, row_tile, first, t, r,
                          SUPERS * sizeof(Super)));
  }
  template <int HALF>
  __device__ __forceinline__ void apply(Run& run) const {
    constexpr int SUPER = HALF * SUPERS / 2, SECOND = MODE == PLAIN ? 0 : (2 + HALF) * GROUPS;
    const Run scale = times(scales.numbers.template spread<HALF * GROUPS, GROUPS>(), supers.template spread<SUPER, 1>());
    Run second = scale;
    if (MODE != PLAIN) second = scales.numbers.template spread<SECOND, GROUPS>();
    if (MODE == MINIMUM) second = times(second, supers.template spread<SUPER + (MODE == MINIMUM), 1>());
    scale_values<MODE>(run, scale, second);
  }
};

#endif  // CUPYATTN_WEIGHT_SCALES_CUH
