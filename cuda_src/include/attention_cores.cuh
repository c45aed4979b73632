// SPDX-License-Identifier: Apache-2.0
// attention_cores.cuh - attention on CUDA cores: any types, formats, alignments; decode and prefill alike. Included by a
// kernel file after its constants T, KF, VF, ROWS, STEP, ALIGNED and BIAS; the kernel is one call of attend_on_cores.
//
// A block takes its work items one after the other. Of an item its warps take tiles of 64 keys, counted from the
// sequence's first local key, so that neither the batch nor the window decides which warp adds what: tile t is that of
// warp t % warps. In a tile
//   scores  a lane has two keys; their dot products with all ROWS rows are its own, no lane needs another
//   softmax one meeting of the warp for the largest score of every row; probabilities go through shared memory
//   P.V     a lane has 8 output dims of all rows, for every groups-th key; value rows come straight from memory
// Where rows come from (pages, scales) is looked up two tiles ahead. On a GPU keys pass through shared memory in slices
// of 128 bytes, the next slice on its way while this one is used.
//
// launch  grid (workers), block (32 * warps), dynamic shared memory as struct Layout: cores_shared_bytes in
//         cupyattn/attention_args.py
// meets   per tile 2 of the warp and one per slice of keys; per item 2 of the block, 2 more for a partial result
#ifndef CUPYATTN_ATTENTION_CORES_CUH
#define CUPYATTN_ATTENTION_CORES_CUH

#include "attention_store.cuh"
#include "attention_work.cuh"
#include "cp_async.cuh"
#include "eight_floats.cuh"
#include "hadamard.cuh"
#include "kv_format.cuh"
#include "page_table.cuh"
#include "warp.cuh"

constexpr int TILE = KEY_TILE;                             // keys of a warp's step: a lane has `lane` and `lane + 32`
constexpr int KEYS = TILE / 32;                            // of a lane
constexpr bool BY_ROWS = ROWS >= (CA_CPU ? 8 : 4);         // q is [head_dim][ROWS] in shared memory, else [ROWS][head_dim]
constexpr int PROB_STRIDE = ROWS <= 4 ? ROWS : ROWS + 4;   // floats: 8 lanes of a 16-byte access do not conflict
constexpr int SLICE = KF::HAS_SCALE ? 256 : 128 / static_cast<int>(sizeof(typename KF::Code));  // dims of a slice of keys
constexpr int BATCH = CA_CPU ? 1 : ROWS <= 4 ? 4 : ROWS == 8 ? 2 : 1;  // value rows a lane loads before it uses them

static_assert(ROWS <= 2 || ROWS % 4 == 0, "probabilities move in pieces of 16 bytes");

// ---- where the rows of a tile are ----------------------------------------------------------------------

// Of the keys or values of a tile, in shared memory: row pointers, null for keys in no page or out of sight, and the
// rows' scales, or where those of groups of dims start.
template <typename F>
struct Places {
  using Code = typename F::Code;
  using Scale = typename F::Scale;
  static constexpr bool ROW_SCALE = F::HAS_SCALE && F::GROUP == 0, GROUP_SCALE = F::HAS_SCALE && F::GROUP == 32;
  static constexpr int BYTES = (ROW_SCALE || GROUP_SCALE ? 16 : 8) * TILE;
  char* memory;

  __device__ __forceinline__ const Code*& row(int t) const { return reinterpret_cast<const Code**>(memory)[t]; }
  __device__ __forceinline__ RowScale& scale(int t) const { return reinterpret_cast<RowScale*>(memory + 8 * TILE)[t]; }
  __device__ __forceinline__ const Scale*& groups(int t) const {
    return reinterpret_cast<const Scale**>(memory + 8 * TILE)[t];
  }
  __device__ __forceinline__ void look_up(const KvView& view, const KvScale& scales, const PageTable& table,
                                          TokenSlot at, int head, int t) const {
    row(t) = kv_row<const Code>(view, table, at, head);
    if constexpr (ROW_SCALE) scale(t) = at.page < 0 ? RowScale{0.0f, 0.0f} : load_row_scale<F>(scales, table, at, head);
    if constexpr (GROUP_SCALE) groups(t) = at.page < 0 ? nullptr : kv_scale<const Scale>(scales, table, at, head, 0);
  }
  // Dims d to d + 7 of row t, which starts at `from`.
  template <bool IS_ALIGNED>
  __device__ __forceinline__ EightFloats eight(const Code* from, int t, const KvScale& scales, int head_dim,
                                               int d) const {
    EightFloats x = F::template eight<IS_ALIGNED>(from, head_dim, d);
    if constexpr (ROW_SCALE) apply_scale<F>(x, scale(t));
    if constexpr (GROUP_SCALE) apply_scale<F>(x, {to_float(groups(t)[d / 32 * scales.stride_group]), 0.0f});
    return x;
  }
};

struct TilePlaces {
  static constexpr int BYTES = Places<KF>::BYTES + Places<VF>::BYTES;
  Places<KF> keys;
  Places<VF> values;
  __device__ __forceinline__ explicit TilePlaces(char* memory) : keys{memory}, values{memory + Places<KF>::BYTES} {}
};

// ---- slices of keys ------------------------------------------------------------------------------------

// Dims of up to TILE keys of one warp, SLICE at a time, two slices in turn. A lane that read its own key from global
// memory would leave most of every sector unused, so the warp copies whole rows to shared memory. The fused host body
// has no sectors: keys are read where they are.
struct KeySlices {
  using Code = typename KF::Code;
#if CA_CPU && CA_FUSED
  static constexpr bool READS_ALIGNED = ALIGNED;
#else
  static constexpr bool READS_ALIGNED = true;
#endif
  char* memory;
  int key_bytes;  // of a key in shared memory: an odd number of 16-byte pieces, so lanes reading keys do not conflict

  static __device__ __forceinline__ int bytes_of_key(int head_dim) {
    const int bytes = KF::row_codes(min(head_dim, SLICE)) * static_cast<int>(sizeof(Code));
    return (ceil_div(bytes, 16) | 1) * 16;
  }
  // Starts copying dims from `from` on.
  __device__ __forceinline__ void fetch(const Places<KF>& keys, int head_dim, int from, int turn, int lane) const {
#if !(CA_CPU && CA_FUSED)
    const int codes = KF::row_codes(min(SLICE, head_dim - from));
    char* to = memory + turn * TILE * key_bytes;
    if constexpr (ALIGNED) {
      const int bytes = codes * static_cast<int>(sizeof(Code));
      const int piece = min(bytes & -bytes, 16);  // 16, or 8 or 4 in short rows of codes: 32 pieces at most
      const int pieces = bytes / piece;
      const int at_once = 32 / pieces;
      const int group = lane / pieces;
      const int at = (lane - group * pieces) * piece;
      int first = group < at_once ? group : TILE;
      if (pieces == 2 || pieces == 4) {  // 8 lanes then write 4 or 2 rows: those `pieces` apart lie in different banks
        const int rows = 8 / pieces;
        first = (group & ~7) + group % rows * pieces + (group & 7) / rows;
      }
      for (int t = first; t < TILE; t += at_once) {
        if (keys.row(t) == nullptr) continue;
        const char* row = reinterpret_cast<const char*>(keys.row(t) + from) + at;
        char* copy = to + t * key_bytes + at;
        if (piece == 16) cp_async16(copy, row);
        else if (piece == 8) cp_async8(copy, row);
        else cp_async4(copy, row);
      }
    } else {
      for (int t = 0; t < TILE; ++t) {
        if (keys.row(t) == nullptr) continue;
        for (int i = lane; i < codes; i += 32)
          reinterpret_cast<Code*>(to + t * key_bytes)[i] = keys.row(t)[from + i];
      }
    }
    cp_async_commit();
#endif
  }
  // The slice fetched last is there and that of the other turn no longer in use.
  __device__ __forceinline__ void wait() const {
#if !(CA_CPU && CA_FUSED)
    cp_async_wait<0>();
    __syncwarp();
#endif
  }
  // Row t of the slice of dims from `from` on; the first of those is at 0.
  __device__ __forceinline__ const Code* row(const Places<KF>& keys, int t, int from, int turn) const {
#if CA_CPU && CA_FUSED
    return keys.row(t) + from;
#else
    return reinterpret_cast<const Code*>(memory + (turn * TILE + t) * key_bytes);
#endif
  }
};

// ---- a block's memory ----------------------------------------------------------------------------------

// Dynamic shared memory, in bytes from its start.
struct Layout {
  int lanes;       // lanes that share one value row, STEP elements each
  int groups;      // value rows a warp reads at once
  int key_bytes;   // KeySlices
  int warp_bytes;  // slices of keys of one warp, later its unnormalised outputs
  int stage;       // [warps][warp_bytes]
  int places;      // [warps][3] TilePlaces
  int probs;       // float [warps][TILE][PROB_STRIDE]
  int q;           // float, see BY_ROWS
  int state;       // float [warps][2][ROWS]: top and sum of each warp
  int keys;        // int [2][ROWS]: first visible key, first one after
  int arrived;     // int [ROWS]
  int biases;      // RowBias [ROWS] where BIAS

  __device__ __forceinline__ Layout(int head_dim, int head_dim_v, int warps) {
    lanes = head_dim_v / STEP;
    groups = 32 / lanes;
    key_bytes = KeySlices::bytes_of_key(head_dim);
    warp_bytes = max(2 * TILE * key_bytes, groups * head_dim_v * ROWS * static_cast<int>(sizeof(float)));
    stage = 0;
    places = stage + warps * warp_bytes;
    probs = places + warps * 3 * TilePlaces::BYTES;
    q = probs + warps * TILE * PROB_STRIDE * static_cast<int>(sizeof(float));
    biases = q + ROWS * head_dim * static_cast<int>(sizeof(float));
    state = biases + (BIAS ? ROWS * static_cast<int>(sizeof(RowBias)) : 0);
    keys = state + warps * 2 * ROWS * static_cast<int>(sizeof(float));
    arrived = keys + 2 * ROWS * static_cast<int>(sizeof(int));
  }
};

// ---- queries -------------------------------------------------------------------------------------------

// What a block knows of the query rows of its item, in shared memory.
struct Queries {
  float* q;
  int* keys;
  RowBias* biases;

  // Rows as float32, in the basis and with the scale per dim of the keys; rows past num_rows are zeros.
  template <typename F = KF>  // so that what the format does not need is not compiled
  __device__ __forceinline__ void load(const AttentionArgs& args, const RowTile& rows) const {
    constexpr int WIDTH = F::ROTATED ? 32 : STEP;  // dims a thread prepares: a rotation mixes 32
    const int head_dim = args.head_dim;
    for (int i = threadIdx.x; i < ROWS * head_dim / WIDTH; i += blockDim.x) {
      const int r = i % ROWS, dim = i / ROWS * WIDTH;
      EightFloats x[WIDTH / STEP];
      if (r < rows.num_rows) {
        const T* row = static_cast<const T*>(query_pointer(args.q, args, rows.row(args, r), sizeof(T)));
#pragma unroll
        for (int n = 0; n < WIDTH / STEP; ++n) x[n] = EightFloats::from(load_step<ALIGNED>(row + dim + n * STEP));
      } else {
#pragma unroll
        for (int n = 0; n < WIDTH / STEP; ++n) x[n] = EightFloats::all(0.0f);
      }
      if constexpr (F::ROTATED) hadamard32(x);
      if constexpr (F::CHANNEL) {
        const EightFloats scale = channel_scales(args.k_scale, rows.item.kv_head, dim);
#pragma unroll
        for (int j = 0; j < STEP; ++j) x[0].x[j] *= scale.x[j];
      }
#pragma unroll
      for (int n = 0; n < WIDTH / STEP; ++n) {
        if constexpr (BY_ROWS) {
#pragma unroll
          for (int j = 0; j < STEP; ++j) q[(dim + n * STEP + j) * ROWS + r] = x[n].x[j];
        } else {
          x[n].store(q + r * head_dim + dim + n * STEP);
        }
      }
    }
    for (int r = threadIdx.x; r < ROWS; r += blockDim.x) {
      const KeyRange seen = rows.keys(args, r);
      keys[r] = seen.begin;
      keys[ROWS + r] = seen.end;
      if constexpr (BIAS) biases[r] = r < rows.num_rows ? RowBias(args, rows.row(args, r)) : RowBias();
    }
  }
};

// ---- numbers of all rows -------------------------------------------------------------------------------

using RowFloats = Floats<ROWS>;

// What exponents are taken relative to: see softmax_origin of one row.
__device__ __forceinline__ RowFloats softmax_origin(const RowFloats& top) {
  RowFloats out;
#if CA_CPU
  out.x = top.x == NEG_INF ? RowFloats::Numbers{} : top.x;
#else
#pragma unroll
  for (int r = 0; r < ROWS; ++r) out.x[r] = softmax_origin(top.x[r]);
#endif
  return out;
}

// Scores of key `key`, -inf for rows that do not see it; rows see keys from first[r] up to, without, first[ROWS + r].
__device__ __forceinline__ void hide(RowFloats& scores, int key, const int* first) {
#if CA_CPU
  ca::VectorOf<ROWS>::Ints begin{}, end{};
  __builtin_memcpy(&begin, first, 4 * ROWS);
  __builtin_memcpy(&end, first + ROWS, 4 * ROWS);
  scores.x = (begin <= key) & (end > key) ? scores.x : NEG_INF - RowFloats::Numbers{};
#else
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
    if (key < first[r] || key >= first[ROWS + r]) scores.x[r] = NEG_INF;
#endif
}

// The largest over the warp, or the sum, of every row.
__device__ __forceinline__ RowFloats warp_maximum(const RowFloats& x) {
  alignas(16) float each[ROWS];
  x.store(each);
  warp_max(each);
  return RowFloats::load(each);
}
__device__ __forceinline__ RowFloats warp_total(const RowFloats& x) {
  alignas(16) float each[ROWS];
  x.store(each);
  warp_sum(each);
  return RowFloats::load(each);
}

// Dot products of a lane's keys with all rows. TOGETHER: a vector has a number of every row, else 8 dims of one row.
template <bool TOGETHER>
struct Dots;

template <>
struct Dots<true> {
  // Sums of every CHAINS-th dim: a vector unit that has one warp to serve must not wait for its last addition.
  static constexpr int CHAINS = CA_CPU ? 4 : 1;
  RowFloats x[KEYS][CHAINS];

  __device__ __forceinline__ Dots() {
#pragma unroll
    for (auto& of_key : x) {
#pragma unroll
      for (RowFloats& part : of_key) part = RowFloats::all(0.0f);
    }
  }
  // What dims d to d + 7 of the first N keys contribute.
  template <int N>
  __device__ __forceinline__ void add(const EightFloats (&key)[N], const float* q, int, int d) {
    const float* dims = q + d * ROWS;
#pragma unroll
    for (int j = 0; j < STEP; ++j) {
      const RowFloats rows = RowFloats::load(dims + j * ROWS);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i][j % CHAINS].add_product(key[i].x[j], rows);
    }
  }
  __device__ __forceinline__ RowFloats of(int i) const {
    RowFloats out = x[i][0];
#pragma unroll
    for (int n = 1; n < CHAINS; ++n) out += x[i][n];
    return out;
  }
};

template <>
struct Dots<false> {
  EightFloats x[KEYS][ROWS];

  __device__ __forceinline__ Dots() {
#pragma unroll
    for (auto& of_key : x) {
#pragma unroll
      for (EightFloats& parts : of_key) parts = EightFloats::all(0.0f);
    }
  }
  template <int N>
  __device__ __forceinline__ void add(const EightFloats (&key)[N], const float* q, int head_dim, int d) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const EightFloats row = EightFloats::load(q + r * head_dim + d);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i][r].add_product(key[i], row);
    }
  }
  __device__ __forceinline__ RowFloats of(int i) const {
    RowFloats out = RowFloats::all(0.0f);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) out.x[r] = x[i][r].sum();
    return out;
  }
};

// Outputs of all rows in the lane's 8 dims, unnormalised.
template <bool TOGETHER>
struct Outputs;

template <>
struct Outputs<true> {
  RowFloats x[STEP];

  __device__ __forceinline__ Outputs() {
#pragma unroll
    for (RowFloats& of_dim : x) of_dim = RowFloats::all(0.0f);
  }
  __device__ __forceinline__ void shrink(const RowFloats& factors) {
#pragma unroll
    for (RowFloats& of_dim : x) of_dim *= factors;
  }
  __device__ __forceinline__ void add(const float* probs, const EightFloats& value) {
    const RowFloats p = RowFloats::load(probs);
#pragma unroll
    for (int j = 0; j < STEP; ++j) x[j].add_product(value.x[j], p);
  }
  __device__ __forceinline__ EightFloats row(int r) const {
    EightFloats out;
#pragma unroll
    for (int j = 0; j < STEP; ++j) out.x[j] = x[j].x[r];
    return out;
  }
};

template <>
struct Outputs<false> {
  EightFloats x[ROWS];

  __device__ __forceinline__ Outputs() {
#pragma unroll
    for (EightFloats& of_row : x) of_row = EightFloats::all(0.0f);
  }
  __device__ __forceinline__ void shrink(const RowFloats& factors) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) x[r] *= factors.x[r];
  }
  __device__ __forceinline__ void add(const float* probs, const EightFloats& value) {
    const RowFloats p = RowFloats::load(probs);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) x[r].add_product(p.x[r], value);
  }
  __device__ __forceinline__ EightFloats row(int r) const { return x[r]; }
};

// ---- a tile --------------------------------------------------------------------------------------------

// What is the same in all tiles of a warp.
struct WarpTiles {
  const AttentionArgs& args;
  const RowTile& rows;
  Queries queries;
  KeySlices slices;
  Visibility rule;
  int lane;

  __device__ __forceinline__ void look_up(int tile, const TilePlaces& to) const {
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      const int t = i * 32 + lane;
      const int key = tile * TILE + t;
      TokenSlot at = {-1, 0};
      if (key >= rows.visible.begin && key < rows.visible.end) at = find_token(args.table, rows.item.seq, key);
      to.keys.look_up(args.k, args.k_scale, args.table, at, rows.item.kv_head, t);
      to.values.look_up(args.v, args.v_scale, args.table, at, rows.item.kv_head, t);
    }
  }

  // Dot products of the lane's first N keys with all rows; `turn` counts slices. The next tile's first slice is on its
  // way afterwards.
  template <int N>
  __device__ __forceinline__ void dot_products(const TilePlaces& places, const TilePlaces& next, int& turn,
                                               Dots<BY_ROWS>& dots) const {
    // a key without a row is read as another one of the lane; if there is none, nothing is read
    int t[N];
    bool any = false;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool is_there = places.keys.row(i * 32 + lane) != nullptr;
      t[i] = (is_there ? i : N - 1 - i) * 32 + lane;
      any |= is_there;
    }
    for (int from = 0; from < args.head_dim; from += SLICE, turn ^= 1) {
      slices.wait();
      const bool more = from + SLICE < args.head_dim;
      const Places<KF> to_fetch = {more ? places.keys.memory : next.keys.memory};
      slices.fetch(to_fetch, args.head_dim, more ? from + SLICE : 0, turn ^ 1, lane);
      if (!any) continue;
      const typename KF::Code* row[N];
#pragma unroll
      for (int i = 0; i < N; ++i) row[i] = slices.row(places.keys, t[i], from, turn);
      const int end = min(SLICE, args.head_dim - from);
#pragma unroll 1  // unrolled it takes too many registers
      for (int d = 0; d < end; d += STEP) {
        EightFloats key[N];
#pragma unroll
        for (int i = 0; i < N; ++i)
          key[i] = places.keys.eight<KeySlices::READS_ALIGNED>(row[i], t[i], args.k_scale, args.head_dim, d);
        dots.add(key, queries.q, args.head_dim, from + d);
      }
    }
  }

  // Makes scores in log2 units of the dot products of the lane's key i, -inf where a row does not see it.
  __device__ __forceinline__ void finish_scores(int tile, int i, const TilePlaces& places, RowFloats& scores) const {
    const int t = i * 32 + lane;
    const int key = places.keys.row(t) == nullptr ? -1 : tile * TILE + t;  // -1: nobody sees it
    scores *= args.softmax_scale;
    if (args.softcap > 0.0f) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) scores.x[r] = args.softcap * tanhf(scores.x[r] / args.softcap);
    }
    if constexpr (BIAS) {
      bool seen = false;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (key < queries.keys[r] || key >= queries.keys[ROWS + r]) continue;
        scores.x[r] = queries.biases[r].apply(args, scores.x[r], rule.token(key));
        seen |= scores.x[r] > NEG_INF;
      }
      // a mask may hide a key whose value is no number: 0 times it would still be seen
      if (!seen) places.values.row(t) = nullptr;
    }
    scores *= LOG2_E;
    hide(scores, key, queries.keys);
  }
};

// ---- the kernel ----------------------------------------------------------------------------------------

__device__ __forceinline__ void attend_to_item(const AttentionArgs& args, int item, char* smem) {
  const RowTile rows(args, item);
  const int warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Layout at(args.head_dim, args.head_dim_v, warps);
  char* stage = smem + at.stage + warp * at.warp_bytes;
  float* probs = reinterpret_cast<float*>(smem + at.probs) + warp * TILE * PROB_STRIDE;
  const Queries queries = {reinterpret_cast<float*>(smem + at.q), reinterpret_cast<int*>(smem + at.keys),
                           reinterpret_cast<RowBias*>(smem + at.biases)};
  const WarpTiles warp_tiles = {args, rows, queries, {stage, at.key_bytes}, Visibility(args, rows.item.seq), lane};

  // 1. queries; where the rows of the first two tiles are
  TilePlaces here(smem + at.places + warp * 3 * TilePlaces::BYTES);
  TilePlaces next(here.keys.memory + TilePlaces::BYTES);
  TilePlaces after(next.keys.memory + TilePlaces::BYTES);
  int tile = rows.visible.begin / TILE;
  tile += (warp + warps - tile % warps) % warps;
  queries.load(args, rows);
  warp_tiles.look_up(tile, here);
  warp_tiles.look_up(tile + warps, next);
  __syncthreads();

  // 2. tiles
  float* state = reinterpret_cast<float*>(smem + at.state) + warp * 2 * ROWS;  // tops here: registers are short
  if (lane == 0) RowFloats::all(NEG_INF).store(state);
  RowFloats sum = RowFloats::all(0.0f);  // of this lane's keys alone
  Outputs<BY_ROWS> outputs;
  const int group = lane / at.lanes;  // lanes past groups * lanes have no part in P.V
  const int dim = (lane - group * at.lanes) * STEP;
  int turn = 0;
  warp_tiles.slices.fetch(here.keys, args.head_dim, 0, turn, lane);
  for (; tile * TILE < rows.visible.end; tile += warps) {
    // 2a. scores
    Dots<BY_ROWS> dots;
    if (tile * TILE + 32 < rows.visible.end) warp_tiles.dot_products<KEYS>(here, next, turn, dots);
    else warp_tiles.dot_products<1>(here, next, turn, dots);
    RowFloats score[KEYS];
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      score[i] = dots.of(i);
      warp_tiles.finish_scores(tile, i, here, score[i]);
    }

    // 2b. probabilities relative to the largest score so far; earlier sums shrink when it grows
    const RowFloats found = warp_maximum(maximum(score[0], score[1]));
    const RowFloats old_top = RowFloats::load(state);
    const RowFloats top = maximum(old_top, found);
    const RowFloats origin = softmax_origin(top);
    const RowFloats shrink = exp2(old_top - origin);
    sum *= shrink;
    outputs.shrink(shrink);
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      const int t = i * 32 + lane;
      const RowFloats p = exp2(score[i] - origin);
      sum += p;
      p.store(probs + t * PROB_STRIDE);
    }
    warp_tiles.look_up(tile + 2 * warps, after);
    __syncwarp();
    if (lane == 0) top.store(state);

    // 2c. the lane's 8 output dims over the group's keys, BATCH rows on their way at a time
    const int live = min(TILE, rows.visible.end - tile * TILE);
    for (int first = group < at.groups ? group : live; first < live; first += BATCH * at.groups) {
      const typename VF::Code* row[BATCH];
      EightFloats value[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int t = first + i * at.groups;
        row[i] = t < live ? here.values.row(t) : nullptr;
        if (row[i] != nullptr) value[i] = here.values.eight<ALIGNED>(row[i], t, args.v_scale, args.head_dim_v, dim);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (row[i] != nullptr) outputs.add(probs + (first + i * at.groups) * PROB_STRIDE, value[i]);
    }
    const TilePlaces done = here;
    here = next, next = after, after = done;
  }

  // 3. put down what each warp has
  sum = warp_total(sum);
  if (lane == 0) sum.store(state + ROWS);
  if (group < at.groups) {
    float* to = reinterpret_cast<float*>(stage) + group * ROWS * args.head_dim_v + dim;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) outputs.row(r).store(to + r * args.head_dim_v);
  }
  __syncthreads();

  // 4. merge and store. The next item writes nothing that is read here before the block has met again.
  const RowTile again(args, item);  // worked out anew: in registers it would keep keys out
  merge_and_store(args, again, {reinterpret_cast<const float*>(smem + at.state), smem + at.stage, warps, at.warp_bytes, args.head_dim_v, at.groups});
  finish_item(args, again, reinterpret_cast<int*>(smem + at.arrived));
}

__device__ __forceinline__ void attend_on_cores(const AttentionArgs& args) {
  CA_DYN_SMEM(char, smem);
  const int end = args.work.worker_items[blockIdx.x + 1];
  for (int item = args.work.worker_items[blockIdx.x]; item < end; ++item) attend_to_item(args, item, smem);
}

#endif  // CUPYATTN_ATTENTION_CORES_CUH
