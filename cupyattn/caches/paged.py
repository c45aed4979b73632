# SPDX-License-Identifier: Apache-2.0
"""PagedCache: keys and values of every layer in pools of pages."""

import numpy as np

from ..kv.formats import FLOATS, check_head_dim
from ..kv.formats import FORMATS as QUANTIZED
from ..kv.quantized import QuantizedKV
from ..ops.page_move import page_move
from ..paging.pages import PageManager
from ..params import PagedParams
from ..runtime.arrays import dtype_of
from ..runtime.checks import check_number

FORMATS = (*FLOATS, *QUANTIZED)


class PagedCache:
    """Keys and values of every layer in pools of pages, and who owns which page.

    It knows no lengths: those of a step are in its `Params` or `PagedParams`. Slots nobody has written hold garbage.
    Sequences that begin alike share pages, see ``pages.sequence``; `step` makes the PagedParams of such.

    Parameters
    ----------
    num_layers, num_pages, page_size, num_kv_heads, head_dim : int
        Sizes; page_size in tokens.
    dtype : str
        "float16", "bfloat16" or "float32": of the activations, and of the pools without a format.
    k_format, v_format : str, optional
        Of keys and of values: a format of `QuantizedKV`, or a dtype (then of both). Default `dtype`; v_format: as
        k_format.
    scales : (k scales, v scales), optional
        For formats whose scales are known beforehand: None, or an array for each layer, see `QuantizedKV`. Without
        them int8_symmetric and int8_channel have scales of 1, and fp8 makes scales per token and head.
    xp : numpy or cupy
        Where the pools are. Default numpy.

    Attributes
    ----------
    k, v : list of ndarray or QuantizedKV
        One per layer, [num_pages, page_size, num_kv_heads, head_dim].
    pages : PageManager
    k_format, v_format : str
        As given, or the dtype.
    nbytes : int
        Of all pools, scales included.

    Raises
    ------
    ValueError
        An unknown format or dtype, two plain dtypes that differ, sizes or scales that do not fit.
    MemoryError
        There is no room.

    Examples
    --------
    >>> import cupyattn
    >>> cache = cupyattn.PagedCache(2, 8, 16, 4, 64, k_format="hadamard8", v_format="hadamard4")
    >>> cache
    PagedCache(2 layers, 8 pages of 16 tokens, 4 heads of 64, hadamard8/hadamard4, 106496 bytes, 8 pages free)
    >>> cache.pages.allocate_tokens(20)
    [0, 1]
    >>> sequence = cache.pages.sequence(range(40))
    >>> params = cache.step([sequence], 40)                 # for layer.forward(x, params, cache, ...)
    >>> params.block_index
    array([[2, 3, 4]], dtype=int32)
    >>> sequence.append(range(40))
    >>> cache.pages.sequence([*range(20), 7])
    PageSequence(20 tokens on pages [2, 3], room for 0 more)
    """

    def __init__(self, num_layers, num_pages, page_size, num_kv_heads, head_dim, *, dtype="float16", k_format=None,
                 v_format=None, scales=None, xp=np):
        sizes = {"num_layers": num_layers, "num_pages": num_pages, "page_size": page_size,
                 "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            check_number("PagedCache", name, size, least=0 if name == "num_pages" else 1, integer=True)
        self.num_layers, self.num_pages, self.page_size = int(num_layers), int(num_pages), int(page_size)
        self.num_kv_heads, self.head_dim = int(num_kv_heads), int(head_dim)
        self.dtype, self.xp = _dtype_name(dtype), xp
        self.k_format = self.dtype if k_format is None else k_format
        self.v_format = self.k_format if v_format is None else v_format
        formats = self.k_format, self.v_format
        for name, format in zip(("k_format", "v_format"), formats, strict=True):
            if format not in FORMATS:
                raise ValueError(f"PagedCache: {name} must be one of {', '.join(FORMATS)}, got {format!r}")
            if format in QUANTIZED:
                check_head_dim(format, head_dim, "PagedCache")
        if formats[0] != formats[1] and all(format in FLOATS for format in formats):
            raise ValueError(f"PagedCache: v_format must be {formats[0]} like k_format or one of "
                             f"{', '.join(QUANTIZED)}, got {formats[1]}")
        self.k, self.v = (
            [self._pool(format, scale) for scale in self._scales(name, given)]
            for name, format, given in zip(("k scales", "v scales"), formats, scales or (None, None), strict=True))
        self.pages = PageManager(num_pages, page_size)

    @classmethod
    def contiguous(cls, num_layers, batch_size, max_seq_len, num_kv_heads, head_dim, **options):
        """A cache with one page for each sequence: page b is sequence b, and no page is free.

        Parameters
        ----------
        num_layers, batch_size, max_seq_len, num_kv_heads, head_dim : int
            `max_seq_len` tokens fit each sequence.
        **options
            As for `PagedCache`.
        """
        cache = cls(num_layers, batch_size, max_seq_len, num_kv_heads, head_dim, **options)
        cache.pages.allocate(cache.num_pages)
        return cache

    def _scales(self, name, given):
        """A scale, or None, for each layer."""
        if given is None:
            return [None] * self.num_layers
        if len(given) != self.num_layers:
            raise ValueError(f"PagedCache: scales must hold one of {name} for each of the {self.num_layers} layers, "
                             f"got {len(given)}")
        return given

    def _pool(self, format, scale):
        """Keys or values of one layer."""
        shape = self.num_pages, self.page_size, self.num_kv_heads, self.head_dim
        if format in FLOATS:
            if scale is not None:
                raise ValueError(f"PagedCache: scales must be None for {format}, got an array")
            return self.xp.empty(shape, dtype_of(format))
        granularity = "token" if scale is None and format.startswith("fp8") else None
        return QuantizedKV.empty(*shape, format=format, dtype=self.dtype, granularity=granularity, scale=scale,
                                 xp=self.xp)

    @property
    def nbytes(self):
        """Bytes of all pools, scales included."""
        return sum(pool.nbytes for pool in (*self.k, *self.v))

    def step(self, sequences, q_len, *, max_pages=None, others=(), out=None):
        """Make room for `q_len` more tokens of each sequence, and copy begun pages that are not a sequence's alone.

        Parameters
        ----------
        sequences : list of PageSequence
            Of ``pages``; give them the tokens by ``append`` when they are in the cache.
        q_len : int
        max_pages : int, optional
            Columns of the block table. Default: as many as the longest sequence needs.
        others : list of PagedCache
            Caches with other keys and values on the same pages, e.g. of a draft model or of other ranks.
        out : PagedParams, optional
            Of an earlier step of as many sequences and as many tokens each, whose block table has columns for this one,
            too: filled again, in place, for a decode loop whose calls repeat (see `QAttn.forward`).

        Returns
        -------
        PagedParams
            Or `out`.

        Raises
        ------
        MemoryError
            There are too few free pages for one of the sequences; those before it have their room.
        TypeError, ValueError
            A sequence of other pages, or named twice; a cache of other pages; an `out` of another kind or size.
        """
        if out is not None and not isinstance(out, PagedParams):
            raise TypeError(f"PagedCache.step: out must be PagedParams, got {type(out).__name__}")
        seen = set()
        for n, sequence in enumerate(sequences):
            if sequence not in self.pages:
                raise ValueError(f"PagedCache.step: sequences must be of this cache's pages, got sequences[{n}] of "
                                 "another PageManager")
            if sequence in seen:
                raise ValueError(f"PagedCache.step: sequences must name each once, got sequences[{n}] twice")
            seen.add(sequence)
        self._check_others("step", others)
        if out is not None and (out.batch_size, out.q_len, out.page_size) != (len(seen), q_len, self.page_size):
            raise ValueError(f"PagedCache.step: out must be of {len(seen)} sequences, {q_len} tokens and pages of "
                             f"{self.page_size}, got {out.batch_size}, {out.q_len} and {out.page_size}")
        copies = {}
        try:
            for sequence in sequences:
                more = sequence.reserve(q_len)
                for source, destination in more:   # what one leaves may be the next one's
                    if any(source == b or destination in (a, b) for a, b in copies):
                        self._move(copies, others)
                        copies = {}
                copies |= more
        finally:
            self._move(copies, others)
        lengths = [sequence.num_tokens for sequence in sequences]
        max_pages = max_pages if out is None else out.block_index.shape[1]
        table = self.pages.block_table([sequence.pages for sequence in sequences], max_pages=max_pages)
        if out is not None:
            out.fill(table, lengths)
            return out
        return PagedParams(len(sequences), table, lengths, max(lengths, default=0), self.page_size, q_len)

    def defragment(self, *, others=()):
        """Give every sequence pages in a row, as far as sharing permits; see `PageManager.defragment`.

        What is in the pages moves along, bit for bit, so only block tables made before are no longer right.

        Parameters
        ----------
        others : list of PagedCache
            As in `step`.

        Returns
        -------
        int
            Pages moved.
        """
        self._check_others("defragment", others)
        done = self.pages.defragment()
        for moves in done:
            self._move(dict.fromkeys(moves.items(), self.page_size), others)
        return sum(map(len, done))

    def _check_others(self, method, others):
        for n, cache in enumerate(others):
            if (cache.num_pages, cache.page_size) != (self.num_pages, self.page_size):
                raise ValueError(f"PagedCache.{method}: others must have {self.num_pages} pages of {self.page_size} "
                                 f"tokens like this cache, got others[{n}] with {cache.num_pages} of {cache.page_size}")

    def _move(self, copies, others):
        """Copy tokens between pages: ``{(page, page): tokens}``."""
        lists = [*zip(*copies, strict=True), copies.values()]
        for cache in (self, *others) if copies else ():
            sources, destinations, tokens = (cache.xp.asarray(np.fromiter(ids, np.int32)) for ids in lists)
            page_move([*cache.k, *cache.v], sources, destinations, tokens=tokens)

    def to(self, xp):
        """This cache with its pools on `xp` (numpy or cupy); itself when they are there. Both share `pages`."""
        if xp is self.xp:
            return self
        move = self.xp.asnumpy if xp is np else xp.asarray
        other = object.__new__(PagedCache)
        other.__dict__.update(self.__dict__, xp=xp)
        other.k, other.v = ([pool.to(xp) if isinstance(pool, QuantizedKV) else move(pool) for pool in pools]
                            for pools in (self.k, self.v))
        return other

    def __repr__(self):
        format = self.k_format if self.k_format == self.v_format else f"{self.k_format}/{self.v_format}"
        return (f"PagedCache({self.num_layers} layers, {self.num_pages} pages of {self.page_size} tokens, "
                f"{self.num_kv_heads} heads of {self.head_dim}, {format}, {self.nbytes} bytes, "
                f"{self.pages.num_free} pages free)")


def _dtype_name(dtype):
    """Name of a plain dtype."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in FLOATS:
        raise ValueError(f"PagedCache: dtype must be {', '.join(FLOATS)}, got {name!r}")
    return name
