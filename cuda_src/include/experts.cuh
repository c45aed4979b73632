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

__device__ __forceinline__ int first_row(const Experts& experts, int tokens) {
  return min(max(experts.offsets[0], 0), tokens);
}

// Where the rows of `expert` end that begin at `from`. Offsets that run backwards or past x count as the one before, or
// as x's end.
__device__ __forceinline__ int end_of(const Experts& experts, int expert, int from, int tokens) {
  return min(max(experts.offsets[expert + 1], from), tokens);
}

// The tile of M_TILE rows that is `tile` tiles after the first of `expert`, whose rows begin at `from`. Past the last
// one expert -1.
template <int M_TILE>
__device__ __forceinline__ ExpertTile tile_after(const Experts& experts, int tokens, int expert, int from, int tile) {
  for (; expert < experts.count; ++expert) {
    const int end = end_of(experts, expert, from, tokens), tiles = ceil_div(end - from, M_TILE);
    if (tile < tiles) return {expert, from + tile * M_TILE, end};
    tile -= tiles;
    from = end;
  }
  return {-1, 0, 0};
}

#if CA_CPU && CA_FUSED
namespace ca {

struct ExpertSearch {
  const Experts* experts;
  int tokens, tile;
  ExpertTile found;
};
template <int M_TILE>
inline void meet_expert(ExpertSearch* const* lanes, uint32_t) {
  const ExpertSearch& asked = *lanes[0];
  const int first = first_row(*asked.experts, asked.tokens);
  const ExpertTile found = tile_after<M_TILE>(*asked.experts, asked.tokens, 0, first, asked.tile);
  for (int l = 0; l < 32; ++l) lanes[l]->found = found;
}

}  // namespace ca
#endif

// Tiles are counted expert by expert, and first_tile + blockIdx.y is the tile's number. Every warp searches for itself,
// all its lanes take part: each adds up the tiles of a run of experts.
template <int M_TILE>
__device__ __forceinline__ ExpertTile expert_tile(const Experts& experts, int tokens) {
  const int tile = experts.first_tile + blockIdx.y;
#if CA_CPU && CA_FUSED
  ca::ExpertSearch search = {&experts, tokens, tile, {}};
  ca::collective<ca::ExpertSearch, ca::meet_expert<M_TILE>>(FULL_MASK, search);
  return search.found;
#else
  const int lane = threadIdx.x % 32, run = ceil_div(experts.count, 32);
  const int begin = min(lane * run, experts.count), stop = min(begin + run, experts.count);
  int64_t ends[1] = {first_row(experts, tokens)};
  for (int expert = begin; expert < stop; ++expert) {
    ends[0] = end_of(experts, expert, static_cast<int>(ends[0]), tokens);
  }
  warp_scan<MaxInt64>(ends);
  const int before = __shfl_up_sync(FULL_MASK, static_cast<int>(ends[0]), 1);
  const int first = lane == 0 ? first_row(experts, tokens) : before;  // of the run
  int64_t tiles[1] = {0};
  for (int expert = begin, from = first; expert < stop; ++expert) {
    const int end = end_of(experts, expert, from, tokens);
    tiles[0] += ceil_div(end - from, M_TILE);
    from = end;
  }
  const int own = tiles[0];
  warp_scan(tiles);
  const int last = tiles[0];
  const uint32_t at_or_after = __ballot_sync(FULL_MASK, tile < last);
  if (at_or_after == 0) return {-1, 0, 0};
  const int finder = __ffs(at_or_after) - 1;
  const int start = __shfl_sync(FULL_MASK, last - own, finder), from = __shfl_sync(FULL_MASK, first, finder);
  return tile_after<M_TILE>(experts, tokens, finder * run, from, tile - start);
#endif
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
