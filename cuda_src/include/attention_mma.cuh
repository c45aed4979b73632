// SPDX-License-Identifier: Apache-2.0
// attention_mma.cuh - attention of many packed query rows over keys of any cache format on tensor cores, as
// FlashAttention-2 does it: mma.m16n8k16, 16 rows a warp, tiles of K and V shared by the warps and converted in
// registers (kv_fragments.cuh).
//
// For every item of the block:
//   1. the queries, in the order of k slots, go through shared memory into A fragments (plain keys and HEAD_DIM 128:
//      kept in registers, else read again for every tile); rows and scales of the first two tiles are looked up
//   2. one tile of KEYS keys per step. While tile j is worked on, tile j + 1 is copied by cp.async to the other stage
//      of the ring, the row addresses of tile j + 2 are published, its scales are loaded, and the page entries of
//      tile j + 3 are on their way
//      2a. scores = Q.K^T in float32, scales of K, softcap, biases; hidden keys -inf. A tile that every row of the warp
//          sees whole skips hiding, one that none of them sees is skipped altogether
//      2b. probabilities relative to `origin`, which follows the largest score only when that is 2^8 times ahead; times
//          V's scales, rounded to V's operand type as the A operand of P.V
//      2c. sums += P.V
//   3. outputs and state go to shared memory in place of ring and queries and are stored; the last block to bring a
//      piece of a unit merges it
// Tiles start at multiples of KEYS, a hidden key adds exactly nothing, and origins and norms follow visible keys alone:
// a row's bits depend on its own keys and on where its items are cut, not on the rows beside it, nor on ROWS.
//
// Scales of V per token: probabilities are p * s * norm in half, norm the power of two that brings the largest s a row
// has seen to [1, 64); sums are divided by it in the end.
//
// legal      T in {__half, __nv_bfloat16}; KF and VF any tags but KvPlain of another type than T; HEAD_DIM 64, 128, 256
//            (both head dims padded to it); ROWS 64 or 128, with HEAD_DIM 256 only 64; ALIGNED 1 (rows of k, v and out
//            at multiples of 16 bytes; q anywhere); BIAS 0, 1
// launch     block (2 * ROWS), any grid, MIN_BLOCKS per multiprocessor fill it; 4 block barriers per item and one per
//            tile, two more for a partial result, a third to merge; dynamic shared memory SHARED_BYTES, at most 99
//            KiB, mirrored by _prefill_mma_launch in cupyattn/attention_plans.py
#ifndef CUPYATTN_ATTENTION_MMA_CUH
#define CUPYATTN_ATTENTION_MMA_CUH

#include "attention_products.cuh"
#include "attention_store.cuh"
#include "cp_async.cuh"

constexpr int THREADS = 2 * ROWS;               // a warp for 16 rows
constexpr int KEYS = HEAD_DIM > 128 ? 32 : 64;  // of a tile
constexpr int STAGE_BYTES = KEYS * (KTile::ROW_BYTES + VTile::ROW_BYTES);         // [K, V][KEYS] rows
constexpr int SCALE_BYTES = KEYS * (KTile::SCALE_BYTES + VTile::SCALE_BYTES);     // of a stage: [K, V][KEYS]
constexpr int RING_BYTES = 2 * STAGE_BYTES;
constexpr int Q_BYTES = ROWS * HEAD_DIM * 2;
constexpr int OUT_BYTES = ROWS * OUT_STRIDE * 4;
constexpr bool Q_IN_SHARED = HEAD_DIM != 128 || KTile::E > 2;  // else in registers
constexpr bool Q_IN_RING =                      // only staged, in the second stage
    !Q_IN_SHARED && RING_BYTES + Q_BYTES > OUT_BYTES && Q_BYTES <= STAGE_BYTES;
// Shared memory: ring and queries, later the outputs; then
constexpr int RING_AND_Q = RING_BYTES + (Q_IN_RING ? 0 : Q_BYTES);
constexpr int SCALES_AT = RING_AND_Q > OUT_BYTES ? RING_AND_Q : OUT_BYTES;        // [2 stages]
constexpr int POINTERS_AT = SCALES_AT + 2 * SCALE_BYTES;                // const char* [2 tiles][K, V][KEYS]
constexpr int STATE_AT = POINTERS_AT + 2 * 2 * KEYS * 8;                // float [2][ROWS]: origin and sum
constexpr int KNOWN_AT = STATE_AT + 2 * ROWS * 4;                       // uint32 [4 tiles][KEYS / 32]: key is in a page
constexpr int ITEM_AT = KNOWN_AT + 32;                                  // ItemKeys
constexpr int FACTORS_AT = ITEM_AT + 32;                                // float [2][ROWS], of quantized keys
constexpr int SHARED_BYTES = FACTORS_AT + (KTile::E > 2 ? 2 * ROWS * 4 : 0);
// Blocks per multiprocessor that registers are given for.
constexpr int MIN_BLOCKS = HEAD_DIM == 64 && !BIAS && SCALE_BYTES == 0 ? 256 / ROWS : ROWS == 64 ? 2 : 1;
constexpr float MAX_GROWTH = 8.0f;  // log2 of the largest probability relative to the origin
constexpr float MAX_SCALE = 64.0f;  // of V's scales times norm; probabilities stay far below half's largest number
static_assert((HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256) && ALIGNED, "attention_mma: HEAD_DIM, ALIGNED");
static_assert(ROWS == 64 || (ROWS == 128 && HEAD_DIM < 256), "attention_mma: ROWS");
static_assert(SHARED_BYTES <= 99 * 1024, "attention_mma: shared memory");

// Power of two 2^-e with 2^e <= x < 2^(e + 1), e from -126 to 126; x >= 0.
__device__ __forceinline__ float inverse_power(float x) {
  return __uint_as_float((254u - min(max(__float_as_uint(x) >> 23, 1u), 253u)) << 23);
}

// ---- which keys a warp sees ----------------------------------------------------------------------------

// Local keys the lane's rows g and g + 8 see. They wait in shared memory where the state of these rows will be:
// registers are short. A row past num_rows sees what the last one sees; what comes of it is never looked at, and a warp
// that has only such rows sees nothing.
struct VisibleKeys {
  KeyRange* rows;  // [ROWS]

  __device__ __forceinline__ VisibleKeys(const AttentionArgs& args, const RowTile& tile, char* smem)
      : rows(reinterpret_cast<KeyRange*>(smem + STATE_AT)) {
    const int r = warp_row() + threadIdx.x % 16;
    if (threadIdx.x % 32 < 16) rows[r] = tile.keys(args, warp_row() < tile.num_rows ? min(r, tile.num_rows - 1) : ROWS);
    __syncwarp();
  }
  __device__ __forceinline__ KeyRange row(int half) const {
    return rows[lane_row(half)];
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

// What the lane has found for its two rows.
struct RowState {
  float origin[2];         // what probabilities are relative to, log2; follows the largest score
  float sum[2];            // of the probabilities of the lane's own keys
  float offset[2];         // of probability * centre of the lane's own keys, where V's format has a centre
  float norm[2];           // of V's scales: sums are of probability * scale * norm
  float sums[COLUMNS][4];

  __device__ __forceinline__ RowState() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      origin[half] = NEG_INF;
      sum[half] = offset[half] = 0.0f;
      norm[half] = inverse_power(0.0f);  // any scale is larger
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[n][j] = 0.0f;
  }

  // Moves the origins if the scores ask for it, and the norms if V's scales of visible keys do. Scores times `factor`
  // are log2 units.
  __device__ __forceinline__ void follow(const float (&scores)[KEYS / 8][4], const float (&factor)[2],
                                         const char* scales) {
    constexpr int N = VTile::TOKEN_SCALE ? 4 : 2;
    float top[N], shrink[2];
#pragma unroll
    for (int i = 0; i < N; ++i) top[i] = i < 2 ? NEG_INF : 0.0f;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) top[j / 2] = fmaxf(top[j / 2], scores[n][j]);
      if constexpr (VTile::TOKEN_SCALE) {
        const Vec<float, 4> both = value_scales(scales, n);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          top[2 + j / 2] = fmaxf(top[2 + j / 2], scores[n][j] == NEG_INF ? 0.0f : fabsf(both.v[j % 2 * 2]));
      }
    }
    group_max<4>(top);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shrink[half] = 1.0f;
      const float found = top[half] * factor[half];
      if (found > origin[half] + MAX_GROWTH) {
        shrink[half] = exp2f(origin[half] - found);
        origin[half] = found;
        sum[half] *= shrink[half];
        offset[half] *= shrink[half];
      }
      if constexpr (VTile::TOKEN_SCALE) {
        if (top[2 + half] * norm[half] > MAX_SCALE) {
          const float wanted = inverse_power(top[2 + half]);
          shrink[half] *= wanted / norm[half];
          norm[half] = wanted;
        }
      }
    }
    if (shrink[0] == 1.0f && shrink[1] == 1.0f) return;
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[n][j] *= shrink[j / 2];
  }

  // Probabilities of 16 keys as the A operand of P.V, from their scores and V's scales.
  __device__ __forceinline__ void make_probs(const float (&scores)[KEYS / 8][4], const float (&factor)[2],
                                             const char* scales, int step, uint32_t (&probs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // keys 16 * step + 8 * (i / 2) + 2t and the next, row half i % 2
      const int half = i % 2, n = 2 * step + i / 2;
      const float from = softmax_origin(origin[half]);
      float low = exp2f(fmaf(scores[n][2 * half], factor[half], -from));
      float high = exp2f(fmaf(scores[n][2 * half + 1], factor[half], -from));
      sum[half] += low + high;
      if constexpr (VTile::TOKEN_SCALE) {
        const Vec<float, 4> both = value_scales(scales, n);
        if constexpr (VTile::Fragments::CENTRE != 0.0f)
          offset[half] = fmaf(low, both.v[1], fmaf(high, both.v[3], offset[half]));
        low *= both.v[0] * norm[half];
        high *= both.v[2] * norm[half];
      }
      probs[i] = pack_pair(low, high);
    }
  }

  // Leaves origins and sums in state [2][ROWS], outputs [ROWS][OUT_STRIDE].
  __device__ __forceinline__ void put_down(float* state, float* outputs) {
    float totals[4] = {sum[0], sum[1], offset[0], offset[1]}, scale[2], shift[2];
    group_sum<4>(totals);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] = VTile::TOKEN_SCALE ? 1.0f / norm[half] : 1.0f;
      shift[half] = totals[2 + half];
      if (threadIdx.x % 4 == 0) {
        state[lane_row(half)] = origin[half];
        state[ROWS + lane_row(half)] = totals[half];
      }
    }
    ::put_down(sums, scale, shift, outputs);
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

// Starts the block's copies of a tile whose rows are all in pages and HEAD_DIM long: few instructions, since nearly
// every tile is such.
template <typename Tile>
__device__ __forceinline__ void copy_whole(char* tile, const char* const* rows) {
  constexpr int PIECES = Tile::PIECES, EACH = THREADS / PIECES;  // of a row; rows at once
  constexpr bool REGULAR = THREADS % PIECES == 0 && EACH % 8 == 0;  // only the row changes from copy to copy
#pragma unroll
  for (int first = 0; first < KEYS * PIECES; first += THREADS) {
    const int index = REGULAR ? threadIdx.x : first + threadIdx.x, rows_down = REGULAR ? first / PIECES : 0;
    if (KEYS * PIECES % THREADS != 0 && first + threadIdx.x >= KEYS * PIECES) break;
    const int row = index / PIECES, piece = index % PIECES;
    cp_async16(tile + Tile::offset(row, piece) + rows_down * Tile::ROW_BYTES, rows[row + rows_down] + piece * 16);
  }
}

// The tiles on their way. The threads 0 to KEYS - 1 look after the keys of a tile, the next KEYS ones after the values.
struct KeyTiles {
  const AttentionArgs& args;
  char* smem;

  __device__ __forceinline__ TokenRequest ask(const ItemKeys& item, int tile) const {
    const int key = tile * KEYS + threadIdx.x % KEYS;
    const bool wanted = threadIdx.x < 2 * KEYS && key >= item.visible.begin && key < item.visible.end;
    return item.pages.ask(args.table, key, wanted);
  }
  __device__ __forceinline__ TokenSlot slot_of(const ItemKeys& item, const TokenRequest& found) const {
    return item.pages.answer(args.table, found);
  }
  __device__ __forceinline__ void publish(const ItemKeys& item, int tile, const TokenRequest& found) const {
    if (threadIdx.x >= 2 * KEYS) return;
    const bool is_key = threadIdx.x < KEYS;
    const TokenSlot slot = slot_of(item, found);
    pointers(tile)[threadIdx.x] =
        is_key ? reinterpret_cast<const char*>(kv_row<const typename KF::Code>(args.k, args.table, slot, item.kv_head))
               : reinterpret_cast<const char*>(kv_row<const typename VF::Code>(args.v, args.table, slot, item.kv_head));
    const uint32_t in_page = __ballot_sync(FULL_MASK, slot.page >= 0);
    if (is_key && threadIdx.x % 32 == 0) known(tile)[threadIdx.x / 32] = in_page;
  }
  __device__ __forceinline__ bool all_known(int tile) const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i) all = all && known(tile)[i] == 0xffffffffu;
    return all;
  }
  __device__ __forceinline__ void copy(int tile) const {
    if (all_known(tile) && args.head_dim == HEAD_DIM && args.head_dim_v == HEAD_DIM) {
      copy_whole<KTile>(keys(tile), pointers(tile));
      copy_whole<VTile>(values(tile), pointers(tile) + KEYS);
    } else {
      KTile::template copy<KEYS, THREADS>(keys(tile), pointers(tile), args.head_dim, threadIdx.x);
      VTile::template copy<KEYS, THREADS>(values(tile), pointers(tile) + KEYS, args.head_dim_v, threadIdx.x);
    }
    cp_async_commit();
  }
  __device__ __forceinline__ char* keys(int tile) const { return smem + (tile & 1) * STAGE_BYTES; }
  __device__ __forceinline__ char* values(int tile) const { return keys(tile) + KEYS * KTile::ROW_BYTES; }
  __device__ __forceinline__ char* key_scales(int tile) const { return smem + SCALES_AT + (tile & 1) * SCALE_BYTES; }
  __device__ __forceinline__ char* value_scales(int tile) const { return key_scales(tile) + KEYS * KTile::SCALE_BYTES; }
  __device__ __forceinline__ const char** pointers(int tile) const {
    return reinterpret_cast<const char**>(smem + POINTERS_AT) + (tile & 1) * (2 * KEYS);
  }
  __device__ __forceinline__ uint32_t* known(int tile) const {
    return reinterpret_cast<uint32_t*>(smem + KNOWN_AT) + (tile & 3) * (KEYS / 32);
  }
};

// Scales of the thread's key or value, on their way to shared memory.
struct ScalesAhead {
  using K = KvScales<KF, HEAD_DIM>;
  using V = KvScales<VF, HEAD_DIM>;
  uint32_t words[(K::WORDS > V::WORDS ? K::WORDS : V::WORDS) + 1];

  __device__ __forceinline__ void load(const KeyTiles& tiles, const ItemKeys& item, const TokenRequest& found) {
    if constexpr (SCALE_BYTES > 0) {
      const AttentionArgs& args = tiles.args;
      const TokenSlot slot = tiles.slot_of(item, found);
      if (threadIdx.x < KEYS)
        K::load(head_view<KF>(args.k_scale, item.kv_head), args.table, slot, args.head_dim, words);
      else if (threadIdx.x < 2 * KEYS)
        V::load(head_view<VF>(args.v_scale, item.kv_head), args.table, slot, args.head_dim_v, words);
    }
  }
  __device__ __forceinline__ void store(const KeyTiles& tiles, int tile) const {
    if constexpr (SCALE_BYTES > 0) {
      if (threadIdx.x < KEYS)
        K::template store<false>(words, tiles.key_scales(tile), threadIdx.x);
      else if (threadIdx.x < 2 * KEYS)
        V::template store<true>(words, tiles.value_scales(tile), threadIdx.x - KEYS);
    }
  }
};

// tanh to 2^-22, without a branch.
__device__ __forceinline__ float quick_tanh(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2f(2.0f * LOG2_E * x));
}

// Natural scores from dot products in units of unit[half].
__device__ __forceinline__ void scale_scores(const AttentionArgs& args, const float (&unit)[2],
                                             float (&scores)[KEYS / 8][4]) {
  const bool capped = args.softcap > 0.0f;
  const float scale = capped ? args.softmax_scale / args.softcap : args.softmax_scale;
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[n][j] *= unit[j / 2] * scale;
  if (!capped) return;
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[n][j] = args.softcap * quick_tanh(scores[n][j]);
}

// Of visible keys alone: only they have entries in masks.
__device__ __forceinline__ void add_biases(const AttentionArgs& args, const RowBias (&bias)[2], const Visibility& rule,
                                           int key, float (&scores)[KEYS / 8][4]) {
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = rule.token(key + n * 8 + threadIdx.x % 4 * 2 + j % 2);
      if (scores[n][j] != NEG_INF) scores[n][j] = bias[j / 2].apply(args, scores[n][j], token);
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

  // 1. first addresses and scales, queries
  char* staged = Q_IN_RING ? tiles.keys(tile + 1) : smem + RING_BYTES;
  float* factors = reinterpret_cast<float*>(smem + FACTORS_AT);
  ScalesAhead next_scales;
  {
    const ItemKeys own(args, rows);
    const TokenRequest first = tiles.ask(own, tile), second = tiles.ask(own, tile + 1);
    stage_queries<THREADS>(args, rows, staged, factors);
    tiles.publish(own, tile, first);
    tiles.publish(own, tile + 1, second);
    next_scales.load(tiles, own, first);
    next_scales.store(tiles, tile);
    next_scales.load(tiles, own, second);
    if (threadIdx.x == 0) keys = own;
  }
  __syncthreads();
  tiles.copy(tile);
  TokenRequest next = tiles.ask(keys, tile + 2);
  const Queries<Q_IN_SHARED> q(staged);
  const VisibleKeys seen(args, rows, smem);
  const Visibility rule(args, rows.item.seq);
  RowBias bias[2];
  if constexpr (BIAS) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      bias[half] = RowBias(args, rows.row(args, min(lane_row(half), rows.num_rows - 1)));
  }
  // plain scores are scaled on their way into exp2
  const bool plain = !BIAS && args.softcap == 0.0f && args.softmax_scale > 0.0f;
  float unit[2] = {1.0f, 1.0f}, factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (KTile::E > 2) unit[half] = factors[lane_row(half)];
    factor[half] = plain ? LOG2_E * args.softmax_scale * unit[half] : LOG2_E;
  }

  // 2. one tile per step
  for (; tile * KEYS < keys.visible.end; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there for all warps, and nobody still reads the one before
    if ((tile + 1) * KEYS < keys.visible.end) tiles.copy(tile + 1);
    next_scales.store(tiles, tile + 1);
    tiles.publish(keys, tile + 2, next);
    next_scales.load(tiles, keys, next);
    next = tiles.ask(keys, tile + 3);
    if (seen.none_seen(tile * KEYS)) continue;

    float scores[KEYS / 8][4] = {};
    multiply_keys<KEYS>(tiles.keys(tile), tiles.key_scales(tile), q, factors, scores);
    if (!plain) scale_scores(args, unit, scores);
    if (!seen.all_seen(tile * KEYS) || !tiles.all_known(tile))
      hide_keys(seen, tiles.known(tile), tile * KEYS, scores);
    if constexpr (BIAS) add_biases(args, bias, rule, tile * KEYS, scores);
    state.follow(scores, factor, tiles.value_scales(tile));
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      uint32_t probs[4];
      state.make_probs(scores, factor, tiles.value_scales(tile), step, probs);
      add_values(tiles.values(tile), tiles.value_scales(tile), step, probs, state.sums);
    }
  }
}

__device__ __forceinline__ void attend_item(const AttentionArgs& args, int index, char* smem) {
  RowState state;
  attend_keys(args, index, smem, state);

  // 3. outputs, in place of the ring
  __syncthreads();
  float* found = reinterpret_cast<float*>(smem + STATE_AT);
  state.put_down(found, reinterpret_cast<float*>(smem));
  __syncthreads();
  const RowTile rows(args, index);  // again: nothing of it takes registers while keys are attended to
  merge_and_store(args, rows, {found, smem, 1, OUT_BYTES, OUT_STRIDE, 1});
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
