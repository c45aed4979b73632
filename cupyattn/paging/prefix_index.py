# SPDX-License-Identifier: Apache-2.0
"""Which page holds which tokens after which other tokens: what makes a prompt's beginning findable."""

import hashlib
from array import array

MIN_PART = 2   # tokens: one alone, most often that which begins every text, is not worth a copy


def chained_hash(previous, tokens):
    """Hash of a full page: of the hash of the page before it (bytes) and its tokens, so of all tokens up to its end."""
    return hashlib.blake2b(previous + array("q", tokens).tobytes(), digest_size=16).digest()


class _Content:
    """What is in a page: `tokens` that follow those of page `parent` (or a salt), and once it is full their hash."""

    __slots__ = ("parent", "tokens", "hash")

    def __init__(self, parent, tokens):
        self.parent, self.tokens, self.hash = parent, tokens, None


class PrefixIndex:
    """A tree of pages; the tokens on the way from a root to a page are those that came before it.

    Roots are salts, texts that keep apart what has the same tokens and other keys and values. Full pages are found by
    their chained hash and are then compared, so that equal hashes of different tokens share nothing; others by their
    tokens among the children of a page.
    """

    def __init__(self, page_size):
        self._page_size = page_size
        self._contents = {}  # page -> _Content
        self._children = {}  # page or salt -> its pages, in a dict for the order
        self._by_hash = {}   # hash -> full page

    def __contains__(self, page):
        return page in self._contents

    def tokens(self, page):
        """Tokens of a page, a list not to be changed."""
        return self._contents[page].tokens

    def children(self, page):
        """Pages that come next after `page`."""
        return self._children.get(page, ())

    def match(self, salt, tokens):
        """(pages, count): those that hold the first `count` of `tokens`, the last of them perhaps more."""
        pages, parent, size = [], salt, self._page_size
        previous = _root_hash(salt)
        while len(tokens) >= (len(pages) + 1) * size:
            part = tokens[len(pages) * size:(len(pages) + 1) * size]
            previous = chained_hash(previous, part)
            page = self._find(previous, parent, part)
            if page is None:
                break
            pages.append(page)
            parent = page
        count = len(pages) * size
        page, common = self._longest_part(parent, tokens[count:count + size])
        return (pages, count) if page is None else ([*pages, page], count + common)

    def _find(self, hash, parent, tokens):
        page = self._by_hash.get(hash)
        found = self._contents.get(page)
        return page if found and found.parent == parent and found.tokens == tokens else None

    def _longest_part(self, parent, tokens):
        """(page, tokens in common) of the child of `parent` that begins most like `tokens`; (None, 0) without one."""
        best, longest = None, MIN_PART - 1
        for page in self._children.get(parent, ()) if len(tokens) > longest else ():
            held = self._contents[page].tokens
            if held[0] != tokens[0]:
                continue
            pairs = enumerate(zip(held, tokens, strict=False))
            common = next((i for i, (a, b) in pairs if a != b), min(len(held), len(tokens)))
            if common > longest:
                best, longest = page, common
        return best, longest if best is not None else 0

    def add(self, page, parent, tokens):
        """`page` now holds `tokens`, one or more, after those of `parent`. Returns as `extend`."""
        self._contents[page] = _Content(parent, [])
        self._children.setdefault(parent, {})[page] = None
        return self.extend(page, tokens)

    def extend(self, page, tokens):
        """`page` now holds `tokens`, too. Returns another page that holds all the same, once it is full; else None."""
        content = self._contents[page]
        content.tokens += tokens
        if len(content.tokens) < self._page_size:
            return None
        above = self._contents.get(content.parent)
        content.hash = chained_hash(above.hash if above else _root_hash(content.parent), content.tokens)
        twin = self._find(content.hash, content.parent, content.tokens)
        if twin is None:
            self._by_hash.setdefault(content.hash, page)   # a collision: only the first is found
        return twin

    def cut(self, page, count):
        """Only the first `count` tokens of `page` stay. Returns the pages that came after it, forgotten now."""
        content = self._contents[page]
        self._forget_hash(page, content)
        del content.tokens[count:]
        below = list(self._children.pop(page, ()))
        for child in below:   # which grows
            self._forget_hash(child, self._contents.pop(child))
            below += self._children.pop(child, ())
        return below[::-1]

    def forget(self, page):
        """What `page` and the pages after it hold is not known any more. Returns them, the deepest first."""
        below = self.cut(page, 0)
        siblings = self._children[self._contents[page].parent]
        del siblings[page]
        if not siblings:
            del self._children[self._contents[page].parent]
        del self._contents[page]
        return [*below, page]

    def _forget_hash(self, page, content):
        if self._by_hash.get(content.hash) == page:
            del self._by_hash[content.hash]
        content.hash = None

    def rename(self, names):
        """Pages move: what page a held is in page ``names[a]``."""
        def of(page):
            return names.get(page, page)

        for content in self._contents.values():
            content.parent = of(content.parent)
        self._contents = {of(page): content for page, content in self._contents.items()}
        self._children = {of(parent): {of(page): None for page in pages} for parent, pages in self._children.items()}
        self._by_hash = {hash: of(page) for hash, page in self._by_hash.items()}

    def walk(self):
        """(depth, page) of all pages, each after its parent."""
        roots = [salt for salt in self._children if isinstance(salt, str)]
        waiting = [(0, page) for salt in reversed(roots) for page in reversed(self._children[salt])]
        while waiting:
            depth, page = waiting.pop()
            yield depth, page
            waiting += [(depth + 1, child) for child in reversed(self._children.get(page, {}))]


def _root_hash(salt):
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()
