// SPDX-License-Identifier: Apache-2.0
// lightning_mma.cuh - lightning_attention of many tokens per sequence on tensor cores, T of 16 bits; formulas as in
// lightning_blocks.cuh.
//
// A thread block has COLUMNS value dims of one head of one sequence and takes the sequence's blocks of up to BLOCK tokens
// in order. Its 4 warps hold the state in registers, KEY_DIM / 4 rows each, as the accumulators of K^T.V; for Q.KV a copy
// of it goes to shared memory. A warp has 16 rows of the scores and keeps them in registers. The next block's tokens are
// on their way (STAGES 2).
//
// rounding   Products are exact and summed in float32. Three factors are no T: scores with their decay, keys with their
//            decay, and the state. Each goes in as a sum of two T, of which the second takes what the first leaves, so
//            that 2^-17 of it is lost with bfloat16 and 2^-22 with float16. float16 has a small range: a row's scores
//            are divided by a power of two, the state by another for each block, and of a key with its decay 2^-25 may
//            be lost. One rounding on store.
// launch     grid ((batch + 1) * heads * slices), block (128), sm_80; block_size at most BLOCK
//            dynamic shared memory, in bytes: 2 * STAGES * BLOCK * (2 * KEY_STRIDE + VALUE_STRIDE)
//            + 4 * KEY_DIM * VALUE_STRIDE + 4 * (BLOCK + 4 + WARPS)
// aliasing   none allowed
// traffic    the state once each way; queries and keys once for each slice of the value dims, values and outputs once
#ifndef CUPYATTN_LIGHTNING_MMA_CUH
#define CUPYATTN_LIGHTNING_MMA_CUH

#include "cp_async.cuh"
#include "mma.cuh"
#include "mma_split.cuh"
#include "warp.cuh"

constexpr int KEY_DIM = CA_KEY_DIM;  // at least key_dim: 64, 128, 256; the rest counts as zeros
constexpr int COLUMNS = CA_COLUMNS;  // value dims of a block: 32, 64
constexpr int STAGES = CA_STAGES;    // blocks of tokens in shared memory: 1, 2
constexpr int BLOCK = 64;            // tokens
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int KEY_STRIDE = KEY_DIM + 8, VALUE_STRIDE = COLUMNS + 8;  // 16 bytes more: ldmatrix meets no bank twice
constexpr int ROW_TILES = KEY_DIM / (16 * WARPS);                    // tiles of 16 rows of the state that a warp holds
constexpr int COLUMN_TILES = COLUMNS / 8;
static_assert(BLOCK == 16 * WARPS, "lightning_attention: a warp has 16 rows of the scores");

constexpr bool NARROW = is_narrow(T{});

struct TokensNear {
  T* q;  // [BLOCK, KEY_STRIDE]
  T* k;  // [BLOCK, KEY_STRIDE]
  T* v;  // [BLOCK, VALUE_STRIDE]
};

struct MmaBlocks {
  const LightningAttentionArgs& args;
  const Part part;
  T* tokens;      // STAGES of TokensNear
  T* high;        // [KEY_DIM, VALUE_STRIDE] state / norm, rounded
  T* low;         // [KEY_DIM, VALUE_STRIDE] what that leaves
  float* powers;  // [BLOCK + 1] exp(-slope * n)
  float* tops;    // [WARPS] largest magnitude in a warp's part of the state
  float slope;
  float state[ROW_TILES][COLUMN_TILES][4];

  __device__ __forceinline__ MmaBlocks(const LightningAttentionArgs& a, char* shared)
      : args(a), part(a), slope(a.slopes[part.head * a.stride_slope]) {
    tokens = reinterpret_cast<T*>(shared);
    high = tokens + STAGES * BLOCK * (2 * KEY_STRIDE + VALUE_STRIDE);
    low = high + KEY_DIM * VALUE_STRIDE;
    powers = reinterpret_cast<float*>(low + KEY_DIM * VALUE_STRIDE);
    tops = powers + BLOCK + 4;
  }
  __device__ __forceinline__ TokensNear near(int stage) const {
    T* at = tokens + stage * BLOCK * (2 * KEY_STRIDE + VALUE_STRIDE);
    return {at, at + BLOCK * KEY_STRIDE, at + 2 * BLOCK * KEY_STRIDE};
  }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int group() { return threadIdx.x % 32 / 4; }  // row of a fragment
  static __device__ __forceinline__ int pair() { return threadIdx.x % 4 * 2; }    // its first column

  // Starts the copies of a block's tokens, zeros for those there are not.
  __device__ __forceinline__ void fetch(int64_t begin, int count, int stage) const {
    const TokensNear to = near(stage);
    for (int i = threadIdx.x; i < BLOCK * (KEY_DIM / 8); i += THREADS) {
      const int t = i / (KEY_DIM / 8), d = i % (KEY_DIM / 8) * 8;
      const bool there = t < count && d < args.key_dim;
      cp_async16(to.q + t * KEY_STRIDE + d, part.row_of(args.q, begin + t) + d, there);
      cp_async16(to.k + t * KEY_STRIDE + d, part.row_of(args.k, begin + t) + d, there && !is_masked(args, begin + t));
    }
    for (int i = threadIdx.x; i < BLOCK * COLUMN_TILES; i += THREADS) {
      const int t = i / COLUMN_TILES, c = i % COLUMN_TILES * 8;
      const bool there = t < count && c < part.count && !is_masked(args, begin + t);
      cp_async16(to.v + t * VALUE_STRIDE + c, part.row_of(args.v, begin + t) + part.first + c, there);
    }
    cp_async_commit();
  }

  // Calls move(pair of numbers in global memory, register) for the part of the state this thread holds.
  template <typename Move>
  __device__ __forceinline__ void move_state(Move move) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = (warp() * ROW_TILES + m) * 16 + 8 * half + group(), column = 8 * n + pair();
          if (row < args.key_dim && column < part.count)
            move(part.state + row * args.stride_key + column, state[m][n][2 * half], state[m][n][2 * half + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void publish_top() const {
    if constexpr (NARROW) {
      float top = 0.0f;
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) top = fmaxf(top, fabsf(state[m][n][i]));
      top = warp_max(top);
      if (threadIdx.x % 32 == 0) tops[warp()] = top;
    }
  }
  // The power of two that the state is divided by in shared memory.
  __device__ __forceinline__ float norm() const {
    if constexpr (!NARROW) return 1.0f;
    float top = tops[0];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) top = fmaxf(top, tops[w]);
    return power_at(top);
  }
  __device__ __forceinline__ void publish_state(float factor) const {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = ((warp() * ROW_TILES + m) * 16 + 8 * half + group()) * VALUE_STRIDE + 8 * n + pair();
          uint32_t rounded, rest;
          split<T>(state[m][n][2 * half] * factor, state[m][n][2 * half + 1] * factor, rounded, rest);
          *reinterpret_cast<uint32_t*>(high + at) = rounded;
          *reinterpret_cast<uint32_t*>(low + at) = rest;
        }
      }
    }
  }

  // Scores of the warp's 16 rows, and their products with the state. Keys of later warps' rows are of no use.
  __device__ __forceinline__ void ask(const TokensNear& near, float (&scores)[BLOCK / 8][4],
                                      float (&history)[COLUMN_TILES][4]) const {
#pragma unroll
    for (int d = 0; d < KEY_DIM; d += 16) {
      uint32_t query[4];
      ldmatrix_x4(query, downward(near.q + 16 * warp() * KEY_STRIDE + d, KEY_STRIDE));
#pragma unroll
      for (int j = 0; j < BLOCK / 16; ++j) {
        if (j > warp()) continue;
        uint32_t keys[4];
        ldmatrix_x4(keys, sideways(near.k + 16 * j * KEY_STRIDE + d, KEY_STRIDE));
        add_pair<T>(scores[2 * j], scores[2 * j + 1], query, keys);
      }
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n += 2) {
        uint32_t values[4];
        ldmatrix_x4_trans(values, downward(high + d * VALUE_STRIDE + 8 * n, VALUE_STRIDE));
        add_pair<T>(history[n], history[n + 1], query, values);
        ldmatrix_x4_trans(values, downward(low + d * VALUE_STRIDE + 8 * n, VALUE_STRIDE));
        add_pair<T>(history[n], history[n + 1], query, values);
      }
    }
  }

  // Scores fade with the distance of their key; later keys have none. unit: what a row's scores were divided by.
  __device__ __forceinline__ void fade(float (&scores)[BLOCK / 8][4], float (&unit)[2]) const {
    float top[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < BLOCK / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int distance = 16 * warp() + group() + i / 2 * 8 - (8 * n + pair() + i % 2);
        scores[n][i] = distance >= 0 ? scores[n][i] * powers[distance] : 0.0f;
        top[i / 2] = fmaxf(top[i / 2], fabsf(scores[n][i]));
      }
    }
    unit[0] = unit[1] = 1.0f;
    if constexpr (NARROW) {
      group_max<4>(top);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unit[half] = power_at(top[half]);
        const float factor = 1.0f / unit[half];  // exact
#pragma unroll
        for (int n = 0; n < BLOCK / 8; ++n) {
          scores[n][2 * half] *= factor;
          scores[n][2 * half + 1] *= factor;
        }
      }
    }
  }

  __device__ __forceinline__ void attend(int64_t begin, int count, const TokensNear& near, float state_norm) const {
    float scores[BLOCK / 8][4] = {}, history[COLUMN_TILES][4] = {}, unit[2];
    ask(near, scores, history);
    fade(scores, unit);
    float sums[COLUMN_TILES][4] = {};
#pragma unroll
    for (int j = 0; j < BLOCK / 16; ++j) {
      if (j > warp()) continue;
      uint32_t rounded[4], rest[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&from)[4] = scores[2 * j + i / 2];
        split<T>(from[i % 2 * 2], from[i % 2 * 2 + 1], rounded[i], rest[i]);
      }
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n += 2) {
        uint32_t values[4];
        ldmatrix_x4_trans(values, downward(near.v + 16 * j * VALUE_STRIDE + 8 * n, VALUE_STRIDE));
        add_pair<T>(sums[n], sums[n + 1], rounded, values);
        add_pair<T>(sums[n], sums[n + 1], rest, values);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * warp() + 8 * half + group();
      const float old = args.scale * state_norm * powers[row + 1], fresh = args.scale * unit[half];
      if (row >= count) continue;
      T* out = part.row_of(args.out, begin + row) + part.first + pair();
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; ++n) {
        const float both[2] = {history[n][2 * half] * old + sums[n][2 * half] * fresh,
                               history[n][2 * half + 1] * old + sums[n][2 * half + 1] * fresh};
        if (8 * n < part.count) store_global(out + 8 * n, from_float<T, 2>(both));
      }
    }
  }

  __device__ __forceinline__ void update(int count, const TokensNear& near) {
    const float loss = loss_of(slope, count);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) state[m][n][i] = fmaf(loss, state[m][n][i], state[m][n][i]);
    for (int t = 0; t < count; t += 16) {
      uint32_t values[COLUMN_TILES / 2][4];
#pragma unroll
      for (int n = 0; n < COLUMN_TILES / 2; ++n)
        ldmatrix_x4_trans(values[n], downward(near.v + t * VALUE_STRIDE + 16 * n, VALUE_STRIDE));
      float weights[4];  // of the tokens of a fragment's columns
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int behind = count - 1 - (t + i / 2 * 8 + pair() + i % 2);
        weights[i] = behind >= 0 ? powers[behind] : 0.0f;
      }
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        uint32_t keys[4], rounded[4], rest[4];
        ldmatrix_x4_trans(keys, sideways(near.k + t * KEY_STRIDE + (warp() * ROW_TILES + m) * 16, KEY_STRIDE));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float both[2];
          unpack<T>(keys[i], both);
          split<T>(both[0] * weights[i / 2 * 2], both[1] * weights[i / 2 * 2 + 1], rounded[i], rest[i]);
        }
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n += 2) {
          add_pair<T>(state[m][n], state[m][n + 1], rounded, values[n / 2]);
          add_pair<T>(state[m][n], state[m][n + 1], rest, values[n / 2]);
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    int64_t begin, end;
    part.tokens_of(args, begin, end);
    if (begin >= end) return;
    if (part.state == nullptr) {
      part.store_zeros(args, begin, end);
      return;
    }
    const auto count_at = [&](int64_t token) {
      return end - token < args.block_size ? static_cast<int>(end - token) : args.block_size;
    };
    fetch(begin, count_at(begin), 0);
    for (int n = threadIdx.x; n <= BLOCK; n += THREADS) powers[n] = n == 0 ? 1.0f : expf(-slope * static_cast<float>(n));
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) state[m][n][i] = 0.0f;
    if (!part.is_fresh) {
      move_state([](const S* far, float& first, float& second) {
        float both[2];
        to_float(load_vec<S, 2>(far), both);
        first = both[0];
        second = both[1];
      });
    }
    for (int stage = 0; begin < end; begin += args.block_size, stage = (stage + 1) % STAGES) {
      const int count = count_at(begin);
      const int64_t next = begin + args.block_size;
      publish_top();
      cp_async_wait<0>();
      __syncthreads();
      if (STAGES == 2 && next < end) fetch(next, count_at(next), 1 - stage);
      const float state_norm = norm();
      publish_state(1.0f / state_norm);
      __syncthreads();
      attend(begin, count, near(stage), state_norm);
      update(count, near(stage));
      if (STAGES == 1 && next < end) {
        __syncthreads();
        fetch(next, count_at(next), 0);
      }
    }
    move_state([](S* far, float first, float second) {
      const float both[2] = {first, second};
      store_vec(far, from_float<S, 2>(both));
    });
  }
};

__device__ __forceinline__ void attend_on_tensor_cores(const LightningAttentionArgs& args) {
  CA_DYN_SMEM(char, shared);
  MmaBlocks blocks(args, shared);
  blocks.run();
}

#endif  // CUPYATTN_LIGHTNING_MMA_CUH
