// SPDX-License-Identifier: Apache-2.0
// last_block.cu - the block that arrives last at a unit adds up what all blocks of the unit left in global memory.
//
//   unit u has gridDim.x blocks; block (p, u) writes x[u] + i + p to partials[u, p, i] and counts itself; the last one
//   stores out[u, i] = sum over p of partials[u, p, i] in ascending p, and resets the counter.
//
// WAY is a legal way to write it or has one fault; test_last_block.py names them.
#include "prelude.cuh"
#include "params.h"

struct LastBlockArgs {
  const float* x;     // float32 [units]
  float* partials;    // float32 [units, pieces, threads]
  float* out;         // float32 [units, threads]
  int32_t* counters;  // int32 [2 * units] zero before and after
};

enum Way {
  ALL_FENCE, THREAD_0_FENCES, THREAD_0_ACQUIRES,  // legal
  NO_FENCE, ONE_THREAD_WITHOUT_FENCE, FENCE_OF_THE_BLOCK, FENCE_BEFORE_WRITE, NO_BARRIER, NO_ATOMIC, PLAIN_COUNT,
  OTHER_COUNTER, READER_PASSES_BY, NO_ACQUIRE, RESET_UNSEEN
};
constexpr int WAY = CA_WAY;
static_assert(sizeof(LastBlockArgs) == CA_SIZEOF_ARGS, "last_block: Python and CUDA disagree on LastBlockArgs");

__device__ __forceinline__ void fence_after_write() {
  if (WAY == ONE_THREAD_WITHOUT_FENCE && threadIdx.x == 40) return;
  if (WAY == FENCE_OF_THE_BLOCK) __threadfence_block();
  if (WAY != THREAD_0_FENCES && WAY != NO_FENCE && WAY != FENCE_OF_THE_BLOCK && WAY != FENCE_BEFORE_WRITE) {
    __threadfence();
  }
}

// How many pieces of the unit came before.
__device__ __forceinline__ int count_piece(const LastBlockArgs& args) {
  const int piece = blockIdx.x, last = gridDim.x - 1;
  int32_t* counter = args.counters + blockIdx.y;
  if (WAY == NO_ATOMIC || (WAY == READER_PASSES_BY && piece == last)) return piece;
  if (WAY == PLAIN_COUNT) return (*counter)++;
  if (WAY == OTHER_COUNTER && piece == last) return atomicAdd(counter + gridDim.y, 1) + last;
  return atomicAdd(counter, 1);
}

CA_KERNEL void last_block(const __grid_constant__ LastBlockArgs args) {
  CA_DYN_SMEM(int, before);
  const int piece = blockIdx.x, pieces = gridDim.x, unit = blockIdx.y, i = threadIdx.x, threads = blockDim.x;
  const int64_t first = static_cast<int64_t>(unit) * pieces * threads;

  // 1. leave the piece
  if (WAY == FENCE_BEFORE_WRITE) __threadfence();
  args.partials[first + piece * threads + i] = args.x[unit] + i + piece;
  fence_after_write();
  if (WAY != NO_BARRIER) __syncthreads();

  // 2. count it
  if (i == 0) {
    if (WAY == THREAD_0_FENCES) __threadfence();
    *before = count_piece(args);
    if (WAY == THREAD_0_ACQUIRES) __threadfence();
  }
  __syncthreads();
  const int arrived = *before;
  if (WAY == RESET_UNSEEN && arrived == 0 && i == 0) args.counters[unit] = 1;
  if (arrived != pieces - 1) return;

  // 3. add up
  if (WAY != NO_ACQUIRE && WAY != THREAD_0_ACQUIRES) __threadfence();
  float sum = 0.0f;
  for (int p = 0; p < pieces; ++p) sum += args.partials[first + p * threads + i];
  args.out[unit * threads + i] = sum;
  if (i == threads - 1) args.counters[unit] = 0;
}

// Block 2 reads what block 0 wrote and knows of it through block 1. Blocks that come too early do nothing.
CA_KERNEL void chain(const __grid_constant__ LastBlockArgs args) {
  if (threadIdx.x != 0) return;
  const int block = blockIdx.x;
  if (block == 0) args.partials[0] = args.x[0];
  if (block > 0 && atomicAdd(args.counters + block - 1, 0) == 0) return;
  // both the acquiring and the releasing fence
  if (!(WAY == NO_FENCE && block == 0) && !(WAY == NO_ACQUIRE && block == 1)) __threadfence();
  if (block == 2) args.out[0] = args.partials[0];
  if (block < 2) atomicExch(args.counters + block, 1);
}
