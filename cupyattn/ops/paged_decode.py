# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens over a paged cache. Kernels: ``cuda_src/paged_decode.cu``, ``cuda_src/split_reduce.cu``."""

import functools

import numpy as np

from ..runtime import Plan, Specialisation, arch_of, env, launch, make_args, workspace
from ..runtime.arrays import address, alignment, array_namespace, kv_view, page_table, strides
from ..runtime.checks import FLOATS, check_dtype, check_element_strides, check_last_axis, check_number, check_shape
from .split_reduce import check_outputs, check_sinks, launch_split_reduce, split_out

CHUNK = 1024   # tokens of a partial result; CHUNK in the kernel
MAX_Q_LEN = 8
MAX_HEAD_DIM = 256
_ROWS = (1, 2, 4, 8)   # query rows of a block on CUDA cores
_MMA_HEAD_DIMS = (64, 128, 256)   # what tensor cores pad head_dim to
_TILE, _STEP = 32, 8   # of the kernel
_AXES = {3: "[batch, num_heads, head_dim]", 4: "[batch, q_len, num_heads, head_dim]"}
_CACHE_AXES = "[num_pages, page_size, num_kv_heads, head_dim]"


def _spec(q, kv, rows, aligned):
    return Specialisation("paged_decode", "paged_decode", "PagedDecodeArgs",
                          {"T": q, "KV": kv, "ROWS": rows, "ALIGNED": int(aligned), "TENSOR_CORES": 0,
                           "HEAD_DIM": 0})


def _spec_mma(dtype, head_dim):
    return Specialisation("paged_decode", "paged_decode_mma", "PagedDecodeArgs",
                          {"T": dtype, "KV": dtype, "ROWS": 16, "ALIGNED": 1, "TENSOR_CORES": 1,
                           "HEAD_DIM": head_dim}, min_sm=80, expects=("HMMA", "LDSM", "LDGSTS"))


_MMA = [_spec_mma(dtype, head_dim) for dtype in ("float16", "bfloat16") for head_dim in _MMA_HEAD_DIMS]
CORE = _MMA + [_spec(*case) for case in (
    ("float16", "float16", 4, True), ("bfloat16", "bfloat16", 4, True), ("float32", "float32", 4, True),
    ("float16", "bfloat16", 1, False), ("bfloat16", "float32", 1, True), ("float32", "float16", 1, True),
    ("float16", "float32", 2, True), ("bfloat16", "float16", 2, False), ("float32", "bfloat16", 2, True),
    ("float16", "float16", 8, True), ("bfloat16", "bfloat16", 8, True), ("float32", "float32", 8, False),
)]
ALL = _MMA + [_spec(q, kv, rows, aligned) for q in FLOATS for kv in FLOATS for rows in _ROWS
              for aligned in (True, False)]


def _shared_bytes(rows, head_dim, item, warps):
    """Dynamic shared memory of the CUDA-core kernel: struct Layout of the kernel."""
    groups = 32 // (head_dim // _STEP)
    key = (head_dim * item // 16 | 1) * 16
    warp = max(_TILE * key, groups * rows * head_dim * 4) + 4 * _TILE * 8 + _TILE * rows * 4 + 2 * rows * 4
    return warps * warp + rows * head_dim * 4 + rows * 2 * 4


def _version(q, kv, align, arch):
    """("mma" or "cores", why): the version of the kernel for these dtypes, this alignment and arch."""
    if arch == "cpu":
        return "cores", "CUDA cores: an mma costs the executor more than it saves"
    if q != kv or q == "float32":
        return "cores", f"CUDA cores: q {q}, caches {kv}"
    if align < 16:
        return "cores", f"CUDA cores: alignment {align}"
    if int(arch[3:].rstrip("af")) < 80:
        return "cores", f"CUDA cores: {arch} has no cp.async"
    return "mma", "tensor cores"


@functools.lru_cache(maxsize=4096)
def _plan_paged_decode(batch, q_len, num_heads, num_kv_heads, head_dim, capacity, q, kv, align, arch, version):
    """Plan from sizes, the tokens a table row can hold, dtype names, the common alignment of k, v and out, arch."""
    name, note = version
    packed = q_len * (num_heads // num_kv_heads)
    if name == "mma":
        rows, padded = 16, next(d for d in _MMA_HEAD_DIMS if d >= head_dim)
        warps, stages, queries = {64: (4, 4, 0), 128: (4, 3, 0), 256: (2, 2, rows * padded * 2)}[padded]
        spec = _spec_mma(q, padded)
        shared = warps * (stages * 2 * 16 * padded * 2 + 2 * 2 * 16 * 8 + 2 * rows * 4) + queries
    else:
        rows = next((r for r in _ROWS if r >= packed), _ROWS[-1])
        item = 4 if kv == "float32" else 2
        # On a GPU the staged keys of a block stay below 48 KiB; on the CPU an idle warp costs 32 fibers.
        warps = 1 if arch == "cpu" else max(1, min(4, 1024 // (head_dim * item)))
        spec = _spec(q, kv, rows, align == 16)
        shared = _shared_bytes(rows, head_dim, item, warps)
    num_chunks = max(1, -(-capacity // CHUNK))
    note += f"; {packed} query rows in tiles of {rows}, {num_chunks} chunks"
    if align < 16:
        note += f", one element per load: alignment {align}"
    partials = num_chunks * batch * q_len * num_heads * (head_dim + 1) * 4 if num_chunks > 1 else 0
    return Plan(spec, arch, (batch * num_kv_heads * -(-packed // rows), num_chunks), (32 * warps,),
                shared_bytes=shared, workspace_bytes=partials, note=note)


def paged_decode(q, k_cache, v_cache, /, *, block_table, cache_seqlens, cache_starts=None, softmax_scale=None,
                 window_size=0, softcap=0.0, sinks=None, workspace=None, out=None, return_lse=False):
    """Attention of the newest tokens of each sequence over its paged cache.

    Query i of sequence b stands at token n = cache_seqlens[b] - q_len + i and sees the tokens t with
    max(cache_starts[b], n - window_size + 1) <= t <= n:

    out[b,i,h] = sum_t exp(s[t]) v[t,g] / (sum_t exp(s[t]) + exp(sinks[h])),   s[t] = softmax_scale * q[b,i,h] . k[t,g]

    with g = h // (num_heads // num_kv_heads) and, with softcap, s[t] = softcap * tanh(s[t] / softcap).

    Parameters
    ----------
    q : ndarray [batch, num_heads, head_dim] or [batch, q_len, num_heads, head_dim], float16, bfloat16 or float32
        Queries after RoPE; q_len from 1 to 8, the first form means 1. head_dim is a multiple of 8 up to 256.
    k_cache, v_cache : ndarray [num_pages, page_size, num_kv_heads, head_dim], float16, bfloat16 or float32
        The new tokens are in it already. Any strides with a contiguous last axis: a head-major pool is passed as
        its transposed view. The dtype may differ from q's. num_kv_heads divides num_heads.
    block_table : ndarray [batch, max_pages], int32
        Page of token t of sequence b is ``block_table[b, t // page_size]``. Entries of pages without a visible
        token are not read.
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
    workspace : ndarray [nbytes], uint8, optional
        Scratch for the partial results of a page table that holds more than 1024 tokens: 4 * (head_dim + 1) bytes
        per query row and chunk, at a multiple of 16. Default: the one this stream's ops share.
    out : ndarray like q, or with ``return_lse=True`` the pair ``(out, lse)``, optional
        Where to write. `out` must be `q` itself or overlap no input, `lse` overlaps no other array.
    return_lse : bool
        Also return the log-sum-exp of the scores.

    Returns
    -------
    out : ndarray, shape and dtype of q
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
    Keys are summed in chunks of 1024 tokens from each sequence's start, merged in order: the bits of a sequence do
    not depend on the batch around it, on the width of the page table or on the number of multiprocessors, and no
    length is read on the host. With q_len > 1, an infinity or NaN in the value of a token that only later queries see
    reaches the earlier ones as well (0 * inf); unused slots never do. Asynchronous on the current CuPy stream.
    Kernels: ``cuda_src/paged_decode.cu``, ``cuda_src/split_reduce.cu``.

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
    xp = array_namespace(op, q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table,
                         cache_seqlens=cache_seqlens, cache_starts=cache_starts, sinks=sinks,
                         workspace=workspace, out=out, lse=lse)
    _check_arrays(op, q, k_cache, v_cache)
    queries = q if q.ndim == 4 else q[:, None]
    batch, q_len, num_heads, head_dim = queries.shape
    _check_table(op, block_table, cache_seqlens, cache_starts, batch)
    check_sinks(op, sinks, num_heads)
    check_number(op, "window_size", window_size, least=0, integer=True)
    check_number(op, "softcap", softcap, least=0)
    if softmax_scale is None:
        softmax_scale = head_dim ** -0.5
    else:
        check_number(op, "softmax_scale", softmax_scale)
    if out is None:
        out = xp.empty(q.shape, q.dtype)
    if return_lse and lse is None:
        lse = xp.empty(q.shape[:-1], np.float32)
    check_outputs(op, out, lse, q.shape, _AXES[q.ndim], (q.dtype.name,))
    if xp is np or env.check():
        _check_content(op, block_table, cache_seqlens, cache_starts, k_cache, q_len, window_size)
    if out.size:
        _launch(xp, queries, k_cache, v_cache, block_table, cache_seqlens, cache_starts,
                softmax_scale, window_size, softcap, sinks, out if out.ndim == 4 else out[:, None], lse, workspace)
    return (out, lse) if return_lse else out


def _check_arrays(op, q, k_cache, v_cache):
    """q and the caches fit each other."""
    for name, array in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_dtype(op, name, array, FLOATS)
    if q.ndim not in _AXES or (q.ndim == 4 and not 1 <= q.shape[1] <= MAX_Q_LEN):
        raise ValueError(f"{op}: q must be {_AXES[3]} or {_AXES[4]} with q_len from 1 to {MAX_Q_LEN}, got "
                         f"{list(q.shape)}")
    num_heads, head_dim = q.shape[-2:]
    if not 0 < head_dim <= MAX_HEAD_DIM or head_dim % _STEP:
        raise ValueError(f"{op}: q must have a head_dim that is a multiple of {_STEP} up to {MAX_HEAD_DIM}, got "
                         f"{head_dim}")
    check_shape(op, "k_cache", k_cache, (None, None, None, head_dim), _CACHE_AXES)
    check_shape(op, "v_cache", v_cache, k_cache.shape, _CACHE_AXES)
    check_dtype(op, "v_cache", v_cache, k_cache.dtype.name)
    _, page_size, num_kv_heads, _ = k_cache.shape
    if page_size == 0 or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{op}: k_cache must have a page_size ≥ 1 and a num_kv_heads that divides the {num_heads} "
                         f"heads of q, got {list(k_cache.shape)}")
    for name, array in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_element_strides(op, name, array)
        check_last_axis(op, name, array)


def _check_table(op, block_table, cache_seqlens, cache_starts, batch):
    """The page table and the lengths have one entry per sequence."""
    check_dtype(op, "block_table", block_table, "int32")
    check_shape(op, "block_table", block_table, (batch, None), "[batch, max_pages]")
    check_element_strides(op, "block_table", block_table)
    check_last_axis(op, "block_table", block_table)
    for name, array in (("cache_seqlens", cache_seqlens), ("cache_starts", cache_starts)):
        if array is not None:
            check_dtype(op, name, array, "int32")
            check_shape(op, name, array, (batch,), "[batch]")
            check_element_strides(op, name, array)


def _check_content(op, block_table, cache_seqlens, cache_starts, cache, q_len, window_size):
    """Lengths fit the table, and every page with a visible token exists."""
    host = np.asarray if isinstance(cache_seqlens, np.ndarray) else lambda a: a.get()
    table, lengths = host(block_table), host(cache_seqlens).astype(np.int64)
    num_pages, page_size = cache.shape[:2]
    capacity = table.shape[1] * page_size
    if lengths.size == 0:
        return
    if lengths.min() < 0 or lengths.max() > capacity:
        raise ValueError(f"{op}: cache_seqlens must be from 0 to {capacity} (max_pages * page_size), got "
                         f"{lengths.min()} to {lengths.max()}")
    first = np.zeros_like(lengths) if cache_starts is None else host(cache_starts).astype(np.int64)
    if first.min() < 0:
        raise ValueError(f"{op}: cache_starts must be ≥ 0, got {first.min()}")
    if window_size:
        first = np.maximum(first, lengths - q_len + 1 - window_size)
    first = np.where(first < lengths, first, capacity)   # such a sequence reads nothing
    columns = np.arange(table.shape[1])
    read = (columns >= (first // page_size)[:, None]) & (columns < -(-lengths // page_size)[:, None])
    bad = read & ((table < 0) | (table >= num_pages))
    if bad.any():
        b, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"{op}: block_table must hold page ids from 0 to {num_pages - 1}, got "
                         f"{table[b, column]} at [{b}, {column}]")


def _check_workspace(workspace, plan):
    """`workspace` if the partial results of `plan` fit in it."""
    check_dtype("paged_decode", "workspace", workspace, "uint8")
    check_last_axis("paged_decode", "workspace", workspace)
    if workspace.ndim != 1 or workspace.size < plan.workspace_bytes:
        raise ValueError(f"paged_decode: workspace must be [nbytes] with at least {plan.workspace_bytes} bytes, got "
                         f"{list(workspace.shape)}")
    if address(workspace) % 16:
        raise ValueError("paged_decode: workspace must start at a multiple of 16 bytes, got one "
                         f"{address(workspace) % 16} bytes off")
    return workspace


def _sequence_view(array):
    """SequenceView of `array` [batch, q_len, heads, head_dim]."""
    seq, token, head, _ = strides(array)
    return {"data": array, "stride_seq": seq, "stride_token": token, "stride_head": head}


def _launch(xp, q, k_cache, v_cache, block_table, cache_seqlens, cache_starts, softmax_scale, window_size, softcap,
            sinks, out, lse, scratch):
    """Launch the chunks and, when there are several, their merge. q and out are [batch, q_len, heads, head_dim]."""
    batch, q_len, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    arch = arch_of(xp)
    dtypes_and_arch = (q.dtype.name, k_cache.dtype.name,
                       min(alignment(k_cache), alignment(v_cache), alignment(out)), arch)
    plan = _plan_paged_decode(batch, q_len, num_heads, num_kv_heads, head_dim,
                              block_table.shape[1] * k_cache.shape[1], *dtypes_and_arch, _version(*dtypes_and_arch))
    num_chunks = plan.grid[1]
    partial_out = partial_lse = None
    if num_chunks > 1:
        rows = num_chunks * batch * q_len * num_heads
        scratch = workspace(xp, plan.workspace_bytes) if scratch is None else _check_workspace(scratch, plan)
        floats = scratch[:plan.workspace_bytes].view(np.float32)
        partial_out, partial_lse = floats[:rows * head_dim], floats[rows * head_dim:]
    launch(plan, make_args(
        plan, q=_sequence_view(q), k=kv_view(k_cache), v=kv_view(v_cache), table=page_table(block_table, k_cache),
        out=_sequence_view(out), cache_seqlens=cache_seqlens, cache_starts=cache_starts, sinks=sinks, lse=lse,
        partial_out=partial_out, partial_lse=partial_lse, stride_seqlens=cache_seqlens.strides[0] // 4,
        stride_starts=0 if cache_starts is None else cache_starts.strides[0] // 4, batch=batch, q_len=q_len,
        num_kv_heads=num_kv_heads, heads_per_kv=num_heads // num_kv_heads, head_dim=head_dim,
        row_tiles=plan.grid[0] // (batch * num_kv_heads), num_chunks=num_chunks, window_size=window_size,
        softmax_scale=softmax_scale, softcap=softcap))
    if num_chunks > 1:
        shape = (num_chunks, batch * q_len, num_heads)
        launch_split_reduce(arch, [(partial_out.reshape(*shape, head_dim), partial_lse.reshape(shape))], sinks, out,
                            lse)
