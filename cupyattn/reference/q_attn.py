# SPDX-License-Identifier: Apache-2.0
"""The meaning of `cupyattn.QAttn` in plain NumPy, float64 inside: no pages, no packed weights, no cache formats."""

import numpy as np

from .attention import _attend
from .layer_norm import layer_norm
from .rms_norm import rms_norm
from .rope import rope


def q_attn(x, keys, values, *, q_proj, k_proj, v_proj, o_proj, num_heads, num_kv_heads, head_dim, positions=None,
           sin=None, cos=None, rope_style="neox", rotary_dim=None, layernorm=None, layernorm_bias=None,
           layernorm_is_rms=True, norm_epsilon=1e-6, q_norm=None, k_norm=None, headnorm_is_rms=True,
           post_layernorm=None, post_layernorm_bias=None, has_residual=True, q_bias=0.0, k_bias=0.0, v_bias=0.0,
           o_bias=0.0, loras=None, causal=True, softmax_scale=None, window_size=0, softcap=0.0, sinks=None, mask=None,
           blocks=None):
    """One step of the layer over `batch` sequences of the same number of new tokens.

    Parameters
    ----------
    x : ndarray [batch, q_len, hidden]
    keys, values : list of ndarray [cached tokens, num_kv_heads, head_dim]
        One per sequence.
    q_proj, k_proj, v_proj, o_proj : ndarray [out, in]
        Dequantized.
    positions : ndarray [batch, q_len]
        Rows of cos and sin.
    loras : list of (list of dict), optional
        For each sequence its adapters: name of a projection -> ndarray [out, in], the scaled product of both matrices.
    mask : ndarray [batch, heads or 1, q_len or 1, keys]
        bool or additive.
    blocks : ndarray, optional
        cu_seqlens over the tokens of all sequences: each block sees itself and nothing else.

    Returns
    -------
    (x, keys, values), with the new tokens, float64
    """
    x = x.astype(np.float64)
    batch, q_len, _ = x.shape
    normed = x
    if layernorm is not None:
        normed = (rms_norm(x, layernorm, eps=norm_epsilon) if layernorm_is_rms else
                  layer_norm(x, layernorm, layernorm_bias, eps=norm_epsilon))

    def project(name, y, weight, bias):
        out = y @ weight.astype(np.float64).T + bias
        for b, adapters in enumerate(loras or ()):
            for adapter in adapters:
                if name in adapter:
                    out[b] += y[b] @ adapter[name].T
        return out

    def finished(y, heads, gain):
        y = y.reshape(batch * q_len, heads, head_dim)
        if gain is not None:
            y = y if headnorm_is_rms else y - y.mean(-1, keepdims=True)
            y = y / np.sqrt((y * y).mean(-1, keepdims=True) + norm_epsilon) * gain.astype(np.float64)
        if positions is not None:
            y = rope(y, cos=cos, sin=sin, positions=positions.ravel(), style=rope_style, rotary_dim=rotary_dim)
        return y.reshape(batch, q_len, heads, head_dim)

    q = finished(project("q", normed, q_proj, q_bias), num_heads, q_norm)
    k = finished(project("k", normed, k_proj, k_bias), num_kv_heads, k_norm)
    v = project("v", normed, v_proj, v_bias).reshape(k.shape)
    keys, values = ([np.concatenate([old, new]) for old, new in zip(past, now, strict=True)]
                    for past, now in ((keys, k), (values, v)))
    scale = head_dim ** -0.5 if softmax_scale is None else softmax_scale
    sinks = np.full(num_heads, -np.inf) if sinks is None else sinks
    mixed = np.zeros((batch, q_len, num_heads, head_dim))
    if blocks is not None:
        q, k, v = (y.reshape(1, batch * q_len, *y.shape[2:]) for y in (q, k, v))
        label = np.searchsorted(blocks[1:], np.arange(batch * q_len), side="right")
        mask, causal = (label[:, None] == label)[None, None], False
    for b in range(len(q)):
        now_k, now_v = (k[0], v[0]) if blocks is not None else (keys[b], values[b])
        at = np.arange(len(now_k))
        n = len(now_k) - len(q[b]) + np.arange(len(q[b]))[:, None]
        visible = (at <= n) | (not causal)
        if window_size:
            visible = visible & (at > n - window_size) & (at < n + window_size)
        for h in range(num_heads):
            see, bias = _masked(mask, b, h, visible)
            g = h // (num_heads // num_kv_heads)
            out, _ = _attend(q[b, :, h], now_k[:, g], now_v[:, g], see, bias, scale, softcap, sinks[h])
            mixed.reshape(q.shape)[b, :, h] = out
    y = project("o", mixed.reshape(batch, q_len, -1), o_proj, o_bias)
    if post_layernorm is not None:
        y = (rms_norm(y, post_layernorm, eps=norm_epsilon) if layernorm_is_rms else
             layer_norm(y, post_layernorm, post_layernorm_bias, eps=norm_epsilon))
    return (x + y if has_residual else y), keys, values


def _masked(mask, b, h, visible):
    """What head h of sequence b sees under a mask [batch or 1, heads or 1, queries or 1, keys], and what it adds."""
    if mask is None:
        return visible, np.zeros(visible.shape)
    rows = np.broadcast_to(mask[b % len(mask), h % mask.shape[1]], (len(visible), mask.shape[-1]))
    rows = rows[:, :visible.shape[1]]
    rest = visible.shape[1] - rows.shape[1]   # keys past its end stay visible
    if mask.dtype == bool:
        return visible & np.pad(rows, ((0, 0), (0, rest)), constant_values=True), np.zeros(visible.shape)
    added = np.pad(np.minimum(rows.astype(np.float64), 0), ((0, 0), (0, rest)))
    return visible & (added > -np.inf), added
