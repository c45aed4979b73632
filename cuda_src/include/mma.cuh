// SPDX-License-Identifier: Apache-2.0
// mma.cuh - tensor-core tiles: ldmatrix and movmatrix (sm_75), mma.sync (sm_80), by all lanes of a warp.
//
// Fragments (PTX manual): with g = lane / 4 and t = lane % 4,
//   8x8 matrix of 16-bit elements   r       = M[g][2t, 2t+1], lower column in the lower half
//   A of m16n8k16   a[0..3] = A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..]    two elements each
//   B of m16n8k16   b[0..1] = B[2t..][g], B[2t+8..][g]
//   C, D            d[0..3] = D[g][2t], D[g][2t+1], D[g+8][2t], D[g+8][2t+1]
//   m16n8k32 (int8) the same with four elements a register: 4t.. and 4t+16..
// The host body of each is one meeting of the lanes. Its products are exact; 16 (or 32) of them are summed in
// float32 in ascending k and then added to d.
#ifndef CUPYATTN_MMA_CUH
#define CUPYATTN_MMA_CUH

#include "eight_floats.cuh"
#include "prelude.cuh"

#if CA_CPU

// Works on operands only, never on the kernel's memory.
#define CA_MEET inline __attribute__((no_sanitize("thread")))

namespace ca {

CA_INLINE void count_in_checked_launches([[maybe_unused]] Event event) {
#if CA_CHECK
  ca_count(event, 1);
#endif
}

// ---- matrix movement ------------------------------------------------------------------------------------

struct MatrixRows {
  uint16_t row[8];  // row (lane % 8) of matrix (lane / 8), read by the lane itself
  uint32_t r[4];    // out: the lane's share of each matrix
};

template <int MATRICES>
CA_MEET void meet_ldmatrix(MatrixRows* const* lanes, uint32_t) {
  count_in_checked_launches(COUNT_LDMATRIX);
  for (int l = 0; l < 32; ++l) {
    for (int m = 0; m < MATRICES; ++m)
      __builtin_memcpy(&lanes[l]->r[m], &lanes[8 * m + l / 4]->row[2 * (l % 4)], 4);
  }
}

template <int MATRICES>
CA_MEET void meet_ldmatrix_trans(MatrixRows* const* lanes, uint32_t) {
  count_in_checked_launches(COUNT_LDMATRIX);
  for (int l = 0; l < 32; ++l) {
    for (int m = 0; m < MATRICES; ++m) {
      const int row = 8 * m + 2 * (l % 4);
      lanes[l]->r[m] = lanes[row]->row[l / 4] | static_cast<uint32_t>(lanes[row + 1]->row[l / 4]) << 16;
    }
  }
}

template <int MATRICES, void (*MEET)(MatrixRows* const*, uint32_t)>
inline void ldmatrix(uint32_t (&r)[MATRICES], const void* smem_row) {
  MatrixRows own;
  if (lane() < 8 * MATRICES) {
    const uint4 row = load(static_cast<const uint4*>(smem_row), CA_LDMATRIX);
    __builtin_memcpy(own.row, &row, 16);
  }
  collective<MatrixRows, MEET>(FULL_MASK, own);
  for (int m = 0; m < MATRICES; ++m) r[m] = own.r[m];
}

CA_MEET void meet_movmatrix(uint32_t* const* lanes, uint32_t) {
  uint16_t m[8][8];
  for (int l = 0; l < 32; ++l) __builtin_memcpy(&m[l / 4][2 * (l % 4)], lanes[l], 4);
  for (int l = 0; l < 32; ++l) {
    const int row = 2 * (l % 4);
    *lanes[l] = m[row][l / 4] | static_cast<uint32_t>(m[row + 1][l / 4]) << 16;
  }
}

// ---- mma ------------------------------------------------------------------------------------------------

template <typename D>
struct MmaOperand {
  D (&d)[4];
  const uint32_t (&a)[4];
  const uint32_t (&b)[2];
};

typedef Lanes<8>::f32 Columns;  // one number for each of the tile's 8 columns
typedef Lanes<8>::u32 ColumnWords;

// Registers of the lanes -> rows of A and rows of B, in words of 2 (or 4) elements ascending in k.
template <typename D>
CA_INLINE void gather_fragments(MmaOperand<D>* const* lanes, uint32_t (&a)[16][8], uint32_t (&b)[8][8]) {
  count_in_checked_launches(COUNT_MMA);
#pragma GCC unroll 8
  for (int g = 0; g < 8; ++g) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const MmaOperand<D>& own = *lanes[4 * g + t];
      a[g][t] = own.a[0];
      a[g + 8][t] = own.a[1];
      a[g][t + 4] = own.a[2];
      a[g + 8][t + 4] = own.a[3];
      b[t][g] = own.b[0];
      b[t + 4][g] = own.b[1];
    }
  }
}

// d += a . b of the whole tile. Eight rows at a time: their sums stay in registers.
template <int K, typename D>
CA_INLINE void multiply_tile(const float (&a)[16][K], const Columns (&b)[K], MmaOperand<D>* const* lanes) {
  Columns tile[16];
  for (int first = 0; first < 16; first += 8) {
    EightFloats sum[8];
    for (EightFloats& of_row : sum) of_row = EightFloats::all(0.0f);
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 8
      for (int row = 0; row < 8; ++row) sum[row].add_product(a[first + row][k], EightFloats{b[k]});
    }
#pragma GCC unroll 8
    for (int row = 0; row < 8; ++row) tile[first + row] = sum[row].x;
  }
  for (int l = 0; l < 32; ++l) {
    float own[4];
    __builtin_memcpy(own, reinterpret_cast<const float*>(&tile[l / 4]) + 2 * (l % 4), 8);
    __builtin_memcpy(own + 2, reinterpret_cast<const float*>(&tile[l / 4 + 8]) + 2 * (l % 4), 8);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) lanes[l]->d[i] += static_cast<D>(own[i]);
  }
}

CA_INLINE Columns widen_columns(__half, const ColumnWords& codes) {
  const Lanes<8>::u16 narrow = Lanes<8>::narrow(codes);
  Columns out;
  widen_half<8>(&narrow, reinterpret_cast<float*>(&out));
  return out;
}
CA_INLINE Columns widen_columns(__nv_bfloat16, const ColumnWords& codes) {
  return bit_cast<Columns>(static_cast<ColumnWords>(codes << 16));
}

template <typename T>
CA_MEET void meet_mma_16(MmaOperand<float>* const* lanes, uint32_t) {
  uint32_t a_words[16][8], b_words[8][8];
  gather_fragments(lanes, a_words, b_words);
  float a[16][16];
  for (int row = 0; row < 16; ++row) to_float(reinterpret_cast<const T(&)[16]>(a_words[row]), a[row]);
  Columns b[16];
#pragma GCC unroll 8
  for (int pair = 0; pair < 8; ++pair) {
    const ColumnWords words = bit_cast<ColumnWords>(b_words[pair]);
    b[2 * pair] = widen_columns(T{}, words & 0xffffu);
    b[2 * pair + 1] = widen_columns(T{}, words >> 16);
  }
  multiply_tile(a, b, lanes);
}

// In float32: 32 products of int8 stay below 2^24, so the sum is exact.
CA_MEET void meet_mma_s8(MmaOperand<int>* const* lanes, uint32_t) {
  typedef int32_t Signed __attribute__((vector_size(32)));
  uint32_t a_words[16][8], b_words[8][8];
  gather_fragments(lanes, a_words, b_words);
  const auto& a_bytes = reinterpret_cast<const int8_t(&)[16][32]>(a_words);
  float a[16][32];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 32; ++k) a[row][k] = a_bytes[row][k];
  }
  Columns b[32];
#pragma GCC unroll 32
  for (int k = 0; k < 32; ++k) {
    const Signed words = bit_cast<Signed>(b_words[k / 4]);
    b[k] = __builtin_convertvector(words << (24 - k % 4 * 8) >> 24, Columns);
  }
  multiply_tile(a, b, lanes);
}

}  // namespace ca

#endif  // CA_CPU

// Loads 8x8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 (16 aligned
// bytes) of matrix l / 8; lanes past 8 * matrices give none that is used. `trans`: r holds M transposed.
#if CA_CPU
#define CA_LDMATRIX(name, meet, count, qualifiers, registers, outputs)                         \
  __device__ __forceinline__ void name(uint32_t (&r)[count], const void* smem_row) {           \
    ca::ldmatrix<count, ca::meet<count>>(r, smem_row);                                         \
  }
#else
#define CA_LDMATRIX(name, meet, count, qualifiers, registers, outputs)                         \
  __device__ __forceinline__ void name(uint32_t (&r)[count], const void* smem_row) {           \
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(smem_row));        \
    asm volatile("ldmatrix.sync.aligned.m8n8." qualifiers ".shared.b16 " registers ";"         \
                 : CA_UNPACK outputs : "r"(address) : "memory");                               \
  }
#define CA_UNPACK(...) __VA_ARGS__
#endif
CA_LDMATRIX(ldmatrix_x1, meet_ldmatrix, 1, "x1", "{%0}, [%1]", ("=r"(r[0])))
CA_LDMATRIX(ldmatrix_x2, meet_ldmatrix, 2, "x2", "{%0, %1}, [%2]", ("=r"(r[0]), "=r"(r[1])))
CA_LDMATRIX(ldmatrix_x4, meet_ldmatrix, 4, "x4", "{%0, %1, %2, %3}, [%4]",
            ("=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])))
CA_LDMATRIX(ldmatrix_x1_trans, meet_ldmatrix_trans, 1, "x1.trans", "{%0}, [%1]", ("=r"(r[0])))
CA_LDMATRIX(ldmatrix_x2_trans, meet_ldmatrix_trans, 2, "x2.trans", "{%0, %1}, [%2]", ("=r"(r[0]), "=r"(r[1])))
CA_LDMATRIX(ldmatrix_x4_trans, meet_ldmatrix_trans, 4, "x4.trans", "{%0, %1, %2, %3}, [%4]",
            ("=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])))
#undef CA_LDMATRIX

// The transpose of an 8x8 matrix of 16-bit elements held one register a lane.
__device__ __forceinline__ uint32_t movmatrix(uint32_t r) {
#if CA_CPU
  ca::collective<uint32_t, ca::meet_movmatrix>(FULL_MASK, r);
#else
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(r));
#endif
  return r;
}

// d += a . b, T in {__half, __nv_bfloat16}, float32 accumulation.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// d += a . b over int8, wrapping int32 accumulation.
__device__ __forceinline__ void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if CA_CPU
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ca::MmaOperand<float> own{d, a, b};
  ca::collective<ca::MmaOperand<float>, ca::meet_mma_16<T>>(FULL_MASK, own);
}
__device__ __forceinline__ void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ca::MmaOperand<int> own{d, a, b};
  ca::collective<ca::MmaOperand<int>, ca::meet_mma_s8>(FULL_MASK, own);
}
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define CA_MMA(instruction, constraint)                                                                     \
  asm volatile("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "            \
               "{%0, %1, %2, %3};"                                                                          \
               : constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3])                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  CA_MMA("m16n8k16.row.col.f32.f16.f16.f32", "+f");
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  CA_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
}
__device__ __forceinline__ void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  CA_MMA("m16n8k32.row.col.s32.s8.s8.s32", "+r");
}
#undef CA_MMA
#endif

#endif  // CUPYATTN_MMA_CUH
