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

// The page table of one sequence in two halves: ask() reads the entry of a token, answer() looks at what was read, so
// that a kernel may do other things while the entry is on its way.
struct TokenRequest {
  int64_t entry;  // address of a block, 0 for none, or without block pointers the 32 bits of a page id, -1 for none
  int32_t slot;
};

struct SequencePages {
  static constexpr int64_t NO_ID = 0xffffffff;
  int64_t first;    // entry of the sequence's page 0, without pages the slot of its token 0
  int32_t columns;  // entries, without pages tokens

  __device__ __forceinline__ SequencePages(const PageTable& table, int64_t seq) {
    first = seq * table.stride_seq, columns = table.max_pages;
    const int32_t* starts = table.row_starts != nullptr ? table.row_starts : table.indptr;
    if (starts == nullptr) return;
    first = starts[seq];
    // never past the last entry
    const int64_t count = min(starts[seq + 1], table.max_pages) - first;
    columns = first < 0 || count < 0 ? 0 : static_cast<int32_t>(count);
  }
  // Nothing is read unless `wanted`.
  __device__ __forceinline__ TokenRequest ask(const PageTable& table, int32_t token, bool wanted) const {
    if (table.row_starts != nullptr)
      return {wanted && token < columns ? 0 : NO_ID, static_cast<int32_t>(first) + token};
    const int32_t column = token / table.page_size;
    TokenRequest out = {table.block_ptrs != nullptr ? 0 : NO_ID, token - column * table.page_size};
    if (wanted && column < columns) {
      if (table.block_ptrs != nullptr) out.entry = table.block_ptrs[first + column];
      else out.entry = static_cast<uint32_t>(table.block_table[first + column]);  // no sign: that would wait for it
    }
    return out;
  }
  __device__ __forceinline__ TokenSlot answer(const PageTable& table, const TokenRequest& found) const {
    if (table.block_ptrs != nullptr) return {found.entry == 0 ? -1 : found.entry, found.slot};
    const int32_t id = static_cast<int32_t>(found.entry);
    const bool inside = id >= 0 && (id < table.num_pages || table.row_starts != nullptr);
    return {inside ? id : -1, found.slot};
  }
};

// Where token `token` >= 0 of sequence `seq` lives.
__device__ __forceinline__ TokenSlot find_token(const PageTable& table, int64_t seq, int32_t token) {
  const SequencePages pages(table, seq);
  return pages.answer(table, pages.ask(table, token, true));
}

// Row of one token and head; null for a token in no page. C: what the view's strides count.
template <typename C>
__device__ __forceinline__ C* kv_row(const KvView& view, const PageTable& table, TokenSlot at, int64_t head) {
  if (at.page < 0) return nullptr;
  const int64_t inside = at.slot * view.stride_token + head * view.stride_head;
  if (table.block_ptrs != nullptr) return reinterpret_cast<C*>(at.page + view.offset) + inside;
  return static_cast<C*>(view.data) + at.page * view.stride_page + inside;
}

// Where the scale or zero of one token, head and group of dims is: `array` holds those of all pages, or is null and
// `offset` bytes into each block are those of its tokens. The token must be in a page.
template <typename S>
__device__ __forceinline__ S* kv_parameter(const KvScale& view, const PageTable& table, TokenSlot at, int64_t head,
                                           int group, void* array, int64_t offset) {
  const int64_t inside = at.slot * view.stride_token + head * view.stride_head + group * view.stride_group;
  if (table.block_ptrs != nullptr && array == nullptr) return reinterpret_cast<S*>(at.page + offset) + inside;
  return static_cast<S*>(array) + at.page * view.stride_page + inside;
}
template <typename S>  // S: the type of scales
__device__ __forceinline__ S* kv_scale(const KvScale& view, const PageTable& table, TokenSlot at, int64_t head,
                                       int group) {
  return in_global(kv_parameter<S>(view, table, at, head, group, view.scale, view.scale_offset));
}
template <typename S>  // in a format that has zeros
__device__ __forceinline__ S* kv_zero(const KvScale& view, const PageTable& table, TokenSlot at, int64_t head,
                                      int group) {
  return in_global(kv_parameter<S>(view, table, at, head, group, view.zero, view.zero_offset));
}

#endif  // CUPYATTN_PAGE_TABLE_CUH
