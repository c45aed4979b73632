# SPDX-License-Identifier: Apache-2.0
"""What one forward pass knows about its batch: lengths, offsets, masks and page tables, shared by all layers."""


import numpy as np

from .devices import device_key, to_device, to_host
from .runtime.capturing import refuse_to_keep

MASKED = np.float16(-65504.0)  # lowest finite float16: a row masked everywhere still has no NaN softmax
_ASSIGNED = ("block_diag_layers", "position_offsets_tp", "past_len_tp", "block_index_tp", "cache_seqlens_tp",
             "cache_seqlens_after_tp")   # attributes that may be replaced: who needs one looks at it every time


class Params:
    """Batch metadata of an attention call over contiguous caches, made once per forward pass.

    Everything array-like is copied to the host on construction, so later changes of the caller's arrays have no
    effect. The ``get_*`` methods return an array on the device asked for and keep one copy per device: only the
    first layer on a device pays for it. A device is None or ``"cpu"`` for NumPy, or an int for CuPy on that GPU.
    Attributes stay as they are, but for those that the caller assigns, the lists of `prep_tp` and `PagedParams.fill`.
    The lengths are numbers of this object: a step over a cache that is captured and replayed with other lengths takes
    `PagedParams`.

    Parameters
    ----------
    batch_size : int
        Sequences.
    seq_len : int, optional
        New tokens per sequence.
    past_len : int or list of int, optional
        Tokens already cached. A list means one cache per entry (`multi_cache`): `past_lens` holds it, `past_len` is
        None.
    input_mask : array [batch_size, keys], [batch_size, 1 or seq_len, keys] or 4-D, optional
        Additive (0 visible, very negative hidden) or bool (True visible). Keys past its end stay visible.
    position_offsets : int array [batch_size] or [batch_size, 1], optional
        Added to every position of a sequence, e.g. minus its left padding.
    paged : bool
        Set by `PagedParams`.
    alt_rope_embed : (sin, cos) or dict of device -> (sin, cos), optional
        Tables that replace the model's, read at the same positions. The dict's ``"cpu"`` entry is copied to devices
        without an own one, once per Params; the caller's dict is never changed.
    non_causal_attn : bool
        Every new token sees every other.
    rope_offsets : int array [batch_size], [batch_size, 1] or one element, optional
        Added to the positions used by RoPE.

    Attributes
    ----------
    past_lens, multi_cache
        See `past_len`.
    cu_seqlens : int32 ndarray [blocks + 1] or None
        Assigned by the caller after construction: borders of the blocks of block-diagonal attention, in packed
        tokens, starting at 0.
    block_diag_layers : set of int
        Layers that use it; filled by the caller.
    attn_mask, attn_masks, block_diag_mask, cu_seqlens_max, past_lens_tensor, positions : ndarray, list, int or None
        Host values of the methods of the same name, None until first asked for.
    position_offsets_tp, past_len_tp : list or None
        Filled by `prep_tp`.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong kind or shape.
    AttributeError
        Another value is assigned to an attribute that stays.
    RuntimeError
        From the ``get_*`` methods: a GPU was asked for and CuPy or the GPU is missing.

    Examples
    --------
    >>> params = Params(batch_size=1, seq_len=2, past_len=1)
    >>> params.get_attn_mask().tolist()
    [[[[0.0, 0.0, -65504.0], [0.0, 0.0, 0.0]]]]
    >>> params.get_positions()
    array([1, 2], dtype=int32)
    """

    def __init__(self, batch_size=1, seq_len=None, past_len=None, input_mask=None, position_offsets=None, paged=False,
                 alt_rope_embed=None, non_causal_attn=False, rope_offsets=None):
        self.batch_size = self._int("batch_size", batch_size, least=1)
        self.seq_len = None if seq_len is None else self._int("seq_len", seq_len, least=1)
        self.paged = bool(paged)
        self.non_causal_attn = bool(non_causal_attn)
        self.multi_cache = isinstance(past_len, list | tuple)
        self.past_lens = [self._int("past_len", n, least=0) for n in past_len] if self.multi_cache else None
        self.past_len = None if self.multi_cache or past_len is None else self._int("past_len", past_len, least=0)
        self.input_mask = None if input_mask is None else self._mask("input_mask", input_mask)
        if input_mask is not None:
            self.input_mask.flags.writeable = False
        self.position_offsets = self._per_sequence("position_offsets", position_offsets)
        self.rope_offsets = self._per_sequence("rope_offsets", rope_offsets, one_for_all=True)
        many = alt_rope_embed if isinstance(alt_rope_embed, dict) else None
        self.alt_rope_embed_dict = None if many is None else {key: self._rope_pair(pair) for key, pair in many.items()}
        self.alt_rope_embed = None if alt_rope_embed is many else self._rope_pair(alt_rope_embed)
        self.attn_mask = self.attn_masks = self.past_lens_tensor = self.positions = None
        self.position_offsets_tp = self.past_len_tp = None
        self.cu_seqlens = None
        self.block_diag_layers = set()
        self._copies = {}  # (name, device) -> (host array, its copy there)

    def __setattr__(self, name, value):
        if name in vars(self) and name not in _ASSIGNED:
            raise AttributeError(f"{self._op}: {name} must stay as it is, got another value; make another {self._op}, "
                                 "layers keep what they made of this one")
        object.__setattr__(self, name, value)

    def _fill(self, name, value):
        """Set an attribute that is None until it is first asked for."""
        vars(self)[name] = value

    # ---- what kind of attention ------------------------------------------------------------------------

    def is_causal(self):
        """True when there is no `input_mask`, so that a kernel needs no mask array.

        `non_causal_attn` does not count here; see `causal`.
        """
        return self.input_mask is None

    @property
    def causal(self):
        """Whether a token is hidden from the tokens before it."""
        return not self.non_causal_attn

    # ---- offsets and lengths ---------------------------------------------------------------------------

    def get_position_offsets(self, device=None):
        """`position_offsets` on `device`, int32."""
        self._required("position_offsets")
        return self._on(device, "position_offsets", self.position_offsets)

    def get_rope_offsets(self, device=None):
        """`rope_offsets` on `device`, int32, or None."""
        return self._on(device, "rope_offsets", self.rope_offsets)

    def get_past_lens(self, device=None):
        """`past_lens` on `device`, int32 [caches]."""
        self._required("past_lens")
        if self.past_lens_tensor is None:
            self._fill("past_lens_tensor", np.array(self.past_lens, dtype=np.int32))
        return self._on(device, "past_lens", self.past_lens_tensor)

    def get_positions(self, device=None):
        """Position of every new token, int32 [batch_size * seq_len], sequence by sequence.

        ``max(past[b] + position_offsets[b] + rope_offsets[b] + t, 0)``
        """
        if self.positions is None:
            self._required("seq_len")
            first = self._past().astype(np.int64)
            for offsets in (self.position_offsets, self.rope_offsets):
                if offsets is not None:
                    first = first + offsets.reshape(-1)
            positions = np.maximum(first[:, None] + np.arange(self.seq_len), 0)
            self._fill("positions", positions.astype(np.int32).reshape(-1))
        return self._on(device, "positions", self.positions)

    def _past(self):
        """Cached tokens of each sequence, [batch_size]."""
        if self.multi_cache:
            if len(self.past_lens) != self.batch_size:
                raise ValueError(f"{self._op}: past_len must have an entry for each of the {self.batch_size} "
                                 f"sequences, got {len(self.past_lens)}")
            return np.array(self.past_lens, dtype=np.int32)
        self._required("past_len")
        return np.full(self.batch_size, self.past_len, dtype=np.int32)

    # ---- masks -----------------------------------------------------------------------------------------

    def get_attn_mask(self, device=None, force=False):
        """The additive mask as an array, for callers without a kernel that derives it. Built once.

        Returns
        -------
        ndarray [batch_size, 1 (or the heads of a 4-D input_mask), seq_len, past_len + seq_len], float16, or None
            None for one new token without `input_mask`, unless `force` asks for its zeros; once built they are
            returned without `force`, too.
        """
        if self.multi_cache:
            raise ValueError(f"{self._op}: past_len must be an int for get_attn_mask, got a list; use get_attn_masks")
        if self.attn_mask is None:
            self._required("seq_len")
            if self.input_mask is None and self.seq_len == 1 and not force:
                return None
            self._required("past_len")
            self._fill("attn_mask", self.build_single_attn_mask(self.batch_size, self.seq_len, self.past_len, None,
                                                                self.input_mask))
        return self._on(device, "attn_mask", self.attn_mask)

    def get_attn_masks(self, device=None):
        """One mask of batch 1 per cache of a multi-cache call; None entries for one new token without mask."""
        if self.attn_masks is None:
            self._required("seq_len")
            self._required("past_lens")
            rows = [None] * len(self.past_lens)
            if self.input_mask is not None:
                if len(self.input_mask) != len(rows):
                    raise ValueError(f"{self._op}: input_mask must have a row for each of the {len(rows)} caches, "
                                     f"got {len(self.input_mask)}")
                rows = [self.input_mask[i:i + 1] for i in range(len(rows))]
            self._fill("attn_masks", [
                None if row is None and self.seq_len == 1 else
                self.build_single_attn_mask(1, self.seq_len, past_len, None, row)
                for past_len, row in zip(self.past_lens, rows, strict=True)
            ])
        return [self._on(device, f"attn_masks[{i}]", mask) for i, mask in enumerate(self.attn_masks)]

    def build_single_attn_mask(self, batch_size, seq_len, past_len, device=None, input_mask=None):
        """Causal mask of `seq_len` new tokens after `past_len` cached ones, narrowed by `input_mask`.

        Entry ``[.., i, j]`` is 0 for ``j <= past_len + i``, else -65504; where `input_mask` covers key ``j`` the
        smaller of both.

        Returns
        -------
        ndarray [batch_size, 1 (or mask heads), seq_len, past_len + seq_len], float16
        """
        keys = past_len + seq_len
        hidden = np.arange(keys) > past_len + np.arange(seq_len)[:, None]
        causal = np.where(hidden, MASKED, np.float16(0))
        if input_mask is None:
            return to_device(self._op, np.tile(causal, (batch_size, 1, 1, 1)), device)
        extra = _additive(self._mask("input_mask", input_mask, batch_size, seq_len))
        mask = np.tile(causal, (batch_size, extra.shape[1], 1, 1))
        width = min(extra.shape[-1], keys)
        mask[..., :width] = np.minimum(mask[..., :width], extra[..., :width])
        return to_device(self._op, mask, device)

    # ---- block-diagonal attention ----------------------------------------------------------------------

    @property
    def cu_seqlens(self):
        """See the class."""
        return self._cu_seqlens

    @cu_seqlens.setter
    def cu_seqlens(self, value):
        if value is not None:
            value = self._ints("cu_seqlens", value)
            if value.ndim != 1 or value.size < 2 or value[0] != 0 or (np.diff(value) < 0).any():
                raise ValueError(f"{self._op}: cu_seqlens must be [blocks + 1], start at 0 and not decrease, "
                                 f"got {value.tolist()}")
            value.flags.writeable = False
        for name, new in (("_cu_seqlens", value), ("cu_seqlens_max", None), ("block_diag_mask", None)):
            self._fill(name, new)

    def get_cu_seqlens(self, device=None):
        """`cu_seqlens` on `device`, int32, or None."""
        return self._on(device, "cu_seqlens", self.cu_seqlens)

    def get_cu_seqlens_max(self):
        """Tokens of the longest block."""
        self._required("cu_seqlens")
        if self.cu_seqlens_max is None:
            self._fill("cu_seqlens_max", int(np.diff(self.cu_seqlens).max()))
        return self.cu_seqlens_max

    def get_block_diag_mask(self, device=None):
        """Mask that lets each block see itself only, in both directions; built once.

        Returns
        -------
        ndarray [tokens, tokens], float16, or None
            Over the packed tokens ``0 .. cu_seqlens[-1] - 1``; None without `cu_seqlens`.
        """
        if self.cu_seqlens is not None and self.block_diag_mask is None:
            block = np.searchsorted(self.cu_seqlens[1:], np.arange(self.cu_seqlens[-1]), side="right")
            self._fill("block_diag_mask", np.where(block[:, None] == block, np.float16(0), MASKED))
        return self._on(device, "block_diag_mask", self.block_diag_mask)

    # ---- RoPE tables -----------------------------------------------------------------------------------

    def get_alt_rope_embed(self, device=None):
        """``(sin, cos)`` on `device`, or None when there are none for it."""
        device = device_key(self._op, device)
        pair = self.alt_rope_embed
        if self.alt_rope_embed_dict is not None:
            pair = self.alt_rope_embed_dict.get(device, self.alt_rope_embed_dict.get("cpu"))
        if pair is None:
            return None
        return tuple(self._on(device, name, table) for name, table in zip(("sin", "cos"), pair, strict=True))

    # ---- tensor parallelism ----------------------------------------------------------------------------

    def prep_tp(self, model):
        """Make the per-device lists of tensor-parallel attention. Does nothing the second time.

        Parameters
        ----------
        model : list of (device, first, last), or an object with such a list as ``kv_split``
            The KV heads ``first .. last - 1`` live on `device`.
        """
        if self.position_offsets_tp is not None:
            return
        devices = self._split_devices(model)
        past = self._past() if self.multi_cache or self.past_len is not None else None
        self.past_len_tp = [self._on(device, "past_len", past) for device in devices]
        self.position_offsets_tp = [self._on(device, "position_offsets", self.position_offsets) for device in devices]

    def _split_devices(self, model):
        split = model if isinstance(model, list | tuple) else getattr(model, "kv_split", None)
        if split is None:
            raise TypeError(f"{self._op}: model must be a list of (device, first, last) or have one as kv_split, "
                            f"got {type(model).__name__}")
        for part in split:
            if len(part) != 3 or not 0 <= part[1] <= part[2]:
                raise ValueError(f"{self._op}: model must be split into (device, first, last) with "
                                 f"0 <= first <= last, got {part!r}")
        return [device for device, _, _ in split]

    # ---- checks and copies -----------------------------------------------------------------------------

    @property
    def _op(self):
        return type(self).__name__

    def _required(self, name):
        if getattr(self, name) is None:
            raise ValueError(f"{self._op}: {name} must be given for this call, got None")

    def _int(self, name, value, *, least):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{self._op}: {name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{self._op}: {name} must be at least {least}, got {value}")
        return int(value)

    def _ints(self, name, value):
        """A host copy as int32."""
        array = to_host(value)
        if array.dtype.kind not in "iu" and array.size:
            raise TypeError(f"{self._op}: {name} must be integers, got dtype {array.dtype}")
        if array.size and not (-2**31 <= array.min() and array.max() < 2**31):
            raise ValueError(f"{self._op}: {name} must fit int32, got values {array.min()} .. {array.max()}")
        return array.astype(np.int32)

    def _per_sequence(self, name, value, *, one_for_all=False):
        if value is None:
            return None
        array = self._ints(name, value)
        array.flags.writeable = False   # what layers made of it would not change
        if array.shape not in ((self.batch_size,), (self.batch_size, 1)) and not (one_for_all and array.size == 1):
            raise ValueError(f"{self._op}: {name} must be [batch_size={self.batch_size}] or [batch_size, 1], "
                             f"got {list(array.shape)}")
        return array

    def _mask(self, name, value, batch_size=None, seq_len=None):
        batch_size, seq_len = batch_size or self.batch_size, seq_len or self.seq_len
        if self.multi_cache:
            batch_size = batch_size if batch_size == 1 else len(self.past_lens)
        array = to_host(value)
        if array.dtype.kind not in "bf" and array.dtype.name != "bfloat16":
            raise TypeError(f"{self._op}: {name} must be bool (True visible) or additive floats, got {array.dtype}")
        fits = 2 <= array.ndim <= 4 and array.shape[0] in (1, batch_size)
        if array.ndim > 2:
            fits = fits and array.shape[-2] in (1, seq_len)
        if not fits:
            raise ValueError(f"{self._op}: {name} must be [batch_size={batch_size}, keys], [batch_size, seq_len="
                             f"{seq_len}, keys] or [batch_size, heads, seq_len, keys], got {list(array.shape)}")
        return array

    def _rope_pair(self, pair):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError(f"{self._op}: alt_rope_embed must be (sin, cos) or a dict of device -> (sin, cos), "
                            f"got {type(pair).__name__}")
        return tuple(pair)

    def _on(self, device, name, array):
        """`array` on `device`; the copy is kept as long as `name` stands for the same array."""
        if array is None:
            return None
        device = device_key(self._op, device)
        source, copy = self._copies.get((name, device), (None, None))
        if source is not array:
            copy = to_device(self._op, array, device)
            self._copies[name, device] = (array, copy)
        return copy


class PagedParams(Params):
    """Batch metadata of an attention call over a paged cache, made once per forward pass.

    Fields and methods of `Params`, with ``seq_len = q_len``; always causal, without a mask array. Built from host or
    device arrays, which are copied. In decode loops and for the replays of a captured step the arrays of
    `get_block_index`, `get_cache_seqlens` and `get_cache_seqlens_after` are changed in place, by the caller or by
    `fill`; see `QAttn.forward`.

    Parameters
    ----------
    batch_size : int
        Sequences.
    block_index : int array [batch_size, max_pages]
        Page of token ``t`` of sequence ``b`` is ``block_index[b, t // page_size]`` (the ops call it `block_table`).
        Entries past a sequence's new length are not looked at.
    cache_seqlens : int array [batch_size]
        Tokens cached *before* this call.
    max_cache_seqlen : int
        Largest of them; not zero means that there is something to read from the cache.
    page_size : int
        Tokens per page.
    q_len : int
        New tokens per sequence, at least 1.
    alt_rope_embed, rope_offsets
        See `Params`.

    Attributes
    ----------
    cache_seqlens_after : int32 ndarray [batch_size]
        ``cache_seqlens + q_len``: what the ops take as `cache_seqlens`.
    is_sequential : bool
        One sequence whose new tokens lie on consecutive pages, so that they form one run of cache rows.
    first_index : int or None
        Cache row ``page * page_size + offset`` of the first new token of a batch of one; None for larger batches.
    block_index_tp, cache_seqlens_tp, cache_seqlens_after_tp : list or None
        Filled by `prep_tp`.

    Examples
    --------
    >>> params = PagedParams(1, [[7, 3, 4, 9]], [456], 456, page_size=256, q_len=100)
    >>> params.is_sequential, params.first_index, params.cache_seqlens_after
    (True, 968, array([556], dtype=int32))
    """

    def __init__(self, batch_size, block_index, cache_seqlens, max_cache_seqlen, page_size, q_len=0,
                 alt_rope_embed=None, rope_offsets=None):
        self.q_len = self._int("q_len", q_len, least=1)
        super().__init__(batch_size, self.q_len, paged=True, rope_offsets=rope_offsets,
                         alt_rope_embed={} if alt_rope_embed is None else alt_rope_embed)
        self.page_size = self._int("page_size", page_size, least=1)
        self.max_cache_seqlen = self._int("max_cache_seqlen", max_cache_seqlen, least=0)
        self.block_index = self._ints("block_index", block_index)
        self.cache_seqlens = self._ints("cache_seqlens", cache_seqlens)
        self._check_pages()
        self.cache_seqlens_after = self.cache_seqlens + np.int32(self.q_len)
        first = int(self.cache_seqlens[0])
        pages = self.block_index[0, first // self.page_size:(first + self.q_len - 1) // self.page_size + 1]
        alone = self.batch_size == 1
        self.is_sequential = alone and bool((np.diff(pages) == 1).all())
        self.first_index = int(pages[0]) * self.page_size + first % self.page_size if alone else None
        self.block_index_tp = self.cache_seqlens_tp = self.cache_seqlens_after_tp = None
        self._slots = None

    def fill(self, block_index, cache_seqlens):
        """Other pages and lengths of as many sequences, in place: in the arrays here and in their copies on devices.

        Whoever attends with this object from then on gives a `Schedule` of the new lengths.

        Parameters
        ----------
        block_index : int array of the shape it has
        cache_seqlens : int array [batch_size]

        Raises
        ------
        TypeError, ValueError
            As the constructor, or a block_index of another shape; nothing has changed then.
        CaptureError
            The step is captured: its replays would not see the new lengths.
        """
        refuse_to_keep("fill PagedParams; it is done between the replays")
        other = PagedParams(self.batch_size, block_index, cache_seqlens, 0, self.page_size, self.q_len)
        if other.block_index.shape != self.block_index.shape:
            raise ValueError(f"PagedParams: block_index must be {list(self.block_index.shape)} as it was, got "
                             f"{list(other.block_index.shape)}")
        for (name, _), (_, copy) in self._copies.items():
            if name in ("block_index", "cache_seqlens", "cache_seqlens_after") and not isinstance(copy, np.ndarray):
                with copy.device:   # on its stream, behind what still reads it
                    copy.set(getattr(other, name))
        for name in ("block_index", "cache_seqlens", "cache_seqlens_after"):
            getattr(self, name)[...] = getattr(other, name)
        vars(self).update(max_cache_seqlen=int(self.cache_seqlens.max()), is_sequential=other.is_sequential,
                          first_index=other.first_index, positions=None, _slots=None)

    def _check_pages(self):
        if self.block_index.ndim != 2 or self.block_index.shape[0] != self.batch_size:
            raise ValueError(f"PagedParams: block_index must be [batch_size={self.batch_size}, max_pages], "
                             f"got {list(self.block_index.shape)}")
        if self.cache_seqlens.shape != (self.batch_size,):
            raise ValueError(f"PagedParams: cache_seqlens must be [batch_size={self.batch_size}], "
                             f"got {list(self.cache_seqlens.shape)}")
        if self.cache_seqlens.min() < 0:
            raise ValueError(f"PagedParams: cache_seqlens must not be negative, got {self.cache_seqlens.min()}")
        longest = int(self.cache_seqlens.max()) + self.q_len
        needed, given = -(-longest // self.page_size), self.block_index.shape[1]
        if needed > given:
            raise ValueError(f"PagedParams: block_index must have {needed} pages of {self.page_size} for "
                             f"{longest} tokens (cache_seqlens + q_len), got {given}")
        used = -(-(self.cache_seqlens + self.q_len) // self.page_size)
        in_use = np.arange(given) < used[:, None]
        if (self.block_index[in_use] < 0).any():
            raise ValueError("PagedParams: block_index must hold page ids of at least 0 within a sequence's length, "
                             f"got {self.block_index[in_use].min()}")

    def _past(self):
        return self.cache_seqlens

    def get_block_index(self, device=None):
        """`block_index` on `device`, int32 [batch_size, max_pages]."""
        return self._on(device, "block_index", self.block_index)

    def get_cache_seqlens(self, device=None):
        """`cache_seqlens` on `device`: the lengths before this call, int32 [batch_size]."""
        return self._on(device, "cache_seqlens", self.cache_seqlens)

    def get_cache_seqlens_after(self, device=None):
        """`cache_seqlens_after` on `device`, int32 [batch_size]."""
        return self._on(device, "cache_seqlens_after", self.cache_seqlens_after)

    def slot_mapping(self, device=None):
        """Cache row of every new token, int64 [batch_size * q_len]: what ``kv_append`` takes as `slots`."""
        if self._slots is None:
            position = self.cache_seqlens.astype(np.int64)[:, None] + np.arange(self.q_len)
            page = np.take_along_axis(self.block_index.astype(np.int64), position // self.page_size, axis=1)
            self._fill("_slots", (page * self.page_size + position % self.page_size).reshape(-1))
        return self._on(device, "slot_mapping", self._slots)

    def get_attn_mask(self, device=None, force=False):
        """A paged call has no mask array: raises NotImplementedError."""
        raise NotImplementedError("PagedParams: get_attn_mask does not exist for paged attention, which is causal; "
                                  "use Params for masks")

    def prep_tp(self, model):
        """Make the per-device lists of tensor-parallel attention; see `Params.prep_tp`."""
        if self.block_index_tp is not None:
            return
        super().prep_tp(model)
        devices = self._split_devices(model)
        self.block_index_tp = [self.get_block_index(device) for device in devices]
        self.cache_seqlens_tp = [self.get_cache_seqlens(device) for device in devices]
        self.cache_seqlens_after_tp = [self.get_cache_seqlens_after(device) for device in devices]


def _additive(mask):
    """A bool or additive mask as float16 [batch, heads, queries, keys]."""
    if mask.dtype == bool:
        mask = np.where(mask, np.float16(0), MASKED)
    shape = {2: (mask.shape[0], 1, 1), 3: (mask.shape[0], 1, mask.shape[1])}.get(mask.ndim, mask.shape[:3])
    with np.errstate(over="ignore"):  # beyond float16 is -inf: hidden as well
        return mask.astype(np.float16).reshape(*shape, mask.shape[-1])
