// SPDX-License-Identifier: Apache-2.0
// selective_dual.cuh - a piece of selective_scan.cu as products of matrices, 32 tokens at a time. Part of that file.
//
// With one step d[t] and rate A per head, s[t] = sum of d * A over the tile's tokens up to t, and h its first state:
//   u[j]   = d[j] * x[j]
//   M[i,j] = exp(s[i] - s[j]) * (C[i] . B[j]) for j <= i
//   y[i]   = exp(s[i]) * (C[i] . h) + sum_j M[i,j] * u[j]
//   h'     = exp(s[end]) * h + sum_j exp(s[end] - s[j]) * u[j] outer B[j]
// Each product is cut into tiles of a few rows times VEC columns, one per thread, float32 on CUDA cores. s is double
// and a token's d * A limited to 200, whose exponential is 0 or infinite all the same: a difference of sums keeps the
// digits of small steps behind large ones.
// shared     with state_size rounded up to N, a multiple of 4: floats B [N, 36], state [N, DIMS + 4], C [32, N + 4],
//            u twice [32, DIMS], M [32, 36]; and 96 floats and 32 doubles of tokens. Five barriers per 32 tokens
constexpr int DIMS = CA_DIMS;    // of a block, a multiple of VEC
constexpr int TOKENS = 32;
constexpr int ROUNDS = 4;        // groups of four numbers that a thread asks for before it waits
constexpr int B_STRIDE = TOKENS + 4, STATE_STRIDE = DIMS + 4, M_STRIDE = TOKENS + 4;  // against bank conflicts
constexpr float FAR = 200.0f;

using Columns = Floats<VEC>;

struct Shared {
  double* sums;     // [TOKENS] s
  float* steps;     // [TOKENS] d
  float* from;      // [TOKENS] exp(s)
  float* until;     // [TOKENS] exp(s[end] - s)
  float* u;         // [TOKENS, DIMS]
  float* weighed;   // [TOKENS, DIMS] until * u
  float* b;         // [states, B_STRIDE]
  float* state;     // [states, STATE_STRIDE]
  float* m;         // [TOKENS, M_STRIDE]
  float* c;         // [TOKENS, states + 4]
  int states;       // state_size rounded up to a multiple of 4; those past it are 0

  __device__ __forceinline__ Shared(float* memory, int state_size)
      : sums(reinterpret_cast<double*>(memory)), steps(memory + 2 * TOKENS), from(steps + TOKENS),
        until(from + TOKENS), u(until + TOKENS), weighed(u + TOKENS * DIMS), b(weighed + TOKENS * DIMS),
        state(b + ceil_div(state_size, 4) * 4 * B_STRIDE), m(state + ceil_div(state_size, 4) * 4 * STATE_STRIDE),
        c(m + TOKENS * M_STRIDE), states(ceil_div(state_size, 4) * 4) {}
};

// sums[r] += a[r * stride_a + k] * b[k * stride_b ...] for k < count, a multiple of 4 as the strides are
template <int ROWS>
__device__ __forceinline__ void add_products(Columns (&sums)[ROWS], const float* a, int stride_a, const float* b,
                                             int stride_b, int count) {
  for (int k = 0; k < count; k += 4) {
    Vec<float, 4> factors[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) factors[r] = load_vec<float, 4>(a + r * stride_a + k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Columns columns = Columns::load(b + (k + i) * stride_b);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) sums[r].add_product(factors[r].v[i], columns);
    }
  }
}

// Of the i-th group of four states that is loaded: its token, its first state.
__device__ __forceinline__ int token_of(int i) { return i / 4 % 8 + i / 32 % (TOKENS / 8) * 8; }
__device__ __forceinline__ int state_of(int i) { return (i % 4 + i / TOKENS / 4 * 4) * 4; }

// B, C, steps and s of `count` tokens from `tile` on; behind the last barrier u.
__device__ __forceinline__ void load_tile(const SelectiveScanArgs& args, const Shared& shared, const Piece& piece,
                                          int tile, int count, int head, int first_dim) {
  const SelectiveInputs& in = args.in;
  const int64_t group = head / in.heads_per_group;
  for (int t = threadIdx.x; t < TOKENS; t += blockDim.x) {
    shared.steps[t] = t < count ? step_size<DT>(in, piece.first + tile + t, head, 0) : 0.0f;
  }
  // four states of eight tokens, then the next four states: whole sectors to read, few bank conflicts to write
  const int quads = ceil_div(shared.states, 16) * 4;
  const bool b_aligned = rows_are_aligned<T>(in.B), c_aligned = rows_are_aligned<T>(in.C);
  for (int first = threadIdx.x; first < TOKENS * quads; first += ROUNDS * blockDim.x) {
    Floats<4> b[ROUNDS], c[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const int t = token_of(first + r * blockDim.x), n = state_of(first + r * blockDim.x);
      const int there = t < count ? in.state_size - n : 0;
      b[r] = load_part<4>(row_of<T>(in.B, piece, tile + t, group) + n, there, b_aligned);
      if (OUTPUTS) c[r] = load_part<4>(row_of<T>(in.C, piece, tile + t, group) + n, there, c_aligned);
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const int t = token_of(first + r * blockDim.x), n = state_of(first + r * blockDim.x);
      if (n >= shared.states) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) shared.b[(n + j) * B_STRIDE + t] = b[r].x[j];
      if (OUTPUTS) c[r].store(shared.c + t * (shared.states + 4) + n);
    }
  }
  __syncthreads();
  const float rate = *channel(in.A, head, 0);
  for (int t = threadIdx.x; t < TOKENS; t += blockDim.x) {
    double sum = 0.0, at = 0.0;
    for (int j = 0; j < TOKENS; ++j) {
      const float log = shared.steps[j] * rate;
      sum += log < -FAR ? -FAR : log > FAR ? FAR : log;
      if (j == t) at = sum;
    }
    shared.sums[t] = at;
    shared.from[t] = expf(static_cast<float>(at));
    shared.until[t] = expf(static_cast<float>(sum - at));
  }
  __syncthreads();
  const bool x_aligned = rows_are_aligned<T>(in.x);
  constexpr int ACROSS = DIMS / 4;
  for (int first = threadIdx.x; first < TOKENS * ACROSS; first += ROUNDS * blockDim.x) {
    Floats<4> x[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const int i = first + r * blockDim.x, t = i / ACROSS, dim = first_dim + i % ACROSS * 4;
      x[r] = load_part<4>(row_of<T>(in.x, piece, tile + t, head) + dim, t < count ? in.head_dim - dim : 0, x_aligned);
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const int i = first + r * blockDim.x, t = i / ACROSS;
      if (t >= TOKENS) break;
      x[r] *= shared.steps[t];
      x[r].store(shared.u + i * 4);
      x[r] *= shared.until[t];
      x[r].store(shared.weighed + i * 4);
    }
  }
}

// M, two rows of VEC columns per thread; nothing reads tiles above the diagonal.
__device__ __forceinline__ void make_m(const Shared& shared) {
  constexpr int ROWS = 2, ACROSS = TOKENS / VEC;
  const int states = shared.states;
  for (int tile = threadIdx.x; tile < TOKENS / ROWS * ACROSS; tile += blockDim.x) {
    const int row = tile / ACROSS * ROWS, column = tile % ACROSS * VEC;
    if (column > row / 4 * 4 + 3) continue;
    Columns sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r] = Columns::all(0.0f);
    add_products(sums, shared.c + row * (states + 4), states + 4, shared.b + column, B_STRIDE, states);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const int i = row + r, from = column + j;
        const bool is_seen = from <= i;
        const float decay = is_seen ? expf(static_cast<float>(shared.sums[i] - shared.sums[from])) : 0.0f;
        shared.m[i * M_STRIDE + from] = is_seen ? decay * sums[r].x[j] : 0.0f;
      }
    }
  }
}

// D of VEC dims; of no dim, or without D, 0.
__device__ __forceinline__ Columns skips_of(const SelectiveInputs& in, int head, int dim) {
  Columns skips = Columns::all(0.0f);
  if (in.D.data != nullptr) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      if (dim + j < in.head_dim) skips.x[j] = *channel(in.D, head, dim + j);
    }
  }
  return skips;
}

__device__ __forceinline__ void make_outputs(const SelectiveScanArgs& args, const Shared& shared, const Piece& piece,
                                             int tile, int count, int head, int first_dim) {
  constexpr int ROWS = 4, ACROSS = DIMS / VEC;
  const SelectiveInputs& in = args.in;
  const int states = shared.states;
  const bool has_skip = in.D.data != nullptr, has_gate = in.z.data != nullptr;
  const HeadView& gates = has_gate ? in.z : in.x;
  const bool aligned = rows_are_aligned<T>(in.x) && rows_are_aligned<T>(gates) && rows_are_aligned<T>(args.out);
  for (int at = threadIdx.x; at < TOKENS / ROWS * ACROSS; at += blockDim.x) {
    const int row = at / ACROSS * ROWS, column = at % ACROSS * VEC;
    if (row >= count) continue;
    const int dim = first_dim + column;
    Columns sums[ROWS], x[ROWS], z[ROWS];
    const Columns skips = skips_of(in, head, dim);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {  // these are on their way while the products are made
      const int there = row + r < count ? in.head_dim - dim : 0;
      x[r] = load_part<VEC>(row_of<T>(in.x, piece, tile + row + r, head) + dim, has_skip ? there : 0, aligned);
      z[r] = load_part<VEC>(row_of<T>(gates, piece, tile + row + r, head) + dim, has_gate ? there : 0, aligned);
      sums[r] = Columns::all(0.0f);
    }
    add_products(sums, shared.c + row * (states + 4), states + 4, shared.state + column, STATE_STRIDE, states);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r] *= shared.from[row + r];
    add_products(sums, shared.m + row * M_STRIDE, M_STRIDE, shared.u + column, DIMS, row + ROWS);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (row + r >= count) break;
      if (has_skip) sums[r].add_product(skips, x[r]);
      if (has_gate) sums[r] *= silu(z[r]);
      T* out = out_row(args, piece, tile + row + r, head) + dim;
      if (aligned && dim + VEC <= in.head_dim) {
        store_floats<VEC>(out, sums[r]);
      } else {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          if (dim + j < in.head_dim) out[j] = from_float<T>(sums[r].x[j]);
        }
      }
    }
  }
}

__device__ __forceinline__ void advance_state(const Shared& shared) {
  constexpr int ROWS = 4, ACROSS = DIMS / VEC;
  const float kept = shared.from[TOKENS - 1];
  for (int at = threadIdx.x; at < shared.states / ROWS * ACROSS; at += blockDim.x) {
    const int row = at / ACROSS * ROWS, column = at % ACROSS * VEC;
    Columns sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sums[r] = Columns::load(shared.state + (row + r) * STATE_STRIDE + column);
      sums[r] *= kept;
    }
    add_products(sums, shared.b + row * B_STRIDE, B_STRIDE, shared.weighed + column, DIMS, TOKENS);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r].store(shared.state + (row + r) * STATE_STRIDE + column);
  }
}

__device__ __forceinline__ void scan_by_products(const SelectiveScanArgs& args) {
  CA_DYN_SMEM(float, memory);
  const int head = blockIdx.y, first_dim = blockIdx.z * DIMS;
  const int dims = min(DIMS, args.in.head_dim - first_dim);
  const Work work(args, blockIdx.x, head);
  const Piece& piece = work.piece;
  if (!work.is_needed()) {
    const int first = first_dim + threadIdx.x;
    if (OUTPUTS && !work.has_slot) write_zeros(args, piece, head, first, first_dim + dims, blockDim.x);
    return;
  }
  if (piece.begin == piece.end) return;
  const Shared shared(memory, args.in.state_size);

  // 1. the state the piece begins with
  const int quads = shared.states / 4;
  for (int first = threadIdx.x; first < DIMS * quads; first += ROUNDS * blockDim.x) {
    Floats<4> four[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const int i = first + r * blockDim.x, dim = i / quads, n = i % quads * 4;
      four[r] = dim < dims ? work.begin_four(first_dim + dim, n, args.in.state_size) : Floats<4>::all(0.0f);
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const int i = first + r * blockDim.x, dim = i / quads, n = i % quads * 4;
      if (dim >= DIMS) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) shared.state[(n + j) * STATE_STRIDE + dim] = four[r].x[j];
    }
  }

  float total = 0.0f;
  for (int tile = piece.begin; tile < piece.end; tile += TOKENS) {
    const int count = min(TOKENS, piece.end - tile);
    // 2. the tile; M
    load_tile(args, shared, piece, tile, count, head, first_dim);
    if (OUTPUTS) make_m(shared);
    __syncthreads();
    // 3. the outputs
    if (OUTPUTS) {
      make_outputs(args, shared, piece, tile, count, head, first_dim);
      __syncthreads();
    } else if (threadIdx.x == 0) {
      for (int t = 0; t < TOKENS; ++t) total += shared.steps[t];
    }
    // 4. the state behind it
    advance_state(shared);
    __syncthreads();
  }

  // 5. where it has come to
  for (int i = threadIdx.x; i < dims * args.in.state_size; i += blockDim.x) {
    const int dim = i / args.in.state_size, n = i % args.in.state_size;
    work.end(first_dim + dim, n, shared.state[n * STATE_STRIDE + dim]);
  }
  if (!OUTPUTS && threadIdx.x == 0) {
    for (int dim = 0; dim < dims; ++dim) work.total[first_dim + dim] = total;
  }
}
