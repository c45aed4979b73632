// SPDX-License-Identifier: Apache-2.0
// online_softmax.cuh - softmax over keys that arrive in pieces: the state of a row.
//
// A piece is (top, sum, acc): scores s are kept times log2(e), top = max s, sum = sum 2^(s - top),
// acc = sum 2^(s - top) v. No key yet: top = -inf, sum = 0, acc = 0. Results are out = acc / sum and the natural
// lse = ln(2) * (top + log2(sum)); an empty row gives 0 and -inf, never NaN.
#ifndef CUPYATTN_ONLINE_SOFTMAX_CUH
#define CUPYATTN_ONLINE_SOFTMAX_CUH

#include "prelude.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float NEG_INF = -__builtin_bit_cast(float, 0x7f800000u);  // NVRTC has neither INFINITY nor __builtin_inff

// What exponents are taken relative to: `top`, or 0 while there is no key (-inf minus -inf would be NaN).
__device__ __forceinline__ float softmax_origin(float top) { return top == NEG_INF ? 0.0f : top; }

__device__ __forceinline__ float natural_lse(float top, float sum) {
  return sum == 0.0f ? NEG_INF : __fmul_rn(LN_2, __fadd_rn(top, log2f(sum)));  // in this way in any kernel
}

// Share of a row's probability that its keys keep when a sink joins as one more logit: e^lse / (e^lse + e^sink).
__device__ __forceinline__ float sink_share(float lse, float sink) {
  return lse == NEG_INF ? 0.0f : 1.0f / (1.0f + exp2f(LOG2_E * (sink - lse)));
}

#endif  // CUPYATTN_ONLINE_SOFTMAX_CUH
