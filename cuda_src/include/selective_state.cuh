// SPDX-License-Identifier: Apache-2.0
// selective_state.cuh - what a selective state space model reads for a token, and how its state decays.
//
//   step = dt + dt_bias, with softplus log1p(exp(step)), limited to [dt_min, dt_max]
//   state[p,n] <- exp(step * A) * state[p,n] + step * x[p] * B[n],   y[p] = sum_n state[p,n] * C[n] + D * x[p]
//   out = y * z * sigmoid(z)
#ifndef CUPYATTN_SELECTIVE_STATE_CUH
#define CUPYATTN_SELECTIVE_STATE_CUH

#include "eight_floats.cuh"
#include "params.h"
#include "silu.cuh"

__device__ __forceinline__ const float* channel(const PerChannel& values, int head, int dim) {
  return values.data + head * values.stride_head + dim * values.stride_dim;
}

// N numbers as floats, from memory in accesses of at most 16 bytes; store_floats writes them so.
template <int N, typename T>
__device__ __forceinline__ Floats<N> load_floats(const T* p) { return Floats<N>::from(load_vec<T, N>(p)); }
template <int N>
__device__ __forceinline__ Floats<N> load_floats(const float* p) { return Floats<N>::load(p); }
// The first `count` of N numbers, and zeros; `whole`: all N are one access, or accesses of 16 bytes.
template <int N, typename T>
__device__ __forceinline__ Floats<N> load_part(const T* p, int count, bool whole) {
  if (whole && count >= N) return load_floats<N>(p);
  Floats<N> some = Floats<N>::all(0.0f);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < count) some.x[j] = to_float(p[j]);
  }
  return some;
}
template <typename T>
__device__ __forceinline__ bool rows_are_aligned(const HeadView& view) {
  const int64_t strides = (view.stride_token | view.stride_head) * static_cast<int64_t>(sizeof(T));
  return (reinterpret_cast<int64_t>(view.data) | strides) % 16 == 0;
}

// Sum of products of N numbers each: on the host N sums, one vector; on the GPU a single one, for want of registers.
template <int N>
struct ProductSum {
#if CA_CPU
  Floats<N> sums = Floats<N>::all(0.0f);
#else
  float sum = 0.0f;
#endif
  __device__ __forceinline__ void add(const Floats<N>& a, const Floats<N>& b) {
#if CA_CPU
    sums.add_product(a, b);
#else
#pragma unroll
    for (int j = 0; j < N; ++j) sum = fmaf(a.x[j], b.x[j], sum);
#endif
  }
  __device__ __forceinline__ float total() const {
#if CA_CPU
    float sum = sums.x[0];
    for (int j = 1; j < N; ++j) sum += sums.x[j];
#endif
    return sum;
  }
};

template <typename DT>
__device__ __forceinline__ float raw_step(const SelectiveInputs& in, int64_t token, int head, int dim) {
  const float step = to_float(static_cast<const DT*>(in.dt.data)[token * in.dt.stride_token + head * in.dt.stride_head +
                                                                 dim * in.dt.stride_dim]);
  return in.dt_bias.data != nullptr ? step + *channel(in.dt_bias, head, dim) : step;
}

// The step of raw_step. Without branches or calls, so that the host computes several at once; the comparisons are false
// for NaN, which so stays. log1p(e) = 2 atanh(e / (2 + e)) for e <= 1, by its series to 2e-9.
__device__ __forceinline__ float finish_step(const SelectiveInputs& in, float raw) {
  const float e = expf(-fabsf(raw)), s = __fdividef(e, 2.0f + e), z = s * s;
  float series = fmaf(z, 1.0f / 15.0f, 1.0f / 13.0f);
  series = fmaf(z, series, 1.0f / 11.0f);
  series = fmaf(z, series, 1.0f / 9.0f);
  series = fmaf(z, series, 1.0f / 7.0f);
  series = fmaf(z, series, 1.0f / 5.0f);
  series = fmaf(z, series, 1.0f / 3.0f);
  series = fmaf(z, series, 1.0f);
  const float soft = fmaf(2.0f * s, series, fmaxf(raw, 0.0f));  // log(1 + exp(raw))
  const float step = in.softplus ? soft : raw;
  return step < in.dt_min ? in.dt_min : step > in.dt_max ? in.dt_max : step;
}

template <typename DT>
__device__ __forceinline__ float step_size(const SelectiveInputs& in, int64_t token, int head, int dim) {
  return finish_step(in, raw_step<DT>(in, token, head, dim));
}

#endif  // CUPYATTN_SELECTIVE_STATE_CUH
