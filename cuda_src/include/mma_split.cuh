// SPDX-License-Identifier: Apache-2.0
// mma_split.cuh - matrices on tensor cores whose numbers are no 16-bit T: each goes in as a sum of two T, of which the
// second takes what the first leaves, so that 2^-17 of it is lost with bfloat16 and 2^-22 with float16. float16 has a
// small range: such a matrix is divided by a power of two.
#ifndef CUPYATTN_MMA_SPLIT_CUH
#define CUPYATTN_MMA_SPLIT_CUH

#include "mma.cuh"

constexpr bool is_narrow(__half) { return true; }  // numbers beyond 65504 are infinite
constexpr bool is_narrow(__nv_bfloat16) { return false; }

// Two numbers as a pair of T, by one instruction, and back.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <typename T>
__device__ __forceinline__ void unpack(uint32_t word, float (&both)[2]) {
  to_float(reinterpret_cast<const Vec<T, 2>&>(word), both);
}

// Two numbers as a pair of T, and what that leaves of them as another.
template <typename T>
__device__ __forceinline__ void split(float low, float high, uint32_t& rounded, uint32_t& rest) {
  rounded = pack<T>(low, high);
  float both[2];
  unpack<T>(rounded, both);
  rest = pack<T>(low - both[0], high - both[1]);
}

// The power of two at x > 0, within 2^-63 and 2^126; 1 for 0.
__device__ __forceinline__ float power_at(float x) {
  if (x == 0.0f) return 1.0f;
  return fminf(fmaxf(__int_as_float(__float_as_int(x) & 0x7f800000), 0x1p-63f), 0x1p126f);
}

// Where this lane's row of a 16 x 16 tile is, for ldmatrix_x4: of the 8 x 8 matrices the second is below the first ...
template <typename T>
__device__ __forceinline__ const T* downward(const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  return tile + lane % 16 * stride + lane / 16 * 8;
}
// ... or right of it.
template <typename T>
__device__ __forceinline__ const T* sideways(const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  return tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
}

// Adds a . b to two neighbouring column tiles; b holds the fragments of both.
template <typename T>
__device__ __forceinline__ void add_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  const uint32_t b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
  mma_m16n8k16<T>(left, a, b_left);
  mma_m16n8k16<T>(right, a, b_right);
}

#endif  // CUPYATTN_MMA_SPLIT_CUH
