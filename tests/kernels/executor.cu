// SPDX-License-Identifier: Apache-2.0
// executor.cu - what the CPU executor promises of CUDA's language, one kernel per promise.
#include "prelude.cuh"
#include "params.h"
#include "cp_async.cuh"
#include "mma.cuh"
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

// ints[12][threads]: one row per instruction, inputs v = 7 * i % 11 and p = i % 3 == 0
CA_KERNEL void collectives(const __grid_constant__ ExecutorArgs args) {
  const int i = threadIdx.x, threads = blockDim.x;
  const int v = 7 * i % 11;
  const bool p = i % 3 == 0;
  int* out = args.ints + i;
  const auto put = [&](int value) {
    *out = value;
    out += threads;
  };
  put(__shfl_sync(FULL_MASK, v, i + 5));
  put(__shfl_sync(FULL_MASK, v, 3, 8));
  put(__shfl_up_sync(FULL_MASK, v, 3, 16));
  put(__shfl_down_sync(FULL_MASK, v, 3, 8));
  put(__shfl_xor_sync(FULL_MASK, v, 5));
  put(static_cast<int>(__ballot_sync(FULL_MASK, p)));
  put(__any_sync(FULL_MASK, v == 10) + 2 * __all_sync(FULL_MASK, v < 11));
  put(static_cast<int>(__match_any_sync(FULL_MASK, v)));
  put(__reduce_add_sync(FULL_MASK, v));
  put(__reduce_max_sync(FULL_MASK, v));
  // even and odd lanes meet apart, inside a branch
  put(i % 2 ? __shfl_xor_sync(0xaaaaaaaau, v, 2) : __shfl_xor_sync(0x55555555u, v, 4));
  put(static_cast<int>(__shfl_xor_sync(FULL_MASK, static_cast<double>(v), 1)));
}

// ints[6]: what the atomics leave behind
CA_KERNEL void more_atomics(const __grid_constant__ ExecutorArgs args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicMax(&args.ints[0], i);
  atomicMin(&args.ints[1], -i);
  atomicInc(reinterpret_cast<unsigned*>(&args.ints[2]), 6u);
  atomicOr(&args.ints[3], 1 << i % 20);
  atomicSub(&args.ints[4], 2);
  int seen = args.ints[5];
  for (;;) {  // an addition by compare and swap
    const int old = atomicCAS(&args.ints[5], seen, seen + i);
    if (old == seen) break;
    seen = old;
  }
}

// ints[threads]: warp 0 waits for the last warp, which waits for nobody
CA_KERNEL void wait_for_last_warp(const __grid_constant__ ExecutorArgs args) {
  __shared__ int flag;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1) atomicExch(&flag, 42);
  if (threadIdx.x < 32 && args.repeat) {
    while (atomicAdd(&flag, 0) != 42) __nanosleep(100);
  }
  while (!args.repeat) __nanosleep(100);  // for ever
  args.ints[threadIdx.x] = atomicAdd(&flag, 0);
}

// one block that is busy for long, meeting all the time
CA_KERNEL void many_barriers(const __grid_constant__ ExecutorArgs args) {
  for (int round = 0; round < args.repeat; ++round) __syncthreads();
  if (threadIdx.x == 0) args.ints[blockIdx.x] = args.repeat;
}

// ints[14][n] of ints[0][n]
CA_KERNEL void bits(const __grid_constant__ ExecutorArgs args) {
  const int i = threadIdx.x, n = blockDim.x;
  const int x = args.ints[i];
  const unsigned u = static_cast<unsigned>(x), w = u * 2654435761u;
  args.ints[1 * n + i] = __popc(u);
  args.ints[2 * n + i] = __clz(x);
  args.ints[3 * n + i] = __ffs(x);
  args.ints[4 * n + i] = static_cast<int>(__brev(u));
  args.ints[5 * n + i] = static_cast<int>(__byte_perm(u, w, 0x7250));
  args.ints[6 * n + i] = static_cast<int>(__funnelshift_l(u, w, 7));
  args.ints[7 * n + i] = static_cast<int>(__funnelshift_r(u, w, 7));
  args.ints[8 * n + i] = __dp4a(x, static_cast<int>(w), 5);
  args.ints[9 * n + i] = static_cast<int>(__dp4a(u, w, 5u));
  args.ints[10 * n + i] = static_cast<int>(__byte_perm(u, w, u >> 16 & 0x7777));
  args.ints[11 * n + i] = static_cast<int>(__funnelshift_lc(u, w, w >> 26));
  args.ints[12 * n + i] = static_cast<int>(__funnelshift_rc(u, w, w >> 26));
  args.ints[13 * n + i] = static_cast<int>((u & 0x0f0f0f0fu) | 0x64006400u);
}

// ints[4][n] = out[n] rounded to integers
CA_KERNEL void to_integers(const __grid_constant__ ExecutorArgs args) {
  const int i = threadIdx.x, n = blockDim.x;
  const float x = args.out[i];
  args.ints[i] = __float2int_rn(x);
  args.ints[n + i] = __float2int_rz(x);
  args.ints[2 * n + i] = static_cast<int>(__float2uint_rn(x));
  args.ints[3 * n + i] = static_cast<int>(__float2uint_rz(x));
}

// out[4][n] of out[0][n]
CA_KERNEL void more_maths(const __grid_constant__ ExecutorArgs args) {
  const int n = blockDim.x;
  const float x = args.out[threadIdx.x];
  args.out[threadIdx.x + n] = logf(x);
  args.out[threadIdx.x + 2 * n] = log2f(x);
  args.out[threadIdx.x + 3 * n] = tanhf(x);
}

// out[1024..] = transpose of out[0..1024) through a 32x32 tile whose rows are `repeat` floats long
CA_KERNEL void transpose(const __grid_constant__ ExecutorArgs args) {
  CA_DYN_SMEM(float, tile);
  const int column = threadIdx.x % 32, row = threadIdx.x / 32;
  tile[row * args.repeat + column] = args.out[row * 32 + column];
  __syncthreads();
  args.out[1024 + row * 32 + column] = tile[column * args.repeat + row];
}

// float4 per thread, `repeat` floats apart
CA_KERNEL void vector_copy(const __grid_constant__ ExecutorArgs args) {
  const int i = threadIdx.x * args.repeat;
  store_vec(args.out + args.n / 2 + i, load_vec<float, 4>(args.out + i));
}

// each lane leaves out another round of a loop in which the warp meets
CA_KERNEL void rounds_left_out(const __grid_constant__ ExecutorArgs args) {
  float sum = 0.0f;
  for (int round = 0; round < 32; ++round) {
    if (round != static_cast<int>(threadIdx.x)) sum += args.out[round * 32 + threadIdx.x];
    __syncwarp();
  }
  args.out[threadIdx.x] = sum;
}

// three times 32 rows of 16 bytes into shared memory, those of odd lanes filled with zeros
CA_KERNEL void half_a_tile(const __grid_constant__ ExecutorArgs args) {
  CA_DYN_SMEM(char, tile);
  for (int i = 0; i < 3; ++i) cp_async16(tile + threadIdx.x * 16, args.out + threadIdx.x * 4, threadIdx.x % 2 == 0);
  cp_async_commit();
  cp_async_wait<0>();
}

// 32 rows of 16 bytes through shared memory, `repeat` bytes apart there: out[row][4] by cp.async and ldmatrix
CA_KERNEL void matrix_tile(const __grid_constant__ ExecutorArgs args) {
  CA_DYN_SMEM(char, tile);
  char* row = tile + threadIdx.x * args.repeat;
  cp_async16(row, args.out + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t words[4];
  ldmatrix_x4(words, row);
  Vec<uint32_t, 4> all;
  for (int i = 0; i < 4; ++i) all.v[i] = words[i];
  store_vec(reinterpret_cast<uint32_t*>(args.out + args.n / 2) + threadIdx.x * 4, all);
}
