// SPDX-License-Identifier: Apache-2.0
// repack.cu - codes, or plain numbers, and their scales in the layout of cupyattn/quant/layout.py.
//
//   codes[tile] = the bits of values[16 * row_tile + r + 8 * half, column(64 * column_tile + 16 * t + 4 * c + i)],
//                 plane after plane, for lane 4r + c, half 0 and 1, step t and i 0..3
//   scales[span] = scale, then zero or minimum, of the span's rows and groups; supers[span] likewise
//   column(k) = k / filled_group * group + k % filled_group; none, like rows and columns past the last, reads as 0
//   Codes below 2^BITS; bits above are dropped. BITS 16 and 32: the numbers, not codes.
//
//   A warp packs a tile of 16 x 64 per step, and the records that begin at it. A quad of lanes reads 64 adjacent
//   values of two rows, four at a time; a lane writes what the kernels' lane will read, in pieces of up to 16 bytes.
//
// launch     grid (row tiles, any), block (a multiple of 32, at most 128)
//            shared memory 0, barriers none, warp ops none
// aliasing   none
// traffic    values, scales and supers read once, packed bytes written once
#include "prelude.cuh"
#include "params.h"
#include "weight_codes.cuh"

constexpr int BITS = CA_BITS;  // of a code or number: 2 to 6, 8, 16, 32
constexpr int VEC = CA_VEC;    // values per load, 1 or 4: 4 divides columns, group and row stride, columns are adjacent
constexpr int TILE_BYTES = TILE_ROWS * TILE_COLUMNS * BITS / 8;
static_assert(sizeof(RepackArgs) == CA_SIZEOF_ARGS, "repack: Python and CUDA disagree on RepackArgs");

template <int B>
struct ValueOf {
  using type = uint8_t;
};
template <>
struct ValueOf<16> {
  using type = uint16_t;
};
template <>
struct ValueOf<32> {
  using type = uint32_t;
};

// ---- codes -----------------------------------------------------------------------------------------------------

// Column of the values that packed column k holds; at least args.columns where it holds none.
__device__ __forceinline__ int source_column(const RepackArgs& args, int k) {
  if (args.group == args.filled_group) return k;
  const int group = k / args.filled_group, within = k - group * args.filled_group;
  return within < args.group ? group * args.group + within : args.columns;
}

// Values at packed columns k..k+3 of a row, k a multiple of 4.
template <typename Value>
__device__ __forceinline__ Vec<Value, 4> four_values(const RepackArgs& args, int row, int k) {
  Vec<Value, 4> four = {};
  if (row >= args.rows) return four;
  const Value* values = static_cast<const Value*>(args.values.data) + row * args.values.stride_row;
  if constexpr (VEC == 4) {
    const int column = source_column(args, k);
    if (column < args.columns) four = load_vec<Value, 4>(values + column);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = source_column(args, k + i);
      if (column < args.columns) four.v[i] = values[column * args.values.stride_column];
    }
  }
  return four;
}

__device__ __forceinline__ uint32_t word_of(const Vec<uint8_t, 4>& x) {
  return reinterpret_cast<const uint32_t&>(x);
}

// Adds the low P bits of the eight codes of step t to a plane: `top` of row r, `bottom` of row r + 8, columns 0..3.
template <int P>
__device__ __forceinline__ void put_in_plane(uint32_t* plane, int t, uint32_t top, uint32_t bottom) {
  constexpr uint32_t CODES = (1u << P) - 1, PAIRS = (1u << 4 * P) - 1;
  const uint32_t both = (top & 0x01010101u * CODES) | (bottom & 0x01010101u * CODES) << P;
  uint32_t pairs = __byte_perm(both, 0, 0x3120);  // low half: columns 0 and 2, high half: 1 and 3
  if constexpr (P < 4) pairs = ((pairs & 0x00ff00ffu) | pairs >> (8 - 2 * P)) & 0x00010001u * PAIRS;
  plane[t * P / 4] |= pairs << 4 * P * t % 16;
}

template <int N>
__device__ __forceinline__ void store_words(uint8_t* chunk, int lane, const uint32_t* words) {
  Vec<uint32_t, N> part;
#pragma unroll
  for (int i = 0; i < N; ++i) part.v[i] = words[i];
  store_vec(reinterpret_cast<uint32_t*>(chunk) + N * lane, part);
}

template <int B>
__device__ __forceinline__ void pack_codes(const RepackArgs& args, uint8_t* tile, int row, int column, int lane) {
  using Value = typename ValueOf<B>::type;
  constexpr int LOW = low_plane(B), HIGH = B - LOW;
  uint32_t words[B] = {};
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    Vec<Value, 4> halves[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) halves[half] = four_values<Value>(args, row + 8 * half, column + 16 * t);
    if constexpr (B < 8) {
      const uint32_t top = word_of(halves[0]), bottom = word_of(halves[1]);
      put_in_plane<LOW>(words, t, top, bottom);
      if constexpr (HIGH > 0) put_in_plane<HIGH>(words + LOW, t, top >> LOW, bottom >> LOW);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Value* v = halves[half].v;
        uint32_t* step = words + B / 2 * half + B / 8 * t;
        if constexpr (B == 8) {
          step[0] = __byte_perm(word_of(halves[half]), 0, 0x3120);
        } else if constexpr (B == 16) {
          step[0] = v[0] | static_cast<uint32_t>(v[1]) << 16, step[1] = v[2] | static_cast<uint32_t>(v[3]) << 16;
        } else {
          step[0] = v[0], step[1] = v[2], step[2] = v[1], step[3] = v[3];
        }
      }
    }
  }
  if constexpr (LOW == 2) {
    store_words<2>(tile, lane, words);
  } else {
#pragma unroll
    for (int i = 0; i < LOW; i += 4) store_words<4>(tile + 128 * i, lane, words + i);
  }
  if constexpr (HIGH > 0) store_words<HIGH>(tile + 128 * LOW, lane, words + LOW);
}

// ---- scales ----------------------------------------------------------------------------------------------------

// Byte `byte` of the number at [row, column]; 0 past the last.
__device__ __forceinline__ uint8_t byte_of(const MatrixView& numbers, int row, int column, int rows, int columns,
                                           int bytes_log2, int byte) {
  if (row >= rows || column >= columns) return 0;
  const int64_t at = row * numbers.stride_row + column * numbers.stride_column;
  return static_cast<const uint8_t*>(numbers.data)[(at << bytes_log2) + byte];
}

// Record of a span of scales: [8 r][scale, second][half][group][bytes of a number], all powers of two.
__device__ __forceinline__ void pack_scales(const RepackArgs& args, int first_row, int tile, int lane) {
  const int spans = ceil_div(args.column_tiles, args.tiles_per_scale), span = tile / args.tiles_per_scale;
  const int second = args.second.data != nullptr, group_at = args.scale_bytes_log2;
  const int half_at = group_at + args.groups_log2, second_at = half_at + 1, r_at = second_at + second;
  const int packed_columns = TILE_COLUMNS * args.tiles_per_scale >> args.groups_log2;  // of a group of the record
  const int groups = ceil_div(args.columns, args.group);
  uint8_t* record = args.scales + ((static_cast<int64_t>(blockIdx.x) * spans + span) << (r_at + 3));
  for (int i = lane; i < 8 << r_at; i += 32) {
    const int row = first_row + (i >> r_at) + 8 * (i >> half_at & 1);
    const int of_row = (span << args.groups_log2) + (i >> group_at & (1 << args.groups_log2) - 1);
    const int group = of_row * packed_columns / args.filled_group;
    record[i] = byte_of(i >> second_at & second ? args.second : args.scale, row, group, args.rows, groups, group_at,
                        i & (1 << group_at) - 1);
  }
}

// Record of a span of supers: [8 r][half][super scale, super minimum][bytes of a number].
__device__ __forceinline__ void pack_supers(const RepackArgs& args, int first_row, int tile, int lane) {
  const int spans = ceil_div(args.column_tiles, args.tiles_per_super), span = tile / args.tiles_per_super;
  const int minimum = args.super_minimum.data != nullptr, minimum_at = args.super_bytes_log2;
  const int half_at = minimum_at + minimum, r_at = half_at + 1;
  uint8_t* record = args.supers + ((static_cast<int64_t>(blockIdx.x) * spans + span) << (r_at + 3));
  for (int i = lane; i < 8 << r_at; i += 32) {
    const int row = first_row + (i >> r_at) + 8 * (i >> half_at & 1);
    record[i] = byte_of(i >> minimum_at & minimum ? args.super_minimum : args.super_scale, row, span, args.rows, spans,
                        minimum_at, i & (1 << minimum_at) - 1);
  }
}

CA_KERNEL __launch_bounds__(128) void repack(const __grid_constant__ RepackArgs args) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, first_row = blockIdx.x * TILE_ROWS;
  for (int t = blockIdx.y * warps + threadIdx.x / 32; t < args.column_tiles; t += gridDim.y * warps) {
    uint8_t* tile = args.codes + (static_cast<int64_t>(blockIdx.x) * args.column_tiles + t) * TILE_BYTES;
    pack_codes<BITS>(args, tile, first_row + lane / 4, t * TILE_COLUMNS + 4 * (lane % 4), lane);
    if (args.scale.data && t % args.tiles_per_scale == 0) pack_scales(args, first_row, t, lane);
    if (args.super_scale.data && t % args.tiles_per_super == 0) pack_supers(args, first_row, t, lane);
  }
}
