// SPDX-License-Identifier: Apache-2.0
// kv_append.cu - write the keys and values of new tokens into a paged or contiguous cache, and finish their queries.
//
//   for every head of every token t, a row x of q, k or v; every step only if it is asked for:
//     1. bias    x = x + bias[h,:]
//     2. norm    x = x * rsqrt(mean(x^2) + eps) * gain[h,:], with norm_centred x = x - mean(x) before (q and k)
//     3. RoPE    x = x turned by row rope_rows[t] of cos and sin, as in rope.cu                        (q and k)
//     4. log-n   x = x * log(p) / log(logn_position) for a position p > logn_position                  (q)
//     5. x is rounded to T, the only rounding so far, and q_out[t,h,:] = x, or
//        k_cache[page,slot,h,:] = encode(x), v_cache[page,slot,h,:] = encode(x)
//   With q_len tokens of each sequence, positions and rope_rows are those of the first of them; a row below 0 is then 0.
//   The place of a token is slots[t] = page * page_size + slot, or, with a page table, the page of token
//   positions[t] / key_stride of sequence batch_indices[t]. A negative slot, position or rope row, a position that is
//   another's by key_stride or below readonly, and a place outside the cache or the tables write nothing to the caches.
//   q_out is zero for a negative position or rope row and NaN for a rope row past the tables.
//   Without steps 1 to 4 a plain cache of type T receives the bits of x.
//
// launch     block (LANES, rows, tokens) of at most 128 threads, a multiple of 32 if LANES > 1. Every axis of the grid
//            strides: tokens in x, and in y tiles of `rows` heads, first those of keys, then of values, then of
//            queries, so that a block works on one kind. No shared memory, no barriers; with LANES > 1 reductions over
//            the lanes of a row. Without steps and with plain caches block.x may be any.
// aliasing   none; two tokens with one place race
// traffic    tokens * num_kv_heads * (head_dim + head_dim_v) * (sizeof(T) + bytes of a code), scales, queries twice
#include "prelude.cuh"
#include "params.h"
#include "kv_encode.cuh"
#include "page_table.cuh"
#include "pairs.cuh"
#include "warp.cuh"

using T = CA_T;                                 // k, v, q, q_out and biases
using W = CA_W;                                 // gains of the norms
using K = CA_K;                                 // format of k_cache, a tag of kv_format.cuh
using V = CA_V;                                 // format of v_cache
constexpr bool STAGES = CA_STAGES;              // steps 1 to 4 and queries
constexpr bool INTERLEAVED = CA_INTERLEAVED;    // RoPE pairs are elements (2j, 2j + 1), not (j, j + rotary_dim / 2)
constexpr bool WIDE = CA_WIDE;                  // 16-byte accesses: rows and rotary_dim / 2 are multiples of 8 elements
constexpr int LANES = CA_LANES;                 // lanes of a row, a power of two
constexpr int CHUNKS = CA_CHUNKS;               // pieces of 8 elements a lane holds: row <= LANES * CHUNKS * 8 elements
constexpr bool WHOLE_PAIRS = LANES == 1 && WIDE && !INTERLEAVED;  // a lane holds both halves of its pairs
constexpr int UNROLL = LANES == 1 ? 1 : CHUNKS; // a lane alone is the CPU's: its chunks are memory
static_assert(sizeof(KvAppendArgs) == CA_SIZEOF_ARGS, "kv_append: Python and CUDA disagree on KvAppendArgs");

// One head of one token and what happens to it; null or 0 for a step that is off.
struct Row {
  const T* x;
  const T* bias;
  const W* gain;
  bool centred;      // a layer norm, not an RMS norm
  const float* cos;  // the token's row
  const float* sin;
  int dims;          // 0: there is nothing to do, and nothing is read
  int rotary_dim;
};

__device__ __forceinline__ EightFloats load_biased(const Row& row, int d) {
  EightFloats x = load_chunk<WIDE>(row.x, d, row.dims);
  if (STAGES && row.bias != nullptr) x += load_chunk<WIDE>(row.bias, d, row.dims);
  return x;
}

// What a norm takes away and multiplies by.
struct Norm {
  float mean;
  float scale;
};

__device__ __forceinline__ void apply_norm(const Row& row, const Norm& norm, int d, EightFloats& x) {
  if (row.gain == nullptr) return;
  EightFloats gain = load_chunk<WIDE>(row.gain, d, row.dims);
  gain *= norm.scale;
  x += EightFloats::all(-norm.mean);
  x *= gain;
}

// RoPE of elements d to d + 7, which are x. The other halves of their pairs are read again.
__device__ __forceinline__ void rotate(const Row& row, const Norm& norm, int d, EightFloats& x) {
  const int half = row.rotary_dim / 2;
  if constexpr (INTERLEAVED) {
    float both[8], a[4], b[4], c[4], s[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) both[i] = x.x[i];
    split_pairs(both, a, b);
    const int inside = WIDE ? 4 : half - d / 2;  // pairs that turn
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[i] = i < inside ? row.cos[d / 2 + i] : 1.0f;
      s[i] = i < inside ? row.sin[d / 2 + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float first = a[i];
      if (WIDE || i < inside) {
        a[i] = fmaf(first, c[i], -(b[i] * s[i]));
        b[i] = fmaf(b[i], c[i], first * s[i]);
      }
    }
    merge_pairs(a, b, both);
#pragma unroll
    for (int i = 0; i < 8; ++i) x.x[i] = both[i];
  } else if constexpr (WIDE) {
    const bool first = d < half;
    const int pair = first ? d : d - half, there = first ? d + half : pair;
    EightFloats other = load_biased(row, there);
    apply_norm(row, norm, there, other);
    other *= EightFloats::load(in_global(row.sin + pair));
    other *= first ? -1.0f : 1.0f;
    other.add_product(x, EightFloats::load(in_global(row.cos + pair)));
    x = other;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (d + i >= row.rotary_dim) continue;
      const bool first = d + i < half;
      const int pair = first ? d + i : d + i - half, there = first ? pair + half : pair;
      float other = to_float(row.x[there]);
      if (row.bias != nullptr) other += to_float(row.bias[there]);
      if (row.gain != nullptr) other = (other - norm.mean) * (to_float(row.gain[there]) * norm.scale);
      x.x[i] = fmaf(x.x[i], row.cos[pair], other * (first ? -row.sin[pair] : row.sin[pair]));
    }
  }
}

// Sum over a row of x, or of the squares of x - mean.
__device__ __forceinline__ float sum_of_row(const Row& row, int lane, float mean, bool squares,
                                            const EightFloats (&x)[CHUNKS]) {
  EightFloats sums = EightFloats::all(0.0f);
#pragma unroll UNROLL
  for (int c = 0; c < CHUNKS; ++c) {
    const int d = (c * LANES + lane) * 8;
    if (LANES == 1 && d >= row.dims) break;
    EightFloats y = x[c];
    if (row.centred) {
      y += EightFloats::all(-mean);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (d + i >= row.dims) y.x[i] = 0.0f;  // past the row
    }
    sums.add_product(squares ? y : EightFloats::all(1.0f), y);
  }
  float sum = sums.sum();
  if constexpr (LANES > 1) sum = group_sum<LANES>(sum);
  return sum;
}

// Steps 1 to 3 in registers: x[c] are elements from (c * LANES + lane) * 8 on, zero past the row.
__device__ __forceinline__ void load_row(const Row& row, int lane, float eps, EightFloats (&x)[CHUNKS]) {
#pragma unroll UNROLL
  for (int c = 0; c < CHUNKS; ++c) {
    const int d = (c * LANES + lane) * 8;
    if (LANES == 1 && d >= row.dims) break;
    x[c] = load_biased(row, d);
  }
  if (!STAGES || (row.gain == nullptr && row.rotary_dim == 0)) return;
  Norm norm = {0.0f, 1.0f};
  if (row.gain != nullptr) {  // the same in all rows of a block
    if (row.centred) norm.mean = sum_of_row(row, lane, 0.0f, false, x) / static_cast<float>(row.dims);
    const float sum = sum_of_row(row, lane, norm.mean, true, x);
    norm.scale = rsqrtf(sum / static_cast<float>(row.dims) + eps);
  }
#pragma unroll UNROLL
  for (int c = 0; c < CHUNKS; ++c) {
    const int d = (c * LANES + lane) * 8;
    if (LANES == 1 && d >= row.dims) break;
    apply_norm(row, norm, d, x[c]);
    if (!WHOLE_PAIRS && d < row.rotary_dim) rotate(row, norm, d, x[c]);
  }
  if constexpr (WHOLE_PAIRS) {
    const int half = row.rotary_dim / 2;
    for (int pair = 0; pair < half; pair += 8) {
      EightFloats &first = x[pair / 8], &second = x[(pair + half) / 8];
      const EightFloats c = EightFloats::load(in_global(row.cos + pair));
      const EightFloats s = EightFloats::load(in_global(row.sin + pair));
      EightFloats a = second, b = first;
      a *= s;
      b *= s;
      a *= -1.0f;
      a.add_product(first, c);
      b.add_product(second, c);
      first = a;
      second = b;
    }
  }
}

// Where a token goes and how its heads are turned.
struct Token {
  int64_t index;
  TokenSlot at;      // page -1: not into the caches
  int64_t rope_row;  // negative: no query either
  bool known;        // the tables have its row
  float factor;      // of queries, step 4
};

__device__ __forceinline__ TokenSlot destination(const KvAppendArgs& args, int64_t token, int64_t entry,
                                                 int32_t position) {
  const PageTable& table = args.table;
  if (args.slots32 == nullptr && args.slots64 == nullptr) {
    const int64_t seq = args.batch_indices == nullptr ? entry : args.batch_indices[token * args.stride_batch_index];
    if (position < 0 || position % args.key_stride != args.key_offset || seq < 0 || seq >= args.batch) return {-1, 0};
    if (args.readonly != nullptr && position < args.readonly[seq * args.stride_readonly]) return {-1, 0};
    return find_token(table, seq, position / args.key_stride);
  }
  const int64_t slot = args.slots64 == nullptr ? args.slots32[token * args.stride_slot]
                                               : args.slots64[token * args.stride_slot];
  if (slot < 0) return {-1, 0};
  const int64_t page = slot / table.page_size;
  if (page >= table.num_pages) return {-1, 0};
  return {page, static_cast<int32_t>(slot - page * table.page_size)};
}

__device__ __forceinline__ Token find(const KvAppendArgs& args, int64_t token, bool stored) {
  Token found = {token, {-1, 0}, -1, true, 1.0f};
  if (token >= args.tokens) return found;
  int64_t entry = token;  // of positions and rope_rows
  int32_t step = 0;       // from it on
  if (args.q_len > 0) {
    entry = token / args.q_len;
    step = static_cast<int32_t>(token - entry * args.q_len);
  }
  int32_t position = args.positions == nullptr ? 0 : args.positions[entry * args.stride_position];
  if (position >= 0) position += step;
  found.rope_row = position;
  if constexpr (STAGES) {
    if (position >= 0 && (args.rope_rows != nullptr || (args.q_len > 0 && args.positions == nullptr))) {
      int64_t row = args.rope_rows == nullptr ? 0 : args.rope_rows[entry * args.stride_rope_row];
      if (args.q_len > 0) {  // a base of -1 keeps rows below 0 out before, any other after it has been added
        row = args.rope_base < 0 ? (row < 0 ? 0 : row) : row + args.rope_base;
        row = row + step < 0 ? 0 : row + step;
      }
      found.rope_row = row;
    }
    found.known = args.rotary_dim == 0 || found.rope_row < args.table_rows;
    if (position > args.logn_position && args.logn_factor != 0.0f)
      found.factor = logf(static_cast<float>(position)) * args.logn_factor;
  }
  if (stored && found.known && found.rope_row >= 0) found.at = destination(args, token, entry, position);
  return found;
}

// The row `head` of `from`; with `live` false one without elements.
__device__ __forceinline__ Row row_of(const KvAppendArgs& args, const HeadView& from, const RowView& bias,
                                      const RowView& gain, const Token& token, int head, int dims, int rotary_dim,
                                      bool live) {
  Row row = {};
  row.gain = static_cast<const W*>(gain.data);
  row.centred = args.norm_centred != 0;
  if (!live) return row;
  row.dims = dims;
  row.rotary_dim = rotary_dim;
  row.x = static_cast<const T*>(from.data) + token.index * from.stride_token + head * from.stride_head;
  if (gain.data != nullptr) row.gain += head * gain.stride_row;
  if (bias.data != nullptr) row.bias = static_cast<const T*>(bias.data) + head * bias.stride_row;
  if (rotary_dim > 0) {
    row.cos = args.cos + token.rope_row * args.stride_cos;
    row.sin = args.sin + token.rope_row * args.stride_sin;
  }
  return row;
}

__device__ __forceinline__ void append_query(const KvAppendArgs& args, const Token& token, int head, int lane) {
  const bool live = head < args.num_heads && token.index < args.tokens, turned = token.known && token.rope_row >= 0;
  const Row row = row_of(args, args.q, args.q_bias, args.q_norm, token, head, args.head_dim, args.rotary_dim,
                         live && turned);
  EightFloats x[CHUNKS];
  load_row(row, lane, args.norm_eps, x);
  if (!live) return;
  T* out = static_cast<T*>(args.q_out.data) + token.index * args.q_out.stride_token + head * args.q_out.stride_head;
#pragma unroll UNROLL
  for (int c = 0; c < CHUNKS; ++c) {
    const int d = (c * LANES + lane) * 8;
    if (LANES == 1 && d >= args.head_dim) break;
    if (turned) x[c] *= token.factor;
    else x[c] = EightFloats::all(token.known ? 0.0f : __int_as_float(0x7fffffff));
    store_chunk<WIDE>(out, d, args.head_dim, x[c]);
  }
}

// Bits of plain rows, one rounding where the types differ.
template <typename E>
__device__ __forceinline__ void copy_row(const T* x, int lane, int lanes, E* out, int dims) {
  constexpr int WIDEST = 16 / static_cast<int>(sizeof(T) > sizeof(E) ? sizeof(T) : sizeof(E));
  constexpr int VEC = WIDE ? WIDEST : 1;
  for (int d = lane * VEC; d < dims; d += lanes * VEC) {
    const Vec<T, VEC> part = load_vec<T, VEC>(in_global(x + d));
    if constexpr (SameType<T, E>::value) {
      store_global(out + d, part);
    } else {
      float values[VEC];
      to_float(part, values);
      store_global(out + d, from_float<E, VEC>(values));
    }
  }
}

template <typename F>
__device__ __forceinline__ void append_head(const KvAppendArgs& args, const Row& row, const KvPlace& to,
                                            bool makes_scale, int lane, int lanes) {
  if constexpr (!STAGES && !F::HAS_SCALE) {
    if (to.live) copy_row(row.x, lane, lanes, kv_row<typename F::Code>(to.view, to.table, to.at, to.head), to.dims);
  } else {
    if (LANES == 1 && !to.live) return;
    EightFloats x[CHUNKS];
    load_row(row, lane, args.norm_eps, x);
    if constexpr (STAGES) round_to<T, LANES>(x, row.dims);
    KvEncoder<F, LANES, CHUNKS, WIDE>::store(x, lane, to, makes_scale);
  }
}

CA_KERNEL __launch_bounds__(128, CHUNKS == 2 ? 5 : 6) void kv_append(const __grid_constant__ KvAppendArgs args) {
  const int lane = threadIdx.x, lanes = blockDim.x, y = threadIdx.y, rows = blockDim.y, step_tile = gridDim.y;
  const int kv_tiles = ceil_div(args.num_kv_heads, rows);
  const int tiles = 2 * kv_tiles + (STAGES ? ceil_div(args.num_heads, rows) : 0);
  const int64_t step_token = static_cast<int64_t>(gridDim.x) * blockDim.z;
  // all threads of a block go round together: rows past the end have nothing to do but take part in reductions
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.z; first < args.tokens; first += step_token) {
    const Token token = find(args, first + threadIdx.z, static_cast<int>(blockIdx.y) < 2 * kv_tiles);
    for (int tile = blockIdx.y; tile < tiles; tile += step_tile) {
      if (tile < 2 * kv_tiles) {
        const bool value = tile >= kv_tiles;
        const int head = (value ? tile - kv_tiles : tile) * rows + y;
        const bool live = token.at.page >= 0 && head < args.num_kv_heads;
        if (value) {
          const Row row = row_of(args, args.v, args.v_bias, RowView{}, token, head, args.head_dim_v, 0, live);
          append_head<V>(args, row, {args.v_cache, args.v_scale, args.table, token.at, head, args.head_dim_v, live},
                         args.v_makes_scale != 0, lane, lanes);
        } else {
          const Row row = row_of(args, args.k, args.k_bias, args.k_norm, token, head, args.head_dim, args.rotary_dim,
                                 live);
          append_head<K>(args, row, {args.k_cache, args.k_scale, args.table, token.at, head, args.head_dim, live},
                         args.k_makes_scale != 0, lane, lanes);
        }
      } else if constexpr (STAGES) {
        append_query(args, token, (tile - 2 * kv_tiles) * rows + y, lane);
      }
    }
  }
}
