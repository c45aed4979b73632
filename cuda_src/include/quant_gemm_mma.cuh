// SPDX-License-Identifier: Apache-2.0
// quant_gemm_mma.cuh - the tensor-core version of quant_gemm.cu, which includes it after its constants.
//
//   The weights are the 16-row operand of mma.m16n8k16, tokens its 8 columns: even one token keeps the tensor cores
//   fed by one 16-byte load per lane. Weights enter as their integer codes; a group's float32 accumulators take
//   scale * codes.x + minimum * sum(x) once, so that no weight is ever rounded.
//
//   1. Each warp loads its tiles of a slice (MAX_SLICE_TILES columns of tiles, dealt out to the warps in turn) into
//      registers and the block the next slice's towards L2, then it stages its M_TILE rows of x as B fragments.
//   2. Products, group by group; sums of x by a second mma, against ones.
//   3. Sums of the warps in order; bias and store.
//
//   A token is a column of its own: its bits do not depend on M or M_TILE.
//
// launch     grid (row_tiles, ceil_div(tokens, M_TILE)), block (32 * WARPS); ROW_TILES is 1
//            dynamic shared memory M_TILE * MAX_SLICE_TILES * 128 bytes
#ifndef CUPYATTN_QUANT_GEMM_MMA_CUH
#define CUPYATTN_QUANT_GEMM_MMA_CUH

#include "mma.cuh"

constexpr int TOKEN_TILES = M_TILE / 8;  // columns of an mma
constexpr int MAX_SLICE_TILES = 16;      // column tiles staged at once; the same for every M_TILE
constexpr int TILES_PER_WARP = MAX_SLICE_TILES / WARPS;
static_assert(sizeof(T) == 2 && M_TILE % 8 == 0 && ROW_TILES == 1, "quant_gemm_mma: 16-bit x, 8 tokens per mma");
static_assert(VEC <= 2 && WARPS <= 2 * MAX_SLICE_TILES, "quant_gemm_mma: x is read in pairs, sums fit in its place");

// Columns of x from column tile `tile` on, as B fragments: fragments[group of 32 columns][token tile][lane] holds the
// words b0, b1 of the group's first step, then of its second; zero past the last row and column.
__device__ __forceinline__ void stage_fragments(const QuantGemmArgs& args, int token, int tile, int groups,
                                                uint4* fragments) {
  const int lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < groups; group += WARPS) {
    const int column = tile * TILE_COLUMNS + group * 32 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
      const int m = token + j * 8 + lane / 4;
      const T* x = static_cast<const T*>(args.x.data) + m * args.x.stride_row + column;
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (m >= args.tokens || column + 8 * i >= args.columns) continue;  // columns is a multiple of 8
        Vec<T, 2> pair;
#pragma unroll
        for (int v = 0; v < 2; v += VEC) {
          const Vec<T, VEC> part = load_vec<T, VEC>(x + 8 * i + v);
#pragma unroll
          for (int n = 0; n < VEC; ++n) pair.v[v + n] = part.v[n];
        }
        words[i] = reinterpret_cast<const uint32_t&>(pair);
      }
      fragments[(group * TOKEN_TILES + j) * 32 + lane] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// Adds the products of one group (half a tile) to `total`.
__device__ __forceinline__ void multiply_group(const LaneTile<Format>& tile, int half_tile, const uint4* fragments,
                                               float (&total)[TOKEN_TILES][4]) {
  const Vec<T, 2> pair_of_ones = {{from_float<T>(1.0f), from_float<T>(1.0f)}};
  const uint32_t one = reinterpret_cast<const uint32_t&>(pair_of_ones), ones[4] = {one, one, one, one};
  uint32_t a[2][4];
#pragma unroll
  for (int step = 0; step < 2; ++step) Format::template fragment<T>(tile.chunks, 2 * half_tile + step, a[step]);
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; ++j) {
    const uint4 x = fragments[j * 32 + threadIdx.x % 32];
    const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
    float codes[4] = {}, x_sums[4] = {};  // [row r, token 2c], [r, 2c + 1], [r + 8, 2c], [r + 8, 2c + 1]
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      mma_m16n8k16<T>(codes, a[step], b[step]);
      if constexpr (Format::SCALES == 8) mma_m16n8k16<T>(x_sums, ones, b[step]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = Format::SCALES > 0 ? to_float(tile.scales.v[i / 2 * 2 + half_tile]) : 1.0f;
      total[j][i] = fmaf(scale, codes[i], total[j][i]);
      if constexpr (Format::SCALES == 8) {
        total[j][i] = fmaf(to_float(tile.scales.v[4 + i / 2 * 2 + half_tile]), x_sums[i], total[j][i]);
      }
    }
  }
}

__device__ __forceinline__ void multiply_on_tensor_cores(const QuantGemmArgs& args) {
  CA_DYN_SMEM(uint4, fragments);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token = blockIdx.y * M_TILE;
  float total[TOKEN_TILES][4] = {};
  for (int slice = 0; slice < args.column_tiles; slice += MAX_SLICE_TILES) {
    // 1. weights into registers, x into shared memory
    const int tiles = min(MAX_SLICE_TILES, args.column_tiles - slice);
    LaneTile<Format> own[TILES_PER_WARP];
#pragma unroll
    for (int i = 0; i < TILES_PER_WARP; ++i) {
      const int t = warp + i * WARPS;
      if (t < tiles) own[i].load(tile_at(args, blockIdx.x, slice + t), lane);
    }
    const int next = slice + MAX_SLICE_TILES;
    if (next < args.column_tiles) {
      prefetch_lines(tile_at(args, blockIdx.x, next),
                     min(MAX_SLICE_TILES, args.column_tiles - next) * LaneTile<Format>::TILE_BYTES);
    }
    if (slice > 0) __syncthreads();
    stage_fragments(args, token, slice, 2 * tiles, fragments);
    __syncthreads();

    // 2. products
#pragma unroll
    for (int i = 0; i < TILES_PER_WARP; ++i) {
      const int t = warp + i * WARPS;
      if (t < tiles) {
        multiply_group(own[i], 0, fragments + (2 * t) * TOKEN_TILES * 32, total);
        multiply_group(own[i], 1, fragments + (2 * t + 1) * TOKEN_TILES * 32, total);
      }
    }
  }

  // 3. sums over the warps, rows fastest
  float* partial = reinterpret_cast<float*>(fragments);  // [warp][token tile][d index][lane], where x was
  __syncthreads();
#pragma unroll
  for (int j = 0; j < TOKEN_TILES * 4; ++j) {
    partial[(warp * TOKEN_TILES * 4 + j) * 32 + lane] = total[j / 4][j % 4];
  }
  __syncthreads();
  for (int item = threadIdx.x; item < TILE_ROWS * M_TILE; item += 32 * WARPS) {
    const int row = item % TILE_ROWS, m = item / TILE_ROWS;
    const int j = m / 8 * 4 + row / 8 * 2 + m % 2, from = row % 8 * 4 + m % 8 / 2;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += partial[(w * TOKEN_TILES * 4 + j) * 32 + from];
    store_sum(args, token + m, blockIdx.x * TILE_ROWS + row, sum);
  }
}

#endif  // CUPYATTN_QUANT_GEMM_MMA_CUH
