// SPDX-License-Identifier: Apache-2.0
// planted.cu - small kernels with one fault each; BUG = 0 compiles the twin without it.
#include "prelude.cuh"
#include "params.h"
#include "barrier.cuh"
#include "cp_async.cuh"

struct PlantedArgs {
  const float* x;     // float32 [n] input
  float* out;         // float32 [n] output
  int32_t* counter;   // int32 [1] zero
  int32_t n;          // elements
  int32_t reserved;   // zero
};

constexpr bool BUG = CA_BUG;
static_assert(sizeof(PlantedArgs) == CA_SIZEOF_ARGS, "planted: Python and CUDA disagree on PlantedArgs");

CA_KERNEL void read_past_end(const __grid_constant__ PlantedArgs args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < args.n) args.out[i] = args.x[i] + (BUG || i + 1 < args.n ? args.x[i + 1] : 0.0f);
}

CA_KERNEL void write_past_end(const __grid_constant__ PlantedArgs args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < args.n) args.out[i + BUG] = 1.0f;
}

CA_KERNEL void write_to_input(const __grid_constant__ PlantedArgs args) {
  const int i = threadIdx.x;
  if (i < args.n) (BUG ? const_cast<float*>(args.x) : args.out)[i] = 1.0f;
}

CA_KERNEL void shared_overrun(const __grid_constant__ PlantedArgs args) {
  CA_DYN_SMEM(float, smem);  // blockDim.x floats
  smem[threadIdx.x + BUG] = args.x[threadIdx.x];
  __syncthreads();
  args.out[threadIdx.x] = smem[threadIdx.x + BUG];
}

CA_KERNEL void uninitialised_shared(const __grid_constant__ PlantedArgs args) {
  CA_DYN_SMEM(float, smem);
  if (!BUG || threadIdx.x != 5) smem[threadIdx.x] = args.x[threadIdx.x];
  __syncthreads();
  args.out[threadIdx.x] = smem[threadIdx.x];
}

CA_KERNEL void uninitialised_static(const __grid_constant__ PlantedArgs args) {
  __shared__ float tile[64];
  if (!BUG || threadIdx.x != 5) tile[threadIdx.x] = args.x[threadIdx.x];
  __syncthreads();
  args.out[threadIdx.x] = tile[63 - threadIdx.x];
}

// reads what other warps wrote
CA_KERNEL void missing_barrier(const __grid_constant__ PlantedArgs args) {
  CA_DYN_SMEM(float, smem);
  smem[threadIdx.x] = args.x[threadIdx.x];
  if (!BUG) __syncthreads();
  args.out[threadIdx.x] = smem[blockDim.x - 1 - threadIdx.x];
}

// overwrites a buffer that other threads still read
CA_KERNEL void missing_second_barrier(const __grid_constant__ PlantedArgs args) {
  CA_DYN_SMEM(float, smem);
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    smem[threadIdx.x] = args.x[threadIdx.x] + round;
    __syncthreads();
    sum += smem[blockDim.x - 1 - threadIdx.x];
    if (!BUG) __syncthreads();
  }
  args.out[threadIdx.x] = sum;
}

// neighbours in a warp exchange through shared memory
CA_KERNEL void missing_syncwarp(const __grid_constant__ PlantedArgs args) {
  CA_DYN_SMEM(float, smem);
  smem[threadIdx.x] = args.x[threadIdx.x];
  if (!BUG) __syncwarp();
  args.out[threadIdx.x] = smem[threadIdx.x ^ 1];
}

CA_KERNEL void divergent_barrier(const __grid_constant__ PlantedArgs args) {
  CA_DYN_SMEM(float, smem);
  smem[threadIdx.x] = args.x[threadIdx.x];
  if (BUG && threadIdx.x < 32) {
    __syncthreads();
    smem[threadIdx.x] += 1.0f;
  } else {
    __syncthreads();
  }
  args.out[threadIdx.x] = smem[threadIdx.x];
}

CA_KERNEL void barrier_after_exit(const __grid_constant__ PlantedArgs args) {
  if (BUG && threadIdx.x == 3) return;
  __syncthreads();
  args.out[threadIdx.x] = args.x[threadIdx.x];
}

CA_KERNEL void divergent_shuffle(const __grid_constant__ PlantedArgs args) {
  float v = args.x[threadIdx.x];
  if (BUG ? threadIdx.x % 32 < 16 : true) v += __shfl_xor_sync(FULL_MASK, v, 1);
  args.out[threadIdx.x] = v;
}

CA_KERNEL void different_collectives(const __grid_constant__ PlantedArgs args) {
  float v = args.x[threadIdx.x];
  if (BUG && threadIdx.x % 2) {
    v += __ballot_sync(FULL_MASK, v > 0.0f);
  } else {
    v += __shfl_xor_sync(FULL_MASK, v, 1);
  }
  args.out[threadIdx.x] = v;
}

// a two-stage ring that waits for one group too few
CA_KERNEL void early_async_read(const __grid_constant__ PlantedArgs args) {
  CA_DYN_SMEM(float, smem);  // 2 * blockDim.x floats
  float* stage[2] = {smem, smem + blockDim.x};
  for (int s = 0; s < 2; ++s) {
    cp_async4(stage[s] + threadIdx.x, args.x + threadIdx.x);
    cp_async_commit();
  }
  cp_async_wait<BUG ? 2 : 1>();
  __syncthreads();
  const float first = stage[0][blockDim.x - 1 - threadIdx.x];
  cp_async_wait<0>();
  __syncthreads();
  args.out[threadIdx.x] = first + stage[1][threadIdx.x];
}

CA_KERNEL void misaligned_async(const __grid_constant__ PlantedArgs args) {
  CA_DYN_SMEM(float, smem);
  if (threadIdx.x == 0) cp_async16(smem + BUG, args.x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  args.out[threadIdx.x] = smem[1 + threadIdx.x % 3];
}

CA_KERNEL void deadlock(const __grid_constant__ PlantedArgs args) {
  if (threadIdx.x / 32 == 0) bar_sync(1, 64);
  if (threadIdx.x / 32 == 1) bar_sync(BUG ? 2 : 1, 64);
  args.out[threadIdx.x] = args.x[threadIdx.x];
}

// warp 0 produces, warp 1 consumes behind a named barrier
CA_KERNEL void producer_consumer(const __grid_constant__ PlantedArgs args) {
  CA_DYN_SMEM(float, smem);
  if (threadIdx.x < 32) {
    smem[threadIdx.x] = args.x[threadIdx.x];
    bar_arrive(1, 64);
  } else {
    if (BUG) {
      bar_arrive(1, 64);
    } else {
      bar_sync(1, 64);
    }
    args.out[threadIdx.x] = smem[threadIdx.x - 32];
  }
}

// two blocks write one element
CA_KERNEL void blocks_collide(const __grid_constant__ PlantedArgs args) {
  if (threadIdx.x == 0) args.out[BUG ? 0 : blockIdx.x] = args.x[blockIdx.x];
}

// a block reads what another block of the launch writes
CA_KERNEL void reads_other_block(const __grid_constant__ PlantedArgs args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  args.out[i] = args.x[i];
  __syncthreads();
  const int other = BUG ? (i + blockDim.x) % args.n : i;
  if (args.out[other] < -1e30f) args.out[i] = 0.0f;
}

// threads of a block exchange through global memory
CA_KERNEL void global_race_in_block(const __grid_constant__ PlantedArgs args) {
  args.out[threadIdx.x] = args.x[threadIdx.x];
  if (!BUG) __syncthreads();
  if (args.out[blockDim.x - 1 - threadIdx.x] < -1e30f) args.counter[0] = 1;
}

// the block that arrives last sums the others' results: fences and atomics order it after them
CA_KERNEL void last_block_reduces(const __grid_constant__ PlantedArgs args) {
  __shared__ int32_t arrived;
  if (threadIdx.x == 0) {
    args.out[1 + blockIdx.x] = args.x[blockIdx.x];
    __threadfence();
    if (!BUG) arrived = atomicAdd(args.counter, 1);
    if (BUG) arrived = blockIdx.x;
    if (arrived == static_cast<int32_t>(gridDim.x) - 1) {
      __threadfence();
      float sum = 0.0f;
      for (int b = 0; b < static_cast<int>(gridDim.x); ++b) sum += args.out[1 + b];
      args.out[0] = sum;
    }
  }
}

CA_KERNEL void shared_atomics(const __grid_constant__ PlantedArgs args) {
  CA_DYN_SMEM(int32_t, bins);
  if (threadIdx.x == 0) bins[0] = 0;
  __syncthreads();
  if (BUG) {
    bins[0] += 1;
  } else {
    atomicAdd(&bins[0], 1);
  }
  __syncthreads();
  args.out[threadIdx.x] = static_cast<float>(bins[0]);
}

CA_KERNEL void misaligned_vector(const __grid_constant__ PlantedArgs args) {
  const int i = threadIdx.x % 8;
  args.out[threadIdx.x] = load_vec<float, 4>(args.x + 4 * i + BUG).v[0];
}

// every thread reads the element that thread 0 then overwrites
CA_KERNEL void overwritten_while_read(const __grid_constant__ PlantedArgs args) {
  CA_DYN_SMEM(float, smem);
  if (threadIdx.x == 0) smem[0] = args.x[0];
  __syncthreads();
  const float v = smem[0];
  if (!BUG) __syncthreads();
  if (threadIdx.x == 0) smem[0] = v + 1.0f;
  args.out[threadIdx.x] = v;
}

// the counter is raised before the result it announces is written
CA_KERNEL void announced_too_early(const __grid_constant__ PlantedArgs args) {
  if (threadIdx.x != 0) return;
  int32_t arrived = 0;
  if (BUG) arrived = atomicAdd(args.counter, 1);
  args.out[1 + blockIdx.x] = args.x[blockIdx.x];
  __threadfence();
  if (!BUG) arrived = atomicAdd(args.counter, 1);
  if (arrived == static_cast<int32_t>(gridDim.x) - 1) {
    __threadfence();
    float sum = 0.0f;
    for (int b = 0; b < static_cast<int>(gridDim.x); ++b) sum += args.out[1 + b];
    args.out[0] = sum;
  }
}

// both halves of a warp shuffle, but not together
CA_KERNEL void shuffle_in_two_branches(const __grid_constant__ PlantedArgs args) {
  float v = args.x[threadIdx.x];
  if (BUG && threadIdx.x % 32 < 16) {
    v += 2.0f * __shfl_xor_sync(FULL_MASK, v, 1);
  } else {
    v += __shfl_xor_sync(FULL_MASK, v, 1);
  }
  args.out[threadIdx.x] = v;
}

__noinline__ __device__ float nested(const float* x, int depth) {
  float pad[64];
  for (int i = 0; i < 64; ++i) pad[i] = x[(i + depth) % 64];
  const float below = depth > 0 ? nested(pad, depth - 1) : 0.0f;
  return below + pad[depth % 64];
}

CA_KERNEL void deep_recursion(const __grid_constant__ PlantedArgs args) {
  args.out[threadIdx.x] = nested(args.x, BUG ? 1000 : 10);
}
