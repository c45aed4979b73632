# SPDX-License-Identifier: Apache-2.0
import numpy as np


def _sequence(inputs, old, weight, bias, activation):
    """Outputs of `inputs` [tokens, channels] after `old` [some, channels], float64; zeros stand before both."""
    tokens, width = len(inputs), weight.shape[1]
    u = np.concatenate([np.zeros((width, inputs.shape[1])), old, inputs])
    out = np.zeros(inputs.shape) + (0 if bias is None else bias.astype(np.float64))
    for j in range(width):
        first = len(u) - tokens - (width - 1) + j
        out += weight[:, j].astype(np.float64) * u[first:first + tokens]
    if activation is not None:
        with np.errstate(over="ignore"):
            out = out / (1 + np.exp(-out))
    return out


def causal_conv1d(x, weight, bias=None, *, conv_states=None, cu_seqlens=None, slots=None, has_state=None,
                  activation=None):
    """The convolution in float64; `conv_states` is updated in place."""
    out = np.zeros(x.shape)
    starts = [0, len(x)] if cu_seqlens is None else cu_seqlens
    for b in range(len(starts) - 1):
        inputs = x[starts[b]:starts[b + 1]].astype(np.float64)
        slot = b if slots is None else slots[b]
        if slot < 0 or not len(inputs):
            continue
        old = np.zeros((0, x.shape[1]))
        if conv_states is not None:
            old = conv_states[slot].T.astype(np.float64)
            if has_state is not None and not has_state[b]:
                old = np.zeros_like(old)
            conv_states[slot] = np.concatenate([old, inputs])[len(inputs):].T.astype(conv_states.dtype)
        out[starts[b]:starts[b + 1]] = _sequence(inputs, old, weight, bias, activation)
    return out


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None,
                         conv_state_indices=None):
    """The next tokens in float64; `conv_state` is updated in place."""
    out = np.zeros(x.shape)
    by_token = out[:, None] if x.ndim == 2 else out.transpose(0, 2, 1)
    for b, inputs in enumerate(x[:, None] if x.ndim == 2 else x.transpose(0, 2, 1)):
        slot = b if conv_state_indices is None else conv_state_indices[b]
        if slot < 0:
            continue
        inputs, state = inputs.astype(np.float64), conv_state[slot]
        length = state.shape[1]
        ring = np.arange(length)   # place of each input, the oldest first
        if cache_seqlens is not None and length:
            ring = (cache_seqlens[b] + ring) % length
        old = state[:, ring].T.astype(np.float64)
        by_token[b] = _sequence(inputs, old, weight, bias, activation)
        if cache_seqlens is None:
            state[...] = np.concatenate([old, inputs])[len(inputs):].T.astype(state.dtype)
        elif length:
            for t, values in enumerate(inputs):
                state[:, (cache_seqlens[b] + t) % length] = values.astype(state.dtype)
    return out
