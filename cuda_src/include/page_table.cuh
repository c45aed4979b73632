// SPDX-License-Identifier: Apache-2.0
// page_table.cuh - from a token's number to the address of its key or value row.
//
// Page ids and slots are int32 at rest and int64 the moment they meet a stride. An id outside [0, num_pages) and a
// token past the table's end have no slot, so nothing is read through them.
#ifndef CUPYATTN_PAGE_TABLE_CUH
#define CUPYATTN_PAGE_TABLE_CUH

#include "params.h"
#include "prelude.cuh"

struct TokenSlot {
  int32_t page;  // -1: the token is in no page
  int32_t slot;  // index inside the page
};

// Where token `token` >= 0 of sequence `seq` lives.
__device__ __forceinline__ TokenSlot find_token(const PageTable& table, int64_t seq, int32_t token) {
  const int32_t column = token / table.page_size;
  int32_t page = -1;
  if (column < table.max_pages) page = table.block_table[seq * table.stride_seq + column];
  if (page >= table.num_pages) page = -1;
  return {page < 0 ? -1 : page, token - column * table.page_size};
}

// Row of one token and head; null for a token in no page.
template <typename T>
__device__ __forceinline__ const T* kv_row(const KvView& view, TokenSlot at, int64_t head) {
  if (at.page < 0) return nullptr;
  return static_cast<const T*>(view.data) + at.page * view.stride_page + at.slot * view.stride_token +
         head * view.stride_head;
}

#endif  // CUPYATTN_PAGE_TABLE_CUH
