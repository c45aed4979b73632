// SPDX-License-Identifier: Apache-2.0
// softcap.cuh - from a dot product to a natural score: score = softmax_scale * dot, with a cap > 0
// cap * tanh(score / cap).
#ifndef CUPYATTN_SOFTCAP_CUH
#define CUPYATTN_SOFTCAP_CUH

#include "online_softmax.cuh"
#include "prelude.cuh"

// tanh to 2^-22, without a branch: 1 - 2 / (1 + e^2x).
__device__ __forceinline__ float quick_tanh(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2f(2.0f * LOG2_E * x));
}

struct ScoreScale {
  float scale;  // of what tanh is taken of, or of the score
  float cap;    // 0: none

  template <typename Args>
  __device__ __forceinline__ explicit ScoreScale(const Args& args)
      : scale(args.softcap > 0.0f ? args.softmax_scale / args.softcap : args.softmax_scale),
        cap(args.softcap > 0.0f ? args.softcap : 0.0f) {}
  __device__ __forceinline__ float operator()(float dot) const {
    return cap > 0.0f ? cap * quick_tanh(dot * scale) : dot * scale;
  }
};

#endif  // CUPYATTN_SOFTCAP_CUH
