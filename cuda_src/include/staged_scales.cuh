// SPDX-License-Identifier: Apache-2.0
// staged_scales.cuh - records of scales (weight_scales.cuh) in shared memory, for kernels that scale sums, not weights.
//
// A kind is a struct with BYTES and SUPER_BYTES of a row's record (0 for none), MODE, and
//   scale(record, above, half, group)    of row r + 8 * half, in float32
//   second(record, above, half, group)   its zero or minimum
#ifndef CUPYATTN_STAGED_SCALES_CUH
#define CUPYATTN_STAGED_SCALES_CUH

#include "prelude.cuh"
#include "weight_scales.cuh"

// `record` is that of rows r and r + 8, `above` their supers.
template <typename Kind>
struct StagedScales {  // NoScales
  static constexpr int BYTES = 0, SUPER_BYTES = 0;
  static constexpr Mode MODE = PLAIN;
};

template <typename S, Mode MODE_, int GROUPS>
struct StagedScales<Scales<S, MODE_, GROUPS>> {
  using Bits = typename ScaleType<S>::Bits;
  static constexpr int BYTES = Scales<S, MODE_, GROUPS>::BYTES, SUPER_BYTES = 0;
  static constexpr Mode MODE = MODE_;

  // Number of the scale (which 0), the zero or the minimum (which 1) of a group of row r + 8 * half.
  static __device__ __forceinline__ float number(const uint8_t* record, int which, int half, int group) {
    constexpr int WIDTH = 2 * GROUPS * sizeof(Bits) <= 16 ? 2 * GROUPS : GROUPS;  // of a load
    const int at = (which * 2 + half) * GROUPS + group;
    return ScaleType<S>::number(load_vec<Bits, WIDTH>(reinterpret_cast<const Bits*>(record) + at / WIDTH * WIDTH)
                                    .v[at % WIDTH]);
  }
  static __device__ __forceinline__ float scale(const uint8_t* record, const uint8_t*, int half, int group) {
    return number(record, 0, half, group);
  }
  static __device__ __forceinline__ float second(const uint8_t* record, const uint8_t*, int half, int group) {
    return number(record, 1, half, group);
  }
};

template <typename S, typename Super, Mode MODE_, int GROUPS>
struct StagedScales<SuperScales<S, Super, MODE_, GROUPS>> : StagedScales<Scales<S, MODE_, GROUPS>> {
  using Base = StagedScales<Scales<S, MODE_, GROUPS>>;
  static constexpr int EACH = MODE_ == MINIMUM ? 2 : 1;  // of a row
  static constexpr int SUPER_BYTES = 2 * EACH * sizeof(Super);

  static __device__ __forceinline__ float super(const uint8_t* above, int half, int which) {
    return to_float(load_vec<Super, 2 * EACH>(reinterpret_cast<const Super*>(above)).v[half * EACH + which]);
  }
  static __device__ __forceinline__ float scale(const uint8_t* record, const uint8_t* above, int half, int group) {
    return Base::number(record, 0, half, group) * super(above, half, 0);
  }
  static __device__ __forceinline__ float second(const uint8_t* record, const uint8_t* above, int half, int group) {
    const float second = Base::number(record, 1, half, group);
    return MODE_ == MINIMUM ? second * super(above, half, 1) : second;
  }
};

// The zero or minimum that makes good that operands are OFFSET larger than the numbers they stand for.
template <Mode MODE, int OFFSET>
__device__ __forceinline__ float with_offset(float second, float scale) {
  if (OFFSET == 0) return second;
  return MODE == ZERO ? second + OFFSET : fmaf(-OFFSET, scale, second);
}

// The kind of scales that `expand` makes of a kind: float32, with supers multiplied in.
template <typename Kind>
struct Expanded {
  using Type = NoScales;
};
template <typename S, Mode MODE, int GROUPS>
struct Expanded<Scales<S, MODE, GROUPS>> {
  using Type = Scales<float, MODE, GROUPS>;
};
template <typename S, typename Super, Mode MODE, int GROUPS>
struct Expanded<SuperScales<S, Super, MODE, GROUPS>> {
  using Type = Scales<float, MODE, GROUPS>;
};
template <Mode MODE, int GROUPS>
struct Expanded<Scales<float, MODE, GROUPS>> {
  using Type = NoScales;  // they are it already
};

// One record and what is above it as an expanded record.
template <typename Kind, int GROUPS, int OFFSET>
__device__ __forceinline__ void expand(const uint8_t* record, const uint8_t* above, uint8_t* to) {
  constexpr int COUNT = (Kind::MODE == PLAIN ? 2 : 4) * GROUPS;
  float numbers[COUNT];  // all before a store, of which the compiler cannot know that it leaves the record alone
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int half = i / GROUPS % 2, group = i % GROUPS;
    numbers[i] = i < 2 * GROUPS ? Kind::scale(record, above, half, group)
                                : with_offset<Kind::MODE, OFFSET>(Kind::second(record, above, half, group),
                                                                  numbers[i % (2 * GROUPS)]);
  }
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    const Vec<float, 4> four = {{numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]}};
    store_vec(reinterpret_cast<float*>(to) + i, four);
  }
}

#endif  // CUPYATTN_STAGED_SCALES_CUH
