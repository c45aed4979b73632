// SPDX-License-Identifier: Apache-2.0
// sequences.cuh - the tokens of packed sequences, cut into pieces that begin at multiples of `size` of their sequence.
//
// Nothing of the lengths is known to whoever launches: piece k of sequence s has the number
// cu_seqlens[s] / size + s + k, which is unique and below tokens / size + batch + 1; numbers of no piece are empty.
#ifndef CUPYATTN_SEQUENCES_CUH
#define CUPYATTN_SEQUENCES_CUH

#include "prelude.cuh"

struct Piece {
  int seq;     // batch: rows behind the last sequence
  int first;   // row of the sequence's first token
  int begin;   // tokens [begin, end) of the sequence, none when they are equal
  int end;
  int length;  // tokens of the sequence
};

// First row of sequence `seq`, inside the rows there are whatever cu_seqlens holds. Null: one sequence of all rows.
__device__ __forceinline__ int first_row(const int32_t* cu_seqlens, int tokens, int seq) {
  if (cu_seqlens == nullptr) return seq == 0 ? 0 : tokens;
  return min(max(cu_seqlens[seq], 0), tokens);
}

// The number of piece 0 of sequence `seq`.
__device__ __forceinline__ int first_piece(const int32_t* cu_seqlens, int tokens, int size, int seq) {
  return first_row(cu_seqlens, tokens, seq) / size + seq;
}

__device__ __forceinline__ Piece find_piece(const int32_t* cu_seqlens, int batch, int tokens, int size, int number) {
  int seq = 0, behind = batch + 1;  // the last sequence whose piece 0 has at most this number is in [seq, behind)
  while (behind - seq > 1) {
    const int middle = (seq + behind) / 2;
    if (first_piece(cu_seqlens, tokens, size, middle) <= number) seq = middle;
    else behind = middle;
  }
  const int first = first_row(cu_seqlens, tokens, seq);
  const int length = (seq < batch ? first_row(cu_seqlens, tokens, seq + 1) : tokens) - first;
  const int64_t begin = static_cast<int64_t>(number - first / size - seq) * size;
  if (begin < 0 || begin >= length) return {seq, first, 0, 0, length};
  const int64_t end = min(begin + size, static_cast<int64_t>(length));
  return {seq, first, static_cast<int>(begin), static_cast<int>(end), length};
}

// Where piece 0 of a sequence of several pieces keeps something for each of them, among at most
// ceil(2 * tokens / size): such a sequence has no more pieces than halves of `size` tokens.
__device__ __forceinline__ int64_t first_kept(const Piece& piece, int size) {
  return ceil_div(static_cast<int64_t>(2) * piece.first, static_cast<int64_t>(size));
}

// The slot of sequence `seq` in a pool, -1 where there is none: it is then skipped.
__device__ __forceinline__ int64_t find_slot(const int32_t* slots, int batch, int num_slots, int seq) {
  if (seq >= batch) return -1;
  const int slot = slots == nullptr ? seq : slots[seq];
  return slot < num_slots ? slot : -1;
}

#endif  // CUPYATTN_SEQUENCES_CUH
