// SPDX-License-Identifier: Apache-2.0
// instructions.cu - every warp-level wrapper once, so that the executor's models can be compared with the hardware.
//
// One block. `out` is uint32 [results, threads]: row k holds every thread's k-th result.
#include "prelude.cuh"
#include "params.h"
#include "barrier.cuh"
#include "cp_async.cuh"
#include "mma.cuh"
#include "warp.cuh"

struct InstructionsArgs {
  const void* x;  // input, see each kernel
  void* out;      // uint32 [results, threads]
};
static_assert(sizeof(InstructionsArgs) == CA_SIZEOF_ARGS, "instructions: Python and CUDA disagree on the struct");

class Results {
  uint32_t* next_;

 public:
  __device__ __forceinline__ explicit Results(const InstructionsArgs& args)
      : next_(static_cast<uint32_t*>(args.out) + threadIdx.x) {}
  __device__ __forceinline__ void operator()(uint32_t value) {
    *next_ = value;
    next_ += blockDim.x;
  }
  __device__ __forceinline__ void operator()(float value) { (*this)(__float_as_uint(value)); }
};

// x uint32 [32]
CA_KERNEL void shuffles(const __grid_constant__ InstructionsArgs args) {
  Results put(args);
  const int lane = threadIdx.x;
  const uint32_t x = static_cast<const uint32_t*>(args.x)[lane];
  put(__shfl_sync(FULL_MASK, x, 7 * lane + 3));
  put(__shfl_sync(FULL_MASK, x, 7 * lane + 3, 8));
  for (int distance = 1; distance < 32; distance *= 2) put(__shfl_xor_sync(FULL_MASK, x, distance));
  put(__shfl_xor_sync(FULL_MASK, x, 5, 8));
  put(__shfl_xor_sync(FULL_MASK, x, 12, 8));  // to an earlier group or past this one
  put(__shfl_up_sync(FULL_MASK, x, 3));
  put(__shfl_up_sync(FULL_MASK, x, 3, 16));
  put(__shfl_down_sync(FULL_MASK, x, 5));
  put(__shfl_down_sync(FULL_MASK, x, 5, 8));
  const int64_t wide = __shfl_sync(FULL_MASK, static_cast<int64_t>(x) << 32 | lane, lane ^ 9);
  put(static_cast<uint32_t>(wide));
  put(static_cast<uint32_t>(wide >> 32));
  put(__float_as_uint(__shfl_xor_sync(FULL_MASK, __uint_as_float(x), 1)));
}

// x uint32 [32]
CA_KERNEL void votes(const __grid_constant__ InstructionsArgs args) {
  Results put(args);
  const uint32_t x = static_cast<const uint32_t*>(args.x)[threadIdx.x];
  put(__ballot_sync(FULL_MASK, x & 4));
  put(static_cast<uint32_t>(__any_sync(FULL_MASK, x == 77)));
  put(static_cast<uint32_t>(__any_sync(FULL_MASK, x == 78)));
  put(static_cast<uint32_t>(__all_sync(FULL_MASK, x > 0)));
  put(static_cast<uint32_t>(__all_sync(FULL_MASK, x & 1)));
  uint32_t half;  // two halves of the warp vote on their own
  if (threadIdx.x < 16) {
    half = __ballot_sync(0xffffu, x & 2);
  } else {
    half = __ballot_sync(0xffff0000u, x & 8);
  }
  put(half);
}

// x float32 [32, 5]
CA_KERNEL void reductions(const __grid_constant__ InstructionsArgs args) {
  Results put(args);
  float x[5];
  for (int i = 0; i < 5; ++i) x[i] = static_cast<const float*>(args.x)[threadIdx.x * 5 + i];
  put(warp_sum(x[0]));
  put(warp_max(x[1]));
  put(group_sum<8>(x[2]));
  put(group_max<4>(x[3]));
  float sums[5], tops[5], quads[3];
  for (int i = 0; i < 5; ++i) sums[i] = tops[i] = x[i];
  for (int i = 0; i < 3; ++i) quads[i] = x[i];
  warp_sum(sums);
  warp_max(tops);
  group_sum<4>(quads);
  for (int i = 0; i < 5; ++i) put(sums[i]);
  for (int i = 0; i < 5; ++i) put(tops[i]);
  for (int i = 0; i < 3; ++i) put(quads[i]);
  float pairs[2] = {x[3], x[4]};
  group_max<16>(pairs);
  put(pairs[0]);
  put(pairs[1]);
}

// x float32 [threads]; shared memory 32 floats
CA_KERNEL void block_sums(const __grid_constant__ InstructionsArgs args) {
  Results put(args);
  CA_DYN_SMEM(float, scratch);
  put(block_sum(static_cast<const float*>(args.x)[threadIdx.x], scratch));
}

// x uint16 [32, 8]: 32 rows of 16 bytes, lane l addresses row 5 * l % 32; shared memory 512 bytes
CA_KERNEL void matrices(const __grid_constant__ InstructionsArgs args) {
  Results put(args);
  CA_DYN_SMEM(uint4, rows);
  rows[threadIdx.x] = static_cast<const uint4*>(args.x)[threadIdx.x];
  __syncthreads();
  const void* row = &rows[5 * threadIdx.x % 32];
  uint32_t one[1], two[2], four[4];
  ldmatrix_x1(one, row);
  put(one[0]);
  ldmatrix_x1_trans(one, row);
  put(one[0]);
  ldmatrix_x2(two, row);
  for (int i = 0; i < 2; ++i) put(two[i]);
  ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 2; ++i) put(two[i]);
  ldmatrix_x4(four, row);
  for (int i = 0; i < 4; ++i) put(four[i]);
  put(movmatrix(four[2]));
  ldmatrix_x4_trans(four, row);
  for (int i = 0; i < 4; ++i) put(four[i]);
}

#if CA_SM_80
// x uint32 [32]
CA_KERNEL void integer_reductions(const __grid_constant__ InstructionsArgs args) {
  Results put(args);
  const uint32_t x = static_cast<const uint32_t*>(args.x)[threadIdx.x];
  const int with_sign = static_cast<int>(x);
  put(__reduce_add_sync(FULL_MASK, x));
  put(__reduce_min_sync(FULL_MASK, x));
  put(__reduce_max_sync(FULL_MASK, x));
  put(__reduce_and_sync(FULL_MASK, x | 12));
  put(__reduce_or_sync(FULL_MASK, x & 0xff00ff));
  put(__reduce_xor_sync(FULL_MASK, x));
  put(static_cast<uint32_t>(__reduce_min_sync(FULL_MASK, with_sign)));
  put(static_cast<uint32_t>(__reduce_max_sync(FULL_MASK, with_sign)));
  uint32_t part;  // a quarter of the warp on its own
  if (threadIdx.x % 4 == 1) {
    part = __reduce_add_sync(0x22222222u, x);
  } else {
    part = __reduce_add_sync(0xddddddddu, x);
  }
  put(part);
}

// x uint32 [32, 10]: registers a[4], b[2], d[4] of every lane
template <typename D>
__device__ __forceinline__ void load_fragments(const void* x, uint32_t (&a)[4], uint32_t (&b)[2], D (&d)[4]) {
  const uint32_t* own = static_cast<const uint32_t*>(x) + threadIdx.x * 10;
  for (int i = 0; i < 4; ++i) a[i] = own[i];
  for (int i = 0; i < 2; ++i) b[i] = own[4 + i];
  for (int i = 0; i < 4; ++i) d[i] = reinterpret_cast<const D*>(own)[6 + i];
}

CA_KERNEL void mma_16(const __grid_constant__ InstructionsArgs args) {
  Results put(args);
  uint32_t a[4], b[2];
  float d[4];
  load_fragments(args.x, a, b, d);
  mma_m16n8k16<CA_T>(d, a, b);
  for (int i = 0; i < 4; ++i) put(d[i]);
}

CA_KERNEL void mma_s8(const __grid_constant__ InstructionsArgs args) {
  Results put(args);
  uint32_t a[4], b[2];
  int d[4];
  load_fragments(args.x, a, b, d);
  mma_m16n8k32_s8(d, a, b);
  for (int i = 0; i < 4; ++i) put(static_cast<uint32_t>(d[i]));
}
#endif

// x uint32 [4, threads, 4]: three groups of 16-byte copies and one of smaller ones, each group checked when it is
// due; thread t reads what thread t ^ 33 copied. shared memory 64 bytes a thread
CA_KERNEL void async_copies(const __grid_constant__ InstructionsArgs args) {
  Results put(args);
  CA_DYN_SMEM(uint4, smem);
  const int i = threadIdx.x, threads = blockDim.x, other = threadIdx.x ^ 33;
  const uint4* x = static_cast<const uint4*>(args.x);
  for (int group = 0; group < 3; ++group) {
    cp_async16(&smem[group * threads + i], &x[group * threads + i], (i + group) % 3 != 0);
    cp_async_commit();
  }
  uint32_t* words = reinterpret_cast<uint32_t*>(&smem[3 * threads + i]);
  const uint32_t* from = reinterpret_cast<const uint32_t*>(&x[3 * threads + i]);
  cp_async8(words, from);
  cp_async4(words + 2, from + 2, i % 2 == 0);
  cp_async4(words + 3, from + 3);
  cp_async_commit();
  cp_async_wait<3>();
  __syncthreads();
  put(smem[other].x);
  put(smem[other].w);
  cp_async_wait<1>();
  __syncthreads();
  put(smem[threads + other].y);
  put(smem[2 * threads + other].z);
  cp_async_wait<0>();
  __syncthreads();
  for (int w = 0; w < 4; ++w) put(reinterpret_cast<uint32_t*>(&smem[3 * threads + other])[w]);
}

// x uint32 [rounds, 64]: warps 0 and 1 hand numbers to warps 2 and 3 through one buffer; shared memory 64 words
CA_KERNEL void named_barriers(const __grid_constant__ InstructionsArgs args) {
  Results put(args);
  CA_DYN_SMEM(uint32_t, buffer);
  constexpr int FULL = 1, EMPTY = 2, ROUNDS = 4, THREADS = 128;
  const int i = threadIdx.x % 64;
  if (threadIdx.x < 64) {
    for (int round = 0; round < ROUNDS; ++round) {
      if (round > 0) bar_sync(EMPTY, THREADS);
      buffer[i] = static_cast<const uint32_t*>(args.x)[round * 64 + i];
      bar_arrive(FULL, THREADS);
      put(0u);
    }
  } else {
    for (int round = 0; round < ROUNDS; ++round) {
      bar_sync(FULL, THREADS);
      put(buffer[(i + 7 * round) % 64]);
      if (round + 1 < ROUNDS) bar_arrive(EMPTY, THREADS);
    }
  }
}
