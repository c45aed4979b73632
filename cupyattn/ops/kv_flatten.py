# SPDX-License-Identifier: Apache-2.0
"""Copying cached keys and values into contiguous arrays. Kernel: ``cuda_src/kv_flatten.cu``."""

import functools
import itertools

import numpy as np

from ..devices import to_host
from ..kv.quantized import FORMATS, PLAIN_TAGS, BlockKV, kv_side
from ..paging.table import PageTable
from ..runtime import Plan, Specialisation, arch_of, env, launch, make_args
from ..runtime.arrays import alignment, array_namespace, dtype_name, dtype_of, head_view, strides
from ..runtime.checks import (
    FLOATS,
    check_array,
    check_dtype,
    check_element_strides,
    check_last_axis,
    check_number,
    check_shape,
    check_writeable,
)
from ..runtime.plan import CUDA_TYPES

_TAGS = tuple(dict.fromkeys(
    list(PLAIN_TAGS.values()) + [f.tag.format(CUDA_TYPES[t]) for f in FORMATS.values() for t in f.scale_dtypes]))


def _spec(k, v, out, aligned, whole_groups):
    return Specialisation("kv_flatten", "kv_flatten", "KvFlattenArgs",
                          {"K": k, "V": v, "T": out, "ALIGNED": aligned, "WHOLE_GROUPS": whole_groups})


CORE = [_spec(*case) for case in (
    ("KvPlain<__half>", "KvPlain<__half>", "float16", 1, 1),
    ("KvPlain<float>", "KvPlain<__nv_bfloat16>", "float32", 0, 1),
    ("KvInt8<__half>", "KvInt8<__half>", "float16", 1, 1), ("KvInt4<__nv_bfloat16>", "KvInt4<float>", "bfloat16", 1, 1),
    ("KvInt8Sym", "KvInt8Channel", "float16", 1, 0), ("KvE4M3", "KvE5M2", "bfloat16", 1, 1),
    ("KvHadamard8", "KvHadamard4", "float16", 1, 0), ("KvHadamard6", "KvHadamard6", "float32", 1, 0),
    ("KvHadamard8", "KvHadamard4", "float16", 1, 1), ("KvHadamard6", "KvE4M3", "bfloat16", 0, 1),
    ("KvInt4<float>", "KvInt8<float>", "float32", 0, 0), ("KvInt8Channel", "KvPlain<__half>", "bfloat16", 0, 0),
)]
# keys and values are compiled apart: every format once on each side covers all pairs


def more_specs():
    """Every format of keys and of values once."""
    for k, v in zip(_TAGS, (*_TAGS[1:], _TAGS[0]), strict=True):
        for out, aligned, whole in itertools.product(FLOATS, (0, 1), (0, 1)):
            yield _spec(k, v, out, aligned, whole)


@functools.lru_cache(maxsize=4096)
def _plan_kv_flatten(tokens, num_kv_heads, head_dim, head_dim_v, k, v, out, aligned, arch):
    """(Plan, tokens per block) from sizes, format tags, dtype name, whether all rows are aligned, and arch."""
    cpu = arch == "cpu"
    spec = _spec(k, v, out, int(aligned), int(cpu))
    note = "16 bytes per access" if aligned else "one element per access: rows are not aligned"
    if cpu:   # one thread fills a tile: a second one must be worth its start
        lanes, rows, tile = 1, 1, max(1, min(1024, 65536 // (num_kv_heads * max(head_dim, head_dim_v))))
    else:
        dims = max(head_dim, head_dim_v)
        lanes = min(32, -(-dims // 32) * 4) if dims >= 32 else dims // 8   # four of them rotate 32 dims together
        rows = 8 * (32 // lanes)   # 8 warps or a little less
        tile = max(1, 4 * rows // num_kv_heads)   # about four rows per thread
    return Plan(spec, arch, (-(-tokens // tile), 2), (lanes, rows), shared_bytes=16 * tile, note=note), tile


def _check_lists(batch, cu_seqlens_k, cache_seqlens):
    check_array("kv_flatten", "cu_seqlens_k", cu_seqlens_k, "int32", (batch + 1,), "[batch + 1]", contiguous=False)
    if cache_seqlens is not None:
        check_array("kv_flatten", "cache_seqlens", cache_seqlens, "int32", (batch,), "[batch]", contiguous=False)


def _check_caches(table, k, v):
    """K and V fit each other and the table."""
    if k.shape[:3] != v.shape[:3]:
        raise ValueError("kv_flatten: v_cache must have the pages, page_size and num_kv_heads of k_cache, "
                         f"{list(k.shape[:3])}, got {list(v.shape[:3])}")
    for name, side in (("k_cache", k), ("v_cache", v)):
        if side.shape[3] == 0 or side.shape[3] % 8:
            raise ValueError(f"kv_flatten: {name} must have a head_dim that is a multiple of 8, got {side.shape[3]}")
        in_blocks = side.shape[0] is None
        if in_blocks != (table.form == "pointers"):
            raise TypeError(f"kv_flatten: {name} must be {'an array or a QuantizedKV' if in_blocks else 'a BlockKV'} "
                            f"with a {table.form} block_table, got {'a BlockKV' if in_blocks else side.format}")
    if k.shape[1] == 0:
        raise ValueError("kv_flatten: k_cache must have a page_size of at least 1, got 0")


def _outputs(xp, k, v, out, dtype, num_tokens):
    """k_out, v_out [tokens, num_kv_heads, head_dim] and what the op returns."""
    heads, dims = k.shape[2], (k.shape[3], v.shape[3])
    if out is None:
        k_out, v_out = (xp.empty((num_tokens, heads, d), dtype_of(dtype)) for d in dims)
        return k_out, v_out, (k_out, v_out)
    if isinstance(out, tuple | list):
        if len(out) != 2:
            raise ValueError(f"kv_flatten: out must be an array or a pair of arrays, got {len(out)} arrays")
        k_out, v_out = out
        array_namespace("kv_flatten", **{"out[0]": k_out, "out[1]": v_out})
        for i, array in enumerate(out):
            check_shape("kv_flatten", f"out[{i}]", array, (k_out.shape[0], heads, dims[i]),
                        "[tokens, num_kv_heads, head_dim]")
    else:
        array_namespace("kv_flatten", out=out)
        check_shape("kv_flatten", "out", out, (heads, 2, None, dims[0]), "[num_kv_heads, 2, tokens, head_dim]")
        if dims[0] != dims[1]:
            raise ValueError(f"kv_flatten: out must be a pair of arrays when the head_dims of k_cache and v_cache "
                             f"differ, {dims[0]} and {dims[1]}, got one array")
        k_out, v_out = (out[:, i].transpose(1, 0, 2) for i in range(2))
    for name, array in (("out[0]", k_out), ("out[1]", v_out)):
        name = "out" if hasattr(out, "shape") else name
        check_dtype("kv_flatten", name, array, FLOATS if dtype is None else dtype)
        check_dtype("kv_flatten", name, array, dtype_name(k_out))
        check_last_axis("kv_flatten", name, array)
        check_element_strides("kv_flatten", name, array)
        check_writeable("kv_flatten", name, array)
    return k_out, v_out, out


def _check_content(table, k, v, caches, starts, cache_seqlens, tokens):
    """Rows are within the outputs and every token has a place. Copies CuPy arrays to the host."""
    starts = to_host(starts).astype(np.int64)
    rows = np.diff(starts)
    if starts[0] < 0 or (rows < 0).any() or starts[-1] > tokens:
        raise ValueError(f"kv_flatten: cu_seqlens_k must not decrease from 0 on and end within the {tokens} rows of "
                         f"out, got {starts.tolist() if starts.size < 20 else 'other numbers'}")
    lengths = rows if cache_seqlens is None else to_host(cache_seqlens)
    if (lengths < 0).any() or (lengths > rows).any():
        b = np.flatnonzero((lengths < 0) | (lengths > rows))[0]
        raise ValueError(f"kv_flatten: cache_seqlens must be from 0 to the {rows[b]} rows that cu_seqlens_k gives "
                         f"sequence {b}, got {lengths[b]}")
    block_bytes = max(cache.nbytes_needed() for cache in caches) if isinstance(caches[0], BlockKV) else 0
    table.check("kv_flatten", lengths, k.shape[0], k.shape[1], block_bytes)


def kv_flatten(k_cache, v_cache, /, *, block_table, cu_seqlens_k, cache_seqlens=None, num_tokens=None, dtype=None,
               out=None):
    """Copy cached keys and values of every sequence into contiguous arrays, as plain numbers.

    k_out[cu_seqlens_k[b] + t, h] = k_cache[page of t, slot of t, h]   for t < cache_seqlens[b], likewise v

    What a kernel without pages needs, and a way to look into a quantized cache: rotated formats come out as the keys
    and values that went in.

    Parameters
    ----------
    k_cache : ndarray [num_pages, page_size, num_kv_heads, head_dim], QuantizedKV or BlockKV
        float16, bfloat16 or float32, any strides with a contiguous last axis; head_dim a multiple of 8.
    v_cache : ndarray [num_pages, page_size, num_kv_heads, head_dim_v], QuantizedKV or BlockKV
        Its format may be another than that of `k_cache`.
    block_table : ndarray [batch, max_pages], int32, or PageTable
        Pages of every sequence; block pointers for `BlockKV` caches.
    cu_seqlens_k : ndarray [batch + 1], int32
        First row of every sequence in the outputs, and the end.
    cache_seqlens : ndarray [batch], int32, optional
        Tokens to copy of each sequence. Default: as many as `cu_seqlens_k` leaves room for.
    num_tokens : int, optional
        Rows of the outputs when `out` is None. Default ``cu_seqlens_k[-1]``; CuPy arrays need it, for asking would
        wait for the device.
    dtype : dtype, optional
        Of the outputs: float16, bfloat16 or float32. Default: out's, else that of a plain `k_cache` or of the scales
        of an int8 or int4 one, else float16.
    out : ndarray [num_kv_heads, 2, tokens, head_dim], or pair of ndarray [tokens, num_kv_heads, head_dim], optional
        Written: all keys then all values of a head, as TurboMind's linear buffer has them, or keys and values apart.
        Any strides with a contiguous last axis. Rows of no token keep their bits.

    Returns
    -------
    (k, v) or out
        New arrays [tokens, num_kv_heads, head_dim] when `out` is None; rows of no token hold anything.

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, an unsupported dtype, or caches that do not go with the table's form.
    ValueError
        Shapes or strides that do not fit; for NumPy arrays also rows outside the outputs and tokens without a page.
        With CuPy arrays a token without a page gives zeros.

    Notes
    -----
    Float32 arithmetic and one rounding; plain caches of the output's dtype are copied bit by bit. On CuPy arrays
    asynchronous on the current stream. Kernel: ``cuda_src/kv_flatten.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> cache = np.arange(24, dtype=np.float32).reshape(3, 1, 1, 8)
    >>> k, v = cupyattn.kv_flatten(cache, cache + 0.5, block_table=np.int32([[2, 0]]), cu_seqlens_k=np.int32([0, 2]))
    >>> k[:, 0, 0], v[:, 0, 0]
    (array([16.,  0.], dtype=float32), array([16.5,  0.5], dtype=float32))
    """
    k, v = kv_side("kv_flatten", "k_cache", k_cache), kv_side("kv_flatten", "v_cache", v_cache)
    table = block_table if isinstance(block_table, PageTable) else PageTable(block_table)
    xp = array_namespace("kv_flatten", **k.arrays, **v.arrays, **table.arrays, cu_seqlens_k=cu_seqlens_k,
                         cache_seqlens=cache_seqlens)
    _check_lists(table.batch, cu_seqlens_k, cache_seqlens)
    _check_caches(table, k, v)
    if dtype is not None and dtype_of(dtype).name not in FLOATS:
        raise TypeError(f"kv_flatten: dtype must be {' or '.join(FLOATS)}, got {dtype_of(dtype).name}")
    dtype = dtype if dtype is None else dtype_of(dtype).name
    if out is None:
        dtype = dtype or _default_dtype(k_cache, k)
        if num_tokens is None:
            if xp is not np:
                raise ValueError("kv_flatten: num_tokens must be given with CuPy arrays when out is None, got None")
            num_tokens = max(0, int(cu_seqlens_k[-1]))
        check_number("kv_flatten", "num_tokens", num_tokens, least=0, integer=True)
    k_out, v_out, result = _outputs(xp, k, v, out, dtype, num_tokens)
    array_namespace("kv_flatten", cu_seqlens_k=cu_seqlens_k, out=k_out)
    tokens = k_out.shape[0]
    if xp is np or env.check():
        _check_content(table, k, v, (k_cache, v_cache), cu_seqlens_k, cache_seqlens, tokens)
    if table.batch == 0 or k_out.size == 0:
        return result
    aligned = min(alignment(k_out), alignment(v_out)) == 16 and all(
        min(side.alignment, table.alignment) >= side.row_align for side in (k, v))
    plan, tile = _plan_kv_flatten(tokens, *k.shape[2:], v.shape[3], k.tag, v.tag, dtype_name(k_out), aligned,
                                  arch_of(xp))
    launch(plan, make_args(
        plan, k=k.view, v=v.view, k_scale=k.scale, v_scale=v.scale, table=table.fields(k.shape[0], k.shape[1]),
        k_out=head_view(k_out), v_out=head_view(v_out), cu_seqlens_k=cu_seqlens_k, cache_seqlens=cache_seqlens,
        stride_starts=strides(cu_seqlens_k)[0], stride_seqlens=0 if cache_seqlens is None else
        strides(cache_seqlens)[0], batch=table.batch, tokens=tokens, num_kv_heads=k.shape[2], head_dim=k.shape[3],
        head_dim_v=v.shape[3], tile=tile), const_buffers=table.buffers)
    return result


def _default_dtype(cache, side):
    """Of the outputs: a plain cache's own, that of the scales where they are the activations', else float16."""
    if side.format in FLOATS:
        return side.format
    if side.format in ("int8", "int4"):
        return cache.scale_dtype if isinstance(cache, BlockKV) else dtype_name(cache.scale)
    return "float16"
