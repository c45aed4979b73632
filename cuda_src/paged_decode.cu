// SPDX-License-Identifier: Apache-2.0
// paged_decode.cu - attention of the newest tokens of each sequence over its paged cache.
//
//   query i of sequence b stands at token  n = cache_seqlens[b] - q_len + i  and sees the tokens t with
//   max(cache_starts[b], n - window_size + 1) <= t <= n  whose page id is in range:
//     s[t] = softcap(softmax_scale * q[b,i,h] . k[t,g]),  g = h / heads_per_kv
//     out[b,i,h] = sum_t exp(s[t]) v[t,g] / (sum_t exp(s[t]) + exp(sinks[h])),  lse = log(sum_t exp(s[t]))
//   Scores, softmax and sums in float32; one rounding on store (tensor cores also round exp(s) to T before P.V).
//
// The keys are cut in chunks of 1024 tokens from each sequence's start, whatever the batch around it. A chunk writes
// a normalised partial result and its lse (-inf for a chunk without visible keys, whose partial_out is left alone);
// split_reduce merges them. When the table holds one chunk at most, the result is written directly, same bits.
//
// launch     grid (batch * num_kv_heads * row_tiles, num_chunks), block (32 * warps); a block owns ROWS of the
//            q_len * heads_per_kv query rows that share a KV head. Dynamic shared memory: see shared_bytes in
//            ops/paged_decode.py. A warp takes every warps-th tile of 32 tokens; 3 warp-level meetings per tile,
//            2 block barriers in all.
// aliasing   none allowed
// traffic    every visible key and value row once per row tile
#include "prelude.cuh"
#include "params.h"
#include "online_softmax.cuh"
#include "page_table.cuh"
#include "warp.cuh"

using T = CA_T;                           // q and out
using KV = CA_KV;                         // caches
constexpr int ROWS = CA_ROWS;             // query rows of a block
constexpr bool ALIGNED = CA_ALIGNED;      // k, v and out rows start at multiples of 16 bytes
constexpr int CHUNK = 1024;               // tokens
constexpr int TILE = 32;                  // tokens of a warp's step, one per lane
constexpr int STEP = 8;                   // elements a lane handles at a time
static_assert(sizeof(PagedDecodeArgs) == CA_SIZEOF_ARGS, "paged_decode: Python and CUDA disagree on PagedDecodeArgs");

// 8 elements, in 16-byte pieces or one by one. (A whole Vec<float, 8> in memory would have to be 32-byte aligned.)
template <bool IS_ALIGNED, typename E>
__device__ __forceinline__ Vec<E, STEP> load_step(const E* p) {
  constexpr int WIDTH = IS_ALIGNED ? 16 / static_cast<int>(sizeof(E)) : 1;
  Vec<E, STEP> out;
#pragma unroll
  for (int i = 0; i < STEP; i += WIDTH) store_vec(out.v + i, load_vec<E, WIDTH>(p + i));
  return out;
}

template <bool IS_ALIGNED, typename E>
__device__ __forceinline__ void store_step(E* p, const Vec<E, STEP>& x) {
  constexpr int WIDTH = IS_ALIGNED ? 16 / static_cast<int>(sizeof(E)) : 1;
#pragma unroll
  for (int i = 0; i < STEP; i += WIDTH) store_vec(p + i, load_vec<E, WIDTH>(x.v + i));
}

// The query rows of a block and the tokens they see.
struct RowTile {
  int64_t seq;       // sequence
  int64_t kv_head;   // KV head
  int first_row;     // of the q_len * heads_per_kv rows of (seq, kv_head), token-major
  int num_rows;      // of this block, at most ROWS
  int position;      // token of query 0
  int start;         // first visible key of the sequence
  int window;        // window_size, or past any length

  __device__ __forceinline__ explicit RowTile(const PagedDecodeArgs& args) {
    const int block = blockIdx.x;
    const int pair = block / args.row_tiles;
    seq = pair / args.num_kv_heads;
    kv_head = pair - seq * args.num_kv_heads;
    first_row = (block - pair * args.row_tiles) * ROWS;
    num_rows = min(ROWS, args.q_len * args.heads_per_kv - first_row);
    position = args.cache_seqlens[seq * args.stride_seqlens] - args.q_len;
    start = args.cache_starts == nullptr ? 0 : max(0, args.cache_starts[seq * args.stride_starts]);
    window = args.window_size > 0 ? args.window_size : 0x7fffffff;
  }
  __device__ __forceinline__ int query(const PagedDecodeArgs& args, int r) const {
    return (first_row + r) / args.heads_per_kv;
  }
  __device__ __forceinline__ int head(const PagedDecodeArgs& args, int r) const {
    return static_cast<int>(kv_head) * args.heads_per_kv + (first_row + r) % args.heads_per_kv;
  }
  // Visible tokens of row r: [first_key, last_key], empty for rows past num_rows.
  __device__ __forceinline__ int last_key(const PagedDecodeArgs& args, int r) const {
    return r < num_rows ? position + query(args, r) : -1;
  }
  __device__ __forceinline__ int first_key(const PagedDecodeArgs& args, int r) const {
    const int n = position + query(args, r);
    return max(start, n < window ? 0 : n - window + 1);
  }
  // Index of row r in arrays [batch, q_len, num_heads].
  __device__ __forceinline__ int64_t flat(const PagedDecodeArgs& args, int r) const {
    return (seq * args.q_len + query(args, r)) * (args.num_kv_heads * args.heads_per_kv) + head(args, r);
  }
};

__device__ __forceinline__ int64_t total_rows(const PagedDecodeArgs& args) {
  return static_cast<int64_t>(args.batch) * args.q_len * args.num_kv_heads * args.heads_per_kv;
}

// Marks this block's rows of chunk blockIdx.y as having seen no key.
__device__ __forceinline__ void store_empty(const PagedDecodeArgs& args, const RowTile& rows) {
  const int r = threadIdx.x;
  if (r < rows.num_rows) args.partial_lse[blockIdx.y * total_rows(args) + rows.flat(args, r)] = NEG_INF;
}

// Stores 8 outputs of row r from `dim` on and, once per row, its lse: as the final result or as a partial one.
__device__ __forceinline__ void store_row(const PagedDecodeArgs& args, const RowTile& rows, int r, int dim,
                                          float (&values)[STEP], float lse) {
  const int64_t flat = rows.flat(args, r);
  if (args.num_chunks > 1) {
    const int64_t row = blockIdx.y * total_rows(args) + flat;
    Vec<float, STEP> out;
#pragma unroll
    for (int j = 0; j < STEP; ++j) out.v[j] = values[j];
    store_step<true>(args.partial_out + row * args.head_dim + dim, out);
    if (dim == 0) args.partial_lse[row] = lse;
    return;
  }
  if (args.sinks != nullptr) {
    const float share = sink_share(lse, args.sinks[rows.head(args, r)]);
#pragma unroll
    for (int j = 0; j < STEP; ++j) values[j] *= share;
  }
  T* out = static_cast<T*>(args.out.data) + rows.seq * args.out.stride_seq +
           rows.query(args, r) * args.out.stride_token + rows.head(args, r) * args.out.stride_head;
  store_step<ALIGNED>(out + dim, from_float<T, STEP>(values));
  if (dim == 0 && args.lse != nullptr) args.lse[flat] = lse;
}

// Dynamic shared memory, in bytes from its start; mirrored by _shared_bytes in ops/paged_decode.py.
struct Layout {
  int lanes;      // lanes that share one token's row, STEP elements each
  int groups;     // tokens a warp reads at once
  int key_bytes;  // staged key row: an odd number of 16-byte pieces, so 32 lanes reading rows do not conflict
  int warp_bytes; // staged keys of one warp, later its unnormalised outputs
  int q;          // float [ROWS][head_dim]
  int keys;       // float2-like int [ROWS][2]: first and last visible token
  int state;      // float [warps][2][ROWS]: top and sum of each warp
  int probs;      // float [warps][TILE][ROWS]
  int slots;      // const KV* [warps][2][2][TILE]: key and value rows of a tile, of this step and of the next
  int stage;      // [warps][warp_bytes]

  __device__ __forceinline__ Layout(int head_dim, int warps) {
    lanes = head_dim / STEP;
    groups = 32 / lanes;
    key_bytes = (head_dim * static_cast<int>(sizeof(KV)) / 16 | 1) * 16;
    warp_bytes = max(TILE * key_bytes, groups * ROWS * head_dim * static_cast<int>(sizeof(float)));
    slots = 0;
    stage = slots + warps * 4 * TILE * static_cast<int>(sizeof(void*));
    q = stage + warps * warp_bytes;
    probs = q + ROWS * head_dim * static_cast<int>(sizeof(float));
    state = probs + warps * TILE * ROWS * static_cast<int>(sizeof(float));
    keys = state + warps * 2 * ROWS * static_cast<int>(sizeof(float));
  }
};

CA_KERNEL __launch_bounds__(128) void paged_decode(const __grid_constant__ PagedDecodeArgs args) {
  CA_DYN_SMEM(unsigned char, smem);
  const RowTile rows(args);
  const int head_dim = args.head_dim;
  const int warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  // 1. tokens of this chunk that any row sees: tiles [first_tile, last_tile) of the sequence
  const int chunk_begin = blockIdx.y * CHUNK;
  const int begin = max(chunk_begin, rows.first_key(args, 0));
  const int end = min(chunk_begin + CHUNK, rows.last_key(args, rows.num_rows - 1) + 1);
  if (args.num_chunks > 1 && begin >= end) {
    store_empty(args, rows);
    return;
  }

  const Layout at(head_dim, warps);
  float* q = reinterpret_cast<float*>(smem + at.q);
  int* keys = reinterpret_cast<int*>(smem + at.keys);
  float* probs = reinterpret_cast<float*>(smem + at.probs) + warp * TILE * ROWS;
  const KV** slots = reinterpret_cast<const KV**>(smem + at.slots) + warp * 4 * TILE;
  unsigned char* stage = smem + at.stage + warp * at.warp_bytes;

  // 2. queries as float32, visible range of each row
  for (int i = threadIdx.x; i < ROWS * head_dim; i += blockDim.x) {
    const int r = i / head_dim;
    float value = 0.0f;
    if (r < rows.num_rows) {
      const T* row = static_cast<const T*>(args.q.data) + rows.seq * args.q.stride_seq +
                     rows.query(args, r) * args.q.stride_token + rows.head(args, r) * args.q.stride_head;
      value = to_float(row[i - r * head_dim]);
    }
    q[i] = value;
  }
  if (threadIdx.x < ROWS) {
    keys[2 * threadIdx.x] = rows.first_key(args, threadIdx.x);
    keys[2 * threadIdx.x + 1] = rows.last_key(args, threadIdx.x);
  }

  // The lane's token of a tile: row pointers of its key and value, null when no row sees it.
  const auto look_up = [&](int token, const KV** to) {
    TokenSlot slot = {-1, 0};
    if (token >= begin && token < end) slot = find_token(args.table, rows.seq, token);
    to[lane] = kv_row<KV>(args.k, slot, rows.kv_head);
    to[TILE + lane] = kv_row<KV>(args.v, slot, rows.kv_head);
  };

  // 3. tiles of 32 tokens, counted from the chunk's start: warp w takes w, w + warps, ...
  float top[ROWS], sum[ROWS], acc[ROWS][STEP];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    top[r] = NEG_INF;
    sum[r] = 0.0f;  // of this lane's tokens alone
#pragma unroll
    for (int j = 0; j < STEP; ++j) acc[r][j] = 0.0f;
  }
  const int group = lane / at.lanes;  // lanes past groups * lanes have no part in copying and P.V
  const int dim = (lane - group * at.lanes) * STEP;
  const int stride = group < at.groups ? at.groups : TILE;
  const int step = warps * TILE;
  int token = chunk_begin + (warp + (begin - chunk_begin) / TILE / warps * warps) * TILE;
  if (token + TILE <= begin) token += step;
  look_up(token + lane, slots);
  __syncthreads();
  for (int parity = 0; token < end; token += step, parity ^= 1) {
    const KV** key_rows = slots + parity * 2 * TILE;
    const KV** value_rows = key_rows + TILE;

    // 3a. copy the keys to shared memory, whole rows at a time
    for (int t = group < at.groups ? group : TILE; t < TILE; t += stride) {
      if (key_rows[t] == nullptr) continue;
      store_step<true>(reinterpret_cast<KV*>(stage + t * at.key_bytes) + dim, load_step<ALIGNED>(key_rows[t] + dim));
    }
    __syncwarp();

    // 3b. scores of the lane's token
    float score[ROWS], tile_top[ROWS];
    if (key_rows[lane] != nullptr) {
      float dot[ROWS][STEP];
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int j = 0; j < STEP; ++j) dot[r][j] = 0.0f;
      const KV* key = reinterpret_cast<const KV*>(stage + lane * at.key_bytes);
      for (int d = 0; d < head_dim; d += STEP) {
        float k[STEP];
        to_float(load_step<true>(key + d), k);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int j = 0; j < STEP; ++j) dot[r][j] += k[j] * q[r * head_dim + d + j];
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float total = ((dot[r][0] + dot[r][1]) + (dot[r][2] + dot[r][3])) +
                            ((dot[r][4] + dot[r][5]) + (dot[r][6] + dot[r][7]));
        const bool visible = token + lane >= keys[2 * r] && token + lane <= keys[2 * r + 1];
        score[r] = visible ? scaled_score(total, args.softmax_scale, args.softcap) : NEG_INF;
      }
    } else {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) score[r] = NEG_INF;
    }

    // 3c. probabilities relative to the largest score so far; earlier sums shrink when it grows
#pragma unroll
    for (int r = 0; r < ROWS; ++r) tile_top[r] = score[r];
    warp_max(tile_top);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float old_top = top[r];
      top[r] = fmaxf(old_top, tile_top[r]);
      const float origin = softmax_origin(top[r]);
      const float shrink = exp2f(old_top - origin);
      const float p = exp2f(score[r] - origin);
      sum[r] = sum[r] * shrink + p;
      probs[lane * ROWS + r] = p;
#pragma unroll
      for (int j = 0; j < STEP; ++j) acc[r][j] *= shrink;
    }
    look_up(token + step + lane, slots + (parity ^ 1) * 2 * TILE);
    __syncwarp();

    // 3d. the lane's 8 output dims over the group's tokens
#pragma unroll 4
    for (int t = group < at.groups ? group : TILE; t < TILE; t += stride) {
      if (value_rows[t] == nullptr) continue;
      float v[STEP];
      to_float(load_step<ALIGNED>(value_rows[t] + dim), v);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float p = probs[t * ROWS + r];
#pragma unroll
        for (int j = 0; j < STEP; ++j) acc[r][j] += p * v[j];
      }
    }
  }

  // 4. put down what each warp has
  warp_sum(sum);
  float* state = reinterpret_cast<float*>(smem + at.state);
  if (lane == 0) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      state[(warp * 2 + 0) * ROWS + r] = top[r];
      state[(warp * 2 + 1) * ROWS + r] = sum[r];
    }
  }
  if (group < at.groups) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      Vec<float, STEP> out;
#pragma unroll
      for (int j = 0; j < STEP; ++j) out.v[j] = acc[r][j];
      store_step<true>(reinterpret_cast<float*>(stage) + (group * ROWS + r) * head_dim + dim, out);
    }
  }
  __syncthreads();

  // 5. merge warps and groups in their order; a thread owns 8 outputs of a row
  for (int item = threadIdx.x; item < rows.num_rows * at.lanes; item += blockDim.x) {
    const int r = item / at.lanes;
    const int first = (item - r * at.lanes) * STEP;
    float row_top = NEG_INF, row_sum = 0.0f, out[STEP] = {};
    for (int w = 0; w < warps; ++w) row_top = fmaxf(row_top, state[w * 2 * ROWS + r]);
    const float origin = softmax_origin(row_top);
    for (int w = 0; w < warps; ++w) {
      const float weight = exp2f(state[w * 2 * ROWS + r] - origin);
      row_sum += weight * state[(w * 2 + 1) * ROWS + r];
      const float* part = reinterpret_cast<const float*>(smem + at.stage + w * at.warp_bytes);
      for (int g = 0; g < at.groups; ++g) {
        const Vec<float, STEP> x = load_step<true>(part + (g * ROWS + r) * head_dim + first);
#pragma unroll
        for (int j = 0; j < STEP; ++j) out[j] += weight * x.v[j];
      }
    }
    const float scale = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
#pragma unroll
    for (int j = 0; j < STEP; ++j) out[j] *= scale;
    store_row(args, rows, r, first, out, natural_lse(row_top, row_sum));
  }
}
