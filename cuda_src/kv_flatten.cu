// SPDX-License-Identifier: Apache-2.0
// kv_flatten.cu - keys and values out of pages or memory blocks, in whatever format, into contiguous arrays.
//
//   for every sequence b and token t < cache_seqlens[b], row = cu_seqlens_k[b] + t:
//     k_out[row,h,:] = k[page of t, slot of t, h] as numbers, likewise v
//   number = code * scale (+ zero); in the hadamard formats then every 32 dims are rotated back. Float32 arithmetic,
//   one rounding to T; a plain cache of type T is copied bit by bit. A token in no page gives zeros. Rows that belong
//   to no token keep their bits.
//
// launch     grid (ceil(tokens / tile), 2): keys, then values. block (8 dims per thread, rows); whole warps where a
//            format is rotated with WHOLE_GROUPS 0. Dynamic shared memory: 16 bytes per row of the tile; one barrier.
// aliasing   none
// traffic    tokens * num_kv_heads * (head_dim * (bits of K / 8 + sizeof(T)) + the same of V) bytes, and the scales
#include "prelude.cuh"
#include "params.h"
#include "hadamard.cuh"
#include "kv_format.cuh"
#include "page_table.cuh"

using T = CA_T;                                   // k_out and v_out
using K = CA_K;                                   // format of the keys, a tag of kv_format.cuh
using V = CA_V;                                   // format of the values
constexpr bool ALIGNED = CA_ALIGNED;              // rows at multiples of their format's ROW_ALIGN, outputs of 16 bytes
constexpr bool WHOLE_GROUPS = CA_WHOLE_GROUPS;    // a thread has 32 dims of a rotated row, not 8
static_assert(sizeof(KvFlattenArgs) == CA_SIZEOF_ARGS, "kv_flatten: Python and CUDA disagree on KvFlattenArgs");

using Output = KvPlain<T>;

template <typename A, typename B>
constexpr bool SAME = false;
template <typename A>
constexpr bool SAME<A, A> = true;

constexpr int64_t NO_TOKEN = -2;  // a page of -1 is a token without a place

// The token of output row `row`, and where it lies.
__device__ __forceinline__ TokenSlot token_of_row(const KvFlattenArgs& args, int row) {
  int seq = 0, end = args.batch;  // the last sequence that starts at or before the row is in [seq, end)
  while (end - seq > 1) {
    const int middle = (seq + end) / 2;
    if (args.cu_seqlens_k[middle * args.stride_starts] <= row) seq = middle;
    else end = middle;
  }
  const int token = row - args.cu_seqlens_k[seq * args.stride_starts];
  int count = args.cu_seqlens_k[(seq + 1) * args.stride_starts] - (row - token);
  if (args.cache_seqlens != nullptr) count = min(count, args.cache_seqlens[seq * args.stride_seqlens]);
  if (token < 0 || token >= count) return {NO_TOKEN, 0};
  return find_token(args.table, seq, token);
}

// One row of a cache. What is the same for all its dims is looked up once; null for a token in no page.
template <typename F>
struct Row {
  const typename F::Code* codes;
  const typename F::Scale* group_scales = nullptr;  // where GROUP is 32
  int64_t stride_group = 0;
  RowScale scale = {1.0f, 0.0f};  // where the row has one

  __device__ __forceinline__ Row(const KvView& view, const KvScale& scales, const PageTable& table, TokenSlot at,
                                 int head) {
    codes = kv_row<const typename F::Code>(view, table, at, head);
    if (codes == nullptr) return;
    if constexpr (F::GROUP == 32) {
      group_scales = kv_scale<const typename F::Scale>(scales, table, at, head, 0);
      stride_group = scales.stride_group;
    } else {
      scale = load_row_scale<F>(scales, table, at, head);
    }
  }
  // Dims d to d + 7.
  __device__ __forceinline__ EightFloats eight(const KvScale& scales, int head, int head_dim, int d) const {
    if (codes == nullptr) return EightFloats::all(0.0f);
    EightFloats x = F::template eight<ALIGNED>(in_global(codes), head_dim, d);
    if constexpr (F::CHANNEL) {
      x *= channel_scales(scales, head, d);
    } else if constexpr (F::GROUP == 32) {
      x *= to_float(in_global(group_scales)[d / 32 * stride_group]);
    } else {
      apply_scale<F>(x, scale);
    }
    return x;
  }
};

// Fills rows first_row to first_row + count of one output; a row of threads has one row of numbers at a time.
template <typename F>
__device__ __forceinline__ void flatten(const KvFlattenArgs& args, const KvView& view, const KvScale& scales,
                                        const HeadView& out, int head_dim, const TokenSlot* places, int64_t first_row,
                                        int count) {
  constexpr int PARTS = F::ROTATED && WHOLE_GROUPS ? 4 : 1;  // times 8 dims of a thread
  const int heads = args.num_kv_heads, rows = blockDim.y;
  const int step_token = rows / heads, step_head = rows - step_token * heads;
  int token = threadIdx.y / heads, head = threadIdx.y - token * heads;
  for (int done = 0; done < count * heads; done += rows) {  // the same number of times for every thread
    const TokenSlot at = token < count ? places[token] : TokenSlot{NO_TOKEN, 0};
    const Row<F> row(view, scales, args.table, at, head);
    T* to = static_cast<T*>(out.data) + (first_row + token) * out.stride_token + head * out.stride_head;
    for (int begin = 0; begin < head_dim; begin += blockDim.x * 8 * PARTS) {
      const int d = begin + threadIdx.x * 8 * PARTS;
      const bool inside = at.page != NO_TOKEN && d < head_dim;
      if constexpr (SAME<F, Output>) {
        if (!inside) continue;
        Output::store<ALIGNED>(to + d, row.codes == nullptr ? Vec<T, 8>{} : Output::load<ALIGNED>(row.codes + d));
      } else {
        EightFloats x[PARTS];
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
          x[i] = inside ? row.eight(scales, head, head_dim, d + 8 * i) : EightFloats::all(0.0f);
        if constexpr (F::ROTATED && WHOLE_GROUPS) hadamard32(x);
        if constexpr (F::ROTATED && !WHOLE_GROUPS) hadamard32(x[0]);
        if (!inside) continue;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) Output::store<ALIGNED>(to + d + 8 * i, x[i].template to<T>());
      }
    }
    token += step_token, head += step_head;
    if (head >= heads) head -= heads, ++token;
  }
}

CA_KERNEL __launch_bounds__(256) void kv_flatten(const __grid_constant__ KvFlattenArgs args) {
  CA_DYN_SMEM(TokenSlot, places);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * args.tile;
  const int count = static_cast<int>(min(static_cast<int64_t>(args.tile), args.tokens - first_row));

  // 1. the places of the tile's tokens
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < count; i += blockDim.x * blockDim.y)
    places[i] = token_of_row(args, static_cast<int>(first_row) + i);
  __syncthreads();

  // 2. their keys or values
  if (blockIdx.y == 0) {
    flatten<K>(args, args.k, args.k_scale, args.k_out, args.head_dim, places, first_row, count);
  } else {
    flatten<V>(args, args.v, args.v_scale, args.v_out, args.head_dim_v, places, first_row, count);
  }
}
