// SPDX-License-Identifier: Apache-2.0
// experts.cuh - rows of x sorted by expert: which of them a block of a ragged grid multiplies, with which weight.
#ifndef CUPYATTN_EXPERTS_CUH
#define CUPYATTN_EXPERTS_CUH

#include "prelude.cuh"
#include "params.h"

// Rows [first, end) of x are `expert`'s; the block's tile of them begins at `token` of these.
struct ExpertTile {
  int expert, first, end, token;
};

// Tiles of M_TILE rows are counted expert by expert, and blockIdx.y is the tile's number. A block past the last tile
// gets expert -1. Offsets that run backwards or past x count as the one before, or as x's end.
template <int M_TILE>
__device__ __forceinline__ ExpertTile expert_tile(const Experts& experts, int tokens) {
  int tile = blockIdx.y, first = min(max(experts.offsets[0], 0), tokens);
  for (int expert = 0; expert < experts.count; ++expert) {
    const int end = min(max(experts.offsets[expert + 1], first), tokens), tiles = ceil_div(end - first, M_TILE);
    if (tile < tiles) return {expert, first, end, tile * M_TILE};
    tile -= tiles;
    first = end;
  }
  return {-1, 0, 0, 0};
}

// The call as if it were for one expert alone: its rows of x and out, its weight and bias, and its share of the partials,
// `partials` for each row of x.
template <typename T, typename U, typename B>
__device__ __forceinline__ QuantGemmArgs expert_call(const QuantGemmArgs& args, const ExpertTile& at, int64_t partials) {
  const Experts& experts = args.experts;
  const WeightView& all = args.weight;
  return {{static_cast<T*>(args.x.data) + at.first * args.x.stride_row, args.x.stride_row},
          {static_cast<U*>(args.out.data) + at.first * args.out.stride_row, args.out.stride_row},
          {all.codes + at.expert * experts.stride_codes, all.scales + at.expert * experts.stride_scales,
           all.supers + at.expert * experts.stride_supers, all.row_tiles, all.column_tiles, all.tiles_per_scale,
           all.tiles_per_super},
          experts, args.order, args.bias ? static_cast<const B*>(args.bias) + at.expert * experts.stride_bias : nullptr,
          args.partials + at.first * partials, args.counters, args.stride_bias, at.end - at.first, args.rows, args.columns, args.pieces, args.first_piece,
          args.tiles_per_piece, args.units_per_chunk, args.accumulate};
}

#endif  // CUPYATTN_EXPERTS_CUH
