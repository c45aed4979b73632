# SPDX-License-Identifier: Apache-2.0
"""What one rank computes in ExLlamaV2's tensor-parallel attention, over the arrays that it is given."""

from typing import NamedTuple

import numpy as np

from ..ops.attention import attention
from ..ops.kv_append import kv_append
from ..ops.paged_decode import MAX_Q_LEN, paged_decode
from ..ops.quant_gemm import quant_gemm
from ..ops.rms_norm import rms_norm
from ..q_attn.buffers import row_numbers
from ..q_attn.lora import Adapters
from ..q_attn.norms import add_normed
from ..q_attn.weights import matrix, vector
from ..runtime.launch import run_library
from .rank_lists import array_module, check_place

_AXES = "[heads of the rank * head_dim, hidden_size]"


class Rows(NamedTuple):
    """The temporary arrays of a rank, as far as the tokens of a step fill them: [tokens, ...]."""

    x: object        # temp_bc0_: [hidden_size]
    normed: object   # temp_bc1_: [hidden_size]
    mixed: object    # temp_bc2_: [all heads * head_dim], attention of all ranks; before that, raw queries of this one
    q: object        # temp_q_: [heads of the rank * head_dim], finished queries, then their attention
    k: object        # temp_k_: [KV heads of the rank * head_dim]
    v: object        # temp_v_
    out: object      # temp_o_: [features of the rank]


class Tokens(NamedTuple):
    """A rank's keys and values, and where the new tokens stand in them."""

    k_cache: object   # ndarray or QuantizedKV
    v_cache: object
    table: object     # int32 [batch_size, max_pages], None: sequence b is page b
    past: object      # int32 [batch_size], tokens before the new ones
    offsets: object   # int32 [batch_size] that RoPE adds to positions, or None
    cos: object       # float32 [positions, rotary_dim / 2], None without RoPE
    sin: object


class Rank:
    """A rank's weights of a layer as they are given, nothing copied; those of the output are rows of the whole.

    Parameters
    ----------
    op : str
        Whose messages these are.
    context : TPContext
    rank : int
    device : "cpu" or int
        Where its arrays are.
    dtype : str
    style : "neox", "interleaved" or None
    rotary_dim : int
    norm_epsilon : float
    weights : dict
        By the names of the arguments of `tp_attn_forward_paged_`, None for what is not there.
    """

    def __init__(self, op, context, rank, device, dtype, style, rotary_dim, norm_epsilon, weights):
        self.xp = xp = array_module(device)
        self.eps, self.head_dim = norm_epsilon, context.head_dim
        heads, kv_heads, hidden = context.q_heads[rank], context.kv_heads[rank], context.hidden_size
        self.heads, self.kv_heads = heads, kv_heads
        q_size, kv_size, gathered = (self.head_dim * n for n in (heads, kv_heads, context.num_heads))
        self.q, self.k, self.v = (matrix(f"{name}_proj", weights[f"{name}_proj"], (size, hidden), _AXES, op=op)
                                  for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)))
        o = weights["o_proj"]
        self.o = matrix("o_proj", o, (getattr(o, "shape", (0,))[0], gathered), "[features, all heads * head_dim]",
                        op=op)
        for name in "qkvo":
            check_place(op, f"{name}_proj", getattr(self, name).segments[0].codes, device)
        self.features = self.o.shape[0]

        def gain(name, *shapes):
            return vector(name, weights[name], shapes, xp, op=op)

        self.pre_layernorm, self.post_layernorm = (gain(name, (hidden,)) for name in
                                                   ("pre_layernorm", "post_layernorm"))
        self.q_bias, self.k_bias, self.v_bias, self.o_bias = (
            gain(f"{name}_bias", (size,)) for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size),
                                                             ("o", self.features)))
        norms = {"q_norm": gain("q_norm", (self.head_dim,), (heads, self.head_dim)),
                 "k_norm": gain("k_norm", (self.head_dim,), (kv_heads, self.head_dim))}
        self.finish = {"norm_eps": norm_epsilon} | {name: norm for name, norm in norms.items() if norm is not None}
        self.turn = {} if style is None else {"style": style, "rotary_dim": rotary_dim}
        self._dtype = dtype

    def adapters(self, given):
        """What `attend` and `project` add, from this rank's part of some adapters."""
        sizes = {"q": self.q.shape, "k": self.k.shape, "v": self.v.shape, "o": self.o.shape}
        return Adapters(given, sizes, self._dtype, self.xp)

    def attend(self, rows, tokens, batch_size, q_len, options, loras=None):
        """Attention of the rank's heads over its cache, new tokens appended: from rows.x to rows.q.

        Parameters
        ----------
        rows : Rows
        tokens : Tokens
        batch_size, q_len : int
        options : dict
            ``softmax_scale``, ``window_size`` and ``softcap`` of attention.
        loras : Adapters, optional
            All of them are added.
        """
        normed = rows.x
        if self.pre_layernorm is not None:
            normed = rms_norm(rows.x, self.pre_layernorm, eps=self.eps, out=rows.normed)
        raw = rows.mixed.reshape(-1)[:rows.q.size].reshape(rows.q.shape)
        for weight, bias, out in ((self.q, self.q_bias, raw), (self.k, self.k_bias, rows.k),
                                  (self.v, self.v_bias, rows.v)):
            quant_gemm(normed, weight, bias=bias, out=out)
        if loras is not None:
            loras.add(("q", "k", "v"), normed, {"q": raw, "k": rows.k, "v": rows.v}, loras.names.values())

        table = row_numbers(self.xp, batch_size)[:, None] if tokens.table is None else tokens.table
        turn = self.turn
        if turn:
            first = tokens.past if tokens.offsets is None else self._sum(tokens.past, tokens.offsets)
            turn = turn | {"cos": tokens.cos, "sin": tokens.sin, "rope_rows": first}
        q = self._heads(rows.q, self.heads)
        kv_append(self._heads(rows.k, self.kv_heads), self._heads(rows.v, self.kv_heads), tokens.k_cache,
                  tokens.v_cache, block_table=table, positions=tokens.past, q_len=q_len,
                  q=self._heads(raw, self.heads), q_out=q, **turn, **self.finish)

        after = self._sum(tokens.past, q_len)
        if q_len <= MAX_Q_LEN:
            q = q.reshape(batch_size, q_len, self.heads, self.head_dim)
            paged_decode(q, tokens.k_cache, tokens.v_cache, block_table=table, cache_seqlens=after, out=q, **options)
        else:
            starts = self.xp.asarray(np.arange(batch_size + 1, dtype=np.int32) * np.int32(q_len))
            attention(q, tokens.k_cache, tokens.v_cache, cu_seqlens_q=starts, cache_seqlens=after, block_table=table,
                      max_q_len=q_len, out=q, **options)

    def _sum(self, array, other):
        """``array + other``, a new array; in a captured step with every replay."""
        total = self.xp.empty(array.shape, array.dtype)

        def add():
            place = total
            place[...] = array
            place += other

        run_library("add", _arch(array), add)
        return total

    def _heads(self, rows, heads):
        return rows.reshape(-1, heads, self.head_dim)

    def project(self, rows, x, loras=None):
        """rows.out = the rank's columns of x (None: 0) + attention of all heads @ Woᵀ."""
        if x is not None:
            copy(rows.out, x)
        quant_gemm(rows.mixed, self.o, bias=self.o_bias, accumulate=x is not None, out=rows.out)
        if loras is not None:
            loras.add(("o",), rows.mixed, {"o": rows.out}, loras.names.values())

    def add_normed(self, projected, x):
        """x += post_norm(projected), which is overwritten."""
        add_normed(projected, x, projected, self.post_layernorm, None, True, self.eps)


def copy(target, source):
    """``target[...] = source``, arrays of one kind; in a captured step with every replay."""
    run_library("copy", _arch(target), lambda: target.__setitem__(..., source))


def _arch(array):
    return "cpu" if isinstance(array, np.ndarray) else "gpu"
