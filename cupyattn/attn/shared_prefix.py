# SPDX-License-Identifier: Apache-2.0
"""Sequences that begin with the same pages, found in a page table in host memory."""

from typing import NamedTuple

import numpy as np

from .work_list import KEY_TILE, OVERHEAD


def shared_prefixes(table, page_size, seqlens, q_lens, unit, eligible):
    """Groups of sequences whose keys begin alike, each sequence in one group at most.

    Only whole pages count, and only keys before every query of every member: then all of them see all of the prefix.
    A group of n members with a prefix of t key tiles saves t * (n - 1) tiles of reading and costs an item and a merge
    per member, OVERHEAD + n. A group has one prefix: where prefixes are nested, shorter ones are looked at after longer
    ones and take over the groups and sequences that save less on their own.

    Parameters
    ----------
    table : PageTable
        With arrays in host memory.
    page_size : int
    seqlens, q_lens : int ndarray [batch]
        Tokens to attend to, the new ones included, and query tokens.
    unit : int
        Prefixes are cut down to a multiple of so many keys, a multiple of 64.
    eligible : bool ndarray [batch]
        Sequences that may be in a group.

    Returns
    -------
    list of (int, ndarray)
        Keys of the prefix, and the sequences that have it, ascending.
    """
    if not table.max_pages:
        return []
    if table.form == "dense":
        heads = table.block_table[:, 0].tolist()
    else:   # that of an empty list is another's, but it has no pages
        entries = table.block_ptrs if table.form == "pointers" else table.block_table
        heads = entries[np.minimum(table.indptr[:-1], len(entries) - 1)].tolist()
    if len(set(heads)) == len(heads):
        return []
    first, entries = _rows(table)
    pages = (np.asarray(seqlens, np.int64) - q_lens) // page_size
    pages[~eligible | (pages * page_size < unit)] = 0
    alike = {}   # sequences by query tokens and first page
    for b in np.flatnonzero(pages > 0).tolist():
        alike.setdefault((q_lens[b], heads[b]), []).append(b)
    found = []
    for candidates in alike.values():
        if len(candidates) > 1:
            candidates = np.array(candidates)
            found += _group(candidates, first, entries, pages, page_size, unit)
    return found


def _rows(table):
    """(index of each sequence's first entry, entries): page ids or addresses of blocks in one array."""
    if table.form == "dense":
        rows = np.ascontiguousarray(table.block_table)
        return np.arange(table.batch) * rows.shape[1], rows.reshape(-1)
    return table.indptr[:-1].astype(np.int64), table.block_ptrs if table.form == "pointers" else table.block_table


def _group(candidates, first, entries, pages, page_size, unit):
    """Groups among `candidates`: rows of pages sorted, neighbours compared, the tree of common prefixes walked."""
    width = int(pages[candidates].max())
    column = np.arange(width)
    inside = column < pages[candidates][:, None]
    rows = np.where(inside, entries[np.minimum(first[candidates][:, None] + column, len(entries) - 1)], -1)
    order = np.argsort(rows.view(f"V{rows.itemsize * width}")[:, 0], kind="stable")   # by bytes, which will do
    rows, candidates = rows[order], candidates[order]
    differ = (rows[1:] != rows[:-1]) | (rows[1:] == -1)
    common = np.where(differ.any(axis=1), differ.argmax(axis=1), width)
    depths = common * page_size // unit * (unit // KEY_TILE)                          # in key tiles
    stack = []   # (depth, parts of the sequences that have so many tiles in common), depths increasing
    for sequence, depth in zip(candidates.tolist(), [*depths.tolist(), -1], strict=True):
        parts = [Part([sequence], 0, 0)]
        while stack and stack[-1][0] > depth:
            deeper, others = stack.pop()
            parts = _join(deeper, others + parts)
        if stack and stack[-1][0] == depth:
            stack[-1][1].extend(parts)
        else:
            stack.append((depth, parts))
    return [(part.tiles * KEY_TILE, np.sort(part.members)) for part in stack[-1][1] if part.tiles]


class Part(NamedTuple):
    """A group, or one sequence that is in none."""

    members: list
    tiles: int   # of the prefix
    saved: int   # see `shared_prefixes`


def _join(depth, parts):
    """`parts`, which all have `depth` tiles in common, with those joined to one group that save less on their own."""
    joined = [part for part in parts if (depth - 1) * len(part.members) > part.saved]
    members = [b for part in joined for b in part.members]
    saved = depth * (len(members) - 1) - OVERHEAD - len(members)
    if saved <= sum(part.saved for part in joined):
        return parts
    return [Part(members, depth, saved), *(part for part in parts if (depth - 1) * len(part.members) <= part.saved)]
