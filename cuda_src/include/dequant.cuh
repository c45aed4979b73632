// SPDX-License-Identifier: Apache-2.0
// dequant.cuh - reading weights in the packed layout of cupyattn/quant/layout.py, one 16 x 64 tile per warp step.
//
// Lane L = 4r + c owns rows r and r + 8 of a tile and, of each 16-column step t, columns 2c, 2c+8, 2c+1, 2c+9. Those
// 16 columns in the order (t, these four) are the lane's run; a tile gives a lane two runs of 16 weights. The first
// eight belong to group 0 (32 columns), the others to group 1.
//
// A format is a struct with CHUNKS (16-byte loads of codes per lane and tile), SCALES (float16 numbers per lane and
// tile: 0, 4, or 8 with a minimum) and
//   codes(chunks, half)         the run of row r + 8 * half as floats, for CUDA cores
//   fragment<T>(chunks, t, a)   step t of both rows as the A operand of mma.m16n8k16, for tensor cores; exact
// where weight = code * scale + minimum, rounded once: bit for bit what the format's definition gives.
#ifndef CUPYATTN_DEQUANT_CUH
#define CUPYATTN_DEQUANT_CUH

#include "bits.cuh"
#include "prelude.cuh"
#include "runs.cuh"

constexpr int TILE_ROWS = 16;
constexpr int TILE_COLUMNS = 64;

// Four unsigned bytes less ZERO as floats: 2^23 + byte has the byte in its last bits.
template <int ZERO>
__device__ __forceinline__ void bytes_to_float(uint32_t four, float* out) {
#pragma unroll
  for (int b = 0; b < 4; ++b) out[b] = __uint_as_float(0x4b000000u | (four >> (8 * b) & 0xffu)) - (8388608.0f + ZERO);
}

__device__ __forceinline__ uint32_t word_of(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// ---- formats ---------------------------------------------------------------------------------------------------

// Small unsigned integers less ZERO as pairs of T. Or-ing in a power of two whose last mantissa bit counts ones makes
// floats of them: 2^10 + i for half (i < 1024), 2^7 + i for bfloat16 (i < 128).
template <typename T, int ZERO>
struct SmallIntegers;

template <int ZERO>
struct SmallIntegers<__half, ZERO> {
  static constexpr uint32_t TWO_TO_10 = 0x64006400u;  // twice
  // the integers in the bits of `mask`, which covers whole last bits of both halves
  static __device__ __forceinline__ uint32_t pair(uint32_t two, uint32_t mask) {
    const uint32_t biased = and_or(two, mask, TWO_TO_10);
    const __half2 exact = __hsub2(reinterpret_cast<const __half2&>(biased), __float2half2_rn(1024.0f + ZERO));
    return reinterpret_cast<const uint32_t&>(exact);
  }
  // the lowest nibble of each half, and the one above: 2^10 + 16 i, brought down by a multiply-add instead of a shift
  static __device__ __forceinline__ void nibble_pairs(uint32_t word, uint32_t& low, uint32_t& high) {
    low = pair(word, 0x000f000fu);
    const uint32_t biased = and_or(word, 0x00f000f0u, TWO_TO_10);
    const __half2 exact = __hfma2(reinterpret_cast<const __half2&>(biased), __float2half2_rn(1.0f / 16),
                                  __float2half2_rn(-(64.0f + ZERO)));
    high = reinterpret_cast<const uint32_t&>(exact);
  }
};

template <int ZERO>
struct SmallIntegers<__nv_bfloat16, ZERO> {
  static __device__ __forceinline__ uint32_t pair(uint32_t two, uint32_t mask) {
    const uint32_t biased = and_or(two, mask, 0x43004300u);
    const __nv_bfloat162 zero = __bfloat162bfloat162(__float2bfloat16_rn(128.0f + ZERO));
    const __nv_bfloat162 exact = __hsub2(reinterpret_cast<const __nv_bfloat162&>(biased), zero);
    return reinterpret_cast<const uint32_t&>(exact);
  }
  static __device__ __forceinline__ void nibble_pairs(uint32_t word, uint32_t& low, uint32_t& high) {
    low = pair(word, 0x000f000fu);
    high = pair(word >> 4, 0x000f000fu);  // 2^7 leaves no room for a nibble that is not at the end
  }
};

// The four signed bytes of a word (sign bits flipped) as pairs (byte 0, byte 2) and (byte 1, byte 3).
__device__ __forceinline__ void byte_pairs(__half, uint32_t four, uint32_t& even, uint32_t& odd) {
  even = SmallIntegers<__half, 128>::pair(four, 0x00ff00ffu);
  odd = SmallIntegers<__half, 128>::pair(four >> 8, 0x00ff00ffu);
}
__device__ __forceinline__ void byte_pairs(__nv_bfloat16, uint32_t four, uint32_t& even, uint32_t& odd) {
  float wide[4];  // 8 bits do not fit under bfloat16's 2^7: by float32, whose upper half is the number
  bytes_to_float<128>(four, wide);
  even = __float_as_uint(wide[0]) >> 16 | (__float_as_uint(wide[2]) & 0xffff0000u);
  odd = __float_as_uint(wide[1]) >> 16 | (__float_as_uint(wide[3]) & 0xffff0000u);
}

// Two codes per byte, the low nibble of row r, the high one of row r + 8; ZERO is the nibble that stands for 0.
template <int ZERO>
struct Nibbles {
  static constexpr int CHUNKS = 1;
  static __device__ __forceinline__ Run codes(const uint4 (&chunks)[CHUNKS], int half) {
    Run run;
#if CA_CPU && CA_FUSED
    ca::Bytes16 bytes;
    __builtin_memcpy(&bytes, chunks, sizeof(bytes));
    bytes = half ? bytes >> 4 : bytes & 15;
    run.v = __builtin_convertvector(ca::widen_bytes(bytes) - ZERO, ca::Floats16);
#else
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      bytes_to_float<ZERO>(word_of(chunks[0], t) >> (4 * half) & 0x0f0f0f0fu, run.v + 4 * t);
    }
#endif
    return run;
  }
  template <typename T>
  static __device__ __forceinline__ void fragment(const uint4 (&chunks)[CHUNKS], int t, uint32_t (&a)[4]) {
    const uint32_t word = word_of(chunks[0], t);
    SmallIntegers<T, ZERO>::nibble_pairs(word, a[0], a[1]);
    SmallIntegers<T, ZERO>::nibble_pairs(word >> 8, a[2], a[3]);
  }
};
struct Q4_0 : Nibbles<8> {
  static constexpr int SCALES = 4;
};
struct Q4_1 : Nibbles<0> {
  static constexpr int SCALES = 8;
};

struct Q8_0 {
  static constexpr int CHUNKS = 2;
  static constexpr int SCALES = 4;
  static __device__ __forceinline__ Run codes(const uint4 (&chunks)[CHUNKS], int half) {
    Run run;
#if CA_CPU && CA_FUSED
    ca::SignedBytes16 bytes;
    __builtin_memcpy(&bytes, &chunks[half], sizeof(bytes));
    run.v = __builtin_convertvector(ca::widen_bytes(bytes), ca::Floats16);
#else
#pragma unroll
    for (int t = 0; t < 4; ++t) bytes_to_float<128>(word_of(chunks[half], t) ^ 0x80808080u, run.v + 4 * t);
#endif
    return run;
  }
  template <typename T>
  static __device__ __forceinline__ void fragment(const uint4 (&chunks)[CHUNKS], int t, uint32_t (&a)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      byte_pairs(T{}, word_of(chunks[half], t) ^ 0x80808080u, a[half], a[half + 2]);
    }
  }
};

// Weights kept as they are: no scales, CHUNKS / 2 chunks for each of the two rows.
template <typename W>
struct Dense {
  static constexpr int CHUNKS = 2 * sizeof(W);
  static constexpr int SCALES = 0;
  static __device__ __forceinline__ Run codes(const uint4 (&chunks)[CHUNKS], int half) {
    constexpr int PER_CHUNK = 16 / sizeof(W);
    Run run;
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; ++i) {
      const uint4 chunk = chunks[half * (CHUNKS / 2) + i];
      float part[PER_CHUNK];
      to_float(*reinterpret_cast<const Vec<W, PER_CHUNK>*>(&chunk), part);
#pragma unroll
      for (int j = 0; j < PER_CHUNK; ++j) run.v[i * PER_CHUNK + j] = part[j];
    }
    return run;
  }
  template <typename T>  // T is W
  static __device__ __forceinline__ void fragment(const uint4 (&chunks)[CHUNKS], int t, uint32_t (&a)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4& chunk = chunks[2 * half + t / 2];
      const uint32_t first = word_of(chunk, t % 2 * 2), second = word_of(chunk, t % 2 * 2 + 1);
      a[half] = (first & 0xffffu) | second << 16;
      a[half + 2] = first >> 16 | (second & 0xffff0000u);
    }
  }
};

// ---- a lane's share of a tile ----------------------------------------------------------------------------------

template <typename F>
struct LaneTile {
  static constexpr int CODE_BYTES = 512 * F::CHUNKS;
  static constexpr int TILE_BYTES = CODE_BYTES + 16 * F::SCALES;
  static constexpr int PARAMETERS = F::SCALES > 0 ? F::SCALES : 1;

  uint4 chunks[F::CHUNKS];
  Vec<__half, PARAMETERS> scales;  // (r, group 0), (r, group 1), (r + 8, group 0), (r + 8, group 1), then the minima

  __device__ __forceinline__ void load(const uint8_t* tile, int lane) {
    const uint4* codes = reinterpret_cast<const uint4*>(tile);
#pragma unroll
    for (int i = 0; i < F::CHUNKS; ++i) chunks[i] = codes[32 * i + lane];
    if constexpr (F::SCALES > 0) {
      scales = load_vec<__half, PARAMETERS>(reinterpret_cast<const __half*>(tile + CODE_BYTES) + lane / 4 * PARAMETERS);
    }
  }

  // The lane's weights of row r (weights[0]) and row r + 8 (weights[1]).
  __device__ __forceinline__ void dequantize(Run (&weights)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) weights[half] = F::codes(chunks, half);
    if constexpr (F::SCALES > 0) {
#if CA_CPU && CA_FUSED
      const ca::Floats8 p = ca::widen_scales<PARAMETERS>(scales.v);
#else
      float p[PARAMETERS];
      to_float(scales, p);
#endif
      scale_groups<0>(weights[0], p);
      scale_groups<1>(weights[1], p);
    }
  }

 private:
  // Applies scale and minimum of the two groups of row r + 8 * HALF; exact products, one rounding.
  template <int HALF, typename Scales>
  static __device__ __forceinline__ void scale_groups(Run& run, const Scales& p) {
#if CA_CPU && CA_FUSED
    run.v *= ca::spread_groups<2 * HALF>(p);
    if constexpr (F::SCALES == 8) run.v += ca::spread_groups<4 + 2 * HALF>(p);
    run.v = ca::in_this_order(run.v);
#else
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      run.v[i] *= p[2 * HALF + i / 8];
      if constexpr (F::SCALES == 8) run.v[i] += p[4 + 2 * HALF + i / 8];
    }
#endif
  }
};

// Asks the threads of the block to bring `bytes` bytes from `p` on into the L2 cache.
__device__ __forceinline__ void prefetch_lines(const uint8_t* p, int bytes) {
#if CA_CPU
  const int share = ceil_div(ceil_div(bytes, 64), static_cast<int>(blockDim.x)) * 64;
  const uint8_t* end = p + min(bytes, static_cast<int>(threadIdx.x + 1) * share);
  for (const uint8_t* line = p + threadIdx.x * share; line < end; line += 64) __builtin_prefetch(line, 0, 2);
#else
  for (int line = threadIdx.x * 128; line < bytes; line += blockDim.x * 128) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p + line));
  }
#endif
}

#endif  // CUPYATTN_DEQUANT_CUH
