// SPDX-License-Identifier: Apache-2.0
// eight_floats.cuh - N float32 numbers of one lane, mostly eight. On the CPU they are one vector: g++ does not
// reliably turn arrays of accumulators into vectors by itself.
#ifndef CUPYATTN_EIGHT_FLOATS_CUH
#define CUPYATTN_EIGHT_FLOATS_CUH

#include "prelude.cuh"

#if CA_CPU
namespace ca {
template <int N>
struct VectorOf {
  static constexpr int LANES = N < 4 ? 4 : N;  // those past N hold anything
  typedef float Floats __attribute__((vector_size(4 * LANES)));
  typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
};
}  // namespace ca
#endif

template <int N>
struct Floats {
#if CA_CPU
  typedef typename ca::VectorOf<N>::Floats Numbers;
  Numbers x;
#else
  float x[N];
#endif

  // The same number N times.
  static __device__ __forceinline__ Floats all(float value) {
    Floats out;
#if CA_CPU
    out.x = value - Numbers{};
#else
#pragma unroll
    for (int j = 0; j < N; ++j) out.x[j] = value;
#endif
    return out;
  }
  template <typename T>
  static __device__ __forceinline__ Floats from(const Vec<T, N>& values) {
    float converted[N];
    to_float(values, converted);
    Floats out;
#if CA_CPU
    __builtin_memcpy(&out.x, converted, sizeof(converted));
#else
#pragma unroll
    for (int j = 0; j < N; ++j) out.x[j] = converted[j];
#endif
    return out;
  }
  template <typename T>
  __device__ __forceinline__ Vec<T, N> to() const {
    float values[N];
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = x[j];
    return from_float<T, N>(values);
  }
  // From and to memory aligned to 16 bytes, or to what N numbers take if that is less.
  static __device__ __forceinline__ Floats load(const float* p) {
    Floats out;
#if CA_CPU && CA_FUSED
    if (N < 4) out.x = Numbers{};
    __builtin_memcpy(&out.x, p, 4 * N);
#else
    constexpr int WIDTH = N < 4 ? N : 4;
#pragma unroll
    for (int j = 0; j < N; j += WIDTH) {
      const Vec<float, WIDTH> piece = load_vec<float, WIDTH>(p + j);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) out.x[j + i] = piece.v[i];
    }
#endif
    return out;
  }
  __device__ __forceinline__ void store(float* p) const {
#if CA_CPU && CA_FUSED
    __builtin_memcpy(p, &x, 4 * N);
#else
    constexpr int WIDTH = N < 4 ? N : 4;
#pragma unroll
    for (int j = 0; j < N; j += WIDTH) {
      Vec<float, WIDTH> piece;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) piece.v[i] = x[j + i];
      store_vec(p + j, piece);
    }
#endif
  }

  __device__ __forceinline__ void add_product(const Floats& a, const Floats& b) {
#if CA_CPU && defined(__FMA__) && !defined(__clang__)
    // a builtin: g++ rearranges a + b * c + d * e, and turns one of the two fused operations into two
    if constexpr (N <= 4) x = __builtin_ia32_vfmaddps(a.x, b.x, x);
    else if constexpr (N == 8) x = __builtin_ia32_vfmaddps256(a.x, b.x, x);
#ifdef __AVX512F__
    else if constexpr (N == 16) x = __builtin_ia32_vfmaddps512_mask(a.x, b.x, x, 0xffff, 4);
#endif
    else x += a.x * b.x;
#elif CA_CPU
#if __has_builtin(__builtin_elementwise_fma) && (defined(__FMA__) || defined(__aarch64__))
    x = __builtin_elementwise_fma(a.x, b.x, x);  // for the same reason
#else
    x += a.x * b.x;
#endif
#else
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = fmaf(a.x[j], b.x[j], x[j]);
#endif
  }
  __device__ __forceinline__ void add_product(float a, const Floats& b) { add_product(all(a), b); }
  __device__ __forceinline__ void operator+=(const Floats& other) {
#if CA_CPU
    x += other.x;
#else
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] += other.x[j];
#endif
  }
  __device__ __forceinline__ Floats operator-(const Floats& other) const {
    Floats out;
#if CA_CPU
    out.x = x - other.x;
#else
#pragma unroll
    for (int j = 0; j < N; ++j) out.x[j] = x[j] - other.x[j];
#endif
    return out;
  }
  __device__ __forceinline__ void operator*=(const Floats& factors) {
#if CA_CPU
    x *= factors.x;
#else
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] *= factors.x[j];
#endif
  }
  __device__ __forceinline__ void operator*=(float factor) {
#if CA_CPU
    x *= factor;
#else
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] *= factor;
#endif
  }
  __device__ __forceinline__ float sum() const {
    static_assert(N == 8, "the order of addition is that of eight numbers");
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  }
};

using EightFloats = Floats<8>;

// N floats rounded to T into global memory, in stores of at most 16 bytes.
template <int N, typename T>
__device__ __forceinline__ void store_floats(T* p, const Floats<N>& x) {
  constexpr int PIECE = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int j = 0; j < N; j += PIECE) {
    float some[PIECE];
#pragma unroll
    for (int i = 0; i < PIECE; ++i) some[i] = x.x[j + i];
    store_global(p + j, from_float<T, PIECE>(some));
  }
}

// The larger one of each pair.
template <int N>
__device__ __forceinline__ Floats<N> maximum(const Floats<N>& a, const Floats<N>& b) {
  Floats<N> out;
#if CA_CPU
  out.x = a.x > b.x ? a.x : b.x;
#else
#pragma unroll
  for (int j = 0; j < N; ++j) out.x[j] = fmaxf(a.x[j], b.x[j]);
#endif
  return out;
}

// exp2f of every number below 128.
template <int N>
__device__ __forceinline__ Floats<N> exp2(const Floats<N>& a) {
  Floats<N> out;
#if CA_CPU
  typedef typename Floats<N>::Numbers Numbers;
  typedef typename ca::VectorOf<N>::Ints Ints;
  const Numbers clamped = a.x < -126.0f ? -126.0f - Numbers{} : a.x;
  const Ints whole = __builtin_convertvector(clamped + (clamped < 0.0f ? -0.5f - Numbers{} : 0.5f - Numbers{}), Ints);
  const Numbers power = ca::exp2_polynomial(clamped - __builtin_convertvector(whole, Numbers));
  out.x = ca::bit_cast<Numbers>(ca::bit_cast<Ints>(power) + (whole << 23));
  out.x = a.x < -126.0f ? Numbers{} : a.x == a.x ? out.x : a.x;  // as with the GPU's -ftz=true; not a number stays so
#else
#pragma unroll
  for (int j = 0; j < N; ++j) out.x[j] = exp2f(a.x[j]);
#endif
  return out;
}

#endif  // CUPYATTN_EIGHT_FLOATS_CUH
