# SPDX-License-Identifier: Apache-2.0
"""ExLlamaV2's tensor-parallel attention over lists of shards: same names, order of arguments and effects."""

import numpy as np

from .lora import Adapters
from .ops.attention import attention
from .ops.kv_append import kv_append
from .ops.paged_decode import MAX_Q_LEN, paged_decode
from .ops.quant_gemm import quant_gemm
from .ops.rms_norm import rms_norm
from .q_attn import QAttn
from .q_attn_buffers import row_numbers
from .q_attn_weights import Linear, matrix, vector
from .rank_lists import array_module, each_rank
from .runtime.arrays import array_namespace, dtype_name
from .runtime.checks import FLOATS, check_dtype, check_number, check_shape, check_writeable
from .runtime.launch import run_library
from .tensor_parallel import TPContext
from .tp_attn import copy

_MOST_LAYERS = 512   # whose weights a context keeps prepared


class _Listed(QAttn):
    """A rank's projections as they are given, nothing copied; those of the output have its rows, not its columns."""

    def __init__(self, gathered, **layer):
        self._gathered = gathered   # columns of the output projection
        super().__init__(**layer)

    def _set_projections(self, q, k, v, o, q_bias, k_bias, v_bias, o_bias):
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linears, start = [], 0
        for name, weight, bias, size in (("q", q, q_bias, self.q_size), ("k", k, k_bias, self.kv_size),
                                         ("v", v, v_bias, self.kv_size)):
            weight = matrix(f"{name}_proj", weight, (size, self.hidden_size), "[heads * head_dim, hidden_size]")
            linears.append(Linear(weight, vector(f"{name}_bias", bias, ((size,),), self.xp), start, start + size))
            start += size
        self.qkv = tuple(linears)
        self.o_proj = matrix("o_proj", o, (o.shape[0], self._gathered), "[features, all heads * head_dim]")
        self.o_bias = vector("o_bias", o_bias, ((o.shape[0],),), self.xp)

    def set_loras(self, adapters):
        """As QAttn's, for rows of the output projection."""
        kv = self.kv_size, self.hidden_size
        sizes = {"q": (self.q_size, self.hidden_size), "k": kv, "v": kv, "o": self.o_proj.shape}
        self.loras = Adapters(adapters, sizes, self._dtype_name, self.xp)
        self._lay_out()
        return self.loras.max_rank

    def attend(self, op, x, queries, caches, table, past, offsets, tables, batch_size, q_len, options):
        """Attention of the rank's heads over its cache, new tokens appended; in `queries`."""
        check_dtype(op, "past_lens", past, "int32")
        check_shape(op, "past_lens", past, (batch_size,), "[batch_size]")
        bases = past
        if offsets is not None:
            check_dtype(op, "position_offsets", offsets, "int32")
            bases = added(past, offsets.reshape(batch_size))
        turn = self._turn_from(0, bases, batch_size, q_len, *tables)
        buffers = self._project(x, self._all_loras)
        q = queries.reshape(len(x), self.num_heads, self.head_dim)
        table = row_numbers(self.xp, batch_size)[:, None] if table is None else table   # sequence b is page b
        kv_append(buffers.k, buffers.v, *caches, block_table=table, positions=past, q_len=q_len, q=buffers.q, q_out=q,
                  **turn, **self._finish)
        after = added(past, q_len)
        if q_len <= MAX_Q_LEN:
            q = q.reshape(batch_size, q_len, self.num_heads, self.head_dim)
            paged_decode(q, *caches, block_table=table, cache_seqlens=after, out=q, **options)
        else:
            starts = self.xp.asarray(np.arange(batch_size + 1, dtype=np.int32) * np.int32(q_len))
            attention(q, *caches, cu_seqlens_q=starts, cache_seqlens=after, block_table=table, max_q_len=q_len, out=q,
                      **options)

    def project(self, mixed, x, out):
        """The rank's columns of x (none: 0) + attention of all heads @ Woᵀ."""
        if x is not None:
            copy(out, x)
        quant_gemm(mixed, self.o_proj, bias=self.o_bias, accumulate=x is not None, out=out)
        self.loras.add(("o",), mixed, {"o": out}, *self._all_loras)

    @property
    def _all_loras(self):
        return list(self.loras.names.values()), None

    def add_normed(self, projected, x):
        """x += post_norm(projected), which is overwritten."""
        rms_norm(projected, self.post_layernorm, eps=self.norm_epsilon, out=projected)
        # the sum is what is wanted of this norm; its result is nobody's
        rms_norm(projected, self.post_layernorm, eps=self.norm_epsilon, residual=x, out=projected)


class _Layer:
    """What a context keeps of a layer's weights: shards, and the features of the hidden state of every rank."""

    def __init__(self, op, context, lists, options):
        self.weights = {name: value and tuple(value) for name, value in lists.items()}   # their ids are its key
        communicator = context.communicator
        self.shards, rows = [], []
        for n, rank in each_rank(communicator, communicator.ranks):
            mine = {name: None if value is None else value[n] for name, value in lists.items()}
            xp = array_module(communicator.devices[n])
            self.shards.append(_Listed(
                context.num_heads * context.head_dim, num_heads=context.q_heads[rank],
                num_kv_heads=context.kv_heads[rank], hidden_size=context.hidden_size, has_residual=True, xp=xp,
                **mine, **options))
            rows.append(xp.asarray(np.array([self.shards[n].o_proj.shape[0]])))
        everyone = communicator.all_gather(rows)[0]
        self.features = [int(n) for n in (everyone if isinstance(everyone, np.ndarray) else everyone.get())]
        if sum(self.features) != context.hidden_size:
            raise ValueError(f"{op}: o_proj must have the rows of one rank each, {context.hidden_size} in all, got "
                             f"{self.features}; TPContext.shard_output_rows makes them")
        self._context, self._loras = context, ()

    def set_loras(self, loras):
        """Add these adapters in the calls that follow; nothing to do if they are those of the last one."""
        if len(loras) == len(self._loras) and all(a is b for a, b in zip(loras, self._loras, strict=True)):
            return
        communicator, adapters = self._context.communicator, dict(enumerate(loras))
        for n, shard in each_rank(communicator, self.shards):
            rank = communicator.ranks[n]
            start = sum(self.features[:rank])
            shard.set_loras(self._context.shard_loras(adapters, rank, features=(start, start + self.features[rank])))
        self._loras = tuple(loras)


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
    temp_bc1_ : list or None
        Not used.
    temp_bc2_ : list of ndarray [rows or more, num_heads * head_dim]
        Scratch: attention of all heads.
    temp_q_ : list of ndarray [rows or more, heads of the rank * head_dim]
        Scratch: queries, then attention of the rank's heads.
    temp_k_, temp_v_ : list or None
        Not used.
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
        Adapters of the whole layer, in the order they are added. Each rank's part is prepared when they differ from the
        last call's.
    q_bias, k_bias, v_bias, o_bias : list of ndarray, optional
        Of the rows of each projection.

    Returns
    -------
    ndarray
        temp_o_ of all ranks side by side, like `hidden_states`; a new array, the same in every process.

    Raises
    ------
    TypeError, ValueError
        Lists and arrays that do not fit.

    Notes
    -----
    Where ExLlamaV2 ignores head norms, post-norms, partial rotation, position offsets, softcap and windows, this does
    what they say. The residual is added once, by the rank that has the features.
    """
    return _forward("tp_attn_forward_paged_", **locals())


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
    if head_dim != tp_context.head_dim:
        raise ValueError(f"{op}: head_dim must be {tp_context.head_dim} like the context's, got {head_dim}")
    check_number(op, "batch_size", batch_size, least=1, integer=True)
    check_number(op, "q_len", q_len, least=1, integer=True)
    communicator, tokens, hidden = tp_context.communicator, batch_size * q_len, tp_context.hidden_size
    xp = array_namespace(op, hidden_states=hidden_states)
    dtype = check_dtype(op, "hidden_states", hidden_states, FLOATS)
    if hidden_states.shape not in ((batch_size, q_len, hidden), (tokens, hidden)):
        raise ValueError(f"{op}: hidden_states must be [batch_size={batch_size}, q_len={q_len}, {hidden}], got "
                         f"{list(hidden_states.shape)}")
    weights = {"layernorm": pre_layernorm or None, "q_q_proj": q_proj, "q_k_proj": k_proj, "q_v_proj": v_proj,
               "q_o_proj": o_proj, "q_norm": q_norm, "k_norm": k_norm, "post_layernorm": post_layernorm,
               "q_bias": q_bias, "k_bias": k_bias, "v_bias": v_bias, "o_bias": o_bias}
    offsets = _given(position_offsets)
    optional = {"block_index": block_index, "position_offsets": offsets, "sin": sin, "cos": cos}
    needed = {"temp_bc0_": temp_bc0_, "temp_bc2_": temp_bc2_, "temp_q_": temp_q_, "temp_o_": temp_o_,
              "k_cache": k_cache, "v_cache": v_cache, "past_lens": past_lens}
    _check_lists(op, communicator, needed, weights, optional)
    layer = _layer(op, tp_context, weights, {"head_dim": head_dim, "norm_epsilon": norm_epsilon, "dtype": dtype,
                                             "rope_style": rope_style, "sincos_size": rotary_dim})
    layer.set_loras(loras)
    q_sizes = [head_dim * heads for heads in tp_context.q_heads]
    starts = [sum(layer.features[:rank]) for rank in communicator.ranks]
    x, queries, mixed, outs = (
        [_rows(op, name, given[n], tokens, sizes[rank], dtype) for n, rank in enumerate(communicator.ranks)]
        for name, given, sizes in (("temp_bc0_", temp_bc0_, [hidden] * communicator.size),
                                   ("temp_q_", temp_q_, q_sizes),
                                   ("temp_bc2_", temp_bc2_, [sum(q_sizes)] * communicator.size),
                                   ("temp_o_", temp_o_, layer.features)))
    _spread(communicator, hidden_states.reshape(tokens, hidden), x)
    tables = [(None, None)] * len(x) if sin is None or cos is None else list(zip(sin, cos, strict=True))
    options = {"softmax_scale": scaling, "window_size": window_size, "softcap": softcap}
    for n, shard in each_rank(communicator, layer.shards):
        shard.attend(op, x[n], queries[n], (k_cache[n], v_cache[n]), None if block_index is None else block_index[n],
                     past_lens[n], None if offsets is None else offsets[n], tables[n], batch_size, q_len, options)
    communicator.all_gather(queries, 1, sizes=q_sizes, out=mixed)
    own = [array[:, start:start + layer.features[rank]]
           for array, start, rank in zip(x, starts, communicator.ranks, strict=True)]
    for n, shard in each_rank(communicator, layer.shards):
        shard.project(mixed[n], own[n] if shard.post_layernorm is None else None, outs[n])
    whole = communicator.all_gather(outs, 1, sizes=layer.features)
    if post_layernorm is not None:
        for n, shard in each_rank(communicator, layer.shards):
            shard.add_normed(whole[n], x[n])
            copy(outs[n], own[n])
            copy(whole[n], x[n])
    result = whole[0].reshape(hidden_states.shape)
    return result.get() if xp is np and communicator.devices[0] != "cpu" else result


def added(array, other):
    """``array + other``, a new array; in a captured step with every replay."""
    total = array_namespace("tp_attn_forward_", array=array).empty(array.shape, array.dtype)

    def add():
        place = total
        place[...] = array
        place += other

    run_library("add", "cpu" if isinstance(array, np.ndarray) else "gpu", add)
    return total


def _spread(communicator, hidden, x):
    """`hidden` of rank 0 in the `x` of all ranks."""
    if communicator.ranks[0] == 0:
        if isinstance(hidden, np.ndarray) and communicator.devices[0] != "cpu":
            x[0].set(np.ascontiguousarray(hidden))
        else:
            copy(x[0], hidden)
    communicator.broadcast(x)


def _given(arrays):
    """A list, or None where there is none or one of Nones, as `Params.prep_tp` leaves it."""
    return None if arrays is None or all(array is None for array in arrays) else arrays


def _check_lists(op, communicator, needed, weights, optional):
    for name, value in (needed | weights | optional).items():
        name = {"layernorm": "pre_layernorm"}.get(name, name.removeprefix("q_") if name.endswith("proj") else name)
        if value is None and name not in needed and not name.endswith("proj"):
            continue
        if not isinstance(value, list | tuple) or len(value) != len(communicator.ranks):
            raise ValueError(f"{op}: {name} must be a list of one for each of the ranks {list(communicator.ranks)}, "
                             f"got {len(value) if isinstance(value, list | tuple) else type(value).__name__}")


def _layer(op, context, weights, options):
    """The _Layer of these weights, made once."""
    key = (*((name, tuple(map(id, value))) for name, value in weights.items() if value is not None),
           *options.items())
    found = context.layers.get(key)
    if found is None:
        while len(context.layers) >= _MOST_LAYERS:   # of a caller that makes new arrays for every call
            context.layers.pop(next(iter(context.layers)))
        found = context.layers[key] = _Layer(op, context, weights, options)
    return found


def _rows(op, name, array, tokens, width, dtype):
    """The first `tokens` rows of a temporary array."""
    array_namespace(op, **{name: array})
    if dtype_name(array) != dtype or array.ndim != 2 or array.shape[1] != width or len(array) < tokens \
            or not array.flags.c_contiguous:
        raise ValueError(f"{op}: {name} must be C-contiguous {dtype} [{tokens} or more, {width}], got "
                         f"{dtype_name(array)} {list(array.shape)}")
    check_writeable(op, name, array)
    return array[:tokens]
