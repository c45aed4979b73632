// SPDX-License-Identifier: Apache-2.0
// rope.cu - rotary position embedding of heads, by cos and sin tables.
//
//   for every token t, head h and pair j in [0, rotary_dim / 2), with p = positions[t]:
//     out[t,h,i0] = x[t,h,i0] * cos[p,j] - x[t,h,i1] * sin[p,j]
//     out[t,h,i1] = x[t,h,i1] * cos[p,j] + x[t,h,i0] * sin[p,j]
//   INTERLEAVED (GPT-J): i0 = 2j, i1 = 2j + 1.  Otherwise (NeoX): i0 = j, i1 = j + rotary_dim / 2.
//   Dims from rotary_dim on are copied. p outside [0, max_pos) gives a row of NaN.
//   Math in float32, one rounding on store.
//
// launch     any grid and block, every axis strides: pairs in threadIdx.x, heads in threadIdx.y and blockIdx.y, tokens
//            in threadIdx.z and blockIdx.x. No shared memory, no barriers, no warp operations.
// aliasing   out == x allowed (same strides), no other overlap
// traffic    2 * tokens * heads * head_dim * sizeof(T) bytes (in place: of rotary_dim); a thread reads its pairs of the
//            tables once for all of its heads
#include "prelude.cuh"
#include "params.h"

using T = CA_T;                                   // x and out
using Table = CA_TABLE;                           // cos and sin
constexpr int VEC = CA_VEC;                       // elements per access; divides rotary_dim / 2, head_dim and all strides
constexpr int TABLE_STRIDE = CA_TABLE_STRIDE;     // table elements between two pairs: 1, or 2 in full-width tables
constexpr bool INTERLEAVED = CA_INTERLEAVED;
static_assert(TABLE_STRIDE == 1 || TABLE_STRIDE == 2, "rope: a table holds every pair once or twice");
static_assert(sizeof(RopeArgs) == CA_SIZEOF_ARGS, "rope: Python and CUDA disagree on RopeArgs");

// cos or sin of VEC pairs from `row` on, at most 16 bytes per load.
__device__ __forceinline__ void load_angles(const Table* row, float (&out)[VEC]) {
  constexpr int NUM = VEC * TABLE_STRIDE;
  constexpr int WIDEST = 16 / static_cast<int>(sizeof(Table));
  constexpr int CHUNK = VEC == 1 ? 1 : NUM < WIDEST ? NUM : WIDEST;
  static_assert(VEC == 1 || NUM % CHUNK == 0, "rope: VEC must be a power of two");
#pragma unroll
  for (int i = 0; i < VEC * TABLE_STRIDE; i += CHUNK) {
    float part[CHUNK];
    to_float(load_vec<Table, CHUNK>(row + i), part);
#pragma unroll
    for (int n = 0; n < CHUNK; ++n) {
      if ((i + n) % TABLE_STRIDE == 0) out[(i + n) / TABLE_STRIDE] = part[n];
    }
  }
}

// Rotate pairs `pair` to `pair` + VEC - 1 of one head; `half` is rotary_dim / 2.
__device__ __forceinline__ void rotate(const T* x, T* out, int pair, int half, const float (&c)[VEC],
                                       const float (&s)[VEC]) {
  // two accesses of VEC elements: the pairs' first and second elements, or the first and second half of the pairs
  const int at0 = INTERLEAVED ? 2 * pair : pair;
  const int at1 = INTERLEAVED ? at0 + VEC : at0 + half;
  float a[VEC], b[VEC], both[2 * VEC];
  to_float(load_vec<T, VEC>(x + at0), a);
  to_float(load_vec<T, VEC>(x + at1), b);
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    both[v] = a[v];
    both[VEC + v] = b[v];
  }
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    const int i0 = INTERLEAVED ? 2 * v : v;
    const int i1 = INTERLEAVED ? i0 + 1 : i0 + VEC;
    const float x0 = both[i0], x1 = both[i1];
    both[i0] = x0 * c[v] - x1 * s[v];
    both[i1] = x1 * c[v] + x0 * s[v];
  }
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    a[v] = both[v];
    b[v] = both[VEC + v];
  }
  store_vec(out + at0, from_float<T, VEC>(a));
  store_vec(out + at1, from_float<T, VEC>(b));
}

CA_KERNEL __launch_bounds__(256, 4) void rope(const __grid_constant__ RopeArgs args) {
  const int half = args.rotary_dim / 2;
  const int first_head = blockIdx.y * blockDim.y + threadIdx.y;
  const int step_head = gridDim.y * blockDim.y;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z; token < args.tokens;
       token += static_cast<int64_t>(gridDim.x) * blockDim.z) {
    const T* x = static_cast<const T*>(args.x.data) + token * args.x.stride_token;
    T* out = static_cast<T*>(args.out.data) + token * args.out.stride_token;
    const int64_t position = args.positions[token * args.stride_position];
    const bool known = position >= 0 && position < args.max_pos;

    // 1. rotated dims
    for (int pair = threadIdx.x * VEC; pair < half; pair += blockDim.x * VEC) {
      float c[VEC], s[VEC];
      if (known) {
        load_angles(static_cast<const Table*>(args.cos) + position * args.stride_cos + pair * TABLE_STRIDE, c);
        load_angles(static_cast<const Table*>(args.sin) + position * args.stride_sin + pair * TABLE_STRIDE, s);
      } else {
#pragma unroll
        for (int v = 0; v < VEC; ++v) c[v] = s[v] = __int_as_float(0x7fffffff);  // NaN, and so is the row
      }
      for (int head = first_head; head < args.heads; head += step_head) {
        rotate(x + head * args.x.stride_head, out + head * args.out.stride_head, pair, half, c, s);
      }
    }

    // 2. the other dims
    if (known && args.out.data == args.x.data) continue;
    for (int head = first_head; head < args.heads; head += step_head) {
      for (int d = args.rotary_dim + threadIdx.x * VEC; d < args.head_dim; d += blockDim.x * VEC) {
        Vec<T, VEC> row = load_vec<T, VEC>(x + head * args.x.stride_head + d);
        if (!known) {
#pragma unroll
          for (int v = 0; v < VEC; ++v) row.v[v] = from_float<T>(__int_as_float(0x7fffffff));
        }
        store_vec(out + head * args.out.stride_head + d, row);
      }
    }
  }
}
