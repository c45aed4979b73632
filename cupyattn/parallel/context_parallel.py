# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: which rank holds which tokens of a sequence, and the merging of the ranks' partial results."""

import numpy as np

from ..ops.split_reduce import MAX_PARTS, split_out, split_reduce
from ..runtime.arrays import array_namespace
from ..runtime.checks import check_number
from ..turbomind.attention_params import check_params
from .communicators import Communicator
from .rank_lists import check_list


def _check_ranks(op, cp_size, cp_rank=0):
    check_number(op, "cp_size", cp_size, least=1, integer=True)
    check_number(op, "cp_rank", cp_rank, least=0, integer=True)
    if cp_rank >= cp_size:
        raise ValueError(f"{op}: cp_rank must be below cp_size {cp_size}, got {cp_rank}")


def _lengths(op, lengths):
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 0).any():
        raise ValueError(f"{op}: lengths must be integers ≥ 0 [batch], got {lengths.dtype} {lengths.tolist()}")
    return lengths.astype(np.int64)


def round_robin(lengths, cp_rank, cp_size):
    """Tokens a rank holds when they are dealt out in turn: token t belongs to rank ``t % cp_size``.

    Parameters
    ----------
    lengths : int array [batch]
        Tokens of every sequence, on the host.
    cp_rank, cp_size : int

    Returns
    -------
    local_lengths : ndarray [batch], int32
        Tokens this rank holds; token t is its local token ``t // cp_size``.
    rows : ndarray [sum(local_lengths)], int64
        Their rows in an array of all tokens, sequence after sequence.

    Examples
    --------
    >>> import cupyattn
    >>> cupyattn.round_robin([9], 1, 2)
    (array([4], dtype=int32), array([1, 3, 5, 7]))
    """
    _check_ranks("round_robin", cp_size, cp_rank)
    lengths = _lengths("round_robin", lengths)
    starts = np.cumsum(lengths) - lengths
    rows = [np.arange(cp_rank, n, cp_size) + start for n, start in zip(lengths, starts, strict=True)]
    local = lengths // cp_size + (lengths % cp_size > cp_rank)
    return local.astype(np.int32), np.concatenate([np.zeros(0, np.int64), *rows])


def contiguous_shards(lengths, cp_size):
    """Cut every sequence into `cp_size` runs of tokens, all but the last ones of the same length.

    Parameters
    ----------
    lengths : int array [batch]
        Tokens of every sequence, on the host.
    cp_size : int

    Returns
    -------
    offsets, counts : ndarray [cp_size, batch], int32
        First token of each rank's run, and its tokens: ``cp_offsets`` and ``cp_counts`` of AttentionParams, as
        ``key_offsets`` and ``key_counts`` of ``attention``.

    Examples
    --------
    >>> import cupyattn
    >>> cupyattn.contiguous_shards([9, 1], 2)
    (array([[0, 0],
           [5, 1]], dtype=int32), array([[5, 1],
           [4, 0]], dtype=int32))
    """
    _check_ranks("contiguous_shards", cp_size)
    lengths = _lengths("contiguous_shards", lengths)
    run = -(-lengths // cp_size)
    offsets = np.minimum(np.arange(cp_size)[:, None] * run, lengths)
    counts = np.minimum(run, lengths - offsets)
    return offsets.astype(np.int32), counts.astype(np.int32)


def rank_result(params, /, *, out=None):
    """Attention over the tokens of one rank, from the splits it left: what ranks send each other.

    Parameters
    ----------
    params : AttentionParams
        With partial results in `split_cnt`, `partial_O` and `partial_ML`.
    out : pair of ndarray, optional
        Where to write, as returned. Default: new arrays.

    Returns
    -------
    out : ndarray [token_num, num_heads, size_per_head], float32
        Normalised, without sinks; zeros where the rank holds no visible key.
    lse : ndarray [token_num, num_heads], float32, natural log
        ``-inf`` there.
    """
    check_params("rank_result", params)
    if params.partial_O is None:
        raise ValueError("rank_result: partial_O must be given, got None; see AttentionParams.with_partials")
    ml = params.partial_ML
    if out is None:
        shape = params.token_num, params.num_heads, params.size_per_head
        out = params.xp.empty(shape, np.float32), params.xp.empty(shape[:2], np.float32)
    return split_reduce(params.partial_O.transpose(2, 0, 1, 3), ml[..., 0].transpose(2, 0, 1),
                        partial_sum=ml[..., 1].transpose(2, 0, 1), lse_scale=params.softmax_scale,
                        split_counts=params.split_cnt, return_lse=True, out=out)


def merge_shards(shards, /, *, communicator=None, out=None, return_lse=False):
    """Attention over all tokens from the partial results that `invoke_decoding` or `invoke_attention` left per rank.

    Parameters
    ----------
    shards : list of AttentionParams
        One per rank, of the same queries, with partial results in arrays of one device. The sinks of the first count,
        once. A rank without any visible key is fine.
    communicator : Communicator, optional
        Where the ranks are: `shards` are those of this process, one for each of ``communicator.ranks``, and every
        process gets the result. One exchange of ``4 * (size_per_head + 1)`` bytes per rank, token and head. Default:
        all are here.
    out : ndarray [tokens, num_heads, size_per_head], or with ``return_lse=True`` the pair ``(out, lse)``, optional
        Where to write. Default: ``shards[0].out`` or a new array; rows of no sequence stay as they are.
    return_lse : bool
        Also return the log-sum-exp of the scores.

    Returns
    -------
    out : ndarray [tokens, num_heads, size_per_head], dtype of q
    lse : ndarray [token_num, num_heads], float32, natural log
        Only with ``return_lse=True``. Of the keys alone, never the sink.

    Raises
    ------
    TypeError, ValueError
        Shards that do not belong together, or hold no partial results.

    Notes
    -----
    Every rank's splits are merged first, then the ranks. Kernel: ``cuda_src/split_reduce.cu``.
    """
    op = "merge_shards"
    if not isinstance(shards, (list, tuple)) or not shards:
        raise TypeError(f"{op}: shards must be a list of AttentionParams, got {type(shards).__name__}")
    first = shards[0]
    for i, shard in enumerate(shards):
        check_params(op, shard, f"shards[{i}]")
        for name in ("token_num", "num_heads", "size_per_head", "softmax_scale", "rows"):
            if getattr(shard, name) != getattr(first, name):
                raise ValueError(f"{op}: shards[{i}] must have the {name} of the first, {getattr(first, name)}, got "
                                 f"{getattr(shard, name)}")
    out, lse = split_out(op, out, return_lse)
    xp = array_namespace(op, q=first.q, out=out, lse=lse)
    if out is None:
        make = xp.empty if first.token_num == len(first.q) else xp.zeros
        out = make(first.q.shape, first.q.dtype) if first.out is None else first.out
    if return_lse and lse is None:
        lse = xp.empty((first.token_num, first.num_heads), np.float32)
    parts = [rank_result(shard) for shard in shards] if communicator is None else _exchanged(shards, communicator)
    while len(parts) > MAX_PARTS:
        groups = [parts[i:i + MAX_PARTS] for i in range(0, len(parts), MAX_PARTS)]
        parts = [split_reduce(*map(list, zip(*group, strict=True)), return_lse=True) for group in groups]
    rows = out[first.rows]
    split_reduce(*map(list, zip(*parts, strict=True)), sinks=first.sinks, out=(rows, lse) if return_lse else rows,
                 return_lse=return_lse)
    return (out, lse) if return_lse else out


def _exchanged(shards, communicator):
    """`rank_result` of all ranks, from the shards of this process; one message each."""
    if not isinstance(communicator, Communicator):
        raise TypeError(f"merge_shards: communicator must be a Communicator, got {type(communicator).__name__}")
    check_list("merge_shards", "shards", shards, communicator.ranks)
    first = shards[0]
    shape = first.token_num, first.num_heads, first.size_per_head
    cut = shape[0] * shape[1] * shape[2]

    def views(message):
        return message[:cut].reshape(shape), message[cut:cut + shape[0] * shape[1]].reshape(shape[:2])

    length = -(-(cut + shape[0] * shape[1]) // 4) * 4   # every rank's begins at a multiple of 16 bytes
    messages = [first.xp.empty((1, length), np.float32) for _ in shards]
    for shard, message in zip(shards, messages, strict=True):
        rank_result(shard, out=views(message[0]))
    return [views(message) for message in communicator.all_gather(messages)[0]]
