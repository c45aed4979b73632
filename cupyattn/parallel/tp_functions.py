# SPDX-License-Identifier: Apache-2.0
"""ExLlamaV2's tensor-parallel attention over lists of shards: same names, order of arguments and effects."""

from collections.abc import Mapping

import numpy as np

from ..attn.args import check_options
from ..kv.quantized import QuantizedKV, kv_side
from ..paging.table import PageTable
from ..q_attn.lora import LoRA
from ..q_attn.weights import rope_style_of, tables
from ..runtime.arrays import array_namespace, dtype_name
from ..runtime.checks import FLOATS, check_apart, check_dtype, check_number, check_shape, check_writeable
from .rank_lists import array_module, check_alike, check_list, check_place, each_rank
from .tensor_parallel import TPContext
from .tp_rank import Rank, Rows, Tokens, copy

PAGED = "tp_attn_forward_paged_"
_MOST_LAYERS = 512   # whose weights a context keeps prepared
_MOST_ADAPTERS = 4   # sets of them that a layer does


class _Layer:
    """What a context keeps of a layer's weights: a Rank for each here, and the features of the output of every rank."""

    def __init__(self, op, context, weights, options):
        self.weights = {name: value and tuple(value) for name, value in weights.items()}   # their ids are its key
        self._context, self._adapters = context, {}   # by what they are made of, the latest
        communicator = context.communicator
        self.ranks, features = [], []
        for n, rank in each_rank(communicator, communicator.ranks):
            mine = {name: None if value is None else value[n] for name, value in weights.items()}
            self.ranks.append(Rank(op, context, rank, communicator.devices[n], weights=mine, **options))
            features.append(self.ranks[n].xp.asarray(np.array([self.ranks[n].features])))
        everyone = communicator.all_gather(features)[0]
        self.features = [int(n) for n in (everyone if isinstance(everyone, np.ndarray) else everyone.get())]
        if sum(self.features) != context.hidden_size:
            raise ValueError(f"{op}: o_proj must have the rows of one rank each, {context.hidden_size} in all, got "
                             f"{self.features}; TPContext.shard_output_rows makes them")

    def span(self, rank):
        """First feature of the hidden state in a rank's part of the output, and the one after its last."""
        first = sum(self.features[:rank])
        return first, first + self.features[rank]

    def adapters(self, loras):
        """The Adapters that each rank here adds in a call, None for none."""
        communicator = self._context.communicator
        if not loras:
            return [None] * len(communicator.ranks)
        key = tuple(tuple((p, *map(id, lora)) for p, lora in one.items()) for one in loras)
        found = self._adapters.get(key)
        if found is None:
            given = {n: dict(one) for n, one in enumerate(loras)}
            parts = [self._context.shard_loras(given, rank, features=self.span(rank)) for rank in communicator.ranks]
            made = [mine.adapters(parts[n]) for n, mine in each_rank(communicator, self.ranks)]
            _drop_oldest(self._adapters, _MOST_ADAPTERS)
            found = self._adapters[key] = made, given   # which stay, so that their ids are theirs
        return found[0]


def tp_attn_forward_paged_(tp_context, hidden_states, temp_bc0_, temp_bc1_, temp_bc2_, temp_q_, temp_k_, temp_v_,
                           temp_o_, k_cache, v_cache, pre_layernorm, norm_epsilon, q_proj, k_proj, v_proj, o_proj,
                           head_dim, rope_style, batch_size, q_len, sin, cos, past_lens, block_index, scaling, *,
                           q_norm=None, k_norm=None, post_layernorm=None, rotary_dim=None, position_offsets=None,
                           softcap=0.0, window_size=0, loras=(), q_bias=None, k_bias=None, v_bias=None, o_bias=None):
    """An attention layer over a paged cache whose heads are spread over ranks: ExLlamaV2's arguments in their order.

    temp_o_[i] = columns of rank i of  x + attention(rope(norm(x) @ Wqᵀ), ...) @ Woᵀ

    Lists have an entry for each rank of this process, in the order of ``tp_context.communicator.ranks``, on its device.

    Parameters
    ----------
    tp_context : TPContext
        It keeps what is made of a layer's weights in the first call with them: give the same objects again.
    hidden_states : ndarray [batch_size, q_len, hidden_size] or [batch_size * q_len, hidden_size]
        x; that of rank 0 counts, other processes' only give the shape. NumPy, or where the ranks are. Not changed.
    temp_bc0_ : list of ndarray [rows or more, hidden_size], dtype of hidden_states
        Scratch: x of each rank.
    temp_bc1_ : list of ndarray, likewise
        Scratch: the norm of x.
    temp_bc2_ : list of ndarray [rows or more, num_heads * head_dim]
        Scratch: attention of all heads.
    temp_q_ : list of ndarray [rows or more, heads of the rank * head_dim]
        Scratch: queries, then attention of the rank's heads.
    temp_k_, temp_v_ : list of ndarray [rows or more, KV heads of the rank * head_dim]
        Scratch: new keys and values.
    temp_o_ : list of ndarray [rows or more, o_proj[i].shape[0]]
        Receive the results.
    k_cache, v_cache : list of ndarray or QuantizedKV [num_pages, page_size, KV heads of the rank, head_dim]
    pre_layernorm : list of ndarray [hidden_size], or an empty one
        Gains of an RMS norm.
    norm_epsilon : float
    q_proj, k_proj, v_proj : list of QMatrix [heads of the rank * head_dim, hidden_size]
        See ``TPContext.shard_rows``.
    o_proj : list of QMatrix [features of the rank, num_heads * head_dim]
        Some rows of the whole each, see ``TPContext.shard_output_rows``.
    head_dim : int
    rope_style : int
        0 none, 1 GPT-J, 2 NeoX.
    batch_size, q_len : int
    sin, cos : list of ndarray
        See `QAttn.forward`.
    past_lens : list of ndarray [batch_size], int32
        Tokens before the new ones: ``PagedParams.cache_seqlens_tp``.
    block_index : list of ndarray [batch_size, max_pages], int32
        ``PagedParams.block_index_tp``.
    scaling : float
        Softmax scale.
    q_norm, k_norm : list of ndarray [head_dim] or [heads of the rank, head_dim], optional
        Gains of a norm over every head.
    post_layernorm : list of ndarray [hidden_size], optional
        Gains of a norm between output projection and residual.
    rotary_dim : int, optional
        Default head_dim.
    position_offsets : list of ndarray [batch_size] or [batch_size, 1], int32, optional
        Added to the positions of RoPE.
    softcap : float
    window_size : int
        Visible tokens, the query's own included; 0 for all.
    loras : sequence of (dict of "q", "k", "v" or "o" to LoRA)
        Adapters of the whole layer, in the order they are added. The ranks' parts are prepared once and kept for the
        latest of them: give the same arrays again. Threads may give others.
    q_bias, k_bias, v_bias, o_bias : list of ndarray, optional
        Of the rows of each projection.

    Returns
    -------
    ndarray
        temp_o_ of all ranks side by side, like `hidden_states`; a new array, the same in every process.

    Raises
    ------
    TypeError, ValueError
        Lists and arrays that do not fit, or written memory that two entries share. No array was changed then, on the
        ranks of this process.

    Notes
    -----
    Where ExLlamaV2 ignores head norms, post-norms, partial rotation, position offsets, softcap and windows, this does
    what they say. The residual is added once, by the rank that has the features. A step of which CUDA graphs are made
    is `TPAttn`'s: this one has no place for a `Schedule` and makes its own.
    """
    return _forward(PAGED, **locals())


def tp_attn_forward_(tp_context, hidden_states, temp_bc0_, temp_bc1_, temp_bc2_, temp_q_, temp_k_, temp_v_, temp_o_,
                     k_cache, v_cache, pre_layernorm, norm_epsilon, q_proj, k_proj, v_proj, o_proj, head_dim,
                     rope_style, batch_size, q_len, sin, cos, past_len_tp, scaling, *, q_norm=None, k_norm=None,
                     post_layernorm=None, rotary_dim=None, position_offsets=None, softcap=0.0, window_size=0, loras=(),
                     q_bias=None, k_bias=None, v_bias=None, o_bias=None):
    """`tp_attn_forward_paged_` over contiguous caches.

    Parameters
    ----------
    tp_context : TPContext
        See `tp_attn_forward_paged_`, also for all others.
    hidden_states : ndarray [batch_size, q_len, hidden_size]
    temp_bc0_, temp_bc1_, temp_bc2_, temp_q_, temp_k_, temp_v_, temp_o_ : list
    k_cache, v_cache : list of ndarray or QuantizedKV [batch_size or more, max_seq_len, KV heads of the rank, head_dim]
    pre_layernorm : list
    norm_epsilon : float
    q_proj, k_proj, v_proj, o_proj : list
    head_dim, rope_style, batch_size, q_len : int
    sin, cos : list
    past_len_tp : list of ndarray [batch_size], int32
        Tokens before the new ones: ``Params.past_len_tp``.
    scaling : float
    q_norm, k_norm, post_layernorm : list, optional
    rotary_dim : int, optional
    position_offsets : list, optional
        ``Params.position_offsets_tp``.
    softcap : float
    window_size : int
    loras : sequence
    q_bias, k_bias, v_bias, o_bias : list, optional

    Returns
    -------
    ndarray
    """
    given = locals()
    return _forward("tp_attn_forward_", past_lens=given.pop("past_len_tp"), block_index=None, **given)


def _forward(op, *, tp_context, hidden_states, temp_bc0_, temp_bc1_, temp_bc2_, temp_q_, temp_k_, temp_v_, temp_o_,
             k_cache, v_cache, pre_layernorm, norm_epsilon, q_proj, k_proj, v_proj, o_proj, head_dim, rope_style,
             batch_size, q_len, sin, cos, past_lens, block_index, scaling, q_norm, k_norm, post_layernorm, rotary_dim,
             position_offsets, softcap, window_size, loras, q_bias, k_bias, v_bias, o_bias):
    if not isinstance(tp_context, TPContext):
        raise TypeError(f"{op}: tp_context must be a TPContext, got {type(tp_context).__name__}")
    dtype = _check_sizes(op, tp_context, hidden_states, head_dim, rotary_dim, batch_size, q_len, norm_epsilon)
    options = {"softmax_scale": check_options(op, True, scaling, window_size, softcap, head_dim),
               "window_size": window_size, "softcap": softcap}
    if isinstance(pre_layernorm, list | tuple) and not pre_layernorm:
        pre_layernorm = None
    _check_loras(op, loras)
    style, loras, rotary_dim = rope_style_of(rope_style, op=op), tuple(loras), rotary_dim or head_dim
    layer = _layer_of(op, tp_context, {
        "pre_layernorm": pre_layernorm, "q_proj": q_proj, "k_proj": k_proj, "v_proj": v_proj, "q_bias": q_bias,
        "k_bias": k_bias, "v_bias": v_bias, "q_norm": q_norm, "k_norm": k_norm, "o_proj": o_proj, "o_bias": o_bias,
        "post_layernorm": post_layernorm,
    }, {"dtype": dtype, "style": style, "rotary_dim": rotary_dim, "norm_epsilon": norm_epsilon})
    communicator, hidden = tp_context.communicator, hidden_states.reshape(batch_size * q_len, tp_context.hidden_size)
    rows = _rows(op, tp_context, layer, len(hidden), dtype, {
        "temp_bc0_": temp_bc0_, "temp_bc1_": temp_bc1_, "temp_bc2_": temp_bc2_, "temp_q_": temp_q_, "temp_k_": temp_k_,
        "temp_v_": temp_v_, "temp_o_": temp_o_})
    written = [(f"{name}[{n}]", array) for n, mine in enumerate(rows) for name, array in zip(_TEMPS, mine, strict=True)]
    lengths = _lengths(op, communicator, batch_size, past_lens, block_index, position_offsets)
    written += _check_caches(op, tp_context, k_cache, v_cache, batch_size, q_len, lengths)
    check_apart(op, written, [("hidden_states", hidden)])
    turns = _tables(op, communicator, style, rotary_dim, sin, cos, q_len, lengths)
    adapters = layer.adapters(loras)

    _spread(communicator, hidden, [mine.x for mine in rows])
    for n, rank in each_rank(communicator, layer.ranks):
        tokens = Tokens(k_cache[n], v_cache[n], *(None if array is None else array[n] for array in lengths), *turns[n])
        rank.attend(rows[n], tokens, batch_size, q_len, options, adapters[n])
    communicator.all_gather([mine.q for mine in rows], 1, sizes=[head_dim * heads for heads in tp_context.q_heads],
                            out=[mine.mixed for mine in rows])
    own = [mine.x[:, slice(*layer.span(rank))] for mine, rank in zip(rows, communicator.ranks, strict=True)]
    for n, rank in each_rank(communicator, layer.ranks):
        rank.project(rows[n], own[n] if post_layernorm is None else None, adapters[n])
    whole = communicator.all_gather([mine.out for mine in rows], 1, sizes=layer.features)
    if post_layernorm is not None:
        for n, rank in each_rank(communicator, layer.ranks):
            rank.add_normed(whole[n], rows[n].x)
            copy(rows[n].out, own[n])
            copy(whole[n], rows[n].x)
    result = whole[0].reshape(hidden_states.shape)
    return result.get() if isinstance(hidden, np.ndarray) and communicator.devices[0] != "cpu" else result


def _spread(communicator, hidden, x):
    """`hidden` of rank 0 in the `x` of all ranks."""
    if communicator.ranks[0] == 0:
        if isinstance(hidden, np.ndarray) and communicator.devices[0] != "cpu":
            x[0].set(np.ascontiguousarray(hidden))
        else:
            copy(x[0], hidden)
    communicator.broadcast(x)


def _layer_of(op, context, weights, options):
    """The _Layer of these weights, made once."""
    for name, values in weights.items():
        if values is not None or name.endswith("_proj"):
            check_list(op, name, values, context.communicator.ranks)
    key = (*((name, tuple(map(id, values))) for name, values in weights.items() if values is not None),
           *options.items())
    found = context.layers.get(key)
    if found is None:
        found = _Layer(op, context, weights, options)
        _drop_oldest(context.layers, _MOST_LAYERS)   # of a caller that makes new arrays for every call
        context.layers[key] = found
    return found


def _drop_oldest(kept, most):
    """Make room for one more of `most` entries."""
    for oldest in list(kept)[:1 - most]:   # a copy: other threads add to it
        kept.pop(oldest, None)


# ---- checks: all before any array is written ---------------------------------------------------------------


def _check_sizes(op, context, hidden_states, head_dim, rotary_dim, batch_size, q_len, norm_epsilon):
    """Numbers, and the shape of the hidden states; their dtype."""
    for name, number in (("batch_size", batch_size), ("q_len", q_len), ("head_dim", head_dim)):
        check_number(op, name, number, least=1, integer=True)
    check_number(op, "norm_epsilon", norm_epsilon, least=0)
    if head_dim != context.head_dim:
        raise ValueError(f"{op}: head_dim must be {context.head_dim} like the context's, got {head_dim}")
    if rotary_dim is not None:
        check_number(op, "rotary_dim", rotary_dim, least=2, integer=True)
        if rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(f"{op}: rotary_dim must be even and at most head_dim {head_dim}, got {rotary_dim}")
    dtype, hidden = check_dtype(op, "hidden_states", hidden_states, FLOATS), context.hidden_size
    array_namespace(op, hidden_states=hidden_states)
    if hidden_states.shape not in ((batch_size, q_len, hidden), (batch_size * q_len, hidden)):
        raise ValueError(f"{op}: hidden_states must be [batch_size={batch_size}, q_len={q_len}, {hidden}], got "
                         f"{list(hidden_states.shape)}")
    return dtype


def _check_loras(op, loras):
    """A list of dicts of LoRA; `TPContext.shard_loras` looks into these."""
    found = type(loras).__name__
    if isinstance(loras, list | tuple):
        wrong = [one for one in loras if not isinstance(one, Mapping)]
        wrong += [lora for one in loras if isinstance(one, Mapping) for lora in one.values()
                  if not isinstance(lora, LoRA)]
        if not wrong:
            return
        found = f"one with {type(wrong[0]).__name__}"
    raise TypeError(f"{op}: loras must be a list of dicts of projections to LoRA, got {found}")


_TEMPS = ("temp_bc0_", "temp_bc1_", "temp_bc2_", "temp_q_", "temp_k_", "temp_v_", "temp_o_")   # the fields of Rows


def _rows(op, context, layer, tokens, dtype, temps):
    """Rows of each rank here: the first `tokens` of the temporary arrays."""
    communicator = context.communicator
    for name in _TEMPS:
        check_list(op, name, temps[name], communicator.ranks)
    found = []
    for n, (rank, device) in enumerate(zip(communicator.ranks, communicator.devices, strict=True)):
        q, kv, gathered = (context.head_dim * heads for heads in (context.q_heads[rank], context.kv_heads[rank],
                                                                  context.num_heads))
        widths = (context.hidden_size, context.hidden_size, gathered, q, kv, kv, layer.features[rank])
        for name, width in zip(_TEMPS, widths, strict=True):
            array = temps[name][n]
            check_place(op, name, array, device)
            if dtype_name(array) != dtype or array.ndim != 2 or array.shape[1] != width or len(array) < tokens \
                    or not array.flags.c_contiguous:
                raise ValueError(f"{op}: {name} must be C-contiguous {dtype} [{tokens} or more, {width}], got "
                                 f"{dtype_name(array)} {list(array.shape)}")
            check_writeable(op, name, array)
        found.append(Rows(*(temps[name][n][:tokens] for name in _TEMPS)))
    return found


def _lengths(op, communicator, batch_size, past_lens, block_index, position_offsets):
    """(block_index, past_lens, position_offsets) of each rank, None for what is not there."""
    lists = {"past_lens" if op == PAGED else "past_len_tp": past_lens}
    if op == PAGED:
        lists["block_index"] = block_index
    if isinstance(position_offsets, list | tuple) and all(offsets is None for offsets in position_offsets):
        position_offsets = None   # as Params.prep_tp leaves it
    if position_offsets is not None:
        lists["position_offsets"] = position_offsets
    for name, arrays in lists.items():
        check_list(op, name, arrays, communicator.ranks)
        check_dtype(op, name, arrays[0], "int32")
        check_alike(op, name, arrays, communicator.devices)
        if name == "block_index":
            check_shape(op, name, arrays[0], (batch_size, None), "[batch_size, max_pages]")
        elif name != "position_offsets" or arrays[0].shape != (batch_size, 1):
            check_shape(op, name, arrays[0], (batch_size,), "[batch_size]")
        for array in arrays[1:]:
            if array is not arrays[0] and isinstance(array, np.ndarray) and (array != arrays[0]).any():
                raise ValueError(f"{op}: {name} must be the same on all ranks, got {arrays[0].tolist()} and "
                                 f"{array.tolist()}")
    return block_index, past_lens, position_offsets and [array.reshape(batch_size) for array in position_offsets]


def _check_caches(op, context, k_cache, v_cache, batch_size, q_len, lengths):
    """Caches of the ranks' heads, else alike, with room for the new tokens; their arrays by name, all written."""
    communicator, arrays, pages, formats = context.communicator, [], None, {}
    for name, caches in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_list(op, name, caches, communicator.ranks)
        for n, (cache, rank, device) in enumerate(zip(caches, communicator.ranks, communicator.devices, strict=True)):
            side = kv_side(op, f"{name}[{n}]", cache)
            for array in side.arrays.values():
                check_place(op, name, array, device)
            if not isinstance(cache, QuantizedKV):   # which says itself what of it is written
                check_writeable(op, f"{name}[{n}]", cache)
            pages = pages or side.shape[:2]
            check_shape(op, f"{name}[{n}]", side, (*pages, context.kv_heads[rank], context.head_dim),
                        "pages, page_size, KV heads of the rank, head_dim")
            if side.format != formats.setdefault(name, side.format):
                raise TypeError(f"{op}: {name} must be of one format on all ranks, got {formats[name]} and "
                                f"{side.format}")
            arrays += side.arrays.items()
    table, past = (of_ranks and of_ranks[0] for of_ranks in lengths[:2])
    if table is None and pages[0] < batch_size:
        raise ValueError(f"{op}: k_cache must have a page for each of the {batch_size} sequences, got {pages[0]}")
    if isinstance(past, np.ndarray):   # on a GPU nothing is read; the kernels leave out what has no place
        table = np.arange(batch_size, dtype=np.int32)[:, None] if table is None else table
        room = table.shape[1] * pages[1] - q_len
        if past.min() < 0 or past.max() > room:
            raise ValueError(f"{op}: {'past_lens' if op == PAGED else 'past_len_tp'} must be from 0 to {room}, with "
                             f"which {q_len} new tokens have room, got {past.tolist()}")
        PageTable(table).check(op, past + np.int32(q_len), *pages)
        positions = past.astype(np.int64)[:, None] + np.arange(q_len)
        places = np.take_along_axis(table.astype(np.int64), positions // pages[1], 1) * pages[1] + positions % pages[1]
        if len(np.unique(places)) < places.size:
            raise ValueError(f"{op}: block_index must have a place of its own for every new token, got {table.tolist()}"
                             f" with pages of {pages[1]} after {past.tolist()} tokens")
    return arrays


def _tables(op, communicator, style, rotary_dim, sin, cos, q_len, lengths):
    """(cos, sin) of each rank as kernels take them, with a row for every position; None without RoPE."""
    if style is None:
        return [(None, None)] * len(communicator.ranks)
    for name, given in (("sin", sin), ("cos", cos)):
        check_list(op, name, given, communicator.ranks)
    found = [tables(sin[n], cos[n], style, rotary_dim, array_module(communicator.devices[n]), op=op)
             for n, _ in each_rank(communicator, communicator.ranks)]
    for name, arrays in zip(("cos", "sin"), zip(*found, strict=True), strict=True):
        check_alike(op, name, arrays, communicator.devices)
    _, past, offsets = (of_ranks and of_ranks[0] for of_ranks in lengths)
    if isinstance(past, np.ndarray):
        last = (past if offsets is None else past.astype(np.int64) + offsets).max() + q_len - 1
        if last >= len(found[0][0]):
            raise ValueError(f"{op}: sin and cos must have a row for position {last}, got {len(found[0][0])} rows")
    return found
