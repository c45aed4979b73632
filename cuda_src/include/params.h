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

struct SequenceView {
  void* data;            // T [batch, q_len, heads, head_dim] last axis contiguous
  int64_t stride_seq;    // elements between sequences; 0 when tokens are counted through all sequences
  int64_t stride_token;  // elements between tokens
  int64_t stride_head;   // elements between heads
};

struct ChannelView {
  void* data;              // T [batch, tokens, channels] any strides
  int64_t stride_seq;      // elements between sequences; 0 when tokens are counted through all sequences
  int64_t stride_token;    // elements between tokens
  int64_t stride_channel;  // elements between channels
};

struct KvView {
  void* data;            // C [pages, page_size, num_kv_heads, codes of a row] last axis contiguous, any other strides
  int64_t stride_page;   // elements between pages
  int64_t stride_token;  // elements between tokens of a page
  int64_t stride_head;   // elements between heads
  int64_t offset;        // bytes from a block's start to its first row, with block pointers; data is then null
};

struct KvScale {
  void* scale;           // S [pages, page_size, num_kv_heads, groups] x = code * scale + zero; stride 0 where shared
  void* zero;            // S like scale; null for none
  int64_t stride_page;   // elements between pages
  int64_t stride_token;  // elements between tokens of a page
  int64_t stride_head;   // elements between heads
  int64_t stride_group;  // elements between groups of dims
  int64_t scale_offset;  // bytes from a block's start to its first scale, with block pointers; scale is then null
  int64_t zero_offset;   // bytes from a block's start to its first zero, with block pointers
};

struct PageTable {
  const int32_t* block_table;  // int32 [batch, max_pages] page ids, or with indptr those of all sequences in one row
  const int32_t* indptr;       // int32 [batch + 1] pages of sequence b are entries indptr[b] to indptr[b + 1]; or null
  const int64_t* block_ptrs;   // uint64 addresses of blocks in place of page ids, with indptr; null for ids
  const int32_t* row_starts;   // int32 [batch + 1] no pages: token t of sequence b is slot row_starts[b] + t; or null
  int64_t stride_seq;          // elements between rows of block_table
  int32_t max_pages;           // columns of block_table, with indptr its length, with row_starts the rows
  int32_t page_size;           // tokens per page
  int32_t num_pages;           // pages in the cache; an id outside [0, num_pages) makes its tokens invisible
  int32_t reserved;            // zero
};

struct MaskView {
  const void* data;      // uint8 (nonzero: visible) or float [batch, heads, queries, keys] by strides, 0 to repeat
  int64_t stride_seq;    // elements between sequences
  int64_t stride_head;   // elements between heads
  int64_t stride_query;  // elements between queries
  int64_t stride_key;    // elements between keys
  int64_t queries;       // queries of a sequence the mask has rows for; to later ones all keys stay visible
  int32_t keys;          // keys of the mask; later ones stay visible
  int32_t kind;          // 0 none, 1 bool, 2 float32 added to the score, 3 float16 added, 4 bfloat16 added
};

struct PartialRows {
  float* out;            // float32 normalised outputs of items that are not a whole unit
  float* lse;            // float32 natural lse times lse_factor, -inf for a row without keys
  float* sum;            // float32 like lse: 1 for a row with keys, 0 without; null when not wanted
  int32_t* split_count;  // int32 [tokens] with num_splits: splits with a token's result, 0: it is in out; or null
  int64_t stride_split;  // elements of out between slots, or with num_splits between splits
  int64_t stride_token;  // elements of out between the rows of a slot, or with num_splits between tokens
  int64_t stride_head;   // elements of out between heads, with num_splits
  int64_t lse_split;     // the same strides of lse and sum
  int64_t lse_token;     // elements
  int64_t lse_head;      // elements
};

struct WorkItems {
  const int32_t* items;         // int32 [items, 8] seq, kv_head, first_row, begin, end, slot, unit, members
  const int32_t* worker_items;  // int32 [blocks + 1] block w runs items worker_items[w] to worker_items[w + 1]
  const int32_t* units;         // int32 [units, 2] first piece, pieces
  const int32_t* pieces;        // int32 [pieces] partial row (slot * ROWS + row) of a unit's row 0, in merge order
  const int32_t* members;       // int32 [members, 2] seq, unit of its KV head 0
  int32_t* counters;            // int32 [units] pieces that have arrived; zero before and after
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

struct AttentionArgs {
  const SequenceView q;          // T [tokens, num_heads, head_dim] queries after RoPE
  const KvView k;                // keys, in codes of the format
  const KvView v;                // values, in codes of the format
  const KvScale k_scale;         // scales of quantized keys
  const KvScale v_scale;         // scales of quantized values
  const PageTable table;         // where the keys of every sequence are
  const MaskView mask;           // user's mask
  SequenceView out;              // T [tokens, num_heads, head_dim_v] results
  PartialRows partials;          // results of items that are not a whole unit
  WorkItems work;                // which block does what
  const int32_t* cu_seqlens_q;   // int32 [batch + 1] first query token of every sequence; null: q_len tokens each
  const int32_t* cache_seqlens;  // int32 [batch] tokens to attend to, the new ones included; null: rows of table
  const int32_t* cache_starts;   // int32 [batch] first visible key; null for 0
  const int32_t* key_offsets;    // int32 [batch] position of local key 0; null for key_offset
  const int32_t* key_counts;     // int32 [batch] local keys; null: all below cache_seqlens
  const uint8_t* finished;       // bool [batch] sequences that give zeros; null for none
  const uint32_t* tree_mask;     // uint32 [tokens, words] bit j: new token j is visible; null: causal decides
  const float* alibi_slopes;     // float32 [num_heads]; null for none
  const float* sinks;            // float32 [num_heads] one extra logit per head; null for none
  float* lse;                    // float32 [tokens, num_heads] contiguous; null when not wanted
  int64_t stride_seqlens;        // elements between entries of cache_seqlens
  int64_t stride_starts;         // elements between entries of cache_starts
  int64_t stride_tree;           // elements between rows of tree_mask
  int64_t tree_words;            // words of such a row; new tokens past its last bit are hidden
  int32_t tokens;                // query tokens; what cu_seqlens_q says beyond them is cut
  int32_t q_len;                 // query tokens per sequence without cu_seqlens_q
  int32_t num_kv_heads;          // KV heads
  int32_t heads_per_kv;          // query heads per KV head
  int32_t head_dim;              // of queries and keys: a multiple of 8, at most 256
  int32_t head_dim_v;            // of values and out: a multiple of 8, at most 256
  int32_t causal;                // 1: a query sees no later token
  int32_t window_size;           // visible tokens, the query's own included; 0 for all
  int32_t key_stride;            // local key l stands at position l * key_stride + key_offset
  int32_t key_offset;            // position of local key 0
  int32_t num_splits;            // > 0: the caller merges so many splits per unit, found in partials by token and head
  int32_t whole_to_out;          // 1: of those, a unit that is one split goes to out all the same
  int32_t sink_in_partials;      // 1: the last of those splits counts the sink into its partial result
  float softmax_scale;           // natural scale of the scores
  float softcap;                 // scores become softcap * tanh(score / softcap); 0 for off
  float lse_factor;              // partial lse is stored times this
};

struct PagedDecodeArgs {
  const SequenceView q;          // T [batch, q_len, num_heads, head_dim] queries after RoPE
  const KvView k;                // KV [num_pages, page_size, num_kv_heads, head_dim]
  const KvView v;                // KV [num_pages, page_size, num_kv_heads, head_dim]
  const PageTable table;         // page ids of every sequence
  SequenceView out;              // T [batch, q_len, num_heads, head_dim] written when num_chunks == 1
  const int32_t* cache_seqlens;  // int32 [batch] tokens to attend to, the new ones included
  const int32_t* cache_starts;   // int32 [batch] first visible key; null for 0
  const float* sinks;            // float32 [num_heads] one extra logit per head; null for none
  float* lse;                    // float32 [batch, q_len, num_heads] contiguous; null when not wanted
  float* partial_out;            // float32 [num_chunks, batch, q_len, num_heads, head_dim] when num_chunks > 1
  float* partial_lse;            // float32 [num_chunks, batch, q_len, num_heads] when num_chunks > 1
  int64_t stride_seqlens;        // elements between entries of cache_seqlens
  int64_t stride_starts;         // elements between entries of cache_starts
  int32_t batch;                 // number of sequences
  int32_t q_len;                 // new tokens per sequence, the last ones of cache_seqlens
  int32_t num_kv_heads;          // KV heads
  int32_t heads_per_kv;          // query heads per KV head
  int32_t head_dim;              // multiple of 8, at most 256
  int32_t row_tiles;             // blocks per (sequence, KV head): ceil(q_len * heads_per_kv / rows per block)
  int32_t num_chunks;            // grid.y; chunks of 1024 tokens the page table can hold
  int32_t window_size;           // visible tokens, the query's own included; 0 for all
  float softmax_scale;           // natural scale of the scores
  float softcap;                 // scores become softcap * tanh(score / softcap); 0 for off
};

struct PartialView {
  const float* out;      // float32 [splits, tokens, heads, head_dim] last axis contiguous
  const float* lse;      // float32 [splits, tokens, heads] natural log over lse_scale, -inf where a split saw no key
  const float* sum;      // float32 like lse: what out is yet to be divided by; null for 1
  int64_t stride_split;  // elements of out between splits
  int64_t stride_token;  // elements of out between tokens
  int64_t stride_head;   // elements of out between heads
  int64_t lse_split;     // elements of lse between splits
  int64_t lse_token;     // elements of lse between tokens
  int64_t lse_head;      // elements of lse between heads
  int64_t sum_split;     // elements of sum between splits
  int64_t sum_token;     // elements of sum between tokens
  int64_t sum_head;      // elements of sum between heads
};

struct PartialList {
  PartialView part0;  // the first num_parts are used, merged in this order
  PartialView part1;  // second
  PartialView part2;  // third
  PartialView part3;  // fourth
  PartialView part4;  // fifth
  PartialView part5;  // sixth
  PartialView part6;  // seventh
  PartialView part7;  // eighth
};

struct SplitReduceArgs {
  const PartialList parts;      // partial results over disjoint key sets
  SequenceView out;             // U [tokens / q_len, q_len, heads, head_dim] merged output
  float* lse;                   // float32 [tokens, heads] contiguous; null when not wanted
  const float* sinks;           // float32 [heads] one extra logit per head; null for none
  const int32_t* split_counts;  // int32 [tokens] splits that count; 0: the row is final; null for all
  int64_t stride_counts;        // elements between entries of split_counts
  int32_t num_parts;            // 1 to 8
  int32_t splits;               // splits of every part
  int32_t tokens;               // rows are tokens x heads
  int32_t heads;                // heads per token
  int32_t head_dim;             // length of an output row
  int32_t q_len;                // tokens per sequence of out
  float lse_scale;              // every lse is multiplied by it
  int32_t reserved;             // zero
};

struct RopeArgs {
  const HeadView x;          // T [tokens, heads, head_dim] input
  HeadView out;              // T [tokens, heads, head_dim] may be x
  const void* cos;           // Table [max_pos, pairs * TABLE_STRIDE] last axis contiguous
  const void* sin;           // Table [max_pos, pairs * TABLE_STRIDE] last axis contiguous
  const int32_t* positions;  // int32 [tokens] table row of every token
  int64_t stride_cos;        // elements between rows of cos
  int64_t stride_sin;        // elements between rows of sin
  int64_t stride_position;   // elements between entries of positions
  int32_t tokens;            // number of tokens
  int32_t heads;             // heads per token
  int32_t head_dim;          // length of a head
  int32_t rotary_dim;        // rotated dims of a head, the first ones; even
  int32_t max_pos;           // rows of the tables; a position outside [0, max_pos) gives NaN
  int32_t reserved;          // zero
};

struct KvAppendArgs {
  const HeadView k;              // T [tokens, num_kv_heads, head_dim] new keys
  const HeadView v;              // T [tokens, num_kv_heads, head_dim_v] new values
  const HeadView q;              // T [tokens, num_heads, head_dim] queries
  HeadView q_out;                // T [tokens, num_heads, head_dim] processed queries; does not overlap q
  KvView k_cache;                // codes of K [num_pages, page_size, num_kv_heads, head_dim]
  KvView v_cache;                // codes of V [num_pages, page_size, num_kv_heads, head_dim_v]
  KvScale k_scale;               // scales and zeros of K, written or given as the format says
  KvScale v_scale;               // scales and zeros of V
  const PageTable table;         // page size and count; without pages of sequences places come from slots
  const RowView q_bias;          // T [num_heads, head_dim] null for none
  const RowView k_bias;          // T [num_kv_heads, head_dim] null for none
  const RowView v_bias;          // T [num_kv_heads, head_dim_v] null for none
  const RowView q_norm;          // W [num_heads, head_dim] gains of the norm of query heads; null for no norm
  const RowView k_norm;          // W [num_kv_heads, head_dim] the same of key heads
  const float* cos;              // float32 [table_rows, rotary_dim / 2] last axis contiguous
  const float* sin;              // float32 [table_rows, rotary_dim / 2] last axis contiguous
  const int32_t* slots32;        // int32 [tokens] page * page_size + slot, negative to skip; null if another has them
  const int64_t* slots64;        // int64 [tokens] the same
  const int32_t* positions;      // int32 [tokens] index of the token in its sequence, negative to skip
  const int32_t* batch_indices;  // int32 [tokens] sequence of the token; null: token t is of sequence t
  const int32_t* rope_rows;      // int32 [tokens] row of cos and sin, negative to skip; null: positions
  const int32_t* readonly;       // int32 [batch] positions below are not stored; null for 0
  int64_t stride_cos;            // elements between rows of cos
  int64_t stride_sin;            // elements between rows of sin
  int64_t stride_slot;           // elements between entries of slots32 or slots64
  int64_t stride_position;       // elements between entries of positions
  int64_t stride_batch_index;    // elements between entries of batch_indices
  int64_t stride_rope_row;       // elements between entries of rope_rows
  int64_t stride_readonly;       // elements between entries of readonly
  int32_t tokens;                // number of new tokens
  int32_t batch;                 // sequences of the table
  int32_t num_heads;             // query heads; 0 without queries
  int32_t num_kv_heads;          // KV heads; 0 without keys and values
  int32_t head_dim;              // length of a query or key head
  int32_t head_dim_v;            // length of a value head
  int32_t rotary_dim;            // rotated dims of a head, the first ones; 0 without RoPE
  int32_t table_rows;            // rows of cos and sin
  int32_t key_stride;            // only positions p with p % key_stride == key_offset are stored,
  int32_t key_offset;            // as token p / key_stride of their sequence
  int32_t k_makes_scale;         // 1: scales of K are written with the rows, 0: they are known
  int32_t v_makes_scale;         // the same of V
  int32_t logn_position;         // queries at a later position p are multiplied by log(p) * logn_factor
  int32_t norm_centred;          // 1: norms are layer norms, 0: RMS norms
  int32_t q_len;                 // tokens of each sequence, of the first of which positions and rope_rows are; 0: of all
  int32_t rope_base;             // with q_len: added to rope_rows; -1: rope_rows below 0 are 0
  float norm_eps;                // added to the mean square
  float logn_factor;             // 1 / log(logn_position); 0 without
};

struct SiluMulArgs {
  const RowView gate;  // T [rows, cols] activated
  const RowView up;    // T [rows, cols] multiplied by it
  RowView out;         // T [rows, cols] may be gate or up
  int32_t rows;        // number of rows
  int32_t cols;        // row length
};

struct LayerNormArgs {
  const RowView x;     // T [rows, hidden] input
  const void* weight;  // W [hidden] gain
  const void* bias;    // W [hidden] added last; null for none
  RowView out;         // U [rows, hidden] (x - mean) / sqrt(variance + eps) * weight + bias
  int32_t rows;        // number of rows
  int32_t hidden;      // row length
  float eps;           // added to the variance
  int32_t reserved;    // zero
};

// Columns of a packed weight that are coded alike, see cupyattn/quant/layout.py.
struct WeightView {
  const uint8_t* codes;      // uint8 [row_tiles, column_tiles, bytes of a tile's codes]
  const uint8_t* scales;     // uint8 [row_tiles, spans of tiles_per_scale, bytes of a record]; null for none
  const uint8_t* supers;     // uint8 [row_tiles, spans of tiles_per_super, bytes of a record]; null for none
  int32_t row_tiles;         // ceil(rows / 16)
  int32_t column_tiles;      // ceil(columns / 64)
  int32_t tiles_per_scale;   // tiles of a row that share a record of scales
  int32_t tiles_per_super;   // tiles of a row that share a record of supers
};

struct Experts {
  const int32_t* offsets;  // int32 [count + 1] first row of x of each expert, then the last one's end; null: no experts
  int64_t stride_codes;    // bytes between the codes of experts' weights
  int64_t stride_scales;   // bytes between their scales
  int64_t stride_supers;   // bytes between their supers
  int64_t stride_bias;     // elements between their rows of bias
  int32_t count;           // of experts
  int32_t first_tile;      // of all experts' tiles of rows of x, that of blockIdx.y 0
};

struct QuantGemmArgs {
  const RowView x;           // T [tokens, columns] activations
  RowView out;               // U [tokens, rows] x @ W.T
  WeightView weight;         // the segment; with experts the first one's
  const Experts experts;     // null for one weight for all rows of x
  const int32_t* order;      // int32 [columns of out] for gather_columns: column of x, -1 for zeros; null: as they are
  const void* bias;          // B [rows] added to every row of out; null for none
  float* partials;           // float32 sums of pieces, placed as the kernel likes; null for one piece
  int32_t* counters;         // int32 [tiles of out] pieces that have arrived; zero before and after
  int64_t stride_bias;       // elements between entries of bias
  int32_t tokens;            // rows of x
  int32_t rows;              // out_features of the weight
  int32_t columns;           // of x that the segment reads, a multiple of 8
  int32_t pieces;            // parts of the columns, of this and all other segments, that blocks sum apart
  int32_t first_piece;       // pieces of the segments before
  int32_t tiles_per_piece;   // column tiles of a piece; the segment's last one may have fewer
  int32_t units_per_chunk;   // units of 64 * UNIT columns of an eighth of a piece
  int32_t accumulate;        // 1: add what out holds
};

struct EmbeddingArgs {
  const RowView table;      // W [rows, columns] when the table is a plain array
  RowView out;              // U [tokens, columns] the rows picked
  const WeightView weight;  // the table's segment when it is packed
  const void* ids;          // int32 or int64 [tokens] row to pick; outside [0, rows) gives NaN
  const int32_t* order;     // int32 [columns of the segment] column of out of each, -1 for none; null: as they are
  int64_t stride_id;        // elements between entries of ids
  int32_t tokens;           // number of ids
  int32_t rows;             // rows of the table
  int32_t columns;          // of the segment
  int32_t out_columns;      // length of a row of out
};

struct DequantizeArgs {
  RowView out;              // U [rows, columns of the weight]
  const WeightView weight;  // the segment
  const int32_t* order;     // int32 [columns of the segment] column of out of each, -1 for none; null: as they are
  int32_t first_row;        // of the weight
  int32_t rows;             // rows of out
  int32_t columns;          // of the segment
  int32_t reserved;         // zero
};

struct MatrixView {
  void* data;             // T [rows, columns] any strides
  int64_t stride_row;     // elements between rows
  int64_t stride_column;  // elements between columns
};

struct RepackArgs {
  const MatrixView values;         // uint8 codes, or the 16- or 32-bit numbers themselves [rows, columns]
  const MatrixView scale;          // bytes of numbers [rows, ceil(columns / group)]; null for none
  const MatrixView second;         // zeros or minima like scale; null for none
  const MatrixView super_scale;    // bytes of numbers [rows, supers of a row]; null for none
  const MatrixView super_minimum;  // like super_scale; null for none
  uint8_t* codes;                  // uint8 [row tiles, column_tiles, bytes of a tile's codes]
  uint8_t* scales;                 // uint8 [row tiles, spans of tiles_per_scale, bytes of a record]; null for none
  uint8_t* supers;                 // uint8 [row tiles, spans of tiles_per_super, bytes of a record]; null for none
  int32_t rows;                    // of values
  int32_t columns;                 // of values
  int32_t group;                   // columns of values that share a scale
  int32_t filled_group;            // packed columns of a group
  int32_t column_tiles;            // ceil(packed columns / 64)
  int32_t tiles_per_scale;         // tiles of a row that share a record of scales
  int32_t tiles_per_super;         // tiles of a row that share a record of supers
  int32_t scale_bytes_log2;        // of a scale, zero or minimum
  int32_t super_bytes_log2;        // of a super
  int32_t groups_log2;             // groups of a tile
};

struct CausalConv1dArgs {
  const ChannelView x;            // T [tokens, channels] packed rows, or [batch, tokens, channels]
  ChannelView out;                // T like x
  const void* weight;             // W [channels, width] the last tap is the current token's
  const void* bias;               // W [channels] contiguous; null for none
  void* state;                    // S [num_slots, channels, state_len] the last inputs; null for none
  const int32_t* cu_seqlens;      // int32 [batch + 1] first row of every sequence; null: one sequence of all rows
  const int32_t* slots;           // int32 [batch] slot of every sequence, one outside the pool skips it; null: its number
  const int32_t* positions;       // int32 [batch] the state is circular, and tokens that came before; null: it is not
  const uint8_t* has_state;       // bool [batch] 0: the sequence begins here; null: none does
  int64_t stride_weight_channel;  // elements between channels of weight
  int64_t stride_weight_tap;      // elements between taps
  int64_t stride_slot;            // elements between slots of state
  int64_t stride_channel;         // elements between channels of state
  int64_t stride_time;            // elements between inputs of state
  int32_t is_packed;              // 1: rows of x are those of all sequences, 0: every sequence has `tokens`
  int32_t batch;                  // sequences
  int32_t tokens;                 // rows of x, or of every sequence
  int32_t channels;               // channels
  int32_t width;                  // taps
  int32_t state_len;              // inputs kept, at least width - 1
  int32_t num_slots;              // slots of the pool
  int32_t piece;                  // tokens of a sequence that one block takes
  int32_t silu;                   // 1: out is y * sigmoid(y)
  int32_t reserved;               // zero
};

struct StepView {
  void* data;            // T [tokens, heads, head_dim] any strides, 0 where dims share
  int64_t stride_token;  // elements between tokens
  int64_t stride_head;   // elements between heads
  int64_t stride_dim;    // elements between dims
};

struct PerChannel {
  const float* data;    // float32 [heads, head_dim, ...] the last axis, if there is one, contiguous; null for none
  int64_t stride_head;  // elements between heads
  int64_t stride_dim;   // elements between dims, 0 where they share
};

// A selective state space model's token; Mamba-1's is one head of all channels.
struct SelectiveInputs {
  HeadView x;               // T [tokens, heads, head_dim] input
  HeadView z;               // T like x, gate; null for none
  HeadView B;               // T [tokens, groups, state_size] input to state
  HeadView C;               // T [tokens, groups, state_size] state to output
  StepView dt;              // DT [tokens, heads, head_dim] step before bias and softplus
  PerChannel A;             // float32 [heads, head_dim(, state_size)] negative rates
  PerChannel D;             // float32 [heads, head_dim] input to output
  PerChannel dt_bias;       // float32 [heads, head_dim] added to dt
  int32_t heads;            // heads of x
  int32_t head_dim;         // dims of a head
  int32_t state_size;       // states of a dim
  int32_t heads_per_group;  // heads that share B and C
  int32_t softplus;         // 1: step is softplus(dt + dt_bias)
  float dt_min;             // smallest step
  float dt_max;             // largest step
  int32_t reserved;         // zero
};

struct SelectiveStateUpdateArgs {
  const SelectiveInputs in;  // one token of every row of the batch
  HeadView out;              // T [batch, heads, head_dim]
  void* state;               // S [num_slots, heads, head_dim, state_size] last axis contiguous
  const int32_t* slots;      // int32 [batch] slot of every row, one outside the pool skips it; null: its number
  int64_t stride_slot;       // elements between slots of state
  int64_t stride_head;       // elements between heads of state
  int64_t stride_dim;        // elements between dims of state
  int32_t batch;             // rows
  int32_t num_slots;         // slots of the pool
};

struct SelectiveScanArgs {
  const SelectiveInputs in;    // packed rows of all sequences
  HeadView out;                // T [tokens, heads, head_dim]
  void* state;                 // S [num_slots, heads, head_dim, state_size] last axis contiguous; null for none
  float* carried;              // float32 [kept, heads, head_dim, state_size] what pieces add, then where they begin
  float* totals;               // float32 [kept, heads, head_dim] sums of the steps of pieces
  const int32_t* cu_seqlens;   // int32 [batch + 1] first row of every sequence; null: one sequence of all rows
  const int32_t* slots;        // int32 [batch] slot of every sequence, one outside the pool skips it; null: its number
  const uint8_t* has_state;    // bool [batch] 0: the sequence begins here; null: none does
  int64_t stride_slot;         // elements between slots of state
  int64_t stride_head;         // elements between heads of state
  int64_t stride_dim;          // elements between dims of state
  int32_t batch;               // sequences
  int32_t tokens;              // rows of x
  int32_t num_slots;           // slots of the pool, without one the sequences
  int32_t piece;               // tokens of a sequence that one block takes, a multiple of 32
};

// ---- TurboMind's parameters, for C callers; no kernel here reads them ------------------------------------
//
// The layout of the C struct with its own types (char**, bool, pointers to T): what its compiler pads is spelled out.

struct TurboMindLinearIteratorParams {
  const void* kv_cache;  // T [num_kv_heads][K, V][tokens][head_dim]
  int64_t stride_h;      // elements from one KV head to the next
  int64_t key_to_val;    // elements from a key to its value
};

struct TurboMindBlockIteratorParams {
  void* block_ptrs;              // char* [blocks] addresses of memory blocks
  const int32_t* cu_block_nums;  // int32 [batch + 1] first block of every sequence
  int32_t layer_id;              // layers before this one in a block
  int32_t block_len;             // tokens per block
};

struct TurboMindYarnRope {
  float scale_factor;             // -log2(base) / dim
  float attention_factor;         // multiplies cos and sin
  float ramp_inv_factor_div_2;    // 0.5 / (high - low)
  float ramp_inv_factor_mul_min;  // low / (high - low)
};

struct TurboMindLlama3Rope {
  float scale_factor;  // -log2(base) / dim
  float alpha;         // original_max / (2 pi) / (high_freq_factor - low_freq_factor)
  float beta;          // low_freq_factor / (high_freq_factor - low_freq_factor)
};

struct TurboMindMrope {
  int32_t section_t;       // elements of a head that turn by time
  int32_t section_h;       // those and the ones that turn by height
  int32_t section_w;       // all of them
  int32_t stride;          // ints of a token in position_ids
  void* position_ids;      // int32 [tokens, 3]
  void* position_delta;    // int32 [batch] added to the position of later tokens
  void* length;            // int32 [batch] tokens of a sequence that have an entry in position_ids
  void* position_offsets;  // int32 [batch] first entry of a sequence
};

struct TurboMindRopeKernelParam {
  int32_t type;                // 0 none, 1 default, 2 linear, 3 dynamic, 4 yarn, 5 llama3, 6 default with mrope
  int32_t padding;             // zero
  void* base;                  // float32 [batch] base of every sequence; null for the one in scale_factor
  int32_t dim;                 // rotated elements of a head
  float scale_factor;          // -log2(base) / dim
  float inv_factor;            // 1 / factor, 1 for dynamic
  int32_t mrope_mode;          // 0 one position, 1 three in sections, 2 three interleaved
  TurboMindYarnRope yarn;      // type 4
  TurboMindLlama3Rope llama3;  // type 5
  int32_t padding2;            // zero
  TurboMindMrope mrope;        // with a mrope_mode
};

struct TurboMindFastDivmod {
  int32_t divisor;       // x / divisor == high half of x * multiplier >> shift_right, x itself for 1
  uint32_t multiplier;   // ceil(2^(32 + shift_right) / divisor)
  uint32_t shift_right;  // ceil(log2(divisor)) - 1
};

struct TurboMindAttentionParams {
  void* out;                                         // T [token_num, num_heads, size_per_head]
  void* q;                                           // T first query, element (t, h, d) at t * stride + h * D + d
  void* k;                                           // T first key, the same way
  void* v;                                           // T first value
  int64_t stride;                                    // elements between tokens of q, k and v
  void* q_bias;                                      // T [num_heads, size_per_head]
  void* k_bias;                                      // T [num_kv_heads, size_per_head]
  void* v_bias;                                      // T [num_kv_heads, size_per_head]
  const int32_t* cu_q_len;                           // int32 [batch + 1] first new token of every sequence
  const int32_t* cu_k_len;                           // int32 [batch + 1] first context token of every sequence
  const void* finished;                              // bool [batch]
  const float* rope_theta;                           // float32 [batch] base of every sequence
  TurboMindLinearIteratorParams linear_iter_params;  // contiguous K and V
  TurboMindBlockIteratorParams block_iter_params;    // K and V in blocks
  int32_t token_num;                                 // new tokens
  int32_t batch_size;                                // sequences
  int32_t max_q_len;                                 // most new tokens of a sequence
  int32_t max_k_len;                                 // longest context
  int32_t num_heads;                                 // query heads
  int32_t num_kv_heads;                              // KV heads
  int32_t size_per_head;                             // head_dim
  float inv_sqrt_dh;                                 // softmax scale times log2(e), as TurboMind's kernels want it
  int32_t window_size;                               // visible tokens, the query's own included
  int32_t padding;                                   // zero
  TurboMindRopeKernelParam rope_param;               // rotary embedding
  int32_t use_logn_attn;                             // bool in the first byte
  int32_t max_position_embeddings;                   // of log-n scaling
  int32_t quant_policy;                              // 0, 4 or 8
  int32_t max_split_k;                               // capacity of the split axis of the partials
  int32_t* split_cnt;                                // int32 [token_num] splits of every token, 0: out is final
  float* partial_O;                                  // float32 [token_num, num_heads, max_split_k, size_per_head]
  float* partial_ML;                                 // float32 [token_num, num_heads, max_split_k, 2]
  int32_t cp_rank;                                   // context parallel
  TurboMindFastDivmod cp_size;                       // ranks
  int32_t arch;                                      // compute capability times 10
  int32_t padding2;                                  // zero
  void* stream;                                      // cudaStream_t
  void* qk;                                          // float32 debug output; null
  void* pr;                                          // T debug output; null
};

struct WorkTarget {
  int32_t* items;         // int32 [capacity, 8] see WorkItems
  int32_t* worker_items;  // int32 [workers + 1]
  int32_t* units;         // int32 [capacity, 2]
  int32_t* pieces;        // int32 [capacity]
  int32_t rows;           // packed rows of a unit
  int32_t workers;        // blocks of the launch the list is for
  int32_t least_packed;   // the list takes sequences of so many packed rows
  int32_t most_packed;    // up to so many
  int32_t max_units;      // units there is room for; later ones are left out
  int32_t max_items;      // items there is room for; a list that needs more stays empty
};

struct ScheduleArgs {
  WorkTarget first;              // list of block 0
  WorkTarget second;             // list of block 1
  const PageTable table;         // row_starts when cache_seqlens is null
  const int32_t* cu_seqlens_q;   // int32 [batch + 1] first query token of every sequence; null: q_len tokens each
  const int32_t* cache_seqlens;  // int32 [batch] tokens to attend to, the new ones included; null: rows of table
  const int32_t* cache_starts;   // int32 [batch] first visible key; null for 0
  const int32_t* key_offsets;    // int32 [batch] position of local key 0; null for key_offset
  const int32_t* key_counts;     // int32 [batch] local keys; null: all below cache_seqlens
  const uint8_t* finished;       // bool [batch] sequences that give zeros; null for none
  const uint32_t* tree_mask;     // null; causal is 0 where queries see each other by a tree mask
  int64_t stride_seqlens;        // elements between entries of cache_seqlens
  int64_t stride_starts;         // elements between entries of cache_starts
  int32_t batch;                 // number of sequences
  int32_t tokens;                // query tokens of all sequences; an offset past them makes a sequence empty
  int32_t q_len;                 // query tokens per sequence without cu_seqlens_q
  int32_t max_q_len;             // most query tokens of a sequence; the rest are left out
  int32_t max_k_len;             // most local keys of a sequence; the rest are left out
  int32_t num_kv_heads;          // KV heads
  int32_t heads_per_kv;          // query heads per KV head
  int32_t causal;                // 1: a query sees no later token
  int32_t window_size;           // visible tokens, the query's own included; 0 for all
  int32_t key_stride;            // local key l stands at position l * key_stride + key_offset
  int32_t key_offset;            // position of local key 0
  int32_t num_splits;            // items of every unit; 0 to balance
  int32_t invariant;             // 1: cut every 1024 keys
  int32_t reserved;              // 0
};

struct KvFlattenArgs {
  const KvView k;                // keys, codes in the format of the specialisation
  const KvView v;                // values
  const KvScale k_scale;         // their scales
  const KvScale v_scale;         // theirs
  const PageTable table;         // pages or blocks of every sequence
  HeadView k_out;                // T [tokens, num_kv_heads, head_dim]
  HeadView v_out;                // T [tokens, num_kv_heads, head_dim_v]
  const int32_t* cu_seqlens_k;   // int32 [batch + 1] token t of sequence b goes to row cu_seqlens_k[b] + t
  const int32_t* cache_seqlens;  // int32 [batch] tokens to copy; null: as many as there are rows
  int64_t stride_starts;         // elements between entries of cu_seqlens_k
  int64_t stride_seqlens;        // elements between entries of cache_seqlens
  int32_t batch;                 // number of sequences
  int32_t tokens;                // rows of the outputs
  int32_t num_kv_heads;          // KV heads
  int32_t head_dim;              // length of a key, a multiple of 8
  int32_t head_dim_v;            // length of a value, a multiple of 8
  int32_t tile;                  // rows of the outputs that a block fills
};

struct LightningAttentionArgs {
  const HeadView q;            // T [tokens, heads, key_dim] queries
  const HeadView k;            // T [tokens, heads, key_dim] keys
  const HeadView v;            // T [tokens, heads, value_dim] values
  HeadView out;                // T [tokens, heads, value_dim] scale * q . state
  void* state;                 // S [num_slots, heads, key_dim, value_dim] last axis contiguous, updated in place
  const float* slopes;         // float32 [heads] a state fades by exp(-slope) a token
  const int32_t* cu_seqlens;   // int32 [batch + 1] first row of every sequence; null: one token each
  const int32_t* slots;        // int32 [batch] slot of every sequence, one outside the pool skips it; null: its number
  const uint8_t* has_state;    // bool [batch] 0: the sequence begins here; null: none does
  const uint8_t* mask;         // bool [tokens] 0: the token's key and value are zeros; null: none is
  int64_t stride_slot;         // elements of state between slots
  int64_t stride_state_head;   // elements of state between heads
  int64_t stride_key;          // elements of state between dims of the key
  int64_t stride_slope;        // elements between entries of slopes
  int64_t stride_mask;         // elements between entries of mask
  int32_t batch;               // sequences
  int32_t tokens;              // rows of q, k, v and out
  int32_t heads;               // heads per token
  int32_t key_dim;             // of q and k, a multiple of 8
  int32_t value_dim;           // of v and out, a multiple of 8
  int32_t num_slots;           // slots of the pool
  int32_t slices;              // blocks of a sequence's head, which share its value dims
  int32_t columns;             // value dims of a block, a multiple of 8; the last one may have fewer
  int32_t tile;                // tokens that a prefill block holds at a time, a multiple of 8
  int32_t block_size;          // tokens between two updates of the state
  float scale;                 // of the output
  int32_t reserved;            // zero
};

struct PagePools {
  void* pool0;  // as many are used as the grid is high
  void* pool1;  // second
  void* pool2;  // third
  void* pool3;  // fourth
  void* pool4;  // fifth
  void* pool5;  // sixth
  void* pool6;  // seventh
  void* pool7;  // eighth
};

struct PageMoveArgs {
  PagePools pools;              // bytes [num_pages, page_size, outer, inner, row], all laid out alike
  const int32_t* sources;       // int32 [moves] page to copy; outside [0, num_pages): none
  const int32_t* destinations;  // int32 [moves] page to write; outside [0, num_pages): none
  const int32_t* tokens;        // int32 [moves] tokens to copy, from the page's first; null for all
  int64_t stride_source;        // elements between entries of sources
  int64_t stride_destination;   // elements between entries of destinations
  int64_t stride_tokens;        // elements between entries of tokens
  int64_t stride_page;          // bytes between pages
  int64_t stride_token;         // bytes between tokens
  int64_t stride_outer;         // bytes between the parts of a token
  int64_t stride_inner;         // bytes between the rows of such a part
  int32_t num_pages;            // of every pool
  int32_t page_size;            // tokens per page
  int32_t outer;                // parts of a token
  int32_t inner;                // rows of a part
  int32_t pieces;               // accesses to a row, whose bytes are adjacent
  int32_t slices;               // blocks of a move in one pool
  int32_t is_flat;              // 1: the bytes of a page are adjacent
  int32_t reserved;             // zero
};

#endif  // CUPYATTN_PARAMS_H
