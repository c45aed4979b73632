// SPDX-License-Identifier: Apache-2.0
// lightning_attention.cu - linear attention with a decay per head, over a state that stands for all earlier tokens.
//
//   for every sequence, its tokens t in order, and every head h:
//     state[h] <- exp(-slopes[h]) * state[h] + k[t,h] (outer) v[t,h]
//     out[t,h] = scale * q[t,h] . state[h]
//   A sequence without has_state starts from zeros, its old state is not read; one without tokens leaves it alone. A
//   sequence without a slot, and rows of no sequence, give zeros. Arithmetic in float32, one rounding on each store.
//
// Three kernels: one token per sequence (below), and any number of them in blocks, on CUDA cores (lightning_blocks.cuh)
// or tensor cores (lightning_mma.cuh).
//
// lightning_attention: a thread has VEC * CHUNKS value dims, every groups-th row of the state, and ROWS of these under
// way at a time; groups meet once, at the end.
//
// launch     grid (sequences * heads * slices), block (lanes, groups), at most 128 threads; ROWS * groups divides key_dim,
//            columns = lanes * VEC * CHUNKS, which divides value_dim when CHUNKS is 1
//            dynamic shared memory 4 * columns * groups bytes
//            On their way: ROWS * 16 bytes of a thread, of 128 threads in 6 blocks of a multiprocessor 96 KiB (of a
//            16-bit state in 5 blocks 40 KiB). An H200 needs 29 KiB on each of 132: 4.8 TB/s times about 800 ns.
// aliasing   none allowed
// traffic    of each sequence with a slot the state once each way, in 16-byte accesses unless VEC is 1; all else is
//            small: 2 * key_dim + 2 * value_dim numbers a head
#include "prelude.cuh"
#include "params.h"
#include "eight_floats.cuh"
#include "sequences.cuh"

using T = CA_T;                         // q, k, v and out
using S = CA_S;                         // state
constexpr int VEC = CA_VEC;             // numbers per access: 4 or 8, all rows at multiples of 16 bytes; or 1
constexpr int CHUNKS = CA_CHUNKS;       // accesses of a thread to a row of the state
constexpr int ROWS = CA_ROWS;           // rows of a matrix that a thread works on at a time
static_assert(sizeof(LightningAttentionArgs) == CA_SIZEOF_ARGS,
              "lightning_attention: Python and CUDA disagree on LightningAttentionArgs");

using Numbers = Floats<VEC>;

// VEC numbers at p; float32 in pieces of 16 bytes.
template <typename E>
__device__ __forceinline__ Numbers load_numbers(const E* p) {
  return Numbers::from(load_vec<E, VEC>(p));
}
template <>
__device__ __forceinline__ Numbers load_numbers<float>(const float* p) { return Numbers::load(p); }

template <typename E>
__device__ __forceinline__ void store_numbers(E* p, const Numbers& x) { store_vec(p, x.template to<E>()); }
template <>
__device__ __forceinline__ void store_numbers<float>(float* p, const Numbers& x) { x.store(p); }

// What a block works on: value dims first to first + count of one head of one sequence. In a prefill one more sequence
// without a slot, number `batch`, stands for the rows behind the last one.
struct Part {
  int sequence;
  int64_t head;
  int first;
  int count;
  S* state;       // of the head, from column `first` on; null without a slot
  bool is_fresh;  // starts from zeros

  __device__ __forceinline__ explicit Part(const LightningAttentionArgs& args) {
    const int row = blockIdx.x / args.slices;
    first = (blockIdx.x - row * args.slices) * args.columns;
    count = min(args.columns, args.value_dim - first);
    sequence = row / args.heads;
    head = row - sequence * args.heads;
    const int64_t slot = find_slot(args.slots, args.batch, args.num_slots, sequence);
    state = slot < 0 ? nullptr : static_cast<S*>(args.state) + slot * args.stride_slot + head * args.stride_state_head +
                                     first;
    is_fresh = state != nullptr && args.has_state != nullptr && args.has_state[sequence] == 0;
  }
  // The sequence's rows, of those there are.
  __device__ __forceinline__ void tokens_of(const LightningAttentionArgs& args, int64_t& begin, int64_t& end) const {
    begin = first_row(args.cu_seqlens, args.tokens, sequence);
    end = sequence < args.batch ? first_row(args.cu_seqlens, args.tokens, sequence + 1) : args.tokens;
  }
  __device__ __forceinline__ void store_zeros(const LightningAttentionArgs& args, int64_t begin, int64_t end) const {
    constexpr int WIDTH = VEC * sizeof(T) > 16 ? 16 / sizeof(T) : VEC;  // numbers per store
    const float zeros[WIDTH] = {};
    const int across = count / WIDTH, rows = max(1, static_cast<int>(blockDim.x) / across), row = threadIdx.x / across;
    if (row >= rows) return;
    for (int64_t t = begin + row; t < end; t += rows) {
      for (int c = threadIdx.x % across; c < across; c += blockDim.x)
        store_global(row_of(args.out, t) + first + c * WIDTH, from_float<T, WIDTH>(zeros));
    }
  }
  template <typename View>
  __device__ __forceinline__ T* row_of(const View& view, int64_t token) const {
    return static_cast<T*>(view.data) + token * view.stride_token + head * view.stride_head;
  }
};

__device__ __forceinline__ bool is_masked(const LightningAttentionArgs& args, int64_t token) {
  return args.mask != nullptr && args.mask[token * args.stride_mask] == 0;
}

// What a state loses within n tokens, exp(-slope * n) - 1: as x + loss * x it fades exactly however slow the head, where
// the rounding of a factor close to 1 would add up over the tokens that the state remembers.
__device__ __forceinline__ float loss_of(float slope, int n) { return expm1f(-slope * static_cast<float>(n)); }

#if CA_TENSOR_CORES
#include "lightning_mma.cuh"

CA_KERNEL __launch_bounds__(THREADS, 2) void
lightning_attention_mma(const __grid_constant__ LightningAttentionArgs args) {
  attend_on_tensor_cores(args);
}

#elif CA_PREFILL
#include "lightning_blocks.cuh"

CA_KERNEL __launch_bounds__(128, 1) void
lightning_attention_prefill(const __grid_constant__ LightningAttentionArgs args) {
  attend_in_blocks(args);
}

#else

CA_KERNEL __launch_bounds__(128, CHUNKS > 1 ? 1 : VEC == 8 ? 5 : 6) void
lightning_attention(const __grid_constant__ LightningAttentionArgs args) {
  CA_DYN_SMEM(float, sums);  // [groups, columns]
  const Part part(args);
  const int lanes = blockDim.x, groups = blockDim.y, thread = threadIdx.y * lanes + threadIdx.x;
  T* out = part.row_of(args.out, part.sequence) + part.first;
  if (part.state == nullptr) {
    for (int j = thread; j < part.count; j += lanes * groups) out[j] = from_float<T>(0.0f);
    return;
  }
  const T* q = part.row_of(args.q, part.sequence);
  const T* k = part.row_of(args.k, part.sequence);
  const T* v = part.row_of(args.v, part.sequence) + part.first;
  const bool masked = is_masked(args, part.sequence);
  const float loss = loss_of(args.slopes[part.head * args.stride_slope], 1);

  // 1. new state, and this thread's rows of the product
  Numbers value[CHUNKS], sum[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * lanes + threadIdx.x) * VEC;
    sum[c] = Numbers::all(0.0f);
    value[c] = (CHUNKS == 1 || column < part.count) && !masked ? load_numbers(v + column) : Numbers::all(0.0f);
  }
  for (int first_row = threadIdx.y; first_row < args.key_dim; first_row += ROWS * groups) {
    // all loads before the first use of any, without a branch between them
    Numbers kept[ROWS][CHUNKS];
    T key[ROWS], query[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = first_row + r * groups;
      const S* from = part.state + row * args.stride_key;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int column = (c * lanes + threadIdx.x) * VEC;
        const bool read = (CHUNKS == 1 || column < part.count) && !part.is_fresh;
        kept[r][c] = read ? load_numbers(from + column) : Numbers::all(0.0f);
      }
      key[r] = masked ? from_float<T>(0.0f) : k[row];
      query[r] = q[row];
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      S* to = part.state + (first_row + r * groups) * args.stride_key;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int column = (c * lanes + threadIdx.x) * VEC;
        kept[r][c].add_product(loss, kept[r][c]);
        kept[r][c].add_product(to_float(key[r]), value[c]);
        sum[c].add_product(to_float(query[r]), kept[r][c]);
        if (CHUNKS == 1 || column < part.count) store_numbers(to + column, kept[r][c]);
      }
    }
  }

  // 2. the groups' sums, in their order
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * lanes + threadIdx.x) * VEC;
    sum[c].store(sums + threadIdx.y * args.columns + column);
  }
  __syncthreads();
  for (int j = thread; j < part.count; j += lanes * groups) {
    float total = 0.0f;
    for (int g = 0; g < groups; ++g) total += sums[g * args.columns + j];
    out[j] = from_float<T>(args.scale * total);
  }
}

#endif  // CA_PREFILL
