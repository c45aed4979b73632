// SPDX-License-Identifier: Apache-2.0
// probe.cu - kernels that show how they were launched: what CuPy's launch rules are tested with.
#include "prelude.cuh"
#include "params.h"

struct ProbeArgs {
  int64_t* out;  // int64 [blocks]
};

static_assert(sizeof(ProbeArgs) == CA_SIZEOF_ARGS, "probe: Python and CUDA disagree on ProbeArgs");

// out[block] = number of blocks
CA_KERNEL void probe_grid(const __grid_constant__ ProbeArgs args) {
  if (threadIdx.x == 0) args.out[blockIdx.x] = gridDim.x;
}

// never runs with more than 64 threads
CA_KERNEL __launch_bounds__(64) void probe_bound(const __grid_constant__ ProbeArgs args) {
  if (threadIdx.x == 0) args.out[0] = blockDim.x;
}

// 4 KiB of static shared memory beside the dynamic one, whose first and last used words are args.out[0] and [1]
CA_KERNEL void probe_shared(const __grid_constant__ ProbeArgs args) {
  __shared__ int64_t table[512];
  CA_DYN_SMEM(int64_t, words);
  for (int i = threadIdx.x; i < 512; i += blockDim.x) table[i] = i;
  __syncthreads();
  if (threadIdx.x == 0) {
    const int64_t last = args.out[0];
    words[0] = table[500];
    words[last] = table[7];
    args.out[0] = words[0];
    args.out[1] = words[last];
  }
}
