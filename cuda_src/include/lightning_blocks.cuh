// SPDX-License-Identifier: Apache-2.0
// lightning_blocks.cuh - lightning_attention of many tokens per sequence, in blocks of block_size tokens, on CUDA cores.
//
//   block of m tokens i, j = 1..m that starts with state KV, d = exp(-slope):
//     out_i = scale * (d^i q_i . KV + sum_{j <= i} d^(i-j) (q_i . k_j) v_j)
//     KV   <- d^m KV + sum_j d^(m-j) k_j (outer) v_j
//
// A thread block has `columns` value dims of one head of one sequence and takes the sequence's blocks in order, with the
// state in shared memory. A block of more than `tile` tokens is cut into tiles: every tile of queries meets every tile of
// keys up to its own, then all tiles of keys go into the state. All four products are those of row-major matrices in
// shared memory; a thread has ROWS rows, apart by the number of row tiles, and 8 columns of the result at a time.
//
// launch     grid ((batch + 1) * heads * slices), block any, one-dimensional, at most 128 threads
//            dynamic shared memory, in floats: round_up(block_size + 1, 4) + tile * (key_dim + 4) + key_dim * (tile + 4)
//            + tile * (tile + 4) + (tile + key_dim) * columns, + tile * columns when block_size > tile
// aliasing   none allowed
// traffic    the state once each way; queries and keys once for each slice of the value dims, keys and values once more
//            where a block has several tiles (and once for each tile of queries behind them)
//
// Bits: not those of the one-token kernel, but the same for the same block_size. An infinity or NaN in a key or value
// also reaches earlier rows of its tile (0 * inf).
#ifndef CUPYATTN_LIGHTNING_BLOCKS_CUH
#define CUPYATTN_LIGHTNING_BLOCKS_CUH

constexpr int PAD = 4;  // floats between rows, so that threads that read neighbouring rows read different banks

// A row-major matrix in shared memory.
struct Matrix {
  float* at;
  int stride;  // floats between rows, a multiple of 4

  __device__ __forceinline__ float* row(int r) const { return at + r * stride; }
};

struct BlockMemory {
  float* powers;  // [block_size + 1] d^n
  Matrix q;       // [tile, key_dim]
  Matrix k;       // [key_dim, tile] transposed
  Matrix scores;  // [tile, tile]
  Matrix v;       // [tile, columns]
  Matrix state;   // [key_dim, columns]
  Matrix out;     // [tile, columns] sums over the tiles of keys so far; only with block_size > tile

  __device__ __forceinline__ BlockMemory(const LightningAttentionArgs& args, float* shared) {
    powers = shared;
    shared += ceil_div(args.block_size + 1, 4) * 4;
    q = take(shared, args.tile, args.key_dim + PAD);
    k = take(shared, args.key_dim, args.tile + PAD);
    scores = take(shared, args.tile, args.tile + PAD);
    v = take(shared, args.tile, args.columns);
    state = take(shared, args.key_dim, args.columns);
    out = {shared, args.columns};
  }
  static __device__ __forceinline__ Matrix take(float*& shared, int rows, int stride) {
    const Matrix found = {shared, stride};
    shared += rows * stride;
    return found;
  }
};

// sum[r] += a[first + r * step, 0 to inner) . b[0 to inner, column to column + 8); inner a multiple of 4.
__device__ __forceinline__ void add_products(EightFloats (&sum)[ROWS], const Matrix& a, int first, int step,
                                             const Matrix& b, int column, int inner) {
  const float* a_row = a.row(first);
  const float* b_row = b.at + column;
  for (int n = 0; n < inner; n += 4) {
    Vec<float, 4> factors[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) factors[r] = load_vec<float, 4>(a_row + r * step * a.stride + n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const EightFloats numbers = EightFloats::load(b_row + (n + i) * b.stride);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) sum[r].add_product(factors[r].v[i], numbers);
    }
  }
}

// Calls work(first row, step, first column) for every ROWS rows and 8 columns of a matrix; the threads share them.
template <typename Work>
__device__ __forceinline__ void for_tiles(int rows, int columns, Work work) {
  const int row_tiles = rows / ROWS, column_tiles = columns / 8;
  for (int i = threadIdx.x; i < row_tiles * column_tiles; i += blockDim.x) {
    const int row = i / column_tiles;
    work(row, row_tiles, (i - row * column_tiles) * 8);
  }
}

struct Blocks {
  const LightningAttentionArgs& args;
  const Part part;
  const BlockMemory memory;
  const float slope;

  __device__ __forceinline__ Blocks(const LightningAttentionArgs& a, float* shared)
      : args(a), part(a), memory(a, shared), slope(a.slopes[part.head * a.stride_slope]) {}

  // Rows past `count` are zeros, here and below: whatever the tokens of the next sequence hold stays out.
  __device__ __forceinline__ void load_queries(int64_t token, int count) const {
    const int pieces = args.key_dim / VEC;
    for (int i = threadIdx.x; i < args.tile * pieces; i += blockDim.x) {
      const int t = i / pieces, d = (i - t * pieces) * VEC;
      const Numbers x = t < count ? load_numbers(part.row_of(args.q, token + t) + d) : Numbers::all(0.0f);
      x.store(memory.q.row(t) + d);
    }
  }
  __device__ __forceinline__ void load_keys(int64_t token, int count) const {
    const int key_pieces = args.key_dim / VEC, value_pieces = part.count / VEC;
    for (int i = threadIdx.x; i < args.tile * key_pieces; i += blockDim.x) {
      const int piece = i / args.tile, t = i - piece * args.tile;  // neighbours store to neighbouring banks
      const bool there = t < count && !is_masked(args, token + t);
      const Numbers x = there ? load_numbers(part.row_of(args.k, token + t) + piece * VEC) : Numbers::all(0.0f);
#pragma unroll
      for (int n = 0; n < VEC; ++n) memory.k.row(piece * VEC + n)[t] = x.x[n];
    }
    for (int i = threadIdx.x; i < args.tile * value_pieces; i += blockDim.x) {
      const int t = i / value_pieces, c = (i - t * value_pieces) * VEC;
      const bool there = t < count && !is_masked(args, token + t);
      const Numbers x = there ? load_numbers(part.row_of(args.v, token + t) + part.first + c) : Numbers::all(0.0f);
      x.store(memory.v.row(t) + c);
    }
  }

  // scores[i, j] = d^(i - j) q_i . k_j for query i, `ahead` tokens after the tile of keys, and key j up to it; else 0.
  __device__ __forceinline__ void make_scores(int ahead) const {
    for_tiles(args.tile, args.tile, [&](int row, int step, int column) {
      EightFloats sum[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) sum[r] = EightFloats::all(0.0f);
      add_products(sum, memory.q, row, step, memory.k, column, args.key_dim);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int distance = ahead + row + r * step - column - j;
          // past block_size only in rows and columns of no token
          const bool counts = distance >= 0 && distance <= args.block_size;
          sum[r].x[j] = counts ? sum[r].x[j] * memory.powers[distance] : 0.0f;
        }
        sum[r].store(memory.scores.row(row + r * step) + column);
      }
    });
  }

  // Adds a tile of keys to a tile of queries, whose first token is number `place` of the block; the first tile of keys
  // comes with the state, after the last one the result goes out.
  __device__ __forceinline__ void add_values(int64_t token, int count, int place, bool is_first, bool is_last) const {
    for_tiles(args.tile, part.count, [&](int row, int step, int column) {
      EightFloats sum[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        sum[r] = is_first ? EightFloats::all(0.0f) : EightFloats::load(memory.out.row(row + r * step) + column);
      if (is_first) {
        add_products(sum, memory.q, row, step, memory.state, column, args.key_dim);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const int number = place + row + r * step + 1;
          sum[r] *= memory.powers[number <= args.block_size ? number : 0];
        }
      }
      add_products(sum, memory.scores, row, step, memory.v, column, args.tile);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int t = row + r * step;
        if (!is_last) {
          sum[r].store(memory.out.row(t) + column);
        } else if (t < count) {
          sum[r] *= args.scale;
          store_result(part.row_of(args.out, token + t) + part.first + column, sum[r]);
        }
      }
    });
  }
  static __device__ __forceinline__ void store_result(T* to, const EightFloats& x) {
#pragma unroll
    for (int n = 0; n < 8; n += VEC) {
      Numbers piece;
#pragma unroll
      for (int i = 0; i < VEC; ++i) piece.x[i] = x.x[n + i];
      store_numbers(to + n, piece);
    }
  }

  // Adds the tile of keys to the state, after a block's `loss` of it or none; the tile's last token is `behind` tokens
  // before the block's last one.
  __device__ __forceinline__ void update_state(int count, int behind, float loss) const {
    const int pieces = part.count / 8;
    for (int i = threadIdx.x; i < count * pieces; i += blockDim.x) {
      const int t = i / pieces;
      float* place = memory.v.row(t) + (i - t * pieces) * 8;
      EightFloats x = EightFloats::load(place);
      x *= memory.powers[behind + count - 1 - t];
      x.store(place);
    }
    __syncthreads();
    for_tiles(args.key_dim, part.count, [&](int row, int step, int column) {
      EightFloats sum[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        sum[r] = EightFloats::load(memory.state.row(row + r * step) + column);
        sum[r].add_product(loss, sum[r]);
      }
      add_products(sum, memory.k, row, step, memory.v, column, args.tile);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) sum[r].store(memory.state.row(row + r * step) + column);
    });
  }

  __device__ __forceinline__ void attend_block(int64_t begin, int size) const {
    const int tiles = ceil_div(size, args.tile);
    const auto tokens_of = [&](int tile) {
      const int left = size - tile * args.tile;
      return left < args.tile ? left : args.tile;
    };
    // 1. outputs
    for (int queries = 0; queries < tiles; ++queries) {
      const int64_t token = begin + queries * args.tile;
      load_queries(token, tokens_of(queries));
      for (int keys = 0; keys <= queries; ++keys) {
        load_keys(begin + keys * args.tile, tokens_of(keys));
        __syncthreads();
        make_scores((queries - keys) * args.tile);
        __syncthreads();
        add_values(token, tokens_of(queries), queries * args.tile, keys == 0, keys == queries);
        __syncthreads();
      }
    }
    // 2. the state: the last tile first, for it is still there
    for (int keys = tiles - 1; keys >= 0; --keys) {
      if (keys < tiles - 1) {
        load_keys(begin + keys * args.tile, args.tile);
        __syncthreads();
      }
      const int count = tokens_of(keys);
      update_state(count, size - keys * args.tile - count, keys == tiles - 1 ? loss_of(slope, size) : 0.0f);
      __syncthreads();
    }
  }

  // The state between global and shared memory.
  template <typename Move>
  __device__ __forceinline__ void move_state(Move move) const {
    const int pieces = part.count / VEC;
    for (int i = threadIdx.x; i < args.key_dim * pieces; i += blockDim.x) {
      const int row = i / pieces, column = (i - row * pieces) * VEC;
      move(part.state + row * args.stride_key + column, memory.state.row(row) + column);
    }
  }

  __device__ __forceinline__ void run() const {
    int64_t begin, end;
    part.tokens_of(args, begin, end);
    if (begin >= end) return;
    if (part.state == nullptr) {
      part.store_zeros(args, begin, end);
      return;
    }
    for (int n = threadIdx.x; n <= args.block_size; n += blockDim.x)
      memory.powers[n] = n == 0 ? 1.0f : expf(-slope * static_cast<float>(n));
    const bool is_fresh = part.is_fresh;
    move_state([&](const S* far, float* near) {
      const Numbers x = is_fresh ? Numbers::all(0.0f) : load_numbers(far);
      x.store(near);
    });
    __syncthreads();
    for (; begin < end; begin += args.block_size)
      attend_block(begin, end - begin < args.block_size ? static_cast<int>(end - begin) : args.block_size);
    move_state([](S* far, const float* near) { store_numbers(far, Numbers::load(near)); });
  }
};

__device__ __forceinline__ void attend_in_blocks(const LightningAttentionArgs& args) {
  CA_DYN_SMEM(float, shared);
  const Blocks blocks(args, shared);
  blocks.run();
}

#endif  // CUPYATTN_LIGHTNING_BLOCKS_CUH
