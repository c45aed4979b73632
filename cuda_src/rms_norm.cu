// SPDX-License-Identifier: Apache-2.0
// rms_norm.cu - root-mean-square normalisation of rows, with an optional residual add in front.
//
//   RESIDUAL:  r[i,:] <- r[i,:] + x[i,:]  (rounded to R, written back),  h = r        otherwise  h = x
//   out[i,j] = h[i,j] * rsqrt(mean_j(h[i,j]^2) + eps) * weight[j],  an infinite float16 h counting as 65504
//   Math in float32, one rounding on store.
//
// launch     grid (rows), block (a multiple of 32, at most 1024); one block per row
//            dynamic shared memory 32 floats
// aliasing   out == x and out == residual are allowed; without a residual, out == x
// traffic    rows * hidden * (sizeof(T) + sizeof(U) + 2 * sizeof(R) with a residual) bytes, weight from cache
#include "prelude.cuh"
#include "params.h"
#include "warp.cuh"

using T = CA_T;  // x
using W = CA_W;  // weight
using R = CA_R;  // residual
using U = CA_U;  // out
constexpr int VEC = CA_VEC;  // elements per load; divides hidden and every row stride
constexpr bool RESIDUAL = CA_RESIDUAL;
static_assert(sizeof(RmsNormArgs) == CA_SIZEOF_ARGS, "rms_norm: Python and CUDA disagree on RmsNormArgs");

// The infinities of float16 as its largest numbers, which are the bits before theirs.
__device__ __forceinline__ Vec<__half, VEC> bounded(Vec<__half, VEC> x) {
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    const uint16_t bits = __half_as_ushort(x.v[v]);
    x.v[v] = __ushort_as_half(static_cast<uint16_t>(bits - ((bits & 0x7fff) == 0x7c00)));
  }
  return x;
}
template <typename S>
__device__ __forceinline__ Vec<S, VEC> bounded(Vec<S, VEC> x) { return x; }

CA_KERNEL __launch_bounds__(1024) void rms_norm(const __grid_constant__ RmsNormArgs args) {
  CA_DYN_SMEM(float, scratch);
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x.data) + row * args.x.stride_row;
  const W* weight = static_cast<const W*>(args.weight);
  R* residual = static_cast<R*>(args.residual.data) + row * args.residual.stride_row;
  U* out = static_cast<U*>(args.out.data) + row * args.out.stride_row;

  // 1. sum of squares; the residual is updated on the way
  float squares = 0.0f;
  for (int j = threadIdx.x * VEC; j < args.hidden; j += blockDim.x * VEC) {
    float h[VEC];
    if constexpr (RESIDUAL) {
      float r[VEC];
      to_float(load_vec<T, VEC>(x + j), h);
      to_float(load_vec<R, VEC>(residual + j), r);
#pragma unroll
      for (int v = 0; v < VEC; ++v) r[v] += h[v];
      const Vec<R, VEC> rounded = from_float<R, VEC>(r);
      store_vec(residual + j, rounded);
      to_float(bounded(rounded), h);
    } else {
      to_float(bounded(load_vec<T, VEC>(x + j)), h);
    }
#pragma unroll
    for (int v = 0; v < VEC; ++v) squares += h[v] * h[v];
  }
  const float scale = rsqrtf(block_sum(squares, scratch) / static_cast<float>(args.hidden) + args.eps);

  // 2. scale; every thread reads back only what it wrote
  for (int j = threadIdx.x * VEC; j < args.hidden; j += blockDim.x * VEC) {
    float h[VEC], w[VEC];
    if constexpr (RESIDUAL) {
      to_float(bounded(load_vec<R, VEC>(residual + j)), h);
    } else {
      to_float(bounded(load_vec<T, VEC>(x + j)), h);
    }
    to_float(load_vec<W, VEC>(weight + j), w);
#pragma unroll
    for (int v = 0; v < VEC; ++v) h[v] *= scale * w[v];
    store_vec(out + j, from_float<U, VEC>(h));
  }
}
