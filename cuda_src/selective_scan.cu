// SPDX-License-Identifier: Apache-2.0
// selective_scan.cu - selective state space models (Mamba, Mamba-2) over packed sequences.
//
//   Every token does what selective_state_update.cu does; state and out are float32 until they are stored. A sequence
//   is cut into pieces of `piece` tokens, from its beginning on, so that nothing depends on its neighbours:
//   1. states    OUTPUTS 0: what each piece but the last makes of a state of zeros, and the sum of its steps
//   2. carry     by sequence, in the order of its pieces: the state each piece begins with
//   3. outputs   OUTPUTS 1: every piece again from there; the last one stores the state of the sequence
//   A sequence of one piece needs step 3 alone. Steps 1 and 3 exist in three forms:
//   recurrence   (selective_recurrence.cuh) token by token, the states of a dim in registers; any model
//   dual         (selective_dual.cuh) 32 tokens at a time as products of matrices; one step and rate per head
//   mma          (selective_mma.cuh) so, too, 64 tokens at a time on tensor cores; T of 16 bits
//
// launch     recurrence: grid (pieces, heads, ceil(head_dim / (threads / LANES))), block (whole warps)
//            dual: grid (pieces, heads, ceil(head_dim / DIMS)), block (any); mma: as it says
//            carry: grid (batch, any), block (any), no shared memory
// aliasing   none
// traffic    inputs twice and out once; of states tokens / piece * heads * head_dim * state_size * 4 bytes, four times.
//            That does not limit it. Per token and head_dim * state_size states the recurrence takes twice as many
//            exponentials (Mamba-1: the special function units set the pace) and five times as many multiply-adds; the
//            dual form about three times as many multiply-adds, on CUDA cores with operands from shared memory, whose
//            bandwidth allows about half their rate, or on tensor cores twice as many of these
#include "prelude.cuh"
#include "params.h"
#include "selective_state.cuh"
#include "sequences.cuh"
#include "warp.cuh"

using T = CA_T;                                 // x, z, B, C and out
using DT = CA_DT;                               // dt
using S = CA_S;                                 // state
constexpr bool OUTPUTS = CA_OUTPUTS;            // step 3 in place of step 1
constexpr bool STATE_DECAYS = CA_STATE_DECAYS;  // A has an axis of states
constexpr int VEC = CA_VEC;                     // numbers of one thread that are computed together
static_assert(sizeof(SelectiveScanArgs) == CA_SIZEOF_ARGS, "selective_scan: Python and CUDA disagree on its arguments");

// States of a head, by dim; a null pointer is zeros, or nowhere.
template <typename U>
struct HeadStates {
  U* data;
  int64_t stride_dim;
};

// The block's piece, and where its states come from and go to.
struct Work {
  Piece piece;
  bool has_slot;
  HeadStates<float> carried;  // of the piece, null if its sequence has no other
  HeadStates<S> pool;         // null without one
  bool reads_pool;            // the piece begins with what is there
  float* total;               // [head_dim]

  // Numbered `number`; of head `head`.
  __device__ __forceinline__ Work(const SelectiveScanArgs& args, int number, int head)
      : piece(find_piece(args.cu_seqlens, args.batch, args.tokens, args.piece, number)),
        carried{nullptr, args.in.state_size}, pool{nullptr, args.stride_dim}, total(nullptr) {
    const int64_t slot = find_slot(args.slots, args.batch, args.num_slots, piece.seq);
    has_slot = slot >= 0;
    reads_pool = has_slot && args.state != nullptr && (args.has_state == nullptr || args.has_state[piece.seq] != 0);
    if (has_slot && args.state != nullptr) {
      pool.data = static_cast<S*>(args.state) + slot * args.stride_slot + head * args.stride_head;
    }
    if (piece.length > args.piece) {
      const int64_t kept = (first_kept(piece, args.piece) + piece.begin / args.piece) * args.in.heads + head;
      carried.data = args.carried + kept * args.in.head_dim * args.in.state_size;
      total = args.totals + kept * args.in.head_dim;
    }
  }
  __device__ __forceinline__ bool is_last() const { return piece.end == piece.length; }
  // Whether there is something to do beside zeros.
  __device__ __forceinline__ bool is_needed() const { return has_slot && (OUTPUTS || !is_last()); }

  __device__ __forceinline__ float begin(int dim, int n) const {
    if (!OUTPUTS) return 0.0f;
    if (carried.data != nullptr) return carried.data[dim * carried.stride_dim + n];
    return reads_pool ? to_float(pool.data[dim * pool.stride_dim + n]) : 0.0f;
  }
  // Four of them; those past state_size are 0.
  __device__ __forceinline__ Floats<4> begin_four(int dim, int n, int state_size) const {
    if (!OUTPUTS || (carried.data == nullptr && !reads_pool)) return Floats<4>::all(0.0f);
    if (carried.data == nullptr) return load_part<4>(pool.data + dim * pool.stride_dim + n, state_size - n, false);
    return load_part<4>(carried.data + dim * carried.stride_dim + n, state_size - n, state_size % 4 == 0);
  }
  __device__ __forceinline__ void end(int dim, int n, float state) const {
    if (!OUTPUTS) carried.data[dim * carried.stride_dim + n] = state;
    else if (is_last() && pool.data != nullptr) pool.data[dim * pool.stride_dim + n] = from_float<S>(state);
  }
};

// Row `token` of the piece's sequence, of head `head`.
template <typename U>
__device__ __forceinline__ const U* row_of(const HeadView& view, const Piece& piece, int token, int64_t head) {
  return static_cast<const U*>(view.data) + static_cast<int64_t>(piece.first + token) * view.stride_token +
         head * view.stride_head;
}

__device__ __forceinline__ T* out_row(const SelectiveScanArgs& args, const Piece& piece, int token, int head) {
  return const_cast<T*>(row_of<T>(args.out, piece, token, head));
}

// A piece of no sequence, or of one without a slot: dims first, first + step, ... become zeros.
__device__ __forceinline__ void write_zeros(const SelectiveScanArgs& args, const Piece& piece, int head, int first,
                                            int last, int step) {
  for (int token = piece.begin; token < piece.end; ++token) {
    T* out = out_row(args, piece, token, head);
    for (int dim = first; dim < last; dim += step) out[dim] = from_float<T>(0.0f);
  }
}

#if CA_FORM == 0

CA_KERNEL __launch_bounds__(256) void selective_scan_carry(const __grid_constant__ SelectiveScanArgs args) {
  const SelectiveInputs& in = args.in;
  const int number = first_piece(args.cu_seqlens, args.tokens, args.piece, blockIdx.x);
  const int64_t head_states = static_cast<int64_t>(in.head_dim) * in.state_size;
  const int64_t piece_states = in.heads * head_states, step = static_cast<int64_t>(gridDim.y) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; i < piece_states; i += step) {
    const int head = i / head_states, dim = i % head_states / in.state_size, n = i % in.state_size;
    const Work work(args, number, head);
    if (!work.has_slot || work.carried.data == nullptr) return;
    const float rate = channel(in.A, head, dim)[STATE_DECAYS ? n : 0];
    float state = work.reads_pool ? to_float(work.pool.data[dim * work.pool.stride_dim + n]) : 0.0f;
    float* carried = work.carried.data + dim * work.carried.stride_dim + n;
    const float* total = work.total + dim;
    for (int begin = 0; begin < work.piece.length; begin += args.piece) {
      const bool is_last = work.piece.length - begin <= args.piece;
      const float added = is_last ? 0.0f : *carried, steps = is_last ? 0.0f : *total;
      *carried = state;
      state = fmaf(expf(rate * steps), state, added);
      carried += piece_states;
      total += static_cast<int64_t>(in.heads) * in.head_dim;
    }
  }
}

#elif CA_FORM == 1
#include "selective_recurrence.cuh"

CA_KERNEL __launch_bounds__(128, 3) void selective_scan(const __grid_constant__ SelectiveScanArgs args) {
  scan_by_tokens(args);
}

#elif CA_FORM == 3
#include "selective_mma.cuh"

CA_KERNEL __launch_bounds__(THREADS, STATES == 256 ? 2 : 3) void
selective_scan_mma(const __grid_constant__ SelectiveScanArgs args) {
  scan_on_tensor_cores(args);
}

#else
#include "selective_dual.cuh"

constexpr int MIN_BLOCKS = VEC == 8 ? 2 : 4;  // shared memory allows two with 128 states

CA_KERNEL __launch_bounds__(128, MIN_BLOCKS) void selective_scan_dual(const __grid_constant__ SelectiveScanArgs args) {
  scan_by_products(args);
}

#endif
