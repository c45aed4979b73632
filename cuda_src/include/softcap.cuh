// SPDX-License-Identifier: Apache-2.0
// softcap.cuh - from a dot product to a natural score: score = softmax_scale * dot, with a cap > 0
// cap * tanh(score / cap).
#ifndef CUPYATTN_SOFTCAP_CUH
#define CUPYATTN_SOFTCAP_CUH

#include "eight_floats.cuh"
#include "online_softmax.cuh"
#include "prelude.cuh"

// tanh to 2^-22 of 1, without a branch: 1 - 2 / (1 + e^2x). Times a cap of 50 that is 1e-5 of a score, which 16-bit
// probabilities do not show.
__device__ __forceinline__ float quick_tanh(float x) {
  return fmaf(-2.0f, __fdividef(1.0f, 1.0f + exp2f(2.0f * LOG2_E * x)), 1.0f);
}

// tanh to 2^-22 of itself.
template <int N>
__device__ __forceinline__ Floats<N> exact_tanh(const Floats<N>& x) {
  Floats<N> out;
#if CA_CPU
  typedef typename Floats<N>::Numbers Numbers;
  const Numbers size = x.x < 0.0f ? -x.x : x.x, z = x.x * x.x;
  Floats<N> power;  // e^(-2 size)
  power.x = -2.0f * LOG2_E * size;
  power = exp2(power);
  const Numbers far = (1.0f - power.x) / (1.0f + power.x);
  Numbers p = 2.18694885e-2f * z - 5.39682540e-2f;  // the Taylor series near zero
  p = p * z + 1.33333333e-1f;
  p = p * z - 3.33333333e-1f;
  out.x = size < 0.3f ? x.x + x.x * z * p : x.x < 0.0f ? -far : far;
#else
#pragma unroll
  for (int j = 0; j < N; ++j) out.x[j] = tanhf(x.x[j]);
#endif
  return out;
}

struct ScoreScale {
  float scale;  // of what tanh is taken of, or of the score
  float cap;    // 0: none

  template <typename Args>
  __device__ __forceinline__ explicit ScoreScale(const Args& args)
      : scale(args.softcap > 0.0f ? args.softmax_scale / args.softcap : args.softmax_scale),
        cap(args.softcap > 0.0f ? args.softcap : 0.0f) {}
  // On tensor cores.
  __device__ __forceinline__ float operator()(float dot) const {
    return cap > 0.0f ? cap * quick_tanh(dot * scale) : dot * scale;
  }
  // On CUDA cores, for float32 too.
  template <int N>
  __device__ __forceinline__ Floats<N> operator()(Floats<N> dots) const {
    dots *= scale;
    if (cap > 0.0f) {
      dots = exact_tanh(dots);
      dots *= cap;
    }
    return dots;
  }
};

#endif  // CUPYATTN_SOFTCAP_CUH
