# SPDX-License-Identifier: Apache-2.0
"""TurboMind's entry points: appending, attending, flattening and merging by AttentionParams."""

import contextlib

import numpy as np

from ..attn.args import Partials
from ..attn.plans import sm_count
from ..ops.attention import attention
from ..ops.kv_append import kv_append
from ..ops.kv_flatten import kv_flatten
from ..ops.schedule import schedule
from ..ops.split_reduce import split_reduce
from ..runtime.arrays import dtype_name
from ..runtime.checks import FLOATS
from .attention_params import check_params

_TILE = 64        # keys; splits are cut at its multiples
_UNIT_ROWS = 16   # query rows that one block of the decode kernel takes
_SCHEDULES = 16   # that a step keeps for its layers


def invoke_decoding(params):
    """Append the new tokens' keys and values to the blocks, then attend to them: one or more new tokens per sequence.

    Parameters
    ----------
    params : AttentionParams
        With k, v and block_iter_params.

    Returns
    -------
    out : ndarray [tokens, num_heads, size_per_head]
        ``params.out``, or a new array; rows of finished sequences are zeros, rows of no sequence stay as they are. With
        context parallelism the partial results ``(partial_O, partial_ML)`` instead: see `merge_shards`.

    Raises
    ------
    ValueError
        A field this call needs is None; the message names it.

    Notes
    -----
    The new tokens are attended to as the cache holds them, quantized. With `partial_O` every token's splits are left in
    the partial results, and `out` is merged from them; without, they are scratch. Sinks count in the last split of a
    token; with context parallelism only in `merge_shards`. Asynchronous on ``params.stream``. Kernels:
    ``cuda_src/kv_append.cu``, ``cuda_src/paged_decode.cu``, ``cuda_src/attention.cu``, ``cuda_src/split_reduce.cu``.
    """
    _require("invoke_decoding", params, "k", "block_iter_params")
    with _on_stream(params):
        q = _append(params, with_queries=True)
        return _attend("invoke_decoding", params, q, linear=False)


def invoke_attention(params):
    """Attend to keys and values that are there already: prefill, chunked prefill, or any other batch.

    Parameters
    ----------
    params : AttentionParams
        Reads linear_iter_params if given, else block_iter_params. Neither is written, and k and v are not looked at.

    Returns
    -------
    out : ndarray [tokens, num_heads, size_per_head]
        As of `invoke_decoding`.

    Raises
    ------
    ValueError
        A field this call needs is None; the message names it.
    """
    check_params("invoke_attention", params)
    linear = params.linear_iter_params is not None
    _require("invoke_attention", params, "linear_iter_params" if linear else "block_iter_params")
    with _on_stream(params):
        return _attend("invoke_attention", params, _finish_queries(params), linear)


def process_kv(params):
    """Write the new tokens' keys and values into the blocks: bias, RoPE (keys), quantization.

    Tokens of finished sequences and of other context-parallel ranks are skipped.

    Parameters
    ----------
    params : AttentionParams
        With k, v and block_iter_params.

    Raises
    ------
    ValueError
        A field this call needs is None; the message names it.
    """
    _require("process_kv", params, "k", "block_iter_params")
    with _on_stream(params):
        _append(params, with_queries=False)


def flatten_kv(params):
    """Copy every context token's keys and values, dequantized, from the blocks into the linear buffer.

    Row ``cu_k_len[b] - cu_k_len[0] + t`` of every head is token t of sequence b; with context parallelism this rank's
    token t. Rows of finished sequences stay as they are.

    Parameters
    ----------
    params : AttentionParams
        With block_iter_params and linear_iter_params.

    Raises
    ------
    ValueError
        A field this call needs is None, or a block of a token is gone, also one before the window.
    """
    _require("flatten_kv", params, "block_iter_params", "linear_iter_params")
    layer, step = params.block_layer, params.step
    if params.window_size:   # without one all blocks were checked before
        params.check_blocks("flatten_kv", np.zeros_like(step.unfinished_lens), step.unfinished_lens)
    with _on_stream(params):
        kv_flatten(layer.k, layer.v, block_table=params.block_iter_params.table, cu_seqlens_k=step.cu_seqlens_k,
                   cache_seqlens=step.unfinished_seqlens, out=_linear_views(params))


def reduce_split_k(params):
    """Merge the partial results into `out`: what `invoke_decoding` does last where there are any.

    out = sum_i w_i O_i / sum_i w_i L_i,   w_i = 2^((M_i - max M) * softmax_scale * log2(e)),   i < split_cnt

    Rows of tokens with a `split_cnt` of 0 stay as they are.

    Parameters
    ----------
    params : AttentionParams
        With out, split_cnt, partial_O and partial_ML. The partial results may be TurboMind's own, numerators with raw
        maxima and sums.

    Returns
    -------
    out : ndarray [tokens, num_heads, size_per_head]

    Raises
    ------
    ValueError
        A field this call needs is None, or is one rank's of several.
    """
    _require("reduce_split_k", params, "out", "partial_O")
    if params.is_context_parallel:
        raise ValueError("reduce_split_k: cp_size must be 1, got one rank of several; use merge_shards")
    with _on_stream(params):
        _reduce(params, params.out[params.rows])
    return params.out


# ---- steps -------------------------------------------------------------------------------------------------


def _require(op, params, *names):
    check_params(op, params)
    for name in names:
        if getattr(params, name) is None:
            raise ValueError(f"{op}: {name} must be given, got None")


def _on_stream(params):
    return contextlib.nullcontext() if params.stream is None else params.stream


def _rope_options(params):
    """What kv_append is told about RoPE and log-n."""
    options = {"logn_max_position": params.max_position_embeddings if params.use_logn_attn else None}
    if params.rope_param is not None:
        cos, sin, rows = params.step.rope_tables
        options |= {"cos": cos, "sin": sin, "rope_rows": rows, "style": params.rope_param.style,
                    "rotary_dim": params.rope_param.rotary_dim}
    return options


def _finish_queries(params):
    """Queries with bias, RoPE and log-n."""
    q = params.q[params.rows]
    if params.q_bias is None and params.rope_param is None and not params.use_logn_attn:
        return q
    return kv_append(None, None, None, None, q=q, q_bias=params.q_bias, q_out=_scratch(params),
                     positions=params.step.positions, **_rope_options(params))


def _scratch(params):
    return None if params.q_out is None else params.q_out[params.rows]


def _append(params, with_queries):
    """Store the new keys and values; returns the finished queries if asked for."""
    step, layer, rows = params.step, params.block_layer, params.rows
    together = with_queries and params.cp_offsets is None
    options = _rope_options(params)
    if not together:   # log-n is the queries' alone
        options.pop("logn_max_position")
    q = kv_append(
        params.k[rows], params.v[rows], layer.k, layer.v, block_table=params.block_iter_params.table,
        batch_indices=step.sequence, k_bias=params.k_bias, v_bias=params.v_bias,
        positions=step.positions if params.cp_offsets is None else step.slots,
        key_stride=params.cp_size if params.cp_offsets is None else 1,
        key_offset=params.cp_rank if params.cp_offsets is None else 0,
        **({"q": params.q[rows], "q_bias": params.q_bias, "q_out": _scratch(params)} if together else {}), **options)
    return _finish_queries(params) if with_queries and not together else q


def _linear_views(params):
    return params.linear_iter_params.views(params.num_kv_heads, int(params.step.k_lens.sum()), params.size_per_head)


def _attend(op, params, q, linear):
    """Attention of finished queries over the linear buffer or the blocks."""
    step = params.step
    options = {"cu_seqlens_q": step.cu_seqlens_q, "max_q_len": params.max_q_len, "causal": params.causal,
               "softmax_scale": params.softmax_scale, "window_size": params.window_size, "sinks": params.sinks,
               "finished": params.finished, "invariant": params.invariant}
    if linear:
        keys = _linear_views(params)
        options["cu_seqlens_k"] = step.cu_seqlens_k
    else:
        keys = params.block_layer[:2]
        options |= {"block_table": params.block_iter_params.table, "cache_seqlens": step.cache_seqlens}
    if params.cp_offsets is not None:
        options |= {"key_offsets": params.cp_offsets, "key_counts": params.cp_counts}
    elif params.cp_size > 1:
        options |= {"cp_rank": params.cp_rank, "cp_size": params.cp_size}
    if params.is_context_parallel and params.partial_O is None:
        raise ValueError(f"{op}: partial_O must be given with context parallelism, got None; see "
                         "AttentionParams.with_partials")
    if params.partial_O is not None:
        options |= _partial_options(params)
    options["schedule"] = _schedule(params, linear, options.get("num_splits"))
    if params.is_context_parallel:
        attention(q, *keys, **options)
        return params.partial_O, params.partial_ML
    out = params.out
    if out is None:
        make = params.xp.empty if params.token_num == len(params.q) else params.xp.zeros
        out = make(params.q.shape, params.q.dtype)
    attention(q, *keys, **options, out=out[params.rows])
    if params.partial_O is not None:
        _reduce(params, out[params.rows])
    return out


def _schedule(params, linear, num_splits):
    """Who attends what: made from the step's lengths on the host for its first layer, and kept for the others.

    Leading blocks that sequences have in common are attended to once for all of them. The step keeps the pointers with
    the schedule: as long as it does, their id is nobody else's. The parameters keep what they used, say for a graph.
    """
    step, blocks = params.step, params.block_iter_params
    format = None if linear or params.block_layer.k.format in FLOATS else params.block_layer.k.format
    options = {"num_heads": params.num_heads, "num_kv_heads": params.num_kv_heads, "head_dim": params.size_per_head,
               "causal": params.causal, "window_size": params.window_size, "dtype": dtype_name(params.q),
               "kv_format": format, "num_splits": num_splits, "invariant": params.invariant,
               "one_list": params.invariant}
    if params.cp_offsets is None:
        options |= {"key_stride": params.cp_size, "key_offset": params.cp_rank}
    shared = None if linear or params.is_context_parallel or num_splits or not params.share_prefix else blocks
    pointers = shared and shared.pointers_host
    key = (*options.values(), id(pointers))
    if key in params.schedules:
        return params.schedules[key]
    if key not in step.schedules:
        if shared:
            options |= {"block_table": shared.host_table(), "page_size": shared.block_len}
        if params.cp_offsets is not None:
            options |= {"key_offsets": step.cp_offsets_host.astype(np.int32),
                        "key_counts": step.local_lens.astype(np.int32)}
        if len(step.schedules) == _SCHEDULES:
            del step.schedules[next(iter(step.schedules))]   # the oldest
        made = schedule(
            step.k_lens.astype(np.int32), cu_seqlens_q=np.append(0, np.cumsum(step.q_lens)).astype(np.int32),
            finished=step.finished_host, xp=params.xp, **options)
        step.schedules[key] = pointers, made
    params.schedules[key] = step.schedules[key][1]
    return params.schedules[key]


def _partial_options(params):
    """Where a call leaves the splits: M = lse / softmax_scale and L = 1, so that any merge of such triples is right."""
    splits = params.num_splits or _busy_splits(params)
    ml = params.partial_ML[:, :, :splits]
    return {"num_splits": splits, "partials": Partials(
        params.partial_O[:, :, :splits].transpose(2, 0, 1, 3), ml[..., 0].transpose(2, 0, 1),
        ml[..., 1].transpose(2, 0, 1), params.split_cnt, lse_factor=1.0 / params.softmax_scale,
        count_sinks=not params.is_context_parallel)}   # a rank's sinks are for the merge of all ranks


def _busy_splits(params):
    """As many splits as give every multiprocessor two units of work, but no more than key tiles or max_split_k.

    A CPU has none: 16 units whatever its number of cores, so that results do not depend on it.
    """
    wanted = 16 if params.xp is np else 2 * sm_count(params.xp)
    keys = int(params.step.local_lens.max(initial=0))
    keys = min(keys, params.window_size + params.max_q_len) if params.window_size else keys
    packed = params.max_q_len * params.num_heads // params.num_kv_heads
    units = params.batch_size * params.num_kv_heads * -(-packed // _UNIT_ROWS)
    return max(1, min(params.max_split_k, -(-keys // _TILE), wanted // max(units, 1)))


def _reduce(params, rows):
    ml = params.partial_ML
    split_reduce(params.partial_O.transpose(2, 0, 1, 3), ml[..., 0].transpose(2, 0, 1),
                 partial_sum=ml[..., 1].transpose(2, 0, 1), lse_scale=params.softmax_scale,
                 split_counts=params.split_cnt, out=rows)
