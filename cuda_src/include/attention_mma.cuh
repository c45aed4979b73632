// SPDX-License-Identifier: Apache-2.0
// attention_mma.cuh - attention of many query rows on tensor cores (FlashAttention-2 style): mma.m16n8k16 on ROWS packed
// rows, a warp for 16 of them, K and V tiles shared by the warps. Included by attention.cu after its constants.
//
// For every item of the block:
//   1. page entries of the first two tiles, and the queries, go through shared memory; a warp keeps its 16 queries as
//      A fragments in registers (HEAD_DIM 128) or in shared memory
//   2. one tile of KEYS keys per step: while tile j is worked on, tile j + 1 is copied by cp.async to the other stage of
//      the ring, the row addresses of tile j + 2 are published and the page entries of tile j + 3 are on their way
//      2a. scores = Q.K^T (K by ldmatrix) in float32; hidden keys -inf, but a tile that every row of the warp sees
//          whole skips that, and one that none sees is skipped
//      2b. probabilities relative to the largest score so far, rounded to T as the A operand of P.V
//      2c. out += P.V (V by transposed ldmatrix)
//   3. outputs go through shared memory to store_row(); the last block to bring a piece of a unit merges it
//
// A row of 16-byte pieces is stored with piece p at p ^ (row % 8), so that the 8 rows of an ldmatrix matrix lie in
// different banks. Rows of invisible tokens and dims past head_dim are zeros. Tiles start at multiples of KEYS and a
// hidden key adds exactly nothing, so a row's bits depend neither on the rows beside it nor on where its item begins.
//
// legal      T in {__half, __nv_bfloat16}, KF and VF KvPlain<T>; HEAD_DIM 64, 128, 256 (both head dims padded to it);
//            ROWS 64 or 128, 64 with HEAD_DIM 256; ALIGNED 1 (rows of q, k, v and out at multiples of 16 bytes); BIAS 0, 1
// launch     block (2 * ROWS), any grid; 3 + tiles block barriers per item, two more when a unit is merged; dynamic
//            shared memory SHARED_BYTES = 8 * KEYS * HEAD_DIM (ring: 2 stages of K and V)
//            + 2 * ROWS * HEAD_DIM unless HEAD_DIM is 128 (queries) + 32 * KEYS (row addresses) + 8 * ROWS (state) + 64,
//            KEYS = 32 with HEAD_DIM 256, else 64
#ifndef CUPYATTN_ATTENTION_MMA_CUH
#define CUPYATTN_ATTENTION_MMA_CUH

#include "attention_store.cuh"
#include "cp_async.cuh"
#include "hadamard.cuh"
#include "kv_fragments.cuh"
#include "mma.cuh"
#include "warp.cuh"

using KTile = KvTile<KF, HEAD_DIM>;
using VTile = KvTile<VF, HEAD_DIM>;
using KOperand = typename KTile::Operand;
using VOperand = typename VTile::Operand;

constexpr int THREADS = 2 * ROWS;               // a warp for 16 rows
constexpr int KEYS = HEAD_DIM > 128 ? 32 : 64;  // of a tile
constexpr int K_STEPS = HEAD_DIM / 16;
constexpr int COLUMNS = HEAD_DIM / 8;           // n-tiles of the sums
constexpr int STAGE_BYTES = KEYS * (KTile::ROW_BYTES + VTile::ROW_BYTES);         // [K, V][KEYS] rows
constexpr int SCALE_BYTES = KEYS * (KTile::SCALE_BYTES + VTile::SCALE_BYTES);     // of a stage: [K, V][KEYS]
constexpr int RING_BYTES = 2 * STAGE_BYTES;
constexpr int Q_BYTES = ROWS * HEAD_DIM * 2;
constexpr int OUT_STRIDE = HEAD_DIM + (VTile::E == 2 ? 8 : VTile::E == 4 ? 16 : 4);  // floats, against conflicts
constexpr int OUT_BYTES = ROWS * OUT_STRIDE * 4;
constexpr bool Q_IN_SHARED = HEAD_DIM != 128;   // else in registers
constexpr bool Q_IN_RING =                      // only staged, in the second stage
    !Q_IN_SHARED && RING_BYTES + Q_BYTES > OUT_BYTES && Q_BYTES <= STAGE_BYTES;
// Shared memory: ring and queries, later the outputs; then
constexpr int RING_AND_Q = RING_BYTES + (Q_IN_RING ? 0 : Q_BYTES);
constexpr int SCALES_AT = RING_AND_Q > OUT_BYTES ? RING_AND_Q : OUT_BYTES;        // [2 stages]
constexpr int POINTERS_AT = SCALES_AT + 2 * SCALE_BYTES;                // const char* [2 tiles][K, V][KEYS]
constexpr int STATE_AT = POINTERS_AT + 2 * 2 * KEYS * 8;                // float [2][ROWS]: origin and sum
constexpr int KNOWN_AT = STATE_AT + 2 * ROWS * 4;                       // uint32 [4 tiles][KEYS / 32]: key is in a page
constexpr int ITEM_AT = KNOWN_AT + 32;                                  // ItemKeys
constexpr int FACTORS_AT = ITEM_AT + 32;                                // float [2][ROWS], of quantized keys
constexpr int SHARED_BYTES = FACTORS_AT + (KTile::E > 2 ? 2 * ROWS * 4 : 0);
// Blocks per multiprocessor that registers are given for.
constexpr int MIN_BLOCKS = HEAD_DIM == 64 && !BIAS && SCALE_BYTES == 0 ? 256 / ROWS : ROWS == 64 ? 2 : 1;
constexpr float MAX_GROWTH = 8.0f;  // log2 of the largest probability relative to the origin
constexpr float MAX_SCALE = 64.0f;  // of V's scales times norm; probabilities stay far below half's largest number
static_assert((HEAD_DIM == 64 || HEAD_DIM == 128 || HEAD_DIM == 256) && ALIGNED, "attention_mma: HEAD_DIM, ALIGNED");
static_assert(ROWS == 64 || (ROWS == 128 && HEAD_DIM < 256), "attention_mma: ROWS");
static_assert(SHARED_BYTES <= 99 * 1024, "attention_mma: shared memory");
static_assert(sizeof(T) == 2, "attention_mma: 16-bit queries");

// ---- queries -------------------------------------------------------------------------------------------

// Power of two 2^e with 2^e <= x < 2^(e + 1), and its inverse; x >= 0, e from -126 to 126.
struct PowerOfTwo {
  float value, inverse;
  __device__ __forceinline__ explicit PowerOfTwo(float x) {
    const uint32_t exponent = min(max(__float_as_uint(x) >> 23, 1u), 253u);
    value = __uint_as_float(exponent << 23);
    inverse = __uint_as_float((254u - exponent) << 23);
  }
};

// Address of 16-byte piece `piece` of row r of the staged queries.
__device__ __forceinline__ char* query_piece(char* queries, int r, int piece) {
  return queries + r * (HEAD_DIM * 2) + (piece ^ (r & 7)) * 16;
}

// Block: the item's queries as K's format wants them, zeros past num_rows and head_dim. factors[r] times a staged row
// is the row; factors[ROWS + r] is the sum of the staged row, where K's format has a scale per token. Plain keys have no
// factors.
__device__ __forceinline__ void stage_queries(const AttentionArgs& args, const RowTile& rows, char* queries,
                                              float* factors) {
  constexpr int LANES = HEAD_DIM / STEP;  // of a row
#pragma unroll 2
  for (int first = 0; first < ROWS * LANES; first += THREADS) {
    const int r = (first + threadIdx.x) / LANES, dim = (first + threadIdx.x) % LANES * STEP;
    EightFloats q = EightFloats::all(0.0f);
    if (r < rows.num_rows && dim < args.head_dim) {
      const T* from = static_cast<const T*>(query_pointer(args.q, args, rows.row(args, r), sizeof(T))) + dim;
      const bool aligned = reinterpret_cast<uint64_t>(from) % 16 == 0;
      q = EightFloats::from(aligned ? load_step<true>(from) : load_step<false>(from));
      if constexpr (KF::CHANNEL) {
        EightFloats scaled = EightFloats::all(0.0f);
        scaled.add_product(q, channel_scales(args.k_scale, rows.item.kv_head, dim));
        q = scaled;
      }
    }
    if constexpr (KF::ROTATED) hadamard32(q);
    if constexpr (KTile::E > 2) {
      float largest = 0.0f;
#pragma unroll
      for (int j = 0; j < STEP; ++j) largest = fmaxf(largest, fabsf(q.x[j]));
      const PowerOfTwo power(group_max<LANES>(largest));
      if (dim == 0) factors[r] = power.value;
      q *= power.inverse;
    }
    const Vec<KOperand, STEP> rounded = q.to<KOperand>();
    if constexpr (KTile::TOKEN_SCALE) {
      const float sum = group_sum<LANES>(EightFloats::from(rounded).sum());
      if (dim == 0) factors[ROWS + r] = sum;
    }
    if constexpr (KTile::E == 2) {
      store_vec(reinterpret_cast<KOperand*>(query_piece(queries, r, dim / 8)), rounded);
    } else {
#pragma unroll
      for (int j = 0; j < STEP; j += 2) {
        const int slot = query_slot<KF>(dim + j);
        store_vec(reinterpret_cast<KOperand*>(query_piece(queries, r, slot / 8)) + slot % 8,
                  Vec<KOperand, 2>{{rounded.v[j], rounded.v[j + 1]}});
      }
    }
  }
}

// A fragments of the warp's 16 queries.
struct Queries {
  uint32_t held[Q_IN_SHARED ? 1 : K_STEPS][4];
  char* staged;

  __device__ __forceinline__ explicit Queries(char* queries) : staged(queries) {
    if constexpr (!Q_IN_SHARED) {
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k) load(k, held[k]);
    }
  }
  __device__ __forceinline__ void load(int k, uint32_t (&fragment)[4]) const {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 16;
    ldmatrix_x4(fragment, query_piece(staged, row, 2 * k + threadIdx.x / 16 % 2));
  }
  __device__ __forceinline__ void get(int k, uint32_t (&fragment)[4]) const {
    if constexpr (Q_IN_SHARED) {
      load(k, fragment);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = held[k][i];
    }
  }
};

// The lane's two rows of the block: g and g + 8 of its warp's.
__device__ __forceinline__ int lane_row(int half) {
  return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half;
}

// ---- products ------------------------------------------------------------------------------------------

// scores[n] of rows g, g + 8 against keys 8n + 2t, 8n + 2t + 1 of the tile (g = lane / 4, t = lane % 4), in units of
// the rows' factors.
__device__ __forceinline__ void multiply_keys(const char* tile, const char* scales, const Queries& q,
                                              const float* factors, float (&scores)[KEYS / 8][4]) {
  const float* own = reinterpret_cast<const float*>(scales);
  const int t = threadIdx.x % 4;
  // of HEAD_DIM 256 all at once would spill addresses
  constexpr int UNROLLED = HEAD_DIM < 256 ? KTile::CHUNKS : KTile::GROUP_SCALE ? 1 : 4;
#pragma unroll UNROLLED
  for (int chunk = 0; chunk < KTile::CHUNKS; ++chunk) {
    uint32_t queries[KTile::K_STEPS][4];
#pragma unroll
    for (int k = 0; k < KTile::K_STEPS; ++k) q.get(chunk * KTile::K_STEPS + k, queries[k]);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n += 2) {
      uint32_t keys[KTile::K_STEPS][2][2];
      KvReader<KF, HEAD_DIM, false>(tile, 8 * n)(chunk, keys);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (KTile::GROUP_SCALE) {
          constexpr int N = KTile::CHUNK_GROUPS;
          const float* at = own + (8 * (n + i) + 2 * t) * KTile::GROUPS + chunk * N;
          const Vec<float, N> even = load_vec<float, N>(at), odd = load_vec<float, N>(at + KTile::GROUPS);
#pragma unroll
          for (int g = 0; g < N; ++g) {
            float part[4] = {};
            mma_m16n8k16<KOperand>(part, queries[2 * g], keys[2 * g][i]);
            mma_m16n8k16<KOperand>(part, queries[2 * g + 1], keys[2 * g + 1][i]);
#pragma unroll
            for (int j = 0; j < 4; ++j)
              scores[n + i][j] = fmaf(j % 2 ? odd.v[g] : even.v[g], part[j], scores[n + i][j]);
          }
        } else {
#pragma unroll
          for (int k = 0; k < KTile::K_STEPS; ++k) mma_m16n8k16<KOperand>(scores[n + i], queries[k], keys[k][i]);
        }
      }
    }
  }
  if constexpr (KTile::TOKEN_SCALE) {
    const float row_sum[2] = {factors[ROWS + lane_row(0)], factors[ROWS + lane_row(1)]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
      const Vec<float, 4> both = load_vec<float, 4>(own + (8 * n + 2 * t) * 2);  // scale and centre of two keys
#pragma unroll
      for (int j = 0; j < 4; ++j)
        scores[n][j] = fmaf(both.v[j % 2 * 2], scores[n][j], both.v[j % 2 * 2 + 1] * row_sum[j / 2]);
    }
  }
}

// sums[index][part] (see value_at) += 16 probabilities . values 16 * step and on of the tile.
__device__ __forceinline__ void add_values(const char* tile, const char* scales, int step, const uint32_t (&probs)[4],
                                           float (&sums)[COLUMNS][4]) {
  const KvReader<VF, HEAD_DIM, true> reader(tile, 16 * step);
#pragma unroll
  for (int chunk = 0; chunk < VTile::CHUNKS; ++chunk) {
    uint32_t values[VTile::COLUMNS][2];
    reader(chunk, values);
    if constexpr (VTile::GROUP_SCALE) {
      constexpr int N = VTile::CHUNK_GROUPS;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t* at = reinterpret_cast<const uint32_t*>(scales);
        at += (8 * step + 4 * half + threadIdx.x % 4) * VTile::GROUPS + chunk * N;
        const Vec<uint32_t, N> pair = load_vec<uint32_t, N>(at);
#pragma unroll
        for (int n = 0; n < VTile::COLUMNS; ++n)
          values[n][half] = multiply_pair(values[n][half], pair.v[n * N / VTile::COLUMNS]);
      }
    }
#pragma unroll
    for (int n = 0; n < VTile::COLUMNS; ++n)
      mma_m16n8k16<VOperand>(sums[chunk * VTile::COLUMNS + n], probs, values[n]);
  }
}

// ---- which keys a warp sees ----------------------------------------------------------------------------

// Local keys the lane's rows g and g + 8 see. They wait in shared memory where the state of these rows will be: registers
// are short. A row past num_rows sees what the last one sees; what comes of it is never looked at, and a warp that has
// only such rows sees nothing.
struct VisibleKeys {
  KeyRange* rows;  // [ROWS]

  __device__ __forceinline__ VisibleKeys(const AttentionArgs& args, const RowTile& tile, char* smem)
      : rows(reinterpret_cast<KeyRange*>(smem + STATE_AT)) {
    const int warp_row = threadIdx.x / 32 * 16, r = warp_row + threadIdx.x % 16;
    if (threadIdx.x % 32 < 16)
      rows[r] = tile.keys(args, warp_row < tile.num_rows ? min(r, tile.num_rows - 1) : ROWS);
    __syncwarp();
  }
  __device__ __forceinline__ KeyRange row(int half) const {
    return rows[lane_row(half)];
  }
  // Of the KEYS keys from `key` on, by all rows of the warp.
  __device__ __forceinline__ bool all_seen(int key) const {
    const KeyRange a = row(0), b = row(1);
    return __all_sync(FULL_MASK, key >= max(a.begin, b.begin) && key + KEYS <= min(a.end, b.end));
  }
  __device__ __forceinline__ bool none_seen(int key) const {
    const KeyRange a = row(0), b = row(1);
    return __all_sync(FULL_MASK, (key >= a.end || key + KEYS <= a.begin) && (key >= b.end || key + KEYS <= b.begin));
  }
};

// ---- softmax -------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const float both[2] = {low, high};
  const Vec<VOperand, 2> rounded = from_float<VOperand, 2>(both);
  return reinterpret_cast<const uint32_t&>(rounded);
}

// What the lane has found for its two rows.
struct RowState {
  float origin[2];         // what probabilities are relative to, log2; follows the largest score
  float sum[2];            // of the probabilities of the lane's own keys
  float offset[2];         // of probability * centre of the lane's own keys, where V's format has a centre
  float norm[2];           // of V's scales: sums are of probability * scale * norm
  float sums[COLUMNS][4];

  __device__ __forceinline__ RowState() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      origin[half] = NEG_INF;
      sum[half] = offset[half] = 0.0f;
      norm[half] = PowerOfTwo(0.0f).inverse;  // any scale is larger
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[n][j] = 0.0f;
  }

  // Moves the origins if the scores ask for it, and the norms if V's scales of visible keys do. Scores times `factor`
  // are log2 units.
  __device__ __forceinline__ void follow(const float (&scores)[KEYS / 8][4], const float (&factor)[2],
                                         const char* scales) {
    constexpr int N = VTile::TOKEN_SCALE ? 4 : 2;
    float top[N], shrink[2];
#pragma unroll
    for (int i = 0; i < N; ++i) top[i] = i < 2 ? NEG_INF : 0.0f;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) top[j / 2] = fmaxf(top[j / 2], scores[n][j]);
      if constexpr (VTile::TOKEN_SCALE) {
        const Vec<float, 4> both = value_scales(scales, n);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          top[2 + j / 2] = fmaxf(top[2 + j / 2], scores[n][j] == NEG_INF ? 0.0f : fabsf(both.v[j % 2 * 2]));
      }
    }
    group_max<4>(top);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shrink[half] = 1.0f;
      const float found = top[half] * factor[half];
      if (found > origin[half] + MAX_GROWTH) {
        shrink[half] = exp2f(origin[half] - found);
        origin[half] = found;
        sum[half] *= shrink[half];
        offset[half] *= shrink[half];
      }
      if constexpr (VTile::TOKEN_SCALE) {
        if (top[2 + half] * norm[half] > MAX_SCALE) {
          const float wanted = PowerOfTwo(top[2 + half]).inverse;
          shrink[half] *= wanted / norm[half];
          norm[half] = wanted;
        }
      }
    }
    if (shrink[0] == 1.0f && shrink[1] == 1.0f) return;
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[n][j] *= shrink[j / 2];
  }

  // Scale and centre of V's keys 8n + 2t and 8n + 2t + 1.
  static __device__ __forceinline__ Vec<float, 4> value_scales(const char* scales, int n) {
    return load_vec<float, 4>(reinterpret_cast<const float*>(scales) + (8 * n + threadIdx.x % 4 * 2) * 2);
  }

  // Probabilities of 16 keys as the A operand of P.V, from their scores and V's scales.
  __device__ __forceinline__ void make_probs(const float (&scores)[KEYS / 8][4], const float (&factor)[2],
                                             const char* scales, int step, uint32_t (&probs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // keys 16 * step + 8 * (i / 2) + 2t and the next, row half i % 2
      const int half = i % 2, n = 2 * step + i / 2;
      const float from = softmax_origin(origin[half]);
      float low = exp2f(fmaf(scores[n][2 * half], factor[half], -from));
      float high = exp2f(fmaf(scores[n][2 * half + 1], factor[half], -from));
      sum[half] += low + high;
      if constexpr (VTile::TOKEN_SCALE) {
        const Vec<float, 4> both = value_scales(scales, n);
        if constexpr (VTile::Fragments::CENTRE != 0.0f)
          offset[half] = fmaf(low, both.v[1], fmaf(high, both.v[3], offset[half]));
        low *= both.v[0] * norm[half];
        high *= both.v[2] * norm[half];
      }
      probs[i] = pack_pair(low, high);
    }
  }

  // Leaves origins and sums in state [2][ROWS], outputs [ROWS][OUT_STRIDE].
  __device__ __forceinline__ void put_down(float* state, float* outputs) {
    constexpr int E = VTile::E, WIDTH = E < 4 ? E : 4;
    const int t = threadIdx.x % 4;
    float totals[4] = {sum[0], sum[1], offset[0], offset[1]};
    group_sum<4>(totals);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = lane_row(half);
      if (t == 0) {
        state[r] = origin[half];
        state[ROWS + r] = totals[half];
      }
#pragma unroll
      for (int piece = 0; piece < VTile::LOW_PIECES; ++piece)
#pragma unroll
        for (int m = 0; m < E; m += WIDTH) {
          Vec<float, WIDTH> run;
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) {
            const ValueAt at = value_at<VF>(piece, m + i);
            const float found = sums[at.index][at.part + 2 * half];
            run.v[i] = VTile::TOKEN_SCALE ? fmaf(found, 1.0f / norm[half], totals[2 + half]) : found;
          }
          store_vec(outputs + r * OUT_STRIDE + piece * 4 * E + t * E + m, run);
        }
    }
  }
};

// ---- items ---------------------------------------------------------------------------------------------

// What a block reads of an item's keys. A copy waits in shared memory, since registers are short.
struct ItemKeys {
  SequencePages pages;
  KeyRange visible;
  int kv_head;

  __device__ __forceinline__ ItemKeys(const AttentionArgs& args, const RowTile& rows)
      : pages(args.table, rows.item.seq), visible(rows.visible), kv_head(rows.item.kv_head) {}
};

// Starts the block's copies of a tile whose rows are all in pages and HEAD_DIM long: few instructions, since nearly
// every tile is such.
template <typename Tile>
__device__ __forceinline__ void copy_whole(char* tile, const char* const* rows) {
  constexpr int PIECES = Tile::PIECES, EACH = THREADS / PIECES;  // of a row; rows at once
  constexpr bool REGULAR = THREADS % PIECES == 0 && EACH % 8 == 0;  // only the row changes from copy to copy
#pragma unroll
  for (int first = 0; first < KEYS * PIECES; first += THREADS) {
    const int index = REGULAR ? threadIdx.x : first + threadIdx.x, rows_down = REGULAR ? first / PIECES : 0;
    if (KEYS * PIECES % THREADS != 0 && first + threadIdx.x >= KEYS * PIECES) break;
    const int row = index / PIECES, piece = index % PIECES;
    cp_async16(tile + Tile::offset(row, piece) + rows_down * Tile::ROW_BYTES, rows[row + rows_down] + piece * 16);
  }
}

// The tiles on their way. The threads 0 to KEYS - 1 look after the keys of a tile, the next KEYS ones after the values.
struct KeyTiles {
  const AttentionArgs& args;
  char* smem;

  __device__ __forceinline__ TokenRequest ask(const ItemKeys& item, int tile) const {
    const int key = tile * KEYS + threadIdx.x % KEYS;
    const bool wanted = threadIdx.x < 2 * KEYS && key >= item.visible.begin && key < item.visible.end;
    return item.pages.ask(args.table, key, wanted);
  }
  __device__ __forceinline__ TokenSlot slot_of(const ItemKeys& item, const TokenRequest& found) const {
    return item.pages.answer(args.table, found);
  }
  __device__ __forceinline__ void publish(const ItemKeys& item, int tile, const TokenRequest& found) const {
    if (threadIdx.x >= 2 * KEYS) return;
    const bool is_key = threadIdx.x < KEYS;
    const TokenSlot slot = slot_of(item, found);
    pointers(tile)[threadIdx.x] =
        is_key ? reinterpret_cast<const char*>(kv_row<const typename KF::Code>(args.k, args.table, slot, item.kv_head))
               : reinterpret_cast<const char*>(kv_row<const typename VF::Code>(args.v, args.table, slot, item.kv_head));
    const uint32_t in_page = __ballot_sync(FULL_MASK, slot.page >= 0);
    if (is_key && threadIdx.x % 32 == 0) known(tile)[threadIdx.x / 32] = in_page;
  }
  __device__ __forceinline__ bool all_known(int tile) const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i) all = all && known(tile)[i] == 0xffffffffu;
    return all;
  }
  __device__ __forceinline__ void copy(int tile) const {
    if (all_known(tile) && args.head_dim == HEAD_DIM && args.head_dim_v == HEAD_DIM) {
      copy_whole<KTile>(keys(tile), pointers(tile));
      copy_whole<VTile>(values(tile), pointers(tile) + KEYS);
    } else {
      KTile::template copy<KEYS, THREADS>(keys(tile), pointers(tile), args.head_dim, args.q.data, threadIdx.x);
      VTile::template copy<KEYS, THREADS>(values(tile), pointers(tile) + KEYS, args.head_dim_v, args.q.data,
                                          threadIdx.x);
    }
    cp_async_commit();
  }
  __device__ __forceinline__ char* keys(int tile) const { return smem + (tile & 1) * STAGE_BYTES; }
  __device__ __forceinline__ char* values(int tile) const { return keys(tile) + KEYS * KTile::ROW_BYTES; }
  __device__ __forceinline__ char* key_scales(int tile) const { return smem + SCALES_AT + (tile & 1) * SCALE_BYTES; }
  __device__ __forceinline__ char* value_scales(int tile) const { return key_scales(tile) + KEYS * KTile::SCALE_BYTES; }
  __device__ __forceinline__ const char** pointers(int tile) const {
    return reinterpret_cast<const char**>(smem + POINTERS_AT) + (tile & 1) * (2 * KEYS);
  }
  __device__ __forceinline__ uint32_t* known(int tile) const {
    return reinterpret_cast<uint32_t*>(smem + KNOWN_AT) + (tile & 3) * (KEYS / 32);
  }
};

template <typename A, typename B>
constexpr bool IS_SAME = false;
template <typename A>
constexpr bool IS_SAME<A, A> = true;

// Scales of the thread's key or value, on their way to shared memory; in the same registers where keys and values have
// the like.
template <typename K, typename V>
struct ScalesAhead {
  static constexpr bool ALIKE = IS_SAME<typename K::S, typename V::S> && K::Tile::TOKEN_SCALE == V::Tile::TOKEN_SCALE &&
                                K::Tile::GROUP_SCALE == V::Tile::GROUP_SCALE && KF::HAS_ZERO == VF::HAS_ZERO;
  K k;
  V v;

  __device__ __forceinline__ void load(const KeyTiles& tiles, const ItemKeys& item, const TokenRequest& found) {
    const AttentionArgs& args = tiles.args;
    const TokenSlot slot = tiles.slot_of(item, found);
    const bool is_key = threadIdx.x < KEYS;
    if (threadIdx.x >= 2 * KEYS) return;
    if (ALIKE || is_key)
      k.load(is_key ? args.k_scale : args.v_scale, args.table, slot, item.kv_head,
             is_key ? args.head_dim : args.head_dim_v);
    else v.load(args.v_scale, args.table, slot, item.kv_head, args.head_dim_v);
  }
  __device__ __forceinline__ void store(const KeyTiles& tiles, int tile) const {
    if (threadIdx.x >= 2 * KEYS) return;
    if (threadIdx.x < KEYS) {
      k.template store<false>(tiles.key_scales(tile), threadIdx.x);
    } else if constexpr (ALIKE) {
      V same;
#pragma unroll
      for (int g = 0; g < static_cast<int>(sizeof(same.scale) / sizeof(same.scale[0])); ++g) same.scale[g] = k.scale[g];
      same.zero = k.zero;
      same.template store<true>(tiles.value_scales(tile), threadIdx.x - KEYS);
    } else {
      v.template store<true>(tiles.value_scales(tile), threadIdx.x - KEYS);
    }
  }
};

// tanh to 2^-22, without a branch.
__device__ __forceinline__ float quick_tanh(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2f(2.0f * LOG2_E * x));
}

// Natural scores of the tile that starts at `key`, from dot products in units of unit[half].
__device__ __forceinline__ void finish_scores(const AttentionArgs& args, const RowBias* bias, const Visibility& rule,
                                              int key, const float (&unit)[2], float (&scores)[KEYS / 8][4]) {
  const bool capped = args.softcap > 0.0f;
  const float scale = capped ? args.softmax_scale / args.softcap : args.softmax_scale;
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[n][j] *= unit[j / 2] * scale;
  if (capped) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[n][j] = args.softcap * quick_tanh(scores[n][j]);
  }
  if constexpr (BIAS) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        scores[n][j] = bias[j / 2].apply(args, scores[n][j], rule.token(key + n * 8 + threadIdx.x % 4 * 2 + j % 2));
  }
}

__device__ __forceinline__ void hide_keys(const VisibleKeys& seen, const uint32_t* known, int key,
                                          float (&scores)[KEYS / 8][4]) {
  const int column = threadIdx.x % 4 * 2;
  const KeyRange range[2] = {seen.row(0), seen.row(1)};
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) {
    const uint32_t found = known[n / 4] >> (n % 4 * 8 + column);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int own = key + n * 8 + column + j % 2;
      const bool visible = own >= range[j / 2].begin && own < range[j / 2].end && (found >> j % 2 & 1) != 0;
      scores[n][j] = visible ? scores[n][j] : NEG_INF;
    }
  }
}

__device__ __forceinline__ void attend_keys(const AttentionArgs& args, int index, char* smem, RowState& state) {
  const RowTile rows(args, index);
  if (rows.visible.begin >= rows.visible.end) return;
  const KeyTiles tiles{args, smem};
  ItemKeys& keys = *reinterpret_cast<ItemKeys*>(smem + ITEM_AT);
  int tile = rows.visible.begin / KEYS;

  // 1. first addresses and scales, queries
  char* staged = Q_IN_RING ? tiles.keys(tile + 1) : smem + RING_BYTES;
  float* factors = reinterpret_cast<float*>(smem + FACTORS_AT);
  ScalesAhead<KvScales<KF, HEAD_DIM>, KvScales<VF, HEAD_DIM>> next_scales;
  {
    const ItemKeys own(args, rows);
    const TokenRequest first = tiles.ask(own, tile), second = tiles.ask(own, tile + 1);
    stage_queries(args, rows, staged, factors);
    tiles.publish(own, tile, first);
    tiles.publish(own, tile + 1, second);
    next_scales.load(tiles, own, first);
    next_scales.store(tiles, tile);
    next_scales.load(tiles, own, second);
    if (threadIdx.x == 0) keys = own;
  }
  __syncthreads();
  tiles.copy(tile);
  TokenRequest next = tiles.ask(keys, tile + 2);
  const Queries q(staged);
  const VisibleKeys seen(args, rows, smem);
  const Visibility rule(args, rows.item.seq);
  RowBias bias[2];
  if constexpr (BIAS) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      bias[half] = RowBias(args, rows.row(args, min(lane_row(half), rows.num_rows - 1)));
  }
  // plain scores are scaled on their way into exp2
  const bool plain = !BIAS && args.softcap == 0.0f && args.softmax_scale > 0.0f;
  float unit[2] = {1.0f, 1.0f}, factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (KTile::E > 2) unit[half] = factors[lane_row(half)];
    factor[half] = plain ? LOG2_E * args.softmax_scale * unit[half] : LOG2_E;
  }

  // 2. one tile per step
  for (; tile * KEYS < keys.visible.end; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there for all warps, and nobody still reads the one before
    if ((tile + 1) * KEYS < keys.visible.end) tiles.copy(tile + 1);
    next_scales.store(tiles, tile + 1);
    tiles.publish(keys, tile + 2, next);
    next_scales.load(tiles, keys, next);
    next = tiles.ask(keys, tile + 3);
    if (seen.none_seen(tile * KEYS)) continue;

    float scores[KEYS / 8][4] = {};
    multiply_keys(tiles.keys(tile), tiles.key_scales(tile), q, factors, scores);
    if (!plain) finish_scores(args, bias, rule, tile * KEYS, unit, scores);
    if (!seen.all_seen(tile * KEYS) || !tiles.all_known(tile))
      hide_keys(seen, tiles.known(tile), tile * KEYS, scores);
    state.follow(scores, factor, tiles.value_scales(tile));
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      uint32_t probs[4];
      state.make_probs(scores, factor, tiles.value_scales(tile), step, probs);
      add_values(tiles.values(tile), tiles.value_scales(tile), step, probs, state.sums);
    }
  }
}

__device__ __forceinline__ void attend_item(const AttentionArgs& args, int index, char* smem) {
  RowState state;
  attend_keys(args, index, smem, state);

  // 3. outputs, in place of the ring
  __syncthreads();
  float* found = reinterpret_cast<float*>(smem + STATE_AT);
  state.put_down(found, reinterpret_cast<float*>(smem));
  __syncthreads();
  const RowTile rows(args, index);  // again: nothing of it takes registers while keys are attended to
  merge_and_store(args, rows, {found, smem, 1, OUT_BYTES, OUT_STRIDE, 1});
  finish_item(args, rows, reinterpret_cast<int*>(smem + POINTERS_AT));
}

__device__ __forceinline__ void attend_on_tensor_cores(const AttentionArgs& args) {
  CA_DYN_SMEM(char, smem);
  for (int index = args.work.worker_items[blockIdx.x]; index < args.work.worker_items[blockIdx.x + 1]; ++index) {
    attend_item(args, index, smem);
    __syncthreads();  // before the next item overwrites shared memory
  }
}

#endif  // CUPYATTN_ATTENTION_MMA_CUH
