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
// Two versions: CUDA cores (below; any types, any alignment, sm_75) and tensor cores (paged_decode_mma.cuh; T == KV of
// 16 bits, 16-byte rows, sm_80).
//
// launch     grid (batch * num_kv_heads * row_tiles, num_chunks), block (32 * warps); a block owns ROWS of the
//            q_len * heads_per_kv query rows that share a KV head.
//            CUDA cores: dynamic shared memory as struct Layout; a warp takes every warps-th tile of 32 tokens; 3
//            warp-level meetings per tile, 2 block barriers in all. Tensor cores: see paged_decode_mma.cuh.
// aliasing   out == q is allowed: a block reads its query rows before it writes them
// traffic    every visible key and value row once per row tile
#include "prelude.cuh"
#include "params.h"
#include "cp_async.cuh"
#include "eight_floats.cuh"
#include "warp.cuh"

using T = CA_T;                       // q and out
using KV = CA_KV;                     // caches
constexpr int ROWS = CA_ROWS;         // query rows of a block
constexpr int HEAD_DIM = CA_HEAD_DIM; // tensor cores: head_dim padded to this; CUDA cores: 0, any
constexpr bool ALIGNED = CA_ALIGNED;  // k, v and out rows start at multiples of 16 bytes
constexpr int CHUNK = 1024;           // tokens
constexpr int STEP = 8;               // elements a thread handles at a time
static_assert(sizeof(PagedDecodeArgs) == CA_SIZEOF_ARGS, "paged_decode: Python and CUDA disagree on PagedDecodeArgs");

#include "paged_decode_rows.cuh"

#if CA_TENSOR_CORES
#include "paged_decode_mma.cuh"

CA_KERNEL __launch_bounds__(32 * WARPS) void paged_decode_mma(const __grid_constant__ PagedDecodeArgs args) {
  decode_on_tensor_cores(args);
}

#else

constexpr int TILE = 32;  // tokens of a warp's step, one per lane
constexpr int BATCH = 4;  // value rows a lane loads before it uses them

// 8 elements from global to shared memory, without passing through registers where that is possible.
__device__ __forceinline__ void copy_step(KV* shared, const KV* global) {
  if constexpr (ALIGNED) {
#pragma unroll
    for (int i = 0; i < STEP; i += 16 / static_cast<int>(sizeof(KV))) cp_async16(shared + i, global + i);
  } else {
    store_step<true>(shared, load_step<false>(global));
  }
}

// Dynamic shared memory, in bytes from its start; mirrored by _shared_bytes in ops/paged_decode.py.
struct Layout {
  int lanes;      // lanes that share one token's row, STEP elements each
  int groups;     // tokens a warp reads at once
  int key_bytes;  // staged key row: an odd number of 16-byte pieces, so 32 lanes reading rows do not conflict
  int warp_bytes; // staged keys of one warp, later its unnormalised outputs
  int q;          // float [ROWS][head_dim]
  int keys;       // int [ROWS][2]: first and last visible token
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

// The second bound keeps ptxas from spilling a few bytes for one more resident block.
CA_KERNEL __launch_bounds__(128, ROWS > 4 ? 2 : 3) void paged_decode(const __grid_constant__ PagedDecodeArgs args) {
  CA_DYN_SMEM(char, smem);
  const RowTile rows(args);
  const int head_dim = args.head_dim;
  const int warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  // 1. tokens of this chunk that any row sees
  const TokenRange chunk = visible_tokens(args, rows);
  const int chunk_begin = chunk.start, begin = chunk.begin, end = chunk.end;
  if (args.num_chunks > 1 && begin >= end) {
    store_empty(args, rows);
    return;
  }

  const Layout at(head_dim, warps);
  float* q = reinterpret_cast<float*>(smem + at.q);
  int* keys = reinterpret_cast<int*>(smem + at.keys);
  float* probs = reinterpret_cast<float*>(smem + at.probs) + warp * TILE * ROWS;
  const KV** slots = reinterpret_cast<const KV**>(smem + at.slots) + warp * 4 * TILE;
  char* stage = smem + at.stage + warp * at.warp_bytes;

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
    to[lane] = kv_row<KV>(args.k, args.table, slot, rows.kv_head);
    to[TILE + lane] = kv_row<KV>(args.v, args.table, slot, rows.kv_head);
  };

  // 3. tiles of 32 tokens, counted from the chunk's start: warp w takes w, w + warps, ...
  float top[ROWS], sum[ROWS];
  EightFloats acc[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    top[r] = NEG_INF;
    sum[r] = 0.0f;  // of this lane's tokens alone
    acc[r] = EightFloats::all(0.0f);
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
      if (key_rows[t] != nullptr) copy_step(reinterpret_cast<KV*>(stage + t * at.key_bytes) + dim, key_rows[t] + dim);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();

    // 3b. scores of the lane's token
    float score[ROWS], tile_top[ROWS];
    if (key_rows[lane] != nullptr) {
      EightFloats dot[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) dot[r] = EightFloats::all(0.0f);
      const KV* key = reinterpret_cast<const KV*>(stage + lane * at.key_bytes);
#pragma unroll 1  // unrolled it takes too many registers
      for (int d = 0; d < head_dim; d += STEP) {
        const EightFloats k = EightFloats::from(load_step<true>(key + d));
#pragma unroll
        for (int r = 0; r < ROWS; ++r) dot[r].add_product(k, EightFloats::load(q + r * head_dim + d));
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const bool visible = token + lane >= keys[2 * r] && token + lane <= keys[2 * r + 1];
        score[r] = visible ? scaled_score(dot[r].sum(), args.softmax_scale, args.softcap) : NEG_INF;
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
      acc[r] *= shrink;
    }
    look_up(token + step + lane, slots + (parity ^ 1) * 2 * TILE);
    __syncwarp();

    // 3d. the lane's 8 output dims over the group's tokens, BATCH rows on their way at a time
    for (int first = group < at.groups ? group : TILE; first < TILE; first += BATCH * stride) {
      Vec<KV, STEP> values[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const KV* row = first + i * stride < TILE ? value_rows[first + i * stride] : nullptr;
        values[i] = row == nullptr ? Vec<KV, STEP>{} : load_step<ALIGNED>(row + dim);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const EightFloats v = EightFloats::from(values[i]);
        const float* p = probs + (first + i * stride) % TILE * ROWS;  // past TILE: of any token, times zeros
#pragma unroll
        for (int r = 0; r < ROWS; ++r) acc[r].add_product(p[r], v);
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
    float* out = reinterpret_cast<float*>(stage) + group * ROWS * head_dim + dim;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) acc[r].store(out + r * head_dim);
  }
  __syncthreads();

  // 5. merge and store
  merge_and_store(args, rows, {state, smem + at.stage, at.warp_bytes, head_dim, at.groups});
}

#endif  // CA_TENSOR_CORES
