// SPDX-License-Identifier: Apache-2.0
// attention_mma.cuh - attention of many packed query rows over keys of any cache format on tensor cores, as
// FlashAttention-2 does it: mma.m16n8k16, tiles of K and V shared by the warps and converted in registers
// (kv_fragments.cuh). A warp has 32 of 128 rows where registers suffice (M_TILES), else 16: what it reads of K and V
// then serves two products, and shared memory keeps up with the tensor cores.
//
// For every item of the block:
//   1. the queries, in the order of k slots, go through shared memory into A fragments (with plain keys those of HELD
//      k-steps stay in registers, the others are read again every time); rows and scales of the first two tiles are
//      looked up
//   2. one tile of KEYS keys per step, AT_ONCE keys at a time. While tile j is worked on, tile j + 1 is copied by
//      cp.async to the other stage of the ring, the row addresses of tile j + 2 are published, its scales are loaded,
//      and the page entries of tile j + 3 are on their way
//      2a. scores = Q.K^T in float32, scales of K, softcap, biases; hidden keys -inf. Keys that every row of the warp
//          sees skip hiding, those that none of them sees are skipped altogether
//      2b. probabilities relative to `origin`, which follows the largest score only when that is 2^8 times ahead; times
//          V's scales, rounded to V's operand type as the A operand of P.V
//      2c. sums += P.V
//   3. outputs and state go to shared memory in place of ring and queries and are stored; the last block to bring a
//      piece of a unit merges it
// Keys are taken at multiples of AT_ONCE, a hidden key adds exactly nothing, and origins and norms follow visible keys
// alone: a row's bits depend on its own keys and on where its items are cut, not on the rows beside it, nor on ROWS.
// So that no two builds round a row differently, a product that meets a sum is fmaf or __fmul_rn, and longer sums are
// __fadd_rn: what a compiler fuses and, on the CPU, reorders depends on the code around it.
//
// Scales of V per token: probabilities are p * s * norm in half, norm the power of two that brings the largest s a row
// has seen to [1, 64); sums are divided by it in the end.
//
// legal      T in {__half, __nv_bfloat16}; KF and VF any tags but KvPlain of another type than T; HEAD_DIM 64, 128, 256
//            (both head dims padded to it); ROWS 64 or 128, with HEAD_DIM 256 only 64; ALIGNED 1 (rows of k, v and out
//            at multiples of 16 bytes; q anywhere); BIAS 0, 1
// launch     block (THREADS), any grid, MIN_BLOCKS per multiprocessor fill it; 4 block barriers per item and one per
//            tile, two more for a partial result, a third to merge; dynamic shared memory SHARED_BYTES, at most 99
//            KiB, mirrored by _prefill_mma_launch in cupyattn/attn/plans.py
#ifndef CUPYATTN_ATTENTION_MMA_CUH
#define CUPYATTN_ATTENTION_MMA_CUH

#include "attention_products.cuh"
#include "attention_store.cuh"
#include "cp_async.cuh"
#include "softcap.cuh"

constexpr int THREADS = ROWS / WARP_ROWS * 32;
// Keys whose scores registers hold, the same for any ROWS: bits depend on it.
constexpr int AT_ONCE = HEAD_DIM > 128 || (TWO_TILES && (HEAD_DIM == 128 || GROUP_SCALE)) ? 32 : 64;
constexpr int KEYS = KTile::ROW_BYTES + VTile::ROW_BYTES > 256 ? AT_ONCE : 64;    // of a tile
constexpr int STAGE_BYTES = KEYS * (KTile::ROW_BYTES + VTile::ROW_BYTES);         // [K, V][KEYS] rows
constexpr int SCALE_BYTES = KEYS * (KTile::SCALE_BYTES + VTile::SCALE_BYTES);     // of a stage: [K, V][KEYS]
constexpr int RING_BYTES = 2 * STAGE_BYTES;
constexpr int Q_BYTES = ROWS * HEAD_DIM * 2;
constexpr int OUT_BYTES = ROWS * OUT_STRIDE * 4;
constexpr int MOST_HELD = KTile::E > 2 || HEAD_DIM > 128 ? 0 : 8 / M_TILES;       // 32 registers
constexpr int HELD = MOST_HELD < K_STEPS ? MOST_HELD : K_STEPS;                   // k-steps of queries in registers
constexpr bool Q_IN_SHARED = HELD < K_STEPS;                                      // the others
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
constexpr int MIN_BLOCKS = THREADS > 128 ? 1 : M_TILES == 1 && !BIAS && HEAD_DIM <= 128 && SCALE_BYTES == 0 ? 3 : 2;
constexpr float MAX_GROWTH = 8.0f;  // log2 of the largest probability relative to the origin
constexpr float MAX_SCALE = 64.0f;  // of V's scales times norm; probabilities stay far below half's largest number
static_assert((HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256) && ALIGNED, "attention_mma: HEAD_DIM, ALIGNED");
static_assert(ROWS == 64 || (ROWS == 128 && HEAD_DIM < 256), "attention_mma: ROWS");
static_assert(SHARED_BYTES <= 99 * 1024, "attention_mma: shared memory");
static_assert(THREADS == CA_THREADS && MIN_BLOCKS == CA_MIN_BLOCKS && SHARED_BYTES == CA_SHARED_BYTES,
              "attention_mma: Python and CUDA disagree on the launch");

// Power of two 2^-e with 2^e <= x < 2^(e + 1), e from -126 to 126; x >= 0.
__device__ __forceinline__ float inverse_power(float x) {
  return __uint_as_float((254u - min(max(__float_as_uint(x) >> 23, 1u), 253u)) << 23);
}

// ---- which keys a warp sees ----------------------------------------------------------------------------

// Local keys the rows of the warp see. They wait in shared memory where the state of these rows will be:
// registers are short. A row past num_rows sees what the last one sees; what comes of it is never looked at, and a warp
// that has only such rows sees nothing.
struct VisibleKeys {
  KeyRange* rows;  // [ROWS]

  __device__ __forceinline__ VisibleKeys(const AttentionArgs& args, const RowTile& tile, char* smem)
      : rows(reinterpret_cast<KeyRange*>(smem + STATE_AT)) {
    const int r = warp_row() + threadIdx.x % WARP_ROWS;
    const int seen_by = warp_row() < tile.num_rows ? min(r, tile.num_rows - 1) : ROWS;
    if (threadIdx.x % 32 < WARP_ROWS) rows[r] = tile.keys(args, seen_by);
    __syncwarp();
  }
  __device__ __forceinline__ KeyRange row(int i) const { return rows[lane_row(i)]; }
  // Of the AT_ONCE keys from `key` on, by all rows of the warp, of which a lane looks at one.
  __device__ __forceinline__ bool all_seen(int key) const {
    const KeyRange own = rows[warp_row() + threadIdx.x % WARP_ROWS];
    return __all_sync(FULL_MASK, key >= own.begin && key + AT_ONCE <= own.end);
  }
  __device__ __forceinline__ bool none_seen(int key) const {
    const KeyRange own = rows[warp_row() + threadIdx.x % WARP_ROWS];
    return __all_sync(FULL_MASK, key >= own.end || key + AT_ONCE <= own.begin);
  }
};

// ---- softmax -------------------------------------------------------------------------------------------

// What the lane has found for its rows.
struct RowState {
  float origin[LANE_ROWS];         // what probabilities are relative to, log2; follows the largest score
  float sum[LANE_ROWS];            // of the probabilities of the lane's own keys
  float offset[LANE_ROWS];         // of probability * centre of the lane's own keys, where V's format has a centre
  float norm[LANE_ROWS];           // of V's scales: sums are of probability * scale * norm
  float sums[COLUMNS][4 * M_TILES];

  __device__ __forceinline__ RowState() {
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) {
      origin[i] = NEG_INF;
      sum[i] = offset[i] = 0.0f;
      norm[i] = inverse_power(0.0f);  // any scale is larger
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int j = 0; j < 4 * M_TILES; ++j) sums[n][j] = 0.0f;
  }

  // Moves the origins if the scores ask for it, and the norms if V's scales of visible keys do; `whole`: of all keys.
  // Scores times `factor` are log2 units.
  __device__ __forceinline__ void follow(const float (&scores)[AT_ONCE / 8][4 * M_TILES],
                                         const float (&factor)[LANE_ROWS], const char* scales, bool whole) {
    constexpr int N = VTile::TOKEN_SCALE ? 2 * LANE_ROWS : LANE_ROWS;
    float top[N], shrink[LANE_ROWS];
#pragma unroll
    for (int i = 0; i < N; ++i) top[i] = i < LANE_ROWS ? NEG_INF : 0.0f;
#pragma unroll
    for (int n = 0; n < AT_ONCE / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4 * M_TILES; ++j) top[j / 2] = fmaxf(top[j / 2], scores[n][j]);
    if constexpr (VTile::TOKEN_SCALE) {
#pragma unroll
      for (int n = 0; n < AT_ONCE / 8; ++n) {
        const Vec<float, 4> both = value_scales(scales, n);
        if (whole) {
          top[LANE_ROWS] = fmaxf(top[LANE_ROWS], fmaxf(fabsf(both.v[0]), fabsf(both.v[2])));
        } else {
#pragma unroll
          for (int j = 0; j < 4 * M_TILES; ++j)
            top[LANE_ROWS + j / 2] =
                fmaxf(top[LANE_ROWS + j / 2], scores[n][j] == NEG_INF ? 0.0f : fabsf(both.v[j % 2 * 2]));
        }
      }
#pragma unroll
      for (int i = 1; i < LANE_ROWS; ++i)
        if (whole) top[LANE_ROWS + i] = top[LANE_ROWS];
    }
    group_max<4>(top);
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) {
      shrink[i] = 1.0f;
      const float found = __fmul_rn(top[i], factor[i]);
      if (found > origin[i] + MAX_GROWTH) {
        shrink[i] = exp2f(origin[i] - found);
        origin[i] = found;
        sum[i] = __fmul_rn(sum[i], shrink[i]);
        offset[i] = __fmul_rn(offset[i], shrink[i]);
      }
      if constexpr (VTile::TOKEN_SCALE) {
        if (top[LANE_ROWS + i] * norm[i] > MAX_SCALE) {
          const float wanted = inverse_power(top[LANE_ROWS + i]);
          shrink[i] *= wanted / norm[i];
          norm[i] = wanted;
        }
      }
    }
    bool all_stay = true;
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) all_stay = all_stay && shrink[i] == 1.0f;
    if (all_stay) return;
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int j = 0; j < 4 * M_TILES; ++j) sums[n][j] *= shrink[j / 2];
  }

  // Probabilities of 16 keys as the A operands of P.V, from their scores and V's scales.
  __device__ __forceinline__ void make_probs(const float (&scores)[AT_ONCE / 8][4 * M_TILES],
                                             const float (&factor)[LANE_ROWS], const char* scales, int step,
                                             uint32_t (&probs)[4 * M_TILES]) {
#pragma unroll
    for (int high_keys = 0; high_keys < 2; ++high_keys) {  // keys 16 * step + 8 * high_keys + 2t and the next
      const int n = 2 * step + high_keys;
      Vec<float, 4> both;
      if constexpr (VTile::TOKEN_SCALE) both = value_scales(scales, n);
#pragma unroll
      for (int i = 0; i < LANE_ROWS; ++i) {
        const float from = softmax_origin(origin[i]);
        float low = exp2f(fmaf(scores[n][2 * i], factor[i], -from));
        float high = exp2f(fmaf(scores[n][2 * i + 1], factor[i], -from));
        sum[i] = __fadd_rn(sum[i], __fadd_rn(low, high));
        if constexpr (VTile::TOKEN_SCALE) {
          if constexpr (VTile::Fragments::CENTRE != 0.0f)
            offset[i] = fmaf(low, both.v[1], fmaf(high, both.v[3], offset[i]));
          low *= both.v[0] * norm[i];
          high *= both.v[2] * norm[i];
        }
        probs[i / 2 * 4 + 2 * high_keys + i % 2] = pack_pair(low, high);
      }
    }
  }

  // Leaves origins and sums in state [2][ROWS], outputs [ROWS][OUT_STRIDE].
  __device__ __forceinline__ void put_down(float* state, float* outputs) {
    float totals[2 * LANE_ROWS], scale[LANE_ROWS], shift[LANE_ROWS];
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) {
      totals[i] = sum[i];
      totals[LANE_ROWS + i] = offset[i];
    }
    group_sum<4>(totals);
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i) {
      scale[i] = VTile::TOKEN_SCALE ? 1.0f / norm[i] : 1.0f;
      shift[i] = totals[LANE_ROWS + i];
      if (threadIdx.x % 4 == 0) {
        state[lane_row(i)] = origin[i];
        state[ROWS + lane_row(i)] = totals[i];
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
// every tile is such. A copy after a load from shared memory costs three more of them, so the loads come first.
template <typename Tile>
__device__ __forceinline__ void copy_whole(char* tile, const char* const* rows) {
  constexpr int PIECES = Tile::PIECES, EACH = THREADS / PIECES;  // of a row; rows at once
  constexpr bool REGULAR = THREADS % PIECES == 0 && EACH % 8 == 0;  // only the row changes from copy to copy
  constexpr int ALL = KEYS * PIECES, COPIES = ceil_div(ALL, THREADS), BATCH = COPIES < 8 ? COPIES : 8;
#pragma unroll
  for (int start = 0; start < COPIES; start += BATCH) {
    const char* from[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int index = (start + i) * THREADS + threadIdx.x;
      if (ALL % THREADS != 0 && index >= ALL) break;
      from[i] = rows[REGULAR ? threadIdx.x / PIECES + (start + i) * EACH : index / PIECES];
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int index = (start + i) * THREADS + threadIdx.x;
      if (ALL % THREADS != 0 && index >= ALL) break;
      const int piece = (REGULAR ? threadIdx.x : index) % PIECES;
      const int place = REGULAR ? Tile::offset(threadIdx.x / PIECES, piece) + (start + i) * EACH * Tile::ROW_BYTES
                                : Tile::offset(index / PIECES, piece);
      cp_async16(tile + place, from[i] + piece * 16);
    }
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

// Natural scores from dot products in units of unit[i].
__device__ __forceinline__ void scale_scores(const AttentionArgs& args, const float (&unit)[LANE_ROWS],
                                             float (&scores)[AT_ONCE / 8][4 * M_TILES]) {
  const ScoreScale natural(args);
#pragma unroll
  for (int n = 0; n < AT_ONCE / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4 * M_TILES; ++j) scores[n][j] = __fmul_rn(scores[n][j], unit[j / 2] * natural.scale);
  if (natural.cap == 0.0f) return;
#pragma unroll
  for (int n = 0; n < AT_ONCE / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4 * M_TILES; ++j) scores[n][j] = natural.cap * quick_tanh(scores[n][j]);
}

// Of visible keys alone: only they have entries in masks.
__device__ __forceinline__ void add_biases(const AttentionArgs& args, const RowBias (&bias)[LANE_ROWS],
                                           const Visibility& rule, int key, float (&scores)[AT_ONCE / 8][4 * M_TILES]) {
#pragma unroll
  for (int n = 0; n < AT_ONCE / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4 * M_TILES; ++j) {
      const int token = rule.token(key + n * 8 + threadIdx.x % 4 * 2 + j % 2);
      if (scores[n][j] != NEG_INF) scores[n][j] = bias[j / 2].apply(args, scores[n][j], token);
    }
}

__device__ __forceinline__ void hide_keys(const VisibleKeys& seen, const uint32_t* known, int key,
                                          float (&scores)[AT_ONCE / 8][4 * M_TILES]) {
  const int column = threadIdx.x % 4 * 2;
  KeyRange range[LANE_ROWS];
#pragma unroll
  for (int i = 0; i < LANE_ROWS; ++i) range[i] = seen.row(i);
#pragma unroll
  for (int n = 0; n < AT_ONCE / 8; ++n) {
    const uint32_t found = known[n / 4] >> (n % 4 * 8 + column);
#pragma unroll
    for (int j = 0; j < 4 * M_TILES; ++j) {
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
  const Queries<Q_IN_SHARED, HELD> q(staged);
  const VisibleKeys seen(args, rows, smem);
  const Visibility rule(args, rows.item.seq);
  RowBias bias[LANE_ROWS];
  if constexpr (BIAS) {
#pragma unroll
    for (int i = 0; i < LANE_ROWS; ++i)
      bias[i] = RowBias(args, rows.row(args, min(lane_row(i), rows.num_rows - 1)));
  }
  // plain scores are scaled on their way into exp2
  const bool plain = !BIAS && args.softcap == 0.0f && args.softmax_scale > 0.0f;
  float unit[LANE_ROWS], factor[LANE_ROWS];
#pragma unroll
  for (int i = 0; i < LANE_ROWS; ++i) {
    unit[i] = KTile::E > 2 ? factors[lane_row(i)] : 1.0f;
    factor[i] = plain ? LOG2_E * args.softmax_scale * unit[i] : LOG2_E;
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
#pragma unroll 1
    for (int first = 0; first < KEYS; first += AT_ONCE) {
      const int key = tile * KEYS + first;
      if (seen.none_seen(key)) continue;
      float scores[AT_ONCE / 8][4 * M_TILES] = {};
      multiply_keys<AT_ONCE>(tiles.keys(tile) + first * KTile::ROW_BYTES,
                             tiles.key_scales(tile) + first * KTile::SCALE_BYTES, q, factors, scores);
      if (!plain) scale_scores(args, unit, scores);
      const bool whole = seen.all_seen(key) && tiles.all_known(tile);
      if (!whole) hide_keys(seen, tiles.known(tile) + first / 32, key, scores);
      if constexpr (BIAS) add_biases(args, bias, rule, key, scores);
      const char* scales = tiles.value_scales(tile) + first * VTile::SCALE_BYTES;
      state.follow(scores, factor, scales, whole && !BIAS);
#pragma unroll
      for (int step = 0; step < AT_ONCE / 16; ++step) {
        uint32_t probs[4 * M_TILES];
        state.make_probs(scores, factor, scales, step, probs);
        add_values(tiles.values(tile), tiles.value_scales(tile), first / 16 + step, probs, state.sums);
      }
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
