# SPDX-License-Identifier: Apache-2.0
"""Writing new keys and values into a cache. Kernel: ``cuda_src/kv_append.cu``."""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from ..kv.places import (
    Places,
    check_blocks,
    check_index,
    check_places,
    check_range,
    no_places,
    prepare_places,
    stride_of,
)
from ..kv.quantized import FORMATS, PLAIN_TAGS, BlockKV, QuantizedKV, kv_side
from ..kv.steps import STYLES, check_q_len, check_queries, check_rope, check_steps, rows_on_host
from ..paging.table import PageTable
from ..runtime import Plan, Prepared, Specialisation, Template, arch_of, env, make_args
from ..runtime.arrays import alignment, array_namespace, head_view, row_view, strides
from ..runtime.checks import FLOATS, check_array, check_flag, check_number, check_shape, check_writeable
from ..runtime.plan import CUDA_TYPES
from ..runtime.structs import address

MAX_DIM = 1024   # longest row that lanes can hold
COPY = {"STAGES": 0, "INTERLEAVED": 0, "LANES": 1, "CHUNKS": 1}   # constants of the version that moves bits


def _spec(new, k_format, v_format, wide, *, gain=None, style="", lanes=0, chunks=1):
    """`style` "" is a launch without bias, norm, RoPE and queries; 0 `lanes` the one that copies rows."""
    held = {"STAGES": int(style != ""), "INTERLEAVED": int(style == "interleaved"), "LANES": lanes, "CHUNKS": chunks}
    return Specialisation("kv_append", "kv_append", "KvAppendArgs",
                          {"T": new, "W": gain or new, "K": PLAIN_TAGS.get(k_format, k_format),
                           "V": PLAIN_TAGS.get(v_format, v_format), "WIDE": int(wide),
                           **(held if lanes else COPY)},
                          spill_bytes=64 * chunks if lanes == 1 else 0)   # the CPU's version holds rows in memory


CORE = [_spec(new, k, v, wide, style=style, lanes=lanes, chunks=chunks, gain=gain)
        for new, k, v, wide, style, lanes, chunks, gain in (
    ("float16", "float16", "float16", 1, "", 0, 1, None), ("float32", "float16", "float16", 0, "", 0, 1, None),
    ("bfloat16", "float32", "float32", 1, "", 0, 1, None),
    ("float16", "float16", "float16", 1, "neox", 16, 1, None),
    ("bfloat16", "bfloat16", "bfloat16", 0, "interleaved", 32, 1, "float32"),
    ("float32", "float32", "float32", 0, "neox", 1, 32, None),
    ("float16", "KvInt8<__half>", "KvInt8<__half>", 1, "neox", 16, 1, None),
    ("bfloat16", "KvInt4<__nv_bfloat16>", "KvInt4<__nv_bfloat16>", 1, "", 16, 1, None),
    ("float16", "KvHadamard8", "KvHadamard4", 1, "interleaved", 16, 1, None),
    ("bfloat16", "KvHadamard6", "KvInt8<__nv_bfloat16>", 0, "neox", 8, 1, None),
    ("bfloat16", "KvE4M3", "KvE4M3", 1, "neox", 16, 1, None), ("float16", "KvE5M2", "KvInt8Sym", 0, "", 32, 2, None),
    ("float32", "KvInt8Channel", "KvInt4<float>", 1, "interleaved", 1, 32, None),
    ("float16", "KvHadamard6", "KvHadamard6", 1, "", 1, 32, None),
)]
TAGS = [kind.tag.format(CUDA_TYPES[name]) for kind in FORMATS.values()
        for name in (FLOATS if len(kind.scale_dtypes) > 1 else FLOATS[:1])]


def more_specs():
    """Every constant with every type, and every format; not all products of them."""
    for new, wide in itertools.product(FLOATS, (0, 1)):
        yield from (_spec(new, cache, cache, wide) for cache in FLOATS)
        for style, gain, (lanes, chunks) in itertools.product(STYLES, ("float32", new), (
                (1, 1), (1, 32), (4, 1), (8, 1), (16, 1), (32, 1), (32, 2))):
            yield _spec(new, new, new, wide, gain=gain, style=style, lanes=lanes, chunks=chunks)
    for new, tag, style in itertools.product(FLOATS, TAGS, ("", *STYLES)):
        yield _spec(new, tag, tag, 1, style=style, lanes=16)
    for tag, (lanes, chunks) in itertools.product(TAGS, ((1, 32), (32, 2))):
        yield _spec("float16", tag, tag, 0, lanes=lanes, chunks=chunks)
    for k, v in zip(TAGS, (*TAGS[1:], "float16"), strict=True):
        yield _spec("float16", k, v, 1, lanes=8)


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
    plain = {tag: name for name, tag in PLAIN_TAGS.items()}
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


def _check_new(k, v, q):
    """The three inputs; (tokens, heads, kv_heads, head_dim, head_dim_v, dtype), 0 heads for what is not there."""
    if (k is None) != (v is None) or k is q is None:
        raise ValueError("kv_append: k and v must be given together, or neither and q, got "
                         f"{' and '.join(n for n, a in (('k', k), ('v', v), ('q', q)) if a is not None) or 'none'}")
    name, first, axes = ("q", q, "[tokens, num_heads, head_dim]") if k is None else \
        ("k", k, "[tokens, num_kv_heads, head_dim]")
    tokens, heads, head_dim = first.shape if first.ndim == 3 else (None, None, None)
    dtype = check_array("kv_append", name, first, FLOATS, (tokens, heads, head_dim), axes)
    if k is None:
        return tokens, heads, 0, head_dim, head_dim, dtype
    check_array("kv_append", "v", v, dtype, (tokens, heads, None), "[tokens, num_kv_heads, head_dim_v]")
    if q is not None:
        check_array("kv_append", "q", q, dtype, (tokens, None, head_dim), "[tokens, num_heads, head_dim]")
    return tokens, 0 if q is None else q.shape[1], heads, head_dim, v.shape[2], dtype


def _check_caches(k, v, caches, heads, head_dim, head_dim_v):
    """Both caches, KvSides `k` and `v` of the objects in `caches`, fit each other and the new tokens."""
    check_shape("kv_append", "k_cache", k, (None, None, heads, head_dim),
                "[num_pages, page_size, num_kv_heads, head_dim]")
    check_shape("kv_append", "v_cache", v, (*k.shape[:3], head_dim_v),
                "[num_pages, page_size, num_kv_heads, head_dim_v]")
    if k.format in FLOATS and v.format in FLOATS and k.format != v.format:
        raise TypeError(f"kv_append: v_cache must be {k.format} like k_cache, got {v.format}")
    if k.shape[1] == 0:
        raise ValueError(f"kv_append: k_cache must have a page_size of at least 1, got {list(k.shape)}")
    for side, cache in zip((k, v), caches, strict=True):
        for name, array in side.arrays.items():
            if _makes_scale(cache) or not name.endswith(".scale"):
                check_writeable("kv_append", name, array)


def _makes_scale(cache):
    """Whether the scales of a cache are written with its rows; the others are known before."""
    if isinstance(cache, QuantizedKV):
        return cache.granularity in ("token", "group")
    return isinstance(cache, BlockKV) and cache.format in FORMATS and cache.scale is None


def _alignment(side, table):
    """Alignment of a side's rows in bytes, 16 where wide accesses to its codes need no more than they have."""
    found = side.alignment if table is None else min(side.alignment, table.alignment)
    return 16 if found >= side.row_align else found


def kv_append(k, v, k_cache, v_cache, /, *, slots=None, block_table=None, positions=None, batch_indices=None, q=None,
              q_out=None, cos=None, sin=None, rope_rows=None, style="neox", rotary_dim=None, q_bias=None, k_bias=None,
              v_bias=None, q_norm=None, k_norm=None, norm_eps=1e-6, norm_is_rms=True, q_len=None, rope_base=0,
              logn_max_position=None, key_stride=1, key_offset=0, readonly_tokens=None):
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
    k_cache : ndarray [num_pages, page_size, num_kv_heads, head_dim], float16, bfloat16 or float32; QuantizedKV; BlockKV
        Any strides with a contiguous last axis: ``transpose(0, 2, 1, 3)`` of a head-major pool, or a contiguous cache
        [batch, capacity, num_kv_heads, head_dim] as pages of `capacity` tokens. Slots not named keep their bits.
        The caches are written: they overlap neither each other nor the inputs.
    v_cache : like k_cache, with head_dim_v
        Of k_cache's dtype if both are arrays; the formats of quantized caches may differ.
    slots : ndarray [tokens], int32 or int64, optional
        -1 skips the token.
    block_table : ndarray [batch, max_pages], int32, or PageTable, optional
        Page ids of every sequence; entries no new token falls on are not read. ``PageTable.csr`` has them in one list;
        ``PageTable.pointers`` has addresses of blocks, and then both caches are BlockKV.
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
    q_norm, k_norm : ndarray [head_dim] or [heads, head_dim], dtype of k or float32, optional
        Gains of an RMS norm over every head: x * gain / sqrt(mean(x**2) + norm_eps).
    norm_eps : float
    norm_is_rms : bool
        False: x - mean(x) in place of x, a layer norm.
    q_len : int, optional
        The tokens are `q_len` new ones of each sequence, one sequence after another. `positions` and `rope_rows` are
        then [tokens / q_len], of the first of them, and token t is of sequence ``t // q_len``. Negative rows of the
        tables count as 0 (left padding), a negative position skips the sequence.
    rope_base : int
        With `q_len`: added to `rope_rows`, or what stands for them where there are neither they nor `positions`. -1
        adds nothing, but makes negative `rope_rows` 0 before the tokens after the first are counted from there.
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
    All steps are float32 with one rounding to k's dtype at the end; that is what is quantized, or rounded to another
    dtype of a cache. Without steps a cache of k's dtype receives its bits. Scales of int8, int4, the hadamard formats
    and of fp8 per token are made here and written with the row; all others are known before, and numbers too large
    for them become the largest code. A NaN makes its row's scale NaN (in a hadamard format its 32 dims'), or where the
    scale is known becomes code 0 itself, in fp8 a NaN. On CuPy arrays asynchronous on the current stream.
    Kernel: ``cuda_src/kv_append.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> k_cache, v_cache = np.zeros((2, 4, 1, 2), np.float32), np.zeros((2, 4, 1, 2), np.float32)
    >>> cupyattn.kv_append(np.float32([[[1, 2]]]), np.float32([[[3, 4]]]), k_cache, v_cache, slots=np.int32([5]))
    >>> k_cache[1, 1]
    array([[1., 2.]], dtype=float32)
    """
    if q is not None and q_out is None:
        q_out = array_namespace("kv_append", q=q).empty(q.shape, q.dtype)
    found, *where = _prepared(
        (k, v, k_cache, v_cache, q, q_out, cos, sin, q_bias, k_bias, v_bias, q_norm, k_norm, slots, block_table,
         positions, batch_indices, readonly_tokens, rope_rows), style, rotary_dim, norm_eps, norm_is_rms, q_len,
        rope_base, logn_max_position, key_stride, key_offset)
    if found is None:
        return q_out
    if q is not None and address(q_out) == address(q):
        raise ValueError("kv_append: q_out must not be q, which is read while q_out is written")
    is_table = isinstance(block_table, PageTable)
    if found.on_host or env.check():
        if cos is not None:
            name = "rope_rows" if rope_rows is not None else "positions" if positions is not None else "rope_base"
            rows = rows_on_host(found.tokens, positions, rope_rows, q_len, rope_base)
            check_range(name, rows, -1, cos.shape[0], "the rows of cos and sin or -1 to skip the token")
        if k is not None:
            check_places(found.places.of_call(slots, block_table, positions, batch_indices, readonly_tokens),
                         (k_cache, v_cache))
    found.template.launch(*where, buffers=block_table.buffers if is_table else ())
    return q_out


class _Append(NamedTuple):
    """What calls with arrays of the same kinds have in common."""

    template: Template
    places: Places    # of Known arrays
    tokens: int
    on_host: bool     # the arrays are NumPy's


@Prepared
def _prepared(k, v, k_cache, v_cache, q, q_out, cos, sin, q_bias, k_bias, v_bias, q_norm, k_norm, slots, block_table,
              positions, batch_indices, readonly_tokens, rope_rows, style, rotary_dim, norm_eps, norm_is_rms, q_len,
              rope_base, logn_max_position, key_stride, key_offset):
    """The _Append for arrays of these kinds; None where there is nothing to do."""
    biases = {"q_bias": q_bias, "k_bias": k_bias, "v_bias": v_bias}
    norms = {"q_norm": q_norm, "k_norm": k_norm}
    indices = {"slots": slots, "positions": positions, "batch_indices": batch_indices,
               "readonly_tokens": readonly_tokens, "rope_rows": rope_rows}
    tables = block_table.arrays if isinstance(block_table, PageTable) else {"block_table": block_table}
    caches = (k_cache, v_cache)
    sides = [kv_side("kv_append", name, cache) for name, cache in zip(("k_cache", "v_cache"), caches, strict=True)
             if cache is not None]
    xp = array_namespace("kv_append", k=k, v=v, q=q, q_out=q_out, cos=cos, sin=sin, **biases, **norms, **indices,
                         **tables, **{name: array for side in sides for name, array in side.arrays.items()})
    tokens, heads, kv_heads, head_dim, head_dim_v, dtype = _check_new(k, v, q)
    entries = check_q_len(tokens, q_len, rope_base)
    if positions is not None:
        check_index("positions", positions, *entries)
    if k is None:
        places = no_places(k_cache=k_cache, v_cache=v_cache, slots=slots, block_table=block_table,
                           batch_indices=batch_indices, readonly_tokens=readonly_tokens)
    else:
        if len(sides) != 2:
            raise ValueError("kv_append: k_cache and v_cache must be given with k and v, got None")
        _check_caches(*sides, caches, kv_heads, head_dim, head_dim_v)
        places = prepare_places(slots, block_table, positions, batch_indices, readonly_tokens, key_stride, key_offset,
                                tokens, q_len)
        check_blocks(places, k_cache=k_cache, v_cache=v_cache)
    rotary_dim = check_rope(entries, head_dim, cos, sin, rope_rows, positions, q_len, style, rotary_dim)
    gain = check_steps(heads, kv_heads, head_dim, head_dim_v, dtype, biases, norms)
    check_number("kv_append", "norm_eps", norm_eps, least=0)
    check_flag("kv_append", "norm_is_rms", norm_is_rms)
    check_queries(q, q_out, dtype, positions, logn_max_position)
    if tokens == 0 or head_dim == 0 or heads + kv_heads == 0:
        return None
    steps = [a for a in (q, q_out, cos, sin, *biases.values(), *norms.values()) if a is not None]
    plan = _plan_kv_append(
        tokens, heads, kv_heads, head_dim, head_dim_v, rotary_dim, dtype, gain,
        *([side.tag for side in sides] or [PLAIN_TAGS[dtype]] * 2), style if steps else "",
        min([*(alignment(a) for a in (k, v, *steps) if a is not None),
             *(_alignment(side, places.table) for side in sides)]), arch_of(xp))
    args = make_args(
        plan, k=_heads(k), v=_heads(v), q=_heads(q), q_out=_heads(q_out), **_cache_fields(sides, caches),
        **places.fields(k_cache), q_bias=row_view(q_bias), k_bias=row_view(k_bias), v_bias=row_view(v_bias),
        **{name: _gain_view(norm) for name, norm in norms.items()},
        cos=cos, sin=sin, stride_cos=0 if cos is None else strides(cos)[0],
        stride_sin=0 if sin is None else strides(sin)[0], positions=positions, stride_position=stride_of(positions),
        rope_rows=rope_rows, stride_rope_row=stride_of(rope_rows), tokens=tokens, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, head_dim_v=head_dim_v, rotary_dim=rotary_dim,
        table_rows=0 if cos is None else cos.shape[0], logn_position=logn_max_position or 0,
        logn_factor=0.0 if logn_max_position is None else 1 / math.log(logn_max_position), norm_eps=norm_eps,
        norm_centred=int(not norm_is_rms), q_len=q_len or 0, rope_base=rope_base)
    return _Append(Template(plan, args), places, tokens, xp is np)


def _heads(array):
    return None if array is None else head_view(array)


def _gain_view(gain):
    """RowView of [heads, head_dim], or of one row for all heads."""
    return None if gain is None else {"data": gain, "stride_row": 0 if gain.ndim == 1 else strides(gain)[0]}


def _cache_fields(sides, caches):
    """Fields of the struct that describe the caches, without `sides` those of none."""
    fields = {}
    for i, letter in enumerate("kv"):
        fields[f"{letter}_cache"] = sides[i].view if sides else None
        fields[f"{letter}_scale"] = sides[i].scale if sides and sides[i].format in FORMATS else None
        fields[f"{letter}_makes_scale"] = int(_makes_scale(caches[i]))
    return fields
