# SPDX-License-Identifier: Apache-2.0
"""Both work lists of a step, from the lengths of a batch: exact ones, or arrays with room for any lengths in limits.

Kernel that fills those from lengths on the device: ``cuda_src/schedule.cu``.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..devices import to_host
from ..paging.table import NO_PAGES
from ..runtime import Plan, Specialisation, arch_of, launch, make_args
from ..runtime.checks import check_flag, check_number
from .plans import CORES_ROWS
from .shared_prefix import shared_prefixes
from .work_list import CHUNK_TILES, KEY_TILE, WorkList, key_ranges, make_work

SCHEDULE = Specialisation("schedule", "schedule", "ScheduleArgs", {})
_EVERY = 2**31 - 1   # packed rows
_NO_TARGET = {"items": None, "worker_items": None, "units": None, "pieces": None, "rows": 1, "workers": 1,
              "least_packed": 1, "most_packed": 0, "max_units": 0, "max_items": 0}


class Lengths(NamedTuple):
    """What of a batch decides who attends what: arrays of one kind, and the rules of what a query sees."""

    num_kv_heads: int
    heads_per_kv: int
    cache_seqlens: object             # int32 [batch], or None with row_starts
    row_starts: object = None         # int32 [batch + 1], of ragged keys
    cu_seqlens_q: object = None       # int32 [batch + 1], or None for q_len queries each
    q_len: int = 1
    cache_starts: object = None       # int32 [batch]
    finished: object = None           # bool [batch]
    key_offsets: object = None        # int32 [batch]
    key_counts: object = None         # int32 [batch]
    key_stride: int = 1
    key_offset: int = 0
    causal: bool = True               # False too with a tree mask
    window_size: int = 0

    @property
    def batch(self):
        return len(self.cache_seqlens) if self.row_starts is None else len(self.row_starts) - 1

    def on_host(self):
        """With copies of the arrays in host memory."""
        return self._replace(**{name: to_host(value) for name, value in self._asdict().items()
                                if hasattr(value, "__cuda_array_interface__")})

    def seqlens(self):
        """Tokens to attend to, from host arrays."""
        return self.cache_seqlens if self.row_starts is None else np.diff(self.row_starts)

    def q_lens(self):
        """Query tokens of every sequence or of all, from host arrays."""
        return self.q_len if self.cu_seqlens_q is None else np.diff(self.cu_seqlens_q)

    def visible_keys(self):
        """Local keys [begin, end) that some query of each sequence may see, from host arrays."""
        q_lens = np.asarray(self.q_lens(), np.int64)
        offsets = (self.key_offset or None) if self.key_offsets is None else self.key_offsets.astype(np.int64)
        return key_ranges(
            self.seqlens().astype(np.int64), q_lens, 0, np.maximum(q_lens, 1) - 1, causal=self.causal,
            window_size=self.window_size, starts=self.cache_starts, finished=self.finished,
            key_stride=self.key_stride, offsets=offsets, counts=self.key_counts)

    def packed_range(self):
        """(least, most) packed rows of the sequences that have queries, from host arrays."""
        if self.cu_seqlens_q is None:
            return self.q_len * self.heads_per_kv, self.q_len * self.heads_per_kv
        packed = np.diff(self.cu_seqlens_q) * self.heads_per_kv
        return int(packed[packed > 0].min(initial=_EVERY)), int(packed.max(initial=0))


class Policy(NamedTuple):
    """How units are cut; `one_list`: every sequence goes to the prefill list."""

    num_splits: int | None = None
    invariant: bool = False
    one_list: bool = False


def checked_policy(op, num_splits, invariant, one_list):
    """Policy of the arguments of `op`, which are of their kinds and do not exclude each other."""
    if num_splits is not None:
        check_number(op, "num_splits", num_splits, least=1, integer=True)
    check_flag(op, "invariant", invariant)
    check_flag(op, "one_list", one_list)
    if invariant and num_splits is not None:
        raise ValueError(f"{op}: num_splits must be None with invariant=True, got {num_splits}")
    return Policy(num_splits, invariant, one_list)


def list_ranges(tiles, least, most, one_list=False):
    """(decode, prefill): (least, most) packed rows of the sequences a list takes, None for a list without any.

    `least` and `most` are those of the batch. One list takes everything where both have the same rows.
    """
    if one_list:
        return None, (1, _EVERY)
    if most <= tiles.decode_rows:
        return (1, _EVERY), None
    if least > tiles.decode_rows or tiles.decode_rows == tiles.prefill_rows:
        return None, (1, _EVERY)
    return (1, tiles.decode_rows), (tiles.decode_rows + 1, _EVERY)


def host_lists(lengths, tiles, policy, ranges, prefixes=()):
    """(decode, prefill): exact work lists in NumPy of `lengths` in host memory, in the Tiling `tiles`.

    `ranges` is from `list_ranges`, `prefixes` from `shared_prefixes` and all in one of the lists.
    """
    seqlens, q_lens = lengths.seqlens(), lengths.q_lens()
    lists = []
    for packed_rows, rows, workers in ((ranges[0], tiles.decode_rows, tiles.decode_workers),
                                       (ranges[1], tiles.prefill_rows, tiles.prefill_workers)):
        inside = ()
        if packed_rows is None:
            lists.append(None)
            continue
        if prefixes:
            each = np.broadcast_to(q_lens, len(seqlens)) * lengths.heads_per_kv
            inside = [(keys, group) for keys, group in prefixes
                      if packed_rows[0] <= each[group[0]] <= min(packed_rows[1], rows // 2)]
        lists.append(make_work(
            seqlens, q_lens, num_kv_heads=lengths.num_kv_heads, heads_per_kv=lengths.heads_per_kv, rows=rows,
            workers=workers, packed_rows=packed_rows, causal=lengths.causal, window_size=lengths.window_size,
            cache_starts=lengths.cache_starts, finished=lengths.finished, key_stride=lengths.key_stride,
            key_offset=lengths.key_offset, key_offsets=lengths.key_offsets, key_counts=lengths.key_counts,
            num_splits=policy.num_splits, invariant=policy.invariant, prefixes=inside))
    return tuple(lists)


def exact_lists(lengths, tiles, policy, prefixes=()):
    """(decode, prefill): `host_lists` of the lists that these lengths need, with `prefixes` where they save time.

    On CUDA cores decoding tiles have no rows for a second sequence. They are enlarged where that pays, but never with
    the invariant policy: with more rows a tile has other bits.
    """
    if prefixes and not policy.one_list and not policy.invariant and tiles.decode_rows < CORES_ROWS[-1]:
        if _pays(lengths, prefixes, tiles.decode_rows):
            tiles = tiles._replace(decode_rows=CORES_ROWS[-1])
        else:
            prefixes = ()
    return host_lists(lengths, tiles, policy, list_ranges(tiles, *lengths.packed_range(), policy.one_list), prefixes)


def _pays(lengths, prefixes, rows):
    """Whether sharing makes up for tiles of CORES_ROWS[-1] rows, on CUDA cores, where most sequences fill `rows`.

    A key tile costs about (1 + rows / 5) times as much then (measured on a CPU: 1.2 for 1 row, 1.3 for 2, 1.8 for 4).
    """
    packed = np.broadcast_to(lengths.q_lens(), lengths.batch) * lengths.heads_per_kv
    tiles = int((-(-lengths.cache_seqlens.astype(np.int64) // KEY_TILE)[packed <= rows]).sum())
    saved = sum(keys // KEY_TILE * (len(group) - -(-len(group) // max(1, CORES_ROWS[-1] // packed[group[0]])))
                for keys, group in prefixes)
    return (tiles - saved) * (1 + rows / 5) < tiles


def find_prefixes(lengths, policy, table, page_size):
    """Shared prefixes of sequences in host memory that all see their first keys."""
    if lengths.batch < 2 or policy.num_splits is not None or lengths.window_size or lengths.cache_starts is not None \
            or lengths.key_stride > 1 or lengths.key_offset or lengths.key_offsets is not None:
        return ()
    eligible = np.ones(lengths.batch, bool) if lengths.finished is None else ~lengths.finished
    q_lens = np.broadcast_to(lengths.q_lens(), lengths.batch)
    return shared_prefixes(table, page_size, lengths.cache_seqlens, q_lens,
                           KEY_TILE * (CHUNK_TILES if policy.invariant else 1), eligible & (q_lens > 0))


class Limits(NamedTuple):
    """What no length exceeds, known on the host."""

    max_q_len: int
    max_k_len: int      # local keys of a sequence
    num_tokens: int     # query tokens of all sequences
    total_k_len: int | None = None   # local keys of all sequences; None: batch * max_k_len


# ---- lists with room for more -----------------------------------------------------------------------------


def capacity(lengths, limits, policy, packed_rows, rows, workers):
    """(units, items, units in several pieces, pieces, partial slots) that lengths inside `limits` never exceed."""
    group, batch = lengths.heads_per_kv, lengths.batch
    each = -(-min(limits.max_q_len * group, packed_rows[1]) // rows)   # row tiles of a sequence
    units = lengths.num_kv_heads * min(batch * each, (limits.num_tokens * group + batch * (rows - 1)) // rows)
    keys = limits.max_k_len
    if lengths.window_size:
        queries = min(limits.max_q_len, (rows - 1) // group + 2)
        span = (1 if lengths.causal else 2) * lengths.window_size + queries   # of the visible tokens of a unit
        keys = min(keys, span + KEY_TILE * CHUNK_TILES)                       # which may begin late in a chunk
    key_tiles = -(-keys // KEY_TILE)
    if not policy.invariant and policy.num_splits is None:
        slots = min(2 * workers, units * key_tiles * (key_tiles > 1))
        return units, units + workers, min(units, slots // 2), slots, slots
    step = CHUNK_TILES if policy.invariant else 1
    splits = max(1, min(-(-key_tiles // step), policy.num_splits or _EVERY))
    items = units * splits
    if limits.total_k_len is not None:
        items = min(items, units + lengths.num_kv_heads * each * (limits.total_k_len // (step * KEY_TILE)))
    pieces = items if items > units else 0
    return units, items, min(units, pieces // 2), pieces, min(pieces, 2 * workers * splits)


def _empty_list(xp, rows, workers, room):
    """WorkList with `room`, the result of `capacity`."""
    _, items, split_units, pieces, slots = room
    return WorkList(rows, workers, xp.empty((items, 8), np.int32), xp.zeros(workers + 1, np.int32),
                    xp.empty((split_units, 2), np.int32), xp.empty(pieces, np.int32),
                    xp.empty((0, 2), np.int32), xp.zeros(split_units, np.int32), slots, exact=False)


def empty_lists(xp, lengths, limits, tiles, policy, ranges):
    """(decode, prefill) of the capacity that `limits` ask for, nothing in them."""
    return tuple(packed_rows and _empty_list(xp, rows, workers,
                                             capacity(lengths, limits, policy, packed_rows, rows, workers))
                 for packed_rows, rows, workers in ((ranges[0], tiles.decode_rows, tiles.decode_workers),
                                                    (ranges[1], tiles.prefill_rows, tiles.prefill_workers)))


@functools.lru_cache(maxsize=64)
def _plan_schedule(lists, arch):
    """Plan from the number of lists and arch."""
    threads = 64 if arch == "cpu" else 512
    return Plan(SCHEDULE, arch, (lists,), (threads,), shared_bytes=96 * 8 + 8 + threads * (64 + 8),
                note="one block per list")


def fill_lists(xp, lengths, limits, policy, ranges, lists):
    """Fills `lists`, made by `empty_lists` of the same arguments, from lengths that are never read on the host."""
    targets = []
    for packed_rows, work in zip(ranges, lists, strict=True):
        if work is not None:
            units, items, *_ = capacity(lengths, limits, policy, packed_rows, work.rows, work.workers)
            targets.append({"items": work.items, "worker_items": work.worker_items, "units": work.units,
                            "pieces": work.pieces, "rows": work.rows, "workers": work.workers,
                            "least_packed": packed_rows[0], "most_packed": packed_rows[1], "max_units": units,
                            "max_items": items})
    plan = _plan_schedule(len(targets), arch_of(xp))

    def stride(array):
        return 0 if array is None else array.strides[0] // 4

    launch(plan, make_args(
        plan, first=targets[0], second=targets[1] if len(targets) > 1 else _NO_TARGET,
        table={**NO_PAGES, "row_starts": lengths.row_starts}, cu_seqlens_q=lengths.cu_seqlens_q,
        cache_seqlens=lengths.cache_seqlens, cache_starts=lengths.cache_starts, key_offsets=lengths.key_offsets,
        key_counts=lengths.key_counts, finished=None if lengths.finished is None else lengths.finished.view(np.uint8),
        tree_mask=None, stride_seqlens=stride(lengths.cache_seqlens), stride_starts=stride(lengths.cache_starts),
        batch=lengths.batch, tokens=limits.num_tokens, q_len=lengths.q_len,
        max_q_len=limits.max_q_len, max_k_len=limits.max_k_len, num_kv_heads=lengths.num_kv_heads,
        heads_per_kv=lengths.heads_per_kv, causal=int(lengths.causal), window_size=lengths.window_size,
        key_stride=lengths.key_stride, key_offset=lengths.key_offset,
        num_splits=policy.num_splits or 0, invariant=int(policy.invariant), reserved=0))


def store_lists(lists, targets):
    """`lists`, exact and in host memory, written into the arrays of `targets`; returns what then describes those."""
    return tuple(_store(name, work, target)
                 for name, work, target in zip(("decode", "prefill"), lists, targets, strict=True))


def _store(name, work, target):
    if target is None:
        if work is not None and len(work.items):
            raise ValueError(f"schedule: out must have a {name} list, got one without")
        return None
    if work is None:
        _put(target.worker_items, np.zeros(target.workers + 1, np.int32))
        return replace(target, host=None)
    for what in ("rows", "workers"):
        if getattr(work, what) != getattr(target, what):
            raise ValueError(f"schedule: out must have {getattr(work, what)} {what} in its {name} list, got "
                             f"{getattr(target, what)}")
    filled = ("items", "units", "pieces")
    for array in filled:
        values, room = getattr(work, array), getattr(target, array)
        if len(values) > len(room):
            raise ValueError(f"schedule: out must have room for {len(values)} {array} in its {name} list, got "
                             f"{len(room)}; make it with the largest max_q_len and max_k_len")
    for array in (*filled, "worker_items"):
        _put(getattr(target, array), getattr(work, array))
    return replace(target, host=work)


def _put(room, values):
    """Copies `values`, in host memory, to the start of `room`."""
    if isinstance(room, np.ndarray):
        room[:len(values)] = values
    elif len(values):
        room[:len(values)].set(values)
