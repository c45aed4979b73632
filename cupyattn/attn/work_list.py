# SPDX-License-Identifier: Apache-2.0
"""Work lists of the attention kernels: which block attends which query rows to which keys. Made here in NumPy.

The q_len * heads_per_kv query rows of a (sequence, KV head) are packed token by token. A unit is a tile of `rows` of
them; a work item is a unit and a range of its key tiles. `cuda_src/schedule.cu` makes the same lists from lengths on a
GPU, bit for bit; `cupyattn.reference.schedule` says in plain loops what they are.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..runtime.structs import address

KEY_TILE = 64          # keys; items are cut at its multiples, KEY_TILE in cuda_src/include/attention_work.cuh
CHUNK_TILES = 16       # tiles of a chunk of the invariant policy: 1024 keys, as in cuda_src/schedule.cu
OVERHEAD = 2           # cost of starting an item, in key tiles, as in cuda_src/schedule.cu
SEQ, KV_HEAD, FIRST_ROW, BEGIN, END, SLOT, UNIT, MEMBERS = range(8)   # columns of items
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class WorkList:
    """Work of one kernel launch: `workers` blocks, block w runs items worker_items[w] to worker_items[w + 1].

    Parameters
    ----------
    rows : int
        Packed query rows of a unit; ROWS of the kernel.
    workers : int
        Blocks of the launch.
    items : int32 ndarray [items, 8]
        seq, kv_head, first_row, begin, end, slot, unit, members. begin and end are local keys, multiples of 64; slot -1
        says that the item is its whole unit, otherwise `unit` is the row of `units` it belongs to. With members > 0
        the rows are those of the sequences members[first_row], ... (shared prefix).
    worker_items : int32 ndarray [workers + 1]
        First item of each block, and the number of items.
    units : int32 ndarray [units, 2]
        First piece and number of pieces of the units in more than one piece.
    pieces : int32 ndarray [pieces]
        Partial row (slot * rows + row) of a unit's first row, in merge order.
    members : int32 ndarray [members, 2]
        Sequence, and row of `units` of its KV head 0; that of head h is h further.
    counters : int32 ndarray [units]
        Arrivals, zero before and after a launch.
    num_slots : int
        Slots of partial results the items may name: the workspace holds so many times `rows` rows. Items of one block
        may use a slot one after the other.
    exact : bool
        The arrays hold what is used and nothing else; otherwise they are capacities, so that they can be filled again,
        and only worker_items[workers] tells how many items there are.
    host : WorkList or None
        The exact list in host memory this is a copy of.
    """

    rows: int
    workers: int
    items: np.ndarray
    worker_items: np.ndarray
    units: np.ndarray
    pieces: np.ndarray
    members: np.ndarray
    counters: np.ndarray
    num_slots: int
    exact: bool = True
    host: "WorkList | None" = None

    ARRAYS = ("items", "worker_items", "units", "pieces", "members", "counters")

    @functools.cached_property
    def array_places(self):
        """The ARRAYS and their addresses."""
        arrays = [getattr(self, name) for name in self.ARRAYS]
        return arrays, [address(array) for array in arrays]

    @property
    def imbalance(self):
        """Cost of the busiest block over the mean of all, minus 1; of lists in host memory."""
        used = self.items[:self.worker_items[-1]]
        costs = np.concatenate([[0], np.cumsum((used[:, END] - used[:, BEGIN]) // KEY_TILE + OVERHEAD)])
        per_worker = np.diff(costs[self.worker_items])
        return float(per_worker.max() / per_worker.mean() - 1) if costs[-1] else 0.0

    def __repr__(self):
        if self.host is not None:
            return repr(self.host)
        text = f"WorkList({self.workers} blocks, tiles of {self.rows} rows"
        if not self.exact or not isinstance(self.items, np.ndarray):
            return f"{text}, room for {len(self.items)} items and {self.num_slots} partial slots)"
        splits = self.splits()
        text += f", {splits.size} units in {len(self.items)} items"
        if self.num_slots:
            text += f", splits {splits.min()} to {splits.max()}, {self.num_slots} partial slots"
        if len(self.members):
            shared = int((self.items[:, MEMBERS] > 0).sum())
            text += f", {shared} items for prefixes that {len(self.members)} sequences share"
        return f"{text}, imbalance {100 * self.imbalance:.0f} %)"

    def to(self, xp):
        """A copy in arrays of `xp`."""
        return replace(self, **{name: xp.asarray(getattr(self, name)) for name in self.ARRAYS}, host=self)

    def splits(self):
        """Items of each unit of its own rows, in the units' order; of lists in host memory."""
        own = self.items[:self.worker_items[-1]]
        own = own[own[:, MEMBERS] == 0][:, [SEQ, KV_HEAD, FIRST_ROW]]
        if not len(own):
            return np.zeros(0, np.int64)
        starts = np.flatnonzero(np.concatenate([[True], (own[1:] != own[:-1]).any(axis=1)]))
        return np.diff(np.append(starts, len(own)))


def key_ranges(seqlens, q_lens, first, last, *, causal=True, window_size=0, starts=None, finished=None, key_stride=1,
               offsets=None, counts=None):
    """Local keys [begin, end) that some query from `first` to `last` of a sequence may see; 0 and 0 for none.

    Element by element over int64 arrays. The same rule as `Visibility` in cuda_src/include/attention_work.cuh.
    """
    if finished is not None:
        seqlens = np.where(finished, 0, seqlens)
    position = seqlens - q_lens   # of query 0
    end = seqlens
    if causal:
        end = np.minimum(end, position + last + 1)
    elif window_size:
        end = np.minimum(end, position + last + window_size)
    begin = position + first - (window_size - 1) if window_size else np.zeros_like(end)
    if starts is not None:
        begin = np.maximum(begin, starts)
    if offsets is not None:
        begin, end = begin - offsets, end - offsets
    begin, end = np.maximum(begin, 0), np.maximum(end, 0)
    if key_stride > 1:
        begin, end = -(-begin // key_stride), -(-end // key_stride)
    if counts is not None:
        end = np.minimum(end, counts)
    some = begin < end
    return begin * some, end * some


def make_work(cache_seqlens, q_lens, *, num_kv_heads, heads_per_kv, rows, workers, packed_rows=(1, _INT32_MAX),
              causal=True, window_size=0, cache_starts=None, finished=None, key_stride=1, key_offset=0,
              key_offsets=None, key_counts=None, num_splits=None, invariant=False, prefixes=()):
    """WorkList of the sequences with a number of packed rows (q_len * heads_per_kv) in `packed_rows`, NumPy in and out.

    Parameters
    ----------
    cache_seqlens : int ndarray [batch]
        Tokens to attend to, the new ones included.
    q_lens : int ndarray [batch] or int
        Query tokens.
    num_kv_heads, heads_per_kv : int
        KV heads, and query heads that share one.
    rows, workers : int
        Packed rows of a unit, and blocks of the launch.
    packed_rows : (int, int)
        Least and most packed rows of the sequences taken.
    causal, window_size, cache_starts, finished, key_stride, key_offset, key_offsets, key_counts
        As in `cupyattn.schedule`.
    num_splits, invariant
        As in `cupyattn.schedule`; neither balances over all workers.
    prefixes : list of (int, ndarray)
        Keys that are the same for some sequences, a multiple of 64 (invariant: of 1024), and those sequences, each in
        one prefix at most and of one tile of rows; all have the same q_len.

    Returns
    -------
    WorkList
    """
    seqlens = np.asarray(cache_seqlens, np.int64)
    packed = np.asarray(q_lens, np.int64) * heads_per_kv
    if packed.ndim == 0:
        packed = np.full(len(seqlens), packed)
    row_tiles = -(-packed // rows)
    if packed.size and not packed_rows[0] <= packed.min() <= packed.max() <= packed_rows[1]:
        row_tiles *= (packed >= packed_rows[0]) & (packed <= packed_rows[1])
    seq, head, tile = _enumerate(row_tiles, num_kv_heads)

    def of_unit(values):
        return None if values is None else np.asarray(values, np.int64)[seq]

    unit_packed, first_row = packed[seq], tile * rows
    last_row = np.minimum(first_row + rows, unit_packed) - 1
    offsets = (key_offset or None) if key_offsets is None else of_unit(key_offsets)
    begin, end = key_ranges(
        seqlens[seq], unit_packed // heads_per_kv, first_row // heads_per_kv, last_row // heads_per_kv, causal=causal,
        window_size=window_size, starts=of_unit(cache_starts), finished=of_unit(finished), key_stride=key_stride,
        offsets=offsets, counts=of_unit(key_counts))
    begin, end = begin // KEY_TILE, -(-end // KEY_TILE)   # from here on in key tiles
    units = _Units(seq, head, first_row, begin, end)
    if prefixes:
        units = _with_prefixes(units, packed, prefixes, num_kv_heads, rows)
    return _assemble(units, rows, workers, num_splits, invariant)


class _Units(NamedTuple):
    """Units in the order of their costs, those of shared prefixes first; begin and end in key tiles."""

    seq: np.ndarray
    head: np.ndarray
    first_row: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    members: np.ndarray | None = None       # sequences of a prefix unit, 0 for other units; None: all 0
    prefix: np.ndarray | None = None        # prefix unit a unit comes after, -1 for none
    offset: np.ndarray | None = None        # its first row among that one's
    sequences: np.ndarray | None = None     # what the first_row of prefix units counts


def _enumerate(row_tiles, num_kv_heads):
    """(sequence, KV head, row tile) of every unit, in this order, from the row tiles of every sequence."""
    batch = len(row_tiles)
    if batch == 0 or row_tiles.min() == row_tiles.max() == 1:
        index = np.arange(batch * num_kv_heads)
        seq = index // num_kv_heads
        return seq, index - seq * num_kv_heads, np.zeros(len(index), np.int64)
    count = row_tiles * num_kv_heads
    seq = np.repeat(np.arange(batch), count)
    index = np.arange(len(seq)) - (np.cumsum(count) - count)[seq]
    each = row_tiles[seq]
    head = index // each
    return seq, head, index - head * each


def _with_prefixes(units, packed, prefixes, num_kv_heads, rows):
    """`units` with those of shared prefixes in front, their own keys starting where the prefix ends.

    A prefix unit takes as many sequences as fit in its rows; the order is prefix, sequences, KV head.
    """
    first, members, tiles = [], [], []   # per prefix unit of KV head 0
    prefix, offset, skipped = (np.full(len(packed), fill, np.int64) for fill in (-1, 0, 0))   # per sequence
    total = 0
    for keys, group in prefixes:
        group = np.asarray(group)
        each = int(packed[group[0]])
        at_once = rows // each
        index = np.arange(len(group))
        prefix[group] = len(first) * num_kv_heads + index // at_once * num_kv_heads
        offset[group] = index % at_once * each
        skipped[group] = keys // KEY_TILE
        for start in range(0, len(group), at_once):
            first.append(total + start)
            members.append(min(at_once, len(group) - start))
            tiles.append(keys // KEY_TILE)
        total += len(group)
    sequences = np.concatenate([group for _, group in prefixes])
    index = np.arange(len(first) * num_kv_heads) // num_kv_heads
    head = np.arange(len(index)) - index * num_kv_heads
    first, own = np.array(first)[index], prefix[units.seq]
    shared = np.full(len(index), -1)
    nothing = np.zeros(len(index), np.int64)
    return _Units(
        np.concatenate([sequences[first], units.seq]), np.concatenate([head, units.head]),
        np.concatenate([first, units.first_row]),
        np.concatenate([nothing, np.maximum(units.begin, skipped[units.seq])]),
        np.concatenate([np.array(tiles)[index], units.end]),
        members=np.concatenate([np.array(members)[index], 0 * units.seq]),
        prefix=np.concatenate([shared, np.where(own >= 0, own + units.head, -1)]),
        offset=np.concatenate([nothing, offset[units.seq]]), sequences=sequences)


def _expand(count):
    """(unit, number inside its unit) of every item, from the items of every unit."""
    unit = np.repeat(np.arange(len(count)), count)
    return unit, np.arange(len(unit)) - (np.cumsum(count) - count)[unit]


def _cut_balanced(begin, end, workers):
    """Items whose costs are one stretch of the total cost per worker: (unit, begin, end, worker) of each item."""
    some = end > begin
    cost = end - begin + OVERHEAD
    stop = np.cumsum(cost)
    per_worker = max(1, -(-int(stop[-1]) // workers))
    tile_start = stop - cost + OVERHEAD * some      # where the cost of the first tile is counted
    first = tile_start // per_worker
    last = np.where(some, (stop - 1) // per_worker, first)
    unit, number = _expand(last - first + 1)
    worker = first[unit] + number
    tile = worker * per_worker + (begin - tile_start)[unit]   # first tile of that worker
    begin, end = begin[unit], end[unit]
    return unit, np.maximum(begin, tile), np.minimum(end, np.maximum(tile + per_worker, begin)), worker


def _cut_fixed(begin, end, workers, num_splits):
    """Items cut every CHUNK_TILES from local key 0, or each unit in `num_splits`: as `_cut_balanced`."""
    if num_splits is None:
        start = begin // CHUNK_TILES * CHUNK_TILES   # where the cuts are counted from
        step = np.full_like(start, CHUNK_TILES)
    else:
        start, step = begin, np.maximum(-(-(end - begin) // num_splits), 1)
    count = np.maximum(-(-(end - start) // step), 1)
    cost = end - begin + OVERHEAD * count
    stop = np.cumsum(cost)
    unit, number = _expand(count)
    cut = start[unit] + number * step[unit]
    item_begin = np.maximum(begin[unit], cut)
    before = (stop - cost - begin)[unit] + item_begin + OVERHEAD * number   # costs of all earlier items
    worker = before // max(1, -(-int(stop[-1]) // workers))
    return unit, item_begin, np.minimum(end[unit], cut + step[unit]), worker


def _assemble(units, rows, workers, num_splits, invariant):
    """WorkList of `units`: items, their partial slots, and which pieces make up each unit."""
    if not len(units.seq):
        none = np.zeros((0, 2), np.int32)
        return WorkList(rows, workers, np.zeros((0, 8), np.int32), np.zeros(workers + 1, np.int32), none,
                        none[:, 0], none, none[:, 0].copy(), 0)
    fixed = invariant or num_splits is not None
    if fixed:
        owner, begin, end, worker = _cut_fixed(units.begin, units.end, workers, num_splits)
    else:
        owner, begin, end, worker = _cut_balanced(units.begin, units.end, workers)
    count = np.bincount(owner)
    partial = count > 1
    if units.members is not None:
        partial |= (units.members > 0) | (units.prefix >= 0)
    counted = partial if units.members is None else partial & (units.members == 0)
    slots = np.cumsum(partial[owner])
    slot, num_slots = slots * partial[owner] - 1, int(slots[-1])
    number = np.cumsum(counted)           # minus 1: row in the table of units
    items = np.empty((len(owner), 8), np.int32)
    items[:, SEQ], items[:, KV_HEAD], items[:, FIRST_ROW] = units.seq[owner], units.head[owner], units.first_row[owner]
    items[:, BEGIN], items[:, END] = begin * KEY_TILE, end * KEY_TILE
    items[:, UNIT] = (number * counted)[owner] - 1
    items[:, MEMBERS] = 0 if units.members is None else units.members[owner]

    table = np.empty((int(number[-1]), 2), np.int32)
    table[:, 1] = count[counted]
    if units.members is None:
        if fixed and 2 * workers * int(count.max()) < num_slots:
            slot, num_slots = _reused_slots(owner, partial, count, worker, workers, slot)
        pieces, members = (slot[slot >= 0] * rows).astype(np.int32), np.zeros((0, 2), np.int32)
    else:
        first_slot = slots[np.cumsum(count) - count] - 1
        pieces, table[:, 1], members = _prefix_pieces(units, counted, count, first_slot, rows)
        shared = items[:, MEMBERS] > 0
        items[shared, UNIT] = members[items[shared, FIRST_ROW], 1] + items[shared, KV_HEAD]
    table[:, 0] = np.cumsum(table[:, 1]) - table[:, 1]
    items[:, SLOT] = slot
    worker_items = np.searchsorted(worker, np.arange(workers + 1)).astype(np.int32)
    return WorkList(rows, workers, items, worker_items, table, pieces, members, np.zeros(len(table), np.int32),
                    num_slots)


def _reused_slots(owner, partial, count, worker, workers, slot):
    """Slots of each item, and their number, where a unit that one block computes alone leaves its slots to its next.

    Such a block merges the unit before it goes on. Each block has slots for one of them; units of several blocks have
    slots of their own. Without this, long prompts cut at fixed keys would need partial results of every chunk at once.
    """
    each = int(count.max())
    first = np.cumsum(count) - count
    alone = worker[first] == worker[first + count - 1]
    shared = np.cumsum((partial & ~alone)[owner])
    own = worker * each + np.arange(len(owner)) - first[owner]
    slot = np.where(slot < 0, -1, np.where(alone[owner], own, workers * each + shared - 1))
    return slot, workers * each + int(shared[-1])


def _prefix_pieces(units, counted, count, first_slot, rows):
    """(pieces, pieces of each unit, members): a unit's pieces are those of its prefix, then its own."""
    own = np.flatnonzero(counted)
    prefix = units.prefix[own]
    before = np.where(prefix >= 0, count[prefix], 0)
    total = before + count[own]
    unit, number = _expand(total)
    of_prefix = first_slot[prefix[unit]] * rows + units.offset[own[unit]]
    of_unit = (first_slot[own[unit]] - before[unit]) * rows
    pieces = np.where(number < before[unit], of_prefix, of_unit) + number * rows
    row = np.zeros(int(units.seq.max()) + 1, np.int64)
    heads0 = np.flatnonzero((prefix >= 0) & (units.head[own] == 0))
    row[units.seq[own[heads0]]] = heads0
    members = np.stack([units.sequences, row[units.sequences]], axis=1)
    return pieces.astype(np.int32), total, members.astype(np.int32)
