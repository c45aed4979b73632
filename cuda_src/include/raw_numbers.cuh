// SPDX-License-Identifier: Apache-2.0
// raw_numbers.cuh - N numbers as they are in memory, loaded now and converted when they are used.
//
// Those of 16 bits are held in whole words: the compiler keeps each member of a Vec in a register of its own, and takes
// what it has loaded apart at once, waiting for it.
#ifndef CUPYATTN_RAW_NUMBERS_CUH
#define CUPYATTN_RAW_NUMBERS_CUH

#include "eight_floats.cuh"

template <bool PAIRS, typename T>
struct RawWord {
  using type = uint32_t;
};
template <typename T>
struct RawWord<false, T> {
  using type = T;
};

// The address must be a multiple of what N numbers take, of float32 at most 16 bytes.
template <typename T, int N>
struct RawNumbers {
  using Word = typename RawWord<N % 2 == 0, T>::type;
  static constexpr int WORDS = N * sizeof(T) / sizeof(Word);
  Vec<Word, WORDS> words = {};

  __device__ __forceinline__ void load(const T* p) {
    words = load_vec<Word, WORDS>(reinterpret_cast<const Word*>(p));
  }
  __device__ __forceinline__ Floats<N> numbers() const {
    Vec<T, N> values;
    memcpy(&values, &words, sizeof(values));
    return Floats<N>::from(values);
  }
};

template <int N>
struct RawNumbers<float, N> {
  Floats<N> values = Floats<N>::all(0.0f);

  __device__ __forceinline__ void load(const float* p) { values = Floats<N>::load(p); }
  __device__ __forceinline__ const Floats<N>& numbers() const { return values; }
};

#endif  // CUPYATTN_RAW_NUMBERS_CUH
