// SPDX-License-Identifier: Apache-2.0
// read_bandwidth.cu - read an array once and keep nothing: the ceiling other kernels' traffic is compared with.
//
// launch     any grid and block, the threads stride over the array
// traffic    16 * count bytes
#include "prelude.cuh"
#include "params.h"

struct ReadBandwidthArgs {
  const uint32_t* x;  // uint32 [count, 4] 16-byte aligned
  uint32_t* out;      // uint32 [1] written only if the data are all ones in every bit, so the loads must happen
  int64_t count;      // 16-byte pieces of x
};

constexpr int UNROLL = CA_UNROLL;  // independent loads in flight per thread
static_assert(sizeof(ReadBandwidthArgs) == CA_SIZEOF_ARGS, "read_bandwidth: Python and CUDA disagree on the struct");

CA_KERNEL void read_bandwidth(const __grid_constant__ ReadBandwidthArgs args) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  uint32_t all = first < args.count ? 0xffffffffu : 0;
  for (int64_t i = first; i < args.count; i += threads * UNROLL) {
    Vec<uint32_t, 4> piece[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t at = i + u * threads;
      piece[u] = load_vec<uint32_t, 4>(args.x + 4 * (at < args.count ? at : i));
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) all &= piece[u].v[0] & piece[u].v[1] & piece[u].v[2] & piece[u].v[3];
  }
  if (all == 0xffffffffu) args.out[0] = all;
}
