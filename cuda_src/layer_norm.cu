// SPDX-License-Identifier: Apache-2.0
// layer_norm.cu - layer normalisation of rows.
//
//   mean = mean_j(x[i,j]),  variance = mean_j((x[i,j] - mean)^2)
//   out[i,j] = (x[i,j] - mean) * rsqrt(variance + eps) * weight[j] + bias[j]
//   Math in float32, the variance in a second pass over the row, one rounding on store.
//
// launch     grid (rows), block (a multiple of 32, at most 1024); one block per row
//            dynamic shared memory 64 floats
// aliasing   out == x is allowed: a thread writes only what it alone reads
// traffic    rows * hidden * (sizeof(T) + sizeof(U)) bytes; the second and third pass over x, weight and bias from cache
#include "prelude.cuh"
#include "params.h"
#include "warp.cuh"

using T = CA_T;  // x
using W = CA_W;  // weight and bias
using U = CA_U;  // out
constexpr int VEC = CA_VEC;  // elements per load; divides hidden and every row stride
constexpr bool BIAS = CA_BIAS;
static_assert(sizeof(LayerNormArgs) == CA_SIZEOF_ARGS, "layer_norm: Python and CUDA disagree on LayerNormArgs");

CA_KERNEL __launch_bounds__(1024) void layer_norm(const __grid_constant__ LayerNormArgs args) {
  CA_DYN_SMEM(float, scratch);
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x.data) + row * args.x.stride_row;
  const W* weight = static_cast<const W*>(args.weight);
  const W* bias = static_cast<const W*>(args.bias);
  U* out = static_cast<U*>(args.out.data) + row * args.out.stride_row;
  const int first = threadIdx.x * VEC, step = blockDim.x * VEC;

  // 1. mean
  float sum = 0.0f;
  for (int j = first; j < args.hidden; j += step) {
    float h[VEC];
    to_float(load_vec<T, VEC>(x + j), h);
#pragma unroll
    for (int v = 0; v < VEC; ++v) sum += h[v];
  }
  const float mean = block_sum(sum, scratch) / static_cast<float>(args.hidden);

  // 2. variance around it
  float squares = 0.0f;
  for (int j = first; j < args.hidden; j += step) {
    float h[VEC];
    to_float(load_vec<T, VEC>(x + j), h);
#pragma unroll
    for (int v = 0; v < VEC; ++v) squares += (h[v] - mean) * (h[v] - mean);
  }
  const float scale = rsqrtf(block_sum(squares, scratch + 32) / static_cast<float>(args.hidden) + args.eps);

  // 3. scale and shift
  for (int j = first; j < args.hidden; j += step) {
    float h[VEC], w[VEC];
    to_float(load_vec<T, VEC>(x + j), h);
    to_float(load_vec<W, VEC>(weight + j), w);
#pragma unroll
    for (int v = 0; v < VEC; ++v) h[v] = (h[v] - mean) * scale * w[v];
    if constexpr (BIAS) {
      float b[VEC];
      to_float(load_vec<W, VEC>(bias + j), b);
#pragma unroll
      for (int v = 0; v < VEC; ++v) h[v] += b[v];
    }
    store_vec(out + j, from_float<U, VEC>(h));
  }
}
