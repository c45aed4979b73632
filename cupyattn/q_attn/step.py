# SPDX-License-Identifier: Apache-2.0
"""What Params or PagedParams mean to the kernels of a layer: made once per step, used by all layers."""

import weakref

import numpy as np

from ..caches import PagedCache
from ..paging.table import PageTable

OP = "QAttn"
_steps = weakref.WeakKeyDictionary()   # Params -> {(device, sizes of the caches): Steps}


class Step:
    """Arrays and rules of one step over one cache, on one device.

    Attributes
    ----------
    rows : slice
        Of the new tokens, those that are its: all, or those of the cache's sequence in a multi-cache call.
    batch, q_len : int
    table : PageTable or None
        None without a cache.
    before, after : ndarray [batch], int32
        Tokens of each sequence without and with the new ones.
    rope_rows : ndarray [batch], int32, or None
        Row of the RoPE tables of each sequence's first new token; None: `before`.
    cu_seqlens_q : ndarray [batch + 1], int32
    mask : ndarray or None
    causal : bool
    last_position : int
        Largest row of the RoPE tables that is read.
    longest : int
        Tokens of the longest sequence, the new ones included.
    after_host : ndarray [batch], int32
        `after` as it was when this was made, in host memory.
    schedules : dict
        Those that layers made of `after_host`, by what else they depend on.
    checked : dict
        Contents of arrays that the last call with all checks has found right, by what decides which of them are read.
    """

    def __init__(self, params, cache, xp, device, sequence=None):
        self.xp = xp
        self.q_len = params.seq_len
        if self.q_len is None:
            raise ValueError(f"{OP}: params must have a seq_len, got None")
        mine = slice(None) if sequence is None else slice(sequence, sequence + 1)
        self.batch = params.batch_size if sequence is None else 1
        tokens = self.batch * self.q_len
        self.rows = slice(0, tokens) if sequence is None else slice(sequence * tokens, (sequence + 1) * tokens)
        self.causal = params.causal
        self.schedules, self.checked = {}, {}
        past = past_lens(params)[mine]
        self.after_host = past + np.int32(self.q_len)
        self.longest = int(self.after_host.max())
        if cache is None and past.any():
            raise ValueError(f"{OP}: cache must be given for {past.max()} cached tokens, got None")
        if params.paged:
            self._check_pages(params, cache)
            self.table = PageTable(params.get_block_index(device))
            self.before, self.after = params.get_cache_seqlens(device), params.get_cache_seqlens_after(device)
        else:
            if cache is not None:
                self._check_room(cache)
            self.table = None
            if cache is not None:
                self.table = PageTable(xp.asarray(np.arange(self.batch, dtype=np.int32)[:, None]))
            self.before, self.after = xp.asarray(past.copy()), xp.asarray(self.after_host)
        offset = _offsets(params)
        self.rope_rows = None if offset is None else xp.asarray((past + offset[mine]).astype(np.int32))
        first = past if offset is None else past + offset[mine]
        self.last_position = max(int(first.max()) + self.q_len - 1, 0)
        self.cu_seqlens_q = xp.asarray(np.arange(self.batch + 1, dtype=np.int32) * np.int32(self.q_len))
        self.mask = _mask(params, mine, xp)

    def _check_pages(self, params, cache):
        """The pages of the sequences are in the cache; read once, whatever the kind of arrays."""
        if cache is None:
            raise ValueError(f"{OP}: cache must be given with PagedParams, got None")
        if params.page_size != cache.page_size:
            raise ValueError(f"{OP}: params must have the page_size {cache.page_size} of the cache, got "
                             f"{params.page_size}")
        used = -(-self.after_host // params.page_size)
        in_use = params.block_index[np.arange(params.block_index.shape[1]) < used[:, None]]
        if in_use.max(initial=-1) >= cache.num_pages:
            raise ValueError(f"{OP}: params must have page ids below the {cache.num_pages} pages of the cache, got "
                             f"{in_use.max()}")

    def _check_room(self, cache):
        """A page for each sequence, in which it has room."""
        if self.batch > cache.num_pages:
            raise ValueError(f"{OP}: cache must have a page for each of the {self.batch} sequences, got "
                             f"{cache.num_pages}; PagedCache.contiguous makes such a one")
        if self.longest > cache.page_size:
            raise ValueError(f"{OP}: params must have at most the {cache.page_size} tokens of the cache, got "
                             f"{self.longest} (past_len + seq_len)")


def steps_of(params, cache, xp):
    """The Steps of `params` over `cache`: one, or one for each cache of a list. Made once per `params`."""
    device = None if xp is np else xp.cuda.runtime.getDevice()
    many = isinstance(cache, list | tuple)
    for one in cache if many else () if cache is None else (cache,):
        if not isinstance(one, PagedCache):
            raise TypeError(f"{OP}: cache must be a PagedCache, a list of them or None, got "
                            f"{'a list with ' * many}{type(one).__name__}")
        if one.xp is not xp:
            raise TypeError(f"{OP}: cache must be on {xp.__name__} like the weights, got one on {one.xp.__name__}")
    key = device, tuple((c.num_pages, c.page_size) for c in cache) if many else \
        None if cache is None else (cache.num_pages, cache.page_size)
    known = _steps.setdefault(params, {})
    found = known.get(key)
    if found is None:
        if many:
            if not params.multi_cache or len(cache) != params.batch_size or len(params.past_lens) != len(cache):
                raise ValueError(f"{OP}: cache must be a list exactly with a past_len for each of its caches, got "
                                 f"{len(cache)} caches for past_len {params.past_lens or params.past_len} of "
                                 f"{params.batch_size} sequences")
            found = tuple(Step(params, one, xp, device, n) for n, one in enumerate(cache))
        else:
            found = (Step(params, cache, xp, device),)
        known[key] = found
    if many and len({id(one) for one in cache}) < len(cache):
        raise ValueError(f"{OP}: cache must be a list of different ones, got one twice, whose first page would be that "
                         "of two sequences")
    return found


def past_lens(params):
    """Cached tokens of each sequence, int32 [batch], on the host."""
    if params.paged:
        return params.cache_seqlens
    if params.multi_cache:
        if len(params.past_lens) != params.batch_size:
            raise ValueError(f"{OP}: params must have a past_len for each of the {params.batch_size} sequences, got "
                             f"{len(params.past_lens)}")
        return np.array(params.past_lens, np.int32)
    return np.full(params.batch_size, params.past_len or 0, np.int32)


def _offsets(params):
    """What RoPE adds to each sequence's positions, int64 [batch]; None for nothing."""
    found = [np.broadcast_to(offsets.reshape(-1).astype(np.int64), (params.batch_size,))
             for offsets in (params.position_offsets, params.rope_offsets) if offsets is not None]
    return sum(found) if found else None


def _mask(params, mine, xp):
    """`input_mask` as attention takes it, [batch or 1, heads or 1, queries or 1, keys]; None for none."""
    mask = None if params.paged else params.input_mask
    if mask is None:
        return None
    if mask.dtype != bool:   # hides, never adds: as get_attn_mask has it
        mask = np.minimum(mask.astype(np.float32), 0)
    mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    return xp.asarray(np.ascontiguousarray(mask if mask.shape[0] == 1 else mask[mine]))


def block_borders(params, step, layer):
    """cu_seqlens, int32 on the host, where `layer` attends in blocks, else None."""
    if layer not in params.block_diag_layers:
        return None
    if params.cu_seqlens is None:
        raise ValueError(f"{OP}: params must have cu_seqlens for block-diagonal layer {layer}, got None")
    if params.cu_seqlens[-1] != step.batch * step.q_len:
        raise ValueError(f"{OP}: params must have cu_seqlens up to its {step.batch * step.q_len} tokens, got "
                         f"{params.cu_seqlens.tolist()}")
    if step.longest != step.q_len:
        raise ValueError(f"{OP}: params must have past_len 0 for block-diagonal layer {layer}, got "
                         f"{step.longest - step.q_len}")
    if step.mask is not None:
        raise ValueError(f"{OP}: params must have no input_mask for block-diagonal layer {layer}, got one")
    return params.cu_seqlens
