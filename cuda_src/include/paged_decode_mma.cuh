// SPDX-License-Identifier: Apache-2.0
// paged_decode_mma.cuh - attention of 16 packed query rows over cached keys on tensor cores: mma.m16n8k16 on K and V of
// any cache format, converted in registers (kv_fragments.cuh).
//
// For every item of the block:
//   1. each warp starts the copies of its first tiles; the queries, in the order of k slots, go through shared memory
//      into A fragments (HEAD_DIM 256: stay in shared memory)
//   2. each warp works alone on every WARPS-th tile of TILE keys, counted from local key 0, through its own ring of
//      STAGES tiles filled by cp.async. While tile i is worked on, tiles i + 1 to i + STAGES - 1 are on their way, the
//      row addresses of tile i + STAGES are published, its scales and the page entries of the tile after it are loaded
//      2a. scores = Q.K^T in float32, scales of K, softmax_scale, biases; hidden keys -inf, where there are any
//      2b. probabilities relative to `origin`, which follows the largest one only when that is 2^8 times ahead; times
//          V's scales, rounded to V's operand type as the A operand of P.V
//      2c. sums += P.V
//   3. outputs and state go to shared memory in place of the ring, are merged in the order of the warps and stored; the
//      last block to bring a piece of a unit merges it
// A hidden key adds exactly nothing, so the bits of a unit's rows depend on the unit's keys and on where it is cut,
// nothing else.
//
// Scales of V per token: p * s is rounded to half, so the origin follows the largest score times the largest scale of a
// tile; p alone may then be any float32 number.
//
// legal      T in {__half, __nv_bfloat16}; KF and VF any tags but KvPlain of another type than T; HEAD_DIM 64, 128,
//            256 (both head dims padded to it); ROWS 16; ALIGNED 1 (rows of k, v and out at multiples of 16 bytes);
//            BIAS 0, 1
// launch     block (32 * WARPS), any grid, 2 blocks per multiprocessor fill it; 4 block barriers per item, two more
//            when a unit is merged; dynamic shared memory SHARED_BYTES, at most 99 KiB, mirrored by _decode_mma_launch
//            in cupyattn/attn/plans.py
#ifndef CUPYATTN_PAGED_DECODE_MMA_CUH
#define CUPYATTN_PAGED_DECODE_MMA_CUH

#include "attention_products.cuh"
#include "attention_store.cuh"
#include "cp_async.cuh"
#include "softcap.cuh"

constexpr int WARPS = HEAD_DIM > 128 ? 2 : 4;
constexpr int TOKEN_BYTES = KTile::ROW_BYTES + VTile::ROW_BYTES;  // of codes
constexpr int TOKEN_SCALES = KTile::SCALE_BYTES + VTile::SCALE_BYTES;  // bytes
// Tokens of a warp's step: as many as registers suffice for
constexpr int TILE = HEAD_DIM <= 128 && TOKEN_BYTES + TOKEN_SCALES <= 272 ? 32 : 16;
constexpr int STRIDE = WARPS * TILE;                              // from tile to tile of a warp
constexpr int TILE_BYTES = TILE * TOKEN_BYTES;
constexpr int SCALE_BYTES = TILE * TOKEN_SCALES;
constexpr int STAGE_BYTES = TILE_BYTES + SCALE_BYTES;     // [K, V][TILE] rows, then [K, V][TILE] scales
constexpr int POINTER_BYTES = 2 * TILE * 8;               // of a warp: [K, V][TILE]
constexpr bool Q_IN_SHARED = HEAD_DIM > 128;              // else in registers, and staged in the ring's last stage
constexpr int Q_BYTES = ROWS * HEAD_DIM * 2;
constexpr int BESIDE_BYTES =  // what is not rings
    (Q_IN_SHARED ? Q_BYTES : 0) + WARPS * (POINTER_BYTES + 2 * ROWS * 4) + 4 * ROWS * 4;
constexpr int MAX_STAGES = (99 * 1024 - BESIDE_BYTES) / (WARPS * STAGE_BYTES);
constexpr int WANTED_STAGES = 1 + ceil_div(96 * 1024, 2 * WARPS * TILE_BYTES);  // 2 blocks have 96 KiB on their way
constexpr int STAGES = WANTED_STAGES < MAX_STAGES ? WANTED_STAGES : MAX_STAGES;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;
// Blocks' shared memory: [WARPS] rings, queries if they stay, [WARPS] pointers, state, factors
constexpr int Q_AT = Q_IN_SHARED ? WARPS * RING_BYTES : RING_BYTES - STAGE_BYTES;
constexpr int POINTERS_AT = WARPS * RING_BYTES + (Q_IN_SHARED ? Q_BYTES : 0);
constexpr int STATE_AT = POINTERS_AT + WARPS * POINTER_BYTES;  // float [WARPS][2][ROWS]; before, KeyRange [WARPS][ROWS]
constexpr int FACTORS_AT = STATE_AT + WARPS * 2 * ROWS * 4;    // float [2][ROWS]
constexpr int MERGE_AT = FACTORS_AT + 2 * ROWS * 4;            // int [2][ROWS], finish_item's
constexpr int SHARED_BYTES = MERGE_AT + 2 * ROWS * 4;
constexpr int SCALE_BATCH = HEAD_DIM > 128 ? 1 : STAGES;  // tiles whose scales are loaded at once in the beginning
constexpr float MAX_GROWTH = 8.0f;  // log2 of the largest probability, times V's scale, relative to the origin
static_assert(ROWS == 16 && ALIGNED, "paged_decode_mma: one m16 tile of 16-byte aligned rows");
static_assert(STAGES >= 2 && SHARED_BYTES <= 99 * 1024, "paged_decode_mma: shared memory");
static_assert(SHARED_BYTES == CA_SHARED_BYTES, "paged_decode_mma: Python and CUDA disagree on shared memory");
static_assert(ROWS * OUT_STRIDE * 4 <= RING_BYTES, "paged_decode_mma: a warp's result must fit in its ring");
static_assert(Q_IN_SHARED || Q_BYTES <= STAGE_BYTES, "paged_decode_mma: queries must fit in a stage");

// ---- a warp's tiles ------------------------------------------------------------------------------------

// What lanes do for a tile that is not in shared memory yet: a lane stands for one of its tokens, or with 16 tokens
// lanes 0 to 15 for their keys, the others for their values.
struct TileAhead {
  static constexpr bool BOTH = TILE == 32;
  static constexpr uint32_t ALL = BOTH ? 0xffffffffu : 0xffffu;
  using KScales = KvScales<KF, HEAD_DIM>;
  using VScales = KvScales<VF, HEAD_DIM>;
  const AttentionArgs& args;
  // Of the lane's token of the tile to be asked for next: its slot in the page, and the page's entry in the table.
  int slot;
  int64_t column;
  int slot_step, column_step;   // to the warp's next tile
  int end;                      // of the visible tokens that the table has an entry for
  bool whole;                   // rows end with a piece
  HeadRows keys, values, key_scales, value_scales;  // without BOTH the lane's own are in keys and key_scales
  int64_t key_zeros, value_zeros;                   // base in place of that of the scales

  __device__ __forceinline__ TileAhead(const AttentionArgs& a, const RowTile& rows, int key) : args(a) {
    const PageTable& table = args.table;
    const SequencePages pages(table, rows.item.seq);
    const bool paged = table.row_starts == nullptr;
    const int token = key + threadIdx.x % TILE;
    const int page_size = paged ? table.page_size : 0x7fffffff;
    end = static_cast<int>(min(static_cast<int64_t>(rows.visible.end), static_cast<int64_t>(pages.columns) *
                                                                           (paged ? page_size : 1)));
    const int first = token / page_size;
    slot = token - first * page_size + (paged ? 0 : static_cast<int>(pages.first));
    column = paged ? pages.first + first : 0;
    column_step = STRIDE / page_size;
    slot_step = STRIDE - column_step * page_size;

    whole = KTile::ends_with_a_piece(args.head_dim) && VTile::ends_with_a_piece(args.head_dim_v);

    const int64_t head = rows.item.kv_head;
    const KvView k = head_view<KF>(args.k, head), v = head_view<VF>(args.v, head);
    keys = HeadRows::of<typename KF::Code>(k.data, k.offset, k.stride_page, k.stride_token, table);
    values = HeadRows::of<typename VF::Code>(v.data, v.offset, v.stride_page, v.stride_token, table);
    const KvScale ks = head_view<KF>(args.k_scale, head), vs = head_view<VF>(args.v_scale, head);
    key_scales = HeadRows::of<typename KF::Scale>(ks.scale, ks.scale_offset, ks.stride_page, ks.stride_token, table);
    value_scales = HeadRows::of<typename VF::Scale>(vs.scale, vs.scale_offset, vs.stride_page, vs.stride_token, table);
    key_zeros = ks.zero != nullptr ? reinterpret_cast<int64_t>(ks.zero) : ks.zero_offset;
    value_zeros = vs.zero != nullptr ? reinterpret_cast<int64_t>(vs.zero) : vs.zero_offset;
    if constexpr (!BOTH) {
      if (!for_keys()) keys = values, key_scales = value_scales, key_zeros = value_zeros;
    }
  }
  static __device__ __forceinline__ bool for_keys() { return BOTH || threadIdx.x % 32 < TILE; }
  static __device__ __forceinline__ bool for_values() { return BOTH || threadIdx.x % 32 >= TILE; }

  // Page entry of the lane's token of the warp's next tile, that from `key` on; none if the token is before `begin`.
  __device__ __forceinline__ TokenRequest ask(int key, int begin = 0) {
    const int token = key + threadIdx.x % TILE;
    const PageTable& table = args.table;
    TokenRequest out = {table.block_ptrs != nullptr ? 0 : SequencePages::NO_ID, slot};
    if (token >= begin && token < end) {
      if (table.block_ptrs != nullptr) out.entry = table.block_ptrs[column];
      else if (table.row_starts != nullptr) out.entry = 0;
      else out.entry = static_cast<uint32_t>(table.block_table[column]);  // no sign: that would wait for it
    }
    column += column_step;
    slot += slot_step;
    if (slot >= table.page_size && table.row_starts == nullptr) slot -= table.page_size, ++column;
    return out;
  }
  __device__ __forceinline__ bool is_known(const TokenRequest& found) const {
    if (args.table.block_ptrs != nullptr) return found.entry != 0;
    const int32_t id = static_cast<int32_t>(found.entry);
    return id >= 0 && (id < args.table.num_pages || args.table.row_starts != nullptr);
  }
  // Makes the rows known to the warp; returns the tokens of the tile that are in a page, one bit each.
  __device__ __forceinline__ uint32_t publish(const TokenRequest& found, const char** pointers) const {
    const bool known = is_known(found);
    const int row = threadIdx.x % TILE;
    int64_t own = keys.base + keys.inside(found.entry, found.slot);
    const int place = for_keys() ? KTile::row_place<TILE>(row) : TILE + VTile::row_place<TILE>(row);
    pointers[place] = reinterpret_cast<const char*>(known ? own : 0);
    if constexpr (BOTH) {
      own = values.base + values.inside(found.entry, found.slot);
      pointers[TILE + VTile::row_place<TILE>(row)] = reinterpret_cast<const char*>(known ? own : 0);
    }
    return __ballot_sync(FULL_MASK, known);
  }
  // Starts the copies of the tile whose tokens `known` are in pages.
  __device__ __forceinline__ void copy(char* tile, const char* const* pointers, uint32_t known) const {
    char* const values_at = tile + TILE * KTile::ROW_BYTES;
    if (whole && (known & ALL) == ALL) {
      KTile::copy_whole<TILE>(tile, pointers, args.head_dim);
      VTile::copy_whole<TILE>(values_at, pointers + TILE, args.head_dim_v);
    } else {
      KTile::copy_any<TILE>(tile, pointers, args.head_dim);
      VTile::copy_any<TILE>(values_at, pointers + TILE, args.head_dim_v);
    }
    cp_async_commit();
  }
};

// Scales of the lane's token, on their way to shared memory.
struct ScalesAhead {
  using K = KvScales<KF, HEAD_DIM>;
  using V = KvScales<VF, HEAD_DIM>;
  static constexpr int V_AT = TileAhead::BOTH ? K::WORDS : 0;  // a lane that has one of them needs no room for two
  uint32_t words[K::WORDS + V::WORDS + 1];

  __device__ __forceinline__ void load(const TileAhead& ahead, const TokenRequest& found) {
    const AttentionArgs& args = ahead.args;
    const bool known = ahead.is_known(found);
    if (K::WORDS > 0 && ahead.for_keys())
      load<K>(known, ahead.key_scales, ahead.key_zeros, found, args.k_scale, args.head_dim, words);
    if (V::WORDS > 0 && ahead.for_values()) {
      if constexpr (TileAhead::BOTH)
        load<V>(known, ahead.value_scales, ahead.value_zeros, found, args.v_scale, args.head_dim_v, words + V_AT);
      else load<V>(known, ahead.key_scales, ahead.key_zeros, found, args.v_scale, args.head_dim_v, words);
    }
  }
  template <typename Scales>
  static __device__ __forceinline__ void load(bool known, const HeadRows& rows, int64_t zeros,
                                              const TokenRequest& found, const KvScale& view, int head_dim,
                                              uint32_t* words) {
    using Bits = typename Scales::Bits;
    const int64_t inside = rows.inside(found.entry, found.slot);
    Scales::load(known, reinterpret_cast<const Bits*>(rows.base + inside),
                 reinterpret_cast<const Bits*>(zeros + inside), view.stride_group, head_dim, words);
  }
  __device__ __forceinline__ void store(char* scales) const {
    const int token = threadIdx.x % TILE;
    if (TileAhead::for_keys()) K::template store<false>(words, scales, token);
    if (TileAhead::for_values()) V::template store<true>(words + V_AT, scales + TILE * KTile::SCALE_BYTES, token);
  }
  // Whole part of log2 of the tile's largest V scale, at least -40; the whole warp takes part.
  __device__ __forceinline__ float log2_of_values() const {
    if constexpr (!VTile::TOKEN_SCALE) return 0.0f;
    const uint32_t bits = TileAhead::for_values() ? __float_as_uint(fabsf(V::number(words[V_AT]))) : 0;
    return static_cast<float>(max(static_cast<int>(__reduce_max_sync(FULL_MASK, bits) >> 23) - 127, -40));
  }
};

// What the warp knows of a tile in its ring.
struct TileFacts {
  uint32_t known;   // tokens that are in a page, one bit each
  float v_log2;     // ScalesAhead::log2_of_values()
};

// ---- rows ----------------------------------------------------------------------------------------------

// The two query rows of a lane, g and g + 8, and what the warp has found for them.
struct LaneRows {
  KeyRange* keys;          // [ROWS] visible ones, of rows past num_rows all of the item; where the state will be left
  KeyRange common;         // visible to both rows
  const float* factors;    // [ROWS] of the dot products, unless K's format is plain
  float unit[2];           // of the scores: log2 of a probability is score * unit - origin
  RowBias bias[BIAS ? 2 : 1];
  float origin[2];         // what probabilities are relative to, log2
  float sum[2];            // of this lane's probabilities
  float offset[2];         // sum of probability * centre of this lane's tokens

  __device__ __forceinline__ LaneRows(const AttentionArgs& args, const RowTile& rows, float* state)
      : keys(reinterpret_cast<KeyRange*>(state)), common(rows.visible) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = lane_row(half);
      const KeyRange own = r < rows.num_rows ? rows.keys(args, r) : rows.visible;
      if (threadIdx.x % 4 == 0) keys[r] = own;
      common = {max(common.begin, own.begin), min(common.end, own.end)};
      if constexpr (BIAS)
        if (r < rows.num_rows) bias[half] = RowBias(args, rows.row(args, r));
      origin[half] = NEG_INF;
      sum[half] = offset[half] = 0.0f;
    }
  }
  // Scores stay dot products until they meet the exponential.
  static __device__ __forceinline__ bool is_simple(const AttentionArgs& args) {
    return !BIAS && args.softcap == 0.0f && args.softmax_scale > 0.0f;
  }
  __device__ __forceinline__ float factor(int half) const { return KTile::E > 2 ? factors[lane_row(half)] : 1.0f; }
  __device__ __forceinline__ void read_factors(const AttentionArgs& args, const float* staged) {
    factors = staged;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      unit[half] = is_simple(args) ? factor(half) * args.softmax_scale * LOG2_E : 1.0f;
  }

  // Dot products to scores: -inf where hidden. known: tokens of the tile that are in a page.
  __device__ __forceinline__ void finish_scores(const AttentionArgs& args, const RowTile& rows, int key, uint32_t known,
                                                float (&scores)[TILE / 8][4]) const {
    constexpr uint32_t ALL = TileAhead::ALL;
    const bool some_hidden = BIAS || (known & ALL) != ALL || key < common.begin || key + TILE > common.end;
    if (!is_simple(args)) {
      const ScoreScale natural(args);
#pragma unroll
      for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          scores[n][j] = natural(scores[n][j] * factor(j / 2)) * (BIAS ? 1.0f : LOG2_E);
    }
    if (!some_hidden) return;
    const KeyRange own[2] = {keys[lane_row(0)], keys[lane_row(1)]};
    const int stride = args.key_stride;
    const int first = BIAS ? Visibility(args, rows.item.seq).token(key) : 0;
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = n * 8 + threadIdx.x % 4 * 2 + j % 2;
        const bool visible = key + column >= own[j / 2].begin && key + column < own[j / 2].end &&
                             (known >> column & 1) != 0;
        if (!visible) scores[n][j] = NEG_INF;
        else if constexpr (BIAS)
          scores[n][j] = LOG2_E * bias[j / 2].apply(args, scores[n][j], first + column * stride);
      }
  }

  // Moves the origins if the tile asks for it.
  __device__ __forceinline__ void follow(const float (&scores)[TILE / 8][4], float v_log2,
                                         float (&sums)[COLUMNS][4]) {
    float top[2] = {NEG_INF, NEG_INF};
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) top[j / 2] = fmaxf(top[j / 2], scores[n][j]);
    group_max<4>(top);
    float shrink[2] = {1.0f, 1.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float reach = fmaf(top[half], unit[half], v_log2);
      if (reach > origin[half] + MAX_GROWTH) {
        shrink[half] = exp2f(origin[half] - reach);
        origin[half] = reach;
      }
    }
    if (shrink[0] == 1.0f && shrink[1] == 1.0f) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] *= shrink[half];
      offset[half] *= shrink[half];
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[n][j] *= shrink[j / 2];
  }

  // Probabilities of 16 tokens as the A operand of P.V, from their scores and V's scales.
  __device__ __forceinline__ void make_probs(const float (&scores)[TILE / 8][4], const char* scales, int step,
                                             uint32_t (&probs)[4]) {
    const float from[2] = {softmax_origin(origin[0]), softmax_origin(origin[1])};
#pragma unroll
    for (int n = 0; n < 2; ++n) {  // tokens 8n + 2t and the next
      const float (&own)[4] = scores[2 * step + n];
      Vec<float, 4> v;  // scale and centre of two tokens
      if constexpr (VTile::TOKEN_SCALE) v = value_scales(scales, 2 * step + n);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float low = exp2f(fmaf(own[2 * half], unit[half], -from[half]));
        float high = exp2f(fmaf(own[2 * half + 1], unit[half], -from[half]));
        sum[half] += low + high;
        if constexpr (VTile::TOKEN_SCALE) {
          if constexpr (VTile::Fragments::CENTRE != 0.0f)
            offset[half] = fmaf(low, v.v[1], fmaf(high, v.v[3], offset[half]));
          low *= v.v[0];
          high *= v.v[2];
        }
        probs[2 * n + half] = pack_pair(low, high);
      }
    }
  }

  // Leaves the warp's result: state [2][ROWS], outputs [ROWS][OUT_STRIDE].
  __device__ __forceinline__ void leave(const float (&sums)[COLUMNS][4], float* state, float* outputs) {
    float totals[4] = {sum[0], sum[1], offset[0], offset[1]};
    group_sum<4>(totals);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (threadIdx.x % 4 != 0) continue;
      state[lane_row(half)] = origin[half];
      state[ROWS + lane_row(half)] = totals[half];
    }
    put_down(sums, {1.0f, 1.0f}, {totals[2], totals[3]}, outputs);
  }
};

// ---- items ---------------------------------------------------------------------------------------------

// One item up to the results of each warp in shared memory.
__device__ __forceinline__ void attend_item(const AttentionArgs& args, int index, char* smem) {
  const RowTile rows(args, index);
  const int warp = threadIdx.x / 32;
  char* ring = smem + warp * RING_BYTES;
  const char** pointers = reinterpret_cast<const char**>(smem + POINTERS_AT + warp * POINTER_BYTES);

  // 1. start copying. Tiles are counted from local key 0: warp w takes w, w + WARPS, ...
  const int first_tile = rows.visible.begin / TILE;
  int key = (first_tile + (warp - first_tile % WARPS + WARPS) % WARPS) * TILE;
  TileAhead ahead(args, rows, key);
  TokenRequest asked[STAGES + 1];
#pragma unroll
  for (int s = 0; s <= STAGES; ++s) asked[s] = ahead.ask(key + s * STRIDE, rows.visible.begin);
  TileFacts facts[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; ++s) {
    __syncwarp();
    facts[s].known = ahead.publish(asked[s], pointers);
    __syncwarp();
    if (s < STAGES - 1) ahead.copy(ring + s * STAGE_BYTES, pointers, facts[s].known);
  }
  ScalesAhead next_scales;
#pragma unroll
  for (int first = 0; first < STAGES; first += SCALE_BATCH) {
    ScalesAhead batch[SCALE_BATCH];
#pragma unroll
    for (int i = 0; i < SCALE_BATCH; ++i)
      if (first + i < STAGES) batch[i].load(ahead, asked[first + i]);
#pragma unroll
    for (int i = 0; i < SCALE_BATCH; ++i) {
      if (first + i < STAGES - 1) {
        batch[i].store(ring + (first + i) * STAGE_BYTES + TILE_BYTES);
        facts[first + i].v_log2 = batch[i].log2_of_values();
      }
      if (first + i == STAGES - 1) next_scales = batch[i];  // their stage is not free yet
    }
  }
  TokenRequest next = asked[STAGES];
  float* state = reinterpret_cast<float*>(smem + STATE_AT) + warp * 2 * ROWS;
  LaneRows lane_rows(args, rows, state);
  float* factors = reinterpret_cast<float*>(smem + FACTORS_AT);
  stage_queries<32 * WARPS>(args, rows, smem + Q_AT, factors);
  __syncthreads();
  const Queries<Q_IN_SHARED> q(smem + Q_AT);
  lane_rows.read_factors(args, factors);
  if constexpr (!Q_IN_SHARED) __syncthreads();  // the last stage of the first ring is free

  // 2. one tile per step
  float sums[COLUMNS][4];
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[n][j] = 0.0f;
  int at = 0, free_at = RING_BYTES - STAGE_BYTES;  // of the tile worked on, of the one before
  for (; key < rows.visible.end; key += STRIDE) {
    cp_async_wait<STAGES - 2>();
    __syncwarp();  // the tile is there for all lanes, and nobody still reads the one before
    ahead.copy(ring + free_at, pointers, facts[STAGES - 1].known);
    next_scales.store(ring + free_at + TILE_BYTES);
    facts[STAGES - 1].v_log2 = next_scales.log2_of_values();

    const char* keys = ring + at;
    const char* values = keys + TILE * KTile::ROW_BYTES;
    const char* key_scales = keys + TILE_BYTES;
    const char* value_scales = key_scales + TILE * KTile::SCALE_BYTES;
    float scores[TILE / 8][4] = {};
    multiply_keys<TILE>(keys, key_scales, q, factors, scores);

    const TileFacts own = facts[0];
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) facts[s] = facts[s + 1];
    __syncwarp();  // all lanes have read the pointers
    facts[STAGES - 1].known = ahead.publish(next, pointers);
    next_scales.load(ahead, next);
    next = ahead.ask(key + (STAGES + 1) * STRIDE);

    lane_rows.finish_scores(args, rows, key, own.known, scores);
    lane_rows.follow(scores, own.v_log2, sums);
#pragma unroll
    for (int step = 0; step < TILE / 16; ++step) {
      uint32_t probs[4];
      lane_rows.make_probs(scores, value_scales, step, probs);
      add_values(values, value_scales, step, probs, sums);
    }
    free_at = at;
    at = at == RING_BYTES - STAGE_BYTES ? 0 : at + STAGE_BYTES;
  }

  // 3. put down what the warp has, in place of its ring
  cp_async_wait<0>();
  __syncwarp();
  lane_rows.leave(sums, state, reinterpret_cast<float*>(ring));
}

__device__ __forceinline__ void decode_on_tensor_cores(const AttentionArgs& args) {
  CA_DYN_SMEM(char, smem);
  const int last = args.work.worker_items[blockIdx.x + 1];
  for (int index = args.work.worker_items[blockIdx.x]; index < last; ++index) {
    attend_item(args, index, smem);
    __syncthreads();
    const RowTile rows(args, index);  // again: registers are better spent on sums meanwhile
    const float* state = reinterpret_cast<const float*>(smem + STATE_AT);
    merge_and_store(args, rows, {state, smem, WARPS, RING_BYTES, OUT_STRIDE, 1});
    __syncthreads();  // state and outputs have been read
    finish_item(args, rows, reinterpret_cast<int*>(smem + MERGE_AT));
  }
}

#endif  // CUPYATTN_PAGED_DECODE_MMA_CUH
