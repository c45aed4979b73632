# SPDX-License-Identifier: Apache-2.0
"""The road both attention ops take from checked arrays to launches: keys, content checks, work lists, arguments."""

import numpy as np

from .attention_args import NO_MASK, Keys, check_lengths, check_sides, launch_work, ragged_side, sequence_view
from .attention_plans import Facts, legal_rows, plan_decode, plan_prefill, sm_count, tiling
from .ops.schedule import Schedule
from .page_table import NO_PAGES, PageTable
from .planning import (
    Lengths,
    Limits,
    checked_policy,
    empty_lists,
    exact_lists,
    fill_lists,
    find_prefixes,
    list_ranges,
)
from .quantized_kv import kv_side
from .runtime import arch_of, env
from .runtime.arrays import alignment, array_namespace, dtype_name, strides
from .runtime.capturing import refuse_to_keep
from .runtime.checks import check_dtype, check_last_axis, check_shape


def prepare_keys(op, xp, num_heads, head_dim, k, v, block_table, cu_seqlens_k, batch, names):
    """Keys of a call: ragged arrays with `cu_seqlens_k`, caches with `block_table` (an array or a PageTable)."""
    if cu_seqlens_k is not None:
        sides = [ragged_side(op, name, array) for name, array in zip(names, (k, v), strict=True)]
        check_dtype(op, "cu_seqlens_k", cu_seqlens_k, "int32")
        check_shape(op, "cu_seqlens_k", cu_seqlens_k, (batch + 1,), "[batch + 1]")
        check_last_axis(op, "cu_seqlens_k", cu_seqlens_k)
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


def attend(op, xp, q, keys, *, cache_seqlens, max_q_len, softmax_scale, window_size, softcap, sinks, num_splits,
           invariant, one_list, schedule, partials, scratch, out, lse, cu_seqlens_q=None, q_lens=None,
           cache_starts=None, finished=None, key_stride=1, key_offset=0, key_offsets=None, key_counts=None, causal=True,
           mask=NO_MASK, tree_mask=None, alibi_slopes=None):
    """Attend: `q` is [batch, q_len, heads, head_dim], or with `cu_seqlens_q` [tokens, heads, head_dim].

    `q_lens` are the query tokens of every sequence where the host may know them; with `one_list` all go through the
    prefill kernel. The other arguments are those of `attention`, checked but for their content.
    """
    uniform = cu_seqlens_q is None
    num_heads, head_dim = q.shape[-2:]
    batch = len(q) if uniform else len(cu_seqlens_q) - 1
    num_kv_heads, head_dim_v = keys.k.shape[2], keys.v.shape[3]
    results = out if out is not None else partials.out
    facts = Facts(
        dtype_name(q), keys.k.tag, keys.v.tag,
        min(keys.k.alignment, keys.v.alignment, alignment(q), alignment(results),
            16 if keys.pages is None else keys.pages.alignment), num_kv_heads,
        num_heads // num_kv_heads, head_dim, head_dim_v,
        mask["kind"] > 0 or tree_mask is not None or alibi_slopes is not None, arch_of(xp))
    lengths = Lengths(
        num_kv_heads, facts.heads_per_kv, cache_seqlens, keys.table["row_starts"], cu_seqlens_q,
        max_q_len if uniform else 0, cache_starts, finished, key_offsets, key_counts, key_stride, key_offset,
        causal and tree_mask is None, window_size)
    if xp is np or env.check():
        _check_content(op, keys, lengths if xp is np else lengths.on_host())
    if results.size == 0:
        return
    policy = checked_policy(op, num_splits, invariant, one_list)
    tokens = batch * max_q_len if uniform else len(q)
    if schedule is None:
        total = keys.capacity if keys.pages is None or keys.pages.form != "dense" else None   # of all sequences
        limits = Limits(max_q_len, keys.capacity, tokens, total)
        lists = _make_lists(op, xp, facts, lengths, policy, q_lens, keys, limits)
    else:
        lists = _lists_of(op, xp, facts, lengths, policy, schedule, causal, tree_mask is not None)
        if schedule.made_from is not None:
            schedule.made_from.check(op, lengths, keys.pages)
            if xp is np or env.check():
                schedule.made_from.check_contents(op, lengths, q_lens, keys.pages, keys.table["page_size"])
    values = dict(
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
    for work, plan in zip(lists, (plan_decode, plan_prefill), strict=True):
        if work is not None:
            launch_work(op, plan(facts, work.rows, work.workers), work, values, partials, scratch, xp, head_dim_v,
                        () if keys.pages is None else keys.pages.buffers)


def _make_lists(op, xp, facts, lengths, policy, q_lens, keys, limits):
    """(decode, prefill) work lists of one call: in NumPy, or by a kernel from lengths that stay on the device."""
    if xp is np:
        refuse_to_keep(f"call {op} without schedule, which is then made on the host")
        tiles = tiling(facts, lengths.packed_range()[1], sm_count(xp))
        prefixes = () if keys.pages is None else find_prefixes(lengths, policy, keys.pages, keys.table["page_size"])
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


def _lists_of(op, xp, facts, lengths, policy, schedule, causal, tree_mask):
    """(decode, prefill) work lists of `schedule`, which must have been made for such a call."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{op}: schedule must be a Schedule, got {type(schedule).__name__}")
    schedule.check(op, device=xp.__name__, batch=lengths.batch, num_heads=lengths.num_kv_heads * facts.heads_per_kv,
                   num_kv_heads=lengths.num_kv_heads, causal=causal, tree_mask=tree_mask,
                   window_size=lengths.window_size, key_stride=lengths.key_stride, key_offset=lengths.key_offset)
    if policy.num_splits is not None or policy.invariant:
        schedule.check(op, **policy._asdict())
    *legal, why = legal_rows(facts)
    for name, work, rows in zip(("decode", "prefill"), (schedule.decode, schedule.prefill), legal, strict=True):
        if work is not None and work.rows not in rows:
            raise ValueError(f"{op}: schedule must {name} in tiles of {rows} rows for {why}, got {work.rows}; make it "
                             "with this call's dtype, kv_format, head_dim and head_dim_v")
    return schedule.decode, schedule.prefill


def _check_content(op, keys, lengths):
    """Lengths fit, and every page with a visible token exists."""
    starts = lengths.row_starts
    if starts is not None and starts.size and (
            starts[0] < 0 or starts[-1] > keys.capacity or np.diff(starts.astype(np.int64)).min(initial=0) < 0):
        raise ValueError(f"{op}: cu_seqlens_k must not decrease and be within 0 and the {keys.capacity} tokens of k, "
                         f"got {starts.tolist() if len(starts) < 20 else f'{starts[0]} to {starts[-1]}'}")
    check_lengths(op, lengths, keys.capacity)
    if starts is None and lengths.batch:
        begin, end = lengths.visible_keys()
        keys.pages.check(op, end, *keys.k.shape[:2], keys.block_bytes, starts=begin)
