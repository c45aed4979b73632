// SPDX-License-Identifier: Apache-2.0
// selective_recurrence.cuh - a piece of selective_scan.cu token by token. Part of that file.
//
// LANES neighbours have the states of a dim, COUNT times VEC each, in registers for the whole piece. B and C of
// TOKENS tokens are in shared memory, read by all dims. Eight tokens of x, dt and z are asked for before the first is
// used, as are ROUNDS numbers of B and C: no branch stands around a load, what is not there is its neighbour once more.
// shared     2 * TOKENS * COUNT * VEC * LANES floats, two barriers per TOKENS tokens; ROUNDS * threads divide a tile
constexpr int LANES = CA_LANES;  // threads of a dim
constexpr int COUNT = CA_COUNT;  // vectors of a thread
constexpr int SLOTS = COUNT * VEC * LANES;       // at least state_size
constexpr int TOKENS = SLOTS > 128 ? 8 : 32;     // in shared memory
constexpr int AHEAD = 8, ROUNDS = 4;
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
  const int place = min(dim, in.head_dim - 1);
  const float skip = in.D.data != nullptr ? *channel(in.D, head, place) : 0.0f;
  const float bias = in.dt_bias.data != nullptr ? *channel(in.dt_bias, head, place) : 0.0f;
  const bool has_gate = OUTPUTS && in.z.data != nullptr;
  const HeadView& gate = has_gate ? in.z : in.x;
  float total = 0.0f;
  for (int tile = piece.begin; tile < piece.end; tile += TOKENS) {
    // 2. B and C of a tile
    const int count = min(TOKENS, piece.end - tile);
    __syncthreads();
    for (int first = 0; first < count * SLOTS; first += ROUNDS * blockDim.x) {  // all of it lies within the tile
      T b[ROUNDS], c[ROUNDS];
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) {
        const int i = first + r * blockDim.x + threadIdx.x;
        const int token = tile + min(i / SLOTS, count - 1), n = min(i % SLOTS, in.state_size - 1);
        b[r] = row_of<T>(in.B, piece, token, group)[n];
        if (OUTPUTS) c[r] = row_of<T>(in.C, piece, token, group)[n];
      }
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) {
        const int i = first + r * blockDim.x + threadIdx.x;
        const bool is_state = i % SLOTS < in.state_size;
        b_tile[i] = is_state ? to_float(b[r]) : 0.0f;
        if (OUTPUTS) c_tile[i] = is_state ? to_float(c[r]) : 0.0f;
      }
    }
    __syncthreads();

    for (int t = 0; t < count; t += AHEAD) {
      // 3. eight tokens
      T raw_x[AHEAD], raw_gates[AHEAD];
      DT raw_steps[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int token = tile + min(t + i, count - 1);
        raw_x[i] = row_of<T>(in.x, piece, token, head)[place];
        raw_steps[i] = static_cast<const DT*>(in.dt.data)[(piece.first + token) * in.dt.stride_token +
                                                          head * in.dt.stride_head + place * in.dt.stride_dim];
        if (OUTPUTS) raw_gates[i] = row_of<T>(gate, piece, token, head)[place];
      }
      float x[AHEAD], steps[AHEAD], y[AHEAD] = {};
      Floats<AHEAD> gates = Floats<AHEAD>::all(0.0f);
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        x[i] = to_float(raw_x[i]);
        steps[i] = finish_step(in, to_float(raw_steps[i]) + bias);
        if (OUTPUTS) gates.x[i] = to_float(raw_gates[i]);
      }
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
        if (has_gate) {
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
