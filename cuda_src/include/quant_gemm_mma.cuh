// SPDX-License-Identifier: Apache-2.0
// quant_gemm_mma.cuh - the tensor-core kernels of quant_gemm.cu, which includes it after its constants.
//
//   The weights are the 16-row operand of mma.m16n8k16, tokens its 8 columns. Weights enter as their codes' numbers
//   (weight_fragments.cuh); a group's float32 products are scaled once, so that no weight is ever rounded, but NF4
//   where out is no wider than x:
//
//     sum += scale * (products - zero * sum(x))     or     sum += scale * products,  sum += minimum * sum(x)
//
//   sum(x) is a second mma, against ones. A tile is 16 rows x 64 columns, a unit is UNIT tiles of a row of tiles; it
//   shares its scales unless tiles have several groups (GROUPS).
//
//   M_TILE 8: "stream", up to 8 tokens. Eight warps of a block each take one chunk of the piece's columns, of the same
//   ROW_TILES rows of tiles. No barrier until all have finished.
//   M_TILE 16 and more: "pipelined". Each warp takes rows of tiles of its own through all eight chunks; x is shared, so
//   that there is one barrier a tile, and another a unit where sums of x are shared as well.
//
//   1. Codes, scales and x go through rings of STAGES tiles filled by cp.async, 16 bytes a lane: while a tile is worked
//      on, the next STAGES - 1 are on their way. x is zero past its last row and column, and so are tiles past the end.
//   2. Products of a tile, step by step; a group's are scaled and added to the chunk's sums. Records of several groups
//      are made float32 first where streaming, each by one lane, in place of the tile's x (EXPANDS).
//   3. Sums of the eight chunks in order are the piece's. The last block to bring a piece of a tile of out adds the
//      pieces in order; bias and store.
//
//   The order of all additions is that of units in a chunk, chunks in a piece, pieces: a row of out has the same bits
//   whatever M and M_TILE.
//
// legal      T in {__half, __nv_bfloat16}; dense weights of type T; rows of x at multiples of 16 bytes
// launch     grid (ceil_div(rows, tile of out), ceil_div(tokens, M_TILE), pieces of this segment), block (32 * WARPS);
//            a tile of out is ROW_TILES * 16 rows, times WARPS where pipelined; dynamic shared memory SHARED_BYTES,
//            mirrored by cupyattn/matmul/plans.py
// in flight  stream: 16 warps on a multiprocessor, each (STAGES - 1) * ROW_TILES tiles of codes: 64 KiB with 4 bits,
//            never less than 48 KiB, with the scales of groups of 16 and 32 columns, which may be larger than codes.
//            Half of that with one block on a multiprocessor: of 100 KiB of shared memory (sm_86, sm_89, sm_120) most
//            forms take more than 49
#ifndef CUPYATTN_QUANT_GEMM_MMA_CUH
#define CUPYATTN_QUANT_GEMM_MMA_CUH

#include "mma.cuh"
#include "quant_gemm_rings.cuh"

// ---- products --------------------------------------------------------------------------------------------------

typedef float Accumulators[ROW_TILES][TOKEN_TILES][4];  // [..][row r, token 2c | r, 2c + 1 | r + 8, 2c | r + 8, 2c + 1]

// B fragment of step t (16 columns) and 8 tokens; x is the lane's place in the stage.
__device__ __forceinline__ void load_x(const char* x, int t, int token_tile, uint32_t (&b)[2]) {
  const char* own = x + t * M_TILE * 32 + token_tile * 256;
  const Vec<uint32_t, 2> words = load_vec<uint32_t, 2>(reinterpret_cast<const uint32_t*>(own));
  b[0] = words.v[0];
  b[1] = words.v[1];
}

__device__ __forceinline__ void add_sums_of_x(const uint32_t (&b)[2], float (&x_sums)[4]) {
  const Vec<T, 2> pair_of_ones = {{from_float<T>(1.0f), from_float<T>(1.0f)}};
  const uint32_t one = reinterpret_cast<const uint32_t&>(pair_of_ones), ones[4] = {one, one, one, one};
  mma_m16n8k16<T>(x_sums, ones, b);
}

// Sums of x of this lane's two tokens of a token tile, of a group.
struct TokenSums {
  float (&own)[4];  // streaming, from add_sums_of_x
  const char* shared;
  __device__ __forceinline__ Vec<float, 2> of(int group, int token_tile) const {
    if constexpr (STREAM) return {{own[0], own[1]}};
    return load_vec<float, 2>(reinterpret_cast<const float*>(shared) + group * M_TILE + token_tile * 8 +
                              threadIdx.x % 4 * 2);
  }
};

// Adds the scaled products of one group of rows r and r + 8 of a row of tiles.
template <typename S = Read>
__device__ __forceinline__ void add_scaled(const uint8_t* record, const uint8_t* above, int group,
                                           const TokenSums& x_sums, const float (&products)[TOKEN_TILES][4],
                                           float (&sums)[TOKEN_TILES][4]) {
  constexpr int OFFSET = EXPANDS ? 0 : Fragments::OFFSET;  // taken care of where expanded
  float scale[2], second[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    scale[half] = S::scale(record, above, half, group);
    if constexpr (SUMS_OF_X)
      second[half] = with_offset<S::MODE, OFFSET>(S::second(record, above, half, group), scale[half]);
  }
#pragma unroll
  for (int j = 0; j < TOKEN_TILES; ++j) {
    Vec<float, 2> of_x;
    if constexpr (SUMS_OF_X) of_x = x_sums.of(group, j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (S::MODE == ZERO) {
        sums[j][i] = fmaf(scale[i / 2], fmaf(-second[i / 2], of_x.v[i % 2], products[j][i]), sums[j][i]);
      } else {
        sums[j][i] = fmaf(scale[i / 2], products[j][i], sums[j][i]);
        if constexpr (SUMS_OF_X) sums[j][i] = fmaf(second[i / 2], of_x.v[i % 2], sums[j][i]);
      }
    }
  }
}

// A unit's products, until they are scaled.
struct Unit {
  static constexpr int SHARE = STREAM ? 1 : ceil_div(TOKEN_TILES, WARPS);  // token tiles whose x this warp sums
  Accumulators products;
  float x_sums[SHARE][GROUPS][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) clear(products[i]);
#pragma unroll
    for (int i = 0; i < SHARE * GROUPS * 4; ++i) x_sums[i / (GROUPS * 4)][i / 4 % GROUPS][i % 4] = 0.0f;
  }

  // The next tile, at the unit's end with its scales. x_sums_at: shared by the block, where pipelined.
  __device__ __forceinline__ void multiply(const LanePlaces& own, const Fragments& fragments, char* stage, bool at_end,
                                           char* x_sums_at, Accumulators& sums) {
    const char* x = stage + own.x;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(stage);
    if constexpr (SUMS_OF_X && !STREAM) {
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
      for (int n = 0; n < SHARE; ++n) {
        if (warp + n * WARPS >= TOKEN_TILES) continue;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          uint32_t b[2];
          load_x(x, t, warp + n * WARPS, b);
          add_sums_of_x(b, x_sums[n][t * GROUPS / 4]);
        }
        if (!at_end || lane >= 4) continue;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
          store_vec(reinterpret_cast<float*>(x_sums_at) + group * M_TILE + (warp + n * WARPS) * 8 + lane * 2,
                    Vec<float, 2>{{x_sums[n][group][0], x_sums[n][group][1]}});
        }
      }
    }
    uint32_t b[4][TOKEN_TILES][2];
    if constexpr (STREAM) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        load_x(x, t, 0, b[t][0]);
        if constexpr (SUMS_OF_X) add_sums_of_x(b[t][0], x_sums[0][t * GROUPS / 4]);
      }
    }
    if constexpr (EXPANDS) {
      __syncwarp();  // all have read x
      expand<Records, GROUPS, Fragments::OFFSET>(bytes + own.record(), bytes + own.record_above(),
                                                 bytes + own.floats());
      __syncwarp();
    }
    LaneCodes<Format::Codes::BITS> codes[ROW_TILES];
    // rows of tiles side by side, but one after another where their scales are expanded: fewer registers
#pragma unroll
    for (int n = 0; n < 4 * ROW_TILES; ++n) {
      const int t = EXPANDS ? n % 4 : n / ROW_TILES, i = EXPANDS ? n / 4 : n % ROW_TILES;
      const int group = t * GROUPS / 4;
      if (t == 0) codes[i].load(bytes + own.weights + i * TILE_BYTES, own.lane);
      if constexpr (!STREAM) {
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j)
          if (i == 0) load_x(x, t, j, b[t][j]);
      }
      if (GROUPS > 1 && t % (4 / GROUPS) == 0) clear(products[i]);
      uint32_t a[Fragments::PARTS][4];
      fragments.make(codes[i].words, t, a);
#pragma unroll
      for (int part = 0; part < Fragments::PARTS; ++part)
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j) mma_m16n8k16<T>(SCALED ? products[i][j] : sums[i][j], a[part], b[t][j]);
      if constexpr (SCALED) {
        if (!at_end || (t + 1) % (4 / GROUPS) != 0) continue;
        if (SUMS_OF_X && !STREAM && group == 0 && i == 0) __syncthreads();  // x_sums_at
        add_scaled(bytes + own.read + i * 8 * Read::BYTES, bytes + own.above + i * 8 * Read::SUPER_BYTES, group,
                   TokenSums{x_sums[0][group], x_sums_at}, products[i], sums[i]);
      }
    }
  }

 private:
  static __device__ __forceinline__ void clear(float (&row)[TOKEN_TILES][4]) {
#pragma unroll
    for (int i = 0; i < TOKEN_TILES * 4; ++i) row[i / 4][i % 4] = 0.0f;
  }
};

// ---- sums ------------------------------------------------------------------------------------------------------

// a + b: not part of a multiply-add where b is a product, and not in another order with other additions.
__device__ __forceinline__ float plus(float a, float b) {
#if CA_CPU
  __asm__("" : "+m"(b));
  float sum = a + b;
  __asm__("" : "+m"(sum));
  return sum;
#else
  return __fadd_rn(a, b);
#endif
}

__device__ __forceinline__ float& sum_of(Accumulators& sums, int i) {
  return sums[i / (TOKEN_TILES * 4)][i / 4 % TOKEN_TILES][i % 4];
}

// Adds a chunk's sums to this lane's share of float [SUMS][32] and starts the next.
__device__ __forceinline__ void close_chunk(Accumulators& sums, float* total) {
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    float& own = total[i * 32 + threadIdx.x % 32];
    own = plus(own, sum_of(sums, i) * Fragments::FACTOR);
    sum_of(sums, i) = 0.0f;
  }
}

// Number `item` of a tile of out is sum i = item / 32 % SUMS of lane item % 32 of warp item / 32 / SUMS; streams share
// their rows.
__device__ __forceinline__ void store_item(const QuantGemmArgs& args, int first_token, int item, float sum) {
  const int lane = item % 32, i = item / 32 % SUMS, warp = item / (32 * SUMS);
  const int row_tile = (blockIdx.x * (STREAM ? 1 : WARPS) + warp) * ROW_TILES + i / (TOKEN_TILES * 4);
  const int token = first_token + i / 4 % TOKEN_TILES * 8 + lane % 4 * 2 + i % 2;
  store_sum(args, token, row_tile * TILE_ROWS + i % 4 / 2 * 8 + lane / 4, sum);
}

// From sums in shared memory to out. All threads take part; the sums have been written and the flag's place is free.
__device__ __forceinline__ void finish(const QuantGemmArgs& args, int token, const float* sums, int* flag) {
  constexpr int ITEMS = (STREAM ? 1 : WARPS) * SUMS * 32;
  const int tile = blockIdx.y * gridDim.x + blockIdx.x, piece = args.first_piece + blockIdx.z;
  float* partials = args.partials + int64_t{tile} * args.pieces * ITEMS;
  for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
    float sum = sums[item];
    if constexpr (STREAM) {
      sum = plus(0.0f, sum);  // as where pipelined
#pragma unroll
      for (int chunk = 1; chunk < CHUNKS; ++chunk) sum = plus(sum, sums[chunk * ITEMS + item]);
    }
    if (args.pieces == 1) store_item(args, token, item, sum);
    else partials[int64_t{piece} * ITEMS + item] = sum;
  }
  if (args.pieces == 1) return;
  __threadfence();  // what this thread stored is visible before the block is counted
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = atomicAdd(args.counters + tile, 1) + 1 == args.pieces;
    if (last) args.counters[tile] = 0;
    *flag = last;
  }
  __threadfence();  // what the others stored is visible from here on
  __syncthreads();
  if (*flag == 0) return;
  for (int item = threadIdx.x; item < ITEMS; item += THREADS) {
    float sum = partials[item];
    for (int p = 1; p < args.pieces; ++p) sum = plus(sum, partials[int64_t{p} * ITEMS + item]);
    store_item(args, token, item, sum);
  }
}

__device__ __forceinline__ void multiply_on_tensor_cores(const QuantGemmArgs& args, int token) {
  CA_DYN_SMEM(char, smem);
  const int warp = threadIdx.x / 32;
  const int row_tile = (STREAM ? blockIdx.x : blockIdx.x * WARPS + warp) * ROW_TILES;
  const int tiles_per_chunk = args.units_per_chunk * UNIT;
  TileRange range;  // of the piece, and of the warp's chunk where streaming
  range.begin = blockIdx.z * args.tiles_per_piece;
  range.end = min(range.begin + args.tiles_per_piece, args.weight.column_tiles);
  if constexpr (STREAM) {
    range.begin = min(range.begin + warp * tiles_per_chunk, range.end);
    range.end = min(range.begin + tiles_per_chunk, range.end);
  }
  const int last = kept(range.end);
  float* total = reinterpret_cast<float*>(smem + SUMS_AT) + warp * SUMS * 32;

  // 1. start copying
  TileAhead ahead(args, row_tile, token, range);
  const LanePlaces own(STREAM ? warp * STAGES * STAGE_BYTES : 0);
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) ahead.copy(own, smem + s * STAGE_BYTES, s % UNIT == UNIT - 1);
  const Fragments fragments;
  Accumulators sums;
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    sum_of(sums, i) = 0.0f;
    if constexpr (!STREAM) total[i * 32 + threadIdx.x % 32] = 0.0f;
  }

  // 2. a unit per step
  int stage = 0, free_stage = (STAGES - 1) * STAGE_BYTES, units_left = args.units_per_chunk;
  constexpr int TRIP = STREAM && GROUPS == 1 ? 2 : UNIT;  // tiles; those past the end are zeros
  for (int tile = range.begin; tile < last; tile += TRIP) {
    Unit unit;
#pragma unroll
    for (int u = 0; u < TRIP; ++u) {
      if (u % UNIT == 0) unit.clear();
      cp_async_wait<STAGES - 2>();
      // the tile is there for all that read it, and nobody still reads the one before
      if constexpr (STREAM) __syncwarp();
      else __syncthreads();
      ahead.copy(own, smem + free_stage, (u + STAGES - 1) % UNIT == UNIT - 1);
      unit.multiply(own, fragments, smem + stage, u % UNIT == UNIT - 1, smem + X_SUMS_AT, sums);
      free_stage = stage;
      stage = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
    }
    if constexpr (!STREAM) {
      if (--units_left > 0) continue;
      units_left = args.units_per_chunk;
      close_chunk(sums, total);
    }
  }

  // 3. sums of chunks and pieces
  cp_async_wait<0>();
  if constexpr (STREAM) {
    __syncthreads();  // no ring is read any more
#pragma unroll
    for (int i = 0; i < SUMS; ++i) total[i * 32 + threadIdx.x % 32] = sum_of(sums, i) * Fragments::FACTOR;
  } else {
    close_chunk(sums, total);
  }
  __syncthreads();
  finish(args, token, reinterpret_cast<const float*>(smem + SUMS_AT),
         reinterpret_cast<int*>(smem + (STREAM ? CHUNKS * SUMS * 128 : 0)));
}

#endif  // CUPYATTN_QUANT_GEMM_MMA_CUH
