// SPDX-License-Identifier: Apache-2.0
// selective_mma.cuh - a piece of selective_scan.cu as products of matrices on tensor cores, 64 tokens at a time, T of
// 16 bits. Part of that file; formulas as in selective_dual.cuh:
//
//   u[j]   = d[j] * x[j]
//   M[i,j] = exp(s[i] - s[j]) * (C[i] . B[j]) for j <= i
//   y[i]   = exp(s[i]) * (C[i] . h) + sum_j M[i,j] * u[j]
//   h'     = exp(s[end]) * h + sum_j exp(s[end] - s[j]) * u[j] outer B[j]
//
// A warp has 16 dims and all their states in registers: as the accumulators of u^T.B they are, pair by pair, also the
// operand of C.h, and u^T as the operand of one product is u of the other. Only M, of which each warp makes 16 rows,
// goes through shared memory. Blocks of the same multiprocessor compute while one waits for its tokens. Parallel are
// pieces, heads and slices of 64 dims: the states of all pieces, their carry, then all outputs (the file's steps), for
// one block per sequence and head would leave most of a GPU idle. M is made for every head, also of one group.
//
// decays     s is a sum of integers, logarithms to base 2 in units of 2^-40, and a token's is limited to 256, whose
//            power is 0 or infinite all the same: exp2(s[i] - s[j]) keeps the digits of small steps behind large
//            ones. In float32 it is two numbers, a multiple of 2^-6 and the rest.
// rounding   Products of T are exact and summed in float32. M, u, u with its decay, and h go in as sums of two T
//            (mma_split.cuh), of which low times low is left out; of float16 a row of M, a warp's u, and its h are
//            divided by powers of two: 2^-39 of the largest is lost. One rounding on store.
// launch     grid (pieces, heads, ceil(head_dim / DIMS)), block (128), sm_80; state_size and head_dim multiples of 8;
//            rows of x, z, B, C and out at multiples of 16 bytes
//            dynamic shared memory, in bytes: 128 * (STATES + 8 + DIMS + 8) + 1792, with outputs
//            + 128 * (STATES + 8 + 2 * (64 + 8)). Three barriers per 64 tokens
// NaN        and infinities of a token may also reach earlier ones of its 64.
#include "cp_async.cuh"
#include "mma.cuh"
#include "mma_split.cuh"
#include "scan.cuh"

constexpr int DIMS = CA_DIMS;      // of a block
constexpr int STATES = CA_STATES;  // at least state_size: 64, 128, 256; the rest counts as zeros
constexpr int TOKENS = 64;
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROW_STRIDE = STATES + 8, X_STRIDE = DIMS + 8, M_STRIDE = TOKENS + 8;  // ldmatrix meets no bank twice
constexpr int ROW_TILES = TOKENS / 16;
constexpr bool NARROW = is_narrow(T{});
constexpr float FAR = 256.0f;
static_assert(DIMS == 16 * WARPS && TOKENS == 16 * WARPS, "selective_scan: a warp has 16 dims, and 16 rows of M");

struct Shared {
  T* b;           // [TOKENS, ROW_STRIDE]
  T* x;           // [TOKENS, X_STRIDE]
  float* steps;   // [TOKENS] d
  float* coarse;  // [TOKENS] s in two parts
  float* fine;    // [TOKENS]
  float* from;    // [TOKENS] exp(s)
  float* until;   // [TOKENS] d * exp(s[end] - s)
  float* units;   // [TOKENS] what rows of M were divided by
  float* skips;   // [DIMS] D
  T* c;           // [TOKENS, ROW_STRIDE]
  T* high;        // [TOKENS, M_STRIDE] M, rounded
  T* low;         // [TOKENS, M_STRIDE] what that leaves

  __device__ __forceinline__ explicit Shared(char* memory) {
    b = reinterpret_cast<T*>(memory);
    x = b + TOKENS * ROW_STRIDE;
    steps = reinterpret_cast<float*>(x + TOKENS * X_STRIDE);
    coarse = steps + TOKENS;
    fine = coarse + TOKENS;
    from = fine + TOKENS;
    until = from + TOKENS;
    units = until + TOKENS;
    skips = units + TOKENS;
    c = reinterpret_cast<T*>(skips + DIMS);
    high = c + TOKENS * ROW_STRIDE;
    low = high + TOKENS * M_STRIDE;
  }
};

__device__ __forceinline__ float larger_finite(float top, float x) {
  const float magnitude = fabsf(x);
  return magnitude < __int_as_float(0x7f800000) ? fmaxf(top, magnitude) : top;
}
__device__ __forceinline__ float within_floats(float x) {
  return x > 0x1.fffffep127f ? 0x1.fffffep127f : x < -0x1.fffffep127f ? -0x1.fffffep127f : x;
}
// What numbers up to `top` are divided by: they stay below 2^15.
__device__ __forceinline__ float unit_of(float top) { return NARROW ? power_at(top) * 0x1p-14f : 1.0f; }

struct MmaPiece {
  const SelectiveScanArgs& args;
  const SelectiveInputs& in;
  const Work& work;
  const Shared shared;
  const int head, first_dim, dims;
  float total;  // of steps, in warp 0
  float state[STATES / 8][4];

  __device__ __forceinline__ MmaPiece(const SelectiveScanArgs& a, const Work& w, char* memory, int h, int first)
      : args(a), in(a.in), work(w), shared(memory), head(h), first_dim(first),
        dims(min(DIMS, a.in.head_dim - first)), total(0.0f) {}

  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int group() { return threadIdx.x % 32 / 4; }  // row of a fragment
  static __device__ __forceinline__ int pair() { return threadIdx.x % 4 * 2; }    // its first column

  // Calls change(number) for the states this thread holds.
  template <typename Change>
  __device__ __forceinline__ void for_states(Change change) {
#pragma unroll
    for (int n = 0; n < STATES / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) change(state[n][i]);
    }
  }
  // Calls move(pair in memory, pair in registers) for those there are; `far` is the head's, rows `stride` apart.
  template <typename U, typename Move>
  __device__ __forceinline__ void move_states(U* far, int64_t stride, Move move) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int dim = 16 * warp() + 8 * half + group();
      if (dim >= dims) continue;
      U* row = far + (first_dim + dim) * stride + pair();
#pragma unroll
      for (int n = 0; n < STATES / 8; ++n) {
        if (8 * n < in.state_size) move(row + 8 * n, state[n] + 2 * half);
      }
    }
  }

  // Starts the copies of `count` tokens from `tile` on; zeros for the rest of 64.
  __device__ __forceinline__ void fetch(int tile, int count) const {
    const int64_t of_group = head / in.heads_per_group;
#pragma unroll 1
    for (int i = threadIdx.x; i < TOKENS * (STATES / 8); i += THREADS) {
      const int t = i / (STATES / 8), n = i % (STATES / 8) * 8;
      const bool there = t < count && n < in.state_size;
      cp_async16(shared.b + t * ROW_STRIDE + n, row_of<T>(in.B, work.piece, tile + t, of_group) + n, there);
      if (!OUTPUTS) continue;
      cp_async16(shared.c + t * ROW_STRIDE + n, row_of<T>(in.C, work.piece, tile + t, of_group) + n, there);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < TOKENS * (DIMS / 8); i += THREADS) {
      const int t = i / (DIMS / 8), p = i % (DIMS / 8) * 8;
      cp_async16(shared.x + t * X_STRIDE + p, row_of<T>(in.x, work.piece, tile + t, head) + first_dim + p,
                 t < count && p < dims);
    }
    cp_async_commit();
  }

  // Steps and decays, by one warp, two tokens a lane.
  __device__ __forceinline__ void make_decays(int tile, int count) {
    const float rate = *channel(in.A, head, 0) * LOG2_E;
    const int first = threadIdx.x * 2;
    float steps[2];
    int64_t logs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      steps[i] = first + i < count ? step_size<DT>(in, work.piece.first + tile + first + i, head, 0) : 0.0f;
      const float log = first + i < count ? steps[i] * rate : 0.0f;
      const bool is_number = log == log;
      const float limited = log < -FAR ? -FAR : log > FAR ? FAR : log;
      logs[i] = is_number ? static_cast<int64_t>(limited * 0x1p40f) : 0;
      if (!is_number) steps[i] = log;
    }
    int64_t sums[1] = {logs[0] + logs[1]};
    warp_scan(sums);
    const int64_t end = __shfl_sync(FULL_MASK, sums[0], 31), all[2] = {sums[0] - logs[1], sums[0]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t rest = all[i] & ((int64_t{1} << 34) - 1);
      shared.steps[first + i] = steps[i];
      shared.coarse[first + i] = static_cast<float>(static_cast<int>(all[i] >> 34)) * 0x1p-6f;
      shared.fine[first + i] = static_cast<float>(rest) * 0x1p-40f;
      shared.from[first + i] = exp2f(static_cast<float>(all[i]) * 0x1p-40f);
      shared.until[first + i] = steps[i] * exp2f(static_cast<float>(end - all[i]) * 0x1p-40f);
    }
    if (!OUTPUTS) total += warp_sum(steps[0] + steps[1]);
  }

  // The warp's rows of M; tokens of later warps have no part in them.
  __device__ __forceinline__ void make_m() const {
    float scores[TOKENS / 8][4] = {};
#pragma unroll
    for (int n = 0; n < STATES; n += 16) {
      uint32_t rows[4];
      ldmatrix_x4(rows, downward(shared.c + 16 * warp() * ROW_STRIDE + n, ROW_STRIDE));
#pragma unroll
      for (int j = 0; j < ROW_TILES; ++j) {
        if (j > warp()) continue;
        uint32_t columns[4];
        ldmatrix_x4(columns, sideways(shared.b + 16 * j * ROW_STRIDE + n, ROW_STRIDE));
        add_pair<T>(scores[2 * j], scores[2 * j + 1], rows, columns);
      }
    }
    float top[2] = {0.0f, 0.0f}, coarse[2], fine[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      coarse[half] = shared.coarse[16 * warp() + 8 * half + group()];
      fine[half] = shared.fine[16 * warp() + 8 * half + group()];
    }
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n) {
      if (n / 2 > warp()) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp() + i / 2 * 8 + group(), column = 8 * n + pair() + i % 2;
        const float log = coarse[i / 2] - shared.coarse[column] + (fine[i / 2] - shared.fine[column]);
        scores[n][i] = column <= row ? scores[n][i] * exp2f(log) : 0.0f;
        if (NARROW) top[i / 2] = larger_finite(top[i / 2], scores[n][i]);
      }
    }
    if (NARROW) group_max<4>(top);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * warp() + 8 * half + group();
      const float unit = unit_of(top[half]), factor = 1.0f / unit;  // exact
      if (NARROW && pair() == 0) shared.units[row] = unit;
#pragma unroll
      for (int n = 0; n < TOKENS / 8; ++n) {
        if (n / 2 > warp()) continue;
        uint32_t rounded, rest;
        split<T>(scores[n][2 * half] * factor, scores[n][2 * half + 1] * factor, rounded, rest);
        *reinterpret_cast<uint32_t*>(shared.high + row * M_STRIDE + 8 * n + pair()) = rounded;
        *reinterpret_cast<uint32_t*>(shared.low + row * M_STRIDE + 8 * n + pair()) = rest;
      }
    }
  }

  // x of the warp's dims and 16 tokens from `first` on, times their weights and `factor`: calls use(i, low, high) for
  // the registers of a fragment of u^T, whose i % 2 is the half of the dims and i / 2 that of the tokens. A weight that
  // `factor` would make infinite is one of zeros.
  template <typename Use>
  __device__ __forceinline__ void for_weighed(int first, const float* weights, float factor, Use use) const {
    uint32_t x[4];
    ldmatrix_x4_trans(x, sideways(shared.x + first * X_STRIDE + 16 * warp(), X_STRIDE));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float both[2];
      unpack<T>(x[i], both);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float weight = weights[first + i / 2 * 8 + pair() + j] * factor;
        both[j] *= NARROW ? within_floats(weight) : weight;
      }
      use(i, both[0], both[1]);
    }
  }

  // Largest magnitudes of the warp's states, u, and u with its decay.
  __device__ __forceinline__ void find_tops(float (&tops)[3]) {
    for_states([&](float number) { tops[0] = larger_finite(tops[0], number); });
#pragma unroll
    for (int t = 0; t < TOKENS; t += 16) {
      const auto raise = [](float& top, float low, float high) {
        top = larger_finite(larger_finite(top, low), high);
      };
      for_weighed(t, shared.steps, 1.0f, [&](int, float low, float high) { raise(tops[1], low, high); });
      for_weighed(t, shared.until, 1.0f, [&](int, float low, float high) { raise(tops[2], low, high); });
    }
    warp_max(tops);
  }

  // C.h / unit of the warp's dims.
  __device__ __forceinline__ void ask_state(float (&history)[ROW_TILES][2][4], float unit) const {
    const float factor = 1.0f / unit;
#pragma unroll
    for (int k = 0; k < STATES / 16; ++k) {
      uint32_t high[2][2], low[2][2];  // of 8 dims each
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&of_dims)[4] = state[2 * k + i % 2];
        split<T>(of_dims[i / 2 * 2] * factor, of_dims[i / 2 * 2 + 1] * factor, high[i / 2][i % 2], low[i / 2][i % 2]);
      }
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        uint32_t rows[4];
        ldmatrix_x4(rows, downward(shared.c + 16 * r * ROW_STRIDE + 16 * k, ROW_STRIDE));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma_m16n8k16<T>(history[r][half], rows, high[half]);
          mma_m16n8k16<T>(history[r][half], rows, low[half]);
        }
      }
    }
  }

  // Adds M.u / (unit of u and that of M's rows), and stores the outputs.
  __device__ __forceinline__ void make_outputs(int tile, int count, const float (&history)[ROW_TILES][2][4],
                                               float state_unit, float u_unit) const {
    const float factor = 1.0f / u_unit;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      float sums[2][4] = {};
#pragma unroll 1
      for (int k = 0; k <= r; ++k) {
        uint32_t high[2][2], low[2][2], m[4];  // u of 8 dims each
        for_weighed(16 * k, shared.steps, factor, [&](int i, float first, float second) {
          split<T>(first, second, high[i % 2][i / 2], low[i % 2][i / 2]);
        });
        ldmatrix_x4(m, downward(shared.high + 16 * r * M_STRIDE + 16 * k, M_STRIDE));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma_m16n8k16<T>(sums[half], m, high[half]);
          mma_m16n8k16<T>(sums[half], m, low[half]);
        }
        ldmatrix_x4(m, downward(shared.low + 16 * r * M_STRIDE + 16 * k, M_STRIDE));
#pragma unroll
        for (int half = 0; half < 2; ++half) mma_m16n8k16<T>(sums[half], m, high[half]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * r + 8 * half + group();
        if (row >= count) continue;
        const float old = shared.from[row] * state_unit, unit = NARROW ? shared.units[row] : 1.0f;
        Floats<4> y;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          y.x[j] = history[r][j / 2][2 * half + j % 2] * old + sums[j / 2][2 * half + j % 2] * unit * u_unit;
        store_row(tile, row, y);
      }
    }
  }

  // y of the dims this thread has: two, and the two behind the next six.
  __device__ __forceinline__ void store_row(int tile, int row, Floats<4> y) const {
    const int dim = 16 * warp() + pair();
    const auto numbers = [&](const T* at) {
      float both[2][2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (16 * warp() + 8 * half < dims) to_float(load_vec<T, 2>(at + 8 * half), both[half]);
      }
      Floats<4> four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.x[j] = both[j / 2][j % 2];
      return four;
    };
    if (in.D.data != nullptr) {
      Floats<4> skips;
#pragma unroll
      for (int j = 0; j < 4; ++j) skips.x[j] = shared.skips[dim + j / 2 * 8 + j % 2];
      y.add_product(skips, numbers(shared.x + row * X_STRIDE + dim));
    }
    if (in.z.data != nullptr) y *= silu(numbers(row_of<T>(in.z, work.piece, tile + row, head) + first_dim + dim));
    T* out = out_row(args, work.piece, tile + row, head) + first_dim + dim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float both[2] = {y.x[2 * half], y.x[2 * half + 1]};
      if (16 * warp() + 8 * half < dims) store_vec(out + 8 * half, from_float<T, 2>(both));
    }
  }

  // The state behind the tile, with everything divided by `unit` on the way.
  __device__ __forceinline__ void advance(int count, float unit) {
    const float factor = 1.0f / unit, kept = shared.from[TOKENS - 1];
    for_states([&](float& number) { number = number * kept * factor; });
#pragma unroll 1
    for (int t = 0; t < count; t += 16) {
      uint32_t high[4], low[4];
      for_weighed(t, shared.until, factor, [&](int i, float first, float second) {
        split<T>(first, second, high[i], low[i]);
      });
#pragma unroll
      for (int n = 0; n < STATES / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, downward(shared.b + t * ROW_STRIDE + 8 * n, ROW_STRIDE));
        add_pair<T>(state[n], state[n + 1], high, b);
        add_pair<T>(state[n], state[n + 1], low, b);
      }
    }
    if (NARROW) for_states([&](float& number) { number *= unit; });
  }

  __device__ __forceinline__ void take(int tile, int count) {
    fetch(tile, count);
    if (warp() == 0) make_decays(tile, count);
    cp_async_wait<0>();
    __syncthreads();
    float tops[3] = {};
    if (NARROW) find_tops(tops);
    const float state_unit = unit_of(tops[0]);
    if (OUTPUTS) {
      make_m();
      float history[ROW_TILES][2][4] = {};
      ask_state(history, state_unit);
      __syncthreads();
      make_outputs(tile, count, history, state_unit, unit_of(tops[1]));
    }
    advance(count, unit_of(fmaxf(tops[0] * shared.from[TOKENS - 1], tops[2])));
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    const auto load = [](const auto* far, float* near) {
      near[0] = to_float(far[0]);
      near[1] = to_float(far[1]);
    };
    const int64_t row = in.state_size;
    for_states([](float& number) { number = 0.0f; });
    if (OUTPUTS && work.carried.data != nullptr) move_states(work.carried.data, row, load);
    else if (OUTPUTS && work.reads_pool) move_states(work.pool.data, args.stride_dim, load);
    S* const ends_at = OUTPUTS && work.is_last() ? work.pool.data : nullptr;  // asked here: fewer registers in the loop

    for (int p = threadIdx.x; p < DIMS; p += THREADS)
      shared.skips[p] = in.D.data != nullptr && p < dims ? *channel(in.D, head, first_dim + p) : 0.0f;
    for (int tile = work.piece.begin; tile < work.piece.end; tile += TOKENS)
      take(tile, min(TOKENS, work.piece.end - tile));

    if (!OUTPUTS) {
      move_states(work.carried.data, row, [](float* far, const float* near) {
        far[0] = near[0];
        far[1] = near[1];
      });
    } else if (ends_at != nullptr) {
      move_states(ends_at, args.stride_dim, [](S* far, const float* near) {
        far[0] = from_float<S>(near[0]);
        far[1] = from_float<S>(near[1]);
      });
    }
    if (!OUTPUTS && threadIdx.x == 0) {
      for (int dim = 0; dim < dims; ++dim) work.total[first_dim + dim] = total;
    }
  }
};

__device__ __forceinline__ void scan_on_tensor_cores(const SelectiveScanArgs& args) {
  CA_DYN_SMEM(char, memory);
  const int head = blockIdx.y, first_dim = blockIdx.z * DIMS;
  const Work work(args, blockIdx.x, head);
  if (!work.is_needed()) {
    const int last = min(first_dim + DIMS, args.in.head_dim);
    if (OUTPUTS && !work.has_slot) write_zeros(args, work.piece, head, first_dim + threadIdx.x, last, THREADS);
    return;
  }
  if (work.piece.begin == work.piece.end) return;
  MmaPiece piece(args, work, memory, head, first_dim);
  piece.run();
}
