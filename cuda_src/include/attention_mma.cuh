// SPDX-License-Identifier: Apache-2.0
// attention_mma.cuh - attention of many query rows on tensor cores (FlashAttention-2 style): mma.m16n8k16 on ROWS packed
// rows, a warp for 16 of them, K and V tiles shared by the warps. Included by attention.cu after its constants.
//
// For every item of the block:
//   1. page entries of the first two tiles, and the queries, go through shared memory; a warp keeps its 16 queries as
//      A fragments in registers (HEAD_DIM 128) or in shared memory
//   2. one tile of KEYS keys per step: while tile j is worked on, tile j + 1 is copied by cp.async to the other stage of
//      the ring, the row addresses of tile j + 2 are published and the page entries of tile j + 3 are on their way
//      2a. scores = Q.K^T (K by ldmatrix) in float32; hidden keys -inf, but a tile that every row of the warp sees
//          whole skips that, and one that none sees is skipped
//      2b. probabilities relative to the largest score so far, rounded to T as the A operand of P.V
//      2c. out += P.V (V by transposed ldmatrix)
//   3. outputs go through shared memory to store_row(); the last block to bring a piece of a unit merges it
//
// A row of 16-byte pieces is stored with piece p at p ^ (row % 8), so that the 8 rows of an ldmatrix matrix lie in
// different banks. Rows of invisible tokens and dims past head_dim are zeros. Tiles start at multiples of KEYS and a
// hidden key adds exactly nothing, so a row's bits depend neither on the rows beside it nor on where its item begins.
//
// legal      T in {__half, __nv_bfloat16}, KF and VF KvPlain<T>; HEAD_DIM 64, 128, 256 (both head dims padded to it);
//            ROWS 64 or 128, 64 with HEAD_DIM 256; ALIGNED 1 (rows of q, k, v and out at multiples of 16 bytes); BIAS 0, 1
// launch     block (2 * ROWS), any grid; 3 + tiles block barriers per item, two more when a unit is merged; dynamic
//            shared memory SHARED_BYTES = 8 * KEYS * HEAD_DIM (ring: 2 stages of K and V)
//            + 2 * ROWS * HEAD_DIM unless HEAD_DIM is 128 (queries) + 32 * KEYS (row addresses) + 8 * ROWS (state) + 64,
//            KEYS = 32 with HEAD_DIM 256, else 64
#ifndef CUPYATTN_ATTENTION_MMA_CUH
#define CUPYATTN_ATTENTION_MMA_CUH

#include "attention_store.cuh"
#include "cp_async.cuh"
#include "mma.cuh"
#include "warp.cuh"

constexpr int THREADS = 2 * ROWS;                    // a warp for 16 rows
constexpr int KEYS = HEAD_DIM > 128 ? 32 : 64;       // of a tile
constexpr int PIECES = HEAD_DIM / 8;                 // 16-byte pieces of a row
constexpr int K_STEPS = HEAD_DIM / 16;
constexpr int TILE_BYTES = KEYS * HEAD_DIM * 2;      // of K or V
constexpr int STAGE_BYTES = 2 * TILE_BYTES;          // [K, V][KEYS][HEAD_DIM]
constexpr int RING_BYTES = 2 * STAGE_BYTES;          // later the outputs: float [ROWS][HEAD_DIM]
constexpr bool Q_IN_SHARED = HEAD_DIM != 128;        // else in registers, and staged in the ring
constexpr int Q_BYTES = ROWS * HEAD_DIM * 2;
constexpr int POINTERS_AT = RING_BYTES + (Q_IN_SHARED ? Q_BYTES : 0);  // const void* [2 tiles][K, V][KEYS]
constexpr int STATE_AT = POINTERS_AT + 2 * 2 * KEYS * 8;               // float [2][ROWS]: top and sum
constexpr int KNOWN_AT = STATE_AT + 2 * ROWS * 4;                      // uint32 [4 tiles][KEYS / 32]: key is in a page
constexpr int ITEM_AT = KNOWN_AT + 32;                                 // ItemKeys
constexpr int SHARED_BYTES = ITEM_AT + 32;
// Blocks per multiprocessor that registers are given for.
constexpr int MIN_BLOCKS = HEAD_DIM == 64 && !BIAS ? 256 / ROWS : ROWS == 64 ? 2 : 1;
static_assert((HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256) && ALIGNED, "attention_mma: HEAD_DIM, ALIGNED");
static_assert(ROWS == 64 || (ROWS == 128 && HEAD_DIM < 256), "attention_mma: ROWS; shared memory stays below 99 KiB");
static_assert(ROWS * HEAD_DIM * 4 <= RING_BYTES && Q_BYTES <= (Q_IN_SHARED ? Q_BYTES : STAGE_BYTES),
              "attention_mma: queries and outputs must fit in the ring");

// ---- tiles ---------------------------------------------------------------------------------------------

__device__ __forceinline__ char* swizzled(char* tile, int row, int piece) {
  return tile + row * (HEAD_DIM * 2) + (piece ^ (row & 7)) * 16;
}

// The pieces even + odd of the rows row, row + 16, ..., `even` known at compile time: few registers hold all addresses.
struct SwizzledRow {
  const char* start;
  int flip;

  __device__ __forceinline__ SwizzledRow(const char* tile, int row, int odd)
      : start(tile + row * (HEAD_DIM * 2)), flip(((row & 7) ^ odd) * 16) {}
  __device__ __forceinline__ const char* piece(int even, int row_offset = 0) const {
    return start + row_offset * (HEAD_DIM * 2) + even / 8 * 128 + (even % 8 * 16 ^ flip);
  }
};

// Starts the block's copies of one tile; null rows and pieces past `pieces` become zeros.
__device__ __forceinline__ void copy_tile(char* tile, const T* const* pointers, int pieces, const void* somewhere) {
  const int piece = threadIdx.x % PIECES;
#pragma unroll
  for (int i = 0; i < KEYS * PIECES / THREADS; ++i) {
    const int row = threadIdx.x / PIECES + i * (THREADS / PIECES);
    const T* from = pointers[row];
    const bool valid = from != nullptr && piece < pieces;
    cp_async16(swizzled(tile, row, piece), valid ? from + piece * 8 : somewhere, valid);
  }
}

// scores[n] of rows g, g + 8 against keys 8n + 2t, 8n + 2t + 1 of the tile (g = lane / 4, t = lane % 4).
template <typename Q>
__device__ __forceinline__ void multiply_keys(const char* tile, const Q& q, float (&scores)[KEYS / 8][4]) {
  const int lane = threadIdx.x % 32;
  const SwizzledRow row(tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < K_STEPS; ++k) {
    uint32_t queries[4];
    q.get(k, queries);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n += 2) {
      uint32_t keys[4];
      ldmatrix_x4(keys, row.piece(2 * k, 8 * n));
      mma_m16n8k16<T>(scores[n], queries, {keys[0], keys[1]});
      mma_m16n8k16<T>(scores[n + 1], queries, {keys[2], keys[3]});
    }
  }
}

// acc[n] of rows g, g + 8 and dims 8n + 2t, 8n + 2t + 1 += 16 probabilities . values 16 * step and on of the tile
__device__ __forceinline__ void add_values(const char* tile, int step, const uint32_t (&probs)[4],
                                           float (&acc)[PIECES][4]) {
  const int lane = threadIdx.x % 32;
  const SwizzledRow row(tile, lane % 16, lane / 16);
#pragma unroll
  for (int n = 0; n < PIECES; n += 2) {
    uint32_t values[4];
    ldmatrix_x4_trans(values, row.piece(n, 16 * step));
    mma_m16n8k16<T>(acc[n], probs, {values[0], values[1]});
    mma_m16n8k16<T>(acc[n + 1], probs, {values[2], values[3]});
  }
}

// ---- queries -------------------------------------------------------------------------------------------

// Block: queries of the item into a swizzled tile, zeros past num_rows and head_dim.
__device__ __forceinline__ void stage_queries(const AttentionArgs& args, const RowTile& rows, char* tile) {
  const int r = threadIdx.x % ROWS;
  const T* from = nullptr;
  if (r < rows.num_rows) from = static_cast<const T*>(query_pointer(args.q, args, rows.row(args, r), sizeof(T)));
#pragma unroll
  for (int i = 0; i < PIECES / 2; ++i) {
    const int piece = threadIdx.x / ROWS * (PIECES / 2) + i;
    Vec<uint32_t, 4> eight = {};
    if (from != nullptr && piece * 8 < args.head_dim)
      eight = load_vec<uint32_t, 4>(reinterpret_cast<const uint32_t*>(from + piece * 8));
    store_vec(reinterpret_cast<uint32_t*>(swizzled(tile, r, piece)), eight);
  }
}

// A fragments of the warp's 16 queries.
struct Queries {
  uint32_t held[Q_IN_SHARED ? 1 : K_STEPS][4];
  SwizzledRow row;

  __device__ __forceinline__ explicit Queries(const char* tile)
      : row(tile, threadIdx.x / 32 * 16 + threadIdx.x % 16, threadIdx.x / 16 % 2) {
    if constexpr (!Q_IN_SHARED) {
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k) ldmatrix_x4(held[k], row.piece(2 * k));
    }
  }
  __device__ __forceinline__ void get(int k, uint32_t (&fragment)[4]) const {
    if constexpr (Q_IN_SHARED) {
      ldmatrix_x4(fragment, row.piece(2 * k));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = held[k][i];
    }
  }
};

// ---- which keys a warp sees ----------------------------------------------------------------------------

// Local keys the lane's rows g and g + 8 see. They wait in shared memory where the state of these rows will be: registers
// are short. A row past num_rows sees what the last one sees; what comes of it is never looked at, and a warp that has
// only such rows sees nothing.
struct VisibleKeys {
  KeyRange* rows;  // [ROWS]

  __device__ __forceinline__ VisibleKeys(const AttentionArgs& args, const RowTile& tile, char* smem)
      : rows(reinterpret_cast<KeyRange*>(smem + STATE_AT)) {
    const int warp_row = threadIdx.x / 32 * 16, r = warp_row + threadIdx.x % 16;
    if (threadIdx.x % 32 < 16)
      rows[r] = tile.keys(args, warp_row < tile.num_rows ? min(r, tile.num_rows - 1) : ROWS);
    __syncwarp();
  }
  __device__ __forceinline__ KeyRange row(int half) const {
    return rows[threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half];
  }
  // Of the KEYS keys from `key` on, by all rows of the warp.
  __device__ __forceinline__ bool all_seen(int key) const {
    const KeyRange a = row(0), b = row(1);
    return __all_sync(FULL_MASK, key >= max(a.begin, b.begin) && key + KEYS <= min(a.end, b.end));
  }
  __device__ __forceinline__ bool none_seen(int key) const {
    const KeyRange a = row(0), b = row(1);
    return __all_sync(FULL_MASK, (key >= a.end || key + KEYS <= a.begin) && (key >= b.end || key + KEYS <= b.begin));
  }
};

// ---- softmax -------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const float both[2] = {low, high};
  const Vec<T, 2> rounded = from_float<T, 2>(both);
  return *reinterpret_cast<const uint32_t*>(&rounded);
}

// State of the lane's two rows. `sum` is of the lane's own keys.
struct RowState {
  float top[2], sum[2], acc[PIECES][4];

  __device__ __forceinline__ RowState() {
#pragma unroll
    for (int half = 0; half < 2; ++half) top[half] = NEG_INF, sum[half] = 0.0f;
#pragma unroll
    for (int n = 0; n < PIECES; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[n][j] = 0.0f;
  }

  // Turns scores, log2 units once multiplied by `factor` > 0, into probabilities relative to the largest so far;
  // earlier sums shrink when it grows.
  __device__ __forceinline__ void take(float (&scores)[KEYS / 8][4], float factor) {
    float tile_top[2] = {NEG_INF, NEG_INF}, origin[2], shrink[2];
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) tile_top[j / 2] = fmaxf(tile_top[j / 2], scores[n][j]);
    group_max<4>(tile_top);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float old_top = top[half];
      top[half] = fmaxf(old_top, tile_top[half] * factor);
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
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[n][j] = exp2f(fmaf(scores[n][j], factor, -origin[j / 2]));
        sum[j / 2] += scores[n][j];
      }
  }
};

// ---- items ---------------------------------------------------------------------------------------------

// What a block reads of an item's keys. A copy waits in shared memory, since registers are short.
struct ItemKeys {
  SequencePages pages;
  KeyRange visible;
  int kv_head;

  __device__ __forceinline__ ItemKeys(const AttentionArgs& args, const RowTile& rows)
      : pages(args.table, rows.item.seq), visible(rows.visible), kv_head(rows.item.kv_head) {}
};

// The tiles on their way. The threads 0 to KEYS - 1 look after the keys of a tile, the next KEYS ones after the values.
struct KeyTiles {
  const AttentionArgs& args;
  char* smem;

  __device__ __forceinline__ TokenRequest ask(const ItemKeys& item, int tile) const {
    const int key = tile * KEYS + threadIdx.x % KEYS;
    const bool wanted = threadIdx.x < 2 * KEYS && key >= item.visible.begin && key < item.visible.end;
    return item.pages.ask(args.table, key, wanted);
  }
  __device__ __forceinline__ void publish(const ItemKeys& item, int tile, const TokenRequest& found) const {
    if (threadIdx.x >= 2 * KEYS) return;
    const bool is_key = threadIdx.x < KEYS;
    const TokenSlot slot = item.pages.answer(args.table, found);
    pointers(tile)[threadIdx.x] = kv_row<const T>(is_key ? args.k : args.v, args.table, slot, item.kv_head);
    const uint32_t in_page = __ballot_sync(FULL_MASK, slot.page >= 0);
    if (is_key && threadIdx.x % 32 == 0) known(tile)[threadIdx.x / 32] = in_page;
  }
  __device__ __forceinline__ void copy(int tile) const {
    copy_tile(keys(tile), pointers(tile), args.head_dim / 8, args.q.data);
    copy_tile(keys(tile) + TILE_BYTES, pointers(tile) + KEYS, args.head_dim_v / 8, args.q.data);
    cp_async_commit();
  }
  __device__ __forceinline__ char* keys(int tile) const { return smem + tile % 2 * STAGE_BYTES; }
  __device__ __forceinline__ const T** pointers(int tile) const {
    return reinterpret_cast<const T**>(smem + POINTERS_AT) + tile % 2 * (2 * KEYS);
  }
  __device__ __forceinline__ uint32_t* known(int tile) const {
    return reinterpret_cast<uint32_t*>(smem + KNOWN_AT) + tile % 4 * (KEYS / 32);
  }
};

// tanh to 2^-22, without a branch.
__device__ __forceinline__ float quick_tanh(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2f(2.0f * LOG2_E * x));
}

// Natural scores of the tile that starts at `key`, from its dot products.
__device__ __forceinline__ void finish_scores(const AttentionArgs& args, const RowBias* bias, const Visibility& rule,
                                              int key, float (&scores)[KEYS / 8][4]) {
  const bool capped = args.softcap > 0.0f;
  const float scale = capped ? args.softmax_scale / args.softcap : args.softmax_scale;
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float& score = scores[n][j];
      score *= scale;
      if (capped) score = args.softcap * quick_tanh(score);
      if constexpr (BIAS)
        score = bias[j / 2].apply(args, score, rule.token(key + n * 8 + threadIdx.x % 4 * 2 + j % 2));
    }
}

__device__ __forceinline__ void hide_keys(const VisibleKeys& seen, const uint32_t* known, int key,
                                          float (&scores)[KEYS / 8][4]) {
  const int column = threadIdx.x % 4 * 2;
  const KeyRange range[2] = {seen.row(0), seen.row(1)};
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) {
    const uint32_t found = known[n / 4] >> (n % 4 * 8 + column);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int own = key + n * 8 + column + j % 2;
      const bool visible = own >= range[j / 2].begin && own < range[j / 2].end && (found >> j % 2 & 1) != 0;
      scores[n][j] = visible ? scores[n][j] : NEG_INF;
    }
  }
}

__device__ __forceinline__ void attend_keys(const AttentionArgs& args, int index, char* smem, RowState& state) {
  const RowTile rows(args, index);
  if (rows.visible.begin >= rows.visible.end) return;
  const KeyTiles tiles{args, smem};
  ItemKeys& keys = *reinterpret_cast<ItemKeys*>(smem + ITEM_AT);
  int tile = rows.visible.begin / KEYS;

  // 1. first addresses, queries
  char* staged = Q_IN_SHARED ? smem + RING_BYTES : tiles.keys(tile + 1);
  {
    const ItemKeys own(args, rows);
    const TokenRequest first = tiles.ask(own, tile), second = tiles.ask(own, tile + 1);
    stage_queries(args, rows, staged);
    tiles.publish(own, tile, first);
    tiles.publish(own, tile + 1, second);
    if (threadIdx.x == 0) keys = own;
  }
  __syncthreads();
  tiles.copy(tile);
  TokenRequest next = tiles.ask(keys, tile + 2);
  const Queries q(staged);
  const VisibleKeys seen(args, rows, smem);
  const Visibility rule(args, rows.item.seq);
  RowBias bias[2];
  if constexpr (BIAS) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half;
      bias[half] = RowBias(args, rows.row(args, min(r, rows.num_rows - 1)));
    }
  }
  // plain scores are scaled on their way into exp2
  const bool plain = !BIAS && args.softcap == 0.0f && args.softmax_scale > 0.0f;
  const float factor = plain ? LOG2_E * args.softmax_scale : LOG2_E;

  // 2. one tile per step
  for (; tile * KEYS < keys.visible.end; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there for all warps, and nobody still reads the one before
    if ((tile + 1) * KEYS < keys.visible.end) tiles.copy(tile + 1);
    tiles.publish(keys, tile + 2, next);
    next = tiles.ask(keys, tile + 3);
    if (seen.none_seen(tile * KEYS)) continue;

    float scores[KEYS / 8][4] = {};
    multiply_keys(tiles.keys(tile), q, scores);
    if (!plain) finish_scores(args, bias, rule, tile * KEYS, scores);
    bool whole = seen.all_seen(tile * KEYS);
#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i) whole = whole && tiles.known(tile)[i] == 0xffffffffu;
    if (!whole) hide_keys(seen, tiles.known(tile), tile * KEYS, scores);
    state.take(scores, factor);
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      uint32_t probs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // keys 16 * step + 8 * (i / 2) + 2t and the next, row half i % 2
        const float(&pair)[4] = scores[2 * step + i / 2];
        probs[i] = pack_pair(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
      add_values(tiles.keys(tile) + TILE_BYTES, step, probs, state.acc);
    }
  }
}

__device__ __forceinline__ void attend_item(const AttentionArgs& args, int index, char* smem) {
  RowState state;
  attend_keys(args, index, smem, state);

  // 3. outputs, in place of the ring
  group_sum<4>(state.sum);
  __syncthreads();
  float* outputs = reinterpret_cast<float*>(smem);
  float* found = reinterpret_cast<float*>(smem + STATE_AT);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = threadIdx.x / 32 * 16 + lane / 4 + 8 * half;
    if (lane % 4 == 0) {
      found[r] = state.top[half];
      found[ROWS + r] = state.sum[half];
    }
#pragma unroll
    for (int n = 0; n < PIECES; ++n)
      store_vec(outputs + r * HEAD_DIM + (n ^ (r & 3)) * 8 + lane % 4 * 2,
                Vec<float, 2>{{state.acc[n][2 * half], state.acc[n][2 * half + 1]}});
  }
  __syncthreads();
  const RowTile rows(args, index);  // again: nothing of it takes registers while keys are attended to
  merge_and_store(args, rows, {found, smem, 1, RING_BYTES, HEAD_DIM, 1, 3});
  finish_item(args, rows, reinterpret_cast<int*>(smem + POINTERS_AT));
}

__device__ __forceinline__ void attend_on_tensor_cores(const AttentionArgs& args) {
  CA_DYN_SMEM(char, smem);
  for (int index = args.work.worker_items[blockIdx.x]; index < args.work.worker_items[blockIdx.x + 1]; ++index) {
    attend_item(args, index, smem);
    __syncthreads();  // before the next item overwrites shared memory
  }
}

#endif  // CUPYATTN_ATTENTION_MMA_CUH
