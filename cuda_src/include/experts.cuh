// SPDX-License-Identifier: Apache-2.0
// experts.cuh - rows of x sorted by expert: which of them a block of a ragged grid multiplies, with which weight.
#ifndef CUPYATTN_EXPERTS_CUH
#define CUPYATTN_EXPERTS_CUH

#include "prelude.cuh"
#include "params.h"
#include "scan.cuh"

// The block's tile begins at row `token` of x; `expert`'s rows end before row `end`.
struct ExpertTile {
  int expert, token, end;
};

// Tiles of M_TILE rows are counted expert by expert, and first_tile + blockIdx.y is the tile's number. A block past the
// last tile gets expert -1. Offsets that run backwards or past x count as the one before, or as x's end.
// Every warp searches for itself, all its lanes take part: each adds up the tiles of a run of experts.
template <int M_TILE>
__device__ __forceinline__ ExpertTile expert_tile(const Experts& experts, int tokens) {
  const int tile = experts.first_tile + blockIdx.y, lane = threadIdx.x % 32, run = ceil_div(experts.count, 32);
  const int begin = min(lane * run, experts.count), stop = min(begin + run, experts.count);
  int64_t ends[1] = {max(experts.offsets[0], 0)}, tiles[1] = {0};
  for (int expert = begin; expert < stop; ++expert) {
    ends[0] = max(static_cast<int>(ends[0]), experts.offsets[expert + 1]);
  }
  warp_scan<MaxInt64>(ends);
  const int before = __shfl_up_sync(FULL_MASK, static_cast<int>(ends[0]), 1);
  const int first = min(lane == 0 ? max(experts.offsets[0], 0) : before, tokens);  // row of the run
  const auto end_of = [&](int expert, int from) { return min(max(experts.offsets[expert + 1], from), tokens); };
  for (int expert = begin, from = first; expert < stop; ++expert) {
    const int end = end_of(expert, from);
    tiles[0] += ceil_div(end - from, M_TILE);
    from = end;
  }
  const int own = tiles[0];
  warp_scan(tiles);
  const int last = tiles[0];
  const uint32_t at_or_after = __ballot_sync(FULL_MASK, tile < last);
  if (at_or_after == 0) return {-1, 0, 0};
  const int finder = __ffs(at_or_after) - 1;
  int left = tile - __shfl_sync(FULL_MASK, last - own, finder), from = __shfl_sync(FULL_MASK, first, finder);
  for (int expert = finder * run;; ++expert) {
    const int end = end_of(expert, from), here = ceil_div(end - from, M_TILE);
    if (left < here) return {expert, from + left * M_TILE, end};
    left -= here;
    from = end;
  }
}

// The call as if it were for the rows up to `at.end` and their expert's weight and bias alone.
template <typename B>
__device__ __forceinline__ QuantGemmArgs expert_call(const QuantGemmArgs& args, const ExpertTile& at) {
  QuantGemmArgs own = args;
  own.weight.codes += at.expert * args.experts.stride_codes;
  own.weight.scales += at.expert * args.experts.stride_scales;
  own.weight.supers += at.expert * args.experts.stride_supers;
  if (args.bias) own.bias = static_cast<const B*>(args.bias) + at.expert * args.experts.stride_bias;
  own.tokens = at.end;
  return own;
}

#endif  // CUPYATTN_EXPERTS_CUH
