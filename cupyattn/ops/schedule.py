# SPDX-License-Identifier: Apache-2.0
"""Who attends what: the work lists of a batch, made once per step. Kernel: ``cuda_src/schedule.cu``."""

import functools
from dataclasses import dataclass

import numpy as np

from ..attn.args import MAX_HEAD_DIM, STEP, check_lengths, check_shards
from ..attn.made_from import MadeFrom
from ..attn.plans import Facts, sm_count, tiling
from ..attn.scheduling import (
    SCHEDULE,
    Lengths,
    Limits,
    checked_policy,
    empty_lists,
    exact_lists,
    fill_lists,
    find_prefixes,
    host_lists,
    list_ranges,
    store_lists,
)
from ..attn.work_list import WorkList
from ..kv.quantized import FORMATS, PLAIN_TAGS
from ..paging.table import PageTable
from ..runtime import arch_of
from ..runtime.arrays import array_namespace
from ..runtime.capturing import refuse_to_keep, tape
from ..runtime.checks import check_array, check_flag, check_number, check_shape
from ..runtime.plan import CUDA_TYPES

CORE = [SCHEDULE]


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """Work lists of one step and what they were made for; `schedule` makes it, attention ops take it.

    Parameters
    ----------
    decode : WorkList or None
        Sequences with few query rows; None when there are none.
    prefill : WorkList or None
        The others.
    batch : int
        Number of sequences.
    num_heads, num_kv_heads, head_dim, causal, tree_mask, window_size, key_stride, key_offset, num_splits
        The arguments of `schedule` it was made with. An op that is called with others refuses it.
    invariant, one_list, dtype, kv_format
        Likewise.
    device : str
        ``"numpy"`` or ``"cupy"``: where its arrays are.
    made_from : MadeFrom or None
        The lengths it was made from. None: an op takes it for any.
    limits : Limits or None
        What the arrays have room for; None when they hold what is used and nothing else.
    """

    decode: WorkList | None
    prefill: WorkList | None
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    tree_mask: bool
    window_size: int
    key_stride: int
    key_offset: int
    num_splits: int | None
    invariant: bool
    one_list: bool
    dtype: str
    kv_format: str
    device: str
    made_from: MadeFrom | None = None
    limits: Limits | None = None

    def check(self, op, name="schedule", **wanted):
        """Raises ValueError when it was made for other values than `wanted`; `name` is the argument it came in as."""
        for what, value in wanted.items():
            found = getattr(self, what)
            if found != value:
                raise ValueError(f"{op}: {name} must be made for {what} {value}, got one for {found}")

    def __repr__(self):
        policy = "invariant" if self.invariant else "balanced"
        if self.num_splits is not None:
            policy = f"{self.num_splits} splits"
        heads = f"{self.num_heads}/{self.num_kv_heads} heads"
        lines = [f"Schedule({self.batch} sequences, {heads}, {policy}, {self.device}"]
        lines += [f"  {name}: {work!r}" for name, work in (("decode", self.decode), ("prefill", self.prefill)) if work]
        return "\n".join(lines) + ")"


# ---- the public function -----------------------------------------------------------------------------------


def schedule(cache_seqlens, /, *, num_heads, num_kv_heads, head_dim, head_dim_v=None, cu_seqlens_q=None, q_len=1,
             max_q_len=None, max_k_len=None, num_tokens=None, total_k_len=None, cache_starts=None, finished=None,
             causal=True, tree_mask=False, window_size=0, key_stride=1, key_offset=0, key_offsets=None, key_counts=None,
             dtype="float16", kv_format=None, num_workers=None, num_splits=None, invariant=False, one_list=False,
             block_table=None, page_size=None, share_prefix=True, xp=None, out=None):
    """Who attends what in a step: made once from the lengths of a batch, handed to the attention of every layer.

    The q_len * heads_per_kv query rows of a (sequence, KV head) are cut into tiles, units, and the keys of a unit into
    tiles of 64. A unit costs its key tiles and 2 more; each block of the launch gets an equal share of the cost of all
    units, in the order (sequence, KV head, row tile), so a block holds at most two units in part and long sequences
    are split over as many blocks as they need. Parts of a unit are merged in order by the block that finishes last.

    Parameters
    ----------
    cache_seqlens : ndarray [batch], int32
        Tokens to attend to, the new ones included. NumPy lengths are planned in NumPy, CuPy lengths by one launch
        without reading them on the host.
    num_heads, num_kv_heads, head_dim : int
    head_dim_v : int, optional
        Of values. Default head_dim.
        Of the attention to come.
    cu_seqlens_q : ndarray [batch + 1], int32, optional
        First query token of every sequence.
    q_len : int
        Query tokens of every sequence without `cu_seqlens_q`.
    max_q_len : int, optional
        Most query tokens of a sequence. Needed with a CuPy `cu_seqlens_q`.
    max_k_len : int, optional
        Most keys of a sequence in the cache: needed with CuPy lengths, default ``block_table.shape[1] * page_size``.
        With NumPy lengths it makes arrays that can be filled again, see `out`.
    num_tokens : int, optional
        Most query tokens of the batch, when that is less than ``batch * max_q_len``: makes the arrays smaller.
    total_k_len : int, optional
        Most keys of the batch in the cache, when that is less than ``batch * max_k_len``: makes the arrays of
        `invariant` and `num_splits` smaller. Default with CSR tables and block pointers: the pages they list.
    cache_starts : ndarray [batch], int32, optional
        First visible key of each sequence.
    finished : ndarray [batch], bool, optional
        Sequences that attend to nothing and give zeros.
    causal : bool
        A query sees no later token.
    tree_mask : bool
        The queries of a sequence see each other by a tree mask instead.
    window_size : int
        Visible tokens, the query's own included; 0 (default) for all.
    key_stride, key_offset : int
        Key l of the cache is token ``l * key_stride + key_offset`` of its sequence (context parallel).
    key_offsets, key_counts : ndarray [batch], int32, optional
        The same per sequence, and the keys of each sequence in the cache, for contiguous shards.
    dtype : str
        Of the queries.
    kv_format : str, optional
        Format of the caches; default plain arrays of `dtype`.
    num_workers : int, optional
        Multiprocessors to plan for, on a CPU blocks. Default: those of the device.
    num_splits : int, optional
        Parts of every unit, of ceil(tiles / num_splits) key tiles each; parts without a tile are left out.
    invariant : bool
        Cut every 1024 keys of a sequence instead: its bits depend neither on the batch nor on the multiprocessors.
    one_list : bool
        Put decoding sequences into the prefill list too: what ``attention(..., invariant=True)`` takes.
    block_table : ndarray [batch, max_pages], int32, or PageTable, optional
        Pages of the sequences, in host memory. Equal leading pages are attended to once for all sequences that have
        them.
    page_size : int, optional
        Tokens of a page; with `block_table`.
    share_prefix : bool
        False: do not look for equal leading pages. On CUDA cores it is also off where the tiles of more rows that it
        takes cost more than it saves, or with `invariant` would change bits, and in any case without a `block_table`
        in host memory, with `window_size`, `cache_starts`, context parallelism, `num_splits`, `max_k_len` or `out`.
    xp : module, optional
        numpy or cupy: where the schedule goes. Default: where the lengths are.
    out : Schedule, optional
        Made by an earlier call that gave `max_k_len` or had CuPy lengths: its arrays are filled again and keep their
        addresses, so that a captured graph sees the new lengths. Its limits stand.

    Returns
    -------
    Schedule
        Prints its units, splits and balance when it was made from NumPy lengths.

    Raises
    ------
    TypeError
        Arrays of different kinds, an unsupported dtype, or an option of the wrong kind.
    ValueError
        Shapes that do not fit, a limit that is missing or too small, or an `out` without room.

    Notes
    -----
    Both planners give the same bits. With an `out` nothing is allocated, and from CuPy lengths nothing
    synchronises; lists made of NumPy lengths are copied to the device, which a graph must not capture. While
    `cupyattn.graphs.capture` has a NumPy step, the kernel makes the lists, at each replay, also from NumPy lengths.
    Kernel: ``cuda_src/schedule.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> lengths = np.int32([40, 9000, 300])
    >>> cupyattn.schedule(lengths, num_heads=8, num_kv_heads=2, head_dim=64)
    Schedule(3 sequences, 8/2 heads, balanced, numpy
      decode: WorkList(16 blocks, tiles of 4 rows, 6 units in 20 items, splits 1 to 8, 16 partial slots, imbalance 5 %))
    """
    op = "schedule"
    lengths_xp = array_namespace(op, cache_seqlens=cache_seqlens, cu_seqlens_q=cu_seqlens_q, cache_starts=cache_starts,
                                 finished=finished, key_offsets=key_offsets, key_counts=key_counts)
    xp = lengths_xp if xp is None else xp
    on_host = lengths_xp is np
    if on_host and (xp is not np or out is None):
        refuse_to_keep(f"call {op} with lengths in host memory unless all is in NumPy arrays and out is given")
    if not on_host and xp is np:
        raise ValueError(f"{op}: xp must be cupy for CuPy lengths, got numpy; copy the lengths to the host")
    _check_arrays(op, cache_seqlens, cu_seqlens_q, finished, cache_starts=cache_starts, key_offsets=key_offsets,
                  key_counts=key_counts)
    policy = checked_policy(op, num_splits, invariant, one_list)
    for name, flag in (("causal", causal), ("tree_mask", tree_mask), ("share_prefix", share_prefix)):
        check_flag(op, name, flag)
    _check_numbers(op, num_heads, num_kv_heads, head_dim, q_len, window_size, key_stride, key_offset,
                   head_dim_v=(head_dim_v, 1), max_q_len=(max_q_len, 0), max_k_len=(max_k_len, 0),
                   num_tokens=(num_tokens, 0), total_k_len=(total_k_len, 0), num_workers=(num_workers, 1),
                   page_size=(page_size, 1))
    check_shards(op, key_offsets, key_counts, key_stride, "key_stride")
    _check_kinds(op, dtype, kv_format)
    lengths = Lengths(num_kv_heads, num_heads // num_kv_heads, cache_seqlens, None, cu_seqlens_q, q_len, cache_starts,
                      finished, key_offsets, key_counts, key_stride, key_offset, causal and not tree_mask, window_size)
    table = None if block_table is None else _page_table(op, block_table, page_size, lengths.batch)
    if on_host:
        _check_lengths(op, lengths, table, page_size)
    made_for = {"batch": lengths.batch, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
                "causal": causal, "tree_mask": tree_mask, "window_size": window_size, "key_stride": key_stride,
                "key_offset": key_offset, "num_splits": num_splits, "invariant": invariant, "one_list": one_list,
                "dtype": dtype, "kv_format": kv_format or dtype, "device": xp.__name__}
    dims = head_dim, head_dim if head_dim_v is None else head_dim_v
    tiles = functools.partial(_tiling, xp, lengths, dims, dtype, kv_format or dtype, num_workers)
    if on_host and max_k_len is None and out is None:
        on = share_prefix and table is not None and table.xp is np
        prefixes = find_prefixes(lengths, policy, table, page_size) if on else ()
        lists = exact_lists(lengths, tiles(lengths.packed_range()[1]), policy, prefixes)
        source = MadeFrom()
        source.set(lengths, True, prefixes)
        return Schedule(*(lists if xp is np else (work and work.to(xp) for work in lists)), **made_for,
                        made_from=source)
    limits = _limits(op, lengths, on_host, max_q_len, max_k_len, num_tokens, total_k_len, table, page_size, out)
    if out is not None:
        out.check(op, "out", **made_for)
    most = limits.max_q_len * lengths.heads_per_kv
    tiles = tiles(most)
    ranges = list_ranges(tiles, most if cu_seqlens_q is None else 1, most, one_list)
    lists = (out.decode, out.prefill) if out is not None else empty_lists(xp, lengths, limits, tiles, policy, ranges)
    on_host = on_host and (xp is not np or tape() is None)   # replays see other lengths: the kernel makes their lists
    if on_host:
        lists = store_lists(host_lists(lengths, tiles, policy, ranges), lists)
    else:
        fill_lists(xp, lengths, limits, policy, ranges, lists)
    source = MadeFrom() if out is None else out.made_from
    source.set(lengths, on_host)
    return Schedule(*lists, **made_for, made_from=source, limits=limits)


def _tiling(xp, lengths, dims, dtype, kv_format, num_workers, most):
    """Tiling of this device, or of one with `num_workers` multiprocessors."""
    tag = FORMATS[kv_format].tag if kv_format in FORMATS else PLAIN_TAGS[kv_format]
    facts = Facts(dtype, tag, tag, 16, lengths.num_kv_heads, lengths.heads_per_kv, *dims, False,
                  arch_of(xp))
    if num_workers is None:
        return tiling(facts, most, sm_count(xp))
    tiles = tiling(facts, most, num_workers)
    return tiles if facts.arch != "cpu" else tiles._replace(decode_workers=num_workers, prefill_workers=num_workers)


def _limits(op, lengths, on_host, max_q_len, max_k_len, num_tokens, total_k_len, table, page_size, out):
    """Limits from the arguments, or those of `out`."""
    if out is not None:
        if not isinstance(out, Schedule):
            raise TypeError(f"{op}: out must be a Schedule, got {type(out).__name__}")
        if out.limits is None:
            raise ValueError(f"{op}: out must be a schedule made with max_k_len, got one without")
        return out.limits
    if max_k_len is None:
        if table is None:
            raise ValueError(f"{op}: max_k_len must be given for CuPy lengths, which are not read, or block_table and "
                             "page_size; got neither")
        max_k_len = table.capacity(page_size)
        if table.form != "dense" and total_k_len is None:
            total_k_len = max_k_len
    if lengths.cu_seqlens_q is None:
        max_q_len = lengths.q_len
    elif max_q_len is None:
        if not on_host:
            raise ValueError(f"{op}: max_q_len must be given for a CuPy cu_seqlens_q, which is not read, got None")
        max_q_len = int(lengths.q_lens().max(initial=0))
    most = lengths.batch * max_q_len
    return Limits(max_q_len, max_k_len, most if num_tokens is None else min(num_tokens, most), total_k_len)


def _check_arrays(op, cache_seqlens, cu_seqlens_q, finished, **per_sequence):
    """Arrays are int32 (finished: bool) with an entry per sequence."""
    check_shape(op, "cache_seqlens", cache_seqlens, (None,), "[batch]")
    batch = len(cache_seqlens)
    for name, array, dtype, size in (
            ("cache_seqlens", cache_seqlens, "int32", batch), ("cu_seqlens_q", cu_seqlens_q, "int32", batch + 1),
            ("finished", finished, "bool", batch), *((n, a, "int32", batch) for n, a in per_sequence.items())):
        if array is not None:
            check_array(op, name, array, dtype, (size,), "[batch + 1]" if size > batch else "[batch]",
                        contiguous=name not in ("cache_seqlens", "cache_starts"))
    if isinstance(cu_seqlens_q, np.ndarray) and (np.diff(cu_seqlens_q) < 0).any():
        raise ValueError(f"{op}: cu_seqlens_q must not decrease, got {cu_seqlens_q.tolist()}")


def _check_numbers(op, num_heads, num_kv_heads, head_dim, q_len, window_size, key_stride, key_offset, **optional):
    """Options are integers in their range; the heads fit each other."""
    needed = {"num_heads": (num_heads, 1), "num_kv_heads": (num_kv_heads, 1), "head_dim": (head_dim, 1),
              "q_len": (q_len, 0), "window_size": (window_size, 0), "key_stride": (key_stride, 1),
              "key_offset": (key_offset, 0)}
    for name, (value, least) in needed.items():
        check_number(op, name, value, least=least, integer=True)
    for name, (value, least) in optional.items():
        if value is not None:
            check_number(op, name, value, least=least, integer=True)
    if num_heads % num_kv_heads:
        raise ValueError(f"{op}: num_kv_heads must divide num_heads {num_heads}, got {num_kv_heads}")
    for name, dim in (("head_dim", head_dim), ("head_dim_v", optional["head_dim_v"][0])):
        if dim is not None and (dim > MAX_HEAD_DIM or dim % STEP):
            raise ValueError(f"{op}: {name} must be a multiple of {STEP} up to {MAX_HEAD_DIM}, got {dim}")
    if key_offset >= key_stride:
        raise ValueError(f"{op}: key_offset must be below key_stride {key_stride}, got {key_offset}")


def _check_lengths(op, lengths, table, page_size):
    """Lengths in host memory are not negative, and in what the table, if it is there too, holds."""
    known = table is not None and table.xp is np
    check_lengths(op, lengths, table.capacity(page_size) if known else None)
    if known and lengths.batch:
        _, end = lengths.visible_keys()
        table.check_room(op, end, page_size)


def _check_kinds(op, dtype, kv_format):
    """dtype and kv_format are names of what there is."""
    if dtype not in CUDA_TYPES:
        raise ValueError(f"{op}: dtype must be {', '.join(CUDA_TYPES)}, got {dtype!r}")
    if kv_format is not None and kv_format not in CUDA_TYPES and kv_format not in FORMATS:
        raise ValueError(f"{op}: kv_format must be {', '.join((*CUDA_TYPES, *FORMATS))}, got {kv_format!r}")


def _page_table(op, block_table, page_size, batch):
    """`block_table` as a PageTable of `batch` sequences."""
    if page_size is None:
        raise ValueError(f"{op}: page_size must be given with block_table, got None")
    table = block_table if isinstance(block_table, PageTable) else PageTable(block_table)
    if table.batch != batch:
        raise ValueError(f"{op}: block_table must have {batch} sequences like cache_seqlens, got {table.batch}")
    return table
