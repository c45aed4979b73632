# SPDX-License-Identifier: Apache-2.0
"""PagedCache: keys and values of every layer in pools of pages."""

import numpy as np

from ..kv.formats import FORMATS as QUANTIZED
from ..kv.formats import check_head_dim
from ..kv.quantized import kv_side
from ..ops.page_move import page_move
from ..paging.pages import PageManager
from ..params import PagedParams
from ..runtime.arrays import array_namespace
from ..runtime.checks import FLOATS, check_number
from .base import float_dtype, moved, zeros_pool

FORMATS = (*FLOATS, *QUANTIZED)


class PagedCache:
    """Keys and values of every layer in pools of pages, and who owns which page.

    It knows no lengths: those of a step are in its `Params` or `PagedParams`. Sequences that begin alike share pages,
    see ``pages.sequence``; `step` makes the PagedParams of such. `over` makes a cache of pools there are already.

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
    TypeError
        An unknown dtype.
    ValueError
        An unknown format, two plain dtypes that differ, sizes or scales that do not fit.
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
        dtype = float_dtype("PagedCache", "dtype", dtype).name
        k_format = dtype if k_format is None else k_format
        formats = k_format, k_format if v_format is None else v_format
        for name, format in zip(("k_format", "v_format"), formats, strict=True):
            if format not in FORMATS:
                raise ValueError(f"PagedCache: {name} must be one of {', '.join(FORMATS)}, got {format!r}")
            if format in QUANTIZED:
                check_head_dim(format, head_dim, "PagedCache")
        if formats[0] != formats[1] and all(format in FLOATS for format in formats):
            raise ValueError(f"PagedCache: v_format must be {formats[0]} like k_format or one of "
                             f"{', '.join(QUANTIZED)}, got {formats[1]}")
        num_layers, *shape = map(int, sizes.values())
        pools = [[_pool(shape, dtype, format, scale, xp) for scale in _scales(name, given, num_layers)]
                 for name, format, given in zip(("k scales", "v scales"), formats, scales or (None, None), strict=True)]
        self._hold("PagedCache", *pools, PageManager(num_pages, page_size))

    @classmethod
    def over(cls, k, v, pages):
        """A cache of pools and pages there are already; nothing is copied.

        Parameters
        ----------
        k, v : list of ndarray or QuantizedKV [num_pages, page_size, num_kv_heads, head_dim]
            One for each layer. Any strides that `page_move` takes.
        pages : PageManager
            Of as many pages of as many tokens.
        """
        cache = object.__new__(cls)
        cache._hold("PagedCache.over", list(k), list(v), pages)
        return cache

    def _hold(self, name, k, v, pages):
        """Everything there is to know, from pools that fit each other and the pages."""
        if not k or len(k) != len(v):
            raise ValueError(f"{name}: k and v must have a pool for each layer, got {len(k)} and {len(v)}")
        sides = {f"{side}[{n}]": kv_side(name, f"{side}[{n}]", pool)
                 for side, pools in (("k", k), ("v", v)) for n, pool in enumerate(pools)}
        shape = pages.num_pages, pages.page_size, *sides["k[0]"].shape[2:]
        for at, side in sides.items():
            wanted = sides[f"{at[0]}[0]"].format, shape
            if (side.format, side.shape) != wanted:
                raise ValueError(f"{name}: {at} must be {wanted[0]} {list(shape)} like the first one and the pages, "
                                 f"got {side.format} {list(side.shape)}")
        self.k, self.v, self.pages, self.num_layers = k, v, pages, len(k)
        self.num_pages, self.page_size, self.num_kv_heads, self.head_dim = shape
        self.k_format, self.v_format = (sides[at].format for at in ("k[0]", "v[0]"))
        self.xp = array_namespace(name, **{at: array for side in sides.values() for at, array in side.arrays.items()})

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
        return PagedCache.over(*([moved(pool, xp) for pool in pools] for pools in (self.k, self.v)), self.pages)

    def __repr__(self):
        format = self.k_format if self.k_format == self.v_format else f"{self.k_format}/{self.v_format}"
        return (f"PagedCache({self.num_layers} layers, {self.num_pages} pages of {self.page_size} tokens, "
                f"{self.num_kv_heads} heads of {self.head_dim}, {format}, {self.nbytes} bytes, "
                f"{self.pages.num_free} pages free)")


def _scales(name, given, num_layers):
    """A scale, or None, for each layer."""
    if given is None:
        return [None] * num_layers
    if len(given) != num_layers:
        raise ValueError(f"PagedCache: scales must hold one of {name} for each of the {num_layers} layers, got "
                         f"{len(given)}")
    return given


def _pool(shape, dtype, format, scale, xp):
    """Keys or values of one layer."""
    if format in QUANTIZED:
        return zeros_pool("PagedCache", shape, dtype, format, xp, scale)
    if scale is not None:
        raise ValueError(f"PagedCache: scales must be None for {format}, got an array")
    return zeros_pool("PagedCache", shape, format, None, xp)
