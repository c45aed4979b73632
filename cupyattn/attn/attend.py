# SPDX-License-Identifier: Apache-2.0
"""The road both attention ops take from arrays to launches: keys, arguments, content checks, work lists."""

import numpy as np

from ..kv.quantized import kv_side
from ..ops.schedule import Schedule
from ..paging.table import NO_PAGES, PageTable
from ..runtime import Template, arch_of, env, make_args, workspace
from ..runtime.arrays import address, alignment, array_namespace, dtype_name, strides
from ..runtime.capturing import refuse_to_keep
from ..runtime.checks import check_array
from ..runtime.known import Known
from .args import NO_MASK, NO_PARTIALS, Keys, check_lengths, check_sides, check_workspace, ragged_side, sequence_view
from .plans import Facts, legal_rows, plan_decode, plan_prefill, sm_count, tiling
from .scheduling import (
    Lengths,
    Limits,
    checked_policy,
    empty_lists,
    exact_lists,
    fill_lists,
    find_prefixes,
    list_ranges,
)


def prepare_keys(op, xp, num_heads, head_dim, k, v, block_table, cu_seqlens_k, batch, names):
    """Keys of a call: ragged arrays with `cu_seqlens_k`, caches with `block_table` (an array or a PageTable)."""
    if cu_seqlens_k is not None:
        sides = [ragged_side(op, name, array) for name, array in zip(names, (k, v), strict=True)]
        check_array(op, "cu_seqlens_k", cu_seqlens_k, "int32", (batch + 1,), "[batch + 1]")
        pages, capacity = None, k.shape[0]
        fields = {**NO_PAGES, "row_starts": cu_seqlens_k, "max_pages": capacity}
    else:
        sides = [kv_side(op, name, array) for name, array in zip(names, (k, v), strict=True)]
        if not isinstance(block_table, PageTable):
            array_namespace(op, block_table=block_table)
            block_table = PageTable(block_table)
        pages = block_table
        num_pages, page_size = sides[0].shape[:2]
        if (num_pages is None) != (pages.form == "pointers"):
            raise TypeError(f"{op}: block_table must hold block pointers exactly when {names[0]} and {names[1]} are "
                            f"BlockKV, got {pages!r}")
        if page_size == 0:
            raise ValueError(f"{op}: {names[0]} must have a page_size ≥ 1, got 0")
        if pages.batch != batch:
            raise ValueError(f"{op}: block_table must be of {batch} sequences, got {pages.batch}")
        fields, capacity = pages.fields(num_pages, page_size), pages.capacity(page_size)
    block_bytes = max(k.nbytes_needed(), v.nbytes_needed()) if pages is not None and pages.form == "pointers" else 0
    check_sides(op, num_heads, head_dim, *sides, names)
    arrays = {**sides[0].arrays, **sides[1].arrays, **({} if pages is None else pages.arrays)}
    if array_namespace(op, **arrays) is not xp:
        raise TypeError(f"{op}: all arrays must be of one kind, got q of {xp.__name__} and {next(iter(arrays))} of "
                        "another; copy one of them over")
    return Keys(*sides, pages, fields, capacity, block_bytes)


def new_outputs(op, q, v, out, lse, partials, return_lse):
    """(out, lse), new arrays for what is wanted and not given; None where q and v, not checked yet, are no arrays."""
    if (out is not None or partials is not None) and (lse is not None or not return_lse):
        return out, lse
    try:
        shape = (*q.shape[:-1], v.shape[-1])
    except (AttributeError, IndexError):
        return out, lse
    xp = array_namespace(op, q=q)
    if out is None and partials is None:
        out = xp.empty(shape, q.dtype)
    return out, xp.empty(shape[:-1], np.float32) if return_lse and lse is None else lse


class Call:
    """What calls of attention with arrays of the same kinds have in common; holds none of them.

    Attributes
    ----------
    xp : module
    facts : Facts
    keys : Keys
    lengths : Lengths
    partials : Partials or None
    limits : Limits
    policy : Policy
    scheduled_for : dict
        What a Schedule must have been made for.
    values : dict
        Fields of AttentionArgs but the partial results and the work.
    """

    def __init__(self, op, xp, q, keys, *, cache_seqlens, max_q_len, softmax_scale, window_size, softcap, sinks,
                 num_splits, invariant, one_list, partials, out, lse, cu_seqlens_q=None, cache_starts=None,
                 finished=None, key_stride=1, key_offset=0, key_offsets=None, key_counts=None, causal=True,
                 mask=NO_MASK, tree_mask=None, alibi_slopes=None):
        uniform = cu_seqlens_q is None
        num_heads, head_dim = q.shape[-2:]
        batch = len(q) if uniform else len(cu_seqlens_q) - 1
        num_kv_heads, head_dim_v = keys.k.shape[2], keys.v.shape[3]
        results = out if out is not None else partials.out
        self.xp, self.keys, self.partials, self.empty = xp, keys, partials, results.size == 0
        self.facts = facts = Facts(
            dtype_name(q), keys.k.tag, keys.v.tag,
            min(keys.k.alignment, keys.v.alignment, alignment(q), alignment(results),
                16 if keys.pages is None else keys.pages.alignment), num_kv_heads,
            num_heads // num_kv_heads, head_dim, head_dim_v,
            mask["kind"] > 0 or tree_mask is not None or alibi_slopes is not None, arch_of(xp))
        self.lengths = Lengths(
            num_kv_heads, facts.heads_per_kv, cache_seqlens, keys.table["row_starts"], cu_seqlens_q,
            max_q_len if uniform else 0, cache_starts, finished, key_offsets, key_counts, key_stride, key_offset,
            causal and tree_mask is None, window_size)
        self.policy = checked_policy(op, num_splits, invariant, one_list)
        tokens = batch * max_q_len if uniform else len(q)
        total = keys.capacity if keys.pages is None or keys.pages.form != "dense" else None   # of all sequences
        self.limits = Limits(max_q_len, keys.capacity, tokens, total)
        self.scheduled_for = {
            "device": xp.__name__, "batch": batch, "num_heads": num_heads, "num_kv_heads": num_kv_heads,
            "causal": causal, "tree_mask": tree_mask is not None, "window_size": window_size, "key_stride": key_stride,
            "key_offset": key_offset,
            **(self.policy._asdict() if num_splits is not None or invariant else {})}
        self.values = dict(
            q=sequence_view(q, uniform), k=keys.k.view, v=keys.v.view, k_scale=keys.k.scale, v_scale=keys.v.scale,
            table=keys.table, mask=mask, out=None if out is None else sequence_view(out, uniform),
            cu_seqlens_q=cu_seqlens_q, cache_seqlens=cache_seqlens, cache_starts=cache_starts, key_offsets=key_offsets,
            key_counts=key_counts, finished=None if finished is None else finished.view(np.uint8), tree_mask=tree_mask,
            alibi_slopes=alibi_slopes, sinks=sinks if partials is None or partials.count_sinks else None, lse=lse,
            stride_seqlens=0 if cache_seqlens is None else strides(cache_seqlens)[0],
            stride_starts=0 if cache_starts is None else strides(cache_starts)[0],
            stride_tree=0 if tree_mask is None else strides(tree_mask)[0],
            tree_words=0 if tree_mask is None else tree_mask.shape[1], tokens=tokens,
            q_len=q.shape[1] if uniform else 0, num_kv_heads=num_kv_heads, heads_per_kv=facts.heads_per_kv,
            head_dim=head_dim, head_dim_v=head_dim_v, causal=int(causal), window_size=window_size,
            key_stride=key_stride, key_offset=key_offset, num_splits=0 if partials is None else num_splits,
            whole_to_out=int(partials is not None and partials.split_count is not None and out is not None),
            sink_in_partials=int(partials is not None and partials.count_sinks), softmax_scale=softmax_scale,
            softcap=softcap, lse_factor=1.0 if partials is None else partials.lse_factor)
        self._templates = {}

    def template(self, plan, work, first):
        """Template of a launch of `work`: its arrays are the call's from number `first` on.

        Where the items of `work` need room for partial results, that comes before, outputs and lse.
        """
        key = plan, work.rows, work.num_slots > 0, first
        found = self._templates.get(key)
        if found is None:
            fields = NO_PARTIALS if self.partials is None else self.partials.fields()
            if self.partials is None and work.num_slots:
                out, lse = (Known(first + i, np.dtype(np.float32), (0,), (4,)) for i in range(2))
                first, dims = first + 2, self.facts.head_dim_v
                fields = {**fields, "out": out, "lse": lse, "stride_split": work.rows * dims, "stride_token": dims,
                          "lse_split": work.rows, "lse_token": 1}
            arrays = {name: Known(first + i, np.dtype(np.int32), (0,), (4,)) for i, name in enumerate(work.ARRAYS)}
            found = self._templates[key] = Template(plan, make_args(plan, **self.values, partials=fields, work=arrays))
        return found


def attend(op, call, arrays, addresses, *, cache_seqlens, block_table=None, cu_seqlens_k=None, cu_seqlens_q=None,
           q_lens=None, cache_starts=None, finished=None, key_offsets=None, key_counts=None, schedule=None,
           scratch=None):
    """Attend as a Call, all `arrays` and their `addresses` say.

    `q_lens` are the query tokens of every sequence where the host may know them. The other arguments are those of
    `attention`, checked but for their content.
    """
    xp, keys, same = call.xp, call.keys, call.lengths
    lengths = Lengths(same.num_kv_heads, same.heads_per_kv, cache_seqlens, cu_seqlens_k, cu_seqlens_q, same.q_len,
                      cache_starts, finished, key_offsets, key_counts, same.key_stride, same.key_offset, same.causal,
                      same.window_size)
    pages = block_table   # of the arrays themselves
    if block_table is not None and not isinstance(block_table, PageTable):
        pages = keys.pages.with_parts(block_table, None, None)
    reads = xp is np or env.check()
    if reads:
        _check_content(op, keys, pages, lengths if xp is np else lengths.on_host())
    if call.empty:
        return
    if schedule is None:
        lists = _make_lists(op, call, lengths, q_lens, pages)
    else:
        lists = _lists_of(op, call, schedule)
        if schedule.made_from is not None:
            schedule.made_from.check(op, lengths, pages)
            if reads:
                schedule.made_from.check_contents(op, lengths, q_lens, pages, keys.table["page_size"])
    for work, plan in zip(lists, (plan_decode, plan_prefill), strict=True):
        if work is not None:
            launch_work(op, plan(call.facts, work.rows, work.workers), work, call, arrays, addresses, scratch,
                        () if pages is None else pages.buffers)


def launch_work(op, plan, work, call, arrays, addresses, scratch, buffers=()):
    """Launch one work list by `plan`; `arrays` and their `addresses` are those of the call."""
    template = call.template(plan, work, len(arrays))
    if call.partials is None and work.num_slots:
        rows, dims = work.num_slots * work.rows, call.facts.head_dim_v
        nbytes = rows * (dims + 1) * 4
        room = workspace(call.xp, nbytes) if scratch is None else check_workspace(op, scratch, nbytes)
        floats = room[:nbytes].view(np.float32)
        more = floats[:rows * dims], floats[rows * dims:]
        arrays, addresses = [*arrays, *more], [*addresses, *map(address, more)]
    more, places = work.array_places
    try:
        template.launch([*arrays, *more], [*addresses, *places], const_buffers=buffers)
    except BaseException:
        work.counters[...] = 0   # an aborted launch has counted some arrivals
        raise


def _make_lists(op, call, lengths, q_lens, pages):
    """(decode, prefill) work lists of one call: in NumPy, or by a kernel from lengths that stay on the device."""
    xp, facts, policy, limits = call.xp, call.facts, call.policy, call.limits
    if xp is np:
        refuse_to_keep(f"call {op} without schedule, which is then made on the host")
        tiles = tiling(facts, lengths.packed_range()[1], sm_count(xp))
        prefixes = () if pages is None else find_prefixes(lengths, policy, pages, call.keys.table["page_size"])
        return exact_lists(lengths, tiles, policy, prefixes)
    if xp.cuda.get_current_stream().is_capturing():   # a graph would keep the addresses of arrays that are freed
        raise ValueError(f"{op}: schedule must be given while a CUDA graph is captured, got None")
    group = facts.heads_per_kv
    tiles = tiling(facts, limits.max_q_len * group, sm_count(xp))
    if lengths.cu_seqlens_q is None:
        least = limits.max_q_len * group
    else:
        least = 1 if q_lens is None else int(q_lens.min(initial=limits.max_q_len)) * group
    ranges = list_ranges(tiles, least, limits.max_q_len * group, policy.one_list)
    lists = empty_lists(xp, lengths, limits, tiles, policy, ranges)
    fill_lists(xp, lengths, limits, policy, ranges, lists)
    return lists


def _lists_of(op, call, schedule):
    """(decode, prefill) work lists of `schedule`, which must have been made for such a call."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{op}: schedule must be a Schedule, got {type(schedule).__name__}")
    schedule.check(op, **call.scheduled_for)
    *legal, why = legal_rows(call.facts)
    for name, work, rows in zip(("decode", "prefill"), (schedule.decode, schedule.prefill), legal, strict=True):
        if work is not None and work.rows not in rows:
            raise ValueError(f"{op}: schedule must {name} in tiles of {rows} rows for {why}, got {work.rows}; make it "
                             "with this call's dtype, kv_format, head_dim and head_dim_v")
    return schedule.decode, schedule.prefill


def _check_content(op, keys, pages, lengths):
    """Lengths fit, and every page with a visible token exists."""
    starts = lengths.row_starts
    if starts is not None and starts.size and (
            starts[0] < 0 or starts[-1] > keys.capacity or np.diff(starts.astype(np.int64)).min(initial=0) < 0):
        raise ValueError(f"{op}: cu_seqlens_k must not decrease and be within 0 and the {keys.capacity} tokens of k, "
                         f"got {starts.tolist() if len(starts) < 20 else f'{starts[0]} to {starts[-1]}'}")
    check_lengths(op, lengths, keys.capacity)
    if starts is None and lengths.batch and not pages.all_entries_are_pages(
            lengths.cache_seqlens, *keys.k.shape[:2]):
        begin, end = lengths.visible_keys()
        pages.check(op, end, *keys.k.shape[:2], keys.block_bytes, starts=begin)
