// SPDX-License-Identifier: Apache-2.0
// silu_mul.cu - the gated activation of a SwiGLU feed-forward layer.
//
//   out[i,j] = gate[i,j] / (1 + exp(-gate[i,j])) * up[i,j]
//   Math in float32, one rounding on store.
//
// launch     grid (rows, any), block (any); the threads of a row's blocks share its columns
//            shared memory 0, barriers none, warp ops none
// aliasing   out == gate and out == up are allowed: a thread writes only what it has read
// traffic    3 * rows * cols * sizeof(T) bytes
#include "prelude.cuh"
#include "params.h"

using T = CA_T;
constexpr int VEC = CA_VEC;  // elements per load; divides cols and every row stride
static_assert(sizeof(SiluMulArgs) == CA_SIZEOF_ARGS, "silu_mul: Python and CUDA disagree on SiluMulArgs");

CA_KERNEL __launch_bounds__(256) void silu_mul(const __grid_constant__ SiluMulArgs args) {
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(args.gate.data) + row * args.gate.stride_row;
  const T* up = static_cast<const T*>(args.up.data) + row * args.up.stride_row;
  T* out = static_cast<T*>(args.out.data) + row * args.out.stride_row;

  const int step = gridDim.y * blockDim.x * VEC;
  for (int j = (blockIdx.y * blockDim.x + threadIdx.x) * VEC; j < args.cols; j += step) {
    float g[VEC], u[VEC];
    to_float(load_vec<T, VEC>(gate + j), g);
    to_float(load_vec<T, VEC>(up + j), u);
#pragma unroll
    for (int v = 0; v < VEC; ++v) g[v] = g[v] / (1.0f + expf(-g[v])) * u[v];
    store_vec(out + j, from_float<T, VEC>(g));
  }
}
