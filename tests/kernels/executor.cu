// SPDX-License-Identifier: Apache-2.0
// executor.cu - what the CPU executor promises of CUDA's language, one kernel per promise.
#include "prelude.cuh"
#include "params.h"
#include "warp.cuh"

struct ExecutorArgs {
  float* out;         // float32 [n]
  int32_t* ints;      // int32 [n]
  int32_t n;          // elements
  int32_t repeat;     // rounds
};
static_assert(sizeof(ExecutorArgs) == CA_SIZEOF_ARGS, "executor: Python and CUDA disagree on ExecutorArgs");

// every thread of a 3-d grid of 3-d blocks writes its own linear index
CA_KERNEL void indices(const __grid_constant__ ExecutorArgs args) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  args.ints[i] = i;
}

// rotates a shared array by one place per round, static and dynamic
CA_KERNEL void rotate(const __grid_constant__ ExecutorArgs args) {
  __shared__ int fixed[1024];
  CA_DYN_SMEM(int, dynamic);
  const int i = threadIdx.x, threads = blockDim.x;
  fixed[i] = dynamic[i] = i;
  for (int round = 0; round < args.repeat; ++round) {
    __syncthreads();
    const int a = fixed[(i + 1) % threads], b = dynamic[(i + 1) % threads];
    __syncthreads();
    fixed[i] = a;
    dynamic[i] = b;
  }
  args.ints[blockIdx.x * threads + i] = fixed[i] == dynamic[i] ? fixed[i] : -1;
}

CA_KERNEL void atomics(const __grid_constant__ ExecutorArgs args) {
  atomicAdd(&args.ints[0], 1);
  atomicAdd(&args.out[0], 0.5f);
}

// threads leave early; the others go on without barriers
CA_KERNEL void early_exit(const __grid_constant__ ExecutorArgs args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i % 3 == 0) return;
  args.ints[i] = i;
}

CA_KERNEL void block_sums(const __grid_constant__ ExecutorArgs args) {
  CA_DYN_SMEM(float, scratch);
  args.out[blockIdx.x * blockDim.x + threadIdx.x] = block_sum(static_cast<float>(threadIdx.x + blockIdx.x), scratch);
}

CA_KERNEL void maths(const __grid_constant__ ExecutorArgs args) {
  const float x = args.out[threadIdx.x];
  args.out[threadIdx.x + blockDim.x] = exp2f(x);
  args.out[threadIdx.x + 2 * blockDim.x] = __expf(x);
  args.out[threadIdx.x + 3 * blockDim.x] = rsqrtf(x);
  args.out[threadIdx.x + 4 * blockDim.x] = fmaxf(x, 0.0f);
}
