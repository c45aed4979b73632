# SPDX-License-Identifier: Apache-2.0
"""What ``kv_append`` does to new heads before it stores them: bias, norm, RoPE, log-n. Its arguments fit."""

import numpy as np

from ..devices import on_host, to_host
from ..runtime.checks import check_array, check_number, check_writeable
from .places import check_index

STYLES = ("neox", "interleaved")
_OP = "kv_append"


def check_rope(entries, head_dim, cos, sin, rope_rows, positions, q_len, style, rotary_dim):
    """The tables and their rows; returns rotary_dim, 0 without RoPE."""
    if style not in STYLES:
        raise ValueError(f"{_OP}: style must be one of {STYLES}, got {style!r}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{_OP}: cos and sin must be given together, got {'sin' if cos is None else 'cos'} alone")
    if cos is None:
        for name, value in (("rope_rows", rope_rows), ("rotary_dim", rotary_dim)):
            if value is not None:
                raise ValueError(f"{_OP}: {name} must come with cos and sin, got neither")
        return 0
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    check_number(_OP, "rotary_dim", rotary_dim, integer=True)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(f"{_OP}: rotary_dim must be even and in [2, head_dim={head_dim}], got {rotary_dim}")
    check_array(_OP, "cos", cos, "float32", (None, rotary_dim // 2), "[rows, rotary_dim / 2]")
    check_array(_OP, "sin", sin, "float32", cos.shape, "the shape of cos")
    if rope_rows is None and positions is None and q_len is None:
        raise ValueError(f"{_OP}: rope_rows or positions must be given with cos and sin, got neither")
    if rope_rows is not None:
        check_index("rope_rows", rope_rows, *entries)
    return rotary_dim


def check_q_len(tokens, q_len, rope_base):
    """q_len and rope_base; how many entries positions and rope_rows have, and what they are called."""
    if q_len is None:
        if rope_base != 0:
            raise ValueError(f"{_OP}: rope_base must come with q_len, got {rope_base} without")
        return tokens, "[tokens]"
    check_number(_OP, "q_len", q_len, least=1, integer=True)
    check_number(_OP, "rope_base", rope_base, least=-1, integer=True)
    if tokens % q_len:
        raise ValueError(f"{_OP}: q_len must divide the {tokens} tokens, got {q_len}")
    return tokens // q_len, "[tokens / q_len]"


def rows_on_host(tokens, positions, rope_rows, q_len, rope_base):
    """Row of the tables of each token, on the host."""
    if q_len is None or q_len == 1 and rope_rows is None and positions is not None:
        return on_host(positions if rope_rows is None else rope_rows)
    if rope_rows is None and positions is not None:
        first = to_host(positions).astype(np.int64)[:, None]
        return np.where(first < 0, -1, first + np.arange(q_len)).ravel()
    first = np.zeros(tokens // q_len, np.int64) if rope_rows is None else to_host(rope_rows).astype(np.int64)
    first = np.maximum(first, 0) if rope_base < 0 else first + rope_base
    return np.maximum(first[:, None] + np.arange(q_len), 0).ravel()


def check_steps(heads, kv_heads, head_dim, head_dim_v, dtype, biases, norms):
    """Biases and gains of norms; the dtype of the gains, `dtype` without."""
    for (name, bias), shape in zip(biases.items(), ((heads, head_dim), (kv_heads, head_dim), (kv_heads, head_dim_v)),
                                   strict=True):
        if bias is not None:
            check_array(_OP, name, bias, dtype, shape, "[heads, head_dim]")
    gain = None
    for name, norm in norms.items():
        if norm is not None:
            shape, axes = (head_dim,), "[head_dim]"
            if norm.ndim == 2:
                shape, axes = (heads if name == "q_norm" else kv_heads, head_dim), "[heads, head_dim]"
            gain = check_array(_OP, name, norm, (dtype, "float32") if gain is None else gain, shape, axes)
    return gain or dtype


def check_queries(q, q_out, dtype, positions, logn_max_position):
    """Where queries go."""
    if q is None:
        if q_out is not None or logn_max_position is not None:
            raise ValueError(f"{_OP}: {'q_out' if q_out is not None else 'logn_max_position'} must come with q, "
                             "got none")
        return
    if logn_max_position is not None:
        check_number(_OP, "logn_max_position", logn_max_position, least=2, integer=True)
        if positions is None:
            raise ValueError(f"{_OP}: positions must be given with logn_max_position, got none")
    check_array(_OP, "q_out", q_out, dtype, q.shape, "the shape of q")
    check_writeable(_OP, "q_out", q_out)
