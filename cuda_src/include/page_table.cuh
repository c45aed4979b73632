// SPDX-License-Identifier: Apache-2.0
// page_table.cuh - from a token's number to the address of its key or value row.
//
// Page ids and slots are int32 at rest and int64 the moment they meet a stride. An id outside [0, num_pages), a null
// block pointer and a token past the table's end have no slot, so nothing is read through them.
#ifndef CUPYATTN_PAGE_TABLE_CUH
#define CUPYATTN_PAGE_TABLE_CUH

#include "params.h"
#include "prelude.cuh"

struct TokenSlot {
  int64_t page;  // page id, or the address of a block; -1: the token is in no page
  int32_t slot;  // index inside the page
};

// Where token `token` >= 0 of sequence `seq` lives.
__device__ __forceinline__ TokenSlot find_token(const PageTable& table, int64_t seq, int32_t token) {
  if (table.row_starts != nullptr) {
    const int32_t row = table.row_starts[seq] + token;
    return {row < table.row_starts[seq + 1] ? 0 : -1, row};
  }
  int32_t column = token / table.page_size;
  const int32_t slot = token - column * table.page_size;
  int64_t first = seq * table.stride_seq, columns = table.max_pages;
  if (table.indptr != nullptr) {
    first = table.indptr[seq];
    columns = table.indptr[seq + 1] - first;
  }
  int64_t page = -1;
  if (column < columns) {
    if (table.block_ptrs != nullptr) {
      page = table.block_ptrs[first + column];
      if (page == 0) page = -1;
    } else {
      page = table.block_table[first + column];
      if (page < 0 || page >= table.num_pages) page = -1;
    }
  }
  return {page, slot};
}

// Row of one token and head; null for a token in no page. C: what the view's strides count.
template <typename C>
__device__ __forceinline__ C* kv_row(const KvView& view, const PageTable& table, TokenSlot at, int64_t head) {
  if (at.page < 0) return nullptr;
  const int64_t inside = at.slot * view.stride_token + head * view.stride_head;
  if (table.block_ptrs != nullptr) return reinterpret_cast<C*>(at.page + view.offset) + inside;
  return static_cast<C*>(view.data) + at.page * view.stride_page + inside;
}

// Scale of one token, head and group of dims, S the type of scales. The token must be in a page.
template <typename S>
__device__ __forceinline__ S* kv_scale(const KvScale& view, const PageTable& table, TokenSlot at, int64_t head,
                                       int group) {
  const int64_t inside = at.slot * view.stride_token + head * view.stride_head + group * view.stride_group;
  if (table.block_ptrs != nullptr && view.scale == nullptr)
    return reinterpret_cast<S*>(at.page + view.scale_offset) + inside;
  return static_cast<S*>(view.scale) + at.page * view.stride_page + inside;
}

// Zero of one token, head and group of dims, in a format that has zeros.
template <typename S>
__device__ __forceinline__ S* kv_zero(const KvScale& view, const PageTable& table, TokenSlot at, int64_t head,
                                      int group) {
  const int64_t inside = at.slot * view.stride_token + head * view.stride_head + group * view.stride_group;
  if (table.block_ptrs != nullptr && view.zero == nullptr)
    return reinterpret_cast<S*>(at.page + view.zero_offset) + inside;
  return static_cast<S*>(view.zero) + at.page * view.stride_page + inside;
}

#endif  // CUPYATTN_PAGE_TABLE_CUH
