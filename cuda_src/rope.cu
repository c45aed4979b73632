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
#include "pairs.cuh"

using T = CA_T;                                   // x and out
using Table = CA_TABLE;                           // cos and sin
constexpr int VEC = CA_VEC;                       // elements per access; divides rotary_dim / 2, head_dim and all strides
constexpr int TABLE_STRIDE = CA_TABLE_STRIDE;     // table elements between two pairs: 1, or 2 in full-width tables
constexpr bool INTERLEAVED = CA_INTERLEAVED;
constexpr int PAIRS = INTERLEAVED && VEC > 1 ? VEC / 2 : VEC;  // a thread's pairs at a time
static_assert(TABLE_STRIDE == 1 || TABLE_STRIDE == 2, "rope: a table holds every pair once or twice");
static_assert(sizeof(RopeArgs) == CA_SIZEOF_ARGS, "rope: Python and CUDA disagree on RopeArgs");

// cos or sin of PAIRS pairs from `row` on, at most 16 bytes per load.
__device__ __forceinline__ void load_angles(const Table* row, float (&out)[PAIRS]) {
  constexpr int NUM = PAIRS * TABLE_STRIDE;
  constexpr int WIDEST = 16 / static_cast<int>(sizeof(Table));
  constexpr int CHUNK = VEC == 1 ? 1 : NUM < WIDEST ? NUM : WIDEST;
#pragma unroll
  for (int i = 0; i < NUM; i += CHUNK) {
    float part[CHUNK];
    to_float(load_vec<Table, CHUNK>(row + i), part);
#pragma unroll
    for (int n = 0; n < CHUNK; ++n) {
      if ((i + n) % TABLE_STRIDE == 0) out[(i + n) / TABLE_STRIDE] = part[n];
    }
  }
}

// The pairs' first and second elements, from `pair` on; `half` is rotary_dim / 2.
__device__ __forceinline__ void load_pairs(const T* x, int pair, int half, float (&first)[PAIRS],
                                           float (&second)[PAIRS]) {
  if constexpr (!INTERLEAVED) {
    to_float(load_vec<T, PAIRS>(x + pair), first);
    to_float(load_vec<T, PAIRS>(x + pair + half), second);
  } else if constexpr (VEC == 1) {
    first[0] = to_float(x[2 * pair]);
    second[0] = to_float(x[2 * pair + 1]);
  } else {
    float both[2 * PAIRS];
    to_float(load_vec<T, 2 * PAIRS>(x + 2 * pair), both);
    split_pairs(both, first, second);
  }
}

__device__ __forceinline__ void store_pairs(T* out, int pair, int half, const float (&first)[PAIRS],
                                            const float (&second)[PAIRS]) {
  if constexpr (!INTERLEAVED) {
    store_global(out + pair, from_float<T, PAIRS>(first));
    store_global(out + pair + half, from_float<T, PAIRS>(second));
  } else if constexpr (VEC == 1) {
    out[2 * pair] = from_float<T>(first[0]);
    out[2 * pair + 1] = from_float<T>(second[0]);
  } else {
    float both[2 * PAIRS];
    merge_pairs(first, second, both);
    store_global(out + 2 * pair, from_float<T, 2 * PAIRS>(both));
  }
}

CA_KERNEL __launch_bounds__(256, 4) void rope(const __grid_constant__ RopeArgs args) {
  const int half = args.rotary_dim / 2;
  const int lane = threadIdx.x, step_lane = blockDim.x;
  const int first_head = blockIdx.y * blockDim.y + threadIdx.y, step_head = gridDim.y * blockDim.y;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  const int64_t step_token = static_cast<int64_t>(gridDim.x) * blockDim.z;
  for (int64_t token = first_token; token < args.tokens; token += step_token) {
    const T* x = static_cast<const T*>(args.x.data) + token * args.x.stride_token;
    T* out = static_cast<T*>(args.out.data) + token * args.out.stride_token;
    const int64_t position = args.positions[token * args.stride_position];
    const bool known = position >= 0 && position < args.max_pos;

    // 1. rotated dims
    for (int pair = lane * PAIRS; pair < half; pair += step_lane * PAIRS) {
      float c[PAIRS], s[PAIRS];
      if (known) {
        load_angles(static_cast<const Table*>(args.cos) + position * args.stride_cos + pair * TABLE_STRIDE, c);
        load_angles(static_cast<const Table*>(args.sin) + position * args.stride_sin + pair * TABLE_STRIDE, s);
      } else {
#pragma unroll
        for (int v = 0; v < PAIRS; ++v) c[v] = s[v] = __int_as_float(0x7fffffff);  // NaN, and so is the row
      }
      for (int head = first_head; head < args.heads; head += step_head) {
        float x0[PAIRS], x1[PAIRS], y0[PAIRS], y1[PAIRS];
        load_pairs(x + head * args.x.stride_head, pair, half, x0, x1);
#pragma unroll
        for (int v = 0; v < PAIRS; ++v) {
          y0[v] = x0[v] * c[v] - x1[v] * s[v];
          y1[v] = x1[v] * c[v] + x0[v] * s[v];
        }
        store_pairs(out + head * args.out.stride_head, pair, half, y0, y1);
      }
    }

    // 2. the other dims
    if (known && args.out.data == args.x.data) continue;
    for (int head = first_head; head < args.heads; head += step_head) {
      for (int d = args.rotary_dim + lane * VEC; d < args.head_dim; d += step_lane * VEC) {
        Vec<T, VEC> row = load_vec<T, VEC>(x + head * args.x.stride_head + d);
        if (!known) {
#pragma unroll
          for (int v = 0; v < VEC; ++v) row.v[v] = from_float<T>(__int_as_float(0x7fffffff));
        }
        store_global(out + head * args.out.stride_head + d, row);
      }
    }
  }
}
