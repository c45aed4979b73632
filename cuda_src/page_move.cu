// SPDX-License-Identifier: Apache-2.0
// page_move.cu - copies pages within pools of pages: bytes, whatever they mean.
//
//   for every pool and move i:  pool[destinations[i], :tokens[i]] = pool[sources[i], :tokens[i]]
//   A source or destination outside [0, num_pages) makes a move none; tokens outside [0, page_size] are cut.
//
// Moves run in any order: no page may be a destination and anything else.
//
// launch     grid (moves * slices, num_pools), block any, one-dimensional; shared memory 0, barriers none, warp ops none
//            a thread has UNROLL accesses on their way
// aliasing   pools overlap nothing else
// traffic    the bytes moved, once each way
#include "prelude.cuh"
#include "params.h"

using Word = CA_WORD;             // what an access is made of: the widest that divides all addresses and rows
constexpr int VEC = CA_VEC;       // words per access
constexpr int UNROLL = 4;
constexpr int WIDTH = VEC * static_cast<int>(sizeof(Word));
static_assert(sizeof(PageMoveArgs) == CA_SIZEOF_ARGS, "page_move: Python and CUDA disagree on PageMoveArgs");

// Bytes from a page's start to its piece number `at`.
__device__ __forceinline__ int64_t offset_of(const PageMoveArgs& args, uint32_t at) {
  if (args.is_flat) return static_cast<int64_t>(at) * WIDTH;
  const uint32_t row = at / args.pieces, part = row / args.inner, token = part / args.outer;
  return token * args.stride_token + (part - token * args.outer) * args.stride_outer +
         (row - part * args.inner) * args.stride_inner + static_cast<int64_t>(at - row * args.pieces) * WIDTH;
}

CA_KERNEL __launch_bounds__(128) void page_move(const __grid_constant__ PageMoveArgs args) {
  const int64_t move = blockIdx.x / args.slices;
  const uint32_t slice = blockIdx.x - static_cast<uint32_t>(move) * args.slices;
  const int64_t from = args.sources[move * args.stride_source];
  const int64_t to = args.destinations[move * args.stride_destination];
  if (from < 0 || from >= args.num_pages || to < 0 || to >= args.num_pages) return;
  int tokens = args.page_size;
  if (args.tokens != nullptr) {
    tokens = args.tokens[move * args.stride_tokens];
    tokens = tokens < 0 ? 0 : tokens < args.page_size ? tokens : args.page_size;
  }
  char* pool = static_cast<char*>(reinterpret_cast<void* const*>(&args.pools)[blockIdx.y]);
  const char* source = pool + from * args.stride_page;
  char* destination = pool + to * args.stride_page;

  const uint32_t count = static_cast<uint32_t>(tokens) * args.outer * args.inner * args.pieces;
  const uint32_t step = args.slices * blockDim.x;
  for (uint32_t first = slice * blockDim.x + threadIdx.x; first < count; first += UNROLL * step) {
    Vec<Word, VEC> bytes[UNROLL];
    int64_t offsets[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      const uint32_t at = first + i * step;
      offsets[i] = offset_of(args, at);
      if (at < count) bytes[i] = load_vec<Word, VEC>(reinterpret_cast<const Word*>(source + offsets[i]));
    }
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      if (first + i * step < count) store_vec(reinterpret_cast<Word*>(destination + offsets[i]), bytes[i]);
    }
  }
}
