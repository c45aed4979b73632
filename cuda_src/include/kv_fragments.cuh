// SPDX-License-Identifier: Apache-2.0
// kv_fragments.cuh - keys and values of any cache format as B operands of mma.m16n8k16, converted in registers.
//
// A tile holds rows of codes as they are in the cache (KvTile: 16-byte pieces, swizzled, zeros past a row's end). A
// word of a row holds E neighbouring dims (16 bit: 2, 8 bit: 4, 4 bit: 8). Lane t of each quad takes word t of every
// piece, E dims from 4E * piece + E * t on, the lane's run:
//   keys     ldmatrix; pair i = piece * E/2 + j (dims 2j, 2j + 1 of the run) stands in k-step i / 2, slots 2t and
//            2t + 1, 8 higher for odd i. Queries are staged in this order: query_slot()
//   values   transposed ldmatrix: a register holds a word's bits of two tokens; byte j, or nibbles j of both 16-bit
//            halves, are one dim of both. Lane t owns the sums of its run: element m is acc[index][part] of value_at()
// Codes become small numbers that the operand type holds exactly, code - CENTRE times a power of two, so nothing is
// rounded but queries and probabilities:
//   plain rows in T; all others in half (bf16 queries are scaled by a power of two per row, so that half loses nothing)
//   scale and zero of a token: on float32 scores,   s * (q . n) + (zero + CENTRE * s) * sum(q)
//                              on probabilities,    sum_t (p_t * s_t) n_t + sum_t p_t * (zero_t + CENTRE * s_t)
//   scales per 32 dims: on float32 partial scores, and on values as one more half product (rounded)
//   scales per dim: on queries, and on the sums when they are stored
//
// KvFragments<F>: Operand, E, CENTRE, expand<VALUES>(word, out), the E/2 pairs of a word of codes.
#ifndef CUPYATTN_KV_FRAGMENTS_CUH
#define CUPYATTN_KV_FRAGMENTS_CUH

#include "bits.cuh"
#include "cp_async.cuh"
#include "kv_format.cuh"
#include "mma.cuh"

// ---- codes to operands -----------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t half2_bits(__half2 x) { return reinterpret_cast<const uint32_t&>(x); }

// biased * FACTOR - OFFSET in both halves, exact for what calls it.
__device__ __forceinline__ uint32_t scaled_pair(uint32_t biased, float factor, float offset) {
  return half2_bits(__hfma2(reinterpret_cast<const __half2&>(biased), __float2half2_rn(factor),
                            __float2half2_rn(-offset)));
}
__device__ __forceinline__ uint32_t add_pair(uint32_t x, float addend) {
  return half2_bits(__hadd2(reinterpret_cast<const __half2&>(x), __float2half2_rn(addend)));
}
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  return half2_bits(__hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b)));
}

constexpr uint32_t TWO_TO_10 = 0x64006400u;  // 1024 in both halves; the last bit of the mantissa counts ones

// Bytes of a word in pairs: keys (0, 1), (2, 3); values (0, 2), (1, 3), two tokens of one dim. Each byte as the low
// or, with UPPER, the high byte of a half; the other byte is `other`.
template <bool VALUES, bool UPPER>
__device__ __forceinline__ void byte_pairs(uint32_t word, uint32_t other, uint32_t (&out)[2]) {
  if constexpr (UPPER) {
    out[0] = __byte_perm(word, other, VALUES ? 0x2404 : 0x1404);
    out[1] = __byte_perm(word, other, VALUES ? 0x3414 : 0x3424);
  } else {
    out[0] = __byte_perm(word, other, VALUES ? 0x4240 : 0x4140);
    out[1] = __byte_perm(word, other, VALUES ? 0x4341 : 0x4342);
  }
}

template <typename F>
struct KvFragments;

template <typename T>
struct KvFragments<KvPlain<T>> {
  using Operand = T;
  static constexpr int E = 2;
  static constexpr float CENTRE = 0.0f;
  template <bool VALUES>
  static __device__ __forceinline__ void expand(uint32_t word, uint32_t (&out)[1]) { out[0] = word; }
};

// byte - 128, of signed bytes the byte itself
template <bool SIGNED>
struct ByteFragments {
  using Operand = __half;
  static constexpr int E = 4;
  static constexpr float CENTRE = SIGNED ? 0.0f : 128.0f;
  template <bool VALUES>
  static __device__ __forceinline__ void expand(uint32_t word, uint32_t (&out)[2]) {
    byte_pairs<VALUES, false>(SIGNED ? word ^ 0x80808080u : word, 0x64u, out);
    out[0] = add_pair(out[0], -1152.0f);
    out[1] = add_pair(out[1], -1152.0f);
  }
};
template <typename S>
struct KvFragments<KvInt8<S>> : ByteFragments<false> {};
template <>
struct KvFragments<KvInt8Sym> : ByteFragments<true> {};
template <>
struct KvFragments<KvInt8Channel> : ByteFragments<true> {};

// (byte - 127.5) / 128
template <>
struct KvFragments<KvHadamard8> {
  using Operand = __half;
  static constexpr int E = 4;
  static constexpr float CENTRE = 0.0f;
  template <bool VALUES>
  static __device__ __forceinline__ void expand(uint32_t word, uint32_t (&out)[2]) {
    byte_pairs<VALUES, false>(word, 0x64u, out);
#pragma unroll
    for (int i = 0; i < 2; ++i) out[i] = add_pair(scaled_pair(out[i], 1.0f / 128, 9.0f), 1.0f / 256);
  }
};

// Nibbles i and i + 4 of a word make the pair of elements 2i, 2i + 1. nibble - 8
template <typename S>
struct KvFragments<KvInt4<S>> {
  using Operand = __half;
  static constexpr int E = 8;
  static constexpr float CENTRE = 8.0f;
  template <bool VALUES>
  static __device__ __forceinline__ void expand(uint32_t word, uint32_t (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t moved = i == 0 ? word : word >> 8;
      out[i] = add_pair(and_or(moved, 0x000f000fu, TWO_TO_10), -1032.0f);
      out[i + 1] = scaled_pair(and_or(moved, 0x00f000f0u, TWO_TO_10), 1.0f / 16, 72.0f);
    }
  }
};

// (nibble - 7.5) / 8. At least one free bit below a nibble makes the half a whole number of the last bit.
template <>
struct KvFragments<KvHadamard4> {
  using Operand = __half;
  static constexpr int E = 8;
  static constexpr float CENTRE = 0.0f;
  template <bool VALUES>
  static __device__ __forceinline__ void expand(uint32_t word, uint32_t (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t moved = i == 0 ? word << 1 : word >> 7;
      out[i] = scaled_pair(and_or(moved, 0x001e001eu, TWO_TO_10), 1.0f / 16, (512.0f + 7.5f) / 8);
      out[i + 1] = scaled_pair(and_or(moved, 0x01e001e0u, TWO_TO_10), 1.0f / 256, (32.0f + 7.5f) / 8);
    }
  }
};

// (code - 31.5) / 32: nibbles and, in bits 0 to 7 of each half of `high`, four pairs of high bits.
template <>
struct KvFragments<KvHadamard6> {
  using Operand = __half;
  static constexpr int E = 8;
  static constexpr float CENTRE = 0.0f;
  static __device__ __forceinline__ void expand(uint32_t word, uint32_t high, uint32_t (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t even = i == 0 ? word << 2 : word >> 6;   // a code in bits 2 to 7
      const uint32_t odd = i == 0 ? word : word >> 8;         // a code in bits 4 to 9
      const uint32_t above = high << (i == 0 ? 6 : 2);        // the high bits of both
      out[i] = scaled_pair(and_or(above, 0x00c000c0u, and_or(even, 0x003c003cu, TWO_TO_10)), 1.0f / 128,
                           (256.0f + 31.5f) / 32);
      out[i + 1] = scaled_pair(and_or(above, 0x03000300u, and_or(odd, 0x00f000f0u, TWO_TO_10)), 1.0f / 512,
                               (64.0f + 31.5f) / 32);
    }
  }
};

// ---- fp8 -------------------------------------------------------------------------------------------------------

template <>
struct KvFragments<KvE5M2> {
  using Operand = __half;
  static constexpr int E = 4;
  static constexpr float CENTRE = 0.0f;
  template <bool VALUES>
  static __device__ __forceinline__ void expand(uint32_t word, uint32_t (&out)[2]) {
    byte_pairs<VALUES, true>(word, 0, out);  // a half cut to 8 bits
  }
};

template <>
struct KvFragments<KvE4M3> {
  using Operand = __half;
  static constexpr int E = 4;
  static constexpr float CENTRE = 0.0f;
  template <bool VALUES>
  static __device__ __forceinline__ void expand(uint32_t word, uint32_t (&out)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    if constexpr (VALUES) word = __byte_perm(word, 0, 0x3120);
    asm("{.reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;}"
        : "=r"(out[0]), "=r"(out[1]) : "r"(word));
#else
    // one exponent bit less than half has, so the exponent is short by 8; the only NaN becomes 480
    byte_pairs<VALUES, true>(word, 0, out);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t halves = and_or(out[i] >> 1, 0x3f803f80u, out[i] & 0x80008000u);
      out[i] = multiply_pair(halves, 0x5c005c00u);  // 256
    }
#endif
  }
};

// ---- tiles -----------------------------------------------------------------------------------------------------

// Rows of format F in shared memory, head_dim padded to HEAD_DIM (64, 128 or 256).
template <typename F, int HEAD_DIM>
struct KvTile {
  using Fragments = KvFragments<F>;
  using Operand = typename Fragments::Operand;
  static constexpr int E = Fragments::E;
  static constexpr int LOW_PIECES = HEAD_DIM / (4 * E);
  static constexpr int HIGH_PIECES = HEAD_DIM * F::HIGH_BITS / 128;
  static constexpr int PIECES = LOW_PIECES + HIGH_PIECES;
  static constexpr int ROW_BYTES = 16 * PIECES;
  static constexpr bool WHOLE_LINE = ROW_BYTES >= 128;  // of L2: in shorter rows half of a line is another head's
  static constexpr int CHUNKS = LOW_PIECES / 2;      // of 8E dims
  static constexpr int K_STEPS = E / 2;              // of a chunk
  static constexpr int COLUMNS = E;                  // n-tiles of a chunk
  static constexpr int GROUPS = HEAD_DIM / 32;
  static constexpr bool TOKEN_SCALE = F::HAS_SCALE && !F::CHANNEL && F::GROUP == 0;
  static constexpr bool GROUP_SCALE = F::GROUP == 32;
  static constexpr int CHUNK_GROUPS = E == 8 ? 2 : 1;  // groups of a chunk, where there are groups
  static constexpr int SCALE_BYTES = TOKEN_SCALE ? 8 : GROUP_SCALE ? 4 * GROUPS : 0;  // of a token in shared memory

  // The 8 rows an ldmatrix matrix takes start at banks apart as far as the row's length allows; xor does the rest.
  static constexpr int SPAN = PIECES % 8 == 0 ? 8 : PIECES % 4 == 0 ? 4 : PIECES % 2 == 0 ? 2 : 1;
  static __device__ __forceinline__ int flip(int row) { return (row & 7) / (8 / SPAN); }
  static __device__ __forceinline__ int offset(int row, int piece) {
    return row * ROW_BYTES + (piece ^ flip(row)) * 16;
  }

  // Which bytes of a row in the cache are its piece `piece`: from `at` on, `bytes` of them, 0 past its end.
  struct Source {
    int at, bytes;
  };
  static __device__ __forceinline__ Source source(int piece, int head_dim) {
    const int low_bytes = head_dim * 4 / E;  // HIGH_BITS come after them
    if (F::HIGH_BITS > 0 && piece >= LOW_PIECES) {
      const int at = (piece - LOW_PIECES) * 16;
      return {low_bytes + at, max(0, min(16, head_dim * F::HIGH_BITS / 8 - at))};
    }
    return {piece * 16, max(0, min(16, low_bytes - piece * 16))};
  }

  // Starts the copies of TOKENS rows by threads `thread` of THREADS; null rows become zeros.
  template <int TOKENS, int THREADS>
  static __device__ __forceinline__ void copy(char* tile, const char* const* rows, int head_dim, int thread) {
    if (ends_with_a_piece(head_dim))
      copy_pieces<true, TOKENS, THREADS>(tile, rows, head_dim, thread);
    else
      copy_pieces<false, TOKENS, THREADS>(tile, rows, head_dim, thread);
  }
  // WHOLE: rows end with a piece.
  template <bool WHOLE, int TOKENS, int THREADS>
  static __device__ __forceinline__ void copy_pieces(char* tile, const char* const* rows, int head_dim, int thread) {
    if constexpr ((PIECES & (PIECES - 1)) == 0) {  // a thread copies the same piece of rows that are ROWS apart
      constexpr int ROWS = THREADS / PIECES;
      const int piece = thread % PIECES, first = thread / PIECES;
      const Source part = source(piece, head_dim);
      char* const to = tile + first * ROW_BYTES;
      const int swizzled = (piece ^ flip(first)) * 16;
#pragma unroll
      for (int row = 0; row < TOKENS; row += ROWS) {
        if (TOKENS % ROWS != 0 && row + first >= TOKENS) break;
        copy_piece<WHOLE>(to + row * ROW_BYTES + (swizzled ^ flip(row) * 16), rows[row + first], part);
      }
    } else {
#pragma unroll
      for (int start = 0; start < TOKENS * PIECES; start += THREADS) {
        const int index = start + thread, row = index / PIECES, piece = index - row * PIECES;
        if (TOKENS * PIECES % THREADS != 0 && index >= TOKENS * PIECES) break;
        copy_piece<WHOLE>(tile + offset(row, piece), rows[row], source(piece, head_dim));
      }
    }
  }
  template <bool WHOLE>
  static __device__ __forceinline__ void copy_piece(char* to, const char* row, Source part) {
    const void* from = reinterpret_cast<const void*>(reinterpret_cast<int64_t>(row) + part.at);
    if constexpr (WHOLE) cp_async16<WHOLE_LINE>(to, from, row != nullptr && part.bytes > 0);
    else cp_async16_part<WHOLE_LINE>(to, from, row == nullptr ? 0 : part.bytes);
  }

  // The way of a warp that looks after one token a lane: rows[row_place<TOKENS>(token)] is the row of a token, so that
  // the rows a lane copies from are neighbours there.
  static constexpr bool REGULAR = (PIECES & (PIECES - 1)) == 0;  // a lane copies the same piece of every row
  static constexpr int ROWS_AT_ONCE = REGULAR ? 32 / PIECES : 1;
  template <int TOKENS>
  static __device__ __forceinline__ int row_place(int token) {
    return REGULAR ? token % ROWS_AT_ONCE * (TOKENS / ROWS_AT_ONCE) + token / ROWS_AT_ONCE : token;
  }
  // Rows that are all there and end with a piece. A copy after a load from shared memory costs three more instructions,
  // so the loads come first.
  template <int TOKENS>
  static __device__ __forceinline__ void copy_whole(char* tile, const char* const* rows, int head_dim) {
    constexpr int COPIES = TOKENS * PIECES / 32, BATCH = COPIES < 8 ? COPIES : 8;
    const int lane = threadIdx.x % 32;
    if constexpr (REGULAR) {
      const int piece = lane % PIECES, first = lane / PIECES, swizzled = (piece ^ flip(first)) * 16;
      const bool inside = source(piece, head_dim).bytes > 0;
      const int64_t* own = reinterpret_cast<const int64_t*>(rows) + first * COPIES;
      char* const to = tile + first * ROW_BYTES;
#pragma unroll
      for (int start = 0; start < COPIES; start += BATCH) {
        alignas(16) int64_t from[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i += 2) store_vec(from + i, load_vec<int64_t, 2>(own + start + i));
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          const int row = (start + i) * ROWS_AT_ONCE;
          cp_async16<WHOLE_LINE>(to + row * ROW_BYTES + (swizzled ^ flip(row) * 16),
                                 reinterpret_cast<const void*>(from[i] + piece * 16), inside);
        }
      }
    } else {
      int64_t from[COPIES];
#pragma unroll
      for (int i = 0; i < COPIES; ++i) from[i] = reinterpret_cast<int64_t>(rows[(i * 32 + lane) / PIECES]);
#pragma unroll
      for (int i = 0; i < COPIES; ++i) {
        const int row = (i * 32 + lane) / PIECES, piece = i * 32 + lane - row * PIECES;
        const Source part = source(piece, head_dim);
        cp_async16<WHOLE_LINE>(tile + offset(row, piece), reinterpret_cast<const void*>(from[i] + part.at),
                               part.bytes > 0);
      }
    }
  }
  // Rows of any kind: null ones and what is past head_dim become zeros.
  template <int TOKENS>
  static __device__ __forceinline__ void copy_any(char* tile, const char* const* rows, int head_dim) {
#pragma unroll 1
    for (int index = threadIdx.x % 32; index < TOKENS * PIECES; index += 32) {
      const int row = index / PIECES, piece = index - row * PIECES;
      copy_piece<false>(tile + offset(row, piece), rows[row_place<TOKENS>(row)], source(piece, head_dim));
    }
  }
  static __device__ __forceinline__ bool ends_with_a_piece(int head_dim) {
    return head_dim * F::BITS % 128 == 0 && head_dim * F::HIGH_BITS % 128 == 0;
  }
};

// Where dim `dim` of a query stands among the k slots of format F.
template <typename F>
__device__ __forceinline__ int query_slot(int dim) {
  constexpr int E = KvFragments<F>::E;
  const int pair = dim / (4 * E) * (E / 2) + dim % E / 2;
  return pair / 2 * 16 + pair % 2 * 8 + dim % (4 * E) / E * 2 + dim % 2;
}

// Sum of element m of the lane's run in `piece`: acc[index][part], part + 2 for the rows 8 further down.
struct ValueAt {
  int index, part;
};
template <typename F>
__host__ __device__ constexpr ValueAt value_at(int piece, int m) {
  constexpr int E = KvFragments<F>::E;
  return E == 4 ? ValueAt{2 * piece + m % 2, m / 2} : ValueAt{E / 2 * piece + m / 2, m % 2};
}

// Reads 16 tokens of a tile, from token `first` (a multiple of 16) on, chunk by chunk.
template <typename F, int HEAD_DIM, bool VALUES>
struct KvReader {
  using Tile = KvTile<F, HEAD_DIM>;
  static constexpr int X = Tile::E / 2;  // pairs of a word
  const char* start;
  const char* row;
  int flip;  // of the lane's row and, for its second piece of a chunk, of the last bit; in bytes

  __device__ __forceinline__ KvReader(const char* tile, int first) : start(tile + first * Tile::ROW_BYTES) {
    const int lane = threadIdx.x % 32;
    const int token = VALUES ? lane % 16 : lane % 8 + lane / 16 * 8;
    row = start + token * Tile::ROW_BYTES;
    flip = (Tile::flip(token) ^ (VALUES ? lane / 16 : lane / 8 % 2)) * 16;
  }
  // Keys: b[k-step][8 tokens][2], values: b[n-tile][2] of chunk `chunk`, known at compile time.
  template <typename B>
  __device__ __forceinline__ void operator()(int chunk, B& b) const {
    constexpr int MASK = Tile::SPAN * 16 - 1;
    const char* address = row + (chunk * 32 & ~MASK) + ((chunk * 32 & MASK) ^ flip);
    uint32_t words[4], high[4];  // keys: [8 tokens][piece]; values: [piece][8 tokens]
    if constexpr (VALUES) ldmatrix_x4_trans(words, address);
    else ldmatrix_x4(words, address);
    if constexpr (Tile::HIGH_PIECES > 0) load_high(chunk, high);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t pairs[X];
      if constexpr (Tile::HIGH_PIECES > 0) Tile::Fragments::expand(words[w], high[w], pairs);
      else Tile::Fragments::template expand<VALUES>(words[w], pairs);
#pragma unroll
      for (int j = 0; j < X; ++j) {
        const int pair = (VALUES ? w / 2 : w % 2) * X + j;
        if constexpr (VALUES) b[pair][w % 2] = pairs[j];
        else b[pair / 2][w / 2][pair % 2] = pairs[j];
      }
    }
  }
  // The high bits of words[] of a chunk (64 dims) lie in one piece, those of two neighbouring words in one of its own.
  __device__ __forceinline__ void load_high(int chunk, uint32_t (&high)[4]) const {
    const int lane = threadIdx.x % 32;
    const char* address = start + Tile::offset(lane % 16, Tile::LOW_PIECES + chunk);
    uint32_t both[2];  // [8 tokens]
    if constexpr (VALUES) ldmatrix_x2_trans(both, address);
    else ldmatrix_x2(both, address);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      // keys: word t / 2 of the quad, or 2 more; values: 16-bit unit 2 * (g / 4) + g % 2, or 4 more
      const int from = VALUES ? (w / 2 * 4 + lane / 16 * 2 + lane / 4 % 2) * 4 + lane % 4
                              : (lane & ~3) + lane % 4 / 2 + w % 2 * 2;
      const uint32_t word = __shfl_sync(FULL_MASK, both[VALUES ? w % 2 : w / 2], from);
      high[w] = word >> (VALUES ? lane / 8 % 2 : lane % 2) * 8;
    }
  }
};

// ---- scales ----------------------------------------------------------------------------------------------------

// The views of one head: what is left to multiply for a token is its page and slot.
template <typename F>
__device__ __forceinline__ KvView head_view(KvView view, int64_t head) {
  using Code = typename F::Code;
  const int64_t inside = head * view.stride_head;
  if (view.data != nullptr) view.data = static_cast<Code*>(view.data) + inside;
  view.offset += inside * static_cast<int64_t>(sizeof(Code));
  return view;
}
template <typename F>
__device__ __forceinline__ KvScale head_view(KvScale view, int64_t head) {
  using S = typename F::Scale;
  const int64_t inside = head * view.stride_head, bytes = inside * static_cast<int64_t>(sizeof(S));
  if (view.scale != nullptr) view.scale = static_cast<S*>(view.scale) + inside;
  if (view.zero != nullptr) view.zero = static_cast<S*>(view.zero) + inside;
  view.scale_offset += bytes;
  view.zero_offset += bytes;
  return view;
}

// Where what a head has for the tokens lies: at base + entry * per_entry + slot * per_slot, in bytes, entry being a page
// id or the address of a block.
struct HeadRows {
  int64_t base, per_entry, per_slot;

  // `array` of E holds all pages, or is null and what the head has is `offset` bytes behind a block's address.
  template <typename E>
  static __device__ __forceinline__ HeadRows of(const void* array, int64_t offset, int64_t stride_page,
                                                int64_t stride_token, const PageTable& table) {
    constexpr int64_t SIZE = sizeof(E);
    if (table.block_ptrs != nullptr && array == nullptr) return {offset, 1, stride_token * SIZE};
    return {reinterpret_cast<int64_t>(array), stride_page * SIZE, stride_token * SIZE};
  }
  __device__ __forceinline__ int64_t inside(int64_t entry, int32_t slot) const {
    return entry * per_entry + slot * per_slot;
  }
};

template <int BYTES>
struct SameSize {
  using Unsigned = uint32_t;
};
template <>
struct SameSize<2> {
  using Unsigned = uint16_t;
};

// Scales of a token: loaded into words as they are in the cache, so that nothing waits for them yet, later stored as a
// tile's scales in shared memory, KvTile::SCALE_BYTES a token:
//   per token            float [TOKENS][2], scale and zero + CENTRE * scale
//   per group of keys    float [TOKENS][GROUPS]
//   per group of values  half [TOKENS / 2][GROUPS][2]
// The view is of one head.
template <typename F, int HEAD_DIM>
struct KvScales {
  using Tile = KvTile<F, HEAD_DIM>;
  using S = typename F::Scale;
  using Bits = typename SameSize<sizeof(S)>::Unsigned;
  static constexpr int SCALES = Tile::GROUP_SCALE ? Tile::GROUPS : Tile::TOKEN_SCALE ? 1 : 0;
  // a word for a scale per token and one for the zero, or one for two groups
  static constexpr int WORDS = Tile::GROUP_SCALE ? SCALES / 2 : SCALES + (F::HAS_ZERO ? 1 : 0);
  static constexpr int WIDTH = SCALES < 4 ? (SCALES < 1 ? 1 : SCALES) : 4;

  // Zeros for a token in no page and for groups past head_dim.
  static __device__ __forceinline__ void load(const KvScale& view, const PageTable& table, TokenSlot slot, int head_dim,
                                              uint32_t* words) {
    const bool known = slot.page >= 0;
    const Bits *scale = nullptr, *zero = nullptr;
    if (SCALES > 0 && known) scale = kv_scale<const Bits>(view, table, slot, 0, 0);
    if (F::HAS_ZERO && known) zero = kv_zero<const Bits>(view, table, slot, 0, 0);
    load(known, scale, zero, view.stride_group, head_dim, words);
  }
  static __device__ __forceinline__ void load(bool known, const Bits* scale, const Bits* zero, int64_t stride_group,
                                              int head_dim, uint32_t* words) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = 0;
    if (!known) return;
    scale = in_global(scale);
    if constexpr (Tile::GROUP_SCALE) {
      if (stride_group == 1 && head_dim == HEAD_DIM && reinterpret_cast<uint64_t>(scale) % (4 * WORDS) == 0) {
        const Vec<uint32_t, WORDS> all = load_vec<uint32_t, WORDS>(reinterpret_cast<const uint32_t*>(scale));
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = all.v[i];
      } else {
#pragma unroll
        for (int g = 0; g < SCALES; ++g)
          if (g * 32 < head_dim) words[g / 2] |= static_cast<uint32_t>(scale[g * stride_group]) << g % 2 * 16;
      }
    } else if constexpr (Tile::TOKEN_SCALE) {
      words[0] = *scale;
      if (F::HAS_ZERO) words[SCALES] = *in_global(zero);
    }
  }
  template <bool VALUES>
  static __device__ __forceinline__ void store(const uint32_t* words, char* scales, int token) {
    if constexpr (Tile::TOKEN_SCALE) {
      const float s = number(words[0]);
      float centre = Tile::Fragments::CENTRE * s;
      if constexpr (F::HAS_ZERO) centre += number(words[SCALES]);
      store_vec(reinterpret_cast<float*>(scales) + token * 2, Vec<float, 2>{{s, centre}});
    } else {
      Bits* pairs = reinterpret_cast<Bits*>(scales);
#pragma unroll
      for (int g = 0; g < SCALES; g += WIDTH) {
        Vec<float, WIDTH> some;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const uint32_t own = words[(g + i) / 2] >> (g + i) % 2 * 16;
          some.v[i] = number(own);
          if constexpr (VALUES) pairs[(token / 2 * SCALES + g + i) * 2 + token % 2] = static_cast<Bits>(own);
        }
        if constexpr (!VALUES) store_vec(reinterpret_cast<float*>(scales) + token * SCALES + g, some);
      }
    }
  }
  static __device__ __forceinline__ float number(uint32_t word) {
    const Bits bits = static_cast<Bits>(word);
    return to_float(reinterpret_cast<const S&>(bits));
  }
};

#endif  // CUPYATTN_KV_FRAGMENTS_CUH
