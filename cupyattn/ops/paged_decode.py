# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens over a paged cache. Kernel: ``cuda_src/paged_decode.cu``."""

from ..attn.args import as_partials, check_options, check_partials, check_per_head, check_per_sequence
from ..attn.attend import Call, attend, new_outputs, prepare_keys
from ..attn.plans import DECODE_CORE, decode_specs
from ..runtime import Prepared
from ..runtime.arrays import array_namespace
from ..runtime.checks import FLOATS, check_array, check_dtype
from .split_reduce import check_outputs, split_out

CORE, more_specs = DECODE_CORE, decode_specs
MAX_Q_LEN = 8
_AXES = {3: "[batch, num_heads, head_dim]", 4: "[batch, q_len, num_heads, head_dim]"}


def paged_decode(q, k_cache, v_cache, /, *, block_table, cache_seqlens, cache_starts=None, softmax_scale=None,
                 window_size=0, softcap=0.0, sinks=None, num_splits=None, invariant=False, schedule=None, partials=None,
                 workspace=None, out=None, return_lse=False):
    """Attention of the newest tokens of each sequence over its paged cache.

    Query i of sequence b stands at token n = cache_seqlens[b] - q_len + i and sees the tokens t with
    max(cache_starts[b], n - window_size + 1) <= t <= n:

    out[b,i,h] = sum_t exp(s[t]) v[t,g] / (sum_t exp(s[t]) + exp(sinks[h])),   s[t] = softmax_scale * q[b,i,h] . k[t,g]

    with g = h // (num_heads // num_kv_heads) and, with softcap, s[t] = softcap * tanh(s[t] / softcap).

    Parameters
    ----------
    q : ndarray [batch, num_heads, head_dim] or [batch, q_len, num_heads, head_dim], float16, bfloat16 or float32
        Queries after RoPE; q_len from 1 to 8, the first form means 1. head_dim is a multiple of 8 up to 256.
    k_cache, v_cache : ndarray [num_pages, page_size, num_kv_heads, head_dim / head_dim_v], QuantizedKV or BlockKV
        The new tokens are in it already. Arrays are float16, bfloat16 or float32, of any strides with a contiguous
        last axis: a head-major pool is passed as its transposed view. Their dtype may differ from q's; quantized
        formats of K and V may differ. num_kv_heads divides num_heads, head_dim_v is a multiple of 8 up to 256.
    block_table : ndarray [batch, max_pages], int32, or PageTable
        Page of token t of sequence b is ``block_table[b, t // page_size]``. Entries of pages without a visible
        token are not read. A `PageTable` also holds CSR lists and block pointers.
    cache_seqlens : ndarray [batch], int32
        Tokens to attend to, the new ones included. 0 gives zeros and lse = -inf.
    cache_starts : ndarray [batch], int32, optional
        First visible key of each sequence. Default 0.
    softmax_scale : float, optional
        Default ``head_dim ** -0.5``.
    window_size : int
        Visible tokens, the query's own included; 0 (default) for all.
    softcap : float
        0 (default) is off.
    sinks : ndarray [num_heads], float32, optional
        One more logit per head that takes probability and adds no value.
    num_splits : int, optional
        Cut the keys of every query tile in so many parts of equal size. Default: by the planner, evenly over the GPU.
    invariant : bool
        Cut keys only at multiples of 1024: the bits of a sequence depend neither on the batch around it nor on the
        number of multiprocessors.
    schedule : Schedule, optional
        From `cupyattn.schedule`, made once per step for all layers, with the very lengths and options of this call.
        Default: the op makes its own. What a schedule of other lengths leaves out stays unwritten; where lengths are
        read, with NumPy arrays or ``CUPYATTN_CHECK=1``, one made from lengths in host memory is refused.
    partials : (ndarray [num_splits, tokens, num_heads, head_dim_v], ndarray [num_splits, tokens, num_heads]), optional
        float32, tokens = batch * q_len. Receive the normalised result and lse of every split, without sinks, in place
        of `out`; for `split_reduce`. Needs `num_splits`.
    workspace : ndarray [nbytes], uint8, optional
        Scratch for partial results, at a multiple of 16. Default: the one this stream's ops share.
    out : ndarray like q, or with ``return_lse=True`` the pair ``(out, lse)``, optional
        Where to write. `out` must be `q` itself or overlap no input, `lse` overlaps no other array.
    return_lse : bool
        Also return the log-sum-exp of the scores.

    Returns
    -------
    out : ndarray, shape of q with head_dim_v, dtype of q
        Or `partials`, when given.
    lse : ndarray [batch, num_heads] or [batch, q_len, num_heads], float32, natural log
        Only with ``return_lse=True``. Of the keys alone, never the sink; ``-inf`` for a row that sees no key, whose
        out is zeros.

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, an unsupported dtype, or an option of the wrong kind.
    ValueError
        Shapes or strides that do not fit, an option that is not finite, a window_size or softcap below 0. For NumPy
        arrays also page ids or lengths out of range; for CuPy arrays only with ``CUPYATTN_CHECK=1``, else such tokens
        are invisible.

    Notes
    -----
    No length is read on the host: for CuPy arrays without `schedule`, a kernel makes the work list first. A block of
    the grid gets an equal share of all key tiles; a tile of query rows that falls to several blocks is merged by the
    last of them, in a fixed order. With q_len > 1, an infinity or NaN in the value of a token that only later queries
    see reaches the earlier ones as well (0 * inf); unused slots never do. Asynchronous on the current CuPy stream;
    graphs whose replays may overlap need a `schedule` and a `workspace` each.
    Kernels: ``cuda_src/paged_decode.cu``, ``cuda_src/schedule.cu``; with more than 16 query rows per sequence and KV
    head (8 on CUDA cores) ``cuda_src/attention.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> cache = np.zeros((3, 16, 1, 8), np.float16)
    >>> cache[2, :2] = np.float16([1, 3]).reshape(2, 1, 1)     # two tokens, in page 2
    >>> q = np.zeros((1, 1, 8), np.float16)
    >>> cupyattn.paged_decode(q, cache, cache, block_table=np.int32([[2]]), cache_seqlens=np.int32([2]))[0, 0, 0]
    np.float16(2.0)
    """
    op = "paged_decode"
    out, lse = split_out(op, out, return_lse)
    partials = as_partials(op, partials)
    out, lse = new_outputs(op, q, v_cache, out, lse, partials, return_lse)
    call, *where = _prepared(
        (q, k_cache, v_cache, block_table, cache_seqlens, cache_starts, sinks, workspace, out, lse,
         partials), softmax_scale, window_size, softcap, num_splits, invariant)
    attend(op, call, *where, cache_seqlens=cache_seqlens, block_table=block_table, cache_starts=cache_starts,
           schedule=schedule, scratch=workspace)
    result = out if partials is None else (partials.out, partials.lse)
    return (result, lse) if return_lse else result


@Prepared
def _prepared(q, k_cache, v_cache, block_table, cache_seqlens, cache_starts, sinks, workspace, out, lse, partials,
              softmax_scale, window_size, softcap, num_splits, invariant):
    """The Call for arrays of these kinds."""
    op = "paged_decode"
    xp = array_namespace(op, q=q, cache_seqlens=cache_seqlens, cache_starts=cache_starts, sinks=sinks,
                         workspace=workspace, out=out, lse=lse)
    dtype = check_dtype(op, "q", q, FLOATS)
    if q.ndim not in _AXES or (q.ndim == 4 and not 1 <= q.shape[1] <= MAX_Q_LEN):
        raise ValueError(f"{op}: q must be {_AXES[3]} or {_AXES[4]} with q_len from 1 to {MAX_Q_LEN}, got "
                         f"{list(q.shape)}")
    check_array(op, "q", q, dtype, q.shape, _AXES[q.ndim])
    queries = q if q.ndim == 4 else q.with_axis(1)
    batch, q_len, num_heads, head_dim = queries.shape
    keys = prepare_keys(op, xp, num_heads, head_dim, k_cache, v_cache, block_table, None, batch,
                        ("k_cache", "v_cache"))
    check_dtype(op, "cache_seqlens", cache_seqlens, "int32")   # which must be given
    check_per_sequence(op, batch, contiguous=False, cache_seqlens=cache_seqlens, cache_starts=cache_starts)
    check_per_head(op, num_heads, sinks=sinks)
    softmax_scale = check_options(op, True, softmax_scale, window_size, softcap, head_dim)
    shape = (*q.shape[:-1], keys.v.shape[3])
    if partials is not None:
        check_partials(op, partials, num_splits, batch * q_len, num_heads, shape[-1])
    if out is not None:
        check_outputs(op, out, lse, shape, _AXES[q.ndim], dtype)
    return Call(
        op, xp, queries, keys, cache_seqlens=cache_seqlens, cache_starts=cache_starts, max_q_len=q_len,
        softmax_scale=softmax_scale, window_size=window_size, softcap=softcap, sinks=sinks, num_splits=num_splits,
        invariant=invariant, one_list=False, partials=partials,
        out=out if out is None or out.ndim == 4 else out.with_axis(1), lse=lse)
