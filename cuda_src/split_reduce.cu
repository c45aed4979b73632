// SPDX-License-Identifier: Apache-2.0
// split_reduce.cu - attention over a union of disjoint key sets, from the attention over each.
//
//   lse[t,h] = log(sum_s exp(partial_lse[s,t,h]))
//   out[t,h] = sum_s exp(partial_lse[s,t,h] - lse[t,h]) * partial_out[s,t,h]      (s: all splits of all parts)
//   with sinks: out[t,h] *= exp(lse[t,h]) / (exp(lse[t,h]) + exp(sinks[h])); lse stays that of the keys
//   A split with lse = -inf is not read. All splits -inf: out = 0, lse = -inf. Order of the sum: part by part.
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

using U = CA_U;                // out
constexpr int VEC = CA_VEC;    // elements per load and store; divides head_dim
static_assert(sizeof(SplitReduceArgs) == CA_SIZEOF_ARGS, "split_reduce: Python and CUDA disagree on SplitReduceArgs");

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
    for (int p = 0; p < args.num_parts; ++p) {
      const float* lse = parts[p].lse + token * parts[p].lse_token + head * parts[p].lse_head;
      for (int s = 0; s < splits; ++s) top = fmaxf(top, args.lse_scale * lse[s * parts[p].lse_split]);
    }

    // 2. weighted sum
    PartialMerge<VEC> merge(top);
    for (int p = 0; p < args.num_parts; ++p) {
      const PartialView& part = parts[p];
      const float* lse = part.lse + token * part.lse_token + head * part.lse_head;
      const float* sum = part.sum + (part.sum == nullptr ? 0 : token * part.sum_token + head * part.sum_head);
      const float* values = part.out + token * part.stride_token + head * part.stride_head + dim;
      for (int s = 0; s < splits; ++s) {
        const float weight = lse[s * part.lse_split];
        if (weight == NEG_INF) continue;
        merge.add(load_vec<float, VEC>(values + s * part.stride_split).v, args.lse_scale * weight,
                  part.sum == nullptr ? 1.0f : sum[s * part.sum_split]);
      }
    }
    const float lse = merge.finish();

    // 3. sink, store
    if (args.sinks != nullptr) {
      const float share = sink_share(lse, args.sinks[head]);
#pragma unroll
      for (int j = 0; j < VEC; ++j) merge.acc[j] *= share;
    }
    const int64_t seq = token / args.q_len;
    U* out = static_cast<U*>(args.out.data) + seq * args.out.stride_seq +
             (token - seq * args.q_len) * args.out.stride_token + head * args.out.stride_head + dim;
    store_vec(out, from_float<U, VEC>(merge.acc));
    if (args.lse != nullptr && dim == 0) args.lse[row] = lse;
  }
}
