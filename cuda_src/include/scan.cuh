// SPDX-License-Identifier: Apache-2.0
// scan.cuh - running sums over a warp and over a block, N at once; over a warp also running maxima.
#ifndef CUPYATTN_SCAN_CUH
#define CUPYATTN_SCAN_CUH

#include "prelude.cuh"

struct AddInt64 {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};
struct MaxInt64 {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a > b ? a : b; }
};

#if CA_CPU && CA_FUSED
namespace ca {

template <typename Op, int N>
inline void meet_scan(int64_t (*const* values)[N], uint32_t) {
  for (int l = 1; l < 32; ++l) {
    for (int i = 0; i < N; ++i) (*values[l])[i] = Op()((*values[l])[i], (*values[l - 1])[i]);
  }
}

}  // namespace ca
#endif

// v becomes the sum (MaxInt64: the largest) over lanes 0 to this one; all lanes of the warp take part.
template <typename Op = AddInt64, int N>
__device__ __forceinline__ void warp_scan(int64_t (&v)[N]) {
#if CA_CPU && CA_FUSED
  ca::collective<int64_t[N], ca::meet_scan<Op, N>>(FULL_MASK, v);
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int x = 1; x < 32; x *= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t below = __shfl_up_sync(FULL_MASK, v[i], x);
      if (lane >= x) v[i] = Op()(v[i], below);
    }
  }
#endif
}

// v becomes the sum over threads 0 to this one of a one-dimensional block of whole warps, `total` the sum over all.
// `scratch`: 32 * N of shared memory that nothing else uses until the next block barrier.
template <int N>
__device__ __forceinline__ void block_scan(int64_t (&v)[N], int64_t (&total)[N], int64_t* scratch) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  warp_scan(v);
  if (lane == 31) {
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[warp * N + i] = v[i];
  }
  __syncthreads();
  if (warp == 0) {
    int64_t sums[N];
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = lane < warps ? scratch[lane * N + i] : 0;
    warp_scan(sums);
    if (lane < warps) {
#pragma unroll
      for (int i = 0; i < N; ++i) scratch[lane * N + i] = sums[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (warp > 0) v[i] += scratch[(warp - 1) * N + i];
    total[i] = scratch[(warps - 1) * N + i];
  }
}

#endif  // CUPYATTN_SCAN_CUH
