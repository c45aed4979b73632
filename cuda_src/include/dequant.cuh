// SPDX-License-Identifier: Apache-2.0
// dequant.cuh - reading weights in the packed layout of cupyattn/quant/layout.py, one 16 x 64 tile per warp step.
//
// A format is Weights<Codes, Scales>, Codes from weight_codes.cuh and Scales from weight_scales.cuh. Lane 4r + c gets
// two runs of 16 weights of a tile, of rows r and r + 8: of each step t of 16 columns the columns 4c + 0, 2, 1, 3.
#ifndef CUPYATTN_DEQUANT_CUH
#define CUPYATTN_DEQUANT_CUH

#include "params.h"
#include "prelude.cuh"
#include "runs.cuh"
#include "weight_codes.cuh"
#include "weight_scales.cuh"

template <typename Codes_, typename Scales_>
struct Weights {
  using Codes = Codes_;
  using Scales = Scales_;
  static constexpr int TILE_BYTES = TILE_ROWS * TILE_COLUMNS * Codes::BITS / 8;
};

template <typename Format>
__device__ __forceinline__ const uint8_t* codes_of(const WeightView& weight, int row_tile, int column_tile) {
  return weight.codes + (row_tile * int64_t{weight.column_tiles} + column_tile) * Format::TILE_BYTES;
}

// A lane's share of a tile.
template <typename Format>
struct LaneTile {
  LaneCodes<Format::Codes::BITS> codes;
  typename Format::Scales scales;

  // Column tile first + t, where t is what changes in a loop.
  __device__ __forceinline__ void load(const WeightView& weight, int row_tile, int first, int t, int lane) {
    codes.load(codes_of<Format>(weight, row_tile, first) + t * Format::TILE_BYTES, lane);
    scales.load(weight, row_tile, first, t, lane / 4);
  }
  // The lane's weights of row r (weights[0]) and row r + 8 (weights[1]).
  __device__ __forceinline__ void dequantize(Run (&weights)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) weights[half] = Format::Codes::values(codes.words, half);
    scales.template apply<0>(weights[0]);
    scales.template apply<1>(weights[1]);
  }
};

// A run of lane column c of tile `column_tile` into a row of `size` numbers, VEC (1, 4) at a time: column k goes to
// order[k], nowhere if that is -1, or to k without an order.
template <int VEC, typename U>
__device__ __forceinline__ void store_run(const Run& run, U* row, int column_tile, int c, const int32_t* order,
                                          int size) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int column = column_tile * TILE_COLUMNS + 16 * t + 4 * c;
    const float step[4] = {run.v[4 * t], run.v[4 * t + 2], run.v[4 * t + 1], run.v[4 * t + 3]};
    if (order) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int to = order[column + i];
        if (to >= 0) row[to] = from_float<U>(step[i]);
      }
    } else if (column < size) {  // a multiple of 8
      const Vec<U, 4> values = from_float<U, 4>(step);
#pragma unroll
      for (int i = 0; i < 4; i += VEC) {
        Vec<U, VEC> part;
#pragma unroll
        for (int j = 0; j < VEC; ++j) part.v[j] = values.v[i + j];
        store_vec(row + column + i, part);
      }
    }
  }
}

// Asks the THREADS threads of the block to bring `bytes` bytes from `p` on into the L2 cache.
template <int THREADS>
__device__ __forceinline__ void prefetch_lines(const uint8_t* p, int bytes) {
#if CA_CPU
  const int share = static_cast<int>(static_cast<unsigned>(bytes + 64 * THREADS - 1) / (64 * THREADS)) * 64;
  const uint8_t* end = p + min(bytes, static_cast<int>(threadIdx.x + 1) * share);
  for (const uint8_t* line = p + threadIdx.x * share; line < end; line += 64) __builtin_prefetch(line, 0, 2);
#else
  for (int line = threadIdx.x * 128; line < bytes; line += THREADS * 128) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p + line));
  }
#endif
}

#endif  // CUPYATTN_DEQUANT_CUH
