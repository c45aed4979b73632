// SPDX-License-Identifier: Apache-2.0
// selective_recurrence.cuh - a piece of selective_scan.cu token by token. Part of that file.
//
// LANES neighbours have the states of a dim, COUNT times VEC each, in registers for the whole piece. B and C of
// TOKENS tokens are in shared memory, read by all dims. Eight tokens of x and dt are loaded before the first is used.
// shared     2 * TOKENS * COUNT * VEC * LANES floats, two barriers per TOKENS tokens
constexpr int LANES = CA_LANES;  // threads of a dim
constexpr int COUNT = CA_COUNT;  // vectors of a thread
constexpr int SLOTS = COUNT * VEC * LANES;       // at least state_size
constexpr int TOKENS = SLOTS > 128 ? 8 : 32;     // in shared memory
constexpr int AHEAD = 8;
constexpr int RATES = STATE_DECAYS ? COUNT : 1;
constexpr int UNROLLED = COUNT > 4 ? 1 : COUNT;  // more of them are the CPU's, in memory

using States = Floats<VEC>;

__device__ __forceinline__ float total_of(const States& x) {
  float sum = x.x[0];
#pragma unroll
  for (int j = 1; j < VEC; ++j) sum += x.x[j];
  return sum;
}

__device__ __forceinline__ void scan_by_tokens(const SelectiveScanArgs& args) {
  CA_DYN_SMEM(float, b_tile);          // [TOKENS, SLOTS]
  float* c_tile = b_tile + TOKENS * SLOTS;
  const SelectiveInputs& in = args.in;
  const int head = blockIdx.y, lane = threadIdx.x % LANES;
  const int dim = blockIdx.z * (blockDim.x / LANES) + threadIdx.x / LANES;
  const bool is_dim = dim < in.head_dim;
  const Work work(args, blockIdx.x, head);
  const Piece& piece = work.piece;
  if (!work.is_needed()) {
    if (OUTPUTS && !work.has_slot && is_dim && lane == 0) write_zeros(args, piece, head, dim, dim + 1, 1);
    return;
  }
  if (piece.begin == piece.end) return;

  // 1. states and rates; those past state_size stay 0
  States states[COUNT], rates[RATES];
#pragma unroll UNROLLED
  for (int k = 0; k < COUNT; ++k) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const int n = (k * LANES + lane) * VEC + j;
      const bool is_state = is_dim && n < in.state_size;
      states[k].x[j] = is_state ? work.begin(dim, n) : 0.0f;
      if (k < RATES) {
        const bool has_rate = STATE_DECAYS ? is_state : is_dim;
        rates[k].x[j] = has_rate ? channel(in.A, head, dim)[STATE_DECAYS ? n : 0] * LOG2_E : 0.0f;
      }
    }
  }

  const int64_t group = head / in.heads_per_group;
  const float skip = is_dim && in.D.data != nullptr ? *channel(in.D, head, dim) : 0.0f;
  float total = 0.0f;
  for (int tile = piece.begin; tile < piece.end; tile += TOKENS) {
    // 2. B and C of a tile
    const int count = min(TOKENS, piece.end - tile);
    __syncthreads();
    for (int i = threadIdx.x; i < count * SLOTS; i += blockDim.x) {
      const int token = tile + i / SLOTS, n = i % SLOTS;
      b_tile[i] = n < in.state_size ? to_float(row_of<T>(in.B, piece, token, group)[n]) : 0.0f;
      if (OUTPUTS) c_tile[i] = n < in.state_size ? to_float(row_of<T>(in.C, piece, token, group)[n]) : 0.0f;
    }
    __syncthreads();

    for (int t = 0; t < count; t += AHEAD) {
      // 3. eight tokens
      float x[AHEAD], steps[AHEAD], y[AHEAD];
      Floats<AHEAD> gates;
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int token = is_dim && t + i < count ? tile + t + i : -1;
        x[i] = token < 0 ? 0.0f : to_float(row_of<T>(in.x, piece, token, head)[dim]);
        steps[i] = token < 0 ? 0.0f : raw_step<DT>(in, piece.first + token, head, dim);
        const bool is_gated = OUTPUTS && token >= 0 && in.z.data != nullptr;
        gates.x[i] = is_gated ? to_float(row_of<T>(in.z, piece, token, head)[dim]) : 0.0f;
        y[i] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) steps[i] = finish_step(in, steps[i]);
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (t + i >= count) break;
        total += steps[i];
        const float* b = b_tile + (t + i) * SLOTS + lane * VEC;
        const float* c = c_tile + (t + i) * SLOTS + lane * VEC;
        States sums = States::all(0.0f), decays = rates[0];
        if (!STATE_DECAYS) {
          decays *= steps[i];
          decays = exp2_of_any(decays);
        }
#pragma unroll UNROLLED
        for (int k = 0; k < COUNT; ++k) {
          if (STATE_DECAYS) {
            decays = rates[k % RATES];
            decays *= steps[i];
            decays = exp2_of_any(decays);
          }
          states[k] *= decays;
          states[k].add_product(steps[i] * x[i], States::load(b + k * LANES * VEC));
          if (OUTPUTS) sums.add_product(states[k], States::load(c + k * LANES * VEC));
        }
        y[i] = total_of(sums);
      }
      if constexpr (OUTPUTS) {
        if constexpr (LANES > 1) group_sum<LANES>(y);
        if (in.D.data != nullptr) {
#pragma unroll
          for (int i = 0; i < AHEAD; ++i) y[i] = fmaf(skip, x[i], y[i]);
        }
        if (in.z.data != nullptr) {
          gates = silu(gates);
#pragma unroll
          for (int i = 0; i < AHEAD; ++i) y[i] *= gates.x[i];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          if (is_dim && t + i < count && lane == i % LANES) {
            out_row(args, piece, tile + t + i, head)[dim] = from_float<T>(y[i]);
          }
        }
      }
    }
  }

  // 4. where it has come to
  if (!is_dim) return;
#pragma unroll UNROLLED
  for (int k = 0; k < COUNT; ++k) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const int n = (k * LANES + lane) * VEC + j;
      if (n < in.state_size) work.end(dim, n, states[k].x[j]);
    }
  }
  if (!OUTPUTS && lane == 0) work.total[dim] = total;
}
