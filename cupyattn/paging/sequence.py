# SPDX-License-Identifier: Apache-2.0
"""The pages of one sequence whose tokens are known, so that others may share them."""

from array import array

from ..runtime.checks import check_number


def token_list(tokens):
    """Any integers that fit 64 bits as a list; TypeError or OverflowError for others."""
    return array("q", tokens).tolist()


class PageSequence:
    """Pages that hold the keys and values of one sequence; `PageManager.sequence` makes it.

    A step is: `reserve` room, make the copies it asks for, compute (`PagedCache.step` does the first two for a batch),
    then `append` the tokens that are in the cache now. Pages that others hold, too, are never written to.

    `free` gives up the pages; so does the end of ``with manager.sequence(...) as sequence:``, and so does a sequence to
    which nothing refers any more: keep it as long as a step reads its pages.

    Attributes
    ----------
    pages : list of int
        In order; a row of the block table. Those past num_tokens are reserved. Not to be changed.
    num_tokens : int
        Tokens whose keys and values are in the cache.
    room : int
        Tokens that may be appended now.

    Examples
    --------
    >>> import cupyattn
    >>> manager = cupyattn.PageManager(num_pages=8, page_size=4)
    >>> first = manager.sequence([11, 12, 13, 14, 15, 16])   # nothing is known yet
    >>> first.reserve(7), first.pages
    ({}, [0, 1])
    >>> first.append([11, 12, 13, 14, 15, 16, 17])
    >>> second = manager.sequence([11, 12, 13, 14, 15, 16, 20])
    >>> second
    PageSequence(6 tokens on pages [0, 1], room for 0 more)
    >>> second.reserve(1)                                    # page 1 is the other's: to be copied, 2 tokens
    {(1, 2): 2}
    >>> second.append([20])
    >>> second.truncate(6)                                 # a verifier has refused 20
    >>> first.free()
    >>> print(manager)
    PageManager(num_pages=8, page_size=4, reserved=[], num_free=6): 2 held, 6 free, 1 of these remembered
      page 0: 1 holder, 4 tokens: 11 12 13 14
        page 1: no holders, 3 tokens: 15 16 17
        page 2: 1 holder, 2 tokens: 15 16
    """

    def __init__(self, manager, pages, num_tokens, salt):
        self._manager, self._salt = manager, salt  # salt None: not in the index
        self.pages, self.num_tokens, self.room = pages, num_tokens, 0

    def __repr__(self):
        return f"PageSequence({self.num_tokens} tokens on pages {self.pages}, room for {self.room} more)"

    def reserve(self, count):
        """Make room for `count` more tokens.

        Returns
        -------
        dict {(int, int): int}
            ``(a, b): n`` where the first n tokens of page a must be copied to page b before anything is written; at
            most one.

        Raises
        ------
        MemoryError
            There are too few free pages; nothing has changed.
        """
        check_number("PageSequence.reserve", "count", count, least=0, integer=True)
        manager, size = self._manager, self._manager.page_size
        with manager._exclusive():
            if count <= self.room:
                return {}
            at, used = divmod(self.num_tokens, size)
            missing = manager.pages_for(self.num_tokens + count) - len(self.pages)
            begun = bool(used) and self.room == 0  # the next token goes to a page that may be another's, too
            shared = begun and manager.ref_count(self.pages[at]) > 1
            if missing + shared > manager.num_free:
                raise MemoryError(self._shortage(count, missing, shared))
            copies = {}
            if shared or begun and self._goes_on(at, used) and manager.num_free:
                copies = {self._leave(at, used): used}
            elif begun and self._goes_on(at, used):
                self._cut(at, used)
            self.pages += [manager._grant() for _ in range(missing)]
            self.room = len(self.pages) * size - self.num_tokens
            return copies

    def _goes_on(self, at, used):
        """Whether more is known to be in page `at` than the first `used` tokens."""
        return self._salt is not None and len(self._manager._index.tokens(self.pages[at])) > used

    def _leave(self, at, used):
        """Give up page `at` for a new one, which gets the first `used` tokens; (page, new page)."""
        manager = self._manager
        source, self.pages[at] = self.pages[at], manager._grant()
        if self._salt is not None:
            manager._index.add(self.pages[at], self._parent(at), manager._index.tokens(source)[:used])
        manager._release(source)
        return source, self.pages[at]

    def _cut(self, at, used):
        """Forget the tokens after the first `used` of page `at`, which nobody else holds."""
        for page in self._manager._index.cut(self.pages[at], used):
            self._manager._empty(page)

    def _parent(self, at):
        return self.pages[at - 1] if at else self._salt

    def _shortage(self, count, missing, shared):
        manager = self._manager
        total = self.num_tokens + count
        needed = manager.pages_for(total)
        if needed > manager.capacity:
            return (f"PageSequence.reserve: {total} tokens need {needed} pages of {manager.page_size}, more than the "
                    f"{manager.capacity} of the cache")
        copied = ", 1 of them for a copy of a shared one" if shared else ""
        return (f"PageSequence.reserve: {count} tokens after {self.num_tokens} need {missing + shared} more pages of "
                f"{manager.page_size}{copied}, got {manager.num_free} free of {manager.capacity}")

    def append(self, tokens):
        """These tokens are in the cache now. A page that has become full gives way to one that holds the same.

        Parameters
        ----------
        tokens : sequence of int
            At most `room`.
        """
        tokens = token_list(tokens)
        manager, size = self._manager, self._manager.page_size
        if len(tokens) > self.room:
            raise ValueError(f"PageSequence.append: tokens must be at most {self.room}, the room reserved, got "
                             f"{len(tokens)}")
        with manager._exclusive():
            while tokens:
                at, used = divmod(self.num_tokens, size)
                part, tokens = tokens[:size - used], tokens[size - used:]
                if self._salt is not None:
                    self._record(at, used, part)
                self.num_tokens += len(part)
                self.room -= len(part)

    def _record(self, at, used, part):
        """Page `at` has got `part` after its `used` tokens."""
        manager, page = self._manager, self.pages[at]
        twin = manager._index.extend(page, part) if used else manager._index.add(page, self._parent(at), part)
        if twin is not None:
            manager._hold(twin)
            self.pages[at] = twin
            manager._release(page)
            if manager.ref_count(page) == 0:
                manager._forget(page)

    def truncate(self, num_tokens):
        """Take back the tokens from `num_tokens` on, e.g. a draft's that its verifier refused, and reserved pages.

        They are not found any more unless others hold them.
        """
        check_number("PageSequence.truncate", "num_tokens", num_tokens, integer=True)
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"PageSequence.truncate: num_tokens must be from 0 to {self.num_tokens}, got {num_tokens}")
        manager = self._manager
        with manager._exclusive():
            kept = manager.pages_for(num_tokens)
            for page in reversed(self.pages[kept:]):
                manager._take_back(page)
            del self.pages[kept:]
            used = num_tokens % manager.page_size
            if num_tokens < self.num_tokens and used and manager.ref_count(self.pages[-1]) == 1 \
                    and self._goes_on(kept - 1, used):
                self._cut(kept - 1, used)
            self.num_tokens, self.room = num_tokens, 0

    def fork(self):
        """A second sequence of the same tokens on the same pages; the first to go on copies the page in which it does.

        Returns
        -------
        PageSequence
        """
        manager = self._manager
        with manager._exclusive():
            pages = self.pages[:manager.pages_for(self.num_tokens)]
            return manager._new_sequence(pages, self.num_tokens, self._salt)

    def free(self):
        """Give up all pages; what is in them is remembered while nobody needs them. The sequence is empty then."""
        manager = self._manager
        with manager._exclusive():
            manager._release_all(self.pages)
            self.num_tokens = self.room = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.free()
