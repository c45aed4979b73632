// SPDX-License-Identifier: Apache-2.0
// dequantize.cu - rows of a packed weight as a plain array.
//
//   out[i,order[k]] = W[first_row + i,k]; W a segment in the layout of dequant.cuh, without an order k itself
//   Weights are float32, one rounding on store.
//
//   A warp unpacks a tile of 16 x 64 per step; a lane stores the four columns of a step of a row together.
//
// launch     grid (row tiles that [first_row, first_row + rows) meets, any), block (32 * WARPS)
//            shared memory 0, barriers none, warp ops none
// aliasing   none
// traffic    packed bytes of these tiles + rows * columns * sizeof(U) bytes
#include "prelude.cuh"
#include "params.h"
#include "dequant.cuh"

using U = CA_U;            // out
using Format = CA_FORMAT;  // of dequant.cuh
constexpr int WARPS = CA_WARPS;
constexpr int VEC = CA_VEC;  // elements per store, 1 or 4; divides the row stride of out
static_assert(sizeof(DequantizeArgs) == CA_SIZEOF_ARGS, "dequantize: Python and CUDA disagree on DequantizeArgs");

CA_KERNEL __launch_bounds__(32 * WARPS, 4) void dequantize(const __grid_constant__ DequantizeArgs args) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_tile = args.first_row / TILE_ROWS + blockIdx.x;
  const int first = row_tile * TILE_ROWS + lane / 4 - args.first_row;  // row of out
  for (int t = blockIdx.y * WARPS + warp; t < args.weight.column_tiles; t += gridDim.y * WARPS) {
    LaneTile<Format> tile;
    tile.load(args.weight, row_tile, 0, t, lane);
    Run weights[2];
    tile.dequantize(weights);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 8 * half;
      if (row < 0 || row >= args.rows) continue;
      U* out = static_cast<U*>(args.out.data) + row * args.out.stride_row;
      store_run<VEC>(weights[half], out, t, lane % 4, args.order, args.columns);
    }
  }
}
