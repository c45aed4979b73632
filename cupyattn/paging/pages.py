# SPDX-License-Identifier: Apache-2.0
"""Which page belongs to whom: the one page manager behind every paged cache."""

import contextlib
import threading
import weakref
from collections import Counter, deque

import numpy as np

from .defragmentation import layout, rounds
from .prefix_index import PrefixIndex
from .sequence import PageSequence, token_list


class PageManager:
    """Hands out page ids first in, first out, and counts who holds them. It owns no cache memory.

    A page goes back to the end of the free queue when the last of its holders has freed it. Every method is atomic:
    it either does everything it was asked or, on an error or a lack of pages, changes nothing; threads may share one
    manager.

    There are two ways to hold pages: as plain lists (`allocate`, `grow`, `share`, `free`), or as `sequence`, which
    knows its tokens. Pages of freed sequences count as free but are remembered: they are granted only when no other is
    left, those released the longest ago first and the end of a text before its beginning, and until then a sequence
    that begins with the same tokens finds them. ``print(manager)`` shows what is known of every page.

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
        self._index = PrefixIndex(self.page_size)
        self._remembered = {}  # free pages in the index, the next to be granted first; a page after all that follow it
        self._sequences = weakref.WeakSet()  # for `defragment`
        self._dropped = deque()  # pages of sequences that are gone and were not freed
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def _exclusive(self):
        """The state for one thread; sequences that nobody refers to any more have given up their pages.

        They do it here, as a finalizer may run in the midst of anything.
        """
        with self._lock:
            while self._dropped:
                self._release_all(self._dropped.popleft())
            yield

    def __repr__(self):
        return (f"PageManager(num_pages={self.num_pages}, page_size={self.page_size}, "
                f"reserved={sorted(self.reserved)}, num_free={self.num_free})")

    def __str__(self):
        with self._exclusive():
            lines = [f"{self!r}: {len(self._holders)} held, {self.num_free} free, {self.num_remembered} of these "
                     "remembered"]
            for depth, page in self._index.walk():
                tokens, holders = self._index.tokens(page), self.ref_count(page)
                shown = " ".join(map(str, tokens[:6])) + " ..." * (len(tokens) > 6)
                lines.append(f"{'  ' * depth}  page {page}: {holders or 'no'} holder{'s' * (holders != 1)}, "
                             f"{len(tokens)} token{'s' * (len(tokens) != 1)}: {shown}")
            return "\n".join(lines)

    @property
    def capacity(self):
        """Pages that can be in use at once: all but the reserved ones."""
        return self.num_pages - len(self.reserved)

    @property
    def num_free(self):
        """Pages that can be allocated now, those remembered included."""
        with self._exclusive():
            return len(self._free) + len(self._remembered)

    @property
    def num_remembered(self):
        """Free pages whose tokens a sequence could still find."""
        with self._exclusive():
            return len(self._remembered)

    def ref_count(self, page):
        """Holders of `page`; 0 when it is free or reserved."""
        with self._exclusive():
            return self._holders.get(page, 0)

    def __contains__(self, sequence):
        """Whether it is a sequence of this manager."""
        return sequence in self._sequences

    def pages_for(self, num_tokens):
        """Pages that `num_tokens` tokens occupy."""
        return -(-_count("num_tokens", num_tokens, least=0) // self.page_size)

    def allocate(self, count):
        """Take `count` pages from the front of the free queue, then those remembered.

        Returns
        -------
        list of int
            Empty when fewer than `count` pages are free, or when `count` is not positive.
        """
        count = _count("count", count)
        with self._exclusive():
            return [self._grant() for _ in range(count)] if 0 < count <= self.num_free else []

    def _grant(self):
        """A free page for one holder; there is one."""
        if not self._free:
            self._forget_oldest()
        page = self._free.popleft()
        self._holders[page] = 1
        return page

    def _forget_oldest(self):
        """One remembered page becomes empty: that released first, or the end of a text that goes on from it."""
        page, below = None, next(iter(self._remembered))
        while below is not None:
            page = below
            below = next((child for child in self._index.children(page) if child in self._remembered), None)
        self._forget(page)

    def _forget(self, page):
        """What is in `page`, and what came after it, cannot be found any more; those without a holder are empty."""
        for each in self._index.forget(page):
            self._empty(each)

    def _empty(self, page):
        if page in self._remembered:
            del self._remembered[page]
            self._free.append(page)

    def _hold(self, page):
        """One more holder of a page in use or remembered."""
        self._remembered.pop(page, None)
        self._holders[page] = self._holders.get(page, 0) + 1

    def _release(self, page):
        """One holder less."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            del self._holders[page]
            if page in self._index:
                self._remembered[page] = None
            else:
                self._free.append(page)

    def _release_all(self, pages):
        """One holder less for each page of a sequence, the end of its text first; the list is empty then."""
        while pages:
            self._release(pages.pop())

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
        if not isinstance(pages, list):
            raise TypeError(f"PageManager.grow: pages must be a list, to be extended, got {type(pages).__name__}")
        missing = self.pages_for(num_tokens) - len(pages)
        if missing <= 0:
            return True
        more = self.allocate(missing)
        pages += more
        return bool(more)

    def _take_back(self, page):
        """As `_release`, but without a holder it is empty, and the next to be granted."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            del self._holders[page]
            if page in self._index:
                self._forget(page)
            self._free.appendleft(page)

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
        with self._exclusive():
            for page in pages:
                if page not in self._holders:
                    raise ValueError(f"PageManager.share: pages must be in use, got {self._describe(page)}")
            for page in pages:
                self._hold(page)
        return pages

    def free(self, pages):
        """Give up one hold on each of `pages`; pages without a holder join the end of the free queue in this order.

        Raises
        ------
        ValueError
            A page is not in use, or named more often than it has holders (a double free).
        """
        pages = list(pages)
        with self._exclusive():
            for page, times in Counter(pages).items():
                holders = self._holders.get(page, 0)
                if holders == 0:
                    raise ValueError(f"PageManager.free: pages must be in use, got {self._describe(page)}")
                if times > holders:
                    raise ValueError(f"PageManager.free: pages must name a page at most once per holder, got page "
                                     f"{page} {times} times with {holders} holder{'s' if holders > 1 else ''}")
            for page in pages:
                self._release(page)

    def _describe(self, page):
        if page in self.reserved:
            return f"page {page}, which is reserved"
        if page in range(self.num_pages):
            return f"page {page}, which is already free"
        return f"{page!r}, which is no page id in [0, {self.num_pages})"

    def sequence(self, tokens=(), *, salt="", share_prefix=True):
        """A sequence that holds the pages on which its first tokens are already.

        Parameters
        ----------
        tokens : sequence of int, optional
            What it will begin with; leave out the last token of a prompt, whose step gives the logits.
        salt : str
            Only sequences with the same salt share pages: name what else the keys and values depend on, e.g. an
            adapter.
        share_prefix : bool
            False: it finds nothing, and nothing of it is found.

        Returns
        -------
        PageSequence
            Its `num_tokens` says how many were found.
        """
        if not isinstance(salt, str):
            raise TypeError(f"PageManager.sequence: salt must be a str, got {type(salt).__name__}")
        tokens = token_list(tokens)
        with self._exclusive():
            pages, count = self._index.match(salt, tokens) if share_prefix else ([], 0)
            return self._new_sequence(pages, count, salt if share_prefix else None)

    def _new_sequence(self, pages, num_tokens, salt):
        for page in pages:
            self._hold(page)
        made = PageSequence(self, list(pages), num_tokens, salt)
        self._sequences.add(made)
        weakref.finalize(made, self._dropped.append, made.pages).atexit = False
        return made

    def defragment(self):
        """Give every sequence pages in a row, as far as sharing permits, from the lowest id on.

        The caller must move what is in the pages, see the result (`PagedCache.defragment` does), and make new tables.
        Pages held as plain lists stay where they are. One remembered page is forgotten when there is no empty one to
        move things through; without either, pages that would have to change places stay, too.

        Returns
        -------
        list of dict {int: int}
            To be done one after the other: page a goes to page b for all ``{a: b}``, none of which is both.
        """
        with self._exclusive():
            sequences = list(self._sequences)   # none of them goes before its pages are renamed
            held = Counter(page for sequence in sequences for page in sequence.pages)
            fixed = {page for page, holders in self._holders.items() if holders != held[page]} | self.reserved
            places = [page for page in range(self.num_pages) if page not in fixed]
            chains = sorted(sequence.pages for sequence in sequences)
            wanted = layout(chains, list(self._remembered), places)
            if wanted and not self._free and self._remembered:
                self._forget_oldest()
                wanted = layout(chains, list(self._remembered), places)
            done = rounds(wanted, self._free)
            self._rename(done, places, sequences)
            return done

    def _rename(self, done, places, sequences):
        """Pages have moved as `done` says, and only among `places`."""
        now = {}   # where what was in a page is
        was = {}
        for moves in done:
            origins = [was.pop(source, source) for source in moves]
            for origin, place in zip(origins, moves.values(), strict=True):
                now[origin], was[place] = place, origin
        self._holders = {now.get(page, page): count for page, count in self._holders.items()}
        self._remembered = {now.get(page, page): None for page in self._remembered}
        self._index.rename(now)
        for sequence in sequences:
            sequence.pages[:] = [now.get(page, page) for page in sequence.pages]
        self._free = deque(page for page in places if page not in self._holders and page not in self._remembered)

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
        positions = np.asarray(positions)
        if positions.size and positions.dtype.kind not in "iu":
            raise TypeError(f"PageManager.slots_for: positions must be integers, got {positions.dtype.name}")
        positions = positions.astype(np.int64)
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


def _count(name, value, *, least=None):
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"PageManager: {name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"PageManager: {name} must be at least {least}, got {value}")
    return int(value)
