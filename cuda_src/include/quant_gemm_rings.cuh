// SPDX-License-Identifier: Apache-2.0
// quant_gemm_rings.cuh - shapes of quant_gemm_mma.cuh and what its rings in shared memory are filled with: codes, scales
// and x of the tiles ahead, by cp.async.
#ifndef CUPYATTN_QUANT_GEMM_RINGS_CUH
#define CUPYATTN_QUANT_GEMM_RINGS_CUH

#include "bits.cuh"
#include "cp_async.cuh"
#include "staged_scales.cuh"
#include "weight_fragments.cuh"

// ---- shape -----------------------------------------------------------------------------------------------------

constexpr int UNIT = CA_UNIT;      // tiles of a unit
constexpr int STAGES = CA_STAGES;  // tiles of a ring
constexpr bool STREAM = M_TILE == 8;
constexpr int CHUNKS = 8;                 // of a piece
constexpr int TOKEN_TILES = M_TILE / 8;  // columns of mma tiles
constexpr int THREADS = 32 * WARPS;

// out is no wider than x: more digits of a weight than x has would not show
constexpr bool ROUNDED = sizeof(U) == 2 && (is_half(static_cast<T*>(nullptr)) || !is_half(static_cast<U*>(nullptr)));
template <typename Codes, typename X, Mode MODE>
struct ChosenFragments {
  using Type = WeightFragments<Codes, X, ROUNDED>;
};
template <int CENTRE>
struct ChosenFragments<Ints<4, CENTRE>, __nv_bfloat16, ZERO> {
  using Type = OffsetFours<CENTRE, __nv_bfloat16>;
};
template <int CENTRE, typename X>
struct ChosenFragments<Ints<4, CENTRE>, X, MINIMUM> {
  using Type = OffsetFours<CENTRE, X>;
};
using Records = StagedScales<typename Format::Scales>;
using Fragments = ChosenFragments<typename Format::Codes, T, Records::MODE>::Type;
constexpr int GROUPS = Format::Scales::GROUPS;  // of a tile, each with scales of its own
constexpr bool SCALED = Records::BYTES > 0, SUMS_OF_X = Records::MODE != PLAIN;

// Four lanes of a stream would make the same float32 numbers of a record of several groups: one lane makes all of a
// record, in place of the tile's x, which is in registers by then.
template <bool EXPANDED, typename Kind>
struct ReadRecords {
  using Type = StagedScales<typename Expanded<Kind>::Type>;
};
template <typename Kind>
struct ReadRecords<false, Kind> {
  using Type = StagedScales<Kind>;
};
constexpr int FLOAT_BYTES = ReadRecords<true, typename Format::Scales>::Type::BYTES;
constexpr bool EXPANDS = STREAM && ROW_TILES == 4 && GROUPS > 1 && FLOAT_BYTES > 0 &&  // a record for each lane
                         ROW_TILES * 8 * FLOAT_BYTES <= M_TILE * 128;
using Read = ReadRecords<EXPANDS, typename Format::Scales>::Type;
static_assert(sizeof(T) == 2 && M_TILE % 8 == 0 && (GROUPS == 1 || UNIT == 1), "quant_gemm_mma: shape of a tile");
static_assert(!STREAM || WARPS == CHUNKS, "quant_gemm_mma: a warp streams a chunk");

// Shared memory: [STAGES] of x, then [WARPS] weights; where streaming, a ring for each warp, [WARPS][STAGES] of x and
// weights. A warp's weights are the codes of its rows of tiles, their scales, their supers. Then, where pipelined, the
// sums of the chunks before, float [WARPS][SUMS][32], and sums of x, float [GROUPS][M_TILE]; streams put their sums down
// in place of the rings, [CHUNKS][SUMS][32].
constexpr int TILE_BYTES = Format::TILE_BYTES;
constexpr int X_BYTES = M_TILE * TILE_COLUMNS * 2;
constexpr int SCALES_AT = ROW_TILES * TILE_BYTES;
constexpr int SUPERS_AT = SCALES_AT + ROW_TILES * 8 * Records::BYTES;
constexpr int WEIGHT_BYTES = ceil_div(SUPERS_AT + ROW_TILES * 8 * Records::SUPER_BYTES, 128) * 128;
constexpr int STAGE_BYTES = X_BYTES + (STREAM ? 1 : WARPS) * WEIGHT_BYTES;
constexpr int SUMS = ROW_TILES * TOKEN_TILES * 4;  // of a lane
constexpr int SUMS_AT = STREAM ? 0 : STAGES * STAGE_BYTES;
constexpr int X_SUMS_AT = SUMS_AT + WARPS * SUMS * 128;

// Columns [64 * begin, 64 * end) of tiles.
struct TileRange {
  int begin, end;
};

// ---- what is on its way ----------------------------------------------------------------------------------------

// 16-byte chunks of `ROW_BYTES` consecutive bytes of each of ROW_TILES rows of tiles, by the lanes of a warp.
template <int ROW_BYTES>
struct RowCopies {
  static constexpr int ROW_CHUNKS = ROW_BYTES / 16, ALL = ROW_TILES * ROW_CHUNKS;
  static constexpr int EACH = ROW_CHUNKS % 32 == 0 ? ROW_CHUNKS / 32 : 1;  // copies in a row, from one pointer
  static constexpr int POINTERS = ceil_div(ALL, 32 * EACH);
  const uint8_t* from[POINTERS];

  // `base` is that of row of tiles 0; rows past the last one read the last.
  __device__ __forceinline__ RowCopies(const uint8_t* base, int64_t stride_row_tile, int first, int row_tiles) {
#pragma unroll
    for (int i = 0; i < POINTERS; ++i) {
      const int chunk = i * 32 * EACH + threadIdx.x % 32;
      const int row_tile = min(first + chunk / ROW_CHUNKS, row_tiles - 1);
      from[i] = base + row_tile * stride_row_tile + chunk % ROW_CHUNKS * 16;
    }
  }
  // `to` is the lane's place, 16 bytes from that of the one before.
  __device__ __forceinline__ void copy(char* to, int lane, bool valid) const {
#pragma unroll
    for (int i = 0; i < POINTERS; ++i) {
      if (ALL % 32 != 0 && i * 32 + lane >= ALL) continue;
#pragma unroll
      for (int n = 0; n < EACH; ++n) cp_async16(to + (i * EACH + n) * 512, from[i] + n * 512, valid);
    }
  }
  __device__ __forceinline__ void advance(int bytes) {
#pragma unroll
    for (int i = 0; i < POINTERS; ++i) from[i] += bytes;
  }
};

template <>
struct RowCopies<0> {
  __device__ __forceinline__ RowCopies(const uint8_t*, int64_t, int, int) {}
  __device__ __forceinline__ void copy(char*, int, bool) const {}
  __device__ __forceinline__ void advance(int) {}
};

// Records that `each` units share.
template <int ROW_BYTES>
struct RecordCopies {
  RowCopies<ROW_BYTES> copies;
  int each, left;  // units of a record; those until the next record

  __device__ __forceinline__ RecordCopies(const uint8_t* base, const WeightView& weight, int first, int tile, int tiles)
      : copies(base + int64_t{tile / tiles} * ROW_BYTES, int64_t{ceil_div(weight.column_tiles, tiles)} * ROW_BYTES,
               first, weight.row_tiles),
        each(tiles / UNIT), left((tiles - tile % tiles) / UNIT) {}
  __device__ __forceinline__ void advance() {
    if (--left > 0) return;
    left = each;
    copies.advance(ROW_BYTES);
  }
};

// x of a tile, [step][M_TILE][32 bytes], so that lane 4g + c reads 8 bytes of row g from all banks. Eight lanes write
// 32 bytes of four rows.
struct XCopies {
  static constexpr int LANES = STREAM ? 32 : THREADS, ROWS = LANES / 8;  // rows of a copy by all
  static constexpr int COPIES = ceil_div(M_TILE, ROWS);
  const T* from[COPIES];
  int limit[COPIES];  // columns of the row up to the range's end, none past the last row
  int column;

  static __device__ __forceinline__ int row() { return threadIdx.x % LANES / 32 * 4 + threadIdx.x % 8 / 2; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % 32 / 8 * 2 + threadIdx.x % 2; }  // of 8 columns
  static __device__ __forceinline__ int to() { return chunk() / 2 * M_TILE * 32 + row() * 32 + chunk() % 2 * 16; }

  __device__ __forceinline__ XCopies(const QuantGemmArgs& args, int token, TileRange range) {
    const int columns = min(args.columns, range.end * TILE_COLUMNS);
    column = range.begin * TILE_COLUMNS + chunk() * 8;
#pragma unroll
    for (int n = 0; n < COPIES; ++n) {
      const int m = row() + n * ROWS;
      from[n] = static_cast<const T*>(args.x.data) + (token + m) * args.x.stride_row + column;
      limit[n] = kept(m < M_TILE && token + m < args.tokens ? columns : 0);
    }
  }
  __device__ __forceinline__ void copy(char* to) const {
#pragma unroll
    for (int n = 0; n < COPIES; ++n) {
      if (M_TILE % ROWS != 0 && row() + n * ROWS >= M_TILE) continue;
      cp_async16(to + n * ROWS * 32, from[n], column < limit[n]);
    }
  }
  __device__ __forceinline__ void advance() {
    column += TILE_COLUMNS;
#pragma unroll
    for (int n = 0; n < COPIES; ++n) from[n] += TILE_COLUMNS;
  }
};

// Where a thread reads and writes in its first stage, `ring` bytes from the start of shared memory; kept, so that it is
// not computed again for every tile, but for what is used once a tile.
struct LanePlaces {
  int lane, x, weights, read, above, x_to, weights_to;
  __device__ __forceinline__ explicit LanePlaces(int ring) {
    const int l = threadIdx.x % 32, first = ring + X_BYTES + (STREAM ? 0 : threadIdx.x / 32 * WEIGHT_BYTES);
    lane = kept(l);
    x = kept(ring + l / 4 * 32 + l % 4 * 8);
    weights = kept(first);
    read = kept((EXPANDS ? ring : first + SCALES_AT) + l / 4 * Read::BYTES);
    above = EXPANDS ? 0 : kept(first + SUPERS_AT + l / 4 * Read::SUPER_BYTES);
    x_to = kept(ring + XCopies::to());
    weights_to = kept(first + l * 16);
  }
  // Of the record this lane expands, what is above it, and where to.
  __device__ __forceinline__ int record() const { return weights + SCALES_AT + lane * Records::BYTES; }
  __device__ __forceinline__ int record_above() const { return weights + SUPERS_AT + lane * Records::SUPER_BYTES; }
  __device__ __forceinline__ int floats() const { return weights - X_BYTES + lane * FLOAT_BYTES; }
};

// The next tile to be copied.
struct TileAhead {
  RowCopies<TILE_BYTES> codes;
  RecordCopies<8 * Records::BYTES> scales;
  RecordCopies<8 * Records::SUPER_BYTES> supers;
  XCopies x;
  int left;  // tiles

  __device__ __forceinline__ TileAhead(const QuantGemmArgs& args, int row_tile, int token, TileRange range)
      : codes(args.weight.codes + int64_t{range.begin} * TILE_BYTES, int64_t{args.weight.column_tiles} * TILE_BYTES,
              row_tile, args.weight.row_tiles),
        scales(args.weight.scales, args.weight, row_tile, range.begin, GROUPS > 1 ? 1 : args.weight.tiles_per_scale),
        supers(args.weight.supers, args.weight, row_tile, range.begin, args.weight.tiles_per_super),
        x(args, token, range), left(range.end - range.begin) {}

  // Starts its copies, past the end those of zeros; `last`: of its unit.
  __device__ __forceinline__ void copy(const LanePlaces& own, char* stage, bool last) {
    const bool valid = left > 0;
    codes.copy(stage + own.weights_to, own.lane, valid);
    x.copy(stage + own.x_to);
    if (last) {
      const bool unit_valid = left > 1 - UNIT;  // the last unit may have fewer tiles
      scales.copies.copy(stage + own.weights_to + SCALES_AT, own.lane, unit_valid);
      supers.copies.copy(stage + own.weights_to + SUPERS_AT, own.lane, unit_valid);
      scales.advance();
      supers.advance();
    }
    cp_async_commit();
    codes.advance(TILE_BYTES);
    x.advance();
    --left;
  }
};

#endif  // CUPYATTN_QUANT_GEMM_RINGS_CUH
