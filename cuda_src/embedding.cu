// SPDX-License-Identifier: Apache-2.0
// embedding.cu - rows of a table by index; the table is a plain array or a packed weight.
//
//   out[i,:] = table[ids[i],:], converted to U;  NaN for an id outside [0, rows)
//   PACKED: the table is a segment in the layout of dequant.cuh, its columns go to args.order; weights are float32, one
//   rounding on store.
//
// launch     grid (tokens), block (a multiple of 32); no shared memory, no barrier
// aliasing   none
// traffic    tokens * columns * (sizeof(W) + sizeof(U)) bytes; PACKED reads the whole chunks of the row pair
#include "prelude.cuh"
#include "params.h"
#include "dequant.cuh"

using W = CA_W;            // element of a plain table
using U = CA_U;            // out
using Id = CA_ID;          // int32_t or int64_t
using Format = CA_FORMAT;  // of a packed table
constexpr bool PACKED = CA_PACKED;
constexpr int VEC = CA_VEC;  // elements per access; divides columns and every row stride (PACKED: 1 or 4)
static_assert(sizeof(EmbeddingArgs) == CA_SIZEOF_ARGS, "embedding: Python and CUDA disagree on EmbeddingArgs");

// Four threads unpack a tile: thread c takes the run of lane 4r + c, r = row % 8.
__device__ __forceinline__ void copy_packed_row(const EmbeddingArgs& args, int64_t row, U* out) {
  const int row_tile = static_cast<int>(row / TILE_ROWS), c = threadIdx.x % 4;
  for (int t = threadIdx.x / 4; t < args.weight.column_tiles; t += blockDim.x / 4) {
    LaneTile<Format> tile;
    tile.load(args.weight, row_tile, 0, t, row % 8 * 4 + c);
    Run weights[2];
    tile.dequantize(weights);
    if (row % TILE_ROWS < 8) {
      store_run<VEC>(weights[0], out, t, c, args.order, args.columns);
    } else {
      store_run<VEC>(weights[1], out, t, c, args.order, args.columns);
    }
  }
}

CA_KERNEL __launch_bounds__(256, 2) void embedding(const __grid_constant__ EmbeddingArgs args) {
  const int64_t token = blockIdx.x;
  const int64_t row = static_cast<const Id*>(args.ids)[token * args.stride_id];
  U* out = static_cast<U*>(args.out.data) + token * args.out.stride_row;
  if (row < 0 || row >= args.rows) {
    for (int j = threadIdx.x; j < args.out_columns; j += blockDim.x) {
      out[j] = from_float<U>(__uint_as_float(0x7fc00000u));
    }
    return;
  }
  if constexpr (PACKED) {
    copy_packed_row(args, row, out);
  } else {
    const W* table = static_cast<const W*>(args.table.data) + row * args.table.stride_row;
    for (int j = threadIdx.x * VEC; j < args.out_columns; j += blockDim.x * VEC) {
      float wide[VEC];
      to_float(load_vec<W, VEC>(table + j), wide);
      store_vec(out + j, from_float<U, VEC>(wide));
    }
  }
}
