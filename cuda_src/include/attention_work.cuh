// SPDX-License-Identifier: Apache-2.0
// attention_work.cuh - which keys a query sees, what a block has to do, and where its results go: what all attention
// kernels and the planner (schedule.cu) share.
//
// The q_len * heads_per_kv query rows of a (sequence, KV head) are packed token by token: row = query * heads_per_kv +
// head in the group. A unit is ROWS of them; a work item is a unit and a range of its keys. Keys are counted locally:
// key l of the cache is token l * key_stride + key_offset of the sequence (context parallel), otherwise token l.
//
// Query i of sequence b stands at n = seqlen - q_len + i and sees the tokens t with
//   t >= cache_start,  causal: t <= n,  window W: t > n - W and t < n + W,  tree mask: bit of t among the new tokens.
#ifndef CUPYATTN_ATTENTION_WORK_CUH
#define CUPYATTN_ATTENTION_WORK_CUH

#include "params.h"
#include "prelude.cuh"

constexpr int KEY_TILE = 64;  // keys; work is cut at multiples of it

// ---- sequences: Args is AttentionArgs or ScheduleArgs --------------------------------------------------

// Query tokens of a sequence are [begin, end) among all.
struct QueryRange {
  int64_t begin, end;
};

template <typename Args>
__device__ __forceinline__ QueryRange queries_of(const Args& args, int64_t seq) {
  if (args.cu_seqlens_q == nullptr) return {seq * args.q_len, (seq + 1) * args.q_len};
  const int begin = args.cu_seqlens_q[seq], end = args.cu_seqlens_q[seq + 1];
  // not what of them would fit: that may be the queries of others
  return {begin, begin < 0 || end < begin || end > args.tokens ? begin : end};
}

template <typename Args>
__device__ __forceinline__ int num_queries(const Args& args, int64_t seq) {
  const QueryRange range = queries_of(args, seq);
  return static_cast<int>(range.end - range.begin);
}

// Tokens to attend to, 0 when finished.
template <typename Args>
__device__ __forceinline__ int num_tokens(const Args& args, int64_t seq) {
  if (args.finished != nullptr && args.finished[seq] != 0) return 0;
  if (args.cache_seqlens != nullptr) return max(0, args.cache_seqlens[seq * args.stride_seqlens]);
  const int begin = args.table.row_starts[seq], end = args.table.row_starts[seq + 1];
  return begin < 0 || end < begin ? 0 : end - begin;
}

struct KeyRange {  // [begin, end)
  int begin, end;
};

// The visible tokens of one sequence, and which of them are local keys.
struct Visibility {
  int seqlen;    // tokens to attend to
  int position;  // of query 0
  int start;     // first visible token
  int window;    // window_size, or past any length
  bool causal;   // and no tree mask
  int stride, offset, count;  // of local keys

  template <typename Args>
  __device__ __forceinline__ Visibility(const Args& args, int64_t seq) {
    seqlen = num_tokens(args, seq);
    position = seqlen - num_queries(args, seq);
    start = args.cache_starts == nullptr ? 0 : max(0, args.cache_starts[seq * args.stride_starts]);
    window = args.window_size > 0 ? args.window_size : 0x7fffffff;
    causal = args.causal != 0 && args.tree_mask == nullptr;
    stride = args.key_stride;
    offset = args.key_offsets == nullptr ? args.key_offset : args.key_offsets[seq];
    count = args.key_counts == nullptr ? 0x7fffffff : args.key_counts[seq];
  }

  // Local keys that some query from `first` to `last` may see. begin <= end, 0 0 when there are none.
  __device__ __forceinline__ KeyRange keys(int first, int last) const {
    const int newest = position + last, oldest = position + first;
    int high = seqlen - 1;
    if (causal) high = min(high, newest);
    else if (newest < 0x7fffffff - window) high = min(high, newest + window - 1);
    const int low = max(start, oldest < window ? 0 : oldest - window + 1);
    int begin = low - offset, end = high - offset + 1;  // tokens behind local key 0
    if (stride > 1) {
      begin = (max(begin, 0) + stride - 1) / stride;
      end = (max(end, 0) + stride - 1) / stride;
    }
    begin = max(begin, 0);
    end = min(end, count);
    return begin < end ? KeyRange{begin, end} : KeyRange{0, 0};
  }
  __device__ __forceinline__ int token(int key) const { return key * stride + offset; }
};

#ifdef CA_ROWS  // the rest is for kernels that attend

#include "attention_constants.cuh"

// ---- work items ----------------------------------------------------------------------------------------

struct WorkItem {
  int64_t seq;    // whose pages are read
  int kv_head;
  int first_row;  // of the unit's packed rows; with members the first entry of work.members
  int begin, end; // local keys, multiples of KEY_TILE
  int slot;       // of partial results; -1: the whole unit, the result is final. With num_splits the number of the split
  int unit;       // whose arrivals are counted; -1: none, nobody merges here
  int members;    // 0: rows of sequence seq; else the rows of so many sequences, to which all these keys are visible

  __device__ __forceinline__ WorkItem(const AttentionArgs& args, int index) {
    const int32_t* at = args.work.items + static_cast<int64_t>(index) * 8;
    const Vec<int32_t, 4> head = load_vec<int32_t, 4>(at), tail = load_vec<int32_t, 4>(at + 4);
    seq = head.v[0], kv_head = head.v[1], first_row = head.v[2], begin = head.v[3];
    end = tail.v[0], slot = tail.v[1], unit = tail.v[2], members = tail.v[3];
  }
};

// A query row of a work item.
struct QueryRow {
  int64_t seq;
  int64_t token;  // among all query tokens
  int query;      // in its sequence
  int head;
};

struct RowTile {
  WorkItem item;
  int num_rows;     // at most ROWS
  int rows_each;    // packed rows of one sequence
  KeyRange visible; // local keys of the item that some row may see

  __device__ __forceinline__ RowTile(const AttentionArgs& args, int index) : item(args, index) {
    rows_each = num_queries(args, item.seq) * args.heads_per_kv;
    num_rows = item.members > 0 ? shared_rows(args) : max(0, min(ROWS, rows_each - item.first_row));
    visible = {item.begin, item.end};
    if (item.members == 0) {
      const KeyRange seen = unit_keys(args);
      visible = {max(item.begin, seen.begin), min(item.end, seen.end)};
      if (args.num_splits > 0) {  // as the planner cut the unit
        const int first = seen.begin / KEY_TILE, tiles = (seen.end + KEY_TILE - 1) / KEY_TILE - first;
        const int each = max(1, (tiles + args.num_splits - 1) / args.num_splits);
        const int before = item.begin / KEY_TILE - first;
        item.slot = before / each;
        if (before < 0 || before > max(0, tiles - 1) || before != item.slot * each) num_rows = 0;  // of other lengths
        if (args.whole_to_out != 0 && tiles <= each) item.slot = -1;
        item.unit = -1;
      }
    }
    if (num_rows == 0 || visible.begin >= visible.end) visible = {item.begin, item.begin};
  }
  // Rows of all members; none if they are not what the list was made for, all of one length and no more than ROWS.
  __device__ __forceinline__ int shared_rows(const AttentionArgs& args) const {
    const int64_t rows = static_cast<int64_t>(item.members) * rows_each;
    bool alike = rows <= ROWS;
    if (args.cu_seqlens_q != nullptr)
      for (int i = 0; i < item.members; ++i)
        alike = alike && num_queries(args, args.work.members[2 * (item.first_row + i)]) * args.heads_per_kv == rows_each;
    return alike ? static_cast<int>(rows) : 0;
  }
  // Of an item without members: it has the unit's last keys.
  __device__ __forceinline__ bool is_last(const AttentionArgs& args) const { return item.end >= unit_keys(args).end; }
  // Local keys that some row of the item's unit may see.
  __device__ __forceinline__ KeyRange unit_keys(const AttentionArgs& args) const {
    const Visibility rule(args, item.seq);
    return rule.keys(item.first_row / args.heads_per_kv, (item.first_row + num_rows - 1) / args.heads_per_kv);
  }
  __device__ __forceinline__ QueryRow row(const AttentionArgs& args, int r) const {
    int64_t seq = item.seq;
    int packed = item.first_row + r;
    if (item.members > 0) {
      const int member = r / rows_each;
      seq = args.work.members[2 * (item.first_row + member)];
      packed = r - member * rows_each;
    }
    const int query = packed / args.heads_per_kv;
    return {seq, queries_of(args, seq).begin + query, query,
            item.kv_head * args.heads_per_kv + packed - query * args.heads_per_kv};
  }
  // Local keys row r may see, inside the item; empty for rows past num_rows. The mask and the tree mask come on top.
  __device__ __forceinline__ KeyRange keys(const AttentionArgs& args, int r) const {
    if (r >= num_rows) return {item.begin, item.begin};
    if (item.members > 0) return visible;
    const int query = (item.first_row + r) / args.heads_per_kv;
    const KeyRange seen = Visibility(args, item.seq).keys(query, query);
    return {max(visible.begin, seen.begin), min(visible.end, seen.end)};
  }
};

__device__ __forceinline__ const void* query_pointer(const SequenceView& view, const AttentionArgs& args, QueryRow row,
                                                     int64_t item_bytes) {
  // with cu_seqlens_q tokens are counted through all sequences, without it inside their own
  const int64_t token = args.cu_seqlens_q == nullptr ? row.query : row.token;
  const int64_t seq = args.cu_seqlens_q == nullptr ? row.seq : 0;
  return static_cast<const char*>(view.data) +
         (seq * view.stride_seq + token * view.stride_token + row.head * view.stride_head) * item_bytes;
}

#endif  // CA_ROWS

#endif  // CUPYATTN_ATTENTION_WORK_CUH
