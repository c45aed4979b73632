// SPDX-License-Identifier: Apache-2.0
// selective_state_update.cu - the next token of a selective state space model (Mamba, Mamba-2).
//
//   per row b of the batch, head h and dim p, with g = h / heads_per_group and slot = slots[b]:
//     step = dt[b,h,p] + dt_bias[h,p], with softplus log1p(exp(step)), limited to [dt_min, dt_max]
//     state[slot,h,p,n] <- exp(step * A[h,p,n]) * state[slot,h,p,n] + step * x[b,h,p] * B[b,g,n]
//     out[b,h,p] = (sum_n state[slot,h,p,n] * C[b,g,n] + D[h,p] * x[b,h,p]) * z[b,h,p] * sigmoid(z[b,h,p])
//   Math in float32; out is summed from the state before it is rounded to S. A row without a slot gives zeros.
//
// launch     grid (batch, any, any), block (any whole number of LANES; whole warps if LANES > 1). The blocks of a row
//            share its heads (y) and their dims (z): LANES neighbours hold the states of ROWS dims at a time.
//            Shared memory 0, barriers none, ROWS * log2(LANES) shuffles per tile of dims
// aliasing   none
// traffic    batch * heads * head_dim * (2 * state_size * sizeof(S) + a few) bytes: every element of the state is read
//            once and written once. A with an axis of states is read for every row of the batch, from L2
// in flight  ROWS * VEC * sizeof(S) = 64 bytes of state per thread, and all else that a tile of dims needs, before the
//            first of it is used; with 4 blocks of 128 threads per SM 32 KiB of states. With accesses of 8 states an A
//            that has an axis of states comes after them, for want of registers
#include "prelude.cuh"
#include "params.h"
#include "raw_numbers.cuh"
#include "selective_state.cuh"
#include "sequences.cuh"
#include "warp.cuh"

using T = CA_T;                                  // x, z, B, C and out
using DT = CA_DT;                                // dt
using S = CA_S;                                  // state
constexpr int VEC = CA_VEC;                      // states per access; divides state_size and strides of state, B, C, A
constexpr int LANES = CA_LANES;                  // threads that share the states of a dim
constexpr int ROWS = CA_ROWS;                    // dims of a thread at a time
constexpr bool STATE_DECAYS = CA_STATE_DECAYS;   // A has an axis of states
static_assert(sizeof(SelectiveStateUpdateArgs) == CA_SIZEOF_ARGS, "selective_state_update: Python and CUDA disagree");

constexpr int OWN = LANES < ROWS ? ROWS / LANES : 1;  // outputs of a thread: those of its dims lane, lane + LANES, ...
static_assert(OWN * LANES >= ROWS, "selective_state_update: somebody writes every output");

using States = Floats<VEC>;
constexpr bool RATES_AHEAD = VEC < 8;  // of the GPU's accesses: A comes with the states
constexpr int MIN_BLOCKS = VEC == 8 && sizeof(S) == 4 ? 2 : 4;  // of 128 threads per SM

CA_KERNEL __launch_bounds__(128, MIN_BLOCKS)
void selective_state_update(const __grid_constant__ SelectiveStateUpdateArgs args) {
  const SelectiveInputs& in = args.in;
  const int64_t b = blockIdx.x;
  const int64_t slot = find_slot(args.slots, args.batch, args.num_slots, blockIdx.x);
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, groups = blockDim.x / LANES;
  const int step_tile = gridDim.z * groups * ROWS;
  for (int head = blockIdx.y; head < in.heads; head += gridDim.y) {
    const int64_t bc_head = head / in.heads_per_group;
    const T* B = static_cast<const T*>(in.B.data) + b * in.B.stride_token + bc_head * in.B.stride_head;
    const T* C = static_cast<const T*>(in.C.data) + b * in.C.stride_token + bc_head * in.C.stride_head;
    const T* x = static_cast<const T*>(in.x.data) + b * in.x.stride_token + head * in.x.stride_head;
    const T* z = static_cast<const T*>(in.z.data) + b * in.z.stride_token + head * in.z.stride_head;
    const DT* dt = static_cast<const DT*>(in.dt.data) + b * in.dt.stride_token + head * in.dt.stride_head;
    T* out = static_cast<T*>(args.out.data) + b * args.out.stride_token + head * args.out.stride_head;
    const bool one_step = in.dt.stride_dim == 0 && (in.dt_bias.data == nullptr || in.dt_bias.stride_dim == 0);

    for (int tile = blockIdx.z * groups * ROWS; tile < in.head_dim; tile += step_tile) {
      const int first = tile + group;  // the thread's dims are first + i * groups
      if (slot < 0) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          if (lane == 0 && first + i * groups < in.head_dim) out[first + i * groups] = from_float<T>(0.0f);
        }
        continue;
      }

      // 1. the first states, and then only what depends on the dim alone: nothing is waited for before all is asked for
      S* state = static_cast<S*>(args.state) + slot * args.stride_slot + head * args.stride_head;
      RawNumbers<S, VEC> old[ROWS];
      RawNumbers<float, VEC> rates[ROWS];
      RawNumbers<T, VEC> b_states, c_states;
      const auto load = [&](int n) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          const int dim = first + i * groups;
          if (dim < in.head_dim) {
            old[i].load(state + dim * args.stride_dim + n);
            if (STATE_DECAYS && RATES_AHEAD) rates[i].load(channel(in.A, head, dim) + n);
          }
        }
        b_states.load(B + n);
        c_states.load(C + n);
      };
      if (lane * VEC < in.state_size) load(lane * VEC);
      DT raw_steps[ROWS];
      float inputs[ROWS], biases[ROWS], steps[ROWS], decays[ROWS], skips[OWN], skipped[OWN];
      Floats<OWN> raw_gates;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int dim = min(first + i * groups, in.head_dim - 1);
        raw_steps[i] = dt[dim * in.dt.stride_dim];
        biases[i] = in.dt_bias.data != nullptr ? *channel(in.dt_bias, head, dim) : 0.0f;
        inputs[i] = to_float(x[dim]);
        decays[i] = STATE_DECAYS ? 0.0f : *channel(in.A, head, dim);
      }
#pragma unroll
      for (int k = 0; k < OWN; ++k) {
        const int dim = min(first + (lane + k * LANES) % ROWS * groups, in.head_dim - 1);
        skips[k] = in.D.data != nullptr ? *channel(in.D, head, dim) : 0.0f;
        skipped[k] = to_float(x[dim]);
        raw_gates.x[k] = in.z.data != nullptr ? to_float(z[dim]) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        steps[i] = i > 0 && one_step ? steps[0] : finish_step(in, to_float(raw_steps[i]) + biases[i]);
        decays[i] = expf(steps[i] * decays[i]);
      }

      // 2. the states, VEC of every dim at a time
      ProductSum<VEC> sums[ROWS];
      for (int n = lane * VEC; n < in.state_size; n += LANES * VEC) {
        if (n >= LANES * VEC) load(n);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          const int dim = first + i * groups;
          States now = old[i].numbers();
          if (STATE_DECAYS) {
            if (!RATES_AHEAD) rates[i].load(channel(in.A, head, min(dim, in.head_dim - 1)) + n);
            States exponents = rates[i].numbers();
            exponents *= steps[i] * LOG2_E;
            now *= exp2_of_any(exponents);
          } else {
            now *= decays[i];
          }
          now.add_product(steps[i] * inputs[i], b_states.numbers());
          if (dim < in.head_dim) store_floats<VEC>(state + dim * args.stride_dim + n, now);
          sums[i].add(now, c_states.numbers());
        }
      }

      // 3. the outputs
      const Floats<OWN> gates = silu(raw_gates);
      float y[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) y[i] = sums[i].total();
      if constexpr (LANES > 1) group_sum<LANES>(y);
#pragma unroll
      for (int k = 0; k < OWN; ++k) {
        const int row = lane + k * LANES, dim = first + row * groups;
        if (row >= ROWS || dim >= in.head_dim) continue;
        float mine = y[k * LANES];
#pragma unroll
        for (int i = k * LANES + 1; i < ROWS; ++i) {
          if (row == i) mine = y[i];
        }
        if (in.D.data != nullptr) mine = fmaf(skips[k], skipped[k], mine);
        if (in.z.data != nullptr) mine *= gates.x[k];
        out[dim] = from_float<T>(mine);
      }
    }
  }
}
