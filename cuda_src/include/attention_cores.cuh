// SPDX-License-Identifier: Apache-2.0
// attention_cores.cuh - attention on CUDA cores: any types, formats, alignments; decode and prefill alike. A kernel
// is one call of attend_on_cores.
//
// A block takes its work items one after the other. Of an item its warps take tiles of 64 keys, counted from the
// sequence's first local key, so that neither the batch nor the window decides which warp adds what: tile t is that of
// warp t % warps. In a tile
//   scores  a lane has two keys; their dot products with all ROWS rows are its own, no lane needs another
//   softmax one meeting of the warp for the largest score of every row; probabilities go through shared memory
//   P.V     a lane has 8 output dims of all rows, for every groups-th key; value rows come straight from memory
// Where rows come from (pages, scales) is looked up two tiles ahead. On a GPU keys pass through shared memory in slices
// of 128 bytes, the next slice on its way while this one is used.
//
// launch  grid (workers), block (32 * warps), dynamic shared memory as struct Layout: _cores_launch in
//         cupyattn/attn/plans.py
// meets   per tile 2 of the warp and one per slice of keys; per item 2 of the block, 2 more for a partial result,
//         1 more to merge
#ifndef CUPYATTN_ATTENTION_CORES_CUH
#define CUPYATTN_ATTENTION_CORES_CUH

#include "attention_constants.cuh"
#include "attention_store.cuh"
#include "attention_work.cuh"
#include "hadamard.cuh"
#include "kv_format.cuh"
#include "page_table.cuh"
#include "softcap.cuh"

constexpr int TILE = KEY_TILE;                            // keys of a warp's step: a lane has `lane` and `lane + 32`
constexpr int KEYS = TILE / 32;                           // of a lane
constexpr bool BY_ROWS = ROWS >= (CA_CPU ? 8 : 4);        // q is kept [head_dim][ROWS], else [ROWS][head_dim]
constexpr int PROB_STRIDE = ROWS <= 4 ? ROWS : ROWS + 4;  // floats: 8 lanes of a 16-byte access do not conflict
constexpr int BATCH = CA_CPU ? 1 : ROWS <= 4 ? 4 : ROWS == 8 ? 2 : 1;  // value rows a lane loads before it uses them
static_assert(ROWS <= 2 || ROWS % 4 == 0, "probabilities move in pieces of 16 bytes");

#include "attention_keys.cuh"
#include "attention_rows.cuh"

// ---- a block's memory ----------------------------------------------------------------------------------

// Dynamic shared memory, in bytes from its start.
struct Layout {
  int lanes;       // lanes that share one value row, STEP elements each
  int groups;      // value rows a warp reads at once
  int key_bytes;   // KeySlices
  int warp_bytes;  // slices of keys of one warp, later its unnormalised outputs
  int stage;       // [warps][warp_bytes]
  int places;      // [warps][3] TilePlaces
  int probs;       // float [warps][TILE][PROB_STRIDE]
  int q;           // float, see BY_ROWS
  int state;       // float [warps][2][ROWS]: top and sum of each warp; then finish_item's
  int keys;        // int [2][ROWS]: first visible key, first one after
  int biases;      // RowBias [ROWS] where BIAS

  __device__ __forceinline__ Layout(int head_dim, int head_dim_v, int warps) {
    lanes = head_dim_v / STEP;
    groups = 32 / lanes;
    key_bytes = KeySlices::bytes_of_key(head_dim);
    warp_bytes = max(2 * TILE * key_bytes, groups * head_dim_v * ROWS * static_cast<int>(sizeof(float)));
    stage = 0;
    places = stage + warps * warp_bytes;
    probs = places + warps * 3 * TilePlaces::BYTES;
    q = probs + warps * TILE * PROB_STRIDE * static_cast<int>(sizeof(float));
    biases = q + ROWS * head_dim * static_cast<int>(sizeof(float));
    state = biases + (BIAS ? ROWS * static_cast<int>(sizeof(RowBias)) : 0);
    keys = state + warps * 2 * ROWS * static_cast<int>(sizeof(float));
  }
};

// ---- queries -------------------------------------------------------------------------------------------

// What a block knows of the query rows of its item, in shared memory.
struct Queries {
  float* q;
  int* keys;
  RowBias* biases;

  // Rows as float32, in the basis and with the scale per dim of the keys; rows past num_rows are zeros.
  template <typename F = KF>  // so that what the format does not need is not compiled
  __device__ __forceinline__ void load(const AttentionArgs& args, const RowTile& rows) const {
    constexpr int WIDTH = F::ROTATED ? 32 : STEP;  // dims a thread prepares: a rotation mixes 32
    const int head_dim = args.head_dim;
    for (int i = threadIdx.x; i < ROWS * head_dim / WIDTH; i += blockDim.x) {
      const int r = i % ROWS, dim = i / ROWS * WIDTH;
      EightFloats x[WIDTH / STEP];
      if (r < rows.num_rows) {
        const T* row = static_cast<const T*>(query_pointer(args.q, args, rows.row(args, r), sizeof(T)));
#pragma unroll
        for (int n = 0; n < WIDTH / STEP; ++n) x[n] = EightFloats::from(load_step<ALIGNED>(row + dim + n * STEP));
      } else {
#pragma unroll
        for (int n = 0; n < WIDTH / STEP; ++n) x[n] = EightFloats::all(0.0f);
      }
      if constexpr (F::ROTATED) hadamard32(x);
      if constexpr (F::CHANNEL) {
        const EightFloats scale = channel_scales(args.k_scale, rows.item.kv_head, dim);
#pragma unroll
        for (int j = 0; j < STEP; ++j) x[0].x[j] *= scale.x[j];
      }
#pragma unroll
      for (int n = 0; n < WIDTH / STEP; ++n) {
        if constexpr (BY_ROWS) {
#pragma unroll
          for (int j = 0; j < STEP; ++j) q[(dim + n * STEP + j) * ROWS + r] = x[n].x[j];
        } else {
          x[n].store(q + r * head_dim + dim + n * STEP);
        }
      }
    }
    for (int r = threadIdx.x; r < ROWS; r += blockDim.x) {
      const KeyRange seen = rows.keys(args, r);
      keys[r] = seen.begin;
      keys[ROWS + r] = seen.end;
      if constexpr (BIAS) biases[r] = r < rows.num_rows ? RowBias(args, rows.row(args, r)) : RowBias();
    }
  }
};

// ---- a tile --------------------------------------------------------------------------------------------

// What is the same in all tiles of a warp.
struct WarpTiles {
  const AttentionArgs& args;
  const RowTile& rows;
  Queries queries;
  KeySlices slices;
  Visibility rule;
  float* probs;   // [TILE][PROB_STRIDE]
  float* state;   // [2][ROWS]: largest scores so far, in shared memory as registers are short; sums in the end
  int lane;

  __device__ __forceinline__ void look_up(int tile, const TilePlaces& to) const {
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      const int t = i * 32 + lane;
      const int key = tile * TILE + t;
      TokenSlot at = {-1, 0};
      if (key >= rows.visible.begin && key < rows.visible.end) at = find_token(args.table, rows.item.seq, key);
      to.keys.look_up(args.k, args.k_scale, args.table, at, rows.item.kv_head, t);
      to.values.look_up(args.v, args.v_scale, args.table, at, rows.item.kv_head, t);
    }
  }

  // Dot products of the lane's first N keys with all rows; `turn` counts slices. The next tile's first slice is on its
  // way afterwards.
  template <int N>
  __device__ __forceinline__ void dot_products(const TilePlaces& places, const TilePlaces& next, int& turn,
                                               Dots<BY_ROWS>& dots) const {
    // a key without a row is read as another one of the lane; if there is none, nothing is read
    int t[N];
    bool any = false;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool is_there = places.keys.row(i * 32 + lane) != nullptr;
      t[i] = (is_there ? i : N - 1 - i) * 32 + lane;
      any |= is_there;
    }
    for (int from = 0; from < args.head_dim; from += SLICE, turn ^= 1) {
      slices.wait();
      const bool more = from + SLICE < args.head_dim;
      const Places<KF> to_fetch = {more ? places.keys.memory : next.keys.memory};
      slices.fetch(to_fetch, args.head_dim, more ? from + SLICE : 0, turn ^ 1, lane);
      if (!any) continue;
      const typename KF::Code* row[N];
#pragma unroll
      for (int i = 0; i < N; ++i) row[i] = slices.row(places.keys, t[i], from, turn);
      const int end = min(SLICE, args.head_dim - from);
#pragma unroll 1  // unrolled it takes too many registers
      for (int d = 0; d < end; d += STEP) {
        EightFloats key[N];
#pragma unroll
        for (int i = 0; i < N; ++i)
          key[i] = places.keys.eight<KeySlices::READS_ALIGNED>(row[i], t[i], args.k_scale, args.head_dim, d);
        dots.add(key, queries.q, args.head_dim, from + d);
      }
    }
  }

  // Makes scores in log2 units of the dot products of the lane's key i, -inf where a row does not see it.
  __device__ __forceinline__ void finish_scores(int tile, int i, const TilePlaces& places, RowFloats& scores) const {
    const int t = i * 32 + lane;
    const int key = places.keys.row(t) == nullptr ? -1 : tile * TILE + t;  // -1: nobody sees it
    scores = ScoreScale(args)(scores);
    if constexpr (BIAS) {
      bool seen = false;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (key < queries.keys[r] || key >= queries.keys[ROWS + r]) continue;
        scores.x[r] = queries.biases[r].apply(args, scores.x[r], rule.token(key));
        seen |= scores.x[r] > NEG_INF;
      }
      // a mask may hide a key whose value is no number: 0 times it would still be seen
      if (!seen) places.values.row(t) = nullptr;
    }
    scores *= LOG2_E;
    hide(scores, key, queries.keys);
  }

  // Probabilities of the lane's scores relative to the largest ones so far, which are returned; earlier sums and
  // outputs shrink when those grow.
  __device__ __forceinline__ RowFloats probabilities(const RowFloats (&scores)[KEYS], RowFloats& sum,
                                                     Outputs<BY_ROWS>& outputs) const {
    const RowFloats largest = warp_maximum(maximum(scores[0], scores[1]));
    const RowFloats old_top = RowFloats::load(state);
    const RowFloats top = maximum(old_top, largest);
    const RowFloats origin = softmax_origin(top);
    const RowFloats shrink = exp2(old_top - origin);
    sum *= shrink;
    outputs.shrink(shrink);
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      const RowFloats p = exp2(scores[i] - origin);
      sum += p;
      p.store(probs + (i * 32 + lane) * PROB_STRIDE);
    }
    return top;
  }

  // Adds the values of keys first, first + step, ... below `live` to the outputs from `dim` on, BATCH rows on their way
  // at a time.
  __device__ __forceinline__ void add_values(const TilePlaces& places, int first, int step, int live, int dim,
                                             Outputs<BY_ROWS>& outputs) const {
    for (; first < live; first += BATCH * step) {
      const typename VF::Code* row[BATCH];
      EightFloats value[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int t = first + i * step;
        row[i] = t < live ? places.values.row(t) : nullptr;
        if (row[i] == nullptr) continue;
        value[i] = places.values.eight<ALIGNED>(in_global(row[i]), t, args.v_scale, args.head_dim_v, dim);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (row[i] != nullptr) outputs.add(probs + (first + i * step) * PROB_STRIDE, value[i]);
    }
  }
};

// ---- the kernel ----------------------------------------------------------------------------------------

__device__ __forceinline__ void attend_to_item(const AttentionArgs& args, int item, char* smem) {
  const RowTile rows(args, item);
  const int warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Layout at(args.head_dim, args.head_dim_v, warps);
  char* stage = smem + at.stage + warp * at.warp_bytes;
  float* states = reinterpret_cast<float*>(smem + at.state);
  const Queries queries = {reinterpret_cast<float*>(smem + at.q), reinterpret_cast<int*>(smem + at.keys),
                           reinterpret_cast<RowBias*>(smem + at.biases)};
  const WarpTiles warp_tiles = {args, rows, queries, {stage, at.key_bytes}, Visibility(args, rows.item.seq),
                                reinterpret_cast<float*>(smem + at.probs) + warp * TILE * PROB_STRIDE,
                                states + warp * 2 * ROWS, lane};

  // 1. queries; where the rows of the first two tiles are
  TilePlaces here(smem + at.places + warp * 3 * TilePlaces::BYTES);
  TilePlaces next(here.keys.memory + TilePlaces::BYTES);
  TilePlaces after(next.keys.memory + TilePlaces::BYTES);
  int tile = rows.visible.begin / TILE;
  tile += (warp + warps - tile % warps) % warps;
  queries.load(args, rows);
  warp_tiles.look_up(tile, here);
  warp_tiles.look_up(tile + warps, next);
  __syncthreads();

  // 2. tiles
  if (lane == 0) RowFloats::all(NEG_INF).store(warp_tiles.state);
  RowFloats sum = RowFloats::all(0.0f);  // of this lane's keys alone
  Outputs<BY_ROWS> outputs;
  const int group = lane / at.lanes;  // lanes past groups * lanes have no part in P.V
  const int dim = (lane - group * at.lanes) * STEP;
  int turn = 0;
  warp_tiles.slices.fetch(here.keys, args.head_dim, 0, turn, lane);
  for (; tile * TILE < rows.visible.end; tile += warps) {
    // 2a. scores
    Dots<BY_ROWS> dots;
    if (tile * TILE + 32 < rows.visible.end) warp_tiles.dot_products<KEYS>(here, next, turn, dots);
    else warp_tiles.dot_products<1>(here, next, turn, dots);
    RowFloats score[KEYS];
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      score[i] = dots.of(i);
      warp_tiles.finish_scores(tile, i, here, score[i]);
    }

    // 2b. probabilities
    const RowFloats top = warp_tiles.probabilities(score, sum, outputs);
    warp_tiles.look_up(tile + 2 * warps, after);
    __syncwarp();
    if (lane == 0) top.store(warp_tiles.state);

    // 2c. outputs
    const int live = min(TILE, rows.visible.end - tile * TILE);
    warp_tiles.add_values(here, group < at.groups ? group : live, at.groups, live, dim, outputs);
    const TilePlaces done = here;
    here = next, next = after, after = done;
  }

  // 3. put down what each warp has
  sum = warp_total(sum);
  if (lane == 0) sum.store(warp_tiles.state + ROWS);
  if (group < at.groups) {
    float* to = reinterpret_cast<float*>(stage) + group * ROWS * args.head_dim_v + dim;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) outputs.row(r).store(to + r * args.head_dim_v);
  }
  __syncthreads();

  // 4. merge and store. The next item writes nothing that is read here before the block has met again.
  const RowTile again(args, item);  // worked out anew: in registers it would keep keys out
  merge_and_store(args, again, {states, smem + at.stage, warps, at.warp_bytes, args.head_dim_v, at.groups});
  finish_item(args, again, reinterpret_cast<int*>(states));
}

__device__ __forceinline__ void attend_on_cores(const AttentionArgs& args) {
  CA_DYN_SMEM(char, smem);
  const int end = args.work.worker_items[blockIdx.x + 1];
  for (int item = args.work.worker_items[blockIdx.x]; item < end; ++item) attend_to_item(args, item, smem);
}

#endif  // CUPYATTN_ATTENTION_CORES_CUH
