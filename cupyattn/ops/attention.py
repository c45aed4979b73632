# SPDX-License-Identifier: Apache-2.0
"""Attention over ragged sequences and caches. Kernels: ``cuda_src/attention.cu``, ``cuda_src/paged_decode.cu``."""

import numpy as np

from ..attn.args import (
    as_partials,
    check_options,
    check_partials,
    check_per_head,
    check_per_sequence,
    check_shards,
    mask_view,
)
from ..attn.attend import Call, attend, new_outputs, prepare_keys
from ..attn.plans import PREFILL_CORE, prefill_specs
from ..runtime import Prepared, env
from ..runtime.arrays import array_namespace, dtype_name
from ..runtime.checks import FLOATS, check_array, check_number
from .split_reduce import check_outputs, split_out

CORE, more_specs = PREFILL_CORE, prefill_specs
_AXES = "[tokens, num_heads, head_dim]"


def attention(q, k, v, /, *, cu_seqlens_q, cu_seqlens_k=None, cache_seqlens=None, block_table=None, cache_starts=None,
              causal=True, softmax_scale=None, window_size=0, softcap=0.0, sinks=None, mask=None, tree_mask=None,
              alibi_slopes=None, finished=None, cp_rank=0, cp_size=1, key_offsets=None, key_counts=None,
              max_q_len=None, num_splits=None, invariant=False, schedule=None, partials=None, workspace=None, out=None,
              return_lse=False):
    """Attention of ragged sequences: prefill, chunked prefill, decode, or a batch of all of them.

    Query i of sequence b, token cu_seqlens_q[b] + i of `q`, stands at position n = seqlen - q_len + i of its sequence
    (bottom-right alignment: what came before the queries is history). It sees the tokens t of the sequence with
    t ≥ cache_starts[b], with `causal` t ≤ n, and with a window n - window_size < t < n + window_size:

    out[i,h] = sum_t exp(s[t]) v[t,g] / (sum_t exp(s[t]) + exp(sinks[h])),   g = h // (num_heads // num_kv_heads)
    s[t] = softcap * tanh(softmax_scale * q[i,h] . k[t,g] / softcap) - alibi_slopes[h] * |n - t| + mask[b,h,i,t]

    Parameters
    ----------
    q : ndarray [tokens, num_heads, head_dim], float16, bfloat16 or float32
        Queries after RoPE. head_dim is a multiple of 8 up to 256.
    k, v : ndarray [tokens_k, num_kv_heads, head_dim / head_dim_v], or caches
        Ragged with `cu_seqlens_k`; with `block_table` caches [num_pages, page_size, num_kv_heads, head_dim /
        head_dim_v], `QuantizedKV` or `BlockKV`. The new tokens are in them already. Any strides with a contiguous last
        axis; the dtype may differ from q's; head_dim_v may differ from head_dim. num_kv_heads divides num_heads.
    cu_seqlens_q : ndarray [batch + 1], int32
        First query token of every sequence, and their number.
    cu_seqlens_k : ndarray [batch + 1], int32, optional
        First key of every sequence in ragged `k` and `v`. Several independent segments of one buffer (block-diagonal
        packing) are sequences like any others.
    cache_seqlens : ndarray [batch], int32, optional
        Tokens to attend to, the new ones included; goes with `block_table`.
    block_table : ndarray [batch, max_pages], int32, or PageTable, optional
        Pages of every sequence; a `PageTable` also holds CSR lists and block pointers.
    cache_starts : ndarray [batch], int32, optional
        First visible key of each sequence (left padding). Default 0.
    causal : bool
        Default True.
    softmax_scale : float, optional
        Default ``head_dim ** -0.5``.
    window_size : int
        Visible tokens, the query's own included; 0 (default) for all.
    softcap : float
        0 (default) is off.
    sinks : ndarray [num_heads], float32, optional
        One more logit per head that takes probability and adds no value.
    mask : ndarray broadcastable to [batch, num_heads, max_q_len, keys], optional
        bool, True for visible, or float32, float16 or bfloat16 added to the scores. Keys past its last column stay
        visible, and all keys to queries past its last row. Never expanded: repeated axes have stride 0.
    tree_mask : ndarray [tokens, words], uint32, optional
        Bit j of query i's words: its sequence's new token j is visible; tokens past the last bit are not. Decides
        among the new tokens in place of `causal`.
    alibi_slopes : ndarray [num_heads], float32, optional
    finished : ndarray [batch], bool, optional
        Sequences that give zeros and read nothing.
    cp_rank, cp_size : int
        Context parallel: `k` and `v` hold only the tokens t with t % cp_size == cp_rank, as local keys t // cp_size.
        Lengths, starts and masks speak of all tokens. Merge the ranks' results with `split_reduce`.
    key_offsets, key_counts : ndarray [batch], int32, optional
        Context parallel over contiguous shards: position of the first local key, and the number of local keys.
    max_q_len : int, optional
        Upper bound of the query tokens of a sequence: for CuPy arrays, where no length is read; default all tokens.
        The results of tokens beyond it may stay unwritten.
    num_splits : int, optional
        Cut the keys of every query tile in so many parts of equal size. Default: by the planner, evenly over the GPU.
    invariant : bool
        Cut keys only at multiples of 1024: the bits of a row depend neither on the batch around it, nor on how its
        sequence is cut into chunks of prefill, nor on the number of multiprocessors.
    schedule : Schedule, optional
        From `cupyattn.schedule`, made once per step for all layers, with the very lengths and options of this call;
        `mask` and `alibi_slopes` have no say in it, so that calls with and without them share one. Default: the op
        makes its own. What a schedule of other lengths leaves out stays unwritten; where lengths are read, with NumPy
        arrays or ``CUPYATTN_CHECK=1``, one made from lengths in host memory is refused.
    partials : (ndarray [num_splits, tokens, num_heads, head_dim_v], ndarray [num_splits, tokens, num_heads]), optional
        float32. Receive the normalised result and lse of every split, without sinks, in place of `out`; for
        `split_reduce`. Needs `num_splits`.
    workspace : ndarray [nbytes], uint8, optional
        Scratch for partial results, at a multiple of 16. Default: the one this stream's ops share.
    out : ndarray [tokens, num_heads, head_dim_v], or with ``return_lse=True`` the pair ``(out, lse)``, optional
        Where to write; may be `q`.
    return_lse : bool
        Also return the log-sum-exp of the scores.

    Returns
    -------
    out : ndarray [tokens, num_heads, head_dim_v], dtype of q
        Or `partials`, when given.
    lse : ndarray [tokens, num_heads], float32, natural log
        Only with ``return_lse=True``. Of the keys alone, never the sink; ``-inf`` for a row that sees no key, whose
        out is zeros.

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, an unsupported dtype, or an option of the wrong kind.
    ValueError
        Shapes or strides that do not fit, options out of range or that exclude each other, a schedule made for
        something else. For NumPy arrays also offsets that decrease and page ids or lengths out of range; for CuPy
        arrays only with ``CUPYATTN_CHECK=1``, else such tokens are invisible.

    Notes
    -----
    Sequences of few query rows go through the decode kernel, the others through the prefill kernel: a mixed batch is
    one call and two launches, since a tile that suits prefill would slow decode. With ``invariant=True`` all of them
    go through the prefill kernel. Scores, softmax and sums are float32; tensor cores round probabilities to q's dtype.
    Slots without a token never matter, whatever they hold. An infinity or NaN in the value of a token does reach rows
    that do not see it (0 * inf) when another row of their tile does, and with `mask` even when none does: leave
    padding out by lengths, `cache_starts` or `finished`. Asynchronous on the current CuPy stream; graphs whose replays
    may overlap need a `schedule` and a `workspace` each.
    Kernels: ``cuda_src/attention.cu``, ``cuda_src/paged_decode.cu``, ``cuda_src/schedule.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> k = np.zeros((3, 1, 8), np.float32)
    >>> v = np.float32([1, 3, 8]).reshape(3, 1, 1).repeat(8, 2)
    >>> starts = np.int32([0, 2, 3])                                # two sequences, of 2 tokens and of 1
    >>> cupyattn.attention(k, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts)[:, 0, 0]
    array([1., 2., 8.], dtype=float32)
    """
    op = "attention"
    out, lse = split_out(op, out, return_lse)
    partials = as_partials(op, partials)
    q_lens = _query_lengths(op, q, cu_seqlens_q)
    if max_q_len is None:
        max_q_len = q.shape[0] if q_lens is None else int(q_lens.max(initial=0))
    else:
        check_number(op, "max_q_len", max_q_len, least=0, integer=True)
        if q_lens is not None and q_lens.max(initial=0) > max_q_len:
            raise ValueError(f"{op}: max_q_len must be at least the {q_lens.max()} query tokens of a sequence, got "
                             f"{max_q_len}")
    out, lse = new_outputs(op, q, v, out, lse, partials, return_lse)
    call, *where = _prepared(
        (q, k, v, cu_seqlens_q, cu_seqlens_k, cache_seqlens, block_table, cache_starts, sinks, mask, tree_mask,
         alibi_slopes, finished, key_offsets, key_counts, workspace, out, lse, partials),
        causal, softmax_scale, window_size, softcap, cp_rank, cp_size, max_q_len, num_splits, invariant)
    attend(op, call, *where, cache_seqlens=cache_seqlens, block_table=block_table, cu_seqlens_k=cu_seqlens_k,
           cu_seqlens_q=cu_seqlens_q, q_lens=q_lens, cache_starts=cache_starts, finished=finished,
           key_offsets=key_offsets, key_counts=key_counts, schedule=schedule, scratch=workspace)
    result = out if partials is None else (partials.out, partials.lse)
    return (result, lse) if return_lse else result


@Prepared
def _prepared_queries(q, cu_seqlens_q):
    """True: the queries, and what says which are whose, fit."""
    op = "attention"
    array_namespace(op, q=q, cu_seqlens_q=cu_seqlens_q)
    check_array(op, "q", q, FLOATS, (None, None, None), _AXES)
    check_array(op, "cu_seqlens_q", cu_seqlens_q, "int32", (None,), "[batch + 1]")
    if len(cu_seqlens_q) == 0:
        raise ValueError(f"{op}: cu_seqlens_q must be [batch + 1], got []")
    return True


@Prepared
def _prepared(q, k, v, cu_seqlens_q, cu_seqlens_k, cache_seqlens, block_table, cache_starts, sinks, mask, tree_mask,
              alibi_slopes, finished, key_offsets, key_counts, workspace, out, lse, partials, causal, softmax_scale,
              window_size, softcap, cp_rank, cp_size, max_q_len, num_splits, invariant):
    """The Call for arrays of these kinds; q and cu_seqlens_q are checked."""
    op = "attention"
    xp = array_namespace(op, q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, cache_seqlens=cache_seqlens,
                         cache_starts=cache_starts, sinks=sinks, mask=mask, tree_mask=tree_mask,
                         alibi_slopes=alibi_slopes, finished=finished, key_offsets=key_offsets, key_counts=key_counts,
                         workspace=workspace, out=out, lse=lse)
    tokens, num_heads, head_dim = q.shape
    batch = len(cu_seqlens_q) - 1
    if (cu_seqlens_k is None) == (cache_seqlens is None) or (cache_seqlens is None) != (block_table is None):
        given = [name for name, array in (("cu_seqlens_k", cu_seqlens_k), ("cache_seqlens", cache_seqlens),
                                          ("block_table", block_table)) if array is not None]
        raise ValueError(f"{op}: keys must be given by cu_seqlens_k, or by block_table and cache_seqlens, got "
                         f"{' and '.join(given) or 'neither'}")
    keys = prepare_keys(op, xp, num_heads, head_dim, k, v, block_table, cu_seqlens_k, batch, ("k", "v"))
    softmax_scale = check_options(op, causal, softmax_scale, window_size, softcap, head_dim)
    check_per_sequence(op, batch, contiguous=False, cache_seqlens=cache_seqlens, cache_starts=cache_starts)
    check_per_sequence(op, batch, key_offsets=key_offsets, key_counts=key_counts)
    check_per_sequence(op, batch, dtype="bool", finished=finished)
    check_per_head(op, num_heads, sinks=sinks, alibi_slopes=alibi_slopes)
    check_number(op, "cp_size", cp_size, least=1, integer=True)
    check_number(op, "cp_rank", cp_rank, least=0, integer=True)
    if cp_rank >= cp_size:
        raise ValueError(f"{op}: cp_rank must be below cp_size {cp_size}, got {cp_rank}")
    check_shards(op, key_offsets, key_counts, cp_size, "cp_size")
    _check_tree_mask(op, tree_mask, tokens, max_q_len)
    shape = (tokens, num_heads, keys.v.shape[3])
    if partials is not None:
        check_partials(op, partials, num_splits, tokens, num_heads, shape[2])
    if out is not None:
        check_outputs(op, out, lse, shape, "[tokens, num_heads, head_dim_v]", (dtype_name(q),))
    return Call(
        op, xp, q, keys, cu_seqlens_q=cu_seqlens_q, max_q_len=max_q_len, cache_seqlens=cache_seqlens,
        cache_starts=cache_starts, finished=finished, key_stride=cp_size, key_offset=cp_rank, key_offsets=key_offsets,
        key_counts=key_counts, causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap,
        sinks=sinks, mask=mask_view(op, mask, batch, num_heads, max_q_len), tree_mask=tree_mask,
        alibi_slopes=alibi_slopes, num_splits=num_splits, invariant=invariant, one_list=invariant, partials=partials,
        out=out, lse=lse)


def _query_lengths(op, q, cu_seqlens_q):
    """Query tokens of each sequence where they may be read, else None; q and cu_seqlens_q fit."""
    _prepared_queries((q, cu_seqlens_q))
    on_host = isinstance(q, np.ndarray)
    if not on_host and not env.check():
        return None
    starts = np.asarray(cu_seqlens_q if on_host else cu_seqlens_q.get(), np.int64)
    tokens, lengths = len(q), np.diff(starts)
    if starts[0] < 0 or starts[-1] > tokens or lengths.min(initial=0) < 0:
        raise ValueError(f"{op}: cu_seqlens_q must not decrease and be within 0 and the {tokens} tokens of q, got "
                         f"{starts.tolist() if len(starts) < 20 else f'{starts[0]} to {starts[-1]}'}")
    return lengths


def _check_tree_mask(op, tree_mask, tokens, max_q_len):
    """tree_mask, if any, has a bit for each new token of a sequence."""
    if tree_mask is None:
        return
    check_array(op, "tree_mask", tree_mask, "uint32", (tokens, None), "[tokens, words]")
    if 32 * tree_mask.shape[1] < max_q_len:
        raise ValueError(f"{op}: tree_mask must have a bit for each of the {max_q_len} new tokens of a sequence, got "
                         f"{tree_mask.shape[1]} words; with CuPy arrays say max_q_len")
