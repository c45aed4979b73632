// SPDX-License-Identifier: Apache-2.0
// embedding.cu - rows of a table by index; the table is a plain array or a packed weight.
//
//   out[i,:] = table[ids[i],:], converted to U;  NaN for an id outside [0, rows)
//   PACKED: the table is in the layout of dequant.cuh; weights are exact in float32, one rounding on store.
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
constexpr int VEC = CA_VEC;  // elements per access of a plain table; divides columns and every row stride
static_assert(sizeof(EmbeddingArgs) == CA_SIZEOF_ARGS, "embedding: Python and CUDA disagree on EmbeddingArgs");

// Four threads unpack a tile: thread c takes the run of lane 4r + c, r = row % 8.
__device__ __forceinline__ void copy_packed_row(const EmbeddingArgs& args, int64_t row, U* out) {
  const uint8_t* tiles = args.packed + row / TILE_ROWS * args.column_tiles * LaneTile<Format>::TILE_BYTES;
  const int c = threadIdx.x % 4;
  for (int t = threadIdx.x / 4; t < args.column_tiles; t += blockDim.x / 4) {
    LaneTile<Format> tile;
    tile.load(tiles + static_cast<int64_t>(t) * LaneTile<Format>::TILE_BYTES, row % 8 * 4 + c);
    Run weights[2];
    tile.dequantize(weights);
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      const int column = t * TILE_COLUMNS + i / 4 * 16 + 2 * c + i % 2 * 8 + i / 2 % 2;
      const float weight = row % TILE_ROWS < 8 ? weights[0].v[i] : weights[1].v[i];
      if (column < args.columns) out[column] = from_float<U>(weight);
    }
  }
}

CA_KERNEL __launch_bounds__(256) void embedding(const __grid_constant__ EmbeddingArgs args) {
  const int64_t token = blockIdx.x;
  const int64_t row = static_cast<const Id*>(args.ids)[token * args.stride_id];
  U* out = static_cast<U*>(args.out.data) + token * args.out.stride_row;
  if (row < 0 || row >= args.rows) {
    for (int j = threadIdx.x; j < args.columns; j += blockDim.x) out[j] = from_float<U>(__uint_as_float(0x7fc00000u));
    return;
  }
  if constexpr (PACKED) {
    copy_packed_row(args, row, out);
  } else {
    const W* table = static_cast<const W*>(args.table.data) + row * args.table.stride_row;
    for (int j = threadIdx.x * VEC; j < args.columns; j += blockDim.x * VEC) {
      float wide[VEC];
      to_float(load_vec<W, VEC>(table + j), wide);
      store_vec(out + j, from_float<U, VEC>(wide));
    }
  }
}
