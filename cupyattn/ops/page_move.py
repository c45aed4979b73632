# SPDX-License-Identifier: Apache-2.0
"""Copying pages within the pools of a cache. Kernel: ``cuda_src/page_move.cu``."""

import functools
from typing import NamedTuple

import numpy as np

from ..devices import to_host
from ..kv.quantized import BlockKV, QuantizedKV
from ..runtime import Plan, Specialisation, arch_of, env, launch, make_args
from ..runtime.arrays import array_namespace, strides
from ..runtime.checks import check_array, check_writeable, value_range
from ..runtime.structs import address

MAX_POOLS = 8   # fields of PagePools
_OP = "page_move"
_WORDS = {16: ("uint32_t", 4), 8: ("uint32_t", 2), 4: ("uint32_t", 1), 2: ("uint16_t", 1), 1: ("uint8_t", 1)}


def _spec(width):
    word, vec = _WORDS[width]
    return Specialisation(_OP, _OP, "PageMoveArgs", {"WORD": word, "VEC": vec})


CORE = [_spec(width) for width in _WORDS]


class _Layout(NamedTuple):
    """Where the bytes of a pool are; pools with equal ones share a launch."""

    stride_page: int
    stride_token: int
    stride_outer: int
    stride_inner: int
    outer: int
    inner: int
    row: int       # adjacent bytes
    width: int     # bytes per access


@functools.lru_cache(maxsize=4096)
def _layout(shape, steps, itemsize, alignment):
    """_Layout of an array [num_pages, page_size, ...] with strides of `steps` bytes, at an address that `alignment`, a
    power of two, divides; None for one with too many axes that are apart."""
    row, axes = itemsize, [(n, s) for n, s in zip(shape[2:], steps[2:], strict=True) if n != 1]
    while axes and axes[-1][1] == row:
        row *= axes.pop()[0]
    merged = axes[:1]
    for size, step in axes[1:]:
        outer, outer_step = merged[-1]
        if outer_step == size * step:
            merged[-1] = (outer * size, step)
        else:
            merged.append((size, step))
    if len(merged) > 2:
        return None
    (outer, outer_step), (inner, inner_step) = [(1, 0)] * (2 - len(merged)) + merged
    bits = 16 | alignment | row | outer_step | inner_step
    for size, step in zip(shape[:2], steps[:2], strict=True):
        bits |= step if size > 1 else 0
    return _Layout(steps[0], steps[1], outer_step, inner_step, outer, inner, row, bits & -bits)


@functools.lru_cache(maxsize=4096)
def _plan_page_move(moves, pools, page_bytes, width, arch):
    """(Plan, blocks of a move) from counts, bytes of a page, bytes per access and arch."""
    note = f"{width} bytes per access"
    if arch == "cpu":
        slices, threads = 1, 1
    else:   # a thread makes 8 accesses, twice 4 at a time
        slices, threads = max(1, min(1024, page_bytes // (width * 128 * 8))), 128
    return Plan(_spec(width), arch, (moves * slices, pools), (threads,), note=note), slices


def _arrays(pools):
    """Name of the argument -> array, for all that is in pages."""
    found = {}
    several = isinstance(pools, list | tuple)
    for i, pool in enumerate(pools if several else [pools]):
        name = f"pools[{i}]" if several else "pools"
        if isinstance(pool, BlockKV):
            raise TypeError(f"{_OP}: {name} must be an array or a QuantizedKV, got a BlockKV")
        if not isinstance(pool, QuantizedKV):
            found[name] = pool
            continue
        found |= {f"{name}.{part}": array for part, array in pool.arrays_in_pages.items()}
    return found


def _check_pools(arrays):
    """All have the same pages of the same size; (num_pages, page_size)."""
    first, sizes = None, None
    for name, array in arrays.items():
        if array.ndim < 2:
            raise ValueError(f"{_OP}: {name} must be [num_pages, page_size, ...], got {list(array.shape)}")
        if sizes is None:
            first, sizes = name, array.shape[:2]
        if array.shape[:2] != sizes:
            raise ValueError(f"{_OP}: {name} must have the num_pages and page_size of {first}, {list(sizes)}, got "
                             f"{list(array.shape[:2])}")
        check_writeable(_OP, name, array)
    return sizes


def _check_content(num_pages, page_size, sources, destinations, tokens):
    """Ids are in range and no page is a destination and anything else. Copies CuPy arrays to the host."""
    sources, destinations = to_host(sources), to_host(destinations)
    for name, ids in (("sources", sources), ("destinations", destinations)):
        if ids.size and ids.max() >= num_pages:
            raise ValueError(f"{_OP}: {name} must be below the {num_pages} pages of the pools, or negative for no "
                             f"move, got {ids.max()}")
    moves = [(a, b) for a, b in zip(sources.tolist(), destinations.tolist(), strict=True) if a >= 0 and b >= 0]
    read, written = {a for a, _ in moves}, set()
    for _, page in moves:
        if page in written:
            raise ValueError(f"{_OP}: destinations must name a page once, got page {page} twice")
        if page in read:
            raise ValueError(f"{_OP}: destinations must be no sources, got page {page} in both; moves have no order, "
                             "make two calls")
        written.add(page)
    if tokens is not None and tokens.size:
        low, high = value_range(to_host(tokens))
        if low < 0 or high > page_size:
            raise ValueError(f"{_OP}: tokens must be from 0 to the page_size {page_size}, got "
                             f"{low if low < 0 else high}")


def page_move(pools, sources, destinations, /, *, tokens=None):
    """Copy pages to other places of the same pools, e.g. to close gaps, or for a sequence that leaves a shared prefix.

    pool[destinations[i], :tokens[i]] = pool[sources[i], :tokens[i]]   for every move i and every pool

    The pages' meaning does not matter: the bytes are copied, so attention gives the same bits once the page tables
    name the new places.

    Parameters
    ----------
    pools : ndarray [num_pages, page_size, ...] or QuantizedKV, or a list of these
        Keys and values of one layer or of all, e.g. ``[*cache.k, *cache.v]`` of a `PagedCache`: any dtypes and formats,
        all with the same pages. Scales and zeros per token go along. Any strides, as long as at most two axes behind
        page_size are apart in memory. Changed in place.
    sources, destinations : ndarray [moves], int32
        Page ids; a negative one makes a move none. A page may be the source of several moves. A destination is that of
        one move only, and the source of none.
    tokens : ndarray [moves], int32, optional
        Tokens to copy of each page, from its first on. Default: all of them.

    Raises
    ------
    TypeError
        NumPy and CuPy arrays mixed, a `BlockKV`, or lists that are not int32.
    ValueError
        Pools that do not fit each other, or too many axes that are apart. For NumPy arrays also ids out of range and
        destinations that are named twice or are sources; for CuPy arrays only with ``CUPYATTN_CHECK=1``, else an id out
        of range makes a move none, and a page that is both gets a mixture.

    Notes
    -----
    Each byte is read once and written once, 16 at a time where addresses allow. Up to 8 pools that are laid out alike
    share a launch. On CuPy arrays asynchronous on the current stream. Kernel: ``cuda_src/page_move.cu``.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> pool = np.arange(8, dtype=np.int8).reshape(4, 2)     # 4 pages of 2 tokens
    >>> cupyattn.page_move(pool, np.int32([3, 2]), np.int32([0, 1]), tokens=np.int32([2, 1]))
    >>> pool.tolist()
    [[6, 7], [4, 3], [4, 5], [6, 7]]
    """
    arrays = _arrays(pools)
    xp = array_namespace(_OP, sources=sources, destinations=destinations, tokens=tokens, **arrays)
    moves = sources.shape[0] if sources.ndim == 1 else None
    lists = {"sources": sources, "destinations": destinations, "tokens": tokens}
    for name, array in lists.items():
        if array is not None:
            check_array(_OP, name, array, "int32", (moves,), "[moves]", contiguous=False)
    if not arrays:
        return
    num_pages, page_size = _check_pools(arrays)
    alike = {}   # _Layout -> arrays
    for name, array in arrays.items():
        at = address(array) | 16
        layout = _layout(array.shape, array.strides, array.itemsize, at & -at)
        if layout is None:
            raise ValueError(f"{_OP}: {name} must have at most two axes behind page_size that are apart in memory, got "
                             f"strides {array.strides} for shape {list(array.shape)}")
        if array.size:
            alike.setdefault(layout, []).append(array)
    if xp is np or env.check():
        _check_content(num_pages, page_size, sources, destinations, tokens)
    if moves == 0:
        return
    steps = {f"stride_{field}": 0 if lists[name] is None else strides(lists[name])[0] for field, name in (
        ("source", "sources"), ("destination", "destinations"), ("tokens", "tokens"))}
    for layout, some in alike.items():
        for first in range(0, len(some), MAX_POOLS):
            _launch(xp, layout, some[first:first + MAX_POOLS], num_pages, page_size, moves, lists | steps)


def _launch(xp, layout, pools, num_pages, page_size, moves, fields):
    token_bytes = layout.outer * layout.inner * layout.row
    plan, slices = _plan_page_move(moves, len(pools), page_size * token_bytes, layout.width, arch_of(xp))
    is_flat = layout.outer == layout.inner == 1 and (layout.stride_token == layout.row or page_size == 1)
    pointers = [*pools, *[None] * (MAX_POOLS - len(pools))]
    launch(plan, make_args(
        plan, pools={f"pool{i}": pool for i, pool in enumerate(pointers)}, stride_page=layout.stride_page,
        stride_token=layout.stride_token, stride_outer=layout.stride_outer, stride_inner=layout.stride_inner,
        num_pages=num_pages, page_size=page_size, outer=layout.outer, inner=layout.inner,
        pieces=layout.row // layout.width, slices=slices, is_flat=int(is_flat), reserved=0, **fields))
