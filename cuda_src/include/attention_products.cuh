// SPDX-License-Identifier: Apache-2.0
// attention_products.cuh - queries as A operands, Q.K^T and P.V of a tile by mma.m16n8k16, and the way from a lane's
// sums to rows in shared memory. Included by the tensor-core kernels after their constants, of which it uses T, KF, VF,
// ROWS, HEAD_DIM, BIAS and STEP. A warp works on 16 * M_TILES rows: on the same ones as the others when ROWS is 16,
// else on its own. What it reads of keys and values, and converts, serves M_TILES products.
//
// In a tile of scores lane (g, t) = (lane / 4, lane % 4) holds its rows g + 8i, i < 2 * M_TILES, against tokens 8n + 2t
// and 8n + 2t + 1: scores[n][2i] and scores[n][2i + 1]. Numbers 4m to 4m + 3 are the accumulator of m-tile m.
#ifndef CUPYATTN_ATTENTION_PRODUCTS_CUH
#define CUPYATTN_ATTENTION_PRODUCTS_CUH

#include "attention_store.cuh"
#include "attention_work.cuh"
#include "hadamard.cuh"
#include "kv_fragments.cuh"
#include "mma.cuh"
#include "warp.cuh"

using KTile = KvTile<KF, HEAD_DIM>;
using VTile = KvTile<VF, HEAD_DIM>;
using KOperand = typename KTile::Operand;
using VOperand = typename VTile::Operand;

constexpr int K_STEPS = HEAD_DIM / 16;
constexpr int COLUMNS = HEAD_DIM / 8;  // n-tiles of the sums
constexpr int OUT_STRIDE = HEAD_DIM + (VTile::E == 2 ? 8 : VTile::E == 4 ? 16 : 4);  // floats, against conflicts
// Whether registers suffice for two m16 tiles a warp: biases and scales of tokens take some as well.
constexpr bool GROUP_SCALE = KTile::GROUP_SCALE || VTile::GROUP_SCALE;
constexpr bool ANY_SCALE = KTile::SCALE_BYTES + VTile::SCALE_BYTES > 0;
constexpr bool TWO_TILES = !BIAS && (HEAD_DIM == 64 || (HEAD_DIM == 128 && !ANY_SCALE));
constexpr int M_TILES = ROWS == 128 && TWO_TILES ? 2 : 1;
constexpr int WARP_ROWS = 16 * M_TILES;
constexpr int LANE_ROWS = 2 * M_TILES;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256, "attention_products: HEAD_DIM");
static_assert(sizeof(T) == 2 && ROWS % WARP_ROWS == 0, "attention_products: 16-bit queries, whole m-tiles");

// First of the warp's rows, and row i of the lane.
__device__ __forceinline__ int warp_row() { return ROWS > 16 ? threadIdx.x / 32 * WARP_ROWS : 0; }
__device__ __forceinline__ int lane_row(int i) { return warp_row() + threadIdx.x % 32 / 4 + 8 * i; }

// What is of m-tile m among a lane's registers.
template <typename E, int N>
__device__ __forceinline__ E (&of_tile(E (&x)[N], int m))[4] {
  static_assert(N == 4 * M_TILES, "of_tile: four registers a tile");
  return reinterpret_cast<E (&)[4]>(x[4 * m]);
}

// ---- queries -------------------------------------------------------------------------------------------

// Address of 16-byte piece `piece` of row r of the staged queries.
__device__ __forceinline__ char* query_piece(char* queries, int r, int piece) {
  return queries + r * (HEAD_DIM * 2) + (piece ^ (r & 7)) * 16;
}

// Block of THREADS: the item's queries as K's format wants them, zeros past num_rows and head_dim. factors[r] times a
// staged row is the row, a power of two; factors[ROWS + r] is the sum of the staged row, where K's format has scales
// per token. Of plain keys there are no factors.
template <int THREADS>
__device__ __forceinline__ void stage_queries(const AttentionArgs& args, const RowTile& rows, char* queries,
                                              float* factors) {
  constexpr int LANES = HEAD_DIM / STEP;  // of a row
#pragma unroll 2
  for (int first = 0; first < ROWS * LANES; first += THREADS) {
    const int r = (first + threadIdx.x) / LANES, dim = (first + threadIdx.x) % LANES * STEP;
    EightFloats q = EightFloats::all(0.0f);
    if (r < rows.num_rows && dim < args.head_dim) {
      const T* from = static_cast<const T*>(query_pointer(args.q, args, rows.row(args, r), sizeof(T))) + dim;
      const bool aligned = reinterpret_cast<uint64_t>(from) % 16 == 0;
      q = EightFloats::from(aligned ? load_step<true>(from) : load_step<false>(from));
      if constexpr (KF::CHANNEL) {
        EightFloats scaled = EightFloats::all(0.0f);
        scaled.add_product(q, channel_scales(args.k_scale, rows.item.kv_head, dim));
        q = scaled;
      }
    }
    if constexpr (KF::ROTATED) hadamard32(q);
    if constexpr (KTile::E > 2) {
      float largest = 0.0f;
#pragma unroll
      for (int j = 0; j < STEP; ++j) largest = fmaxf(largest, fabsf(q.x[j]));
      const uint32_t exponent = min(max(__float_as_uint(group_max<LANES>(largest)) >> 23, 1u), 253u);
      q *= __uint_as_float((254u - exponent) << 23);  // so that half holds the row
      if (dim == 0) factors[r] = __uint_as_float(exponent << 23);
    }
    const Vec<KOperand, STEP> rounded = q.to<KOperand>();
    if constexpr (KTile::TOKEN_SCALE) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < STEP; ++j) sum = __fadd_rn(sum, to_float(rounded.v[j]));
      sum = group_sum<LANES>(sum);
      if (dim == 0) factors[ROWS + r] = sum;
    }
    if constexpr (KTile::E == 2) {
      store_vec(reinterpret_cast<KOperand*>(query_piece(queries, r, dim / 8)), rounded);
    } else {
#pragma unroll
      for (int j = 0; j < STEP; j += 2) {
        const int slot = query_slot<KF>(dim + j);
        store_vec(reinterpret_cast<KOperand*>(query_piece(queries, r, slot / 8)) + slot % 8,
                  Vec<KOperand, 2>{{rounded.v[j], rounded.v[j + 1]}});
      }
    }
  }
}

// A fragments of the warp's staged queries: of the first HELD k-steps in registers, the others read again every time.
template <bool IN_SHARED, int HELD = IN_SHARED ? 0 : K_STEPS>
struct Queries {
  uint32_t held[HELD + 1][4 * M_TILES];
  char* staged;

  __device__ __forceinline__ explicit Queries(char* queries) : staged(queries) {
#pragma unroll
    for (int k = 0; k < HELD; ++k) load(k, held[k]);
  }
  __device__ __forceinline__ void load(int k, uint32_t (&fragments)[4 * M_TILES]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
      ldmatrix_x4(of_tile(fragments, m), query_piece(staged, warp_row() + 16 * m + lane % 16, 2 * k + lane / 16));
  }
  __device__ __forceinline__ void get(int k, uint32_t (&fragments)[4 * M_TILES]) const {
    if (k >= HELD) return load(k, fragments);
#pragma unroll
    for (int i = 0; i < 4 * M_TILES; ++i) fragments[i] = held[k][i];
  }
};

// ---- products ------------------------------------------------------------------------------------------

// d += a . b of every m-tile.
template <typename E>
__device__ __forceinline__ void multiply_tiles(float (&d)[4 * M_TILES], const uint32_t (&a)[4 * M_TILES],
                                               const uint32_t (&b)[2]) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) mma_m16n8k16<E>(of_tile(d, m), of_tile(a, m), b);
}

// scores[n] of the lane's rows against tokens 8n + 2t, 8n + 2t + 1 of the tile, in units of the rows' factors.
template <int TOKENS, bool Q_IN_SHARED, int HELD>
__device__ __forceinline__ void multiply_keys(const char* tile, const char* scales,
                                              const Queries<Q_IN_SHARED, HELD>& q, const float* factors,
                                              float (&scores)[TOKENS / 8][4 * M_TILES]) {
  const float* own = reinterpret_cast<const float*>(scales);
  const int t = threadIdx.x % 4;
  // all at once, addresses would spill where registers are short
  constexpr int UNROLLED = !Q_IN_SHARED        ? KTile::CHUNKS
                           : KTile::GROUP_SCALE ? 1
                           : HEAD_DIM < 256     ? KTile::CHUNKS
                                                : (KTile::E == 8 ? 2 : 4);
#pragma unroll UNROLLED
  for (int chunk = 0; chunk < KTile::CHUNKS; ++chunk) {
    uint32_t queries[KTile::K_STEPS][4 * M_TILES];
#pragma unroll
    for (int k = 0; k < KTile::K_STEPS; ++k) q.get(chunk * KTile::K_STEPS + k, queries[k]);
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n += 2) {
      uint32_t keys[KTile::K_STEPS][2][2];
      KvReader<KF, HEAD_DIM, false>(tile, 8 * n)(chunk, keys);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (KTile::GROUP_SCALE) {
          constexpr int N = KTile::CHUNK_GROUPS;
          const float* at = own + (8 * (n + i) + 2 * t) * KTile::GROUPS + chunk * N;
          const Vec<float, N> even = load_vec<float, N>(at), odd = load_vec<float, N>(at + KTile::GROUPS);
#pragma unroll
          for (int g = 0; g < N; ++g) {
            float part[4 * M_TILES] = {};
            multiply_tiles<KOperand>(part, queries[2 * g], keys[2 * g][i]);
            multiply_tiles<KOperand>(part, queries[2 * g + 1], keys[2 * g + 1][i]);
#pragma unroll
            for (int j = 0; j < 4 * M_TILES; ++j)
              scores[n + i][j] = fmaf(j % 2 ? odd.v[g] : even.v[g], part[j], scores[n + i][j]);
          }
        } else {
#pragma unroll
          for (int k = 0; k < KTile::K_STEPS; ++k) multiply_tiles<KOperand>(scores[n + i], queries[k], keys[k][i]);
        }
      }
    }
  }
  if constexpr (KTile::TOKEN_SCALE) {
    float row_sums[LANE_ROWS];
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) row_sums[i] = factors[ROWS + lane_row(i)];
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n) {
      const Vec<float, 4> both = load_vec<float, 4>(own + (8 * n + 2 * t) * 2);  // scale and centre of two tokens
#pragma unroll
      for (int j = 0; j < 4 * M_TILES; ++j)
        scores[n][j] = fmaf(both.v[j % 2 * 2], scores[n][j], both.v[j % 2 * 2 + 1] * row_sums[j / 2]);
    }
  }
}

// sums[index][part] (see value_at) += 16 probabilities . values 16 * step and on of the tile.
__device__ __forceinline__ void add_values(const char* tile, const char* scales, int step,
                                           const uint32_t (&probs)[4 * M_TILES], float (&sums)[COLUMNS][4 * M_TILES]) {
  const KvReader<VF, HEAD_DIM, true> reader(tile, 16 * step);
#pragma unroll
  for (int chunk = 0; chunk < VTile::CHUNKS; ++chunk) {
    uint32_t values[VTile::COLUMNS][2];
    reader(chunk, values);
    if constexpr (VTile::GROUP_SCALE) {
      constexpr int N = VTile::CHUNK_GROUPS;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t* at = reinterpret_cast<const uint32_t*>(scales);
        at += (8 * step + 4 * half + threadIdx.x % 4) * VTile::GROUPS + chunk * N;
        const Vec<uint32_t, N> pair = load_vec<uint32_t, N>(at);
#pragma unroll
        for (int n = 0; n < VTile::COLUMNS; ++n)
          values[n][half] = multiply_pair(values[n][half], pair.v[n * N / VTile::COLUMNS]);
      }
    }
#pragma unroll
    for (int n = 0; n < VTile::COLUMNS; ++n)
      multiply_tiles<VOperand>(sums[chunk * VTile::COLUMNS + n], probs, values[n]);
  }
}

// Scale and centre of V's tokens 8n + 2t and 8n + 2t + 1, in formats with a scale per token.
__device__ __forceinline__ Vec<float, 4> value_scales(const char* scales, int n) {
  return load_vec<float, 4>(reinterpret_cast<const float*>(scales) + (8 * n + threadIdx.x % 4 * 2) * 2);
}

// Two probabilities of an A operand of P.V.
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const float both[2] = {low, high};
  const Vec<VOperand, 2> rounded = from_float<VOperand, 2>(both);
  return reinterpret_cast<const uint32_t&>(rounded);
}

// sums * scale + offset of the lane's rows to outputs, float [ROWS][OUT_STRIDE].
__device__ __forceinline__ void put_down(const float (&sums)[COLUMNS][4 * M_TILES], const float (&scale)[LANE_ROWS],
                                         const float (&offset)[LANE_ROWS], float* outputs) {
  constexpr int E = VTile::E, WIDTH = E < 4 ? E : 4;
#pragma unroll
  for (int row = 0; row < LANE_ROWS; ++row) {
    float* to = outputs + lane_row(row) * OUT_STRIDE + threadIdx.x % 4 * E;
#pragma unroll
    for (int piece = 0; piece < VTile::LOW_PIECES; ++piece)
#pragma unroll
      for (int m = 0; m < E; m += WIDTH) {
        Vec<float, WIDTH> run;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const ValueAt at = value_at<VF>(piece, m + i);
          run.v[i] = fmaf(sums[at.index][at.part + 2 * row], scale[row], offset[row]);
        }
        store_vec(to + piece * 4 * E + m, run);
      }
  }
}

#endif  // CUPYATTN_ATTENTION_PRODUCTS_CUH
