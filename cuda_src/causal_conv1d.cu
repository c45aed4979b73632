// SPDX-License-Identifier: Apache-2.0
// causal_conv1d.cu - causal depthwise convolution over time; the last inputs of every sequence are kept in a pool.
//
//   y[t,c] = act(bias[c] + sum_{j < width} weight[c,j] * u[t - (width - 1) + j,c])
//   u[t,c] = x[t,c] for t >= 0; before that what slot `slots[seq]` of the state holds, zeros for a new sequence
//   state[slot,c,:] <- the last state_len of (old state, x). Circular, with positions: x[t] goes to place
//   (positions[seq] + t) mod state_len, and the newest old input stands before positions[seq].
//   Math in float32, one rounding on store. A sequence without a slot, and rows of no sequence, give zeros.
//
// A thread takes VEC channels of one piece of a sequence:
//   1. the window of earlier inputs, from the state or from x      2. the state, by the sequence's first piece alone
//   3. the outputs; with WIDTH 0 before step 2, since they read their windows from memory
// One token of every sequence (STEP), and states whose channels are one access each (ROW), have ways of their own: in a
// step all loads come before the first number is used.
//
// launch     grid (pieces, any), block (any); the blocks and threads of a piece share its channels. `piece` is at least
//            width - 1; with ROW or STEP a sequence is one piece. Shared memory 0, barriers none, warp ops none
// aliasing   none
// traffic    sequences * channels * (tokens * 2 * sizeof(T) + state) bytes; of the state every element is read at most
//            once and written once: 2 * state_len elements, circular width - 1 + tokens of them
// in flight  an H200 wants about 32 KiB per SM when it only reads, half of that when it writes as much. With blocks of
//            128 threads, packed rows: AHEAD * 16 bytes per thread in 3 blocks, 48 KiB. One token by rows: 32 bytes of
//            state and at least 4 of x in 8 blocks, 36 KiB; by channels HELD accesses and one of x, with 16-bit states
//            and x 64 bytes, in 5 blocks 40 KiB, with float32 states more. Taps and biases come on top, from L2
#include "prelude.cuh"
#include "params.h"
#include "eight_floats.cuh"
#include "raw_numbers.cuh"
#include "sequences.cuh"
#include "silu.cuh"

using T = CA_T;                                      // x and out
using W = CA_W;                                      // weight and bias
using S = CA_S;                                      // state
constexpr int VEC = CA_VEC;                          // channels per thread; divides channels and strides of x and out
constexpr int WIDTH = CA_WIDTH;                      // at least width: inputs are held in registers; 0: any width
constexpr bool CHANNEL_VECTORS = CA_CHANNEL_VECTORS; // channels of the state are neighbours, VEC of them aligned
constexpr int ROW = CA_ROW;                          // state_len of a state whose channels are one access each; or 0
constexpr bool STEP = CA_STEP;                       // one token per sequence, WIDTH whole taps, HELD kept inputs
static_assert(sizeof(CausalConv1dArgs) == CA_SIZEOF_ARGS, "causal_conv1d: Python and CUDA disagree on its arguments");
static_assert(ROW == 0 || (VEC == 1 && WIDTH > 0 && WIDTH <= ROW + 1), "causal_conv1d: a row holds the window");
static_assert(!STEP || WIDTH > 0, "causal_conv1d: the window of a step is in registers");

using Channels = Floats<VEC>;
constexpr int HELD = WIDTH > 0 ? WIDTH - 1 : 0;  // earlier inputs in registers
constexpr int TAPS = WIDTH > 0 ? WIDTH : 1, WINDOW = HELD > 0 ? HELD : 1, PLACES = ROW > 0 ? ROW : 1;  // of arrays
constexpr int ACCESS = !CHANNEL_VECTORS ? 1 : VEC * sizeof(S) > 16 ? 16 / sizeof(S) : VEC;  // channels of the state
constexpr int AHEAD = 8;                         // tokens loaded before the first of them is used
constexpr int COUNT = ROW > 0 && STEP ? 32 / (ROW * sizeof(S)) : 1;  // rows of a thread, a block apart
constexpr int MIN_BLOCKS = ROW > 0 ? 8 : STEP ? 5 : 3;               // of 128 threads per SM

// An input of VEC channels as the state holds it.
struct Kept {
  Vec<S, ACCESS> part[VEC / ACCESS];

  __device__ __forceinline__ Channels numbers() const {
    Channels found;
#pragma unroll
    for (int v = 0; v < VEC / ACCESS; ++v) {
      float values[ACCESS];
      to_float(part[v], values);
#pragma unroll
      for (int j = 0; j < ACCESS; ++j) found.x[v * ACCESS + j] = values[j];
    }
    return found;
  }
};

// A sequence from channel c on.
struct Sequence {
  const CausalConv1dArgs& args;
  const T* x;     // token 0
  T* out;         // token 0
  S* state;       // place 0; null without
  int64_t c;
  int oldest;     // place of the oldest input
  int length;     // tokens
  bool is_new;    // what the state holds counts as zeros

  __device__ __forceinline__ RawNumbers<T, VEC> raw_input(int t) const {
    RawNumbers<T, VEC> raw;
    raw.load(x + t * args.x.stride_token);
    return raw;
  }
  __device__ __forceinline__ Channels input(int t) const { return raw_input(t).numbers(); }
  // Kept input i, 0 the oldest.
  __device__ __forceinline__ S* place(int i) const {
    const int at = i + oldest;
    return state + (at < args.state_len ? at : at - args.state_len) * args.stride_time;
  }
  __device__ __forceinline__ Kept raw_kept(int i) const {
    const S* p = place(i);
    Kept found;
#pragma unroll
    for (int v = 0; v < VEC / ACCESS; ++v) found.part[v] = load_vec<S, ACCESS>(p + v * ACCESS * args.stride_channel);
    return found;
  }
  __device__ __forceinline__ Channels kept(int i) const { return raw_kept(i).numbers(); }
  __device__ __forceinline__ void keep(int i, const Kept& values) const {
    S* p = place(i);
#pragma unroll
    for (int v = 0; v < VEC / ACCESS; ++v) store_global(p + v * ACCESS * args.stride_channel, values.part[v]);
  }
  __device__ __forceinline__ void keep(int i, const Channels& values) const {
    S* p = place(i);
#pragma unroll
    for (int v = 0; v < VEC; v += ACCESS) {
      float some[ACCESS];
#pragma unroll
      for (int j = 0; j < ACCESS; ++j) some[j] = values.x[v + j];
      store_global(p + v * args.stride_channel, from_float<S, ACCESS>(some));
    }
  }
  // The input `age` tokens before token t.
  __device__ __forceinline__ Channels earlier(int t, int age) const {
    if (t >= age) return input(t - age);
    const int i = args.state_len + t - age;
    return is_new || i < 0 ? Channels::all(0.0f) : kept(i);
  }
  __device__ __forceinline__ Channels tap(int age) const {
    const W* p = static_cast<const W*>(args.weight) + c * args.stride_weight_channel +
                 (args.width - 1 - age) * args.stride_weight_tap;
    Channels taps;
#pragma unroll
    for (int v = 0; v < VEC; ++v) taps.x[v] = to_float(p[v * args.stride_weight_channel]);
    return taps;
  }
  __device__ __forceinline__ Channels bias() const {
    Channels biases = Channels::all(0.0f);
    if (args.bias != nullptr) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) biases.x[v] = to_float(static_cast<const W*>(args.bias)[c + v]);
    }
    return biases;
  }
  // Of channel c + v: all WIDTH taps in one access, its bias.
  __device__ __forceinline__ Vec<W, TAPS> whole_taps(int64_t v) const {
    return load_vec<W, TAPS>(static_cast<const W*>(args.weight) + (c + v) * args.stride_weight_channel);
  }
  __device__ __forceinline__ W raw_bias(int64_t v) const {
    return args.bias != nullptr ? static_cast<const W*>(args.bias)[c + v] : from_float<W>(0.0f);
  }
  __device__ __forceinline__ void write(int t, const Channels& sum) const {
    store_floats<VEC>(out + t * args.out.stride_token, args.silu ? silu(sum) : sum);
  }

  // The state after the sequence; window[a - 1] is the input of age a before token 0.
  __device__ __forceinline__ void update(const Channels (&window)[WINDOW]) const {
    const int len = args.state_len;
    if (args.positions == nullptr) {
      const int stay = len - length;  // old inputs that only move; each is read before its place is written
      for (int i = 0; i < stay - HELD; ++i) keep(i, is_new ? Channels::all(0.0f) : kept(i + length));
#pragma unroll
      for (int age = HELD; age > 0; --age) {
        if (age <= stay) keep(stay - age, window[age - 1]);
      }
    }
    for (int t = max(0, length - len); t < length; ++t) {
      keep(args.positions == nullptr ? len - length + t : t % len, input(t));
    }
  }

  __device__ __forceinline__ void from_registers(int begin, int end) const {
    // 1. the window
    Channels taps[TAPS], window[WINDOW];
#pragma unroll
    for (int age = 0; age < WIDTH; ++age) {  // no branch around a load
      taps[age] = tap(min(age, args.width - 1));
      if (age >= args.width) taps[age] = Channels::all(0.0f);
    }
    const Channels biases = bias();
    if (begin > 0) {
#pragma unroll
      for (int age = 1; age <= HELD; ++age) window[age - 1] = input(begin - age);
    } else {
#pragma unroll
      for (int age = 1; age <= HELD; ++age) window[age - 1] = earlier(0, age);
    }

    // 2. the state
    if (state != nullptr && begin == 0) update(window);

    // 3. the outputs
    for (int t = begin; t < end; t += AHEAD) {
      RawNumbers<T, VEC> inputs[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (t + i < end) inputs[i] = raw_input(t + i);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (t + i >= end) break;
        const Channels newest = inputs[i].numbers();
        Channels sum = biases;
#pragma unroll
        for (int age = HELD; age > 0; --age) {
          if (age < args.width) sum.add_product(taps[age], window[age - 1]);
        }
        sum.add_product(taps[0], newest);
        write(t + i, sum);
#pragma unroll
        for (int age = HELD; age > 1; --age) window[age - 1] = window[age - 2];
        if (HELD > 0) window[0] = newest;
      }
    }
  }

  // The state of one channel is one access each way, and its end the window.
  __device__ __forceinline__ void from_row() const {
    float row[PLACES], taps[TAPS];
    to_float(load_vec<S, PLACES>(state), row);
#pragma unroll
    for (int age = 0; age < WIDTH; ++age) taps[age] = age < args.width ? tap(age).x[0] : 0.0f;
    const float biases = bias().x[0];
#pragma unroll 1
    for (int t = 0; t < length; ++t) {
      const float newest = input(t).x[0];
      float sum = biases;
#pragma unroll
      for (int age = WIDTH - 1; age > 0; --age) {
        if (age < args.width) sum = fmaf(taps[age], row[PLACES - age], sum);
      }
      write(t, Channels::all(fmaf(taps[0], newest, sum)));
#pragma unroll
      for (int i = 0; i < PLACES - 1; ++i) row[i] = row[i + 1];
      row[PLACES - 1] = newest;
    }
    store_global(state, from_float<S, PLACES>(row));
  }

  // One token of COUNT rows, `apart` channels from each other; for one that does not exist the first one's token.
  __device__ __forceinline__ void step_rows(int apart) const {
    RawNumbers<S, PLACES> raw[COUNT];
    Vec<W, TAPS> taps[COUNT];
    T newest[COUNT];
    W biases[COUNT];
    int64_t away[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      away[i] = c + i * apart < args.channels ? i * apart : 0;
      if (i == 0 || away[i] > 0) raw[i].load(state + away[i] * args.stride_channel);
      newest[i] = x[away[i] * args.x.stride_channel];
      taps[i] = whole_taps(away[i]);
      biases[i] = raw_bias(away[i]);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Floats<PLACES> row = raw[i].numbers();
      Channels sum = Channels::all(to_float(biases[i]));
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const float u = j < HELD ? row.x[PLACES - HELD + j] : to_float(newest[i]);
        sum.add_product(u, Channels::all(to_float(taps[i].v[j])));
      }
      if (args.silu) sum = silu(sum);
      if (i > 0 && away[i] == 0) break;
      out[away[i] * args.out.stride_channel] = from_float<T>(sum.x[0]);
      float shifted[PLACES];
#pragma unroll
      for (int j = 0; j < PLACES; ++j) shifted[j] = j < PLACES - 1 ? row.x[j + 1] : to_float(newest[i]);
      store_global(state + away[i] * args.stride_channel, from_float<S, PLACES>(shifted));
    }
  }

  // One token of VEC channels.
  __device__ __forceinline__ void step() const {
    const int len = args.state_len;
    const RawNumbers<T, VEC> raw = raw_input(0);
    Kept window[WINDOW];
#pragma unroll
    for (int age = 1; age <= HELD; ++age) window[age - 1] = raw_kept(len - age);
    Vec<W, TAPS> taps[VEC];
    W biases[VEC];
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      taps[v] = whole_taps(v);
      biases[v] = raw_bias(v);
    }
    const Channels newest = raw.numbers();
    Channels sum;
#pragma unroll
    for (int v = 0; v < VEC; ++v) sum.x[v] = to_float(biases[v]);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      Channels factors;
#pragma unroll
      for (int v = 0; v < VEC; ++v) factors.x[v] = to_float(taps[v].v[j]);
      sum.add_product(factors, j < HELD ? window[HELD - 1 - j].numbers() : newest);
    }
    write(0, sum);
    if (args.positions == nullptr) {
      for (int i = 0; i < len - 1 - HELD; ++i) keep(i, raw_kept(i + 1));
#pragma unroll
      for (int age = HELD; age > 0; --age) {
        if (age < len) keep(len - 1 - age, window[age - 1]);
      }
    }
    keep(args.positions == nullptr ? len - 1 : 0, newest);
  }

  __device__ __forceinline__ void from_memory(int begin, int end) const {
    const Channels biases = bias(), none[WINDOW] = {};
    for (int t = begin; t < end; ++t) {
      Channels sum = biases;
      for (int age = args.width - 1; age >= 0; --age) sum.add_product(tap(age), earlier(t, age));
      write(t, sum);
    }
    if (state != nullptr && begin == 0) update(none);
  }
};

CA_KERNEL __launch_bounds__(128, MIN_BLOCKS) void causal_conv1d(const __grid_constant__ CausalConv1dArgs args) {
  Piece piece;
  if constexpr (STEP) {
    piece = {static_cast<int>(blockIdx.x), 0, 0, 1, 1};
  } else if (args.is_packed) {
    piece = find_piece(args.cu_seqlens, args.batch, args.tokens, args.piece, blockIdx.x);
  } else {  // `tokens` of every sequence
    const int pieces = (args.tokens + args.piece - 1) / args.piece, begin = blockIdx.x % pieces * args.piece;
    piece = {static_cast<int>(blockIdx.x / pieces), 0, begin, min(begin + args.piece, args.tokens), args.tokens};
  }
  if (piece.begin == piece.end) return;
  const bool has_states = args.state != nullptr;
  const int64_t slot = find_slot(args.slots, args.batch, has_states ? args.num_slots : args.batch, piece.seq);
  const int64_t x_row = piece.seq * args.x.stride_seq + piece.first * args.x.stride_token;
  const int64_t out_row = piece.seq * args.out.stride_seq + piece.first * args.out.stride_token;
  const bool is_new = !has_states || (args.has_state != nullptr && slot >= 0 && args.has_state[piece.seq] == 0);
  int oldest = 0;
  if (args.positions != nullptr && slot >= 0 && args.state_len > 0) {
    oldest = args.positions[piece.seq] % args.state_len;
    if (oldest < 0) oldest += args.state_len;
  }

  const int threads = blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * COUNT * threads * VEC + threadIdx.x * VEC;
  for (int64_t c = first; c < args.channels; c += static_cast<int64_t>(gridDim.y) * COUNT * threads * VEC) {
    T* out = static_cast<T*>(args.out.data) + out_row + c * args.out.stride_channel;
    if (slot < 0) {
      float zeros[VEC] = {};
      for (int i = 0; i < COUNT && c + i * threads < args.channels; ++i) {
        T* to = out + i * threads * args.out.stride_channel;
        for (int t = piece.begin; t < piece.end; ++t) {
          store_global(to + t * args.out.stride_token, from_float<T, VEC>(zeros));
        }
      }
      continue;
    }
    const T* x = static_cast<const T*>(args.x.data) + x_row + c * args.x.stride_channel;
    S* state = has_states ? static_cast<S*>(args.state) + slot * args.stride_slot + c * args.stride_channel : nullptr;
    const Sequence sequence{args, x, out, state, c, oldest, piece.length, is_new};
    if constexpr (ROW > 0 && STEP) sequence.step_rows(threads);
    else if constexpr (ROW > 0) sequence.from_row();
    else if constexpr (STEP) sequence.step();
    else if constexpr (WIDTH > 0) sequence.from_registers(piece.begin, piece.end);
    else sequence.from_memory(piece.begin, piece.end);
  }
}
