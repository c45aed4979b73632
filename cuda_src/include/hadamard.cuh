// SPDX-License-Identifier: Apache-2.0
// hadamard.cuh - multiplying 32 numbers by H / sqrt(32), H the 32 x 32 Sylvester matrix: out[j] = sum over i of
// x[i] * (-1)^popcount(i & j) / sqrt(32). Its own inverse. Sums run over neighbours at distance 1, 2, 4, 8, 16 in this
// order, then one product: every form below gives the same bits.
#ifndef CUPYATTN_HADAMARD_CUH
#define CUPYATTN_HADAMARD_CUH

#include "eight_floats.cuh"
#include "prelude.cuh"

constexpr float HADAMARD_SCALE = 0.17677669529663687f;  // 1 / sqrt(32)

// Keeps -fassociative-math from reordering the sums: registers the compiler may not look into. No instruction.
__device__ __forceinline__ void in_this_order(EightFloats& x) {
#if CA_CPU
#if defined(__AVX__)
  typedef EightFloats::Numbers Register;
#else
  typedef float Register __attribute__((vector_size(16)));
#endif
  Register parts[sizeof(x.x) / sizeof(Register)];
  __builtin_memcpy(parts, &x.x, sizeof(parts));
#pragma GCC unroll 2
  for (Register& part : parts) {
#if defined(__x86_64__)
    __asm__("" : "+x"(part));
#else
    __asm__("" : "+w"(part));
#endif
  }
  __builtin_memcpy(&x.x, parts, sizeof(parts));
#endif
}

// Sum and difference of neighbours at distance D inside x: D is 1, 2 or 4.
template <int D>
__device__ __forceinline__ void butterfly(EightFloats& x) {
#if CA_CPU
  typedef EightFloats::Numbers Numbers;
  constexpr auto SIGN = [](int j) { return j & D ? -1.0f : 1.0f; };
#if __has_builtin(__builtin_shufflevector)
  const Numbers other = __builtin_shufflevector(x.x, x.x, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D);
#else  // GCC before 12
  const Numbers other = {x.x[0 ^ D], x.x[1 ^ D], x.x[2 ^ D], x.x[3 ^ D],
                         x.x[4 ^ D], x.x[5 ^ D], x.x[6 ^ D], x.x[7 ^ D]};
#endif
  x.x = other + x.x * Numbers{SIGN(0), SIGN(1), SIGN(2), SIGN(3), SIGN(4), SIGN(5), SIGN(6), SIGN(7)};
  in_this_order(x);
#else
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j & D) continue;
    const float a = x.x[j], b = x.x[j + D];
    x.x[j] = a + b;
    x.x[j + D] = a - b;
  }
#endif
}
__device__ __forceinline__ void butterfly(EightFloats& a, EightFloats& b) {
#if CA_CPU
  const EightFloats::Numbers sum = a.x + b.x;
  b.x = a.x - b.x;
  a.x = sum;
  in_this_order(a);
  in_this_order(b);
#else
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float sum = a.x[j] + b.x[j];
    b.x[j] = a.x[j] - b.x[j];
    a.x[j] = sum;
  }
#endif
}

// All 32 numbers in one lane.
__device__ __forceinline__ void hadamard32(EightFloats (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    butterfly<1>(x[i]);
    butterfly<2>(x[i]);
    butterfly<4>(x[i]);
  }
  butterfly(x[0], x[1]);
  butterfly(x[2], x[3]);
  butterfly(x[0], x[2]);
  butterfly(x[1], x[3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] *= HADAMARD_SCALE;
}

#if CA_CPU && CA_FUSED
namespace ca {
inline void meet_hadamard32(EightFloats* const* lanes, uint32_t) {
  for (int quad = 0; quad < 32; quad += 4) {
    if (lanes[quad] == nullptr) continue;  // a block's last warp may lack whole groups
    EightFloats x[4] = {*lanes[quad], *lanes[quad + 1], *lanes[quad + 2], *lanes[quad + 3]};
    hadamard32(x);
    for (int i = 0; i < 4; ++i) *lanes[quad + i] = x[i];
  }
}
}  // namespace ca
#endif

// Numbers 8 * (lane % 4) onward in each of four neighbouring lanes; all lanes of the warp take part.
__device__ __forceinline__ void hadamard32(EightFloats& x) {
#if CA_CPU && CA_FUSED
  ca::collective<EightFloats, ca::meet_hadamard32>(FULL_MASK, x);
#else
  butterfly<1>(x);
  butterfly<2>(x);
  butterfly<4>(x);
  const int lane = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const float sign = lane & distance ? -1.0f : 1.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) x.x[j] = fmaf(sign, x.x[j], __shfl_xor_sync(FULL_MASK, x.x[j], distance));
  }
  x *= HADAMARD_SCALE;
#endif
}

// Every 32 numbers of `num_rows` rows of head_dim floats in shared memory, by one warp (lane 0 to 31). Rows start at
// multiples of 16 bytes; the caller waits for the warp before and after.
__device__ __forceinline__ void hadamard32_rows(float* rows, int num_rows, int row_stride, int head_dim, int lane) {
  const int groups = head_dim / 32;
#if CA_CPU && CA_FUSED
  for (int index = lane; index < num_rows * groups; index += 32) {
    float* group = rows + index / groups * row_stride + index % groups * 32;
    EightFloats x[4];
    for (int i = 0; i < 4; ++i) x[i] = EightFloats::load(group + 8 * i);
    hadamard32(x);
    for (int i = 0; i < 4; ++i) x[i].store(group + 8 * i);
  }
#else
  for (int first = 0; first < num_rows * groups; first += 8) {
    const int index = first + lane / 4;
    const bool inside = index < num_rows * groups;
    float* group = rows + index / groups * row_stride + index % groups * 32 + lane % 4 * 8;
    EightFloats x = inside ? EightFloats::load(group) : EightFloats::all(0.0f);
    hadamard32(x);
    if (inside) x.store(group);
  }
#endif
}

#endif  // CUPYATTN_HADAMARD_CUH
