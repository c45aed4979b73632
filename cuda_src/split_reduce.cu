// SPDX-License-Identifier: Apache-2.0
// split_reduce.cu - attention over a union of disjoint key sets, from the attention over each.
//
//   lse[t,h] = log(sum_s exp(partial_lse[s,t,h]))
//   out[t,h] = sum_s exp(partial_lse[s,t,h] - lse[t,h]) * partial_out[s,t,h]      (s: all splits of all parts)
//   with sinks: out[t,h] *= exp(lse[t,h]) / (exp(lse[t,h]) + exp(sinks[h])); lse stays that of the keys
//   A split with lse = -inf counts nothing, whatever its out. All splits -inf: out = 0, lse = -inf. Order of the sum:
//   part by part.
//   With sums a split's out is yet to be divided by its sum: its weight in lse is sum * exp(partial_lse).
//   With split_counts only the first split_counts[t] splits count, and a row without any stays as it is.
//
// launch     any grid and block; a thread takes VEC outputs of a row at a time, striding over the grid
//            shared memory 0, barriers none, warp ops none
// aliasing   none allowed
// traffic    4 * parts * splits * tokens * heads * (head_dim + 1) bytes read, the output written
#include "prelude.cuh"
#include "params.h"
#include "online_softmax.cuh"
#include "partial_merge.cuh"

using U = CA_U;                // out
constexpr int VEC = CA_VEC;    // elements per load and store; divides head_dim
static_assert(sizeof(SplitReduceArgs) == CA_SIZEOF_ARGS, "split_reduce: Python and CUDA disagree on SplitReduceArgs");

// The splits of one part that a row of the output is made of.
struct Splits {
  const PartialView& part;
  const float* lses;
  const float* sums;  // null for 1
  const float* out;
  float lse_scale;

  __device__ __forceinline__ Splits(const SplitReduceArgs& args, const PartialView& p, int64_t token, int64_t head)
      : part(p), lses(p.lse + token * p.lse_token + head * p.lse_head),
        sums(p.sum == nullptr ? nullptr : p.sum + token * p.sum_token + head * p.sum_head),
        out(p.out + token * p.stride_token + head * p.stride_head), lse_scale(args.lse_scale) {}
  __device__ __forceinline__ int at(int split) const { return split; }
  __device__ __forceinline__ float lse(int split) const { return lse_scale * lses[split * part.lse_split]; }
  __device__ __forceinline__ float sum(int split) const { return sums == nullptr ? 1.0f : sums[split * part.sum_split]; }
  __device__ __forceinline__ const float* values(int split) const { return out + split * part.stride_split; }
};

CA_KERNEL __launch_bounds__(128) void split_reduce(const __grid_constant__ SplitReduceArgs args) {
  const PartialView* parts = reinterpret_cast<const PartialView*>(&args.parts);
  const int pieces = args.head_dim / VEC;
  const int64_t items = static_cast<int64_t>(args.tokens) * args.heads * pieces;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < items;
       item += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = item / pieces;
    const int dim = static_cast<int>(item - row * pieces) * VEC;
    const int64_t token = row / args.heads;
    const int64_t head = row - token * args.heads;

    int splits = args.splits;
    if (args.split_counts != nullptr) {
      splits = args.split_counts[token * args.stride_counts];
      if (splits <= 0) continue;
      splits = splits < args.splits ? splits : args.splits;
    }

    // 1. the largest lse: every thread of a row reads all of them, which is cheaper than agreeing on one reader
    float top = NEG_INF;
    for (int p = 0; p < args.num_parts; ++p)
      top = fmaxf(top, largest_lse(Splits(args, parts[p], token, head), splits));

    // 2. weighted sum
    PartialMerge<VEC> merge(top);
    for (int p = 0; p < args.num_parts; ++p) merge.add(Splits(args, parts[p], token, head), splits, dim);
    const float lse = merge.finish();

    // 3. sink, store
    if (args.sinks != nullptr) merge.acc *= sink_share(lse, args.sinks[head]);
    const int64_t seq = token / args.q_len;
    U* out = static_cast<U*>(args.out.data) + seq * args.out.stride_seq +
             (token - seq * args.q_len) * args.out.stride_token + head * args.out.stride_head + dim;
    store_vec(out, merge.acc.to<U>());
    if (args.lse != nullptr && dim == 0) args.lse[row] = lse;
  }
}
