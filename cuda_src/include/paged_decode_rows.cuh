// SPDX-License-Identifier: Apache-2.0
// paged_decode_rows.cuh - what both versions of paged_decode share: the query rows of a block, the tokens they see,
// and the merging and storing of what the block's warps found. Included by paged_decode.cu after its constants, of
// which it uses T, ROWS, STEP, ALIGNED and CHUNK.
#ifndef CUPYATTN_PAGED_DECODE_ROWS_CUH
#define CUPYATTN_PAGED_DECODE_ROWS_CUH

#include "eight_floats.cuh"
#include "online_softmax.cuh"
#include "page_table.cuh"
#include "params.h"
#include "prelude.cuh"

// 8 elements, in 16-byte pieces or one by one. (A whole Vec<float, 8> in memory would have to be 32-byte aligned.)
template <bool IS_ALIGNED, typename E>
__device__ __forceinline__ Vec<E, STEP> load_step(const E* p) {
  constexpr int WIDTH = IS_ALIGNED ? 16 / static_cast<int>(sizeof(E)) : 1;
  Vec<E, STEP> out;
#pragma unroll
  for (int i = 0; i < STEP; i += WIDTH) store_vec(out.v + i, load_vec<E, WIDTH>(p + i));
  return out;
}

template <bool IS_ALIGNED, typename E>
__device__ __forceinline__ void store_step(E* p, const Vec<E, STEP>& x) {
  constexpr int WIDTH = IS_ALIGNED ? 16 / static_cast<int>(sizeof(E)) : 1;
#pragma unroll
  for (int i = 0; i < STEP; i += WIDTH) store_vec(p + i, load_vec<E, WIDTH>(x.v + i));
}

// The query rows of a block and the tokens they see.
struct RowTile {
  int64_t seq;       // sequence
  int64_t kv_head;   // KV head
  int first_row;     // of the q_len * heads_per_kv rows of (seq, kv_head), token-major
  int num_rows;      // of this block, at most ROWS
  int position;      // token of query 0
  int start;         // first visible key of the sequence
  int window;        // window_size, or past any length

  __device__ __forceinline__ explicit RowTile(const PagedDecodeArgs& args) {
    const int block = blockIdx.x;
    const int pair = block / args.row_tiles;
    seq = pair / args.num_kv_heads;
    kv_head = pair - seq * args.num_kv_heads;
    first_row = (block - pair * args.row_tiles) * ROWS;
    num_rows = min(ROWS, args.q_len * args.heads_per_kv - first_row);
    position = args.cache_seqlens[seq * args.stride_seqlens] - args.q_len;
    start = args.cache_starts == nullptr ? 0 : max(0, args.cache_starts[seq * args.stride_starts]);
    window = args.window_size > 0 ? args.window_size : 0x7fffffff;
  }
  __device__ __forceinline__ int query(const PagedDecodeArgs& args, int r) const {
    return (first_row + r) / args.heads_per_kv;
  }
  __device__ __forceinline__ int head(const PagedDecodeArgs& args, int r) const {
    return static_cast<int>(kv_head) * args.heads_per_kv + (first_row + r) % args.heads_per_kv;
  }
  // Visible tokens of row r: [first_key, last_key], empty for rows past num_rows.
  __device__ __forceinline__ int last_key(const PagedDecodeArgs& args, int r) const {
    return r < num_rows ? position + query(args, r) : -1;
  }
  __device__ __forceinline__ int first_key(const PagedDecodeArgs& args, int r) const {
    const int n = position + query(args, r);
    return max(start, n < window ? 0 : n - window + 1);
  }
  // Index of row r in arrays [batch, q_len, num_heads].
  __device__ __forceinline__ int64_t flat(const PagedDecodeArgs& args, int r) const {
    return (seq * args.q_len + query(args, r)) * (args.num_kv_heads * args.heads_per_kv) + head(args, r);
  }
};

// The chunk of this block starts at `start`; its tokens [begin, end) are those that any of the rows sees.
struct TokenRange {
  int start, begin, end;
};

__device__ __forceinline__ TokenRange visible_tokens(const PagedDecodeArgs& args, const RowTile& rows) {
  const int chunk_begin = blockIdx.y * CHUNK;
  const int end = min(chunk_begin + CHUNK, rows.last_key(args, rows.num_rows - 1) + 1);
  // a first key past the end is the end: counting tiles from it must not overflow
  return {chunk_begin, min(max(chunk_begin, rows.first_key(args, 0)), max(chunk_begin, end)), end};
}

__device__ __forceinline__ int64_t total_rows(const PagedDecodeArgs& args) {
  return static_cast<int64_t>(args.batch) * args.q_len * args.num_kv_heads * args.heads_per_kv;
}

// Marks this block's rows of chunk blockIdx.y as having seen no key.
__device__ __forceinline__ void store_empty(const PagedDecodeArgs& args, const RowTile& rows) {
  const int r = threadIdx.x;
  if (r < rows.num_rows) args.partial_lse[blockIdx.y * total_rows(args) + rows.flat(args, r)] = NEG_INF;
}

// Stores 8 outputs of row r from `dim` on and, once per row, its lse: as the final result or as a partial one.
__device__ __forceinline__ void store_row(const PagedDecodeArgs& args, const RowTile& rows, int r, int dim,
                                          EightFloats values, float lse) {
  const int64_t flat = rows.flat(args, r);
  if (args.num_chunks > 1) {
    const int64_t row = blockIdx.y * total_rows(args) + flat;
    values.store(args.partial_out + row * args.head_dim + dim);
    if (dim == 0) args.partial_lse[row] = lse;
    return;
  }
  if (args.sinks != nullptr) values *= sink_share(lse, args.sinks[rows.head(args, r)]);
  T* out = static_cast<T*>(args.out.data) + rows.seq * args.out.stride_seq +
           rows.query(args, r) * args.out.stride_token + rows.head(args, r) * args.out.stride_head;
  store_step<ALIGNED>(out + dim, values.to<T>());
  if (dim == 0 && args.lse != nullptr) args.lse[flat] = lse;
}

// What every warp of a block found, in shared memory.
struct WarpResults {
  const float* state;  // [warps][2][ROWS] top and sum
  const char* outputs; // [warps] pieces of warp_bytes, each float [groups][ROWS][row_stride] unnormalised outputs
  int warp_bytes;
  int row_stride;
  int groups;
};

// Merges warps and groups in their order and stores the rows; a thread owns 8 outputs of a row.
__device__ __forceinline__ void merge_and_store(const PagedDecodeArgs& args, const RowTile& rows,
                                                const WarpResults& found) {
  const int warps = blockDim.x / 32;
  const int pieces = args.head_dim / STEP;
  for (int item = threadIdx.x; item < rows.num_rows * pieces; item += blockDim.x) {
    const int r = item / pieces;
    const int dim = (item - r * pieces) * STEP;
    float top = NEG_INF, sum = 0.0f;
    EightFloats out = EightFloats::all(0.0f);
    for (int w = 0; w < warps; ++w) top = fmaxf(top, found.state[w * 2 * ROWS + r]);
    const float origin = softmax_origin(top);
    for (int w = 0; w < warps; ++w) {
      const float weight = exp2f(found.state[w * 2 * ROWS + r] - origin);
      sum += weight * found.state[(w * 2 + 1) * ROWS + r];
      const float* part = reinterpret_cast<const float*>(found.outputs + w * found.warp_bytes);
      for (int g = 0; g < found.groups; ++g)
        out.add_product(weight, EightFloats::load(part + (g * ROWS + r) * found.row_stride + dim));
    }
    out *= sum == 0.0f ? 0.0f : 1.0f / sum;
    store_row(args, rows, r, dim, out, natural_lse(top, sum));
  }
}

#endif  // CUPYATTN_PAGED_DECODE_ROWS_CUH
