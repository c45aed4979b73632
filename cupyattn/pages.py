# SPDX-License-Identifier: Apache-2.0
"""Which page belongs to whom: the one page manager behind every paged cache."""

import threading
from collections import Counter, deque

import numpy as np


class PageManager:
    """Hands out page ids first in, first out, and counts who holds them. It owns no cache memory.

    A page goes back to the end of the free queue when the last of its holders has freed it. Every method is atomic:
    it either does everything it was asked or, on an error or a lack of pages, changes nothing; threads may share one
    manager.

    Parameters
    ----------
    num_pages : int
        Pages of the cache; ids are ``0 .. num_pages - 1``.
    page_size : int
        Tokens per page.
    reserved : iterable of int, optional
        Ids that are never handed out, e.g. ``[0]`` where page 0 is a dummy.

    Examples
    --------
    >>> manager = PageManager(num_pages=8, page_size=16, reserved=[0])
    >>> pages = manager.allocate_tokens(20)
    >>> pages
    [1, 2]
    >>> manager.grow(pages, 33), pages
    (True, [1, 2, 3])
    >>> manager.slots_for(pages, [0, 16, 32]).tolist()
    [16, 32, 48]
    >>> manager.allocate(5)  # only 4 are free: nothing is granted
    []
    >>> manager.free(pages)
    >>> manager.num_free
    7
    """

    def __init__(self, num_pages, page_size, *, reserved=()):
        self.num_pages = _count("num_pages", num_pages, least=0)
        self.page_size = _count("page_size", page_size, least=1)
        self.reserved = frozenset(_count("reserved", page, least=0) for page in reserved)
        outside = [page for page in self.reserved if page >= num_pages]
        if outside:
            raise ValueError(f"PageManager: reserved must hold ids below num_pages = {num_pages}, got {outside[0]}")
        self._free = deque(page for page in range(num_pages) if page not in self.reserved)
        self._holders = {}  # page -> number of holders, only pages in use
        self._lock = threading.Lock()

    def __repr__(self):
        return (f"PageManager(num_pages={self.num_pages}, page_size={self.page_size}, "
                f"reserved={sorted(self.reserved)}, num_free={self.num_free})")

    @property
    def capacity(self):
        """Pages that can be in use at once: all but the reserved ones."""
        return self.num_pages - len(self.reserved)

    @property
    def num_free(self):
        """Pages that can be allocated now."""
        return len(self._free)

    def ref_count(self, page):
        """Holders of `page`; 0 when it is free or reserved."""
        return self._holders.get(page, 0)

    def pages_for(self, num_tokens):
        """Pages that `num_tokens` tokens occupy."""
        return -(-_count("num_tokens", num_tokens, least=0) // self.page_size)

    def allocate(self, count):
        """Take `count` pages from the front of the free queue.

        Returns
        -------
        list of int
            Empty when fewer than `count` pages are free, or when `count` is not positive.
        """
        with self._lock:
            if not 0 < count <= len(self._free):
                return []
            pages = [self._free.popleft() for _ in range(count)]
            self._holders.update(dict.fromkeys(pages, 1))
            return pages

    def allocate_tokens(self, num_tokens):
        """Take as many pages as a prompt of `num_tokens` tokens needs; as `allocate` otherwise."""
        return self.allocate(self.pages_for(num_tokens))

    def grow(self, pages, num_tokens):
        """Extend the list `pages` in place until it holds `num_tokens` tokens.

        Returns
        -------
        bool
            False when there are too few free pages; `pages` is then unchanged.
        """
        missing = self.pages_for(num_tokens) - len(pages)
        if missing <= 0:
            return True
        more = self.allocate(missing)
        pages += more
        return bool(more)

    def share(self, pages):
        """Add a holder to each of `pages`, e.g. for a second sequence with the same prompt.

        Each holder frees the pages once. A page that will still be written to must not be shared: allocate one more
        page and copy its tokens instead.

        Returns
        -------
        list of int
            A new list with the same ids.

        Raises
        ------
        ValueError
            A page is not in use.
        """
        pages = list(pages)
        with self._lock:
            for page in pages:
                if page not in self._holders:
                    raise ValueError(f"PageManager.share: pages must be in use, got {self._describe(page)}")
            for page in pages:
                self._holders[page] += 1
        return pages

    def free(self, pages):
        """Give up one hold on each of `pages`; pages without a holder join the end of the free queue in this order.

        Raises
        ------
        ValueError
            A page is not in use, or named more often than it has holders (a double free).
        """
        pages = list(pages)
        with self._lock:
            for page, times in Counter(pages).items():
                holders = self._holders.get(page, 0)
                if holders == 0:
                    raise ValueError(f"PageManager.free: pages must be in use, got {self._describe(page)}")
                if times > holders:
                    raise ValueError(f"PageManager.free: pages must name a page at most once per holder, got page "
                                     f"{page} {times} times with {holders} holder{'s' if holders > 1 else ''}")
            for page in pages:
                self._holders[page] -= 1
                if self._holders[page] == 0:
                    del self._holders[page]
                    self._free.append(page)

    def _describe(self, page):
        if page in self.reserved:
            return f"page {page}, which is reserved"
        if page in range(self.num_pages):
            return f"page {page}, which is already free"
        return f"{page!r}, which is no page id in [0, {self.num_pages})"

    def slots_for(self, pages, positions):
        """Flat cache slots ``pages[p // page_size] * page_size + p % page_size`` of one sequence's positions.

        Parameters
        ----------
        pages : sequence of int
            Pages of the sequence in order.
        positions : int array [tokens]

        Returns
        -------
        ndarray [tokens], int64
            What ``kv_append`` takes as `slots`.
        """
        positions = np.asarray(positions, dtype=np.int64)
        limit = len(pages) * self.page_size
        if positions.size and not (0 <= positions.min() and positions.max() < limit):
            raise ValueError(f"PageManager.slots_for: positions must be in [0, {limit}), the {len(pages)} pages given, "
                             f"got {positions.min()} .. {positions.max()}")
        page = np.asarray(pages, dtype=np.int64)[positions // self.page_size]
        return page * self.page_size + positions % self.page_size

    def block_table(self, sequences, *, max_pages=None):
        """Pages of several sequences as the table the attention ops read.

        Parameters
        ----------
        sequences : sequence of sequences of int
            Pages of each sequence in order.
        max_pages : int, optional
            Columns of the table. Default: the longest sequence, at least 1.

        Returns
        -------
        ndarray [batch, max_pages], int32
            -1 past the end of a sequence.
        """
        longest = max(map(len, sequences), default=0)
        max_pages = max(longest, 1) if max_pages is None else max_pages
        if longest > max_pages:
            raise ValueError(f"PageManager.block_table: max_pages must be at least {longest}, the longest sequence, "
                             f"got {max_pages}")
        table = np.full((len(sequences), max_pages), -1, dtype=np.int32)
        for row, pages in zip(table, sequences, strict=True):
            row[:len(pages)] = pages
        return table


def _count(name, value, *, least):
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"PageManager: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"PageManager: {name} must be at least {least}, got {value}")
    return int(value)
