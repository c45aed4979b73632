# SPDX-License-Identifier: Apache-2.0
"""Writing new keys and values into a cache. Kernel: ``cuda_src/kv_append.cu``."""

import functools
import math

import numpy as np

from ..quantized_kv import FORMATS, BlockKV, QuantizedKV, kv_side
from ..runtime import Plan, Specialisation, arch_of, env, launch, make_args
from ..runtime.arrays import alignment, array_namespace, head_view, page_table, row_view, strides
from ..runtime.checks import (
    FLOATS,
    check_dtype,
    check_element_strides,
    check_last_axis,
    check_number,
    check_shape,
    check_writeable,
    value_range,
)
from ..runtime.plan import CUDA_TYPES
from ..runtime.structs import address

STYLES = ("neox", "interleaved")
MAX_DIM = 1024   # longest row that lanes can hold


PLAIN = {name: f"KvPlain<{CUDA_TYPES[name]}>" for name in FLOATS}
COPY = {"STAGES": 0, "INTERLEAVED": 0, "LANES": 1, "CHUNKS": 1}   # constants of the version that moves bits


def _spec(new, k_format, v_format, wide, *, gain=None, style="", lanes=0, chunks=1):
    """`style` "" is a launch without bias, norm, RoPE and queries; 0 `lanes` the one that copies rows."""
    held = {"STAGES": int(style != ""), "INTERLEAVED": int(style == "interleaved"), "LANES": lanes, "CHUNKS": chunks}
    return Specialisation("kv_append", "kv_append", "KvAppendArgs",
                          {"T": new, "W": gain or new, "K": PLAIN.get(k_format, k_format),
                           "V": PLAIN.get(v_format, v_format), "WIDE": int(wide),
                           **(held if lanes else COPY)},
                          spill_bytes=32 * chunks if lanes == 1 else 0)   # the CPU's version holds rows in memory


CORE = [_spec(*case) for case in (
    ("float16", "float16", "float16", 1), ("bfloat16", "bfloat16", "bfloat16", 1),
    ("float32", "float32", "float32", 1), ("float32", "float16", "float16", 0), ("float16", "float32", "float32", 1),
)] + [_spec(new, cache, cache, wide, gain=gain, style=style, lanes=lanes, chunks=chunks)
      for new, cache, wide, gain, style, lanes, chunks in (
    ("float16", "float16", 1, "float16", "neox", 16, 1), ("bfloat16", "bfloat16", 1, "float32", "interleaved", 8, 1),
    ("float32", "float32", 0, "float32", "neox", 1, 32), ("bfloat16", "bfloat16", 0, "bfloat16", "neox", 32, 1),
    ("float16", "float16", 0, "float32", "interleaved", 4, 1), ("float32", "bfloat16", 1, "float32", "neox", 32, 2),
)]
ALL = [_spec(new, cache, cache, wide) for new in FLOATS for cache in FLOATS for wide in (0, 1)] + [
    _spec(new, cache, cache, wide, gain=gain, style=style, lanes=lanes, chunks=chunks)
    for new in FLOATS for cache in FLOATS for wide in (0, 1) for gain in sorted({new, "float32"}) for style in STYLES
    for lanes, chunks in ((1, 1), (1, 32), (4, 1), (8, 1), (16, 1), (32, 1), (32, 2))]


def _power_of_two(n):
    """Smallest power of two of at least n."""
    return 1 << max(0, n - 1).bit_length()


def _is_wide(vec, head_dim, head_dim_v, rotary_dim, style, align):
    pairs = rotary_dim // 2 if style == "neox" else rotary_dim   # dims that stay together in a piece
    return align >= 16 and not (head_dim % vec or head_dim_v % vec or pairs % vec)


@functools.lru_cache(maxsize=4096)
def _plan_kv_append(tokens, num_heads, num_kv_heads, head_dim, head_dim_v, rotary_dim, new, gain, k_format, v_format,
                    style, align, arch):
    """Plan from sizes, dtype and format names, the common alignment in bytes, and arch; `style` as in `_spec`."""
    plain = {tag: name for name, tag in PLAIN.items()}
    copy = style == "" and k_format in plain and v_format in plain
    vec = 4 if copy and "float32" in (new, plain[k_format], plain[v_format]) else 8
    wide = _is_wide(vec, head_dim, head_dim_v, rotary_dim, style, align)
    note = "16-byte accesses" if wide else (
        f"one element per access: alignment {align}, head_dim {head_dim}, head_dim_v {head_dim_v}"
        f"{f', rotary_dim {rotary_dim}' if rotary_dim else ''}")
    if not copy and max(head_dim, head_dim_v) > MAX_DIM:
        raise NotImplementedError(f"kv_append: head_dim must be at most {MAX_DIM} unless rows are only copied, got "
                                  f"{max(head_dim, head_dim_v)}")
    pieces = -(-max(head_dim, head_dim_v) // 8)
    size = tokens * (num_heads * head_dim + num_kv_heads * (head_dim + head_dim_v))
    if arch == "cpu":  # one thread strides over everything: a second one must be worth its start
        spec = _spec(new, k_format, v_format, wide, gain=gain, style=style, lanes=0 if copy else 1,
                     chunks=max(32, _power_of_two(pieces)))
        return Plan(spec, arch, (min(tokens, -(-size // (32768 if copy else 8192))),), (1,), note=note)
    if copy:
        spec, lanes = _spec(new, k_format, v_format, wide), min(128, max(head_dim, head_dim_v) // (vec if wide else 1))
    else:
        lanes = min(32, _power_of_two(pieces))
        spec = _spec(new, k_format, v_format, wide, gain=gain, style=style, lanes=lanes,
                     chunks=_power_of_two(-(-pieces // lanes)))
    heads = num_kv_heads or num_heads
    rows = min(128 // lanes, heads if copy else _power_of_two(heads))
    depth = min(_power_of_two(tokens), 64, max(1, 128 // (lanes * rows)))   # a block is at most 64 deep
    if not copy:
        rows = max(rows, 32 // (lanes * depth))   # whole warps: their lanes reduce together
    tiles = 2 * -(-num_kv_heads // rows) + -(-num_heads // rows)
    return Plan(spec, arch, (-(-tokens // depth), tiles), (lanes, rows, depth), note=note)


def _check_range(name, values, low, high, what):
    if values.size == 0:
        return
    smallest, largest = value_range(values)
    if smallest < low or largest >= high:
        found = smallest if smallest < low else largest
        raise ValueError(f"kv_append: {name} must be in [{low}, {high}), {what}, got {found}")


def _check_places(num_pages, page_size, slots, block_table, positions, batch_indices, readonly_tokens,
                  key_stride, key_offset):
    """Every token goes to a place inside the cache, and no two to the same one."""
    if slots is not None:
        _check_range("slots", slots, -1, num_pages * page_size, "num_pages * page_size or -1 to skip the token")
        places = slots
    else:
        batch, max_pages = block_table.shape
        _check_range("positions", positions, -1, max_pages * page_size * key_stride,
                     "what block_table can hold, or -1 to skip the token")
        sequences = np.arange(batch) if batch_indices is None else batch_indices
        _check_range("batch_indices", sequences, 0, batch, "the rows of block_table")
        writes = (positions >= 0) & (positions % key_stride == key_offset)
        if readonly_tokens is not None:
            writes &= positions >= readonly_tokens[sequences]
        tokens, sequences = positions[writes] // key_stride, sequences[writes]
        pages = block_table[sequences, tokens // page_size]
        _check_range("block_table", pages, 0, num_pages, "the pages of the cache, where a token is written")
        places = pages * np.int64(page_size) + tokens % page_size
    if places.size > 1:
        seen = set()
        for place in places.tolist():
            if place >= 0 and (place in seen or seen.add(place)):
                raise ValueError(f"kv_append: places must differ from token to token, got page {place // page_size} "
                                 f"slot {place % page_size} twice")


def _check_array(name, array, dtype, shape, axes):
    """Dtype, shape and strides of an array whose last axis the kernel reads or writes in pieces; the dtype's name."""
    dtype = check_dtype("kv_append", name, array, dtype)
    check_shape("kv_append", name, array, shape, axes)
    check_last_axis("kv_append", name, array)
    check_element_strides("kv_append", name, array)
    return dtype


def _check_new(k, v, q):
    """The three inputs; (tokens, heads, kv_heads, head_dim, head_dim_v, dtype), 0 heads for what is not there."""
    if (k is None) != (v is None) or k is q is None:
        raise ValueError("kv_append: k and v must be given together, or neither and q, got "
                         f"{' and '.join(n for n, a in (('k', k), ('v', v), ('q', q)) if a is not None) or 'none'}")
    name, first, axes = ("q", q, "[tokens, num_heads, head_dim]") if k is None else \
        ("k", k, "[tokens, num_kv_heads, head_dim]")
    tokens, heads, head_dim = first.shape if first.ndim == 3 else (None, None, None)
    dtype = _check_array(name, first, FLOATS, (tokens, heads, head_dim), axes)
    if k is None:
        return tokens, heads, 0, head_dim, head_dim, dtype
    _check_array("v", v, dtype, (tokens, heads, None), "[tokens, num_kv_heads, head_dim_v]")
    if q is not None:
        _check_array("q", q, dtype, (tokens, None, head_dim), "[tokens, num_heads, head_dim]")
    return tokens, 0 if q is None else q.shape[1], heads, head_dim, v.shape[2], dtype


def _check_caches(k_cache, v_cache, heads, head_dim, head_dim_v):
    """Both caches as KvSides."""
    k, v = kv_side("kv_append", "k_cache", k_cache), kv_side("kv_append", "v_cache", v_cache)
    check_shape("kv_append", "k_cache", k, (None, None, heads, head_dim),
                "[num_pages, page_size, num_kv_heads, head_dim]")
    check_shape("kv_append", "v_cache", v, (*k.shape[:3], head_dim_v),
                "[num_pages, page_size, num_kv_heads, head_dim_v]")
    if k.format in FLOATS and v.format in FLOATS and k.format != v.format:
        raise TypeError(f"kv_append: v_cache must be {k.format} like k_cache, got {v.format}")
    if k.shape[1] == 0:
        raise ValueError(f"kv_append: k_cache must have a page_size of at least 1, got {list(k.shape)}")
    for side, cache in ((k, k_cache), (v, v_cache)):
        for name, array in side.arrays.items():
            if _makes_scale(cache) or not name.endswith(".scale"):
                check_writeable("kv_append", name, array)
    return k, v


def _makes_scale(cache):
    """Whether the scales of a cache are written with its rows; the others are known before."""
    if isinstance(cache, QuantizedKV):
        return cache.granularity in ("token", "group")
    return isinstance(cache, BlockKV) and cache.format in FORMATS and cache.scale is None


def _alignment(side):
    """Alignment of a side's rows in bytes, 16 where the pieces of 8 codes need no more than they have."""
    needed = {8: 8, 6: 4, 4: 4}[FORMATS[side.format].bits] if side.format in FORMATS else 16
    return 16 if side.alignment >= needed else side.alignment


def _check_index(name, array, length, axes, dtypes=("int32",)):
    check_dtype("kv_append", name, array, dtypes)
    check_shape("kv_append", name, array, (length,), axes)
    check_element_strides("kv_append", name, array)


def _check_choice(tokens, slots, block_table, positions, batch_indices, readonly_tokens, key_stride, key_offset):
    """Exactly one way to say where tokens go, and its arrays fit."""
    if (slots is None) == (block_table is None) or block_table is not None and positions is None:
        given = [name for name, array in (("slots", slots), ("block_table", block_table), ("positions", positions))
                 if array is not None]
        raise ValueError("kv_append: places must be given by slots, or by block_table and positions, got "
                         f"{' and '.join(given) or 'neither'}")
    check_number("kv_append", "key_stride", key_stride, least=1, integer=True)
    check_number("kv_append", "key_offset", key_offset, least=0, integer=True)
    if key_offset >= key_stride:
        raise ValueError(f"kv_append: key_offset must be below key_stride = {key_stride}, got {key_offset}")
    if slots is not None:
        for name, given in (("batch_indices", batch_indices is not None), ("key_stride", key_stride != 1),
                            ("readonly_tokens", readonly_tokens is not None)):
            if given:
                raise ValueError(f"kv_append: {name} must come with block_table, got slots")
        _check_index("slots", slots, tokens, "[tokens]", ("int32", "int64"))
        return
    check_dtype("kv_append", "block_table", block_table, "int32")
    check_shape("kv_append", "block_table", block_table, (None, None), "[batch, max_pages]")
    check_last_axis("kv_append", "block_table", block_table)
    check_element_strides("kv_append", "block_table", block_table)
    if batch_indices is not None:
        _check_index("batch_indices", batch_indices, tokens, "[tokens]")
    elif tokens != block_table.shape[0]:
        raise ValueError(f"kv_append: batch_indices must be given unless there is one token per sequence, got {tokens} "
                         f"tokens for {block_table.shape[0]} rows of block_table")
    if readonly_tokens is not None:
        _check_index("readonly_tokens", readonly_tokens, block_table.shape[0], "[batch]")


def _check_rope(tokens, head_dim, cos, sin, rope_rows, positions, style, rotary_dim):
    """The tables and their rows; returns rotary_dim, 0 without RoPE."""
    if style not in STYLES:
        raise ValueError(f"kv_append: style must be one of {STYLES}, got {style!r}")
    if (cos is None) != (sin is None):
        raise ValueError(f"kv_append: cos and sin must be given together, got {'sin' if cos is None else 'cos'} alone")
    if cos is None:
        for name, value in (("rope_rows", rope_rows), ("rotary_dim", rotary_dim)):
            if value is not None:
                raise ValueError(f"kv_append: {name} must come with cos and sin, got neither")
        return 0
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    check_number("kv_append", "rotary_dim", rotary_dim, integer=True)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(f"kv_append: rotary_dim must be even and in [2, head_dim={head_dim}], got {rotary_dim}")
    _check_array("cos", cos, "float32", (None, rotary_dim // 2), "[rows, rotary_dim / 2]")
    _check_array("sin", sin, "float32", cos.shape, "the shape of cos")
    if rope_rows is None and positions is None:
        raise ValueError("kv_append: rope_rows or positions must be given with cos and sin, got neither")
    if rope_rows is not None:
        _check_index("rope_rows", rope_rows, tokens, "[tokens]")
    return rotary_dim


def _check_steps(heads, kv_heads, head_dim, head_dim_v, dtype, biases, norms):
    """Biases and gains of norms; the dtype of the gains, `dtype` without."""
    for (name, bias), shape in zip(biases.items(), ((heads, head_dim), (kv_heads, head_dim), (kv_heads, head_dim_v)),
                                   strict=True):
        if bias is not None:
            _check_array(name, bias, dtype, shape, "[heads, head_dim]")
    gain = None
    for name, norm in norms.items():
        if norm is not None:
            gain = _check_array(name, norm, (dtype, "float32") if gain is None else gain, (head_dim,), "[head_dim]")
    return gain or dtype


def _check_queries(xp, q, q_out, dtype, positions, logn_max_position):
    """Where queries go, a new array by default."""
    if q is None:
        if q_out is not None or logn_max_position is not None:
            raise ValueError(f"kv_append: {'q_out' if q_out is not None else 'logn_max_position'} must come with q, "
                             "got none")
        return None
    if logn_max_position is not None:
        check_number("kv_append", "logn_max_position", logn_max_position, least=2, integer=True)
        if positions is None:
            raise ValueError("kv_append: positions must be given with logn_max_position, got none")
    if q_out is None:
        return xp.empty(q.shape, q.dtype)
    _check_array("q_out", q_out, dtype, q.shape, "the shape of q")
    check_writeable("kv_append", "q_out", q_out)
    if q_out.size and address(q_out) == address(q):
        raise ValueError("kv_append: q_out must not be q, which is read while q_out is written")
    return q_out


def kv_append(k, v, k_cache, v_cache, /, *, slots=None, block_table=None, positions=None, batch_indices=None, q=None,
              q_out=None, cos=None, sin=None, rope_rows=None, style="neox", rotary_dim=None, q_bias=None, k_bias=None,
              v_bias=None, q_norm=None, k_norm=None, norm_eps=1e-6, logn_max_position=None, key_stride=1, key_offset=0,
              readonly_tokens=None):
    """Write the keys and values of new tokens into a paged or contiguous cache, in place, and finish their queries.

    k_cache[page, slot, h] = rope(norm(k[t, h] + k_bias[h])),   v_cache[page, slot, h] = v[t, h] + v_bias[h],
    q_out[t, h] = logn(rope(norm(q[t, h] + q_bias[h])))

    Every step happens only if its arrays are given; k, v and q are never modified. Say where token t goes either by
    ``slots[t] = page * page_size + slot``, or by ``block_table`` and ``positions``: page
    ``block_table[batch_indices[t], positions[t] // page_size]``, slot ``positions[t] % page_size``.

    Parameters
    ----------
    k : ndarray [tokens, num_kv_heads, head_dim], float16, bfloat16 or float32, or None
        New keys. Tokens and heads may be strided (a slice of a fused projection). None, with `v` and the caches, to
        finish only the queries.
    v : ndarray [tokens, num_kv_heads, head_dim_v], dtype of k
    k_cache : ndarray [num_pages, page_size, num_kv_heads, head_dim], float16, bfloat16 or float32
        Any strides with a contiguous last axis: ``transpose(0, 2, 1, 3)`` of a head-major pool, or a contiguous cache
        [batch, capacity, num_kv_heads, head_dim] as pages of `capacity` tokens. Slots not named keep their bits.
        The caches are written: they overlap neither each other nor the inputs.
    v_cache : ndarray [num_pages, page_size, num_kv_heads, head_dim_v], dtype of k_cache
    slots : ndarray [tokens], int32 or int64, optional
        -1 skips the token.
    block_table : ndarray [batch, max_pages], int32, optional
        Page ids of every sequence; entries no new token falls on are not read.
    positions : ndarray [tokens], int32, optional
        Index of the token in its sequence, 0 for the first; -1 skips the token, and its queries become zero. Goes with
        `block_table`; with `slots` it only says how far RoPE turns and log-n scales.
    batch_indices : ndarray [tokens], int32, optional
        Row of `block_table` the token belongs to. Default: token t is the one new token of sequence t.
    q : ndarray [tokens, num_heads, head_dim], dtype of k, optional
        Queries of the same tokens.
    q_out : ndarray [tokens, num_heads, head_dim], dtype of k, optional
        Where the finished queries go, a new array by default. Overlaps no input.
    cos, sin : ndarray [rows, rotary_dim / 2], float32, optional
        RoPE tables, e.g. of ``RopeParams.tables(max_pos)``.
    rope_rows : ndarray [tokens], int32, optional
        Row of `cos` and `sin` of each token, -1 to skip the token. Default `positions`.
    style : "neox" or "interleaved"
        RoPE's pair j is elements (j, j + rotary_dim/2) for "neox", (2j, 2j + 1) for "interleaved".
    rotary_dim : int, optional
        Rotated elements, the first ones of a head; even. Default ``head_dim``.
    q_bias, k_bias, v_bias : ndarray [heads, head_dim], dtype of k, optional
        Added first.
    q_norm, k_norm : ndarray [head_dim], dtype of k or float32, optional
        Gains of an RMS norm over every head: x * gain / sqrt(mean(x**2) + norm_eps).
    norm_eps : float
    logn_max_position : int, optional
        Queries at a 0-based position p past it are multiplied by log(p) / log(logn_max_position).
    key_stride, key_offset : int
        Context parallel: only tokens at positions p with ``p % key_stride == key_offset`` are stored, as token
        ``p // key_stride`` of their sequence.
    readonly_tokens : ndarray [batch], int32, optional
        Tokens at positions below it are not stored (their pages are shared). With `block_table`.

    Returns
    -------
    q_out : ndarray [tokens, num_heads, head_dim], dtype of k, or None without `q`

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, or an unsupported dtype.
    ValueError
        Shapes or strides that do not fit; for NumPy arrays also a place outside the cache or named twice. With CuPy
        arrays a place outside the cache and a row outside the tables write nothing (the latter gives NaN queries), and
        which of two tokens for one place wins is open.
    NotImplementedError
        A head longer than 1024 elements, unless it is only copied.

    Notes
    -----
    All steps are float32 with one rounding to k's dtype at the end, then one to the cache's. Without steps a cache of
    k's dtype receives its bits. On CuPy arrays asynchronous on the current stream. Kernel: ``cuda_src/kv_append.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> k_cache, v_cache = np.zeros((2, 4, 1, 2), np.float32), np.zeros((2, 4, 1, 2), np.float32)
    >>> cupyattn.kv_append(np.float32([[[1, 2]]]), np.float32([[[3, 4]]]), k_cache, v_cache, slots=np.int32([5]))
    >>> k_cache[1, 1]
    array([[1., 2.]], dtype=float32)
    """
    biases = {"q_bias": q_bias, "k_bias": k_bias, "v_bias": v_bias}
    norms = {"q_norm": q_norm, "k_norm": k_norm}
    indices = {"slots": slots, "block_table": block_table, "positions": positions, "batch_indices": batch_indices,
               "readonly_tokens": readonly_tokens, "rope_rows": rope_rows}
    caches = {f"{name}{part}": array for name, cache in (("k_cache", k_cache), ("v_cache", v_cache))
              for part, array in (cache.arrays if isinstance(cache, (QuantizedKV, BlockKV)) else {"": cache}).items()}
    xp = array_namespace("kv_append", k=k, v=v, q=q, q_out=q_out, cos=cos, sin=sin, **caches, **biases, **norms,
                         **indices)
    tokens, heads, kv_heads, head_dim, head_dim_v, dtype = _check_new(k, v, q)
    sides = [] if k is None else _check_caches(k_cache, v_cache, kv_heads, head_dim, head_dim_v)
    if positions is not None:
        _check_index("positions", positions, tokens, "[tokens]")
    if k is None:
        _refuse_places(k_cache=k_cache, v_cache=v_cache, slots=slots, block_table=block_table,
                       batch_indices=batch_indices, readonly_tokens=readonly_tokens)
    else:
        _check_choice(tokens, slots, block_table, positions, batch_indices, readonly_tokens, key_stride, key_offset)
    rotary_dim = _check_rope(tokens, head_dim, cos, sin, rope_rows, positions, style, rotary_dim)
    gain = _check_steps(heads, kv_heads, head_dim, head_dim_v, dtype, biases, norms)
    check_number("kv_append", "norm_eps", norm_eps, least=0)
    q_out = _check_queries(xp, q, q_out, dtype, positions, logn_max_position)
    if tokens == 0 or head_dim == 0 or heads + kv_heads == 0:
        return q_out
    if xp is np or env.check():
        host = {name: a if a is None or xp is np else a.get() for name, a in indices.items()}
        rows = "positions" if rope_rows is None else "rope_rows"
        if rotary_dim:
            _check_range(rows, host[rows], -1, cos.shape[0], "the rows of cos and sin or -1 to skip the token")
        if k is not None:
            del host["rope_rows"]
            _check_places(*sides[0].shape[:2], **host, key_stride=key_stride, key_offset=key_offset)
    steps = [a for a in (q, q_out, cos, sin, *biases.values(), *norms.values()) if a is not None]
    plan = _plan_kv_append(
        tokens, heads, kv_heads, head_dim, head_dim_v, rotary_dim, dtype, gain,
        *([side.tag for side in sides] or [PLAIN[dtype]] * 2), style if steps else "",
        min([*(alignment(a) for a in (k, v, *steps) if a is not None), *map(_alignment, sides)]), arch_of(xp))
    by_table = block_table is not None
    wide = slots is not None and slots.dtype.itemsize == 8
    k_side, v_side = sides or (None, None)
    launch(plan, make_args(
        plan, k=_heads(k), v=_heads(v), q=_heads(q), q_out=_heads(q_out),
        k_cache=k_side and k_side.view, v_cache=v_side and v_side.view, k_scale=k_side and k_side.scale,
        v_scale=v_side and v_side.scale, table=_table(block_table, k_side), q_bias=row_view(q_bias),
        k_bias=row_view(k_bias), v_bias=row_view(v_bias), q_norm=q_norm, k_norm=k_norm, cos=cos, sin=sin,
        slots32=None if wide else slots, slots64=slots if wide else None, positions=positions,
        batch_indices=batch_indices, rope_rows=rope_rows, readonly=readonly_tokens,
        stride_cos=0 if cos is None else strides(cos)[0], stride_sin=0 if sin is None else strides(sin)[0],
        stride_slot=_step(slots), stride_position=_step(positions), stride_batch_index=_step(batch_indices),
        stride_rope_row=_step(rope_rows), stride_readonly=_step(readonly_tokens), tokens=tokens,
        batch=block_table.shape[0] if by_table else 0, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        head_dim_v=head_dim_v, rotary_dim=rotary_dim, table_rows=0 if cos is None else cos.shape[0],
        key_stride=key_stride, key_offset=key_offset, k_makes_scale=int(_makes_scale(k_cache)),
        v_makes_scale=int(_makes_scale(v_cache)), logn_position=logn_max_position or 0, norm_eps=norm_eps,
        logn_factor=0.0 if logn_max_position is None else 1 / math.log(logn_max_position), reserved=0))
    return q_out


def _heads(array):
    return None if array is None else head_view(array)


def _step(array):
    """Stride of a one-dimensional array in elements, 0 for none."""
    return 0 if array is None else strides(array)[0]


def _table(block_table, side):
    """Fields of PageTable; with slots only the page size and count."""
    if side is None:
        return None
    if block_table is not None:
        return page_table(block_table, side)
    return {"block_table": None, "indptr": None, "block_ptrs": None, "row_starts": None, "stride_seq": 0,
            "max_pages": 0, "page_size": side.shape[1], "num_pages": side.shape[0], "reserved": 0}


def _refuse_places(**given):
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"kv_append: {name} must come with k and v, got it without them")
