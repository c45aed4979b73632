# SPDX-License-Identifier: Apache-2.0
"""Where a layer keeps what goes from one op to the next, and callers' arrays as rows."""

import weakref
from typing import NamedTuple

import numpy as np

from ..runtime import layer_workspace
from ..runtime.arrays import array_namespace, as_rows, dtype_name
from ..runtime.structs import address

_numbers = {}   # (numpy or cupy, device) -> int32 0, 1, 2, ...


class Buffers(NamedTuple):
    """Views into the workspace for one number of tokens."""

    tokens: int
    block: object
    normed: object        # [tokens, hidden_size], dtype
    heads: object         # [tokens, rows of q, k and v], dtype
    linears: tuple        # the columns of `heads` of each Linear of q, k and v
    q: object             # [tokens, num_heads, head_dim] of heads
    k: object
    v: object
    mixed: object         # [tokens, num_heads, head_dim]: finished queries, then attention's output in their place
    k_out: object         # [tokens, num_kv_heads, head_dim]: finished keys, where no cache takes them
    v_out: object
    projected: object     # float32 [tokens, hidden_size], before a post-norm
    added: object         # [tokens, hidden_size], x's dtype, after it
    outs: dict            # columns of `heads` of "q", "k" and "v"
    sorted_x: object      # bytes for rows in the order of their adapters: of an input
    sorted_y: object      # and of an output, None without adapters


class Workspace:
    """Views into the scratch that all layers of a device, stream and thread share.

    Parameters
    ----------
    attn : QAttn
    loras : bool
        It has adapters.
    """

    def __init__(self, attn, loras):
        size, x_size, hidden = attn.dtype.itemsize, attn.x_dtype.itemsize, attn.hidden_size
        columns, post = attn.q_size + 2 * attn.kv_size, loras or attn.post_layernorm is not None
        self._attn, self._held = weakref.proxy(attn), None   # no cycle: a layer's weights go with it
        self._row_bytes = (   # of a token, in the order of the parts in `_made`
            hidden * size, columns * size, attn.q_size * size, attn.kv_size * size, attn.kv_size * size,
            hidden * 4 * post, hidden * x_size * post, max(hidden * x_size, attn.q_size * size) * loras,
            max(columns * size, hidden * 4) * loras)

    def of(self, tokens):
        """Buffers for `tokens`: made once, as long as the number of tokens and the scratch stay."""
        held = self._held
        if held is None or held.tokens != tokens or \
                layer_workspace(self._attn.xp, held.block.size) is not held.block:
            held = self._held = self._made(tokens)
        return held

    def _made(self, tokens):
        attn, starts, end = self._attn, [], 0
        for row in self._row_bytes:
            starts.append(end)
            end += -(-tokens * row // 256) * 256
        block = layer_workspace(attn.xp, end)
        parts = [block[start:start + tokens * row] for start, row in zip(starts, self._row_bytes, strict=True)]

        def part(n, dtype, *shape):
            return parts[n].view(dtype).reshape(tokens, *shape) if parts[n].size else None

        kv = attn.num_kv_heads, attn.head_dim
        heads = part(1, attn.dtype, attn.num_heads + 2 * attn.num_kv_heads, attn.head_dim)
        flat = heads.reshape(tokens, -1)
        return Buffers(
            tokens, block, part(0, attn.dtype, attn.hidden_size), flat,
            tuple(flat[:, linear.start:linear.stop] for linear in attn.qkv), heads[:, :attn.num_heads],
            heads[:, attn.num_heads:-attn.num_kv_heads], heads[:, -attn.num_kv_heads:],
            part(2, attn.dtype, attn.num_heads, attn.head_dim), part(3, attn.dtype, *kv), part(4, attn.dtype, *kv),
            part(5, np.float32, attn.hidden_size), part(6, attn.x_dtype, attn.hidden_size), self.columns(flat),
            parts[7], parts[8])

    def columns(self, flat):
        """Columns of "q", "k" and "v" in rows of all of them."""
        q, kv = self._attn.q_size, self._attn.kv_size
        return {"q": flat[:, :q], "k": flat[:, q:q + kv], "v": flat[:, q + kv:]}


def buffers_of_rows(buffers, rows):
    """Buffers of some of the tokens, as far as `_attend` looks at them."""
    parts = {name: getattr(buffers, name)[rows] for name in ("q", "k", "v", "mixed", "k_out", "v_out")}
    return buffers._replace(tokens=rows.stop - rows.start, **parts)


def row_numbers(xp, tokens):
    """int32 [tokens]: 0, 1, 2, ...: the places of rows in arrays of their own."""
    key = xp.__name__, None if xp is np else xp.cuda.runtime.getDevice()
    held = _numbers.setdefault(key, [])   # older ones stay: a captured graph may read them
    if not held or len(held[-1]) < tokens:
        held.append(xp.asarray(np.arange(1 << max(10, (tokens - 1).bit_length()), dtype=np.int32)))
    return held[-1][:tokens]


def token_rows(xp, name, array, batch_size, q_len, width, dtype):
    """`array` [batch_size, q_len, width] as [tokens, width], a view."""
    tokens = batch_size * q_len
    _check_kind(xp, name, array, dtype)
    if array.shape == (tokens, width):
        return as_rows("QAttn", name, array)
    if array.shape[:-1] != (batch_size, q_len) or array.shape[-1] != width:
        heads = array.shape[-2:] if array.shape[:-2] in ((batch_size, q_len), (tokens,)) else (0, 0)
        if heads[0] * heads[1] == width:   # heads are an axis of their own
            return _viewed(name, array, (tokens, width))
        raise ValueError(f"QAttn: {name} must be [batch_size={batch_size}, q_len={q_len}, {width}], got "
                         f"{list(array.shape)}")
    return as_rows("QAttn", name, array)


def head_rows(xp, name, array, batch_size, q_len, heads, head_dim, dtype):
    """`array` [batch_size, q_len, heads, head_dim] as [tokens, heads, head_dim], a view."""
    _check_kind(xp, name, array, dtype)
    tokens = batch_size * q_len
    for before in ((batch_size, q_len), (tokens,)):
        if array.shape in ((*before, heads, head_dim), (*before, heads * head_dim)):
            return _viewed(name, array, (tokens, heads, head_dim))
    raise ValueError(f"QAttn: {name} must be [batch_size={batch_size}, q_len={q_len}, {heads}, {head_dim}], got "
                     f"{list(array.shape)}")


def _check_kind(xp, name, array, dtype):
    if array_namespace("QAttn", **{name: array}) is not xp:
        raise TypeError(f"QAttn: {name} must be a {xp.__name__} array like the weights, got another kind")
    if dtype_name(array) != dtype:
        raise TypeError(f"QAttn: {name} must be {dtype}, got {dtype_name(array)}")


def _viewed(name, array, shape):
    """`array` in another shape over the same memory."""
    view = array.reshape(shape)
    if array.size and address(view) != address(array):
        raise ValueError(f"QAttn: {name} must have one stride between tokens, got strides {array.strides} bytes for "
                         f"shape {list(array.shape)}")
    return view
