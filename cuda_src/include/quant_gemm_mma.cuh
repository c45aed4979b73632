// SPDX-License-Identifier: Apache-2.0
// quant_gemm_mma.cuh - the tensor-core version of quant_gemm.cu, which includes it after its constants.
//
//   The weights are the 16-row operand of mma.m16n8k16, tokens its 8 columns: even one token keeps the tensor cores
//   fed by one 16-byte load per lane. Weights enter as their integer codes; a group's float32 accumulators take
//   scale * codes.x + minimum * sum(x) once, so that no weight is ever rounded.
//
//   1. Each warp loads its tiles of a slice (MAX_SLICE_TILES columns of tiles, dealt out to the warps in turn) into
//      registers, while the block stages its M_TILE rows of x as B fragments, and their sums over each group.
//   2. Products, group by group.
//   3. Sums of the warps in order; bias and store.
//
//   A token is a column of its own: its bits do not depend on M or M_TILE.
//
// launch     grid (row_tiles, ceil_div(tokens, M_TILE)), block (32 * WARPS); ROW_TILES is 1
//            dynamic shared memory M_TILE * (MAX_SLICE_TILES * 136 + WARPS * 64) bytes
#ifndef CUPYATTN_QUANT_GEMM_MMA_CUH
#define CUPYATTN_QUANT_GEMM_MMA_CUH

#include "mma.cuh"

constexpr int TOKEN_TILES = M_TILE / 8;  // columns of an mma
constexpr int MAX_SLICE_TILES = 16;      // column tiles staged at once; the same for every M_TILE
constexpr int TILES_PER_WARP = MAX_SLICE_TILES / WARPS;
static_assert(sizeof(T) == 2 && M_TILE % 8 == 0 && ROW_TILES == 1, "quant_gemm_mma: 16-bit x, 8 tokens per mma");

struct Staged {
  uint4* fragments;  // [group][token tile][lane]: words b0, b1 of the group's first step, then of its second
  float* sums;       // [group][token] of x
  float* partial;    // [warp][token tile][d index][lane]
};

// Groups of 32 columns of x from column tile `tile` on; zero past the last row and column.
__device__ __forceinline__ void stage_fragments(const QuantGemmArgs& args, int token, int tile, int groups,
                                                const Staged& staged) {
  for (int item = threadIdx.x; item < M_TILE * groups; item += 32 * WARPS) {
    const int m = item / groups, group = item % groups;
    const int column = tile * TILE_COLUMNS + group * 32;
    const T* x = static_cast<const T*>(args.x.data) + (token + m) * args.x.stride_row + column;
    alignas(16) T values[32];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i += 8) {
      const bool inside = token + m < args.tokens && column + i < args.columns;  // columns is a multiple of 8
#pragma unroll
      for (int j = i; j < i + 8; j += VEC) {
        Vec<T, VEC> part = {};
        if (inside) part = load_vec<T, VEC>(x + j);
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          values[j + v] = part.v[v];
          sum += to_float(part.v[v]);
        }
      }
    }
    uint32_t words[16];  // pairs of neighbouring columns
#pragma unroll
    for (int i = 0; i < 16; ++i) words[i] = reinterpret_cast<const uint32_t*>(values)[i];
    uint4* to = staged.fragments + ((group * TOKEN_TILES + m / 8) * 32 + m % 8 * 4);
#pragma unroll
    for (int c = 0; c < 4; ++c) to[c] = make_uint4(words[c], words[c + 4], words[c + 8], words[c + 12]);
    staged.sums[group * M_TILE + m] = sum;
  }
}

// Adds the products of one group of a lane's tile to `total`.
__device__ __forceinline__ void multiply_group(const LaneTile<Format>& tile, int half_tile, const Staged& staged,
                                               int group, float (&total)[TOKEN_TILES][4]) {
  const int lane = threadIdx.x % 32;
  float sums[TOKEN_TILES][4] = {};
  uint32_t a[2][4];
#pragma unroll
  for (int step = 0; step < 2; ++step) Format::template fragment<T>(tile.chunks, 2 * half_tile + step, a[step]);
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; ++j) {
    const uint4 x = staged.fragments[(group * TOKEN_TILES + j) * 32 + lane];
    const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
    mma_m16n8k16<T>(sums[j], a[0], b[0]);
    mma_m16n8k16<T>(sums[j], a[1], b[1]);
  }
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // row r + 8 * (i / 2), token 2c + i % 2
      const float scale = Format::SCALES > 0 ? to_float(tile.scales.v[i / 2 * 2 + half_tile]) : 1.0f;
      total[j][i] = fmaf(scale, sums[j][i], total[j][i]);
      if constexpr (Format::SCALES == 8) {
        const float minimum = to_float(tile.scales.v[4 + i / 2 * 2 + half_tile]);
        const float x_sum = staged.sums[group * M_TILE + j * 8 + lane % 4 * 2 + i % 2];
        total[j][i] = fmaf(minimum, x_sum, total[j][i]);
      }
    }
  }
}

__device__ __forceinline__ void multiply_on_tensor_cores(const QuantGemmArgs& args) {
  CA_DYN_SMEM(uint4, shared);
  Staged staged;
  staged.fragments = shared;
  staged.sums = reinterpret_cast<float*>(shared + MAX_SLICE_TILES * 2 * TOKEN_TILES * 32);
  staged.partial = staged.sums + MAX_SLICE_TILES * 2 * M_TILE;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token = blockIdx.y * M_TILE;
  const uint8_t* packed = args.packed + blockIdx.x * int64_t{args.column_tiles} * LaneTile<Format>::TILE_BYTES;

  prefetch_lines(packed, args.column_tiles * LaneTile<Format>::TILE_BYTES);
  float total[TOKEN_TILES][4] = {};
  for (int slice = 0; slice < args.column_tiles; slice += MAX_SLICE_TILES) {
    // 1. weights into registers, x into shared memory
    const int tiles = min(MAX_SLICE_TILES, args.column_tiles - slice);
    LaneTile<Format> own[TILES_PER_WARP];
#pragma unroll
    for (int i = 0; i < TILES_PER_WARP; ++i) {
      const int t = warp + i * WARPS;
      if (t < tiles) own[i].load(packed + (slice + t) * int64_t{LaneTile<Format>::TILE_BYTES}, lane);
    }
    if (slice > 0) __syncthreads();
    stage_fragments(args, token, slice, 2 * tiles, staged);
    __syncthreads();

    // 2. products
#pragma unroll
    for (int i = 0; i < TILES_PER_WARP; ++i) {
      const int t = warp + i * WARPS;
      if (t < tiles) {
        multiply_group(own[i], 0, staged, 2 * t, total);
        multiply_group(own[i], 1, staged, 2 * t + 1, total);
      }
    }
  }

  // 3. sums over the warps, rows fastest
#pragma unroll
  for (int j = 0; j < TOKEN_TILES * 4; ++j) {
    staged.partial[(warp * TOKEN_TILES * 4 + j) * 32 + lane] = total[j / 4][j % 4];
  }
  __syncthreads();
  for (int item = threadIdx.x; item < TILE_ROWS * M_TILE; item += 32 * WARPS) {
    const int row = item % TILE_ROWS, m = item / TILE_ROWS;
    const int j = m / 8 * 4 + row / 8 * 2 + m % 2, from = row % 8 * 4 + m % 8 / 2;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += staged.partial[(w * TOKEN_TILES * 4 + j) * 32 + from];
    store_sum(args, token + m, blockIdx.x * TILE_ROWS + row, sum);
  }
}

#endif  // CUPYATTN_QUANT_GEMM_MMA_CUH
