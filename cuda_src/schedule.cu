// SPDX-License-Identifier: Apache-2.0
// schedule.cu - work lists of the attention kernels, from lengths that are on the GPU.
//
//   What the lists are is said by cupyattn/reference/schedule.py; cupyattn/attn/work_list.py makes the same bits in
//   NumPy.
//   Units in the order (sequence, KV head, row tile) cost `key tiles + 2` each, or with fixed cuts `key tiles + 2 *
//   items`; per_worker = ceil(sum of costs / workers).
//   balanced   block w of the attention kernel owns costs [w, w + 1) * per_worker, the first two of a unit being no tile
//   fixed      cut every 1024 keys from local key 0 (invariant) or in num_splits; an item goes to the owner of its first
//              cost
//   slots      of partial results are as many as partial items; where fixed cuts would make more than 2 * workers * most
//              items of a unit, a unit with one block uses that block's slots, which its next one uses again
//
// launch     grid (lists), block (threads): one block per list, a multiple of 32 threads up to 512; one pass over the
//            units for the sum of costs, one for the items, `threads` of them at a time
//            shared memory 776 + threads * (sizeof(Unit) + sizeof(Sequence)) bytes, dynamic
// aliasing   none allowed
// traffic    the lengths 2 * num_kv_heads times (from L1 after the first), 36 bytes written per item, 8 per split unit
#include "prelude.cuh"
#include "params.h"
#include "attention_work.cuh"
#include "scan.cuh"

constexpr int CHUNK = 1024;   // keys of an item with invariant cuts
constexpr int OVERHEAD = 2;   // cost of starting an item, in key tiles
static_assert(sizeof(ScheduleArgs) == CA_SIZEOF_ARGS, "schedule: Python and CUDA disagree on ScheduleArgs");

// A unit, as the threads that write its items need it. Begin, end and cuts count key tiles.
struct Unit {
  int64_t start;  // balanced: cost before the first tile; fixed: cost before the unit
  int seq, head, first_row;
  int begin, end;
  int origin, step;  // fixed: where cuts are counted from, and how far apart; balanced: first worker, unused
  int count;         // items
  int last;          // worker of the last item
  int stop;          // items of this round up to and with this unit
  int slot;          // of the first item
  int piece;         // first entry of pieces; -1: one item
  int number;        // row of the table of units; -1: one item
};

// One of the sequences loaded at a time.
struct Sequence {
  int stop;   // units up to and with this sequence
  int tiles;  // of rows
};

__device__ __forceinline__ int upper(int64_t both) { return static_cast<int>(both >> 32); }
__device__ __forceinline__ int lower(int64_t both) { return static_cast<int>(both & 0xffffffff); }

struct Planner {
  const ScheduleArgs& args;
  const WorkTarget& list;
  Unit* units;          // [threads]
  Sequence* sequences;  // [threads]
  int64_t* scratch;     // [96]
  int* most;            // [1]
  int first_seq;        // of those loaded
  bool fixed;

  __device__ __forceinline__ Planner(const ScheduleArgs& a, const WorkTarget& l, void* shared) : args(a), list(l) {
    units = static_cast<Unit*>(shared);
    scratch = reinterpret_cast<int64_t*>(units + blockDim.x);
    sequences = reinterpret_cast<Sequence*>(scratch + 96);
    most = reinterpret_cast<int*>(sequences + blockDim.x);
    first_seq = 0;
    fixed = a.invariant != 0 || a.num_splits > 0;
  }

  __device__ __forceinline__ int packed_rows(int64_t seq) const {
    return min(max(num_queries(args, seq), 0), args.max_q_len) * args.heads_per_kv;
  }

  // Loads a sequence per thread from `first` on; returns how many units they have, at most `room`.
  __device__ __forceinline__ int load_sequences(int first, int room) {
    const int seq = first + threadIdx.x;
    int tiles = 0;
    if (seq < args.batch) {
      const int packed = packed_rows(seq);
      if (packed >= list.least_packed && packed <= list.most_packed) tiles = ceil_div(packed, list.rows);
    }
    int64_t stop[1] = {static_cast<int64_t>(tiles) * args.num_kv_heads}, total[1];
    block_scan(stop, total, scratch);
    sequences[threadIdx.x] = {static_cast<int>(min(stop[0], static_cast<int64_t>(room))), tiles};
    first_seq = first;
    __syncthreads();
    return static_cast<int>(min(total[0], static_cast<int64_t>(room)));
  }

  // Unit `index` of the loaded sequences: where it is, its key tiles and its fixed cuts.
  __device__ __forceinline__ Unit unit_at(int index) const {
    int low = 0, high = blockDim.x - 1;  // the first sequence with stop > index
    while (low < high) {
      const int middle = (low + high) / 2;
      if (sequences[middle].stop > index) high = middle;
      else low = middle + 1;
    }
    Unit unit;
    const int tiles = sequences[low].tiles, inside = index - (low > 0 ? sequences[low - 1].stop : 0);
    unit.seq = first_seq + low;
    unit.head = inside / tiles;
    unit.first_row = (inside - unit.head * tiles) * list.rows;
    const int last_row = min(unit.first_row + list.rows, packed_rows(unit.seq)) - 1;
    KeyRange keys = Visibility(args, unit.seq).keys(unit.first_row / args.heads_per_kv, last_row / args.heads_per_kv);
    keys.end = min(keys.end, args.max_k_len);
    if (keys.begin >= keys.end) keys = {0, 0};
    unit.begin = keys.begin / KEY_TILE;
    unit.end = ceil_div(keys.end, KEY_TILE);
    unit.origin = unit.begin, unit.step = 1, unit.count = 1;
    if (fixed) {
      constexpr int CHUNK_TILES = CHUNK / KEY_TILE;
      if (args.invariant != 0) {
        unit.origin = unit.begin / CHUNK_TILES * CHUNK_TILES;
        unit.step = CHUNK_TILES;
      } else {
        unit.step = max(1, ceil_div(unit.end - unit.begin, args.num_splits));
      }
      unit.count = max(1, ceil_div(unit.end - unit.origin, unit.step));
    }
    return unit;
  }

  __device__ __forceinline__ int64_t cost(const Unit& unit) const {
    return unit.end - unit.begin + (fixed ? static_cast<int64_t>(OVERHEAD) * unit.count : OVERHEAD);
  }

  // Workers and number of items of a unit that starts at cost `start`; returns its first worker.
  __device__ __forceinline__ int place(Unit& unit, int64_t start, int64_t per_worker) const {
    if (fixed) {
      unit.start = start;
      unit.last = worker_of(unit, unit.count - 1, per_worker);
      return worker_of(unit, 0, per_worker);
    }
    const bool some = unit.end > unit.begin;
    unit.start = start + (some ? OVERHEAD : 0);
    unit.origin = static_cast<int>(unit.start / per_worker);
    unit.last = some ? static_cast<int>((start + cost(unit) - 1) / per_worker) : unit.origin;
    unit.count = unit.last - unit.origin + 1;
    return unit.origin;
  }

  __device__ __forceinline__ int64_t cut_of(const Unit& unit, int number, int64_t per_worker) const {
    if (fixed) return unit.origin + static_cast<int64_t>(number) * unit.step;
    return (unit.origin + number) * per_worker - unit.start + unit.begin;
  }

  __device__ __forceinline__ int worker_of(const Unit& unit, int number, int64_t per_worker) const {
    if (!fixed) return unit.origin + number;
    const int64_t begin = max(static_cast<int64_t>(unit.begin), cut_of(unit, number, per_worker));
    return static_cast<int>((unit.start + begin - unit.begin + OVERHEAD * number) / per_worker);
  }

  // Writes item `number` of `unit`; it is item `index` of the list.
  __device__ __forceinline__ void write(const Unit& unit, int number, int64_t index, int64_t per_worker) const {
    const int64_t cut = cut_of(unit, number, per_worker), step = fixed ? unit.step : per_worker;
    const int begin = static_cast<int>(max(static_cast<int64_t>(unit.begin), cut));
    const int end = static_cast<int>(min(static_cast<int64_t>(unit.end),
                                         max(cut + step, static_cast<int64_t>(unit.begin))));
    const int slot = unit.piece < 0 ? -1 : unit.slot + number;
    store_vec(list.items + index * 8, Vec<int32_t, 4>{unit.seq, unit.head, unit.first_row, begin * KEY_TILE});
    store_vec(list.items + index * 8 + 4, Vec<int32_t, 4>{end * KEY_TILE, slot, unit.number, 0});
    if (slot >= 0) list.pieces[unit.piece + number] = slot * list.rows;
  }
};

CA_KERNEL __launch_bounds__(512) void schedule(const __grid_constant__ ScheduleArgs args) {
  CA_DYN_SMEM(char, shared);
  const int thread = threadIdx.x, threads = blockDim.x;
  Planner planner(args, blockIdx.x == 0 ? args.first : args.second, shared);
  const WorkTarget& list = planner.list;

  // 1. what all units cost together, and, as far as the cuts are fixed, how many items and partial slots they need
  int64_t sum[3] = {0, 0, 0}, total[3];
  int most = 1;  // items of a unit
  int planned = 0;
  for (int first = 0; first < args.batch; first += threads) {
    const int units = planner.load_sequences(first, list.max_units - planned);
    for (int i = thread; i < units; i += threads) {
      const Unit unit = planner.unit_at(i);
      sum[0] += planner.cost(unit);
      sum[1] += unit.count;
      sum[2] += unit.count > 1 ? unit.count : 0;
      most = max(most, unit.count);
    }
    planned += units;
    __syncthreads();
  }
  if (thread == 0) *planner.most = 1;
  block_scan(sum, total, planner.scratch);
  atomicMax(planner.most, most);
  __syncthreads();
  most = *planner.most;
  const bool again = total[2] > 2 * static_cast<int64_t>(list.workers) * most;  // slots are used more than once
  const int batch = total[1] <= list.max_items ? args.batch : 0;
  const int64_t per_worker = max(static_cast<int64_t>(1), ceil_div(total[0], static_cast<int64_t>(list.workers)));

  // 2. the items, a unit per thread at a time
  int64_t spent = 0, items = 0;
  int pieces = 0, slots = again ? list.workers * most : 0, split_units = 0, last_worker = -1;
  planned = 0;
  for (int first = 0; first < batch; first += threads) {
    const int units = planner.load_sequences(first, list.max_units - planned);
    planned += units;
    for (int base = 0; base < units; base += threads) {
      const int present = min(threads, units - base);
      Unit unit;
      int64_t cost[1] = {0}, round_cost[1];
      if (thread < present) {
        unit = planner.unit_at(base + thread);
        cost[0] = planner.cost(unit);
      }
      const int64_t own_cost = cost[0];
      block_scan(cost, round_cost, planner.scratch);

      // items and pieces; split units and slots that no other unit has: upper and lower halves
      int64_t counts[2] = {0, 0}, round[2];
      int alone = -1;  // the one worker of a split unit that uses its worker's slots
      if (thread < present) {
        const int worker = planner.place(unit, spent + cost[0] - own_cost, per_worker);
        const int split = unit.count > 1 ? unit.count : 0;
        if (again && split > 0 && worker == unit.last) alone = worker;
        counts[0] = static_cast<int64_t>(unit.count) << 32 | split;
        counts[1] = static_cast<int64_t>(split > 0) << 32 | (alone < 0 ? split : 0);
      }
      block_scan(counts, round, planner.scratch + 32);
      if (thread < present) {
        const bool split = unit.count > 1;
        unit.stop = upper(counts[0]);
        unit.piece = split ? pieces + lower(counts[0]) - unit.count : -1;
        unit.slot = alone < 0 ? slots + lower(counts[1]) - unit.count : alone * most;
        unit.number = split ? split_units + upper(counts[1]) - 1 : -1;
        planner.units[thread] = unit;
        if (split) store_vec(list.units + 2 * unit.number, Vec<int32_t, 2>{unit.piece, unit.count});
      }
      __syncthreads();

      const int round_items = upper(round[0]);
      for (int i = thread; i < round_items; i += threads) {
        int low = 0, high = present - 1;  // the first unit with stop > i
        while (low < high) {
          const int middle = (low + high) / 2;
          if (planner.units[middle].stop > i) high = middle;
          else low = middle + 1;
        }
        const Unit& of = planner.units[low];
        const int number = i - (low > 0 ? planner.units[low - 1].stop : 0);
        planner.write(of, number, items + i, per_worker);
        const int worker = planner.worker_of(of, number, per_worker);
        int previous = low > 0 ? planner.units[low - 1].last : last_worker;
        if (number > 0) previous = planner.worker_of(of, number - 1, per_worker);
        for (int w = previous + 1; w <= worker; ++w) list.worker_items[w] = static_cast<int32_t>(items + i);
      }
      last_worker = planner.units[present - 1].last;
      spent += round_cost[0];
      items += round_items;
      pieces += lower(round[0]);
      slots += lower(round[1]);
      split_units += upper(round[1]);
      __syncthreads();
    }
  }
  for (int w = last_worker + 1 + thread; w <= list.workers; w += threads) {
    list.worker_items[w] = static_cast<int32_t>(items);
  }
}
