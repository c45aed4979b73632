// SPDX-License-Identifier: Apache-2.0
// partial_merge.cuh - merging of partial results over disjoint key sets: what the separate kernel (split_reduce.cu) and
// the last block of a unit (attention_store.cuh) share.
//
//   lse = log(sum_p sum_p exp(lse_p)),  out = sum_p exp(lse_p - lse) out_p, pieces in the order of their numbers
//
// Memory is waited for once per AHEAD pieces, not once per piece, and no load depends on what another one finds but
// where the piece is. Pieces is a struct with
//   int at(int p)               where piece p is
//   float lse(int at)           natural lse of its row, -inf: no key, and what else of it is read does not count
//   float sum(int at)           what its outputs are yet to be divided by
//   const float* values(int at)
#ifndef CUPYATTN_PARTIAL_MERGE_CUH
#define CUPYATTN_PARTIAL_MERGE_CUH

#include "eight_floats.cuh"
#include "online_softmax.cuh"

constexpr int AHEAD = CA_CPU ? 1 : 8;  // pieces on their way at a time

// The largest lse of pieces first, first + step, ... below `count`.
template <typename Pieces>
__device__ __forceinline__ float largest_lse(const Pieces& pieces, int count, int first = 0, int step = 1) {
  float top = NEG_INF;
  for (; first < count; first += AHEAD * step) {
    int at[AHEAD];
    float lse[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) at[i] = pieces.at(min(first + i * step, count - 1));  // twice does no harm
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) lse[i] = pieces.lse(at[i]);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) top = fmaxf(top, lse[i]);
  }
  return top;
}

// Weighted sum of N outputs of a row, the same bits whoever adds them. Merging one partial result gives its bits back.
template <int N>
struct PartialMerge {
  Floats<N> acc;
  Floats<1> total;  // not a float, whose additions the host's compiler may take in another order
  float top;        // largest lse of all pieces

  __device__ __forceinline__ explicit PartialMerge(float largest)
      : acc(Floats<N>::all(0.0f)), total(Floats<1>::all(0.0f)), top(largest) {}

  // Adds outputs `dim` and following of pieces 0 to count - 1, one after the other.
  template <typename Pieces>
  __device__ __forceinline__ void add(const Pieces& pieces, int count, int dim) {
    for (int first = 0; first < count; first += AHEAD) {
      int at[AHEAD];
      float lse[AHEAD], sum[AHEAD];
      Floats<N> values[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) at[i] = pieces.at(min(first + i, count - 1));
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        lse[i] = pieces.lse(at[i]);
        sum[i] = pieces.sum(at[i]);
        values[i] = Floats<N>::load(pieces.values(at[i]) + dim);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (first + i >= count || lse[i] == NEG_INF) continue;
        const float weight = exp2f(LOG2_E * (lse[i] - top));
        total.add_product(weight, Floats<1>::all(sum[i]));
        acc.add_product(weight, values[i]);
      }
    }
  }

  // Normalises acc; returns the merged natural lse.
  __device__ __forceinline__ float finish() {
    const float sum = total.x[0];
    acc *= sum == 0.0f ? 0.0f : 1.0f / sum;
    return sum == 0.0f ? NEG_INF : fmaf(LN_2, log2f(sum), top);
  }
};

#endif  // CUPYATTN_PARTIAL_MERGE_CUH
