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
// are folded onto the first lane instead, in place: the compiler cannot join the steps of the tree.
template <int W, int N, typename Op>
inline void meet_reduce(float (*const* values)[N], uint32_t) {
  for (int group = 0; group < 32; group += W) {
    float(*const* lanes)[N] = values + group;
    if (lanes[W - 1] == nullptr) continue;  // a block's last warp may lack whole groups
#pragma GCC unroll 5
    for (int x = W / 2; x > 0; x /= 2) {
#pragma GCC unroll 16
      for (int l = 0; l < x; ++l) {
        float a[N], b[N];
        __builtin_memcpy(a, lanes[l], sizeof(a));
        __builtin_memcpy(b, lanes[l + x], sizeof(b));
        for (int i = 0; i < N; ++i) a[i] = Op()(a[i], b[i]);
        __builtin_memcpy(lanes[l], a, sizeof(a));
      }
    }
#pragma GCC unroll 32
    for (int l = 1; l < W; ++l) __builtin_memcpy(lanes[l], lanes[0], sizeof(float[N]));
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
