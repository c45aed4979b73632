// SPDX-License-Identifier: Apache-2.0
// params.h - the one declaration of every kernel argument struct.
//
// Grammar, read by cupyattn/runtime/structs.py: one field per line, `type name;  // dtype [shape] meaning`.
// A type is a scalar (int32_t uint32_t int64_t float), a pointer to void or to a scalar, or a struct declared
// earlier. A pointer to const (and every pointer inside a `const` struct field) is only read by the kernel.
// Strides are in elements. Fields run from largest to smallest, so there is no hidden padding.
#ifndef CUPYATTN_PARAMS_H
#define CUPYATTN_PARAMS_H

#include "ints.h"

// ---- views shared by several kernels -------------------------------------------------------------------

struct RowView {
  void* data;          // T [rows, row_size] last axis contiguous
  int64_t stride_row;  // elements between rows
};

struct HeadView {
  void* data;            // T [tokens, heads, head_dim] last axis contiguous
  int64_t stride_token;  // elements between tokens
  int64_t stride_head;   // elements between heads
};

struct KvView {
  void* data;            // T [pages, page_size, num_kv_heads, head_dim] last axis contiguous, any other strides
  int64_t stride_page;   // elements between pages
  int64_t stride_token;  // elements between tokens of a page
  int64_t stride_head;   // elements between heads
};

struct PageTable {
  const int32_t* block_table;  // int32 [batch, max_pages] page ids, entries past a sequence's length are not read
  int64_t stride_seq;          // elements between rows of block_table
  int32_t max_pages;           // columns of block_table
  int32_t page_size;           // tokens per page
  int32_t num_pages;           // pages in the cache; an id outside [0, num_pages) makes its tokens invisible
  int32_t reserved;            // zero
};

// ---- one struct per kernel, in the order of the op list ------------------------------------------------

struct RmsNormArgs {
  const RowView x;     // T [rows, hidden] input
  const void* weight;  // W [hidden] gain
  RowView residual;    // R [rows, hidden] residual += x in place, read back before the norm; null for none
  RowView out;         // U [rows, hidden] norm(residual or x) * weight
  int32_t rows;        // number of rows
  int32_t hidden;      // row length
  float eps;           // added to the mean square
  int32_t reserved;    // zero
};

#endif  // CUPYATTN_PARAMS_H
