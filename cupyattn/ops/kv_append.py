# SPDX-License-Identifier: Apache-2.0
"""Writing new keys and values into a cache. Kernel: ``cuda_src/kv_append.cu``."""

import functools

import numpy as np

from ..runtime import Plan, Specialisation, arch_of, env, launch, make_args
from ..runtime.arrays import alignment, array_namespace, head_view, kv_view, page_table, strides
from ..runtime.checks import (
    FLOATS,
    check_dtype,
    check_element_strides,
    check_last_axis,
    check_shape,
    check_writeable,
    value_range,
)


def _spec(new, cache, vec):
    return Specialisation("kv_append", "kv_append", "KvAppendArgs", {"T": new, "KV": cache, "VEC": vec})


def _widest_vec(new, cache):
    """Elements of a 16-byte access to the wider of the two types."""
    return 4 if "float32" in (new, cache) else 8


CORE = [_spec(*case) for case in (
    ("float16", "float16", 8), ("bfloat16", "bfloat16", 8), ("float32", "float32", 4), ("float32", "float16", 4),
    ("float16", "float32", 4), ("bfloat16", "float16", 8), ("float16", "float16", 1), ("float32", "bfloat16", 1),
    ("bfloat16", "float32", 1), ("float16", "bfloat16", 1),
)]
ALL = [_spec(new, cache, vec) for new in FLOATS for cache in FLOATS for vec in (1, _widest_vec(new, cache))]


@functools.lru_cache(maxsize=4096)
def _plan_kv_append(tokens, num_kv_heads, head_dim, head_dim_v, new, cache, align, arch):
    """Plan from sizes, dtype names, the common alignment in bytes, and arch."""
    vec = _widest_vec(new, cache)
    note = f"{vec} elements per access"
    if align < 16 or head_dim % vec or head_dim_v % vec:
        vec, note = 1, f"one element per access: alignment {align}, head_dim {head_dim}, head_dim_v {head_dim_v}"
    spec = _spec(new, cache, vec)
    if arch == "cpu":  # one thread strides over everything: a second one must be worth its start
        size = tokens * num_kv_heads * (head_dim + head_dim_v)
        return Plan(spec, arch, (min(tokens, -(-size // 32768)),), (1,), note=note)
    lanes = min(128, max(head_dim, head_dim_v) // vec)
    rows = min(2 * num_kv_heads, 128 // lanes)
    depth = min(tokens, 64, max(1, 128 // (lanes * rows)))   # a block is at most 64 deep
    grid = (-(-tokens // depth), -(-2 * num_kv_heads // rows))
    return Plan(spec, arch, grid, (lanes, rows, depth), note=note)


def _check_range(name, values, low, high, what):
    if values.size == 0:
        return
    smallest, largest = value_range(values)
    if smallest < low or largest >= high:
        found = smallest if smallest < low else largest
        raise ValueError(f"kv_append: {name} must be in [{low}, {high}), {what}, got {found}")


def _check_places(cache, slots, block_table, positions, batch_indices):
    """Every token goes to a place inside the cache, and no two to the same one."""
    num_pages, page_size = cache.shape[:2]
    if slots is not None:
        _check_range("slots", slots, -1, num_pages * page_size, "num_pages * page_size or -1 to skip the token")
        places = slots
    else:
        batch, max_pages = block_table.shape
        _check_range("positions", positions, -1, max_pages * page_size,
                     "what block_table can hold, or -1 to skip the token")
        sequences = np.arange(batch) if batch_indices is None else batch_indices
        _check_range("batch_indices", sequences, 0, batch, "the rows of block_table")
        writes = positions >= 0
        positions, sequences = positions[writes], sequences[writes]
        pages = block_table[sequences, positions // page_size]
        _check_range("block_table", pages, 0, num_pages, "the pages of the cache, where a token is written")
        places = pages * np.int64(page_size) + positions % page_size
    if places.size > 1:
        seen = set()
        for place in places.tolist():
            if place >= 0 and (place in seen or seen.add(place)):
                raise ValueError(f"kv_append: places must differ from token to token, got page {place // page_size} "
                                 f"slot {place % page_size} twice")


def _check_metadata(k, v, k_cache, v_cache):
    """Dtypes, shapes and strides of the four big arrays; returns the dtype names of the new ones and the caches."""
    tokens, num_kv_heads, head_dim = k.shape if k.ndim == 3 else (None, None, None)
    check_shape("kv_append", "k", k, (tokens, num_kv_heads, head_dim), "[tokens, num_kv_heads, head_dim]")
    check_shape("kv_append", "v", v, (tokens, num_kv_heads, None), "[tokens, num_kv_heads, head_dim_v]")
    check_shape("kv_append", "k_cache", k_cache, (None, None, num_kv_heads, head_dim),
                "[num_pages, page_size, num_kv_heads, head_dim]")
    check_shape("kv_append", "v_cache", v_cache, (*k_cache.shape[:3], v.shape[2]),
                "[num_pages, page_size, num_kv_heads, head_dim_v]")
    if k_cache.shape[1] == 0:
        raise ValueError(f"kv_append: k_cache must have a page_size of at least 1, got {list(k_cache.shape)}")
    new = check_dtype("kv_append", "k", k, FLOATS)
    check_dtype("kv_append", "v", v, new)
    cache = check_dtype("kv_append", "k_cache", k_cache, FLOATS)
    check_dtype("kv_append", "v_cache", v_cache, cache)
    for name, array in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_last_axis("kv_append", name, array)
        check_element_strides("kv_append", name, array)
    check_writeable("kv_append", "k_cache", k_cache)
    check_writeable("kv_append", "v_cache", v_cache)
    return new, cache


def _check_index(name, array, length, axes, dtypes=("int32",)):
    check_dtype("kv_append", name, array, dtypes)
    check_shape("kv_append", name, array, (length,), axes)
    check_element_strides("kv_append", name, array)


def _check_choice(tokens, slots, block_table, positions, batch_indices):
    """Exactly one way to say where tokens go, and its arrays fit."""
    if (slots is None) == (block_table is None) or (block_table is None) != (positions is None):
        given = [name for name, array in (("slots", slots), ("block_table", block_table), ("positions", positions))
                 if array is not None]
        raise ValueError("kv_append: places must be given by slots, or by block_table and positions, got "
                         f"{' and '.join(given) or 'neither'}")
    if slots is not None:
        if batch_indices is not None:
            raise ValueError("kv_append: batch_indices must come with block_table, got slots")
        _check_index("slots", slots, tokens, "[tokens]", ("int32", "int64"))
        return
    check_dtype("kv_append", "block_table", block_table, "int32")
    check_shape("kv_append", "block_table", block_table, (None, None), "[batch, max_pages]")
    check_last_axis("kv_append", "block_table", block_table)
    check_element_strides("kv_append", "block_table", block_table)
    _check_index("positions", positions, tokens, "[tokens]")
    if batch_indices is not None:
        _check_index("batch_indices", batch_indices, tokens, "[tokens]")
    elif tokens != block_table.shape[0]:
        raise ValueError(f"kv_append: batch_indices must be given unless there is one token per sequence, got {tokens} "
                         f"tokens for {block_table.shape[0]} rows of block_table")


def kv_append(k, v, k_cache, v_cache, /, *, slots=None, block_table=None, positions=None, batch_indices=None):
    """Write the keys and values of new tokens into a paged or contiguous cache, in place.

    k_cache[page, slot, h] = k[t, h],   v_cache[page, slot, h] = v[t, h]

    Say where token t goes either by ``slots[t] = page * page_size + slot``, or by ``block_table`` and ``positions``:
    page ``block_table[batch_indices[t], positions[t] // page_size]``, slot ``positions[t] % page_size``.

    Parameters
    ----------
    k : ndarray [tokens, num_kv_heads, head_dim], float16, bfloat16 or float32
        Keys after RoPE. Tokens and heads may be strided (a slice of a fused projection).
    v : ndarray [tokens, num_kv_heads, head_dim_v], dtype of k
    k_cache : ndarray [num_pages, page_size, num_kv_heads, head_dim], float16, bfloat16 or float32
        Any strides with a contiguous last axis: ``transpose(0, 2, 1, 3)`` of a head-major pool, or a contiguous cache
        [batch, capacity, num_kv_heads, head_dim] as pages of `capacity` tokens. Slots not named keep their bits.
        The caches are written: they overlap neither each other nor `k` and `v`.
    v_cache : ndarray [num_pages, page_size, num_kv_heads, head_dim_v], dtype of k_cache
    slots : ndarray [tokens], int32 or int64, optional
        -1 skips the token.
    block_table : ndarray [batch, max_pages], int32, optional
        Page ids of every sequence; entries no new token falls on are not read.
    positions : ndarray [tokens], int32, optional
        Index of the token in its sequence, 0 for the first; -1 skips the token. Goes with `block_table`.
    batch_indices : ndarray [tokens], int32, optional
        Row of `block_table` the token belongs to. Default: token t is the one new token of sequence t.

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, or an unsupported dtype.
    ValueError
        Shapes or strides that do not fit; for NumPy arrays also a place outside the cache or named twice. With CuPy
        arrays a place outside the cache writes nothing, and which of two tokens for one place wins is open.

    Notes
    -----
    A cache of k's dtype receives its bits, any other one rounding. On CuPy arrays asynchronous on the current stream.
    Kernel: ``cuda_src/kv_append.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> k_cache, v_cache = np.zeros((2, 4, 1, 2), np.float32), np.zeros((2, 4, 1, 2), np.float32)
    >>> cupyattn.kv_append(np.float32([[[1, 2]]]), np.float32([[[3, 4]]]), k_cache, v_cache, slots=np.int32([5]))
    >>> k_cache[1, 1]
    array([[1., 2.]], dtype=float32)
    """
    xp = array_namespace("kv_append", k=k, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots,
                         block_table=block_table, positions=positions, batch_indices=batch_indices)
    new, cache = _check_metadata(k, v, k_cache, v_cache)
    tokens, num_kv_heads, head_dim = k.shape
    head_dim_v = v.shape[2]
    _check_choice(tokens, slots, block_table, positions, batch_indices)
    if k.size + v.size == 0:
        return
    if xp is np:
        _check_places(k_cache, slots, block_table, positions, batch_indices)
    elif env.check():
        _check_places(k_cache, *(None if a is None else a.get() for a in (slots, block_table, positions,
                                                                          batch_indices)))
    plan = _plan_kv_append(tokens, num_kv_heads, head_dim, head_dim_v, new, cache,
                           min(alignment(a) for a in (k, v, k_cache, v_cache)), arch_of(xp))
    by_table = block_table is not None
    table = page_table(block_table, k_cache) if by_table else {
        "block_table": None, "indptr": None, "block_ptrs": None, "row_starts": None, "stride_seq": 0, "max_pages": 0,
        "page_size": k_cache.shape[1],
        "num_pages": k_cache.shape[0], "reserved": 0}
    wide = not by_table and slots.dtype.itemsize == 8
    launch(plan, make_args(
        plan, k=head_view(k), v=head_view(v), k_cache=kv_view(k_cache), v_cache=kv_view(v_cache), table=table,
        slots32=None if wide else slots, slots64=slots if wide else None, positions=positions,
        batch_indices=batch_indices, stride_slot=0 if by_table else strides(slots)[0],
        stride_position=strides(positions)[0] if by_table else 0,
        stride_batch_index=0 if batch_indices is None else strides(batch_indices)[0], tokens=tokens,
        batch=block_table.shape[0] if by_table else 0, num_kv_heads=num_kv_heads, head_dim=head_dim,
        head_dim_v=head_dim_v, reserved=0))
