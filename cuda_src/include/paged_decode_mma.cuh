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
//            in cupyattn/attention_plans.py
#ifndef CUPYATTN_PAGED_DECODE_MMA_CUH
#define CUPYATTN_PAGED_DECODE_MMA_CUH

#include "attention_products.cuh"
#include "attention_store.cuh"
#include "cp_async.cuh"

constexpr int WARPS = HEAD_DIM > 128 ? 2 : 4;
constexpr int TOKEN_BYTES = KTile::ROW_BYTES + VTile::ROW_BYTES;  // of codes
constexpr int TILE = TOKEN_BYTES < 256 ? 32 : 16;                 // tokens of a warp's step
constexpr int STAGE_BYTES = TILE * TOKEN_BYTES;                   // [K, V][TILE] rows
constexpr int IN_FLIGHT = 96 * 1024 / (2 * WARPS);                // bytes of a warp on their way: 96 KiB with 2 blocks
constexpr int MAX_STAGES = (HEAD_DIM > 128 ? 40 : 24) * 1024 / STAGE_BYTES;
constexpr int WANTED_STAGES = 1 + ceil_div(IN_FLIGHT, STAGE_BYTES);
constexpr int STAGES = WANTED_STAGES < MAX_STAGES ? WANTED_STAGES : MAX_STAGES;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;
constexpr int SCALE_BYTES = TILE * (KTile::SCALE_BYTES + VTile::SCALE_BYTES);  // of a stage: [K, V][TILE]
constexpr int POINTER_BYTES = 2 * 2 * TILE * 8;                                // [2][K, V][TILE]
constexpr int MAX_RING_STAGES = 8;
constexpr bool Q_IN_SHARED = HEAD_DIM > 128;  // else in registers, and staged in the ring's last stage
constexpr int Q_BYTES = ROWS * HEAD_DIM * 2;
// Blocks' shared memory: [WARPS] rings, queries if they stay, [WARPS] scales, [WARPS] pointers, state, factors
constexpr int Q_AT = Q_IN_SHARED ? WARPS * RING_BYTES : RING_BYTES - STAGE_BYTES;
constexpr int SCALES_AT = WARPS * RING_BYTES + (Q_IN_SHARED ? Q_BYTES : 0);
constexpr int POINTERS_AT = SCALES_AT + WARPS * STAGES * SCALE_BYTES;
constexpr int FACTS_AT = POINTERS_AT + WARPS * POINTER_BYTES;            // TileFacts [WARPS][8], of the stages
constexpr int STATE_AT = FACTS_AT + WARPS * MAX_RING_STAGES * 8;         // float [WARPS][2][ROWS]; then finish_item's
constexpr int FACTORS_AT = STATE_AT + WARPS * 2 * ROWS * 4;              // float [2][ROWS]
constexpr int SHARED_BYTES = FACTORS_AT + 2 * ROWS * 4;
constexpr int SCALE_BATCH = HEAD_DIM > 128 ? 1 : STAGES;  // tiles whose scales are loaded at once in the beginning
constexpr float MAX_GROWTH = 8.0f;  // log2 of the largest probability, times V's scale, relative to the origin
static_assert(ROWS == 16 && ALIGNED, "paged_decode_mma: one m16 tile of 16-byte aligned rows");
static_assert(STAGES >= 2 && STAGES <= MAX_RING_STAGES && SHARED_BYTES <= 99 * 1024, "paged_decode_mma: shared memory");
static_assert(ROWS * OUT_STRIDE * 4 <= RING_BYTES, "paged_decode_mma: a warp's result must fit in its ring");
static_assert(Q_IN_SHARED || Q_BYTES <= STAGE_BYTES, "paged_decode_mma: queries must fit in a stage");

// ---- a warp's tiles ------------------------------------------------------------------------------------

// What lanes do for a tile that is not in shared memory yet: a lane stands for one of its tokens, or with 16 tokens
// lanes 0 to 15 for their keys, the others for their values.
struct TileAhead {
  static constexpr bool BOTH = TILE == 32;
  const AttentionArgs& args;
  const RowTile& rows;
  SequencePages pages;
  KvView k, v;  // of the item's head
  KvScale k_scale, v_scale;

  __device__ __forceinline__ TileAhead(const AttentionArgs& a, const RowTile& r)
      : args(a), rows(r), pages(a.table, r.item.seq), k(head_view<KF>(a.k, r.item.kv_head)),
        v(head_view<VF>(a.v, r.item.kv_head)), k_scale(head_view<KF>(a.k_scale, r.item.kv_head)),
        v_scale(head_view<VF>(a.v_scale, r.item.kv_head)) {}
  static __device__ __forceinline__ bool for_keys() { return BOTH || threadIdx.x % 32 < TILE; }
  static __device__ __forceinline__ bool for_values() { return BOTH || threadIdx.x % 32 >= TILE; }

  // Page entry of the lane's token of the tile from `key` on.
  __device__ __forceinline__ TokenRequest ask(int key) const {
    const int own = key + threadIdx.x % TILE;
    return pages.ask(args.table, own, own >= rows.visible.begin && own < rows.visible.end);
  }
  __device__ __forceinline__ TokenSlot answer(const TokenRequest& found) const {
    return pages.answer(args.table, found);
  }
  // Makes the rows known to the warp; returns the tokens of the tile that are in a page, one bit each.
  __device__ __forceinline__ uint32_t publish(TokenSlot slot, const char** pointers) const {
    const int lane = threadIdx.x % 32;
    const char* key = nullptr;
    const char* value = nullptr;
    if (for_keys()) key = reinterpret_cast<const char*>(kv_row<const typename KF::Code>(k, args.table, slot, 0));
    if (for_values()) value = reinterpret_cast<const char*>(kv_row<const typename VF::Code>(v, args.table, slot, 0));
    pointers[lane] = lane < TILE ? key : value;
    if constexpr (BOTH) pointers[TILE + lane] = value;
    return __ballot_sync(FULL_MASK, slot.page >= 0);
  }
  // Starts the copies of the tile.
  __device__ __forceinline__ void copy(char* tile, const char* const* pointers) const {
    const int lane = threadIdx.x % 32;
    KTile::template copy<TILE, 32>(tile, pointers, args.head_dim, lane);
    VTile::template copy<TILE, 32>(tile + TILE * KTile::ROW_BYTES, pointers + TILE, args.head_dim_v, lane);
    cp_async_commit();
  }
};

// Scales of the lane's token, on their way to shared memory.
struct ScalesAhead {
  using K = KvScales<KF, HEAD_DIM>;
  using V = KvScales<VF, HEAD_DIM>;
  static constexpr int V_AT = TileAhead::BOTH ? K::WORDS : 0;  // a lane that has one of them needs no room for two
  uint32_t words[K::WORDS + V::WORDS + 1];

  __device__ __forceinline__ void load(const TileAhead& ahead, TokenSlot slot) {
    const AttentionArgs& args = ahead.args;
    if (ahead.for_keys()) K::load(ahead.k_scale, args.table, slot, args.head_dim, words);
    if (ahead.for_values()) V::load(ahead.v_scale, args.table, slot, args.head_dim_v, words + V_AT);
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
  KeyRange keys[2];        // visible ones; of rows past num_rows all of the item
  float factor[2];         // of the dot products
  float unit[2];           // of the scores: log2 of a probability is score * unit - origin
  RowBias bias[BIAS ? 2 : 1];
  float origin[2];         // what probabilities are relative to, log2
  float sum[2];            // of this lane's probabilities
  float offset[2];         // sum of probability * centre of this lane's tokens

  __device__ __forceinline__ LaneRows(const AttentionArgs& args, const RowTile& rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = lane_row(half);
      keys[half] = r < rows.num_rows ? rows.keys(args, r) : rows.visible;
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
  __device__ __forceinline__ void read_factors(const AttentionArgs& args, const float* factors) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor[half] = KTile::E > 2 ? factors[lane_row(half)] : 1.0f;
      unit[half] = is_simple(args) ? factor[half] * args.softmax_scale * LOG2_E : 1.0f;
    }
  }

  // Dot products to scores: -inf where hidden. known: tokens of the tile that are in a page.
  __device__ __forceinline__ void finish_scores(const AttentionArgs& args, const RowTile& rows, int key, uint32_t known,
                                                float (&scores)[TILE / 8][4]) const {
    constexpr uint32_t ALL = TILE == 32 ? 0xffffffffu : 0xffffu;
    const int begin = max(keys[0].begin, keys[1].begin), end = min(keys[0].end, keys[1].end);
    const bool some_hidden = BIAS || (known & ALL) != ALL || key < begin || key + TILE > end;
    if (!BIAS && !is_simple(args)) {
      const bool capped = args.softcap > 0.0f;
      const float inner = capped ? args.softmax_scale / args.softcap : args.softmax_scale;
#pragma unroll
      for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float score = scores[n][j] * factor[j / 2] * inner;
          scores[n][j] = LOG2_E * (capped ? args.softcap * tanhf(score) : score);
        }
    }
    if (!some_hidden) return;
    const int stride = args.key_stride;
    const int first = BIAS ? Visibility(args, rows.item.seq).token(key) : 0;
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = n * 8 + threadIdx.x % 4 * 2 + j % 2;
        const bool visible = key + column >= keys[j / 2].begin && key + column < keys[j / 2].end &&
                             (known >> column & 1) != 0;
        if (!visible) scores[n][j] = NEG_INF;
        else if constexpr (BIAS)
          scores[n][j] = masked_score(args, scores[n][j] * factor[j / 2], bias[j / 2], first + column * stride);
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
  constexpr int STRIDE = WARPS * TILE;
  const RowTile rows(args, index);
  const int warp = threadIdx.x / 32;
  char* ring = smem + warp * RING_BYTES;
  char* scales = smem + SCALES_AT + warp * STAGES * SCALE_BYTES;
  const char** pointers = reinterpret_cast<const char**>(smem + POINTERS_AT + warp * POINTER_BYTES);

  TileFacts* facts = reinterpret_cast<TileFacts*>(smem + FACTS_AT) + warp * MAX_RING_STAGES;

  // 1. start copying. Tiles are counted from local key 0: warp w takes w, w + WARPS, ...
  const TileAhead ahead(args, rows);
  const int first_tile = rows.visible.begin / TILE;
  int key = (first_tile + (warp - first_tile % WARPS + WARPS) % WARPS) * TILE;
  TokenRequest asked[STAGES + 1];
#pragma unroll
  for (int s = 0; s <= STAGES; ++s) asked[s] = ahead.ask(key + s * STRIDE);
  uint32_t newest;
#pragma unroll
  for (int s = 0; s < STAGES; ++s) {
    newest = ahead.publish(ahead.answer(asked[s]), pointers + s % 2 * 2 * TILE);
    if (s == STAGES - 1) break;
    if (threadIdx.x % 32 == 0) facts[s].known = newest;
    __syncwarp();
    ahead.copy(ring + s * STAGE_BYTES, pointers + s % 2 * 2 * TILE);
  }
  ScalesAhead next_scales;
#pragma unroll
  for (int first = 0; first < STAGES; first += SCALE_BATCH) {
    ScalesAhead batch[SCALE_BATCH];
#pragma unroll
    for (int i = 0; i < SCALE_BATCH; ++i)
      if (first + i < STAGES) batch[i].load(ahead, ahead.answer(asked[first + i]));
#pragma unroll
    for (int i = 0; i < SCALE_BATCH; ++i) {
      if (first + i < STAGES - 1) {
        batch[i].store(scales + (first + i) * SCALE_BYTES);
        const float v_log2 = batch[i].log2_of_values();
        if (threadIdx.x % 32 == 0) facts[first + i].v_log2 = v_log2;
      }
      if (first + i == STAGES - 1) next_scales = batch[i];  // their stage is not free yet
    }
  }
  TokenRequest next = asked[STAGES];
  LaneRows lane_rows(args, rows);
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
  int stage = 0, parity = (STAGES - 1) % 2;  // of the tile worked on; of the pointers of the tile to be copied
  for (; key < rows.visible.end; key += STRIDE) {
    cp_async_wait<STAGES - 2>();
    __syncwarp();  // the tile is there for all lanes, and nobody still reads the one before
    const int filled = stage == 0 ? STAGES - 1 : stage - 1;
    ahead.copy(ring + filled * STAGE_BYTES, pointers + parity * 2 * TILE);
    next_scales.store(scales + filled * SCALE_BYTES);
    const float v_log2 = next_scales.log2_of_values();
    if (threadIdx.x % 32 == 0) facts[filled] = {newest, v_log2};

    const char* keys = ring + stage * STAGE_BYTES;
    const char* key_scales = scales + stage * SCALE_BYTES;
    const char* value_scales = key_scales + TILE * KTile::SCALE_BYTES;
    float scores[TILE / 8][4] = {};
    multiply_keys<TILE>(keys, key_scales, q, factors, scores);

    parity ^= 1;
    const TokenSlot slot = ahead.answer(next);
    newest = ahead.publish(slot, pointers + parity * 2 * TILE);
    next_scales.load(ahead, slot);
    next = ahead.ask(key + (STAGES + 1) * STRIDE);

    lane_rows.finish_scores(args, rows, key, facts[stage].known, scores);
    lane_rows.follow(scores, facts[stage].v_log2, sums);
#pragma unroll
    for (int step = 0; step < TILE / 16; ++step) {
      uint32_t probs[4];
      lane_rows.make_probs(scores, value_scales, step, probs);
      add_values(keys + TILE * KTile::ROW_BYTES, value_scales, step, probs, sums);
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }

  // 3. put down what the warp has, in place of its ring
  cp_async_wait<0>();
  __syncwarp();
  float* state = reinterpret_cast<float*>(smem + STATE_AT);
  lane_rows.leave(sums, state + warp * 2 * ROWS, reinterpret_cast<float*>(ring));
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
    finish_item(args, rows, reinterpret_cast<int*>(smem + STATE_AT));
  }
}

#endif  // CUPYATTN_PAGED_DECODE_MMA_CUH
