// SPDX-License-Identifier: Apache-2.0
// attention_rows.cuh - numbers of all ROWS query rows in one lane: scores, dot products and outputs. Included by
// attention_cores.cuh, of which it uses KEYS and BY_ROWS.
#ifndef CUPYATTN_ATTENTION_ROWS_CUH
#define CUPYATTN_ATTENTION_ROWS_CUH

#include "eight_floats.cuh"
#include "online_softmax.cuh"
#include "warp.cuh"

using RowFloats = Floats<ROWS>;

// What exponents are taken relative to: see softmax_origin of one row.
__device__ __forceinline__ RowFloats softmax_origin(const RowFloats& top) {
  RowFloats out;
#if CA_CPU
  out.x = top.x == NEG_INF ? RowFloats::Numbers{} : top.x;
#else
#pragma unroll
  for (int r = 0; r < ROWS; ++r) out.x[r] = softmax_origin(top.x[r]);
#endif
  return out;
}

// Scores of key `key`, -inf for rows that do not see it; rows see keys from first[r] up to, without, first[ROWS + r].
__device__ __forceinline__ void hide(RowFloats& scores, int key, const int* first) {
#if CA_CPU
  ca::VectorOf<ROWS>::Ints begin{}, end{};
  __builtin_memcpy(&begin, first, 4 * ROWS);
  __builtin_memcpy(&end, first + ROWS, 4 * ROWS);
  scores.x = (begin <= key) & (end > key) ? scores.x : NEG_INF - RowFloats::Numbers{};
#else
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
    if (key < first[r] || key >= first[ROWS + r]) scores.x[r] = NEG_INF;
#endif
}

// The largest over the warp, or the sum, of every row.
__device__ __forceinline__ RowFloats warp_maximum(const RowFloats& x) {
  alignas(16) float each[ROWS];
  x.store(each);
  warp_max(each);
  return RowFloats::load(each);
}
__device__ __forceinline__ RowFloats warp_total(const RowFloats& x) {
  alignas(16) float each[ROWS];
  x.store(each);
  warp_sum(each);
  return RowFloats::load(each);
}

// Dot products of a lane's keys with all rows. TOGETHER: a vector has a number of every row, else 8 dims of one row.
template <bool TOGETHER>
struct Dots;

template <>
struct Dots<true> {
  // Sums of every CHAINS-th dim: a vector unit that has one warp to serve must not wait for its last addition.
  static constexpr int CHAINS = CA_CPU ? 4 : 1;
  RowFloats x[KEYS][CHAINS];

  __device__ __forceinline__ Dots() {
#pragma unroll
    for (auto& of_key : x) {
#pragma unroll
      for (RowFloats& part : of_key) part = RowFloats::all(0.0f);
    }
  }
  // What dims d to d + 7 of the first N keys contribute.
  template <int N>
  __device__ __forceinline__ void add(const EightFloats (&key)[N], const float* q, int, int d) {
    const float* dims = q + d * ROWS;
#pragma unroll
    for (int j = 0; j < STEP; ++j) {
      const RowFloats rows = RowFloats::load(dims + j * ROWS);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i][j % CHAINS].add_product(key[i].x[j], rows);
    }
  }
  __device__ __forceinline__ RowFloats of(int i) const {
    RowFloats out = x[i][0];
#pragma unroll
    for (int n = 1; n < CHAINS; ++n) out += x[i][n];
    return out;
  }
};

template <>
struct Dots<false> {
  EightFloats x[KEYS][ROWS];

  __device__ __forceinline__ Dots() {
#pragma unroll
    for (auto& of_key : x) {
#pragma unroll
      for (EightFloats& parts : of_key) parts = EightFloats::all(0.0f);
    }
  }
  template <int N>
  __device__ __forceinline__ void add(const EightFloats (&key)[N], const float* q, int head_dim, int d) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const EightFloats row = EightFloats::load(q + r * head_dim + d);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i][r].add_product(key[i], row);
    }
  }
  __device__ __forceinline__ RowFloats of(int i) const {
    RowFloats out = RowFloats::all(0.0f);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) out.x[r] = x[i][r].sum();
    return out;
  }
};

// Outputs of all rows in the lane's 8 dims, unnormalised.
template <bool TOGETHER>
struct Outputs;

template <>
struct Outputs<true> {
  RowFloats x[STEP];

  __device__ __forceinline__ Outputs() {
#pragma unroll
    for (RowFloats& of_dim : x) of_dim = RowFloats::all(0.0f);
  }
  __device__ __forceinline__ void shrink(const RowFloats& factors) {
#pragma unroll
    for (RowFloats& of_dim : x) of_dim *= factors;
  }
  __device__ __forceinline__ void add(const float* probs, const EightFloats& value) {
    const RowFloats p = RowFloats::load(probs);
#pragma unroll
    for (int j = 0; j < STEP; ++j) x[j].add_product(value.x[j], p);
  }
  __device__ __forceinline__ EightFloats row(int r) const {
    EightFloats out;
#pragma unroll
    for (int j = 0; j < STEP; ++j) out.x[j] = x[j].x[r];
    return out;
  }
};

template <>
struct Outputs<false> {
  EightFloats x[ROWS];

  __device__ __forceinline__ Outputs() {
#pragma unroll
    for (EightFloats& of_row : x) of_row = EightFloats::all(0.0f);
  }
  __device__ __forceinline__ void shrink(const RowFloats& factors) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) x[r] *= factors.x[r];
  }
  __device__ __forceinline__ void add(const float* probs, const EightFloats& value) {
    const RowFloats p = RowFloats::load(probs);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) x[r].add_product(p.x[r], value);
  }
  __device__ __forceinline__ EightFloats row(int r) const { return x[r]; }
};

#endif  // CUPYATTN_ATTENTION_ROWS_CUH
