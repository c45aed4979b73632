// SPDX-License-Identifier: Apache-2.0
// quant_gemm.cu - activations times packed weights: here on CUDA cores for any element type, on tensor cores for half
// and bfloat16 in quant_gemm_mma.cuh.
//
//   out[m,n] = sum_k x[m,k] * W[n,k] + bias[n] (+ out[m,n] when args.accumulate)
//   W comes in the packed layout of dequant.cuh. Weights, products and sums are float32; one rounding on store.
//
//   1. The block stages MAX_SLICE_TILES * 64 columns of its M_TILE rows of x as float32, each lane's run contiguous.
//   2. A warp walks the tiles of a row of tiles with stride WARPS; a lane dequantizes its two runs once and
//      multiplies them with all M_TILE rows of x.
//   3. Sums of the four lanes of a row, then of the warps in order; bias and store.
//
//   The order of all additions depends on K and WARPS alone: a row of out has the same bits whatever M and M_TILE.
//   A weight of several segments takes a launch each, a piece each: partials [pieces - 1, gridDim.y * M_TILE, rows]
//   keeps the sums of all but the last, which adds them in order.
//   EXPERTS: rows of x belong to experts, offsets[e] to offsets[e + 1] to expert e, each with a weight of its own; a
//   block finds its expert and rows (experts.cuh).
//
// launch     quant_gemm: grid (ceil_div(row_tiles, ROW_TILES), ceil_div(tokens, M_TILE)), block (32 * WARPS)
//            dynamic shared memory 4 * M_TILE * 64 * MAX_SLICE_TILES bytes
//            with EXPERTS gridDim.y of all launches together is at least the tiles of all experts:
//            ceil_div(tokens + e * (M_TILE - 1), M_TILE) for e = min(experts, tokens)
//            gather_columns: grid (tokens, any), block (any); no shared memory
// aliasing   none
// traffic    packed bytes once per M_TILE rows of x
#include "prelude.cuh"
#include "params.h"
#include "dequant.cuh"
#include "warp.cuh"
#include "experts.cuh"

using T = CA_T;            // x
using U = CA_U;            // out
using B = CA_B;            // bias
using Format = CA_FORMAT;  // of dequant.cuh
constexpr int M_TILE = CA_M_TILE;        // rows of x per block
constexpr int ROW_TILES = CA_ROW_TILES;  // rows of tiles per block
constexpr int WARPS = CA_WARPS;          // share the columns of a row of tiles
constexpr int VEC = CA_VEC;              // elements per load of x; divides every row stride (tensor cores copy 16 bytes)
constexpr bool EXPERTS = CA_EXPERTS;     // rows of x have different weights
static_assert(sizeof(QuantGemmArgs) == CA_SIZEOF_ARGS, "quant_gemm: Python and CUDA disagree on QuantGemmArgs");

__device__ __forceinline__ void store_sum(const QuantGemmArgs& args, int token, int row, float sum) {
  if (token >= args.tokens || row >= args.rows) return;
  if (args.bias) sum += to_float(static_cast<const B*>(args.bias)[row * args.stride_bias]);
  U* out = static_cast<U*>(args.out.data) + token * args.out.stride_row + row;
  if (args.accumulate) sum += to_float(*out);
  *out = from_float<U>(sum);
}

// x in the order of a weight's columns: out[m,k] = x[m,order[k]]; without an order a copy whose rows are aligned.
CA_KERNEL __launch_bounds__(256) void gather_columns(const __grid_constant__ QuantGemmArgs args) {
  const int64_t token = blockIdx.x;
  const T* x = static_cast<const T*>(args.x.data) + token * args.x.stride_row;
  T* out = static_cast<T*>(args.out.data) + token * args.out.stride_row;
  for (int k = blockIdx.y * blockDim.x + threadIdx.x; k < args.columns; k += gridDim.y * blockDim.x) {
    const int from = args.order ? args.order[k] : k;
    out[k] = from < 0 ? from_float<T>(0.0f) : x[from];
  }
}

#if CA_TENSOR_CORES
#include "quant_gemm_mma.cuh"

CA_KERNEL __launch_bounds__(32 * WARPS, 2) void quant_gemm_mma(const __grid_constant__ QuantGemmArgs args) {
  if constexpr (EXPERTS) {
    const ExpertTile at = expert_tile<M_TILE>(args.experts, args.tokens);
    if (at.expert >= 0) multiply_on_tensor_cores(expert_call<B>(args, at), at.token);
  } else {
    multiply_on_tensor_cores(args, blockIdx.y * M_TILE);
  }
}
#else

constexpr int MAX_SLICE_TILES = 24;  // column tiles staged at once; the same for every M_TILE
constexpr int SUMS = ROW_TILES * M_TILE * 2;
// Rows of tiles asked for at a time, while those before them are worked on. All of a few; only the host's blocks have
// more, whose lanes run one after another: they meet that often, so that the next lane finds the rows in a near cache.
constexpr int AHEAD = ROW_TILES > 8 ? 4 : ROW_TILES;

// The sum of a segment for row `first` + m of x; the last one's finishes the output.
__device__ __forceinline__ void store_piece(const QuantGemmArgs& args, int first, int m, int row, float sum) {
  const int token = first + m;
  if (args.pieces > 1 && token < args.tokens && row < args.rows) {
    const int64_t size = int64_t{gridDim.y} * M_TILE * args.rows;
    float* partial = args.partials + (int64_t{blockIdx.y} * M_TILE + m) * args.rows + row;
    if (args.first_piece < args.pieces - 1) {
      partial[args.first_piece * size] = sum;
      return;
    }
    float before = partial[0];
    for (int piece = 1; piece < args.pieces - 1; ++piece) before += partial[piece * size];
    sum = before + sum;
  }
  store_sum(args, token, row, sum);
}

// Columns [64 * tile, 64 * (tile + tiles)) of x as float32, runs of lane column c at staged[m][tile][16c]; zero past
// the last row and column. Reading a run is a 2-way bank conflict (four 64-byte rows), hidden behind the dequantizing.
__device__ __forceinline__ void stage_x(const QuantGemmArgs& args, int token, int tile, int tiles, float* staged) {
  for (int item = threadIdx.x; item < M_TILE * tiles * 4; item += 32 * WARPS) {
    const int m = item / (tiles * 4), step = item % (tiles * 4);
    const int column = tile * TILE_COLUMNS + step * 16;
    const T* x = static_cast<const T*>(args.x.data) + (token + m) * args.x.stride_row + column;
    float values[16];
#pragma unroll
    for (int i = 0; i < 16; i += 8) {
      const bool inside = token + m < args.tokens && column + i < args.columns;  // columns is a multiple of 8
#pragma unroll
      for (int j = i; j < i + 8; j += VEC) {
        Vec<T, VEC> part = {};
        if (inside) part = load_vec<T, VEC>(x + j);
        float wide[VEC];
        to_float(part, wide);
#pragma unroll
        for (int v = 0; v < VEC; ++v) values[j + v] = wide[v];
      }
    }
    float* to = staged + (m * MAX_SLICE_TILES + step / 4) * TILE_COLUMNS + step % 4 * 4;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      store_vec(to + 16 * c, Vec<float, 4>{{values[4 * c], values[4 * c + 2], values[4 * c + 1], values[4 * c + 3]}});
    }
  }
}

// Asks for AHEAD rows of tiles.
__device__ __forceinline__ void prefetch_rows(const QuantGemmArgs& args, int first, int slice, int tiles) {
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) {
    if (first + i >= args.weight.row_tiles) continue;
    prefetch_lines<32 * WARPS>(codes_of<Format>(args.weight, first + i, slice), tiles * Format::TILE_BYTES);
  }
}

__device__ __forceinline__ void multiply(const QuantGemmArgs& args, int token) {
  CA_DYN_SMEM(float, staged);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row_tile = blockIdx.x * ROW_TILES;

  float sums[SUMS] = {};  // [row tile][row of x][row r, row r + 8]
  for (int slice = 0; slice < args.weight.column_tiles; slice += MAX_SLICE_TILES) {
    // 1. stage x while the weights are on their way
    const int tiles = min(MAX_SLICE_TILES, args.weight.column_tiles - slice);
    prefetch_rows(args, first_row_tile, slice, tiles);
    if (slice > 0) __syncthreads();
    stage_x(args, token, slice, tiles, staged);
    __syncthreads();

    // 2. products
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
      if (i % AHEAD == 0) {
        if (i > 0) __syncwarp();
        if (i + AHEAD < ROW_TILES) prefetch_rows(args, first_row_tile + i + AHEAD, slice, tiles);
      }
      if (first_row_tile + i >= args.weight.row_tiles) continue;
      RunSum run_sums[M_TILE][2];
#pragma unroll 2
      for (int t = warp; t < tiles; t += WARPS) {
        LaneTile<Format> tile;
        tile.load(args.weight, first_row_tile + i, slice, t, lane);
        Run weights[2];
        tile.dequantize(weights);
#pragma unroll
        for (int m = 0; m < M_TILE; ++m) {
          const Run x = load_run(staged + (m * MAX_SLICE_TILES + t) * TILE_COLUMNS + lane % 4 * RUN);
          run_sums[m][0].add_product(weights[0], x);
          run_sums[m][1].add_product(weights[1], x);
        }
      }
#pragma unroll
      for (int m = 0; m < M_TILE; ++m) {
        sums[(i * M_TILE + m) * 2] += run_sums[m][0].total();
        sums[(i * M_TILE + m) * 2 + 1] += run_sums[m][1].total();
      }
    }
  }

  // 3. sums over lanes and warps
  group_sum<4>(sums);
  const int row = first_row_tile * TILE_ROWS + lane / 4;
  if constexpr (WARPS == 1) {
#pragma unroll
    for (int j = 0; j < SUMS; ++j) {  // lane 4r + c stores every fourth
      if (j % 4 != lane % 4) continue;
      store_piece(args, token, j / 2 % M_TILE, row + j / (2 * M_TILE) * 16 + j % 2 * 8, sums[j]);
    }
  } else {
    float* partial = staged;  // [warp][sum][r], where x was
    __syncthreads();
#pragma unroll
    for (int j = 0; j < SUMS; ++j) {
      if (j % 4 == lane % 4) partial[(warp * SUMS + j) * 8 + lane / 4] = sums[j];
    }
    __syncthreads();
    for (int item = threadIdx.x; item < SUMS * 8; item += 32 * WARPS) {
      const int j = item / 8;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += partial[(w * SUMS + j) * 8 + item % 8];
      store_piece(args, token, j / 2 % M_TILE,
                  (first_row_tile + j / (2 * M_TILE)) * TILE_ROWS + j % 2 * 8 + item % 8, sum);
    }
  }
}

CA_KERNEL __launch_bounds__(32 * WARPS, M_TILE == 8 && VEC == 1 ? 3 : 4) void quant_gemm(const __grid_constant__ QuantGemmArgs args) {
  if constexpr (EXPERTS) {
    const ExpertTile at = expert_tile<M_TILE>(args.experts, args.tokens);
    if (at.expert < 0) return;
    multiply(expert_call<B>(args, at), at.token);
  } else {
    multiply(args, blockIdx.y * M_TILE);
  }
}

#endif  // CA_TENSOR_CORES
