// SPDX-License-Identifier: Apache-2.0
// paged_decode_mma.cuh - the tensor-core version of paged_decode: mma.m16n8k16 on 16 packed query rows.
//
// Each warp works alone on every WARPS-th tile of 16 tokens, through its own ring of STAGES tiles filled by cp.async:
// scores = Q.K^T (K by ldmatrix), softmax in registers, probabilities rounded to T as the A operand of P.V (V by
// transposed ldmatrix). Row pointers are worked out a step before the copies that need them, page ids one step before
// that. A row of 16-byte pieces is stored with piece p at p ^ (row % 8), so that the 8 rows of an ldmatrix matrix
// lie in different banks. Rows of invisible tokens and dims past head_dim are zeros.
//
// launch     block (32 * WARPS), at most two block barriers, dynamic shared memory WARPS * (RING_BYTES + POINTER_BYTES + 128)
//            + Q_BYTES: rings, row pointers, state, queries; mirrored by _plan_paged_decode in ops/paged_decode.py
#ifndef CUPYATTN_PAGED_DECODE_MMA_CUH
#define CUPYATTN_PAGED_DECODE_MMA_CUH

#include "cp_async.cuh"
#include "mma.cuh"
#include "paged_decode_rows.cuh"

constexpr int TILE = 16;                                 // tokens of a warp's step
constexpr int WARPS = HEAD_DIM > 128 ? 2 : 4;            // all shared memory fits in 99 KiB
constexpr int STAGES = HEAD_DIM > 128 ? 2 : HEAD_DIM > 64 ? 3 : 4;  // tiles of a ring
constexpr int PIECES = HEAD_DIM / 8;                     // 16-byte pieces of a row
constexpr int TILE_BYTES = TILE * HEAD_DIM * 2;          // of K or V
constexpr int RING_BYTES = STAGES * 2 * TILE_BYTES;      // of a warp: [STAGES][K, V][TILE][HEAD_DIM]
constexpr int OUT_STRIDE = HEAD_DIM + 8;                 // floats between rows of a warp's result, against conflicts
constexpr int K_STEPS = HEAD_DIM / 16;
constexpr bool Q_IN_SHARED = HEAD_DIM > 128;             // registers hold the query fragments of smaller heads
constexpr int Q_BYTES = Q_IN_SHARED ? ROWS * HEAD_DIM * 2 : 0;
constexpr int POINTER_BYTES = 2 * 2 * TILE * 8;          // of a warp: [2][K, V][TILE]
static_assert(ROWS == 16 && HEAD_DIM % 64 == 0 && ALIGNED, "paged_decode_mma: one m16 tile of 16-byte aligned rows");
static_assert(ROWS * OUT_STRIDE * 4 <= RING_BYTES, "paged_decode_mma: a warp's result must fit in its ring");

// Address of piece `piece` of row `row` in a swizzled tile.
__device__ __forceinline__ char* swizzled(char* tile, int row, int piece) {
  return tile + row * (HEAD_DIM * 2) + (piece ^ (row & 7)) * 16;
}

// The pieces even + odd of one row, `even` known at compile time: few registers hold the addresses of all.
struct SwizzledRow {
  const char* start;
  int flip;

  __device__ __forceinline__ SwizzledRow(const char* tile, int row, int odd)
      : start(tile + row * (HEAD_DIM * 2)), flip(((row & 7) ^ odd) * 16) {}
  __device__ __forceinline__ const char* piece(int even) const {
    return start + even / 8 * 128 + (even % 8 * 16 ^ flip);
  }
};

__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const float both[2] = {low, high};
  const Vec<T, 2> rounded = from_float<T, 2>(both);
  return *reinterpret_cast<const uint32_t*>(&rounded);
}

// A fragments of the block's query rows, zeros past num_rows and head_dim: in registers, or in shared memory as every
// warp's lanes want them, [K_STEPS][32] of 16 bytes.
struct Queries {
  uint32_t held[Q_IN_SHARED ? 1 : K_STEPS][4];
  Vec<uint32_t, 4>* shared;

  // With Q_IN_SHARED the warps fill `to` in turns; a block barrier must follow before get().
  __device__ __forceinline__ Queries(const PagedDecodeArgs& args, const RowTile& rows, char* to)
      : shared(reinterpret_cast<Vec<uint32_t, 4>*>(to)) {
    const int lane = threadIdx.x % 32;
    const T* row[2];  // of rows g and g + 8, null past num_rows
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = lane / 4 + half * 8;
      row[half] = nullptr;
      if (r < rows.num_rows) {
        row[half] = static_cast<const T*>(args.q.data) + rows.seq * args.q.stride_seq +
                    rows.query(args, r) * args.q.stride_token + rows.head(args, r) * args.q.stride_head;
      }
    }
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      if (Q_IN_SHARED && k % WARPS != threadIdx.x / 32) continue;
      Vec<uint32_t, 4> fragment;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rows g and g + 8 (i % 2), dims 2t and 2t + 8 (i / 2)
        const int dim = 16 * k + i / 2 * 8 + lane % 4 * 2;
        Vec<T, 2> pair = from_float<T, 2>({0.0f, 0.0f});
        if (row[i % 2] != nullptr && dim < args.head_dim) pair = {{row[i % 2][dim], row[i % 2][dim + 1]}};
        fragment.v[i] = *reinterpret_cast<const uint32_t*>(&pair);
        if constexpr (!Q_IN_SHARED) held[k][i] = fragment.v[i];
      }
      if constexpr (Q_IN_SHARED) store_vec(shared[k * 32 + lane].v, fragment);
    }
  }
  __device__ __forceinline__ void get(int k, uint32_t (&fragment)[4]) const {
    Vec<uint32_t, 4> stored;
    if constexpr (Q_IN_SHARED) stored = load_vec<uint32_t, 4>(shared[k * 32 + threadIdx.x % 32].v);
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = Q_IN_SHARED ? stored.v[i] : held[Q_IN_SHARED ? 0 : k][i];
  }
};

// Starts the copies of one tile; lane l of the warp copies the pieces l, l + 32, ... `somewhere` is a valid address.
__device__ __forceinline__ void copy_tile(char* tile, const T* const* pointers, int pieces, const void* somewhere) {
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int i = 0; i < TILE * PIECES / 32; ++i) {
    const int row = (i * 32 + lane) / PIECES, piece = (i * 32 + lane) % PIECES;
    const T* from = pointers[row];
    const bool valid = from != nullptr && piece < pieces;
    cp_async16(swizzled(tile, row, piece), valid ? from + piece * 8 : somewhere, valid);
  }
}

// scores[n] of rows g, g + 8 against tokens 8n + 2t, 8n + 2t + 1 (g = lane / 4, t = lane % 4).
__device__ __forceinline__ void multiply_keys(const char* tile, const Queries& q, float (&scores)[2][4]) {
  const int lane = threadIdx.x % 32;
  const int token = lane % 8 + lane / 16 * 8;
  const SwizzledRow row(tile, token, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < K_STEPS; ++k) {
    uint32_t queries[4], keys[4];
    q.get(k, queries);
    ldmatrix_x4(keys, row.piece(2 * k));
    mma_m16n8k16<T>(scores[0], queries, {keys[0], keys[1]});
    mma_m16n8k16<T>(scores[1], queries, {keys[2], keys[3]});
  }
}

__device__ __forceinline__ void add_values(const char* tile, const uint32_t (&probs)[4], float (&acc)[PIECES][4]) {
  const int lane = threadIdx.x % 32;
  const SwizzledRow row(tile, lane % 16, lane / 16);
#pragma unroll
  for (int n = 0; n < PIECES; n += 2) {
    uint32_t values[4];
    ldmatrix_x4_trans(values, row.piece(n));
    mma_m16n8k16<T>(acc[n], probs, {values[0], values[1]});
    mma_m16n8k16<T>(acc[n + 1], probs, {values[2], values[3]});
  }
}

__device__ __forceinline__ void decode_on_tensor_cores(const PagedDecodeArgs& args) {
  CA_DYN_SMEM(char, smem);
  const RowTile rows(args);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  // 1. tokens of this chunk that any row sees
  const TokenRange chunk = visible_tokens(args, rows);
  const int chunk_begin = chunk.start, begin = chunk.begin, end = chunk.end;
  if (args.num_chunks > 1 && begin >= end) {
    store_empty(args, rows);
    return;
  }
  char* ring = smem + warp * RING_BYTES;
  const T** pointers = reinterpret_cast<const T**>(smem + WARPS * RING_BYTES + warp * POINTER_BYTES);
  float* state = reinterpret_cast<float*>(smem + WARPS * (RING_BYTES + POINTER_BYTES));  // [WARPS][2][ROWS]

  const Queries q(args, rows, smem + WARPS * (RING_BYTES + POINTER_BYTES + 2 * ROWS * 4));
  if constexpr (Q_IN_SHARED) __syncthreads();
  int first_key[2], last_key[2];
  float top[2] = {NEG_INF, NEG_INF}, sum[2] = {0.0f, 0.0f}, acc[PIECES][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    first_key[half] = rows.first_key(args, lane / 4 + 8 * half);
    last_key[half] = rows.last_key(args, lane / 4 + 8 * half);
  }
#pragma unroll
  for (int n = 0; n < PIECES; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[n][j] = 0.0f;

  // 2. fill the pipeline. Tiles are counted from the chunk's start: warp w takes w, w + WARPS, ...
  constexpr int STRIDE = WARPS * TILE;
  int token = chunk_begin + (warp + (begin - chunk_begin) / TILE / WARPS * WARPS) * TILE;
  if (token + TILE <= begin) token += STRIDE;
  // The lane's row of a tile: lanes 0 to 15 keys, 16 to 31 values.
  const auto find = [&](int tile_token) {
    const int t = tile_token + lane % TILE;
    return t >= begin && t < end ? find_token(args.table, rows.seq, t) : TokenSlot{-1, 0};
  };
  // Makes the row known to the warp; returns the tokens of the tile that are in a page, one bit each.
  const auto publish = [&](TokenSlot slot, int parity) {
    pointers[parity * 2 * TILE + lane] = kv_row<T>(lane < TILE ? args.k : args.v, args.table, slot, rows.kv_head);
    return __ballot_sync(FULL_MASK, slot.page >= 0);
  };
  const auto copy = [&](int stage, int parity) {
    char* to = ring + stage * 2 * TILE_BYTES;
    copy_tile(to, pointers + parity * 2 * TILE, args.head_dim / 8, args.k.data);
    copy_tile(to + TILE_BYTES, pointers + parity * 2 * TILE + TILE, args.head_dim / 8, args.v.data);
    cp_async_commit();
  };
  uint32_t known[STAGES];
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    known[stage] = publish(find(token + stage * STRIDE), stage % 2);
    __syncwarp();
    copy(stage, stage % 2);
  }
  known[STAGES - 1] = publish(find(token + (STAGES - 1) * STRIDE), (STAGES - 1) % 2);
  TokenSlot next = find(token + STAGES * STRIDE);

  // 3. one tile per step
  int stage = 0, parity = (STAGES - 1) % 2;  // of the tile worked on; of the pointers of the tile to be copied
  for (; token < end; token += STRIDE) {
    cp_async_wait<STAGES - 2>();
    __syncwarp();  // the tile is there for all lanes, and nobody still reads the one before
    copy(stage == 0 ? STAGES - 1 : stage - 1, parity);
    parity ^= 1;
    const uint32_t newest = publish(next, parity);
    next = find(token + (STAGES + 1) * STRIDE);

    // 3a. scores, and their largest per row
    char* keys = ring + stage * 2 * TILE_BYTES;
    float scores[2][4] = {};
    multiply_keys(keys, q, scores);
    float tile_top[2] = {NEG_INF, NEG_INF};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = n * 8 + lane % 4 * 2 + j % 2;
        const bool visible = token + column >= first_key[j / 2] && token + column <= last_key[j / 2] &&
                             (known[0] >> column & 1) != 0;
        scores[n][j] = visible ? scaled_score(scores[n][j], args.softmax_scale, args.softcap) : NEG_INF;
        tile_top[j / 2] = fmaxf(tile_top[j / 2], scores[n][j]);
      }
    group_max<4>(tile_top);

    // 3b. probabilities relative to the largest score so far; earlier sums shrink when it grows
    float origin[2], shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float old_top = top[half];
      top[half] = fmaxf(old_top, tile_top[half]);
      origin[half] = softmax_origin(top[half]);
      shrink[half] = exp2f(old_top - origin[half]);
      sum[half] *= shrink[half];
    }
    if (shrink[0] != 1.0f || shrink[1] != 1.0f) {
#pragma unroll
      for (int n = 0; n < PIECES; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[n][j] *= shrink[j / 2];
    }
    uint32_t probs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // tokens 8 * (i / 2) + 2t and the next, row half i % 2
      const int half = i % 2;
      const float low = exp2f(scores[i / 2][2 * half] - origin[half]);
      const float high = exp2f(scores[i / 2][2 * half + 1] - origin[half]);
      sum[half] += low + high;
      probs[i] = pack_pair(low, high);
    }

    // 3c. outputs
    add_values(keys + TILE_BYTES, probs, acc);
    stage = stage == STAGES - 1 ? 0 : stage + 1;
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) known[i] = known[i + 1];
    known[STAGES - 1] = newest;
  }

  // 4. put down what each warp has, in place of its ring
  cp_async_wait<0>();
  group_sum<4>(sum);
  __syncwarp();
  float* outputs = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = lane / 4 + 8 * half;
    if (lane % 4 == 0) {
      state[(warp * 2 + 0) * ROWS + r] = top[half];
      state[(warp * 2 + 1) * ROWS + r] = sum[half];
    }
#pragma unroll
    for (int n = 0; n < PIECES; ++n)
      store_vec(outputs + r * OUT_STRIDE + n * 8 + lane % 4 * 2,
                Vec<float, 2>{{acc[n][2 * half], acc[n][2 * half + 1]}});
  }
  __syncthreads();

  // 5. merge and store
  merge_and_store(args, rows, {state, smem, RING_BYTES, OUT_STRIDE, 1});
}

#endif  // CUPYATTN_PAGED_DECODE_MMA_CUH
