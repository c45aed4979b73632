// SPDX-License-Identifier: Apache-2.0
// warp.cuh - reductions over a warp, over groups of W neighbouring lanes and over a block.
//
// Butterfly order, so every lane gets the same bits. Array forms reduce N values at once. On the CPU with CA_FUSED
// one reduction is one meeting of the lanes, with the additions in the butterfly's order.
#ifndef CUPYATTN_WARP_CUH
#define CUPYATTN_WARP_CUH

#include "prelude.cuh"

struct AddFloat {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct MaxFloat {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

#if CA_CPU && CA_FUSED
namespace ca {

// values[lane] holds the N numbers of a lane. The butterfly gives every lane of a group the same bits, so its halves
// are folded instead: half the work, one result per group.
template <int W, int N, typename Op>
inline void meet_reduce(float (*const* values)[N], uint32_t) {
  float now[N][32];
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < N; ++i) now[i][l] = values[l] ? (*values[l])[i] : 0.0f;
  }
#pragma GCC unroll 5
  for (int x = W / 2; x > 0; x /= 2) {
    for (int i = 0; i < N; ++i) {
      for (int group = 0; group < 32; group += W) {
        for (int l = group; l < group + x; ++l) now[i][l] = Op()(now[i][l], now[i][l + x]);
      }
    }
    asm("" : "+m"(now));  // keeps -fassociative-math from joining the steps of the tree
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; values[l] && i < N; ++i) (*values[l])[i] = now[i][l / W * W];
  }
}

}  // namespace ca
#endif

// Reduces v over groups of W lanes (W a power of two up to 32); all lanes of the warp take part.
template <int W, typename Op, int N>
__device__ __forceinline__ void group_reduce(float (&v)[N]) {
#if CA_CPU && CA_FUSED
  ca::collective<float[N], ca::meet_reduce<W, N, Op>>(FULL_MASK, v);
#else
#pragma unroll
  for (int x = W / 2; x > 0; x /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = Op()(v[i], __shfl_xor_sync(FULL_MASK, v[i], x));
  }
#endif
}

template <int W, int N>
__device__ __forceinline__ void group_sum(float (&v)[N]) { group_reduce<W, AddFloat>(v); }
template <int W, int N>
__device__ __forceinline__ void group_max(float (&v)[N]) { group_reduce<W, MaxFloat>(v); }
template <int W>
__device__ __forceinline__ float group_sum(float v) {
  float one[1] = {v};
  group_reduce<W, AddFloat>(one);
  return one[0];
}
template <int W>
__device__ __forceinline__ float group_max(float v) {
  float one[1] = {v};
  group_reduce<W, MaxFloat>(one);
  return one[0];
}

template <int N>
__device__ __forceinline__ void warp_sum(float (&v)[N]) { group_sum<32>(v); }
template <int N>
__device__ __forceinline__ void warp_max(float (&v)[N]) { group_max<32>(v); }
__device__ __forceinline__ float warp_sum(float v) { return group_sum<32>(v); }
__device__ __forceinline__ float warp_max(float v) { return group_max<32>(v); }

// Sum over a one-dimensional block of whole warps, the same bits in every thread. `scratch`: 32 floats of shared
// memory that nothing else uses until the next block barrier.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  const int warps = blockDim.x / 32;
  v = warp_sum(v);
  if (warps == 1) return v;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < warps; ++w) sum += scratch[w];
  return sum;
}

#endif  // CUPYATTN_WARP_CUH
