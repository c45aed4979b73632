// SPDX-License-Identifier: Apache-2.0
// attention_store.cuh - the ends of every attention kernel: scores with masks and biases, and how a block's results
// reach out, partial results or the merge of a unit.
//
// Merging needs no second launch: a block that has stored a partial result counts it as arrived at its unit; the last
// to arrive merges the unit's pieces, in the order the planner gave, whoever came last.
#ifndef CUPYATTN_ATTENTION_STORE_CUH
#define CUPYATTN_ATTENTION_STORE_CUH

#include "attention_constants.cuh"
#include "attention_work.cuh"
#include "eight_floats.cuh"
#include "hadamard.cuh"
#include "kv_format.cuh"
#include "online_softmax.cuh"
#include "partial_merge.cuh"

// ---- scores --------------------------------------------------------------------------------------------

// What masks and biases do to the scores of one query row.
struct RowBias {
  const char* mask;      // of this row, null for none
  const uint32_t* tree;  // words of this row, null for none
  float slope;           // ALiBi
  int position;          // of the query
  int first_new;         // first of the sequence's new tokens

  __device__ __forceinline__ RowBias() : mask(nullptr), tree(nullptr), slope(0.0f), position(0), first_new(0) {}
  __device__ __forceinline__ RowBias(const AttentionArgs& args, const QueryRow& row) : RowBias() {
    first_new = num_tokens(args, row.seq) - num_queries(args, row.seq);
    position = first_new + row.query;
    if (args.mask.kind != 0 && row.query < args.mask.queries) {
      const int64_t at = row.seq * args.mask.stride_seq + row.head * args.mask.stride_head +
                         row.query * args.mask.stride_query;
      mask = static_cast<const char*>(args.mask.data) +
             at * (args.mask.kind == 1 ? 1 : args.mask.kind == 2 ? 4 : 2);
    }
    if (args.tree_mask != nullptr) tree = args.tree_mask + row.token * args.stride_tree;
    if (args.alibi_slopes != nullptr) slope = args.alibi_slopes[row.head];
  }
  // Natural score of token `token`, -inf where a mask hides it.
  __device__ __forceinline__ float apply(const AttentionArgs& args, float score, int token) const {
    const int fresh = token - first_new;
    if (tree != nullptr && fresh >= 0 &&
        (fresh / 32 >= args.tree_words || (tree[fresh / 32] >> fresh % 32 & 1) == 0))
      return NEG_INF;
    score = fmaf(-slope, static_cast<float>(position < token ? token - position : position - token), score);
    if (mask == nullptr || token >= args.mask.keys) return score;
    const int64_t at = token * args.mask.stride_key;
    if (args.mask.kind == 1) return mask[at] != 0 ? score : NEG_INF;
    if (args.mask.kind == 2) return score + reinterpret_cast<const float*>(mask)[at];
    if (args.mask.kind == 3) return score + to_float(reinterpret_cast<const __half*>(mask)[at]);
    return score + to_float(reinterpret_cast<const __nv_bfloat16*>(mask)[at]);
  }
};

// ---- results -------------------------------------------------------------------------------------------

// 8 elements, in 16-byte pieces or one by one. (A whole Vec<float, 8> in memory would have to be 32-byte aligned.)
template <bool IS_ALIGNED, typename E>
__device__ __forceinline__ Vec<E, STEP> load_step(const E* p) {
  constexpr int WIDTH = IS_ALIGNED ? 16 / static_cast<int>(sizeof(E)) : 1;
  Vec<E, STEP> out;
#pragma unroll
  for (int i = 0; i < STEP; i += WIDTH) store_vec(out.v + i, load_vec<E, WIDTH>(p + i));
  return out;
}

template <bool IS_ALIGNED, typename E, int N>
__device__ __forceinline__ void store_step(E* p, const Vec<E, N>& x) {
  constexpr int PIECE = 16 / static_cast<int>(sizeof(E)), WIDTH = !IS_ALIGNED ? 1 : N < PIECE ? N : PIECE;
#pragma unroll
  for (int i = 0; i < N; i += WIDTH) store_vec(p + i, load_vec<E, WIDTH>(x.v + i));
}

// N outputs of a row from `dim` on and, once per row, its lse.
template <int N>
__device__ __forceinline__ void store_final(const AttentionArgs& args, const QueryRow& row, int dim, Floats<N> values,
                                            float lse) {
  if (args.sinks != nullptr) values *= sink_share(lse, args.sinks[row.head]);
  T* out = static_cast<T*>(const_cast<void*>(query_pointer(args.out, args, row, sizeof(T))));
  store_step<ALIGNED>(out + dim, values.template to<T>());
  if (dim == 0 && args.lse != nullptr)
    args.lse[row.token * (args.num_kv_heads * args.heads_per_kv) + row.head] = lse;
}

// The same as a partial result: row r of the item's slot, or of its token and head when the caller merges.
__device__ __forceinline__ void store_partial(const AttentionArgs& args, const RowTile& rows, int r, int dim,
                                              EightFloats values, float lse) {
  const PartialRows& to = args.partials;
  int64_t token = r, head = 0;
  if (args.num_splits > 0) {
    const QueryRow row = rows.row(args, r);
    token = row.token, head = row.head;
    if (args.sink_in_partials != 0 && args.sinks != nullptr && rows.is_last(args)) {
      values *= sink_share(lse, args.sinks[row.head]);
      const float sink = args.sinks[row.head], top = fmaxf(lse, sink);
      if (top > NEG_INF) lse = fmaf(LN_2, log2f(exp2f(LOG2_E * (lse - top)) + exp2f(LOG2_E * (sink - top))), top);
    }
  }
  values.store(to.out + rows.item.slot * to.stride_split + token * to.stride_token + head * to.stride_head + dim);
  if (dim > 0) return;
  const int64_t at = rows.item.slot * to.lse_split + token * to.lse_token + head * to.lse_head;
  to.lse[at] = lse == NEG_INF ? NEG_INF : lse * args.lse_factor;
  if (to.sum != nullptr) to.sum[at] = lse == NEG_INF ? 0.0f : 1.0f;
}

// 8 outputs of row r of an item, in the basis of the model; the one way results leave a block.
__device__ __forceinline__ void store_row(const AttentionArgs& args, const RowTile& rows, int r, int dim,
                                          const EightFloats& values, float lse) {
  if (rows.item.slot < 0) store_final(args, rows.row(args, r), dim, values, lse);
  else store_partial(args, rows, r, dim, values, lse);
}

// For a caller that merges: how many splits hold each token's result, and that the later ones hold none. Called by all
// threads.
__device__ __forceinline__ void store_split_counts(const AttentionArgs& args, const RowTile& rows) {
  if (args.num_splits == 0 || !rows.is_last(args)) return;
  const PartialRows& to = args.partials;
  for (int r = threadIdx.x; r < rows.num_rows; r += blockDim.x) {
    const QueryRow row = rows.row(args, r);
    if (to.split_count != nullptr && row.head == 0) to.split_count[row.token] = rows.item.slot + 1;
    if (rows.item.slot < 0) continue;
    for (int split = rows.item.slot + 1; split < args.num_splits; ++split) {
      const int64_t at = split * to.lse_split + row.token * to.lse_token + row.head * to.lse_head;
      to.lse[at] = NEG_INF;
      if (to.sum != nullptr) to.sum[at] = 0.0f;
    }
  }
}

// ---- merging -------------------------------------------------------------------------------------------

// The partial results of one row of a unit.
struct RowPieces {
  const AttentionArgs& args;
  const int32_t* pieces;  // partial rows of the unit's row 0
  int r;                  // row of the unit
  int count;

  __device__ __forceinline__ RowPieces(const AttentionArgs& a, int unit, int row)
      : args(a), pieces(a.work.pieces + a.work.units[2 * unit]), r(row), count(a.work.units[2 * unit + 1]) {}
  __device__ __forceinline__ int at(int p) const {
    const uint32_t first = pieces[p];  // of a slot's rows; they would not suffice if the list is of other lengths
    return first + min(static_cast<uint32_t>(r), ROWS - 1 - first % ROWS);
  }
  __device__ __forceinline__ float lse(int at) const { return args.partials.lse[at]; }
  __device__ __forceinline__ float sum(int) const { return 1.0f; }
  __device__ __forceinline__ const float* values(int at) const {
    return args.partials.out + static_cast<int64_t>(at) * args.head_dim_v;
  }
};

// Integers in the order of the floats whose bits they are made of, and back.
__device__ __forceinline__ int ordered(int bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// Merges the rows whose units are complete. units: of every member, or of the item; -1 where pieces are missing.
// tops: int [ROWS] of shared memory, all ordered(-inf).
__device__ __forceinline__ void merge_rows(const AttentionArgs& args, const RowTile& rows, const int* units,
                                           int* tops) {
  const int num_rows = rows.num_rows, rows_each = rows.item.members > 0 ? rows.rows_each : ROWS;

  // 1. the largest lse of every row. All threads have part, neighbours read neighbouring rows
  const int threads = max(1, static_cast<int>(blockDim.x) / max(1, num_rows));  // of a row
  for (int i = threadIdx.x; i < threads * num_rows; i += blockDim.x) {
    const int share = i / num_rows, r = i - share * num_rows;
    const int unit = units[r / rows_each];
    if (unit < 0) continue;
    const RowPieces pieces(args, unit, r % rows_each);
    atomicMax(tops + r, ordered(__float_as_int(largest_lse(pieces, pieces.count, share, threads))));
  }
  __syncthreads();

  // 2. weighted sums. A thread has few outputs, so that a single row too keeps most of them at work
  constexpr int WIDTH = 4;
  const int steps = args.head_dim_v / WIDTH;
  for (int i = threadIdx.x; i < num_rows * steps; i += blockDim.x) {
    const int r = i / steps, dim = (i - r * steps) * WIDTH;
    const int unit = units[r / rows_each];
    if (unit < 0) continue;
    const RowPieces pieces(args, unit, r % rows_each);
    PartialMerge<WIDTH> merge(__int_as_float(ordered(tops[r])));
    merge.add(pieces, pieces.count, dim);
    const float lse = merge.finish();
    store_final(args, rows.row(args, r), dim, merge.acc, lse);
  }
}

// Counts this item's partial result as arrived and merges every unit that is complete. Called by all threads after
// their store_row calls; `scratch` is int [2][ROWS] of shared memory that is free once all threads are here.
__device__ __forceinline__ void finish_item(const AttentionArgs& args, const RowTile& rows, int* scratch) {
  store_split_counts(args, rows);
  if (rows.item.unit < 0) return;
  int* complete = scratch;
  int* tops = scratch + ROWS;
  const bool shared_keys = rows.item.members > 0;
  const int num_units = shared_keys ? rows.item.members : 1;
  __threadfence();  // what this thread stored is visible before the block is counted
  __syncthreads();
  for (int i = threadIdx.x; i < num_units; i += blockDim.x) {
    const int unit = shared_keys ? args.work.members[2 * (rows.item.first_row + i) + 1] + rows.item.kv_head
                                 : rows.item.unit;
    const int before = atomicAdd(args.work.counters + unit, 1);
    const bool last = before + 1 == args.work.units[2 * unit + 1];
    if (last) args.work.counters[unit] = 0;
    complete[i] = last ? unit : -1;
  }
#pragma unroll 1
  for (int r = threadIdx.x; r < ROWS; r += blockDim.x) tops[r] = ordered(__float_as_int(NEG_INF));
  __threadfence();  // what the others stored is visible from here on
  __syncthreads();
  bool merges = false;
#pragma unroll 1
  for (int i = 0; i < num_units; ++i) merges |= complete[i] >= 0;
  if (merges) merge_rows(args, rows, complete, tops);
}

// ---- results of several warps --------------------------------------------------------------------------

// What every warp of a block found, in shared memory.
struct WarpResults {
  const float* state;  // [warps][2][ROWS] top and sum
  const char* outputs; // [warps] pieces of warp_bytes, each float [groups][ROWS][row_stride] unnormalised outputs
  int warps;
  int warp_bytes;
  int row_stride;
  int groups;
};

// Merges warps and groups in their order and stores the rows; a thread owns WIDTH outputs of a row.
template <typename F = VF>  // so that what the format does not need is not compiled
__device__ __forceinline__ void merge_and_store(const AttentionArgs& args, const RowTile& rows,
                                                const WarpResults& found) {
  constexpr int WIDTH = F::ROTATED ? 32 : STEP;  // a rotation mixes 32 dims
  const int pieces = args.head_dim_v / WIDTH;
  for (int i = threadIdx.x; i < rows.num_rows * pieces; i += blockDim.x) {
    const int r = i / pieces;
    const int dim = (i - r * pieces) * WIDTH;
    float top = NEG_INF, sum = 0.0f;
    EightFloats out[WIDTH / STEP];
#pragma unroll
    for (int n = 0; n < WIDTH / STEP; ++n) out[n] = EightFloats::all(0.0f);
    for (int w = 0; w < found.warps; ++w) top = fmaxf(top, found.state[w * 2 * ROWS + r]);
    const float origin = softmax_origin(top);
    for (int w = 0; w < found.warps; ++w) {
      const float weight = exp2f(found.state[w * 2 * ROWS + r] - origin);
      sum = fmaf(weight, found.state[(w * 2 + 1) * ROWS + r], sum);
      const float* part = reinterpret_cast<const float*>(found.outputs + w * found.warp_bytes);
      for (int g = 0; g < found.groups; ++g)
#pragma unroll
        for (int n = 0; n < WIDTH / STEP; ++n)
          out[n].add_product(weight, EightFloats::load(part + (g * ROWS + r) * found.row_stride + dim + n * STEP));
    }
    const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int n = 0; n < WIDTH / STEP; ++n) {
      out[n] *= scale;
      in_this_order(out[n]);  // before the factors that follow
    }
    if constexpr (F::ROTATED) hadamard32(out);
    if constexpr (F::CHANNEL) {
      const EightFloats channels = channel_scales(args.v_scale, rows.item.kv_head, dim);
#pragma unroll
      for (int j = 0; j < STEP; ++j) out[0].x[j] *= channels.x[j];
      in_this_order(out[0]);
    }
#pragma unroll
    for (int n = 0; n < WIDTH / STEP; ++n)
      store_row(args, rows, r, dim + n * STEP, out[n], natural_lse(top, sum));
  }
}

#endif  // CUPYATTN_ATTENTION_STORE_CUH
