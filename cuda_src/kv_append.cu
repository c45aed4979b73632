// SPDX-License-Identifier: Apache-2.0
// kv_append.cu - write the keys and values of new tokens into a paged or contiguous cache.
//
//   for every token t with a place (page, slot):
//     k_cache[page,slot,h,:] = k[t,h,:],  v_cache[page,slot,h,:] = v[t,h,:]
//   The place is slots[t] = page * page_size + slot, or, with a block table, the page of token positions[t] of sequence
//   batch_indices[t]. A negative slot or position, and a place outside the cache, writes nothing.
//   KV == T copies bits; otherwise one rounding to KV.
//
// launch     any grid and block, every axis strides: dims in threadIdx.x, heads (keys', then values') in threadIdx.y
//            and blockIdx.y, tokens in threadIdx.z and blockIdx.x. No shared memory, no barriers, no warp operations.
// aliasing   none; two tokens with one place race
// traffic    tokens * num_kv_heads * (head_dim + head_dim_v) * (sizeof(T) + sizeof(KV)) bytes
#include "prelude.cuh"
#include "params.h"
#include "page_table.cuh"

using T = CA_T;              // k and v
using KV = CA_KV;            // k_cache and v_cache
constexpr int VEC = CA_VEC;  // elements per access; divides head_dim, head_dim_v and all strides
static_assert(sizeof(KvAppendArgs) == CA_SIZEOF_ARGS, "kv_append: Python and CUDA disagree on KvAppendArgs");

__device__ __forceinline__ void store_row(const Vec<KV, VEC>& row, KV* out) { store_vec(out, row); }

template <typename Other>
__device__ __forceinline__ void store_row(const Vec<Other, VEC>& row, KV* out) {
  float x[VEC];
  to_float(row, x);
  store_vec(out, from_float<KV, VEC>(x));
}

// Where token `token` goes; page -1 for nowhere.
__device__ __forceinline__ TokenSlot destination(const KvAppendArgs& args, int64_t token) {
  if (args.table.block_table != nullptr) {
    const int32_t position = args.positions[token * args.stride_position];
    const int64_t seq = args.batch_indices == nullptr ? token : args.batch_indices[token * args.stride_batch_index];
    if (position < 0 || seq < 0 || seq >= args.batch) return {-1, 0};
    return find_token(args.table, seq, position);
  }
  const int64_t slot = args.slots64 == nullptr ? args.slots32[token * args.stride_slot]
                                               : args.slots64[token * args.stride_slot];
  if (slot < 0) return {-1, 0};
  const int64_t page = slot / args.table.page_size;
  if (page >= args.table.num_pages) return {-1, 0};
  return {static_cast<int32_t>(page), static_cast<int32_t>(slot - page * args.table.page_size)};
}

CA_KERNEL __launch_bounds__(256) void kv_append(const __grid_constant__ KvAppendArgs args) {
  const int lane = threadIdx.x, step_lane = blockDim.x;
  const int first_row = blockIdx.y * blockDim.y + threadIdx.y, step_row = gridDim.y * blockDim.y;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  const int64_t step_token = static_cast<int64_t>(gridDim.x) * blockDim.z;
  for (int64_t token = first_token; token < args.tokens; token += step_token) {
    const TokenSlot at = destination(args, token);
    if (at.page < 0) continue;
    for (int row = first_row; row < 2 * args.num_kv_heads; row += step_row) {
      const bool is_value = row >= args.num_kv_heads;
      const int64_t head = is_value ? row - args.num_kv_heads : row;
      const HeadView& from = is_value ? args.v : args.k;
      const KvView& to = is_value ? args.v_cache : args.k_cache;
      const int dims = is_value ? args.head_dim_v : args.head_dim;
      const T* x = static_cast<const T*>(from.data) + token * from.stride_token + head * from.stride_head;
      KV* out = static_cast<KV*>(to.data) + at.page * to.stride_page + at.slot * to.stride_token +
                head * to.stride_head;
      for (int d = lane * VEC; d < dims; d += step_lane * VEC) store_row(load_vec<T, VEC>(x + d), out + d);
    }
  }
}
